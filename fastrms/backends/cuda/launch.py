"""One kernel, its tensors and its coefficients: all that a launch hands to the driver."""

import numpy as np

from ... import own_rules, rules
from ...memory import device
from .. import plan
from . import toolchain
from .driver import write
from .kernel import Kind, kernel_name
from .table import THREADS, blocks, table, vectors


@own_rules.remembered
def loaded(rule, general, dtype, kind, index):
    """A kernel, loaded on a device."""
    from cuda.core import ObjectCode

    made = toolchain.compiler().compiled(rule, general, dtype, kind, tuple(device.current(index).compute_capability))
    return ObjectCode.from_cubin(made.cubin).get_kernel(made.name)


class Launch(plan.Update):
    """A kernel over one or many tensors that share their coefficients and have missed the same number of steps.  It is kept
    from step to step, so aim() gives it its tensors; and run() takes a stream, too."""

    def __init__(self, recipe, many, capturable, index):
        from cuda.core import LaunchConfig, launch

        kind = Kind(many, capturable)
        self.itemsize, self.index = recipe.dtype.itemsize, index
        self.name = kernel_name(recipe.rule, recipe.general, recipe.dtype, kind)
        self.kernel = loaded(recipe.rule, recipe.general, recipe.dtype, kind, index)
        self.make_config, self.launch = LaunchConfig, launch
        self.table, self.table_host, self.table_sent = None, None, True
        self.count = len(rules.coefficient_names(rules.find(recipe.rule)))
        self.device_row = device.allocate(self.count, recipe.dtype, index) if capturable else None
        self.sent = None

    def aim(self, coefficients, missed, tensors):
        """Set the tensors of the next launches, a list of (param, grad, states), of which only the addresses are kept."""
        self.use(coefficients, missed)
        found = [([buffer.address for buffer in (param, grad, *states)], param.size) for param, grad, states in tensors]
        if len(found) == 1:
            addresses, size = found[0]
            count = vectors(addresses, size, self.itemsize)
            self.head, grid = (*addresses, size, count), blocks(size, count, self.itemsize)
        else:
            self.head, grid = self._aim_many(*table(found, self.itemsize))
        self.config = self.make_config(grid=grid, block=THREADS)

    def _aim_many(self, rows, tensor_of):
        """Note the table, which send() writes to the device; its memory there serves for every table of this size.  Returns
        the first arguments of the kernel and the number of blocks."""
        host = np.concatenate([rows.view(np.uint32), tensor_of])
        if self.table is None or self.table.size != host.size:
            self.table = device.allocate(host.size, host.dtype, self.index)
        if not np.array_equal(self.table_host, host):
            self.table_host, self.table_sent = host, False
        return (self.table.address, self.table.address + rows.nbytes), tensor_of.size

    def take(self):
        """Note the new coefficients as words.

        A float32 goes to cuda.core as the integer of its bits, of which the driver takes the low four bytes: cuda.core
        would widen a Python float, and a NumPy number costs it 0.5 us more.
        """
        self.words = memoryview(self.coefficients.rows).cast("B").cast("I" if self.itemsize == 4 else "d")

    def send(self, stream, number):
        """Write to the device what has changed: the table, and the coefficients of a capturable kernel."""
        if not self.table_sent:
            write(self.table.address, self.table_host, stream)
            self.table_sent = True
        if self.device_row is not None:
            row = self.taken[(number - self.first) * self.stride]
            if row.tobytes() != self.sent:
                write(self.device_row.address, row, stream)
                self.sent = row.tobytes()

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
