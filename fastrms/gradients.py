"""Which gradients an optimizer knows: those of a step, those that are bound, and those given to two steps in a row."""

import weakref
from types import GeneratorType

import numpy as np

from .memory import host
from .memory.tree import STEADY, SequenceOf

PLAIN = {list, tuple, dict}  # types of gradients that can be looked at twice
MOST = 2**31 - 1  # a number of held gradients is an int32 in C


class Gradients:
    """The gradients that the plan of a backend holds from one step to the next.

    ``held`` is None, or the object whose memory the plan holds: ``bound_object``, which bind() was given, or an array or
    FlatBuffer.grads that step() was given twice in a row.  ``number`` names what is held: the backend makes a step by
    number only while it is still this one.  ``held_shape`` is the shape that a held array had, None for anything else.
    ``bound`` lists the Buffers of bound_object; it is None before bind().  ``may_move`` is True where bound gradients are
    held and one is a torch tensor, which may have been given other memory.
    """

    def __init__(self, tensors, zero_grad):
        self._tensors, self._writable = tensors, zero_grad
        self.bound = self.bound_object = None
        self.held = self.held_shape = None
        self.may_move = False
        self.number = 0
        self._last = None  # a weak reference to the array of the last step
        plain = tensors.memory is host  # only on the host may an ndarray pass without acquire()
        self._quick = [
            (k, t.dtype, t.param.shape if plain and t.shaped(t.param.flat).flags.c_contiguous else None)
            for k, t in enumerate(tensors)
        ]

    @property
    def holds_bound(self):
        """Whether what is held was bound."""
        return self.bound is not None and self.held is self.bound_object

    def hold(self, held):
        """Note what the plan holds from now on, which may be None."""
        self.held, self.held_shape = held, held.shape if type(held) is np.ndarray else None
        self.may_move = self.holds_bound and any(map(host.is_torch, self._bound_owners()))

    def next_number(self):
        self.number = self.number % MOST + 1
        return self.number

    def acquire(self, leaves, writable):
        """The checked Buffers of gradients, one for each tensor or None."""
        return [self._tensors.acquire_grad(k, grad, writable) for k, grad in enumerate(leaves)]

    def accept(self, grads, anew):
        """(accepted, hold): the checked gradients of this step, or None where the plan holds them already; and the object
        whose memory it is to hold from this step on, or None.  anew: whether the parameters have moved, so that the plan
        must be given all addresses again."""
        if grads is None:
            return self._accept_bound(anew)
        if self._is_held(grads) and not anew:
            return None, None
        if callable(grads) and not hasattr(grads, "shape"):
            if hasattr(grads, "named_parameters"):
                raise TypeError("grads is a module: pass its gradients, [p.grad for p in model.parameters()]")
            raise TypeError("grads is a function: fastrms calls no closure; compute the loss and the gradients first, then "
                            "call opt.step(grads)")  # fmt: skip
        accepted = [
            grad
            if type(grad) is np.ndarray and grad.dtype is dtype and grad.shape == shape and grad.flags.carray
            else self._tensors.acquire_grad(k, grad, self._writable)
            for grad, (k, dtype, shape) in zip(self._tensors.structure.leaves(grads, "grads"), self._quick, strict=True)
        ]
        if type(grads) not in STEADY:
            return accepted, None
        came_twice = self._last is not None and self._last() is grads
        self._last = weakref.ref(grads)
        return accepted, grads if came_twice else None

    def listed(self, grads):
        """grads, a generator of them as a list where params is a sequence: they may have to be looked at twice."""
        return list(grads) if type(grads) is GeneratorType and isinstance(self._tensors.structure, SequenceOf) else grads

    def torch_leaves(self, grads):
        """The gradients of a step as a list, those that are bound for None; None where they can be looked at only once."""
        if grads is None:
            return None if self.bound is None else self._bound_owners()
        plain = type(grads) in PLAIN or host.is_torch(grads)
        return self._tensors.structure.leaves(grads, "grads") if plain else None

    def _is_held(self, grads):
        """Whether the plan holds this array as it is.  An array that the step will zero is always checked again, since it
        may have become read-only, and so is an array that was reshaped in place."""
        if grads is not self.held or type(grads) not in STEADY or self._writable:
            return False
        return self.held_shape is None or grads.shape == self.held_shape

    def _accept_bound(self, anew):
        if self.bound is None:
            raise ValueError("there are no gradients: pass grads to step(), or bind() them first")
        if self.holds_bound and not anew and not self.may_move:
            return None, None
        self.bound = self.acquire(self._bound_owners(), self._writable)
        return self.bound, self.bound_object

    def held_buffers(self):
        """Writable Buffers of the gradients that are bound, or else held."""
        owners = self._tensors.structure.leaves(self.held, "grads") if self.bound is None else self._bound_owners()
        return [buffer for buffer in self.acquire(owners, True) if buffer is not None]

    def _bound_owners(self):
        return [None if buffer is None else buffer.owner for buffer in self.bound]
