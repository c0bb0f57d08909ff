"""`python -m bench.gpu` from its first to its last line on the driver double, whose times are made up and marked so."""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import in_background

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("matplotlib", reason="needs the extra bench")

from bench import gpu_report

ROOT = Path(__file__).parents[1]
DOUBLE = [sys.executable, str(ROOT / "tests/ptx/on_double.py")]


whole = {}  # the folder of a whole run -> what conftest.in_background() gave


def command(folder, *options):
    return [*DOUBLE, "bench.gpu", "--out", str(folder), "--python", shlex.join(DOUBLE), *options]


def run(folder, *options):
    return subprocess.run(command(folder, *options), capture_output=True, text=True, cwd=ROOT)


def begin():
    """Run all of it beside the tests that come before; conftest.py calls this."""
    folder = tempfile.TemporaryDirectory(prefix="fastrms-gpu-")
    whole[folder] = in_background(command(folder.name, "--sizes", "8,12", "--seconds", "3000"), ROOT)


@pytest.fixture(scope="module")
def found():
    ((folder, ended),) = whole.items()
    status, printed, said = ended()
    assert status == 0, printed[-3000:] + said[-3000:]
    return Path(folder.name), json.loads(Path(folder.name, "fastrms-gpu.json").read_text()), printed


def test_every_part_has_run(found):
    folder, content, _ = found
    parts = content["parts"]
    assert content["double"] and not [name for name, part in parts.items() if "found" not in part]
    assert {"tests", "rules", "formats", "many tensors", "views", "calls from Python", "variants"} <= parts.keys()
    assert parts["tests"]["found"]["failed"] == 0 and parts["tests"]["found"]["passed"] > 20
    assert not [row for row in parts["variants"]["found"] if "refused" in row]
    assert (folder / "fastrms-gpu.png").stat().st_size > 10_000


BYTES = {  # that a step moves per element: the gradient, twice the parameter and its lower bits, twice each state, the copy
    ("rmsprop", "float32"): 4 + 8 + 8,
    ("rmsprop", "bf16 states"): 2 + 8 + 4,
    ("rmsprop", "bf16 states, nearest"): 2 + 8 + 4,
    ("rmsprop", "q8 states"): 2 + 8 + 2 * (1 + 4 / 256),
    ("rmsprop", "split16 and bf16 states"): 2 + 4 + 4 + 4,
    ("rmsprop", "float32 with a bf16 copy"): 2 + 8 + 8 + 2,
    ("rmsprop", "FiveStreams"): 5 * 4,
    ("adam", "float32"): 4 + 8 + 16,
    ("adam", "bf16 states"): 2 + 8 + 8,
    ("adam", "bf16 states, nearest"): 2 + 8 + 8,
    ("adam", "q8 states"): 2 + 8 + 4 * (1 + 4 / 256),
    ("adam", "split16 and bf16 states"): 2 + 4 + 4 + 8,
    ("adam", "float32 with a bf16 copy"): 2 + 8 + 16 + 2,
    ("adam", "SevenStreams"): 7 * 4,
}


def test_storage_formats_are_timed_by_the_bytes_that_they_move(found):
    folder, content, _ = found
    rows = content["parts"]["formats"]["found"]
    assert len(rows) == 2 * len(BYTES) and {row["elements"] for row in rows} == {2**8, 2**12}
    for row in rows:
        moved = BYTES[row["rule"], row["what"]]
        assert row["bytes per element"] == moved and row["GB/s"] == pytest.approx(moved * row["elements"] / row["us"] / 1e3)
        (ceiling,) = (other["GB/s"] for other in rows if other["what"].endswith("Streams")
                      and (other["rule"], other["elements"]) == (row["rule"], row["elements"]))  # fmt: skip
        assert row["% of streams"] == pytest.approx(100 * row["GB/s"] / ceiling)
    page = (folder / "fastrms-gpu.md").read_text()
    assert "| adam: GB/s (% of streams), speed over float32 |" in page and "| q8 states | 14.1 |" in page
    drawn = [row["what"] for row in gpu_report.bars(content["parts"])]
    assert {f"{rule}: {what}" for rule, what in BYTES if not what.endswith("Streams")} <= {*drawn}


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


def test_optax_is_timed_where_it_is_installed(tmp_path):
    pytest.importorskip("optax")
    done = run(tmp_path, "--sizes", "8", "--no-tests", "--parts", "Optax")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "fastrms-gpu.json").read_text())["parts"]["Optax"]["found"]
    names = {f"{library} {rule}, host's clock" for library in ("fastrms", "Optax") for rule in ("Adam", "RMSProp")}
    assert {row["what"] for row in rows} == names and all(row["tensors"] == 100 and row["us"] > 0 for row in rows)
