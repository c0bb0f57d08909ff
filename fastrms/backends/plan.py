"""The plan in Python, for the NumPy, the Numba and the CUDA backend: csrc/plan.c as methods, mostly of the same names."""

import math
import threading
import time
from bisect import bisect_left
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import backends, formats
from ..memory import host
from ..storage import FLOAT, Storage, of_buffer
from . import BUSY, NONFINITE, NOT_HELD, OK, OVERLAP, STREAMING, norm
from .coefficients import Coefficients, rows_each
from .float_mode import default_mode
from .forks import PAUSE, forks

TILE = 1 << 14  # elements that are decoded at a time: whole blocks of every format


class Update:
    """Updates the tensors that share their coefficients and have missed the same number of steps of the plan.

    coefficients: a Coefficients; missed: that number; tensors: a list of (param, grad, states).  A subclass has take(),
    which is called when there are new rows of coefficients, and run(number), which makes step number `number` of the plan
    with the coefficients of row (number - first) * stride.
    """

    def __init__(self, coefficients, missed, tensors):
        self.tensors = tensors
        self.use(coefficients, missed)

    def use(self, coefficients, missed):
        self.coefficients, self.missed = coefficients, missed
        self.taken = None  # the rows that take() has seen

    def make_coefficients(self, number, grad_scale, most_rows=1):
        """Make the coefficients of step `number` of the plan, and those of later steps, at most `most_rows` rows in all.
        This comes before anything is written, since an own rule may fail.  Returns the first step for which it must be
        called again."""
        coefficients = self.coefficients
        coefficients.have(number - self.missed, grad_scale, most_rows)
        if self.taken is not coefficients.rows:
            self.first, self.stride = coefficients.first + self.missed, 0 if coefficients.recipe.fixed else 1
            self.take()
            self.taken = coefficients.rows  # last: Ctrl-C may come before
        return coefficients.end + self.missed


class Part(NamedTuple):
    """A buffer of one tensor: its Format, the flat array, and the remainders of a split parameter."""

    format: Any
    stored: Any
    low: Any = None


class StoredTensor:
    """A tensor whose buffers are stored in formats.  storage: its Storage or None; missed: the steps of the plan that
    it has missed."""

    def __init__(self, storage, missed, param, grad, states):
        made = storage or Storage(FLOAT, (FLOAT,) * len(states))
        self.storage, self.missed, self.size = made, missed, param.size
        has_floats = made.master == "float32"
        updated = Part(FLOAT, made.low) if has_floats else Part(made.param, param, made.low)
        self.written = [updated, *map(Part, made.states, states)]  # in the order of the streams of random numbers
        self.read = [updated, Part(of_buffer(grad), grad), *self.written[1:]]
        self.copies = [Part(made.param, param)] if has_floats else []
        if made.copy is not None:
            self.copies.append(Part(made.copy_format, made.copy.flat))

    def decode(self, begin, end, rows):
        """Write the elements [begin, end) of the parameter, the gradient and the states into rows of floats."""
        for part, row in zip(self.read, rows, strict=True):
            row[:] = formats.decode(part.format, part.stored, self.size, part.low, begin, end)

    def encode(self, begin, rows, number):
        """Store the rows that step `number` of the plan has updated, from the element `begin` on."""
        param, _, *states = rows
        for stream, (part, row) in enumerate(zip(self.written, (param, *states), strict=True)):
            self._store(part, row, begin, self._rounding(part, number, stream, begin))
        for part in self.copies:
            self._store(part, param, begin, formats.Rounding())

    def _rounding(self, part, number, stream, begin):
        if part.format is FLOAT or not self.storage.stochastic:
            return formats.Rounding()
        key = formats.key(self.storage.seed, number - self.missed, stream)
        return formats.Rounding(True, key, self.storage.origin + begin)

    def _store(self, part, row, begin, rounding):
        formats.encode(part.format, row, part.stored, self.size, rounding, part.low, begin)


class TiledUpdate:
    """What an Update is, for StoredTensors: it decodes tile after tile to rows of floats, which an Update of `kind` updates,
    and encodes what has changed."""

    def __init__(self, kind, coefficients, missed, tensors):
        self.tensors = tensors
        sizes = {min(TILE, tensor.size - begin) for tensor in tensors for begin in range(0, tensor.size, TILE)}
        rows = [np.empty(max(sizes, default=0), np.float32) for _ in tensors[0].read]
        self.rows = {size: [row[:size] for row in rows] for size in sizes}
        self.updates = {
            size: kind(coefficients, missed, [(param, constant(grad), states)])
            for size, (param, grad, *states) in self.rows.items()
        }

    def make_coefficients(self, number, grad_scale, most_rows=1):
        made_until = (update.make_coefficients(number, grad_scale, most_rows) for update in self.updates.values())
        return min(made_until, default=math.inf)

    def run(self, number):
        with default_mode():
            for tensor in self.tensors:
                for begin in range(0, tensor.size, TILE):
                    self._run_tile(tensor, begin, min(TILE, tensor.size - begin), number)

    def _run_tile(self, tensor, begin, size, number):
        rows = self.rows[size]
        tensor.decode(begin, begin + size, rows)
        self.updates[size].run(number)
        tensor.encode(begin, rows, number)


def update(kind, recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place, by an Update of this kind."""
    made = kind(Coefficients(recipe), 0, [(param, constant(grad), states)])
    made.make_coefficients(step, grad_scale)
    made.run(step)


def constant(array):
    """A read-only view of an array that an update must not write."""
    view = array.view()
    view.flags.writeable = False
    return view


class Plan(backends.Plan):
    """A backends.Plan in Python.  A subclass has `kind`, the class of its Updates."""

    def __init__(self, params, states, recipe_of, recipes, nonfinite="propagate", zero_grad=False, storages=None):
        self.nonfinite, self.zero_grad = nonfinite, zero_grad
        self.params = [param.flat for param in params]
        self.states = [list(state) for state in states]
        self.storages = storages or [None] * len(params)
        self.recipe_of = list(recipe_of)
        self.recipes = list(recipes)
        self.grads = [None] * len(params)
        self.held = False
        self.exchange = None  # a shards.Exchange, where the tensors are spread over several ranks
        self.steps = 0
        self.missed = [0] * len(params)  # steps without a gradient, by tensor: mostly 0, and then a step raises one count
        self._kept = {}  # index of a tensor -> Coefficients, see _coefficients()
        self._occupied = None  # sorted starts and ends of parameters and states
        self._stale()
        self.streaming = self._streamed = False
        self.lock = threading.RLock()  # reentrant: a thread that an interrupt kept from releasing it can go on
        forks.add(self)

    # a subclass for device memory replaces these

    ours = staticmethod(host.ours)

    def flat_grad(self, grad):
        """The flat gradient that the plan holds; it is read-only, unless a step is to zero it."""
        flat = grad.reshape(-1) if isinstance(grad, np.ndarray) else grad.flat
        return flat if self.zero_grad else constant(flat)

    @staticmethod
    def assign(to, source):
        to[:] = source

    def _lies_as_before(self, params, grads):
        """Whether the updates of the last step serve these parameters and gradients, too: never, as they hold the arrays."""
        return False

    def grad_dtype(self, k):
        """The dtype of the gradient of tensor k that the plan took over last, None where it has none."""
        return None if self.grads[k] is None else self.grads[k].dtype

    def join(self, exchange):
        self.exchange = exchange

    # a step

    def _stale(self):
        """Note that the next step needs other updates than the last."""
        self._updates = None
        self._until = 0  # the first step for which coefficients must be made
        self._plain_until = 0  # the first step that is not plain: it needs more than to run the updates

    def _make_updates(self, number, grad_scale):
        """Make the updates of step `number`, and the coefficients for it and for steps after it where they are known."""
        self._until = self._plain_until = 0
        if self._updates is None:
            self._absent = [k for k, grad in enumerate(self.grads) if grad is None]
            updates = [self._update(self._coefficients(members[0]), members, self.grads) for members in self._groups()]
            self._runs = [update.run for update in updates]
            self._updates = updates  # last: Ctrl-C may come before
        most_rows = rows_each(len(self._updates))
        made_until = (update.make_coefficients(number, grad_scale, most_rows) for update in self._updates)
        until = min(made_until, default=math.inf)
        self._until, self._scale = until, grad_scale
        if self.held and grad_scale == 1.0 and self.nonfinite == "propagate" and not (self._absent or self.zero_grad):
            self._plain_until = until

    def _groups(self):
        """The indices of the tensors with a gradient, in lists that share an Update.  Where coefficients change from step to
        step, these have the same count of missed steps, which grows for all of them or for none.  Tensors that are stored in
        formats are apart from others."""
        groups = {}
        for k, grad in enumerate(self.grads):
            if grad is not None and grad.size:
                index = self.recipe_of[k]
                missed = None if self.recipes[index].fixed else self.missed[k]
                groups.setdefault((index, missed, self._stored_as(k, grad)), []).append(k)
        return groups.values()

    def _stored_as(self, k, grad):
        """Whether tensor k is updated tile by tile, through floats; in a subclass how."""
        return self.storages[k] is not None or of_buffer(grad) is not FLOAT

    def _update(self, coefficients, members, grads):
        """An Update of the tensors with the indices `members`, which are of one group; grads: index -> gradient."""
        tensors, missed = [(self.params[k], grads[k], self.states[k]) for k in members], self.missed[members[0]]
        if not self._stored_as(members[0], grads[members[0]]):
            return self.kind(coefficients, missed, tensors)
        stored = [StoredTensor(self.storages[k], self.missed[k], *row) for k, row in zip(members, tensors, strict=True)]
        return TiledUpdate(self.kind, coefficients, missed, stored)

    def _coefficients(self, tensor):
        """The Coefficients that are kept for a group of tensors under the index of its first one, or new ones."""
        kept, recipe = self._kept.get(tensor), self.recipes[self.recipe_of[tensor]]
        if kept is None or kept.recipe is not recipe:
            kept = self._kept[tensor] = Coefficients(recipe)
        return kept

    def _rescaled(self, number, grad_scale, grad_rescale):
        """The functions that run a step whose gradients have a second factor; its recipes and updates serve it alone."""
        updates = []
        for members in self._groups():
            recipe = self.recipes[self.recipe_of[members[0]]].rescaled(grad_rescale)
            updates.append(self._update(Coefficients(recipe), members, self.grads))
        for update in updates:
            update.make_coefficients(number, grad_scale)
        return [update.run for update in updates]

    def _zero_gradients(self):
        for grad in self.grads:
            if grad is not None:
                grad.fill(0)

    def _count(self, number):
        missed = self.missed.copy() if self._absent else self.missed
        for k in self._absent:
            missed[k] += 1
        self.missed, self.steps = missed, number  # in one statement: Ctrl-C comes in loops and calls

    def _run(self, grad_scale, clip_norm):
        """Make a step from the gradients that are there; returns (status, Found or None)."""
        found, grad_rescale = None, 1.0
        if clip_norm is not None or self.nonfinite != "propagate":
            scan = norm.scan if self.exchange is None else partial(norm.scan_shards, self.exchange)
            found, squares = scan(self.grads, grad_scale, clip_norm, self.nonfinite != "propagate")
            if found.nonfinite:
                if self.zero_grad and self.nonfinite == "skip":
                    self._zero_gradients()
                return NONFINITE, found
            grad_scale, grad_rescale = norm.clipped_scale(grad_scale, clip_norm, found.grad_norm, squares)
        number = self.steps + 1
        if number >= self._until or grad_scale != self._scale:
            self._make_updates(number, grad_scale)
        for run in self._runs if grad_rescale == 1 else self._rescaled(number, grad_scale, grad_rescale):
            run(number)
        if self.zero_grad:
            self._zero_gradients()
        self._count(number)
        return OK, found

    def _acquire_part(self):
        """Take the lock, and wait for a fork that has it; BUSY where another thread is in a step.  Returns a status."""
        number = forks.number
        while not self.lock.acquire(False):
            if number % 2 == 0 and number == forks.number:
                return BUSY
            time.sleep(PAUSE)
            number = forks.number
        return OK

    def _acquire(self):
        """Take the lock as _acquire_part() does; STREAMING where a streamed step is open.  Returns a status."""
        status = self._acquire_part()
        if status or not self.streaming:
            return status
        self.lock.release()
        return STREAMING

    def bound_step(self):
        return type(self)._step, type(self)._step, self

    def _step(self, held=None):
        if not self.lock.acquire(False) and self._acquire_part():
            return BUSY
        try:
            number = self.steps + 1
            if number < self._plain_until and (held is None or held == self.held):  # the usual case, in half the time
                for run in self._runs:
                    run(number)
                self.steps = number
                return OK
            if self.streaming:
                return STREAMING
            if not self.held or held not in (None, self.held):
                return NOT_HELD
            return self._run(1.0, None)[0]
        finally:
            self.lock.release()

    def _would_overlap(self, params, grads):
        """Whether any two buffers of a step would share a byte, with these parameters and gradients."""
        flats = (*params, *grads, *self._beside_params())
        return host.overlap([self.ours(flat) for flat in flats if flat is not None]) is not None

    def _beside_params(self):
        """The flat arrays that belong to parameters: states, the lower bits of parameters or their floats, and copies."""
        flats = [state for states in self.states for state in states]
        for storage in self.storages:
            if storage is not None:
                flats += [storage.low, storage.copy and storage.copy.flat]
        return [flat for flat in flats if flat is not None]

    def _set_recipes(self, recipes):
        for index, recipe in (recipes or {}).items():
            self.recipes[index] = recipe
        if recipes:
            self._stale()

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        status = self._acquire()
        if status:
            return status, None
        try:
            if grads is None and run and not self.held:
                return NOT_HELD, None
            flats = self.params if params is None else [param.flat for param in params]
            if grads is not None:
                grads = [g if g is None else self.flat_grad(g) for g in grads]
            if grads is not None or params is not None:
                if not self._lies_as_before(flats, grads):
                    if self._would_overlap(flats, grads or (self.grads if self.held else [])):
                        return OVERLAP, None
                    self._stale()
                self.params, self._occupied = flats, None
            if grads is not None:
                self.grads, self.held = grads, hold
            self._set_recipes(recipes)
            return self._run(grad_scale, clip_norm) if run else (OK, None)
        finally:
            self.lock.release()

    def _take_rates(self, rates):
        for index, (recipe, rate) in enumerate(zip(self.recipes, rates, strict=True)):
            if recipe.rate != rate:
                self.recipes[index] = recipe.at_rate(rate)
                self._stale()

    def set_rate(self, rate):
        return self.set_rates([rate] * len(self.recipes))

    def set_rates(self, rates, first=0, rows=0):
        status = self._acquire()
        if not status:
            self._take_rates(rates)
            self.lock.release()
        return status

    # a step in parts

    def stream_open(self):
        status = self._acquire()
        if not status:
            self.streaming, self._streamed = True, False
            self._stale()
            self.lock.release()
        return status

    def stream_close(self):
        self.streaming = False

    def _is_occupied(self, grad):
        """Whether a gradient shares a byte with a parameter or a state.  Parameters and states do not overlap, so only the
        last of them that starts before the end of the gradient can share one."""
        if self._occupied is None:
            flats = [*self.params, *self._beside_params()]
            ranges = sorted((buffer.address, buffer.end) for buffer in map(self.ours, flats) if buffer.size)
            self._occupied = [start for start, _ in ranges], [end for _, end in ranges]
        starts, ends = self._occupied
        last = bisect_left(starts, grad.end) - 1
        return grad.size and last >= 0 and ends[last] > grad.address

    def _accept_streamed(self, k, param, grad):
        """Note where the parameter of a streamed tensor has moved, unless it or the gradient overlaps another buffer."""
        if param is None or param.address == self.ours(self.params[k]).address:
            return OVERLAP if self._is_occupied(grad) else OK
        params = [*self.params[:k], param.flat, *self.params[k + 1 :]]
        if self._would_overlap(params, [grad.flat]):
            return OVERLAP
        self.params, self._occupied = params, None
        return OK

    def stream_step(self, k, param, grad, rates, grad_scale):
        status = self._acquire_part()
        if status:
            return status
        try:
            if not self.streaming:
                return STREAMING
            if self._accept_streamed(k, param, grad):
                return OVERLAP
            grad = self.flat_grad(grad)
            self._stale()  # the step count of this tensor changes
            if rates is not None:
                self._take_rates(rates)
            update = self._update(self._coefficients(k), [k], {k: grad})
            update.make_coefficients(self.steps + 1, grad_scale, rows_each(len(self.params)))
            self._run_streamed(update, self.steps + 1, k, grad)
            if not self._streamed:
                later = [missed + 1 for missed in self.missed]
                self.steps, self.missed, self._streamed = self.steps + 1, later, True  # in one statement
            self.missed[k] -= 1
            return OK
        finally:
            self.lock.release()

    def _run_streamed(self, update, number, k, grad):
        """Run the update of tensor k alone."""
        update.run(number)
        if self.zero_grad:
            grad.fill(0)

    # reading and replacing the state

    def copy(self, pairs, recipes=None, steps=None):
        status = self._acquire()
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
                self.steps, self.missed = steps[0], missed  # in one statement
            return OK, before
        finally:
            self.lock.release()

    @property
    def tensor_steps(self):
        steps = self.steps  # for which a subclass may wait
        return [steps - missed for missed in self.missed]

    def steps_of(self, k):
        return self.steps - self.missed[k]
