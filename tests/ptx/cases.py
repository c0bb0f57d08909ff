"""What the tests of this folder run: every rule, form, dtype and architecture, and one way to launch them all."""

from functools import cache

import execute
import numpy as np
import pytest
from conftest import DTYPES, Guarded, backends, bits, raw_recipe, wild_values

from fastrms import rules
from fastrms.backends.cuda import table, toolchain
from fastrms.backends.cuda.kernel import Kind

compiler = toolchain.compiler()

DIALECTS = [((8, 0), (9, 0)), ((10, 0), (12, 0))]  # of PTX: the texts for two architectures are often the same
ARCHITECTURES = [cc for dialect in DIALECTS for cc in dialect]
KINDS = [Kind(), Kind(capturable=True), Kind(many=True), Kind(True, True), Kind(zero_grad=True), Kind(True, True, True)]
LENGTHS = [*range(41), 255, 256, 257, 1023, 1024, 1025, 1026, 1027, 4099]


def every(*last):
    """Parameters of a test: every rule, form and dtype for each of these architectures, or dialects."""
    return [
        pytest.param(rule, general, dtype, each, id=f"{rule}-{'general' if general else 'neutral'}-{dtype}-{k}")
        for rule in rules.RULES
        for general in (False, True)
        for dtype in DTYPES
        for k, each in enumerate(last)
    ]


OTHER_KINDS = [
    pytest.param(rule, dtype, kind, cc, id=f"{rule}-{dtype}-{''.join(name for name, on in kind._asdict().items() if on)}")
    for rule in rules.RULES
    for dtype, cc in zip(DTYPES, [(9, 0), (12, 0)], strict=True)
    for kind in KINDS[1:]
]


@cache
def text(rule, general, dtype, kind, cc):
    return compiler.compile_ptx(rule, general, dtype, kind, cc)


@cache
def kernel(*which):
    return execute.Kernel(text(*which))


@cache
def norm_kernel(name, cc):
    return execute.Kernel(compiler.norm_ptx(name, cc))


def kernels(rule, general, dtype, kind, dialect):
    """The kernels for the architectures of a dialect, without those of the same instructions."""
    found = {}
    for cc in dialect:
        lines = text(rule, general, dtype, kind, cc).splitlines()
        found.setdefault("\n".join(line for line in lines if not line.startswith((".target", ".common"))), cc)
    return [kernel(rule, general, dtype, kind, cc) for cc in found.values()]


def recipe_of(rule, general, dtype, visible):
    """Every coefficient away from its neutral value; `visible`: eps large enough to show in every element."""
    recipe = raw_recipe(rule, dtype, general)
    return (
        recipe._replace(values={**recipe.values, "eps": 0.1, "decay": 0.01})
        if visible and "eps" in recipe.values
        else recipe
    )


def never_negative(name):
    """Whether a state holds no negative number."""
    return name.endswith(("sq", "square_avg", "sum"))


def coefficients_of(recipe):
    return np.array(recipe.at(1, 1.0)).astype(recipe.dtype)


def buffers_of(rule, dtype, size, ordinary):
    """param, grad and states: numbers of every magnitude and special ones, or ordinary ones."""
    names = rules.arguments(rules.RULES[rule])[: 2 + len(rules.state_names(rules.RULES[rule]))]
    values = [np.random.default_rng(k).standard_normal(size).astype(dtype) if ordinary else wild_values(size, dtype, k)
              for k, _ in enumerate(names)]  # fmt: skip
    return [np.abs(v) if never_negative(name) else v for name, v in zip(names, values, strict=True)]


def expected(recipe, buffers):
    """Param and states after a step in NumPy; C must agree where it is built."""
    results = []
    for name in ("numpy", "c"):
        if backends.load(name).available() is None:
            param, grad, *states = [b.copy() for b in buffers]
            backends.load(name).update(recipe, 1, 1.0, param, grad, states)
            results.append([bits(b) for b in (param, *states)])
    for got, want in zip(results[0], results[-1], strict=True):
        assert np.array_equal(got, want)
    return results[0]


class Tensor:
    """Guarded copies of buffers, the first element `offset` elements behind a 16-byte boundary; with `apart`, that of the
    gradient one element further on, so that there are no vectors."""

    def __init__(self, buffers, offset=0, apart=False):
        self.guarded = [self.at(values, offset + (apart and k == 1)) for k, values in enumerate(buffers)]
        self.buffers = [execute.Buffer(guarded.array) for guarded in self.guarded]
        self.addresses, self.size = [buffer.address for buffer in self.buffers], buffers[0].size

    @staticmethod
    def at(values, offset):
        guarded = Guarded(values)
        shift = -guarded.array.ctypes.data // values.itemsize % (16 // values.itemsize)
        return Guarded(values, shift + offset) if (shift + offset) else guarded

    def check(self, expected, grad, zero_grad=False):
        """Bits as expected, gradient untouched or all zero, each updated word stored once, nothing stored elsewhere."""
        param, gradient, *states = self.buffers
        for buffer, want in zip((param, *states), expected, strict=True):
            assert np.array_equal(bits(buffer.array), want[: self.size])
            assert (buffer.stores == 1).all()
        left = np.zeros_like(grad) if zero_grad else grad
        assert np.array_equal(bits(gradient.array), bits(left[: self.size])) and (gradient.stores == zero_grad).all()
        assert all(guarded.intact() for guarded in self.guarded)


def launch(kernel, kind, recipe, tensors, backwards=False, made=1):
    """As the backend launches it: the same table, the same vectors, blocks and coefficients.  made: 0 leaves it out."""
    itemsize, coefficients = recipe.dtype.itemsize, coefficients_of(recipe)
    if kind.many:
        rows, tensor_of = table.table([(tensor.addresses, tensor.size) for tensor in tensors], itemsize)
        head, grid = [execute.Buffer(rows), execute.Buffer(tensor_of)], tensor_of.size
    else:
        (tensor,) = tensors
        vectors = table.vectors(tensor.addresses, tensor.size, itemsize)
        head, grid = [*tensor.buffers, tensor.size, vectors], table.blocks(tensor.size, vectors, itemsize)
    tail = [execute.Buffer(np.append(coefficients, coefficients.dtype.type(made)))] if kind.capturable else coefficients
    regions = [buffer for tensor in tensors for buffer in tensor.buffers] if kind.many else []
    kernel.launch(grid, table.THREADS, [*head, *tail], regions, backwards=backwards)
