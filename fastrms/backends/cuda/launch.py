"""One kernel, its tensors and its coefficients: all that a launch hands to the driver."""

from collections import deque

import numpy as np

from ... import own_rules, rules
from ...memory import device
from .. import plan
from . import toolchain
from .driver import write
from .kernel import kernel_name
from .table import THREADS, blocks, table, vectors

PENDING = 4096  # rows of coefficients that are kept unchanged for the driver; it lets no stream be as many launches behind


@own_rules.remembered
def loaded(rule, general, dtype, kind, index):
    """A kernel, loaded on a device."""
    from cuda.core import ObjectCode

    made = toolchain.compiler().compiled(rule, general, dtype, kind, tuple(device.current(index).compute_capability))
    return ObjectCode.from_cubin(made.cubin).get_kernel(made.name)


class Launch(plan.Update):
    """A kernel over one or many tensors that share their coefficients and have missed the same number of steps.  It is kept
    from step to step, so aim() gives it its tensors; and run() takes a stream, too.

    allocate(size, dtype, index) gives device memory, for the coefficients of a capturable kernel and for the table.
    """

    def __init__(self, recipe, kind, index, allocate):
        from cuda.core import LaunchConfig, launch

        self.itemsize, self.kind, self.index = recipe.dtype.itemsize, kind, index
        self.count = len(rules.coefficient_names(rules.find(recipe.rule)))
        self.device_row = allocate(self.count, recipe.dtype, index) if kind.capturable else None
        self.name = kernel_name(recipe.rule, recipe.general, recipe.dtype, kind)
        self.kernel = loaded(recipe.rule, recipe.general, recipe.dtype, kind, index)
        self.make_config, self.launch = LaunchConfig, launch
        self.table, self.parts, self.there = None, {}, {}
        self.reading = []  # (event, array) of each part that the driver may not have read yet
        self.rows_sent = deque([None], PENDING)

    def aim(self, coefficients, missed, tensors, allocate):
        """Set the tensors of the next launches, a list of (param, grad, states), of which only the addresses are kept."""
        self.use(coefficients, missed)
        found = [([buffer.address for buffer in (param, grad, *states)], param.size) for param, grad, states in tensors]
        if self.kind.many:
            self.head, grid = self._aim_many(*table(found, self.itemsize), allocate)
        else:
            addresses, size = found[0]
            count = vectors(addresses, size, self.itemsize)
            self.head, grid = (*addresses, size, count), blocks(size, count, self.itemsize)
        self.config = self.make_config(grid=grid, block=THREADS)

    def _aim_many(self, rows, tensor_of, allocate):
        """Note the two parts of the table by their addresses on the device, for send().  The memory there serves for every
        table of this size.  Returns the first arguments of the kernel and the number of blocks."""
        words = (rows.nbytes + tensor_of.nbytes) // 4
        if self.table is None or self.table.size != words:
            self.table, self.there = allocate(words, tensor_of.dtype, self.index), {}
        head = self.table.address, self.table.address + rows.nbytes
        self.parts = dict(zip(head, (rows, tensor_of), strict=True))
        return head, tensor_of.size

    def take(self):
        """Note the new coefficients as words.

        A float32 goes to cuda.core as the integer of its bits, of which the driver takes the low four bytes: cuda.core
        would widen a Python float, and a NumPy number costs it 0.5 us more.
        """
        self.words = memoryview(self.coefficients.rows).cast("B").cast("I" if self.itemsize == 4 else "d")

    def send(self, stream, number):
        """Write to the device what has changed: parts of the table, and the coefficients of a capturable kernel."""
        for address, part in self.parts.items():
            if not np.array_equal(self.there.get(address), part):
                self._send_part(address, part, stream)
        if self.device_row is not None:
            row = self.taken[(number - self.first) * self.stride].copy()
            if row.tobytes() != getattr(self.rows_sent[-1], "tobytes", bytes)():
                self.rows_sent.append(row)
                write(self.device_row.address, row, stream)

    def _send_part(self, address, part, stream):
        self.reading = [pair for pair in self.reading if not pair[0].is_done]
        write(address, part, stream)
        self.there[address] = part
        self.reading.append((stream.record(), part))

    def run(self, number, stream):
        """Launch step `number` of the plan on a stream of cuda.core."""
        if self.device_row is None:
            start = (number - self.first) * self.stride * self.count
            tail = self.words[start : start + self.count]
        else:
            tail = (self.device_row.address,)
        try:
            self.launch(stream, self.config, self.kernel, *self.head, *tail)
        except Exception as error:  # of cuda.core, whose own classes are not public
            raise RuntimeError(f"launching {self.name} failed: {error}") from error
