"""The text of a loop over a rule, its helpers written out: Numba compiles one function in a third of the time of six."""

import ast
import inspect

from .. import rules

HELPERS = {function.__name__: function for function in (rules.select, *rules.HELPERS)}


def loop_body(rule, general):
    """The lines that update element i of the buffers: the rule as it stands in rules.py, GENERAL settled."""
    buffers = ("param", "grad", *rules.state_names(rule))
    writer = Writer(general)
    arguments = [load(name) for name in buffers] + list(rules.coefficient_names(rule))
    results = writer.call(rule, [ast.parse(text, mode="eval").body for text in arguments])
    return [*writer.lines, *stores(rule, map(ast.unparse, results.elts))]


def load(name):
    return f"load_{name}({name}, i)"


def stores(rule, results):
    """Lines that write what a rule returns."""
    return [f"store_{name}({name}, i, {x})" for name, x in zip(("param", *rules.state_names(rule)), results, strict=True)]


class Writer(ast.NodeTransformer):
    """Writes calls as assignments; a name gets the number of its call, so that no two functions share one."""

    def __init__(self, general):
        self.general, self.lines, self.number, self.calls = general, [], 0, 0

    def call(self, function, arguments):
        """Lines for function(*arguments); the expression of what it returns."""
        self.calls += 1
        outer, self.number = self.number, self.calls
        definition = ast.parse(inspect.getsource(function)).body[0]
        for parameter, argument in zip(definition.args.args, arguments, strict=True):
            self.lines.append(f"{parameter.arg}_{self.number} = {ast.unparse(argument)}")
        result = self.block(definition.body)
        self.number = outer
        return result

    def block(self, statements):
        for statement in statements:
            if isinstance(statement, ast.Expr):  # a docstring
                continue
            if isinstance(statement, ast.If):  # `if GENERAL:`, the only one there is
                if self.general:
                    self.block(statement.body)
            elif isinstance(statement, ast.Return):
                return self.visit(statement.value)
            else:
                value = ast.unparse(self.visit(statement.value))
                self.lines.append(f"{ast.unparse(self.visit(statement.targets[0]))} = {value}")

    def visit_Name(self, node):
        return ast.Name(f"{node.id}_{self.number}", node.ctx)

    def visit_Call(self, node):
        arguments = [self.visit(argument) for argument in node.args]
        if node.func.id in HELPERS:
            return self.call(HELPERS[node.func.id], arguments)
        return ast.Call(node.func, arguments, [])
