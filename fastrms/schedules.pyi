"""The types of the schedules; tests/test_types.py holds them equal to the source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from . import Optimizer, _Params

@dataclass(frozen=True)
class Step:
    lr: float
    every: int
    factor: float = 0.1
    def __call__(self, step: int) -> float: ...

@dataclass(frozen=True)
class Exponential:
    lr: float
    factor: float
    every: int = 1
    staircase: bool = False
    def __call__(self, step: int) -> float: ...

@dataclass(frozen=True)
class Cosine:
    lr: float
    steps: int
    end: float = 0.0
    warmup: int = 0
    start: float = 0.0
    def __call__(self, step: int) -> float: ...

class Plateau:
    lr: float
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    mode: str
    cooldown: int
    min_lr: float
    min_change: float
    counting: str
    rate: float
    best: float | None
    bad: int
    cooling: int
    def __init__(
        self,
        lr: float,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 0.0001,
        threshold_mode: Literal["rel", "abs"] = "rel",
        mode: Literal["min", "max"] = "min",
        cooldown: int = 0,
        min_lr: float = 0.0,
        min_change: float = 1e-08,
        counting: Literal["torch", "keras"] = "torch",
    ) -> None: ...
    @classmethod
    def keras(cls, lr: float, factor: float = 0.1, patience: int = 10, **options: Any) -> Self: ...
    def __call__(self, step: int) -> float: ...
    def count(self, rate: float, best: float | None, bad: int, cooling: int) -> None: ...
    def update(self, metric: float) -> bool: ...

class EarlyStopping:
    patience: int
    threshold: float
    threshold_mode: str
    mode: str
    best: float | None
    bad: int
    def __init__(
        self,
        params: _Params,
        patience: int = 10,
        threshold: float = 0.0,
        threshold_mode: Literal["rel", "abs"] = "abs",
        mode: Literal["min", "max"] = "min",
        optimizer: Optimizer | None = None,
    ) -> None: ...
    def update(self, metric: float) -> bool: ...
    def restore(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, d: Mapping[str, Any]) -> None: ...
