"""From a CuPy, torch, Numba or other CUDA array to the Buffer that says where its numbers lie; and our own state arrays.

This is the counterpart of host.py, with the same names.  acquire() refuses with a sentence, and neither copies nor
synchronises.  CUDA is imported at the first array.
"""

import contextlib
import ctypes
import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from ..words import kind_of
from . import host, remedies

LEGACY_STREAM = 1  # the handle of the default stream
VECTOR = 16  # bytes that a thread loads at once; buffers that share an offset to a multiple of them can be loaded so
INTERFACE = "__cuda_array_interface__"
_ON_DEVICE = (2, 13)  # DLPack: CUDA, CUDA managed


class DeviceBuffer:
    """A dense array in device memory: what host.Buffer is for the host."""

    def __init__(self, owner, address, shape, strides, dtype, device, stream=None):
        self.owner, self.address, self.shape, self.strides, self.dtype = owner, address, shape, strides, dtype
        self.device, self.stream = device, stream
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self.end = address + self.nbytes

    @property
    def flat(self):
        return self

    def _replace(self, address, dtype):
        """A DeviceBuffer like this one of another dtype at another address, whose memory somebody else keeps."""
        return DeviceBuffer(None, address, self.shape, self.strides, dtype, self.device)

    def __getitem__(self, span):
        """A part of a flat array."""
        start, stop, _ = span.indices(self.size)
        size, address = max(0, stop - start), self.address + start * self.dtype.itemsize
        return DeviceArray(self.owner, address, (size,), (int(size > 1),), self.dtype, self.device)

    def view(self, dtype):
        """The same memory as elements of another dtype of this size."""
        return DeviceArray(self.owner, self.address, self.shape, self.strides, np.dtype(dtype), self.device)

    def fill(self, value):
        """Write a value everywhere; the device does it where all words of the value are equal."""
        size = min(self.dtype.itemsize, 4)
        words = np.full(1, value, self.dtype).view(f"u{size}")
        if (words != words[0]).any():
            copy(self, np.full(self.size, value, self.dtype))
        elif self.size:
            with finished(self.device):
                call_driver("filling", f"cuMemsetD{8 * size}", self.address, int(words[0]), self.nbytes // size)

    def to_host(self):
        """A NumPy array with the numbers in memory order."""
        host = np.empty(self.size, self.dtype)
        copy(host, self)
        return host

    def reshape(self, shape):
        """The same memory, that of a flat array, in another shape in C order."""
        steps = [math.prod(shape[k + 1 :]) if length > 1 else 0 for k, length in enumerate(shape)]
        return DeviceArray(self.owner, self.address, tuple(shape), tuple(steps), self.dtype, self.device)

    def shaped(self, like):
        """The same memory in the shape and memory order of a Buffer."""
        return DeviceArray(self.owner, self.address, like.shape, like.strides, self.dtype, self.device)


class DeviceArray(DeviceBuffer):
    """A state array as people get it.  cupy.asarray, torch.as_tensor and numba.cuda.as_cuda_array take it without a copy."""

    @property
    def __cuda_array_interface__(self):
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        data = (self.address, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "version": 3, "strides": strides}


def is_device_array(x, name="this"):
    """Whether x lies in device memory, without importing anything; TypeError that calls it `name` where it cannot say so."""
    x = x.array if isinstance(x, host.Stored) else x
    if isinstance(x, (np.ndarray, *host._NOT_ARRAYS)):
        return False
    if host.is_torch(x):
        return x.is_cuda
    if hasattr(type(x), INTERFACE) or hasattr(x, INTERFACE):  # the first does not make the interface
        return True
    return host._dlpack_device(x, name) in _ON_DEVICE


def acquire(x, name, *, writable, halves=False, wanted="float32"):
    """The DeviceBuffer of x; TypeError or ValueError that calls x `name`.  halves: whether it may also be bf16 or fp16, for
    which a DeviceBuffer has the dtype uint16 or float16.  wanted: the dtype that remedies name."""
    seen = see(x, name, halves, wanted)
    if seen.dtype not in host.DTYPES and not (halves and seen.dtype == host.FP16) and not _says_bf16(x):
        if halves:
            host.refuse_unsaid(seen.dtype, name)
        raise TypeError(f"{name} has dtype {seen.dtype}; fastrms updates float32 and float64")
    return _buffer(x, seen, name, writable)


def acquire_integers(x, name):
    """The DeviceBuffer of an array of any dtype, which holds what a format stores."""
    return _buffer(x, see(x, name, False), name, True)


def see(x, name, halves, wanted="float32"):
    """The Seen of a device array, and of one in a Stored where it may be bf16 or fp16; TypeError for anything else."""
    if halves and isinstance(x, host.Stored):
        return see(x.array, name, halves)._replace(dtype=host.IN_HALF[{"bf16": "bfloat16", "fp16": "float16"}[x.format]])
    host.refuse_stored(x, name)
    if remedies.is_jax(x):
        raise TypeError(f"{name} is a JAX array: JAX arrays are immutable and JAX does not say on which stream they are "
                        f"made; use optax there, or pass a CuPy or torch array")  # fmt: skip
    host.refuse_non_array(x, name, wanted)
    if not is_device_array(x):
        raise TypeError(f"{name} ({type(x).__name__}) is in host memory; backend='cuda' updates device memory: pass "
                        f"cupy.asarray({name}) or a torch tensor on 'cuda', or use backend='c'")  # fmt: skip
    if host.is_torch(x):
        return _seen_of_torch(x, name, halves, wanted)
    return _seen_of_cupy(x) if _is_cupy(x) else _seen(x, name)


def holds_bytes(x):
    """Whether x is an array of uint8, as those of q8 are."""
    return is_device_array(x) and not isinstance(x, host.Stored) and see(x, "this", True).dtype == np.uint8


def _says_bf16(x):
    """Whether an array that was seen with halves says itself that its bits are bf16."""
    return host.is_half(x) and (host.is_torch(x) or isinstance(x, host.Stored))


def _buffer(x, seen, name, writable):
    if seen.address % seen.dtype.itemsize:
        raise ValueError(f"{name} starts at address {seen.address:#x}, which is not aligned to {seen.dtype.itemsize} bytes")
    if writable and seen.read_only:
        raise ValueError(f"{name} is read-only; it is written in place and must be writable")
    strides = _dense_strides(seen.shape, seen.strides, name)
    return DeviceBuffer(x, seen.address, seen.shape, strides, seen.dtype, seen.device, seen.stream)


class Seen(NamedTuple):
    """What an array says of its memory; strides in elements, None for C order; stream: the one on which it is ready, None
    where it does not say so or where its library has a current stream."""

    address: int
    shape: tuple
    strides: tuple | None
    dtype: np.dtype
    device: int
    read_only: bool
    stream: int | None = None


def _seen_of_torch(x, name, halves, wanted):
    """The Seen of a torch tensor.  Its own methods answer in a tenth of the time that the protocols take."""
    dtype = str(x.dtype).removeprefix("torch.")
    kind = host.IN_HALF.get(dtype) if halves else None
    if dtype not in ("float32", "float64", "uint16", "int16", "int8", "uint8") and kind is None:
        raise TypeError(
            f"{name} has dtype {dtype}; fastrms updates float32 and float64 on CUDA: pass {name}.to(torch.{wanted}), a copy"
        )
    try:
        negated = x.is_neg()
        address, strides, storage = x.data_ptr(), x.stride(), x.untyped_storage()
        end = storage.data_ptr() + storage.nbytes()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise TypeError(f"{name} is {kind_of(x)} without memory that fastrms can use ({error})") from None
    if negated:
        raise ValueError(f"{name} is a lazily negated view; pass {name}.resolve_neg()")
    if address + x.numel() * x.element_size() > end:
        raise ValueError(f"{name} has lost its memory: its torch storage was resized")
    return Seen(address, tuple(x.shape), tuple(strides), kind or np.dtype(dtype), x.device.index, False)


def _is_cupy(x):
    return isinstance(x, getattr(sys.modules.get("cupy"), "ndarray", ()))


def _seen_of_cupy(x):
    strides = tuple(stride // x.dtype.itemsize for stride in x.strides)
    return Seen(x.data.ptr, x.shape, strides, x.dtype, x.device.id, False)


def _seen(x, name):
    if isinstance(x, DeviceArray):
        return Seen(x.address, x.shape, x.strides, x.dtype, x.device, False)
    interface = getattr(x, INTERFACE, {})
    view = _view(x, interface, name)
    try:
        dtype = np.dtype(view.dtype)
    except Exception as error:  # a format that NumPy does not know
        raise TypeError(
            f"{name} has a dtype that NumPy does not have; fastrms updates float32 and float64 ({error})"
        ) from None
    strides = None if view.strides is None else tuple(view.strides)
    return Seen(view.ptr, tuple(view.shape), strides, dtype, view.device_id, view.readonly, _stream(interface, name))


def _view(x, interface, name):
    from cuda.core.utils import StridedMemoryView

    if interface.get("mask") is not None:
        raise TypeError(f"{name} is a masked array; a mask would be ignored")
    if interface.get("version", 3) == 2:
        x = SimpleNamespace(__cuda_array_interface__={**interface, "version": 3})  # version 2 is version 3 without a stream
    try:
        return StridedMemoryView.from_any_interface(x, stream_ptr=-1)
    except Exception as error:  # somebody's code: whatever it raises, this array cannot be used
        raise TypeError(f"{name} is {kind_of(x)}, which fastrms cannot use in place ({error})") from None


def _dense_strides(shape, strides, name):
    """Strides in elements, 0 for axes of length 1; ValueError where the numbers have gaps."""
    if len(shape) == 1 and (strides is None or strides[0] == 1 or shape[0] < 2):
        return (1 if shape[0] > 1 else 0,)
    expected = 1
    if strides is None:
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride != expected and math.prod(shape):
            raise ValueError(f"{name} has shape {shape} and strides {tuple(strides)} (elements): it is not dense; pass a "
                             f"contiguous array")  # fmt: skip
        expected *= length if length > 1 else 1
    return tuple(stride if length > 1 else 0 for stride, length in zip(strides, shape, strict=True))


def _stream(interface, name):
    """The stream in a __cuda_array_interface__, or None."""
    stream = interface.get("stream")
    if stream == 0:
        raise ValueError(f"{name} names the stream 0, which __cuda_array_interface__ forbids as ambiguous")
    return stream


def same_layout(buffer, name, reference, reference_name, dtypes=None):
    """Refuse unless buffer has the device, shape and strides of reference, and its dtype or one of dtypes."""
    if buffer.device != reference.device:
        raise ValueError(f"{name} is on device {buffer.device}, {reference_name} is on device {reference.device}")
    host.same_layout(buffer, name, reference, reference_name, dtypes)


def same_device(buffers, names):
    """Refuse unless all are on one device."""
    for buffer, name in zip(buffers, names, strict=True):
        if buffer.device != buffers[0].device:
            raise ValueError(f"{name} is on device {buffer.device}, {names[0]} on device {buffers[0].device}: make one "
                             f"optimizer per device")  # fmt: skip


wrote = host.wrote  # torch counts the writes to its tensors on either side; CuPy and Numba count none


def ours(array):
    """The Buffer of an array that fastrms allocated itself: a DeviceArray is its own."""
    return array


on_host = host.on_host


def place_beside(param, others, size=None, dtype=None):
    """A new uninitialised flat DeviceArray like a Buffer, unless it is to have another size and dtype.  It begins as
    many elements behind a vector as the Buffer, so that a kernel can load vectors of both, unless it has another size; where
    else it lies makes no difference on a GPU."""
    dtype = dtype or param.dtype
    behind = 0 if size not in (None, param.size) else param.address // param.dtype.itemsize % 4  # of 16 bytes at most
    return allocate(param.size if size is None else size, dtype, param.device, behind * dtype.itemsize)


def again(buffer, name):
    """The Buffer of a torch tensor that may have been given other memory since."""
    if buffer.owner.data_ptr() == buffer.address:
        return buffer
    if buffer.dtype.kind in "iu" and not buffer.owner.is_floating_point():
        return acquire_integers(buffer.owner, name)
    return acquire(buffer.owner, name, writable=True, halves=True)


class Memory:
    """Device memory of ours.  It is freed when the device has done everything, as a kernel on any stream may be using it."""

    def __init__(self, nbytes, index):
        self._device = index
        with finished(index) as device:  # then any stream may use it
            self._held = device.allocate(max(1, nbytes), stream=device.default_stream)
        self.address = int(self._held.handle)

    def __del__(self):
        with contextlib.suppress(Exception):  # at the end of the process there may be no driver left
            wait(self._device)


def allocate(size, dtype, index, offset=0):
    """A new uninitialised DeviceArray on a device, whose address has this offset to a multiple of 256."""
    memory = Memory(offset + size * dtype.itemsize, index)
    return DeviceArray(memory, memory.address + offset, (size,), (1 if size > 1 else 0,), dtype, index)


class HostMemory:
    """An array of uint64 in memory of the host that kernels write, at the same address; it is zero at first."""

    def __init__(self, size, index):
        from cuda.core import LegacyPinnedMemoryResource

        self._device = index
        with entered(index):
            self._held = LegacyPinnedMemoryResource().allocate(8 * size)
        self.address = int(self._held.handle)
        self.array = np.frombuffer((ctypes.c_uint64 * size).from_address(self.address), np.uint64)
        self.array[:] = 0

    def __del__(self):
        with contextlib.suppress(Exception):  # at the end of the process there may be no driver left
            wait(self._device)


def count():
    """The number of devices that this process may use."""
    return call_driver("counting the devices", "cuDeviceGetCount")[0]


def current(index):
    """The cuda.core Device, made the current one of this thread."""
    from cuda.core import Device

    device = Device(index)
    device.set_current()
    return device


@contextlib.contextmanager
def entered(index):
    """A `with` block in which a device is the current one of this thread; afterwards it is that of the caller again."""
    (before,) = call_driver("asking for the current device", "cuCtxGetCurrent")
    try:
        yield current(index)
    finally:
        call_driver("returning to the device before", "cuCtxSetCurrent", before)


@contextlib.contextmanager
def finished(index):
    """A `with` block on a device, which waits at its end until the device has done everything."""
    with entered(index) as device:
        yield device
        call_driver("work done before", "cuCtxSynchronize")


def wait(index):
    """Wait until a device has done everything."""
    with finished(index):
        pass


def copy(to, source):
    """Copy between flat arrays, on the host or the device, after whatever the device is doing; finished on return."""
    if to.size:
        index = next(x.device for x in (to, source) if isinstance(x, DeviceBuffer))
        addresses = [x.address if isinstance(x, DeviceBuffer) else x.ctypes.data for x in (to, source)]
        wait(index)
        with finished(index):
            call_driver("copying", "cuMemcpy", *addresses, to.nbytes)


def call_driver(what, function, *arguments):
    """The results of a function of the CUDA driver, without its status; RuntimeError that calls it `what` where it fails."""
    from cuda.bindings import driver

    answer = getattr(driver, function)(*arguments)
    if answer[0]:
        raise RuntimeError(f"{what} failed on the GPU: {answer[0].name}")
    return answer[1:]


def library_stream(buffer):
    """A function that gives the handle of the stream on which the array's library works at the time (torch, CuPy); None for
    an array of another library."""
    if host.is_torch(buffer.owner):
        torch, index = sys.modules["torch"], buffer.device
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what torch's own compiler calls: 10 times as fast
        return lambda: (raw(index) if raw else torch.cuda.current_stream(index).cuda_stream) or LEGACY_STREAM
    if remedies.library(buffer.owner) == "cupy":
        cupy = sys.modules["cupy"]
        return lambda: cupy.cuda.get_current_stream().ptr or LEGACY_STREAM
    return None


def stream_source(buffer):
    """A function that gives the handle of the stream to launch on: that on which the array's library works at the time, else
    the one that the array names, else the default one."""
    handle = buffer.stream or LEGACY_STREAM
    return library_stream(buffer) or (lambda: handle)


def named_stream(buffer):
    """The stream on which an array says that it is ready, where its library has no current stream."""
    return None if buffer.stream is None or library_stream(buffer) else buffer.stream
