"""What a step looks at before it updates: backends/norm.py on the device, with the same bits, by norm_kernels.py.

No step waits for the norm of all gradients: the factor stays in device memory, in the rows of coefficients that the kernels
of the rules read, and the norm is read when somebody asks for it.  A sum of squares of float32 numbers cannot overflow a
double, so only blocks of float64 have a scale of their own.  Whether all gradients are finite decides what the host does
next, so a step waits for that.
"""

import math
from functools import cache
from itertools import groupby

import numpy as np

from ...memory import device
from ...storage import BF16, FLOAT, FP16, OF_DTYPE, of_buffer
from .. import norm as host_norm
from . import toolchain
from .driver import read
from .launch import Arguments, Table, kernel_of

THREADS, LANES, SLOTS = 256, host_norm.LANES, 1024
PER_SEGMENT = host_norm.SEGMENT // host_norm.BLOCK  # blocks
KERNELS = ("segment_sums", "clip")  # after those that sum the lanes, in this order; of float64 their names end in _double
LANE_SUMS = {FLOAT: "lane_sums", BF16: "lane_sums_bf16", FP16: "lane_sums_fp16"}
LANE_COUNTS = {BF16: "bf16", FP16: "fp16"}
REAL = np.dtype(np.float32), np.dtype(np.float64)
MAXIMIZES, SPLITS = 1, 2  # of a target: its gradient is negated; its kernel takes a second factor


@cache
def loaded(name, index):
    """A kernel of norm_kernels.py, loaded on a device."""
    return kernel_of(toolchain.compiler().compiled_norm, name, index=index)


class Norm:
    """The norm of the gradients of one plan, and the clipping by it.

    aim() gives it the gradients, and the launches whose coefficients it changes.
    """

    def __init__(self, index):
        self.index = index
        self.table, self.scratch, self.slots = Table(), None, None
        self.number = 0  # of steps

    def aim(self, grads, launches, allocate):
        """Set the gradients, and the launches whose coefficients lie on the device."""
        _, blocks_of_all, first_of = blocked(grads)
        rows_of_targets = np.array([launch.device_row.address for launch in launches], np.uint64)
        kinds = np.array([kind_of(launch.coefficients.recipe) for launch in launches], np.uint32)
        runs = [(format, *blocked([*run])[:2]) for format, run in groupby(grads, of_buffer)]
        parts = [rows_of_targets, *(rows for _, rows, _ in runs), first_of, kinds, *(blocks for *_, blocks in runs)]
        there = self.table.set(parts, allocate, self.index)
        count = len(runs)
        rows = zip(runs, there[1 : 1 + count], there[3 + count :], strict=True)
        self.of = "_double" if grads[0].dtype == np.float64 else ""  # all are, or none
        lanes = [(LANE_SUMS[run[0]] + self.of, table, tensor_of, run[2].size) for run, table, tensor_of in rows]
        fixed = there[0], there[1 + count], there[2 + count]
        self._make_arguments(lanes, fixed, blocks_of_all.size, first_of.size - 1, len(launches), allocate)

    def _make_arguments(self, runs, there, blocks, segments, targets, allocate):
        """runs: of each run of gradients in one format the kernel, its table and the number of its blocks."""
        rows_of_targets, first_of, kinds = there
        per_block, per_segment = (LANES + 1, 2) if self.of else (LANES, 1)  # with an exponent each
        numbers = blocks * per_block + segments * per_segment
        if self.scratch is None or self.scratch.size != numbers:
            self.scratch = allocate(numbers, np.dtype(np.float64), self.index)
        self.slots = self.slots or allocate(SLOTS, np.dtype(np.float64), self.index)
        lanes, sums = self.scratch.address, self.scratch.address + 8 * blocks * per_block
        heads, at = [], lanes
        for _, rows, tensor_of, count in runs:
            heads.append(([rows, tensor_of, at, count], np.empty(0), count * LANES))
            at += 8 * count * per_block
        self.names = [*(name for name, *_ in runs), *(name + self.of for name in KERNELS)]
        self.arguments = launches_of([loaded(name, self.index) for name in self.names], [
            *heads,
            ([lanes, first_of, sums, segments], np.empty(0), segments),
            ([sums, segments, rows_of_targets, kinds, targets], np.empty(5), 1),
        ])  # fmt: skip

    def run(self, handle, grad_scale, clip_norm):
        """Launch the kernels; returns a Later."""
        slot = self.number % SLOTS
        self.number += 1
        mantissa, exponent = math.frexp(clip_norm) if clip_norm < math.inf else (0.0, 0)
        tail = self.arguments[-1].tail
        tail[:8] = np.uint64(self.slots.address + 8 * slot).tobytes()
        tail[8:32] = np.array([grad_scale, clip_norm, mantissa]).tobytes()
        tail[32:] = np.int64(exponent).tobytes()
        for name, arguments in zip(self.names, self.arguments, strict=True):
            if arguments.launch(handle):
                raise RuntimeError(f"launching fastrms_{name} failed on the GPU")
        return Later(self, slot, self.number)


def kind_of(recipe):
    """What a target is, of MAXIMIZES and SPLITS."""
    ours = isinstance(recipe.rule, str)
    return MAXIMIZES * (ours and recipe.values["grad_scale"] < 0) + SPLITS * (not ours or recipe.general)


def launches_of(kernels, rows):
    """The Arguments of each kernel.  rows: (first arguments, memory of the other ones, threads)."""
    rows = zip(kernels, rows, strict=True)
    return [Arguments(kernel, head, tail, -(-threads // THREADS), THREADS) for kernel, (head, tail, threads) in rows]


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


class Nonfinite:
    """Counts the elements of gradients of one dtype that are not finite, or whose square overflows; the host waits."""

    def __init__(self, dtype, index):
        of = LANE_COUNTS.get(OF_DTYPE.get(dtype), "double" if dtype.itemsize == 8 else "float")
        self.dtype, self.index, self.table, self.memory = REAL[of == "double"], index, Table(), None
        self.kernels = [loaded(name, index) for name in (f"lane_counts_{of}", "segment_counts")]

    def aim(self, grads, allocate):
        rows, tensor_of, first_of = blocked(grads)
        rows, there_of, there_first = self.table.set([rows, tensor_of, first_of], allocate, self.index)
        lanes, segments = tensor_of.size * LANES, first_of.size - 1
        if self.memory is None or self.memory.size != lanes + segments:
            self.memory = allocate(lanes + segments, np.dtype(np.uint64), self.index)
        sums = self.memory.address + 8 * lanes
        self.found = device.DeviceArray(self.memory.owner, sums, (segments,), (1,), self.memory.dtype, self.index)
        self.tensor_of_segment = tensor_of[first_of[:-1]]
        self.arguments = launches_of(self.kernels, [
            ([rows, there_of, self.memory.address, tensor_of.size], np.zeros(1, self.dtype), lanes),
            ([self.memory.address, there_first, sums, segments], np.empty(0), segments),
        ])  # fmt: skip

    def count(self, handle, grad_scale):
        """(how many, the index of the first gradient that has one, -1 for none)."""
        self.table.send(handle)
        self.arguments[0].tail[:] = self.dtype.type(grad_scale).tobytes()
        if any(arguments.launch(handle) for arguments in self.arguments):
            raise RuntimeError("launching the count of nonfinite gradients failed on the GPU")
        counts = read(self.found, handle)
        return int(counts.sum()), int(self.tensor_of_segment[counts > 0][0]) if counts.any() else -1


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
