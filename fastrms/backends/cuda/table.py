"""How elements are shared out among the threads of a launch, and the table of a launch over many tensors.

A thread updates one 128-bit vector, or one element of what the vectors leave.  Vectors begin at the first address that is
a multiple of their size: all buffers of a tensor must share the offset to it, else there are none.  Where buffers are stored
in formats, a vector has as many elements in all of them; where one is in q8, there are none, and a warp has a block of q8.
"""

from typing import NamedTuple

import numpy as np

from ... import formats as codecs
from ...memory.device import VECTOR

THREADS = 256  # per block
LANES = 4  # elements of a vector of each buffer, where some are stored in formats
WARP = 32  # threads
BLOCKS = THREADS // WARP  # of q8, that a block of threads updates
BEHIND = ("size", "vectors", "first_block")  # in a row of the table, after the addresses of the buffers
EXACT = ("float32", "split16")  # formats that round nothing


class Formats(NamedTuple):
    """The names of the formats of all buffers of a launch.

    Parameters
    ----------
    written : tuple of str
        Of what is updated, in the order of the streams of random numbers: the parameter, or its floats, and the states.
    grad : str
    copies : tuple of str
        Of what the new parameter is written to once more, to nearest.
    stochastic : bool
    """

    written: tuple
    grad: str
    copies: tuple = ()
    stochastic: bool = False

    @property
    def name(self):
        """All of this as a part of the name of a kernel."""
        return "_".join([*self.written, "of", self.grad, *(f"to_{name}" for name in self.copies),
                         *["stochastic"] * self.stochastic])  # fmt: skip

    @property
    def in_blocks(self):
        return any(codecs.FORMATS[name].in_blocks for name in self.written)

    @property
    def streams(self):
        """The indices in `written` that are rounded at random."""
        return [k for k, name in enumerate(self.written) if self.stochastic and name not in EXACT]

    @property
    def itemsizes(self):
        """Of each buffer of elements, in the order of parts()."""
        names = [self.written[0], self.grad, *self.written[1:], *self.copies]
        found = [codecs.FORMATS[name] for name in names]
        return [dtype.itemsize for made in found for dtype in (made.dtype, made.low) if dtype]


def width(dtype):
    """How many elements a vector has."""
    return VECTOR // dtype.itemsize


def vectors(addresses, size, itemsize, itemsizes=None):
    """How many whole vectors a tensor has.  addresses, size: integers, or arrays of them with one entry per tensor;
    itemsizes: those of the buffers where they differ, itemsize is that of the update then."""
    lanes, differs = VECTOR // itemsize, 0
    sizes = itemsizes or [itemsize] * len(addresses)
    places = [address // each % lanes for address, each in zip(addresses, sizes, strict=True)]
    for place in places:
        differs = differs | (place ^ places[0])
    head = -places[0] % lanes  # elements in front of the first vector
    return (differs == 0) * (size > head) * (size - head) // lanes


def blocks(size, vectors, itemsize):
    """How many blocks update a tensor: a thread per vector, and one per element that is left."""
    return -(-(vectors + size - vectors * (VECTOR // itemsize)) // THREADS)


def grid(addresses, size, itemsize, formats=None):
    """(vectors, blocks) of a tensor; formats: the Formats of its buffers, None where all are in one dtype."""
    if formats and formats.in_blocks:
        return size * 0, -(-size // (codecs.Q8_BLOCK * BLOCKS))
    count = vectors(addresses, size, itemsize, formats and formats.itemsizes)
    return count, blocks(size, count, itemsize)


def table(tensors, itemsize, formats=None):
    """(rows, tensor_of).  rows: of each tensor the addresses of its buffers, then BEHIND, then its other numbers; tensor_of:
    each block's tensor.

    Parameters
    ----------
    tensors : list of (addresses, size, *other numbers)
    """
    addresses = np.array([addresses for addresses, *_ in tensors], np.int64).T
    size, *others = np.array([numbers for _, *numbers in tensors], np.int64).T
    count, blocks_of = grid(addresses, size, itemsize, formats)
    rows = np.stack([*addresses, size, count, np.cumsum(blocks_of) - blocks_of, *others], axis=1).astype(np.uint64)
    return rows.reshape(-1), np.repeat(np.arange(len(tensors), dtype=np.uint32), blocks_of)
