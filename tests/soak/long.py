"""Checks of long and large runs: dying gradients, millions of steps, counts beyond 2^31, more than 2^32 elements."""

import ctypes
import mmap
import os
import time
from pathlib import Path

import numpy as np

import fastrms
from fastrms import backends

from . import NotRun, check

c = backends.load("c")


def need_c():
    if c.lib is None:
        raise NotRun("fastrms was built without its C extension")


DYING = {
    "RMSProp": lambda w, rho: fastrms.RMSProp(w, rho=rho),
    "RMSProp with all states": lambda w, rho: fastrms.RMSProp(w, rho=rho, momentum=rho, centered=True),
    "Adam": lambda w, rho: fastrms.Adam(w, beta1=rho, beta2=rho),
    "AdaGrad": lambda w, rho: fastrms.AdaGrad(w),
}
BLOCK = 200


def shortest_of_blocks(optimizer, steps):
    """The shortest time of a step in each block of steps."""
    times = np.empty(steps)
    for k in range(steps):
        start = time.perf_counter_ns()
        optimizer.step()
        times[k] = time.perf_counter_ns() - start
    return times.reshape(-1, BLOCK).min(axis=1)


@check({"steps": 4000, "rho": 0.9, "most": np.inf})
def zero_gradients(steps=100_000, rho=0.99, most=2):
    """After many steps with gradients of zero the steps are as fast as at first, and no subnormal number is in a state."""
    found, tiny = [], np.finfo(np.float32).tiny
    for name, make in DYING.items():
        grad = np.full(4099, 1e-6, np.float32)
        optimizer = make(np.ones_like(grad), rho)
        optimizer.bind(grad)
        optimizer.step()
        grad[:] = 0
        times = shortest_of_blocks(optimizer, steps)
        left = sum(int(((x != 0) & (np.abs(x) < tiny)).sum()) for x in optimizer.state.values())
        assert left == 0, f"{name}: {left} subnormal numbers are left"
        last, slowest = times[-5:].min() / times[:5].min(), times.max() / times[:5].min()
        assert last <= most, f"{name}: the last steps take {last:.2f} times the time of the first"
        found.append(f"{name} {last:.2f} ({slowest:.1f})")
    ratios = f"time of the last (of the slowest {BLOCK}) over the first: {'; '.join(found)}"
    return f"{steps:,} steps each; {ratios}; 0 subnormal numbers left"


def resources():
    """(KiB of memory, without that of files; descriptors; threads) of this process."""
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (
        (resident - of_files) * mmap.PAGESIZE // 1024,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def small_steps(steps):
    """Steps in every way: through c_step, bound, with a fresh gradient, and functions of raw arrays."""
    param, grads = np.ones(7, np.float32), [np.full(7, k, np.float32) for k in (1, 2)]
    bound, fresh, state = fastrms.Adam(param.copy()), fastrms.RMSProp(param.copy(), clip_value=1.0), np.ones(7, np.float32)
    bound.bind(grads[0])
    function, plan = bound.c_step
    in_c = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(function)
    for k in range(steps // 10):
        for _ in range(7):
            in_c(plan)
        bound.step()
        fresh.step(grads[k & 1], clip_norm=1.0)
        fastrms.rmsprop(param, grads[0], state, lr=1e-3)
    assert bound.steps == steps // 10 * 8 and fresh.steps == steps // 10


@check({"steps": 20_000})
def many_steps(steps=10_000_000):
    """Small steps in every way of calling: memory, file descriptors and threads stay as they are."""
    need_c()
    small_steps(min(steps, 100_000))
    before = resources()
    small_steps(steps)
    after = resources()
    assert after[1:] == before[1:] and after[0] - before[0] <= 256, f"before {before}, after {after}"
    return f"{steps:,} steps: {after[0] - before[0]} KiB of memory, 0 descriptors, 0 threads more"


COUNTS = [2**24, 2**31, 2**32, 2**53]


@check({"around": 3})
def large_counts(around=1000):
    """Steps are counted exactly beyond 2^24 (floats), 2^31, 2^32 and 2^53, and the C backend has the bits of NumPy there."""
    need_c()
    for count in COUNTS:
        made = []
        for backend in ("c", "numpy"):
            param, grad = (np.linspace(-1, 1, 37).astype(np.float32) for _ in range(2))
            optimizer = fastrms.Adam(param, backend=backend, beta2=0.9999999)
            saved = optimizer.state_dict()
            saved["steps"] = saved["tensors"][0]["steps"] = count - around
            optimizer.load_state_dict(saved)
            for _ in range(2 * around):
                optimizer.step(grad)
            assert optimizer.steps == count + around, f"{optimizer.steps} steps, not {count} + {around}"
            made.append(param.tobytes())
        assert made[0] == made[1], f"other bits than NumPy near {count}"
    return f"{2 * around:,} steps across each of 2^24, 2^31, 2^32 and 2^53"


# more elements than memory: one file, mapped one time behind the other

PIECE = 2**20  # elements of float32: 4 MiB
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def mapped(address, nbytes, protection, flags, file):
    found = libc.mmap(address, nbytes, protection, flags, file, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        raise NotRun(f"this process may not map {nbytes / 2**30:.0f} GiB ({os.strerror(ctypes.get_errno())})")
    return found


class Repeated:
    """An array of `size` float32 in which element k is element k % PIECE of a file of 4 MiB."""

    def __init__(self, size, values):
        nbytes, step, fixed = -(-4 * size // mmap.PAGESIZE) * mmap.PAGESIZE, 4 * PIECE, 0x10
        file = os.memfd_create("repeated")
        os.truncate(file, step)
        self.nbytes, self.address = nbytes, mapped(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1)
        for at in range(0, nbytes, step):
            protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed
            mapped(self.address + at, min(step, nbytes - at), protection, flags, file)
        os.close(file)
        self.array = np.frombuffer((ctypes.c_float * size).from_address(self.address), np.float32)
        self.piece = self.array[:PIECE]
        self.piece[:] = values

    def close(self):
        libc.munmap(self.address, self.nbytes)


def over_and_over(make, hyper, size):
    """Whether one step over so many elements is what as many steps as there are pieces make of the elements of the file."""
    rng = np.random.default_rng(3)
    values, grads = (rng.standard_normal(PIECE).astype(np.float32) for _ in range(2))
    states, samples = fastrms.init_state(make, values, **hyper), [0, 1, 2, 3, 1003, PIECE - 1]
    large = [Repeated(size, x) for x in (values, grads, *states.values())]
    small = [x[samples].copy() for x in (values, grads, *states.values())]
    numbered = {"step": 1} if make in ("adagrad", "adam") else {}
    update, names = getattr(fastrms, make), list(states)
    update(*[x.array for x in large[:2]], **dict(zip(names, (x.array for x in large[2:]), strict=True)), **numbered, **hyper)
    for piece in range(-(-size // PIECE)):
        there = np.array([k for k, at in enumerate(samples) if piece * PIECE + at < size])
        part = [x[there] for x in small]
        update(*part[:2], **dict(zip(names, part[2:], strict=True)), **numbered, **hyper, backend="numpy")
        for whole, x in zip(small, part, strict=True):
            whole[there] = x
    right = all(np.array_equal(x.piece[samples], y) for x, y in zip(large, small, strict=True))
    for x in large:
        x.close()
    return right


@check({"sizes": [3 * PIECE + 3]})
def large_arrays(sizes=(2**31 + 3, 2**32 + 3)):
    """Arrays of more than 2^31 and 2^32 elements: each element is updated once (4 MiB, mapped one time behind the other)."""
    need_c()
    threads = fastrms.get_num_threads()
    fastrms.set_num_threads(1)  # pieces share their memory, so that they must be updated one after the other
    try:
        for size in sizes:
            for make, hyper in (("rmsprop", {"lr": 1e-4}), ("adagrad", {"lr": 1e-2}), ("adam", {"lr": 1e-5}), ("rprop", {})):
                assert over_and_over(make, hyper, size), f"{make}, {size} elements: wrong elements"
    finally:
        fastrms.set_num_threads(threads)
    return f"4 rules, {' and '.join(f'{size:,}' for size in sizes)} elements; the same bits as repeated updates of the file"
