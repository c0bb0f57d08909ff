"""The shapes that params and grads may have: an array, a sequence, a mapping, a FlatBuffer, or a list of groups of these."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ..words import kind_of, shown
from . import device, host, remedies
from .flat import FlatBuffer, ReadOnlyDict, ReadOnlyList, Views, joined, key_text, one_after_another

STEADY = (np.ndarray, Views)  # types of gradients that always hold the same arrays: none can be exchanged


def arrange(params, groups):
    """(structure, leaves, group_of, overrides) of params, of a list of groups, or of named arrays with groups by pattern.
    group_of: the index of the group of each leaf; overrides: for each group the hyper-parameters given for it, by name."""
    if groups is not None:
        return _by_pattern(params, groups)
    listed = _is_group_list(params)
    if not listed:
        _refuse_half_groups(params)
    members = params if listed else [{"params": params}]
    parts = [of(member["params"]) for member in members]
    overrides = [{name: value for name, value in member.items() if name != "params"} for member in members]
    structure = GroupsOf([part for part, _ in parts]) if listed else parts[0][0]
    leaves = [leaf for _, leaves in parts for leaf in leaves]
    group_of = [index for index, (part, _) in enumerate(parts) for _ in range(part.count)]
    return structure, leaves, group_of, overrides


def _by_pattern(params, groups):
    """The same for named arrays: group 0 has what matches no pattern, then comes one group for each pattern."""
    if not isinstance(groups, Mapping) or not all(isinstance(p, str) and isinstance(o, Mapping) for p, o in groups.items()):
        listed = "; a list of groups is itself params: [{'params': w, 'lr': 0.1}, ...]" if isinstance(groups, list) else ""
        raise TypeError(f"groups={shown(groups)} must be a mapping name pattern -> mapping of hyper-parameters{listed}")
    if not isinstance(params, (Mapping, FlatBuffer)):
        raise TypeError(f"groups={shown(groups)} goes by name, and params is {kind_of(params)} without names; pass a "
                        f"mapping name -> array or a FlatBuffer")  # fmt: skip
    owner = _owners(params.params if isinstance(params, FlatBuffer) else params, list(groups))
    structure, leaves = of(params, owner)
    group_of = [owner[key] for key in structure.keys]
    return structure, leaves, group_of, [{}, *map(dict, groups.values())]


def _owners(names, patterns):
    """name -> the number of the first pattern that matches it, from 1; 0 where none does."""
    owner = {name: next((k for k, p in enumerate(patterns, 1) if fnmatchcase(_plain(name), p)), 0) for name in names}
    for k, pattern in enumerate(patterns, 1):
        if k not in owner.values():
            raise ValueError(f"groups[{pattern!r}] gets none of {', '.join(map(_plain, names))}: it matches no name, or an "
                             f"earlier pattern takes all that it matches")  # fmt: skip
    return owner


def _plain(key):
    """A key as the text that patterns are matched with: a name without quotation marks."""
    return str.__str__(key) if isinstance(key, str) else key_text(key)


def _is_group_list(params):
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(group, Mapping) and "params" in group for group in params)
    )


def _refuse_half_groups(params):
    """TypeError for a sequence with mappings in it that is no list of groups."""
    if not isinstance(params, (list, tuple)) or not any(isinstance(entry, Mapping) for entry in params):
        return
    k = next(k for k, entry in enumerate(params) if not (isinstance(entry, Mapping) and "params" in entry))
    entry, kind = params[k], kind_of(params[k])
    if not isinstance(entry, Mapping):
        raise TypeError(f"params[{k}] is {kind} among groups: in a list of groups each is a mapping with its arrays under "
                        f"the key 'params'")  # fmt: skip
    keys = ", ".join(map(repr, entry)) or "no keys"
    raise TypeError(f"params[{k}] is {kind} without the key 'params' (it has {keys}): in a list of groups each has its "
                    f"arrays under this key, and nested mappings are not flattened; without groups pass one mapping with a "
                    f"key for each array, such as 'layer.weight'")  # fmt: skip


def of(params, owner=None):
    """(structure, leaves) of one array, a sequence, a mapping or a FlatBuffer; owner: the group of each of its names."""
    if isinstance(params, FlatBuffer):
        structure = FlatOf(params, owner or dict.fromkeys(params.params, 0))
        return structure, structure.cut(params._owner)
    if isinstance(params, Mapping):
        keys = list(params)
        leaves = [params[key] for key in keys]
        _refuse_made_anew(leaves, map(params.__getitem__, keys), params)
        return MappingOf(keys), _refuse_flat(leaves)
    if isinstance(params, (list, tuple)) or _is_plain_iterable(params):
        leaves = list(params)
        if isinstance(params, (list, tuple)) and any(isinstance(leaf, remedies.NUMBERS) for leaf in leaves):
            raise TypeError(f"params is {kind_of(params)} of numbers{remedies.of_non_array(1.0, 'params')}")
        if iter(params) is not params:
            _refuse_made_anew(leaves, params, params)
        return SequenceOf(list(range(len(leaves)))), _refuse_flat(_refuse_modules(leaves, params))
    return One(), [params]


def _refuse_made_anew(leaves, again, params):
    """TypeError where a second look into params finds other arrays, as in an NpzFile: an update would reach neither."""
    for first, second in zip(leaves, again, strict=False):  # nothing is compared where params can be iterated only once
        if first is not second and not host.same_memory(first, second):
            kind, plain = kind_of(params), "dict" if isinstance(params, Mapping) else "list"
            raise TypeError(f"params is {kind}, which makes its arrays anew at each access, so that an update would be "
                            f"lost: make arrays = {plain}(params) once, pass them and use them from then on")  # fmt: skip


def _refuse_modules(leaves, params):
    """The leaves of a sequence.  A torch Sequential, a sequence of modules, is refused; a ParameterList is accepted."""
    if remedies.is_module(params) and not all(map(host.is_torch, leaves)):
        raise TypeError(f"params is {kind_of(params)}, a module: pass its parameters, params.parameters()")
    return leaves


def _refuse_flat(leaves):
    """The leaves; TypeError where one of them is a FlatBuffer."""
    if any(isinstance(leaf, FlatBuffer) for leaf in leaves):
        raise TypeError("a FlatBuffer is no array among others: pass it alone, or as a group, "
                        "[{'params': flat}, {'params': other_arrays}]")  # fmt: skip
    return leaves


def _is_plain_iterable(x):
    """A generator, dict view or the like: iterable, but not itself an array."""
    arrayish = ("__array_interface__", "__array__", "__dlpack__", "__cuda_array_interface__", "dtype")
    if isinstance(x, (str, bytes, bytearray, memoryview, np.ndarray, Mapping)) or any(hasattr(x, name) for name in arrayish):
        return False
    try:
        memoryview(x)
    except TypeError:
        return isinstance(x, Iterable)
    return False


class Part(NamedTuple):
    """Where a named array lies in a tensor of the optimizer; span is None where it is the whole tensor."""

    span: slice | None = None
    shape: tuple = ()

    def of(self, tensor):
        """The view of this part of an array, which has the shape of the tensor; of a state in a format, its part."""
        if self.span is None:
            return tensor
        return tensor[self.span].reshape(self.shape) if hasattr(tensor, "reshape") else tensor.part(self)


class Structure:
    """A shape that params may have, with `count` tensors, its leaves.

    labels() are what names each leaf in a streamed step, and names(what) what error sentences call it.  leaves(value, what)
    lists the leaves of a value that must have this structure, and build(leaves) is the reverse, for showing the state.
    state_leaves(value, what) lists those of a state that a caller gives.
    """

    count: int
    cut_tensors = ()  #: (what sentences call it, torch tensor, its address), for each of which the leaves are views

    def refuse_moved(self):
        """ValueError where torch has given a tensor under a FlatBuffer other memory."""

    def state_leaves(self, value, what):
        return self.leaves(value, what)

    def copy_leaves(self, value, what):
        """The leaves of the arrays to which the parameters are written once more."""
        return self.leaves(value, what)

    def parts(self, what):
        """For each tensor the named arrays in it: (name, Part) pairs."""
        return [[(name, Part())] for name in self.names(what)]

    def twins(self):
        """For each tensor its gradient array where this is known before the first step, else None."""
        return [None] * self.count


class One(Structure):
    """A single array."""

    count = 1

    def labels(self):
        """What names each leaf in a streamed step: an index, a key, or a pair (group index, one of these)."""
        return [0]

    def names(self, what):
        return [what]

    def leaves(self, value, what):
        remedies.refuse_collection(value, what)
        return [value]

    def build(self, leaves):
        return leaves[0]


class Keyed(Structure):
    """Arrays that have a key each."""

    def __init__(self, keys):
        self.keys = keys
        self.count = len(keys)

    def labels(self):
        return self.keys

    def names(self, what):
        return [f"{what}[{key_text(key)}]" for key in self.keys]


class SequenceOf(Keyed):
    """A sequence of arrays, whose keys are their indices."""

    def leaves(self, value, what):
        if not isinstance(value, (list, tuple)):
            if not _is_plain_iterable(value):
                raise TypeError(f"{what} is {kind_of(value)}; it must be a sequence of {self.count}, as params is")
            value = list(value)
        if len(value) != self.count:
            raise ValueError(f"{what} has {len(value)} entries, params has {self.count}")
        return value

    def build(self, leaves):
        return ReadOnlyList(leaves)


class MappingOf(Keyed):
    """A mapping with these keys."""

    def leaves(self, value, what):
        if not isinstance(value, Mapping):
            raise TypeError(f"{what} is {kind_of(value)}; it must be a mapping, as params is")
        try:
            leaves = [value[key] for key in self.keys]
        except KeyError as error:
            missing = key_text(error.args[0])
            raise ValueError(f"{what} has no {missing}, which params has; give None to skip it") from None
        if len(value) != self.count:
            keys = set(self.keys)
            extra = next(key for key in value if key not in keys)
            raise ValueError(f"{what} has {key_text(extra)}, params has not")
        return leaves

    def build(self, leaves):
        return ReadOnlyDict(zip(self.keys, leaves, strict=True))


class FlatOf(Structure):
    """A FlatBuffer: one tensor for each run of consecutive names that are in the same group."""

    def __init__(self, flat, owner):
        self.flat = flat
        flat.refuse_moved()
        self.runs = [self._run(list(names)) for _, names in groupby(owner, owner.get)]
        self.keys = [next(iter(run)) for run in self.runs]
        self.count = len(self.runs)
        self.spans = one_after_another(sum(math.prod(part.shape) for part in run.values()) for run in self.runs)
        self.size, self.memory, self.cut_tensors = flat._size, flat._memory, []

    def refuse_moved(self):
        self.flat.refuse_moved()

    def _run(self, names):
        shapes = [tuple(self.flat.params[name].shape) for name in names]
        spans = one_after_another(map(math.prod, shapes))
        return {name: Part(span, shape) for name, span, shape in zip(names, spans, shapes, strict=True)}

    def labels(self):
        raise TypeError("a FlatBuffer is updated as one, not name by name: a streamed step needs the mapping flat.params")

    def names(self, what):
        if self.count == 1:
            return [what]
        ends = [(key_text(next(iter(run))), key_text(next(reversed(run)))) for run in self.runs]
        return [f"{what}[{first}]" if first == last else f"{what}[{first}:{last}]" for first, last in ends]

    def leaves(self, value, what):
        if value is None:
            return [None] * self.count
        if value is self.flat.grads:
            value = self.flat.grad
        if not isinstance(value, (np.ndarray, host.Stored)) and not self._is_on_device(value):
            raise TypeError(f"{what} is {kind_of(value)}; it must be the grads or grad of the FlatBuffer, or a 1-D "
                            f"array of {self.size}: copy other gradients into flat.grads[name][...]")  # fmt: skip
        if tuple(value.shape) != (self.size,):
            raise ValueError(f"{what} has shape {tuple(value.shape)}, the FlatBuffer has {self.size} elements in one "
                             f"dimension")  # fmt: skip
        return self.cut(value)

    def _is_on_device(self, value):
        """Whether a value is an array in device memory, as this FlatBuffer is."""
        return self.memory is device and device.is_device_array(value)

    def state_leaves(self, value, what):
        if value is None:
            return [None] * self.count
        if isinstance(value, Mapping):
            arrays = dict(zip(self.flat.params, MappingOf(list(self.flat.params)).leaves(value, what), strict=True))
            return [self._joined({name: arrays[name] for name in run}, what) for run in self.runs]
        array = value if host.is_torch(value) or self._is_on_device(value) else host.as_array(value, what)
        if tuple(array.shape) != (self.size,):
            raise ValueError(f"{what} has shape {tuple(array.shape)}, the FlatBuffer has {self.size} elements in one "
                             f"dimension")  # fmt: skip
        return self._cut_named(array, what)

    def copy_leaves(self, value, what):
        if value is None:
            return [None] * self.count
        if isinstance(value, FlatBuffer):
            value = value.data
        if isinstance(value, Mapping) or tuple(getattr(value, "shape", ())) != (self.size,):
            raise ValueError(f"{what} of a FlatBuffer must be one array of its {self.size} elements in one dimension, or a "
                             f"FlatBuffer of as many")  # fmt: skip
        return self._cut_named(value, what)

    def _cut_named(self, whole, what):
        """The parts of an array that stays in use.  torch may give a tensor other memory; its views do not learn of that."""
        if self.count == 1:
            return [whole]
        if host.is_torch(whole):
            self.cut_tensors.append((what, whole, whole.data_ptr()))
        return self.cut(whole)

    def _joined(self, arrays, what):
        """One array over the named arrays of a run, which lie one after the other in memory; None where there are none."""
        if all(array is None for array in arrays.values()):
            return None
        buffers, end = {}, None
        for name, array in arrays.items():
            label, like = f"{what}[{key_text(name)}]", f"params[{key_text(name)}]"
            buffer = buffers[name] = self.memory.acquire(array, label, writable=True)
            self.memory.same_layout(buffer, label, self.memory.acquire(self.flat.params[name], like, writable=True), like)
            if host.is_torch(array) or (buffer.size and buffer.address != (end or buffer.address)):
                raise ValueError(f"{label} does not follow in memory on the array before it; the state of a FlatBuffer is "
                                 f"one array: pass one of {self.size} elements in one dimension, or the params "
                                 f"of another FlatBuffer")  # fmt: skip
            end = buffer.end if buffer.size else end
        return joined(list(buffers.values()))

    def cut(self, whole):
        """The parts of a 1-D array that belong to the runs of names."""
        if isinstance(whole, host.Stored):
            return [host.Stored(whole.array[span], whole.format) for span in self.spans]
        return [whole[span] for span in self.spans]

    def parts(self, what):
        return [[(f"{what}[{key_text(name)}]", part) for name, part in run.items()] for run in self.runs]

    def twins(self):
        return super().twins() if self.memory is device else self.cut(self.flat.grad)  # a GPU asks for no placement

    def build(self, leaves):
        runs = zip(self.runs, leaves, strict=True)
        return ReadOnlyDict({n: leaf if leaf is None else part.of(leaf) for run, leaf in runs for n, part in run.items()})


class GroupsOf(Structure):
    """A list of groups, each with a structure of its own."""

    def __init__(self, members):
        self.members = members
        self.count = sum(member.count for member in members)

    def refuse_moved(self):
        for member in self.members:
            member.refuse_moved()

    def labels(self):
        return [(k, label) for k, member in enumerate(self.members) for label in member.labels()]

    def names(self, what):
        return [name for k, member in enumerate(self.members) for name in member.names(f"{what}[{k}]")]

    def parts(self, what):
        return [parts for k, member in enumerate(self.members) for parts in member.parts(f"{what}[{k}]")]

    def twins(self):
        return [twin for member in self.members for twin in member.twins()]

    def leaves(self, value, what):
        entries = self._entries(value, what)
        return [leaf for member, entry, name in entries for leaf in member.leaves(entry, name)]

    def state_leaves(self, value, what):
        entries = self._entries(value, what)
        return [leaf for member, entry, name in entries for leaf in member.state_leaves(entry, name)]

    def copy_leaves(self, value, what):
        entries = self._entries(value, what)
        return [leaf for member, entry, name in entries for leaf in member.copy_leaves(entry, name)]

    def _entries(self, value, what):
        """(member, its entry of a list of groups, what error sentences call this entry) for each group."""
        if not isinstance(value, (list, tuple, ReadOnlyList)) or len(value) != len(self.members):
            raise ValueError(f"{what} must be a list with one entry for each of the {len(self.members)} groups")
        return [(member, entry, f"{what}[{k}]") for k, (member, entry) in enumerate(zip(self.members, value, strict=True))]

    def build(self, leaves):
        leaves = iter(leaves)
        return ReadOnlyList(member.build([next(leaves) for _ in range(member.count)]) for member in self.members)
