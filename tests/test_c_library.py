"""csrc/ without Python: the static library, the coefficients that C computes, the header, and the trainer written in C."""

import importlib.util
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, c
from test_build import COMPILER, ROOT, check_kernels, instructions, needs_c

import fastrms

MAKE = shutil.which("make")
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
TRAINER = ROOT / "examples" / "trainer_c"
needs_make = pytest.mark.skipif(COMPILER is None or MAKE is None, reason="no C compiler or no make here")

FAMILIES = {
    "rmsprop": fastrms.RMSProp,
    "adagrad": fastrms.AdaGrad,
    "adam": fastrms.Adam,
    "adamw": fastrms.AdamW,
    "rprop": fastrms.RProp,
}
ONLY_FOR_THE_STATE = {"initial_value"}  # no coefficient
WORDS = {None: 0, "corrected": 2, "folded": 3, "dozat": 4}  # those of fastrms_decl.h


# the coefficients


def in_c(hyper):
    """Hyper-parameters of Python as a fastrms_hyper."""
    made = c.ffi.new("fastrms_hyper *")
    for name, value in hyper.items():
        if name not in ONLY_FOR_THE_STATE:
            setattr(made, name, WORDS.get(value, value))
    return made


def c_group(family, hyper, dtype):
    """(the fastrms_group that C computes, as bytes; what it refuses, or None); the group must be as it was then."""
    group = c.ffi.new("fastrms_group *")
    c.ffi.buffer(group)[:] = before = b"\x55" * c.ffi.sizeof("fastrms_group")
    function = getattr(c.lib, f"fastrms_{'adam' if family == 'adamw' else family}_group")
    refused = function(group, dtype.itemsize, in_c(hyper))
    assert not refused or bytes(c.ffi.buffer(group)) == before
    return bytes(c.ffi.buffer(group)), c.ffi.string(refused).decode() if refused else None


def python_group(family, hyper, dtype):
    """(the same as Python computes it, the error it raises or None)"""
    make = FAMILIES[family]
    try:
        recipe = make.checked_recipe(make.at_step(make.resolve(None, hyper)), dtype)
    except ValueError as error:
        return None, str(error)
    group = c.ffi.new("fastrms_group *")
    c.fill_group(group, recipe)
    return bytes(c.ffi.buffer(group)), None


def magnitude(rng):
    usual = [0.0, 1e-300, 1e-46, 1e-30, 1e-8, 1e-3, 1.0, 1e20, 1e39, 10 ** rng.uniform(-12, 3)]
    return -1.0 if rng.random() < 0.01 else rng.choice(usual)


def rate(rng):
    return rng.choice([0.0, 0.5, 0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-9, 1 - 2**-53, 1e-46, rng.random()])


VALUES = {
    "lr": magnitude, "eps": magnitude, "eps_root": magnitude, "lr_decay": magnitude, "weight_decay": magnitude,
    "rho": rate, "beta1": rate, "beta2": rate, "momentum": lambda rng: rng.choice([0.0, rate(rng)]),
    "clip_value": lambda rng: rng.choice([None, None, 1.0, 1e-46, 1e39, 0.1 + rng.random()]),
    "eta_minus": lambda rng: rng.choice([0.5, 1 - 1e-9, rng.random() or 0.5]),
    "eta_plus": lambda rng: rng.choice([1.2, 1 + 1e-9, 1e39, 1 + rng.random()]),
    "step_min": magnitude, "step_max": magnitude,
    "bias_correction": lambda rng: rng.choice([False, "corrected", "folded"]),
    "amsgrad": lambda rng: rng.choice([False, True, "corrected"]),
}  # fmt: skip


def random_hyper(family, rng):
    """Some hyper-parameters away from their defaults: those of a few, or of all."""
    flags = {"nesterov": [False, "dozat", "folded"] if family.startswith("adam") else [False, True]}
    hyper, share = {}, rng.choice([0.2, 0.5, 1.0])
    for name, default in FAMILIES[family].defaults.items():
        if name in ONLY_FOR_THE_STATE or rng.random() > share:
            hyper[name] = default
        elif name in VALUES:
            hyper[name] = VALUES[name](rng)
        else:
            hyper[name] = rng.choice(flags.get(name, [False, True]))
    return hyper


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_c_computes_the_groups_of_python(family, dtype):
    """The whole struct, byte by byte, for every rule in both forms; and C refuses what Python refuses."""
    rng, seen, refusals = random.Random(f"{family} {dtype}"), set(), 0
    for _ in range(1000):
        hyper = random_hyper(family, rng)
        want, error = python_group(family, hyper, dtype)
        got, refused = c_group(family, hyper, dtype)
        assert (refused is None) == (error is None), (hyper, refused, error)
        if error is None:
            assert got == want, hyper
            group = c.ffi.from_buffer("fastrms_group *", bytearray(got))
            seen.add((group.rule, group.general))
        refusals += error is not None
    rules = {"rmsprop": 4, "adam": 2, "adamw": 2}.get(family, 1)
    assert len(seen) == 2 * rules and 0 < refusals < 900, (seen, refusals)


@needs_c
@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_python(family):
    defaults = getattr(c.lib, f"fastrms_{family}_defaults")
    assert bytes(c.ffi.buffer(c.ffi.addressof(defaults))) == bytes(c.ffi.buffer(in_c(FAMILIES[family].defaults)))


@needs_c
@pytest.mark.parametrize("family, wrong", [
    *[(f, {name: value}) for f in FAMILIES for name in ("lr", "clip_value") for value in (-1.0, math.nan, math.inf)],
    *[("rmsprop", {name: value}) for name in ("rho", "momentum") for value in (-0.1, 1.0, math.nan, 1 - 1e-9)],
    *[("adam", {name: value}) for name in ("beta1", "beta2") for value in (-0.1, 1.0, math.nan, 1 - 1e-9)],
    *[(f, {"weight_decay": -1.0}) for f in ("rmsprop", "adagrad", "adam")],
    *[("rprop", wrong) for wrong in ({"eta_minus": 1.0}, {"eta_minus": 0.0}, {"eta_plus": 1.0}, {"step_min": 51.0})],
    ("rprop", {"step_max": math.inf}), ("rmsprop", {"eps": 0.0}), ("rmsprop", {"eps_root": -1.0}), ("rmsprop", {"nesterov": True}),
    ("adam", {"eps": 0.0}), ("adam", {"lr": 1e39}), ("adagrad", {"lr_decay": -1.0}), ("adagrad", {"eps": math.nan}),
])  # fmt: skip
def test_a_wrong_hyper_parameter_is_named(family, wrong):
    """As in Python, whose sentence has the same name."""
    hyper = {**FAMILIES[family].defaults, **wrong}
    _, refused = c_group(family, hyper, np.dtype(np.float32))
    _, error = python_group(family, hyper, np.dtype(np.float32))
    assert [refused] == list(wrong) and refused in error


@needs_c
def test_words_and_sizes_that_are_none_are_refused():
    for family, name, value in [("rmsprop", "bias_correction", 1), ("rmsprop", "nesterov", 2), ("adam", "nesterov", 1),
                                ("adam", "amsgrad", 3), ("adam", "bias_correction", -1)]:  # fmt: skip
        hyper = {**FAMILIES[family].defaults, "momentum": 0.9} if family == "rmsprop" else dict(FAMILIES[family].defaults)
        assert c_group(family, {**hyper, name: value}, DTYPES[0])[1] == name
    assert c.ffi.string(c.lib.fastrms_rprop_group(c.ffi.NULL, 2, c.ffi.NULL)) == b"itemsize"
