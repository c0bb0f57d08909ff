"""What a call on raw arrays does where its buffers are stored in formats: bf16 or fp16 gradients, parameters, copies and
states, and states in q8.  The arrays say their formats themselves."""

from types import SimpleNamespace

import numpy as np

from . import formats, hyper, rules, storage
from .memory import device, host
from .storage import BF16, FLOAT, FP16S, Q8, Storage, of_buffer

OPTIONS = {"param_copy": None, "rounding": "stochastic", "seed": 0}  # of a call, with their defaults
OF_CLASSES = {  # options that only the classes have -> what a call takes in their place
    "master": "pass the float32 master as param, and the bf16 or fp16 parameter as param_copy",
    "state_format": "the arrays of the state say it, as init_state(..., state_format=) makes them",
}
SAID = {host.BF16: "bf16", host.FP16: "fp16", Q8.dtype: "q8"}  # dtype of a state -> its state_format


def state_formats(rule, param, not_negative, state_format):
    """The Format of each state that a call of a rule is to have, in its order."""
    dtype, names = storage.compute_dtype(param), rules.state_names(rules.find(rule))
    return [storage.state_format(state_format, name, dtype, not_negative, "param") for name in names]


def shown(flat, format, param):
    """A flat array in the Format of a state as a call takes it."""
    if format.in_blocks:
        return flat
    array = host.shaped(flat, param)
    return host.Stored(array, "bf16") if format is BF16 else array.view(np.float16) if format is FP16S else array


def taken(options):
    """(those of OPTIONS that are given, checked; all other options)."""
    for name, remedy in OF_CLASSES.items():
        if name in options:
            raise TypeError(f"{name}={options[name]!r} is for optimizer objects: {remedy}")
    said = {name: options[name] for name in OPTIONS if name in options}
    if not said:
        return said, options
    for name, check in (("rounding", storage.CHECKS["rounding"]), ("seed", hyper.seed)):
        if name in said:
            said[name] = check(name, said[name])
    return said, {name: value for name, value in options.items() if name not in said}


def refuse_in_init_state(options, function):
    """TypeError where init_state() for a function is given an option of the function, or of the classes alone."""
    if "master" in options:
        taken(options)
    name = next((name for name in (*OPTIONS, "backend") if name in options), None)
    if name:
        raise TypeError(f"{name} does not change which state is made: leave it out here, and pass it to {function}()")


def acquired(memory, buffers, names, said):
    """The Buffers of the arguments of a call, checked against each other."""
    param = acquired_param(memory, buffers[0], "rounding" in said)
    return [param, *(acquired_beside(memory, x, name, param) for x, name in zip(buffers[1:], names[1:], strict=True))]


def acquired_param(memory, x, rounding_said):
    """The Buffer of the parameter, which may be bf16 or fp16 where the call says how it is rounded."""
    if not rounding_said and host.is_half(x):
        raise TypeError(f"param has dtype {host.half_name(x)}: pass a float32 copy of it as param and this array as "
                        f"param_copy, or say rounding='stochastic' or 'nearest', by which new parameters are "
                        f"rounded")  # fmt: skip
    return memory.acquire(x, "param", writable=True, halves=rounding_said)


def acquired_beside(memory, x, name, param):
    """The Buffer of a gradient or a state, checked against the parameter."""
    wanted = storage.compute_dtype(param)
    dtypes = storage.GRADIENTS if wanted == np.float32 else None  # None: that of param alone
    if dtypes and name != "grad" and memory.holds_bytes(x):
        return q8_state(x, name, param) if memory is host else q8_state_on_device(x, name, param)
    buffer = memory.acquire(x, name, writable=name != "grad", halves=True, wanted=wanted)
    memory.same_layout(buffer, name, param, "param", dtypes=dtypes)
    return buffer


def q8_state_on_device(x, name, param):
    """The Buffer of a state in q8 in device memory."""
    buffer, shape = device.acquire_integers(x, name), (formats.stored_bytes(Q8, param.size),)
    device.same_device([param, buffer], ["param", name])
    if buffer.shape != shape or buffer.address % 4:
        raise ValueError(f"{name} is an array of uint8 with shape {buffer.shape} at address {buffer.address:#x}; a state in "
                         f"q8 of {param.size} elements has shape {shape}, and is aligned to 4 bytes: make it by "
                         f"init_state()")  # fmt: skip
    return buffer


def q8_state(x, name, param):
    """The Buffer of a state in q8, a flat array of bytes."""
    shape = (formats.stored_bytes(Q8, param.size),)
    if x.shape != shape or not x.flags.c_contiguous or host.address(x) % 4:
        raise ValueError(f"{name} is an array of uint8 with shape {x.shape}; a state in q8 of {param.size} elements has "
                         f"shape {shape}, and is dense and aligned to 4 bytes: make it by init_state()")  # fmt: skip
    if not x.flags.writeable:
        raise ValueError(f"{name} is read-only; it is written in place and must be writable")
    return host.ours(np.asarray(x))


def state_format(buffer, name, param, not_negative):
    """The Format of a state; ValueError where it cannot hold a state of this name."""
    said = SAID.get(buffer.dtype)
    if said is None:
        return FLOAT
    reason = storage.NEEDS_FLOATS.get((said, name))
    if reason:
        raise ValueError(f"{name} cannot be in {said}: {reason}; pass it in float32")
    format = storage.named(said, name not in not_negative)
    if format.in_blocks:
        storage.refuse_damaged_blocks(format, buffer.flat, param.size, name)
    return format


def storage_of(acquired, copy, names, said, not_negative, step):
    """The Storage of the arrays of a call; None where all are in the compute dtype.  step: None where it was not said."""
    param, _, *states = acquired
    made = [state_format(buffer, name, param, not_negative) for buffer, name in zip(states, names[2:], strict=True)]
    param_format, options = of_buffer(param), {**OPTIONS, **said}
    rounded, stochastic = {param_format, *made} != {FLOAT}, options["rounding"] == "stochastic"
    if copy is None and not rounded:
        return None
    if any(format.in_blocks for format in made):
        storage.refuse_q8_to_nearest("q8", options["rounding"])
    if rounded and stochastic and step is None:
        raise ValueError("rounding='stochastic' needs step, the number of this update from 1, on which the random numbers "
                         "depend: pass it, or rounding='nearest'")  # fmt: skip
    copied = FLOAT if copy is None else of_buffer(copy)
    return Storage(param_format, tuple(made), None, None, copy, copied, stochastic, options["seed"])


def acquired_copy(memory, x, param):
    """The Buffer of param_copy, None where there is none."""
    tensor = SimpleNamespace(dtype=storage.compute_dtype(param), param=param, name="param")
    return None if x is None else storage.acquired_copy(x, "param_copy", tensor, memory)


def holds_zero(param, states):
    """Whether a state holds a 0; in q8 that is the code 0."""
    flats = (storage.decoded(host.on_host(x.flat[: param.size])) for x in states)
    return any((flat == 0).any() for flat in flats)


def update(module, made, recipe, step, grad_scale, acquired):
    """Make the update on a backend.  made: the Storage of the arrays, or None."""
    param, grad, *states = acquired
    flats = [state.flat for state in states]
    if made is None and of_buffer(grad) is FLOAT:
        return module.update(recipe, step, grad_scale, param.flat, grad.flat, flats)
    if hasattr(param, "device"):
        return module.update(recipe, step, grad_scale, param, grad, flats, made)
    plan = module.Plan([param], [flats], [0], [recipe], storages=[made])
    plan.copy([], steps=[step - 1, step - 1])
    status, _ = plan.change(grads=[grad], grad_scale=grad_scale)
    if status:
        raise RuntimeError(f"the plan of this call answered {status}: buffers overlap")
