"""From hyper-parameters to the coefficients of a rule at a step.  All in double; a backend rounds them once.

csrc/plan.c evaluates the same recipe with the same operations, so that a bound step needs no Python.
"""

from array import array
from math import isfinite
from typing import NamedTuple

import numpy as np
from numpy import sqrt

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

    @property
    def fixed(self):
        """Whether no coefficient changes from step to step."""
        return not self.corrections

    def rescaled(self, grad_rescale):
        """This recipe with a second factor of the gradient, for a step whose factor is too small to be a float32."""
        return self._replace(general=True, values={**self.values, "grad_rescale": grad_rescale})

    def ahead(self, first, count):
        """(place, values) of each coefficient that changes, for `count` updates from number `first`: what at() says."""
        steps, columns = np.arange(first, first + count), {}
        for correction in self.corrections:
            value = columns.get(correction.coefficient, self.values[correction.coefficient])
            columns[correction.coefficient] = corrected(value, correction, steps, many)
        places = list(self.values)
        return [(places.index(name), column) for name, column in columns.items()]

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


def doubled(decay, terms):
    """(1 + decay + ... + decay^(terms-1), decay^terms)"""
    bits = 0
    while terms >> bits:
        bits += 1
    total, power = 0.0, 1.0
    for bit in range(bits - 1, -1, -1):
        total, power = twice(total, power)
        if terms >> bit & 1:
            total, power = one_more(total, power, decay)
    return total, power


def twice(total, power):
    """Of twice as many terms."""
    return total * (1 + power), power * power


def one_more(total, power, decay):
    """Of one term more."""
    return total * decay + 1, power * decay


def many(decay, weight, steps):
    """series of numbers of terms that follow each other: each from the number that its bits are without the last."""
    bits = int(steps.size - 1).bit_length()
    first = int(steps[0]) >> bits
    total, power = np.array([doubled(decay, first), doubled(decay, first + 1)]).T
    for _ in range(bits):
        even = twice(total, power)
        total, power = (np.stack(both, axis=1).ravel() for both in zip(even, one_more(*even, decay), strict=True))
    start = int(steps[0]) - (first << bits)
    return weight * total[start : start + steps.size]


def corrected(value, correction, step, series=series):
    """value at update number `step`, or with series=many at an array of them."""
    _, operation, decay, weight, ahead, linear = correction
    quantity = 1 + (step - 1) * decay if linear else series(decay, weight, step + ahead)
    if operation == DIVIDE:
        return value / quantity
    return value * sqrt(quantity) if operation == TIMES_ROOT else value / sqrt(quantity)


def make(rule, dtype, general, values, corrections=()):
    """A recipe with its coefficients in the order of the rule, each one finite after rounding to dtype."""
    ordered = {name: float(values[name]) for name in rules.coefficient_names(rules.RULES[rule])}
    for name, value in ordered.items():
        if isfinite(value) and not isfinite(rounded(value, dtype)):
            raise ValueError(f"the coefficient {name}={value!r} is not finite in {dtype}")
    for correction in corrections:
        first = ordered[correction.coefficient] / correction.weight
        if correction.operation == DIVIDE and not isfinite(rounded(first, dtype)):
            raise ValueError(
                f"the coefficient {correction.coefficient} of the first step, {first!r}, is not finite in {dtype}"
            )
    return Recipe(rule, dtype, bool(general), ordered, tuple(corrections))


def rounded(value, dtype):
    """The double that dtype holds for value; infinite where it is too large."""
    return value if dtype.itemsize == 8 else array("f", (value,))[0]  # np.float32() would warn, and take 20 times as long


def constants(dtype):
    """The numbers that rules may not spell out: zero, one, tiny (smallest normal), floor (of the centered variance)."""
    return {
        "grad_rescale": 1.0,  # other than 1 for a single step: see rescaled()
        "zero": 0.0,
        "one": 1.0,
        "tiny": float(np.finfo(dtype).tiny),
        "floor": 2.0**-20 if dtype.itemsize == 4 else 2.0**-49,
    }
