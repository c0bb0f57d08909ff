"""How elements are shared out among the threads of a launch, and the table of a launch over many tensors.

A thread updates one 128-bit vector, or one element of what the vectors leave.
"""

import numpy as np

VECTOR, THREADS = 16, 256  # bytes per thread, threads per block
BEHIND = ("size", "vectors", "first_block")  # of a tensor, in a row of the table behind the addresses of its buffers


def width(dtype):
    """Elements per vector."""
    return VECTOR // dtype.itemsize


def vectors(addresses, size, itemsize):
    """How many vectors a tensor has: none where a buffer is not aligned to them."""
    return 0 if any(address % VECTOR for address in addresses) else size * itemsize // VECTOR


def blocks(size, vectors, itemsize):
    """How many blocks update a tensor: a thread per vector, and one per element that is left."""
    return -(-(vectors + size - vectors * (VECTOR // itemsize)) // THREADS)


def table(tensors, itemsize):
    """(rows, tensor_of): a row per tensor, the addresses of its buffers and BEHIND; and for each block its tensor.

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
