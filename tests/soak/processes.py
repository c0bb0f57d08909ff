"""Checks of processes and threads: forks, many threads, interrupts, killed writers, one CPU, other libraries beside ours."""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

import fastrms

from . import ROOT, NotRun, check
from .long import need_c


def steps_of_a_child(size=300_007):
    """A child's own steps, on several threads: the sum counts them."""
    fastrms.set_num_threads(3)
    optimizer = fastrms.AdaGrad(np.zeros(size, np.float32))
    for _ in range(3):
        optimizer.step(np.ones(size, np.float32))
    assert (optimizer.state["sum"] == 3).all()


def stepping(stop):
    optimizer = fastrms.AdaGrad(np.zeros(300_007, np.float32))
    optimizer.bind(np.ones(300_007, np.float32))
    while not stop.is_set():
        optimizer.step()


def children(method, count, seconds, patience=60):
    """Start so many processes one after the other, no longer than this, while a thread steps; how many there were."""
    context, stop, end = multiprocessing.get_context(method), threading.Event(), time.monotonic() + seconds
    runner, made = threading.Thread(target=stepping, args=(stop,)), 0
    runner.start()
    try:
        while made < count and time.monotonic() < end:
            child = context.Process(target=steps_of_a_child)
            child.start()
            child.join(patience)
            code = child.exitcode
            child.kill()  # or this process would wait for it at its end
            assert code == 0, f"{method}: child {made} has exit code {code} (None: it hangs)"
            made += 1
    finally:
        stop.set()
        runner.join()
    return made


@check({"count": 10, "seconds": 1})
def forks(count=1000, seconds=30):
    """Children of os.fork and of multiprocessing, made while other threads step, step themselves, and none hangs."""
    need_c()
    from test_threads import fork_while_others_step

    assert fork_while_others_step(count, patience=300) == "fine"
    fastrms.set_num_threads(3)
    warnings.simplefilter("ignore")  # Python's own, of a fork beside threads
    made = [f"{method} {children(method, count, seconds):,}" for method in ("fork", "forkserver", "spawn")]
    return f"os.fork {count:,}, multiprocessing {', '.join(made)} (at most {seconds} s each): 0 hangs"


@check({"rounds": 1, "steps": 20})
def many_threads(rounds=1, steps=10_000):
    """32 Python threads step at once, each with an optimizer of its own: no update is lost or made twice."""
    need_c()
    from test_threads import threads_at_once

    assert threads_at_once(32, rounds, steps, patience=300) == "fine"
    return f"32 threads x {rounds * steps:,} steps, 0 wrong elements"


@check({"count": 100})
def interrupts(count=10_000):
    """Ctrl-C about every millisecond: after each, buffers and counts are those of a whole number of steps."""
    need_c()
    from test_threads import interrupts

    assert interrupts(count, 0.0005, patience=300) == "fine"
    return f"{count:,} interrupts 0.5 to 1.5 ms after steps have begun, 0 torn steps"


@check({"kills": 20})
def killed_writers(kills=1000):
    """kill -9 while a checkpoint is saved: the file is the old one or the new one, whole."""
    from test_checkpoint import killed

    with tempfile.TemporaryDirectory() as folder:
        run = killed(f"{folder}/o", "renamed", kills)
    assert run.returncode == 0, run.stderr
    return f"{kills:,} kills, of which {int(run.stdout)} hit the writing; 0 torn files"


def python(code, **environment):
    """Standard output of a fresh Python."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert run.returncode == 0, run.stderr[-600:]
    return run.stdout.strip()


QUOTA = """
import os, time
import numpy as np
{first}
import fastrms
{then}
w = np.ones(2_000_003, np.float32)
optimizer = fastrms.RMSProp(w)
optimizer.bind(np.ones_like(w))
times = []
for _ in range({steps}):
    start = time.perf_counter()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(fastrms.get_num_threads(), min(times))
"""
ON_AVERAGE = """
import os
{first}
import time
import numpy as np
import fastrms
w = np.ones(2_000_003, np.float32)
optimizer = fastrms.RMSProp(w)
optimizer.bind(np.ones_like(w))
optimizer.step()
times = []
for _ in range(5):
    start = time.perf_counter()
    for _ in range({steps} // 5):
        optimizer.step()
    times.append(time.perf_counter() - start)
print(fastrms.get_num_threads(), min(times))
"""
ONE_CPU = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


@check({"steps": 60, "least": 0})
def one_cpu(steps=2000, least=0.8):
    """On one CPU there is one thread; a process that loses its other CPUs later is about as fast as with one thread."""
    need_c()
    if not hasattr(os, "sched_setaffinity"):
        raise NotRun("this system has no affinity")
    free = {"FASTRMS_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    count, alone = python(QUOTA.format(first=ONE_CPU, then="", steps=steps), **free).split()
    assert count == "1", f"{count} threads on one CPU"
    later = python(QUOTA.format(first="", then=f"fastrms.set_num_threads(2); {ONE_CPU}", steps=steps), **free).split()[1]
    share = float(alone) / float(later)
    assert share >= least, f"with 2 threads on one CPU {share:.2f} of the speed of one thread"
    return f"1 thread; two on one CPU have {share:.2f} of its speed (2,000,003 elements, shortest of {steps:,} steps)"


def new_group(cpus=1, period=100_000):
    """The folder of a new cgroup in that of this process, which may use so many CPUs; None where that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, controllers, path = line.split(":", 2)
        parts = {"": ("", {"cpu.max": f"{cpus * period} {period}"})}
        if "cpu" in controllers.split(","):
            parts[controllers] = (controllers, {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": cpus * period})
        if controllers not in parts:
            continue
        below, files = parts[controllers]
        group = Path("/sys/fs/cgroup", below, path.lstrip("/"), f"fastrms-soak-{os.getpid()}")
        try:
            group.mkdir()
            for name, value in files.items():
                if not (group / name).exists():  # it would become a file of its own in a tmpfs
                    raise FileNotFoundError(name)
                (group / name).write_text(str(value))
            return group
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
    return None


@check({"steps": 60, "least": 0})
def quota(steps=2000, least=0.8):
    """In a cgroup that may use one CPU there is one thread, which is as fast as one thread without a limit."""
    need_c()
    from fastrms import threads

    if threads.usable_cpus() < 2:
        raise NotRun("this process may use one CPU only")
    group = new_group()
    if group is None:
        raise NotRun("this process may not make a cgroup with a quota; tests/test_threads.py reads files that say so")
    joined = f'import pathlib; pathlib.Path("{group}/cgroup.procs").write_text(str(os.getpid()))'
    free = {"FASTRMS_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    try:
        count, limited = python(ON_AVERAGE.format(first=joined, steps=steps), **free).split()
    finally:
        group.rmdir()
    alone = python(ON_AVERAGE.format(first="", steps=steps), FASTRMS_NUM_THREADS="1").split()[1]
    assert count == "1", f"{count} threads with a quota of one CPU"
    share = float(alone) / float(limited)
    assert share >= least, f"with a quota of one CPU {share:.2f} of the speed of one thread"
    measured = f"2,000,003 elements, the fastest of 5 x {steps // 5} steps"
    return f"1 thread, with {share:.2f} of its speed without a quota ({measured})"


INTERPRETER = """
import warnings
warnings.simplefilter("ignore")
try:
    import numpy as np, fastrms
except ImportError as error:
    print("refused:", str(error).splitlines()[0])
else:
    fastrms.set_num_threads(2)
    optimizer = fastrms.AdaGrad(np.zeros(400_007))
    for _ in range(3):
        optimizer.step(np.ones(400_007))
    print("works" if (optimizer.state["sum"] == 3).all() else "wrong")
"""
INTERPRETERS = """
import sys
try:
    import _interpreters as interpreters
    make, execute = lambda: interpreters.create("legacy"), interpreters.exec
except ImportError:
    import _xxsubinterpreters as interpreters
    make, execute = lambda: interpreters.create(isolated=False), interpreters.run_string
code = {code!r}
if {main_first}:
    exec(code, {{}})
for _ in range(2):
    sys.stdout.flush()
    execute(make(), code)
if {main_first}:
    exec(code, {{}})
"""


@check({})
def interpreters():
    """In a sub-interpreter an import works, or is an ImportError, as NumPy allows; the main interpreter goes on."""
    if not any(importlib.util.find_spec(name) for name in ("_interpreters", "_xxsubinterpreters")):
        raise NotRun("this Python has no interpreters that a program could make")
    found = {}
    for main_first in (True, False):
        lines = python(INTERPRETERS.format(code=INTERPRETER, main_first=main_first)).splitlines()
        assert len(lines) == 2 + 2 * main_first and {line.split(":")[0] for line in lines} <= {"works", "refused"}, lines
        assert not main_first or lines[0] == lines[-1] == "works", lines
        found[main_first] = [line.split(":")[0] for line in lines]
    return f"main interpreter first: {', '.join(found[True])}; sub-interpreters alone: {', '.join(found[False])}"


@check({})
def empty_environment():
    """Without a single environment variable, HOME and PATH included, every backend works."""
    code = (
        "import numpy as np, fastrms; names = [x for x in fastrms.available_backends() if x != 'cuda'];"
        "w = [np.ones(9, np.float32) for _ in names];"
        "[fastrms.RMSProp(x, backend=name).step(x.copy()) for x, name in zip(w, names)];"
        "assert all((x == w[0]).all() for x in w); print(', '.join(names))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env={})
    assert run.returncode == 0, run.stderr[-600:]
    return f"the backends {run.stdout.strip()}"


LIBRARIES = {
    "torch": "import torch; a = torch.ones(300, 300); a @ a; torch.optim.Adam([torch.ones(9, requires_grad=True)])",
    "sklearn": "from sklearn.cluster import KMeans; KMeans(2, n_init=1).fit(np.arange(4000.0).reshape(-1, 2))",
    "numba": "import numba; numba.njit(parallel=True)(lambda x: x.sum())(np.ones(1000))",
    "fastrms": "import fastrms",
}
TOGETHER = """
import hashlib, os, warnings
import numpy as np
warnings.simplefilter("ignore")
{imports}
fastrms.set_num_threads(2)
w = np.linspace(-3, 3, 700_001).astype(np.float32)
optimizer = fastrms.Adam(w)
for _ in range(5):
    optimizer.step(w.copy())
assert np.float64(5e-324) * 1 != 0, "denormals are flushed in this process"
pid = os.fork()
if pid == 0:
    optimizer.step(w.copy())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(hashlib.sha256(w.tobytes()).hexdigest())
"""


@check({"seconds": 0})
def import_orders(seconds=150):
    """Beside torch, scikit-learn and Numba, imported in every order, all of which compute: the same bits, denormals are not
    flushed, and a child of a fork makes a step."""
    names = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    orders, end, found = list(itertools.permutations(names)), time.monotonic() + seconds, []
    for order in orders:
        found.append(python(TOGETHER.format(imports="\n".join(LIBRARIES[name] for name in order))))
        if time.monotonic() > end:
            break
    assert len({*found}) == 1, f"{len({*found})} different results"
    return f"{len(found)} of {len(orders)} orders of {', '.join(names)}"
