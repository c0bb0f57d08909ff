"""The state that a caller gives: arrays of the caller's, checked as parameters are, and used in place as they are."""

from collections.abc import Mapping

from . import rules, storage
from .memory import host
from .words import kind_of

DTYPES = {  # of a torch tensor that holds what a format stores
    storage.BF16: "bfloat16",
    storage.FP16S: "float16",
    storage.Q8: "uint8",
    storage.Q8U: "uint8",
    storage.SPLIT16: "int16",
    storage.SPLIT8: "int8",
}


def acquired(tensors, rules_of_keys, state, not_negative):
    """For each tensor the Buffers of its state by name, in the order of its rule.

    state: name -> arrays in the structure of params, None where the rule of a tensor has no such state.  rules_of_keys: the
    rule of each RecipeKey.  not_negative: the names of states in which a negative number or NaN can only be damage; None
    where states may be stored in formats, in torch tensors, and come with the masters and remainders of parameters.
    TypeError or ValueError where something does not fit.
    """
    trusted = not_negative is None
    kept = [rules.state_names(rules.find(rules_of_keys[tensor.recipe])) for tensor in tensors]
    made = [tensor.storage if trusted else None for tensor in tensors]
    kept = [*map(storage.kept, made, kept)]
    names = dict.fromkeys(name for wanted in kept for name in wanted)
    refuse_other_names(state, names)
    found = {}  # (index of a tensor, state name) -> (what error sentences call the array, Buffer)
    for name in names:
        for k, label, array in leaves(tensors.structure, state, name):
            if name in kept[k]:
                found[k, name] = label, acquired_one(tensors, k, array, label, kept[k][name])
            elif array is not None:
                raise ValueError(
                    f"{label} is given, and the rule of {tensors[k].name} has no {name}: pass None in its place"
                )
    host.refuse_overlap([*found.values(), *((tensor.name, tensor.param) for tensor in tensors)])
    for (_, name), labelled in found.items():
        if not trusted and name in not_negative:
            refuse_negative(tensors.memory, *labelled)
    return [{name: found[k, name][1] for name in wanted} for k, wanted in enumerate(kept)]


def refuse_other_names(state, names):
    """TypeError or ValueError unless state is a mapping with exactly these names."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is {kind_of(state)}; it must be a mapping: state name -> arrays in the structure of "
                        f"params, as opt.state is")  # fmt: skip
    missing = [name for name in names if name not in state]
    extra = [name for name in state if name not in names]
    if missing or extra:
        fault = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r}"
        wanted = ", ".join(names) or "no state"
        raise ValueError(f"state {fault}; with these hyper-parameters there must be exactly: {wanted}")


def leaves(structure, state, name):
    """(index, what error sentences call it, array or None) of the given state of this name, for each tensor."""
    what = f"state[{name!r}]"
    labels, arrays = structure.names(what), structure.state_leaves(state[name], what)
    return [(k, *pair) for k, pair in enumerate(zip(labels, arrays, strict=True))]


def acquired_one(tensors, k, array, name, format):
    """The Buffer of a state array of tensor k, which error sentences call `name`."""
    like, memory = tensors[k], tensors.memory
    if array is None:
        raise ValueError(f"{name} is None, and the rule of {like.name} needs it: pass an array like {like.name}")
    if format is not storage.FLOAT:
        return stored_one(memory, like, array, name, format)
    dtype = str(getattr(array, "dtype", "")).removeprefix("torch.")
    if dtype in DTYPES.values():
        raise TypeError(f"{name} has dtype {dtype}, which is that of a state in a format; {like.name} has no state_format, "
                        f"so that it must be {like.dtype}: formats stay as they are once there is a state")  # fmt: skip
    buffer = memory.acquire(array, name, writable=True, wanted=like.dtype)
    updated_in = {"dtypes": (like.dtype,)} if like.storage else {}
    memory.same_layout(buffer, name, like.param, like.name, **updated_in)
    return buffer


def stored_one(memory, like, tensor, name, format):
    """The Buffer of a torch tensor that holds a state, or a remainder, of the Tensor `like` in a Format."""
    if not host.is_torch(tensor):
        raise TypeError(f"{name} is {kind_of(tensor)}; what is stored in {storage.said(format)} is a torch tensor "
                        f"of {DTYPES[format]} here")  # fmt: skip
    dtype, size = str(tensor.dtype).removeprefix("torch."), like.param.size
    if dtype != DTYPES[format]:
        raise TypeError(f"{name} has dtype {dtype}; what is stored in {storage.said(format)} is {DTYPES[format]}: formats "
                        f"stay as they are once there is a state")  # fmt: skip
    is_float = tensor.is_floating_point()
    buffer = memory.acquire(tensor, name, writable=True, halves=True) if is_float else memory.acquire_integers(tensor, name)
    if not format.in_blocks:
        memory.same_layout(buffer, name, like.param, like.name, dtypes=(buffer.dtype,))
    elif buffer.shape != (storage.items_of(format, size),) or buffer.address % 4:
        raise ValueError(f"{name} has shape {buffer.shape} and starts at address {buffer.address:#x}; q8 of {like.name} has "
                         f"shape {(storage.items_of(format, size),)}, and an address that is a multiple of 4")  # fmt: skip
    return buffer


def refuse_negative(memory, name, buffer):
    """ValueError where a state array holds a negative number or NaN."""
    if not (memory.on_host(buffer.flat) >= 0).all():
        raise ValueError(f"{name} holds a negative number or NaN; means and sums of squares, and step sizes, are at least 0")
