"""Tensors whose buffers are stored in formats, for the compiled kernels and for NumPy: every format in every place."""

from types import SimpleNamespace

import cases
import execute
import numpy as np
from test_formats import Buffers

from fastrms import formats, rules, storage
from fastrms.backends import plan
from fastrms.backends.coefficients import Coefficients
from fastrms.backends.cuda import launch, table
from fastrms.backends.cuda.kernel import Kind
from fastrms.backends.cuda.table import Formats
from fastrms.backends.numpy import Update

FORMATS = formats.FORMATS
F32 = np.dtype(np.float32)
PLACES = {place: [name for name, made in FORMATS.items() if place in made.kinds] for place in ("gradients", "parameters",
                                                                                             "copies")}  # fmt: skip
SEED, ORIGIN, STEP = 2**63 + 5, 2**32 - 100, 7  # positions pass 2^32


def state_formats(rule):
    """The formats of the states of a rule, a tuple for each state_format that it can have."""
    names = rules.state_names(rules.RULES[rule])
    for said in (None, *storage.SIGNED):
        if not any((said, name) in storage.NEEDS_FLOATS for name in names):
            yield tuple(storage.FLOAT.name if said is None else
                        storage.named(said, not cases.never_negative(name)).name for name in names)  # fmt: skip


def of_rule(rule, number):
    """Formats for a rule: each of those that its states may have, beside parameters, gradients, copies and roundings that
    go on from case to case, as `number` does from rule to rule."""
    for k, states in enumerate(state_formats(rule), 4 * number):
        param = PLACES["parameters"][k % len(PLACES["parameters"])]
        grad = PLACES["gradients"][(k + number) % len(PLACES["gradients"])]
        copies = [(), ("bf16",), ("fp16", "bf16")][(k // 2) % 3]
        for stochastic in (True, False) if k % 2 or "q8" in states else (True,):
            yield Formats((param, *states), grad, copies, stochastic)


ALL = [(rule, made) for number, rule in enumerate(rules.RULES) for made in of_rule(rule, number)]


def dtypes_of(name):
    """The dtypes of the arrays of elements of a format."""
    return [dtype for dtype in (FORMATS[name].dtype, FORMATS[name].low) if dtype]


def named(value):
    return value.name if isinstance(value, Formats) else None


class Stored:
    """A tensor with its buffers between guard zones, `offset` elements behind an aligned address, those with an index in
    `apart` one element further on."""

    def __init__(self, made, buffers, offset=0, apart=()):
        param, grad, *states = buffers
        self.formats, self.size, self.parts = made, param.size, []
        names = [made.written[0], made.grad, *made.written[1:], *made.copies]
        for k, (name, x) in enumerate(zip(names, [param, grad, *states, *[param] * len(made.copies)], strict=True)):
            self.parts.append(self.at(FORMATS[name], x, offset + (k in apart)))
        self.buffers = [
            execute.Buffer(array) for part in self.parts for array in (part.stored, part.low) if array is not None
        ]

    @staticmethod
    def at(format, x, offset):
        """The first element lies `offset` elements behind a multiple of the size of four."""
        for k in range(4):
            made = Buffers(format, x.size, (k if not format.in_blocks else 0))
            starts = [array.ctypes.data // array.itemsize % 4 for array in (made.stored, made.low) if array is not None]
            if format.in_blocks or all(start == offset % 4 for start in starts):
                return made.encode(x, formats.Rounding())
        raise AssertionError((format.name, offset))

    def tensor(self, address=True):
        """The plan.StoredTensor of these arrays, or of their addresses."""
        there = (lambda x: SimpleNamespace(address=x.ctypes.data, dtype=x.dtype)) if address else lambda x: x
        param, grad, *others = self.parts
        states, copies = others[: len(self.formats.written) - 1], others[len(self.formats.written) - 1 :]
        stored = plan.StoredTensor.__new__(plan.StoredTensor)
        part = lambda x: plan.Part(x.format, there(x.stored), None if x.low is None else there(x.low))  # noqa: E731
        stored.written = [part(x) for x in (param, *states)]
        stored.read = [stored.written[0], part(grad), *stored.written[1:]]
        stored.copies, stored.size, stored.missed = [part(x) for x in copies], self.size, 0
        stored.storage = storage.Storage(None, (), stochastic=self.formats.stochastic, seed=SEED, origin=ORIGIN)
        return stored

    def expected(self, recipe):
        """What the parts hold after a step of NumPy, as arrays (stored, low)."""
        copy = Stored(self.formats, [np.zeros(self.size, F32)] * (1 + len(self.formats.written)))
        for mine, theirs in zip(copy.parts, self.parts, strict=True):
            for to, source in ((mine.stored, theirs.stored), (mine.low, theirs.low)):
                if to is not None:
                    to[:] = source
        made = plan.TiledUpdate(Update, Coefficients(recipe), 0, [copy.tensor(address=False)])
        made.make_coefficients(STEP, 1.0)
        made.run(STEP)
        return copy

    def check(self, wanted, zero_grad=False):
        """The bits of NumPy, every byte written once, the gradient untouched or zero, nothing else written."""
        for k, (mine, theirs) in enumerate(zip(self.parts, wanted.parts, strict=True)):
            x, y = mine.decode(), theirs.decode()
            assert mine.intact()
            if k == 1 and zero_grad:
                assert not mine.stored.any()
                continue
            assert np.array_equal(cases.bits(x), cases.bits(y)), (k, mine.format.name)
            numbers = ~np.isnan(y)
            for a, b in zip(arrays(mine), arrays(theirs), strict=True):
                there = numbers if a.size == numbers.size else slice(None)
                assert np.array_equal(a[there], b[there]), (k, mine.format.name)
        for part, buffers in self.stored_by_part():
            once = 0 if part is self.parts[1] and not zero_grad else 1
            for buffer in buffers:
                used = np.ones(buffer.stores.size, bool)
                if part.format.in_blocks:
                    used[self.size : formats.first_base(self.size)] = False
                assert (buffer.stores == once * used).all(), part.format.name

    def stored_by_part(self):
        left = iter(self.buffers)
        return [(part, [next(left) for array in (part.stored, part.low) if array is not None]) for part in self.parts]


def arrays(part):
    return formats.parts_of(part.format, part.stored, part.low, part.size, 0, part.size)


def start(rule, size, ordinary=True):
    return cases.buffers_of(rule, F32, size, ordinary)


def kind_of(made, **more):
    return Kind(formats=made, **more)


def run(kernel, kind, recipe, tensors, backwards=False, made=1):
    """As the backend launches it.  made: 0 leaves the step out, where the kernel is capturable."""
    which, coefficients = kind.formats, np.array(recipe.at(STEP, 1.0)).astype(F32)
    keys = np.array([formats.key(SEED, STEP, stream) for stream in which.streams], np.uint32)
    tail = np.concatenate([coefficients, keys.view(F32)])
    others = [ORIGIN % 2**32] * bool(which.streams)
    found = [(launch.addresses_of(tensor.tensor()), tensor.size, *others) for tensor in tensors]
    if kind.many:
        rows, tensor_of = table.table(found, 4, which)
        head, blocks = [execute.Buffer(rows), execute.Buffer(tensor_of)], tensor_of.size
    else:
        ((addresses, size, *_),) = found
        count, blocks = table.grid(addresses, size, 4, which)
        head = [*addresses, size, count, *others]
    tail = [execute.Buffer(np.append(tail, F32.type(made)))] if kind.capturable else list(tail.view(np.uint32))
    kernel.launch(
        blocks, table.THREADS, [*head, *tail], [b for tensor in tensors for b in tensor.buffers], backwards=backwards
    )
