"""Other CPUs, systems and compilers compute the bits of this machine: tests/c/bits.c, cross-compiled, and run emulated.

aarch64: Debian's gcc-aarch64-linux-gnu or zig (the wheel ziglang), and qemu-user.  Windows: zig, and wine64.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_build
from test_build import COMPILER, ROOT, check_kernels, flags, instructions

ZIG = [sys.executable, "-m", "ziglang", "cc"]
QEMU, GCC = shutil.which("qemu-aarch64"), "aarch64-linux-gnu-gcc"
WINE = shutil.which("wine64") or next((at for at in ["/usr/lib/wine/wine64"] if os.access(at, os.X_OK)), None)
OBJDUMP = shutil.which("aarch64-linux-gnu-objdump") or shutil.which("llvm-objdump")
needs_zig = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no zig here: pip install ziglang")
needs_gcc = pytest.mark.skipif(shutil.which(GCC) is None, reason=f"no {GCC} here")
PORTS = [
    pytest.param([GCC, "-static", "-pthread"], QEMU, id="gcc-aarch64", marks=needs_gcc),
    pytest.param([*ZIG, "-target", "aarch64-linux-musl", "-pthread"], QEMU, id="zig-aarch64", marks=needs_zig),
    pytest.param([*ZIG, "-target", "x86_64-windows-gnu"], WINE, id="zig-windows", marks=needs_zig),
]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


def built(compiler, name, folder):
    """The program tests/c/<name>.c with csrc/, by a compiler with its options."""
    program = Path(folder, f"{name}.exe")
    sources = [ROOT / "tests" / "c" / f"{name}.c", *sorted((ROOT / "csrc").glob("*.c"))]
    options = [flag for flag in flags() if flag != "-pthread"]
    command = [*compiler, *options, f"-I{ROOT / 'csrc'}", *sources, "-lm", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def lines_of(command, tmp_path):
    environment = {**os.environ, "WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The lines of this machine, all of whose tiers agree."""
    folder = tmp_path_factory.mktemp("here")
    return lines_of([built([COMPILER, "-pthread"], "bits", folder)], folder)


def test_every_rule_and_format_is_there(here):
    words = [line.split()[0] for line in here]
    for rule in test_build.rules.RULES:
        assert words.count(rule) == 8, rule  # kernels and steps of 1 to 7 threads, two forms, two dtypes
    assert words.count("format") == 16 and words[-1] == "done"
    assert len({line.split()[-1] for line in here if " steps " not in line}) > 40  # the hashes say something


@pytest.mark.parametrize(("compiler", "emulator"), PORTS)
def test_a_port_has_the_bits_of_this_machine(here, compiler, emulator, tmp_path):
    if emulator is None:
        pytest.skip("its emulator is not here: qemu-user or wine64")
    assert lines_of([emulator, built(compiler, "bits", tmp_path)], tmp_path) == here


@pytest.mark.parametrize(("compiler", "emulator"), PORTS[:2])
def test_kernels_of_aarch64_are_packed_and_exact(compiler, emulator, tmp_path, monkeypatch):
    """As test_build.py says it of the machine that it runs on."""
    if OBJDUMP is None:
        pytest.skip("no objdump for aarch64 here")
    monkeypatch.setattr(test_build, "MACHINE", "aarch64")
    monkeypatch.setattr(test_build, "X86", False)
    check_kernels(instructions(built(compiler, "bits", tmp_path), OBJDUMP))
