"""From hyper-parameters to the coefficients of a rule at a step.  All in double; a backend rounds them once.

csrc/step.c evaluates the same recipe with the same operations, so that a bound step needs no Python.
"""

from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import numpy as np

from . import rules

DIVIDE, TIMES_ROOT, OVER_ROOT = range(3)  # value / q, value * sqrt(q), value / sqrt(q)


class Correction(NamedTuple):
    """How one coefficient changes with the step t: by q = weight*(1 + decay + ... + decay^(t-1+ahead)),
    which is 1 - decay^(t+ahead) when weight = 1 - decay, or, linear, by q = 1 + (t-1)*decay."""

    coefficient: str
    operation: int
    decay: float
    weight: float = 1.0
    ahead: int = 0
    linear: bool = False


class Recipe(NamedTuple):
    """One rule, its form, its coefficients before correction (in the rule's order) and their corrections."""

    rule: str
    dtype: np.dtype
    general: bool
    values: dict
    corrections: tuple

    def changing(self):
        """(place, value, corrections) of each coefficient that changes from step to step."""
        names = dict.fromkeys(correction.coefficient for correction in self.corrections)
        return [
            (list(self.values).index(name), self.values[name], [c for c in self.corrections if c.coefficient == name])
            for name in names
        ]

    def at(self, step, grad_scale):
        """The coefficients of update number `step` (from 1), in double."""
        values = dict(self.values)
        values["grad_scale"] = values["grad_scale"] * grad_scale
        for correction in self.corrections:
            values[correction.coefficient] = corrected(values[correction.coefficient], correction, step)
        return list(values.values())


def series(decay, weight, terms):
    """weight * (1 + decay + ... + decay^(terms-1)) by doubling: only * and +, so every machine agrees."""
    return weight * doubled(decay, terms)[0]


@lru_cache(maxsize=256)  # the next step needs the same half
def doubled(decay, terms):
    """(1 + decay + ... + decay^(terms-1), decay^terms)"""
    if terms == 0:
        return 0.0, 1.0
    total, power = doubled(decay, terms >> 1)
    total, power = total * (1 + power), power * power
    return (total * decay + 1, power * decay) if terms & 1 else (total, power)


def corrected(value, correction, step):
    _, operation, decay, weight, ahead, linear = correction
    quantity = 1 + float(step - 1) * decay if linear else series(decay, weight, step + ahead)
    if operation == DIVIDE:
        return value / quantity
    return value * sqrt(quantity) if operation == TIMES_ROOT else value / sqrt(quantity)


def make(rule, dtype, general, values, corrections=()):
    """A recipe with its coefficients in the order of the rule, each one finite after rounding to dtype."""
    ordered = {name: float(values[name]) for name in rules.coefficient_names(rules.RULES[rule])}
    for name, value in ordered.items():
        if np.isfinite(value) and not np.isfinite(rounded(value, dtype)):
            raise ValueError(f"the coefficient {name}={value!r} is not finite in {dtype}")
    for correction in corrections:
        first = ordered[correction.coefficient] / correction.weight
        if correction.operation == DIVIDE and not np.isfinite(rounded(first, dtype)):
            raise ValueError(
                f"the coefficient {correction.coefficient} of the first step, {first!r}, is not finite in {dtype}"
            )
    return Recipe(rule, dtype, bool(general), ordered, tuple(corrections))


def rounded(value, dtype):
    """The double that dtype holds for value."""
    with np.errstate(over="ignore", under="ignore"):
        return float(dtype.type(value))


def constants(dtype):
    """The numbers that rules may not spell out: zero, one, tiny (smallest normal), floor (of the centered variance)."""
    return {
        "zero": 0.0,
        "one": 1.0,
        "tiny": float(np.finfo(dtype).tiny),
        "floor": 2.0**-20 if dtype.itemsize == 4 else 2.0**-49,
    }
