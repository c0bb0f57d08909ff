"""Own rules: a user's subclass of Optimizer with state_names, coefficients and rule, for NumPy, Numba and CUDA.

A rule is elementwise: each element of its results depends on the same element of its arguments and on coefficients, so that
one text serves scalars, arrays and chunks of arrays.  It has no ``if``; ``select``, ``larger`` and ``clip`` of
``fastrms.rules`` stand for it.  It changes nothing in place.  ``@staticmethod`` may be written above it or left out.
"""

import math
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import Parameter, signature
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from .words import kind_of


@dataclass(frozen=True)
class OwnRule:
    """A rule that a subclass of Optimizer brings.  As a rule of rules.py it has, beside its own coefficients, grad_scale and
    grad_rescale, which are multiplied into grad before ``function`` is called."""

    name: str
    function: Any
    states: tuple
    coefficients: tuple  # without grad_scale and grad_rescale
    kept: dict = field(default_factory=dict, compare=False, repr=False)  # what was made from it, which goes with it

    def __str__(self):
        return self.name


def remembered(function):
    """functools.cache for a function whose first argument is a rule or its name.  What is made from an own rule is kept on
    this rule, so that both are freed with the class that brought it."""
    kept_of_ours = {}

    @wraps(function)
    def found(rule, *rest):
        kept, key = getattr(rule, "kept", kept_of_ours), (function, str(rule), *rest)
        if key not in kept:
            kept[key] = function(rule, *rest)
        return kept[key]

    return found


class OwnRecipe(NamedTuple):
    """An own rule with its hyper-parameters; coefficients() of the subclass makes the coefficients of a step from them."""

    rule: OwnRule
    dtype: Any
    coefficients: Any  # the function of the subclass
    hyper: dict
    grad_rescale: float = 1.0

    general = False  # there is one form of an own rule

    fixed = False
    ahead = None  # the subclass is asked step by step
    most_rate = -1.0  # it is asked at every rate, too

    @property
    def rate(self):
        return self.hyper["lr"]

    def at_rate(self, rate):
        """This recipe with another learning rate, as Recipe.at_rate."""
        return self._replace(hyper={**self.hyper, "lr": rate})

    def rescaled(self, grad_rescale):
        """This recipe with a second factor of the gradient, as Recipe.rescaled."""
        return self._replace(grad_rescale=grad_rescale)

    def at(self, step, grad_scale):
        """The coefficients of update number `step` (from 1), in double."""
        given = self.coefficients(step, **self.hyper)
        if not isinstance(given, dict):
            raise TypeError(f"coefficients of {self.rule} gives {kind_of(given)}; it must give a dict: name -> number")
        if set(given) != set(self.rule.coefficients):
            raise ValueError(f"coefficients of {self.rule} gives {', '.join(given)}; "
                             f"its rule takes {', '.join(self.rule.coefficients)}")  # fmt: skip
        values = [float(given[name]) for name in self.rule.coefficients]
        if any(map(math.isnan, values)):
            raise ValueError(f"coefficients of {self.rule} gives a NaN at step {step}: {given}")
        return [grad_scale, self.grad_rescale, *values]


def plain(rule):
    """The rule with its states and coefficients renamed, so that no name has another meaning in the text of a kernel."""
    if not isinstance(rule, OwnRule):
        return rule
    states = tuple(f"own_state_{k}" for k in range(len(rule.states)))
    numbers = tuple(f"own_number_{k}" for k in range(len(rule.coefficients)))
    return replace(rule, states=states, coefficients=numbers, kept={})


def rule_of(cls):
    """The OwnRule of a subclass of Optimizer, its arguments checked."""
    function, states = cls.rule, cls.state_names
    if isinstance(states, str) or not all(isinstance(name, str) for name in states):
        raise TypeError(f"state_names={states!r} of {cls.__name__} must be a tuple of names")
    names = _arguments(cls.__name__, function)
    first = ("param", "grad", *states)
    if names[: len(first)] != first:
        raise TypeError(f"rule of {cls.__name__} takes {', '.join(names)}; its first arguments must be {', '.join(first)}")
    taken = next((name for name in ("grad_scale", "grad_rescale") if name in names), None)
    if taken:
        raise TypeError(f"rule of {cls.__name__} takes {taken}, which is multiplied into grad before it is called")
    if not callable(getattr(cls, "coefficients", None)):
        raise TypeError(f"{cls.__name__} has a rule, but no coefficients(step, **hyper) that returns the numbers it needs")
    if "lr" not in cls.defaults:
        raise TypeError(f"defaults={cls.defaults!r} of {cls.__name__} must have a learning rate, lr")
    return OwnRule(cls.__name__, function, tuple(states), names[len(first) :])


def _arguments(name, function):
    """The names of the arguments of a rule, which must be a plain function of arguments that are given by position."""
    if not isinstance(function, FunctionType):
        kind = "a classmethod" if isinstance(function, MethodType) else kind_of(function)
        raise TypeError(f"rule of {name} is {kind}; it must be a plain function, with @staticmethod or nothing above it")
    parameters = signature(function).parameters
    wrong = next((p for p in parameters.values() if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    if wrong is not None:
        kind = "by name only" if wrong.kind is Parameter.KEYWORD_ONLY else "in any number"
        raise TypeError(f"rule of {name} takes {wrong.name} {kind}; its arguments are given by position: leave out the `*`")
    return tuple(parameters)


def recipe(rule, coefficients, hyper, dtype):
    """An OwnRecipe; an error where the coefficients of the first step cannot be made."""
    made = OwnRecipe(rule, dtype, coefficients, hyper)
    made.at(1, 1.0)
    return made


def checked(rule, results):
    """The results of an own rule; TypeError unless they are a tuple of the new param and states."""
    if not isinstance(results, tuple) or len(results) != 1 + len(rule.states):
        raise TypeError(
            f"the rule of {rule} must return a tuple ({', '.join(('param', *rule.states))}{',' * (not rule.states)})"
        )
    return results


def scaled(rule, function):
    """A function of all arguments of an own rule, from its function, which takes the scaled gradient."""
    states = len(rule.states)

    def of_all(param, grad, *rest):
        grad_scale, grad_rescale, *numbers = rest[states:]
        return function(param, grad * grad_scale * grad_rescale, *rest[:states], *numbers)

    return of_all


def function_of(rule, python_of=lambda x: getattr(x, "py_func", x), compiler=lambda function: function):
    """The function of an own rule, in which the functions that it reaches are such that a backend can run them.

    Parameters
    ----------
    rule : OwnRule
    python_of : callable(x), optional
        It returns the Python function for which a value that the rule reaches stands, and something else where the value
        stays as it is.  By default it returns what the user has compiled by Numba as Python.
    compiler : callable(function), optional
        It wraps the rule and each Python function that the rule reaches.
    """
    made = {}

    def exchanged(x):
        function = python_of(x)
        if not isinstance(function, FunctionType):
            return x
        if function not in made:
            made[function] = x  # for a function that calls itself
            made[function] = compiler(_rebuilt(function, exchanged))
        return made[function]

    return compiler(_rebuilt(rule.function, exchanged))


def _rebuilt(function, exchanged):
    """A function with exchanged(x) for each x that it reaches by a global name or in its closure; the function itself where
    this changes nothing."""
    used, closure = _names(function.__code__), function.__closure__ or ()
    known = {name: x for name, x in function.__globals__.items() if name in used}
    names, cells = {name: exchanged(x) for name, x in known.items()}, tuple(_cell(cell, exchanged) for cell in closure)
    if all(x is y for x, y in zip([*known.values(), *closure], [*names.values(), *cells], strict=True)):
        return function
    names["__builtins__"] = function.__globals__["__builtins__"]
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _cell(cell, exchanged):
    """A cell with exchanged(x) for its x; the cell itself where this changes nothing, or where it is empty."""
    try:
        x = exchanged(cell.cell_contents)
    except ValueError:
        return cell
    return cell if x is cell.cell_contents else CellType(x)


def _names(code):
    """The names in a code and in the functions that it defines."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def not_elementwise(rule):
    """The error of a rule whose results depend on other elements."""
    return ValueError(
        f"the rule of {rule} is not elementwise: an element of its results depends on other elements, as with a sum, a "
        f"norm or a maximum, and only a chunk of them is there; compute such a number before the step and pass it as a "
        f"hyper-parameter"
    )
