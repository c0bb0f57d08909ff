"""A CUDA kernel, from its rule to machine code, without a driver or a GPU, and kept on disk.

trace.py         the operations of the rule
lower.py         these as a device function, in which nothing can be rounded differently
kernel.py        the text of the kernel that calls it
compile_ptx()    both as PTX, by Numba and NVIDIA's NVVM
link()           the PTX as a cubin: one runs on drivers older than the compiler, PTX does not
"""

import contextlib
import hashlib
import inspect
import re
import sys
from functools import cache
from importlib import metadata
from typing import NamedTuple

from cuda.bindings import nvjitlink, nvvm
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.cuda import types

from ... import files, formats, own_rules, rules
from ..trace import text, trace
from . import codecs, intrinsics, kernel, norm_kernels, stored_kernel
from . import lower as lowering
from .kernel import kernel_name
from .lower import REALS, lower
from .table import THREADS, width


class Compiled(NamedTuple):
    """A kernel for one compute capability."""

    name: str
    ptx: str
    cubin: bytes


@own_rules.remembered
def compiled(rule, general, dtype, kind, cc):
    """The kernel of a rule: the one that this process has, the one on disk, or a new one.

    Parameters
    ----------
    rule : str or OwnRule
        A name in rules.RULES, or a user's rule.
    general : bool
    dtype : numpy.dtype
    kind : Kind
    cc : tuple of int
        The compute capability, such as (9, 0).

    Returns
    -------
    Compiled
    """
    name = kernel_name(rule, general, dtype, kind)
    which = rule, general, dtype, kind, cc
    return kept(name, lambda: cache_path(*which), lambda: compile_ptx(*which), cc)


def kept(name, find_path, make_ptx, cc):
    """The Compiled of this name from the disk, or made and written there."""
    with contextlib.suppress(OSError):  # it is not there
        path = find_path()
        return Compiled(name, path.with_suffix(".ptx").read_text(), path.with_suffix(".cubin").read_bytes())
    ptx = make_ptx()
    cubin = link(ptx, cc)
    with contextlib.suppress(OSError):  # an unwritable or full disk costs only time
        path = find_path()
        files.keep(path.with_suffix(".cubin"), cubin)
        files.keep(path.with_suffix(".ptx"), ptx.encode())
    return Compiled(name, ptx, cubin)


@cache
def compiled_norm(name, cc):
    """The Compiled of a kernel of norm.py."""
    return kept(f"fastrms_{name}", lambda: norm_path(name, cc), lambda: norm_ptx(name, cc), cc)


def norm_ptx(name, cc):
    """The PTX of a kernel of norm.py, always compiled anew."""
    kinds = {
        "float": types.float32,
        "double": types.float64,
        "int64": types.int64,
        "uint32": types.uint32,
        "uint64": types.uint64,
    }
    kinds |= {f"{kind}*": types.CPointer(one) for kind, one in kinds.items()}
    signature = types.void(*[kinds[kind] for kind in norm_kernels.ARGUMENTS[name].values()])
    return named_ptx(getattr(norm_kernels, name), signature, f"fastrms_{name}", cc, launch_bounds=THREADS)


def norm_path(name, cc):
    """The path of a kernel of norm.py in the cache, as cache_path()."""
    parts = [inspect.getsource(norm_kernels), name, str(cc), *versions()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return files.cache_folder() / f"fastrms_{name}_sm{cc[0]}{cc[1]}_{key}"


def compile_ptx(rule, general, dtype, kind, cc):
    """The PTX of a kernel, always compiled anew."""
    names = names_of(rule, general, dtype, kind)
    exec(text_of(kind).kernel_text(rules.find(rule), dtype, kind), names)
    name = kernel_name(rule, general, dtype, kind)
    return named_ptx(names["kernel"], signature(rule, dtype, kind), name, cc, launch_bounds=THREADS)


def names_of(rule, general, dtype, kind):
    """What the text of a kernel calls: name -> device function, type or module."""
    names = {"address": intrinsics.address, "uint64": types.uint64, "real": REALS[dtype], "cuda": cuda}
    names["load"], names["store"] = intrinsics.vectors(width(dtype))
    names["rule"], names["pointer"] = lower(operations_of(rule, general)), intrinsics.pointer_to(REALS[dtype])
    if kind.formats:
        names |= stored_kernel.functions(rules.find(rule), kind.formats)
    return names


def text_of(kind):
    """The module that has the text of a kernel of this Kind."""
    return stored_kernel if kind.formats else kernel


@own_rules.remembered
def operations_of(rule, general):
    """The Trace of a rule; where it cannot be made, the error names the rule."""
    try:
        return trace(rules.find(rule), general)
    except (AttributeError, TypeError) as error:
        raise TypeError(f"the rule of {rule} cannot run on CUDA: {error}") from None


def signature(rule, dtype, kind):
    """The types of a kernel's arguments."""
    real = REALS[dtype]
    known = {"real": real, **{str(one): one for one in (types.uint8, types.uint16, types.int32, types.uint32, types.uint64)}}
    known |= {f"{name}*": types.CPointer(one) for name, one in known.items()}
    return types.void(*[known[name] for name in text_of(kind).arguments(rules.find(rule), kind).values()])


def named_ptx(function, signature, name, cc, **options):
    """The PTX of a function as a kernel, with a plain name in place of Numba's mangled one."""
    ptx, _ = cuda.compile(function, signature, cc=cc, device=False, abi="numba", output="ptx", **options)
    return ptx.replace(re.search(r"\.entry\s+([\w$]+)", ptx).group(1), name)


def link(ptx, cc):
    """The cubin of a PTX text."""
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")
    return bytes(Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin").code)


def cache_path(rule, general, dtype, kind, cc):
    """The path of a kernel in the cache, without suffix; its name holds a hash of all that decides the code.  OSError where
    our sources cannot be read."""
    texts = [text(operations_of(rule, general)), text_of(kind).kernel_text(rules.find(rule), dtype, kind)]
    parts = [*texts, str(signature(rule, dtype, kind)), str(cc), *versions()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return files.cache_folder() / f"{kernel_name(rule, general, dtype, kind)}_sm{cc[0]}{cc[1]}_{key}"


@cache
def versions():
    """The versions of everything between the text of a kernel and its machine code, and the files that compile it."""
    packages = [f"{name} {metadata.version(name)}" for name in ("numba-cuda", "numba", "llvmlite", "cuda-core")]
    ours = map(inspect.getsource, sources())
    return [sys.version, *packages, f"nvvm {nvvm.version()}", f"nvjitlink {nvjitlink.version()}", *ours]


def sources():
    """The modules that compile what the text of a kernel calls."""
    return sys.modules[__name__], lowering, intrinsics, codecs, stored_kernel, formats
