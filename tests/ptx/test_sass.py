"""What ptxas makes of the kernels: no spills, 128-bit memory operations, no double precision in float32 kernels, fused
multiply-adds only inside NVIDIA's division and root, and as few instructions as CUDA C++ written by hand."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("nvidia.cu13", reason="needs the extra cuda-test")

import cases
from conftest import DTYPES

from fastrms.backends.cuda import __main__ as shown
from fastrms.backends.cuda.kernel import Kind

FUSED = {4: {"FFMA": 50}, 8: {"FFMA": 3, "DFMA": 53}}  # in the expansions of the root and the division of every lane


def count(operations, prefix):
    return sum(number for name, number in operations.items() if name.startswith(prefix))


@pytest.mark.parametrize("rule, general, dtype, cc", cases.ALL)
def test_machine_code(rule, general, dtype, cc):
    made = shown.assemble(cases.text(rule, general, dtype, Kind(), cc), cc)
    updated = len(cases.buffers_of(rule, dtype, 1, True)) - 1
    assert made.spills == 0 and made.registers <= 56
    assert (made.operations["LDG.E.128"], made.operations["STG.E.128"]) == (updated + 1, updated)
    assert count(made.operations, ("LDL", "STL")) == 0
    fused = {name: count(made.operations, name) for name in ("FFMA", "DFMA")}
    assert fused == {"FFMA": 0, "DFMA": 0, **(FUSED[dtype.itemsize] if rule != "rprop" else {})}
    if dtype.itemsize == 4:
        assert count(made.operations, ("DADD", "DMUL", "DFMA", "DSETP", "F2F", "MUFU.RSQ64", "MUFU.RCP64")) == 0


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
@pytest.mark.parametrize("dtype, real", [(DTYPES[0], "float"), (DTYPES[1], "double")])
def test_instructions_and_registers_as_by_hand(dtype, real, cc, tmp_path):
    source = Path(__file__).with_name("handwritten.cu")
    command = ["nvcc", "-ptx", f"-DREAL={real}", f"-arch=sm_{cc[0]}{cc[1]}", source, "-o", tmp_path / "hand.ptx"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    head, *entries = re.split(r"(?=\.visible \.entry)", (tmp_path / "hand.ptx").read_text())
    for rule in ("rmsprop", "adam"):
        (entry,) = [text for text in entries if text.startswith(f".visible .entry {rule}_kernel")]
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
