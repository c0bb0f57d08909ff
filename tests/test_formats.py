"""The storage formats: what they decode, how they round, that their errors have the bounds that are written down, and that C
has the bits of Python.  With FASTRMS_EXHAUSTIVE=1 every float32 is encoded."""

import concurrent.futures
import functools
import itertools
import os
import subprocess

import cffi
import numpy as np
import pytest
from conftest import c
from test_build import COMPILER, ROOT

from fastrms import formats, self_check
from fastrms.formats import FORMATS, Rounding

NEAREST, STOCHASTIC = Rounding(), Rounding(True, formats.key(1, 2, 3), 2**32 - 300)  # the positions pass the end of 32 bits
LENGTHS = 0, 1, 7, 255, 256, 257, 1003
BASES = {"q8": (0, 8, 16, 120, 800, 1784), "q8u": (0, 1, 7, 8, 9, 800, 1785)}  # at which every code is a finite number
SIXTEEN = np.arange(2**16, dtype=np.uint32)

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_rounding = pytest.mark.parametrize("rounding", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
in_16_bits = pytest.mark.parametrize("name", ["bf16", "fp16", "fp16s"])
in_blocks = pytest.mark.parametrize("name", ["q8", "q8u"])


def floats(bits):
    return np.asarray(bits).astype(np.uint32).view(np.float32)


def around(bits):
    """These bits, and their neighbours."""
    return (np.asarray(bits, np.int64)[:, None] + (-1, 0, 1)).reshape(-1) % 2**32


def powers(*exponents):
    return np.ldexp(1.0, np.arange(*exponents))


@functools.cache
def sample():
    """Every 65,521st float32; every exponent; the ties of each format and their neighbours; and blocks of numbers of many
    magnitudes, for the formats with blocks."""
    rng = np.random.default_rng(3)
    exponents = np.arange(512) << 23
    ties = [around((np.arange(2**n) << (32 - n)) + (1 << (31 - n))) for n in (12, 16)]  # of q8, q8u and bf16
    of_fp16 = around((np.arange(0x32800000 >> 13, 0x48000000 >> 13) << 13) + 0x1000)
    of_24_bits = around((np.arange(0, 2**24, 251) << 8) + 0x80)
    small = around(floats_of_doubles((np.arange(1024) + 0.5) * 2.0**-24).view(np.uint32))  # subnormal numbers of fp16
    signed = np.concatenate([of_fp16, of_fp16 + 2**31, small, small + 2**31])
    parts = [np.arange(0, 2**32, 65521), around(exponents), *ties, signed, of_24_bits]
    sorted_ = floats(np.concatenate(parts))
    return np.concatenate([sorted_, rng.permutation(sorted_[: 2**16]), blocks(rng).reshape(-1)])


def floats_of_doubles(x):
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(np.float32)


def blocks(rng):
    """1000 blocks of 256 numbers, of which the largest has any exponent; half of the numbers of the first half are ties."""
    top = floats_of_doubles(np.ldexp(rng.uniform(1, 2, 1000), rng.integers(-149, 128, 1000))).astype(np.float64)
    x = top[:, None] * 2.0 ** -rng.uniform(0, 36, (1000, 256)) * rng.choice([-1, 1], (1000, 256))
    x[:, 7] = top
    unit = formats.q8_unit(formats.q8_base(top.astype(np.float32).view(np.uint32))).astype(np.float64)
    x[:500, 128:] = (np.arange(128) % 8 + 0.5) * unit[:500, None]
    return floats_of_doubles(x)


class Buffers:
    """The arrays of a stored tensor, each between guard zones and some elements behind an aligned address."""

    ZONE, FILL = 64, 0xA5

    def __init__(self, format, size, offset=0):
        self.format, self.size, self.memory = format, size, []
        in_bytes = formats.stored_bytes(format, size) if format.in_blocks else size * format.dtype.itemsize
        self.stored = self._array(in_bytes, format.dtype, 4 * offset if format.in_blocks else offset)
        self.low = None if format.low is None else self._array(size * format.low.itemsize, format.low, offset)

    def _array(self, in_bytes, dtype, offset):
        memory = np.full(in_bytes + 2 * self.ZONE + 16, self.FILL, np.uint8)
        start = self.ZONE + offset * dtype.itemsize
        self.memory.append((memory, start, start + in_bytes))
        return memory[start : start + in_bytes].view(dtype)

    def encode(self, x, rounding, begin=0):
        formats.encode(self.format, x, self.stored, self.size, rounding, self.low, begin)
        return self

    def decode(self, begin=0, end=None):
        return formats.decode(self.format, self.stored, self.size, self.low, begin, end)

    def codes(self):
        return self.stored[: self.size].astype(np.uint32)

    def bases(self):
        return self.stored[-(-self.size // 64) * 64 :].view(np.int32)

    def intact(self):
        """Whether only the elements and their bases have been written."""
        gap = self.stored[self.size : -(-self.size // 64) * 64] if self.format.in_blocks else self.stored[:0]
        zones = [zone for memory, start, end in self.memory for zone in (memory[:start], memory[end:])]
        return all((zone == self.FILL).all() for zone in (*zones, gap))

    def same(self, other):
        return all(np.array_equal(x[0], y[0]) for x, y in zip(self.memory, other.memory, strict=True))


def encoded(format, x, rounding=NEAREST, offset=0):
    return Buffers(format, x.size, offset).encode(x, rounding)


def cast(name, x):
    """The codes that another library makes of float32 numbers."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bf16" else np.float16
    with np.errstate(all="ignore"):
        return x.astype(dtype).view(np.uint16)


def same_numbers(x, y):
    """Whether the bits are equal, but for those of NaN."""
    nan = np.isnan(x)
    return np.array_equal(nan, np.isnan(y)) and np.array_equal(x[~nan].view(np.uint32), y[~nan].view(np.uint32))


def stored_codes(format, codes, low=None):
    made = Buffers(format, codes.size)
    made.stored[: codes.size] = codes
    if low is not None:
        made.low[:] = low
    return made


def all_codes(format):
    """Buffers with all codes, or with a large sample of them."""
    if format.name == "float32":
        return stored_codes(format, sample().view(np.uint32))
    if format.in_blocks:
        bases = BASES[format.name]
        made = stored_codes(format, np.tile(np.arange(256), len(bases)))
        made.bases()[:] = bases
        return made
    low = None if format.low is None else SIXTEEN * np.uint32(40503)
    return stored_codes(format, SIXTEEN, low)


def steady_codes(format):
    """all_codes(), without NaN of other bits than those which an encoder makes, and without the highest codes of a block,
    which an encoder makes only of a number that is less."""
    made = all_codes(format)
    nan = np.isnan(made.decode())
    if format.in_blocks:
        codes = made.codes()
        drop = codes == 254 if format.name == "q8u" else (codes & 127) == 126
        made.stored[: made.size][drop] = 0
    elif format.name != "float32":
        made.stored[nan] = 0x7FC0 if format.name == "bf16" else 0x7E00 if format.low is None else 0
    if format.low is not None:
        made.low[(made.stored & 0x7FFF) == 0] = 0  # no encoder makes a remainder below 0 beside a 0
    return made


# decoding


@in_16_bits
def test_all_codes_decode_as_elsewhere(name):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if name == "bf16" else np.float16
    with np.errstate(all="ignore"):
        there = SIXTEEN.astype(np.uint16).view(dtype).astype(np.float32)
    assert same_numbers(all_codes(FORMATS[name]).decode(), there)


def by_upper_bits(n):
    """The float32 whose upper 12 bits are n: an exponent and 3 bits."""
    return np.where(n < 8, n * 2.0**-129, np.ldexp(1 + n % 8 / 8, n // 8 - 127))


@in_blocks
def test_all_codes_of_blocks(name):
    made = all_codes(FORMATS[name])
    code, base = made.codes().astype(np.int64), np.repeat(np.asarray(BASES[name], np.int64), 256)
    if name == "q8u":
        expected = np.where(code == 0, 0.0, np.where(code == 255, np.inf, by_upper_bits(code + base)))
    else:
        m = code & 127
        small = m * np.ldexp(1.0, base // 8 - 126)
        expected = np.where(m == 127, np.nan, np.where(m < 8, small, by_upper_bits(m + base + 24)))
        expected = np.copysign(expected, np.where(code >= 128, -1.0, 1.0))
        assert (np.diff(made.decode().reshape(-1, 256)[:, :127], axis=1) > 0).all(), "a larger code is a larger number"
    finite = expected[np.isfinite(expected)]
    assert (finite.astype(np.float32) == finite).all()
    assert same_numbers(made.decode(), expected.astype(np.float32))


@each_format
def test_bytes_of_0_are_zeros(format):
    made = Buffers(format, 1003)
    made.stored[:] = 0
    if made.low is not None:
        made.low[:] = 0
    assert not made.decode().view(np.uint32).any()


# rounding to nearest


@in_16_bits
def test_nearest_is_the_cast_of_other_libraries(name):
    x = sample()
    here, there = encoded(FORMATS[name], x).codes(), cast(name, x)
    if name == "fp16s":  # it saturates, and nothing but 0 becomes 0
        there = np.where(np.isfinite(x) & (there & 0x7FFF == 0x7C00), there - 1, there)
        there = np.where((x != 0) & (there & 0x7FFF == 0), there + 1, there)
    nan = np.isnan(x)
    assert np.array_equal(here[~nan], there[~nan])
    assert np.isnan(formats.decode(FORMATS[name], here[nan].astype(np.uint16), nan.sum())).all()
    assert np.array_equal(here[nan] >> 15, x[nan].view(np.uint32) >> 31), "the sign of NaN stays"


@in_blocks
def test_nearest_in_blocks_is_the_nearest_number(name):
    """Of all numbers that the codes of its block stand for, no other is nearer."""
    x = blocks(np.random.default_rng(5))[::9]
    x = abs(x) if name == "q8u" else x
    made = encoded(FORMATS[name], x.reshape(-1))
    got = made.decode().reshape(x.shape).astype(np.float64)
    for row, values, base in zip(x.astype(np.float64), got, made.bases(), strict=True):
        possible = stored_codes(FORMATS[name], np.arange(256))
        possible.bases()[:] = base
        numbers = possible.decode().astype(np.float64)
        numbers = numbers[np.isfinite(numbers)] if name == "q8" else numbers[1:255]
        least = abs(row[:, None] - numbers).min(axis=1)
        assert (abs(values - row)[row != 0] == least[row != 0]).all()


# what has been stored stays


@each_format
@each_rounding
def test_what_a_code_stands_for_is_stored_as_this_code(format, rounding):
    made = steady_codes(format)
    x = made.decode()
    if format.name == "float32" or format.low is None:
        assert encoded(format, x, rounding).same(made)
    else:
        made.stored[np.isnan(x)], made.low[np.isnan(x)] = 0x7FC0, 0
        assert encoded(format, x, rounding).same(made)


@each_rounding
def test_whole_numbers_stay_at_all_random_bits(rounding):
    t = np.arange(1024, dtype=np.float32)
    for bits in (0, 1, 2**31, 2**32 - 1):
        random = np.full(1024, bits, np.uint32) if rounding.stochastic else None
        assert np.array_equal(formats.whole(t, random), np.arange(1024))


def test_split16_is_the_float():
    x = sample()
    made = encoded(FORMATS["split16"], x)
    assert same_numbers(made.decode(), x)
    nan = np.isnan(x)
    assert (made.decode()[nan].view(np.uint32) == formats.QUIET).all()
    tie = (x.view(np.uint32) & 0xFFFF) == 0x8000
    assert np.array_equal(made.codes()[~nan & ~tie], encoded(FORMATS["bf16"], x[~nan & ~tie]).codes())
    assert encoded(FORMATS["split16"], x, STOCHASTIC).same(made), "nothing is rounded"


def test_split8_is_24_bits():
    x = sample()[np.isfinite(sample())]
    bits = encoded(FORMATS["split8"], x).decode().view(np.uint32)
    with np.errstate(all="ignore"):
        assert not (bits & 0xFF).any() and (abs(bits.astype(np.int64) - x.view(np.uint32)) <= 0x80).all()
    half = np.abs(bits.astype(np.int64) - x.view(np.uint32)) == 0x80
    assert half.any() and not (bits[half] & 0x100).any(), "ties to even"


# error bounds


def tops(x, size=formats.Q8_BLOCK):
    """For each number the largest finite magnitude of its block."""
    padded = np.zeros(-(-x.size // size) * size)
    padded[: x.size] = np.where(np.isfinite(x), abs(x), 0.0)
    return np.repeat(padded.reshape(-1, size).max(axis=1), size)[: x.size]


BOUNDS = {  # the sentences of Format.error as formulas: of a magnitude and of the largest one in its block
    "float32": lambda a, top: 0 * a,
    "bf16": lambda a, top: np.where(a < 2.0**-126, 2.0**-134, 2.0**-8 * a),
    "fp16": lambda a, top: np.where(a < 2.0**-14, 2.0**-25, 2.0**-11 * a),
    "fp16s": lambda a, top: np.where(a < 2.0**-24, 2.0**-24, BOUNDS["fp16"](a, top)),
    "q8": lambda a, top: np.where(a >= 2.0**-13 * top, a / 16, np.maximum(2.0**-17 * top, a / 16)).clip(2.0**-127),
    "q8u": lambda a, top: np.where(a >= 2.0**-31 * top, a / 16, 2.0**-31 * top).clip(2.0**-129),
    "split16": lambda a, top: 0 * a,
    "split8": lambda a, top: np.where(a < 2.0**-126, 2.0**-142, 2.0**-16 * a),
}  # fmt: skip
LARGEST = {"bf16": 2.0**128 * (1 - 2.0**-9), "fp16": 65520.0, "fp16s": 65504.0, "split8": 2.0**128 * (1 - 2.0**-17)}


@each_format
@each_rounding
def test_errors_are_within_the_bounds(format, rounding):
    x = abs(sample()) if format.name == "q8u" else sample()
    largest = LARGEST.get(format.name, np.inf)
    got, top = encoded(format, x, rounding).decode(), tops(x)
    bounded = np.isfinite(x) & (abs(x) < largest)
    if rounding.stochastic and format.name in LARGEST:
        bounded &= np.isfinite(got)  # between the largest number and the next there is infinity
    x, got = x[bounded].astype(np.float64), got[bounded].astype(np.float64)
    error, bound = abs(got - x), BOUNDS[format.name](abs(x), top[bounded])
    if not rounding.stochastic:
        assert (error <= bound).all()
        assert bound.max() == 0 or (error[bound > 0] / bound[bound > 0]).max() > 0.9, "the bound is tight"
    else:
        assert (error <= 2 * bound).all() and ((error < 2 * bound) | (error == 0)).all()
    assert np.array_equal(np.signbit(got), np.signbit(x))


@pytest.mark.parametrize("name", ["fp16s", "q8u"])
@each_rounding
def test_no_number_but_0_becomes_0(name, rounding):
    x = np.concatenate([sample(), floats(np.arange(1, 1000))])
    x = abs(x) if name == "q8u" else x
    got = encoded(FORMATS[name], x, rounding).decode()
    assert np.array_equal(got == 0, x == 0)


@each_rounding
def test_the_smallest_numbers_of_a_state_in_fp16_are_too_large(rounding):
    """Below 2^-24 the mean of what is stored is not the number, as it is elsewhere: nothing but 0 becomes 0."""
    x = np.full(1003, 2.0**-26, np.float32)
    assert (encoded(FORMATS["fp16s"], x, rounding).decode() == 2.0**-24).all()
    assert "2^-24 below 2^-24, where every number but 0 becomes 2^-24" in FORMATS["fp16s"].error


@each_format
def test_what_is_not_finite(format):
    x = np.resize(np.float32([1.0, np.inf, 2.0, -np.inf, np.nan, -np.nan]), 300)
    x = abs(x) if format.name == "q8u" else x
    for rounding in (NEAREST, STOCHASTIC):
        got = encoded(format, x, rounding).decode()
        if format.name == "q8u":
            assert np.array_equal(got, np.where(np.isfinite(x), x, np.inf))
        else:
            kept = np.where(np.isinf(x), np.nan, x) if format.name == "q8" else x
            assert np.array_equal(got, kept, equal_nan=True)
    if format.name == "fp16s":
        saturated = encoded(format, np.float32([1e38, -1e38, 65505, np.inf])).decode()
        assert np.array_equal(saturated, np.float32([65504, -65504, 65504, np.inf]))


@in_blocks
@each_rounding
def test_what_is_not_finite_changes_no_other_number(name, rounding):
    x = abs(blocks(np.random.default_rng(7))[:8].reshape(-1))
    x[5::97] = 0
    pure = encoded(FORMATS[name], x, rounding)
    x[5::97] = np.resize(np.float32([np.inf, np.nan, -np.inf, -np.nan]), x[5::97].size)
    disturbed = encoded(FORMATS[name], x, rounding)
    finite = np.isfinite(x)
    assert np.array_equal(disturbed.codes()[finite], pure.codes()[finite])
    assert np.array_equal(disturbed.bases(), pure.bases())
    assert not np.isfinite(disturbed.decode()[~finite]).any()


@in_blocks
def test_a_block_that_has_no_finite_number(name):
    made = encoded(FORMATS[name], np.full(300, np.inf, np.float32))
    assert not np.isfinite(made.decode()).any() and not made.bases().any()


# stochastic rounding

VALUES = 1.1, 0.7, 3.14159, 0.031, 1.0e-4, 6.1e-5, 3.3e-5, 7.77e-6  # 1.875 is the largest of their blocks


@each_format
def test_stochastic_rounding_is_unbiased(format):
    """Each number becomes one of its two neighbours, and the mean over many keys is the number."""
    x = np.repeat(np.float32(VALUES), formats.Q8_BLOCK)
    x[:: formats.Q8_BLOCK] = 3.75
    keys = [formats.key(11, step, 1) for step in range(1, 257)]
    made = np.array([encoded(format, x, Rounding(True, key, 1000)).decode() for key in keys], np.float64)
    exact = x.reshape(-1, formats.Q8_BLOCK)[:, 1].astype(np.float64)
    draws = made.reshape(len(keys), len(VALUES), -1)[:, :, 1:].swapaxes(0, 1).reshape(len(VALUES), -1)
    assert (made[:, :: formats.Q8_BLOCK] == 3.75).all()
    for value, drawn in zip(exact, draws, strict=True):
        low, high = drawn.min(), drawn.max()
        if format.name in ("float32", "split16"):
            assert low == high == value
            continue
        assert set(np.unique(drawn)) == {low, high} and low < value < high
        share = (value - low) / (high - low)
        error = (high - low) * np.sqrt(share * (1 - share) / drawn.size)
        assert abs(drawn.mean() - value) < 5 * error, value


@each_format
def test_the_means_at_each_position_are_the_number(format):
    """No position is favoured: over many keys each of them has the share of either neighbour that it should have."""
    x = np.full(256, 1.1, np.float32)
    draws = [encoded(format, x, Rounding(True, formats.key(seed, 3, 2), 0)).decode() for seed in range(400)]
    drawn = np.array(draws, np.float64)
    spread = np.ptp(drawn)
    assert (abs(drawn.mean(axis=0) - np.float64(x)) <= 5 * (spread / 2) / 20).all()


@each_format
@each_rounding
def test_parts_have_the_bits_of_the_whole(format, rounding):
    x = abs(blocks(np.random.default_rng(9)).reshape(-1)[:1003])
    whole, parts = encoded(format, x, rounding), Buffers(format, x.size)
    for begin, end in ((768, 1003), (0, 256), (256, 768)):
        parts.encode(x[begin:end], rounding._replace(position=rounding.position + begin), begin)
        assert same_numbers(parts.decode(begin, end), whole.decode()[begin:end])
    assert parts.same(whole) and parts.intact()


def test_the_keys_are_those_of_splitmix64():
    assert [formats.key(0, 1, stream) for stream in (0, 1)] == [0xF88BB8A8, 0x1B39896A]
    made = [formats.key(*of) for of in itertools.product((0, 1, 2**63, 2**64 - 1), range(1, 500), range(4))]
    assert all(0 <= key < 2**32 for key in made) and len(set(made)) > len(made) - 5


def randoms(key, size=2**16):
    return formats.random_of(np.arange(size, dtype=np.uint32), key)


def test_streams_and_steps_have_other_noise():
    """The random bits of two keys are not correlated, and those of each are evenly distributed."""
    made = [randoms(formats.key(0, step, stream)) for step in (1, 2, 3) for stream in range(4)]
    scaled = np.array([random / 2.0**32 - 0.5 for random in made]) * np.sqrt(12)
    correlations = scaled @ scaled.T / 2**16 - np.eye(12)
    assert abs(correlations).max() < 5 / 2**8
    counts = np.array([np.bincount(random >> 26, minlength=64) for random in made])
    assert abs(((counts - 1024) ** 2 / 1024).sum(axis=1) - 63).max() < 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 13, 16, 64, 256, 1024])
def test_neighbours_have_other_noise(lag):
    """All pairs of the upper 4 bits of two elements are equally frequent."""
    for key in (0, 12345, formats.key(5, 6, 1)):
        random = randoms(key) >> 28
        pairs = np.bincount(16 * random[:-lag] + random[lag:], minlength=256)
        expected = (random.size - lag) / 256
        assert abs(((pairs - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


# memory


@each_format
@each_rounding
def test_every_length_between_guard_zones(format, rounding):
    """A tensor has the codes of a longer one that goes on with zeros, wherever it lies; nothing else is written."""
    x = abs(blocks(np.random.default_rng(2)).reshape(-1)[:1024])
    for size, offset in itertools.product(LENGTHS, (0, 1, 3)):
        longer = encoded(format, np.where(np.arange(1024) < size, x, np.float32(0)), rounding)
        made = encoded(format, x[:size], rounding, offset)
        assert np.array_equal(made.codes(), longer.codes()[:size]) and made.intact()
        assert same_numbers(made.decode(), longer.decode()[:size]) and made.intact()


@each_format
def test_the_caller_may_have_any_errstate(format):
    with np.errstate(all="raise"):
        for rounding in (NEAREST, STOCHASTIC):
            encoded(format, sample()[::3], rounding).decode()


@each_format
def test_a_format_describes_itself(format):
    assert format.number == list(FORMATS).index(format.name) and format.error and format.kinds
    taken = {name: formats.stored_bytes(FORMATS[name], 1003) for name in FORMATS}
    assert taken == {"float32": 4012, "bf16": 2006, "fp16": 2006, "fp16s": 2006, "q8": 1040, "q8u": 1040,
                     "split16": 2006, "split8": 1003}  # fmt: skip
    assert formats.stored_bytes(format, 0) == 0


# C has the bits of Python

in_c = pytest.mark.skipif(not hasattr(c.lib, "fastrms_encode"), reason="the C extension has no storage formats")
encoders = list(FORMATS.values())
each_encoder = pytest.mark.parametrize("format", encoders, ids=[format.name for format in encoders])
each_tier = pytest.mark.parametrize("isa", c.isas())


def c_encoded(isa, x, made, rounding):
    self_check.encode(isa, made.format, x, made.stored, made.low, rounding)
    return made


def c_decoded(isa, made, x):
    self_check.decode(isa, made.format, made.stored, made.low, x)
    return x


expected = functools.cache(lambda name, rounding: encoded(FORMATS[name], sample(), rounding))


@in_c
@each_encoder
def test_c_knows_the_sizes(format):
    for size in (*LENGTHS, 63, 64, 65, 2**40):
        assert c.lib.fastrms_stored_bytes(format.number, size) == formats.stored_bytes(format, size)


@in_c
def test_c_makes_the_keys():
    for of in itertools.product((0, 1, 2**64 - 1), (1, 2, 2**40), range(4)):
        assert c.lib.fastrms_key(*of) == formats.key(*of)


@in_c
@each_tier
@each_encoder
def test_c_decodes_all_codes(isa, format):
    made = all_codes(format)
    got = c_decoded(isa, made, np.empty(made.size, np.float32))
    assert np.array_equal(got.view(np.uint32), made.decode().view(np.uint32)) and made.intact()


@in_c
@each_tier
@each_encoder
@each_rounding
def test_c_encodes_as_python(isa, format, rounding):
    x = sample()
    assert c_encoded(isa, x, Buffers(format, x.size), rounding).same(expected(format.name, rounding))


@functools.cache
def short(name, rounding, size):
    x = sample()[-3000 - size : -3000]
    return x, encoded(FORMATS[name], x, rounding, 1)


@in_c
@each_tier
@each_encoder
@each_rounding
def test_c_at_every_length(isa, format, rounding):
    """The bodies and the tails of the loops have the same bits, at addresses that are not aligned, and stay in bounds."""
    for size in range(131):
        x, there = short(format.name, rounding, size)
        source = Buffers(FORMATS["float32"], size, 1)
        source.stored[:] = x.view(np.uint32)
        assert c_encoded(isa, source.stored, Buffers(format, size, 1), rounding).same(there), size
        c_decoded(isa, there, source.stored)
        assert np.array_equal(source.stored, there.decode().view(np.uint32)) and source.intact() and there.intact(), size


EXHAUSTIVE = "FASTRMS_EXHAUSTIVE" in os.environ
THREADS = 2
ABOVE = {"q8": 14 << 23, "q8u": 31 << 23}  # what is added to the bits of a number in each block that is far larger


@pytest.fixture(scope="session")
def wrong_floats(tmp_path_factory):
    """wrong_floats() of tests/c/every_float.c."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    source, made = ROOT / "tests" / "c" / "every_float.c", tmp_path_factory.mktemp("every_float") / "every_float.so"
    command = [COMPILER, "-O3", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    ffi = cffi.FFI()
    ffi.cdef("""typedef struct { int32_t stochastic; uint32_t key, position; } fastrms_rounding;
                int64_t wrong_floats(void *encode, const int *isa, int tiers, int format, int64_t first, int64_t stride,
                                     uint32_t above, fastrms_rounding rounding);""")
    library = ffi.dlopen(str(made))
    encode = int(c.ffi.cast("uintptr_t", c.ffi.addressof(c.lib, "fastrms_encode")))
    isas = [c.ISAS.index(isa) for isa in c.isas()]

    def call(format, first, stride, above, rounding):
        here = ffi.new("fastrms_rounding *", tuple(map(int, rounding)))[0]
        tiers = ffi.new("int[]", isas), len(isas)
        return library.wrong_floats(ffi.cast("void *", encode), *tiers, format.number, first, stride, above, here)

    return call


@in_c
@each_encoder
@each_rounding
def test_c_encodes_every_float_as_it_is_defined(wrong_floats, format, rounding):
    """Every 509th of 2^16 chunks, and with FASTRMS_EXHAUSTIVE=1 all 2^32 floats, in some minutes; in the formats with blocks
    again with a number in each block that is far larger."""
    stride = 1 if EXHAUSTIVE else 509
    for above in (0, ABOVE[format.name]) if format.in_blocks else (0,):
        slices = [(format, first * stride, THREADS * stride, above, rounding) for first in range(THREADS)]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(lambda of: wrong_floats(*of), slices))
        assert found == [-1] * THREADS, f"chunks {found} of 65,536 floats"
