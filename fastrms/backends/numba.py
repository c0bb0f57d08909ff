"""The rules compiled by Numba: serial, or by prange behind a guard.  Numba is imported at the first step.

Numba's threading layers are not safe by themselves: workqueue aborts the process when two threads use it at once, and
under omp a forked child dies or hangs at its first parallel region.  So one caller at a time runs in parallel, others
alone, and a forked child always alone.
"""

import os
import threading
from functools import cache
from importlib.util import find_spec

from .. import recipes, threads
from . import pyplan

LEAST = {"omp": 1 << 16, "tbb": 1 << 17, "workqueue": 1 << 17}  # elements from which two threads gain
SMALLEST = min(LEAST.values())
_one_at_a_time = threading.Lock()
_process = os.getpid()


def available():
    return None if find_spec("numba") else "numba is not installed: pip install 'fastrms[numba]'"


def kernel(recipe, parallel=False):
    try:
        from . import kernels
    except ImportError as error:
        raise RuntimeError(f"backend='numba' is not available, importing numba failed: {error}") from error
    return kernels.kernel(recipe.rule, recipe.general, recipe.dtype, parallel)


def updater(recipe):
    """A function for one step on flat arrays, in place; grad and coefficients are read-only."""
    serial = kernel(recipe)

    def guarded(coefficients, param, grad, states):
        if param.size < SMALLEST or not in_parallel(recipe, param, grad, *states, coefficients):
            serial(param, grad, *states, coefficients)

    return guarded


def in_parallel(recipe, param, *others):
    """Run the step on several threads, unless the guard is against it; whether it ran."""
    if threads.get_num_threads() == 1 or os.getpid() != _process or not _one_at_a_time.acquire(blocking=False):
        return False
    try:
        least, parts = layer()
        if param.size < least or parts == 1:
            return False
        with_threads(parts, kernel(recipe, parallel=True), param, *others)
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
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(parts)
    try:
        function(*arguments, parts)
    finally:
        numba.set_num_threads(before)


def update(recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place."""
    if param.size:
        coefficients = recipes.ready(recipe, step, grad_scale)
        updater(recipe)(pyplan.constant(coefficients), param, pyplan.constant(grad), states)


class Plan(pyplan.Plan):
    """Bound buffers, updated by Numba."""

    updater = staticmethod(updater)
