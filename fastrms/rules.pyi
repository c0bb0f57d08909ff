"""The types of the scalar rules and of what is there for rules of one's own: scalars or arrays of one dtype."""

from collections.abc import Callable
from typing import Any, TypeAlias

_Rule: TypeAlias = Callable[..., tuple[Any, ...]]

GENERAL: bool
RULES: dict[str, _Rule]

rmsprop: _Rule
rmsprop_momentum: _Rule
rmsprop_centered: _Rule
rmsprop_centered_momentum: _Rule
adagrad: _Rule
adam: _Rule
adam_amsgrad: _Rule
rprop: _Rule

def coefficient_names(rule: _Rule) -> list[str]: ...
def state_names(rule: _Rule) -> list[str]: ...
def select(condition: Any, x: Any, y: Any) -> Any: ...
def larger(x: Any, y: Any) -> Any: ...
def clip(x: Any, low: Any, high: Any) -> Any: ...
def flush(x: Any, tiny: Any, zero: Any) -> Any: ...
def sign(x: Any, zero: Any, one: Any) -> Any: ...
def prepare(
    grad: Any, param: Any, grad_scale: Any, grad_rescale: Any, clip_low: Any, clip_high: Any, weight_decay: Any
) -> Any: ...
def variance(v: Any, a: Any, v_scale: Any, floor: Any) -> Any: ...
