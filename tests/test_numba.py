"""The Numba backend: what its compiler made, its guard under every threading layer, its cache, and kernels in user code.

Whatever could hang or abort runs in a process of its own with a watchdog.  Bits are compared in test_same_bits.py, too.
"""

import compileall
import ctypes
import gc
import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, DTYPES, FUNCTIONS, THREADS_AT_ONCE, backends, bits, c, raw_recipe
from test_build import operations
from test_same_bits import scalar_reference, wild_buffers

import fastrms
from fastrms import rules, stored_call

pytestmark = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not installed")
if "numba" in BACKENDS:
    import numba
    from numba import njit, prange

    import fastrms.numba as jitted
    from fastrms.backends.numba import kernels

WATCHDOG = 200  # seconds
PACKAGE = Path(fastrms.__file__).parent
EXACT = "c" if c.lib else "numpy"  # what the bits are compared with


def layers():
    if "numba" not in BACKENDS:
        return []
    found = ["workqueue"]
    for name in ("omp", "tbb"):
        try:
            __import__(f"numba.np.ufunc.{name}pool")
            found.append(name)
        except ImportError:
            pass
    return found


def in_process(code, **environment):
    """Standard output of code in a fresh process that must end by itself."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                         timeout=WATCHDOG, cwd="/", env={**os.environ, **environment})  # fmt: skip
    assert run.returncode == 0, f"{run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout.strip()


# what is there


def test_without_numba_the_error_names_the_extra(monkeypatch):
    module = backends.load("numba")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"backend='numba' is not available: .*pip install numba"):
        fastrms.RMSProp(np.ones(3), backend="numba")
    assert "numba" not in fastrms.available_backends()


def test_fastrms_numba_without_numba_names_the_extra():
    assert in_process("""
        import sys
        sys.modules["numba"] = None
        import fastrms
        for load in (lambda: __import__("fastrms.numba"), lambda: fastrms.numba):
            try:
                load()
            except (ImportError, AttributeError) as error:
                assert "fastrms.numba needs Numba: pip install numba" in str(error), error
            else:
                raise SystemExit("it was imported")
    """) == ""  # fmt: skip


@pytest.mark.skipif(c.lib is None, reason="without C, auto is numba")
def test_numba_is_imported_only_when_it_is_used():
    assert in_process("""
        import sys, numpy as np, fastrms
        w = np.ones(3)
        fastrms.RMSProp(w).step(w + 1)
        fastrms.RMSProp(w, backend="numpy").step(w + 1)
        optimizer = fastrms.RMSProp(w, backend="numba")
        assert "numba" not in sys.modules
        optimizer.step(w + 1)
        assert "numba" in sys.modules
        print("fine")
    """) == "fine"  # fmt: skip


@pytest.mark.parametrize("imported", [False, True])
def test_with_jit_disabled_numba_says_so_and_auto_goes_on(imported):
    """It is set by people who measure coverage or look for a mistake."""
    code = textwrap.dedent("""
        import numpy as np, fastrms
        w = np.ones(3)
        assert "numba" not in fastrms.available_backends()
        fastrms.RMSProp(w).step(w + 1)
        for call, error in ((lambda: fastrms.RMSProp(w, backend="numba"), RuntimeError),
                            (lambda: __import__("fastrms.numba"), ImportError)):
            try:
                call()
                print("ran")
            except error as said:
                print(str(said).count("NUMBA_DISABLE_JIT"))
    """)
    assert in_process("import numba\n" * imported + code, NUMBA_DISABLE_JIT="1") == "1\n1"
    ran = "import numpy, fastrms.numba as f; f.rmsprop(numpy.ones(3), numpy.ones(3), numpy.ones(3)); print('ran')"
    assert in_process(ran, NUMBA_DISABLE_JIT="0") == "ran"


# what the compiler made


def machine_code(rule, general, dtype, parallel=False):
    """The assembly of a kernel that was compiled just now: what comes from disk shows none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kept", lambda text, name: 1 / 0)
        (text,) = kernels.kernel.__wrapped__(rule, general, dtype, parallel).inspect_asm().values()
    return text


def check_code(text, dtype, operations):
    suffix = "ps" if dtype.itemsize == 4 else "pd"
    for operation in operations:
        assert re.search(rf"\bv?{operation}{suffix}\s", text), f"no packed {operation}"
    assert not re.search(r"\bvfn?m(add|sub)", text), "FMA"
    assert not re.search(r"\bv?(rsqrt|rcp)", text), "estimate"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the instructions of x86-64 only")
@pytest.mark.parametrize("general, dtype", [(False, DTYPES[0]), (True, DTYPES[0]), (True, DTYPES[1])])
@pytest.mark.parametrize("rule", rules.RULES)
def test_every_kernel_is_vectorised_without_fma(rule, general, dtype):
    check_code(machine_code(rule, general, dtype), dtype, operations(rule))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the instructions of x86-64 only")
def test_the_parallel_kernel_is_vectorised_without_fma():
    check_code(machine_code("rmsprop", False, DTYPES[0], parallel=True), DTYPES[0], ("sqrt", "div"))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the instructions of x86-64 only")
@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"error_model": "python"}, "no packed"),
        ({"fastmath": {"contract"}}, "FMA"),
        ({"fastmath": True}, "no packed div"),
    ],
)
def test_the_check_of_the_code_bites(monkeypatch, options, complaint):
    monkeypatch.setattr(kernels, "OPTIONS", {**kernels.OPTIONS, **options})
    with pytest.raises(AssertionError, match=complaint):
        check_code(machine_code("rmsprop", True, DTYPES[0]), DTYPES[0], ("sqrt", "div"))


# threads

COMMON = (
    THREADS_AT_ONCE
    + """
    import os, signal, sys, threading, warnings
    import numpy as np, fastrms
    from fastrms.backends import numba as backend
    warnings.simplefilter("ignore")      # Python's own, of forks beside threads
    backend.LEAST = dict.fromkeys(backend.LEAST, 1000)
    backend.SMALLEST = 1000
    fastrms.set_num_threads(2)
    shared = []                          # sizes of the updates that ran on several threads
    run = backend.in_parallel

    def counted(update, number):
        ran = run(update, number)
        shared.extend([update.elements] * ran)
        return ran

    backend.in_parallel = counted

    def check(steps=5, size=50_001):
        w, g = np.zeros(size, np.float32), np.ones(size, np.float32)
        opt = fastrms.AdaGrad(w, backend="numba")
        for _ in range(steps):
            opt.step(g)
        state = opt.state["sum"]
        assert opt.steps == steps and (state == steps).all(), (opt.steps, state.min(), state.max())

    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(60)
                before = len(shared)
                work()
                os._exit(0 if len(shared) == before else 3)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
"""
)


def with_layer(code, layer, **environment):
    code = (
        textwrap.dedent(COMMON)
        + textwrap.dedent(code)
        + f"""
import numba
assert numba.threading_layer() == {layer!r} and shared, (numba.threading_layer(), shared)
print("fine")
"""
    )
    said = in_process(code, **{"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2", **environment})
    assert said.splitlines()[-1] == "fine"  # Numba's tbb layer says more at a fork


@pytest.mark.parametrize("layer", layers())
def test_six_python_threads_at_once(layer):
    """One runs in parallel, the others alone; without the guard workqueue aborts here."""
    with_layer("""
    at_once(6, lambda: [check(steps=20) for _ in range(10)])
    """, layer)  # fmt: skip


@pytest.mark.parametrize("layer", layers())
def test_fork_after_use_and_again_in_the_child(layer):
    """A child runs alone; under omp Numba would end it."""
    with_layer("""
    check()
    child(lambda: (check(), child(check), check()))
    check()
    """, layer)  # fmt: skip


@pytest.mark.parametrize("layer", layers())
def test_fork_while_other_threads_step(layer):
    """The child finds every optimizer between two steps: as many updates as its count says, and not busy."""
    with_layer("""
    made = []
    for size in (50_001, 200_003, 200):
        w = np.zeros(size, np.float32)
        opt = fastrms.AdaGrad([w, w.copy()], backend="numba")
        opt.bind([np.ones(size, np.float32), np.ones(size, np.float32)])
        opt.step()
        made.append(opt)
    stop = []

    def work(opt):
        while not stop:
            opt.step()

    runners = [threading.Thread(target=work, args=(opt,), daemon=True) for opt in made]
    for runner in runners:
        runner.start()

    def look():
        for opt in made:
            for state in opt.state["sum"]:
                assert (state == opt.steps).all(), (opt.steps, state.min(), state.max())
            opt.step()
            assert (opt.state["sum"][1] == opt.steps).all()

    for _ in range(60):
        child(look)
    stop.append(1)
    for runner in runners:
        runner.join()
    """, layer)  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("layer", layers())
def test_multiprocessing(layer, method, tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import multiprocessing as mp, numpy as np, fastrms\n"
        "def train(seed):\n"
        "    w = np.full(1_200_000, seed, np.float32)\n"
        "    opt = fastrms.RMSProp(w, lr=0.01, backend='numba')\n"
        "    for _ in range(5): opt.step(np.ones(1_200_000, np.float32))\n"
        "    return float(w[-1])\n"
        "if __name__ == '__main__':\n"
        "    here = [train(k) for k in range(4)]\n"
        f"    with mp.get_context({method!r}).Pool(3) as pool:\n"
        "        assert pool.map(train, range(4)) == here\n"
        "    print('fine', len(set(here)))\n"
    )
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer, "FASTRMS_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WATCHDOG, env=environment)
    assert run.stdout.strip() == "fine 4", run.stdout + run.stderr


@pytest.mark.parametrize("layer", layers())
def test_a_users_number_of_numba_threads_stays(layer):
    """Ours is lower or higher for the time of a step."""
    with_layer("""
    import numba
    for ours, theirs in ((2, 1), (2, 3), (3, 3)):
        fastrms.set_num_threads(ours)
        numba.set_num_threads(theirs)
        before = len(shared)
        check()
        assert numba.get_num_threads() == theirs and len(shared) == before + 5
    """, layer, NUMBA_NUM_THREADS="3")  # fmt: skip


def test_small_steps_one_thread_and_a_missing_layer_run_alone():
    code = """
        import numpy as np, fastrms, numba
        from fastrms.backends import numba as backend
        guarded = backend.in_parallel
        backend.in_parallel = lambda *arguments: guarded(*arguments) and 1 / 0
        def step(size):
            w = np.zeros(size)
            fastrms.AdaGrad(w, backend="numba", lr=1.0).step(np.ones(size))
            assert np.allclose(w, -1)
        {what}
        print("fine")
    """  # fmt: skip
    small = code.format(what="fastrms.set_num_threads(8); step(backend.SMALLEST - 1)")
    alone = code.format(what="fastrms.set_num_threads(1); step(1_000_000)")
    assert in_process(small) == in_process(alone) == "fine"
    nothing = code.format(what="fastrms.set_num_threads(8); step(1_000_000); assert backend.started() == (None, 1)")
    assert in_process(nothing, NUMBA_THREADING_LAYER="nothing") == "fine"


# every update runs on several threads; `shared` has the numbers of threads that were asked for then
ALL_SHARED = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import numpy as np, fastrms
    from conftest import backends, bits, raw_recipe
    from test_same_bits import rules, wild_buffers
    module = backends.load("numba")
    module.LEAST = dict.fromkeys(module.LEAST, 1)
    module.SMALLEST = 1
    shared, run = set(), module.in_parallel
    module.in_parallel = lambda *rest: run(*rest) and not shared.add(fastrms.get_num_threads())
"""


def test_same_bits_for_every_thread_count():
    """Each rule in parallel by 1 to 8 threads, at lengths that leave some of them little or nothing."""
    assert in_process(textwrap.dedent(ALL_SHARED) + textwrap.dedent("""
        for rule in rules.RULES:
            for dtype, general in ((np.dtype("f4"), False), (np.dtype("f8"), True)):
                recipe = raw_recipe(rule, dtype, general)
                for size in (1, 2, 7, 63, 1003, 100_003):
                    buffers = wild_buffers(rule, dtype, size)
                    results = []
                    for backend, counts in (("numpy", [1]), ("numba", range(1, 9))):
                        for count in counts:
                            fastrms.set_num_threads(count)
                            param, grad, *states = [b.copy() for b in buffers]
                            backends.load(backend).update(recipe, 1, 1.0, param, grad, states)
                            results.append([bits(b) for b in (param, *states)])
                    for result in results:
                        assert all(np.array_equal(a, b) for a, b in zip(result, results[0])), (rule, size, count)
        assert shared == set(range(2, 9)), shared
        print("fine")
    """), NUMBA_NUM_THREADS="8") == "fine"  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills what is freed")
@pytest.mark.parametrize("layer", layers())
def test_nothing_that_threads_share_is_freed_too_early(layer):
    """Freed memory is filled at once, with what is no number of a chunk."""
    with_layer("""
    check()
    """, layer, MALLOC_PERTURB_="85", GLIBC_TUNABLES="glibc.malloc.tcache_count=0")  # fmt: skip


def test_many_tensors_share_the_threads():
    """Whatever their sizes: chunks of a thread begin and end in any of them."""
    assert in_process(textwrap.dedent(ALL_SHARED) + textwrap.dedent("""
        sizes = [0, 1, 8191, 8192, 8193, 7, 0, 50_021, 16_384, 3]
        rng = np.random.default_rng(7)
        start, grads = [[rng.standard_normal(size) for size in sizes] for _ in range(2)]
        for skipped in ([], [3], [0, 7, 9]):
            results = []
            for backend, threads in (("numpy", 1), ("numba", 1), ("numba", 2), ("numba", 5)):
                fastrms.set_num_threads(threads)
                params = [p.copy() for p in start]
                optimizer = fastrms.Adam(params, lr=0.1, backend=backend)
                for step in range(3):
                    optimizer.step([None if step == 1 and k in skipped else g for k, g in enumerate(grads)])
                results.append([bits(p) for p in params])
            for result in results:
                assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True)), skipped
        assert shared == {2, 5}, shared
        print("fine")
    """), NUMBA_NUM_THREADS="8") == "fine"  # fmt: skip


def test_parallel_without_the_c_extension():
    """Numba is what auto means then, and fastrms still counts the threads."""
    assert in_process("""
        import sys
        sys.modules["fastrms._core"] = None
        import numpy as np, fastrms
        from fastrms.backends import numba as backend
        assert fastrms.isa() is None and fastrms.available_backends() == ("numba", "numpy")
        assert fastrms.get_num_threads() == 5
        fastrms.set_num_threads(2)
        shared, run = [], backend.in_parallel
        backend.in_parallel = lambda *rest: run(*rest) and not shared.append(fastrms.get_num_threads())
        results = []
        for name in ("auto", "numpy"):
            w = np.linspace(-1, 1, 2_000_003)
            fastrms.Adam(w, backend=name).step(np.cos(w))
            results.append(w)
        assert np.array_equal(*results) and shared == [2], shared
        print("fine")
    """, FASTRMS_NUM_THREADS="5", NUMBA_NUM_THREADS="2") == "fine"  # fmt: skip


# the cache on disk

ONE_STEP = """
    import sys, numpy as np, fastrms
    w, g = np.linspace(-1, 1, 1003), np.linspace(3, 4, 1003)
    other = w.copy()
    fastrms.RMSProp(w, backend="numba", **OPTIONS).step(g)
    fastrms.RMSProp(other, backend="numpy", **OPTIONS).step(g)
    assert np.array_equal(w, other)
    from fastrms.backends.numba import kernels
    found = kernels.kernel(*KERNEL, w.dtype, False)
    print(sum(found.stats.cache_hits.values()), sum(found.stats.cache_misses.values()), float(w[0]))
"""


def one_step(cache_dir, options="{}", kernel="('rmsprop', False)", **environment):
    """(hits, misses, a weight) of one step in a new process with this cache."""
    code = textwrap.dedent(ONE_STEP).replace("OPTIONS", options).replace("KERNEL", kernel)
    hits, misses, weight = in_process(code, NUMBA_CACHE_DIR=str(cache_dir), **environment).split()
    return int(hits), int(misses), float(weight)


def test_the_second_process_compiles_nothing_and_a_swapped_form_is_noticed(tmp_path):
    assert one_step(tmp_path)[:2] == (0, 1)
    assert one_step(tmp_path)[:2] == (1, 0)
    general = one_step(tmp_path, "{'clip_value': 1.0}", "('rmsprop', True)")
    assert general[:2] == (0, 1)
    assert one_step(tmp_path, "{'clip_value': 1.0}", "('rmsprop', True)") == (1, 0, general[2])
    assert one_step(tmp_path)[:2] == (1, 0)


def test_an_edited_rule_is_noticed(tmp_path):
    """Also one of the functions that it calls; the old code stays for the old text."""
    package = tmp_path / "fastrms"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    text = (package / "rules.py").read_text()
    cache_dir, path = tmp_path / "cache", {"PYTHONPATH": str(tmp_path)}
    first = one_step(cache_dir, **path)
    for old, new in (
        ("u = in_scale * g / (sqrt(w) + eps)\n    param", "u = in_scale * g / (sqrt(w) + one_minus_rho)\n    param"),
        ("g = grad * grad_scale\n", "g = grad * grad_scale * grad_scale + param\n"),
    ):  # fmt: skip
        assert text.count(old) >= 1
        (package / "rules.py").write_text(text.replace(old, new, 1))
        edited = one_step(cache_dir, **path)
        assert edited[:2] == (0, 1) and edited[2] != first[2]
    (package / "rules.py").write_text(text)
    assert one_step(cache_dir, **path) == (1, 0, first[2])


def test_an_edited_intrinsic_is_noticed(tmp_path):
    """What a kernel calls stands in another file than its text."""
    package = tmp_path / "fastrms"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    file, path = package / "backends" / "numba" / "intrinsics.py", {"PYTHONPATH": str(tmp_path)}
    text, old = file.read_text(), "all_caches, data = flag(0), flag(3)"
    assert text.count(old) == 1 and one_step(tmp_path / "cache", **path)[:2] == (0, 1)
    file.write_text(text.replace(old, "all_caches, data = flag(0), flag(2)"))
    assert one_step(tmp_path / "cache", **path)[:2] == (0, 1)
    file.write_text(text)
    assert one_step(tmp_path / "cache", **path)[:2] == (1, 0)


def test_without_sources_kernels_are_compiled_and_not_kept(tmp_path):
    """As in an application that was frozen: the rules are there as code only."""
    package = tmp_path / "fastrms"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    compileall.compile_dir(package, quiet=2, legacy=True)
    for source in package.rglob("*.py"):
        source.unlink()
    first = one_step(tmp_path / "cache", PYTHONPATH=str(tmp_path))
    assert first[0] == 0 and not list((tmp_path / "cache").rglob("*.nb?"))
    assert first[2] == one_step(tmp_path / "other")[2]


def test_read_only_installation_and_unwritable_home(tmp_path):
    """With no place to write, kernels are compiled and not kept; whoever may write anything does not matter (root may)."""
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    package = tmp_path / "fastrms"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [package, *package.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    environment = {"HOME": str(nowhere), "XDG_CACHE_HOME": "", "PYTHONPATH": str(tmp_path)}
    try:
        assert one_step("", **environment)[0] == 0
        assert one_step("", **environment)[0] == 0
        assert not list(package.rglob("*.nb?"))
    finally:
        for path in [package, *package.rglob("*")]:
            path.chmod(0o755)


def test_a_torn_cache_is_done_without(tmp_path):
    want = one_step(tmp_path)
    for path in (tmp_path / "fastrms").rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:100])
    assert one_step(tmp_path)[2] == want[2]


def test_eight_processes_fill_one_cache_at_once(tmp_path):
    code = textwrap.dedent(ONE_STEP).replace("OPTIONS", "{}").replace("KERNEL", "('rmsprop', False)")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(8)]
    answers = {run.communicate(timeout=WATCHDOG)[0].split()[-1] for run in runs}
    assert len(answers) == 1 and all(run.returncode == 0 for run in runs)
    assert one_step(tmp_path)[:2] == (1, 0)


# in people's own code


def state_of(name, **options):
    w = np.zeros((20, 51), np.float32)
    return list(fastrms.init_state(name, w, **options))


UPDATES = [
    ("rmsprop", {}),
    ("rmsprop", {"lr": 0.02, "rho": 0.9, "eps": 1e-6, "clip_value": 0.5, "weight_decay": 0.1, "maximize": True}),
    ("rmsprop", {"momentum": 0.9, "nesterov": True, "lr_in_momentum": True, "bias_correction": "corrected", "step": 5}),
    ("rmsprop", {"momentum": 0.9, "bias_correction": "folded", "step": 17, "weight_decay": 0.1, "decoupled": True}),
    ("rmsprop", {"centered": True, "eps_root": 1e-6, "grad_scale": 0.25}),
    ("rmsprop", {"centered": True, "momentum": 0.5}),
    ("adagrad", {}),
    ("adagrad", {"lr_decay": 0.01, "step": 7, "decoupled": True, "weight_decay": 0.1, "clip_value": 2.0}),
    ("adam", {"step": 1}),
    ("adam", {"step": 1000, "weight_decay": 0.01, "decoupled": True, "maximize": True, "grad_scale": 0.1}),
    ("adam", {"step": 3, "nesterov": "dozat", "eps_root": 1e-8}),
    ("adam", {"step": 3, "nesterov": "dozat", "bias_correction": "folded"}),
    ("adam", {"step": 3, "nesterov": "folded", "bias_correction": "folded", "clip_value": 0.1}),
    ("adam", {"step": 3, "bias_correction": False}),
    ("adam", {"step": 3, "amsgrad": True}),
    ("adam", {"step": 9, "amsgrad": "corrected", "eps_root": 1e-7}),
    ("rprop", {}),
    ("rprop", {"zero_on_flip": False, "clip_value": 0.5, "eta_plus": 1.5}),
]


def user_code(name, options, states):
    """An @njit function of somebody else's that makes this update, serial or parallel, among other things."""
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    optional = ("grad_avg", "momentum_buffer", "max_exp_avg_sq")
    passed = ", ".join(f"{state}={state}" if state in optional else state for state in states)
    text = (f"def train(w, g, {', '.join(states)}):\n"
            f"    total = 0.0\n    for i in prange(g.size):\n        total += g.flat[i] * 0\n"
            f"    update(w, g, {passed}, {given})\n    return total\n")  # fmt: skip
    found = {}
    exec(text, {"update": getattr(jitted, name), "prange": prange}, found)
    return found["train"]


@pytest.mark.parametrize("name, options", UPDATES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "defaults")
def test_an_update_inside_users_code(name, options):
    """float32 and float64, matrices in C and Fortran order, in @njit and @njit(parallel=True): the bits of C."""
    hyper = {k: v for k, v in options.items() if k not in ("step", "grad_scale")}
    states = state_of(name, **hyper)
    inside = {k: v for k, v in options.items() if k != "centered"}
    rng = np.random.default_rng(4)
    for form, parallel, dtype, order in ((name, False, "f4", "C"), (f"{name}_parallel", True, "f8", "F")):
        function = njit(parallel=parallel)(user_code(form, inside, states))
        buffers = [np.asarray(np.abs(rng.standard_normal((20, 51))), dtype, order=order) for _ in range(2 + len(states))]
        buffers[1] -= 0.7
        mine, theirs = [b.copy(order="K") for b in buffers], [b.copy(order="K") for b in buffers]
        function(*mine)
        call = dict(zip(("param", "grad", *states), theirs, strict=True))
        getattr(fastrms, name)(**call, **{k: v for k, v in options.items() if k != "centered"}, backend=EXACT)
        assert not np.array_equal(bits(mine[0]), bits(buffers[0]))
        assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(mine, theirs, strict=True))


def test_keywords_and_defaults_are_those_of_fastrms():
    for name in FUNCTIONS:
        theirs = {p.name: p.default for p in inspect.signature(getattr(fastrms, name)).parameters.values()}
        mine = {p.name: p.default for p in inspect.signature(getattr(jitted, name).py_func).parameters.values()}
        left_out = theirs.keys() - mine.keys()
        of_formats = {*stored_call.OPTIONS, *(["step"] if name == "rprop" else [])}
        assert left_out <= {"dialect", "backend", *of_formats} and mine.keys() <= theirs.keys()
        for key, default in mine.items():
            assert default == theirs[key] or key in ("step", "amsgrad"), key


def test_what_cannot_be_is_refused():
    w, v = np.ones(6), np.ones(6)
    for bad in ((w, w.astype("f4"), v), (w[::2], w[::2], v[::2]), (w.astype(int),) * 3, (w.reshape(2, 3), w, v)):
        with pytest.raises(numba.errors.TypingError, match=r"fastrms (updates contiguous|needs) arrays"):
            jitted.rmsprop(*bad)
    for options in ({"momentum": 0.9}, {"momentum_buffer": w.copy()}, {"bias_correction": "folding"}):
        with pytest.raises(ValueError, match="fastrms"):
            jitted.rmsprop(w, w, v, **options)
    with pytest.raises(numba.errors.TypingError, match="fastrms has no rule of Adam with just the states exp_avg\n"):
        jitted.adam(w, w, v, None, 1)
    for name, word, said in (("rmsprop", "momentum", {"momentum": 0.9}), ("adam", "amsgrad", {"amsgrad": True})):
        with pytest.raises(ValueError, match=f"fastrms: {word} and .* go together"):
            called(name, [x.copy() for x in (w, w, v, v)[: ARGUMENTS[name]]], **said)
    for options, words in (
        ({"nesterov": True}, "nesterov must be one of False, 'dozat', 'folded'"),
        ({"bias_correction": "folding"}, "bias_correction must be one of False, True, 'corrected', "),
    ):
        with pytest.raises(ValueError, match=f"fastrms: {words}"):
            jitted.adam(w, w, v, v, 1, **options)
    with pytest.raises(ValueError, match="one shape"):
        jitted.rmsprop(w, w[:5], v)
    for options in ({"nesterov": True}, {"amsgrad": True}, {"amsgrad": "corrected"}):
        with pytest.raises(ValueError, match="fastrms"):
            jitted.adam(w, w, v, v, 1, **options)
    assert (w == 1).all() and (v == 1).all()


ARGUMENTS = {"rmsprop": 3, "adagrad": 3, "adam": 4, "rprop": 4}


def called(name, buffers, **options):
    step = (options.pop("step", 1),) if name == "adam" else ()
    return getattr(jitted, name)(*buffers, *step, **options)


def read_only(size):
    array = np.ones(size, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("function", [*ARGUMENTS, "rmsprop_parallel"])
def test_only_grad_may_be_read_only(function):
    """A read-only map of a file would end the process."""
    name = function.removesuffix("_parallel")
    for k in range(ARGUMENTS[name]):
        buffers = [read_only(6) if k == j else np.ones(6, np.float32) for j in range(ARGUMENTS[name])]
        step = (1,) if name == "adam" else ()
        if k == 1:
            getattr(jitted, function)(*buffers, *step)
            assert (buffers[0] != 1).all()
            continue
        with pytest.raises(numba.errors.TypingError, match="of these arrays only grad may be read-only"):
            getattr(jitted, function)(*buffers, *step)
        assert all((buffer == 1).all() for buffer in buffers)


OUT_OF_RANGE = [
    *[(name, {"lr": lr}) for name in ("rmsprop", "adagrad", "adam") for lr in (-0.1, float("nan"), float("inf"), 1e39)],
    *[(name, {"weight_decay": -0.1}) for name in ("rmsprop", "adagrad", "adam")],
    *[(name, {"clip_value": value}) for name in ARGUMENTS for value in (0.0, -1.0, float("nan"), float("inf"), 1e-46)],
    *[(name, {"eps": value}) for name in ("rmsprop", "adagrad", "adam") for value in (-1e-8, float("nan"))],
    *[(name, {"eps_root": -1e-8}) for name in ("rmsprop", "adagrad", "adam")],
    *[(name, {"eps": 0.0}) for name in ("rmsprop", "adam")], ("adam", {"eps": 1e-60}),
    *[("rmsprop", {"rho": value}) for value in (1.0, -0.1, float("nan"), 1 - 1e-9)],
    *[("adam", {rate: value}) for rate in ("beta1", "beta2") for value in (1.0, -0.1, float("nan"), 1 - 1e-9)],
    ("rmsprop", {"momentum": -0.5}), ("rmsprop", {"momentum": float("nan")}), ("rmsprop", {"nesterov": True}),
    ("adagrad", {"lr_decay": -1.0}), ("adam", {"amsgrad": "corrected"}),
    *[("rprop", wrong) for wrong in ({"eta_minus": 1.0}, {"eta_minus": 0.0}, {"eta_plus": 1.0}, {"step_min": 51.0})],
    ("rprop", {"step_max": float("inf")}), ("rprop", {"step_min": -1.0}),
    *[(name, {"grad_scale": value}) for name in ARGUMENTS for value in (0.0, -1.0, 1e-31, 1e31, float("nan"))],
    *[(name, {"step": step}) for name in ("rmsprop", "adagrad", "adam") for step in (0, -1, 2**62 + 1)],
]  # fmt: skip


@pytest.mark.parametrize("name, wrong", OUT_OF_RANGE, ids=str)
def test_what_python_refuses_jitted_code_refuses_before_it_writes(name, wrong):
    """The sentence names the hyper-parameter that Python names."""
    buffers = [np.ones(6, np.float32) for _ in range(ARGUMENTS[name])]
    needs_step = {"step": 1} if name == "adam" else {}
    with pytest.raises(ValueError) as theirs:
        getattr(fastrms, name)(*buffers, **{**needs_step, **wrong})
    with pytest.raises(ValueError, match="fastrms: ") as mine:
        called(name, buffers, **wrong)
    (named,) = {*wrong} & {*re.findall(r"\w+", str(mine.value))}
    assert named in str(theirs.value) and all((buffer == 1).all() for buffer in buffers)


@pytest.mark.parametrize("options", [{"step": 1.0}, {"step": True}, {"lr": "0.1"}, {"lr": True}, {"maximize": 1},
                                     {"nesterov": 1.0}, {"bias_correction": 2}, {"grad_scale": True}])  # fmt: skip
def test_arguments_of_another_kind_are_refused_when_the_function_is_compiled(options):
    buffers = [np.ones(6, np.float32) for _ in range(4)]
    with pytest.raises(numba.errors.TypingError, match="fastrms takes"):
        called("adam", buffers, **options)
    assert all((buffer == 1).all() for buffer in buffers)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("wrong", [[1.0, 2.0], 1.0])
def test_what_is_no_array_is_refused_when_the_function_is_compiled(name, wrong):
    for k in range(ARGUMENTS[name]):
        buffers = [np.ones(2) for _ in range(ARGUMENTS[name])]
        buffers[k] = wrong
        with pytest.raises(numba.errors.TypingError, match="fastrms updates contiguous arrays of float32 or float64, not"):
            called(name, buffers)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_buffers_that_overlap_are_refused(name):
    """By one element, in any order; neighbours are fine."""
    count = ARGUMENTS[name]
    for first in range(count):
        for second in range(first):
            buffers = [np.ones(6, np.float32) for _ in range(count)]
            both = np.ones(11, np.float32)
            buffers[first], buffers[second] = both[5:], both[:6]
            with pytest.raises(ValueError, match="overlap"):
                called(name, buffers)
            assert (both == 1).all() and all((buffer == 1).all() for buffer in buffers)
    arena = np.ones((count, 6), np.float32)
    called(name, list(arena))
    assert (arena[0] != 1).all()
    called(name, [np.ones(0, np.float32)] * count)


def test_misaligned_arrays_are_refused():
    odd = np.zeros(25, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="aligned"):
        jitted.rmsprop(odd, np.ones(6, np.float32), np.ones(6, np.float32))


def test_adagrad_without_eps_in_jitted_code():
    w, g, total = np.ones(3), np.array([1.0, 0.0, 2.0]), np.ones(3)
    jitted.adagrad(w, g, total, eps=0.0)
    assert np.isfinite(w).all() and (w != 1).any()
    total[1] = 0
    before = w.copy()
    with pytest.raises(ValueError, match="sum holds a 0"):
        jitted.adagrad(w, g, total, eps=0.0)
    assert np.array_equal(w, before)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("rule", ["rmsprop", "rmsprop_centered_momentum", "adagrad", "adam_amsgrad", "rprop"])
def test_a_scalar_rule_inside_users_code(rule, general):
    """Coefficients that come as Python floats do not promote float32."""
    function = rules.RULES[rule]
    scalar = getattr(jitted.rules if general else jitted.neutral_rules, rule)
    states = rules.state_names(function)
    names = ["w", *states]
    text = (f"def train(w, g, {', '.join(states)}, numbers):\n    for i in range(w.size):\n"
            f"        {', '.join(f'{name}[i]' for name in names)} = rule(w[i], g[i], "
            f"{', '.join(f'{name}[i]' for name in states)}, *numbers)\n")  # fmt: skip
    found = {}
    exec(text, {"rule": scalar}, found)
    for dtype in DTYPES:
        recipe = raw_recipe(rule, dtype, general)
        buffers = wild_buffers(rule, dtype, 503)
        want = scalar_reference(recipe, buffers)
        mine = [b.copy() for b in buffers]
        njit(error_model="numpy")(found["train"])(*mine, tuple(recipe.at(1, 1.0)))
        for got, expected in zip([mine[0], *mine[2:]], want, strict=True):
            assert np.array_equal(bits(got), bits(expected))


# one bound C step from code without Python


@pytest.mark.skipif(c.lib is None, reason="c_step is the C backend's")
def test_c_step_from_jitted_code():
    w, g = np.linspace(-1, 1, 100).astype("f4"), np.empty(100, "f4")
    optimizer = fastrms.Adam(w, lr=0.1, backend="c")
    optimizer.bind(g)
    function, plan = optimizer.c_step
    step = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(function)

    @njit
    def train(w, g, steps):
        refused = 0
        for _ in range(steps):
            for i in range(w.size):
                g[i] = w[i] * np.float32(2)
            refused |= step(plan)
        return refused

    other = w.copy()
    assert train(w, g, 20) == 0 and optimizer.steps == 20
    reference = fastrms.Adam(other, lr=0.1, backend="numpy")
    for _ in range(20):
        reference.step(other * np.float32(2))
    assert np.array_equal(w, other)
    optimizer.step(g.copy())
    assert step(plan) == backends.NOT_HELD


@pytest.mark.skipif(c.lib is None, reason="c_step is the C backend's")
def test_c_step_is_refused_where_a_step_needs_python():
    w = np.ones(3)
    optimizer = fastrms.RMSProp(w, backend="c")
    with pytest.raises(RuntimeError, match="bind"):
        _ = optimizer.c_step
    with pytest.raises(RuntimeError, match="backend='c', this RMSProp runs on 'numpy'"):
        _ = fastrms.RMSProp(w, backend="numpy").c_step
    scheduled = fastrms.RMSProp(w, lr=lambda step: 0.1, backend="c")
    scheduled.bind(w + 1)
    with pytest.raises(RuntimeError, match="callable lr"):
        _ = scheduled.c_step


@pytest.mark.parametrize("size", [7, 1 << 17])
def test_gradients_of_former_steps_are_freed_at_once(size):
    """Without the cyclic garbage collector: it comes after hundreds of steps."""
    optimizer = fastrms.RMSProp([np.ones(size, np.float32), np.ones(3, np.float32)], backend="numba")
    gc.collect()
    gc.disable()
    try:
        grads = [[np.ones(size, np.float32), np.ones(3, np.float32)] for _ in range(3)]
        former = [weakref.ref(grad) for pair in grads for grad in pair]
        while grads:
            optimizer.step(grads.pop())
        optimizer.step([np.ones(size, np.float32), None])
        assert not any(ref() is not None for ref in former)
    finally:
        gc.enable()


KEPT = """
    import numba, numpy as np, fastrms.numba as fn

    @numba.njit(cache=True)
    def train(w, g, m, v):
        fn.rmsprop(w, g, v, lr=0.1)
        fn.adam(w, g, m, v, 1)
        w[0], v[0] = fn.neutral_rules.adagrad(w[0], g[0], v[0], 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.1, 1e-8, 0.0, 0.0, 0.0)

    arrays = [np.full(70_000, x, np.float32) for x in (1, 2, 0, 0)]
    train(*arrays)
    print([x[0].tobytes().hex() for x in arrays], sum(train.stats.cache_hits.values()))
"""


def run_kept(script, **environment):
    """The process of a script with a function that Numba keeps, without NUMBA_CACHE_DIR in the __pycache__ beside it."""
    script.write_text(textwrap.dedent(KEPT))
    known = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WATCHDOG,
                          env={**known, **environment})  # fmt: skip


def results(run):
    """(bits, how often the function was found in Numba's cache)"""
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().rsplit(" ", 1)


def test_a_function_of_ones_own_may_be_kept(tmp_path):
    """cache=True: the second process loads the function, and with it the kernels that it calls, without compiling."""
    script, environment = tmp_path / "kept.py", {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    (first, hits), (second, more) = (results(run_kept(script, **environment)) for _ in range(2))
    assert first == second and (hits, more) == ("0", "1")


@pytest.mark.parametrize("gone", ["removed", "unwritable", "never there"])
def test_a_function_of_ones_own_outlives_the_kernels(tmp_path, gone):
    """They are made anew where their folder was removed, cannot be written, or could not even in the first process."""
    script, cache, nowhere = tmp_path / "kept.py", tmp_path / "cache", tmp_path / "file"
    nowhere.write_text("")
    first, _ = results(run_kept(script, XDG_CACHE_HOME=str(nowhere if gone == "never there" else cache)))
    assert list((tmp_path / "__pycache__").glob("*.nbc")) and cache.exists() == (gone != "never there")
    shutil.rmtree(cache, ignore_errors=True)
    second, hits = results(run_kept(script, XDG_CACHE_HOME=str(cache if gone == "removed" else nowhere)))
    assert first == second and hits == "1"
    assert bool(list(cache.rglob("fastrms_*.py"))) == (gone == "removed")


def test_kernels_of_another_version_cannot_be_made_anew(tmp_path):
    """The error says what to delete; a name that is none of ours is left to others."""
    finder = kernels.Kept.find_spec
    with pytest.raises(ImportError, match=r"fastrms_adam_neutral_float32_0.*delete the files of this function"):
        finder(f"fastrms_adam_neutral_float32_{'0' * 24}")
    with pytest.raises(ImportError, match="delete the files"):
        finder(f"fastrms_lost_neutral_float32_{'0' * 24}")
    assert finder("fastrms_utilities") is finder("fastrms") is None
