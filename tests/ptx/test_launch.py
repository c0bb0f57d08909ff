"""Runs launch_cases.py, the backend on a double of the CUDA driver, in its own process, and reports case by case."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")

FILE = Path(__file__).with_name("launch_cases.py")
CASES = re.findall(r"^def (test_\w+)", FILE.read_text(), re.M)


@cache
def report():
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(FILE)]
    return subprocess.run(command, capture_output=True, text=True, cwd=FILE.parents[2]).stdout


@pytest.mark.parametrize("case", CASES)
def test_on_the_driver_double(case):
    outcomes = re.findall(rf"^(\w+) \S+::{case}(?:\[|\s|$)", report(), re.M)
    assert outcomes and set(outcomes) == {"PASSED"}, report()[-6000:]
