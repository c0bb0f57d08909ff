"""Any bytes as a small program in Python: arrays of all kinds and layouts, hyper-parameters, gradients, saved states.

The bytes are random, or libFuzzer brings them, by atheris.  A call does what it should, with the bits of NumPy, or raises
TypeError, ValueError or FloatingPointError with a sentence, and has changed nothing; any other exception is a finding.
"""

import math
import re

import numpy as np

import fastrms

PROMISED = (TypeError, ValueError, FloatingPointError)
FAMILIES = (fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.AdamW, fastrms.RProp)
DTYPES = ("f4", "f8", ">f4", "f2", "i4", "u2", "c8", "?", "O")
LENGTHS = (0, 1, 2, 3, 7, 8, 17, 33)
VALUES = (
    *(0, 1, -1, 0.0, 0.5, 0.9, 0.999, 1e-3, 1e-8, 1e-46, 1e-300, 1e39, 2, -0.0, math.inf, math.nan, 10**400, 1j, "0.1"),
    *(None, True, False, "torch", "keras", "tf1", "optax", "dozat", "folded", "skip", "raise", "bf16", "q8", "nearest"),
    *(lambda step: 0.01, lambda step: math.nan, lambda step: "x", np.float32(0.1), np.ones(2), [1], b"", {}),
)


class Bytes:
    """Choices by the bytes of an input; the first of each where there are none left."""

    def __init__(self, data):
        self.left = iter(data)

    def number(self, count):
        return next(self.left, 0) % count

    def one_of(self, things):
        return things[self.number(len(things))]

    def rarely(self):
        return self.number(8) == 7


def numbers(choose, length):
    """Floats of an array, some of them not finite, some subnormal."""
    rng = np.random.default_rng(choose.number(256))
    values = rng.standard_normal(length) * 10.0 ** rng.integers(-3, 3, length)
    if length and choose.rarely():
        values[choose.number(length)] = choose.one_of((math.nan, math.inf, -math.inf, 1e-42, 1e-310, 3e38))
    return values


def laid_out(choose, values, dtype):
    """An array of these values; rarely one that may not be used."""
    with np.errstate(all="ignore"):
        array = values.astype(dtype)
    if not choose.rarely():
        return array
    kind = choose.number(9)
    if kind == 0:
        return np.repeat(array, 2)[::2]
    if kind == 1:
        return array[::-1]
    if kind == 2:
        array.flags.writeable = False
    if kind == 3:
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
        return memory.view(array.dtype) if dtype != "O" else array
    if kind == 4:
        return np.ma.masked_array(array)
    if kind == 5:
        return array.tolist()
    if kind == 6:
        return np.broadcast_to(array[:1], array.shape) if array.size else array
    if kind == 7:
        return choose.one_of((None, 1.0, "w", b"w", {}, object(), np.float32(1)))
    return np.stack([array, array]).T


def structure(choose, names, dtype, length, kind):
    """Arrays by name (1), in a list (0), or one alone (2)."""
    made = []
    for _ in names:
        other = choose.one_of(DTYPES) if choose.rarely() else dtype
        made.append(laid_out(choose, numbers(choose, length + choose.rarely()), other))
    if len(made) > 1 and choose.rarely():
        made[1] = choose.one_of((made[0], made[0][1:] if isinstance(made[0], np.ndarray) and made[0].ndim else made[0]))
    kind = choose.number(3) if choose.rarely() else kind
    return made[0] if kind == 2 else dict(zip(names, made, strict=True)) if kind else made


def arrays_in(thing):
    found = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else [thing]
    return [x for x in found if isinstance(x, np.ndarray)]


def contents(*things):
    """The bits of all arrays in these things."""
    return [np.ascontiguousarray(x).tobytes() for thing in things for x in arrays_in(thing) if x.dtype != object]


def states(optimizer):
    found = []
    for state in optimizer.state.values():
        found += arrays_in(state)
    return found


def promised(work):
    """What a call returns, or the sentence with which it is refused."""
    try:
        return work(), None
    except PROMISED as refused:
        assert str(refused), f"an empty {type(refused).__name__}"
        return None, f"{type(refused).__name__}: {refused}"


def hyper_parameter(choose, make):
    """(name, value): half of the values are likely ones."""
    name = choose.one_of(list(make.defaults))
    usual = make.defaults[name]
    if choose.number(2):
        return name, choose.one_of(VALUES)
    return name, not usual if isinstance(usual, bool) else usual / 2 if isinstance(usual, float) else usual


def one_program(data, backend):
    """Make an optimizer, let it step, save and load: what it said and what is left, to be compared between backends."""
    choose, said = Bytes(data), []
    make, names, dtype = choose.one_of(FAMILIES), ["w", "b", "c"][: 1 + choose.number(3)], choose.one_of(DTYPES[:2])
    length, kind = choose.one_of(LENGTHS), choose.number(2 + (len(names) == 1))
    hyper = dict(hyper_parameter(choose, make) for _ in range(choose.number(4)))
    params = structure(choose, names, dtype, length, kind)
    before = contents(params)
    optimizer, refused = promised(lambda: make(params, **{**hyper, "backend": backend}))
    assert contents(params) == before, "the constructor has changed parameters"
    if refused:
        return [refused]
    for _ in range(1 + choose.number(4)):
        grads = structure(choose, names, dtype, length, kind)
        options = {key: choose.one_of(VALUES) for key in ("grad_scale", "clip_norm") if choose.rarely()}
        before = contents(params, states(optimizer)), optimizer.steps
        with np.errstate(all="ignore"):
            info, refused = promised(lambda now=grads, said=options: optimizer.step(now, **said))
        if refused:
            assert (contents(params, states(optimizer)), optimizer.steps) == before, f"a refused step has changed: {refused}"
        said += [refused, None if info is None else (info.applied, info.nonfinite)]
    _, refused = promised(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    one_nan = [np.where(np.isnan(x), 0, x).tobytes() for x in arrays_in(params) + states(optimizer) if x.dtype.kind == "f"]
    return [*said, refused, one_nan, optimizer.steps]


def one_input(data):
    """All that the bytes ask for, on C and on NumPy: both say the same and have the same bits."""
    found = [re.sub(r"0x[0-9a-f]+", "an address", repr(one_program(data, name))) for name in ("numpy", "c")]
    assert found[0] == found[1].replace("backend='c'", "backend='numpy'"), "C: {1}\nNumPy: {0}".format(*found)
