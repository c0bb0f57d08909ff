"""The norm of all gradients and the clipping by it.  This is csrc/norm.c in Python: functions of the same names compute the
same bits.

The sum of squares is made in double and in one order of additions: eight lanes within a block of 4096, blocks in sequence
within a segment of 2^18, segments in sequence.  Each block of doubles is scaled by a power of two of its own, so that no
square overflows; the square of a float cannot overflow a double.
"""

import math
from typing import NamedTuple

import numpy as np

from . import Found

SEGMENT, BLOCK, LANES = 1 << 18, 4096, 8  # elements
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
    return [grad[start : start + SEGMENT] for start in range(0, 0 if grad is None else grad.size, SEGMENT)]


def sum_of_segments(grads):
    total = ZERO
    for grad in grads:
        for segment in segments(grad):
            total = add(total, segment_scan(segment))
    return total


def scan(grads, grad_scale, clip_norm, nonfinite):
    """(Found, Squares): everything that must be known of the gradients before the first write.  clip_norm: None where no
    norm is wanted; then Squares is None, too.  nonfinite: whether to count the elements that are not finite."""
    squares = norm = counts = None
    with np.errstate(all="ignore"):
        if clip_norm is not None:
            squares = sum_of_segments(grads)
            norm = float(np.ldexp(np.sqrt(squares.sum) * grad_scale, squares.exponent))
        if nonfinite:
            counts = [sum(block_nonfinite(segment, grad_scale) for segment in segments(grad)) for grad in grads]
    if counts is None:
        return Found(norm, None, -1), squares
    return Found(norm, sum(counts), next((k for k, count in enumerate(counts) if count), -1)), squares


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
