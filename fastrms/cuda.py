"""For your own Numba CUDA kernels: the scalar rules as device functions, bit for bit those of the backend "cuda".

``fastrms.cuda.rules.adam(param, grad, exp_avg, exp_avg_sq, *coefficients)`` gives the new param and states; the arguments
are those of fastrms.rules, all float32 or all float64.  neutral_rules are the same with GENERAL False.  compile_ptx compiles
a kernel that calls them without a GPU.
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


def compile_ptx(kernel, signature, cc):
    """The PTX of a kernel of yours, whose entry has the name of the function.

    Parameters
    ----------
    kernel : function
        Plain Python, as numba.cuda.jit takes it.
    signature : numba.cuda.types signature
        Of a function that returns void.
    cc : tuple of int
        The compute capability, such as (9, 0).

    Returns
    -------
    str
    """
    return _compile.named_ptx(kernel, signature, kernel.__name__, cc)
