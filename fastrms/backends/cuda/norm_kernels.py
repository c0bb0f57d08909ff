"""The kernels of norm.py, which have the bits of backends/norm.py.

    lane_counts      as lane_sums, of what is not finite
    segment_counts   as segment_sums
    lane_sums        a thread for each of the eight lanes of a block of 4096 elements
    segment_sums     a thread for each segment: its blocks in sequence
    clip             one thread: the segments in sequence, the norm, the factor
    decide           one warp: all counts, the number of the step, its coefficients
    lane_zeros       as lane_counts: zeros over the gradients of a step that is left out

Those of float64 scale each block by a power of two of its own, which stands as an exponent behind the sums of its lanes, and
behind the sum of each segment.  Additions and products are calls of libdevice, which the compiler cannot contract.
of_halves() makes the kernels that read gradients in bf16 or fp16.
"""

from math import inf
from types import FunctionType

from numba import cuda
from numba.cuda.libdevice import dadd_rn, ddiv_rn, dmul_rn, double_as_longlong, dsqrt_rn, fmul_rn, longlong_as_double
from numba.cuda.types import float32, float64, int32, int64, uint16, uint32, uint64

from ..norm import FLT_MIN
from .codecs import decoder
from .intrinsics import pointer_to

pointer, pointer_to_doubles, pointer_to_words = pointer_to(float32), pointer_to(float64), pointer_to(uint32)
number = real = float32  # real: of the coefficients of a rule
zero = float32(0)
HALVES = ("bf16", "fp16")
ARGUMENTS = {  # of each kernel, with their types as in C
    "lane_counts_float": {"tensors": "uint64*", "tensor_of": "uint32*", "counts": "uint64*", "blocks": "uint64",
                          "grad_scale": "float"},
    "lane_counts_double": {"tensors": "uint64*", "tensor_of": "uint32*", "counts": "uint64*", "blocks": "uint64",
                           "grad_scale": "double"},
    "segment_counts": {"lanes": "uint64*", "first_of": "uint32*", "counts": "uint64*", "segments": "uint64"},
    "decide": {"counts": "uint64*", "segments": "uint64", "state": "uint64*", "seen": "uint64*", "targets": "uint64*",
               "count": "uint64"},
    "lane_zeros_float": {"tensors": "uint64*", "tensor_of": "uint32*", "state": "uint64*", "blocks": "uint64"},
    "lane_sums_float": {"tensors": "uint64*", "tensor_of": "uint32*", "sums": "double*", "blocks": "uint64"},
    "lane_sums_double": {"tensors": "uint64*", "tensor_of": "uint32*", "sums": "double*", "blocks": "uint64"},
    "segment_sums": {"lanes": "double*", "first_of": "uint32*", "sums": "double*", "segments": "uint64"},
    "segment_sums_double": {"lanes": "double*", "first_of": "uint32*", "sums": "double*", "segments": "uint64"},
    "clip": {"sums": "double*", "segments": "uint64", "targets": "uint64*", "kinds": "uint32*", "count": "uint64",
             "found": "double*", "grad_scale": "double", "clip_norm": "double", "mantissa": "double", "exponent": "int64"},
}  # fmt: skip


def lane_counts_float(tensors, tensor_of, counts, blocks, grad_scale):
    thread = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    block, lane = thread // uint64(8), thread % uint64(8)
    if block < blocks:
        row = uint64(tensor_of[block]) * uint64(3)
        grad, first = pointer(tensors[row]), (block - tensors[row + uint64(2)]) * uint64(4096)
        end = min(tensors[row + uint64(1)], first + uint64(4096))
        at, count = first + lane, uint64(0)
        while at < end:
            x = fmul_rn(number(grad[at]), grad_scale)
            count += uint64(0) if abs(fmul_rn(x, x)) < float32(inf) else uint64(1)
            at += uint64(8)
        counts[thread] = count


def lane_counts_double(tensors, tensor_of, counts, blocks, grad_scale):
    thread = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    block, lane = thread // uint64(8), thread % uint64(8)
    if block < blocks:
        row = uint64(tensor_of[block]) * uint64(3)
        grad, first = pointer_to_doubles(tensors[row]), (block - tensors[row + uint64(2)]) * uint64(4096)
        end = min(tensors[row + uint64(1)], first + uint64(4096))
        at, count = first + lane, uint64(0)
        while at < end:
            x = dmul_rn(grad[at], grad_scale)
            count += uint64(0) if abs(dmul_rn(x, x)) < inf else uint64(1)
            at += uint64(8)
        counts[thread] = count


def segment_counts(lanes, first_of, counts, segments):
    segment = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    if segment < segments:
        count, at = uint64(0), uint64(first_of[segment]) * uint64(8)
        end = uint64(first_of[segment + uint64(1)]) * uint64(8)
        while at < end:
            count += lanes[at]
            at += uint64(1)
        counts[segment] = count


def decide(counts, segments, state, seen, targets, count):
    lane = uint64(cuda.threadIdx.x)
    if uint64(cuda.blockIdx.x) == uint64(0) and lane < uint64(32):
        looked, made, found, segment = state[uint64(0)] + uint64(1), state[uint64(1)], int64(0), lane
        while segment < segments:
            found += int64(counts[segment])
            segment += uint64(32)
        for k in range(5):
            found += cuda.shfl_xor_sync(0xFFFFFFFF, found, 16 >> k)
        skips = found != int64(0)
        made += uint64(0) if skips else uint64(1)
        target = uint64(0)
        while target < count:
            at = target * uint64(4)
            row, words = pointer_to_words(targets[at]), targets[at + uint64(2)]
            ahead = pointer_to_words(targets[at + uint64(1)] + (made & targets[at + uint64(3)]) * words * uint64(4))
            word = lane
            while word < words:
                row[word] = uint32(0) if skips else ahead[word]
                word += uint64(32)
            target += uint64(1)
        cuda.syncwarp()  # all have read the state
        if lane == uint64(0):
            state[uint64(0)], state[uint64(1)], state[uint64(2)] = looked, made, uint64(found)
            seen[uint64(1) + (looked & uint64(1023))] = uint64(found)
            cuda.threadfence_system()  # the host finds the count where it finds the word
            seen[uint64(0)] = (looked << uint64(32)) + (made & uint64(0xFFFFFFFF))


def lane_zeros_float(tensors, tensor_of, state, blocks):
    thread = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    block, lane = thread // uint64(8), thread % uint64(8)
    if block < blocks and state[uint64(2)] != uint64(0):
        row = uint64(tensor_of[block]) * uint64(3)
        grad, first = pointer(tensors[row]), (block - tensors[row + uint64(2)]) * uint64(4096)
        end = min(tensors[row + uint64(1)], first + uint64(4096))
        at = first + lane
        while at < end:
            grad[at] = zero
            at += uint64(8)


def lane_sums_float(tensors, tensor_of, sums, blocks):
    thread = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    block, lane = thread // uint64(8), thread % uint64(8)
    if block < blocks:
        row = uint64(tensor_of[block]) * uint64(3)
        grad, first = pointer(tensors[row]), (block - tensors[row + uint64(2)]) * uint64(4096)
        end = min(tensors[row + uint64(1)], first + uint64(4096))
        at, total = first + lane, float64(0)
        while at + uint64(248) < end:  # many elements are loaded before the first is added
            for k in range(32):
                x = float64(number(grad[at + uint64(k) * uint64(8)]))
                total = dadd_rn(total, dmul_rn(x, x))
            at += uint64(256)
        while at < end:
            x = float64(number(grad[at]))
            total = dadd_rn(total, dmul_rn(x, x))
            at += uint64(8)
        sums[thread] = total


def segment_sums(lanes, first_of, sums, segments):
    segment = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    if segment < segments:
        total, block = float64(0), uint64(first_of[segment])
        end = uint64(first_of[segment + uint64(1)])
        while block < end:
            at = block * uint64(8)
            low = dadd_rn(dadd_rn(lanes[at], lanes[at + uint64(4)]), dadd_rn(lanes[at + uint64(2)], lanes[at + uint64(6)]))
            at += uint64(1)
            high = dadd_rn(dadd_rn(lanes[at], lanes[at + uint64(4)]), dadd_rn(lanes[at + uint64(2)], lanes[at + uint64(6)]))
            total = dadd_rn(total, dadd_rn(low, high))
            block += uint64(1)
        sums[segment] = total


def clip(sums, segments, targets, kinds, count, found, grad_scale, clip_norm, mantissa, exponent):
    if uint64(cuda.blockIdx.x) + uint64(cuda.threadIdx.x) == uint64(0):
        total, doubled = total_of(sums, segments)
        size = dmul_rn(dsqrt_rn(total), grad_scale)
        norm = scaled(size, doubled)
        found[uint64(0)] = norm
        whole = first = grad_scale
        second = float64(1)
        if not norm <= clip_norm and clip_norm < float64(inf):
            value = dmul_rn(grad_scale, ddiv_rn(mantissa, size))
            exponent -= doubled
            whole = first = scaled(value, exponent)
            if value != float64(0) and abs(whole) < float64(FLT_MIN):
                bits = double_as_longlong(value)
                more = exponent + (bits >> int64(52)) - int64(1022)
                half = -(-more // int64(2)) if more < int64(0) else more // int64(2)
                unit = bits - ((bits >> int64(52)) << int64(52)) + (int64(1022) << int64(52))
                first, second = scaled(longlong_as_double(unit), half), scaled(float64(1), more - half)
        target = uint64(0)
        while target < count:
            kind, row = kinds[target], pointer(targets[target])
            factor = first if kind & uint32(2) else whole
            row[uint64(0)] = real(-factor if kind & uint32(1) else factor)
            row[uint64(1)] = real(second)
            target += uint64(1)


@cuda.jit(device=True, inline="always")
def power(exponent):
    """2 to an exponent between -1022 and 1023."""
    return longlong_as_double((exponent + int64(1023)) << int64(52))


@cuda.jit(device=True, inline="always")
def scaled(x, exponent):
    """x * 2^exponent; what is beyond the exponents of the arguments is 0 or infinite either way."""
    exponent = min(max(exponent, int64(-2044)), int64(2046))
    half = exponent // int64(2)
    return dmul_rn(dmul_rn(x, power(half)), power(exponent - half))


@cuda.jit(device=True, inline="always")
def total_of(sums, segments):
    """(sum, exponent) of all segments; the exponent is 0 where no block was scaled."""
    total, segment = float64(0), uint64(0)
    while segment < segments:
        total = dadd_rn(total, sums[segment])
        segment += uint64(1)
    return total, int64(0)


@cuda.jit(device=True, inline="always")
def added(total, exponent, more, of_more):
    """The sum of total * 2^(2*exponent) and more * 2^(2*of_more), as such a pair."""
    if more == float64(0):  # then its exponent means nothing
        return total, exponent
    most = max(exponent, of_more)
    low, high = scaled(total, int64(2) * (exponent - most)), scaled(more, int64(2) * (of_more - most))
    return dadd_rn(low, high), most


@cuda.jit(device=True, inline="always")
def total_of_doubles(sums, segments):
    total, exponent, segment = float64(0), int64(-1000), uint64(0)
    while segment < segments:
        at = segment * uint64(2)
        total, exponent = added(total, exponent, sums[at], int64(sums[at + uint64(1)]))
        segment += uint64(1)
    return total, exponent


def lane_sums_double(tensors, tensor_of, sums, blocks):
    thread = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    block, lane = thread // uint64(8), thread % uint64(8)
    inside = block < blocks
    if not inside:  # a thread behind the last block exchanges what nobody reads
        block = blocks - uint64(1)
    row = uint64(tensor_of[block]) * uint64(3)
    grad, first = pointer_to_doubles(tensors[row]), (block - tensors[row + uint64(2)]) * uint64(4096)
    end = min(tensors[row + uint64(1)], first + uint64(4096))
    at, top = first + lane, int64(0)
    while at < end:
        top = max(top, double_as_longlong(abs(grad[at])) >> int64(52))
        at += uint64(8)
    most = int32(top)
    for k in range(3):
        most = max(most, cuda.shfl_xor_sync(0xFFFFFFFF, most, 4 >> k))
    exponent = int64(most) - int64(1022)  # the host makes it -1000 at least, and 0 beside infinity, with the same norm
    scale, at, total = scaled(float64(1), -exponent), first + lane, float64(0)
    while at < end:
        x = dmul_rn(grad[at], scale)
        total = dadd_rn(total, dmul_rn(x, x))
        at += uint64(8)
    if inside:
        sums[block * uint64(9) + lane] = total
        if lane == uint64(0):
            sums[block * uint64(9) + uint64(8)] = float64(exponent)


def segment_sums_double(lanes, first_of, sums, segments):
    segment = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    if segment < segments:
        total, exponent, block = float64(0), int64(-1000), uint64(first_of[segment])
        end = uint64(first_of[segment + uint64(1)])
        while block < end:
            at = block * uint64(9)
            low = dadd_rn(dadd_rn(lanes[at], lanes[at + uint64(4)]), dadd_rn(lanes[at + uint64(2)], lanes[at + uint64(6)]))
            more = int64(lanes[at + uint64(8)])
            at += uint64(1)
            high = dadd_rn(dadd_rn(lanes[at], lanes[at + uint64(4)]), dadd_rn(lanes[at + uint64(2)], lanes[at + uint64(6)]))
            total, exponent = added(total, exponent, dadd_rn(low, high), more)
            block += uint64(1)
        sums[segment * uint64(2)] = total
        sums[segment * uint64(2) + uint64(1)] = float64(exponent)


def with_names(function, **names):
    """A kernel as it is, which finds other things under these names."""
    return FunctionType(function.__code__, {**globals(), **names}, function.__name__)


def of_halves(function, format):
    """A kernel as it is, for gradients in bf16 or fp16: their elements are decoded to floats."""
    decode = decoder(format)

    @cuda.jit(device=True, inline="always")
    def number(code):
        return decode(code)[0]

    return with_names(function, pointer=pointer_to(uint16), number=number)


clip_double = with_names(clip, pointer=pointer_to_doubles, real=float64, total_of=total_of_doubles)
ARGUMENTS["clip_double"] = ARGUMENTS["clip"]
lane_zeros_double = with_names(lane_zeros_float, pointer=pointer_to_doubles, zero=float64(0))
lane_zeros_bf16 = lane_zeros_fp16 = with_names(lane_zeros_float, pointer=pointer_to(uint16), zero=uint16(0))
ARGUMENTS |= dict.fromkeys(("lane_zeros_double", "lane_zeros_bf16", "lane_zeros_fp16"), ARGUMENTS["lane_zeros_float"])

for _format in HALVES:
    for _name, _of in ((f"lane_counts_{_format}", "lane_counts_float"), (f"lane_sums_{_format}", "lane_sums_float")):
        ARGUMENTS[_name], globals()[_name] = ARGUMENTS[_of], of_halves(globals()[_of], _format)
