"""A plan held in Python, which the NumPy and the Numba backend share: what is bound, step counts, the norm, forks."""

import os
import threading
import time

import numpy as np

from .. import arrays, recipes
from . import BUSY, NOT_HELD, OK, OVERLAP

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


class Forks:
    """Between steps only: a fork waits for the steps that other threads are in, and new steps wait for the fork."""

    def __init__(self):
        self.stepping = set()  # threads that are in a step
        self.forking = threading.Lock()
        os.register_at_fork(before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child)

    def enter(self):
        me = threading.get_ident()
        self.stepping.add(me)
        while self.forking.locked():
            self.stepping.discard(me)
            time.sleep(PAUSE)
            self.stepping.add(me)

    def leave(self):
        self.stepping.discard(threading.get_ident())

    def _before(self):
        self.forking.acquire()
        me = {threading.get_ident()}
        while self.stepping - me:
            time.sleep(PAUSE)

    def _in_parent(self):
        self.forking.release()

    def _in_child(self):
        self.forking = threading.Lock()
        self.stepping = set()


forks = Forks()


def constant(array):
    """A view that cannot be written: one type for Numba, whatever it came from."""
    view = array.view()
    view.flags.writeable = False
    return view


class Plan:
    """Bound buffers.  params: Buffers; states: flat arrays per param; sets: index into recipes per param.
    A subclass gives updater(recipe) -> function(coefficients, param, grad, states), one update of flat arrays in place."""

    def __init__(self, params, states, sets, recipes):
        self.params = [param.flat for param in params]
        self.states = [list(state) for state in states]
        self.sets = list(sets)
        self.recipes = list(recipes)
        self.grads = [None] * len(params)
        self.held = False
        self.steps = 0
        self.tensor_steps = [0] * len(params)
        self._ready = {}  # coefficients that may also hold for the next step
        self._updaters = {}
        self._locks = {}  # by process: a fork must not inherit one that a thread of the parent holds

    own = staticmethod(arrays.own)
    finished = staticmethod(constant)  # coefficients

    @staticmethod
    def read_only(grad):
        return constant(grad.reshape(-1) if isinstance(grad, np.ndarray) else grad.flat)

    @staticmethod
    def assign(to, source):
        to[:] = source

    def _taken(self):
        """Other buffers or step counts than before."""

    def bound_step(self):
        """A function and its argument for one step of the held gradients; it answers 0 when the step was made."""
        return type(self)._step, self

    def _step(self):
        lock = self._lock()
        if not lock.acquire(blocking=False):
            return BUSY
        try:
            forks.enter()
            if not self.held:
                return NOT_HELD
            self._run(1.0, None)
            return OK
        finally:
            forks.leave()
            lock.release()

    def change(self, params=None, grads=None, recipes=None, hold=False, run=True, grad_scale=1.0, clip_norm=None):
        """Take over params (Buffers), grads (Buffers, matching ndarrays or None) and recipes (index -> Recipe), and run a
        step.  Returns (status, norm)."""
        lock = self._lock()
        if not lock.acquire(blocking=False):
            return BUSY, None
        try:
            forks.enter()
            if grads is None and run and not self.held:
                return NOT_HELD, None
            flats = self.params if params is None else [param.flat for param in params]
            if grads is not None:
                grads = [g if g is None else self.read_only(g) for g in grads]
                if self._overlap(flats, grads):
                    return OVERLAP, None
                self.grads, self.held = grads, hold
            self.params = flats
            if params is not None or grads is not None:
                self._taken()
            self._set_recipes(recipes)
            return OK, self._run(grad_scale, clip_norm) if run else None
        finally:
            forks.leave()
            lock.release()

    def _lock(self):
        """Of this process.  Reentrant: a thread that an interrupt kept from releasing it is not locked out."""
        return self._locks.get(os.getpid()) or self._locks.setdefault(os.getpid(), threading.RLock())

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
            self._updaters.pop(index, None)
        if recipes:
            self._ready = {}

    def _run(self, grad_scale, clip_norm):
        norm = None
        if clip_norm is not None:
            norm = self.norm(grad_scale)
            if not norm <= clip_norm:
                grad_scale = grad_scale * float(np.float64(clip_norm) / norm)
        updates = [self._update(k, grad, grad_scale) for k, grad in enumerate(self.grads) if grad is not None]
        for k, updater, arguments in updates:  # made before anything is written: compiling or an own rule may fail
            if self.params[k].size:
                updater(*arguments)
            self.tensor_steps[k] += 1
        self.steps += 1
        if len(self._ready) > len(self.recipes):
            self._ready = {}
        return norm

    def _update(self, k, grad, grad_scale):
        """(k, function, arguments) of the next update of tensor k."""
        index = self.sets[k]
        updater = self._updaters.get(index)
        if updater is None:
            updater = self._updaters[index] = self.updater(self.recipes[index])
        return k, updater, (self._coefficients(k, grad_scale), self.params[k], grad, self.states[k])

    def _coefficients(self, k, grad_scale):
        """Of the next update of tensor k; tensors of one group that have had equally many steps share them."""
        recipe = self.recipes[self.sets[k]]
        key = (self.sets[k], None if recipe.unchanging else self.tensor_steps[k], grad_scale)
        if key not in self._ready:
            self._ready[key] = self.finished(recipes.ready(recipe, self.tensor_steps[k] + 1, grad_scale))
        return self._ready[key]

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
            forks.enter()
            before = [self.steps, *self.tensor_steps]
            for to, source in pairs:
                self.assign(to, source)
            self._set_recipes(recipes)
            if steps is not None:
                self.steps, *self.tensor_steps = steps
                self._taken()
            return OK, before
        finally:
            forks.leave()
            lock.release()
