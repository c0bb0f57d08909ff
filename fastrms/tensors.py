"""What an optimizer knows of each of its tensors: the parameter, the state and the names."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import given_state, rules, saved_formats, storage, torch_reader
from .memory import host, remedies


class RecipeKey(NamedTuple):
    """Tensors of one group of hyper-parameters and one compute dtype share a recipe."""

    group: int
    dtype: Any


class Tensor:
    """One parameter with its state.

    ``name`` and ``grad_name`` are what error sentences call the parameter and its gradient, ``parts`` the named arrays
    inside it: (name, Part) pairs.  ``param`` is its Buffer, ``dtype`` the dtype in which it is updated, ``recipe`` the index
    of its RecipeKey, and ``state`` maps the name of a state to a flat array in the memory order of the parameter.
    ``storage`` is its Storage, None where all of it is in its compute dtype.  ``given`` has the Buffers of a state that the
    caller gave, by name, and ``lent`` maps what sentences call them to those of them, and to a copy of the parameter, that
    are torch tensors: they must learn that they were written, and must not be given other memory.
    """

    __slots__ = ("dtype", "given", "grad_name", "lent", "name", "param", "parts", "recipe", "state", "storage")

    def __init__(self, name, grad_name, parts, param, recipe):
        self.name, self.grad_name, self.parts, self.param, self.recipe = name, grad_name, parts, param, recipe
        self.dtype, self.storage = storage.compute_dtype(param), None
        self.state, self.given, self.lent = {}, {}, {}

    def shaped(self, flat):
        """A flat state array in the shape and memory order of the parameter."""
        return host.shaped(flat, self.param)


class Tensors(list):
    """All tensors of an optimizer, a list of Tensor in the order of its structure.

    ``memory`` is the module for arrays of their kind, memory.host or memory.device; ``keys`` lists the RecipeKeys.
    ``tells_of_state`` says whether torch learns that a step has written the caller's state tensors.  options: those of
    storage.OPTIONS for each group, None where no group has any.
    """

    def __init__(self, structure, leaves, groups, memory, options=None):
        self.structure, self.memory = structure, memory
        self._reader, self.tells_of_state = None, True
        names = structure.names("params")
        refuse_equal(name for parts in structure.parts("params") for name, _ in parts)
        rows = zip(leaves, names, groups, strict=True)
        params = [acquired_param(memory, leaf, name, options and options[group]) for leaf, name, group in rows]
        memory.same_device(params, names)
        host.refuse_overlap(zip(names, params, strict=True))
        keys = [RecipeKey(group, storage.compute_dtype(param)) for group, param in zip(groups, params, strict=True)]
        self.keys = sorted(set(keys), key=str)
        columns = names, structure.names("grads"), structure.parts("params"), params, map(self.keys.index, keys)
        super().__init__(Tensor(*row) for row in zip(*columns, strict=True))
        self._know_torch()

    @property
    def params(self):
        return [tensor.param for tensor in self]

    @property
    def state(self):
        self.refuse_moved_state()
        return [tensor.state for tensor in self]

    def holds_zero(self, flat, size):
        """Whether the numbers in a flat state array hold a zero: its bits are 0 in every format.  The blocks of q8, which
        follow the numbers, do not count."""
        return bool((self.memory.on_host(flat)[:size] == 0).any())

    def make_state(self, initial_of, rules_of_keys):
        """Allocate the state of every tensor.  initial_of(key, name): the value at which a state of this name starts."""
        for tensor, twin in zip(self, self.structure.twins(), strict=True):
            rule, key = rules_of_keys[tensor.recipe], self.keys[tensor.recipe]
            formats = tensor.storage.states if tensor.storage else None
            tensor.state = new_state(rule, partial(initial_of, key), tensor.param, self.memory, twin, formats)

    def make_storage(self, options, rules_of_keys, not_negative, copies, seed):
        """Decide how the buffers of every tensor are stored.  options: those of storage.OPTIONS for each group; copies:
        where the parameters are written once more, in the structure of params, or None."""
        structure, origin = self.structure, 0
        copies = [None] * len(self) if copies is None else structure.copy_leaves(copies, "param_copy")
        names = structure.names("param_copy")
        for tensor, copy, name in zip(self, copies, names, strict=True):
            mine = options[self.keys[tensor.recipe].group]
            if copy is not None:
                copy = storage.acquired_copy(copy, name, tensor, self.memory)
            tensor.storage = storage.of_tensor(tensor, rules_of_keys[tensor.recipe], mine, copy, not_negative, seed, origin)
            origin += tensor.param.size
            tensor.lent = {name: copy} if copy is not None and host.is_torch(copy.owner) else {}
        host.refuse_overlap([*self.copies(), *((tensor.name, tensor.param) for tensor in self)])
        self._know_torch()

    def copies(self):
        """(name, Buffer) pairs of the arrays to which parameters are written once more."""
        names, found = self.structure.names("param_copy"), (tensor.storage and tensor.storage.copy for tensor in self)
        return [(name, copy) for name, copy in zip(names, found, strict=True) if copy is not None]

    def write_copies(self):
        """Give the copies of parameters the numbers that these have now, and tell their owners."""
        copied = [tensor for tensor in self if tensor.storage and tensor.storage.copy]
        for tensor in copied:
            storage.write_copy(tensor, self.memory)
        self.memory.wrote([tensor.storage.copy for tensor in copied])

    def make_low(self):
        """Make the buffers with what bf16 and fp16 parameters lack of a float32."""
        for tensor in self:
            if tensor.storage:
                tensor.storage = storage.with_low(tensor, self.memory)

    def storages(self):
        """The last argument of a Plan; nothing where every buffer is in its compute dtype."""
        found = [tensor.storage for tensor in self]
        return {"storages": found} if any(found) else {}

    def take_state(self, state, rules_of_keys, not_negative):
        """Use arrays of the caller as the state, in place; see given_state.acquired, which checks them.  not_negative: None
        where anything is taken that an optimizer makes, masters and remainders included."""
        given = given_state.acquired(self, rules_of_keys, state, not_negative)
        for tensor, buffers in zip(self, given, strict=True):
            tensor.state = {name: buffer.flat for name, buffer in buffers.items() if name not in storage.LOW.values()}
            tensor.given = buffers
            tensor.lent |= {
                f"state[{name!r}] of {tensor.name}": buffer
                for name, buffer in buffers.items()
                if host.is_torch(buffer.owner)
            }
        self._know_torch()

    def _know_torch(self):
        """Note which tensors have buffers that torch may move."""
        self.of_torch = [k for k, tensor in enumerate(self) if tensor.lent or host.is_torch(tensor.param.owner)]

    def refuse_moved_state(self):
        """ValueError where torch has given a state tensor of the caller, or a copy, other memory: the old memory may be
        gone."""
        for tensor in self:
            for label, buffer in tensor.lent.items():
                found = self.memory.again(buffer, label)
                self.memory.same_layout(found, label, buffer, f"{label} when it was bound")
                if found.address != buffer.address and buffer.size:
                    raise moved_after(label)
        for label, tensor, address in self.structure.cut_tensors:
            if tensor.data_ptr() != address:
                raise moved_after(label)

    def of_the_caller(self, grads):
        """For each tensor (name, Buffer) pairs of the arrays of the caller that a step reads; grads: Buffers or None."""
        for tensor, grad in zip(self, grads, strict=True):
            state = [(f"state[{name!r}] of {tensor.name}", buffer) for name, buffer in tensor.given.items()]
            yield [(tensor.name, tensor.param), *([(tensor.grad_name, grad)] if grad is not None else []), *state]

    def acquire_grad(self, k, grad, writable):
        """The Buffer of a gradient of tensor k, checked against its parameter; None where there is no gradient."""
        if grad is None:
            return None
        tensor = self[k]
        dtypes = storage.GRADIENTS if tensor.dtype == np.float32 else None
        buffer = self.memory.acquire(grad, tensor.grad_name, writable=writable, halves=True, wanted=tensor.dtype)
        self.memory.same_layout(buffer, tensor.grad_name, tensor.param, tensor.name, dtypes=dtypes)
        return buffer

    def moved(self, which):
        """The Buffers of all parameters where torch has given one of these other memory (p.data = ...), else None."""
        self.structure.refuse_moved()
        self.refuse_moved_state()
        params, memory = self.params, self.memory
        for k in which:
            tensor = self[k]
            if host.is_torch(tensor.param.owner):
                params[k] = memory.again(tensor.param, tensor.name)
            refuse_other_dtype(params[k], tensor)
            memory.same_layout(params[k], tensor.name, tensor.param, f"{tensor.name} when it was bound")
        moved = any(params[k].address != self[k].param.address for k in which if params[k].size)
        return params if moved else None

    def reader(self, plan):
        """The torch_reader.Reader of these tensors for a Plan, or None where they cannot be read so."""
        if self._reader is None:
            self._reader = torch_reader.reader_of(self, plan) or False
        return self._reader or None

    def take(self, params):
        """Note where the parameters lie now."""
        self._reader = None
        for tensor, param in zip(self, params, strict=True):
            tensor.param = param

    def refuse_overlap(self, params, grads):
        """ValueError that names two buffers of a step which overlap.  params: the Buffers of the parameters, or None
        for the present ones; grads: (k, array or Buffer) pairs."""
        params = params or self.params
        named = [(tensor.name, param) for tensor, param in zip(self, params, strict=True)] + self.copies()
        for tensor in self:
            kept = saved_formats.kept(tensor).items()
            named += [(f"{name} of {tensor.name}", self.memory.ours(flat)) for name, flat in kept]
        for k, grad in grads:
            if grad is not None:
                buffer = self.acquire_grad(k, getattr(grad, "owner", grad), writable=False)
                named.append((self[k].grad_name, buffer))
        host.refuse_overlap(named)
        raise ValueError(f"two buffers of this step overlap in memory; {remedies.SEPARATE}")


def acquired_param(memory, x, name, options):
    """The Buffer of a parameter, which may be bf16 or fp16 where the options of its group say how it is updated."""
    if options is None or not storage.takes_halves(options):
        host.refuse_unsaid_param(x, name)
    if options is None:
        return memory.acquire(x, name, writable=True)
    storage.refuse_undecided(x, name, options)
    return memory.acquire(x, name, writable=True, halves=storage.takes_halves(options))


def refuse_other_dtype(param, tensor):
    """TypeError where torch has given a parameter another dtype than it had when it was bound (model.float(), model.half()).
    Its Buffer is now `param`."""
    if param.dtype != tensor.param.dtype:
        now, before = map(host.dtype_of, (param.dtype, tensor.param.dtype))
        raise TypeError(f"{tensor.name} has dtype {now}, and had {before} when it was bound: turn the model back, by "
                        f"model.to(torch.{before}), or make a new optimizer of its parameters as they are now")  # fmt: skip


def moved_after(label):
    """The error for a torch tensor that has other memory than when it was bound."""
    return ValueError(f"{label} was given other memory (tensor.data = ..., share_memory_()) after this optimizer had been "
                      f"made; make a new one")  # fmt: skip


def new_state(rule, initial, param, memory, twin=None, formats=None):
    """Name -> flat state array, for a parameter (Buffer), placed so that none evicts another from cache.  initial(name): the
    value at which a state starts.  twin: the flat gradient where it is known, which the placement then regards, too.
    formats: that of each state, None for the dtype of the parameter."""
    state, known = {}, [] if twin is None else [twin]
    for k, name in enumerate(rules.state_names(rules.find(rule))):
        format = formats[k] if formats else storage.FLOAT
        state[name] = storage.new_state(format, param, [*known, *state.values()], initial(name), memory)
    return state


def refuse_equal(names):
    """ValueError where two names read alike, since state_dict() tells tensors apart by name."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two keys of params read alike: {name}; their state could not be told apart")
        seen.add(name)
