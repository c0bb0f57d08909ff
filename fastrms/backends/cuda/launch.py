"""One kernel, its tensors and its coefficients: all that a launch hands to the driver."""

import math
from collections import deque

import numpy as np

from ... import formats, own_rules, rules
from ...memory import device
from .. import plan
from . import toolchain
from .driver import stream_of, write
from .kernel import kernel_name
from .table import THREADS, grid, table

PENDING = 4096  # rows of coefficients that are kept unchanged for the driver; it lets no stream be as many launches behind
STAGED = 1 << 16  # bytes that the driver copies at once from any memory of the host; for more it may wait for the stream
AHEAD = 1024  # rows of coefficients on the device, from which it chooses where it decides whether a step is made


@own_rules.remembered
def loaded(rule, general, dtype, kind, index):
    """The kernel of a rule, loaded on a device."""
    return kernel_of(toolchain.compiler().compiled, rule, general, dtype, kind, index=index)


def kernel_of(compiled, *which, index):
    """What a function of compile.py compiles, loaded on a device."""
    from cuda.core import ObjectCode

    made = compiled(*which, tuple(device.current(index).compute_capability))
    return ObjectCode.from_cubin(made.cubin).get_kernel(made.name)


class Launch(plan.Update):
    """A kernel over one or many tensors that share their coefficients and have missed the same number of steps.  It is kept
    from step to step, so aim() gives it its tensors; and run() takes the handle of a stream, too.

    allocate(size, dtype, index) gives device memory, for the coefficients of a capturable kernel and for the table.
    """

    def __init__(self, recipe, kind, index, allocate):
        self.itemsize, self.kind, self.index = recipe.dtype.itemsize, kind, index
        self.count = len(rules.coefficient_names(rules.find(recipe.rule)))
        self.streams = kind.formats.streams if kind.formats else []
        self.numbers = self.count + len(self.streams) + kind.capturable  # all of one size; see kernel.Kind
        self.device_row = allocate(self.numbers, recipe.dtype, index) if kind.capturable else None
        self._aheads = {}  # rows -> device memory
        self._ahead_of, self._begin, self._end = None, 0, 0  # what the rows there were made from, for which steps
        self.name = kernel_name(recipe.rule, recipe.general, recipe.dtype, kind)
        self.kernel = loaded(recipe.rule, recipe.general, recipe.dtype, kind, index)
        self.arguments = None
        self.table = Table()
        self.rows_sent, self._row_there = deque(maxlen=PENDING), None

    def aim(self, coefficients, missed, tensors, allocate, rates=None, rows=0):
        """Set the tensors of the next launches, a list of (param, grad, states) or of StoredTensor, of which only the
        addresses are kept.  rates: where the recipe has no learning rate, a function that gives a list of them for the
        number of a step of the plan, and the place of that of the recipe.  rows: where the device decides which number a
        step has, the number of rows of coefficients that lie ahead of it, for as many steps; 1 where one row serves all
        steps."""
        self.use(coefficients, missed)
        if rows and rows not in self._aheads:
            self._aheads[rows] = allocate(rows * self.numbers, coefficients.recipe.dtype, self.index)
        self.rows, self.ahead = rows, self._aheads.get(rows)
        self.rates = rates
        self._row_there = None  # whoever aims may have changed what is on the device
        self.seed = tensors[0].storage.seed if self.streams else None
        found = [self._numbers(tensor) for tensor in tensors]
        if self.kind.many:
            parts = table(found, self.itemsize, self.kind.formats)
            head, blocks = self.table.set(parts, allocate, self.index), parts[1].size
        else:
            addresses, size, *others = found[0]
            count, blocks = grid(addresses, size, self.itemsize, self.kind.formats)
            head = *addresses, size, count, *others
        self.arguments = Arguments(self.kernel, head, self._tail(), blocks, THREADS)

    def _numbers(self, tensor):
        """What a kernel is told of a tensor: its addresses, its size, and where random numbers need it, the position of its
        first element."""
        if not self.kind.formats:
            param, grad, states = tensor
            return [buffer.address for buffer in (param, grad, *states)], param.size
        return addresses_of(tensor), tensor.size, *[tensor.storage.origin % 2**32] * bool(self.streams)

    def _tail(self):
        """The memory of the arguments behind the head: a row of numbers, or the address of the row on the device."""
        row = self.device_row
        return np.empty(self.numbers, f"f{self.itemsize}") if row is None else np.array([row.address], np.uint64)

    def keys(self, number):
        """The keys of the random numbers of step `number` of the plan."""
        return [formats.key(self.seed, number - self.missed, stream) for stream in self.streams]

    def make_coefficients(self, number, grad_scale, most_rows=1):
        """As an Update does; where the device decides, send() makes them."""
        if self.ahead is None:
            return super().make_coefficients(number, grad_scale, most_rows)
        self._scale, self._most_rows = grad_scale, most_rows
        return math.inf

    def take(self):
        """Note the new coefficients as bytes."""
        self.bytes = memoryview(self.coefficients.rows).cast("B")

    def send(self, handle, number, last):
        """Write to the device what has changed: parts of the table, and the coefficients of a capturable kernel for step
        `number` of the plan, or where the device decides, for those up to `last`."""
        self.table.send(handle)
        if self.ahead is not None:
            self._send_ahead(handle, number, last)
        elif self.device_row is not None:
            row = self._rows(number, 1)
            if row.tobytes() != self._row_there:
                self._row_there = None  # Ctrl-C may come before the write, and after it
                self.rows_sent.append(row)
                write(self.device_row.address, row, handle)
                self._row_there = row.tobytes()

    def _send_ahead(self, handle, number, last):
        made_of = self.rows, self.coefficients, self.missed, self._scale, self.seed, self.rates
        one_serves_all = self.rows == 1
        if made_of != self._ahead_of or not (
            one_serves_all or max(self._begin, self._end - self.rows) <= number <= self._end
        ):
            self._ahead_of, self._begin, self._end = made_of, number, number
        if one_serves_all:
            last = self._begin
        while self._end <= last:
            until = self._end + STAGED // (self.numbers * self.itemsize)
            if self.rates:
                until = min(until, last + 1)
            else:
                until = min(until, number + self.rows, super().make_coefficients(self._end, self._scale, self._most_rows))
            rows = self._rows(self._end, until - self._end)
            self._write_ahead(rows, self._end % self.rows, handle)
            self._end += len(rows)

    def _write_ahead(self, rows, at, handle):
        """Write rows of coefficients behind the first `at` of them, from the start on where they come to the end."""
        fit = self.rows - at
        for part, start in ((rows[:fit], at), (rows[fit:], 0)):
            if part.size:
                self.rows_sent.append(part)
                write(self.ahead.address + start * self.numbers * self.itemsize, part, handle)

    def _rows(self, number, count):
        """What a capturable kernel reads, for `count` steps from step `number` of the plan on."""
        recipe = self.coefficients.recipe
        rows = np.ones((count, self.numbers), recipe.dtype)
        if self.rates:
            rates_of, place = self.rates
            with np.errstate(over="ignore", under="ignore"):
                for row, step in zip(rows, range(number, number + count), strict=True):
                    row[: self.count] = recipe.at_rate(rates_of(step)[place]).at(step - self.missed, self._scale)
        else:
            start = (number - self.first) * self.stride
            rows[:, : self.count] = self.taken[start : start + count] if self.stride else self.taken
        for row, step in zip(rows, range(number, number + count) if self.streams else (), strict=False):
            row[self.count : -1].view(np.uint32)[:] = self.keys(step)
        return rows

    def run(self, number, handle):
        """Launch step `number` of the plan on the stream of this handle."""
        if self.device_row is None:
            nbytes = self.count * self.itemsize
            start = (number - self.first) * self.stride * nbytes
            self.arguments.tail[:nbytes] = self.bytes[start : start + nbytes]
            if self.streams:
                self.arguments.tail[nbytes:] = np.array(self.keys(number), np.uint32).tobytes()
        status = self.arguments.launch(handle)
        if status:
            raise RuntimeError(f"launching {self.name} failed on the GPU: {status.name}")


def addresses_of(tensor):
    """The addresses of all buffers of a StoredTensor, as stored_kernel.buffers() lists these."""
    param, *states = tensor.written
    found = []
    for part in (param, tensor.read[1], *states, *tensor.copies):
        found.append(part.stored.address)
        if part.format.in_blocks:
            found.append(part.stored.address + formats.first_base(tensor.size))
        elif part.format.low:
            found.append(part.low.address)
    return found


class Table:
    """Flat arrays of numbers in one piece of device memory, of which send() writes those that have changed."""

    def __init__(self):
        self._memory = None
        self._parts, self._there = {}, {}  # address -> array, as they are to be and as they are
        self.reading = []  # (event, array) of each part that the driver may not have read yet

    def set(self, parts, allocate, index):
        """Note new arrays, the widest numbers first.  The memory serves for all of the same size.  Returns addresses."""
        words = sum(part.nbytes for part in parts) // 4
        if self._memory is None or self._memory.size != words:
            self._memory, self._there = allocate(words, np.dtype(np.uint32), index), {}
        starts = [self._memory.address + sum(part.nbytes for part in parts[:k]) for k in range(len(parts))]
        self._parts = dict(zip(starts, parts, strict=True))
        return starts

    def send(self, handle):
        for address, part in self._parts.items():
            if not np.array_equal(self._there.get(address), part):
                self.reading = [pair for pair in self.reading if not pair[0].is_done]
                self._there.pop(address, None)  # Ctrl-C may come after the write
                write(address, part, handle)
                self._there[address] = part
                self.reading.append((stream_of(handle).record(), part))


class Arguments:
    """A launch as the driver takes it: pointers to all arguments of the kernel.  It is made once for the same tensors; a
    step writes only what has changed, in a third of the time that cuda.core.launch takes.

    tail: the bytes of the arguments behind the first ones, all of one size; the driver copies them at the launch.
    """

    def __init__(self, kernel, head, tail, grid, block):
        from cuda.bindings import driver

        self._call, self._kernel = driver.cuLaunchKernelEx, driver.CUfunction(int(kernel.handle))
        self._head, self._tail, self._owner = np.array(head, np.uint64), tail, kernel
        self.tail = memoryview(tail).cast("B")
        self._pointers = np.concatenate([addresses_in(self._head), addresses_in(tail)])
        self._at = self._pointers.ctypes.data
        self._config = config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX = grid, block
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        self._handle = None

    def launch(self, handle):
        """The driver's answer, which is 0 where it has taken the launch."""
        if handle != self._handle:
            self._config.hStream = self._handle = handle
        return self._call(self._config, self._kernel, self._at, 0)[0]


def addresses_in(array):
    """The address of each number of a flat NumPy array."""
    return array.ctypes.data + array.itemsize * np.arange(array.size, dtype=np.uint64)
