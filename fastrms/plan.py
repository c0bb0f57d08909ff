"""Bound buffers: gradients checked against parameters and states, then one backend call per step for all of them."""

import weakref
from typing import NamedTuple

import numpy as np

from . import arrays, backends, hyper
from .structure import STEADY

ONE = 1.0
_NEVER = object()


class StepInfo(NamedTuple):
    """What a step did.  applied: whether it was made; grad_norm: the global norm of grads*grad_scale before clipping,
    None unless clip_norm was given; nonfinite: None, nothing counts them yet."""

    applied: bool
    grad_norm: float | None
    nonfinite: int | None


APPLIED = StepInfo(True, None, None)


class Bound:
    """The stepping half of an Optimizer: what the plan of the backend points to, and when it may be called at once.

    Nothing is locked from Python: whatever must not be cut in two is one call of the backend.
    """

    __slots__ = ("_argument", "_call", "_no_grads", "_same_grads")  # what step() reads: 20 ns faster than in the dict

    def _bind_params(self, backend, recipes, options):
        """Hand parameters, states, recipes and what only CUDA knows to the backend, once."""
        states = [list(state.values()) for state in self._state]
        self._plan = backend.Plan(self._params, states, self._set_of, recipes, *options)
        self._call, self._argument = self._plan.bound_step()
        self._refresh = [k for k, param in enumerate(self._params) if arrays.is_torch(param.owner)]
        self._indices = range(len(self._params))
        self._dtypes = [param.dtype for param in self._params]
        plain = self._memory is arrays  # else no ndarray is taken as it is
        self._shapes = [param.shape if plain and arrays.is_c_order(param) else None for param in self._params]
        self._bound = self._bound_object = self._last = None
        self._note_schedules()
        self._point_to(None)

    def _note_schedules(self):
        self._scheduled = [k for k, (group, _) in enumerate(self._sets) if callable(self._groups[group]["lr"])]

    def _point_to(self, pointed):
        """Note what the plan holds: None, the bound gradients, or an array or FlatBuffer.grads that came twice; and whether
        step() may call the backend at once: nothing may move between steps (torch), and no schedule may need Python."""
        self._pointed = pointed
        ready = pointed is not None and not (self._scheduled or self._refresh or self._moving())
        held = self._bound_object if pointed is self._bound else pointed
        self._no_grads = None if ready and pointed is self._bound else _NEVER
        self._same_grads = held if ready and type(held) in STEADY else _NEVER

    def _moving(self):
        return self._pointed is self._bound and any(b is not None and arrays.is_torch(b.owner) for b in self._bound)

    # grad_scale and clip_norm are for keywords; enforcing that by `*` costs 60 ns of 250 at 64 elements (CPython 3.11)
    def step(self, grads=None, grad_scale=ONE, clip_norm=None):
        """Update all parameters in place from grads, or from the bound gradients where grads is None.

        grads: the structure of params; a None in it leaves that tensor and its step count alone.
        grad_scale, from 1e-30 to 1e30, multiplies every gradient (1/loss_scale).   clip_norm > 0: where the norm of all
        grads*grad_scale exceeds it, they are scaled down to it (inf: only measure).  Gradients are left untouched.
        Returns StepInfo.  Raises before anything is written; RuntimeError when another thread uses this optimizer.
        """
        if (
            (grads is self._no_grads or grads is self._same_grads)
            and grad_scale is ONE
            and clip_norm is None
            and not self._call(self._argument)
        ):
            return APPLIED
        return self._checked_step(grads, grad_scale, clip_norm)

    def bind(self, grads):
        """Gradient buffers that stay where they are: step() without grads reads them, without checking them again."""
        if grads is None:
            raise TypeError("grads is None; bind() needs the gradient buffers")
        leaves = self._structure.leaves(grads, "grads")
        bound = [self._acquire_grad(k, grad) for k, grad in enumerate(leaves)]
        self._point_to(None)
        self._change_plan(grads=bound, hold=True, run=False)
        self._bound, self._bound_object = bound, grads
        self._point_to(bound)

    @property
    def c_step(self):
        """(function address, plan address): one step of the bound gradients from C, Cython or @njit code without Python,
        by ``int step(void *plan)``, which answers 0 when the step was made.  Good while this optimizer, the gradients and
        the parameters live where they are.  RuntimeError on other backends than C and where a step needs Python."""
        if self.backend != "c":
            raise RuntimeError(f"c_step needs backend='c', this {type(self).__name__} runs on {self.backend!r}")
        if self._pointed is None or self._pointed is not self._bound:
            raise RuntimeError("c_step needs gradients that stay: bind() them first")
        if self._no_grads is _NEVER:
            raise RuntimeError("c_step cannot serve a callable lr or torch tensors, which need Python at every step")
        return self._plan.addresses()

    def advance(self):
        """With backend="cuda" and capturable=True, before a captured CUDA graph with step() in it is launched again: count
        the step and write its coefficients, an lr set since included, to the device."""
        if self.backend != "cuda" or self._pointed is None:
            raise RuntimeError("advance() needs backend='cuda', capturable=True and bound gradients: see bind()")
        self._change_plan(recipes={k: self._recipe(*self._sets[k], self.steps) for k in self._scheduled}, run=False)
        self._plan.advance()

    def _checked_step(self, grads, grad_scale, clip_norm):
        if grad_scale is not ONE:
            grad_scale = hyper.scale("grad_scale", grad_scale)
        if clip_norm is not None:
            clip_norm = hyper.above_zero("clip_norm", clip_norm)
        recipes = {k: self._recipe(*self._sets[k], self.steps) for k in self._scheduled}
        params = self._moved_params() if self._refresh else None
        accepted, hold = self._accept(grads, anew=params is not None)
        if accepted is not None:
            self._point_to(None)
        norm = self._change_plan(params, accepted, recipes, hold is not None, True, grad_scale, clip_norm)
        if params is not None:
            self._params = params
        if hold is not None:
            self._point_to(hold)
        return APPLIED if clip_norm is None else StepInfo(True, norm, None)

    def _accept(self, grads, anew):
        """(accepted, hold): the checked gradients, None where the plan points to them already; and what is held then."""
        if grads is None:
            return self._accept_bound(anew)
        if grads is self._pointed and type(grads) in STEADY and not anew:
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
        buffer = self._memory.acquire(grad, self._grad_names[k], writable=False)
        self._memory.same_layout(buffer, self._grad_names[k], self._params[k], self._names[k])
        return buffer

    def _change_plan(self, params=None, grads=None, recipes=None, hold=False, run=True, grad_scale=1.0, clip_norm=None):
        """plan.change, with the sentence where it refuses."""
        status, norm = self._plan.change(params, grads, recipes, hold, run, grad_scale, clip_norm)
        if status == backends.OVERLAP:
            self._explain_overlap(params, grads)
        if status != backends.OK:
            raise self._busy()
        return norm

    def _explain_overlap(self, params, grads):
        named = list(zip(self._names, params or self._params, strict=True))
        for k, tensor in enumerate(self._state):
            named += [(f"{name} of {self._names[k]}", self._memory.own(flat)) for name, flat in tensor.items()]
        for k, grad in enumerate(grads):
            if grad is not None:
                named.append((self._grad_names[k], self._acquire_grad(k, getattr(grad, "owner", grad))))
        arrays.refuse_overlap(named)
        raise AssertionError("the backend saw an overlap that is not there")

    def _moved_params(self):
        """torch may move a parameter (p.data = ...): its address is read anew at every step.  None where all stayed."""
        params = list(self._params)
        for k in self._refresh:
            params[k] = self._memory.again(params[k], self._names[k])
            self._memory.same_layout(params[k], self._names[k], self._params[k], f"{self._names[k]} when it was bound")
        moved = any(new.address != old.address for new, old in zip(params, self._params, strict=True))
        return params if moved else None

    def _busy(self):
        return RuntimeError(f"this {type(self).__name__} is in use by another thread; give each thread its own, or a lock")
