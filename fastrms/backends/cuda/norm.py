"""The norm of all gradients on the device, and the clipping by it: backends/norm.py as kernels, with the same bits.

No step waits for it: the factor stays in device memory, in the rows of coefficients that the kernels of the rules read, and
the norm is read when somebody asks for it.  A sum of squares of float32 numbers cannot overflow a double, so no block needs
a scale of its own; float64 gradients would need one, and are refused.  norm_kernels.py has the kernels.
"""

import math

import numpy as np

from ...memory import device
from .. import norm as host_norm
from . import toolchain
from .launch import Arguments, Table, kernel_of

THREADS, LANES, SLOTS = 256, host_norm.LANES, 1024
PER_SEGMENT = host_norm.SEGMENT // host_norm.BLOCK  # blocks
KERNELS = ("lane_sums", "segment_sums", "clip")  # in this order
MAXIMIZES, SPLITS = 1, 2  # of a target: its gradient is negated; its kernel takes a second factor


class Norm:
    """The norm of the gradients of one plan, and the clipping by it.

    aim() gives it the gradients, and the launches whose coefficients it changes.
    """

    def __init__(self, index):
        self.index = index
        self.kernels = [kernel_of(toolchain.compiler().compiled_norm, name, index=index) for name in KERNELS]
        self.table, self.scratch, self.slots = Table(), None, None
        self.number = 0  # of steps

    def aim(self, grads, launches, allocate):
        """Set the gradients, and the launches whose coefficients lie on the device."""
        sizes = np.array([grad.size for grad in grads], np.int64)
        addresses = np.array([grad.address for grad in grads], np.int64)
        blocks = -(-sizes // host_norm.BLOCK)
        first = np.cumsum(blocks) - blocks
        starts = [np.arange(f, f + n, PER_SEGMENT) for f, n in zip(first, blocks, strict=True)]
        narrow = [np.concatenate([*starts, [blocks.sum()]]), np.repeat(np.arange(len(grads)), blocks),
                  [kind_of(launch.coefficients.recipe) for launch in launches]]  # fmt: skip
        wide = [np.stack([addresses, sizes, first], axis=1).reshape(-1), [launch.device_row.address for launch in launches]]
        parts = [*(np.array(part, np.uint64) for part in wide), *(np.array(part, np.uint32) for part in narrow)]
        there = self.table.set(parts, allocate, self.index)
        self._make_arguments(there, int(blocks.sum()), narrow[0].size - 1, len(launches), allocate)

    def _make_arguments(self, there, blocks, segments, targets, allocate):
        rows, rows_of_targets, first_of, tensor_of, kinds = there
        numbers = blocks * LANES + segments
        if self.scratch is None or self.scratch.size != numbers:
            self.scratch = allocate(numbers, np.dtype(np.float64), self.index)
        self.slots = self.slots or allocate(SLOTS, np.dtype(np.float64), self.index)
        lanes, sums = self.scratch.address, self.scratch.address + 8 * blocks * LANES
        heads = [[rows, tensor_of, lanes, blocks], [lanes, first_of, sums, segments],
                 [sums, segments, rows_of_targets, kinds, targets]]  # fmt: skip
        calls = zip(self.kernels, heads, (0, 0, 5), (blocks * LANES, segments, 1), strict=True)
        self.arguments = [Arguments(kernel, head, np.empty(tail), -(-threads // THREADS), THREADS)
                          for kernel, head, tail, threads in calls]  # fmt: skip

    def run(self, handle, grad_scale, clip_norm):
        """Launch the kernels; returns a Later."""
        slot = self.number % SLOTS
        self.number += 1
        mantissa, exponent = math.frexp(clip_norm) if clip_norm < math.inf else (0.0, 0)
        tail = self.arguments[-1].tail
        tail[:8] = np.uint64(self.slots.address + 8 * slot).tobytes()
        tail[8:32] = np.array([grad_scale, clip_norm, mantissa]).tobytes()
        tail[32:] = np.int64(exponent).tobytes()
        for name, arguments in zip(KERNELS, self.arguments, strict=True):
            if arguments.launch(handle):
                raise RuntimeError(f"launching fastrms_{name} failed on the GPU")
        return Later(self, slot, self.number)


def kind_of(recipe):
    """What a target is, of MAXIMIZES and SPLITS."""
    ours = isinstance(recipe.rule, str)
    return MAXIMIZES * (ours and recipe.values["grad_scale"] < 0) + SPLITS * (not ours or recipe.general)


class Later:
    """What a clipped step has found, which is read from the device when it is asked for."""

    nonfinite, tensor = None, -1

    def __init__(self, of, slot, number):
        self._of, self._slot, self._number = of, slot, number

    @property
    def grad_norm(self):
        """The norm; the host waits for the device."""
        if self._of.number - self._number >= SLOTS:
            raise RuntimeError(f"this norm was not asked for within {SLOTS} steps, and is no longer there")
        slots = self._of.slots
        there = device.DeviceArray(slots.owner, slots.address + 8 * self._slot, (1,), (0,), slots.dtype, slots.device)
        return float(there.to_host()[0])
