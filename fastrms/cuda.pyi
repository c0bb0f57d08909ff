"""The types of what is there for people's own Numba CUDA kernels."""

from types import ModuleType

rules: ModuleType
neutral_rules: ModuleType
