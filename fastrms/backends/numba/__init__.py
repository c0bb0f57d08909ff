"""The rules compiled by Numba: serial, or by prange behind a guard.  Numba is imported at the first step.

Numba's threading layers are not safe by themselves: workqueue aborts the process when two threads use it at once, and
under omp a forked child dies or hangs at its first parallel region.  So only one caller at a time runs on several threads;
other callers, and a forked child always, run on one.
"""

import os
import sys
import threading
from functools import cache, cached_property, partial
from itertools import chain

import numpy as np

from ... import threads
from ...memory import host
from .. import find_spec, plan

LEAST = {"omp": 1 << 16, "tbb": 1 << 18, "workqueue": 1 << 21}  # elements from which two threads gain, steps every 1 ms too
SMALLEST = min(LEAST.values())
_one_at_a_time = threading.Lock()
_process = os.getpid()


def available():
    """None, or the reason why not."""
    if not find_spec("numba"):
        return "numba is not installed: pip install numba"
    return "NUMBA_DISABLE_JIT is set, and its kernels run compiled only: unset it" if jit_disabled() else None


def jit_disabled():
    """Whether Numba is told to compile nothing; found out without importing Numba."""
    told = getattr(sys.modules.get("numba.core.config"), "DISABLE_JIT", None)  # this counts once Numba is imported
    if told is not None:
        return bool(told)
    try:
        return bool(int(os.environ.get("NUMBA_DISABLE_JIT") or 0))
    except ValueError:  # then Numba warns and compiles
        return False


def kernel(recipe, parallel=False):
    kernels, own = compiler()
    if isinstance(recipe.rule, str):
        return kernels.kernel(recipe.rule, recipe.general, recipe.dtype, parallel)
    return own.kernel(recipe.rule, recipe.dtype, parallel)


@cache
def compiler():
    try:
        from . import kernels, own
    except ImportError as error:
        raise RuntimeError(f"backend='numba' is not available, importing numba failed: {error}") from error
    return kernels, own


class Update(plan.Update):
    """An update by one call of a kernel, which takes the tensors one after the other or shares them out among threads."""

    def __init__(self, coefficients, missed, tensors):
        super().__init__(coefficients, missed, tensors)
        rows = [(param.size, *map(host.address, (param, grad, *states))) for param, grad, states in tensors]
        self.table = np.array([len(rows), 0, 0, 0, *chain.from_iterable(rows)], np.intp)
        self.elements = sum(row[0] for row in rows)
        _ = self.shared if parts_of(self.elements) > 1 else self.alone  # compiles now: what Numba refuses, it refuses here
        if self.elements < SMALLEST:
            self.run = self.alone  # no bound method: a cycle would keep gradients until gc runs

    def take(self):
        rows = self.coefficients.rows
        self.table[1:4] = host.address(rows), self.first, self.stride * rows.strides[0]

    @cached_property
    def alone(self):
        return self._kernel(parallel=False)

    @cached_property
    def shared(self):
        return self._kernel(parallel=True)

    def _kernel(self, parallel):
        made = kernel(self.coefficients.recipe, parallel)
        return partial(made.get_overload(made.signatures[0]), host.address(self.table))  # past Numba's dispatch on types

    def run(self, number):
        if threads.count() == 1 or not in_parallel(self, number):
            self.alone(number)


def in_parallel(update, number):
    """Run an update on several threads, unless the guard forbids it; returns whether it ran."""
    parts = parts_of(update.elements)
    if parts == 1 or not _one_at_a_time.acquire(blocking=False):
        return False
    try:
        update.shared(number, parts)
        return True
    finally:
        _one_at_a_time.release()


def parts_of(elements):
    """On how many threads an update of `elements` elements should run in this process."""
    parts = threads.count()
    if elements < SMALLEST or parts == 1 or os.getpid() != _process:
        return 1
    name, most = started()
    return min(parts, most) if elements >= LEAST.get(name, 0) else 1


@cache
def started():
    """Start the threading layer; returns (its name, its number of threads), or (None, 1) where there is none."""
    import numba

    try:
        numba.get_num_threads()
        return numba.threading_layer(), numba.config.NUMBA_NUM_THREADS
    except (ImportError, OSError, ValueError):
        return None, 1


update = partial(plan.update, Update)


class Plan(plan.Plan):
    """A plan whose updates are made by Numba."""

    kind = Update

    def __init__(self, *arguments, **options):
        import logging  # noqa: F401  Numba uses it in the first step: see backends.forks.Forks

        super().__init__(*arguments, **options)
