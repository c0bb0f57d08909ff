"""Optimizers of torch, torch.optim.Optimizer subclasses with its constructors, whose step is one fused pass in C.

They import torch, which nothing else in fastrms does.  docs/torch.md has a whole page about them.
"""

try:
    import torch  # noqa: F401
except ImportError:
    raise ImportError("fastrms.torch needs torch: pip install fastrms[torch]") from None

from .backward import step_in_backward
from .base import Optimizer, arguments

__all__ = ["Adagrad", "Adam", "AdamW", "RMSprop", "Rprop", "step_in_backward"]


class RMSprop(Optimizer):
    """torch.optim.RMSprop."""

    kind = "RMSProp"

    @arguments
    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, capturable=False,
                 foreach=None, maximize=False, differentiable=False, *, decoupled=False, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None):  # fmt: skip
        pass


class Adagrad(Optimizer):
    """torch.optim.Adagrad."""

    kind = "AdaGrad"

    @arguments
    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, foreach=None, *,
                 maximize=False, differentiable=False, fused=None, decoupled=False, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None):  # fmt: skip
        pass


class Adam(Optimizer):
    """torch.optim.Adam."""

    kind = "Adam"

    @arguments
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
                 maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
                 eps_root=0.0, clip_value=None, clip_norm=None, nonfinite="propagate", zero_grad=False,
                 dialect=None):  # fmt: skip
        pass


class AdamW(Adam):
    """torch.optim.AdamW."""

    kind = "AdamW"

    @arguments
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
                 foreach=None, capturable=False, differentiable=False, fused=None, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None):  # fmt: skip
        pass


class Rprop(Optimizer):
    """torch.optim.Rprop."""

    kind = "RProp"

    @arguments
    def __init__(self, params, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50), *, capturable=False, foreach=None,
                 maximize=False, differentiable=False, clip_value=None, clip_norm=None, nonfinite="propagate",
                 zero_grad=False, dialect=None):  # fmt: skip
        pass
