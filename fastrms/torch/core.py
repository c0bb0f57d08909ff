"""The part of a torch optimizer on one device: an optimizer of fastrms over those of its parameters that have a state."""

from typing import Any, NamedTuple

import numpy as np
import torch

from .. import optimizers, rules
from ..memory import placement

EXACT = 2**24  # up to this count, every number of steps is a float32


def trusting(kind):
    """The optimizer of fastrms, except that it takes a state as it is: a run whose state is NaN goes on, as torch's does."""
    return type(kind.__name__, (kind,), {"not_negative": ()})


KINDS = {name: trusting(vars(optimizers)[name]) for name in optimizers.__all__ if name[:1].isupper()}


class State(dict):
    """The state of one parameter.  It sets ``note.changed`` where an entry that the update uses is exchanged."""

    __slots__ = ("note",)

    def __init__(self, values, note):
        super().__init__(values)
        self.note = note

    def __reduce__(self):
        return dict, (dict(self),)


def _noting(name):
    method = getattr(dict, name)

    def noting(self, *arguments, **named):
        self.note.changed = True
        return method(self, *arguments, **named)

    return noting


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(State, _name, _noting(_name))


class Note:
    """Whether something has changed."""

    __slots__ = ("changed",)

    def __init__(self):
        self.changed = False


def new_state(param, beside, value):
    """A new state tensor in the layout of a parameter, which holds this value; in host memory it is placed so that it evicts
    neither the parameter nor the state tensors `beside` from cache."""
    if param.device.type != "cpu" or not param.numel():
        return torch.full_like(param, value, memory_format=torch.preserve_format, requires_grad=False)
    dtype = np.dtype(str(param.dtype).removeprefix("torch."))
    flat = placement.place(param.numel(), dtype, [x.data_ptr() for x in (param, *beside)])
    flat.fill(value)
    return torch.from_numpy(flat).as_strided(param.shape, param.stride())


def state_names(kind, values):
    """The names of the states that hyper-parameters in our names ask for."""
    made = KINDS[kind]
    recipe = made.checked_recipe(made.at_step(values), np.dtype(np.float64))
    return rules.state_names(rules.find(recipe.rule))


def complete(kind, values, param, state):
    """Add what the state of a parameter lacks: the number of its steps, and arrays for what `values` ask for."""
    h = KINDS[kind].at_step(values)
    state.setdefault("step", torch.tensor(0.0))
    for name in state_names(kind, values):
        if name not in state:
            beside = [x for x in state.values() if torch.is_tensor(x) and x.dim()]
            state[name] = new_state(param, beside, KINDS[kind].initial(h, name))


def laid_out(param, grad):
    """A gradient in the memory order of its parameter: itself, or a temporary copy where it is a dense one of another order."""
    if grad is None or grad.layout is not torch.strided or grad.stride() == param.stride():
        return grad
    if (grad.shape, grad.dtype, grad.device) != (param.shape, param.dtype, param.device):
        return grad
    return torch.empty_like(param, requires_grad=False).copy_(grad)


class Member(NamedTuple):
    """A parameter that has a state: its group, the name by which error sentences call it, and the state."""

    group: int
    label: Any
    param: torch.Tensor
    state: State


class Core:
    """The parameters of one device and the optimizer of fastrms that updates them.

    kind: the name of its class; members: a list of Member in the order of their groups; values: the hyper-parameters of each
    group, in our names; options: nonfinite and zero_grad.
    """

    def __init__(self, kind, members, values, options):
        self.members, self.params = members, [member.param for member in members]
        self.groups = sorted({member.group for member in members})
        of_group = [[m for m in members if m.group == group] for group in self.groups]
        self._keys = [[m.label for m in some] for some in of_group]
        self.names = names = [state_names(kind, values[group]) for group in self.groups]
        state = {
            name: [{m.label: m.state[name] if name in mine else None for m in some}
                   for some, mine in zip(of_group, names, strict=True)]
            for name in dict.fromkeys(name for mine in names for name in mine)
        }  # fmt: skip
        groups = [
            {"params": {m.label: m.param for m in some}, **values[group]}
            for group, some in zip(self.groups, of_group, strict=True)
        ]
        self.optimizer = KINDS[kind](groups, state=state, **options)
        self._take_counts()

    def _take_counts(self):
        """Make the step tensors of all members parts of one array, which a step advances at once."""
        counts = [float(member.state["step"]) for member in self.members]
        self._most = max(counts)
        self._counts = np.array(counts, np.float64 if self._most >= EXACT else np.float32)
        for member, step in zip(self.members, torch.from_numpy(self._counts), strict=True):
            dict.__setitem__(member.state, "step", step)
        self._tell_plan()

    def _tell_plan(self):
        """Give the plan the counts that the step tensors show."""
        counts = [int(count) for count in self._counts]
        self.optimizer._copy([], [], steps=[max(counts), *counts])
        self._seen = self._counts.tobytes()

    def step(self, grads, grad_scale, clip_norm):
        """Make a step from the gradients of all members, None where there is none.  Returns a StepInfo."""
        if self._counts.tobytes() != self._seen:
            self._tell_plan()
        optimizer = self.optimizer
        with optimizer._one_thread:
            info = optimizer._read_step(grads, grad_scale, clip_norm)
        if info is None:
            info = optimizer.step(self._arranged(grads), grad_scale, clip_norm)
        if info.applied:
            self._count(grads)
        return info

    def set_values(self, values):
        """Take over new hyper-parameters of all groups; ValueError where they ask for another state."""
        for mine, group in zip(self.optimizer.groups, self.groups, strict=True):
            changed = {name: value for name, value in values[group].items() if mine[name] != value}
            if changed:
                mine.update(changed)

    def stays(self):
        """Whether every state tensor is where it was when this was made."""
        lent = (b for tensor in self.optimizer._tensors for b in tensor.lent.values())
        return all(b.owner.data_ptr() == b.address for b in lent)

    def _arranged(self, grads):
        """The gradients in the structure of the groups, each in the layout of its parameter."""
        grads = iter(map(laid_out, self.params, grads))
        return [{key: next(grads) for key in keys} for keys in self._keys]

    def _count(self, grads):
        present = [grad is not None for grad in grads]
        self._counts += 1 if all(present) else present
        self._most += 1
        if self._most >= EXACT and self._counts.dtype == np.float32:
            self._take_counts()
        self._seen = self._counts.tobytes()
