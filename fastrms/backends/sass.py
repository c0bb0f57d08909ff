"""What NVIDIA's assembler makes of a PTX text: machine code, registers, spills.  For people and tests; nothing runs this."""

import collections
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple


class Assembled(NamedTuple):
    """registers and spilled bytes per thread; the listing (SASS); how often each operation stands in it."""

    registers: int
    spills: int
    listing: str
    operations: collections.Counter


def tool(name):
    """The path of ptxas or nvdisasm: that of the NVIDIA wheels, which matches the compiler, else the system's."""
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    found = next((str(path) for path in sorted(wheels.glob(f"*/bin/{name}"))), None) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found: pip install 'fastrms[cuda-test]'")
    return found


def assemble(ptx, cc):
    with tempfile.TemporaryDirectory(prefix="fastrms-") as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        info = _run(tool("ptxas"), "-v", "-arch", f"sm_{cc[0]}{cc[1]}", str(source), "-o", str(cubin)).stderr
        listing = _run(tool("nvdisasm"), "-c", str(cubin)).stdout
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", info)))
    return Assembled(
        int(re.search(r"Used (\d+) registers", info).group(1)), spills, listing, collections.Counter(operations)
    )


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done
