"""`python -m bench --shapes`: a model of the reader's own, small: what it checks, prints, stores and refuses."""

import json
import re

import numpy as np
import pytest
from conftest import BACKENDS, folder_with_page

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bench import __main__ as command
from bench import model, model_command, peers
from bench.check import WrongContender
from bench.contenders import FASTRMS, NAIVE
from bench.problem import RULES

OPTIONS = [(clip, schedule) for clip in (False, True) for schedule in (False, True)]
SHAPES = ((7, 3), (3,), (3, 2, 1))


@pytest.fixture
def short(tmp_path, monkeypatch):
    """The command in an empty folder with the page of its table, without the time that it takes, and without frameworks."""
    monkeypatch.setattr(model_command, "SECONDS", 0.0)
    monkeypatch.setattr(model, "PLACES", 2)
    monkeypatch.setattr(peers, "available", lambda names: ({}, dict.fromkeys(names, f"not installed: {peers.INSTALL}")))
    with folder_with_page(tmp_path, monkeypatch, "model") as folder:
        yield folder


def test_a_model_is_printed_and_stored(short, capsys):
    asked = "--shapes 7x3,3,3x2x1 --how step --clip --schedule --rules rmsprop,adam --json out.json --docs"
    command.main(asked.split())
    out, page = capsys.readouterr().out, (short / "docs/performance.md").read_text()
    names = [NAIVE, *(FASTRMS[backend] for backend in ("numpy", "numba", "c") if backend in BACKENDS)]
    names.append(f"{names[-1]}, opt.lr = x")
    for rule in ("rmsprop", "adam"):
        assert f"{rule}, float32, 7x3, 3, 3x2x1 (30 elements), step, clip_norm=1.0, lr=Cosine(...)" in out
        for name in names:
            assert re.search(rf"│ {re.escape(name)} +│ +[\d.]+ │ +[\d.]+ │ +[\d.]+ │ +[\d.]+x │", out)
            assert re.search(rf"^\| {rule} \| {re.escape(name)} \|( [\d.]+ \|){{3}} [\d.]+x \|$", page, re.M)
    assert "torch fused: not installed: pip install -e '.[peers]'" in out
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page
    content = json.loads((short / "out.json").read_text())
    assert content["command"] == "python -m bench " + asked and content["machine"]["cpu"]
    assert [(row["rule"], row["contender"]) for row in content["results"]] == [
        (rule, name) for rule in ("rmsprop", "adam") for name in names
    ]
    for row in content["results"]:
        assert (row["how"], row["clip"], row["schedule"]) == ("step", True, True) and row["shapes"] == [
            [7, 3],
            [3],
            [3, 2, 1],
        ]
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["over_naive"] > 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--shapes", "64x"], "'64x' is not a list of shapes of numbers above 0, such as 784x512,512"),
        (["--shapes", "3,0"], "'3,0' is not a list of shapes"),
        (["--shapes", "big"], "'big' is not a list of shapes"),
        (["--clip"], "--clip needs --shapes, the tensors of your model"),
        (["--schedule"], "--schedule needs --shapes, the tensors of your model"),
        (["--how", "torch"], "--how needs --shapes, the tensors of your model"),
        (["--shapes", "3", "--sizes", "64"], "--sizes is for the tables, --shapes for a model: give one of the two"),
        (["--shapes", "3", "--rules", "adam,rprop", "--schedule"], "--schedule is not for rprop, which uses its lr once"),
        (["--shapes", "3", "--how", "slowly"], "argument --how: invalid choice: 'slowly'"),
    ],
)
def test_wrong_words_are_refused_in_one_sentence(monkeypatch, arguments, sentence, capsys):
    monkeypatch.setattr(command, "Run", None)  # nothing is measured
    monkeypatch.setattr(model_command, "run", None)
    with pytest.raises(SystemExit):
        command.main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last


def test_a_missing_torch_is_named(short):
    with pytest.raises(SystemExit) as info:
        command.main(["--shapes", "3", "--how", "torch"])
    assert info.value.code == "--how torch needs torch: not installed: pip install -e '.[peers]'"


def test_shapes_are_parsed():
    options = command.parse(["--shapes", "784x512,512,512x10"])
    assert options.shapes == ((784, 512), (512,), (512, 10)) and options.how == "bound"
    assert model.Asked("adam", options.shapes).elements() == 784 * 512 + 512 + 5120
    assert options.rules == command.QUICK_RULES


def contenders(asked):
    others, _ = model.frameworks(asked)
    return model.makers(asked, 1) | others


@pytest.mark.parametrize("clip, schedule", OPTIONS)
@pytest.mark.parametrize("how", model.HOWS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_every_contender_does_what_is_asked(rule, how, clip, schedule):
    """A contender that leaves out the clipping, the schedule or a tensor is named, and those that are there pass."""
    if rule == "rprop" and schedule:
        pytest.skip("RProp uses its lr once")
    if how == "torch":
        pytest.importorskip("torch")
    asked = model.Asked(rule, SHAPES, how, clip, schedule)
    for name, make in contenders(asked).items():
        try:
            checked = model.Model(asked, model.CHECKED)
            model.check(checked, make(checked))
        except model.CannotDo:
            continue
        for other in (asked._replace(clip=not clip), asked._replace(schedule=not schedule)):
            seen = rule not in ("rprop",) if other.clip == clip else how == "bound" or rule == "adagrad"
            if seen and name != f"{FASTRMS['c']}, opt.lr = x":
                with pytest.raises(WrongContender, match=re.escape(name)):
                    model.check(model.Model(asked, model.CHECKED), with_own_model(make, other))


def with_own_model(make, asked):
    return make(model.Model(asked, model.CHECKED))


def test_a_wrong_tensor_is_named():
    asked = model.Asked("adam", SHAPES)
    made = model.Model(asked, model.CHECKED)
    contender = model.naive(made)
    wrong = contender._replace(read=lambda: [made.params[0], made.params[1] + 1, made.params[2]])
    with pytest.raises(WrongContender, match=r"naive NumPy is wrong: adam, .* tensor 1 is off by"):
        model.check(made, wrong)


def test_the_rate_changes_at_every_step_that_is_timed():
    made = model.Model(model.Asked("rmsprop", SHAPES, schedule=True), model.TIMED)
    rates = [rate["lr"] for rate, _ in zip(made.rates(), range(1000), strict=False)]
    assert np.all(np.diff(rates) != 0) and rates[0] == rates[model.RATES] and made.lr(10**6) > 0


def test_a_functional_call_is_not_said_to_have_what_only_a_step_has():
    asked = model.Asked("adam", SHAPES, "functional", clip=True, schedule=True)
    said = asked.in_words()
    assert said.endswith("functional, the norm of all gradients clipped to 1.0 by grad_scale, another lr at each step")
    assert "clip_norm" not in said and "Cosine" not in said
    assert asked._replace(clip=False, schedule=False).in_words().endswith("(30 elements), functional")


def test_times_naive_is_what_the_caption_says(short, capsys):
    """The median of the ratios of the rounds: here 10, where the ratio of the medians is 20/3."""
    _, row = model.rows({NAIVE: [10.0, 20.0, 30.0], "other": [1.0, 10.0, 3.0]})
    assert row.over_naive == 10
    command.main(["--shapes", "3", "--rules", "rmsprop", "--docs"])
    caption = "times naive: naive NumPy's time over that of the row, the median of these ratios over the rounds"
    assert caption in " ".join(capsys.readouterr().out.split())
    assert caption in (short / "docs/performance.md").read_text()
