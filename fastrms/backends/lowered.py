"""The rules in a form that CUDA cannot round differently: + - * / and sqrt as libdevice calls that round once (nothing
is left for the compiler to contract), select as the instruction of that name (nothing branches).

The text stays that of rules.py or of an own rule; its syntax tree is rewritten here.  Every operation takes numbers of
one type only, so a stray double is a compile error and not a slow kernel.
"""

import ast
import inspect
import textwrap

from llvmlite import ir
from numba import cuda
from numba.cuda import cgutils, types
from numba.cuda.extending import intrinsic

from .. import own, rules

OPERATIONS = {ast.Add: "add_rn", ast.Sub: "sub_rn", ast.Mult: "mul_rn", ast.Div: "div_rn"}


def _rounded_once(builder, real, operation, *operands):
    """A call of libdevice's __nv_fmul_rn, __nv_dsqrt_rn, ...: IEEE, round to nearest, never contracted."""
    name = f"__nv_{'f' if real is types.float32 else 'd'}{operation}_rn"
    kind = operands[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(operands)), name)
    return builder.call(function, operands)


def _same_reals(*reals):
    return reals[0] in (types.float32, types.float64) and all(real is reals[0] for real in reals)


def _binary(operation):
    @intrinsic
    def rounded(typing, x, y):
        if _same_reals(x, y):
            return x(x, y), lambda context, builder, signature, values: _rounded_once(builder, x, operation, *values)

    return rounded


add_rn, mul_rn, div_rn = map(_binary, ("add", "mul", "div"))


@intrinsic
def sub_rn(typing, x, y):
    """x + (-y), as libdevice has no subtraction of doubles."""

    def lower(context, builder, signature, values):
        minus = builder.fsub(ir.Constant(values[1].type, -0.0), values[1])
        return _rounded_once(builder, x, "add", values[0], minus)

    if _same_reals(x, y):
        return x(x, y), lower


@intrinsic
def sqrt_rn(typing, x):
    if _same_reals(x):
        return x(x), lambda context, builder, signature, values: _rounded_once(builder, x, "sqrt", *values)


@intrinsic
def select(typing, condition, x, y):
    if condition is types.boolean and _same_reals(x, y):
        return x(condition, x, y), lambda context, builder, signature, values: builder.select(*values)


PRIMITIVES = {"add_rn": add_rn, "sub_rn": sub_rn, "mul_rn": mul_rn, "div_rn": div_rn, "sqrt_rn": sqrt_rn, "select": select}


class Lowering(ast.NodeTransformer):
    """x * y -> mul_rn(x, y) and so on; `if GENERAL:` decided.  What has no exact counterpart is refused."""

    def __init__(self, general):
        self.general = general

    def visit_BinOp(self, node):
        name = OPERATIONS.get(type(node.op))
        if name is None:
            raise TypeError(f"`{ast.unparse(node)}`: only + - * / and sqrt have the same bits everywhere")
        return ast.Call(ast.Name(name, ast.Load()), [self.visit(node.left), self.visit(node.right)], [])

    def visit_Call(self, node):
        node = self.generic_visit(node)
        if ast.unparse(node.func).rpartition(".")[2] == "sqrt":  # of numpy or math
            node.func = ast.Name("sqrt_rn", ast.Load())
        return node

    def visit_If(self, node):
        if ast.unparse(node.test) != "GENERAL":
            raise TypeError(f"`if {ast.unparse(node.test)}`: a rule chooses by select(condition, x, y)")
        return [self.visit(line) for line in (node.body if self.general else node.orelse)]

    def visit_Constant(self, node):
        if not isinstance(node.value, str):
            raise TypeError(f"`{node.value!r}`: every number in a rule must be a coefficient")
        return node


def text(function, general):
    """The source of a function, lowered."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    tree.decorator_list = []
    tree.body = [line for line in tree.body if not _is_docstring(line)]
    return ast.unparse(ast.fix_missing_locations(Lowering(general).visit(tree)))


def _is_docstring(line):
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)



def device_function(source, names):
    """A lowered function compiled into whatever kernel calls it, without asking a driver."""
    exec(source, names)
    name = source[4 : source.index("(")]
    names[name] = cuda.jit(device=True, inline="always")(names[name])
    return names[name]


def rule_text(rule, general):
    """The lowered texts of what a rule may call and of the rule."""
    return [text(function, general) for function in (*rules.HELPERS, getattr(rule, "function", rule))]


def device_rule(rule, general):
    """A rule of rules.py as a device function of scalars; an own rule with its own global names."""
    *helpers, last = rule_text(rule, general)
    names = dict(PRIMITIVES)
    for helper in helpers:
        device_function(helper, names)
    if isinstance(rule, own.OwnRule):
        names = {**own.exchanged(rule, names), **PRIMITIVES}
    return device_function(last, names)
