"""The rules in a form that CUDA cannot round differently: + - * / and sqrt as libdevice calls that round once (nothing
is left for the compiler to contract), comparisons and select as instructions (nothing branches).

A rule of rules.py or of a user is called once with Traced numbers, which write down each operation.  In a kernel a rule
takes one real type only, so a stray double is a compile error and not a slow kernel; its arguments are numbers or whole
vectors of lanes (tuples).
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from .. import own_rules, rules

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
        self.lines.append((result, operation, [operand.name for operand in operands]))
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


def traced(rule, general):
    """(operations, results) of a rule: (result, operation, operands) each, by name."""
    lines = []
    numbers = {name: Traced(name, lines) for name in rules.arguments(rule)}
    try:
        results = _traceable(rule, general)(**numbers)
    except TypeError as error:
        raise TypeError(f"the rule of {rule} cannot run on CUDA: {error}") from None
    count = 1 + len(rules.state_names(rule))
    if not isinstance(results, tuple) or [type(result) for result in results] != [Traced] * count:
        raise TypeError(f"the rule of {rule} must return the new param and states")
    return lines, [result.name for result in results]


def text(rule, general):
    """The operations of a rule as Python, for people and for the key of the cache."""
    lines, returned = traced(rule, general)
    body = "".join(f"    {result} = {operation}({', '.join(operands)})\n" for result, operation, operands in lines)
    return f"def rule({', '.join(rules.arguments(rule))}):\n{body}    return {', '.join(returned)}\n"


def _traceable(rule, general):
    if not isinstance(rule, own_rules.OwnRule):
        return rules.compile_rule(rule, general, select=_select, sqrt=np.sqrt)
    function = own_rules.function_of(rule, _select)
    return lambda grad, grad_scale, grad_rescale, **rest: function(grad=grad * grad_scale * grad_rescale, **rest)


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


def _typed(kinds, results, emit):
    """(signature, code) of a rule for arguments of these types: all of one real type, numbers or lanes."""
    real, tuples = _element(kinds[0]), [kind for kind in kinds if isinstance(kind, types.UniTuple)]
    if real not in REALS or any(_element(kind) is not real for kind in kinds):
        return None
    one = types.UniTuple(real, tuples[0].count) if tuples else real

    def code(context, builder, signature, values):
        def lane(k):
            pairs = zip(values, kinds, strict=True)
            return [builder.extract_value(v, k) if isinstance(kind, types.UniTuple) else v for v, kind in pairs]

        if not tuples:
            return context.make_tuple(builder, signature.return_type, emit(builder, real, lane(0)))
        columns = zip(*(emit(builder, real, lane(k)) for k in range(one.count)), strict=True)  # lane after lane, as nvcc
        made = [context.make_tuple(builder, one, column) for column in columns]
        return context.make_tuple(builder, signature.return_type, made)

    return types.UniTuple(one, results)(*kinds), code


@cache
def device_rule(rule, general):
    """A rule as a device function of numbers or lanes: an intrinsic, so it needs no driver and is always inlined."""
    operations, returned = traced(rule, general)
    arguments = rules.arguments(rule)

    def emit(builder, real, numbers):
        known = dict(zip(arguments, numbers, strict=True))
        for result, operation, operands in operations:
            known[result] = EMIT[operation](builder, real, *(known[name] for name in operands))
        return [known[name] for name in returned]

    names = {"typed": lambda *kinds: _typed(kinds, len(returned), emit)}
    passed = ", ".join(f"argument_{k}" for k in range(len(arguments)))
    exec(f"def {rule_name(rule)}(typing, {passed}): return typed({passed})", names)
    return intrinsic(names[rule_name(rule)])


def rule_name(rule):
    return rule.name if isinstance(rule, own_rules.OwnRule) else rule.__name__
