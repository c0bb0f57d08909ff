"""The types of what is there for people's own Numba CUDA kernels."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

rules: ModuleType
neutral_rules: ModuleType

def compile_ptx(kernel: Callable[..., None], signature: Any, cc: tuple[int, int]) -> str: ...
