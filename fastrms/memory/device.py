"""From a CuPy, torch, Numba or other CUDA array to the Buffer that says where its numbers lie; and our own state arrays.

This is the counterpart of host.py, with the same names.  acquire() refuses with a sentence, and neither copies nor
synchronises.  CUDA is imported at the first array.
"""

import math
import sys
from types import SimpleNamespace

import numpy as np

from . import host, remedies

LEGACY_STREAM = 1  # the handle of the default stream
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

    def fill(self, value):
        copy(self, np.full(self.size, value, self.dtype))

    def to_host(self):
        """A NumPy array with the numbers in memory order."""
        host = np.empty(self.size, self.dtype)
        copy(host, self)
        return host

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


def is_device_array(x):
    """Whether x lies in device memory, without importing anything."""
    if isinstance(x, (np.ndarray, *host._NOT_ARRAYS)):
        return False
    if host.is_torch(x):
        return x.is_cuda
    return hasattr(x, "__cuda_array_interface__") or host._dlpack_device(x, "this") in _ON_DEVICE


def acquire(x, name, *, writable):
    """The DeviceBuffer of x; TypeError or ValueError that calls x `name`."""
    if remedies.is_jax(x):
        raise TypeError(f"{name} is a JAX array: JAX arrays are immutable and JAX does not say on which stream they are "
                        f"made; use optax there, or pass a CuPy or torch array")  # fmt: skip
    host.refuse_non_array(x, name)
    if not is_device_array(x):
        raise TypeError(f"{name} ({type(x).__name__}) is in host memory; backend='cuda' updates device memory: pass "
                        f"cupy.asarray({name}) or a torch tensor on 'cuda', or use backend='c'")  # fmt: skip
    view = _view(x.detach() if host.is_torch(x) else x, name)
    if view.dtype not in host.DTYPES:
        raise TypeError(f"{name} has dtype {view.dtype}; fastrms updates float32 and float64")
    if view.ptr % view.dtype.itemsize:
        raise ValueError(f"{name} starts at address {view.ptr:#x}, which is not aligned to {view.dtype.itemsize} bytes")
    if writable and view.readonly:
        raise ValueError(f"{name} is read-only; it is written in place and must be writable")
    strides = _dense_strides(view, name)
    return DeviceBuffer(x, view.ptr, tuple(view.shape), strides, np.dtype(view.dtype), view.device_id, _stream_of(x, name))


def _view(x, name):
    from cuda.core.utils import StridedMemoryView

    interface = getattr(x, "__cuda_array_interface__", {})
    if interface.get("mask") is not None:
        raise TypeError(f"{name} is a masked array; a mask would be ignored")
    if interface.get("version", 3) == 2:
        x = SimpleNamespace(__cuda_array_interface__={**interface, "version": 3})  # version 2 is version 3 without a stream
    try:
        return StridedMemoryView.from_any_interface(x, stream_ptr=-1)
    except Exception as error:  # somebody's code: whatever it raises, this array cannot be used
        raise TypeError(f"{name} is a {type(x).__name__}, which fastrms cannot use in place ({error})") from None


def _dense_strides(view, name):
    """Strides in elements, 0 for axes of length 1; ValueError where the numbers have gaps."""
    strides, expected = view.strides, 1
    if strides is None:
        strides = [math.prod(view.shape[k + 1 :]) for k in range(len(view.shape))]
    for stride, length in sorted(zip(strides, view.shape, strict=True)):
        if length > 1 and stride != expected and math.prod(view.shape):
            raise ValueError(f"{name} has shape {tuple(view.shape)} and strides {tuple(strides)} (elements): it is not "
                             f"dense; pass a contiguous array")  # fmt: skip
        expected *= length if length > 1 else 1
    return tuple(stride if length > 1 else 0 for stride, length in zip(strides, view.shape, strict=True))


def _stream_of(x, name):
    """The stream that x names in its __cuda_array_interface__ and on which it is ready, or None."""
    stream = getattr(x, "__cuda_array_interface__", {}).get("stream") if not host.is_torch(x) else None
    if stream == 0:
        raise ValueError(f"{name} names the stream 0, which __cuda_array_interface__ forbids as ambiguous")
    return stream


def same_layout(buffer, name, reference, reference_name):
    """Refuse unless buffer has the device, dtype, shape and strides of reference."""
    if buffer.device != reference.device:
        raise ValueError(f"{name} is on device {buffer.device}, {reference_name} is on device {reference.device}")
    host.same_layout(buffer, name, reference, reference_name)


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


def on_host(array):
    """A flat array of ours as a NumPy array in host memory: a copy of its numbers."""
    return array.to_host()


def place_beside(param, others):
    """A new uninitialised flat DeviceArray like a Buffer; where it lies beside the others makes no difference on a GPU."""
    return allocate(param.size, param.dtype, param.device)


def again(buffer, name):
    """The Buffer of a torch tensor that may have been given other memory since."""
    return buffer if buffer.owner.data_ptr() == buffer.address else acquire(buffer.owner, name, writable=True)


def allocate(size, dtype, index):
    """A new uninitialised DeviceArray on a device."""
    device = current(index)
    memory = device.allocate(max(1, size * dtype.itemsize), stream=device.default_stream)
    wait(index)  # then any stream may use it
    return DeviceArray(memory, int(memory.handle), (size,), (1 if size > 1 else 0,), dtype, index)


def count():
    """The number of devices."""
    from cuda.core import Device

    return len(Device.get_all_devices())


def current(index):
    """The cuda.core Device, made the current one of this thread."""
    from cuda.core import Device

    device = Device(index)
    device.set_current()
    return device


def copy(to, source):
    """Copy between flat arrays, on the host or the device, after whatever the device is doing; finished on return."""
    if to.size:
        wait(next(x.device for x in (to, source) if isinstance(x, DeviceBuffer)))
        addresses = [x.address if isinstance(x, DeviceBuffer) else x.ctypes.data for x in (to, source)]
        call_driver("copying", "cuMemcpy", *addresses, to.nbytes)
        call_driver("copying", "cuCtxSynchronize")


def wait(index):
    """Wait until a device has done everything."""
    current(index)
    call_driver("work done before", "cuCtxSynchronize")


def call_driver(what, function, *arguments):
    """The results of a function of the CUDA driver, without its status; RuntimeError that calls it `what` where it fails."""
    from cuda.bindings import driver

    answer = getattr(driver, function)(*arguments)
    if answer[0]:
        raise RuntimeError(f"{what} failed on the GPU: {answer[0].name}")
    return answer[1:]


def stream_source(buffer):
    """A function that gives the handle of the stream to launch on: that on which the array's library works at the time
    (torch, CuPy), else the one that the array names, else the default one."""
    if host.is_torch(buffer.owner):
        torch = sys.modules["torch"]
        return lambda: torch.cuda.current_stream(buffer.device).cuda_stream or LEGACY_STREAM
    if remedies.library(buffer.owner) == "cupy":
        cupy = sys.modules["cupy"]
        return lambda: cupy.cuda.get_current_stream().ptr or LEGACY_STREAM
    handle = buffer.stream or LEGACY_STREAM
    return lambda: handle


def named_stream(buffer):
    """The stream on which an array says that it is ready, where its library has no current stream."""
    return None if host.is_torch(buffer.owner) or remedies.library(buffer.owner) == "cupy" else buffer.stream
