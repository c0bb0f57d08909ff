"""The rules on chunks of arrays in NumPy: the fallback where C is missing, and the slow reference."""

import contextlib
from functools import partial

import numpy as np

from .. import own_rules, rules
from . import plan

CHUNK = 1 << 14  # elements: the temporaries of a rule for such a chunk stay in cache
PROBE = 7  # elements on which an own rule is tried
REMEDIES = {  # for an own rule that does not take arrays: a part of NumPy's error -> what to do
    "read-only": "its arguments are read-only: write `param = param - ...`, never `param -= ...`",
    "arrays can be converted to": "take np.sqrt and the like in place of math.sqrt, float() and int()",
    "shape": "it takes arrays of any size, and gives each result in this size",
    "truth value": "a rule has no `if`, see select in fastrms.rules",
}


def available():
    return None


@own_rules.remembered
def compiled(rule, general):
    """A rule as a function of arrays."""
    if isinstance(rule, str):
        return rules.compile_rule(rules.RULES[rule], general, np.where)
    function, count = own_rules.function_of(rule), 2 + len(rule.states)

    def guarded(*arguments):  # they are read-only, and a result that shares memory with one of them is copied
        buffers = [plan.constant(x) for x in arguments[:count]]
        results = own_rules.checked(rule, function(*buffers, *arguments[count:]))
        return [np.copy(x) if any(np.may_share_memory(x, y) for y in buffers) else x for x in results]

    return own_rules.scaled(rule, guarded)


def in_chunks(rule, param, grad, states, coefficients):
    with np.errstate(all="ignore"):
        for start in range(0, param.size, CHUNK):
            part = slice(start, start + CHUNK)
            buffers = [param[part], *(state[part] for state in states)]
            results = rule(buffers[0], grad[part], *buffers[1:], *coefficients)
            for buffer, result in zip(buffers, results, strict=True):
                buffer[:] = result


class Update(plan.Update):
    """An update by NumPy, one tensor after the other."""

    def take(self):
        recipe = self.coefficients.recipe
        self.rule, self.rows = compiled(recipe.rule, recipe.general), self.coefficients.rows
        if not isinstance(recipe.rule, str):
            try_once(recipe.rule, self.rule, self.rows[0])

    def run(self, number):
        coefficients = self.rows[(number - self.first) * self.stride]
        for param, grad, states in self.tensors:
            in_chunks(self.rule, param, grad, states, coefficients)


update = partial(plan.update, Update)


class Plan(plan.Plan):
    """A plan whose updates are made by NumPy."""

    kind = Update


def try_once(rule, function, coefficients):
    """Refuse an own rule, before it writes anything, if its results for arrays are not those for their elements.

    It is tried with the coefficients of its first step, and with others: a learning rate may begin at 0, which hides all
    else.

    Parameters
    ----------
    rule : OwnRule
    function : callable
        The rule as a function of arrays.
    coefficients : array

    Raises
    ------
    ValueError
        An element of its results depends on other elements, as with a sum or a norm, which would be those of a chunk; or
        the rule writes into its arguments, or does not accept an array, as with an ``if``.
    TypeError
        A result is no real number.
    """
    if "tried" in rule.kept:
        return
    others = 0.5 + 0.5 * abs(np.sin(np.arange(1.0, 1 + coefficients.size)))
    with np.errstate(all="ignore"):
        elementwise = _is_elementwise(rule, function, coefficients.astype(float))
        with contextlib.suppress(Exception):  # the rule need not take these coefficients
            elementwise = elementwise and _is_elementwise(rule, function, others)
    if not elementwise:
        raise own_rules.not_elementwise(rule)
    rule.kept["tried"] = True


def _is_elementwise(rule, function, coefficients):
    """Whether the results of a rule for arrays, of several magnitudes, are those for their elements."""
    numbers = np.sin(np.arange(1.0, 1 + PROBE * (2 + len(rule.states)))).reshape(-1, PROBE)
    numbers[2:] = abs(numbers[2:])  # some states are never negative
    for of_param, of_others in ((1.0, 1.0), (1e-3, 1e3), (1e3, 1e-3)):
        buffers = [numbers[0] * of_param, *(numbers[1:] * of_others)]
        whole = _tried(rule, function, buffers, coefficients)
        parts = [_tried(rule, function, [x[k : k + 1] for x in buffers], coefficients) for k in range(PROBE)]
        for x, y in zip(whole, map(np.concatenate, zip(*parts, strict=True)), strict=True):
            size = np.max(np.abs(x[np.isfinite(x)]), initial=0.0)
            if not np.allclose(x, y, rtol=1e-9, atol=1e-9 * size, equal_nan=True):
                return False
    return True


def _tried(rule, function, buffers, coefficients):
    """The results of a rule as arrays of the size of its arguments."""
    try:
        results = [np.broadcast_to(x, buffers[0].shape) for x in function(*buffers, *coefficients)]
    except (TypeError, ValueError) as error:
        remedy = next((remedy for part, remedy in REMEDIES.items() if part in str(error)), None)
        if remedy is None:
            raise
        raise ValueError(f"the rule of {rule} cannot take an array on backend='numpy' ({error}): {remedy}") from error
    for name, x in zip(("param", *rule.states), results, strict=True):
        if x.dtype.kind not in "biuf":
            kind = "None" if x[0] is None else x.dtype
            raise TypeError(f"the rule of {rule} gives {kind} as the new {name}; it must give real numbers")
    return results
