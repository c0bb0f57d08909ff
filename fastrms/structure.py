"""The shapes that params and grads may have: one array, a sequence, a mapping, or a list of groups of these."""

from collections.abc import Iterable, Mapping

import numpy as np


def is_group_list(params):
    return (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(group, Mapping) and "params" in group for group in params)
    )


def of(params):
    """(structure, leaves) of one array, a sequence or a mapping."""
    if isinstance(params, Mapping):
        return MappingOf(list(params)), list(params.values())
    if isinstance(params, (list, tuple)) or _is_plain_iterable(params):
        leaves = list(params)
        return SequenceOf(len(leaves)), leaves
    return One(), [params]


def _is_plain_iterable(x):
    """A generator, dict view or the like: iterable, but not itself an array."""
    arrayish = ("__array_interface__", "__array__", "__dlpack__", "__cuda_array_interface__")
    if isinstance(x, (str, bytes, bytearray, memoryview, np.ndarray, Mapping)) or any(hasattr(x, name) for name in arrayish):
        return False
    try:
        memoryview(x)
    except TypeError:
        return isinstance(x, Iterable)
    return False


class One:
    """A single array."""

    count = 1

    def labels(self):
        """Of each leaf, what names it in a streamed step."""
        return [0]

    def names(self, what):
        return [what]

    def leaves(self, value, what):
        return [value]

    def build(self, leaves):
        return leaves[0]


class SequenceOf:
    """A sequence of `count` arrays."""

    def __init__(self, count):
        self.count = count

    def labels(self):
        return list(range(self.count))

    def names(self, what):
        return [f"{what}[{k}]" for k in range(self.count)]

    def leaves(self, value, what):
        if not isinstance(value, (list, tuple)):
            if not _is_plain_iterable(value):
                raise TypeError(f"{what} is a {type(value).__name__}; it must be a sequence of {self.count}, as params is")
            value = list(value)
        if len(value) != self.count:
            raise ValueError(f"{what} has {len(value)} entries, params has {self.count}")
        return value

    def build(self, leaves):
        return list(leaves)


class MappingOf:
    """A mapping with the given keys."""

    def __init__(self, keys):
        self.keys = keys
        self.count = len(keys)

    def labels(self):
        return self.keys

    def names(self, what):
        return [f"{what}[{key!r}]" for key in self.keys]

    def leaves(self, value, what):
        if not isinstance(value, Mapping):
            raise TypeError(f"{what} is a {type(value).__name__}; it must be a mapping, as params is")
        try:
            leaves = [value[key] for key in self.keys]
        except KeyError as error:
            raise ValueError(f"{what} has no {error.args[0]!r}, which params has; give None to skip it") from None
        if len(value) != self.count:
            extra = next(key for key in value if key not in self.keys)
            raise ValueError(f"{what} has {extra!r}, params has not")
        return leaves

    def build(self, leaves):
        return dict(zip(self.keys, leaves, strict=True))


class GroupsOf:
    """A list of groups, each with a structure of its own."""

    def __init__(self, members):
        self.members = members
        self.count = sum(member.count for member in members)

    def labels(self):
        return [(k, label) for k, member in enumerate(self.members) for label in member.labels()]

    def names(self, what):
        return [name for k, member in enumerate(self.members) for name in member.names(f"{what}[{k}]")]

    def leaves(self, value, what):
        if not isinstance(value, (list, tuple)) or len(value) != len(self.members):
            raise ValueError(f"{what} must be a list with one entry for each of the {len(self.members)} groups")
        leaves = []
        for k, (member, entry) in enumerate(zip(self.members, value, strict=True)):
            leaves += member.leaves(entry, f"{what}[{k}]")
        return leaves

    def build(self, leaves):
        leaves = iter(leaves)
        return [member.build([next(leaves) for _ in range(member.count)]) for member in self.members]
