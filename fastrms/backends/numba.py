"""The rules compiled by Numba: serial, or by prange behind a guard.  Numba is imported at the first step.

Numba's threading layers are not safe by themselves: workqueue aborts the process when two threads use it at once, and
under omp a forked child dies or hangs at its first parallel region.  So one caller at a time runs in parallel, others
alone, and a forked child always alone.
"""

import os
import sys
import threading
from functools import cache, partial
from importlib.util import find_spec

from .. import threads
from . import pyplan

LEAST = {"omp": 1 << 17, "tbb": 1 << 18, "workqueue": 1 << 18}  # elements from which two threads gain (tbb: not measured)
SMALLEST = min(LEAST.values())
_one_at_a_time = threading.Lock()
_process = os.getpid()


def available():
    return None if find_spec("numba") else "numba is not installed: pip install 'fastrms[numba]'"


def kernel(recipe, parallel=False):
    return compiler()(recipe.rule, recipe.general, recipe.dtype, parallel)


@cache
def compiler():
    try:
        from . import kernels
    except ImportError as error:
        raise RuntimeError(f"backend='numba' is not available, importing numba failed: {error}") from error
    return kernels.kernel


def call(recipe, param, grad, states):
    """One update of these flat arrays, in place, as a function of the address of the coefficients.  Whoever has it keeps
    the arrays alive."""
    arguments = (param.size, *(array.ctypes.data for array in (param, grad, *states)))
    serial = partial(kernel(recipe), *arguments)
    return serial if param.size < SMALLEST else partial(guarded, serial, recipe, arguments)


def guarded(serial, recipe, arguments, coefficients):
    if not in_parallel(recipe, arguments, coefficients):
        serial(coefficients)


def in_parallel(recipe, arguments, coefficients):
    """Run the update on several threads, unless the guard is against it; whether it ran."""
    if threads.get_num_threads() == 1 or os.getpid() != _process or not _one_at_a_time.acquire(blocking=False):
        return False
    try:
        least, parts = layer()
        if arguments[0] < least or parts == 1:
            return False
        with_threads(parts, kernel(recipe, parallel=True), *arguments, coefficients)
        return True
    finally:
        _one_at_a_time.release()


def layer():
    """(elements, threads): from which size, and with how many threads, Numba's threading layer is worth it."""
    name, most = started()
    return LEAST.get(name, 0), min(threads.get_num_threads(), most)


@cache
def started():
    """The name and the threads of the threading layer, which this starts; one thread where it has none to offer."""
    import numba

    try:
        numba.get_num_threads()
        return numba.threading_layer(), numba.config.NUMBA_NUM_THREADS
    except (ImportError, OSError, ValueError):
        return None, 1


def with_threads(parts, function, *arguments):
    """The caller's own number of Numba threads is as before afterwards."""
    numba = sys.modules["numba"]
    before = numba.get_num_threads()
    if before == parts:
        return function(*arguments, parts)
    numba.set_num_threads(parts)
    try:
        function(*arguments, parts)
    finally:
        numba.set_num_threads(before)


update = partial(pyplan.update, call, pyplan.Coefficients.address)


class Plan(pyplan.Plan):
    """Bound buffers, updated by Numba."""

    call, given = staticmethod(call), staticmethod(pyplan.Coefficients.address)
