"""Promise 4: steps on several threads have the same bits, and nothing hangs: fork, many callers, nesting, quotas, signals.

Everything that could hang runs in a process of its own with a watchdog.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import THREADS_AT_ONCE, bits, c, forced
from hypothesis import given, settings
from hypothesis import strategies as st
from test_same_bits import OPTIMIZERS, many_steps

import fastrms
from fastrms import threads

pytestmark = pytest.mark.skipif(c.lib is None, reason="without the C extension there are no threads")
ROOT = Path(__file__).resolve().parent.parent
WATCHDOG = 90  # seconds
SOURCES = sorted(map(str, (ROOT / "csrc").glob("*.c")))


@pytest.mark.parametrize("make, options", OPTIMIZERS)
@pytest.mark.parametrize("isa", c.isas())
def test_same_bits_for_every_thread_count_and_chunk(pool, isa, make, options):
    dtypes = [np.float32, np.float64, np.float32, np.float64, np.float32]
    want, _ = many_steps(make, options, "numpy", dtypes, steps=12)
    with forced(isa):
        for count in range(1, 9):
            for chunk in (1, 7, 64, 333, 100_000):
                pool(count, chunk)
                got, _ = many_steps(make, options, "c", dtypes, steps=12)
                assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), (count, chunk)
    assert c.lib.fastrms_workers() == 7


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_of_a_large_step(pool, dtype):
    """Sizes at which threads are used by default, with the norm in several segments."""
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal(1_000_003).astype(dtype), rng.standard_normal(1_000_003).astype(dtype)
    results = []
    for count, chunk in ((1, 16384), (2, 16384), (3, 4096), (8, 99_991)):
        pool(count, chunk)
        param = start.copy()
        optimizer = fastrms.AdamW(param, backend="c")
        norms = [optimizer.step(grad, clip_norm=10.0).grad_norm for _ in range(3)]
        state = [np.zeros_like(param) for _ in range(2)]
        other = start.copy()
        fastrms.adam(other, grad, *state, step=1, backend="c")
        results.append([bits(param), bits(other), bits(state[1]), norms])
    for result in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_small_steps_start_no_thread():
    """A single step wakes workers from 320 Ki elements on, a step that follows closely on another shares from 32 Ki on."""
    assert in_process("""
        import time
        import numpy as np, fastrms
        from fastrms.backends import c
        fastrms.set_num_threads(4)

        def workers_after(size, steps):
            w = np.ones(size, np.float32)
            opt = fastrms.RMSProp(w)
            opt.bind(np.ones(size, np.float32))
            time.sleep(0.01)
            for _ in range(steps):
                opt.step()
            return c.lib.fastrms_workers()

        assert workers_after(327679, 1) == 0
        assert workers_after(32767, 100) == 0
        assert workers_after(32768, 1) == 0
        assert workers_after(32768, 100) == 3
        print("fine")
    """) == "fine"  # fmt: skip
    assert in_process("""
        import numpy as np, fastrms
        from fastrms.backends import c
        fastrms.set_num_threads(4)
        w = np.ones(327680, np.float32)
        fastrms.RMSProp(w).step(w + 1)
        assert c.lib.fastrms_workers() == 3
        print("fine")
    """) == "fine"  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_workers_leave_the_cpus_of_the_process_alone():
    """A worker that moves away from its caller stays on the CPUs of the process; the caller's own mask does not change."""
    assert in_process("""
        import os
        import numpy as np, fastrms
        allowed = os.sched_getaffinity(0)
        fastrms.set_num_threads(3)
        w = np.ones(400_003, np.float32)
        opt = fastrms.RMSProp(w)
        opt.bind(np.ones_like(w))
        for _ in range(300):
            opt.step()
        assert os.sched_getaffinity(0) == allowed
        masks = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
        assert masks and all(mask and mask <= allowed for mask in masks), masks
        print("fine")
    """) == "fine"  # fmt: skip


def in_process(code, python=sys.executable, patience=WATCHDOG, **environment):
    """Standard output of code in a fresh process that must end by itself."""
    import os
    import textwrap

    run = subprocess.run([python, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True,
                         timeout=patience, env={**os.environ, **environment})  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


COMMON = (
    THREADS_AT_ONCE
    + """
    import os, sys, threading, signal, time
    import numpy as np, fastrms
    from fastrms.backends import c
    fastrms.set_num_threads(3)
    c.lib.fastrms_set_chunks(1000, 1)

    def check(steps=5, size=50_001):
        w, total = np.zeros(size, np.float32), np.zeros(size, np.float32)
        opt = fastrms.AdaGrad(w)
        g = np.ones(size, np.float32)
        for _ in range(steps):
            opt.step(g)
        state = opt.state["sum"]
        assert opt.steps == steps and (state == steps).all(), (opt.steps, state.min(), state.max())
        assert len(os.listdir("/proc/self/task")) >= fastrms.get_num_threads()

    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(30)
                work()
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
"""
)


def test_fork_after_use_and_again_in_the_child():
    """No DeprecationWarning about threads either (-W error): the workers are gone before the fork."""
    assert in_process(COMMON + """
    check()
    child(lambda: (check(), child(check), check()))
    check()
    print("fine")
    """) == "fine"  # fmt: skip


def fork_while_others_step(forks, **options):
    return in_process(COMMON + f"    forks = {forks}\n" + """
    sizes = (50_001, 200)      # one shared out, one run by its caller alone
    made = []
    for size in sizes:
        w = np.zeros(size)         # float64, which counts beyond 2**24
        opt = fastrms.AdaGrad(w)
        opt.bind(np.ones(size))
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
            seen, state = opt.steps, opt.state["sum"]
            assert (state == seen).all(), (seen, state.min(), state.max())
            opt.step()
            assert opt.steps == seen + 1 and (state == seen + 1).all()

    import warnings
    warnings.simplefilter("ignore")      # Python's own: there are threads, the runners
    for _ in range(forks):
        child(look)
    stop.append(1)
    for runner in runners:
        runner.join()
    print("fine")
    """, **options)  # fmt: skip


def test_fork_while_other_threads_step():
    """The child finds every optimizer between two steps: as many updates as its count says, and not busy."""
    assert fork_while_others_step(200) == "fine"


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_the_first_step_imports_nothing(backend):
    """A child that is forked while another thread imports a module waits for ever where it needs this module: numpy.ma was
    imported by the first optimizer, fastrms.schedules by the first load_state_dict()."""
    assert in_process("""
    import sys
    import numpy as np, fastrms
    from fastrms import backends
    w = np.ones(300_007, np.float32)
    """ + f"backend = {backend!r}" + """
    before = {*sys.modules}
    for name in backends.HOST:
        backends.load(name)
    optimizer = fastrms.Adam({"w": w}, backend=backend)
    optimizer.step({"w": w.copy()}, clip_norm=1.0)
    optimizer.bind({"w": w.copy()})
    optimizer.step()
    fastrms.rmsprop(w, w.copy(), w.copy(), lr=0.1, backend=backend)
    optimizer.lr = lambda step: 0.1
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    print({*sys.modules} - before or "fine")
    """) == "fine"  # fmt: skip


def test_fork_while_a_step_waits_for_the_lock_of_logging():
    """A fork takes this lock, too, after it has waited for the step."""
    assert in_process(COMMON + """
    import logging, time
    from fastrms.backends.forks import forks
    entered = threading.Event()

    class Logs(fastrms.Optimizer):
        defaults = {"lr": 0.1}
        state_names = ()

        def coefficients(step, **hyper):
            return hyper

        def rule(param, grad, lr):
            if threading.current_thread() is runner:
                entered.set()
                while forks.number % 2 == 0:       # the fork has not come to the locks of steps
                    time.sleep(1e-3)
                logging.getLogger("of a step")
            return (param - lr * grad,)

    runner = None
    opt, g = Logs(np.ones(5, np.float32), backend="numpy"), np.ones(5, np.float32)
    runner = threading.Thread(target=opt.step, args=(g,))
    runner.start()
    entered.wait()
    import warnings
    warnings.simplefilter("ignore")      # Python's own: there is a thread, the runner
    child(lambda: opt.step(g))
    runner.join()
    print("fine")
    """) == "fine"  # fmt: skip


def test_fork_while_another_thread_is_in_the_python_of_a_step():
    """The child has not that thread, and does not wait for it."""
    assert in_process(COMMON + """
    entered, go = threading.Event(), threading.Event()

    def rate(step):
        if threading.current_thread() is runner:
            entered.set()
            go.wait()
        return 0.1

    opt, g = fastrms.RMSProp(np.ones(5, np.float32), lr=rate), np.ones(5, np.float32)
    runner = threading.Thread(target=opt.step, args=(g,))
    runner.start()
    entered.wait()
    import warnings
    warnings.simplefilter("ignore")      # Python's own: there is a thread, the runner
    child(lambda: (opt.step(g), opt.step(g)))
    go.set()
    runner.join()
    assert opt.steps == 1
    print("fine")
    """) == "fine"  # fmt: skip


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import multiprocessing as mp, numpy as np, fastrms\n"
        "def train(seed):\n"
        "    fastrms.set_num_threads(3)\n"
        "    w = np.full(300_000, seed, np.float32)\n"
        "    opt = fastrms.RMSProp(w, lr=0.01)\n"
        "    for _ in range(5): opt.step(np.ones(300_000, np.float32))\n"
        "    return float(w[-1])\n"
        "if __name__ == '__main__':\n"
        "    here = [train(k) for k in range(4)]\n"
        f"    with mp.get_context({method!r}).Pool(3) as pool:\n"
        "        assert pool.map(train, range(4)) == here\n"
        "    print('fine', len(set(here)))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WATCHDOG)
    assert run.stdout.strip() == "fine 4", run.stdout + run.stderr


def threads_at_once(count, rounds, steps, **options):
    """So many Python threads that make rounds of steps with optimizers of their own."""
    return in_process(COMMON + f"""
    at_once({count}, lambda: [check({steps}, 20_011) for _ in range({rounds})])
    print("fine")
    """, **options)  # fmt: skip


def test_thirty_two_python_threads_at_once():
    assert threads_at_once(32, 20, 5) == "fine"


def test_nested_in_other_pools():
    """A step inside joblib's threads and processes, inside a ThreadPoolExecutor, and inside another step's schedule."""
    assert in_process(COMMON + """
    import joblib, warnings
    from concurrent.futures import ThreadPoolExecutor
    warnings.simplefilter("ignore")
    inner = fastrms.RMSProp(np.ones(50_001, np.float32))

    def schedule(step):
        inner.step(np.ones(50_001, np.float32))
        return 0.01

    outer = fastrms.RMSProp(np.ones(50_001, np.float32), lr=schedule)
    before = inner.steps
    outer.step(np.ones(50_001, np.float32))
    assert inner.steps == before + 1 and outer.steps == 1

    def train(seed):
        w = np.full(50_001, seed, np.float32)
        fastrms.RMSProp(w).step(np.ones(50_001, np.float32))
        return float(w[-1])

    want = [train(k) for k in range(8)]
    for backend in ("threading", "loky"):
        assert joblib.Parallel(n_jobs=3, backend=backend)(joblib.delayed(train)(k) for k in range(8)) == want
    with ThreadPoolExecutor(5) as executor:
        assert list(executor.map(train, range(8))) == want
    print("fine")
    """) == "fine"  # fmt: skip


def test_workers_leave_signals_to_python():
    assert in_process(COMMON + """
    check()
    blocked = {}
    for task in os.listdir("/proc/self/task"):
        for line in open(f"/proc/self/task/{task}/status"):
            if line.startswith("SigBlk"):
                blocked[int(task)] = int(line.split()[1], 16)
    interrupt = 1 << (signal.SIGINT - 1)
    workers = [mask for task, mask in blocked.items() if task != os.getpid() and mask & interrupt]
    assert not blocked[os.getpid()] & interrupt and len(workers) == 2, blocked
    print("fine")
    """) == "fine"  # fmt: skip


def interrupts(count, seconds, **options):
    """An interrupt so many seconds, and a little longer each time, after steps have begun."""
    return in_process(COMMON + f"    count, seconds = {count}, {seconds}\n" + """
    w = np.zeros(50_001, np.float32)
    opt = fastrms.AdaGrad(w)
    g = np.ones(50_001, np.float32)
    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for k in range(count):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds + 1e-6 * (k % 1000))    # once: a second could hit this test itself
            while True:
                opt.step(g, clip_norm=1e30, grad_scale=1.0 + 0.0 * k)
        except KeyboardInterrupt:
            state = opt.state["sum"]
            assert (state == opt.steps).all(), (opt.steps, state.min(), state.max())
            opt.step(g.copy())
    print("fine")
    """, **options)  # fmt: skip


def test_interrupts_find_a_whole_number_of_steps():
    """Every few hundred microseconds: buffers and count agree after each."""
    assert interrupts(300, 0.0005) == "fine"


def fake(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(tmp_path)


@pytest.mark.parametrize("files, quota", [
    ({}, float("inf")),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
      "sys/fs/cgroup/a/b/cpu.max": "50000 100000"}, 0.5),
    ({"proc/self/cgroup": "3:cpu,cpuacct:/x\n2:memory:/x\n", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "200000\n",
      "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}, 2.0),
    ({"proc/self/cgroup": "3:cpu:/x\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
])  # fmt: skip
def test_cgroup_quotas(tmp_path, files, quota):
    assert threads.cgroup_quota(fake(tmp_path, files)) == quota
    assert threads.usable_cpus(fake(tmp_path, files)) <= max(1, quota + 0.999)


SCRAPS = [
    *(b"", b"0", b"-1", b"max", b"100000", b"1e5", b"9" * 5000, b"nan", b"0x10", b"1_0", b"+5", b" ", b"\n", b"\0"),
    *(b":", b"::", b"0::/", b"0::/a\n", b"3:cpu:/a\n", b"/../..", b"\x85", b"\xff\xfe", "\u00b2".encode()),
]
some_bytes = st.one_of(st.binary(max_size=20), st.lists(st.sampled_from(SCRAPS), max_size=6).map(b"".join))
READ = ["proc/self/cgroup", "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/a/cpu.max", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(READ), some_bytes), st.sampled_from([b"0::/a\n", b"3:cpu:/a\n", None]))
def test_files_of_the_system_may_hold_anything(files, row):
    """Whatever is in them, an import does not end: the number of CPUs is that of the affinity mask, or fewer."""
    if row is not None:
        files["proc/self/cgroup"] = row + files.get("proc/self/cgroup", b"")
    with tempfile.TemporaryDirectory() as folder:
        root = fake(Path(folder), files)
        assert threads.cgroup_quota(root) >= 0
        assert 1 <= threads.usable_cpus(root) <= threads.usable_cpus(folder + "/nothing")


def test_unreadable_files_of_the_system_are_no_limit(tmp_path):
    (tmp_path / "proc" / "self" / "cgroup").mkdir(parents=True)  # a folder cannot be read
    assert threads.cgroup_quota(str(tmp_path)) == float("inf")
    assert threads.cgroup_quota("\0") == float("inf")
    deep = fake(tmp_path / "deep", {"proc/self/cgroup": "0::" + "/a" * 10**6})
    assert threads.cgroup_quota(deep) == float("inf")
    endless = fake(tmp_path / "endless", {"proc/self/cgroup": "0::/a\n" * 10**6})
    assert threads.cgroup_quota(endless) == float("inf")


@pytest.mark.parametrize(
    "error", [OSError(38, "not implemented"), PermissionError(), ValueError(), AttributeError(), RuntimeError()]
)
def test_an_affinity_that_cannot_be_asked(monkeypatch, tmp_path, error):
    def raises(process):
        raise error

    monkeypatch.setattr(os, "sched_getaffinity", raises, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.usable_cpus(str(tmp_path)) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert threads.usable_cpus(str(tmp_path)) == 12


@given(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["\u00b2", "\u0663", "1\u00b2", "9" * 5000, "1.5", "+2", " 2", "2,2", "-2", "\udcff"]),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_environment_is_survived_or_named(text):
    """OMP_NUM_THREADS is not ours: nonsense in it is no limit.  FASTRMS_NUM_THREADS is a request: nonsense is named."""
    assert 1 <= threads.default_num_threads({"OMP_NUM_THREADS": text}) <= threads.MOST
    try:
        assert threads.default_num_threads({"FASTRMS_NUM_THREADS": text}) in range(1, threads.MOST + 1)
    except ValueError as error:
        assert str(error) == f"FASTRMS_NUM_THREADS={text!r} must be a number from 1 to {threads.MOST}"


@pytest.mark.parametrize("module", [
    "raise RuntimeError('broken')", "import nothing_of_this_name", "", "class LibController: pass",
    "class LibController: pass\ndef register(controller): raise ValueError('old')", "LibController = 5", "this is no Python",
])  # fmt: skip
def test_a_threadpoolctl_that_does_not_work_is_left(tmp_path, module):
    (tmp_path / "threadpoolctl.py").write_text(module)
    ask = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fastrms; print(fastrms.get_num_threads())"
    assert in_process(ask, FASTRMS_NUM_THREADS="3") == "3"


def test_show_config_shows_what_it_can(monkeypatch, capsys):
    def raises():
        raise OSError("no uname")

    monkeypatch.setattr(platform, "system", raises)
    monkeypatch.setenv("FASTRMS_BACKEND", "fortran")
    fastrms.show_config()
    out = capsys.readouterr().out
    assert "machine    unknown (OSError('no uname'))" in out and "auto       unknown (ValueError(" in out
    assert f"threads    {fastrms.get_num_threads()}\n" in out and len(out.splitlines()) == 17


def test_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: 6)
    for environment, count in [
        ({}, 6), ({"OMP_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "4,2"}, 4), ({"OMP_NUM_THREADS": "100"}, 6),
        ({"OMP_NUM_THREADS": "x"}, 6), ({"FASTRMS_NUM_THREADS": "9", "OMP_NUM_THREADS": "2"}, 9),
    ]:  # fmt: skip
        assert threads.default_num_threads(environment) == count
    for bad in ("0", "-1", "two", "65", "\u00b2", "9" * 5000):
        with pytest.raises(ValueError, match="FASTRMS_NUM_THREADS="):
            threads.default_num_threads({"FASTRMS_NUM_THREADS": bad})
    for bad, error in ((0, ValueError), (65, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="n="):
            fastrms.set_num_threads(bad)


def test_environment_and_affinity_in_a_new_process():
    ask = "import fastrms; print(fastrms.get_num_threads())"
    assert in_process(ask, FASTRMS_NUM_THREADS="5") == "5"
    assert in_process(ask, FASTRMS_NUM_THREADS="", OMP_NUM_THREADS="1") == "1"
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});" + ask
    assert in_process(one, FASTRMS_NUM_THREADS="", OMP_NUM_THREADS="") == "1"


@pytest.mark.parametrize("order", ["import threadpoolctl, fastrms", "import fastrms, threadpoolctl"])
def test_threadpoolctl_sees_and_limits(order):
    assert in_process(order + """
fastrms.set_num_threads(4)
mine = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "fastrms"]
assert [x["num_threads"] for x in mine] == [4], mine
with threadpoolctl.threadpool_limits(1):
    assert fastrms.get_num_threads() == 1
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    assert fastrms.get_num_threads() == 4
assert fastrms.get_num_threads() == 4
print("fine")
""") == "fine"  # fmt: skip


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
@pytest.mark.parametrize("sanitizer, runs", [
    ("thread", [("3", "0"), ("3", "15"), ("1", "0")]),
    ("address,undefined", [("3", "0"), ("0", "15")]),  # this ASan's allocator does not survive a fork between threads
    ("", [("3", "500"), ("32", "0")]),
])  # fmt: skip
def test_sanitized_c_programs(tmp_path, sanitizer, runs):
    """csrc/ without Python: many callers and forks, every element updated once, no report of the sanitizer."""
    options = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    program = str(tmp_path / "stress")
    source = str(ROOT / "tests" / "c" / "stress.c")
    command = ["gcc", "-g", "-O1", *options, f"-I{ROOT / 'csrc'}", source, *SOURCES, "-lm", "-pthread", "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    for arguments in runs:
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=150,
                             env={"TSAN_OPTIONS": "die_after_fork=0:report_thread_leaks=0"})  # fmt: skip
        assert run.returncode == 0 and run.stdout.startswith("faults 0"), run.stdout + run.stderr
        assert "Sanitizer" not in run.stderr, run.stderr


def compiled(name, folder, sources=SOURCES):
    """The program tests/c/<name>.c, built with csrc/."""
    program, source = str(folder / name), str(ROOT / "tests" / "c" / f"{name}.c")
    command = ["gcc", "-g", "-O1", f"-I{ROOT / 'csrc'}", source, *sources, "-lm", "-pthread", "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    return program


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or threads.usable_cpus() < 2, reason="one CPU, or no affinity here")
def test_what_is_shared_and_with_whom(tmp_path):
    """Which jobs wake workers, which workers they wake, and which CPUs these use: the program prints what is wrong."""
    program = compiled("sharing", tmp_path)
    for arguments in ([], ["threads"]):
        run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=WATCHDOG)
        assert (run.returncode, run.stdout) == (0, ""), run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_a_child_forks_although_a_thread_came_to_a_step_during_the_fork(tmp_path):
    program = compiled("fork", tmp_path, [source for source in SOURCES if not source.endswith("pool.c")])
    assert subprocess.run([program], capture_output=True, text=True, timeout=WATCHDOG).stdout == "fine\n"


RANKS = [
    ({"LOCAL_WORLD_SIZE": "2"}, 4), ({"LOCAL_WORLD_SIZE": "4"}, 2), ({"LOCAL_WORLD_SIZE": "100"}, 1),
    ({"LOCAL_WORLD_SIZE": "1"}, 6), ({"LOCAL_WORLD_SIZE": "x"}, 6), ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4),
    ({"MPI_LOCALNRANKS": "2"}, 4), ({"PMI_LOCAL_SIZE": "2"}, 4), ({"SLURM_NTASKS_PER_NODE": "2"}, 4),
    ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4), ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 3),
    ({"MPI_LOCALNRANKS": "2", "OMP_NUM_THREADS": "1"}, 1), ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 1),
    ({"LOCAL_WORLD_SIZE": "4", "FASTRMS_NUM_THREADS": "5"}, 5), ({"LOCAL_WORLD_SIZE": "2", "MPI_LOCALNRANKS": "8"}, 4),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "count"), RANKS)
def test_ranks_on_one_machine_share_its_cpus(monkeypatch, environment, count):
    """The launcher has 8 CPUs and this rank 6 of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6 if process == 0 else 8)), raising=False)
    monkeypatch.setattr(threads, "cgroup_quota", lambda root="/": 100)
    assert threads.default_num_threads(environment) == count


def test_ranks_that_are_bound_to_cpus_of_their_own_keep_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4 if process == 0 else 16)), raising=False)
    monkeypatch.setattr(threads, "cgroup_quota", lambda root="/": 100)
    assert threads.default_num_threads({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}) == 4


def test_show_config_says_why_a_rank_has_so_many_threads():
    ask = "import fastrms; fastrms.show_config()"
    out = in_process(ask, FASTRMS_NUM_THREADS="", OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE="1000")
    assert "threads    1" in out and "\nranks      1000 on this machine, which share " in out
    assert out.endswith(" CPUs (LOCAL_WORLD_SIZE of torchrun): 1 for each")
    out = in_process(ask, FASTRMS_NUM_THREADS="3", LOCAL_WORLD_SIZE="1000")
    assert "threads    3" in out and out.endswith("; FASTRMS_NUM_THREADS=3 wins")
