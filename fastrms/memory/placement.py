"""Where our own buffers start.  Streams that lie at equal distances modulo 4 KiB or a power of two evict each
other from L1 (hashed way prediction on AMD, 4 KiB and set aliasing elsewhere) and cost up to 5x.

A buffer that is not very small starts at the candidate offset that is farthest, modulo 4 KiB, from the buffers it runs
beside: loads and stores of 64 bytes that are less than 256 bytes apart modulo 4 KiB wait for each other.
"""

from itertools import combinations

import numpy as np

LINE = 64
PAGE = 4096
LARGE, SMALL = 1 << 18, 1 << 14  # bytes; below LARGE the buffers of a step fit in L2, below SMALL slack costs too much
FAR = 3 * PAGE + 37 * LINE  # successive candidates differ in the page and in the line within it
CLOSE = 5 * LINE  # nine of these leave a place beside any four buffers
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
    return LINE + candidates(nbytes)[-1]


def candidates(nbytes):
    """The offsets at which a buffer of nbytes may start."""
    return range(0, 16 * FAR, FAR) if nbytes >= LARGE else range(0, 9 * CLOSE if nbytes >= SMALL else 1, CLOSE)


def within(memory, nbytes, beside):
    """The part of an array of bytes that lies best beside these addresses."""
    start = memory.__array_interface__["data"][0]
    first = -start % LINE
    offsets = [first + offset for offset in candidates(nbytes)]
    best = max(offsets, key=lambda offset: min((distance(start + offset, other) for other in beside), default=PAGE))
    return memory[best : best + nbytes]


def collide(a, b):
    """Whether two Buffers that are read side by side are large and start too close modulo 4 KiB."""
    return min(a.flat.nbytes, b.flat.nbytes) >= LARGE and distance(a.address, b.address) < NEAR


def collisions(named):
    """(name, name) of each two of these (name, Buffer) pairs that collide."""
    return [(name, other) for (name, a), (other, b) in combinations(named, 2) if collide(a, b)]
