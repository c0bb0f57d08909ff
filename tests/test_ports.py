"""Other CPUs and systems: the C sources, built for them and run by an emulator, have the bits of this machine."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = " ".join(line.partition("#")[0] for line in (ROOT / "csrc/flags").read_text().splitlines()).split()
SOURCES = [*map(str, sorted((ROOT / "csrc").glob("*.c")))]
ZIG = [sys.executable, "-m", "ziglang", "cc", "-target"]
GCC = shutil.which("gcc")
NEON_TOOLS = [f"aarch64-linux-gnu-{name}" for name in ("gcc", "objdump")]


def needs(*programs, module=None):
    missing = [name for name in programs if not shutil.which(name)]
    missing += [module] if module and importlib.util.find_spec(module) is None else []
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def built(compiler, program, *options):
    """tests/c/bits.c with the library, by a compiler."""
    command = [*compiler, *FLAGS, f"-I{ROOT / 'csrc'}", str(ROOT / "tests/c/bits.c"), *SOURCES, *options, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(program)


def hashes(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.replace("\r", "").splitlines()
    *lines, last = lines
    assert last == "done" and len(lines) > 50 and all(re.search(r" [0-9a-f]{16}$", line) for line in lines)
    return lines


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The hashes of this machine, by the compiler that is called gcc."""
    return hashes(built([GCC], tmp_path_factory.mktemp("ports") / "here", "-lm", "-pthread"))


@needs("gcc", "qemu-aarch64", *NEON_TOOLS)
def test_aarch64_has_the_same_bits(here, tmp_path):
    """Debian's packages gcc-aarch64-linux-gnu and qemu-user; its vectors have roots and divisions, and nothing is fused."""
    program = built(NEON_TOOLS[:1], tmp_path / "neon", "-static", "-lm", "-pthread")
    assert hashes("qemu-aarch64", program) == here
    text = subprocess.run([NEON_TOOLS[1], "-d", program], capture_output=True, text=True, check=True).stdout
    for operation in ("fsqrt", "fdiv"):
        for lanes in ("4s", "2d"):
            assert re.search(rf"\t{operation}\tv\d+\.{lanes}", text), (operation, lanes)
    assert not re.search(r"\tf(n?m(add|sub)|ml[as])\t", text)


@needs("gcc", "wine", module="ziglang")
def test_windows_has_the_same_bits(here, tmp_path):
    """The extra `wheels`, and wine: the pool, too, as bits.c makes steps on several threads."""
    program = built([*ZIG, "x86_64-windows-gnu"], tmp_path / "bits.exe")
    assert hashes("wine", program) == here


@needs("gcc", module="ziglang")
def test_another_compiler_has_the_same_bits(here, tmp_path):
    """clang, as zig has it, for the C library of this machine."""
    program = built([*ZIG, "x86_64-linux-musl"], tmp_path / "clang", "-lm", "-pthread")
    assert hashes(program) == here


@needs("gcc", module="ziglang")
@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos", "aarch64-windows-gnu"])
def test_other_systems_are_compiled(target, tmp_path):
    """Compiled, and not run: there is no such machine."""
    for source in SOURCES:
        command = [*ZIG, target, *FLAGS, "-Werror", "-c", source, "-o", str(tmp_path / "object.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
