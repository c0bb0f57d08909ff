"""The encoders and decoders of fastrms/formats.py as device functions.

Their text is called once per lane, with Numbers in place of arrays, which emit an instruction for each operation.  Float
products and sums are the calls of lower.py that round once; everything else is exact.
"""

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from ... import formats
from .lower import EMIT

U32, I32, F32, BOOL = map(np.dtype, (np.uint32, np.int32, np.float32, np.bool_))
WORD = ir.IntType(32)
TYPES = {U32: WORD, I32: WORD, F32: ir.FloatType(), BOOL: ir.IntType(1)}
OF_NUMBA = {types.uint32: U32, types.int32: I32, types.float32: F32, types.uint8: U32, types.uint16: U32}
STORED = {np.dtype(np.uint8): types.uint8, np.dtype(np.uint16): types.uint16, U32: types.float32}
Q8_LANES = 8  # of the 32 threads that share a block of q8
IN_BLOCKS = {
    "q8": (formats.q8_base, formats.q8_encoded, formats.q8_decoded),
    "q8u": (formats.q8u_base, formats.q8u_encoded, formats.q8u_decoded),
}


class Number:
    """A number in a register, which answers to the operations of formats.py as an array of NumPy does."""

    def __init__(self, builder, value, dtype):
        self.builder, self.value, self.dtype = builder, value, dtype

    def like(self, x):
        """Another number, or a literal, which takes the dtype of this one."""
        if isinstance(x, Number):
            return x
        dtype = np.dtype(type(x)) if isinstance(x, np.generic) else self.dtype
        return Number(self.builder, ir.Constant(TYPES[dtype], x if dtype == F32 else int(x) % 2**32), dtype)

    def apply(self, name, other):
        """An operation of the builder on this number and another one of its dtype."""
        other = self.like(other)
        if self.dtype != other.dtype:
            raise TypeError(f"{name} of {self.dtype} and {other.dtype}")
        return Number(self.builder, getattr(self.builder, name)(self.value, other.value), self.dtype)

    def rounded(self, name, other):
        """A sum or product of floats, rounded once; of integers, modulo 2^32."""
        if self.dtype != F32:
            return self.apply(name, other)
        return Number(self.builder, EMIT[name](self.builder, types.float32, self.value, self.like(other).value), F32)

    def __add__(self, other):
        return self.rounded("add", other)

    __radd__ = __add__

    def __mul__(self, other):
        return self.rounded("mul", other)

    def __sub__(self, other):
        return self.apply("sub", other)

    def __rsub__(self, other):
        return self.like(other) - self

    def __and__(self, other):
        return self.apply("and_", other)

    def __or__(self, other):
        return self.apply("or_", other)

    def __xor__(self, other):
        return self.apply("xor", other)

    def __lshift__(self, other):
        return self.apply("shl", other)

    def __rshift__(self, other):
        return self.apply("ashr" if self.dtype == I32 else "lshr", other)

    def view(self, dtype):
        dtype = np.dtype(dtype)
        if F32 not in (dtype, self.dtype) or dtype == self.dtype:
            return Number(self.builder, self.value, dtype)
        return Number(self.builder, self.builder.bitcast(self.value, TYPES[dtype]), dtype)

    def astype(self, dtype):
        dtype = np.dtype(dtype)
        if self.dtype == F32:
            return Number(self.builder, self.builder.fptoui(self.value, WORD), dtype)
        if dtype == F32:
            return Number(self.builder, self.builder.uitofp(self.value, TYPES[F32]), F32)
        return self.view(dtype)

    def chosen(self, condition, x, y):
        """x where the condition holds, else y."""
        condition = condition if condition.dtype == BOOL else condition != 0
        x, y = (x, x.like(y)) if isinstance(x, Number) else (y.like(x), y)
        return Number(self.builder, self.builder.select(condition.value, x.value, y.value), x.dtype)

    def __array_ufunc__(self, function, method, x, y):
        sign = {"minimum": "__lt__", "maximum": "__gt__"}[function.__name__]
        return self.chosen(getattr(x, sign)(y), x, y)

    def __array_function__(self, function, kinds, arguments, options):
        if function is np.where:
            return self.chosen(*arguments)
        x, low, high = arguments  # of np.clip
        return np.minimum(np.maximum(x, low), high)


def _comparison(sign):
    def method(self, other):
        name = "icmp_signed" if self.dtype == I32 else "icmp_unsigned"
        x, y = self, self.like(other)
        return Number(self.builder, getattr(self.builder, name)(sign, x.value, y.value), BOOL)

    return method


for _name, _sign in {"lt": "<", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    setattr(Number, f"__{_name}__", _comparison(_sign))
Number.__hash__ = None


def device_function(count, results, work):
    """An intrinsic of `count` numbers or tuples of lanes, of which it calls work(lane, *Numbers) for each lane; a number
    stands for as many equal lanes.  results: the types of the Numbers that work gives."""
    names = {"typed": lambda *kinds: _typed(kinds, results, work)}
    passed = ", ".join(f"argument_{k}" for k in range(count))
    exec(f"def codec(typing, {passed}): return typed({passed})", names)
    return intrinsic(names["codec"])


def _typed(kinds, results, work):
    """(signature, code) of a device function for arguments of these types."""
    lanes = next((kind.count for kind in kinds if isinstance(kind, types.UniTuple)), None)
    returned = results if lanes is None else [types.UniTuple(one, lanes) for one in results]

    def code(context, builder, signature, values):
        rows = []
        for lane in range(lanes or 1):
            numbers = [_number(builder, value, kind, lane) for value, kind in zip(values, kinds, strict=True)]
            rows.append([_packed(x, one) for x, one in zip(work(lane, *numbers), results, strict=True)])
        if lanes is None:
            return context.make_tuple(builder, signature.return_type, rows[0])
        columns = zip(*rows, strict=True)
        made = [context.make_tuple(builder, kind, column) for kind, column in zip(returned, columns, strict=True)]
        return context.make_tuple(builder, signature.return_type, made)

    return types.Tuple(returned)(*kinds), code


def _number(builder, value, kind, lane):
    if isinstance(kind, types.UniTuple):
        value, kind = builder.extract_value(value, lane), kind.dtype
    return Number(builder, builder.zext(value, WORD) if kind.bitwidth < 32 else value, OF_NUMBA[kind])


def _packed(x, kind):
    """The value of a Number in the type in which it is stored."""
    if kind is types.float32:
        return x.view(F32).value
    return x.builder.trunc(x.value, ir.IntType(kind.bitwidth)) if kind.bitwidth < 32 else x.value


def bits(x):
    return x.view(U32)


def decoder(name):
    """decode(stored, low) -> (numbers,), without low where the format has one array; the low of q8 is the base."""
    format = formats.FORMATS[name]
    if format.in_blocks:
        decoded = IN_BLOCKS[name][2]
        return device_function(2, [types.float32], lambda lane, code, base: [decoded(code, base)])
    count = 1 if format.low is None else 2
    return device_function(count, [types.float32], lambda lane, *parts: [format.decode(*map(bits, parts))])


def encoder(name, stochastic, stride=1):
    """encode(numbers, position, key) -> the parts that are stored, without position and key where it rounds to nearest; q8
    has the base behind the numbers.  position: that of the first lane, from which on others are `stride` apart."""
    format = formats.FORMATS[name]
    results = [STORED[dtype] for dtype in (format.dtype, format.low) if dtype]

    def work(lane, x, *more):
        *base, position, key = more if stochastic else (*more, None, None)
        random = formats.random_of(position + lane * stride, key) if stochastic else None
        if base:
            return [IN_BLOCKS[name][1](bits(x), *base, random)]
        return format.encode(bits(x), random)

    return device_function(1 + format.in_blocks + 2 * stochastic, results, work)


def magnitudes():
    """magnitudes(numbers, valid) -> (the bits of finite magnitudes,), those of lanes from 32 * lane = valid on are 0."""

    def work(lane, x, valid):
        a = bits(x) & formats.MAGNITUDE
        a = np.where(a < formats.INFINITE, a, np.uint32(0))
        return [np.where(valid > 32 * lane, a, np.uint32(0))]

    return device_function(2, [types.int32], work)


def base_of(name):
    """base(top) -> (base,) of a block of q8."""
    return device_function(1, [types.int32], lambda lane, top: [IN_BLOCKS[name][0](bits(top))])
