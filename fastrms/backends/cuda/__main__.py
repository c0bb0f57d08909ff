"""Print what a kernel is made of: its Python, PTX and SASS, registers and spills.  Needs no GPU."""

import argparse
import collections
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ... import rules
from .. import find_spec, trace
from .kernel import Kind, kernel_name, kernel_text
from .toolchain import NO_PACKAGE, compiler


class Assembled(NamedTuple):
    """Registers and spilled bytes per thread, the listing (SASS), and how often each operation stands in it."""

    registers: int
    spills: int
    listing: str
    operations: collections.Counter


def tool(name):
    """The path of ptxas or nvdisasm: that of the NVIDIA wheels, which matches the compiler, else the system's."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    found = next((str(path) for path in sorted(wheels.glob(f"*/bin/{name}"))), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    return found


def assemble(ptx, cc):
    """The Assembled of a PTX text, by NVIDIA's assembler."""
    with tempfile.TemporaryDirectory(prefix="fastrms-") as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        info = _run(tool("ptxas"), "-v", "-arch", f"sm_{cc[0]}{cc[1]}", str(source), "-o", str(cubin)).stderr
        listing = _run(tool("nvdisasm"), "-c", str(cubin)).stdout
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", info)))
    registers = int(re.search(r"Used (\d+) registers", info).group(1))
    return Assembled(registers, spills, listing, collections.Counter(operations))


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done


def main(arguments=None):
    chosen = parsed(arguments)
    cc, dtype, kind = (
        tuple(map(int, chosen.cc.split("."))),
        np.dtype(chosen.dtype),
        Kind(chosen.many, chosen.capturable, chosen.zero_grad),
    )
    name = kernel_name(chosen.rule, chosen.general, dtype, kind)
    ptx = compiler().compile_ptx(chosen.rule, chosen.general, dtype, kind, cc)
    made = assemble(ptx, cc)
    texts = {"source": source(rules.RULES[chosen.rule], chosen.general, dtype, kind), "ptx": ptx, "sass": made.listing}
    for part in [name for name in texts if getattr(chosen, name)] or texts:
        sys.stdout.write(f"{texts[part]}\n")
    sys.stdout.write(f"{name}, sm_{cc[0]}{cc[1]}: {made.registers} registers, {made.spills} bytes spilled, "
                     f"{sum(made.operations.values())} instructions, {len(ptx)} bytes of PTX\n")  # fmt: skip


def source(rule, general, dtype, kind):
    """A rule as a comment, its operations, and the kernel that calls them."""
    comment = "".join(f"# {line}\n" for line in inspect.getsource(rule).splitlines())
    return "\n".join([comment + trace.text(trace.trace(rule, general)), kernel_text(rule, dtype, kind)])


def parsed(arguments):
    parser = argparse.ArgumentParser(prog="python -m fastrms.backends.cuda", description=__doc__)
    parser.add_argument("--cc", default="9.0", help="compute capability, 8.0 and above (default 9.0)")
    parser.add_argument("--rule", default="rmsprop", choices=rules.RULES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    for name in ("general", "many", "capturable", "zero_grad"):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    for name in ("source", "ptx", "sass"):
        parser.add_argument(f"--{name}", action="store_true", help=f"print only the {name} and the figures")
    chosen = parser.parse_args(arguments)
    if not re.fullmatch(r"\d{1,2}\.\d", chosen.cc):
        parser.error(f"--cc {chosen.cc} is not a compute capability such as 9.0")
    if not find_spec("numba_cuda"):
        parser.error(NO_PACKAGE)
    return chosen


if __name__ == "__main__":
    main()
