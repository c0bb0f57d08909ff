"""The operations of a rule in a form that CUDA cannot round differently: + - * / and sqrt as libdevice calls that round
once (nothing is left for the compiler to contract), comparisons and select as instructions (nothing branches).

In a kernel a rule takes one real type only, so a stray double is a compile error and not a slow kernel; its arguments are
numbers or whole vectors of lanes (tuples).
"""

import numpy as np
from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

REALS = {np.dtype(np.float32): types.float32, np.dtype(np.float64): types.float64}


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


EMIT = {  # the keys are those of trace.EXPRESSIONS
    "add": lambda b, r, x, y: _rounded(b, r, "add", x, y),
    "sub": lambda b, r, x, y: _rounded(b, r, "add", x, _minus(b, r, y)),  # libdevice cannot subtract doubles
    "mul": lambda b, r, x, y: _rounded(b, r, "mul", x, y),
    "truediv": lambda b, r, x, y: _rounded(b, r, "div", x, y),
    "lt": lambda b, r, x, y: b.fcmp_ordered("<", x, y),
    "le": lambda b, r, x, y: b.fcmp_ordered("<=", x, y),
    "gt": lambda b, r, x, y: b.fcmp_ordered(">", x, y),
    "ge": lambda b, r, x, y: b.fcmp_ordered(">=", x, y),
    "eq": lambda b, r, x, y: b.fcmp_ordered("==", x, y),
    "ne": lambda b, r, x, y: b.fcmp_unordered("!=", x, y),  # as with NaN
    "neg": _minus,
    "abs": _absolute,
    "sqrt": lambda b, r, x: _rounded(b, r, "sqrt", x),
    "select": lambda b, r, condition, x, y: b.select(condition, x, y),
}


def lower(made):
    """A Trace as a device function of numbers or lanes: an intrinsic, so it needs no driver and is always inlined."""

    def emit(builder, real, numbers):
        known = dict(zip(made.arguments, numbers, strict=True))
        for result, operation, operands in made.operations:
            known[result] = EMIT[operation](builder, real, *(known[operand] for operand in operands))
        return [known[result] for result in made.results]

    names = {"typed": lambda *kinds: _typed(kinds, len(made.results), emit)}
    passed = ", ".join(f"argument_{k}" for k in range(len(made.arguments)))  # Numba counts the arguments of an intrinsic
    exec(f"def rule(typing, {passed}): return typed({passed})", names)
    names["rule"].__name__ = made.name
    return intrinsic(names["rule"])


def _typed(kinds, results, emit):
    """(signature, code) of a rule for arguments of these types: all of one real type, numbers or lanes."""
    real, tuples = _element(kinds[0]), [kind for kind in kinds if isinstance(kind, types.UniTuple)]
    if real not in REALS.values() or any(_element(kind) is not real for kind in kinds):
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


def _element(kind):
    return kind.dtype if isinstance(kind, types.UniTuple) else kind
