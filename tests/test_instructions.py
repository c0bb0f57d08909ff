"""The number of instructions of every kernel, which no noise can hide: at most 1 % off the one recorded for the compiler
(a whole step: 3 %).

Counted by callgrind, which knows no AVX-512: there the instructions of the loop over tiles are read off the binary.
`python tests/test_instructions.py --record` writes the counts of this machine's compiler to tests/instructions.json; do so
after a change that is meant to alter them, and for a new compiler.
"""

import collections
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import c
from test_build import COMPILER, ROOT, addressed, flags, kernel_names, needs_c

RECORD = "python tests/test_instructions.py --record"
DATA = ROOT / "tests" / "instructions.json"
SLACK, STEP_SLACK = (
    0.01,
    0.03,
)  # a multiplication is 2 to 5 % of most kernels; a distribution's flags move a step
TILE, ITEMSIZE = 128, {"float": 4, "double": 8}  # bytes
SIZES = 4096, 8192  # their difference is free of prologues, and whole vectors
STEPS = 1000  # the first makes the coefficients; among so many it does not count
pytestmark = [
    needs_c,
    pytest.mark.skipif(COMPILER is None, reason="no C compiler here"),
    pytest.mark.skipif(shutil.which("valgrind") is None, reason=f"no valgrind here; with it, `{RECORD}` records the counts"),
]


def compiler():
    """Version and machine, such as gcc 12.2.0 x86_64; clang says its name itself."""
    command = [COMPILER, "-E", "-P", "-"]
    run = subprocess.run(command, input="__VERSION__", capture_output=True, text=True, check=True)
    version = run.stdout.strip().strip('"')
    return f"{version if 'lang' in version else f'gcc {version}'} {os.uname().machine}"


def build(csrc, target):
    sources = [*sorted(glob.glob(f"{csrc}/*.c")), str(ROOT / "tests" / "c" / "instructions.c")]
    command = [COMPILER, *flags(), f"-I{csrc}", *sources, "-lm", "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def costs(program, isa, size):
    """Instructions of every function with those it calls: callgrind lists them line by line under its name."""
    out = f"{program}.callgrind"
    options = ["--tool=callgrind", "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}"]
    subprocess.run(["valgrind", *options, str(program), isa, str(size), str(STEPS)], check=True, capture_output=True)
    total, name = collections.Counter(), None
    for line in Path(out).read_text().splitlines():
        if line.startswith("fn="):
            name = line[3:]
        elif match := re.fullmatch(r"\d+ (\d+)", line):
            total[name] += int(match[1])
    return total


def loop_over_tiles(body):
    """How many instructions the loop with the prefetches has; what stands outside it is left out, as are rare branches."""
    loops = []
    for address, text in body:
        if (match := re.match(r"j\w+\s+([0-9a-f]+) ", text)) and int(match[1], 16) <= address:
            inside = [line for at, line in body if int(match[1], 16) <= at <= address]
            loops += [len(inside)] if any("prefetch" in line for line in inside) else []
    return min(loops)


def read_off(program, isa):
    """Instructions per element of every kernel of one instruction set."""
    counted, bodies = {}, addressed(program)
    for name, _, real, tier in kernel_names():
        if tier == isa:
            counted[name] = loop_over_tiles(bodies[name]) / (TILE // ITEMSIZE[real])
    return counted


def count(program):
    """Instructions per element of every kernel that ran, and per step of a bound tensor of 64 elements."""
    counted = {}
    for isa in c.isas():
        if isa.startswith("avx512"):
            counted |= read_off(program, isa)
            continue
        small, large = (costs(program, isa, size) for size in SIZES)
        for name in large:
            if re.fullmatch(rf"\w+_(float|double)_(neutral|general)_{isa}", name):
                counted[name] = round((large[name] - small[name]) / (SIZES[1] - SIZES[0]), 4)
        counted[f"fastrms_step_{isa}"] = large["fastrms_step"] / STEPS
    return counted


def complaint(name, now, before):
    if before is None:
        return f"{name}: {now:g} instructions, none recorded"
    advice = "slower" if now > before else "record the gain"
    return f"{name}: {now:g} instructions, {before:g} recorded, {now / before - 1:+.1%}: {advice}"


def complaints(counted, recorded):
    """One line per count that has no record, or is off it by more than the slack; a gain too: a loss could hide in it."""
    return [
        complaint(name, now, recorded.get(name))
        for name, now in counted.items()
        if name not in recorded or abs(now / recorded[name] - 1) > (STEP_SLACK if "step" in name else SLACK)
    ]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return count(build(ROOT / "csrc", tmp_path_factory.mktemp("instructions") / "program"))


def test_every_kernel_was_counted(counted):
    """All rules, both dtypes, both forms, every instruction set of this CPU; whole steps where callgrind runs."""
    kernels = {name for name, _, _, isa in kernel_names() if isa in c.isas()}
    steps = {f"fastrms_step_{isa}" for isa in c.isas() if not isa.startswith("avx512")}
    assert counted.keys() == kernels | steps
    assert min(counted.values()) > 0
    print(f"{len(kernels)} kernels counted, {len(steps)} whole steps")


def test_no_kernel_needs_more_instructions_than_recorded(counted):
    recorded = json.loads(DATA.read_text())
    if compiler() not in recorded:
        pytest.skip(f"nothing recorded for {compiler()}: `{RECORD}` does it; known are {', '.join(recorded)}")
    wrong = complaints(counted, recorded[compiler()])
    assert not wrong, "\n".join([f"{len(wrong)} of {len(counted)} counts", *wrong, f"if it is meant so: `{RECORD}`"])


def altered(csrc, file, old, new):
    text = (csrc / file).read_text()
    assert text.count(old) == 1
    (csrc / file).write_text(text.replace(old, new))


def test_the_guard_bites(counted, tmp_path):
    """A second root and division in one rule, and coefficients made anew at every step: these are named, no others."""
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    altered(csrc, "rules.h", "lr * g / (sqrt(w) + eps)", "lr * g / (sqrt(w) + eps) / (sqrt(w + lr) + eps)")
    altered(csrc, "plan.c", "!plan->unchanging || scale.grad_scale != 1", "1")
    wrong = complaints(count(build(csrc, tmp_path / "program")), counted)
    guilty = {name for name in counted if name.startswith(("adagrad_", "fastrms_step_"))}
    assert {line.split(":")[0] for line in wrong} == guilty and all(line.endswith("slower") for line in wrong), wrong


def test_a_missing_record_and_a_gain_are_reported():
    wrong = complaints({"new": 2, "same": 2.01, "faster": 1.9, "step": 2.05}, {"same": 2, "faster": 2, "step": 2})
    assert wrong == ["new: 2 instructions, none recorded", "faster: 1.9 instructions, 2 recorded, -5.0%: record the gain"]


def record():
    with tempfile.TemporaryDirectory() as directory:
        counted = count(build(ROOT / "csrc", Path(directory) / "program"))
    recorded = json.loads(DATA.read_text())
    counted = {**recorded.get(compiler(), {}), **counted}  # another CPU may have counted other instruction sets
    DATA.write_text(json.dumps({**recorded, compiler(): dict(sorted(counted.items()))}, indent=1) + "\n")
    print(f"{len(counted)} counts of {compiler()} written to {DATA}")


if __name__ == "__main__":
    sys.exit(record() if sys.argv[1:] == ["--record"] else f"usage: {RECORD}")
