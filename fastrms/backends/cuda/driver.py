"""The streams and the calls of the CUDA driver that a step makes.  A stream is named by its handle, memory by address."""

from functools import lru_cache

import numpy as np

from ...memory.device import LEGACY_STREAM, call_driver


def stream_handle(stream):
    """The handle of a stream of cuda.core, CuPy, torch, Numba, or an integer."""
    if stream is not None and hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1]) or LEGACY_STREAM
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            stream = getattr(stream, name)
            stream = getattr(stream, "value", stream)
    if not isinstance(stream, int) or isinstance(stream, bool):
        raise TypeError(f"stream={stream!r} is not a CUDA stream: pass one of CuPy, torch, cuda.core, or its handle")
    return stream or LEGACY_STREAM


@lru_cache(maxsize=64)
def stream_of(handle):
    """The stream of cuda.core that has this handle."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def wait(handle, other):
    """Let a stream wait for what another one does now; the host does not wait."""
    stream_of(handle).wait(stream_of(other))


def write(address, array, handle):
    """Copy a NumPy array to the device on a stream.  It must stay as it is until then: the driver may read it only when the
    stream comes to it."""
    where = address, array.ctypes.data, array.nbytes, handle
    call_driver("writing tables or coefficients", "cuMemcpyHtoDAsync", *where)


def read(array, handle):
    """A NumPy array of what stands in a flat array on the device; the host waits for this stream and for no other."""
    made = np.empty(array.size, array.dtype)
    call_driver("reading counts", "cuMemcpyDtoHAsync", made.ctypes.data, array.address, array.nbytes, handle)
    call_driver("work done before", "cuStreamSynchronize", handle)
    return made


def capturing(handle):
    """Whether a CUDA graph is being captured on the stream: what is launched then is recorded and not run."""
    return bool(call_driver("asking whether it captures", "cuStreamIsCapturing", handle)[0])
