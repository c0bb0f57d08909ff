"""The Numba kernels: the loop over each rule, as a generated module per rule, form, dtype and way to run, kept on disk.

A module holds the text of the rule itself, so its name, a hash of that text and of all versions, changes with it, and
Numba's cache beside it can never run another rule or form.  Own rules are compiled in each process and not kept.
"""

import hashlib
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
from . import inlined

OPTIONS = {"error_model": "numpy", "nogil": True}  # Python's division check keeps loops scalar; never fastmath
compiler = numba.njit(**OPTIONS)

HEAD = """\
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy import empty, sqrt, uint8, uintp

OPTIONS = {options}
real, word = types.{dtype}, types.intp
fegetmode, fesetmode = (types.ExternalFunction(name, types.intc(types.uintp)) for name in ("fegetmode", "fesetmode"))
IEEE = uintp(2**64 - 1)  # FE_DFL_MODE

@intrinsic
def pointer(context, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))
    return types.CPointer(real)(word), code
"""
LOOP = """
@njit({signature}**OPTIONS)
def kernel(size, {addresses}, coefficients):
    {buffers}, numbers = {pointers}, pointer(coefficients)
    {names} = {values}
    {enter}
    for i in range(size):
        {body}
    {leave}
"""
SERIAL = "[types.void({words})], cache=CACHE, "
PARALLEL = """
update = kernel

@njit([types.void({words}, word)], cache=CACHE, parallel=True, **OPTIONS)
def kernel(size, {addresses}, coefficients, parts):
    for part in prange(parts):
        first, last = size * part // parts, size * (part + 1) // parts
        update(last - first, {moved}, coefficients)
"""
# each thread computes in the default floating-point mode, with subnormals, whatever the caller has set, and restores it
ENTER, LEAVE = "mode = empty(64, uint8); fegetmode(mode.ctypes.data); fesetmode(IEEE)", "fesetmode(mode.ctypes.data)"
if platform.libc_ver()[0] != "glibc":
    ENTER = LEAVE = "pass"


@cache
def kernel(rule, general, dtype, parallel=False):
    """kernel(size, *addresses, coefficients[, parts]): the addresses of param, grad, the states, and the coefficients."""
    if not isinstance(rule, str):
        return own_kernel(rule, dtype, parallel)
    try:
        text = module_text(rule, dtype, parallel, inlined.loop_body(rules.RULES[rule], general))
    except OSError:  # an installation without sources
        text = module_text(rule, dtype, parallel, calling(rules.RULES[rule]))
        return executed(text, f"fastrms_{rule}", CACHE=False, rule=jitted(rule, general)).kernel
    name = f"fastrms_{rule}_{'general' if general else 'neutral'}_{dtype}_{fingerprint(text)}"
    try:
        return executed(text, name, kept(text, name), CACHE=True).kernel
    except Exception:  # unwritable, full, torn or foreign: whatever is wrong with the cache, we can do without it
        return executed(text, name, CACHE=False).kernel


def module_text(rule, dtype, parallel, body):
    """The module of a kernel; body: the lines that update element i."""
    known = {"zero": "real(0)"} if isinstance(rule, str) else {}  # a select of it is a mask
    rule = rules.find(rule)
    buffers, names = ["param", "grad", *rules.state_names(rule)], rules.coefficient_names(rule)
    words = ", ".join(["word"] * (len(buffers) + 2))
    text = HEAD + LOOP + (PARALLEL if parallel else "")
    return text.format(
        options=OPTIONS,
        dtype=dtype,
        signature="" if parallel else SERIAL.format(words=words),
        words=words,
        addresses=", ".join(f"{name}_at" for name in buffers),
        moved=", ".join(f"{name}_at + first * {dtype.itemsize}" for name in buffers),
        buffers=", ".join(buffers),
        pointers=", ".join(f"pointer({name}_at)" for name in buffers),
        names=", ".join(names) + ",",
        values=", ".join(known.get(name, f"numbers[{k}]") for k, name in enumerate(names)) + ",",
        body="\n        ".join(body),
        enter=ENTER,
        leave=LEAVE,
    )


def calling(rule):
    """The body of a loop that calls the function `rule`.  An own rule gets its gradient scaled."""
    states, names = rules.state_names(rule), list(rules.coefficient_names(rule))
    elements = [f"{name}[i]" for name in ("param", "grad", *states)]
    results = ", ".join(f"{name}[i]" for name in ("param", *states))
    if isinstance(rule, own.OwnRule):
        names.remove("grad_scale")
        elements[1] += " * grad_scale"
    return [f"{results}, = rule({', '.join(elements + names)})"]


def jitted(rule, general):
    """A rule as a jitted function of scalars."""
    return rules.compile_rule(rules.RULES[rule], general, compiler, select=compiler(rules.select))


def own_kernel(rule, dtype, parallel):
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
    text = module_text(rule, dtype, parallel, calling(rule))
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
