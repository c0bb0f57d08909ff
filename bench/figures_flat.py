"""FlatBuffer against separate arrays and one flat array; huge pages against pages of 4 KiB, on fresh allocations."""

import mmap
import time

import numpy as np

import fastrms
from fastrms.memory import placement

from . import figures_numpy
from .figures import at_least, at_most
from .figures_numpy import many_arrays, ratio
from .report import size_name

SECONDS = 6.0  # for each size
PASSES = 4  # over each set of buffers
WORK = 2**24  # elements of one measurement
PLACED = (
    "each buffer where fastrms.memory.placement puts it, its pages huge where the system gives them, unless it says 4 KiB"
)
HUGE, SMALL = "as placed", "4 KiB"
KEPT = 2**26  # bytes; malloc may hand out a smaller freed buffer again, with pages that were touched
prepare = figures_numpy.prepare


def one_tensor():
    """Bound steps over the same numbers, as names in a FlatBuffer, as one array, and as separate arrays."""
    arrays = many_arrays(0)
    flat = fastrms.FlatBuffer.like(arrays)
    whole, separate = fastrms.FlatBuffer.like([flat.data]), [array.copy() for array in arrays]
    bound = {
        "flat": (flat, flat.grads),
        "one array": (whole.data, whole.grad),
        "separate": (separate, [np.zeros_like(array) for array in arrays]),
    }
    calls = {}
    for name, (params, grads) in bound.items():
        optimizer = fastrms.RMSProp(params, backend="c")
        optimizer.bind(grads)
        calls[name] = optimizer.step
    what = f"FlatBuffer of {len(arrays)} x {arrays[0].size}, bound RMSProp step"
    yield at_most(f"{what}: time over one flat array", ratio(calls, "flat", "one array"), 1.05)
    yield at_least(f"{what}: over separate arrays", ratio(calls, "separate", "flat"), 1.0)


def huge_pages():
    for size in (2**20, 2**22, 2**24, 2**26):
        touched, stepped = measured(size)
        name = size_name(size)
        if 4 * size >= KEPT:
            yield at_least(f"first touch, {name}: over pages of 4 KiB", min(touched[SMALL]) / min(touched[HUGE]), 1.2)
        slower = min(stepped[HUGE]) / min(stepped[SMALL])
        yield at_most(f"RMSProp step, {name}: time over pages of 4 KiB", slower, 1.15)


def measured(size):
    """(seconds of allocating and filling, seconds of a step): each a dict kind of pages -> list over fresh allocations."""
    touched, stepped = {HUGE: [], SMALL: []}, {HUGE: [], SMALL: []}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(touched[HUGE]) < 3:
        sets = {}
        for kind in touched:
            start = time.perf_counter()
            sets[kind] = three_buffers(size, kind)
            touched[kind].append(time.perf_counter() - start)
        for _ in range(PASSES):
            for kind, (param, grad, square_avg) in sets.items():
                start = time.perf_counter()
                for _ in range(max(1, WORK // size)):
                    fastrms.rmsprop(param, grad, square_avg, lr=0.01, backend="c")
                stepped[kind].append(time.perf_counter() - start)
    return touched, stepped


def three_buffers(size, kind):
    """New well-placed float32 arrays, filled."""
    buffers = []
    for value in (1.0, 0.5, 0.0):
        allocate = placement.place if kind == HUGE else in_small_pages
        buffers.append(allocate(size, np.dtype(np.float32), [buffer.ctypes.data for buffer in buffers]))
        buffers[-1].fill(value)
    return buffers


def in_small_pages(size, dtype, beside):
    """A buffer as placement.place makes it, in memory for which huge pages are forbidden."""
    nbytes = size * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + placement.slack(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return placement.within(np.frombuffer(memory, np.uint8), nbytes, beside).view(dtype)


MEASUREMENTS = (one_tensor, huge_pages)
