"""The rules on chunks of arrays in NumPy: the fallback where C is missing, and the slow reference."""

from functools import partial

import numpy as np

from .. import own_rules, rules
from . import plan

CHUNK = 1 << 14  # elements: the temporaries of a rule for such a chunk stay in cache


def available():
    return None


@own_rules.remembered
def compiled(rule, general):
    """A rule as a function of arrays."""
    if isinstance(rule, str):
        return rules.compile_rule(rules.RULES[rule], general, select=np.where, sqrt=np.sqrt)
    return own_function(rule)


def own_function(rule, given=plan.constant):
    """An own rule as a function of arrays.  It gets what ``given`` makes of them, read-only views, and a result that shares
    memory with one of these is copied, so that writing back one result changes no other."""
    function, states = own_rules.function_of(rule, np.where), len(rule.states)

    def scaled(param, grad, *rest):
        grad_scale, grad_rescale, *coefficients = rest[states:]
        seen = [given(x) for x in (param, grad * grad_scale * grad_rescale, *rest[:states])]
        results = own_rules.checked(rule, function(*seen, *coefficients))
        return [np.copy(x) if any(np.may_share_memory(x, y) for y in seen) else x for x in results]

    return scaled


def try_once(rule, rows, must_run=True):
    """Refuse an own rule that is not elementwise before it writes anything.  It is tried with the first of its rows of
    coefficients; must_run is that of refuse_unless_elementwise()."""
    if isinstance(rule, str) or ("tried", must_run) in rule.kept:
        return
    function = compiled(rule, False) if must_run else own_function(rule, np.ndarray.copy)  # scalars may be assigned to
    own_rules.refuse_unless_elementwise(rule, function, rows[0], must_run)
    rule.kept["tried", must_run] = True


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
        try_once(recipe.rule, self.rows)

    def run(self, number):
        coefficients = self.rows[(number - self.first) * self.stride]
        for param, grad, states in self.tensors:
            in_chunks(self.rule, param, grad, states, coefficients)


update = partial(plan.update, Update)


class Plan(plan.Plan):
    """A plan whose updates are made by NumPy."""

    kind = Update
