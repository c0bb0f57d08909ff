"""How the buffers of a tensor are stored: the options state_format, master, rounding and param_copy, checked, and what they
make for each tensor.  The formats themselves are in formats.py."""

from typing import Any, NamedTuple

import numpy as np

from . import formats, hyper, rules
from .memory import host
from .words import kind_of

FLOAT, BF16, FP16, FP16S, Q8, Q8U, SPLIT16, SPLIT8 = formats.FORMATS.values()
OF_DTYPE = {host.BF16: BF16, host.FP16: FP16}

OPTIONS = {"state_format": None, "master": None, "rounding": "stochastic"}  # of an optimizer, or of a group
CHECKS = {
    "state_format": hyper.choice(None, "bf16", "fp16", "q8"),
    "master": hyper.choice(None, "float32", "split16", "split8"),
    "rounding": hyper.choice("nearest", "stochastic"),
}
GRADIENTS = (np.dtype(np.float32), host.BF16, host.FP16)  # dtypes of Buffers of gradients for a float32 update
SPLIT = {"split16": SPLIT16, "split8": SPLIT8}
SIGNED = {"bf16": BF16, "fp16": FP16S, "q8": Q8}
NEVER_NEGATIVE = {**SIGNED, "q8": Q8U}
LOW = {"float32": "master", "split16": "remainder", "split8": "remainder"}  # what a state calls what a master needs
LARGEST_BASE = {Q8: 1896, Q8U: 1786}
NEEDS_FLOATS = {  # (state_format, rule or state) -> why not
    ("fp16", "prev"): "fp16 would round the sign of a small gradient away",
    ("q8", "prev"): "q8 would round the sign of a small gradient away",
    ("q8", "max_exp_avg_sq"): "a maximum would keep every error of rounding upwards, which is 1/8 in q8",
    ("fp16", "grad_avg"): "a variance is a small difference of averages, which fp16 and q8 do not keep",
    ("q8", "grad_avg"): "a variance is a small difference of averages, which fp16 and q8 do not keep",
    ("bf16", "grad_avg"): "a variance is a small difference of averages, which bf16 does not keep",
}


def taken(options):
    """The options of OPTIONS out of a dict of options, which loses them, checked; those that are not there are left out."""
    return {name: CHECKS[name](name, options.pop(name)) for name in OPTIONS if name in options}


def of_groups(options, overrides):
    """The options of OPTIONS for each group, out of the options of all groups and those of each group, which lose them."""
    common = taken(options)
    groups = [{**common, **taken(extra)} for extra in overrides]
    for group in groups:
        refuse_q8_to_nearest(group.get("state_format"), group.get("rounding"))
    return groups


def refuse_q8_to_nearest(state_format, rounding):
    """ValueError for states in q8 that are to be rounded to nearest."""
    if state_format == "q8" and rounding == "nearest":
        raise ValueError("state_format='q8' cannot have rounding='nearest': states would lose every change below 1/32 of "
                         "them (losses up to 13 % worse); pass rounding='stochastic', or state_format='bf16'")  # fmt: skip


class Storage(NamedTuple):
    """How the buffers of one tensor are stored.

    param, states, copy_format : Format
        Of the parameter, of each state in the order of the rule, and of the copy.
    master : str or None
        The option of this name.
    low : flat array or None
        The lower bits of a split parameter, or the parameter in floats, which is updated in place of it.
    copy : Buffer or None
        Where the new parameter is written once more.
    stochastic : bool
    seed, origin : int
        What random numbers depend on, beside the step: origin is the position of the first element.
    """

    param: Any
    states: tuple
    master: str | None = None
    low: Any = None
    copy: Any = None
    copy_format: Any = FLOAT
    stochastic: bool = True
    seed: int = 0
    origin: int = 0


def of_buffer(buffer):
    """The Format of the numbers of a Buffer, or of a flat array."""
    return OF_DTYPE.get(buffer.dtype, FLOAT)


def decoded(flat):
    """The numbers of a flat array; those of bf16 and fp16 in float32."""
    format = of_buffer(flat)
    return flat if format is FLOAT else formats.decode(format, host.bits(flat), flat.size)


def low(master):
    """Name -> Format of what a parameter with this master, which may be None, needs beside its states."""
    return {LOW[master]: SPLIT.get(master, FLOAT)} if master else {}


def kept(made, names):
    """Name -> Format of all that is kept of a tensor with this Storage, which may be None: the states of these names, and
    what its master needs."""
    return {**dict(zip(names, made.states, strict=True)), **low(made.master)} if made else dict.fromkeys(names, FLOAT)


def compute_dtype(buffer):
    """The dtype in which a parameter is updated."""
    return np.dtype(np.float32) if of_buffer(buffer) is not FLOAT else buffer.dtype


def named(said, signed):
    """The Format that state_format calls so, for numbers that may be negative (signed) or never are."""
    return (SIGNED if signed else NEVER_NEGATIVE)[said]


def state_format(said, name, dtype, not_negative, label):
    """The Format of a state of this name, said by the option; ValueError where it must be stored in the compute dtype."""
    if said is None:
        return FLOAT
    if dtype != np.float32:
        raise ValueError(f"state_format={said!r} is for tensors that are updated in float32; {label} has dtype {dtype}: "
                         f"pass state_format=None, which may be that of its group alone")  # fmt: skip
    reason = NEEDS_FLOATS.get((said, name))
    if reason:
        instead = None if ("bf16", name) in NEEDS_FLOATS else "bf16"
        raise ValueError(f"state_format={said!r} cannot hold {name} of {label}: {reason}; pass state_format={instead!r}, "
                         f"which may be that of its group alone")  # fmt: skip
    return named(said, name not in not_negative)


def refuse_with_state(options):
    """ValueError where states that the caller gives are to be in formats.  options: those of OPTIONS for each group."""
    said = next((group["state_format"] for group in options if group.get("state_format")), None)
    if said:
        raise ValueError(f"state= and state_format={said!r} are both given; state= takes arrays of float32 or float64: "
                         f"leave state= out; to go on from the state of another optimizer, pass its state_dict() to "
                         f"load_state_dict(), with convert='float32' where that state is in float32")  # fmt: skip


def refuse_undecided(x, name, options):
    """TypeError for a parameter in bf16 or fp16 whose options, some of OPTIONS, do not say how it is updated."""
    if not host.is_half(x) or takes_halves(options):
        return
    of_array = f"np.asarray({name})" if isinstance(x, host.Stored) else f"{name}.astype(np.float32)"
    floats = "model.float()" if host.is_torch(x) else of_array
    raise TypeError(f"{name} has dtype {host.half_name(x)}: say how it is updated, by master='float32' (from a float32 "
                    f"copy) or rounding='stochastic' (without one; 'nearest' is what torch.optim does, and loses small "
                    f"updates), or train in float32: {floats}")  # fmt: skip


def takes_halves(options):
    """Whether these options, some of OPTIONS, say how a parameter in bf16 or fp16 is updated."""
    return options.get("master") is not None or "rounding" in options


def of_tensor(tensor, rule, options, copy, not_negative, seed, origin):
    """The Storage of a Tensor, as yet without the buffer `low`; None where all is in its compute dtype.  options: those of
    its group; copy: a Buffer or None."""
    said, master, rounding = {**OPTIONS, **options}.values()
    names = rules.state_names(rules.find(rule))
    states = tuple(state_format(said, name, tensor.dtype, not_negative, tensor.name) for name in names)
    param = of_buffer(tensor.param)
    refuse_master(master, param, tensor)
    if copy is None and param is FLOAT and all(format is FLOAT for format in states):
        return None
    copied = FLOAT if copy is None else of_buffer(copy)
    return Storage(param, states, master, None, copy, copied, rounding == "stochastic", seed, origin)


def refuse_master(master, param, tensor):
    """ValueError where a parameter cannot have this master."""
    if master is None:
        return
    if param is FLOAT:
        raise ValueError(f"master={master!r} is for parameters in bf16 or fp16; {tensor.name} has dtype "
                         f"{tensor.param.dtype} and needs none: pass master=None, which may be that of its group alone, or "
                         f"param_copy= for a copy in bf16 or fp16")  # fmt: skip
    if master in SPLIT and param is not BF16:
        raise ValueError(f"master={master!r} splits a float32 into a bf16 and a remainder; {tensor.name} is "
                         f"{param.name}: pass master='float32'")  # fmt: skip


def with_low(tensor, memory):
    """The Storage of a Tensor with the buffer that its master needs: the one that the caller gave, or a new one, to which
    the parameter as it is now gives its numbers."""
    made, param = tensor.storage, tensor.param
    if made.master is None:
        return made
    given = [buffer.flat for name, buffer in tensor.given.items() if name not in tensor.state]
    if given:
        return made._replace(low=given[0], param=SPLIT.get(made.master, made.param))
    dtype = np.dtype(np.float32) if made.master == "float32" else SPLIT[made.master].low
    low = memory.place_beside(param, list(tensor.state.values()), param.size, dtype)
    if made.master == "float32":
        memory.copy(low, decoded(host.on_host(param.flat)))
    else:
        low.fill(0)
    return made._replace(low=low, param=SPLIT.get(made.master, made.param))


def acquired_copy(copy, name, tensor, memory):
    """The Buffer of the bf16 or fp16 array to which a parameter is written once more."""
    if tensor.dtype != np.float32:
        raise ValueError(f"{name} is for parameters that are updated in float32; {tensor.name} has dtype {tensor.dtype}")
    wanted = "it must be bf16 or fp16: an array of float16 or ml_dtypes.bfloat16, a torch tensor of float16 or bfloat16, or "
    wanted += "fastrms.Stored(array, 'bf16')"
    if host.is_no_array(copy):
        raise TypeError(f"{name} is {kind_of(copy)}; {wanted}")
    buffer = memory.acquire(copy, name, writable=True, halves=True)
    if of_buffer(buffer) is FLOAT:
        raise TypeError(f"{name} has dtype {buffer.dtype}; {wanted}")
    memory.same_layout(buffer, name, tensor.param, tensor.name, dtypes=GRADIENTS)
    return buffer


def write_copy(tensor, memory):
    """Give the copy of a parameter the numbers that this has now, rounded to nearest."""
    made, param, step = tensor.storage, tensor.param, 1 << 20  # elements
    for some in (slice(begin, begin + step) for begin in range(0, param.size, step)):
        numbers = decoded(host.on_host(param.flat[some]))
        memory.copy(host.bits(made.copy.flat[some]), stored(made.copy_format, numbers))


def refuse_damaged_blocks(format, flat, size, label):
    """ValueError where the bases of the blocks of q8 are none that an encoder makes."""
    bases = host.on_host(flat[formats.first_base(size) :]).view(np.int32)
    if not ((bases >= 0) & (bases <= LARGEST_BASE[format])).all() or (format is Q8 and (bases % 8).any()):
        raise ValueError(f"{label} has damaged blocks: the base of a block is from 0 to {LARGEST_BASE[format]}, and a "
                         f"multiple of 8 where numbers have a sign")  # fmt: skip


def items_of(format, size):
    """The items of the flat array in which a state is stored."""
    return formats.stored_bytes(format, size) // format.dtype.itemsize


def stored(format, numbers):
    """Flat numbers as a flat array in a Format, rounded to nearest."""
    if format is FLOAT:
        return numbers
    made = np.zeros(items_of(format, numbers.size), format.dtype)
    formats.encode(format, numbers, made, numbers.size, formats.Rounding())
    return made


def fill(flat, format, size, value, memory=host):
    """Make all `size` numbers of a flat array in a Format this value, rounded to nearest."""
    flat.fill(value if format is FLOAT else 0)
    if value and format is not FLOAT:
        memory.copy(flat.view(format.dtype), stored(format, np.full(size, value, np.float32)))


def new_state(format, param, beside, value, memory):
    """A new flat state array in a Format, every element of which holds a value."""
    dtype = compute_dtype(param) if format is FLOAT else format.dtype
    made = memory.place_beside(param, beside, items_of(format, param.size), dtype)
    fill(made, format, param.size, value, memory)
    return made


def said(format):
    """A Format of a state as people say it: the two for numbers with and without a sign are one."""
    return {FP16S: "fp16", Q8U: "q8"}.get(format, format.name)


class StoredState:
    """A state that is stored in a format.  np.asarray() of it gives its numbers, a copy in float32: what is written there
    does not reach the optimizer, what is written into bits does.

    Attributes
    ----------
    bits : numpy.ndarray, or array in device memory
        The memory that is in use, flat, in the memory order of the parameter: uint16 for bf16 and fp16, uint8 for q8, where
        a name of a FlatBuffer has that of the whole FlatBuffer.
    format : str
        "bf16", "fp16" or "q8".
    shape : tuple of int
        That of the parameter.
    """

    def __init__(self, tensor, format, flat, part=None):
        self._tensor, self._format, self._flat, self._part = tensor, format, flat, part
        self.bits = flat if part is None or format.in_blocks else flat[part.span]
        self.format, self.shape = said(format), tensor.param.shape if part is None else part.shape

    def part(self, part):
        """The state of a Part of the tensor."""
        return StoredState(self._tensor, self._format, self._flat, part)

    def __array__(self, dtype=None, copy=None):
        flat = host.on_host(self._flat)
        numbers = self._tensor.shaped(formats.decode(self._format, flat, self._tensor.param.size))
        return host.decoded(numbers if self._part is None else self._part.of(numbers), self.format, dtype, copy)

    def __reduce__(self):
        raise TypeError("a state that is stored in a format is a view of its optimizer: copy or pickle opt.state_dict(), or "
                        "np.asarray() of the state, which decodes it")  # fmt: skip

    def __repr__(self):
        return f"<state of shape {self.shape}, stored in {self.format}>"


def shown(tensor, name):
    """A state of a Tensor that has a Storage, as people see it."""
    flat = tensor.state[name]
    format = tensor.storage.states[list(tensor.state).index(name)]
    return tensor.shaped(flat) if format is FLOAT else StoredState(tensor, format, flat)
