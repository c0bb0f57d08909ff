"""What the numbers were measured on and with: for the output, the JSON file, the picture and docs/performance.md."""

import os
import platform
from pathlib import Path

import numpy as np

import fastrms
from fastrms.config import cpu_model


def describe():
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastrms": fastrms.__version__,
        "isa": fastrms.isa() or "none (no C extension)",
        "isas": fastrms.backends.load("c").isas(),
        "compiler": fastrms.backends.load("c").compiler(),
        "threads": fastrms.get_num_threads(),
    }


def in_words(machine):
    sizes = ", ".join(f"{name} {kibibytes(size)}" for name, size in machine["caches"].items()) or "caches unknown"
    return f"{machine['cpu']}, {machine['cores']} cores, {sizes}"


def software(machine):
    others = "".join(f", {name} {version}" for name, version in machine.get("peers", {}).items())
    return (
        f"Python {machine['python']}, NumPy {machine['numpy']}, fastrms {machine['fastrms']} ({machine['compiler']}), "
        f"{instruction_sets(machine)}, {threads(machine)}{others}"
    )


def instruction_sets(machine):
    """The one that the kernels run, and all of fastrms' that this CPU has, best first."""
    return f"instruction set {machine['isa']} (of {', '.join(machine['isas']) or 'none'})"


def threads(machine):
    """The threads of fastrms, the ceilings and the peers in words; NumPy's arithmetic always has one."""
    return "one thread" if machine["threads"] == 1 else f"up to {machine['threads']} threads (NumPy: one)"


def cores():
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this system, or forbidden in its sandbox
        return os.cpu_count()


def text_of(path):
    """The text of a file of the system; empty where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def caches():
    """The bytes of each data cache of the first core, {"L1": ..., "L2": ...}; empty where the system hides them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = text_of(index / "size").removesuffix("K")
        if text_of(index / "type") in ("Data", "Unified") and size.isdecimal():
            found[f"L{text_of(index / 'level')}"] = int(size) * 1024
    return found


def kibibytes(size):
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
