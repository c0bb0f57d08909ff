"""A plan held in Python, which the NumPy and the Numba backend share: what is bound, step counts, the norm, forks."""

import math
import os
import threading
import time
import weakref
from functools import partial

import numpy as np

from .. import arrays
from . import BUSY, NONFINITE, NOT_HELD, OK, OVERLAP, STREAMING, Found

SEGMENT, BLOCK, LANES = 1 << 18, 4096, 8  # of the norm, as in csrc/norm.c
ZERO = (0.0, -1000)
PAUSE = 1e-4  # seconds between two looks at who is stepping or forking


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


def nonfinite(grad, scale):
    """How many elements of grad*scale are NaN or infinite or have a square that overflows their dtype."""
    count = 0
    for first in range(0, grad.size, SEGMENT):
        scaled = grad[first : first + SEGMENT] * grad.dtype.type(scale)
        count += scaled.size - int(np.count_nonzero(np.isfinite(scaled * scaled)))
    return count


class Forks:
    """Between steps only: a fork takes the locks of all plans, and gives them back in the parent and in the child."""

    def __init__(self):
        self.plans = weakref.WeakSet()
        self.lock = threading.Lock()
        self.number = 0  # odd while one is under way
        self.locked = []
        os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)

    def add(self, plan):
        with self.lock:
            self.plans.add(plan)

    def _before(self):
        self.lock.acquire()
        self.number += 1
        self.locked = [plan.lock for plan in self.plans]
        for lock in self.locked:
            lock.acquire()

    def _after(self):
        for lock in self.locked:
            lock.release()
        self.locked = []
        self.number += 1
        self.lock.release()


forks = Forks()


class Coefficients:
    """Of tensors of one group that have had equally many steps: rows in memory, one for each step to come."""

    AHEAD = 1024  # rows that are made at once, in 0.3 ms: one at a time costs 5 us each

    def __init__(self, recipe):
        self.recipe = recipe
        self._scale = self._rows = self._row = self._row_at = None
        self._first = self._end = self._start = self._stride = 0

    def address(self, step, grad_scale):
        """Where the coefficients of update number `step` are, rounded once from double; good until the next call."""
        if grad_scale != self._scale or not self._first <= step < self._end:
            self._fill(step, grad_scale)
        return self._start + (step - self._first) * self._stride

    def values(self, step, grad_scale):
        """The same as an array, which is the same object while they do not change."""
        place = self.address(step, grad_scale)
        if place != self._row_at:
            self._row = self._rows[(place - self._start) // self._rows.strides[0]]
            self._row_at = place
        return self._row

    def _fill(self, step, grad_scale):
        """One row where nothing else is known to come: for all steps, or for one with this grad_scale."""
        recipe = self.recipe
        count = self.AHEAD if recipe.ahead and not recipe.fixed and grad_scale == self._scale else 1
        now = recipe.at(step, grad_scale)
        with np.errstate(over="ignore", under="ignore"):
            rows = np.empty((count, len(now)), recipe.dtype)
            rows[:] = now
            for place, column in recipe.ahead(step, count) if count > 1 else ():
                rows[:, place] = column
        self._rows, self._scale, self._first, self._row_at = rows, grad_scale, step, None
        self._start, self._stride = rows.ctypes.data, 0 if recipe.fixed else rows.strides[0]
        if recipe.fixed:
            self._first, self._end = 0, math.inf
        else:
            self._end = step + count


def update(call, given, recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place, by what `call` and `given` of a Plan are."""
    coefficients = Coefficients(recipe)
    call(recipe, param, constant(grad), states)(given(coefficients, step, grad_scale))


def zero(grad, coefficients):
    """In place of an update: nothing but zeros."""
    grad.fill(0)


def constant(array):
    """A view that cannot be written: one type for Numba, whatever it came from."""
    view = array.view()
    view.flags.writeable = False
    return view


class Plan:
    """Bound buffers.  params: Buffers; states: flat arrays per param; sets: index into recipes per param.
    A subclass has call(recipe, param, grad, states) -> function(coefficients): one update of these flat arrays in place, and
    given, a method of Coefficients: the form in which it takes those."""

    def __init__(self, params, states, sets, recipes, nonfinite="propagate", zero_grad=False):
        self.nonfinite, self.zero_grad = nonfinite, zero_grad
        self.params = [param.flat for param in params]
        self.states = [list(state) for state in states]
        self.sets = list(sets)
        self.recipes = list(recipes)
        self.grads = [None] * len(params)
        self.held = False
        self.steps = 0
        self.tensor_steps = [0] * len(params)
        self._prepared, self._kept = None, {}  # tensor -> Coefficients
        self.streaming = self._streamed = False
        self.lock = threading.RLock()  # reentrant: a thread that an interrupt kept from releasing it is not locked out
        forks.add(self)

    own = staticmethod(arrays.own)  # this and the next two differ in device memory

    def flat_grad(self, grad):
        """A gradient as it is held: only read, unless it is to be zeroed."""
        flat = grad.reshape(-1) if isinstance(grad, np.ndarray) else grad.flat
        return flat if self.zero_grad else constant(flat)

    @staticmethod
    def assign(to, source):
        to[:] = source

    def bound_step(self):
        """Two functions and their argument for one step of the held gradients; they answer 0 when the step was made.
        The second also takes the number under which change() was told to hold them."""
        return type(self)._step, type(self)._step, self

    def _step(self, held=None):
        status = self._enter()
        if status:
            return status
        try:
            return self._run(1.0, None)[0] if self.held and held in (None, self.held) else NOT_HELD
        finally:
            self.lock.release()

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        """Take over params (Buffers), grads (Buffers, matching ndarrays or None) and recipes (index -> Recipe), and run a
        step.  Returns (status, Found, or None where nothing was looked for)."""
        status = self._enter()
        if status:
            return status, None
        try:
            if grads is None and run and not self.held:
                return NOT_HELD, None
            flats = self.params if params is None else [param.flat for param in params]
            if grads is not None:
                grads = [g if g is None else self.flat_grad(g) for g in grads]
                if self._overlap(flats, grads):
                    return OVERLAP, None
                self.grads, self.held = grads, hold
            if grads is not None or params is not None:
                self._prepared = None
            self.params = flats
            self._set_recipes(recipes)
            return self._run(grad_scale, clip_norm) if run else (OK, None)
        finally:
            self.lock.release()

    def _enter(self, streamed=False):
        """Take the lock, unless another thread is in a step, or this is not a part of the streamed step that is open; a
        fork is waited for.  Returns a status."""
        number = forks.number
        while not self.lock.acquire(False):
            if number % 2 == 0 and number == forks.number:
                return BUSY
            time.sleep(PAUSE)
            number = forks.number
        if self.streaming == streamed:
            return OK
        self.lock.release()
        return STREAMING

    def stream_open(self):
        """Begin a step that is made tensor by tensor; returns a status."""
        status = self._enter()
        if not status:
            self.streaming, self._streamed = True, False
            self.lock.release()
        return status

    def stream_close(self):
        self.streaming = False

    def stream_step(self, k, param, grad, recipes, grad_scale):
        """Update tensor k from a Buffer, with the param (Buffer or None) and recipes taken over first; returns a status."""
        status = self._enter(streamed=True)
        if status:
            return status
        try:
            self._prepared = None  # the count of this tensor moves
            self._set_recipes(recipes)
            if param is not None:
                self.params[k] = param.flat
            numbers, grad = self._coefficients(self.sets[k], k), self.flat_grad(grad)
            coefficients = self.given(numbers, self.tensor_steps[k] + 1, grad_scale)
            self.call(numbers.recipe, self.params[k], grad, self.states[k])(coefficients)
            if self.zero_grad:
                grad.fill(0)
            self.tensor_steps[k] += 1
            self.steps += not self._streamed
            self._streamed = True
            return OK
        finally:
            self.lock.release()

    def _overlap(self, params, grads):
        states = [state for states in self.states for state in states]
        flats = [flat for flat in (*params, *grads, *states) if flat is not None]
        try:
            arrays.refuse_overlap([(str(k), self.own(flat)) for k, flat in enumerate(flats)])
        except ValueError:
            return True
        return False

    def _set_recipes(self, recipes):
        for index, recipe in (recipes or {}).items():
            self.recipes[index] = recipe
        if recipes:
            self._prepared = None

    def _run(self, grad_scale, clip_norm):
        """(status, Found or None)"""
        looks = clip_norm is not None or self.nonfinite != "propagate"
        found = self._look(grad_scale, clip_norm) if looks else None
        if looks and found.nonfinite:
            if self.zero_grad and self.nonfinite == "skip":
                for grad in filter(lambda grad: grad is not None, self.grads):
                    grad.fill(0)
            return NONFINITE, found
        if clip_norm is not None and not found.grad_norm <= clip_norm:
            grad_scale = grad_scale * float(np.float64(clip_norm) / found.grad_norm)
        tensors, groups = self._prepared or self._prepare()
        ready, counts = [], self.tensor_steps
        for first, given, calls in groups:  # before anything is written: an own rule may fail
            ready.append((calls, given(counts[first] + 1, grad_scale)))
        for calls, coefficients in ready:
            for call in calls:
                call(coefficients)
        for k in tensors:
            counts[k] += 1
        self.steps += 1
        return OK, found

    def _look(self, grad_scale, clip_norm):
        """Found: everything about the gradients that must be known before the first write."""
        norm = None if clip_norm is None else self.norm(grad_scale)
        if self.nonfinite == "propagate":
            return Found(norm, None, -1)
        with np.errstate(all="ignore"):
            counts = [0 if grad is None else nonfinite(grad, grad_scale) for grad in self.grads]
        return Found(norm, sum(counts), next((k for k, count in enumerate(counts) if count), -1))

    def _prepare(self):
        """(tensors with a gradient, (tensor, what gives its coefficients, what to call) for each group and step count)"""
        tensors = [k for k, grad in enumerate(self.grads) if grad is not None]
        groups = {}  # equal counts stay equal
        for k in tensors:
            recipe, alike = self.recipes[self.sets[k]], (self.sets[k], self.tensor_steps[k])
            if alike not in groups:
                groups[alike] = k, partial(self.given, self._coefficients(self.sets[k], k)), []
            _, _, calls = groups[alike]
            calls.append(self.call(recipe, self.params[k], self.grads[k], self.states[k]))
            if self.zero_grad:
                calls.append(partial(zero, self.grads[k]))
        self._prepared = tensors, list(groups.values())
        return self._prepared

    def _coefficients(self, index, tensor):
        """Those that this tensor had when it was the first with its step count, else new ones."""
        kept = self._kept.get(tensor)
        if kept is None or kept.recipe is not self.recipes[index]:
            kept = self._kept[tensor] = Coefficients(self.recipes[index])
        return kept

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
        status = self._enter()
        if status:
            return status, None
        try:
            before = [self.steps, *self.tensor_steps]
            for to, source in pairs:
                self.assign(to, source)
            self._set_recipes(recipes)
            if steps is not None:
                self.steps, *self.tensor_steps = steps
                self._prepared = None
            return OK, before
        finally:
            self.lock.release()

    def steps_of(self, k):
        return self.tensor_steps[k]
