"""The rules on whole arrays in NumPy: the fallback where C is missing, and the slow reference."""

from functools import cache, partial

import numpy as np

from .. import own_rules, rules
from . import plan

CHUNK = 1 << 14  # elements per pass: the temporaries of a rule stay in cache


def available():
    return None


@cache
def compiled(rule, general):
    """A rule as a function of arrays."""
    if isinstance(rule, str):
        return rules.compile_rule(rules.RULES[rule], general, select=np.where, sqrt=np.sqrt)
    function, states = own_rules.function_of(rule, np.where), len(rule.states)

    def scaled(param, grad, *rest):
        return own_rules.checked(rule, function(param, grad * rest[states], *rest[:states], *rest[states + 1 :]))

    return scaled


def in_chunks(rule, param, grad, states, coefficients):
    with np.errstate(all="ignore"):
        for start in range(0, param.size, CHUNK):
            part = slice(start, start + CHUNK)
            buffers = [param[part], *(state[part] for state in states)]
            results = rule(buffers[0], grad[part], *buffers[1:], *coefficients)
            for buffer, result in zip(buffers, results, strict=True):
                buffer[:] = result


class Update(plan.Update):
    """By NumPy, tensor by tensor."""

    def take(self):
        recipe = self.coefficients.recipe
        self.rule, self.rows = compiled(recipe.rule, recipe.general), self.coefficients.rows

    def run(self, number):
        coefficients = self.rows[(number - self.first) * self.stride]
        for param, grad, states in self.tensors:
            in_chunks(self.rule, param, grad, states, coefficients)


update = partial(plan.update, Update)


class Plan(plan.Plan):
    """Bound buffers, updated by NumPy."""

    kind = Update
