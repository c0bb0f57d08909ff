"""The part of a torch optimizer on one device: an optimizer of fastrms over those of its parameters that have a state."""

from typing import Any, NamedTuple

import numpy as np
import torch

from . import optimizers, rules
from .hyper import MOST_STEPS
from .saved_formats import in_blocks
from .storage import FLOAT, LOW, low
from .torch_formats import SHAPE, new_part, of_state, refuse_blocks, refuse_other_shape, shape_of
from .torch_shards import Parts, part_of, spread_like

EXACT = 2**24  # up to this count, every number of steps is a float32


def trusting(kind):
    """The optimizer of fastrms, except that it takes a state as it is: a run whose state is NaN goes on, as torch's does."""
    return type(kind.__name__, (kind,), {"trusts_state": True})


STATES = {name for rule in rules.RULES.values() for name in rules.state_names(rule)} | {*LOW.values()}
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


def new_state(param, beside, value, format=FLOAT):
    """A new state tensor in the layout of a parameter, which holds this value, stored in a Format; in host memory it is
    placed so that it evicts neither the parameter nor the state tensors `beside` from cache.  It is spread over ranks as the
    parameter is."""
    return spread_like(param, new_part(part_of(param), map(part_of, beside), value, format))


def rule_of(kind, values):
    """The name of the rule that hyper-parameters in our names ask for."""
    made = KINDS[kind]
    return made.checked_recipe(made.at_step(values), np.dtype(np.float64)).rule


def state_names(kind, values):
    """The names of the states that hyper-parameters in our names ask for."""
    return rules.state_names(rules.find(rule_of(kind, values)))


def stored_state(kind, values, options, param, name):
    """Name -> Format of what the state of a parameter, which error sentences call `name`, holds; options: those of its group
    in storage.OPTIONS."""
    return of_state(KINDS[kind], rule_of(kind, values), options, param, name)


def complete(kind, values, options, param, state, name):
    """Add what the state of a parameter lacks: the number of its steps, and arrays for what `values` and `options` want."""
    h = KINDS[kind].at_step(values)
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
    for key, format in stored_state(kind, values, options, param, name).items():
        if key not in state:
            beside = [x for x in state.values() if torch.is_tensor(x) and x.dim()]
            value = 0.0 if key in LOW.values() else KINDS[kind].initial(h, key)
            state[key] = new_state(param, beside, value, format)
            if key == LOW["float32"]:
                part_of(state[key]).copy_(part_of(param).detach())
            if format.in_blocks:
                state.setdefault(SHAPE, shape_of(param))


def laid_out(param, grad):
    """A gradient, or a state, in the memory order of its parameter: itself, or a copy where it has another order, or where
    torch has not written its numbers."""
    if grad is None or grad.layout is not torch.strided or (grad.stride() == param.stride() and not is_lazy(grad)):
        return grad
    if (grad.shape, grad.device) != (param.shape, param.device):
        return grad
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)


def is_lazy(tensor):
    """Whether the numbers of a tensor are not those in its memory: torch negates them when it reads them, or it has none, as
    all of them are 0."""
    return tensor.is_neg() or tensor._is_zerotensor()


def apart(grads):
    """Gradients as they are, or a copy where one of them serves another parameter already."""
    first = {}
    return [first.setdefault(id(grad), grad) if grad is None or id(grad) not in first else grad.clone() for grad in grads]


@torch.no_grad()
def zero_copied(given, used):
    """Write zeros over those of the given gradients in whose place a step has used a temporary copy, which it has zeroed."""
    for grad, mine in zip(given, used, strict=True):
        if grad is not None and part_of(grad) is not mine and not part_of(grad)._is_zerotensor():
            part_of(grad).zero_()


def is_random(stored):
    """Whether a step rounds a buffer of this Storage at random."""
    low_is_random = stored.param is not FLOAT and stored.master in (None, "split8")
    return stored.stochastic and (low_is_random or any(format is not FLOAT for format in stored.states))


class Member(NamedTuple):
    """A parameter that has a state: its group, the name by which error sentences call it, the state, and the position of its
    first element among the elements of all parameters."""

    group: int
    label: Any
    param: torch.Tensor
    state: State
    origin: int


class Core:
    """The parameters of one device and the optimizer of fastrms that updates them.

    kind: the name of its class; members: a list of Member in the order of their groups; values: the hyper-parameters of each
    group, in our names; stored: the options of each group in storage.OPTIONS; options: nonfinite, zero_grad and seed.  The
    torch optimizer lets one thread at a time use it.
    """

    def __init__(self, kind, members, values, stored, options):
        self._kind, self.stored, self._options = kind, stored, options
        self.members, self.params = members, [member.param for member in members]
        self.groups = sorted({member.group for member in members})
        of_group = [[m for m in members if m.group == group] for group in self.groups]
        self._keys = [[m.label for m in some] for some in of_group]
        self.names = [state_names(kind, values[group]) for group in self.groups]
        names = [[*mine, *low(stored[group].get("master"))] for mine, group in zip(self.names, self.groups, strict=True)]
        state = {
            name: [{m.label: part_of(m.state[name]) if name in mine else None for m in some}
                   for some, mine in zip(of_group, names, strict=True)]
            for name in dict.fromkeys(name for mine in names for name in mine)
        }  # fmt: skip
        groups = [
            {"params": {m.label: part_of(m.param) for m in some}, **values[group], **stored[group]}
            for group, some in zip(self.groups, of_group, strict=True)
        ]
        self.optimizer = KINDS[kind](groups, state=state, **options)
        self._parts = Parts(self.params, [tensor.name for tensor in self.optimizer._tensors])
        self.optimizer._tensors.tells_of_state = False  # no backward pass reads the state of an optimizer
        self._refuse_other_blocks()
        self._take_positions()
        self._take_counts()

    def _refuse_other_blocks(self):
        """ValueError where states are in blocks of other elements than those of their parameter, which may have changed."""
        for member, tensor in zip(self.members, self.optimizer._tensors, strict=True):
            if in_blocks(tensor):
                refuse_blocks(member.param, tensor.name)
                refuse_other_shape(member.state, member.param, tensor.name)

    def _take_positions(self):
        """Let random numbers depend on the positions of elements among those of all parameters of all devices and ranks."""
        tensors, plan = self.optimizer._tensors, self.optimizer._plan
        for k, (member, tensor) in enumerate(zip(self.members, tensors, strict=True)):
            if tensor.storage is not None:
                start = self._parts.start(k) if is_random(tensor.storage) else 0
                tensor.storage = tensor.storage._replace(origin=member.origin + start)
        storages = [tensor.storage for tensor in tensors]
        if any(storages):
            plan.copy(plan.pairs_of_storages(storages))

    def _take_counts(self):
        """Make the step tensors of all members parts of one array, which a step advances at once."""
        steps = [member.state["step"] for member in self.members]
        array = in_a_row(steps)
        if array is None:
            counts = [float(step) for step in steps]
            array = torch.tensor(counts, dtype=torch.float64 if max(counts) >= EXACT else torch.float32)
        self._show(array)
        self._tell_plan()

    def _show(self, array):
        """Let the step tensors of the members be the elements of this tensor."""
        for member, step in zip(self.members, array, strict=True):
            dict.__setitem__(member.state, "step", step)
        self._counts = array.numpy()
        self._all = np.ones_like(self._counts)

    def share_counts(self):
        """Move the step tensors into memory that processes share."""
        self._show(torch.from_numpy(self._counts).clone().share_memory_())

    def _tell_plan(self):
        """Give the plan the counts that the step tensors show."""
        for count, tensor in zip(self._counts, self.optimizer._tensors, strict=True):
            if not 0 <= count <= MOST_STEPS:
                raise ValueError(f"state['step'] of {tensor.name} is {count}; it must be a number of steps, from 0 to 2**62")
        counts = [int(count) for count in self._counts]
        self._most = max(counts)
        self._keep_exact()
        self.optimizer._copy([], [], steps=[self._most, *counts])
        self._seen = self._counts.tobytes()

    def _keep_exact(self):
        """Count in float64 where float32, which torch counts in, could not count the next step."""
        if self._most >= EXACT and self._counts.dtype == np.float32:
            self._show(torch.from_numpy(self._counts.astype(np.float64)))

    def step(self, grads, grad_scale, clip_norm):
        """Make a step from the gradients of all members.  Returns a StepInfo, or None where a tensor is not what it was, or
        its gradient is not like it."""
        if self._parts.spread:
            grads = self._parts.of_grads(grads)
            if grads is None:
                return None
            self._join(clip_norm)
        if self._counts.tobytes() != self._seen:
            self._tell_plan()
        optimizer = self.optimizer
        try:
            reader = optimizer._tensors.reader(optimizer._plan)
            info = reader and optimizer._read_step(reader, grads, grad_scale, clip_norm)
            if info and info.applied:
                self._count([grad is not None for grad in grads] if reader.absent else self._all)
        except BaseException:  # Ctrl-C may come after the step and before it is counted
            self._recount()
            raise
        if info and info.applied and self._parts.spread:
            self._parts.wrote(grads)
        return info

    def checked_step(self, grads, grad_scale, clip_norm):
        """step(), with all checks and their sentences."""
        given, grads = grads, apart(map(laid_out, self._parts.parts, self._parts.brought(grads)))
        self._join(clip_norm)
        if self._counts.tobytes() != self._seen:
            self._tell_plan()
        try:
            info = self.optimizer.step(self._arranged(grads), grad_scale=grad_scale, clip_norm=clip_norm)
        finally:
            self._recount()
        if self._options["zero_grad"]:
            zero_copied(given, grads)
        if info.applied:
            self._parts.wrote(grads)
        return info

    def _join(self, clip_norm):
        """Find the norm together with the other ranks, if a step with this clip_norm needs one."""
        if clip_norm is not None or self.optimizer.nonfinite != "propagate":
            self._parts.join(self.optimizer)

    def present(self):
        """This core, or one made anew where torch has given a state other memory, or a parameter another memory order."""
        self.lay_out_states()
        lent = (b for tensor in self.optimizer._tensors for b in tensor.lent.values())
        same = self._parts.present() and all(b.owner.data_ptr() == b.address for b in lent if b.size)
        values = dict(zip(self.groups, map(dict, self.optimizer.groups), strict=True))
        return self if same else Core(self._kind, self.members, values, self.stored, self._options)

    def lay_out_states(self):
        """Give states the memory order of parameters that lie elsewhere in another one: model.to(memory_format=...)."""
        for part, tensor in zip(self._parts.parts, self.optimizer._tensors, strict=True):
            if part.data_ptr() != tensor.param.address:
                for state in (buffer.owner for buffer in tensor.lent.values()):
                    if (other := laid_out(part, state)) is not state:
                        state.data = other

    def set_values(self, values):
        """Take over new hyper-parameters of all groups, which ask for the same states."""
        for mine, group in zip(self.optimizer.groups, self.groups, strict=True):
            new = values[group].items()
            changed = {name: x for name, x in new if name not in self.optimizer.fixed and mine[name] != x}
            if changed:
                mine.update(changed)

    def set_rates(self, rates):
        """Take over the learning rates of all groups."""
        if "lr" not in self.optimizer.fixed:
            self.optimizer._change([(k, "lr", rates[group]) for k, group in enumerate(self.groups)])

    def _arranged(self, grads):
        """The gradients in the structure of the groups."""
        grads = iter(grads)
        return [{key: next(grads) for key in keys} for keys in self._keys]

    def stream_open(self):
        """Begin a step that is made member by member."""
        if self._counts.tobytes() != self._seen:
            self._tell_plan()
        self.optimizer._open_stream()

    def stream_step(self, k, grad):
        """Update member k from its gradient, within such a step."""
        grad = self._parts.brought_one(k, grad)
        if not self.optimizer._stream_read(k, grad):
            self.optimizer._stream(k, laid_out(self._parts.parts[k], grad), 1.0, first=False)
        self._counts[k] += 1
        self._parts.wrote_one(k)

    def stream_close(self):
        self.optimizer._plan.stream_close()
        self._recount()

    def _recount(self):
        """Let the step tensors show the counts of the plan."""
        plan = self.optimizer._plan
        self._most = plan.steps
        self._keep_exact()
        self._counts[:] = plan.tensor_steps
        self._seen = self._counts.tobytes()

    def _count(self, stepped):
        """Count a step of the members for which `stepped` has a 1."""
        np.add(self._counts, stepped, self._counts)
        self._most += 1
        self._keep_exact()
        self._seen = self._counts.tobytes()


def in_a_row(steps):
    """One tensor over step tensors that processes share and that follow on each other in memory; None where they do not."""
    first, size = steps[0], 4
    if not all(torch.is_tensor(step) and step.is_shared() and step.dtype == torch.float32 for step in steps):
        return None
    if [step.data_ptr() for step in steps] != [first.data_ptr() + size * k for k in range(len(steps))]:
        return None
    return first.as_strided((len(steps),), (1,))
