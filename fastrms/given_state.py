"""The state that a caller gives: arrays of the caller's, checked as parameters are, and used in place as they are."""

from collections.abc import Mapping

from . import rules
from .memory import host


def acquired(tensors, rules_of_keys, state, not_negative):
    """For each tensor the Buffers of its state by name, in the order of its rule.

    state: name -> arrays in the structure of params, None where the rule of a tensor has no such state.  rules_of_keys: the
    rule of each RecipeKey.  not_negative: the names of states in which a negative number or NaN can only be damage.
    TypeError or ValueError where something does not fit.
    """
    kept = [rules.state_names(rules.find(rules_of_keys[tensor.recipe])) for tensor in tensors]
    names = dict.fromkeys(name for names in kept for name in names)
    refuse_other_names(state, names)
    found, labelled = [{} for _ in tensors], [(tensor.name, tensor.param) for tensor in tensors]
    for name in names:
        what = f"state[{name!r}]"
        rows = zip(tensors, found, kept, tensors.structure.state_leaves(state[name], what),
                   tensors.structure.names(what), strict=True)  # fmt: skip
        for tensor, buffers, wanted, array, label in rows:
            if name in wanted:
                buffers[name] = checked(tensors.memory, tensor, array, label, name in not_negative)
                labelled.append((label, buffers[name]))
            elif array is not None:
                raise ValueError(f"{label} is given, and the rule of {tensor.name} has no {name}: pass None in its place")
    host.refuse_overlap(labelled)
    return [{name: buffers[name] for name in wanted} for buffers, wanted in zip(found, kept, strict=True)]


def refuse_other_names(state, names):
    """Refuse a state that is no mapping with exactly these names."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}; it must be a mapping: state name -> arrays in the structure of "
                        f"params, as opt.state is")  # fmt: skip
    missing = [name for name in names if name not in state]
    extra = [name for name in state if name not in names]
    if missing or extra:
        fault = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r}"
        wanted = ", ".join(names) or "no state"
        raise ValueError(f"state {fault}; with these hyper-parameters there must be exactly: {wanted}")


def checked(memory, tensor, array, name, not_negative):
    """The Buffer of one state array of a tensor, which error sentences call `name`."""
    if array is None:
        raise ValueError(f"{name} is None, and the rule of {tensor.name} needs it: pass an array like {tensor.name}")
    buffer = memory.acquire(array, name, writable=True)
    memory.same_layout(buffer, name, tensor.param, tensor.name)
    if not_negative and not (memory.on_host(buffer.flat) >= 0).all():
        raise ValueError(f"{name} holds a negative number or NaN; means and sums of squares, and step sizes, are at least 0")
    return buffer
