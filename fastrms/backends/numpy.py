"""The rules on whole arrays in NumPy: the fallback where C is missing, and the slow reference."""

import os
import threading
from functools import cache

import numpy as np

from .. import arrays, rules
from . import BUSY, NOT_HELD, OK, OVERLAP

CHUNK = 1 << 14  # elements per pass: the temporaries of a rule stay in cache
SEGMENT, BLOCK, LANES = 1 << 18, 4096, 8  # of the norm, as in csrc/norm.c
ZERO = (0.0, -1000)


def available():
    return None


@cache
def compiled(rule, general):
    return rules.compile_rule(rules.RULES[rule], general, select=np.where, sqrt=np.sqrt)


def update(recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place."""
    rule = compiled(recipe.rule, recipe.general)
    with np.errstate(all="ignore"):
        coefficients = [recipe.dtype.type(value) for value in recipe.at(step, grad_scale)]
        for start in range(0, param.size, CHUNK):
            part = slice(start, start + CHUNK)
            buffers = [param[part], *(state[part] for state in states)]
            results = rule(buffers[0], grad[part], *buffers[1:], *coefficients)
            for buffer, result in zip(buffers, results, strict=True):
                buffer[:] = result


def squares(grad):
    """The sum of squares of each segment of grad as (sum, exponent): sum * 2^(2*exponent), in the order of csrc/norm.c."""
    for first in range(0, grad.size, SEGMENT):
        segment = grad[first : first + SEGMENT]
        total = ZERO
        for start in range(0, segment.size, BLOCK):
            total = add(total, block_squares(segment[start : start + BLOCK]))
        yield total


def block_squares(block):
    exponent = block_exponent(block) if block.itemsize == 8 else 0
    block = block.astype(np.float64) * np.ldexp(1.0, -exponent)
    lanes = np.zeros((-(-block.size // LANES), LANES))
    lanes.reshape(-1)[: block.size] = block * block
    lane = np.add.accumulate(lanes)[-1]
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7])), exponent


def add(total, part):
    if part[0] == 0:  # its exponent says nothing
        return total
    most = max(total[1], part[1])
    return np.ldexp(total[0], 2 * (total[1] - most)) + np.ldexp(part[0], 2 * (part[1] - most)), most


def block_exponent(block):
    most = np.fmax.reduce(np.abs(block), initial=0.0)
    return max(int(np.frexp(most)[1]), -1000) if 0 < most < np.inf else 0


class Plan:
    """Bound buffers.  params: Buffers; states: flat arrays per param; sets: index into recipes per param."""

    def __init__(self, params, states, sets, recipes):
        self.params = [param.flat for param in params]
        self.states = [list(state) for state in states]
        self.sets = list(sets)
        self.recipes = list(recipes)
        self.grads = [None] * len(params)
        self.held = False
        self.steps = 0
        self.tensor_steps = [0] * len(params)
        self._locks = {}  # by process: a fork must not inherit one that a thread of the parent holds

    def bound_step(self):
        """A function and its argument for one step of the held gradients; it answers 0 when the step was made."""
        return Plan._step, self

    def _step(self):
        return self.change()[0]

    def change(self, params=None, grads=None, recipes=None, hold=False, run=True, grad_scale=1.0, clip_norm=None):
        """Take over params (Buffers), grads (Buffers, matching ndarrays or None) and recipes (index -> Recipe), and run a
        step.  Returns (status, norm)."""
        lock = self._lock()
        if not lock.acquire(blocking=False):
            return BUSY, None
        try:
            if grads is None and run and not self.held:
                return NOT_HELD, None
            flats = self.params if params is None else [param.flat for param in params]
            if grads is not None:
                grads = [g.reshape(-1) if isinstance(g, np.ndarray) else g and g.flat for g in grads]
                if self._overlap(flats, grads):
                    return OVERLAP, None
                self.grads, self.held = grads, hold
            self.params = flats
            self._set_recipes(recipes)
            return OK, self._run(grad_scale, clip_norm) if run else None
        finally:
            lock.release()

    def _lock(self):
        """Of this process.  Reentrant: a thread that an interrupt kept from releasing it is not locked out."""
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def _overlap(self, params, grads):
        states = [state for states in self.states for state in states]
        flats = [flat for flat in (*params, *grads, *states) if flat is not None]
        try:
            arrays.refuse_overlap([(str(k), arrays.own(flat)) for k, flat in enumerate(flats)])
        except ValueError:
            return True
        return False

    def _set_recipes(self, recipes):
        for index, recipe in (recipes or {}).items():
            self.recipes[index] = recipe

    def _run(self, grad_scale, clip_norm):
        norm = None
        if clip_norm is not None:
            norm = self.norm(grad_scale)
            if not norm <= clip_norm:
                grad_scale = grad_scale * float(np.float64(clip_norm) / norm)
        for k, grad in enumerate(self.grads):
            if grad is not None:
                recipe = self.recipes[self.sets[k]]
                update(recipe, self.tensor_steps[k] + 1, grad_scale, self.params[k], grad, self.states[k])
                self.tensor_steps[k] += 1
        self.steps += 1
        return norm

    def norm(self, scale):
        total = ZERO
        with np.errstate(all="ignore"):
            for grad in self.grads:
                for part in squares(grad) if grad is not None else ():
                    total = add(total, part)
            return float(np.ldexp(np.sqrt(total[0]) * scale, total[1]))

    def copy(self, pairs, recipes=None, steps=None):
        """Copy flat arrays, pairs of (to, from), and with them take over recipes and step counts (the plan's own first).
        Returns (status, the step counts before)."""
        lock = self._lock()
        if not lock.acquire(blocking=False):
            return BUSY, None
        try:
            before = [self.steps, *self.tensor_steps]
            for to, source in pairs:
                to[:] = source
            self._set_recipes(recipes)
            if steps is not None:
                self.steps, *self.tensor_steps = steps
            return OK, before
        finally:
            lock.release()
