"""Bound buffers: gradients checked against parameters and states, then one backend call per step for all of them."""

import os
import threading
import weakref
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from . import backends, hyper
from .memory import host
from .memory.tree import STEADY
from .streaming import Streaming

ONE = 1.0
_NEVER = object()


class StepInfo(NamedTuple):
    """What a step did.  applied: whether it was made; grad_norm: the global norm of grads*grad_scale before clipping,
    None unless clip_norm was given; nonfinite: how many elements of grads*grad_scale are NaN or infinite or have a square
    that overflows their dtype, None with nonfinite="propagate", which does not look."""

    applied: bool
    grad_norm: float | None
    nonfinite: int | None


APPLIED = StepInfo(True, None, None)


def in_use(name):
    return RuntimeError(f"this {name} is in use by another thread; give each thread its own, or a lock")


class ByOne:
    """As a `with` block: one thread at a time.  A forked child does not wait for a thread that only its parent has."""

    def __init__(self, name):
        self._name = name
        self._renew()

    def _renew(self):
        self._process = os.getpid()
        self._lock = threading.RLock()  # reentrant: an interrupt may have kept its thread from releasing it

    def __enter__(self):
        if not self._lock.acquire(False):
            if self._process == os.getpid():
                raise in_use(self._name)
            self._renew()
            self._lock.acquire()

    def __exit__(self, *error):
        self._lock.release()


class Bound:
    """The stepping half of an Optimizer: what the plan of the backend points to, and when it may be called at once.

    Whatever must not be cut in two is one call of the backend.  What Python notes of it, beside the fast path of step(), is
    locked; the fast path names the gradients that it means, and the backend refuses others.
    """

    # what step() reads: 20 ns faster than in the dict
    __slots__ = ("_argument", "_call", "_call_held", "_no_grads", "_same_grads")

    def _bind_params(self, backend, recipes, options):
        """Hand parameters, states, recipes and what only CUDA knows to the backend, once."""
        states = [list(state.values()) for state in self._state]
        self._plan = backend.Plan(self._params, states, self._set_of, recipes, *options)
        self._call, self._call_held, self._argument = self._plan.bound_step()
        self._by_one, self._holds = ByOne(type(self).__name__), 0
        self._refresh = [k for k, param in enumerate(self._params) if host.is_torch(param.owner)]
        self._indices = range(len(self._params))
        self._dtypes = [param.dtype for param in self._params]
        plain = self._memory is host  # else no ndarray is taken as it is
        self._shapes = [param.shape if plain and host.is_c_order(param) else None for param in self._params]
        self._bound = self._bound_object = self._last = self._occupied = None
        self._note_schedules()
        self._point_to(None)

    def _note_schedules(self):
        self._of_rate = {}  # set -> (rate, recipe)
        self._scheduled = [k for k, (group, _) in enumerate(self._sets) if callable(self._groups[group]["lr"])]

    def _point_to(self, pointed):
        """Note what the plan holds: None, the bound gradients, or an array or FlatBuffer.grads that came twice; and whether
        step() may call the backend at once: no step may need Python, nor have anything to tell."""
        self._pointed = pointed
        ready = pointed is not None and self.nonfinite == "propagate" and not self._needs_python()
        held = self._bound_object if pointed is self._bound else pointed
        self._no_grads = None if ready and pointed is self._bound else _NEVER
        steady = ready and type(held) in STEADY and not self._zero_grad  # which asks each time whether it may write
        self._same_grads = (held if steady else _NEVER), self._holds

    def _needs_python(self):
        """Whether a schedule must be asked, or something may move between steps (torch)."""
        return bool(self._scheduled or self._refresh or self._moving())

    def _moving(self):
        return self._pointed is self._bound and any(b is not None and host.is_torch(b.owner) for b in self._bound)

    # grad_scale and clip_norm are for keywords; enforcing that by `*` costs 60 ns of 250 at 64 elements (CPython 3.11)
    def step(self, grads=None, grad_scale=ONE, clip_norm=None):
        """Update all parameters in place from grads, or from the bound gradients where grads is None.

        grads: the structure of params; a None in it leaves that tensor and its step count alone.
        grad_scale, from 1e-30 to 1e30, multiplies every gradient (1/loss_scale).   clip_norm > 0: where the norm of all
        grads*grad_scale exceeds it, they are scaled down to it (inf: only measure).  Gradients are left untouched, but for
        zero_grad=True.  In this order: nonfinite elements are counted, the norm is taken, the rule clips, decays and
        updates, gradients are zeroed.
        Returns StepInfo.  Raises before anything is written; FloatingPointError with nonfinite="raise", RuntimeError when
        another thread uses this optimizer or a streaming block is open.
        """
        if grad_scale is ONE and clip_norm is None:
            if grads is self._no_grads:
                if not self._call(self._argument):
                    return APPLIED
            else:
                same = self._same_grads
                if grads is same[0] and not self._call_held(self._argument, same[1]):
                    return APPLIED
        with self._by_one:
            return self._checked_step(grads, grad_scale, clip_norm)

    def _hold(self):
        """A new number for gradients that the plan shall hold."""
        self._holds = self._holds % (2**31 - 1) + 1
        return self._holds

    def bind(self, grads):
        """Gradient buffers that stay where they are: step() without grads reads them, without checking them again."""
        if grads is None:
            raise TypeError("grads is None; bind() needs the gradient buffers")
        leaves = self._structure.leaves(grads, "grads")
        bound = [self._acquire_grad(k, grad) for k, grad in enumerate(leaves)]
        with self._by_one:
            self._point_to(None)
            self._change_plan(grads=bound, hold=self._hold(), run=False)
            self._bound, self._bound_object = bound, grads
            self._point_to(bound)

    def streaming(self, grad_scale=1.0):
        """A step that is made tensor by tensor, while each gradient is still in cache, as a `with` block::

            with opt.streaming() as s:
                s.step("w3", g)             # g may be one scratch array for all tensors, one after the other

        The name is the key in a mapping, the index in a sequence, 0 for a single array, and (group index, key or index)
        in a list of groups.  Same bits and same counts as one step() with these gradients and None for the others: the
        first update in the block counts the step, and asks a schedule.  While the block is open, everything else that
        needs the optimizer whole is refused (RuntimeError).  Leaving the block early takes nothing back; s.updated says
        what was updated.  There is no clip_norm, which needs all gradients at once.
        grad_scale: as in step().   Raises ValueError unless nonfinite="propagate", and on backend="cuda"; TypeError for a
        FlatBuffer, which is updated as one: stream its mapping flat.params.
        """
        if self.backend == "cuda":
            raise ValueError("streaming needs a host backend, this optimizer runs on 'cuda': call step() with all gradients")
        if self.nonfinite != "propagate":
            raise ValueError(
                f"nonfinite={self.nonfinite!r} looks at all gradients before the first update, which a streamed step cannot "
                f"do: it needs nonfinite='propagate'"
            )
        return Streaming(self, hyper.scale("grad_scale", grad_scale))

    @property
    def nonfinite(self):
        """What a step does about gradients that are not finite: "propagate", "skip" or "raise"."""
        return self._nonfinite

    @property
    def zero_grad(self):
        """Whether a step zeroes the gradients."""
        return self._zero_grad

    @property
    def c_step(self):
        """(function address, plan address): one step of the bound gradients from C, Cython or @njit code without Python,
        by ``int step(void *plan)``.  It answers 0 when the step was made, 6 when nonfinite="skip" or "raise" left it out,
        1 when another thread is in a step, 7 when a streaming block is open; only with 0 was anything updated.
        Good while this optimizer, the gradients and the parameters live where they are.
        RuntimeError on other backends than C and where a step needs Python."""
        if self.backend != "c":
            raise RuntimeError(f"c_step needs backend='c', this {type(self).__name__} runs on {self.backend!r}")
        if self._pointed is None or self._pointed is not self._bound:
            raise RuntimeError("c_step needs gradients that stay: bind() them first")
        if self._needs_python():
            raise RuntimeError("c_step cannot serve a callable lr or torch tensors, which need Python at every step")
        return self._plan.addresses()

    def advance(self):
        """With backend="cuda" and capturable=True, before a captured CUDA graph with step() in it is launched again: count
        the step and write its coefficients, an lr set since included, to the device."""
        if self.backend != "cuda" or self._pointed is None:
            raise RuntimeError("advance() needs backend='cuda', capturable=True and bound gradients: see bind()")
        self._change_plan(recipes=self._scheduled_recipes(), run=False)
        self._plan.advance()

    def _scheduled_recipes(self):
        """Those of the next step, where lr is a schedule; made anew only where the rate has changed."""
        for k in self._scheduled:
            group, dtype = self._sets[k]
            h = self.at_step(self._groups[group]._values, self.steps)
            if k not in self._of_rate or self._of_rate[k][0] != h.lr:
                self._of_rate[k] = h.lr, self.checked_recipe(h, dtype)
        return {k: self._of_rate[k][1] for k in self._scheduled}

    def _checked_step(self, grads, grad_scale, clip_norm):
        if grad_scale is not ONE:
            grad_scale = hyper.scale("grad_scale", grad_scale)
        if clip_norm is not None:
            clip_norm = hyper.above_zero("clip_norm", clip_norm)
        recipes = self._scheduled_recipes()
        params = self._moved_params(self._refresh) if self._refresh else None
        accepted, hold = self._accept(grads, anew=params is not None)
        if accepted is not None:
            self._point_to(None)
        number = 0 if hold is None else self._hold()
        found = self._change_plan(params, accepted, recipes, number, True, grad_scale, clip_norm)
        if params is not None:
            self._params, self._occupied = params, None
        if hold is not None:
            self._point_to(hold)
        return APPLIED if found is None else self._info(found)

    def _info(self, found):
        """StepInfo, or FloatingPointError: the plan has left the step out where gradients are not finite."""
        if found.nonfinite and self.nonfinite == "raise":
            raise FloatingPointError(
                f"{found.nonfinite} element(s) of the gradients are NaN or infinite or have a square that overflows, the "
                f"first of them in {self._grad_names[found.tensor]}; nothing was updated"
            )
        return StepInfo(not found.nonfinite, found.grad_norm, found.nonfinite)

    def _stream(self, k, grad, grad_scale, first):
        """Update tensor k alone, within a streamed step."""
        if grad is None:
            raise TypeError(f"{self._grad_names[k]} is None; a tensor without a gradient is left out of the block")
        buffer = self._acquire_grad(k, grad)
        params = self._moved_params([k]) if k in self._refresh else None
        self._refuse_occupied(k, buffer, params)
        recipes = self._scheduled_recipes() if first else None
        status = self._plan.stream_step(k, params and params[k], buffer, recipes, grad_scale)
        if status != backends.OK:
            raise self._refusal(status)
        if params is not None:
            self._params, self._occupied = params, None
            self._point_to(None)

    def _refuse_occupied(self, k, grad, params):
        """Refuse a gradient that shares a byte with a parameter or a state.  These are separate: the last that starts before
        the end of grad is the only one to look at."""
        if params is not None:  # of torch, and it was moved: look at all
            host.refuse_overlap([*self._named_buffers(params), (self._grad_names[k], grad)])
            return
        if self._occupied is None:
            ranges = sorted((b.address, b.end) for _, b in self._named_buffers(self._params) if b.size)
            self._occupied = [start for start, _ in ranges], [end for _, end in ranges]
        starts, ends = self._occupied
        last = bisect_left(starts, grad.end) - 1
        if grad.size and last >= 0 and ends[last] > grad.address:
            host.refuse_overlap([*self._named_buffers(self._params), (self._grad_names[k], grad)])

    def _accept(self, grads, anew):
        """(accepted, hold): the checked gradients, None where the plan points to them already; and what is held then."""
        if grads is None:
            return self._accept_bound(anew)
        if grads is self._pointed and type(grads) in STEADY and not anew and not self._zero_grad:
            return None, None
        accepted = [
            grad
            if type(grad) is np.ndarray and grad.dtype is dtype and grad.shape == shape and grad.flags.carray
            else self._acquire_grad(k, grad)
            for k, grad, dtype, shape in zip(
                self._indices, self._structure.leaves(grads, "grads"), self._dtypes, self._shapes, strict=True
            )
        ]
        if type(grads) not in STEADY:
            return accepted, None
        again = self._last is not None and self._last() is grads  # what comes twice is held from then on
        self._last = weakref.ref(grads)
        return accepted, grads if again else None

    def _accept_bound(self, anew):
        if self._bound is None:
            raise ValueError("there are no gradients: pass grads to step(), or bind() them first")
        if self._pointed is self._bound and not anew and not self._moving():
            return None, None
        self._bound = [b if b is None else self._acquire_grad(k, b.owner) for k, b in enumerate(self._bound)]
        return self._bound, self._bound

    def _acquire_grad(self, k, grad):
        if grad is None:
            return None
        buffer = self._memory.acquire(grad, self._grad_names[k], writable=self.zero_grad)
        self._memory.same_layout(buffer, self._grad_names[k], self._params[k], self._names[k])
        return buffer

    def _change_plan(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        """plan.change, with the sentence where it refuses."""
        status, found = self._plan.change(params, grads, recipes, hold, run, grad_scale, clip_norm)
        if status == backends.OVERLAP:
            self._explain_overlap(params, grads)
        if status not in (backends.OK, backends.NONFINITE):
            raise self._refusal(status)
        return found

    def _named_buffers(self, params):
        """(name, Buffer) of all parameters and states."""
        named = list(zip(self._names, params, strict=True))
        for k, tensor in enumerate(self._state):
            named += [(f"{name} of {self._names[k]}", self._memory.ours(flat)) for name, flat in tensor.items()]
        return named

    def _explain_overlap(self, params, grads):
        named = self._named_buffers(params or self._params)
        for k, grad in enumerate(grads):
            if grad is not None:
                named.append((self._grad_names[k], self._acquire_grad(k, getattr(grad, "owner", grad))))
        host.refuse_overlap(named)
        raise AssertionError("the backend saw an overlap that is not there")

    def _moved_params(self, which):
        """torch may move a parameter (p.data = ...): its address is read anew at every step.  None where all stayed."""
        params = list(self._params)
        for k in which:
            params[k] = self._memory.again(params[k], self._names[k])
            self._memory.same_layout(params[k], self._names[k], self._params[k], f"{self._names[k]} when it was bound")
        moved = any(new.address != old.address for new, old in zip(params, self._params, strict=True))
        return params if moved else None

    def _refusal(self, status):
        if status == backends.STREAMING:
            return RuntimeError(f"a streaming block of this {type(self).__name__} is open; leave it first")
        return in_use(type(self).__name__)
