"""How elements are shared out among the threads of a launch, and the table of a launch over many tensors.

A thread updates one 128-bit vector, or one element of what the vectors leave.
"""

import numpy as np

VECTOR, THREADS = 16, 256  # bytes per thread, threads per block
BEHIND = ("size", "vectors", "first_block")  # in a row of the table, after the addresses of the buffers


def width(dtype):
    """How many elements a vector has."""
    return VECTOR // dtype.itemsize


def vectors(addresses, size, itemsize):
    """How many whole vectors a tensor has; 0 where a buffer is not aligned to them."""
    return 0 if any(address % VECTOR for address in addresses) else size * itemsize // VECTOR


def blocks(size, vectors, itemsize):
    """How many blocks update a tensor: a thread per vector, and one per element that is left."""
    return -(-(vectors + size - vectors * (VECTOR // itemsize)) // THREADS)


def table(tensors, itemsize):
    """(rows, tensor_of).  rows: of each tensor the addresses of its buffers, then BEHIND; tensor_of: each block's tensor.

    Parameters
    ----------
    tensors : list of (addresses, size)
    """
    rows, tensor_of = [], []
    for addresses, size in tensors:
        count = vectors(addresses, size, itemsize)
        rows.append([*addresses, size, count, len(tensor_of)])
        tensor_of += [len(rows) - 1] * blocks(size, count, itemsize)
    return np.array(rows, np.uint64).reshape(-1), np.array(tensor_of, np.uint32)
