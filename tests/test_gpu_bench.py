"""`python -m bench.gpu` from its first to its last line on the driver double, whose times are made up and marked so."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("matplotlib", reason="needs the extra bench")

ROOT = Path(__file__).parents[1]
DOUBLE = [sys.executable, str(ROOT / "tests/ptx/on_double.py")]


def run(folder, *options):
    command = [*DOUBLE, "bench.gpu", "--out", str(folder), "--python", shlex.join(DOUBLE), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = run(folder, "--sizes", "8,12")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, json.loads((folder / "fastrms-gpu.json").read_text()), done.stdout


def test_every_part_has_run(found):
    folder, content, _ = found
    parts = content["parts"]
    assert content["double"] and not [name for name, part in parts.items() if "found" not in part]
    assert {"tests", "rules", "many tensors", "views", "calls from Python", "variants"} <= parts.keys()
    assert parts["tests"]["found"]["failed"] == 0 and parts["tests"]["found"]["passed"] > 20
    assert not [row for row in parts["variants"]["found"] if "refused" in row]
    assert (folder / "fastrms-gpu.png").stat().st_size > 10_000


def test_made_up_times_are_marked(found):
    folder, _, printed = found
    page = (folder / "fastrms-gpu.md").read_text()
    assert "the times are made up" in page and page.strip() in printed and "| rmsprop |" in page


def test_a_part_that_fails_stops_no_other(tmp_path):
    done = run(tmp_path, "--sizes", "8,nine")
    assert done.returncode == 2 and "--sizes" in done.stderr
    done = run(tmp_path, "--sizes", "8", "--parts", "tests,views", "--python", "false")
    parts = json.loads((tmp_path / "fastrms-gpu.json").read_text())["parts"]
    assert "failed: tests" in done.stderr and "failed" in parts["tests"] and "found" in parts["views"]
    assert "It failed" in (tmp_path / "fastrms-gpu.md").read_text()
