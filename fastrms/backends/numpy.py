"""The rules on whole arrays in NumPy: the fallback where C is missing, and the slow reference."""

from functools import cache

import numpy as np

from .. import own, recipes, rules
from . import pyplan

CHUNK = 1 << 14  # elements per pass: the temporaries of a rule stay in cache


def available():
    return None


@cache
def compiled(rule, general):
    """A rule as a function of arrays."""
    if isinstance(rule, str):
        return rules.compile_rule(rules.RULES[rule], general, select=np.where, sqrt=np.sqrt)
    function, states = own.function_of(rule, np.where), len(rule.states)

    def scaled(param, grad, *rest):
        return own.checked(rule, function(param, grad * rest[states], *rest[:states], *rest[states + 1 :]))

    return scaled


def updater(recipe):
    """A function for one step on flat arrays, in place."""
    rule = compiled(recipe.rule, recipe.general)

    def in_chunks(coefficients, param, grad, states):
        with np.errstate(all="ignore"):
            for start in range(0, param.size, CHUNK):
                part = slice(start, start + CHUNK)
                buffers = [param[part], *(state[part] for state in states)]
                results = rule(buffers[0], grad[part], *buffers[1:], *coefficients)
                for buffer, result in zip(buffers, results, strict=True):
                    buffer[:] = result

    return in_chunks


def update(recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place."""
    updater(recipe)(recipes.ready(recipe, step, grad_scale), param, grad, states)


class Plan(pyplan.Plan):
    """Bound buffers, updated by NumPy."""

    updater = staticmethod(updater)
