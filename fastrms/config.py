"""What this installation consists of and uses, for bug reports and for tests that must know what they test."""

import platform
import sys
from pathlib import Path

import numpy as np

from . import backends, threads


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


def show_config():
    """Print the versions, backends, instruction sets and threads of this installation.  What cannot be found out is shown
    as unknown, with the reason."""
    from . import __version__

    facts = {
        "fastrms": lambda: __version__,
        "python": platform.python_version,
        "numpy": lambda: np.__version__,
        "machine": lambda: f"{platform.system()} {platform.machine()}",
        "backends": lambda: ", ".join(backends.available_backends()),
        "auto": lambda: backends.name_of(backends.choose("auto")),
        "isa": isa,
        "isas": lambda: ", ".join(backends.load("c").isas()),
        "compiler": lambda: backends.load("c").compiler(),
        "threads": threads.get_num_threads,
        **({"ranks": threads.said_of_ranks} if threads.said_of_ranks() else {}),
    }
    for name, find in facts.items():
        try:
            value = find()
        except Exception as error:  # a bug report needs the other lines all the more
            value = f"unknown ({error!r})"
        sys.stdout.write(f"{name:10} {value}\n")
