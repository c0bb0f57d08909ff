"""The norm of all gradients and the clipping by it.  This is csrc/norm.c in Python: functions of the same names compute the
same bits.

The sum of squares is made in double and in one order of additions: eight lanes within a block of 4096, blocks in sequence
within a segment of 2^18, segments in sequence.  Each block of doubles is scaled by a power of two of its own, so that no
square overflows; the square of a float cannot overflow a double.

All of it is computed in the default floating-point mode, whatever the caller has set: a caller that takes subnormal numbers
for 0 gets the norm of the numbers that are there.

Where tensors are spread over several ranks, each rank sums the segments and blocks that it holds whole, and all ranks add up
the sums of all ranks in the same order.
"""

import math
from typing import NamedTuple

import numpy as np

from ..storage import decoded
from . import Found
from .float_mode import default_mode

SEGMENT, BLOCK, LANES = 1 << 18, 4096, 8  # elements
RECORD = np.dtype([("sum", "f8"), ("exponent", "i8"), ("nonfinite", "i8")])  # a fastrms_squares
FLT_MIN = float(np.finfo(np.float32).tiny)


class Squares(NamedTuple):
    """A sum of squares, kept as sum * 2^(2*exponent) so that it neither overflows nor vanishes."""

    sum: float
    exponent: int


ZERO = Squares(0.0, -1000)


def block_sum(block, scale):
    block = block.astype(np.float64) * scale
    lanes = np.zeros((-(-block.size // LANES), LANES))
    lanes.reshape(-1)[: block.size] = block * block
    lane = np.add.accumulate(lanes)[-1]
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]))


def block_exponent(block):
    """The exponent of the power of two just above the largest magnitude, at least -1000; 0 where that magnitude is 0 or
    infinite.  NaNs are passed over."""
    most = np.fmax.reduce(np.abs(block), initial=0.0)
    return max(math.frexp(most)[1], -1000) if 0 < most < np.inf else 0


def block_squares(block):
    exponent = 0 if block.itemsize == 4 else block_exponent(block)
    return Squares(block_sum(block, np.ldexp(1.0, -exponent)), exponent)


def block_nonfinite(block, grad_scale):
    """How many elements are NaN or infinite or have a square that overflows, in the compute dtype, in which the rule scales
    and squares, too."""
    scaled = block * block.dtype.type(grad_scale)
    return scaled.size - int(np.count_nonzero(np.isfinite(scaled * scaled)))


def add(total, part):
    if part.sum == 0:  # then its exponent means nothing
        return total
    most = max(total.exponent, part.exponent)
    both = np.ldexp(total.sum, 2 * (total.exponent - most)) + np.ldexp(part.sum, 2 * (part.exponent - most))
    return Squares(both, most)


def segment_scan(segment):
    total = ZERO
    for start in range(0, segment.size, BLOCK):
        total = add(total, block_squares(segment[start : start + BLOCK]))
    return total


def segments(grad):
    """The parts of a gradient that are scanned one by one; none for None."""
    for start in range(0, 0 if grad is None else grad.size, SEGMENT):
        yield decoded(grad[start : start + SEGMENT])


def sum_of_segments(grads):
    total = ZERO
    for grad in grads:
        for segment in segments(grad):
            total = add(total, segment_scan(segment))
    return total


def norm_of(squares, grad_scale):
    return float(np.ldexp(np.sqrt(squares.sum) * grad_scale, squares.exponent))


@default_mode()
def scan(grads, grad_scale, clip_norm, nonfinite):
    """(Found, Squares): everything that must be known of the gradients before the first write.  clip_norm: None where no
    norm is wanted; then Squares is None, too.  nonfinite: whether to count the elements that are not finite."""
    squares = norm = counts = None
    with np.errstate(all="ignore"):
        if clip_norm is not None:
            squares = sum_of_segments(grads)
            norm = norm_of(squares, grad_scale)
        if nonfinite:
            counts = [sum(block_nonfinite(segment, grad_scale) for segment in segments(grad)) for grad in grads]
    if counts is None:
        return Found(norm, None, -1), squares
    return Found(norm, sum(counts), next((k for k, count in enumerate(counts) if count), -1)), squares


def own_message(exchange, grads, grad_scale, clip_norm, nonfinite):
    """What this rank knows of its pieces: grad_scale and clip_norm, the Squares and the count of each piece, and the
    elements of the parts of blocks.  Whoever holds all parts of a block sums its squares."""
    message = np.zeros(exchange.length, np.uint8)
    message[:16] = np.array([grad_scale, -1.0 if clip_norm is None else clip_norm]).view(np.uint8)
    for piece in exchange.own:
        grad = grads[piece.tensor]
        if grad is None:
            continue
        part = decoded(grad[piece.begin : piece.begin + piece.length])
        squares = segment_scan(part) if clip_norm is not None and not piece.values else ZERO
        count = block_nonfinite(part, grad_scale) if nonfinite else 0
        message[piece.squares :][: RECORD.itemsize] = np.array((*squares, count), RECORD).reshape(1).view(np.uint8)
        if piece.values:
            message[piece.values :][: part.nbytes] = part.view(np.uint8)
    return message.tobytes()


def fold(exchange, gathered, clip_norm):
    """(Squares, nonfinite, tensor) of the gathered pieces of all ranks, added up in the order in which one process adds up
    whole tensors.  tensor: as in Found."""
    total = segment = ZERO
    nonfinite, tensor, parts = 0, -1, []
    for piece in exchange.pieces:
        *squares, count = np.frombuffer(gathered, RECORD, 1, piece.squares)[0].tolist()
        if count and not nonfinite:
            tensor = piece.tensor
        nonfinite += count
        segment = add(segment, Squares(*squares))
        if piece.values and clip_norm is not None:
            parts.append(np.frombuffer(gathered, f"f{piece.stored}", piece.length, piece.values))
            if piece.ends_block:
                segment = add(segment, block_squares(np.concatenate(parts)))
                parts = []
        if piece.ends_segment:
            total, segment = add(total, segment), ZERO
    return total, nonfinite, tensor


@default_mode()
def scan_shards(exchange, grads, grad_scale, clip_norm, nonfinite):
    """scan() over the tensors of all ranks."""
    with np.errstate(all="ignore"):
        gathered = exchange(own_message(exchange, grads, grad_scale, clip_norm, nonfinite))
        squares, count, tensor = fold(exchange, gathered, clip_norm)
        norm = None if clip_norm is None else norm_of(squares, grad_scale)
    return Found(norm, count if nonfinite else None, tensor), squares


def factor(value, exponent):
    """value * 2^exponent as (grad_scale, grad_rescale).  Where that is too small for a float32, half of the exponent
    goes to each, so that a float32 can hold both."""
    whole = float(np.ldexp(value, exponent))
    if value == 0 or not abs(whole) < FLT_MIN:  # or it is NaN
        return whole, 1.0
    value, more = math.frexp(value)
    exponent += more
    half = int(exponent / 2)  # towards zero, as in C
    return math.ldexp(value, half), math.ldexp(1.0, exponent - half)


@default_mode()
def clipped_scale(grad_scale, clip_norm, grad_norm, squares):
    """grad_scale * (clip_norm / norm) as a factor(), where the norm is larger than clip_norm.  Powers of two are kept apart,
    since the norm of finite gradients may be too large for a double.  A NaN norm makes the factor NaN, as every framework
    has it."""
    if clip_norm is None or math.isinf(clip_norm) or grad_norm <= clip_norm:
        return grad_scale, 1.0
    with np.errstate(all="ignore"):
        clip_norm, exponent = math.frexp(clip_norm)
        norm = np.sqrt(squares.sum) * grad_scale
        return factor(grad_scale * float(clip_norm / norm), exponent - squares.exponent)
