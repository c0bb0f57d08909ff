"""A rule as a list of its single operations, which Numba and CUDA compile in place of the rule's own text.

The rule is called once with numbers that record what is done to them.  The record keeps the order of the operations, so it
gives the same bits.  It has no branches, no literals, and no calls but sqrt and abs.  It changes whenever the rule or a
function that the rule calls changes, and is part of the key by which kernels are found on disk.
"""

from typing import NamedTuple

import numpy as np

from .. import own_rules, rules

EXPRESSIONS = {  # the operations that a rule may hold, as Python
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "truediv": "{} / {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "neg": "-{}",
    "abs": "abs({})",
    "sqrt": "sqrt({})",
    "select": "{1} if {0} else {2}",
}


class Operation(NamedTuple):
    """One operation: the name of its result, a key of EXPRESSIONS, and the names of its operands."""

    result: str
    name: str
    operands: list


class Trace(NamedTuple):
    """A recorded rule: its name, the names of its arguments, its operations, the names of the new param and states."""

    name: str
    arguments: tuple
    operations: list
    results: list


class Traced:
    """A number that stands for an argument or a result of a rule, and records every operation on it."""

    def __init__(self, name, operations):
        self.name, self.operations = name, operations

    def apply(self, operation, *operands):
        for operand in operands:
            if not isinstance(operand, Traced):
                raise TypeError(f"it holds {operand!r}; every number in it must be a coefficient")
        result = f"t{len(self.operations)}"
        self.operations.append(Operation(result, operation, [operand.name for operand in operands]))
        return Traced(result, self.operations)

    def sqrt(self):
        """NumPy calls this for np.sqrt of an object."""
        return self.apply("sqrt", self)

    def __array_function__(self, function, types, args, kwargs):
        """NumPy calls this for np.where, and for np.sum and the like, which would take an element for a whole array."""
        if function is np.where and len(args) == 3 and not kwargs:
            return self.apply("select", *args)
        raise TypeError(f"it calls np.{function.__name__}; only + - * /, sqrt and select have the same bits everywhere")

    def __bool__(self):
        raise TypeError("it branches; choose by select(condition, x, y)")

    def __pow__(self, power):
        raise TypeError("it holds **; only + - * / and sqrt have the same bits everywhere")


def _forward(operation):
    return lambda self, *others: self.apply(operation, self, *others)


def _backward(operation):
    return lambda self, other: self.apply(operation, other, self)


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"):
    setattr(Traced, f"__{_name}__", _forward(_name))
for _name in ("add", "sub", "mul", "truediv"):
    setattr(Traced, f"__r{_name}__", _backward(_name))


def trace(rule, general):
    """The Trace of a rule.

    Parameters
    ----------
    rule : function or OwnRule
        One of rules.RULES, or a user's.
    general : bool
        What GENERAL is in the rule.

    Raises
    ------
    TypeError
        The rule cannot be recorded: it branches, holds a literal or returns something other than param and states.
    """
    operations, arguments = [], rules.arguments(own_rules.plain(rule))  # a user may have named a number t0
    if isinstance(rule, own_rules.OwnRule):
        name, function = rule.name, own_rules.scaled(rule, own_rules.function_of(rule))
    else:
        name, function = rule.__name__, rules.compile_rule(rule, general)
    results = function(*[Traced(name, operations) for name in arguments])
    count = 1 + len(rules.state_names(rule))
    if not isinstance(results, tuple) or [type(result) for result in results] != [Traced] * count:
        raise TypeError("it must return the new param and states")
    return Trace(name, arguments, operations, [result.name for result in results])


def lines(made):
    """The operations of a Trace as lines of Python, one assignment each."""
    return [f"{result} = {EXPRESSIONS[name].format(*operands)}" for result, name, operands in made.operations]


def text(made):
    """A Trace as the text of a Python function, which needs sqrt."""
    body = "".join(f"    {line}\n" for line in lines(made))
    return f"def {made.name}({', '.join(made.arguments)}):\n{body}    return {', '.join(made.results)},\n"
