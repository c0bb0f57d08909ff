"""Runs launch_cases.py and torch_cases.py, the backend on a double of the CUDA driver, each in a process of its own, and
reports case by case."""

import re
import sys
from pathlib import Path

import pytest
from conftest import in_background

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")

FILES = [Path(__file__).with_name(name) for name in ("launch_cases.py", "torch_cases.py")]
CASES = [(file, case) for file in FILES for case in re.findall(r"^def (test_\w+)", file.read_text(), re.M)]


reports = {}  # file -> what conftest.in_background() gave


def begin():
    """Run the files beside the tests that come before; conftest.py calls this."""
    for file in FILES:
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(file)]
        reports[file] = in_background(command, file.parents[2])


@pytest.mark.parametrize("file, case", CASES, ids=lambda x: getattr(x, "stem", x))
def test_on_the_driver_double(file, case):
    if file.stem.startswith("torch"):
        pytest.importorskip("torch")
    _, report, _ = reports[file]()
    outcomes = re.findall(rf"^(\w+) \S+::{case}(?:\[|\s|$)", report, re.M)
    assert outcomes and set(outcomes) == {"PASSED"}, report[-6000:]
