"""The storage formats: how float32 numbers are stored in fewer bytes.

A format says how a buffer of numbers lies in memory.  A step decodes the numbers to float32, updates them in float32, and
encodes what it stores; the rules know nothing of formats.  csrc/formats.h says the same from random_of() to split8_decoded()
in C, with the same names in the same order; the tests hold the two equal in every bit.  The functions here take arrays of
uint32 with one element per number: u has the bits of a float32, a those of its magnitude, random 32 random bits or is None.

An encoder adds noise to the bits, and then drops the lowest bits.  The noise is half a unit of the last bit that stays, with
ties to even (rounding to nearest, where random is None), or as many random bits as are dropped (stochastic rounding): then
the mean of what is stored is the number itself.  The random bits of an element depend on the seed, on the number of the
step, on the buffer and on the position of the element, and on nothing else: never on threads or on how a tensor is divided.

The blocks of q8 and q8u are 256 elements, counted from the first element of the tensor.  The codes of all elements are
followed by one int32 per block, its `base`, from the next multiple of 64 bytes on.  Bytes that are all 0 decode to zeros.

The error of each format stands in FORMATS[name].error.  It is the largest difference between a float32 and what decode()
makes of it, for rounding to nearest; it is less than twice as large for stochastic rounding.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

INFINITE, SIGN, MAGNITUDE, QUIET = 0x7F800000, 0x80000000, 0x7FFFFFFF, 0x7FC00000  # bits of float32 numbers
Q8_BLOCK, Q8_ALIGNMENT = 256, 64  # elements; bytes
Q8_LARGEST = 0x7F7  # the upper 12 bits of the largest number that a code stands for


class Rounding(NamedTuple):
    """How an encoder rounds: at random or to nearest, with a key() and the position of the first element in its tensor."""

    stochastic: bool = False
    key: int = 0
    position: int = 0


def key(seed, step, stream):
    """The key of the random bits of one buffer at one step: a hash of all three by the finaliser of splitmix64.

    Parameters
    ----------
    seed : int
        The seed of the optimizer.
    step : int
        The number of the update of the tensor, from 1.
    stream : int
        0 for the parameter, 1, 2 and 3 for the states in the order of the rule.

    Returns
    -------
    int
        32 bits.  Source: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (4 * step + stream)) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 32


def random_of(position, key):
    """The random bits of elements: a hash of their positions."""
    w = position * np.uint32(0x9E3779B9) + key
    return (w ^ (w >> 15)) * np.uint32(0x2C1B3C6D)


def bits_of(x):
    return x.view(np.uint32)


def float_of(u):
    return u.view(np.float32)


def noise(u, dropped, random):
    """What is added to bits before the lowest are dropped."""
    return (1 << (dropped - 1)) - 1 + ((u >> dropped) & 1) if random is None else random >> (32 - dropped)


def whole(t, random):
    """The float t, 0 <= t < 1024, rounded to a whole number."""
    if random is None:
        return bits_of(t + np.float32(2**23)) - np.uint32(0x4B000000)
    return ((t * np.float32(2**21)).astype(np.uint32) + (random >> 11)) >> 21


def bf16_decoded(h):
    return h << 16


def bf16_encoded(u, random):
    a = u & MAGNITUDE
    return np.where(a > INFINITE, (u >> 16) | 0x40, (u + noise(u, 16, random)) >> 16)


def fp16_decoded(h):
    m = (h & 0x7FFF) << 13
    u = bits_of(float_of(m) * np.float32(2.0**112))
    return np.where(m >= 0x0F800000, u | INFINITE, u) | (h & 0x8000) << 16


def fp16_magnitude(a, random):
    small = whole(float_of(np.where(a < 0x38800000, a, np.uint32(0))) * np.float32(2**24), random)
    large = ((a + noise(a, 13, random)) >> 13).astype(np.int32) - 0x1C000
    return np.where(a < 0x38800000, small, np.minimum(large, 0x7C00).astype(np.uint32))


def fp16_encoded(u, random):
    a = u & MAGNITUDE
    return np.where(a > INFINITE, np.uint32(0x7E00), fp16_magnitude(a, random)) | (u & SIGN) >> 16


def fp16s_encoded(u, random):
    """As fp16, but a number that is too large becomes the largest, and no number but 0 becomes 0."""
    a = u & MAGNITUDE
    c = fp16_magnitude(a, random)
    c = np.where(a < INFINITE, np.minimum(c, 0x7BFF), c)
    c = np.where(a > 0, np.maximum(c, 1), c)
    return np.where(a > INFINITE, np.uint32(0x7E00), c) | (u & SIGN) >> 16


def q8u_base(top):
    """The base of a block, from the largest finite magnitude in it."""
    return np.maximum((top >> 20).astype(np.int32) - 253, 0)


def q8u_encoded(u, base, random):
    a = u & MAGNITUDE
    c = np.minimum((a + noise(a, 20, random)) >> 20, Q8_LARGEST).astype(np.int32) - base
    c = np.clip(c, 1, 254).astype(np.uint32)
    return np.where(a == 0, np.uint32(0), np.where(a >= INFINITE, np.uint32(255), c))


def q8u_decoded(code, base):
    u = (code + base.astype(np.uint32)) << 20
    return np.where(code == 0, np.uint32(0), np.where(code == 255, np.uint32(INFINITE), u))


def q8_base(top):
    """The base of a block; it is a multiple of 8, which is a power of 2 in the numbers."""
    return (np.maximum((top >> 20).astype(np.int32) - 149, 0) + 7) & ~7


def q8_unit(base):
    """The distance of the numbers below the eighth, which are at equal distances down to 0."""
    return float_of((base + 8) << 20)


def q8_per_unit(base):
    return float_of((2024 - base) << 20)


def q8_encoded(u, base, random):
    a = u & MAGNITUDE
    linear = a < (base + 32).astype(np.uint32) << 20
    small = whole(float_of(np.where(linear, a, np.uint32(0))) * q8_per_unit(base), random)
    c = np.minimum((a + noise(a, 20, random)) >> 20, Q8_LARGEST).astype(np.int32) - (base + 24)
    m = np.where(linear, small, np.minimum(c, 126).astype(np.uint32))
    return np.where(a >= INFINITE, np.uint32(127), m) | (u & SIGN) >> 24


def q8_decoded(code, base):
    m = code & 127
    small = bits_of(m.astype(np.float32) * q8_unit(base))
    large = (m + base.astype(np.uint32) + 24) << 20
    return np.where(m == 127, np.uint32(QUIET), np.where(m < 8, small, large)) | (code & 128) << 24


def without_payload(u):
    """The bits, those of one NaN for all."""
    return np.where((u & MAGNITUDE) > INFINITE, np.uint32(QUIET), u)


def split16_high(u):
    """The nearest bf16, the larger of two that are equally near."""
    return (u + 0x8000) >> 16


def split16_decoded(high, low):
    """A remainder below 0 belongs to no 0: somebody has written the 0 since, and the number would be NaN."""
    return (high << 16) + np.where(high & 0x7FFF, (low ^ 0x8000) - np.uint32(0x8000), low & 0x7FFF)


def split8_rounded(u, random):
    """The upper 24 bits, rounded."""
    return np.where((u & MAGNITUDE) > INFINITE, np.uint32(QUIET >> 8), (u + noise(u, 8, random)) >> 8)


def split8_high(v):
    return (v + 0x80) >> 8


def split8_decoded(high, low):
    return ((high << 8) + np.where(high & 0x7FFF, (low ^ 0x80) - np.uint32(0x80), low & 0x7F)) << 8


# Buffers.  Each format makes one or two arrays of all elements, and of these all elements again.


def alone(encoded):
    """An encoder that makes one array."""
    return lambda u, random: (encoded(u, random),)


def split16_parts(u, random):
    u = without_payload(u)
    return split16_high(u), u & 0xFFFF


def split8_parts(u, random):
    v = split8_rounded(u, random)
    return split8_high(v), v & 0xFF


def in_blocks(base_of, encoded):
    """An encoder that makes codes, and the bases of their blocks."""

    def parts(u, random):
        a = u & MAGNITUDE
        finite = np.zeros(Q8_BLOCK * blocks(u.size), np.uint32)
        finite[: u.size] = np.where(a < INFINITE, a, np.uint32(0))
        bases = base_of(finite.reshape(-1, Q8_BLOCK).max(axis=1))
        return encoded(u, of_elements(bases, u.size), random), bases

    return parts


def of_blocks(decoded):
    return lambda code, bases: decoded(code, of_elements(bases.view(np.int32), code.size))


def blocks(size):
    return -(-size // Q8_BLOCK)


def first_base(size):
    """Where the bases of blocks begin behind the codes, in bytes."""
    return -(-size // Q8_ALIGNMENT) * Q8_ALIGNMENT


def of_elements(bases, size):
    return np.repeat(bases, Q8_BLOCK)[:size]


class Format(NamedTuple):
    """A storage format.

    Parameters
    ----------
    number : int
        Its number in C.
    name : str
    dtype : numpy.dtype
        Of an element of the stored array; it is unsigned, and arrays of any dtype of this size are viewed as it.
    low : numpy.dtype or None
        Of an element of the second array, which has the remainders of split16 and split8.
    kinds : str
        What may be stored in it.
    error : str
        How far what decode() gives can be from what encode() took.
    encode, decode : callable
        From bits of float32 to the arrays that are stored, and back.
    """

    number: int
    name: str
    dtype: np.dtype
    low: np.dtype | None
    kinds: str
    error: str
    encode: Callable
    decode: Callable

    @property
    def in_blocks(self):
        return self.name in ("q8", "q8u")


U8, U16, U32 = map(np.dtype, (np.uint8, np.uint16, np.uint32))
Q8_ENDS = "; the largest number is 1.875 * 2^127"
FORMATS = {
    made.name: made
    for made in (
        Format(
            0, "float32", U32, None, "gradients, parameters, states", "none",
            alone(lambda u, random: u), lambda u: u,
        ),
        Format(
            1, "bf16", U16, None, "gradients, parameters, copies, states",
            "2^-8 of the number; 2^-134 below 2^-126; NaN stays NaN, and numbers beyond the largest bf16 become infinite",
            alone(bf16_encoded), bf16_decoded,
        ),
        Format(
            2, "fp16", U16, None, "gradients, parameters, copies",
            "2^-11 of the number; 2^-25 below 2^-14; NaN stays NaN, and numbers beyond 65504 become infinite",
            alone(fp16_encoded), fp16_decoded,
        ),
        Format(
            3, "fp16s", U16, None, "states",
            "2^-11 of the number; 2^-25 below 2^-14; 2^-24 below 2^-24, where every number but 0 becomes 2^-24, which is "
            "too large, for stochastic rounding, too; NaN stays NaN, and finite numbers beyond 65504 become 65504",
            alone(fp16s_encoded), fp16_decoded,
        ),
        Format(
            4, "q8", U8, None, "states",
            "1/16 of the number from 2^-13 of the largest finite magnitude of the block on; below, 2^-17 of the largest, or "
            "2^-127 where this is more; infinite numbers and NaN become NaN, and change no other number" + Q8_ENDS,
            in_blocks(q8_base, q8_encoded), of_blocks(q8_decoded),
        ),
        Format(
            5, "q8u", U8, None, "states that are never negative",
            "1/16 of the number from 2^-31 of the largest finite magnitude of the block on; smaller numbers become at most "
            "2^-31 of the largest, and never 0 unless they are 0; 2^-129 below 2^-126; infinite numbers and NaN become "
            "infinite, and change no other number" + Q8_ENDS,
            in_blocks(q8u_base, q8u_encoded), of_blocks(q8u_decoded),
        ),
        Format(
            6, "split16", U16, U16, "parameters", "none; all NaN become one",
            split16_parts, split16_decoded,
        ),
        Format(
            7, "split8", U16, U8, "parameters",
            "2^-16 of the number; 2^-142 below 2^-126; NaN stays NaN, and numbers beyond the largest become infinite",
            split8_parts, split8_decoded,
        ),
    )
}  # fmt: skip


def stored_bytes(format, size):
    """The bytes of the buffer for `size` elements: of the stored array, or of the remainders of split16 and split8."""
    if format.in_blocks:
        return first_base(size) + 4 * blocks(size)
    return size * (format.low or format.dtype).itemsize


def parts_of(format, stored, low, size, begin, end):
    """The arrays in which the elements [begin, end) are stored."""
    if format.in_blocks:
        bases = stored[first_base(size) :].view(np.uint32)
        return stored.view(U8)[begin:end], bases[begin // Q8_BLOCK : blocks(end)]
    parts = (stored.view(format.dtype),) if format.low is None else (stored.view(format.dtype), low.view(format.low))
    return tuple(part[begin:end] for part in parts)


def decode(format, stored, size, low=None, begin=0, end=None):
    """The elements [begin, end) of a stored tensor.

    Parameters
    ----------
    format : Format
    stored : numpy.ndarray
        Flat, with elements of the format's size; for q8 and q8u `stored_bytes(format, size)` bytes.
    size : int
        The elements of the tensor.
    low : numpy.ndarray, optional
        The remainders of split16 and split8.
    begin, end : int, optional
        begin is a multiple of 256; the default is the whole tensor.

    Returns
    -------
    numpy.ndarray
        float32.
    """
    parts = parts_of(format, stored, low, size, begin, size if end is None else end)
    with np.errstate(all="ignore"):
        return float_of(format.decode(*(part.astype(np.uint32) for part in parts)))


def encode(format, x, stored, size, rounding, low=None, begin=0):
    """Store numbers as the elements [begin, begin + x.size) of a tensor.

    Parameters
    ----------
    format : Format
    x : numpy.ndarray
        float32, flat; it ends at a multiple of 256 or at the end of the tensor.
    stored, size, low : as in decode
        What lies outside of these elements is not written.
    rounding : Rounding
        Its position is that of the element `begin`.
    begin : int, optional
        A multiple of 256, the default is 0.
    """
    parts = parts_of(format, stored, low, size, begin, begin + x.size)
    with np.errstate(all="ignore"):
        random = random_of(positions(rounding, x.size), rounding.key) if rounding.stochastic else None
        for part, made in zip(parts, format.encode(bits_of(x), random), strict=True):
            part[:] = made


def positions(rounding, size):
    """The positions of elements, modulo 2^32."""
    return np.arange(size, dtype=np.uint32) + np.uint32(rounding.position % 2**32)
