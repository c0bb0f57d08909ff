"""Runs launch_cases.py and torch_cases.py, the backend on a double of the CUDA driver, each in a process of its own, and
reports case by case."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")

FILES = [Path(__file__).with_name(name) for name in ("launch_cases.py", "torch_cases.py")]
CASES = [(file, case) for file in FILES for case in re.findall(r"^def (test_\w+)", file.read_text(), re.M)]


@cache
def report(file):
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parents[2]).stdout


@pytest.mark.parametrize("file, case", CASES, ids=lambda x: getattr(x, "stem", x))
def test_on_the_driver_double(file, case):
    if file.stem.startswith("torch"):
        pytest.importorskip("torch")
    outcomes = re.findall(rf"^(\w+) \S+::{case}(?:\[|\s|$)", report(file), re.M)
    assert outcomes and set(outcomes) == {"PASSED"}, report(file)[-6000:]
