"""Where our own buffers start.  Streams that lie at equal distances modulo 4 KiB or a power of two evict each
other from L1 (hashed way prediction on AMD, 4 KiB and set aliasing elsewhere) and cost up to 5x.

A large buffer starts at the candidate offset that is farthest, modulo 4 KiB, from the buffers it runs beside.
"""

import numpy as np

LINE = 64
PAGE = 4096
STEP = 3 * PAGE + 37 * LINE  # successive candidates differ in the page and in the line within it
CANDIDATES = 16
LARGE = 1 << 18  # bytes; below it the buffers of a step fit in L2 and the slack would cost more than it saves
NEAR = 6 * LINE  # streams closer than this, modulo 4 KiB, count as colliding


def distance(a, b):
    """Bytes between two addresses modulo 4 KiB, the short way round."""
    d = (a - b) % PAGE
    return min(d, PAGE - d)


def place(size, dtype, beside):
    """A new uninitialised 1-D array for size elements, well away from the addresses in `beside`.

    From 4 MiB on NumPy's allocator asks Linux for huge pages, which halves the time of the first touch."""
    nbytes = size * dtype.itemsize
    return within(np.empty(nbytes + slack(nbytes), np.uint8), nbytes, beside).view(dtype)


def slack(nbytes):
    """How much longer than a buffer of nbytes its memory has to be."""
    return LINE + (STEP * CANDIDATES if nbytes >= LARGE else 0)


def within(memory, nbytes, beside):
    """The part of an array of bytes that lies best beside these addresses."""
    start = memory.__array_interface__["data"][0]
    first = -start % LINE
    offsets = [first + k * STEP for k in range(CANDIDATES if nbytes >= LARGE else 1)]
    best = max(offsets, key=lambda offset: min((distance(start + offset, other) for other in beside), default=PAGE))
    return memory[best : best + nbytes]


def collide(a, b):
    """Whether two Buffers that are read side by side are large and start too close modulo 4 KiB."""
    return min(a.flat.nbytes, b.flat.nbytes) >= LARGE and distance(a.address, b.address) < NEAR
