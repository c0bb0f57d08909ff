"""How a state_dict holds buffers that are stored in formats: as they are, with the names of their formats beside them.

A saved tensor with a Storage has three entries more: "formats", state name -> format; "rounding", "nearest" or "stochastic";
and "seed".  Its arrays of bf16, fp16 and of remainders are those bits in the shape of the parameter, and an array of q8 is
the flat buffer with codes and blocks.  Where there is such a buffer, a FlatBuffer is saved whole, as its blocks do not end
where a name does, "shape" is that of the parameter, and "order" lists its axes from the slowest to the fastest in memory.
"""

import math

import numpy as np

from . import formats, hyper, storage
from .memory.tree import Part
from .storage import FLOAT
from .words import kind_of

CONVERTED = ("float32", "bf16", "fp16", "q8")  # what convert= may name
check = hyper.choice(None, *CONVERTED)
DTYPES = {"float64": np.dtype(np.float64), "float32": np.dtype(np.float32)}
DTYPES |= {name: formats.FORMATS[name].dtype for name in ("bf16", "fp16", "q8")}
DTYPES |= {name: storage.SPLIT[name].low for name in storage.SPLIT}


def kept(tensor):
    """Name -> flat array of all that an optimizer keeps of a tensor: its states, and the master or the remainder of a bf16
    or fp16 parameter."""
    low = storage.low(tensor.storage.master) if tensor.storage else {}
    return {**tensor.state, **{name: tensor.storage.low for name in low}}


def formats_of(tensor):
    """Name -> Format of all that kept() has."""
    return storage.kept(tensor.storage, tensor.state)


def said(tensor, format):
    """The name of a Format of a tensor in a state_dict."""
    return str(tensor.dtype) if format is FLOAT else storage.said(format)


def in_blocks(tensor):
    """Whether a buffer of a tensor is stored in blocks."""
    return any(format.in_blocks for format in formats_of(tensor).values())


def parts(tensor):
    """(name, Part) pairs: the arrays that a state_dict has of a tensor."""
    return [(tensor.name, Part())] if len(tensor.parts) > 1 and in_blocks(tensor) else tensor.parts


def order(tensor, part):
    """The axes of an array in a tensor from the slowest to the fastest in memory."""
    shape, strides = _shape(tensor, part), tensor.param.strides
    in_order = part.span is not None or not tensor.param.size
    return sorted(range(len(shape)), key=lambda axis: axis if in_order else -strides[axis])


def described(tensor):
    """What a state_dict says of the formats of a tensor."""
    if tensor.storage is None:
        return {}
    rounding = "stochastic" if tensor.storage.stochastic else "nearest"
    named = {name: said(tensor, format) for name, format in formats_of(tensor).items()}
    return {"formats": named, "rounding": rounding, "seed": tensor.storage.seed}


def laid_out(tensor, part):
    """What a state_dict says of where the elements of an array in a tensor lie, if there are blocks of them."""
    return {"order": order(tensor, part), "shape": [*_shape(tensor, part)]} if in_blocks(tensor) else {}


def arrays(tensor, part, copies):
    """Name -> array for a state_dict, from copies of the flat arrays of kept()."""
    if not in_blocks(tensor):
        return {name: part.of(tensor.shaped(flat)) for name, flat in copies.items()}
    found = formats_of(tensor)
    return {name: flat if found[name].in_blocks else part.of(tensor.shaped(flat)) for name, flat in copies.items()}


def decoded(optimizer):
    """The entry "tensors" of a state_dict with all states in the dtype of the update, cut by name, and without masters."""
    entries = {entry["name"]: entry for entry in optimizer.state_dict()["tensors"]}
    return [
        _decoded_entry(tensor, name, part, entries.get(name) or entries[tensor.name], optimizer.not_negative)
        for tensor in optimizer._tensors
        for name, part in tensor.parts
    ]


def _decoded_entry(tensor, name, part, entry, not_negative):
    """A saved tensor with decoded states: one of this name, or the Part of this name in one that was saved whole."""
    whole = entry["name"] != name
    shape, state = tensor.param.shape if whole else _shape(tensor, part), {}
    for key in tensor.state:
        numbers = entry["state"][key]
        if "formats" in entry:
            numbers = _decoded(key, entry, _format_of(tensor, entry, key), shape, key not in not_negative)
        state[key] = part.of(numbers) if whole else numbers
    return {"name": name, "steps": entry["steps"], "state": state}


def resumed(tensor, entries):
    """The Storage of a tensor with the seed and the rounding that its saved entries have; (Part, entry) pairs."""
    entry = entries[0][1]
    if tensor.storage is None or "rounding" not in entry:
        return tensor.storage
    rounding = storage.CHECKS["rounding"]("rounding", entry["rounding"])
    stochastic = rounding == "stochastic" or in_blocks(tensor)  # q8 cannot have "nearest"
    return tensor.storage._replace(stochastic=stochastic, seed=hyper.seed("seed", entry["seed"]))


def loaded(tensor, key, entries, signed, convert):
    """(flat array, its numbers) of what is kept under `key`, from the saved (Part, entry) pairs.  The numbers are None where
    signed is true, as nobody asks for them then."""
    format, size = formats_of(tensor)[key], tensor.param.size
    for part, entry in entries:
        _refuse_other_shape(key, entry, _shape(tensor, part))
    theirs = [_format_of(tensor, entry, key) for _, entry in entries]
    if any(name != said(tensor, format) for name in theirs) or _lies_otherwise(tensor, format, entries):
        _refuse_conversion(tensor, key, format, entries, convert)
        numbers = np.empty(size, np.float32)
        for (part, entry), name in zip(entries, theirs, strict=True):
            part.of(tensor.shaped(numbers))[...] = _decoded(key, entry, name, _shape(tensor, part), signed)
        return storage.stored(format, numbers), numbers
    flat = np.empty(formats.stored_bytes(format, size) if format.in_blocks else size, _dtype(tensor, format))
    for part, entry in entries:
        to = flat if format.in_blocks else part.of(tensor.shaped(flat))
        to[...] = _array(key, entry, format, _shape(tensor, part), flat.dtype)
    if signed:
        return flat, None
    return flat, flat if format is FLOAT else formats.decode(format, flat, size)


def _dtype(tensor, format):
    return tensor.dtype if format is FLOAT else format.low or format.dtype


def _format_of(tensor, entry, key):
    """The name of the format of a saved array."""
    name = entry.get("formats", {}).get(key, str(tensor.dtype))
    if name not in DTYPES:
        raise ValueError(f"{key} of {entry['name']} in the state_dict has the format {name!r}, which this fastrms does not "
                         f"know: it has {', '.join(DTYPES)}")  # fmt: skip
    return name


def _shape(tensor, part):
    return tensor.param.shape if part.span is None else part.shape


def _lies_otherwise(tensor, format, entries):
    """Whether the blocks that were saved have other elements: those of one of several arrays, or in another memory order."""
    return format.in_blocks and (len(entries) > 1 or any(list(e["order"]) != order(tensor, part) for part, e in entries))


def _refuse_other_shape(key, entry, shape):
    """ValueError where an array was saved in blocks, which do not show its shape, and had another one."""
    saved = tuple(entry.get("shape", shape))
    if saved != shape:
        raise ValueError(f"{key} of {entry['name']} in the state_dict has the shape {saved}, in this optimizer {shape}")


def _refuse_conversion(tensor, key, format, entries, convert):
    """ValueError unless the saved arrays may be decoded and stored anew."""
    mine = said(tensor, format)
    for _, entry in entries:
        theirs, label = _format_of(tensor, entry, key), f"{key} of {entry['name']}"
        if "float64" in (mine, theirs) or key in storage.LOW.values():
            remedy = (
                "float64 is not converted" if "float64" in (mine, theirs) else f"pass master={theirs!r} to the optimizer"
            )
            raise ValueError(f"{label} is {theirs} in the state_dict, and {mine} in this optimizer: {remedy}")
        if theirs == mine == "q8" != convert:
            what = "of fewer elements" if len(entries) > 1 else "in another memory order"
            raise ValueError(f"{label} has blocks of q8 {what} than {tensor.name}: pass convert='q8', "
                             f"which decodes it and rounds it to nearest")  # fmt: skip
        if theirs not in (mine, convert):
            instead = "no state_format" if theirs == "float32" else f"state_format={theirs!r}"
            other = "" if convert is None else f", which is not convert={convert!r}"
            raise ValueError(f"{label} is stored in {theirs} in the state_dict{other}, and in {mine} in this optimizer: "
                             f"make the optimizer with {instead}, or pass convert={theirs!r}, which decodes it and rounds "
                             f"it to the nearest {mine}")  # fmt: skip


def _array(key, entry, format, shape, dtype):
    """A saved array of numbers of this shape; ValueError where it is not one, or where its blocks are damaged."""
    array, label, size = entry["state"][key], f"{key} of {entry['name']}", math.prod(shape)
    expected = (formats.stored_bytes(format, size),) if format.in_blocks else shape
    if type(array) is not np.ndarray or (array.dtype, array.shape) != (dtype, expected):
        its = f"{array.dtype}, shape {array.shape}" if type(array) is np.ndarray else kind_of(array)
        raise ValueError(f"{label} in the state_dict must be an ndarray of {dtype}, shape {expected}, and is {its}: load it "
                         f"into an optimizer over parameters as those that it was saved from")  # fmt: skip
    if format.in_blocks:
        storage.refuse_damaged_blocks(format, np.array(array), size, f"{label} in the state_dict")
    return array


def _decoded(key, entry, name, shape, signed):
    """The numbers of a saved array, in this shape; name: that of its format."""
    format = FLOAT if name == "float32" else storage.SPLIT.get(name) or storage.named(name, signed)
    array, axes = _array(key, entry, format, shape, DTYPES[name]), range(len(shape))
    if format is FLOAT:
        return array
    numbers = formats.decode(format, np.array(array, order="C").reshape(-1), math.prod(shape))
    if not format.in_blocks:
        return numbers.reshape(shape)
    slowest_first = list(entry["order"])
    if sorted(slowest_first) != [*axes]:
        raise ValueError(
            f"the order of {entry['name']} in the state_dict is {slowest_first}, which are not its {len(axes)} axes"
        )
    return numbers.reshape([shape[axis] for axis in slowest_first]).transpose([slowest_first.index(axis) for axis in axes])


def of_structure(entries, missing):
    """What a sentence on a missing name adds where the saved structure was another: one array, a FlatBuffer that was saved
    whole, or several arrays.  entries: name -> saved tensor."""
    inside = [name for name in entries if name.startswith(f"{missing}[")]
    if inside:
        return (f", it has {', '.join(inside)}: make this optimizer over the same names or places of arrays, as the saved "
                f"one was")  # fmt: skip
    whole = next((name for name in entries if missing.startswith(f"{name}[")), None)
    if whole is None:
        return ""
    if len(entries[whole].get("shape", ())) != 1:  # without blocks there is no shape, and a FlatBuffer has one dimension
        return f": its {whole} is one array; make this optimizer over one array, as the saved one was"
    return (f": {whole} was saved whole, as q8 states of a FlatBuffer are; load it into an optimizer of such a FlatBuffer "
            f"without state_format, with convert='q8', and load the state_dict() of that one here with "
            f"convert='float32'")  # fmt: skip


def of_master(saved, kept):
    """What a sentence on other names adds where only the master of a parameter makes the difference."""
    low = set(storage.LOW.values())
    if set(saved) - low != set(kept) - low:
        return ""
    return "give this optimizer the parameters and the master= that the saved one had"
