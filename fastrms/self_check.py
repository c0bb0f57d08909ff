"""Whether this installation has the bits that it promises: `python -m fastrms`, and `python -m fastrms verify`, which goes
through Numba's kernels, too.

Every kernel of every tier, every storage format and whole steps are compared with the NumPy backend, on numbers of all
kinds; and the C extension with the sources beside it.
"""

import argparse
import contextlib
import os
import runpy
import sys
import time
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np

import fastrms

from . import backends, config, files, formats, recipes, rules, storage
from .backends import plan
from .backends.coefficients import Coefficients

c = backends.load("c")
SOURCES = Path(__file__).parents[1] / "csrc"  # of an editable install
LENGTHS = (0, 1, 7, 8, 15, 17, 31, 33, 63, 65, 131, 1003, 2053)
STEP = 330_007  # elements: enough for all threads
ROUNDINGS = formats.Rounding(), formats.Rounding(True, 0x12345678, 1000)
OPTIONS = [{name: value} for name in ("state_format", "master") for value in storage.CHECKS[name].allowed]
COEFFICIENTS = {
    "grad_scale": -0.7, "grad_rescale": 0.9, "clip_low": -2.5, "clip_high": 2.5, "weight_decay": 0.03, "rho": 0.9,
    "one_minus_rho": 0.1,
    "v_scale": 1.7, "eps_root": 1e-7, "in_scale": 0.01, "eps": 1e-8, "momentum": 0.8, "nesterov_b": 0.8,
    "nesterov_u": 0.3, "out_scale": 0.9, "decay": 1e-4, "lr": 0.02, "beta1": 0.9, "one_minus_beta1": 0.1,
    "beta2": 0.99, "one_minus_beta2": 0.01, "m_scale": 0.9, "g_scale": 0.2, "step_size": 0.003, "root_scale": 1.1,
    "max_scale": 1.3, "eta_minus": 0.5, "eta_plus": 1.2, "step_min": 1e-6, "step_max": 50.0, "flip_below": 0.0,
}  # fmt: skip


# what goes in, and how results are compared; the tests use it, too


def raw_recipe(rule, dtype, general):
    """A recipe with every coefficient different from its neutral value."""
    known, names = {**recipes.constants(dtype), **COEFFICIENTS}, rules.coefficient_names(rules.RULES[rule])
    return recipes.Recipe(rule, dtype, general, {name: float(known[name]) for name in names}, ())


def wild_values(size, dtype, seed):
    """Normal numbers of many magnitudes, and 10 % raw bit patterns: subnormals, infinities, NaN."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * 10.0 ** rng.integers(-12, 6, size)).astype(dtype)
    raw = rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8).view(dtype)
    wild = np.where(rng.random(size) < 0.1, raw, values)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(dtype).tiny, np.finfo(dtype).max], dtype)
    tiniest = np.nextafter(dtype.type(0), dtype.type(1))
    wild[:: max(size // 200, 1)] = np.resize(np.append(special, [tiniest, -tiniest]), wild[:: max(size // 200, 1)].size)
    return wild


def buffer_names(rule):
    return ["param", "grad", *rules.state_names(rules.RULES[rule])]


def wild_buffers(rule, dtype, size):
    """param, grad and states; averages of squares are not negative."""
    buffers = {name: wild_values(size, dtype, seed) for seed, name in enumerate(buffer_names(rule))}
    return [np.abs(b) if name.endswith(("sq", "square_avg", "sum")) else b for name, b in buffers.items()]


def bits(array):
    """The numbers as integers, all NaN alike (their sign and payload are not promised)."""
    flat = np.array(array).reshape(-1)
    if flat.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            flat[np.isnan(flat)] = np.nan
    return flat.view(f"u{flat.itemsize}")


def difference(names, got, want):
    """Where the first of these arrays differs from the one that is wanted, as a text; None where none does."""
    for name, x, y in zip(names, got, want, strict=True):
        wrong = np.flatnonzero(bits(x) != bits(y))
        if wrong.size:
            k, x, y = wrong[0], np.reshape(x, -1), np.reshape(y, -1)
            return f"{name}[{k}] is {x[k]}, NumPy has {y[k]}; {wrong.size} of {x.size} differ"
    return None


@contextlib.contextmanager
def forced(isa):
    """The C kernels of one instruction set; None leaves them as they are."""
    if isa is not None:
        c.use_isa(isa)
    try:
        yield
    finally:
        if isa is not None:
            c.use_isa(os.environ.get("FASTRMS_ISA") or None)


# kernels


def updated(update, recipe, buffers):
    """The buffers after one update, which gets copies at odd offsets."""
    copies = []
    for buffer in buffers:
        offset = (len(copies) + buffer.size) % 8
        copies.append(np.empty(buffer.size + offset, buffer.dtype)[offset:])
        copies[-1][:] = buffer
    param, grad, *states = copies
    update(recipe, 1, 1.0, param, grad, states)
    return copies


@cache
def reference(rule, general, dtype):
    """(recipe, buffers, the buffers that NumPy makes of them)"""
    recipe, buffers = raw_recipe(rule, dtype, general), wild_buffers(rule, dtype, LENGTHS[-1])
    return recipe, buffers, updated(backends.load("numpy").update, recipe, buffers)


def wrong_kernels(update, tier, kernels):
    """A sentence for each of these kernels that gives other bits than NumPy."""
    for rule, general, dtype in kernels:
        recipe, buffers, want = reference(rule, general, dtype)
        for size in LENGTHS:
            last = slice(LENGTHS[-1] - size, None)  # the first numbers are all 0
            got = updated(update, recipe, [buffer[last] for buffer in buffers])
            found = difference(buffer_names(rule), got, [buffer[last] for buffer in want])
            if found:
                form = "general" if general else "neutral"
                yield f"rule {rule}, {form} form, {dtype}, tier {tier}, {size} elements: {found}"
                break


# storage formats


def pointer(array):
    return c.ffi.NULL if array is None else c.ffi.from_buffer(array)


def encode(isa, format, x, stored, low, rounding):
    """formats.encode() of a whole buffer by a tier of C."""
    how = c.ffi.new("fastrms_rounding *", dict(zip(("stochastic", "key", "position"), rounding, strict=True)))
    of = c.ISAS.index(isa), format.number, x.size, c.ffi.from_buffer("float[]", x)
    c.lib.fastrms_encode(*of, pointer(stored), pointer(low), how[0])


def decode(isa, format, stored, low, x):
    """formats.decode() of a whole buffer into x by a tier of C."""
    of = c.ISAS.index(isa), format.number, x.size, pointer(stored), pointer(low)
    c.lib.fastrms_decode(*of, c.ffi.from_buffer("float[]", x))


def memory(format, size):
    """The array and the remainders of a stored tensor, all 0."""
    stored = np.zeros(storage.items_of(format, size) if format.in_blocks else size, format.dtype)
    return stored, None if format.low is None else np.zeros(size, format.low)


@cache
def stored(format, rounding, size):
    """(numbers, the memory in which NumPy stores them, the numbers that this decodes to)"""
    x = wild_values(LENGTHS[-1], np.dtype(np.float32), 1)[LENGTHS[-1] - size :]
    x = np.abs(x) if format.name == "q8u" else x
    into, low = memory(format, size)
    formats.encode(format, x, into, size, rounding, low)
    return x, (into, low), formats.decode(format, into, size, low)


def wrong_formats(isa):
    """A sentence for each storage format in which a tier of C gives other bits than NumPy."""
    for format, rounding in product(formats.FORMATS.values(), ROUNDINGS):
        for size in LENGTHS:
            x, want, numbers = stored(format, rounding, size)
            made, decoded = memory(format, size), np.empty(size, np.float32)
            encode(isa, format, x, *made, rounding)
            decode(isa, format, *want, decoded)
            got = {"stored": (made[0], want[0]), "decoded": (decoded, numbers)}
            got |= {} if format.low is None else {"low": (made[1], want[1])}
            found = difference(got, *zip(*got.values(), strict=True))
            if found:
                how = "stochastic" if rounding.stochastic else "nearest"
                yield f"format {format.name}, rounding {how}, tier {isa}, {size} elements: {found}"
                break


# whole steps


def stepped(backend, options):
    """Name -> array, of all that two steps with clip_norm leave."""
    rng = np.random.default_rng(2)
    param, grad = (rng.standard_normal(STEP, np.float32) for _ in range(2))
    if "master" in options:  # the upper halves of floats are numbers in bf16
        param = fastrms.Stored((param.view(np.uint32) >> 16).astype(np.uint16), "bf16")
    optimizer = fastrms.Adam(param, backend=backend, rounding="stochastic", **options)
    norms = [optimizer.step(grad, clip_norm=1.0).grad_norm for _ in range(2)]
    made = optimizer.state_dict()["tensors"][0]["state"]
    return {"grad_norm": np.array(norms), "param": getattr(param, "array", param), **made}


@cache
def reference_step(k):
    return stepped("numpy", OPTIONS[k])


def wrong_steps(isa):
    """A sentence for each option with which a step by a tier of C leaves other bits than one by NumPy."""
    for k, options in enumerate(OPTIONS):
        want, got = reference_step(k), stepped("c", options)
        found = difference(want, got.values(), want.values())
        if found:
            yield f"a step of Adam, {options}, float32, tier {isa}, {STEP} elements: {found}"


def wrong_in_tier(isa):
    with forced(isa):
        yield from wrong_kernels(c.update, isa, config.kernels())
        yield from wrong_formats(isa)
        yield from wrong_steps(isa)


# the build, and what Numba keeps on disk


def stale_build():
    """A sentence where the C extension was built from other sources than those beside the package."""
    built, there = c.built("sources"), runpy.run_path(str(SOURCES / "fingerprint.py"))["fingerprint"](SOURCES)
    if built != there:
        yield (f"the C extension is stale: it was built from sources with the hash {built}, and those in {SOURCES} have "
               f"{there}: run `pip install -e .` in {SOURCES.parent}")  # fmt: skip


def in_parallel(numba, recipe, step, grad_scale, param, grad, states):
    """numba.update by the parallel kernel."""
    made = numba.Update(Coefficients(recipe), 0, [(param, plan.constant(grad), states)])
    made.make_coefficients(step, grad_scale)
    made.shared(step, numba.started()[1])


def kept_in_parallel(kernels):
    """The kernels whose parallel form is on disk: it takes seconds to compile one that is not."""
    for of in config.kernels():
        text, name = kernels.text_of(*of, parallel=True), kernels.name_of(*of)
        if (files.cache_folder() / f"{name}_{kernels.fingerprint(text)}.py").exists():
            yield of


def wrong_in_numba():
    """A sentence for each kernel of the Numba backend that gives other bits than NumPy, and for a cache that is broken."""
    numba = backends.load("numba")
    kernels, _ = numba.compiler()
    again = f"delete the folder {files.cache_folder()}, and run this again"
    for tier, update, of in (("numba", numba.update, [*config.kernels()]),
                             ("numba, parallel", partial(in_parallel, numba), [*kept_in_parallel(kernels)])):  # fmt: skip
        for sentence in wrong_kernels(update, tier, of):
            yield f"{sentence}; where the compiled kernel on disk is damaged: {again}"
        without = [kernels.why_not_kept(*kernel, tier != "numba") for kernel in of]
        if any(without):
            yield (f"{sum(map(bool, without))} kernels of tier {tier} cannot be kept in Numba's cache, and each process "
                   f"compiles them anew ({next(filter(None, without))}): {again}, or set NUMBA_CACHE_DIR to a folder that "
                   f"can be written")  # fmt: skip


def checks(thorough):
    """(name, function that gives a sentence for all that is wrong, why it cannot be looked at or None, what is right where
    nothing is wrong) of each check."""
    no_sources = None if (SOURCES / "fingerprint.py").exists() else "there are no sources beside the package"
    yield "build", stale_build, c.available() or no_sources, f"the C extension was built from the sources in {SOURCES}"
    same = f"{len([*config.kernels()])} kernels have the bits of NumPy"
    for isa in c.isas():
        seen = f"{same}, and so have {len(formats.FORMATS)} storage formats and {len(OPTIONS)} kinds of steps"
        yield isa, partial(wrong_in_tier, isa), None, seen
    if thorough:
        yield "by numba", wrong_in_numba, backends.load("numba").available(), f"{same}, and the cache on disk works"


def looked_at(name, check, reason, right):
    """Print what a check finds; returns how much is wrong."""
    sys.stdout.write(f"{name:10} ")
    sys.stdout.flush()  # where a kernel ends the process, its tier is the last word
    wrong = []
    try:
        wrong += [] if reason else check()
    except Exception as error:  # a bug report needs the other lines all the more
        wrong.append(repr(error))
    said = f"not checked: {reason}" if reason else "WRONG" if wrong else f"ok: {right}"
    sys.stdout.write("".join(f"{line}\n" for line in [said, *(f"    {sentence}" for sentence in wrong)]))
    return len(wrong)


def main(arguments=None):
    """Print what is installed and what is wrong with it; returns the exit status, 1 where anything is."""
    parser = argparse.ArgumentParser(prog="python -m fastrms", description=__doc__)
    parser.add_argument("what", nargs="?", choices=["check", "verify"], default="check", help="verify: Numba's kernels, too")
    thorough, start = parser.parse_args(arguments).what == "verify", time.perf_counter()
    config.show_config()
    found = sum(looked_at(*check) for check in checks(thorough))
    sys.stdout.write(f"self-check: {found or 'nothing'} wrong, {time.perf_counter() - start:.1f} s\n")
    return 1 if found else 0
