"""Conversion between the state_dict of torch.optim and ours, for the rules that torch has.

torch numbers its parameters through all groups, counts the steps of each, and keeps a state from the first step on.  It says
nothing of storage formats: states go to it in float32, decoded, without masters, and what comes from it is float32 or
float64, and is rounded to a format only where convert="float32" says so.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np

from . import hyper, saved_formats, storage
from .memory import host
from .state import MALFORMED
from .words import kind_of

ADAM = {
    "lr": "lr", "betas": ("beta1", "beta2"), "eps": "eps", "weight_decay": "weight_decay", "amsgrad": "amsgrad",
    "maximize": "maximize", "decoupled_weight_decay": "decoupled",
}  # fmt: skip
NAMES = {  # torch's name: ours
    "RMSProp": {"lr": "lr", "alpha": "rho", "eps": "eps", "weight_decay": "weight_decay", "momentum": "momentum",
                "centered": "centered", "maximize": "maximize"},
    "AdaGrad": {"lr": "lr", "lr_decay": "lr_decay", "eps": "eps", "weight_decay": "weight_decay",
                "initial_accumulator_value": "initial_value", "maximize": "maximize"},
    "Adam": ADAM,
    "AdamW": ADAM,
    "RProp": {"lr": "lr", "etas": ("eta_minus", "eta_plus"), "step_sizes": ("step_min", "step_max"), "maximize": "maximize"},
}  # fmt: skip
YOUNG = ("maximize", "decoupled_weight_decay")  # older versions of torch do not write these
FILLED = (*YOUNG, "amsgrad", "momentum", "centered")  # torch adds these to groups of older versions, which lack them
FLAGS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}  # how torch computes, not what
MOST_STEPS = 2**24  # torch counts in float32


def refuse_foreign(kind, values, always, known, name):
    """ValueError where values, which error sentences call `name`, lack what is always there and have what is not known."""
    lacking, foreign = [x for x in always if x not in values], [str(x) for x in values if x not in known]
    if lacking and foreign:
        raise ValueError(f"{name} has {', '.join(foreign)} and no {', '.join(lacking)}: it is no state of {kind.__name__}; "
                         f"load it into an optimizer of the class that it came from")  # fmt: skip


def refuse_no_state_dict(d, kind):
    """ValueError for what is no state_dict of torch, where an optimizer of torch of this class is to take one."""
    if not isinstance(d, Mapping):
        raise ValueError(f"this is {kind_of(d)}, not a state_dict of torch.optim: pass what state_dict() gave")
    if "tensors" in d and "optimizer" in d:
        raise ValueError(f"this is a state_dict of fastrms.{d['optimizer']}, not of torch.optim: {kind} takes what "
                         f"to_torch_state_dict() of that optimizer gives")  # fmt: skip
    if not {"state", "param_groups"} <= d.keys():
        raise ValueError(f"this has the keys {[*d]}, not those of a state_dict of torch.optim: pass what state_dict() gave")


def _names(optimizer):
    if optimizer.family not in NAMES:
        raise TypeError(f"torch.optim has no {type(optimizer).__name__}")
    return NAMES[optimizer.family]


def _members(optimizer):
    """The indices of the arrays of each group in the "tensors" of our state_dict; torch numbers them in this order."""
    tensors = optimizer._tensors
    group_of = [tensors.keys[tensor.recipe].group for tensor in tensors for _ in tensor.parts]
    return [[k for k, group in enumerate(group_of) if group == number] for number in range(len(optimizer.groups))]


# ours to torch's


def exported(optimizer):
    """See Optimizer.to_torch_state_dict."""
    d = torch_form(optimizer)
    try:
        import torch
    except ImportError:
        raise ImportError("to_torch_state_dict() makes torch tensors: pip install torch") from None
    tensors = {
        number: {"step": torch.tensor(state.pop("step"), dtype=torch.float32)}
        | {name: torch.from_numpy(array) for name, array in state.items()}
        for number, state in d["state"].items()
    }
    return {**d, "state": tensors}


def torch_form(optimizer):
    """torch's state_dict with NumPy arrays, and floats for step."""
    members = _members(optimizer)
    order = [k for group in members for k in group]
    number_of = {k: number for number, k in enumerate(order)}
    groups = [_torch_group(optimizer, k, [number_of[n] for n in group]) for k, group in enumerate(members)]
    tensors = saved_formats.decoded(optimizer)
    return {"state": {number: _torch_state(tensors[k]) for number, k in enumerate(order)}, "param_groups": groups}


def _torch_state(tensor):
    if tensor["steps"] > MOST_STEPS:
        raise ValueError(f"{tensor['name']} has made {tensor['steps']} steps; torch counts in float32, up to {MOST_STEPS}")
    return {"step": float(tensor["steps"]), **tensor["state"]}


def _torch_group(optimizer, k, numbers):
    h = vars(optimizer.at_step(dict(optimizer.groups[k]), optimizer.steps))
    names = _names(optimizer)
    _refuse_what_torch_lacks(optimizer, h, names)
    values = {theirs: tuple(h[n] for n in ours) if isinstance(ours, tuple) else h[ours] for theirs, ours in names.items()}
    return {**values, **FLAGS, "params": numbers}


def _refuse_what_torch_lacks(optimizer, h, names):
    """ValueError for a hyper-parameter that torch lacks, unless it has our default, which is torch's, or has no effect."""
    known = {name for ours in names.values() for name in (ours if isinstance(ours, tuple) else (ours,))}
    idle = {"initial_value"}  # its effect is in the state
    if h.get("weight_decay") == 0:
        idle.add("decoupled")
    if h.get("momentum") == 0:
        idle.add("lr_in_momentum")
    for name, value in h.items():
        if name not in known | idle and value != optimizer.defaults[name]:
            raise ValueError(f"torch.optim has no {name}={value!r} for {optimizer.family}")
    if optimizer.family == "AdamW" and not h["decoupled"] and h["weight_decay"]:
        raise ValueError("decoupled=False: torch's AdamW is always decoupled; use fastrms.Adam and torch.optim.Adam")
    if h.get("amsgrad") == "corrected":
        raise ValueError("torch.optim has no amsgrad='corrected'")


# torch's to ours


def imported(optimizer, d, convert=None):
    """See Optimizer.load_torch_state_dict."""
    _refuse_low(optimizer)
    names = _names(optimizer)
    if isinstance(d, Mapping) and "tensors" in d and "optimizer" in d:
        raise ValueError("this is a state_dict of fastrms: pass it to load_state_dict()")
    try:
        plain = _plain(optimizer, names, d)
    except MALFORMED as error:
        raise ValueError(f"this is not a state_dict of torch.optim that fits {optimizer.family}: {error!r}") from None
    optimizer.load_state_dict(plain, convert)


def _refuse_low(optimizer):
    """ValueError where a parameter has a master, of which torch's state_dict says nothing."""
    for tensor in optimizer._tensors:
        if tensor.storage and tensor.storage.master:
            name = storage.LOW[tensor.storage.master]
            raise ValueError(f"{tensor.name} has a {name} (master={tensor.storage.master!r}), which torch's state_dict lacks"
                             f": make the optimizer from float32 parameters, or use load_state_dict()")  # fmt: skip


def _plain(optimizer, names, d):
    """Our form of a state_dict of torch."""
    groups, members = d["param_groups"], _members(optimizer)
    if [len(group["params"]) for group in groups] != [len(group) for group in members]:
        raise ValueError(
            f"the state_dict has groups of {[len(group['params']) for group in groups]} parameters, "
            f"this optimizer has {[len(group) for group in members]}"
        )
    numbers = [number for group in groups for number in group["params"]]
    known = set(numbers)
    if not known.issuperset(d["state"]) or len(known) < len(numbers):
        raise ValueError(f"the state_dict has state for {list(d['state'])}, its groups list the parameters {numbers}; "
                         f"each must be listed once")  # fmt: skip
    values = [_our_group(optimizer, names, k, group) for k, group in enumerate(groups)]
    tensors = saved_formats.decoded(optimizer)
    for group, mine, h in zip(groups, members, values, strict=True):
        for number, k in zip(group["params"], mine, strict=True):
            tensors[k] = _our_tensor(optimizer, tensors[k], d["state"].get(number), h)
    return {
        "optimizer": type(optimizer).__name__, "dialect": "torch", "steps": max(t["steps"] for t in tensors),
        "groups": values, "patterns": list(optimizer._patterns), "tensors": tensors,
    }  # fmt: skip


def _our_group(optimizer, names, k, group):
    """Our hyper-parameters of group k: those that torch does not have keep their values."""
    known = {*names, *FLAGS, *optimizer.defaults, "params", "param_names"}
    refuse_foreign(type(optimizer), group, [x for x in names if x not in FILLED], known, f"param_groups[{k}]")
    values = {**optimizer.groups[k], **{names[young]: optimizer.defaults[names[young]] for young in YOUNG if young in names}}
    becomes_l2 = not group.get("decoupled_weight_decay", True) and optimizer.groups[k].get("decoupled")
    if becomes_l2 and group["weight_decay"] and optimizer.family == "AdamW":
        raise ValueError(f"param_groups[{k}] is of torch's Adam, not AdamW: its weight_decay={group['weight_decay']!r} goes "
                         f"through the gradient; load it into fastrms.Adam")  # fmt: skip
    for theirs, ours in names.items():
        if theirs in YOUNG and theirs not in group:
            continue
        if isinstance(ours, tuple):
            if len(group[theirs]) != len(ours):
                raise ValueError(f"{theirs}={group[theirs]!r} must be {len(ours)} numbers")
            values.update(zip(ours, group[theirs], strict=True))
        else:
            values[ours] = group[theirs]
    return {name: optimizer.checked("torch", name, value) for name, value in values.items()}


def _our_tensor(optimizer, present, saved, h):
    """One entry of "tensors" in our state_dict, in exchange for the present one; torch has no state before the first
    gradient, so it is then made here."""
    name = present["name"]
    if saved is not None and not isinstance(saved, Mapping):
        raise ValueError(f"the state of {name} is {kind_of(saved)}; it must be a mapping")
    if not saved:
        h = SimpleNamespace(**h)
        fresh = {state: np.full_like(x, optimizer.initial(h, state)) for state, x in present["state"].items()}
        return {"name": name, "steps": 0, "state": fresh}
    step = hyper.number("step", saved["step"])
    if not step.is_integer():
        raise ValueError(f"step={step!r} of {name} is not a whole number")
    state = {state: _array(x, f"{state} of {name}") for state, x in saved.items() if state != "step"}
    return {"name": name, "steps": int(step), "state": state}


def _array(x, name):
    dtype = str(getattr(x, "dtype", "")).removeprefix("torch.")
    if dtype in ("bfloat16", "float16", "uint8"):
        raise ValueError(f"{name} has dtype {dtype}, which stores a state in a format; this takes float32 and float64: load "
                         f"it into an optimizer of fastrms.torch without state_format, by load_state_dict(state_dict, "
                         f"convert=...), and take the state_dict() of that one")  # fmt: skip
    buffer = host.acquire(x, name, writable=False)
    return host.shaped(buffer.flat, buffer)
