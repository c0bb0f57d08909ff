"""What an optimizer knows of each of its tensors: the parameter, the state and the names."""

from typing import Any, NamedTuple

from . import given_state, rules, torch_reader
from .memory import host


class RecipeKey(NamedTuple):
    """Tensors of one group of hyper-parameters and one compute dtype share a recipe."""

    group: int
    dtype: Any


class Tensor:
    """One parameter with its state.

    ``name`` and ``grad_name`` are what error sentences call the parameter and its gradient, ``parts`` the named arrays
    inside it: (name, Part) pairs.  ``param`` is its Buffer, ``recipe`` the index of its RecipeKey, and ``state`` maps the
    name of a state to a flat array in the memory order of the parameter.  ``given`` has the Buffers of a state that the
    caller gave, by name, and ``lent`` those of them that are torch tensors: they must learn that they were written, and must
    not be given other memory.
    """

    __slots__ = ("given", "grad_name", "lent", "name", "param", "parts", "recipe", "state")

    def __init__(self, name, grad_name, parts, param, recipe):
        self.name, self.grad_name, self.parts, self.param, self.recipe = name, grad_name, parts, param, recipe
        self.state, self.given, self.lent = {}, {}, {}

    def shaped(self, flat):
        """A flat state array in the shape and memory order of the parameter."""
        return host.shaped(flat, self.param)


class Tensors(list):
    """All tensors of an optimizer, a list of Tensor in the order of its structure.

    ``memory`` is the module for arrays of their kind, memory.host or memory.device; ``keys`` lists the RecipeKeys.
    ``tells_of_state`` says whether torch learns that a step has written the caller's state tensors.
    """

    def __init__(self, structure, leaves, groups, memory):
        self.structure, self.memory = structure, memory
        self._reader, self.tells_of_state = None, True
        names = structure.names("params")
        refuse_equal(name for parts in structure.parts("params") for name, _ in parts)
        params = [memory.acquire(leaf, name, writable=True) for leaf, name in zip(leaves, names, strict=True)]
        memory.same_device(params, names)
        host.refuse_overlap(zip(names, params, strict=True))
        keys = [RecipeKey(group, param.dtype) for group, param in zip(groups, params, strict=True)]
        self.keys = sorted(set(keys), key=str)
        columns = names, structure.names("grads"), structure.parts("params"), params, map(self.keys.index, keys)
        super().__init__(Tensor(*row) for row in zip(*columns, strict=True))
        self.of_torch = [k for k, param in enumerate(params) if host.is_torch(param.owner)]

    @property
    def params(self):
        return [tensor.param for tensor in self]

    @property
    def state(self):
        self.refuse_moved_state()
        return [tensor.state for tensor in self]

    def holds_zero(self, flat):
        """Whether a flat state array holds a zero."""
        return bool((self.memory.on_host(flat) == 0).any())

    def make_state(self, initial_of, rules_of_keys):
        """Allocate the state of every tensor.  initial_of(key, name): the value at which a state of this name starts."""
        for tensor, twin in zip(self, self.structure.twins(), strict=True):
            rule, key = rules_of_keys[tensor.recipe], self.keys[tensor.recipe]
            tensor.state = new_state(rule, lambda name, key=key: initial_of(key, name), tensor.param, self.memory, twin)

    def take_state(self, state, rules_of_keys, not_negative):
        """Use arrays of the caller as the state, in place; see given_state.acquired, which checks them."""
        given = given_state.acquired(self, rules_of_keys, state, not_negative)
        for tensor, buffers in zip(self, given, strict=True):
            tensor.state = {name: buffer.flat for name, buffer in buffers.items()}
            tensor.given = buffers
            tensor.lent = {name: buffer for name, buffer in buffers.items() if host.is_torch(buffer.owner)}
        self.of_torch = [k for k, tensor in enumerate(self) if tensor.lent or host.is_torch(tensor.param.owner)]

    def refuse_moved_state(self):
        """ValueError where torch has given a state tensor of the caller other memory: the old memory may be gone."""
        for tensor in self:
            for name, buffer in tensor.lent.items():
                label = f"state[{name!r}] of {tensor.name}"
                found = self.memory.again(buffer, label)
                self.memory.same_layout(found, label, buffer, f"{label} when it was bound")
                if found.address != buffer.address and buffer.size:
                    raise ValueError(f"{label} was given other memory (tensor.data = ..., share_memory_()) after this "
                                     f"optimizer had been made; make a new one with state=")  # fmt: skip

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
        buffer = self.memory.acquire(grad, tensor.grad_name, writable=writable)
        self.memory.same_layout(buffer, tensor.grad_name, tensor.param, tensor.name)
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
        named = [(tensor.name, param) for tensor, param in zip(self, params, strict=True)]
        for tensor in self:
            named += [(f"{name} of {tensor.name}", self.memory.ours(flat)) for name, flat in tensor.state.items()]
        for k, grad in grads:
            if grad is not None:
                buffer = self.acquire_grad(k, getattr(grad, "owner", grad), writable=False)
                named.append((self[k].grad_name, buffer))
        host.refuse_overlap(named)
        raise ValueError("two buffers of this step overlap in memory; every buffer of a step must be separate")


def new_state(rule, initial, param, memory, twin=None):
    """Name -> flat state array, for a parameter (Buffer), placed so that none evicts another from cache.  initial(name): the
    value at which a state starts.  twin: the flat gradient where it is known, which the placement then regards, too."""
    state, known = {}, [] if twin is None else [twin]
    for name in rules.state_names(rules.find(rule)):
        state[name] = memory.place_beside(param, [*known, *state.values()])
        state[name].fill(initial(name))
    return state


def refuse_equal(names):
    """ValueError where two names read alike, since state_dict() tells tensors apart by name."""
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"two keys of params read alike: {name}; their state could not be told apart")
        seen.add(name)
