"""The Numba kernels: the loop over each rule, as a generated module per rule, form, dtype and way to run, kept on disk.

A module holds the text of the rule itself, so its name, a hash of that text and of all versions, changes with it, and
Numba's cache beside it can never run another rule or form.  Own rules are compiled in each process and not kept.
"""

import hashlib
import inspect
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import llvmlite
import numba
import numpy as np
from llvmlite import binding

from .. import own, rules

OPTIONS = {"error_model": "numpy", "nogil": True}  # Python's division check keeps loops scalar; never fastmath
compiler = numba.njit(**OPTIONS)

HEAD = """\
from numba import njit, prange, types
from numpy import empty, sqrt, uint8, uintp

GENERAL = {general}
OPTIONS = {options}
inner = njit(**OPTIONS)
real = types.{dtype}
writable, constant = types.Array(real, 1, "C"), types.Array(real, 1, "C", readonly=True)
fegetenv, fesetenv = (types.ExternalFunction(name, types.intc(types.uintp)) for name in ("fegetenv", "fesetenv"))
IEEE = uintp(2**64 - 1)  # FE_DFL_ENV
"""
LOOP = """
@inner
def loop({buffers}, coefficients):
    {names} = {values}
    {enter}
    for i in range(param.size):
        {results} = rule({elements})
    {leave}
"""
# each thread computes in the default floating-point mode, with subnormals, whatever the caller has set, and restores it
ENTER, LEAVE = "mode = empty(64, uint8); fegetenv(mode.ctypes.data); fesetenv(IEEE)", "fesetenv(mode.ctypes.data)"
if platform.system() != "Linux":
    ENTER = LEAVE = "pass"
SERIAL = """
@njit([({types}, constant)], cache=CACHE, **OPTIONS)
def kernel({buffers}, coefficients):
    loop({buffers}, coefficients)
"""
PARALLEL = """
@njit([({types}, constant, types.intp)], cache=CACHE, parallel=True, **OPTIONS)
def kernel({buffers}, coefficients, parts):
    for part in prange(parts):
        first, last = param.size * part // parts, param.size * (part + 1) // parts
        loop({slices}, coefficients)
"""


@cache
def kernel(rule, general, dtype, parallel=False):
    """kernel(param, grad, *states, coefficients[, parts]) for flat arrays; grad and coefficients are read-only arrays."""
    head = HEAD.format(general=general, options=OPTIONS, dtype=dtype)
    loops = loop_text(rules.find(rule), PARALLEL if parallel else SERIAL)
    if not isinstance(rule, str):
        return own_kernel(rule, head + loops, dtype)
    try:
        text = head + rule_text(rules.RULES[rule]) + loops
    except OSError:  # an installation without sources
        return executed(head + loops, f"fastrms_{rule}", CACHE=False, rule=jitted(rule, general)).kernel
    name = f"fastrms_{rule}_{'general' if general else 'neutral'}_{dtype}_{fingerprint(text)}"
    try:
        return executed(text, name, kept(text, name), CACHE=True).kernel
    except Exception:  # unwritable, full, torn or foreign: whatever is wrong with the cache, we can do without it
        return executed(text, name, CACHE=False).kernel


def loop_text(rule, ending):
    """The loop over a rule, and the function around it.  An own rule gets its gradient scaled."""
    states, names = rules.state_names(rule), rules.coefficient_names(rule)
    buffers = ["param", "grad", *states]
    elements = [f"{name}[i]" for name in buffers] + list(names)
    if isinstance(rule, own.OwnRule):
        elements.remove("grad_scale")
        elements[1] += " * grad_scale"
    return (LOOP + ending).format(
        enter=ENTER,
        leave=LEAVE,
        buffers=", ".join(buffers),
        names=", ".join(names) + ",",
        values=", ".join(f"coefficients[{k}]" for k in range(len(names))) + ",",
        results=", ".join(f"{name}[i]" for name in ("param", *states)) + ",",
        elements=", ".join(elements),
        slices=", ".join(f"{name}[first:last]" for name in buffers),
        types=", ".join(["writable", "constant", *["writable"] * len(states)]),
    )


def rule_text(rule):
    """A rule and what it calls, as they stand in rules.py."""
    sources = [inspect.getsource(function) for function in (rules.select, *rules.HELPERS, rule)]
    return "".join(f"\n@inner\n{source}" for source in sources) + f"\nrule = {rule.__name__}\n"


def jitted(rule, general):
    """A rule as a jitted function of scalars."""
    return rules.compile_rule(rules.RULES[rule], general, compiler, select=compiler(rules.select))


def own_kernel(rule, text, dtype):
    """The kernel of an own rule; what Numba refuses, or computes in another dtype, is an error in one sentence."""
    function = own.function_of(rule, compiler(rules.select), compiler)
    real = numba.from_dtype(dtype)
    try:
        function.compile((real,) * (2 + len(rule.states) + len(rule.coefficients)))
    except numba.errors.NumbaError as error:
        reason = next((line for line in str(error).splitlines() if line.strip() and "pipeline" not in line), "")
        raise TypeError(f"Numba cannot compile the rule of {rule} for {dtype}: {reason.strip()}") from error
    (overload,) = function.overloads.values()
    returned = overload.signature.return_type
    results = own.checked(rule, tuple(returned) if isinstance(returned, numba.types.BaseTuple) else returned)
    wrong = next((part for part in results if part != real), None)
    if wrong is not None:
        raise TypeError(f"the rule of {rule} computes {wrong} from {dtype}; every number in it must be a coefficient")
    return executed(text, f"fastrms_{rule}", CACHE=False, rule=function).kernel


def fingerprint(text):
    """What decides the machine code, as a word; processors differ in a folder that machines share."""
    target = [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), platform.machine()]
    versions = [sys.version, np.__version__, numba.__version__, llvmlite.__version__]
    return hashlib.sha256("\n".join([text, *target, *versions]).encode()).hexdigest()[:24]


def kept(text, name):
    """The path of the generated module, written if it is not there: Numba keeps the machine code beside it."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(numba.config.CACHE_DIR or home, "fastrms")
    path = folder / f"{name}.py"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder)
        with open(handle, "w") as file:
            file.write(text)
        os.utime(temporary, (0, 0))  # Numba goes by size and time: processes that write at once write the same
        os.replace(temporary, path)
    return str(path)


def executed(text, name, path="<fastrms kernel>", **names):
    """The module of a generated text; what the file at path says does not matter, only that Numba finds it there."""
    module = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module  # Numba looks there for the globals of what it kept
    exec(compile(text, path, "exec"), vars(module))
    return module
