"""The backends by name.  Each module has available() -> None or the reason why not, and Plan, which holds the
bound buffers of one optimizer and makes a step over all of them."""

import importlib.util
import os
from typing import NamedTuple

from ..memory import device, host

OK, BUSY, OVERLAP, NOT_HELD, NONFINITE, STREAMING = 0, 1, 2, 5, 6, 7  # what a Plan answers, as in csrc/fastrms_decl.h
ON_NONFINITE = ("propagate", "skip", "raise")  # in the order of csrc/fastrms_decl.h
HOST = ("c", "numba", "numpy")  # in the order of preference
NAMES = (*HOST, "cuda")
FOR_OWN_RULES = ("numba", "numpy", "cuda")


class Found(NamedTuple):
    """What a step found in the gradients before it wrote anything; None for what was not looked for.
    tensor: the first with a nonfinite element, -1 where there is none."""

    grad_norm: float | None
    nonfinite: int | None
    tensor: int


def load(name):
    """The module of a backend.  Tools that freeze a program look for such import statements, and find each backend."""
    if name == "c":
        from . import c as module
    elif name == "numba":
        from . import numba as module
    elif name == "numpy":
        from . import numpy as module
    else:
        from . import cuda as module
    return module


def find_spec(name):
    """importlib.util.find_spec, which raises where a stand-in without __spec__ took the place of a package.  Such a package
    is as good as absent."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:
        return None


def available_backends():
    """Names of the backends that work here, the one that "auto" takes first."""
    return tuple(name for name in NAMES if load(name).available() is None)


def choose(name, own_rule=None, array=None):
    """The backend module for name: "auto" takes "cuda" where an array is in device memory, else FASTRMS_BACKEND, else the
    first for the host that works here and runs an own rule."""
    source = f"backend={name!r}"
    if name == "auto" and array is not None and device.is_device_array(array):
        name, source = "cuda", "the arrays are in device memory, and backend='cuda'"
    elif name == "auto":
        name = os.environ.get("FASTRMS_BACKEND") or next(
            name for name in HOST if load(name).available() is None and (own_rule is None or name in FOR_OWN_RULES)
        )
        source = f"FASTRMS_BACKEND={name!r}"
    if name not in NAMES:
        raise ValueError(f"{source} is not one of 'auto', {', '.join(map(repr, NAMES))}")
    if own_rule is not None and name not in FOR_OWN_RULES:
        raise ValueError(f"{source} cannot run the rule of {own_rule}, which is Python: use 'numba', 'numpy' or 'cuda'")
    module = load(name)
    reason = module.available()
    if reason:
        raise RuntimeError(f"{source} is not available: {reason}")
    return module


def name_of(module):
    """The name of a backend module, as load() takes it."""
    return module.__name__.rpartition(".")[2]


def memory(module):
    """The module for the arrays of a backend: arrays (host memory) or device."""
    return getattr(module, "memory", host)
