"""From hyper-parameters to the coefficients of a rule, and to those of one step.  These are doubles; a backend rounds them.

csrc/recipes.c says the same in C, with the same names in the same order of operations; the tests compare what both make
byte by byte.  The functions from usable() down to evaluate() take plain numbers, and Numba compiles them as they
stand (fastrms/jitted.py): they contain no strings, no dicts and no raise.  In `h`, the hyper-parameters, None and False are
0, True is 1, and words are CORRECTED, FOLDED and DOZAT.
"""

from collections import namedtuple
from ctypes import c_float
from functools import cache
from math import inf
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import numpy as np
from numpy import sqrt

from . import hyper, rules
from .rules import select

CORRECTED, FOLDED, DOZAT = 2, 3, 4  # as in csrc/fastrms_decl.h
WORDS = {None: 0.0, "corrected": CORRECTED, "folded": FOLDED, "dozat": DOZAT}
NONE, DIVIDE, TIMES_ROOT, OVER_ROOT = range(4)  # value, value / q, value * sqrt(q), value / sqrt(q)
CONSTANTS = ("grad_rescale", "zero", "one", "tiny", "floor")  # coefficients that no hyper-parameter decides


class Correction(NamedTuple):
    """How one coefficient, given by its place, changes with the step t: the operation combines it with a quantity q.  q is
    weight*(1 + decay + ... + decay^(t-1+ahead)), which is 1 - decay^(t+ahead) when weight = 1 - decay; where linear is set,
    q is 1 + (t-1)*decay."""

    coefficient: int
    operation: int
    decay: float
    weight: float
    ahead: int
    linear: bool


def values_of(rule):
    """(a class of named tuples for the coefficients of a rule without CONSTANTS, one of these with their places)"""
    names = [name for name in rules.coefficient_names(rules.RULES[rule]) if name not in CONSTANTS]
    made = namedtuple(f"{rule}_values", names)
    return made, made(*range(len(names)))


# The rule with the most coefficients stands for its family.
RMSPropValues, RMSPROP = values_of("rmsprop_centered_momentum")
AdaGradValues, ADAGRAD = values_of("adagrad")
AdamValues, ADAM = values_of("adam_amsgrad")
RPropValues, RPROP = values_of("rprop")
NEUTRAL = Correction(0, NONE, 0.0, 1.0, 0, False)


def rounded(value, dtype):
    """The double that dtype holds for value; infinite where it is too large.  Jitted code passes an itemsize as dtype."""
    return value if dtype.itemsize == 8 else c_float(value).value  # np.float32() would warn, and take 20 times as long


# what values hyper-parameters may have.  usable: at least 0, and finite in the dtype; decaying: in [0, 1) in the dtype;
# clipping: usable, and not rounded to 0 unless it is 0


def usable(x, dtype):
    return x >= 0 and rounded(x, dtype) < inf


def decaying(x, dtype):
    return x >= 0 and rounded(x, dtype) < 1


def clipping(x, dtype):
    return usable(x, dtype) and (x == 0 or rounded(x, dtype) > 0)


def some_eps(h, dtype):
    return usable(h.eps, dtype) and (rounded(h.eps, dtype) > 0 or rounded(h.eps_root, dtype) > 0)


# what every family shares


def direction(h):
    return select(h.maximize, -1.0, 1.0)


def clip_bound(h):
    return select(h.clip_value > 0, h.clip_value, inf)


def added_decay(h):
    return select(h.decoupled, 0.0, h.weight_decay)


def decoupled_decay(h):
    return select(h.decoupled, h.lr * h.weight_decay, 0.0)


def needs_general(h):
    return h.clip_value > 0 or added_decay(h) > 0 or h.eps_root > 0


def of_average(coefficient, operation, rate, ahead, dtype):
    """The correction of a coefficient for the start at 0 of an average that decays by `rate`."""
    return Correction(coefficient, operation, rounded(rate, dtype), rounded(1 - rate, dtype), ahead, False)


def linear(coefficient, operation, decay):
    return Correction(coefficient, operation, decay, 1.0, 0, True)


# The families.  The first function of each names every hyper-parameter that can be wrong and says whether it is right; the
# second gives (whether the general form is needed, the coefficients before correction, their corrections).

RMSPropChecks = namedtuple("RMSPropChecks", "lr weight_decay clip_value eps_root eps rho momentum nesterov bias_correction")


def rmsprop_checks(h, dtype):
    return RMSPropChecks(
        lr=usable(h.lr, dtype), weight_decay=usable(h.weight_decay, dtype),
        clip_value=clipping(h.clip_value, dtype), eps_root=usable(h.eps_root, dtype), eps=some_eps(h, dtype),
        rho=decaying(h.rho, dtype), momentum=decaying(h.momentum, dtype),
        nesterov=h.nesterov == 0 or h.momentum > 0,
        bias_correction=h.centered == 0 or h.bias_correction != FOLDED,
    )  # fmt: skip


def rmsprop(h, dtype):
    lr_first, form = h.lr_in_momentum or h.momentum == 0, h.bias_correction
    values = RMSPropValues(
        grad_scale=direction(h), clip_low=-clip_bound(h), clip_high=clip_bound(h), weight_decay=added_decay(h),
        rho=h.rho, one_minus_rho=1 - h.rho,
        v_scale=1.0, eps_root=h.eps_root, in_scale=select(lr_first, h.lr, 1.0), eps=h.eps,
        momentum=h.momentum, nesterov_b=select(h.nesterov, h.momentum, 1.0), nesterov_u=select(h.nesterov, 1.0, 0.0),
        out_scale=select(lr_first, 1.0, h.lr), decay=decoupled_decay(h),
    )  # fmt: skip
    divide, times_root = select(form == CORRECTED, DIVIDE, NONE), select(form == FOLDED, TIMES_ROOT, NONE)
    corrections = (
        of_average(RMSPROP.v_scale, divide, h.rho, 0, dtype),
        of_average(select(lr_first, RMSPROP.in_scale, RMSPROP.out_scale), times_root, h.rho, 0, dtype),
    )
    return needs_general(h) or h.nesterov > 0 or form == CORRECTED, values, corrections


AdaGradChecks = namedtuple("AdaGradChecks", "lr weight_decay clip_value eps_root eps lr_decay")


def adagrad_checks(h, dtype):
    return AdaGradChecks(
        lr=usable(h.lr, dtype), weight_decay=usable(h.weight_decay, dtype),
        clip_value=clipping(h.clip_value, dtype), eps_root=usable(h.eps_root, dtype), eps=usable(h.eps, dtype),
        lr_decay=usable(h.lr_decay, dtype),
    )  # fmt: skip


def adagrad(h, dtype):
    values = AdaGradValues(
        grad_scale=direction(h), clip_low=-clip_bound(h), clip_high=clip_bound(h), weight_decay=added_decay(h),
        eps_root=h.eps_root, lr=h.lr, eps=h.eps, decay=decoupled_decay(h),
    )  # fmt: skip
    slower = select(h.lr_decay > 0, DIVIDE, NONE)
    corrections = linear(ADAGRAD.lr, slower, h.lr_decay), linear(ADAGRAD.decay, slower, h.lr_decay)
    return needs_general(h), values, corrections


AdamChecks = namedtuple("AdamChecks", "lr weight_decay clip_value eps_root eps beta1 beta2 amsgrad")


def adam_checks(h, dtype):
    return AdamChecks(
        lr=usable(h.lr, dtype), weight_decay=usable(h.weight_decay, dtype),
        clip_value=clipping(h.clip_value, dtype), eps_root=usable(h.eps_root, dtype), eps=some_eps(h, dtype),
        beta1=decaying(h.beta1, dtype), beta2=decaying(h.beta2, dtype),
        amsgrad=h.amsgrad != CORRECTED or h.bias_correction == CORRECTED,
    )  # fmt: skip


def of_second_average(h, dtype):
    """Adam's correction of exp_avg_sq; which coefficient takes it depends on the form of bias correction."""
    divide, over_root = select(h.bias_correction, DIVIDE, NONE), select(h.bias_correction, OVER_ROOT, NONE)
    if h.bias_correction == FOLDED:
        return of_average(ADAM.step_size, TIMES_ROOT, h.beta2, 0, dtype)
    if h.amsgrad == CORRECTED:
        return of_average(ADAM.max_scale, divide, h.beta2, 0, dtype)
    if h.eps_root > 0:
        return of_average(ADAM.v_scale, divide, h.beta2, 0, dtype)
    return of_average(ADAM.root_scale, over_root, h.beta2, 0, dtype)


def adam(h, dtype):
    values = AdamValues(
        grad_scale=direction(h), clip_low=-clip_bound(h), clip_high=clip_bound(h), weight_decay=added_decay(h),
        beta1=h.beta1, one_minus_beta1=1 - h.beta1, beta2=h.beta2, one_minus_beta2=1 - h.beta2,
        max_scale=1.0, m_scale=select(h.nesterov, h.beta1, 1.0), g_scale=select(h.nesterov, 1 - h.beta1, 0.0),
        v_scale=1.0, eps_root=h.eps_root, step_size=h.lr, root_scale=1.0, eps=h.eps, decay=decoupled_decay(h),
    )  # fmt: skip
    divide, dozat = select(h.bias_correction, DIVIDE, NONE), h.nesterov == DOZAT
    corrections = (
        of_average(select(dozat, ADAM.m_scale, ADAM.step_size), divide, h.beta1, select(dozat, 1, 0), dtype),
        of_average(ADAM.g_scale, select(dozat, divide, NONE), h.beta1, 0, dtype),
        of_second_average(h, dtype),
    )
    return needs_general(h) or h.nesterov > 0, values, corrections


RPropChecks = namedtuple("RPropChecks", "lr clip_value eta_minus eta_plus step_max step_min")


def rprop_checks(h, dtype):
    return RPropChecks(
        lr=usable(h.lr, dtype), clip_value=clipping(h.clip_value, dtype),
        eta_minus=h.eta_minus > 0 and decaying(h.eta_minus, dtype),
        eta_plus=usable(h.eta_plus, dtype) and rounded(h.eta_plus, dtype) > 1,
        step_max=usable(h.step_max, dtype), step_min=0 <= h.step_min <= h.step_max,
    )  # fmt: skip


def rprop(h, dtype):
    values = RPropValues(
        grad_scale=direction(h), clip_low=-clip_bound(h), clip_high=clip_bound(h),
        eta_minus=h.eta_minus, eta_plus=h.eta_plus, step_min=h.step_min, step_max=h.step_max,
        flip_below=select(h.zero_on_flip, 0.0, -inf),
    )  # fmt: skip
    return h.clip_value > 0, values, (NEUTRAL,)


def overflowing(values, corrections, dtype):
    """The place of a coefficient that overflows the dtype, by itself or after division at the first step; -1 for none."""
    for k in range(len(values)):
        if abs(rounded(values[k], dtype)) == inf and abs(values[k]) < inf:
            return k
    for c in corrections:
        if c.operation == DIVIDE and abs(rounded(values[c.coefficient] / c.weight, dtype)) == inf:
            return c.coefficient
    return -1


# the coefficients of one step


def twice(total, power):
    """(the sum, the power) that doubled() gives for twice as many terms."""
    return total * (1 + power), power * power


def one_more(total, power, decay):
    """(the sum, the power) that doubled() gives for one term more."""
    return total * decay + 1, power * decay


def doubled(decay, terms):
    """(1 + decay + ... + decay^(terms-1), decay^terms); (0, 1) where there are no terms."""
    bits = 0
    while terms >> bits > 0:
        bits += 1
    total, power = 0.0, 1.0
    for bit in range(bits - 1, -1, -1):
        total, power = twice(total, power)
        if terms >> bit & 1:
            total, power = one_more(total, power, decay)
    return total, power


def series(decay, weight, terms):
    """weight * (1 + decay + ... + decay^(terms-1)) by doubling: only * and +, so every machine agrees."""
    return weight * doubled(decay, terms)[0]


def quantity(c, step):
    """What correction c divides or multiplies by at update number `step`."""
    return 1 + (step - 1) * c.decay if c.linear else series(c.decay, c.weight, step + c.ahead)


def corrected(value, operation, q):
    if operation == DIVIDE:
        return value / q
    if operation == TIMES_ROOT:
        return value * sqrt(q)
    return value / sqrt(q) if operation == OVER_ROOT else value


def evaluate(values, corrections, step, grad_scale):
    """Make the coefficients of update number `step`, from 1, in place; the first is grad_scale in every rule."""
    values[0] = values[0] * grad_scale
    for c in corrections:
        values[c.coefficient] = corrected(values[c.coefficient], c.operation, quantity(c, step))


# Python only from here


class Recipe(NamedTuple):
    """A rule, its form, its coefficients before correction, and the corrections that are not neutral.  The coefficients are
    in the order of the rule's arguments, and corrections name them by their place in it.  The learning rate multiplies the
    coefficients at the places `rated`."""

    rule: str
    dtype: np.dtype
    general: bool
    values: dict
    corrections: tuple
    rate: float = 0.0
    rated: tuple = ()

    @property
    def fixed(self):
        """Whether no coefficient changes from step to step."""
        return not self.corrections

    @property
    def most_rate(self):
        """A learning rate up to which no coefficient overflows the dtype, even after a division at the first step."""
        weights = dict.fromkeys(self.rated, 1.0)
        for c in self.corrections:
            if c.operation == DIVIDE and c.coefficient in weights:
                weights[c.coefficient] = c.weight
        values, most = [*self.values.values()], float(np.finfo(self.dtype).max) / 2
        return min([most, *(most * weight / abs(values[k]) for k, weight in weights.items())])

    def at_rate(self, rate):
        """This recipe with another learning rate."""
        return self._replace(rate=rate)

    def rescaled(self, grad_rescale):
        """This recipe with a second factor of the gradient, for a step whose one factor would be too small for a float32."""
        return self._replace(general=True, values={**self.values, "grad_rescale": grad_rescale})

    def rated_values(self):
        """The coefficients before correction, those of them multiplied by the learning rate that it multiplies."""
        values = list(self.values.values())
        for k in self.rated:
            values[k] *= self.rate
        return values

    def at(self, step, grad_scale):
        """The coefficients of update number `step` (from 1), in double."""
        values = self.rated_values()
        evaluate(values, self.corrections, step, grad_scale)
        return values

    def ahead(self, first, count):
        """at() for `count` updates from number `first`, as (place, values) of each coefficient that changes."""
        steps, columns, values = np.arange(first, first + count), {}, self.rated_values()
        for c in self.corrections:
            value = columns.get(c.coefficient, values[c.coefficient])
            columns[c.coefficient] = corrected(value, c.operation, quantities(c, steps))
        return list(columns.items())


def quantities(c, steps):
    """quantity() for an array of steps that follow each other."""
    return 1 + (steps - 1) * c.decay if c.linear else many(c.decay, c.weight, steps + c.ahead)


def many(decay, weight, terms):
    """series() for an array of numbers of terms that follow each other.  Each level of doubling gives all of them at once:
    the numbers of a level are those of the level above with one more binary digit."""
    bits = int(terms.size - 1).bit_length()
    first = int(terms[0]) >> bits
    total, power = np.array([doubled(decay, first), doubled(decay, first + 1)]).T
    for _ in range(bits):
        even = twice(total, power)
        total, power = (np.stack(both, axis=1).ravel() for both in zip(even, one_more(*even, decay), strict=True))
    start = int(terms[0]) - (first << bits)
    return weight * total[start : start + terms.size]


class Numbers(NamedTuple):
    """What recipes.py has for one family: its rules, its functions and the classes of named tuples that these give."""

    rules: dict  # names of states -> the name of the rule that has these; the last has all of them
    optional: dict  # the name of a state that not every rule has -> the hyper-parameter that is above 0 where it is needed
    checks: FunctionType
    recipe: FunctionType
    right: type  # the class of what checks() gives
    values: type  # the class of its coefficients


def by_states(*names):
    return {rules.state_names(rules.RULES[name]): name for name in names}


RMSPROP_RULES = by_states("rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_centered_momentum")
RMSPROP_OPTIONAL = {"grad_avg": "centered", "momentum_buffer": "momentum"}
ADAM_RULES = by_states("adam", "adam_amsgrad")
ADAM_OPTIONAL = {"max_exp_avg_sq": "amsgrad"}
FAMILIES = {
    "rmsprop": Numbers(RMSPROP_RULES, RMSPROP_OPTIONAL, rmsprop_checks, rmsprop, RMSPropChecks, RMSPropValues),
    "adagrad": Numbers(by_states("adagrad"), {}, adagrad_checks, adagrad, AdaGradChecks, AdaGradValues),
    "adam": Numbers(ADAM_RULES, ADAM_OPTIONAL, adam_checks, adam, AdamChecks, AdamValues),
    "rprop": Numbers(by_states("rprop"), {}, rprop_checks, rprop, RPropChecks, RPropValues),
}


def recipe(family, h, dtype):
    """The Recipe of hyper-parameters, each in its range, for a family (Numbers); ValueError where one does not go with dtype
    or the others."""
    numbers = SimpleNamespace(**{name: WORDS.get(value, value) for name, value in vars(h).items()})
    right = family.checks(numbers, dtype)
    if not all(right):
        raise ValueError(hyper.forbidden(right._fields[right.index(False)], h, dtype))
    unneeded = {state for state, name in family.optional.items() if not getattr(numbers, name) > 0}
    rule = family.rules[tuple(state for state in [*family.rules][-1] if state not in unneeded)]
    (general, one, corrections), (_, two, _) = by_rate(family, numbers, dtype)
    sources, places = layout(rule, one._fields)
    ordered = {name: constants(dtype)[name] if k is None else one[k] for name, k in sources}
    placed = [c._replace(coefficient=places[c.coefficient]) for c in corrections if c.operation]
    rated = [place for place, (_, k) in enumerate(sources) if k is not None and one[k] != two[k]]
    made = Recipe(rule, dtype, bool(general), ordered, tuple(placed), float(h.lr), tuple(rated))
    over = overflowing(made.rated_values(), placed, dtype)
    if over >= 0:
        raise ValueError(f"lr={h.lr!r} is too large: the coefficient {[*ordered][over]}={made.rated_values()[over]!r}, or "
                         f"what bias_correction makes of it at the first step, is not finite in {dtype}")  # fmt: skip
    return made


def by_rate(family, numbers, dtype):
    """What a family makes of a learning rate of 1 and of 2: it multiplies the coefficients that are not the same."""
    return [family.recipe(SimpleNamespace(**{**vars(numbers), "lr": rate}), dtype) for rate in (1.0, 2.0)]


@cache
def layout(rule, fields):
    """Where the coefficients of a rule come from: (name, place in the values of the family, None for a constant) pairs, and
    for each of these values its place in the rule, None where the rule lacks it."""
    names = rules.coefficient_names(rules.RULES[rule])
    sources = [(name, fields.index(name) if name in fields else None) for name in names]
    return sources, [names.index(name) if name in names else None for name in fields]


@cache
def constants(dtype):
    """The numbers that rules may not spell out: zero, one, tiny (smallest normal), floor (of the centered variance)."""
    return {
        "grad_rescale": 1.0,  # other than 1 for a single step: see rescaled()
        "zero": 0.0,
        "one": 1.0,
        "tiny": float(np.finfo(dtype).tiny),
        "floor": 2.0**-20 if dtype.itemsize == 4 else 2.0**-49,
    }
