"""The CUDA kernels: Python text around each rule -> PTX -> cubin, without a driver or a GPU, kept on disk.

One thread updates one 128-bit vector.  A kernel is told how many vectors it may use, which is none where a buffer is not
aligned to 16 bytes; what they leave is updated one element per thread, by the same rule.  No loop, hence no limit at
2^31 elements, and every index is a uint64 compared with a uint64 (with an int64 Numba would compare doubles).
"""

import hashlib
import os
import re
import sys
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cuda.bindings import nvjitlink, nvvm
from cuda.core import Linker, LinkerOptions, ObjectCode
from llvmlite import ir
from numba import config, cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .. import own_rules, rules
from . import lowered

THREADS = 256  # per block
VECTOR = 16  # bytes
REALS = {np.dtype(np.float32): types.float32, np.dtype(np.float64): types.float64}


class Kind(NamedTuple):
    """many: buffers found through a table of pointers, for any number of tensors in one launch; else one tensor.
    capturable: coefficients read from device memory, so that a captured CUDA graph can change them; else arguments."""

    many: bool = False
    capturable: bool = False


class Compiled(NamedTuple):
    """A kernel for one compute capability."""

    name: str
    ptx: str
    cubin: bytes


KERNEL = """\
def {name}({arguments}):
{head}\
    thread = block * uint64({threads}) + uint64(cuda.threadIdx.x)
    if thread < vectors:
        first = thread * uint64({width})
        {lanes} = rule({loads})
{stores}\
    else:
        at = thread + vectors * uint64({width} - 1)
        if at < size:
            {results} = rule({elements})
"""
ONE = "    block = uint64(cuda.blockIdx.x)\n"
MANY = """\
    block = uint64(cuda.blockIdx.x)
    row = uint64(tensor_of[block]) * uint64({columns})
{pointers}\
    size = table[row + uint64({states} + 2)]
    vectors = table[row + uint64({states} + 3)]
    block = block - table[row + uint64({states} + 4)]
"""


def columns(states):
    """Of the table of a kernel for many tensors, per tensor: param, grad, states; size, vectors, first block."""
    return states + 5


def width(dtype):
    """Elements per vector."""
    return VECTOR // dtype.itemsize


def kernel_name(rule, general, dtype, kind):
    form = "general" if general else "neutral"
    return "_".join(["fastrms", str(rule), form, str(dtype), *(name for name, on in kind._asdict().items() if on)])


def kernel_text(rule, dtype, kind, name):
    """The Python source of a kernel; `rule` is the device function that it calls."""
    rule = own_rules.plain(rule)
    states, names = rules.state_names(rule), list(rules.coefficient_names(rule))
    buffers, updated = ["param", "grad", *states], ["param", *states]
    return KERNEL.format(
        name=name,
        arguments=", ".join(_arguments(buffers, names, kind)),
        head=_head(buffers, kind) + _coefficients(names, kind),
        threads=THREADS,
        width=width(dtype),
        lanes=", ".join(f"{name}_lanes" for name in updated) + ",",
        loads=", ".join([f"load({name}, first)" for name in buffers] + names),
        stores="".join(f"        store({name}, first, {name}_lanes)\n" for name in updated),
        results=", ".join(f"{name}[at]" for name in updated) + ",",
        elements=", ".join([f"{name}[at]" for name in buffers] + names),
    )


def _arguments(buffers, names, kind):
    return (["table", "tensor_of"] if kind.many else [*buffers, "size", "vectors"]) + (
        ["coefficients"] if kind.capturable else names
    )


def _head(buffers, kind):
    if not kind.many:
        return ONE
    pointers = [f"    {name} = pointer(table[row + uint64({k})])\n" for k, name in enumerate(buffers)]
    return MANY.format(columns=columns(len(buffers) - 2), states=len(buffers) - 2, pointers="".join(pointers))


def _coefficients(names, kind):
    return "".join(f"    {name} = coefficients[uint64({k})]\n" for k, name in enumerate(names)) if kind.capturable else ""


def signature(rule, dtype, kind):
    real, words = REALS[dtype], types.CPointer(types.uint64)
    buffers = 2 + len(rules.state_names(rule))
    where = [words, types.CPointer(types.uint32)] if kind.many else [types.CPointer(real)] * buffers + [types.uint64] * 2
    count = len(rules.coefficient_names(rule))
    return types.void(*where, *([types.CPointer(real)] if kind.capturable else [real] * count))


def _lanes(pointer):
    return VECTOR // (pointer.dtype.bitwidth // 8)


@intrinsic
def load(typing, pointer, at):
    """The 128-bit vector at pointer + at, as a tuple."""
    signature = types.UniTuple(pointer.dtype, _lanes(pointer))(pointer, at)

    def lower(context, builder, signature, values):
        vector = builder.load(_vector_pointer(builder, values, _lanes(pointer)), align=VECTOR)
        lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(_lanes(pointer))]
        return context.make_tuple(builder, signature.return_type, lanes)

    return signature, lower


@intrinsic
def store(typing, pointer, at, lanes):
    """Write a tuple as the 128-bit vector at pointer + at."""

    def lower(context, builder, signature, values):
        where = _vector_pointer(builder, values, _lanes(pointer))
        vector = ir.Constant(where.type.pointee, ir.Undefined)
        for k in range(_lanes(pointer)):
            vector = builder.insert_element(vector, builder.extract_value(values[2], k), ir.Constant(ir.IntType(32), k))
        builder.store(vector, where, align=VECTOR)
        return context.get_dummy_value()

    return types.void(pointer, at, lanes), lower


def _vector_pointer(builder, values, lanes):
    where = builder.gep(values[0], [values[1]])
    return builder.bitcast(where, ir.VectorType(where.type.pointee, lanes).as_pointer())


def _pointer_to(real):
    @intrinsic
    def pointer(typing, address):
        """An address as a pointer into global memory (addrspace 1: plain LDG, not a generic load)."""

        def lower(context, builder, signature, values):
            kind = context.get_value_type(real)
            there = builder.inttoptr(values[0], ir.PointerType(kind, 1))
            return builder.addrspacecast(there, ir.PointerType(kind))

        return types.CPointer(real)(address), lower

    return pointer


POINTERS = {real: _pointer_to(real) for real in REALS.values()}


def compile_ptx(rule, general, dtype, kind, cc):
    """(name, PTX) of a kernel; no cache."""
    found, name = rules.find(rule), kernel_name(rule, general, dtype, kind)
    names = {"rule": lowered.device_rule(found, general), "load": load, "store": store}
    names.update(pointer=POINTERS[REALS[dtype]], uint64=types.uint64, cuda=cuda)
    exec(kernel_text(found, dtype, kind, name), names)
    return name, named_ptx(names[name], signature(found, dtype, kind), name, cc, launch_bounds=THREADS)


def named_ptx(function, signature, name, cc, **options):
    """A kernel's PTX, with a plain name in place of Numba's mangled one."""
    ptx, _ = cuda.compile(function, signature, cc=cc, device=False, abi="numba", output="ptx", **options)
    mangled = re.search(r"\.entry\s+([\w$]+)", ptx).group(1)
    return ptx.replace(mangled, name)


def link(ptx, cc):
    """The cubin of a PTX text: a cubin runs on drivers older than the compiler, PTX does not."""
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


@cache
def compiled(rule, general, dtype, kind, cc):
    """Compiled, from this process, from disk or new.  Own rules are not kept on disk: their text may depend on anything."""
    if not isinstance(rule, str):
        name, ptx = compile_ptx(rule, general, dtype, kind, cc)
        return Compiled(name, ptx, link(ptx, cc))
    name = kernel_name(rule, general, dtype, kind)
    path = cache_path(rule, general, dtype, kind, cc)
    try:
        return Compiled(name, path.with_suffix(".ptx").read_text(), path.with_suffix(".cubin").read_bytes())
    except OSError:
        name, ptx = compile_ptx(rule, general, dtype, kind, cc)
        made = Compiled(name, ptx, link(ptx, cc))
        _keep(path, made)
        return made


def cache_path(rule, general, dtype, kind, cc):
    """Of the kept kernel, without suffix: what decides its code is in the name."""
    found, name = rules.find(rule), kernel_name(rule, general, dtype, kind)
    texts = [lowered.text(found, general), kernel_text(found, dtype, kind, name), str(signature(found, dtype, kind))]
    key = hashlib.sha256("\n".join([*texts, str(cc), *versions()]).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(config.CACHE_DIR or home, "fastrms", f"{name}_sm{cc[0]}{cc[1]}_{key}")


@cache
def versions():
    """Of everything between the text and the machine code, this module and the lowering included."""
    packages = [f"{name} {metadata.version(name)}" for name in ("numba-cuda", "numba", "llvmlite", "cuda-core")]
    ours = [Path(module.__file__).read_text() for module in (sys.modules[__name__], lowered)]
    return [sys.version, *packages, f"nvvm {nvvm.version()}", f"nvjitlink {nvjitlink.version()}", *ours]


def _keep(path, made):
    """Write both files whole, or do without them: an unwritable or full disk costs only time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for suffix, content in ((".cubin", made.cubin), (".ptx", made.ptx.encode())):
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path.with_suffix(suffix))
    except OSError:
        pass
