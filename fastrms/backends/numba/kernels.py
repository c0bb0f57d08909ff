"""The Numba kernels: a generated module with the loop over each rule, form and dtype, serial or parallel, kept on disk.

A module holds the operations of its rule (trace.py), so its name, a hash of its text and of all that its machine code
depends on, changes with the rule, and Numba's cache beside it can never run another rule or form.
"""

import hashlib
import inspect
import platform
import re
import sys
from functools import cache
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from textwrap import indent
from types import ModuleType

import llvmlite
import numba
import numpy as np
from llvmlite import binding

from ... import files, rules
from .. import trace
from . import intrinsics

if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and these kernels run compiled only: unset it, or use another backend")

TILE, ASKED = 128, (1536, 1600)  # bytes: the length of a tile, and how far from its start it prefetches
CHUNK = 8 * 1024  # elements that a thread takes at once
OPTIONS = {"error_model": "numpy", "nogil": True}  # "python" checks divisors, which keeps loops scalar; never fastmath
compiler = numba.njit(**OPTIONS)

HEAD = """\
CACHE = globals().get("CACHE", True)
from numba import int64, njit, prange, types
from numpy import empty, sqrt
from {intrinsics} import (
    IEEE, ask, fegetmode, fesetmode, get_num_threads, integer, reader, room, set_num_threads, stream, take,
)

OPTIONS = {options}
real, word = types.{dtype}, types.intp
coefficient = reader(real)
{streams}
"""
LOOPS = """\
{names} = {values}
{addresses} = {moved}
whole = size - size % {tile}
for start in range(0, whole, {tile}):
    {ask}
    for k in range({tile}):
        i = start + k
        {body_of_tile}
for i in range(whole, size):
    {body}
"""
SERIAL = """
@njit([types.void(word, word)], cache=CACHE, **OPTIONS)
def kernel(table, number):
    coefficients = integer(table, 1) + (number - integer(table, 2)) * integer(table, 3)
    first = 0
    {enter}
    for tensor in range(integer(table, 0)):
        row = table + {head} + tensor * {row}
        size = integer(row, 0)
{loops_of_tensor}
    {leave}
"""
# each thread begins with its own share of the chunks, then takes chunks that are left of the others' shares, as in
# csrc/pool.c, so that a late thread holds up nobody
PARALLEL = """
@njit(**OPTIONS)
def update(row, first, size, coefficients):
{loops}

@njit(**OPTIONS)
def chunks(row):
    return -(-integer(row, 0) // {chunk})

@njit([types.void(word, word, word)], cache=CACHE, parallel=True, **OPTIONS)
def kernel(table, number, parts):
    coefficients = integer(table, 1) + (number - integer(table, 2)) * integer(table, 3)
    users = get_num_threads()
    set_num_threads(parts)
    total = 0
    for tensor in range(integer(table, 0)):
        total += chunks(table + {head} + tensor * {row})
    taken = empty(parts * 8, int64)  # each in a cache line of its own
    for part in range(parts):
        taken[8 * part] = total * part // parts
    at = taken.ctypes.data
    for part in prange(parts):
        {enter}
        for turn in range(parts):
            whose = (part + turn) % parts
            end = total * (whose + 1) // parts
            row, before = table + {head}, 0
            chunk = take(at + 64 * whose)
            while chunk < end:
                while before + chunks(row) <= chunk:
                    before += chunks(row)
                    row += {row}
                first = (chunk - before) * {chunk}
                update(row, first, min({chunk}, integer(row, 0) - first), coefficients)
                chunk = take(at + 64 * whose)
        {leave}
    set_num_threads(users)
    taken[0] = 0  # until here it is used, and not freed, though above only by its address
"""
# each thread computes in the default floating-point mode, with subnormals, whatever the caller has set, and restores it
ENTER, LEAVE = "mode = room(); fegetmode(mode); fesetmode(IEEE)", "fesetmode(mode)"
if platform.libc_ver()[0] != "glibc":
    ENTER = LEAVE = "pass"


@cache
def kernel(rule, general, dtype, parallel=False):
    """A compiled kernel(table, number), or kernel(table, number, parts) where it is parallel.

    ``table`` is the address of a table of words: the number of tensors, the address of the first row of coefficients, the
    step number of this row, the bytes from one row to the next; then, for each tensor, its size and the addresses of its
    param, grad and states.
    """
    text, name = text_of(rule, general, dtype, parallel), name_of(rule, general, dtype)
    try:
        name = f"{name}_{fingerprint(text)}"
        return executed(text, name, kept(text, name), CACHE=True).kernel
    except Exception as error:  # an unwritable, full or damaged disk, no sources: the cache can be done without
        return executed(text, name, CACHE=False, WHY_NOT=repr(error)).kernel


def why_not_kept(rule, general, dtype, parallel=False):
    """Why kernel() is not kept on disk; None where it is."""
    return kernel(rule, general, dtype, parallel).py_func.__globals__.get("WHY_NOT")


def name_of(rule, general, dtype):
    """The first part of the name of a kernel's module; the key follows, where there is one."""
    return f"fastrms_{rule}_{'general' if general else 'neutral'}_{dtype}"


def text_of(rule, general, dtype, parallel=False):
    """The module of the kernel of a rule in rules.RULES."""
    made = trace.trace(rules.RULES[rule], general)
    known = {"zero": "real(0)"}  # a constant: a select of it becomes a mask
    return module_text(rules.RULES[rule], dtype, parallel, trace.lines(made), made.results, known)


def module_text(rule, dtype, parallel, lines, results, known=None):
    """The module of a kernel.

    Parameters
    ----------
    lines : list of str
        The operations on one element, whose numbers have the names of the rule's arguments.
    results : list of str
        The names of the new param and states in lines.
    known : dict, optional
        The coefficients that are constants: name -> expression.
    """
    buffers = ["param", "grad", *rules.state_names(rule)]
    loops = loops_text(rule, buffers, dtype, body_text(buffers, lines, results), known or {})
    return (HEAD + (PARALLEL if parallel else SERIAL)).format(
        intrinsics=intrinsics.__name__,
        options=OPTIONS,
        dtype=dtype,
        streams="\n".join(f"load_{name}, store_{name} = stream({name!r}, {buffers}, real)" for name in buffers),
        head=4 * np.dtype(np.intp).itemsize,
        row=(1 + len(buffers)) * np.dtype(np.intp).itemsize,
        loops=indent(loops, " " * 4),
        loops_of_tensor=indent(loops, " " * 8),
        chunk=CHUNK,
        enter=ENTER,
        leave=LEAVE,
    )


def body_text(buffers, lines, results):
    """The lines that update element i: load it, compute, store it."""
    updated = [name for name in buffers if name != "grad"]
    loads = [f"{name} = load_{name}(at_{name}, i)" for name in buffers]
    return [*loads, *lines, *(f"store_{name}(at_{name}, i, {new})" for name, new in zip(updated, results, strict=True))]


def loops_text(rule, buffers, dtype, body, known):
    """The loop over a tensor in tiles, as in csrc/kernels.inc, and the loop over the elements that are left."""
    names = rules.coefficient_names(rule)
    return LOOPS.format(
        addresses=", ".join(f"at_{name}" for name in buffers),
        moved=", ".join(f"integer(row, {k}) + first * {dtype.itemsize}" for k in range(1, len(buffers) + 1)),
        names=", ".join(names) + ",",
        values=", ".join(known.get(name, f"coefficient(coefficients, {k})") for k, name in enumerate(names)) + ",",
        tile=TILE // dtype.itemsize,
        ask="; ".join(f"ask(at_{name} + start * {dtype.itemsize} + {offset})" for name in buffers for offset in ASKED),
        body="\n    ".join(body),
        body_of_tile="\n        ".join(body),
    )


def jitted(rule, general):
    """A rule of rules.RULES as a jitted function of scalars."""
    names = {"sqrt": np.sqrt}
    exec(trace.text(trace.trace(rules.RULES[rule], general)), names)
    return compiler(names[rule])


def fingerprint(text):
    """A hash of all that decides the machine code; the processor, too, since machines may share the folder."""
    target = [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), platform.machine()]
    versions = [sys.version, np.__version__, numba.__version__, llvmlite.__version__]
    parts = [text, inspect.getsource(intrinsics), *target, *versions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def kept(text, name):
    """The path of the generated module, written if it is not there: Numba keeps the machine code beside it."""
    path = files.cache_folder() / f"{name}.py"
    if not path.exists():
        files.keep(path, text.encode())
    return str(path)


class Kept:
    """Imports a kernel by its name, as Numba does when it loads a user's function that calls it and that was kept by
    cache=True.  The module is made anew from its text where its file is gone or cannot be written.  It is a serial kernel:
    Numba keeps no function that calls a parallel one."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        found = re.fullmatch(r"fastrms_(\w+)_(general|neutral)_(float32|float64)(_[0-9a-f]{24})?", name)
        if found is None:
            return None
        path = files.cache_folder() / f"{name}.py"
        if path.exists():
            return spec_from_file_location(name, path)
        rule, form, dtype, key = found.groups()
        text = text_of(rule, form == "general", np.dtype(dtype)) if rule in rules.RULES else ""
        if key is None:
            return ModuleSpec(name, Unkept(text))
        if key != f"_{fingerprint(text)}":
            raise ImportError(
                f"a function of yours that Numba kept by cache=True calls {name}, a kernel of another fastrms, Numba or "
                f"machine: delete the files of this function in the folder __pycache__ beside its own file, or in "
                f"NUMBA_CACHE_DIR"
            )
        try:
            return spec_from_file_location(name, kept(text, name))
        except OSError:
            return ModuleSpec(name, Unkept(text))


class Unkept(Loader):
    """A loader of a kernel that has no file."""

    def __init__(self, text):
        self.text = text

    def exec_module(self, module):
        filled(module, self.text, CACHE=False)


sys.meta_path.append(Kept)


def executed(text, name, path="<fastrms kernel>", **names):
    """The module made by a generated text.  Numba caches beside a file at path, the text of which does not matter."""
    module = sys.modules[name] = ModuleType(name)  # where Numba looks for the globals of a cached function
    return filled(module, text, path, **names)


def filled(module, text, path="<fastrms kernel>", **names):
    vars(module).update(names)
    exec(compile(text, path, "exec"), vars(module))
    return module
