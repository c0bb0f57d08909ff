"""The rules in a form that CUDA cannot round differently: + - * / and sqrt as libdevice calls that round once (nothing
is left for the compiler to contract), comparisons and select as instructions (nothing branches).

A rule of rules.py or of a user is called once with Traced numbers, which write down each operation.  In a kernel every
operation takes one type only, so a stray double is a compile error and not a slow kernel; its operands are numbers or
whole vectors of lanes (tuples).
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from .. import own, rules

REALS = (types.float32, types.float64)


class Traced:
    """A number of a rule that is being written down: every operation on it adds a line."""

    def __init__(self, name, lines):
        self.name, self.lines = name, lines

    def apply(self, operation, *operands):
        for operand in operands:
            if not isinstance(operand, Traced):
                raise TypeError(f"it holds {operand!r}; every number in it must be a coefficient")
        result = f"t{len(self.lines)}"
        self.lines.append(f"{result} = {operation}({', '.join(operand.name for operand in operands)})")
        return Traced(result, self.lines)

    def sqrt(self):
        """np.sqrt of an object comes here."""
        return self.apply("sqrt_rn", self)

    def __bool__(self):
        raise TypeError("it branches; choose by select(condition, x, y)")

    def __pow__(self, power):
        raise TypeError("it holds **; only + - * / and sqrt have the same bits everywhere")


def _forward(operation):
    return lambda self, *others: self.apply(operation, self, *others)


def _backward(operation):
    return lambda self, other: self.apply(operation, other, self)


for _name in ("add", "sub", "mul", "truediv"):
    _operation = _name.replace("truediv", "div") + "_rn"
    setattr(Traced, f"__{_name}__", _forward(_operation))
    setattr(Traced, f"__r{_name}__", _backward(_operation))
for _name in ("lt", "le", "gt", "ge", "neg", "abs"):
    setattr(Traced, f"__{_name}__", _forward(_name))


def text(rule, general, name="rule"):
    """A rule as the source of a function of straight-line operations.  An own rule gets its gradient scaled."""
    lines = []
    traced = {name: Traced(name, lines) for name in rules.arguments(rule)}
    results = _traceable(rule, general)(**traced)
    if not isinstance(results, tuple) or len(results) != 1 + len(rules.state_names(rule)):
        raise TypeError("it must return the new param and states")
    returned = ", ".join(result.name for result in results)
    return f"def {name}({', '.join(traced)}):\n" + "".join(f"    {line}\n" for line in lines) + f"    return {returned},\n"


def _traceable(rule, general):
    if not isinstance(rule, own.OwnRule):
        return rules.compile_rule(rule, general, select=_select, sqrt=np.sqrt)
    function = own.function_of(rule, _select)
    return lambda grad, grad_scale, **rest: function(grad=grad * grad_scale, **rest)


def _select(condition, x, y):
    return next(v for v in (condition, x, y) if isinstance(v, Traced)).apply("select", condition, x, y)


def _rounded(builder, real, operation, *operands):
    """A call of libdevice's __nv_fmul_rn, __nv_dsqrt_rn, ...: IEEE, round to nearest, never contracted."""
    name = f"__nv_{'f' if real is types.float32 else 'd'}{operation}_rn"
    kind = operands[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(operands)), name)
    return builder.call(function, operands)


def _minus(builder, real, x):
    return builder.fsub(ir.Constant(x.type, -0.0), x)  # fneg is younger than NVVM's LLVM


def _absolute(builder, real, x):
    name = "__nv_fabsf" if real is types.float32 else "__nv_fabs"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type]), name), [x])


EMIT = {
    **{f"{name}_rn": (lambda b, r, *v, name=name: _rounded(b, r, name, *v)) for name in ("add", "mul", "div", "sqrt")},
    "sub_rn": lambda b, r, x, y: _rounded(b, r, "add", x, _minus(b, r, y)),  # libdevice cannot subtract doubles
    **{name: (lambda b, r, x, y, sign=sign: b.fcmp_ordered(sign, x, y))
       for name, sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="))},
    "neg": _minus,
    "abs": _absolute,
    "select": lambda b, r, condition, x, y: b.select(condition, x, y),
}  # fmt: skip


def _element(kind):
    return kind.dtype if isinstance(kind, types.UniTuple) else kind


def _lanewise(operation, *kinds):
    """(signature, code) of an operation on numbers or lanes; None, a typing error, where their types differ."""
    real, conditions = _element(kinds[-1]), kinds[:1] if operation == "select" else ()
    if real not in REALS or any(_element(kind) is not real for kind in kinds[len(conditions) :]):
        return None
    if any(_element(kind) is not types.boolean for kind in conditions):
        return None
    element = types.boolean if operation in ("lt", "le", "gt", "ge") else real
    tuples = [kind for kind in kinds if isinstance(kind, types.UniTuple)]
    result = types.UniTuple(element, tuples[0].count) if tuples else element

    def code(context, builder, signature, values):
        def lane(k):
            pairs = zip(values, kinds, strict=True)
            picked = [builder.extract_value(v, k) if isinstance(kind, types.UniTuple) else v for v, kind in pairs]
            return EMIT[operation](builder, real, *picked)

        if result is element:
            return lane(0)
        return context.make_tuple(builder, result, [lane(k) for k in range(result.count)])

    return result(*kinds), code


def _unary(name):
    return intrinsic(lambda typing, x: _lanewise(name, x))


def _binary(name):
    return intrinsic(lambda typing, x, y: _lanewise(name, x, y))


def _ternary(name):
    return intrinsic(lambda typing, x, y, z: _lanewise(name, x, y, z))


OPERATIONS = {
    **{name: _unary(name) for name in ("sqrt_rn", "neg", "abs")},
    **{name: _binary(name) for name in ("add_rn", "sub_rn", "mul_rn", "div_rn", "lt", "le", "gt", "ge")},
    "select": _ternary("select"),
}


@cache
def device_rule(rule, general):
    """A rule as a device function of numbers or lanes, compiled into whatever kernel calls it without asking a driver."""
    names = dict(OPERATIONS)
    exec(text(rule, general), names)
    return cuda.jit(device=True, inline="always")(names["rule"])
