"""fastrms: fused in-place RMSProp, AdaGrad, Adam and RProp updates on flat parameter buffers."""

from . import backends, functional, graph_breaks, optimizers, rules
from .backends import available_backends
from .config import get_include, isa, show_config
from .family import Family
from .functional import *  # noqa: F403
from .groups import Group
from .memory.flat import FlatBuffer
from .memory.host import Stored
from .names import Names
from .optimizer import Optimizer, StepInfo
from .optimizers import *  # noqa: F403
from .shards import Shards
from .streaming import Streaming
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    *optimizers.__all__,
    *functional.__all__,
    "FlatBuffer",
    "Optimizer",
    "Shards",
    "StepInfo",
    "Stored",
    "available_backends",
    "get_include",
    "get_num_threads",
    "isa",
    "rules",
    "set_num_threads",
    "show_config",
]

# now, and not in the first step: a child that is forked while another thread imports one of them would wait for ever
_HOST = [*map(backends.load, backends.HOST)]

_INSTEAD = {  # what other frameworks have: what to write here
    "RMSprop": "fastrms.RMSProp",
    "NAdam": 'fastrms.Adam(..., nesterov="dozat" or "folded")',
    "Nadam": 'fastrms.Adam(..., nesterov="dozat" or "folded")',
    "AMSGrad": "fastrms.Adam(..., amsgrad=True)",
    "Adamax": "a rule of your own: docs/own-rules.md has it",
    "AdaMax": "a rule of your own: docs/own-rules.md has it",
    "Lion": "a rule of your own: docs/own-rules.md has it",
    "optim": "fastrms itself: fastrms.RMSProp",
    **{name.capitalize(): f"fastrms.{name}" for name in optimizers.__all__},  # Adagrad, Rprop
}


def __getattr__(name):
    """The submodules numba, cuda, mpi, torch and schedules are imported when they are asked for."""
    try:
        if name == "cuda":
            import fastrms.cuda as module
        elif name == "numba":
            import fastrms.numba as module
        elif name == "torch":
            import fastrms.torch as module
        elif name == "mpi":
            import fastrms.mpi as module
        elif name == "schedules":
            import fastrms.schedules as module
        else:
            instead = f"; write {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise AttributeError(f"module 'fastrms' has no attribute {name!r}{instead}")
    except (ImportError, RuntimeError) as error:
        raise AttributeError(f"fastrms.{name} is not there: {error}") from error
    return module


def __dir__():
    return sorted([*__all__, "schedules", "__version__", *{"numba", "cuda", "mpi", "torch"} & globals().keys()])


graph_breaks.at(
    Group, Optimizer, Names, Family, Streaming, *(globals()[name] for name in __all__ if callable(globals()[name]))
)
