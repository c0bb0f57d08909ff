"""The types of the optimizers of torch."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from . import StepInfo

__all__ = ["Adagrad", "Adam", "AdamW", "RMSprop", "Rprop", "step_in_backward"]

_Params = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]
_Rate = float | torch.Tensor
_Dialect = Literal["torch", "keras", "tf1", "mindspore", "optax"]
_Nonfinite = Literal["propagate", "skip", "raise"]
_StateFormat = Literal["bf16", "fp16", "q8"]
_Master = Literal["float32", "split16", "split8"]
_Rounding = Literal["nearest", "stochastic"]
_Convert = Literal["float32", "bf16", "fp16", "q8"]

class Optimizer(torch.optim.Optimizer):
    clip_norm: float | None
    step_info: StepInfo
    dialect: str | None
    nonfinite: str
    @property
    def seed(self) -> int: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...  # type: ignore[override]
    def load_state_dict(self, state_dict: dict[str, Any], convert: _Convert | None = None) -> None: ...
    def make_state(self) -> None: ...
    def share_memory(self) -> None: ...

class RMSprop(Optimizer):
    def __init__(
        self,
        params: _Params,
        lr: _Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        decoupled: bool = False,
        eps_root: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        dialect: _Dialect | None = None,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding | None = None,
        seed: int = 0,
    ) -> None: ...

class Adagrad(Optimizer):
    def __init__(
        self,
        params: _Params,
        lr: _Rate = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled: bool = False,
        eps_root: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        dialect: _Dialect | None = None,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding | None = None,
        seed: int = 0,
    ) -> None: ...

class Adam(Optimizer):
    def __init__(
        self,
        params: _Params,
        lr: _Rate = 1e-3,
        betas: tuple[_Rate, _Rate] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_root: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        dialect: _Dialect | None = None,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding | None = None,
        seed: int = 0,
    ) -> None: ...

class AdamW(Adam):
    def __init__(
        self,
        params: _Params,
        lr: _Rate = 1e-3,
        betas: tuple[_Rate, _Rate] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_root: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        dialect: _Dialect | None = None,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding | None = None,
        seed: int = 0,
    ) -> None: ...

class Rprop(Optimizer):
    def __init__(
        self,
        params: _Params,
        lr: _Rate = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        dialect: _Dialect | None = None,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding | None = None,
        seed: int = 0,
    ) -> None: ...

class _InBackward:
    def remove(self) -> None: ...
    def finish(self) -> None: ...

def step_in_backward(optimizer: Optimizer) -> _InBackward: ...
