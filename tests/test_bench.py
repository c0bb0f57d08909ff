"""The benchmark as a user runs it, small: it checks its contenders, prints tables, writes its files, and can say no."""

import json
import re

import numpy as np
import pytest
from conftest import BACKENDS

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bench import __main__ as command
from bench import check, contenders


def test_a_small_run_writes_table_picture_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    command.main(["--quick", "--sizes", "64,1003", "--rules", "rmsprop,rprop", "--json", "out.json", "--readme"])
    out = capsys.readouterr().out
    for words in (
        "naive NumPy",
        "in-place NumPy",
        "ns per element",
        "GB/s",
        "times naive",
        "placement:",
        "empty Python call",
    ):
        assert words in out
    assert (tmp_path / "fastrms-bench.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "out.json").read_text())
    timed = {(row["rule"], row["size"], row["contender"]) for row in content["results"]}
    names = ["naive NumPy", "in-place NumPy", *[f"fastrms {b}" for b in BACKENDS], *(["ceiling"] if "c" in BACKENDS else [])]
    assert timed == {(rule, size, name) for rule in ("rmsprop", "rprop") for size in (64, 1003) for name in names}
    assert all(row["minimum"] > 0 and row["median"] >= row["minimum"] for row in content["results"])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before") and readme.endswith("after\n") and "old" not in readme
    assert re.search(r"\| rmsprop \| naive NumPy \|", readme)


@pytest.mark.parametrize("rule", contenders.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_contender_is_checked(rule, dtype):
    """One wrong number in any contender stops the benchmark and is named."""
    for victim in range(len(contenders.Problem(rule, 64, dtype).contenders)):
        problem = contenders.Problem(rule, 1003, dtype)
        check.check(problem)
        problem = contenders.Problem(rule, 1003, dtype)
        wrong = problem.contenders[victim]
        wrong.buffers[0][-1] += 0.01
        with pytest.raises(check.WrongContender, match=re.escape(wrong.name)):
            check.check(problem)


def test_bytes_come_from_the_state_list():
    assert contenders.bytes_per_element("rmsprop", "float32") == 20
    assert contenders.bytes_per_element("adam", np.float64) == 56


@pytest.mark.parametrize("arguments", [["--sizes", "0"], ["--sizes", "big"], ["--rules", "sgd"], ["--dtype", "int8"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[1] in capsys.readouterr().err
