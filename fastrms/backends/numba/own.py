"""The Numba kernels of own rules: the loops of kernels.py around the user's function, which Numba compiles for numbers.

They are compiled in each process and not kept on disk.
"""

import inspect
from types import FunctionType, ModuleType

import numba
from numba import types
from numba.core import ir
from numba.core.registry import cpu_target
from numba.extending import overload, register_jitable

from ... import own_rules, rules
from .kernels import compiler, filled, module_text


@overload(rules.select)
def select(condition, x, y):
    """select for Numba, in all that it compiles."""
    return lambda condition, x, y: x if condition else y


for helper in rules.HELPERS:
    register_jitable(helper)


@own_rules.remembered
def kernel(rule, dtype, parallel):
    """The kernel of an own rule, as kernels.kernel; an error where Numba refuses the rule, or where check() does."""
    function, plain = own_rules.function_of(rule, unless_known, compiler), own_rules.plain(rule)
    check(rule, function, dtype)
    arguments = ["param", "grad * grad_scale * grad_rescale", *plain.states, *plain.coefficients]
    results = [f"new_{name}" for name in ("param", *plain.states)]
    text = module_text(plain, dtype, parallel, [f"{', '.join(results)}, = rule({', '.join(arguments)})"], results)
    module = filled(ModuleType(f"fastrms_{rule}"), text, CACHE=False, rule=function)
    made = module.kernel
    vars(module).clear()  # Numba never frees a function whose globals hold it, nor what the user's rule closes over
    return made


def unless_known(x):
    """A Python function that Numba cannot call as it is; None for anything else."""
    context = cpu_target.typing_context
    context.refresh()
    try:
        return None if not isinstance(x, FunctionType) or context.resolve_value_type(x) else x
    except ValueError:
        return x


def check(rule, function, dtype):
    """Compile an own rule for numbers of a dtype.  TypeError unless Numba accepts it and it returns numbers of this dtype;
    ValueError where it is not elementwise."""
    real = numba.from_dtype(dtype)
    try:
        function.compile((real,) * (2 + len(rule.states) + len(rule.coefficients)))
    except Exception as error:  # besides errors of its own, Numba raises NotImplementedError and the like
        reason = next((line for line in str(error).splitlines() if line.strip() and "pipeline" not in line), "")
        raise TypeError(f"Numba cannot compile the rule of {rule} for {dtype}: {reason.strip()}") from error
    returned = function.nopython_signatures[0].return_type
    results = own_rules.checked(rule, tuple(returned) if isinstance(returned, types.BaseTuple) else returned)
    wrong = next((part for part in results if part != real), None)
    if wrong is not None:
        raise TypeError(f"the rule of {rule} computes {wrong} from {dtype}; every number in it must be a coefficient")
    if any(takes_for_array(called, signature) for called, signature in calls(function)):
        raise own_rules.not_elementwise(rule)


def calls(dispatcher):
    """(type of the function, signature) of each call in a compiled function and in the jitted functions that it calls."""
    for result in dispatcher.overloads.values():
        typed = result.type_annotation
        for call, signature in getattr(typed, "calltypes", {}).items():  # Numba has none for what comes from its cache
            if isinstance(call, ir.Expr) and call.op == "call":
                called = typed.typemap[call.func.name]
                yield called, signature
                yield from calls(called.dispatcher) if isinstance(called, types.Dispatcher) else ()


def takes_for_array(called, signature):
    """Whether a call takes a number for an array, as np.mean(grad) does, which is grad to Numba.  It calls a function that
    has an axis, or a method of an array without dimensions."""
    if isinstance(called, types.BoundFunction):
        return getattr(called.this, "ndim", None) == 0
    first = next(iter(signature.args), None)
    if not isinstance(first, (types.Float, types.Boolean)) and getattr(first, "ndim", None) != 0:
        return False
    try:
        return "axis" in inspect.signature(called.typing_key).parameters
    except (AttributeError, TypeError, ValueError):  # it is no Python function
        return False
