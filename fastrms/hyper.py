"""Hyper-parameters: what values each may have, and the sentence for a value that it may not have."""

import inspect
import math
import numbers
import re

import numpy as np

from . import backends
from .words import kind_of, shown

MOST_STEPS = 2**62


def number(name, value):
    """value as a float; TypeError for what is not one number (bool included), ValueError for NaN."""
    kind = kind_of(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a 0-d array or tensor
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        only_lr = "; only lr may be a schedule" if callable(value) and name != "lr" else ""
        raise TypeError(f"{name}={shown(value)} is {kind}; it must be a number{only_lr}")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer too large for a float") from None
    if math.isnan(value):
        raise ValueError(f"{name} is nan")
    return value


def within(words, holds):
    """A check that a value is a number for which holds() is true; `words` describe these numbers."""

    def check(name, value):
        if type(value) is not float or value != value:
            value = number(name, value)
        if not holds(value):
            raise ValueError(f"{name}={shown(value)} must be {words}")
        return value

    check.words = words
    return check


non_negative = within("finite and at least 0", lambda value: 0 <= value < math.inf)
positive = within("finite and above 0", lambda value: 0 < value < math.inf)
above_zero = within("above 0", lambda value: value > 0)
decay_rate = within("in [0, 1)", lambda value: 0 <= value < 1)
scale = within("from 1e-30 to 1e30", lambda value: 1e-30 <= value <= 1e30)  # each of these is a normal float32


def finite(name, value):
    """A hyper-parameter that only an own rule knows: a number, or a word or flag that its coefficients read."""
    if value is None or isinstance(value, (bool, str)):
        return value
    value = number(name, value)
    if math.isinf(value):
        raise ValueError(f"{name}={shown(value)} must be finite")
    return value


def step_count(name, value, least):
    """A number of steps as an int."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={shown(value)} is {kind_of(value)}; it must be an int")
    if not least <= value <= MOST_STEPS:
        raise ValueError(f"{name}={shown(value)} must be from {least} to 2**62")
    return int(value)


def seed(name, value):
    """A seed of random numbers as an int."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={shown(value)} is {kind_of(value)}; it must be an int")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}={shown(value)} must be from 0 to 2**64 - 1")
    return int(value)


def flag(name, value):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={shown(value)} must be True or False")
    return bool(value)


def rate_or_schedule(name, value):
    if isinstance(value, type):
        raise TypeError(f"{name}={value.__name__} is a class; a schedule is an object of it: {name}={value.__name__}(...)")
    if not callable(value):
        return non_negative(name, value)
    try:
        takes = inspect.signature(value)
    except (TypeError, ValueError):  # a callable that cannot say what it takes
        return value
    try:
        takes.bind(0)
    except TypeError as error:
        raise TypeError(f"{name}={value!r} cannot be called with the number of steps made, as a schedule is ({error}): it "
                        f"must take one argument, such as {name}=lambda step: 0.1 / (1 + step)") from None  # fmt: skip
    return value


def optional_positive(name, value):
    return None if value is None else positive(name, value)


def choice(*allowed):
    def check(name, value):
        value = bool(value) if isinstance(value, np.bool_) else value
        for candidate in allowed:
            if value is candidate or (isinstance(value, str) and value == candidate):
                return candidate
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, allowed))}")

    check.allowed = allowed
    return check


on_nonfinite = choice(*backends.ON_NONFINITE)

CHECKS = {
    "lr": rate_or_schedule,
    "rho": decay_rate,
    "momentum": decay_rate,
    "beta1": decay_rate,
    "beta2": decay_rate,
    "eps": non_negative,
    "eps_root": non_negative,
    "lr_decay": non_negative,
    "weight_decay": non_negative,
    "initial_value": non_negative,
    "clip_value": optional_positive,
    "eta_minus": positive,
    "eta_plus": positive,
    "step_min": non_negative,
    "step_max": non_negative,
    "nesterov": flag,
    "centered": flag,
    "decoupled": flag,
    "maximize": flag,
    "lr_in_momentum": flag,
    "zero_on_flip": flag,
    "bias_correction": choice(False, True, "corrected", "folded"),
    "amsgrad": choice(False, True, "corrected"),
}


# What is refused although each value is in its range: combinations, and values once rounded.  The key is the hyper-parameter
# that is refused with those that its sentence speaks of; {name} becomes name=value.
FORBIDDEN = {
    ("eps", "eps_root"): "{eps} and {eps_root} are both 0 in {dtype}: a zero average would give 0/0",
    ("eps",): "{eps} is 0 in {dtype}: a zero average would give 0/0",
    ("nesterov", "momentum"): "nesterov=True needs momentum > 0",
    ("bias_correction", "centered"): "bias_correction='folded' cannot serve centered=True, which corrects two averages",
    ("amsgrad", "bias_correction"): "amsgrad='corrected' needs bias_correction='corrected'",
    ("eta_minus",): "{eta_minus} is not below 1 in {dtype}",
    ("eta_plus",): "{eta_plus} is not above 1 in {dtype}",
    ("step_min", "step_max"): "{step_min} is above {step_max}",
}


def words_of(name):
    """The range of a hyper-parameter in words, such as "finite and at least 0"; None where it is not a number."""
    return getattr({"lr": non_negative, "clip_value": positive}.get(name, CHECKS.get(name)), "words", None)


def together(name, known):
    """The sentence of FORBIDDEN for a hyper-parameter of a family with the names in `known`; None where there is none."""
    return next((text for names, text in FORBIDDEN.items() if names[0] == name and known.keys() >= {*names}), None)


def forbidden(name, h, dtype):
    """The sentence for a hyper-parameter whose value is in its range, but does not go with the others or with dtype."""
    known = {key: f"{key}={value!r}" for key, value in vars(h).items()}
    in_range = words_of(name) and f"rounds in {{dtype}} to a number that is not {words_of(name)}"
    sentence = together(name, known) or f"{{{name}}} {in_range or 'does not go with the other hyper-parameters in {dtype}'}"
    return sentence.format(**known, dtype=dtype)


def refusal(name, known=CHECKS):
    """The sentence for a wrong hyper-parameter in jitted code, which cannot put the value into it.  known: the names that
    its family has."""
    names = {key: key for key in known}
    dtype = "the dtype of param"
    in_range = words_of(name) and f"{name} must be {words_of(name)} in {dtype}"
    forbidden = (together(name, names) or "").format(**names, dtype=dtype)
    return "fastrms: " + "; it is refused, too, where ".join(filter(None, (in_range, forbidden)))


# the names of other frameworks, and what to write here in their place: alternatives, parted by |
OUR_WORD = {
    "alpha": "rho",
    "learning_rate": "lr",
    "betas": "beta1 and beta2",
    "beta_1": "beta1",
    "beta_2": "beta2",
    "b1": "beta1",
    "b2": "beta2",
    "epsilon": "eps",
    "decay": "rho for the averages | beta2 for the averages | lr_decay for the step size | "
    "weight_decay for the parameters, or, in an optimizer, a schedule as lr",
    "use_nesterov": "nesterov",
    "etas": "eta_minus and eta_plus",
    "step_sizes": "step_min and step_max",
    "delta_min": "step_min",
    "delta_max": "step_max",
    "initial_accumulator_value": "initial_value",
    "initial_scale": "initial_value",
    "decoupled_weight_decay": "decoupled",
    "clip": "clip_value",
    "clipvalue": "clip_value",
    "clipnorm": "clip_norm, an argument of an optimizer's step()",
    "clip_norm": "opt.step(grads, clip_norm=...) of an optimizer",
    "global_clipnorm": "clip_norm, an argument of an optimizer's step()",
    "grad_clip": "clip_norm, an argument of an optimizer's step()",
    "max_grad_norm": "clip_norm, an argument of an optimizer's step()",
    "max_norm": "clip_norm, an argument of an optimizer's step()",
    "grad_scale": "opt.step(grads, grad_scale=...) of an optimizer",
    "loss_scale": "grad_scale, which multiplies the gradients, an argument of step() and of the functions",
    "loss_scale_factor": "grad_scale, which multiplies the gradients, an argument of step() and of the functions",
}
NOT_NEEDED = {
    "foreach": "all tensors are updated in one call",
    "fused": "every update is fused",
    "jit": "every update is compiled",
    "differentiable": "updates are made in place and cannot be differentiated",
    "momentum_decay": "nesterov has no schedule of its own here",
    "use_ema": "averages of the parameters are not kept here",
    "ema_momentum": "averages of the parameters are not kept here",
    "ema_overwrite_frequency": "averages of the parameters are not kept here",
}


def said_instead(name, known=None):
    """The end of a sentence that says what to write for a name of another framework; "" where there is nothing to say.
    known: the hyper-parameters of an optimizer, which the sentence keeps to; None for those of all optimizers."""

    def fits(text):
        return known is None or {*re.findall(r"\w+", text)} & CHECKS.keys() <= {*known}

    if name in NOT_NEEDED:
        return f"; leave {name} out: {NOT_NEEDED[name]}" if fits(NOT_NEEDED[name]) else ""
    alternatives = [text for text in OUR_WORD.get(name, "").split(" | ") if text and fits(text)]
    return f"; for {name} write {' or '.join(alternatives)}" if alternatives else ""


def cuda_options(backend, stream, capturable, check):
    """A list with the last argument of the CUDA backend's Plan; an empty list for the others, whose Plans have none."""
    if backend == "cuda":
        from .backends.cuda import Options

        return [Options(stream, flag("capturable", capturable), flag("check", check))]
    for name, value in (("stream", stream), ("capturable", capturable), ("check", check)):
        if value is not None and value is not False:
            raise TypeError(f"{name}={shown(value)} needs backend='cuda'; this runs on {backend!r}")
    return []
