"""For your own Numba CUDA kernels: the scalar rules as device functions, bit for bit those of the backend "cuda".

fastrms.cuda.rules.adam(param, grad, exp_avg, exp_avg_sq, *coefficients) -> the new param and states; the arguments are
those of fastrms.rules, all float32 or all float64.  neutral_rules are the same with GENERAL False.
"""

from types import ModuleType

from . import rules as texts
from .backends.cuda.toolchain import compiler

_compile = compiler()  # refuses Numba's own CUDA target


def _module(name, general):
    module = ModuleType(f"{__name__}.{name}", f"The scalar rules as device functions; GENERAL is {general}.")
    vars(module).update({rule: _compile.lower(_compile.operations_of(rule, general)) for rule in texts.RULES})
    return module


rules, neutral_rules = _module("rules", True), _module("neutral_rules", False)
