"""What ptxas makes of the kernels: no spills, 128-bit memory operations, no double precision in float32 kernels, fused
multiply-adds only inside NVIDIA's division and root, and as few instructions as CUDA C++ written by hand."""

import re
import shutil
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("nvidia.cu13", reason="needs the extra cuda-test")

import cases
import stored_cases
from conftest import DTYPES, in_background

from fastrms import rules
from fastrms.backends.cuda import __main__ as shown
from fastrms.backends.cuda import norm_kernels
from fastrms.backends.cuda.kernel import Kind

REGISTERS = {False: 48, True: 128}  # at most, of a kernel for formats, without and with q8, of which a thread has 8 elements
FUSED = {4: {"FFMA": 50}, 8: {"FFMA": 3, "DFMA": 53}}  # in the expansions of the root and the division of every lane


def count(operations, prefix):
    return sum(number for name, number in operations.items() if name.startswith(prefix))


@pytest.mark.parametrize("rule, general, dtype, dialect", cases.every(*cases.DIALECTS))
def test_machine_code(rule, general, dtype, dialect):
    """For one architecture of each dialect; a rule's four kernels have all of them."""
    cc = dialect[(list(rules.RULES).index(rule) + general + (dtype.itemsize == 8)) % 2]
    made = shown.assemble(cases.text(rule, general, dtype, Kind(), cc), cc)
    updated = len(cases.buffers_of(rule, dtype, 1, True)) - 1
    assert made.spills == 0 and made.registers <= 56
    assert (made.operations["LDG.E.128"], made.operations["STG.E.128"]) == (updated + 1, updated)
    assert count(made.operations, ("LDL", "STL")) == 0
    fused = {name: count(made.operations, name) for name in ("FFMA", "DFMA")}
    assert fused == {"FFMA": 0, "DFMA": 0, **(FUSED[dtype.itemsize] if rule != "rprop" else {})}
    if dtype.itemsize == 4:
        assert count(made.operations, ("DADD", "DMUL", "DFMA", "DSETP", "F2F", "MUFU.RSQ64", "MUFU.RCP64")) == 0


@pytest.mark.parametrize("rule, made", stored_cases.ALL, ids=stored_cases.named)
def test_machine_code_of_formats(rule, made):
    """Of each array a vector of four elements in one access, and single elements; with q8 eight single ones, and the base of
    the block.  No call but of division and root, and no double precision."""
    number = stored_cases.ALL.index((rule, made))
    cc, kind = cases.ARCHITECTURES[number % 4], stored_cases.kind_of(made)
    found = shown.assemble(cases.text(rule, bool(number % 2), stored_cases.F32, kind, cc), cc)
    assert found.spills == 0 and found.registers <= REGISTERS[made.in_blocks]
    assert count(found.operations, ("LDL", "STL", "LDS", "STS")) == 0
    assert count(found.operations, ("DADD", "DMUL", "DFMA", "DSETP", "F2F", "MUFU.RSQ64", "MUFU.RCP64")) == 0
    for what, names in (("LDG", [*made.written, made.grad]), ("STG", [*made.written, *made.copies])):
        wide = [dtype.itemsize for name in names for dtype in stored_cases.dtypes_of(name)]
        bases = [4 for name in names if stored_cases.FORMATS[name].in_blocks]
        wanted = 8 * wide + bases if made.in_blocks else wide + [4 * size for size in wide]
        assert accesses(found.operations, what) == sorted(wanted)


@pytest.mark.parametrize("name", norm_kernels.ARGUMENTS)
def test_machine_code_of_what_looks_at_gradients(name):
    cc = cases.ARCHITECTURES[len(name) % 4]
    made = shown.assemble(cases.compiler.norm_ptx(name, cc), cc)
    assert made.spills == 0 and made.registers <= 64 and count(made.operations, ("LDL", "STL", "LDS", "STS")) == 0
    assert count(made.operations, "LDG") and count(made.operations, "STG") and not count(made.operations, ("LD.", "ST."))


def accesses(operations, what):
    """The bytes of each access of global memory, sorted."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return sorted(sizes.get(name.split(".")[-1], 4) for name, number in operations.items() if name.startswith(what)
                  for _ in range(number))  # fmt: skip


REALS = {"float": DTYPES[0], "double": DTYPES[1]}
by_hand = {}  # the folder of what nvcc makes of handwritten.cu -> what conftest.in_background() gave


def begin():
    """Let nvcc compile beside the tests that come before; conftest.py calls this."""
    if shutil.which("nvcc"):
        folder, source = tempfile.TemporaryDirectory(prefix="fastrms-hand-"), Path(__file__).with_name("handwritten.cu")
        lines = [f"nvcc -ptx -DREAL={real} -arch=sm_{a}{b} '{source}' -o {folder.name}/{real}{a}{b}.ptx"
                 for real in REALS for a, b in cases.ARCHITECTURES]  # fmt: skip
        by_hand[folder] = in_background(["sh", "-e", "-c", "\n".join(lines)], folder.name)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
@pytest.mark.parametrize("real", REALS)
def test_instructions_and_registers_as_by_hand(real, cc):
    ((folder, ended),), dtype = by_hand.items(), REALS[real]
    assert ended()[0] == 0, ended()[2]
    text = Path(folder.name, f"{real}{cc[0]}{cc[1]}.ptx").read_text()
    head, *entries = re.split(r"(?=\.visible \.entry)", text)
    for rule in ("rmsprop", "adam"):
        (entry,) = [entry for entry in entries if entry.startswith(f".visible .entry {rule}_kernel")]
        hand = shown.assemble(head + entry, cc)
        ours = shown.assemble(cases.text(rule, False, dtype, Kind(), cc), cc)
        figures = [(made.registers, sum(made.operations.values())) for made in (ours, hand)]
        print(
            f"| {rule} {dtype} sm_{cc[0]}{cc[1]} | {figures[0][0]} / {figures[0][1]} | {figures[1][0]} / {figures[1][1]} |"
        )
        assert all(mine <= 1.05 * theirs for mine, theirs in zip(*figures, strict=True))


def test_anyone_can_look_at_a_kernel(capsys):
    shown.main(["--cc", "9.0", "--rule", "adam", "--sass"])
    printed = capsys.readouterr().out
    assert "LDG.E.128" in printed and "fastrms_adam_neutral_float32, sm_90: 3" in printed and " 0 bytes spilled" in printed
    with pytest.raises(SystemExit):
        shown.main(["--cc", "nine"])
    assert "--cc nine is not a compute capability" in capsys.readouterr().err
