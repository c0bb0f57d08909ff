"""The types of fastrms.mpi; see __init__.pyi."""

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

from . import Optimizer, StepInfo, _Grads, _Params, _Path, _Rate

__all__ = ["Cost", "ShardedOptimizer", "cost"]

class Cost(NamedTuple):
    sent: int
    memory: int
    seconds: float

def cost(
    elements: int,
    ranks: int,
    *,
    itemsize: int = 4,
    states: int = 2,
    bucket: int = 4194304,
    latency: float = 2e-6,
    bandwidth: float = 1e10,
    rate: float = 1e9,
) -> Cost: ...

class ShardedOptimizer:
    sent: int
    def __init__(
        self,
        comm: Any,
        params: _Params,
        optimizer: type[Optimizer],
        *,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        bucket: int = 4194304,
        timeout: float = 600.0,
        **options: Any,
    ) -> None: ...
    def step(self, grads: _Grads, grad_scale: float = 1.0, clip_norm: float | None = None) -> StepInfo: ...
    @property
    def lr(self) -> _Rate | list[_Rate]: ...
    @lr.setter
    def lr(self, value: _Rate | list[_Rate]) -> None: ...
    @property
    def groups(self) -> tuple[MutableMapping[str, Any], ...]: ...
    @property
    def steps(self) -> int: ...
    def state_dict(self) -> dict[str, Any] | None: ...
    def load_state_dict(self, d: Mapping[str, Any]) -> None: ...
    def save(self, path: _Path) -> None: ...
    def load(self, path: _Path) -> None: ...
