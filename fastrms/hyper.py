"""Hyper-parameters: what values each may have, and the sentence when one has another."""

import math
import numbers

import numpy as np

from . import backends

MOST_STEPS = 2**62


def number(name, value):
    """value as a float; TypeError for what is not one number (bool included), ValueError for NaN."""
    kind = type(value).__name__
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a 0-d array or tensor
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {kind}; it must be a number")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name} is an integer too large for a float") from None
    if math.isnan(value):
        raise ValueError(f"{name} is nan")
    return value


def non_negative(name, value):
    value = number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be finite and at least 0")
    return value


def finite(name, value):
    """A hyper-parameter that only an own rule knows: a number, or a word or flag that its coefficients read."""
    if value is None or isinstance(value, (bool, str)):
        return value
    value = number(name, value)
    if math.isinf(value):
        raise ValueError(f"{name}={value!r} must be finite")
    return value


def positive(name, value):
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be finite and above 0")
    return value


def scale(name, value):
    """A factor for gradients that neither vanishes nor overflows in float32."""
    value = number(name, value)
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name}={value!r} must be from 1e-30 to 1e30")
    return value


def step_count(name, value, least):
    """A number of steps as an int."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be an int")
    if not least <= value <= MOST_STEPS:
        raise ValueError(f"{name}={value!r} must be from {least} to 2**62")
    return int(value)


def above_zero(name, value):
    value = number(name, value)
    if not value > 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    return value


def decay_rate(name, value):
    value = number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1)")
    return value


def flag(name, value):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} must be True or False")
    return bool(value)


def rate_or_schedule(name, value):
    return value if callable(value) else non_negative(name, value)


def optional_positive(name, value):
    return None if value is None else positive(name, value)


def choice(*allowed):
    def check(name, value):
        value = bool(value) if isinstance(value, np.bool_) else value
        for candidate in allowed:
            if value is candidate or (isinstance(value, str) and value == candidate):
                return candidate
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")

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


def cuda_options(backend, stream, capturable, check):
    """What only the CUDA backend takes, as the last argument of its Plan; no argument for the others."""
    if backend == "cuda":
        from .backends.cuda import Options

        return [Options(stream, flag("capturable", capturable), flag("check", check))]
    for name, value in (("stream", stream), ("capturable", capturable), ("check", check)):
        if value is not None and value is not False:
            raise TypeError(f"{name}={value!r} needs backend='cuda'; this runs on {backend!r}")
    return []


def said_instead(name):
    return ""
