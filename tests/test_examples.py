"""Each example runs at small size, as a user would run it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import fastrms

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(tmp_path, monkeypatch, capsys):
    """The whole of it takes about 10 s: every optimizer learns, three of them past 97 % on images not trained on."""
    monkeypatch.chdir(tmp_path)
    accuracies = load("digits").main([])
    out = capsys.readouterr().out
    assert set(accuracies) == {"RMSProp", "AdaGrad", "Adam", "AdamW", "RProp"}
    assert all(name in out for name in accuracies)
    assert all(len(values) == 5 and np.mean(values) > 0.95 for values in accuracies.values())
    assert all(np.mean(accuracies[name]) >= 0.97 for name in ("RMSProp", "AdaGrad", "Adam"))
    assert (tmp_path / "fastrms-digits.png").read_bytes().startswith(b"\x89PNG")


def test_trainer_numba(capsys):
    """Every way learns, and all of them to the same weights."""
    pytest.importorskip("numba")
    results = load("trainer_numba").main(["--epochs", "25", "--rounds", "1"])
    out = capsys.readouterr().out
    assert len(results) == (3 if "c" in fastrms.available_backends() else 2) and "DIFFERENT" not in out
    (want, _, accuracy), *others = results.values()
    assert accuracy > 0.95 and all(np.array_equal(weights, want) for weights, _, _ in others)


def test_streaming(capsys):
    """It learns, and both ways to the same weights."""
    results = load("streaming").main(["--hidden", "48", "--layers", "2", "--epochs", "40"])
    assert "DIFFERENT" not in capsys.readouterr().out
    whole, streamed = results["whole"], results["streamed"]
    assert all(np.array_equal(whole[0][name], streamed[0][name]) for name in whole[0]) and whole[2] > 0.8
    assert whole[2] == streamed[2]


def test_fused_cuda():
    """It compiles without a GPU; tests/ptx/test_tester.py executes it."""
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    text = load("fused_cuda").compile_fused((9, 0))
    assert ".entry fused" in text and "fma." not in text and "f64" not in text


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert all(f'load("{path.stem}")' in tested for path in EXAMPLES.glob("*.py"))
