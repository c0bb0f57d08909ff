"""How elements are shared out among the threads of a launch, and the table of a launch over many tensors.

A thread updates one 128-bit vector, or one element of what the vectors leave.  Vectors begin at the first address that is
a multiple of their size: all buffers of a tensor must share the offset to it, else there are none.
"""

import numpy as np

from ...memory.device import VECTOR

THREADS = 256  # per block
BEHIND = ("size", "vectors", "first_block")  # in a row of the table, after the addresses of the buffers


def width(dtype):
    """How many elements a vector has."""
    return VECTOR // dtype.itemsize


def vectors(addresses, size, itemsize):
    """How many whole vectors a tensor has.  addresses, size: integers, or arrays of them with one entry per tensor."""
    first, differs = addresses[0], 0
    for address in addresses:
        differs = differs | ((address ^ first) & (VECTOR - 1))
    head = -first % VECTOR // itemsize  # elements in front of the first vector
    return (differs == 0) * (size > head) * (size - head) * itemsize // VECTOR


def blocks(size, vectors, itemsize):
    """How many blocks update a tensor: a thread per vector, and one per element that is left."""
    return -(-(vectors + size - vectors * (VECTOR // itemsize)) // THREADS)


def table(tensors, itemsize):
    """(rows, tensor_of).  rows: of each tensor the addresses of its buffers, then BEHIND; tensor_of: each block's tensor.

    Parameters
    ----------
    tensors : list of (addresses, size)
    """
    columns = np.array([[*addresses, size] for addresses, size in tensors], np.int64).T
    *addresses, size = columns
    count = vectors(addresses, size, itemsize)
    grid = blocks(size, count, itemsize)
    rows = np.stack([*columns, count, np.cumsum(grid) - grid], axis=1).astype(np.uint64)
    return rows.reshape(-1), np.repeat(np.arange(len(tensors), dtype=np.uint32), grid)
