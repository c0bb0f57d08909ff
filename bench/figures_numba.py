"""The figures of the Numba backend: against C on the same buffers, on one thread and on all, and its first step."""

import sys

import fastrms

from . import first_step
from .contenders import OPTIMIZERS
from .figures import Figure
from .problem import IN_WORDS, WELL_PLACED, Problem
from .report import size_name
from .timing import paired

SECONDS = 3.0  # of timing for each rule at each size
SIZES = (2**16, 2**18, 2**20, 2**22, 2**25)
SLOWER = {"one thread": 1.05, "all threads": 1.10}  # the targets: at most so many times C's time
PLACED = f"{IN_WORDS[WELL_PLACED]}; both backends update the same parameter and states from the same gradient"


def prepare():
    """Returns the number of threads, and the version and threading layer of Numba; exits where there is no Numba."""
    backend = fastrms.backends.load("numba")
    if backend.available() is not None:
        sys.exit(backend.available())
    import numba

    layer, most = backend.started()
    return {"threads": min(fastrms.get_num_threads(), most), "peers": {"Numba": f"{numba.__version__} ({layer})"}}


def over_c():
    """One row for each size, with the ratio of each rule."""
    before = fastrms.get_num_threads()
    for name, most in SLOWER.items():
        fastrms.set_num_threads(1 if name == "one thread" else before)
        for size in SIZES:
            slower = {rule: time_over_c(rule, size) for rule in OPTIMIZERS}
            measured = ", ".join(f"{rule} {times:.2f}x" for rule, times in slower.items())
            yield Figure(f"{size_name(size)}, {name}: time over C", f"<= {most}x", measured, max(slower.values()) <= most)
    fastrms.set_num_threads(before)


def time_over_c(rule, size):
    """Time bound steps of both backends over the same memory, since one set of pages is up to 10 % faster than another."""
    grad, param = Problem(rule, size, "float32").new_buffers(states=0)
    one, other = (OPTIMIZERS[rule](param, backend=backend) for backend in ("c", "numba"))
    for mine, theirs in zip(other._plan.states, (t.state for t in one._tensors), strict=True):
        mine[:] = theirs.values()
    calls = {}
    for backend, optimizer in (("c", one), ("numba", other)):
        optimizer.bind(grad)
        optimizer.step()  # Numba compiles
        calls[backend] = optimizer.step
    return paired(calls, SECONDS)


def first():
    for what, seconds, most in zip(("without", "with"), first_step.seconds(), (1.5, 0.5), strict=True):
        what = f"first step of a process {what} the cache on disk, imports included"
        yield Figure(what, f"<= {most} s", f"{seconds:.1f} s", seconds <= most)


MEASUREMENTS = (over_c, first)
