"""What this installation consists of and uses, for bug reports and for tests that must know what they test."""

import platform
import sys
from collections import Counter
from functools import partial
from importlib import metadata
from itertools import combinations, product
from pathlib import Path

import numpy as np

from . import backends, rules, threads
from .memory import host, placement


def isa():
    """The instruction set that FASTRMS_ISA forces, or else the most able that this CPU has and a C kernel may use.

    Unforced, each kernel is taken from the set that is fastest at it here; that is measured when it is first used.

    Returns
    -------
    str or None
        "avx512", "avx512fma" (square roots by fused multiply-adds), "avx2" or "baseline"; None without the C extension.
    """
    return backends.load("c").isa()


def get_include():
    """The directory of fastrms.h, for C code that calls opt.c_step or links libfastrms.a (`make -C csrc` in the sources).

    Returns
    -------
    str
    """
    return str(Path(__file__).parent / "include")


def available():
    """The backends that work here, and why the others do not."""
    reasons = {name: backends.load(name).available() for name in backends.NAMES}
    return "; ".join([", ".join(backends.available_backends()), *(f"no {n}: {why}" for n, why in reasons.items() if why)])


def version(package):
    """The version of a package, which is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model():
    """The name of the processor, else of its architecture."""
    named = (line.partition(":")[2].strip() for line in threads.lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.machine())


def kernels():
    """Every kernel that each backend has: (rule, whether it is the general form, dtype)."""
    return product(rules.RULES, (False, True), map(np.dtype, ("float32", "float64")))


def in_use():
    """From which instruction sets the C kernels are taken."""
    c = backends.load("c")
    counts = Counter(c.isa_of(rule, dtype, general) for rule, general, dtype in kernels()) if c.lib else {}
    return ", ".join(f"{count} of {isa}" for isa, count in counts.items()) or None


def placed():
    """How far apart buffers of ours lie that a step reads side by side."""
    made = []
    for _ in range(5):
        made.append(placement.place(placement.LARGE, np.dtype(np.float32), [*map(host.address, made)]))
    least = min(placement.distance(*map(host.address, pair)) for pair in combinations(made, 2))
    return f"{len(made)} buffers of 1 MiB begin {least} bytes apart modulo 4 KiB ({placement.NEAR} are enough)"


def show_config():
    """Print the versions, backends, instruction sets and threads of this installation.  What cannot be found out is shown
    as unknown, with the reason.  ``python -m fastrms`` prints it, too, and checks the kernels."""
    from . import __version__

    facts = {
        "fastrms": lambda: __version__,
        "python": platform.python_version,
        "numpy": lambda: np.__version__,
        **{name: partial(version, name) for name in ("cffi", "numba", "torch")},
        "machine": lambda: f"{platform.system()} {platform.machine()}, {cpu_model()}",
        "backends": available,
        "auto": lambda: backends.name_of(backends.choose("auto")),
        "isa": isa,
        "isas": lambda: ", ".join(backends.load("c").isas()),
        "kernels": in_use,
        "compiler": lambda: backends.load("c").compiler(),
        "flags": lambda: backends.load("c").built("flags"),
        "memory": placed,
        "limits": threads.said_of_limits,
        "threads": threads.get_num_threads,
        **({"ranks": threads.said_of_ranks} if threads.said_of_ranks() else {}),
    }
    for name, find in facts.items():
        try:
            value = find()
        except Exception as error:  # a bug report needs the other lines all the more
            value = f"unknown ({error!r})"
        sys.stdout.write(f"{name:10} {value}\n")
