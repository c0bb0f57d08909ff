"""From any CPU array-like to the Buffer that says where its numbers lie.  Nothing is copied; what cannot be used is refused
with a sentence.

Two things cannot be seen from here: an array that ndarray.resize(refcheck=False) moves later, and two mappings of the same
file pages, which share memory at different addresses.
"""

import itertools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import formats
from ..words import kind_of
from . import placement, remedies

DTYPES = {np.dtype(np.float32), np.dtype(np.float64)}
BF16, FP16 = np.dtype(np.uint16), np.dtype(np.float16)  # NumPy has no bf16: its numbers are here what their bits are
IN_HALF = {"bfloat16": BF16, "float16": FP16}  # dtypes of other libraries -> what a Buffer has for them
_NOT_ARRAYS = (list, tuple, Mapping, set, str, bytes, *remedies.NUMBERS)


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


class Stored:
    """An array of 16 bits for each number, and which numbers these are, where its dtype does not say so.

    It may stand wherever an optimizer takes bf16 or fp16: among gradients, parameters and copies.  np.asarray() of it gives
    its numbers, a copy in float32.

    Parameters
    ----------
    array : array of uint16 or int16
        Such as the memory of a program that has no dtype for bf16.  It is used in place.
    format : "bf16" or "fp16"

    Raises
    ------
    TypeError
        Where array is anything else: float16, ml_dtypes.bfloat16 and torch tensors are passed as they are.
    ValueError
        For another format.
    """

    __slots__ = ("array", "format")

    def __init__(self, array, format):
        if format not in ("bf16", "fp16"):
            raise ValueError(f"format={format!r} is not one of 'bf16', 'fp16'")
        is_other = is_torch(array) or isinstance(array, Stored) or is_no_array(array)
        interface = None if is_other else getattr(array, "__cuda_array_interface__", None)
        dtype = np.dtype(interface["typestr"]) if interface else None if is_other else as_array(array, "array").dtype
        if dtype not in (np.uint16, np.int16):
            raise TypeError(f"array is {_with_dtype(array)}; Stored takes an array of uint16 or int16 with the bits of each "
                            f"number, and converts nothing: an array of float16 or ml_dtypes.bfloat16, or a torch tensor of "
                            f"float16 or bfloat16, is passed without Stored")  # fmt: skip
        self.array, self.format = array, format

    @property
    def shape(self):
        return self.array.shape

    def __array__(self, dtype=None, copy=None):
        bits = np.ravel(as_array(self.array, "array"))
        numbers = formats.decode(formats.FORMATS[self.format], bits, bits.size)
        return decoded(numbers.reshape(self.shape), self.format, dtype, copy)

    def __repr__(self):
        return f"Stored({self.array!r}, {self.format!r})"


def decoded(numbers, format, dtype, copy):
    """What __array__(dtype, copy) gives where the numbers had to be decoded; ValueError where there must be no copy."""
    if copy is False:
        raise ValueError(f"the numbers of {format} are decoded to float32, which is a copy: copy=False is impossible")
    return np.asarray(numbers, dtype)


def _with_dtype(x):
    """The kind of an object in words, with its dtype where it has one."""
    dtype = str(getattr(x, "dtype", "")).removeprefix("torch.")
    return f"{kind_of(x)}{dtype and f' of {dtype}'}"


def acquire(x, name, *, writable, halves=False, wanted="float32"):
    """The Buffer of x; TypeError or ValueError that calls x `name`.  x: a NumPy array, torch CPU tensor, or an object with
    the buffer protocol, __array_interface__ or CPU DLPack; float32 or float64, native byte order, aligned, dense.
    halves: whether it may also be bf16 or fp16, whose Buffer has the dtype uint16 or float16.  wanted: the dtype that
    remedies name."""
    array = half_array(x, name) if halves else None
    if array is None:
        array = as_array(x, name, wanted)
        refuse_dtype(array.dtype, name, x, halves, wanted)
    start = _refuse_misaligned(array, name)
    if writable and not array.flags.writeable:
        raise ValueError(f"{name} is read-only{remedies.of_read_only(x, name)}")
    return Buffer(x, _flat(array, name, x), start, array.shape, _element_strides(array))


def acquire_integers(x, name):
    """The Buffer of a torch tensor of integers, which hold what a format stores."""
    array = _from_torch(x, name, np.dtype(str(x.dtype).removeprefix("torch.")))
    _refuse_misaligned(array, name)
    return Buffer(x, _flat(array, name, x), address(array), array.shape, _element_strides(array))


def _refuse_misaligned(array, name):
    """The address of an array; ValueError where it is none for its elements."""
    start = address(array)
    if start % array.itemsize:
        raise ValueError(f"{name} starts at address {start:#x}, which is not aligned to {array.itemsize} bytes")
    return start


def half_array(x, name):
    """The array of the 16 bits of each number of x, with the dtype BF16 or FP16; None where x is no bf16 or fp16."""
    if type(x) is np.ndarray and x.dtype in DTYPES:  # the name of its dtype takes microseconds
        return None
    if isinstance(x, Stored):
        return as_array(x.array, name).view(BF16 if x.format == "bf16" else FP16)
    kind = IN_HALF.get(str(getattr(x, "dtype", "")).removeprefix("torch."))
    if kind is None:
        return None
    if is_torch(x):
        return _from_torch(x, name, kind)
    if remedies.is_jax(x):
        return _of_jax(x, name).view(kind)
    return as_array(x, name).view(kind)


def holds_bytes(x):
    """Whether x is an array of uint8, as those of q8 are."""
    return isinstance(x, np.ndarray) and x.dtype == np.uint8


def is_half(x):
    """Whether x is an array of bf16 or fp16."""
    return isinstance(x, Stored) or str(getattr(x, "dtype", "")).removeprefix("torch.") in IN_HALF


def half_name(x):
    """The name of the dtype of an array of bf16 or fp16."""
    return x.format if isinstance(x, Stored) else str(x.dtype).removeprefix("torch.")


def _of_jax(x, name):
    """A JAX array of a dtype that NumPy lacks, without a copy."""
    _refuse_without_numbers(x, name)
    array = np.asarray(x)
    if address(array) != x.unsafe_buffer_pointer():
        raise TypeError(f"{name} is a JAX array whose memory NumPy does not share: pass {name}.astype('float32')")
    return array


def refuse_dtype(dtype, name, x, halves=False, wanted="float32"):
    """TypeError unless the dtype of x is float32 or float64 in native byte order."""
    if dtype in DTYPES:
        return
    if halves:
        refuse_unsaid(dtype, name)
    fault = f"{dtype}; fastrms updates float32 and float64"
    if not dtype.isnative:
        fault = f"{dtype.str}, which is not in native byte order"
    array = name if hasattr(x, "astype") else f"np.asarray({name})"
    raise TypeError(f"{name} has dtype {fault}: {remedies.of_dtype(dtype, array, wanted)}")


def refuse_unsaid(dtype, name):
    """TypeError for 16 bits of which nobody says what numbers they are."""
    if dtype in (np.uint16, np.int16):
        raise TypeError(f"{name} has dtype {dtype}; say which numbers its bits are: fastrms.Stored({name}, 'bf16') or "
                        f"fastrms.Stored({name}, 'fp16')")  # fmt: skip


def refuse_unsaid_param(x, name):
    """TypeError for a parameter of 16 bits of which nobody says what numbers they are, nor how it is updated."""
    if isinstance(x, np.ndarray) and x.dtype in (np.uint16, np.int16):
        raise TypeError(f"{name} has dtype {x.dtype}: where these are the bits of bf16 or fp16 numbers, pass "
                        f"fastrms.Stored({name}, 'bf16') or fastrms.Stored({name}, 'fp16') with master='float32'; where "
                        f"they are integers, {name}.astype(np.float32), a copy, and keep that array")  # fmt: skip


def address(array):
    """Where an ndarray begins."""
    return array.__array_interface__["data"][0]


def same_memory(a, b):
    """Whether two array-likes begin at the same address; also true where one is no array, which acquire() refuses later."""
    try:
        return address(as_array(a, "")) == address(as_array(b, ""))
    except (TypeError, ValueError):
        return True


def as_array(x, name, wanted="float32"):
    """x as an ndarray of the same memory; TypeError or ValueError that calls x `name`.  wanted: the dtype that remedies
    name."""
    if is_torch(x):
        return _from_torch(x, name, wanted=wanted)
    if is_masked(x):
        raise TypeError(f"{name} is a masked array; a mask would be ignored: pass {name}.data")
    if isinstance(x, np.ndarray):
        return np.asarray(x)  # a subclass may compute differently
    refuse_stored(x, name)
    refuse_non_array(x, name, wanted)
    if remedies.is_jax(x):
        _refuse_without_numbers(x, name)
    if hasattr(x, "__cuda_array_interface__") or _dlpack_device(x, name) not in (None, 1):
        raise TypeError(
            f"{name} ({type(x).__name__}) is in device memory; this backend updates host memory: copy it to a NumPy array"
        )
    return _view(x, name, wanted)


def refuse_stored(x, name):
    """TypeError for bf16 and fp16 where only floats are taken."""
    if isinstance(x, Stored):
        raise TypeError(f"{name} is a Stored {x.format}; it must be float32 or float64 here")


def is_torch(x):
    """Whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return isinstance(x, getattr(torch, "Tensor", ()))  # torch is None, or may be in the middle of its import


def is_masked(x):
    """Whether x is a masked array.  np.ma would import numpy.ma; a child that is forked meanwhile would wait for ever."""
    return isinstance(x, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


def _from_torch(x, name, kind=None, wanted="float32"):
    """A CPU tensor as an ndarray of the same memory; requires_grad does not matter.  kind: the dtype of the array where the
    tensor is bf16 or fp16."""
    torch = sys.modules["torch"]
    _refuse_tensor(x, name, torch, kind, wanted)
    try:
        bits = x.detach().view(torch.int16) if kind is not None and x.is_floating_point() else x.detach()
        array, storage = bits.numpy(), x.untyped_storage()
        start = x.data_ptr()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} is {kind_of(x)} without memory that fastrms can use ({error})") from None
    if array.size and (address(array) != start or start + _extent(array) > storage.data_ptr() + storage.nbytes()):
        raise ValueError(f"{name} has lost its memory: its torch storage was resized")
    return array if kind is None else array.view(kind)


def _refuse_tensor(x, name, torch, kind, wanted):
    """TypeError or ValueError for a tensor whose numbers do not lie in host memory as float32 or float64; kind: what a bf16
    or fp16 may be."""
    if isinstance(x, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name} is {kind_of(x)}, which has no memory yet: run one forward pass of its lazy module "
                        f"(LazyLinear, ...) before making the optimizer")  # fmt: skip
    if (where := x.device.type) != "cpu":
        raise TypeError(f"{name} is on device {x.device}{remedies.of_torch_device(where, name)}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} is a torch tensor with layout {x.layout}; fastrms needs a dense (strided) one: "
                        f"pass {name}.to_dense()")  # fmt: skip
    if x.is_neg() or x.is_conj():
        raise ValueError(f"{name} is a lazily negated or conjugated view; pass {name}.resolve_neg()")
    if kind is None and x.dtype not in (torch.float32, torch.float64):
        dtype = str(x.dtype).removeprefix("torch.")
        remedy = remedies.of_torch_dtype(dtype, name, wanted)
        raise TypeError(f"{name} has dtype {dtype}; fastrms updates float32 and float64: {remedy}")


def _extent(array):
    """The bytes from the start of the first to the end of the last element of an array with strides >= 0."""
    if array.flags.c_contiguous:
        return array.nbytes
    last = sum((length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True))
    return last + array.itemsize


def _refuse_without_numbers(x, name):
    """TypeError for a value that JAX traces, and for an array whose memory it has taken back."""
    if "Tracer" in type(x).__name__:
        raise TypeError(f"{name} is traced by JAX and has no numbers yet: call fastrms outside of jax.jit and jax.grad, "
                        f"with the gradients that they return")  # fmt: skip
    if getattr(x, "is_deleted", bool)():
        raise TypeError(f"{name} is a JAX array that was deleted: a jitted function took it over (donate_argnums), so pass "
                        f"what that function returned")  # fmt: skip


def is_no_array(x):
    """Whether x is None, a number, text or a container."""
    return x is None or isinstance(x, _NOT_ARRAYS)


def refuse_non_array(x, name, wanted="float32"):
    """TypeError for what is_no_array()."""
    if is_no_array(x):
        raise TypeError(f"{name} is {kind_of(x)}{remedies.of_non_array(x, name, wanted)}")


def _dlpack_device(x, name):
    try:
        return int(x.__dlpack_device__()[0])
    except AttributeError:
        return None
    except Exception as error:  # somebody's code: whatever it raises, this array cannot be used
        raise TypeError(f"{name} is {kind_of(x)} whose __dlpack_device__ fails ({error})") from None


def _view(x, name, wanted):
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
        dtype, reason = f" of dtype {x.dtype}" if hasattr(x, "dtype") else "", str(error).partition("\n")[0]
        raise TypeError(f"{name} is {kind_of(x)}{dtype}, which fastrms cannot use in place ({reason}): "
                        f"{remedies.of_object(x, name, wanted)}") from None  # fmt: skip


def _element_strides(array):
    return tuple(
        stride // array.itemsize if length > 1 else 0 for stride, length in zip(array.strides, array.shape, strict=True)
    )


def _flat(array, name, x):
    """The numbers of a dense array, taken from x, in memory order, without a copy."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    packed = array.transpose(order)
    if not packed.flags.c_contiguous:
        copy = f"{name}.contiguous()" if is_torch(x) else f"np.ascontiguousarray({name})"
        raise ValueError(
            f"{name} has shape {array.shape} and strides {array.strides} bytes: it is not dense (its numbers repeat or have "
            f"gaps between them); pass {copy}, a contiguous copy"
        )
    return packed.reshape(-1)


def same_layout(buffer, name, reference, reference_name, dtypes=None):
    """Refuse unless buffer has the shape and strides of reference, and its dtype or one of dtypes, the first of which is
    that in which reference is updated."""
    dtypes = dtypes or (reference.dtype,)
    if buffer.dtype not in dtypes:
        has = f"{reference_name} {'has' if reference.dtype == dtypes[0] else 'is updated in'} {dtype_of(dtypes[0])}"
        dtype, library = dtype_of(dtypes[0]), "ml_dtypes" if dtypes[0] == BF16 else "np"
        raise TypeError(f"{name} has dtype {dtype_of(buffer.dtype)}, {has}; give both the same: "
                        f"{name}.astype({library}.{dtype}), for a torch tensor {name}.to(torch.{dtype})")  # fmt: skip
    if buffer.shape != reference.shape:
        remedy = remedies.of_shape(buffer, name, reference, reference_name, is_torch(buffer.owner))
        raise ValueError(f"{name} has shape {buffer.shape}, {reference_name} has {reference.shape}{remedy}")
    if buffer.strides != reference.strides and buffer.size:
        raise ValueError(
            f"{name} has strides {buffer.strides} (elements), {reference_name} has {reference.strides}: elements would be "
            f"paired wrongly; give both the same memory order (np.ascontiguousarray, np.asfortranarray, tensor.contiguous())"
        )


def overlap(buffers):
    """The indices of two Buffers that share a byte, the one with the lower address first, or None."""
    ranges = sorted((buffer.address, buffer.end, k) for k, buffer in enumerate(buffers) if buffer.size)
    pairs = itertools.pairwise(ranges)
    return next(((first, second) for (_, end, first), (start, _, second) in pairs if start < end), None)


def refuse_overlap(buffers):
    """buffers: (name, Buffer) pairs.  ValueError if any two share a byte."""
    names, buffers = zip(*sorted(buffers, key=lambda named: named[0]), strict=True)  # this orders two at one address
    pair = overlap(buffers)
    if pair is not None:
        first, second = (names[k] for k in pair)
        raise ValueError(f"{first} and {second} overlap in memory; {remedies.SEPARATE}")


def ours(array):
    """The Buffer of an array that fastrms allocated itself, which needs no check."""
    return Buffer(array, array, address(array), array.shape, _element_strides(array))


def shaped(flat, like):
    """Flat numbers in memory order as an array in the shape and memory order of a Buffer."""
    if not isinstance(flat, np.ndarray):
        return flat.shaped(like)
    if not flat.size:
        return flat.reshape(like.shape)
    return np.lib.stride_tricks.as_strided(flat, like.shape, [stride * flat.itemsize for stride in like.strides])


def dtype_of(dtype):
    """What people call the dtype of a Buffer: uint16 stands for bfloat16."""
    return "bfloat16" if dtype == BF16 else str(dtype)


def again(buffer, name):
    """The Buffer of a torch tensor that may have been given other memory since, by `tensor.data = ...`."""
    if buffer.dtype.kind in "iu" and not buffer.owner.is_floating_point():
        return acquire_integers(buffer.owner, name)
    return acquire(buffer.owner, name, writable=True, halves=buffer.dtype not in DTYPES)


def bits(flat):
    """A flat array of bf16 or fp16 as the 16 bits of each number."""
    return flat.view(np.uint16)


def wrote(buffers):
    """Tell the owners of these Buffers that their memory was written.

    A torch tensor counts the writes to it.  A backward pass that saved the tensor compares the count, and raises where it
    would otherwise compute gradients from numbers that are no longer there.  Other owners count nothing.
    None and plain arrays may stand among the buffers, as they do among gradients.
    """
    torch = sys.modules.get("torch")
    if not hasattr(torch, "Tensor"):  # torch is None, or in the middle of its import
        return
    owners = [getattr(buffer, "owner", None) for buffer in buffers]
    written = [x for x in owners if isinstance(x, torch.Tensor) and not x.is_inference()]  # an inference tensor has no count
    if written:
        _raise_versions(torch, written)


def _raise_versions(torch, tensors):
    try:
        torch.autograd.graph.increment_version(tensors)
    except (AttributeError, TypeError):  # before torch 2.5; an in-place write of no elements counts, too
        for tensor in tensors:
            tensor.detach().as_strided((0,), (1,)).zero_()


def same_device(buffers, names):
    """Refuse unless all Buffers are on one device.  The memory of the host is one device, so there is nothing to refuse."""


def on_host(array):
    """A flat array of ours as a NumPy array in host memory: itself, or a copy of one of device memory."""
    return array.to_host() if hasattr(array, "to_host") else array


def copy(to, source):
    """Copy between flat arrays."""
    to[...] = source


def place_beside(param, others, size=None, dtype=None):
    """A new uninitialised flat array, like a Buffer unless it is to have another size and dtype, well away from the Buffer
    and from others that run beside it."""
    addresses = [param.address, *(ours(flat).address for flat in others)]
    return placement.place(param.size if size is None else size, dtype or param.dtype, addresses)
