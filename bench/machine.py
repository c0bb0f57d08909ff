"""What the numbers were measured on and with: for the output, the JSON file, the picture and docs/performance.md."""

import os
import platform
from pathlib import Path

import numpy as np

import fastrms


def describe():
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastrms": fastrms.__version__,
        "isa": fastrms.isa() or "none (no C extension)",
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
        f"instruction set {machine['isa']}, {threads(machine)}{others}"
    )


def threads(machine):
    """Of fastrms, the ceilings and the peers; NumPy's arithmetic has always one."""
    return "one thread" if machine["threads"] == 1 else f"up to {machine['threads']} threads (NumPy: one)"


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def caches():
    """Bytes of each data cache that the first core sees: {"L1": ..., "L2": ...}, empty where the system hides them."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() in ("Data", "Unified"):
            level = (index / "level").read_text().strip()
            found[f"L{level}"] = int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return found


def kibibytes(size):
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
