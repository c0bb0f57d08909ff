"""The state of an optimizer as people see it, and as state_dict() and load_state_dict() write and read it."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import NamedTuple

from . import dialects, hyper, saved_formats, storage
from .memory.flat import ReadOnlyDict
from .memory.tree import Part
from .words import kind_of

MALFORMED = (AttributeError, IndexError, KeyError, TypeError)
_KEYS = ("dialect", "steps", "groups", "patterns", "tensors")  # of a state_dict, beside "optimizer"
_AGAIN = "make this optimizer with the class, the parameters and the options of the saved one"


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
    """The entry "tensors" of a state_dict, from copies of all that is kept and from the step count of each tensor."""
    return [
        {
            "name": name,
            "steps": counts[k],
            **saved_formats.described(tensor),
            **saved_formats.laid_out(tensor, part),
            "state": saved_formats.arrays(tensor, part, copies[k]),
        }
        for k, tensor in enumerate(tensors)
        for name, part in saved_formats.parts(tensor)
    ]


class Loaded(NamedTuple):
    """What a state_dict holds, checked against an optimizer."""

    values: list  # the hyper-parameters of each group
    flats: list  # for each tensor: name -> flat array, for all that saved_formats.kept() has
    steps: list  # the count of the optimizer, then that of each tensor
    dialect: str | None
    plateaus: list  # (Plateau of this optimizer, saved Plateau) pairs
    storages: list  # for each tensor its Storage, with the saved seed and rounding, or None


def checked(d, kind, tensors, values, patterns, trusted=False, convert=None):
    """Loaded of a state_dict.  kind: the class of the optimizer; values, patterns: its present hyper-parameters of each
    group, and the patterns of its groups; convert: the name of a format that states in d may have in place of theirs.
    ValueError where d does not fit; what it lacks, and of what type, is any of MALFORMED."""
    saved_formats.check("convert", convert)
    if not isinstance(d, Mapping):
        raise ValueError(f"this is {kind_of(d)}, not a state_dict of fastrms: pass what state_dict() gave")
    if isinstance(d.get("optimizer"), Mapping):
        raise ValueError('this is a checkpoint with an optimizer in it: pass its state, load_state_dict(saved["optimizer"])')
    if "param_groups" in d:
        raise ValueError("this is a state_dict of torch.optim: pass it to load_torch_state_dict()")
    if "optimizer" not in d:
        raise ValueError(f"this has the keys {[*d]}, not those of a state_dict of fastrms: pass what state_dict() gave")
    if d["optimizer"] != kind.__name__:
        raise ValueError(f"the state_dict is of {d['optimizer']}, this is {kind.__name__}: {_AGAIN}")
    if lacking := [key for key in _KEYS if key not in d]:
        raise ValueError(f"this is not a state_dict of fastrms: it lacks the key {lacking[0]!r}")
    dialects.preset(d["dialect"], kind.family)
    by_name = {tensor["name"]: tensor for tensor in d["tensors"]}
    parts = [_parts(tensor, by_name) for tensor in tensors]
    named = sum(map(len, parts))
    missing = next((name for some in parts for name, _ in some if name not in by_name), None)
    if missing is not None and (structure := saved_formats.of_structure(by_name, missing)):
        raise ValueError(f"the state_dict has no {missing}{structure}")
    for what, count in (("groups", len(values)), ("tensors", named)):
        if len(d[what]) != count:
            raise ValueError(f"the state_dict has {len(d[what])} {what}, this optimizer has {count}: {_AGAIN}")
    if d["patterns"] != patterns:
        raise ValueError(
            f"the state_dict has groups by the patterns {d['patterns']}, this optimizer by {patterns}: {_AGAIN}"
        )
    groups, plateaus = revived(d["groups"], [group["lr"] for group in values])
    new_values = [
        _group(kind, k, mine, group, d["dialect"]) for k, (mine, group) in enumerate(zip(values, groups, strict=True))
    ]
    if missing is not None:
        raise ValueError(f"the state_dict has no {missing}; it has {', '.join(map(str, by_name))}")
    entries = [[(part, by_name[name]) for name, part in some] for some in parts]
    rows = [*zip(tensors, entries, strict=True)]
    flats = [_state(tensor, some, kind, trusted, convert) for tensor, some in rows]
    steps = [hyper.step_count("steps", d["steps"], least=0), *map(_count, entries)]
    return Loaded(new_values, flats, steps, d["dialect"], plateaus, [saved_formats.resumed(*row) for row in rows])


def _parts(tensor, by_name):
    """(name, Part) pairs of what a state_dict has of a tensor: as this optimizer would save it, or else cut by name, or
    whole.  The first of these where the state_dict has none of them."""
    ways = saved_formats.parts(tensor), tensor.parts, [(tensor.name, Part())]
    return next((way for way in ways if all(name in by_name for name, _ in way)), ways[0])


def _group(kind, k, mine, group, dialect):
    """All hyper-parameters of group k.  Where the saved group has no lr, the present one stays; where it lacks another one,
    because it was saved before there was this hyper-parameter, that gets its default."""
    unknown = next((name for name in group if name not in mine), None)
    if unknown is not None:
        raise ValueError(f"groups[{k}] of the state_dict has {unknown!r}; {kind.__name__} has {', '.join(mine)}")
    new = {**kind.defaults, "lr": mine["lr"], **group}
    return {name: kind.checked(dialect, name, new[name]) for name in mine}


def _count(entries):
    """The step count of a tensor, from those of the arrays in it."""
    counts = {hyper.step_count("steps", entry["steps"], least=0): entry["name"] for _, entry in entries}
    if len(counts) > 1:
        said = ", ".join(f"{count} steps for {name}" for count, name in counts.items())
        raise ValueError(f"the state_dict has {said}; in this FlatBuffer they are one tensor with one count")
    return next(iter(counts))


def _state(tensor, entries, kind, trusted, convert):
    """The flat arrays of a tensor, from the saved ones of the arrays in it; entries: (Part, saved tensor) pairs."""
    kept = saved_formats.kept(tensor)
    for _, entry in entries:
        state, name = entry["state"], entry["name"]
        if state.keys() != kept.keys():
            raise ValueError(f"the state_dict has state {sorted(state)} for {name}, this optimizer has {sorted(kept)}: "
                             f"{saved_formats.of_master(state, kept) or _AGAIN}")  # fmt: skip
    flats = {}
    for key in kept:
        signed = key not in kind.not_negative
        flats[key], numbers = saved_formats.loaded(tensor, key, entries, signed, convert)
        if not (signed or trusted or (numbers >= 0).all()):
            raise ValueError(f"{key} of {_culprit(tensor, entries, numbers)} in the state_dict holds a negative number or "
                             f"NaN; means and sums of squares, and step sizes, are at least 0")  # fmt: skip
    return flats


def _culprit(tensor, entries, numbers):
    """The name of the first array in a tensor for which flat numbers hold a negative one or NaN."""
    shaped = tensor.shaped(numbers)
    return next(entry["name"] for part, entry in entries if not (part.of(shaped) >= 0).all())


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
    return callable(rate) and _kinds().get(type(rate).__name__) is type(rate)


def _is_plateau(rate):
    return type(rate) is _kinds().get("Plateau")


def _kinds():
    """KINDS of fastrms.schedules, which is imported where there is an object of its classes.  To import it here would let a
    child that is forked meanwhile wait for ever."""
    return getattr(sys.modules.get(f"{__package__}.schedules"), "KINDS", {})


def revived(plain, rates):
    """(groups, plateaus) from what described() gave, for an optimizer whose groups have these rates now.

    groups: the plain values with a schedule in place of its description, and without lr where the present one stays.
    plateaus: (present, saved) pairs of Plateaus; the present one is to take over the fields of the saved one.
    ValueError, TypeError or KeyError where the plain values are damaged or do not fit.
    """
    groups, pairs = _with_schedules(plain), {}
    for values, rate in zip(groups, rates, strict=True):
        if callable(rate) and not (_is_ours(rate) and _is_ours(values.get("lr"))):
            values.pop("lr", None)
        elif _is_plateau(rate):
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
    for _, saved in pairs.values():
        if not _is_plateau(saved):
            raise ValueError(f"lr is a Plateau here, the saved one is {kind_of(saved)}; set lr to a number first")
    if any(len({key[k] for key in pairs}) < len(pairs) for k in (0, 1)):
        raise ValueError("the groups that share a Plateau here are not those that shared one when it was saved")
