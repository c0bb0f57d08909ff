"""The rules on whole arrays in NumPy: the fallback where C is missing, and the slow reference."""

import os
import threading
from functools import cache

import numpy as np

from .. import arrays, rules

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
        self.steps = 0
        self.tensor_steps = [0] * len(params)
        self._ready = False
        self._locks = {}  # by process: a fork must not inherit one that a thread of the parent holds

    def acquire(self):
        return self._lock().acquire(blocking=False)

    def release(self):
        self._lock().release()

    def _lock(self):
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def set_recipe(self, index, recipe):
        self.recipes[index] = recipe

    def set_param(self, k, buffer):
        self.params[k] = buffer.flat

    def set_grads(self, grads, buffers):
        """Take over the gradients (Buffers, or ndarrays that match already, or None).  True: some buffers overlap."""
        flats = [grad.reshape(-1) if isinstance(grad, np.ndarray) else grad and grad.flat for grad in grads]
        own = [(f"grads {k}", arrays.own(flat)) for k, flat in enumerate(flats) if flat is not None]
        try:
            arrays.refuse_overlap([*buffers(), *own])
        except ValueError:
            return True
        self.grads = flats
        return False

    def run(self, grad_scale=1.0, clip_norm=None):
        """One step over all tensors that have a gradient; the norm of the gradients if clip_norm asks for it."""
        norm = None
        if clip_norm is not None:
            norm = self.norm() * grad_scale
            if not norm <= clip_norm:
                grad_scale = grad_scale * float(np.float64(clip_norm) / norm)
        for k, grad in enumerate(self.grads):
            if grad is not None:
                recipe = self.recipes[self.sets[k]]
                update(recipe, self.tensor_steps[k] + 1, grad_scale, self.params[k], grad, self.states[k])
                self.tensor_steps[k] += 1
        self.steps += 1
        return norm

    def norm(self):
        total = ZERO
        with np.errstate(all="ignore"):
            for grad in self.grads:
                for part in squares(grad) if grad is not None else ():
                    total = add(total, part)
            return float(np.ldexp(np.sqrt(total[0]), total[1]))

    def set_ready(self, ready):
        """Whether the gradients that the plan points to are held, so that a step may read them at once."""
        self._ready = ready

    def bound_step(self):
        """A function and its argument for one step of the bound buffers; it answers 0 when the step was made."""
        return Plan._step, self

    def _step(self):
        if not self._ready or not self.acquire():
            return 1
        try:
            self.run()
        finally:
            self.release()
        return 0

    def set_steps(self, steps, tensor_steps):
        self.steps = steps
        self.tensor_steps = list(tensor_steps)
