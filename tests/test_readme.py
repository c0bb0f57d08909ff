"""The README: its example runs, its commands are those of CI, its tables say what the code says."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fastrms
from fastrms import dialects

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", README, re.S)[1].strip()


def code_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_first_example_runs_and_trains():
    names = {}
    exec(code_blocks()[0], names)
    assert len(code_blocks()[0].strip().splitlines()) <= 10
    assert 0 < names["w"][0] < 0.5 and names["opt"].steps == 100


def test_the_second_example_runs():
    w, b = np.ones(5, np.float32), np.ones(3, np.float32)
    names = {"fastrms": fastrms, "w": w, "b": b, "gw": w * 2, "gb": b * 2}
    exec(code_blocks()[1], names)
    assert names["info"].grad_norm > 0 and (w < 1).all() and (b < 1).all()
    assert names["opt"].steps == 1


def test_the_flat_buffer_example_runs():
    names = {}
    exec(next(text for text in code_blocks() if "FlatBuffer(" in text), names)
    flat = names["flat"]
    assert names["opt"].steps == 1 and (flat.params["w1.bias"] < 0).all() and not flat.params["w2.bias"].any()


def test_the_schedules_and_checkpoints_run(tmp_path, monkeypatch):
    """Five bad epochs: the rate falls once, and the best parameters come back."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"fastrms": fastrms, "w": np.ones(5, np.float32), "gw": np.ones(5, np.float32)}
    for words in ("import Cosine", "opt.save("):
        exec(next(text for text in code_blocks() if words in text), names)
    assert names["plateau"].rate == 0.01 * 0.1 and names["opt"].lr is names["plateau"]
    assert names["opt"].steps == 2 and (tmp_path / "run.safetensors").exists()


def test_the_example_of_gradients_in_the_step_runs(capsys):
    w, b = np.ones(5, np.float32), np.ones(3, np.float32)
    for value, said in ((1.0, ""), (np.inf, "8 elements overflowed: nothing was updated\n")):
        names = {"fastrms": fastrms, "w": w, "b": b, "gw": w * np.float32(value), "gb": b * np.float32(value)}
        exec(next(text for text in code_blocks() if "info.nonfinite" in text), names)
        assert capsys.readouterr().out == said and (names["gw"] == 0).all() and names["opt"].steps == (not said)


def test_the_streaming_example_runs():
    w = {"first": np.ones(5, np.float32), "second": np.ones(3, np.float32)}
    names = {
        "opt": fastrms.Adam(w),
        "layers": list(w),
        "backward": lambda name, out: out,
        "scratch": {k: v * 2 for k, v in w.items()},
    }
    exec(next(text for text in code_blocks() if "opt.streaming" in text), names)
    assert names["s"].updated == ["second", "first"] and names["opt"].steps == 1 and all((v < 1).all() for v in w.values())


def test_the_numba_example_runs():
    pytest.importorskip("numba")
    names = {}
    exec(next(text for text in code_blocks() if "numba.njit" in text), names)
    assert 0 < names["w"][0] < 0.5


def test_an_own_rule_is_short():
    lion = next(text for text in code_blocks() if "class Lion" in text).split("class Lion")[1]
    assert len([line for line in lion.splitlines() if line.strip()]) <= 12


def shown(value):
    return f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')


def dialect_table():
    """The README's table, from the code: per optimizer, our defaults and what each framework has instead."""
    lines = [f"| | ours, torch | {' | '.join(d for d in dialects.DIALECTS if d != 'torch')} |", "| --- " * 6 + "|"]
    for make in (fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.AdamW, fastrms.RProp):
        presets = {d: of.get(make.__name__) for d, of in dialects.DIALECTS.items()}
        names = dict.fromkeys(name for preset in presets.values() for name in preset or ())
        cells = [", ".join(f"{name} {shown(make.defaults[name])}" for name in names) or "(defaults)"]
        for d, preset in presets.items():
            if d != "torch":
                said = [f"{name} {shown(value)}" for name, value in (preset or {}).items() if value != make.defaults[name]]
                cells.append("none" if preset is None else ", ".join(said) or "as ours")
        lines.append(f"| {make.__name__} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_dialect_table_is_the_code():
    assert block("dialects") == dialect_table(), f"put this between the markers:\n{dialect_table()}"


def test_our_defaults_are_torchs():
    assert all(preset == {} for preset in dialects.DIALECTS["torch"].values())


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = re.search(r"<!-- tests -->\n```\n(.*?)\n```", README)[1]
    assert command == 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest'
    line = next(line for line in script.splitlines() if line.startswith("tests="))
    found = subprocess.run(["bash", "-c", f'{line}; echo "$tests"'], cwd=ROOT, capture_output=True, text=True).stdout
    assert found.strip() == command and 'eval "$tests"' in script


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"`((?:tests|csrc|fastrms|examples|bench)/[\w./]+)(?:::\w+)?`|\]\(([\w./]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
    for test in re.findall(r"`(tests/\w+\.py)::(\w+)`", README):
        assert f"def {test[1]}(" in (ROOT / test[0]).read_text()
