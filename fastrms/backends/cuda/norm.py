"""What a step looks at before it updates: backends/norm.py on the device, with the same bits, by norm_kernels.py.

No step waits for the norm of all gradients: the factor stays in device memory, in the rows of coefficients that the kernels
of the rules read, and the norm is read when somebody asks for it.  A sum of squares of float32 numbers cannot overflow a
double, so only blocks of float64 have a scale of their own.  What is not finite is counted in the same segments; decide.py
says what becomes of these counts.
"""

import math
from functools import cache
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ...memory import device
from ...storage import BF16, FP16, of_buffer
from .. import norm as host_norm
from . import toolchain
from .driver import read
from .launch import Arguments, Table, kernel_of

THREADS, LANES, SLOTS = 256, host_norm.LANES, 1024
PER_SEGMENT = host_norm.SEGMENT // host_norm.BLOCK  # blocks
KERNELS = ("segment_sums", "clip")  # after those that sum the lanes, in this order; of float64 their names end in _double
HALVES = {BF16: "bf16", FP16: "fp16"}
MAXIMIZES, SPLITS = 1, 2  # of a target: its gradient is negated; its kernel takes a second factor


@cache
def loaded(name, index):
    """A kernel of norm_kernels.py, loaded on a device."""
    return kernel_of(toolchain.compiler().compiled_norm, name, index=index)


class Run(NamedTuple):
    """Gradients of one dtype that follow on each other: the name of this dtype, the addresses of their rows and of the
    gradient of each block, the address of what the kernel leaves, and the number of blocks."""

    of: str
    rows: int
    tensor_of: int
    lanes: int
    blocks: int


class Scan:
    """Kernels that look at all gradients of a plan: a launch for each Run, whose threads leave a number for each lane, and
    one whose threads add these up in segments."""

    def __init__(self, index):
        self.index, self.table, self.scratch = index, Table(), None

    def _set(self, grads, numbers, allocate, wide=(), narrow=()):
        """Set the gradients.  numbers: how many the kernels leave for a block, and for a segment; wide, narrow: arrays of
        uint64 and of uint32 that kernels read.  Returns the addresses of wide, then of first_of and of narrow."""
        _, tensor_of, first_of = blocked(grads)
        runs = [(of, *blocked([*run])[:2]) for of, run in groupby(grads, dtype_name)]
        parts = [*wide, *(rows for _, rows, _ in runs), first_of, *narrow, *(blocks for *_, blocks in runs)]
        there = self.table.set(parts, allocate, self.index)
        self.segments = first_of.size - 1
        count = numbers[0] * tensor_of.size + numbers[1] * self.segments
        if self.scratch is None or self.scratch.size != count:
            self.scratch = allocate(count, np.dtype(np.uint64), self.index)
        rows, others = there[len(wide) : len(wide) + len(runs)], there[len(wide) + len(runs) : len(there) - len(runs)]
        self.runs, self.lanes = [], self.scratch.address
        self.sums = self.lanes
        for (of, _, blocks), *where in zip(runs, rows, there[len(there) - len(runs) :], strict=True):
            self.runs.append(Run(of, *where, self.sums, blocks.size))
            self.sums += 8 * numbers[0] * blocks.size
        return there[: len(wide)], others

    def send(self, handle):
        """Write to the device where the gradients are."""
        self.table.send(handle)

    def _launches(self, kernel, tail, others):
        """Launches of a kernel for each Run, named after its dtype, and of others, as the rows of Launches.  tail(of): the
        memory of the other arguments of a Run."""
        made = [(f"{kernel}_{run.of}", run[1:], tail(run.of), run.blocks * LANES) for run in self.runs]
        return Launches([*made, *others], self.index)


class Launches:
    """Kernels that are launched one after the other.  rows: (name, first arguments, memory of the other ones, threads)."""

    def __init__(self, rows, index):
        self.names = [name for name, *_ in rows]
        self.arguments = [Arguments(loaded(name, index), head, tail, -(-threads // THREADS), THREADS)
                          for name, head, tail, threads in rows]  # fmt: skip

    def launch(self, handle):
        for name, arguments in zip(self.names, self.arguments, strict=True):
            if arguments.launch(handle):
                raise RuntimeError(f"launching fastrms_{name} failed on the GPU")


class Norm(Scan):
    """The norm of the gradients of one plan, and the clipping by it.

    aim() gives it the gradients, and the launches whose coefficients it changes.
    """

    def __init__(self, index):
        super().__init__(index)
        self.slots = None
        self.number = 0  # of steps

    def aim(self, grads, launches, allocate):
        """Set the gradients, and the launches whose coefficients lie on the device."""
        of = "_double" if grads[0].dtype == np.float64 else ""  # all are, or none
        rows_of_targets = np.array([launch.device_row.address for launch in launches], np.uint64)
        kinds = np.array([kind_of(launch.coefficients.recipe) for launch in launches], np.uint32)
        numbers = (LANES + 1, 2) if of else (LANES, 1)  # with an exponent each
        (targets,), (first_of, kinds) = self._set(grads, numbers, allocate, [rows_of_targets], [kinds])
        self.slots = self.slots or allocate(SLOTS, np.dtype(np.float64), self.index)
        self.launches = self._launches("lane_sums", lambda of: np.empty(0), [
            (KERNELS[0] + of, [self.lanes, first_of, self.sums, self.segments], np.empty(0), self.segments),
            (KERNELS[1] + of, [self.sums, self.segments, targets, kinds, len(launches)], np.empty(5), 1),
        ])  # fmt: skip

    def run(self, handle, grad_scale, clip_norm):
        """Launch the kernels; returns a Later."""
        slot = self.number % SLOTS
        self.number += 1
        mantissa, exponent = math.frexp(clip_norm) if clip_norm < math.inf else (0.0, 0)
        tail = self.launches.arguments[-1].tail
        tail[:8] = np.uint64(self.slots.address + 8 * slot).tobytes()
        tail[8:32] = np.array([grad_scale, clip_norm, mantissa]).tobytes()
        tail[32:] = np.int64(exponent).tobytes()
        self.launches.launch(handle)
        return Later(self, slot, self.number)


def kind_of(recipe):
    """What a target is, of MAXIMIZES and SPLITS."""
    ours = isinstance(recipe.rule, str)
    return MAXIMIZES * (ours and recipe.values["grad_scale"] < 0) + SPLITS * (not ours or recipe.general)


def dtype_name(grad):
    """What the kernels for a gradient of this dtype are named after."""
    return HALVES.get(of_buffer(grad)) or ("double" if grad.dtype.itemsize == 8 else "float")


def blocked(grads):
    """(rows, tensor_of, first_of): of each gradient its address, its size and its first block; the gradient of each block;
    the first block of each segment, and the number of blocks."""
    addresses, sizes = (np.array([getattr(grad, name) for grad in grads], np.int64) for name in ("address", "size"))
    blocks = -(-sizes // host_norm.BLOCK)
    first = np.cumsum(blocks) - blocks
    starts = [np.arange(f, f + n, PER_SEGMENT) for f, n in zip(first, blocks, strict=True)]
    rows = np.stack([addresses, sizes, first], axis=1).astype(np.uint64).reshape(-1)
    tensor_of = np.repeat(np.arange(len(grads), dtype=np.uint32), blocks)
    return rows, tensor_of, np.concatenate([*starts, [blocks.sum()]]).astype(np.uint32)


class Nonfinite(Scan):
    """Counts the elements of gradients that are not finite, or whose square overflows, in segments of each gradient."""

    def aim(self, grads, allocate):
        """Set the gradients: index of a tensor -> gradient."""
        which = sorted(grads, key=lambda k: dtype_name(grads[k]))  # a Run for each dtype: the order of counts is free
        _, (first_of,) = self._set([grads[k] for k in which], (LANES, 1), allocate)
        segments_of = [-(-grads[k].size // host_norm.SEGMENT) for k in which]
        self.tensor_of_segment = np.repeat(which, segments_of)
        shape = (self.segments,), (1,)
        self.counts = device.DeviceArray(self.scratch.owner, self.sums, *shape, np.dtype(np.uint64), self.index)
        self.launches = self._launches("lane_counts", lambda of: np.zeros(1, f"f{8 if of == 'double' else 4}"), [
            ("segment_counts", [self.lanes, first_of, self.sums, self.segments], np.empty(0), self.segments),
        ])  # fmt: skip

    def zeros(self, state):
        """Launches that write zeros over the gradients where the third number of state is not 0."""
        made = [(f"lane_zeros_{run.of}", run._replace(lanes=state.address)[1:], np.empty(0), run.blocks * LANES)
                for run in self.runs]  # fmt: skip
        return Launches(made, self.index)

    def count(self, handle, grad_scale):
        """Launch the kernels, which leave their counts in self.counts."""
        for arguments in self.launches.arguments[:-1]:
            arguments.tail[:] = np.array([grad_scale], f"f{len(arguments.tail)}").tobytes()
        self.launches.launch(handle)

    def read(self, handle):
        """(how many, the index of the first tensor that has one, -1 for none); the host waits for this stream."""
        counts = read(self.counts, handle)
        return int(counts.sum()), int(self.tensor_of_segment[counts > 0].min()) if counts.any() else -1


class Later:
    """What a clipped step has found, which is read from the device when it is asked for."""

    nonfinite, tensor = None, -1  # the first is 0 where nonfinite elements were counted, too

    def __init__(self, of, slot, number):
        self._of, self._slot, self._number = of, slot, number

    @property
    def grad_norm(self):
        """The norm; the host waits for the device."""
        if self._of.number - self._number >= SLOTS:
            raise RuntimeError(f"this norm was not asked for within {SLOTS} steps, and is no longer there")
        return float(self._there().to_host()[0])

    def read(self, handle):
        """The norm of the last step; the host waits for this stream alone."""
        return float(read(self._there(), handle)[0])

    def _there(self):
        slots = self._of.slots
        return device.DeviceArray(slots.owner, slots.address + 8 * self._slot, (1,), (0,), slots.dtype, slots.device)
