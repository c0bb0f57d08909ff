"""Own rules: a user's subclass of Optimizer with state_names, coefficients and rule, for NumPy, Numba and CUDA.

A rule is elementwise: each element of its results depends on the same element of its arguments and on coefficients, so that
one text serves scalars, arrays and chunks of arrays.  It has no ``if``; ``select``, ``larger`` and ``clip`` of
``fastrms.rules`` stand for it.  It changes nothing in place.  ``@staticmethod`` may be written above it or left out.
"""

import math
from inspect import signature
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from . import rules

PROBE = 7  # elements on which a rule is tried


class OwnRule(NamedTuple):
    """A rule that a subclass of Optimizer brings.  As a rule of rules.py it has, beside its own coefficients, grad_scale and
    grad_rescale, which are multiplied into grad before ``function`` is called."""

    name: str
    function: Any
    states: tuple
    coefficients: tuple  # without grad_scale and grad_rescale

    def __str__(self):
        return self.name


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

    def rescaled(self, grad_rescale):
        """This recipe with a second factor of the gradient, as Recipe.rescaled."""
        return self._replace(grad_rescale=grad_rescale)

    def at(self, step, grad_scale):
        """The coefficients of update number `step` (from 1), in double."""
        given = self.coefficients(step, **self.hyper)
        if not isinstance(given, dict):
            raise TypeError(
                f"coefficients of {self.rule} gives a {type(given).__name__}; it must give a dict: name -> number"
            )
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
    return rule._replace(states=states, coefficients=tuple(f"own_number_{k}" for k in range(len(rule.coefficients))))


def rule_of(cls):
    """The OwnRule of a subclass of Optimizer, its arguments checked."""
    function, states = cls.rule, cls.state_names
    if isinstance(states, str) or not all(isinstance(name, str) for name in states):
        raise TypeError(f"state_names={states!r} of {cls.__name__} must be a tuple of names")
    names = tuple(signature(function).parameters)
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


def function_of(rule, select, compiler=lambda function: function):
    """The function of an own rule; `compiler` wraps it and each helper that it imported from fastrms.rules."""
    names = {"GENERAL": False, "select": select}
    for helper in rules.HELPERS:
        names[helper.__name__] = rules.rebuilt(helper, names, compiler)
    exchanged = {rules.select: select, **{helper: names[helper.__name__] for helper in rules.HELPERS}}
    used = rule.function.__globals__.items()
    mine = {name: exchanged.get(x, x) if isinstance(x, FunctionType) else x for name, x in used}
    return rules.rebuilt(rule.function, mine, compiler)


def refuse_unless_elementwise(rule, function, coefficients):
    """Try an own rule, as a function of arrays, on an array and on the elements of this array one by one.

    Raises
    ------
    ValueError
        The rule writes into its arguments, or it does not accept an array, as with an ``if``, or an element of its results
        depends on other elements, as with a sum or a norm, which would be those of a chunk.
    """
    numbers = np.sin(np.arange(1.0, 1 + PROBE * (2 + len(rule.states)))).reshape(-1, PROBE)
    numbers[2:] = abs(numbers[2:])  # some states are never negative
    coefficients = [float(x) for x in coefficients]
    with np.errstate(all="ignore"):
        for of_param, of_others in ((1.0, 1.0), (1e-3, 1e3), (1e3, 1e-3)):
            buffers = [numbers[0] * of_param, *(numbers[1:] * of_others)]
            whole = _tried_on(rule, function, buffers, coefficients)
            single = [_tried_on(rule, function, [x[k : k + 1] for x in buffers], coefficients) for k in range(PROBE)]
            for results, parts in zip(whole, zip(*single, strict=True), strict=True):
                _refuse_different(rule, results, np.concatenate(parts))


def _tried_on(rule, function, buffers, coefficients):
    """The results of a rule as arrays of the size of its arguments."""
    try:
        return [np.broadcast_to(x, buffers[0].shape) for x in function(*buffers, *coefficients)]
    except ValueError as error:
        remedy = "its arguments are read-only: write `param = param - ...`, never `param -= ...`"
        if "read-only" not in str(error):
            remedy = f"it cannot take an array ({error}): a rule has no `if`, see select in fastrms.rules"
        raise ValueError(f"the rule of {rule} does not run on backend='numpy': {remedy}") from error


def _refuse_different(rule, whole, single):
    size = np.max(np.abs(whole[np.isfinite(whole)]), initial=0.0)
    if not np.allclose(whole, single, rtol=1e-9, atol=1e-9 * size, equal_nan=True):
        raise ValueError(
            f"the rule of {rule} is not elementwise: an element of its results depends on other elements, as with a sum, a "
            f"norm or a maximum, and only a chunk of them is there; compute such a number before the step and pass it as a "
            f"hyper-parameter"
        )
