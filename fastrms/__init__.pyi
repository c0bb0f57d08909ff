"""The types of the public interface: explicit keywords and defaults, which the source cannot have.

There a preset of `dialect` must know which arguments were given.  tests/test_types.py holds the two equal.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, overload

from numpy.typing import DTypeLike, NDArray
from typing_extensions import Buffer, Self, TypeVar

from . import cuda as cuda
from . import mpi as mpi
from . import numba as numba
from . import rules as rules
from . import schedules as schedules

__version__: str
__all__ = [
    "AdaGrad",
    "Adam",
    "AdamW",
    "FlatBuffer",
    "Optimizer",
    "RMSProp",
    "RProp",
    "Shards",
    "StepInfo",
    "Stored",
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

_Flat = TypeVar("_Flat", default=NDArray[Any])  # no argument says it: a torch.Tensor may be on the host

class _ArrayInterface(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...

class _CudaArrayInterface(Protocol):
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

class _DLPack(Protocol):
    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...

_Array: TypeAlias = _ArrayInterface | _CudaArrayInterface | _DLPack | Buffer | Stored
_Params: TypeAlias = _Array | FlatBuffer[Any] | Mapping[Any, _Array] | Iterable[_Array] | Iterable[Mapping[str, Any]]
_Grads: TypeAlias = _Array | Mapping[Any, _Array | None] | Iterable[Any]
_Rate: TypeAlias = float | Callable[[int], float]
_Shape: TypeAlias = int | Sequence[int]
_BiasCorrection: TypeAlias = bool | Literal["corrected", "folded"]
_Dialect: TypeAlias = Literal["torch", "keras", "tf1", "mindspore", "optax"]
_Backend: TypeAlias = Literal["auto", "c", "numba", "numpy", "cuda"]
_Nonfinite: TypeAlias = Literal["propagate", "skip", "raise"]
_StateFormat: TypeAlias = Literal["bf16", "fp16", "q8"]
_Master: TypeAlias = Literal["float32", "split16", "split8"]
_Rounding: TypeAlias = Literal["nearest", "stochastic"]
_Convert: TypeAlias = Literal["float32", "bf16", "fp16", "q8"]
_Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

class StepInfo(NamedTuple):
    applied: bool
    grad_norm: float | None
    nonfinite: int | None

class Shards:
    gather: Callable[[bytes], Sequence[bytes]]
    table: list[tuple[int, int, int]]
    def __init__(self, gather: Callable[[bytes], Sequence[bytes]], table: Iterable[tuple[int, int, int]]) -> None: ...

class Stored:
    array: Any
    format: str
    def __init__(self, array: Any, format: Literal["bf16", "fp16"]) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]: ...

class _Streaming:
    updated: list[Any]
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def step(self, name: Any, grad: _Array) -> None: ...

class _Views(Mapping[Any, _Flat]):
    def __getitem__(self, name: Any) -> _Flat: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def __setitem__(self, name: Any, value: _Flat) -> None: ...

class FlatBuffer(Generic[_Flat]):
    data: _Flat
    grad: _Flat
    params: _Views[_Flat]
    grads: _Views[_Flat]
    def __init__(
        self,
        shapes: Mapping[Any, _Shape] | Sequence[_Shape],
        dtype: DTypeLike = ...,
        *,
        data: _Array | None = None,
        grad: _Array | None = None,
    ) -> None: ...
    @classmethod
    def like(
        cls, params: Mapping[Any, _Array] | Sequence[_Array], *, data: _Array | None = None, grad: _Array | None = None
    ) -> Self: ...

class Optimizer:
    defaults: ClassVar[dict[str, Any]]
    state_names: ClassVar[tuple[str, ...]]
    def __new__(cls, params: Any = None, *positional: NoReturn, **options: Any) -> Self: ...
    def __init__(
        self,
        params: _Params,
        *,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
        **options: Any,
    ) -> None: ...
    def step(self, grads: _Grads | None = None, *, grad_scale: float = 1.0, clip_norm: float | None = None) -> StepInfo: ...
    def bind(self, grads: _Grads) -> None: ...
    def zero_grad(self, set_to_none: bool = False) -> None: ...
    def streaming(self, grad_scale: float = 1.0) -> _Streaming: ...
    def advance(self) -> None: ...
    @property
    def lr(self) -> _Rate | list[_Rate]: ...
    @lr.setter
    def lr(self, value: _Rate | list[_Rate]) -> None: ...
    @property
    def steps(self) -> int: ...
    @property
    def tensor_steps(self) -> list[int]: ...
    @property
    def groups(self) -> tuple[MutableMapping[str, Any], ...]: ...
    @property
    def state(self) -> Mapping[str, Any]: ...
    @property
    def nbytes(self) -> Mapping[str, int]: ...
    @property
    def formats(self) -> dict[str, dict[str, Any]]: ...
    @property
    def backend(self) -> str: ...
    @property
    def dialect(self) -> str | None: ...
    @property
    def nonfinite(self) -> str: ...
    @property
    def c_step(self) -> tuple[int, int]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, d: Mapping[str, Any], convert: _Convert | None = None) -> None: ...
    def save(self, path: _Path) -> None: ...
    def load(self, path: _Path, convert: _Convert | None = None) -> None: ...
    def to_torch_state_dict(self) -> dict[str, Any]: ...
    def load_torch_state_dict(self, d: Mapping[str, Any], convert: _Convert | None = None) -> None: ...
    def report(self) -> str: ...
    @staticmethod
    def initial(h: Any, state_name: str) -> float: ...

class RMSProp(Optimizer):
    def __init__(
        self,
        params: _Params,
        *,
        lr: _Rate = 0.01,
        rho: float = 0.99,
        eps: float = 1e-08,
        eps_root: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        centered: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
        clip_value: float | None = None,
        initial_value: float = 0.0,
        lr_in_momentum: bool = False,
        bias_correction: _BiasCorrection = False,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
    ) -> None: ...

class AdaGrad(Optimizer):
    def __init__(
        self,
        params: _Params,
        *,
        lr: _Rate = 0.01,
        eps: float = 1e-10,
        eps_root: float = 0.0,
        lr_decay: float = 0.0,
        initial_value: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
        clip_value: float | None = None,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
    ) -> None: ...

class Adam(Optimizer):
    def __init__(
        self,
        params: _Params,
        *,
        lr: _Rate = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-08,
        eps_root: float = 0.0,
        amsgrad: bool | Literal["corrected"] = False,
        nesterov: Literal[False, "dozat", "folded"] = False,
        bias_correction: _BiasCorrection = "corrected",
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
        clip_value: float | None = None,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
    ) -> None: ...

class AdamW(Adam):
    def __init__(
        self,
        params: _Params,
        *,
        lr: _Rate = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-08,
        eps_root: float = 0.0,
        amsgrad: bool | Literal["corrected"] = False,
        nesterov: Literal[False, "dozat", "folded"] = False,
        bias_correction: _BiasCorrection = "corrected",
        weight_decay: float = 0.01,
        decoupled: bool = True,
        maximize: bool = False,
        clip_value: float | None = None,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
    ) -> None: ...

class RProp(Optimizer):
    def __init__(
        self,
        params: _Params,
        *,
        lr: float = 0.01,
        eta_minus: float = 0.5,
        eta_plus: float = 1.2,
        step_min: float = 1e-06,
        step_max: float = 50.0,
        zero_on_flip: bool = True,
        maximize: bool = False,
        clip_value: float | None = None,
        state: Mapping[str, Any] | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        dialect: _Dialect | None = None,
        nonfinite: _Nonfinite = "propagate",
        zero_grad: bool = False,
        state_format: _StateFormat | None = None,
        master: _Master | None = None,
        rounding: _Rounding = "stochastic",
        param_copy: Any = None,
        seed: int = 0,
        shards: Shards | None = None,
        backend: _Backend = "auto",
        stream: Any = None,
        capturable: bool = False,
        check: bool = False,
    ) -> None: ...

def rmsprop(
    param: _Array,
    grad: _Array,
    square_avg: _Array,
    *,
    grad_avg: _Array | None = None,
    momentum_buffer: _Array | None = None,
    step: int | None = None,
    grad_scale: float = 1.0,
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
    dialect: _Dialect | None = None,
    backend: _Backend = "auto",
    param_copy: _Array | None = None,
    rounding: _Rounding = "stochastic",
    seed: int = 0,
) -> None: ...
def adagrad(
    param: _Array,
    grad: _Array,
    sum: _Array,
    *,
    step: int | None = None,
    grad_scale: float = 1.0,
    lr: float = 0.01,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    dialect: _Dialect | None = None,
    backend: _Backend = "auto",
    param_copy: _Array | None = None,
    rounding: _Rounding = "stochastic",
    seed: int = 0,
) -> None: ...
def adam(
    param: _Array,
    grad: _Array,
    exp_avg: _Array,
    exp_avg_sq: _Array,
    *,
    step: int,
    max_exp_avg_sq: _Array | None = None,
    grad_scale: float = 1.0,
    lr: float = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    amsgrad: bool | Literal["corrected"] = False,
    nesterov: Literal[False, "dozat", "folded"] = False,
    bias_correction: _BiasCorrection = "corrected",
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    dialect: _Dialect | None = None,
    backend: _Backend = "auto",
    param_copy: _Array | None = None,
    rounding: _Rounding = "stochastic",
    seed: int = 0,
) -> None: ...
def rprop(
    param: _Array,
    grad: _Array,
    prev: _Array,
    step_size: _Array,
    *,
    step: int | None = None,
    grad_scale: float = 1.0,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    step_min: float = 1e-06,
    step_max: float = 50.0,
    zero_on_flip: bool = True,
    maximize: bool = False,
    clip_value: float | None = None,
    dialect: _Dialect | None = None,
    backend: _Backend = "auto",
    param_copy: _Array | None = None,
    rounding: _Rounding = "stochastic",
    seed: int = 0,
) -> None: ...
@overload
def init_state(
    optimizer: Literal["rmsprop"],
    param: _Array,
    *,
    dialect: _Dialect | None = None,
    state_format: _StateFormat | None = None,
    lr: _Rate = 0.01,
    rho: float = 0.99,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    centered: bool = False,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
    initial_value: float = 0.0,
    lr_in_momentum: bool = False,
    bias_correction: _BiasCorrection = False,
) -> dict[str, Any]: ...
@overload
def init_state(
    optimizer: Literal["adagrad"],
    param: _Array,
    *,
    dialect: _Dialect | None = None,
    state_format: _StateFormat | None = None,
    lr: _Rate = 0.01,
    eps: float = 1e-10,
    eps_root: float = 0.0,
    lr_decay: float = 0.0,
    initial_value: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
) -> dict[str, Any]: ...
@overload
def init_state(
    optimizer: Literal["adam"],
    param: _Array,
    *,
    dialect: _Dialect | None = None,
    state_format: _StateFormat | None = None,
    lr: _Rate = 0.001,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    amsgrad: bool | Literal["corrected"] = False,
    nesterov: Literal[False, "dozat", "folded"] = False,
    bias_correction: _BiasCorrection = "corrected",
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    clip_value: float | None = None,
) -> dict[str, Any]: ...
@overload
def init_state(
    optimizer: Literal["rprop"],
    param: _Array,
    *,
    dialect: _Dialect | None = None,
    state_format: _StateFormat | None = None,
    lr: float = 0.01,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    step_min: float = 1e-06,
    step_max: float = 50.0,
    zero_on_flip: bool = True,
    maximize: bool = False,
    clip_value: float | None = None,
) -> dict[str, Any]: ...
def available_backends() -> tuple[str, ...]: ...
def get_include() -> str: ...
def get_num_threads() -> int: ...
def isa() -> str | None: ...
def set_num_threads(n: int) -> None: ...
def show_config() -> None: ...
