"""Optimizers of torch: torch.optim.Optimizer subclasses with the constructors of torch.optim, whose step is one pass in C
over all parameters.  They import torch, which nothing else in fastrms does.
"""

try:
    import torch  # noqa: F401
except ImportError:
    raise ImportError("fastrms.torch needs torch: pip install torch (what the extra fastrms[torch] names)") from None

from . import graph_breaks, torch_core
from .torch_backward import step_in_backward
from .torch_base import Optimizer, arguments

__all__ = ["Adagrad", "Adam", "AdamW", "RMSprop", "Rprop", "step_in_backward"]


class RMSprop(Optimizer):
    """torch.optim.RMSprop with a fused step; the formula is that of fastrms.RMSProp, with rho under the name alpha.

    Parameters
    ----------
    params : iterable of torch.Tensor, of (name, tensor) pairs or of dicts
        Parameters or groups of them, as in torch: float32 or float64, dense in any memory order, in host memory or on a GPU.
        Of a DTensor each rank updates its part.  In host memory they may also be bfloat16 or float16, where ``master`` or
        ``rounding`` says how they are updated; gradients of float32, bfloat16 and float16 parameters may be any of these.
    lr : float or one-element tensor, default 0.01
        Step size.  A scheduler may change it, and so may anything in param_groups: the next step has it.
    alpha : float in [0, 1), default 0.99
        Share of the mean of squares that is kept at each step.
    eps : float >= 0, default 1e-8
        Added to the root.
    weight_decay : float >= 0, default 0
        Times the parameter, it is added to the gradient.
    momentum : float in [0, 1), default 0
        Above 0, the share of momentum_buffer that is kept.
    centered : bool, default False
        Whether the mean of the gradients is subtracted below the root.
    maximize : bool, default False
        Whether to go up the gradient.
    foreach, fused : bool or None
        How torch loops over parameters; here all of them are updated in one call whatever it is.
    capturable, differentiable : bool, default False
        True is refused.
    decoupled : bool, default False
        Whether weight_decay acts beside the update, times lr, instead of through the gradient.
    eps_root : float >= 0, default 0
        Added below the root.
    clip_value : float > 0 or None, default None
        Bound of each element of the gradient.
    clip_norm : float > 0 or None, default None
        The norm of all gradients on a device is reduced to it where it is larger (inf: only measured, in step_info).  It is
        an attribute, too, and may be changed.  With DTensors, which are cut along their first dimension or not at all, it
        is the norm of the whole gradients, and all ranks step together.
    nonfinite : {"propagate", "skip", "raise"}, default "propagate"
        What a step does where a gradient is NaN or infinite: "skip" leaves it out, as step_info says, "raise" raises
        FloatingPointError; with DTensors on all ranks.  It is an attribute, too, and may be changed.
    zero_grad : bool, default False
        Whether a step writes zeros over the gradients.
    dialect : {"torch", "keras", "tf1", "mindspore", "optax"} or None, default None
        Whose defaults and semantics hold; arguments that are given win.
    state_format : {"bf16", "fp16", "q8"} or None, default None
        How the states of parameters that are updated in float32 are stored; None is float32.  Errors, and what is refused,
        are those of fastrms.RMSProp.  A group may have its own, as with the next two.  "q8" is for contiguous parameters
        that are no DTensors.
    master : {"float32", "split16", "split8"} or None, default None
        What bfloat16 and float16 parameters are updated in.  "float32" keeps a float32 of each element; "split16" and
        "split8" keep, for bfloat16, 16 or 8 bits more of each, which together with it are a float32 exactly, or to 2**-16 of
        it.  The parameter is the master, rounded to nearest.  None keeps nothing, and rounds each new parameter.
    rounding : {"stochastic", "nearest"} or None, default None
        How states in formats are rounded, and parameters without master or with "split8"; None is "stochastic", and does not
        say how parameters in bfloat16 or float16 are updated.  ``state_format="bf16", rounding="nearest"`` is what
        torch.optim's fused optimizers do with parameters in bfloat16.
    seed : int, default 0
        From 0 to 2**64 - 1.  The bits of stochastic rounding depend on it, on the number of the update, and on the position
        of the element among all elements of all groups, and on nothing else: neither on threads nor on ranks.

    Attributes
    ----------
    state : dict of parameter to dict
        step, square_avg, grad_avg (centered) and momentum_buffer (momentum > 0) as in torch, from the first step with a
        gradient on.  Tensors may be written, and exchanged for others.  With a state_format they are of bfloat16 or float16,
        or, for "q8", flat ones of uint8; the master is master (float32) or remainder (int16, int8).
    step_info : StepInfo
        What the last step did: see fastrms.Optimizer.step.  Before the first step, ``applied`` is False.

    Raises
    ------
    TypeError, ValueError
        With the name of the argument, or of the parameter that cannot be updated.

    Notes
    -----
    Parameters and gradients are read where they lie at the time; the gradients are left as they are.  One that has another
    memory order than its parameter is copied for the step.
    """

    kind = "RMSProp"

    @arguments
    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, capturable=False,
                 foreach=None, maximize=False, differentiable=False, *, decoupled=False, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None, state_format=None,
                 master=None, rounding=None, seed=0):  # fmt: skip
        pass


class Adagrad(Optimizer):
    """torch.optim.Adagrad with a fused step; the formula is that of fastrms.AdaGrad.

    Parameters
    ----------
    lr : float or one-element tensor, default 0.01
        Step size.
    lr_decay : float >= 0, default 0
        How fast the step size falls with the number of updates.
    initial_accumulator_value : float >= 0, default 0
        What the sum of squares starts with.
    eps : float >= 0, default 1e-10
        Added to the root.
    params, weight_decay, foreach, fused, maximize, differentiable, decoupled, eps_root, clip_value, clip_norm, nonfinite, \
zero_grad, dialect, state_format, master, rounding, seed : see RMSprop
        As there.

    Raises
    ------
    TypeError, ValueError
        As RMSprop does.
    """

    kind = "AdaGrad"

    @arguments
    def __init__(self, params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, foreach=None, *,
                 maximize=False, differentiable=False, fused=None, decoupled=False, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None, state_format=None,
                 master=None, rounding=None, seed=0):  # fmt: skip
        pass


class Adam(Optimizer):
    """torch.optim.Adam with a fused step; the formula is that of fastrms.Adam, with beta1 and beta2 as betas.

    Parameters
    ----------
    lr : float or one-element tensor, default 1e-3
        Step size.
    betas : pair of float in [0, 1), default (0.9, 0.999)
        Shares of exp_avg and of exp_avg_sq that are kept at each step.
    eps : float >= 0, default 1e-8
        Added to the root.
    weight_decay : float >= 0, default 0
        Times the parameter, it is added to the gradient, or acts beside the update with decoupled_weight_decay.
    amsgrad : bool, default False
        Whether to divide by the root of the largest exp_avg_sq so far.
    decoupled_weight_decay : bool, default False
        Whether this is AdamW.
    params, foreach, fused, maximize, capturable, differentiable, eps_root, clip_value, clip_norm, nonfinite, zero_grad, \
dialect, state_format, master, rounding, seed : see RMSprop
        As there.

    Raises
    ------
    TypeError, ValueError
        As RMSprop does.
    """

    kind = "Adam"

    @arguments
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, *, foreach=None,
                 maximize=False, capturable=False, differentiable=False, fused=None, decoupled_weight_decay=False,
                 eps_root=0.0, clip_value=None, clip_norm=None, nonfinite="propagate", zero_grad=False,
                 dialect=None, state_format=None, master=None, rounding=None, seed=0):  # fmt: skip
        pass


class AdamW(Adam):
    """torch.optim.AdamW with a fused step: Adam whose weight decay acts beside the update.

    Parameters
    ----------
    weight_decay : float >= 0, default 0.01
        Share of the parameter, times lr, that is taken from it at each step.
    params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused, eps_root, clip_value, clip_norm, \
nonfinite, zero_grad, dialect, state_format, master, rounding, seed : see Adam
        As there.

    Raises
    ------
    TypeError, ValueError
        As RMSprop does.
    """

    kind = "AdamW"

    @arguments
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, *, maximize=False,
                 foreach=None, capturable=False, differentiable=False, fused=None, eps_root=0.0, clip_value=None,
                 clip_norm=None, nonfinite="propagate", zero_grad=False, dialect=None, state_format=None,
                 master=None, rounding=None, seed=0):  # fmt: skip
        pass

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # as in torch's AdamW, of what Adam has saved, too


class Rprop(Optimizer):
    """torch.optim.Rprop with a fused step; the formula is that of fastrms.RProp.

    Parameters
    ----------
    lr : float or one-element tensor, default 0.01
        The first step_size of every weight.
    etas : pair of float, default (0.5, 1.2)
        Factors by which step_size shrinks and grows: 0 < etas[0] < 1 < etas[1].
    step_sizes : pair of float, default (1e-6, 50)
        Bounds of step_size.
    params, capturable, foreach, maximize, differentiable, clip_value, clip_norm, nonfinite, zero_grad, dialect, \
state_format, master, rounding, seed : see RMSprop
        As there.

    Raises
    ------
    TypeError, ValueError
        As RMSprop does.
    """

    kind = "RProp"

    @arguments
    def __init__(self, params, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50), *, capturable=False, foreach=None,
                 maximize=False, differentiable=False, clip_value=None, clip_norm=None, nonfinite="propagate",
                 zero_grad=False, dialect=None, state_format=None, master=None, rounding=None, seed=0):  # fmt: skip
        pass


def __getattr__(name):
    """Names are spelt here as torch.optim has them."""
    instead = next((f"; write fastrms.torch.{x}" for x in __all__[:-1] if x.lower() == name.lower()), "")
    raise AttributeError(f"module 'fastrms.torch' has no attribute {name!r}{instead}")


graph_breaks.at(Optimizer, torch_core.Core, step_in_backward, *(globals()[name] for name in __all__[:-1]))
