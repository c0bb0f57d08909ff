"""The types of the functions for people's own Numba code; tests/test_types.py holds them equal to the source."""

from types import ModuleType
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]
_BiasCorrection: TypeAlias = bool | Literal["corrected", "folded"]

rules: ModuleType
neutral_rules: ModuleType

def rmsprop(
    param: _Array,
    grad: _Array,
    square_avg: _Array,
    lr: float = 0.01,
    rho: float = 0.99,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    lr_in_momentum: bool = False,
    bias_correction: _BiasCorrection = False,
    step: int = 1,
    grad_scale: float = 1.0,
    grad_avg: _Array | None = None,
    momentum_buffer: _Array | None = None,
) -> None: ...

rmsprop_parallel = rmsprop

def adagrad(
    param: _Array,
    grad: _Array,
    sum: _Array,
    lr: float = 0.01,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    step: int = 1,
    grad_scale: float = 1.0,
) -> None: ...

adagrad_parallel = adagrad

def adam(
    param: _Array,
    grad: _Array,
    exp_avg: _Array,
    exp_avg_sq: _Array,
    step: int,
    lr: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    nesterov: Literal[False, "dozat", "folded"] = False,
    bias_correction: _BiasCorrection = "corrected",
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    grad_scale: float = 1.0,
    max_exp_avg_sq: _Array | None = None,
    amsgrad: bool | Literal["corrected"] | None = None,
) -> None: ...

adam_parallel = adam

def rprop(
    param: _Array,
    grad: _Array,
    prev: _Array,
    step_size: _Array,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    step_min: float = 1e-06,
    step_max: float = 50.0,
    zero_on_flip: bool = True,
    maximize: bool = False,
    clip_value: float | None = None,
    grad_scale: float = 1.0,
) -> None: ...

rprop_parallel = rprop
