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
from textwrap import indent
from types import ModuleType

import llvmlite
import numba
import numpy as np
from llvmlite import binding

from .. import own_rules, rules
from . import inlined

TILE, ASKED = 128, (1536, 1600)  # bytes; the lines that a tile asks for, from its start: as in csrc/internal.h
CHUNK = 8 * 1024  # elements that a thread takes at once
OPTIONS = {"error_model": "numpy", "nogil": True}  # Python's division check keeps loops scalar; never fastmath
compiler = numba.njit(**OPTIONS)

HEAD = """\
from llvmlite import ir
from numba import int64, njit, prange, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from numpy import empty, sqrt, uintp

OPTIONS = {options}
BUFFERS = {buffers}
real, word = types.{dtype}, types.intp
fegetmode, fesetmode = (types.ExternalFunction(name, types.intc(types.uintp)) for name in ("fegetmode", "fesetmode"))
IEEE = uintp(2**64 - 1)  # FE_DFL_MODE

@intrinsic
def room(context):
    \"\"\"64 bytes on the stack.\"\"\"
    def code(context, builder, signature, arguments):
        return builder.ptrtoint(alloca_once(builder, ir.IntType(64), size=8), context.get_value_type(types.uintp))
    return types.uintp(), code

def element(builder, address, index):
    return builder.gep(builder.inttoptr(address, ir.{ir}().as_pointer()), [index])

def apart(builder, access, name):
    \"\"\"Tells LLVM that no two buffers share a byte.\"\"\"
    known = builder.module.add_metadata
    scopes = {{buffer: known([buffer, known(["fastrms"])]) for buffer in BUFFERS}}
    access.set_metadata("alias.scope", known([scopes.pop(name)]))
    access.set_metadata("noalias", known(list(scopes.values())))
    return access

def stream(name):
    @intrinsic
    def load(context, address, index):
        def code(context, builder, signature, arguments):
            return apart(builder, builder.load(element(builder, *arguments)), name)
        return real(word, word), code

    @intrinsic
    def store(context, address, index, value):
        def code(context, builder, signature, arguments):
            apart(builder, builder.store(arguments[2], element(builder, *arguments[:2])), name)
            return context.get_dummy_value()
        return types.void(word, word, real), code
    return load, store

@intrinsic
def ask(context, address):
    def code(context, builder, signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        prototype = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], prototype)
        to_read, all_caches, data = flag(0), flag(3), flag(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), to_read, all_caches, data])
        return context.get_dummy_value()
    return types.void(word), code

@intrinsic
def coefficient(context, address, index):
    def code(context, builder, signature, arguments):
        return builder.load(element(builder, *arguments))
    return real(word, word), code

@intrinsic
def integer(context, address, index):
    def code(context, builder, signature, arguments):
        address, index = arguments
        words = builder.inttoptr(address, index.type.as_pointer())
        return builder.load(builder.gep(words, [index]))
    return word(word, word), code

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
# each thread begins with its own share of the chunks and takes over what is left of others', as in csrc/pool.c: a late one
# holds up nobody
PARALLEL = """
@njit(**OPTIONS)
def update(row, first, size, coefficients):
{loops}

get_num_threads = types.ExternalFunction("get_num_threads", word())  # numba's functions of these names cannot be kept
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intc))

@intrinsic
def take(context, address):
    def code(context, builder, signature, arguments):
        counter = ir.IntType(64)
        where = builder.inttoptr(arguments[0], counter.as_pointer())
        return builder.atomic_rmw("add", where, counter(1), "monotonic")
    return int64(word), code

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
    """kernel(table, number[, parts]).  table: the address of words that say how many tensors, where coefficients begin, with
    which number, how many bytes from one number's to the next; then of each tensor size, param, grad, *states."""
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
    """The module of a kernel; body: the lines that update element i.  In tiles, as in csrc/kernels.inc."""
    known = {"zero": "real(0)"} if isinstance(rule, str) else {}  # a select of it is a mask
    rule = rules.find(rule)
    buffers, names = ["param", "grad", *rules.state_names(rule)], rules.coefficient_names(rule)
    loops = LOOPS.format(
        addresses=", ".join(buffers),
        moved=", ".join(f"integer(row, {k}) + first * {dtype.itemsize}" for k in range(1, len(buffers) + 1)),
        names=", ".join(names) + ",",
        values=", ".join(known.get(name, f"coefficient(coefficients, {k})") for k, name in enumerate(names)) + ",",
        tile=TILE // dtype.itemsize,
        ask="; ".join(f"ask({name} + start * {dtype.itemsize} + {place})" for name in buffers for place in ASKED),
        body="\n    ".join(body),
        body_of_tile="\n        ".join(body),
    )
    return (HEAD + (PARALLEL if parallel else SERIAL)).format(
        options=OPTIONS,
        buffers=buffers,
        dtype=dtype,
        ir={4: "FloatType", 8: "DoubleType"}[dtype.itemsize],
        streams="\n".join(f"load_{name}, store_{name} = stream({name!r})" for name in buffers),
        head=4 * np.dtype(np.intp).itemsize,
        row=(1 + len(buffers)) * np.dtype(np.intp).itemsize,
        loops=indent(loops, " " * 4),
        loops_of_tensor=indent(loops, " " * 8),
        chunk=CHUNK,
        enter=ENTER,
        leave=LEAVE,
    )


def calling(rule):
    """The body of a loop that calls the function `rule`.  An own rule gets its gradient scaled."""
    states, names = rules.state_names(rule), list(rules.coefficient_names(rule))
    elements = [inlined.load(name) for name in ("param", "grad", *states)]
    results = [f"new_{name}" for name in ("param", *states)]
    if isinstance(rule, own_rules.OwnRule):
        del names[:2]
        elements[1] += " * grad_scale * grad_rescale"
    return [f"{', '.join(results)}, = rule({', '.join(elements + names)})", *inlined.stores(rule, results)]


def jitted(rule, general):
    """A rule as a jitted function of scalars."""
    return rules.compile_rule(rules.RULES[rule], general, compiler, select=compiler(rules.select))


def own_kernel(rule, dtype, parallel):
    """The kernel of an own rule; what Numba refuses, or computes in another dtype, is an error in one sentence."""
    function = own_rules.function_of(rule, compiler(rules.select), compiler)
    real = numba.from_dtype(dtype)
    try:
        function.compile((real,) * (2 + len(rule.states) + len(rule.coefficients)))
    except numba.errors.NumbaError as error:
        reason = next((line for line in str(error).splitlines() if line.strip() and "pipeline" not in line), "")
        raise TypeError(f"Numba cannot compile the rule of {rule} for {dtype}: {reason.strip()}") from error
    (overload,) = function.overloads.values()
    returned = overload.signature.return_type
    results = own_rules.checked(rule, tuple(returned) if isinstance(returned, numba.types.BaseTuple) else returned)
    wrong = next((part for part in results if part != real), None)
    if wrong is not None:
        raise TypeError(f"the rule of {rule} computes {wrong} from {dtype}; every number in it must be a coefficient")
    text = module_text(own_rules.plain(rule), dtype, parallel, calling(own_rules.plain(rule)))
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
