"""The figures against NumPy, on one thread: small and large updates, many tensors, import, memory, placement."""

import os
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

import fastrms

from . import timing
from .baselines import Naive
from .check import WrongContender, check
from .contenders import FASTRMS, IN_PLACE, NAIVE, OPTIMIZERS, Contender, contenders
from .figures import Figure, at_least, at_most
from .measure import measure
from .problem import WELL_PLACED, allocate, at_places
from .report import size_name
from .results import Results
from .timing import interleaved

SECONDS = 3.0  # of timing for each figure
OURS, LARGE = FASTRMS["c"], 2**24
TENSORS, TENSOR_SIZE, GRADIENT_SETS = 100, 64, 50
IMPORTS = 9
PLACED = "staggered modulo 4 KiB, save for small tensors in lists (as NumPy allocates them) and where it says back to back"
HEAVY_MODULES = {"numba", "torch", "matplotlib"}
IMPORT = """
import sys, numpy, time
start = time.perf_counter()
import fastrms
print(time.perf_counter() - start, *sys.modules)
"""


def prepare():
    """Let fastrms use one thread, and return this."""
    fastrms.set_num_threads(1)
    return {"threads": 1}


def ratio(calls, slow, fast):
    """How many times as fast `fast` is as `slow`, by their minimum times."""
    timings = interleaved(calls, SECONDS)
    return timings[slow].minimum / timings[fast].minimum


def against_numpy(rule, size, seconds):
    """The Results of both baselines and of the C backend, all checked first."""
    results = Results("float32", WELL_PLACED)
    measure(results, rule, size, seconds, [NAIVE, IN_PLACE, OURS])
    return results


def functional():
    calls = {NAIVE: [], "functional": []}
    for problem in at_places("rmsprop", 64, "float32"):
        g, w, v = problem.new_buffers()
        made, _ = contenders(problem, 1, names=[NAIVE])
        call = partial(fastrms.rmsprop, w, g, v, lr=0.01)
        made.append(Contender("functional", call, lambda w=w, v=v: [w, v]))
        check(problem, made)
        for contender in made:
            calls[contender.name].append(contender.step)
    timings = timing.at_places(calls, SECONDS)
    times = timings[NAIVE].minimum / timings["functional"].minimum
    yield at_least("fastrms.rmsprop(w, g, v, lr=0.01), 64: over naive", times, 2.5)


def bound():
    for size, target in ((64, 20), (1024, 12)):
        results = against_numpy("rmsprop", size, SECONDS)
        yield at_least(f"bound step(), {size}, RMSProp: over naive", results.over_naive("rmsprop", size, OURS), target)


def many_arrays(seed):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(TENSOR_SIZE, dtype=np.float32) for _ in range(TENSORS)]


def naive_loop(params, averages, grads):
    for param, grad, average in zip(params, grads, averages, strict=True):
        Naive.rmsprop(param, grad, average)


def many_bound():
    grads = many_arrays(1)
    naive, optimizer, check_equal = many_pair()
    optimizer.bind(grads)
    calls = {"naive": lambda: naive(grads), "fastrms": optimizer.step}
    check_equal(calls)
    what = f"{TENSORS} bound tensors of {TENSOR_SIZE}, one step: over a naive loop"
    yield at_least(what, ratio(calls, "naive", "fastrms"), 60)


def many_fresh():
    """Steps from gradient arrays that the optimizer has not seen lately.  They are made beforehand; only steps are timed."""
    sets = [many_arrays(seed) for seed in range(1, GRADIENT_SETS + 1)]
    naive, optimizer, check_equal = many_pair()
    for_naive, for_fastrms = cycle(sets), cycle(sets)
    calls = {"naive": lambda: naive(next(for_naive)), "fastrms": lambda: optimizer.step(next(for_fastrms))}
    check_equal(calls)
    what = f"{TENSORS} tensors of {TENSOR_SIZE}, new gradient arrays each step: over a naive loop"
    yield at_least(what, ratio(calls, "naive", "fastrms"), 5)


def many_pair():
    """The naive loop and an optimizer on many small tensors, equal at the start, and a check that they stay so."""
    params, averages = many_arrays(0), [np.zeros(TENSOR_SIZE, np.float32) for _ in range(TENSORS)]
    copies = [param.copy() for param in params]

    def check_equal(calls):
        for call in calls.values():
            call()
        if not np.allclose(params, copies, rtol=1e-6, atol=1e-6):
            raise WrongContender(f"fastrms.RMSProp on {TENSORS} tensors and the naive loop differ after a step")

    return partial(naive_loop, params, averages), fastrms.RMSProp(copies, backend="c"), check_equal


def large():
    for rule, target in (("rmsprop", 5), ("adagrad", 5), ("adam", 6)):
        results = against_numpy(rule, LARGE, 2 * SECONDS)
        what = f"{OPTIMIZERS[rule].__name__}, {size_name(LARGE)}"
        yield at_least(f"{what}: over naive NumPy", results.over_naive(rule, LARGE, OURS), target)
        yield at_least(f"{what}: over in-place NumPy", results.over_in_place(rule, LARGE, OURS), 3)


def importing():
    """The import with bytecode, as after an installation or a first import, and without, as at the very first."""
    with tempfile.TemporaryDirectory() as folder:
        written = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        first, modules = import_once(written | {"PYTHONPYCACHEPREFIX": folder})
        later = [import_once(written | {"PYTHONPYCACHEPREFIX": folder})[0] for _ in range(IMPORTS)]
    taken = statistics.median(later) * 1e3
    what = f"import fastrms, after import numpy (the first of all, without bytecode: {first * 1e3:.0f} ms)"
    yield Figure(what, "<= 60 ms", f"{taken:.0f} ms", taken <= 60)
    yield Figure("heavy modules imported with it", "none", ", ".join(sorted(modules)) or "none", not modules)


def import_once(environment):
    """Import in a new process: (seconds, heavy modules that were imported with it)."""
    command = [sys.executable, "-c", IMPORT]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    seconds, *names = output.split()
    return float(seconds), HEAVY_MODULES & set(names)


def memory():
    size = 2**22
    param, grad = np.ones(size, np.float32), np.ones(size, np.float32)
    optimizer = fastrms.RMSProp(param, backend="c")
    optimizer.bind(grad)
    optimizer.step()
    python, resident = python_peak(optimizer.step), resident_peak(optimizer.step)
    what = "memory of a step, 2^22, bytes per element"
    yield Figure(f"{what}: tracemalloc", "0", f"{python / size:.2f}", round(python / size, 2) == 0)
    yield Figure(f"{what}: resident", "0", f"{resident / size:.2f}", resident / size < 0.1)


def python_peak(call):
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def resident_peak(call):
    """By how many bytes the process grew at most, by the kernel's high-water mark, which is reset first."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def placement():
    for make in (fastrms.RMSProp, fastrms.Adam):
        for size in (2**25, 2**26):
            together = np.ones(2 * size, np.float32)
            calls = {
                "back to back": bound_step(make, together[:size], together[size:]),
                "staggered": bound_step(make, *allocate(size, [np.dtype(np.float32)] * 2, WELL_PLACED)),
            }
            slower = ratio(calls, "back to back", "staggered")
            yield at_most(f"{make.__name__}, {size_name(size)}, back to back: time over staggered", slower, 1.25)


def bound_step(make, param, grad):
    param.fill(1)
    grad.fill(1)
    optimizer = make(param, backend="c")
    optimizer.bind(grad)
    return optimizer.step


MEASUREMENTS = (functional, bound, many_bound, many_fresh, large, importing, memory, placement)
