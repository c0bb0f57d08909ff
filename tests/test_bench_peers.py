"""The rivals that the benchmark measures: each library takes part where it should, and computes what it should.

Marker `peers`.  A library that is not installed is skipped with the reason.  The first run compiles DeepSpeed's kernels.
"""

import subprocess
import sys

import numpy as np
import pytest

from bench import peers
from bench.check import WrongContender, check
from bench.problem import AS_ALLOCATED, PLACEMENTS, RULES, CannotDo, Problem

# The libraries' own warnings (deprecations, missing GPUs) are not ours to raise.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

SIZES = [64, 1003, 1 << 16, 1 << 20]
BOTH = {(rule, dtype) for rule in RULES for dtype in ("float32", "float64")}
TAKES_PART = {
    "torch for-loop": BOTH,
    "torch foreach": BOTH,
    "torch fused": {pair for pair in BOTH if pair[0] in ("adagrad", "adam")},
    "torch.compile": BOTH,
    "optax": {pair for pair in BOTH if pair[0] != "rprop"},
    "DeepSpeed": {("adagrad", "float32"), ("adam", "float32")},
    "prime-rl": {("adam", "float32")},
    "bitsandbytes 8-bit": {("rmsprop", "float32"), ("adagrad", "float32"), ("adam", "float32")},
    "Thinc": {("adam", "float32")},
}
CASES = [(name, *pair) for name, pairs in TAKES_PART.items() for pair in sorted(pairs)]
MISSING = [(name, *pair) for name, pairs in TAKES_PART.items() for pair in sorted(BOTH - pairs)]


def peer(name):
    found, reasons = peers.available([name])
    if name not in found:
        pytest.skip(f"{name}: {reasons[name]}")
    return found[name]


def recorded(problem):
    """The buffers that the problem hands out from now on."""
    handed, make = [], problem.new_buffers
    problem.new_buffers = lambda *args: handed.extend(made := make(*args)) or made
    return handed


def test_every_peer_is_tested():
    assert set(TAKES_PART) == set(peers.PEERS) == set(peers.LIBRARIES)
    assert set(peers.NOTES) < set(peers.PEERS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, rule, dtype", CASES)
def test_result(name, rule, dtype, size):
    problem = Problem(rule, size, dtype)
    check(problem, [peer(name)(problem)])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name, rule, dtype", [case for case in CASES if case[2] == "float32"])
def test_placement(name, rule, dtype, placement):
    """Parameter and states lie in the problem's buffers, but for those of XLA, and where PyTorch allocates."""
    problem = Problem(rule, 4096, dtype, placement)
    handed = recorded(problem)
    contender = peer(name)(problem)
    check(problem, [contender])
    inside = [any(np.shares_memory(array, buffer) for buffer in handed) for array in contender.read()]
    assert set(inside) == {name == "Thinc" or (name != "optax" and placement != AS_ALLOCATED)}


@pytest.mark.parametrize("name, rule, dtype", CASES)
def test_check_sees_a_step_too_many(name, rule, dtype):
    """However wide the tolerance of a contender is."""
    problem = Problem(rule, 1003, dtype)
    contender = peer(name)(problem)
    contender.step()
    with pytest.raises(WrongContender):
        check(problem, [contender])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", TAKES_PART)
def test_buffers_of_ones_own(name, placement):
    """Two contenders of one problem do not meet in memory, and the problem's own arrays stay as they are."""
    problem = Problem("adam", 1003, "float32", placement)
    grad, start = problem.grad.copy(), problem.start.copy()
    check(problem, [peer(name)(problem), peer(name)(problem)])
    np.testing.assert_array_equal(problem.grad, grad)
    np.testing.assert_array_equal(problem.start, start)


@pytest.mark.parametrize("name, rule, dtype", MISSING)
def test_cannot(name, rule, dtype):
    with pytest.raises(CannotDo, match=r"has no (RMSProp|AdaGrad|RProp|float64)$|optax#1725"):
        peer(name)(Problem(rule, 64, dtype))


def test_compiled_at_every_size():
    """Beyond its limit of recompilations torch.compile would run the uncompiled code without a word."""
    make = peer("torch.compile")
    from torch._dynamo.utils import counters

    counters.clear()
    for size in range(64, 76):
        make(Problem("rmsprop", size, "float32")).step()
    assert counters["stats"]["unique_graphs"] == 12


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "thinc", None)
    found, reasons = peers.available(["Thinc", "fastrms c"])
    assert (found, reasons) == ({}, {"Thinc": f"not installed: {peers.INSTALL}"})


def test_what_no_registry_has_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpu_adam", None)
    assert peers.available(["prime-rl"])[1] == {"prime-rl": "not installed: docs/performance.md says how it is found"}


def test_broken_library(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: 1 / 0)
    assert peers.available(["Thinc"]) == ({}, {"Thinc": "fails to import: division by zero"})


def test_versions(monkeypatch):
    def version(name):
        if name != "torch":
            raise peers.metadata.PackageNotFoundError
        return "2.13.0"

    monkeypatch.setattr(peers.metadata, "version", version)
    assert peers.versions() == {"torch": "2.13.0"}


def run(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True).stdout


def test_lazy():
    assert run(f"import sys, bench.peers; print({set(peers.DISTRIBUTIONS)} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_torch(threads):
    peer("torch for-loop")
    code = f"from bench import peers; peers.use_threads({threads}); print(peers.load('torch').get_num_threads())"
    assert run(code) == f"{threads}\n"


def test_threads_of_xla():
    """XLA starts one worker, and the process may use all its processors again."""
    peer("optax")
    code = """
import os, pathlib
from bench import peers
before = os.sched_getaffinity(0)
peers.use_threads(1)
peers.load("optax")
names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(sum("XLAEigen" in name for name in names), os.sched_getaffinity(0) == before)
"""
    assert run(code) == "1 True\n"
