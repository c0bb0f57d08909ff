"""What a FlatBuffer on a GPU needs: arrays of CuPy or torch, whose parts are views, in memory of their library."""

import sys

from ..words import kind_of
from . import device, host, remedies

LIBRARIES = ("cupy", "torch")


def are_there(arrays):
    """Whether one of these arrays, by their names, lies in device memory.  Those of JAX seem to, wherever they lie, and are
    left to the host, which takes them or says why not."""
    return any(device.is_device_array(x, name) for name, x in arrays.items() if not remedies.is_jax(x))


def refuse_others(x, name):
    """TypeError for a device array whose parts are no views that can be written into."""
    if device.is_device_array(x) and not host.is_torch(x) and remedies.library(x) not in LIBRARIES:
        raise TypeError(f"{name} is {kind_of(x)}; a FlatBuffer in device memory has parts of an array of CuPy or "
                        f"torch: pass cupy.asarray({name}) or torch.as_tensor({name}, device='cuda'), which do not "
                        f"copy")  # fmt: skip


def over(x, name, size, dtype):
    """A 1-D array of this size and dtype over a device array of the caller; TypeError or ValueError that calls it `name`."""
    refuse_others(x, name)
    buffer = device.acquire(x, name, writable=True)
    if buffer.dtype != dtype:
        raise TypeError(f"{name} has dtype {buffer.dtype}; the FlatBuffer has {dtype}: pass dtype=np.{buffer.dtype}")
    if buffer.shape != (size,):
        raise ValueError(f"{name} has shape {buffer.shape}; the shapes have {size} numbers in all, in one dimension")
    return detached(x)


def detached(x):
    """The same array, without the gradients that torch may compute."""
    return x.detach() if host.is_torch(x) else x


def zeros(like, size):
    """A new 1-D array of zeros by the library of an array, with its dtype and on its device."""
    if host.is_torch(like):
        return like.detach().new_zeros(size)
    with like.device:
        return sys.modules["cupy"].zeros(size, like.dtype)


def address(flat):
    """Where an array of a FlatBuffer starts, on the host or a GPU."""
    if host.is_torch(flat):
        return flat.data_ptr()
    return device.acquire(flat, "it", writable=False).address if device.is_device_array(flat) else host.address(flat)


def overlap(x, flat, what):
    """Whether an array shares a byte with a flat one, which error sentences call `what`."""
    mine, other = (device.acquire(array, what, writable=False) for array in (x, flat))
    return bool(mine.size and other.size) and mine.address < other.end and other.address < mine.end
