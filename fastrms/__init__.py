"""fastrms: fused in-place RMSProp, AdaGrad, Adam and RProp updates on flat parameter buffers."""

from . import rules
from .backends import available_backends
from .config import get_include, isa, show_config
from .functional import adagrad, adam, init_state, rmsprop, rprop
from .memory.flat import FlatBuffer
from .optimizer import Optimizer, StepInfo
from .optimizers import AdaGrad, Adam, AdamW, RMSProp, RProp
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    "AdaGrad",
    "Adam",
    "AdamW",
    "FlatBuffer",
    "Optimizer",
    "RMSProp",
    "RProp",
    "StepInfo",
    "adagrad",
    "adam",
    "available_backends",
    "get_include",
    "get_num_threads",
    "init_state",
    "isa",
    "rmsprop",
    "rprop",
    "rules",
    "set_num_threads",
    "show_config",
]


def __getattr__(name):
    """fastrms.numba and fastrms.cuda, which import Numba, and fastrms.schedules come when they are asked for."""
    if name not in ("numba", "cuda", "schedules"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module(f"{__name__}.{name}")
