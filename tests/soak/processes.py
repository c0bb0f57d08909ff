"""Checks of processes and threads: forks, many threads, interrupts, killed writers, one CPU, other libraries beside ours."""

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

import numpy as np

import fastrms

from . import ROOT, NotRun, check


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
def forks(count=1000, seconds=45):
    """Children of os.fork and of multiprocessing, made while other threads step, step themselves, and none hangs."""
    from test_threads import fork_while_others_step

    assert fork_while_others_step(count, patience=300) == "fine"
    fastrms.set_num_threads(3)
    warnings.simplefilter("ignore")  # Python's own, of a fork beside threads
    made = [f"{method} {children(method, count, seconds):,}" for method in ("fork", "forkserver", "spawn")]
    return f"os.fork {count:,}, multiprocessing {', '.join(made)} (at most {seconds} s each): 0 hangs"


@check({"rounds": 1, "steps": 20})
def many_threads(rounds=1, steps=10_000):
    """32 Python threads step at once, each with an optimizer of its own: no update is lost or made twice."""
    from test_threads import threads_at_once

    assert threads_at_once(32, rounds, steps, patience=300) == "fine"
    return f"32 threads x {rounds * steps:,} steps, 0 wrong elements"


@check({"count": 100})
def interrupts(count=20_000):
    """Ctrl-C about every millisecond: after each, buffers and counts are those of a whole number of steps."""
    from test_threads import interrupts

    assert interrupts(count, 0.0005, patience=300) == "fine"
    return f"{count:,} interrupts 0.5 to 1.5 ms after steps have begun, 0 torn steps"


@check({"kills": 20})
def killed_writers(kills=2000):
    """kill -9 while a checkpoint is saved: the file is the old one or the new one, whole."""
    from test_checkpoint import killed

    with tempfile.TemporaryDirectory() as folder:
        run = killed(f"{folder}/o", "renamed", kills)
    assert run.returncode == 0, run.stderr
    return f"{kills:,} kills, of which {int(run.stdout)} hit the writing; 0 torn files"


def python(code, **environment):
    """Standard output of a fresh Python."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
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
ONE_CPU = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


@check({"steps": 60})
def one_cpu(steps=2000):
    """On one CPU there is one thread; a process that loses its other CPUs later is about as fast as with one thread."""
    if not hasattr(os, "sched_setaffinity"):
        raise NotRun("this system has no affinity")
    free = {"FASTRMS_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    count, alone = python(QUOTA.format(first=ONE_CPU, then="", steps=steps), **free).split()
    assert count == "1", f"{count} threads on one CPU"
    later = python(QUOTA.format(first="", then=f"fastrms.set_num_threads(2); {ONE_CPU}", steps=steps), **free).split()[1]
    share = float(alone) / float(later)
    assert share >= 0.8, f"with 2 threads on one CPU {share:.2f} of the speed of one thread"
    return f"1 thread; two on one CPU have {share:.2f} of its speed (2,000,003 elements, shortest of {steps:,} steps)"


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
def import_orders(seconds=340):
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
