"""Storage formats in the optimizers of torch: what the options of a group mean for the state of a parameter, the tensors
that hold it, and what load_state_dict() may take in their place.

A state in bf16 or fp16 is a tensor of torch.bfloat16 or torch.float16 in the layout of the parameter, one in q8 a flat
tensor of torch.uint8 with codes and blocks, beside which state["q8_shape"] says the shape of the parameter.  A float32
master is state["master"], the lower bits of a split one state["remainder"].
"""

from types import SimpleNamespace

import numpy as np
import torch

from . import formats, rules, storage
from .given_state import DTYPES
from .memory import host, placement
from .storage import FLOAT
from .torch_shards import is_spread, part_of
from .torch_state import refuse_no_state_dict

HALVES = {torch.bfloat16: host.BF16, torch.float16: host.FP16}
SHAPE = "q8_shape"  # what a state calls the shape of the parameter whose elements are in blocks
SAID = {getattr(torch, name): storage.said(format) for format, name in DTYPES.items()}


def options_of(group):
    """Those of the options state_format, master and rounding that a group of parameters has, checked."""
    (options,) = storage.of_groups({}, [{name: group[name] for name in storage.OPTIONS if group.get(name) is not None}])
    return options


def numpy_dtype(tensor):
    """What a Buffer of this tensor has as its dtype."""
    return HALVES[tensor.dtype] if tensor.dtype in HALVES else np.dtype(str(tensor.dtype).removeprefix("torch."))


def of_state(kind, rule, options, param, name):
    """Name -> Format of what the state of a parameter holds beside its count: its states, and the master or the remainder of
    a bf16 or fp16 parameter.  ValueError, which calls the parameter `name`, where it cannot be stored so."""
    part, names, master = part_of(param), rules.state_names(rules.find(rule)), options.get("master")
    if master and part.dtype not in HALVES:
        raise ValueError(f"master={master!r} is for parameters in bf16 and fp16; {name} has dtype {numpy_dtype(part)}: put "
                         f"it into a group of parameters without master")  # fmt: skip
    dtype = np.dtype(np.float32) if part.dtype in HALVES else numpy_dtype(part)
    like = SimpleNamespace(name=name, dtype=dtype, param=SimpleNamespace(dtype=numpy_dtype(part)))
    made = storage.of_tensor(like, rule, options, None, kind.not_negative, 0, 0)
    found = storage.kept(made, names)
    if any(format.in_blocks for format in found.values()):
        refuse_blocks(param, name)
    return found


def refuse_blocks(param, name):
    """ValueError for a parameter whose states cannot be in blocks of q8."""
    if is_spread(param):
        raise ValueError(f"state_format='q8' has blocks of 256 elements, which another number of ranks would cut elsewhere; "
                         f"{name} is a DTensor: pass state_format='bf16'")  # fmt: skip
    if not param.is_contiguous():
        raise ValueError(f"state_format='q8' has blocks of 256 elements in the order of contiguous memory; {name} has "
                         f"strides {param.stride()}: pass state_format='bf16', or make it contiguous")  # fmt: skip


def refuse_other_shape(state, param, name, where=""):
    """ValueError where a state in blocks is that of a parameter of another shape, of which a flat tensor tells nothing."""
    saved = state.get(SHAPE)
    if saved is not None and [*map(int, saved)] != [*param.shape]:
        raise ValueError(f"the state of {name}{where} is in q8 of the shape {(*map(int, saved),)}, the parameter has "
                         f"{tuple(param.shape)}: give it that shape, or begin anew without this state")  # fmt: skip


def refuse_stale_master(state, wanted, name):
    """ValueError where a state has a master, or a remainder, which the options of its group no longer ask for: its bits
    would be lost, and be out of date when they came back.  wanted: what the state must have."""
    key = next((key for key in storage.LOW.values() if key in state and key not in wanted), None)
    if key is not None:
        raise ValueError(f"the state of {name} has a {key}, which the master= of its group leaves out of date: set "
                         f"master={master_of(key, state[key])!r} again, or delete it to go on from the parameter: del "
                         f"opt.state[p][{key!r}]")  # fmt: skip


def master_of(key, tensor):
    """The option master that keeps a tensor under this key."""
    return "float32" if key == "master" else "split16" if tensor.dtype is torch.int16 else "split8"


def shape_of(param):
    """What state["q8_shape"] is."""
    return torch.tensor(param.shape, dtype=torch.int64)


def dtype_of(param, format):
    """The dtype of a tensor that holds a state in this Format."""
    if format is not FLOAT:
        return getattr(torch, DTYPES[format])
    return torch.float32 if param.dtype in HALVES else param.dtype


def new_part(param, beside, value, format=FLOAT):
    """A new tensor for a state in a Format, whose numbers are all this value; see new_state() of torch_core."""
    dtype, size = dtype_of(param, format), param.numel()
    if (format is FLOAT and param.device.type != "cpu") or not size:
        shape = (0,) if format.in_blocks else param.shape
        return torch.full_like(param, value, dtype=dtype, requires_grad=False).view(shape)
    items = storage.items_of(format, size) if format.in_blocks else size
    bits = np.dtype(np.int16) if dtype is torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    flat = placement.place(items, bits, [x.data_ptr() for x in (param, *beside)])
    storage.fill(flat, format, size, value)
    return like(param, torch.from_numpy(flat).view(dtype).to(param.device), format)


def like(param, flat, format):
    """A flat tensor of a state in the layout of its parameter; one of blocks stays flat."""
    return flat if format.in_blocks else flat.as_strided(param.shape, param.stride())


# state_dict()


class Held:
    """A tensor that torch's load_state_dict() shall leave as it is: it would give it the dtype of the parameter."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor


def held(names):
    """A hook for load_state_dict(): states of these names are Held, and the options of each group stay what they are."""

    def hook(optimizer, d):
        refuse_no_state_dict(d, type(optimizer).__name__)
        state = {key: hidden(value, names) if isinstance(value, dict) else value for key, value in d["state"].items()}
        groups = [dict(group) for group in d["param_groups"]]
        for saved, mine in zip(groups, optimizer.param_groups, strict=False):
            saved.update({name: mine[name] for name in storage.OPTIONS if name in mine})
        return {**d, "state": state, "param_groups": groups}

    return hook


def hidden(state, names):
    return {name: Held(x) if name in names and torch.is_tensor(x) else x for name, x in state.items()}


def shown(state):
    """The state of a parameter without Held."""
    return {name: x.tensor if isinstance(x, Held) else x for name, x in state.items()}


def said(tensor):
    """The name of the format of a tensor in a state_dict."""
    return SAID.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def name_of(param, format):
    """The name of a Format in which this optimizer keeps a state of a parameter."""
    return str(dtype_of(param, format)).removeprefix("torch.") if format is FLOAT else storage.said(format)


def loaded(made, key, value, param, format, signed, convert, name):
    """Write a saved state, a plain tensor, into the new one of this optimizer; ValueError, which calls it `key of name`,
    where it does not fit.  signed: whether a saved q8 has signs; convert: as in load_state_dict()."""
    saved, mine, label = said(value), name_of(param, format), f"{key} of {name}"
    source = storage.named("q8", signed)
    if in_blocks := saved == "q8":
        bits = np.array(value.detach().cpu().numpy())
        refuse_other_size(bits, source, param, label)
    if saved == mine or {saved, mine} == {"float32", "float64"}:
        made.copy_(value)
        return
    refuse_conversion(label, key, saved, mine, convert)
    numbers = torch.from_numpy(formats.decode(source, bits, param.numel())).view(param.shape) if in_blocks else value
    write(made, numbers, param, format)


def refuse_other_size(bits, format, param, label):
    """ValueError where an array in blocks is not that of a parameter of this size, or is damaged."""
    expected = formats.stored_bytes(format, param.numel())
    if bits.shape != (expected,):
        raise ValueError(f"{label} in the state_dict has shape {bits.shape}, q8 of {param.numel()} elements "
                         f"has {(expected,)}")  # fmt: skip
    storage.refuse_damaged_blocks(format, bits, param.numel(), f"{label} in the state_dict")


def refuse_conversion(label, key, saved, mine, convert):
    """ValueError unless a state that is saved in a format may be decoded and stored in that of this optimizer."""
    if key in storage.LOW.values():
        remedy = f"make it with master={saved!r}" if key == "remainder" else "it must be float32"
        raise ValueError(f"{label} is {saved} in the state_dict, and {mine} in this optimizer: {remedy}")
    if saved != convert:
        instead = "no state_format" if saved in ("float32", "float64") else f"state_format={saved!r}"
        raise ValueError(f"{label} is stored in {saved} in the state_dict, and in {mine} in this optimizer: make the "
                         f"optimizer with {instead}, or pass convert={saved!r} to load_state_dict(), which decodes it and "
                         f"rounds it to the nearest {mine}")  # fmt: skip


def write(made, numbers, param, format):
    """Write numbers in the shape of a parameter into a state that is stored in a Format, rounded to nearest."""
    if format is FLOAT:
        made.copy_(numbers)
        return
    laid_out = torch.empty_like(param, dtype=torch.float32, device="cpu", requires_grad=False).copy_(numbers)
    bits = storage.stored(format, host.acquire(laid_out, "", writable=False).flat)
    flat = torch.from_numpy(bits.view(np.uint8)).view(made.dtype)
    made.copy_(like(param, flat, format))
