"""A plan held in Python, which the NumPy and the Numba backend share: what is bound, step counts, the norm, forks."""

import math
import os
import threading
import time
import weakref

import numpy as np

from ..memory import host
from . import BUSY, NONFINITE, NOT_HELD, OK, OVERLAP, STREAMING, Found

SEGMENT, BLOCK, LANES = 1 << 18, 4096, 8  # of the norm, as in csrc/norm.c
ZERO = (0.0, -1000)
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
PAUSE = 1e-4  # seconds between two looks at who is stepping or forking


def squares(grad):
    """The sum of squares of each segment of grad as (sum, exponent): sum * 2^(2*exponent), in the order of csrc/norm.c."""
    for first in range(0, grad.size, SEGMENT):
        segment = grad[first : first + SEGMENT]
        total = ZERO
        for start in range(0, segment.size, BLOCK):
            total = add(total, block_squares(segment[start : start + BLOCK]))
        yield total


def sum_of_squares(grads):
    """Of all gradients, None among them left out."""
    total = ZERO
    for grad in grads:
        for part in squares(grad) if grad is not None else ():
            total = add(total, part)
    return total


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
        if hasattr(os, "register_at_fork"):  # else this system has no fork
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
    """Of the updates to come, rounded once from double: a row for each, or one for all."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.rows = self._scale = None
        self.first = self.end = 0

    def have(self, step, grad_scale, ahead):
        """Make the row of update number `step`, unless it is there; with it at most `ahead` rows, where those are known."""
        known = grad_scale == self._scale
        if known and self.first <= step < self.end:
            return
        recipe = self.recipe
        several = recipe.ahead and not recipe.fixed and known  # not for a scale that comes but once
        count = min(8 * len(self.rows), ahead) if several else 1
        now = recipe.at(step, grad_scale)
        with np.errstate(over="ignore", under="ignore"):
            rows = np.empty((count, len(now)), recipe.dtype)
            rows[:] = now
            for place, column in recipe.ahead(step, count) if count > 1 else ():
                rows[:, place] = column
        of = (0, math.inf) if recipe.fixed else (step, step + count)
        self.rows, self._scale, (self.first, self.end) = rows, grad_scale, of  # no call between: Ctrl-C comes in calls


class Update:
    """Of tensors that share their coefficients and have missed equally many steps of the plan.  tensors: (param, grad,
    states) of each.  A subclass has take(), told of new rows, and run(number): step number `number` of the plan, by row
    (number - first) * stride of the coefficients."""

    def __init__(self, coefficients, missed, tensors):
        self.coefficients, self.missed, self.tensors = coefficients, missed, tensors
        self.taken = None  # rows

    def ready(self, number, grad_scale, ahead=1):
        """Have the coefficients of that step, before anything is written: an own rule may fail.  The first step for which
        this must be asked again."""
        coefficients = self.coefficients
        coefficients.have(number - self.missed, grad_scale, ahead)
        if self.taken is not coefficients.rows:
            self.first, self.stride = coefficients.first + self.missed, 0 if coefficients.recipe.fixed else 1
            self.take()
            self.taken = coefficients.rows  # not sooner: Ctrl-C may come before
        return coefficients.end + self.missed


def split(value, exponent):
    """value * 2^exponent as (grad_scale, grad_rescale): halves of a small power of two, so that neither is too small for
    float32."""
    whole = float(np.ldexp(value, exponent))
    if value == 0 or not abs(whole) < SMALLEST_NORMAL:  # NaN passes
        return whole, 1.0
    value, more = math.frexp(value)
    exponent += more
    half = int(exponent / 2)  # towards zero, as in C
    return math.ldexp(value, half), math.ldexp(1.0, exponent - half)


def clipped_scale(grad_scale, clip_norm, squares):
    """grad_scale * (clip_norm / norm) as split() has it.  Powers of two are kept apart, since the norm of finite gradients
    may be too large for a double.  A NaN norm makes the factor NaN, as every framework has it."""
    with np.errstate(all="ignore"):
        clip_norm, exponent = math.frexp(clip_norm)
        norm = np.sqrt(squares[0]) * grad_scale
        return split(grad_scale * float(clip_norm / norm), exponent - int(squares[1]))


def rows_each(count):
    """How many rows of coefficients each of so many holders may make at once: one at a time costs 5 us, of 4096 each 0.1 us;
    so many take up to half a megabyte."""
    return max(16, 4096 // max(1, count))


def update(kind, recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place, by an Update of this kind."""
    made = kind(Coefficients(recipe), 0, [(param, constant(grad), states)])
    made.ready(step, grad_scale)
    made.run(step)


def constant(array):
    """A view that cannot be written: one type for Numba, whatever it came from."""
    view = array.view()
    view.flags.writeable = False
    return view


class Plan:
    """Bound buffers.  params: Buffers; states: flat arrays per param; sets: index into recipes per param.
    A subclass has the kind of its Updates."""

    def __init__(self, params, states, sets, recipes, nonfinite="propagate", zero_grad=False):
        self.nonfinite, self.zero_grad = nonfinite, zero_grad
        self.params = [param.flat for param in params]
        self.states = [list(state) for state in states]
        self.sets = list(sets)
        self.recipes = list(recipes)
        self.grads = [None] * len(params)
        self.held = False
        self.steps = 0
        self.missed = [0] * len(params)  # steps that a tensor had no gradient for: mostly none, so a step counts but once
        self._kept = {}  # tensor -> Coefficients
        self._stale()
        self.streaming = self._streamed = False
        self.lock = threading.RLock()  # reentrant: a thread that an interrupt kept from releasing it is not locked out
        forks.add(self)

    ours = staticmethod(host.ours)  # this and the next two differ in device memory

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

    def _stale(self):
        """The next step has other updates than the last."""
        self._updates = None
        self._until = 0  # the first step for which coefficients must be made
        self._plain_until = 0  # the first step for which anything but the updates must be done

    def _step(self, held=None):
        if not self.lock.acquire(False) and not self._acquire():
            return BUSY
        try:
            number = self.steps + 1
            if number < self._plain_until and (held is None or held == self.held):  # as below, in half the time
                for run in self._runs:
                    run(number)
                self.steps = number
                return OK
            if self.streaming:
                return STREAMING
            if held != self.held and (held is not None or not self.held):
                return NOT_HELD
            return self._run(1.0, None)[0]
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
                self._stale()
            self.params = flats
            self._set_recipes(recipes)
            return self._run(grad_scale, clip_norm) if run else (OK, None)
        finally:
            self.lock.release()

    def _enter(self, streamed=False):
        """Take the lock, unless another thread is in a step, or this is not a part of the streamed step that is open; a
        fork is waited for.  Returns a status."""
        if not self._acquire():
            return BUSY
        if self.streaming == streamed:
            return OK
        self.lock.release()
        return STREAMING

    def _acquire(self):
        """Take the lock, unless another thread is in a step; a fork is waited for.  Whether it was taken."""
        number = forks.number
        while not self.lock.acquire(False):
            if number % 2 == 0 and number == forks.number:
                return False
            time.sleep(PAUSE)
            number = forks.number
        return True

    def stream_open(self):
        """Begin a step that is made tensor by tensor; returns a status."""
        status = self._enter()
        if not status:
            self.streaming, self._streamed = True, False
            self._stale()
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
            self._stale()  # the count of this tensor moves
            self._set_recipes(recipes)
            if param is not None:
                self.params[k] = param.flat
            grad = self.flat_grad(grad)
            update = self._update([k], [grad])
            update.ready(self.steps + 1, grad_scale, rows_each(len(self.params)))
            update.run(self.steps + 1)
            if self.zero_grad:
                grad.fill(0)
            if not self._streamed:
                later = [missed + 1 for missed in self.missed]
                self.steps, self.missed, self._streamed = self.steps + 1, later, True  # at once
            self.missed[k] -= 1
            return OK
        finally:
            self.lock.release()

    def _overlap(self, params, grads):
        states = [state for states in self.states for state in states]
        flats = [flat for flat in (*params, *grads, *states) if flat is not None]
        try:
            host.refuse_overlap([(str(k), self.ours(flat)) for k, flat in enumerate(flats)])
        except ValueError:
            return True
        return False

    def _set_recipes(self, recipes):
        for index, recipe in (recipes or {}).items():
            self.recipes[index] = recipe
        if recipes:
            self._stale()

    def _run(self, grad_scale, clip_norm):
        """(status, Found or None)"""
        found, grad_rescale = None, 1.0
        if clip_norm is not None or self.nonfinite != "propagate":
            found, squares = self._look(grad_scale, clip_norm)
            if clip_norm is not None and not found.grad_norm <= clip_norm:
                grad_scale, grad_rescale = clipped_scale(grad_scale, clip_norm, squares)
            if found.nonfinite:
                if self.zero_grad and self.nonfinite == "skip":
                    self._zero_grads()
                return NONFINITE, found
        number = self.steps + 1
        if number >= self._until or grad_scale != self._scale:
            self._prepare(number, grad_scale)
        for run in self._runs if grad_rescale == 1 else self._rescaled(number, grad_scale, grad_rescale):
            run(number)
        if self.zero_grad:
            self._zero_grads()
        self._count(number)
        return OK, found

    def _count(self, number):
        missed = self.missed.copy() if self._absent else self.missed
        for k in self._absent:
            missed[k] += 1
        self.missed, self.steps = missed, number  # at once: Ctrl-C comes in loops and calls

    def _zero_grads(self):
        for grad in self.grads:
            if grad is not None:
                grad.fill(0)

    def _look(self, grad_scale, clip_norm):
        """Everything about the gradients that must be known before the first write: Found, and the sum of squares."""
        squares = norm = None
        with np.errstate(all="ignore"):
            if clip_norm is not None:
                squares = sum_of_squares(self.grads)
                norm = float(np.ldexp(np.sqrt(squares[0]) * grad_scale, squares[1]))
            if self.nonfinite == "propagate":
                return Found(norm, None, -1), squares
            counts = [0 if grad is None else nonfinite(grad, grad_scale) for grad in self.grads]
        return Found(norm, sum(counts), next((k for k, count in enumerate(counts) if count), -1)), squares

    def _prepare(self, number, grad_scale):
        """Everything for step `number`, and as many after it as are known."""
        self._until = self._plain_until = 0
        if self._updates is None:
            self._absent = [k for k, grad in enumerate(self.grads) if grad is None]
            updates = [self._update(members, [self.grads[k] for k in members]) for members in self._groups()]
            self._runs = [update.run for update in updates]
            self._updates = updates  # last: Ctrl-C may come before
        ahead = rows_each(len(self._updates))
        until = min((update.ready(number, grad_scale, ahead) for update in self._updates), default=math.inf)
        self._until, self._scale = until, grad_scale
        if self.held and grad_scale == 1.0 and self.nonfinite == "propagate" and not (self._absent or self.zero_grad):
            self._plain_until = until

    def _groups(self):
        """The tensors with a gradient that share their coefficients: equal counts stay equal."""
        groups = {}
        for k, grad in enumerate(self.grads):
            if grad is not None and grad.size:
                index = self.sets[k]
                groups.setdefault((index, None if self.recipes[index].fixed else self.missed[k]), []).append(k)
        return groups.values()

    def _rescaled(self, number, grad_scale, grad_rescale):
        """The runs of a step whose gradients have a second factor, by recipes and updates that serve this step alone."""
        updates = []
        for members in self._groups():
            recipe = self.recipes[self.sets[members[0]]].rescaled(grad_rescale)
            tensors = [(self.params[k], self.grads[k], self.states[k]) for k in members]
            updates.append(self.kind(Coefficients(recipe), self.missed[members[0]], tensors))
        for update in updates:
            update.ready(number, grad_scale)
        return [update.run for update in updates]

    def _update(self, members, grads):
        first = members[0]
        tensors = [(self.params[k], grad, self.states[k]) for k, grad in zip(members, grads, strict=True)]
        return self.kind(self._coefficients(self.sets[first], first), self.missed[first], tensors)

    def _coefficients(self, index, tensor):
        """Those that this tensor had when it was the first with its step count, else new ones."""
        kept = self._kept.get(tensor)
        if kept is None or kept.recipe is not self.recipes[index]:
            kept = self._kept[tensor] = Coefficients(self.recipes[index])
        return kept

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
                self._stale()
                missed = [steps[0] - count for count in steps[1:]]
                self.steps, self.missed = steps[0], missed  # at once
            return OK, before
        finally:
            self.lock.release()

    @property
    def tensor_steps(self):
        return [self.steps - missed for missed in self.missed]

    def steps_of(self, k):
        return self.steps - self.missed[k]
