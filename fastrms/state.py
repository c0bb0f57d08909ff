"""The state of an optimizer as people see it, and as state_dict() and load_state_dict() write and read it."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import NamedTuple

import numpy as np

from . import dialects, hyper, storage
from .memory.flat import ReadOnlyDict

MALFORMED = (AttributeError, IndexError, KeyError, TypeError)


def mapping(tensors):
    """Mapping: state name -> the state arrays in the structure of params, None where a tensor has no such state."""
    names = dict.fromkeys(name for tensor in tensors for name in tensor.state)
    return ReadOnlyDict({
        name: tensors.structure.build([shown(t, name) if name in t.state else None for t in tensors])
        for name in names
    })  # fmt: skip


def shown(tensor, name):
    """A state of a tensor as people see it: an array, or a StoredState."""
    if tensor.storage is None:
        return tensor.shaped(tensor.state[name])
    return storage.shown(tensor, name)


def saved(tensors, copies, counts):
    """The entry "tensors" of a state_dict, from copies of the flat state and from the step count of each tensor."""
    return [
        {
            "name": name,
            "steps": counts[k],
            "state": {state: part.of(tensor.shaped(flat)) for state, flat in copies[k].items()},
        }
        for k, tensor in enumerate(tensors)
        for name, part in tensor.parts
    ]


class Loaded(NamedTuple):
    """What a state_dict holds, checked against an optimizer."""

    values: list  # the hyper-parameters of each group
    flats: list  # for each tensor: state name -> flat array
    steps: list  # the count of the optimizer, then that of each tensor
    dialect: str | None
    plateaus: list  # (Plateau of this optimizer, saved Plateau) pairs


def checked(d, kind, tensors, values, patterns, trusted=False):
    """Loaded of a state_dict.  kind: the class of the optimizer; values, patterns: its present hyper-parameters of each
    group, and the patterns of its groups.  ValueError where d does not fit; what it lacks, and of what type, is any of
    MALFORMED."""
    if isinstance(d.get("optimizer"), Mapping):
        raise ValueError('this is a checkpoint with an optimizer in it: pass its state, load_state_dict(saved["optimizer"])')
    if "param_groups" in d:
        raise ValueError("this is a state_dict of torch.optim: pass it to load_torch_state_dict()")
    if d["optimizer"] != kind.__name__:
        raise ValueError(f"the state_dict is of {d['optimizer']}, this is {kind.__name__}")
    dialects.preset(d["dialect"], kind.family)
    named = sum(len(tensor.parts) for tensor in tensors)
    for what, count in (("groups", len(values)), ("tensors", named)):
        if len(d[what]) != count:
            raise ValueError(f"the state_dict has {len(d[what])} {what}, this optimizer has {count}")
    if d["patterns"] != patterns:
        raise ValueError(f"the state_dict has groups by the patterns {d['patterns']}, this optimizer by {patterns}")
    groups, plateaus = revived(d["groups"], [group["lr"] for group in values])
    new_values = [
        _group(kind, k, mine, group, d["dialect"]) for k, (mine, group) in enumerate(zip(values, groups, strict=True))
    ]
    by_name = {tensor["name"]: tensor for tensor in d["tensors"]}
    missing = next((name for tensor in tensors for name, _ in tensor.parts if name not in by_name), None)
    if missing is not None:
        raise ValueError(f"the state_dict has no {missing}; it has {', '.join(map(str, by_name))}")
    flats = [_state(tensor, by_name, () if trusted else kind.not_negative) for tensor in tensors]
    steps = [hyper.step_count("steps", d["steps"], least=0), *(_count(tensor, by_name) for tensor in tensors)]
    return Loaded(new_values, flats, steps, d["dialect"], plateaus)


def _group(kind, k, mine, group, dialect):
    """All hyper-parameters of group k.  Where the saved group has no lr, the present one stays; where it lacks another one,
    because it was saved before there was this hyper-parameter, that gets its default."""
    unknown = next((name for name in group if name not in mine), None)
    if unknown is not None:
        raise ValueError(f"groups[{k}] of the state_dict has {unknown!r}; {kind.__name__} has {', '.join(mine)}")
    new = {**kind.defaults, "lr": mine["lr"], **group}
    return {name: kind.checked(dialect, name, new[name]) for name in mine}


def _count(tensor, by_name):
    """The step count of a tensor, from those of the arrays in it."""
    counts = {hyper.step_count("steps", by_name[name]["steps"], least=0): name for name, _ in tensor.parts}
    if len(counts) > 1:
        said = ", ".join(f"{count} steps for {name}" for count, name in counts.items())
        raise ValueError(f"the state_dict has {said}; in this FlatBuffer they are one tensor with one count")
    return next(iter(counts))


def _state(tensor, by_name, not_negative):
    """The flat state arrays of a tensor, from the saved ones of the arrays in it."""
    flats = {name: np.empty(tensor.param.size, tensor.param.dtype) for name in tensor.state}
    for name, part in tensor.parts:
        state = by_name[name]["state"]
        if state.keys() != flats.keys():
            raise ValueError(f"the state_dict has state {sorted(state)} for {name}, this optimizer has {sorted(flats)}")
        for key, array in state.items():
            to = part.of(tensor.shaped(flats[key]))
            if type(array) is not np.ndarray or (array.dtype, array.shape) != (to.dtype, to.shape):
                raise ValueError(f"{key} of {name} in the state_dict must be an ndarray of {to.dtype}, shape {to.shape}")
            if key in not_negative and not (array >= 0).all():
                raise ValueError(f"{key} of {name} in the state_dict holds a negative number or NaN; means and sums of "
                                 f"squares, and step sizes, are at least 0")  # fmt: skip
            to[...] = array
    return flats


# schedules in a state_dict


def described(groups):
    """The hyper-parameters of groups as plain values.  A schedule of ours becomes its fields, its class and the number of
    its object, as groups may share one; any other callable is left out."""
    numbers, plain = {}, []
    for group in groups:
        rate, values = group["lr"], dict(group)
        if _is_ours(rate):
            number = numbers.setdefault(id(rate), len(numbers))
            values["lr"] = {"schedule": type(rate).__name__, "object": number, **asdict(rate)}
        elif callable(rate):
            del values["lr"]
        plain.append(values)
    return plain


def _is_ours(rate):
    if not callable(rate):
        return False
    from .schedules import KINDS

    return KINDS.get(type(rate).__name__) is type(rate)


def revived(plain, rates):
    """(groups, plateaus) from what described() gave, for an optimizer whose groups have these rates now.

    groups: the plain values with a schedule in place of its description, and without lr where the present one stays.
    plateaus: (present, saved) pairs of Plateaus; the present one is to take over the fields of the saved one.
    ValueError, TypeError or KeyError where the plain values are damaged or do not fit.
    """
    from .schedules import Plateau

    groups, pairs = _with_schedules(plain), {}
    for values, rate in zip(groups, rates, strict=True):
        if callable(rate) and not (_is_ours(rate) and _is_ours(values.get("lr"))):
            values.pop("lr", None)
        elif type(rate) is Plateau:
            pairs[id(rate), id(values["lr"])] = rate, values["lr"]
    _refuse_lost(pairs)
    stays = {id(saved): rate for rate, saved in pairs.values()}
    for values in groups:
        if "lr" in values:
            values["lr"] = stays.get(id(values["lr"]), values["lr"])
    return groups, list(pairs.values())


def _with_schedules(plain):
    made, groups = {}, []
    for saved in plain:
        values = {**saved}
        told = values.get("lr")
        if isinstance(told, dict):
            if told["object"] not in made:
                made[told["object"]] = _revive(told)
            values["lr"] = made[told["object"]]
        elif "lr" in values:
            hyper.non_negative("lr", told)  # it may not be used, but a wrong one shows that the dict is damaged
        groups.append(values)
    return groups


def _revive(told):
    """The schedule with the fields and counters that described() wrote."""
    from .schedules import KINDS, Plateau

    kind = KINDS[told["schedule"]]
    values = {name: value for name, value in told.items() if name not in ("schedule", "object")}
    counters = {f.name: values.pop(f.name) for f in fields(kind) if not f.init}
    schedule = kind(**values)
    if kind is Plateau:
        schedule.count(**counters)
    return schedule


def _refuse_lost(pairs):
    """ValueError where loading would replace a Plateau that the caller feeds, or give it to other groups than it had."""
    from .schedules import Plateau

    for _, saved in pairs.values():
        if type(saved) is not Plateau:
            raise ValueError(f"lr is a Plateau here, the saved one is a {type(saved).__name__}; set lr to a number first")
    if any(len({key[k] for key in pairs}) < len(pairs) for k in (0, 1)):
        raise ValueError("the groups that share a Plateau here are not those that shared one when it was saved")
