"""The way in: any CPU array-like -> where its numbers lie.  Refuses with a sentence, never copies.

What cannot be seen from here: ndarray.resize(refcheck=False) and two mappings of the same file pages.
"""

import itertools
import sys
from typing import Any, NamedTuple

import numpy as np

from . import placement

DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
_NOT_ARRAYS = (list, tuple, dict, set, int, float, complex, str, bytes, np.generic)


class Buffer(NamedTuple):
    """A dense array: the object it came from, its numbers in memory order, and its layout."""

    owner: Any
    flat: np.ndarray
    address: int
    shape: tuple
    strides: tuple  # in elements, 0 for axes of length 1

    @property
    def size(self):
        return self.flat.size

    @property
    def dtype(self):
        return self.flat.dtype

    @property
    def end(self):
        return self.address + self.flat.nbytes


def acquire(x, name, *, writable):
    """Buffer of x, or TypeError / ValueError that names it.  x: NumPy array, torch CPU tensor, or an object with
    the buffer protocol, __array_interface__ or CPU DLPack; float32 or float64, native byte order, aligned, dense."""
    array = as_array(x, name)
    start = address(array)
    if not array.dtype.isnative:
        raise TypeError(f"{name} has dtype {array.dtype.str}, which is not in native byte order")
    if array.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype}; fastrms updates float32 and float64, see astype()")
    if start % array.itemsize:
        raise ValueError(f"{name} starts at address {start:#x}, which is not aligned to {array.itemsize} bytes")
    if writable and not array.flags.writeable:
        raise ValueError(f"{name} is read-only; it is written in place and must be writable")
    return Buffer(x, _flat(array, name), start, array.shape, _element_strides(array))


def address(array):
    """Where an ndarray begins."""
    return array.__array_interface__["data"][0]


def as_array(x, name):
    """x as an ndarray of the same memory, or TypeError / ValueError that names it."""
    return _from_torch(x, name) if is_torch(x) else _as_array(x, name)


def is_torch(x):
    """Whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _from_torch(x, name):
    """A CPU tensor as an ndarray of the same memory; requires_grad does not matter."""
    if x.device.type != "cpu":
        raise TypeError(f"{name} is on device {x.device}; this backend updates host memory: pass {name}.cpu()")
    if str(x.layout) != "torch.strided":
        raise TypeError(f"{name} is a torch tensor with layout {x.layout}; fastrms needs a dense (strided) one")
    if x.is_neg() or x.is_conj():
        raise ValueError(f"{name} is a lazily negated or conjugated view; pass {name}.resolve_neg()")
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float64"):
        raise TypeError(f"{name} has dtype {dtype}; fastrms updates float32 and float64")
    try:
        array, storage = x.detach().numpy(), x.untyped_storage()
        start = x.data_ptr()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(x).__name__} without memory that fastrms can use ({error})") from None
    if array.size and (address(array) != start or start + array.nbytes > storage.data_ptr() + storage.nbytes()):
        raise ValueError(f"{name} has lost its memory: its torch storage was resized")
    return array


def _as_array(x, name):
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; a mask would be ignored: pass {name}.data")
    if isinstance(x, np.ndarray):
        return np.asarray(x)  # a subclass may compute differently
    if x is None or isinstance(x, _NOT_ARRAYS):
        raise TypeError(f"{name} is a {type(x).__name__}{_hint(x)}; it must be an array of float32 or float64, as in params")
    if hasattr(x, "__cuda_array_interface__") or _dlpack_device(x, name) not in (None, 1):
        raise TypeError(
            f"{name} ({type(x).__name__}) is in device memory; this backend updates host memory: copy it to a NumPy array"
        )
    return _view(x, name)


def _hint(x):
    if isinstance(x, dict):
        return ', which as a group needs the key "params", and a group holds arrays'
    return ", which has no buffer to use in place" if isinstance(x, (list, tuple)) else ""


def _dlpack_device(x, name):
    try:
        return int(x.__dlpack_device__()[0])
    except AttributeError:
        return None
    except Exception as error:  # somebody's code: whatever it raises, this array cannot be used
        raise TypeError(f"{name} is a {type(x).__name__} whose __dlpack_device__ fails ({error})") from None


def _view(x, name):
    """x without a copy: by the buffer protocol, by __array_interface__, or by DLPack; never by __array__, which may copy."""
    try:
        if hasattr(x, "__array_interface__"):
            return np.asarray(x)
        try:
            return np.asarray(memoryview(x))
        except (TypeError, ValueError, BufferError):
            if hasattr(x, "__dlpack__"):
                return np.from_dlpack(x)
            raise
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError) as error:
        dtype = f" of dtype {x.dtype}" if hasattr(x, "dtype") else ""
        raise TypeError(
            f"{name} is a {type(x).__name__}{dtype}, which fastrms cannot use in place ({error}); pass a NumPy array"
        ) from None


def _element_strides(array):
    return tuple(
        stride // array.itemsize if length > 1 else 0 for stride, length in zip(array.strides, array.shape, strict=True)
    )


def _flat(array, name):
    """The numbers of a dense array in memory order, without a copy."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    packed = array.transpose(order)
    if not packed.flags.c_contiguous:
        raise ValueError(
            f"{name} has shape {array.shape} and strides {array.strides} bytes: it is not dense; pass a contiguous array"
        )
    return packed.reshape(-1)


def same_layout(buffer, name, reference, reference_name):
    """Refuse unless buffer has the dtype, shape and strides of reference."""
    if buffer.dtype != reference.dtype:
        raise TypeError(f"{name} has dtype {buffer.dtype}, {reference_name} has {reference.dtype}; give both the same")
    if buffer.shape != reference.shape:
        raise ValueError(f"{name} has shape {buffer.shape}, {reference_name} has {reference.shape}")
    if buffer.strides != reference.strides and buffer.size:
        raise ValueError(
            f"{name} has strides {buffer.strides} (elements), {reference_name} has {reference.strides}: elements would be "
            f"paired wrongly; give both the same memory order (np.ascontiguousarray, np.asfortranarray)"
        )


def overlap(buffers):
    """The indices of two Buffers that share a byte, the one with the lower address first, or None."""
    ranges = sorted((buffer.address, buffer.end, k) for k, buffer in enumerate(buffers) if buffer.size)
    pairs = itertools.pairwise(ranges)
    return next(((first, second) for (_, end, first), (start, _, second) in pairs if start < end), None)


def refuse_overlap(buffers):
    """buffers: (name, Buffer) pairs.  ValueError if any two share a byte."""
    names, buffers = zip(*buffers, strict=True)
    pair = overlap(buffers)
    if pair is not None:
        first, second = (names[k] for k in pair)
        raise ValueError(f"{first} and {second} overlap in memory; every buffer of a step must be separate")


def ours(array):
    """Buffer of an array of ours, which needs no check."""
    return Buffer(array, array, address(array), array.shape, _element_strides(array))


def shaped(flat, like):
    """Flat numbers in memory order as an array in the shape and memory order of a Buffer."""
    if not isinstance(flat, np.ndarray):
        return flat.shaped(like)
    if not flat.size:
        return flat.reshape(like.shape)
    return np.lib.stride_tricks.as_strided(flat, like.shape, [stride * flat.itemsize for stride in like.strides])


def is_c_order(buffer):
    """Whether a Buffer is C-contiguous, whatever strides its axes of length 1 have."""
    expected, stride = [], 1
    for length in reversed(buffer.shape):
        expected.append(stride if length > 1 else 0)
        stride *= length
    return buffer.strides == tuple(reversed(expected))


def again(buffer, name):
    """The Buffer of a torch tensor that may have been given other memory since."""
    return acquire(buffer.owner, name, writable=True)


def same_device(buffers, names):
    """There is one host."""


def on_host(flat):
    return flat


def place_beside(param, others):
    """A new uninitialised flat array like a Buffer, well away from it and from others that run beside it."""
    return placement.place(param.size, param.dtype, [param.address, *(ours(flat).address for flat in others)])
