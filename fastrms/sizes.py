"""How many bytes the buffers of an optimizer have, and how many a step moves between memory and processor."""

from functools import partial

from . import formats, saved_formats, storage

MANY = 2**20  # elements: of so many, a block of q8 has its share of the bytes of one element


class Bytes(dict):
    """Name of a buffer -> its bytes, of all tensors together.

    The names are "param", "grad", those of the states, "master" or "remainder" for bf16 and fp16 parameters that have one,
    and "param_copy".  Gradients count as those of the last step or of bind(); before, as those of a FlatBuffer, or in
    the dtype of the update.

    Attributes
    ----------
    elements : int
        How many numbers all parameters have.
    total : int
        The bytes of all buffers.
    per_parameter : dict of str to float
        The bytes of each buffer, for one number of the parameters.
    """

    def __init__(self, sizes, elements):
        super().__init__(sizes)
        self.elements = elements

    @property
    def total(self):
        return sum(self.values())

    @property
    def per_parameter(self):
        return {name: count / max(self.elements, 1) for name, count in self.items()}


def of_optimizer(tensors, grads):
    """The Bytes of all tensors.  grads: the dtype of each gradient."""
    found = {}
    for tensor, grad in zip(tensors, grads, strict=True):
        for name, count in of_tensor(tensor, grad, tensor.param.size).items():
            found[name] = found.get(name, 0) + count
    return Bytes(found, sum(tensor.param.size for tensor in tensors))


def of_tensor(tensor, grad, size):
    """Name -> bytes of the buffers of a Tensor as if it had `size` elements."""
    made = {"param": size * tensor.param.dtype.itemsize, "grad": size * grad.itemsize}
    for name, format in saved_formats.formats_of(tensor).items():
        native = format is storage.FLOAT
        made[name] = size * tensor.dtype.itemsize if native else formats.stored_bytes(format, size)
    if tensor.storage and tensor.storage.copy:
        made["param_copy"] = size * tensor.storage.copy.dtype.itemsize
    return made


def per_element(rows, sizes_of):
    """Name -> bytes per element, the mean over the elements of (Tensor, dtype of its gradient) pairs.  sizes_of(*pair): name
    -> bytes of MANY elements; a buffer that only some tensors have counts as nothing in the others."""
    found, elements = {}, sum(tensor.param.size for tensor, _ in rows)
    for tensor, grad in rows:
        share = tensor.param.size / elements if elements else 1 / len(rows)
        for name, count in sizes_of(tensor, grad).items():
            found[name] = found.get(name, 0) + share * count / MANY
    return found


def stored(tensor, grad):
    return of_tensor(tensor, grad, MANY)


def moved(tensor, grad, zero_grad=False):
    """What a step reads and writes of each buffer: it reads the gradient, unless it zeroes it, too, and writes the copy and
    a parameter that has a master; it reads and writes all else."""
    sizes = stored(tensor, grad)
    once = {"param_copy", *["grad"] * (not zero_grad), *["param"] * ("master" in sizes)}
    return {name: count if name in once else 2 * count for name, count in sizes.items()}


def moved_per_element(rows, zero_grad=False):
    """The bytes that a step moves per element of (Tensor, dtype of its gradient) pairs."""
    return sum(per_element(rows, partial(moved, zero_grad=zero_grad)).values())
