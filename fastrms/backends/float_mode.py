"""The floating-point mode of a thread: how it rounds, and whether it keeps subnormal numbers."""

import contextlib
import ctypes
import platform

libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
DEFAULT = ctypes.c_void_p(-1)  # FE_DFL_MODE


@contextlib.contextmanager
def default_mode():
    """A block, or as a decorator a function, in which this thread computes in the default mode, whatever its caller has set,
    as it does in kernels."""
    if libc is None:
        yield
        return
    mode = ctypes.create_string_buffer(64)
    libc.fegetmode(mode)
    libc.fesetmode(DEFAULT)
    try:
        yield
    finally:
        libc.fesetmode(mode)
