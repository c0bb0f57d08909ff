"""What must be installed for CUDA, and a sentence for each thing that is missing."""

import ctypes
import warnings
from functools import cache
from importlib import metadata

import numpy as np

from .. import find_spec

NO_PACKAGE = "numba-cuda is not installed: pip install 'numba-cuda[cu13]' 'numpy<2.5' (cu12 for CUDA 12)"

UNFIT = "numba-cuda {} cannot be used with NumPy {} ({}): pip install 'numpy<2.5'"


@cache
def available():
    """None, or the reason why not: no package, no driver, no device."""
    if not find_spec("numba_cuda"):
        return NO_PACKAGE
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver: libcuda.so.1 was not found"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return None if status == 0 and count.value else f"the NVIDIA driver finds no CUDA device (cuInit answered {status})"


def compiler():
    """The module compile; ModuleNotFoundError without numba-cuda, RuntimeError unless it stands in for Numba's own CUDA
    target."""
    if not find_spec("numba_cuda"):
        raise ModuleNotFoundError(NO_PACKAGE, name="numba_cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba-cuda uses what NumPy deprecates
        from numba import cuda

        if getattr(cuda, "implementation", None) != "NVIDIA":
            raise RuntimeError(f"numba.cuda is Numba's own deprecated target, which is not supported; {NO_PACKAGE}")
        try:
            from numba.cuda import cudaimpl  # noqa: F401  otherwise the first kernel imports it

            from . import compile
        except AttributeError as error:  # numba-cuda uses what this NumPy has no more
            raise RuntimeError(UNFIT.format(metadata.version("numba-cuda"), np.__version__, error)) from error
    return compile
