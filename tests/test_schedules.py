"""Schedules: their formulas, how PyTorch and Keras count a plateau, early stopping, and their way through state_dict()."""

import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import bits

import fastrms
from fastrms.schedules import Cosine, EarlyStopping, Exponential, Plateau, Step


def test_formulas():
    assert [Step(0.5, 3, 0.5)(t) for t in (0, 2, 3, 5, 6)] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert [Exponential(0.5, 0.25, 2)(t) for t in (0, 1, 2, 4)] == [0.5, 0.25, 0.125, 0.03125]
    assert [Exponential(0.5, 0.25, 2, staircase=True)(t) for t in (0, 1, 2, 3)] == [0.5, 0.5, 0.125, 0.125]
    cosine = Cosine(0.5, 12, end=0.1, warmup=4, start=0.3)
    assert [cosine(t) for t in (0, 2, 4, 12, 13, 10**9)] == [0.3, 0.4, 0.5, 0.1, 0.1, 0.1]
    assert cosine(8) == pytest.approx(0.3) and cosine(6) == pytest.approx(0.1 + 0.4 * (1 + math.sqrt(0.5)) / 2)
    assert Cosine(1.0, 1)(0) == 1.0 and Cosine(1.0, 1)(1) == 0.0


def test_wrong_arguments_are_refused_by_name():
    for make, error, words in [
        (lambda: Step(-1.0, 3), ValueError, "lr=-1.0"), (lambda: Step(0.1, 0), ValueError, "every=0"),
        (lambda: Step(0.1, 2.5), TypeError, "every=2.5"), (lambda: Step(0.1, 2, 1.5), ValueError, "factor=1.5"),
        (lambda: Exponential(0.1, 0.0), ValueError, "factor=0.0"), (lambda: Exponential("x", 0.5), TypeError, "lr='x'"),
        (lambda: Exponential(0.1, 0.5, staircase=1), TypeError, "staircase=1"),
        (lambda: Cosine(0.1, 5, warmup=5), ValueError, "warmup=5"), (lambda: Cosine(0.1, 0), ValueError, "steps=0"),
        (lambda: Cosine(0.1, 5, end=math.nan), ValueError, "end"), (lambda: Plateau(0.1, factor=1.0), ValueError, "factor"),
        (lambda: Plateau(0.1, mode="best"), ValueError, "mode='best'"),
        (lambda: Plateau(0.1, counting="jax"), ValueError, "counting"),
        (lambda: Plateau(0.1, patience=-1), ValueError, "patience=-1"),
        (lambda: Plateau(0.1).update("x"), TypeError, "metric='x'"),
        (lambda: Plateau(0.1).update("0.5"), TypeError, "metric='0.5'"),
        (lambda: Plateau(0.1).update(True), TypeError, "metric=True"),
        (lambda: Plateau(0.1).update(10**400), ValueError, "metric is too large"),
        (lambda: EarlyStopping({}), ValueError, "params is empty"),
        (lambda: EarlyStopping(np.ones(3), optimizer=5), TypeError, "optimizer=5"),
        (lambda: EarlyStopping(np.ones(3), patience=-1), ValueError, "patience=-1"),
        (lambda: EarlyStopping(np.ones(3), threshold_mode="x"), ValueError, "threshold_mode='x'"),
        (lambda: EarlyStopping({"w": np.ones(3, int)}), TypeError, r"params\['w'\] has dtype int64"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            make()
    with pytest.raises(AttributeError):
        Step(0.1, 3).lr = 1.0


CLOSED = [  # an object, what it has, and what the sentence says to do
    (lambda: Step(0.1, 3), ["lr", "every", "factor"], "make a new Step$"),
    (lambda: Exponential(0.1, 0.5), ["lr", "factor", "every", "staircase"], "make a new Exponential$"),
    (lambda: Cosine(0.1, 5), ["lr", "steps", "end", "warmup", "start"], "make a new Cosine$"),
    (lambda: Plateau(0.1), [*Plateau.__annotations__], r"make a new Plateau; its counters are set by count\(rate, "),
    (lambda: EarlyStopping(np.ones(3)), ["patience", "threshold", "threshold_mode", "mode", "best", "bad"],
     r"make a new EarlyStopping; best and bad are set by update\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("make, names, words", CLOSED)
def test_no_attribute_can_be_set(make, names, words):
    """A misspelt one would be ignored, and a wrong one would not be checked."""
    made = make()
    kind, before = type(made).__name__, dict(vars(made))
    assert set(names) <= before.keys() | {"rate", "best", "bad", "cooling"}
    for name in names:
        with pytest.raises(AttributeError, match=f"{name} of an? {kind} is fixed: {words}"):
            setattr(made, name, 3)
    for name in ("patienc", "learning_rate", "rates", "_lr"):
        with pytest.raises(
            AttributeError, match=rf"an? {kind} has no attribute '{name}' \(it has {', '.join(names)}\).*{words}"
        ):
            setattr(made, name, 3)
    assert vars(made) == before


def test_the_counters_of_a_plateau_are_set_by_count():
    plateau = Plateau(0.1, patience=0)
    plateau.count(rate=0.5, best=2.0, bad=0, cooling=0)
    assert plateau(0) == 0.5 and not plateau.update(1.0) and plateau.update(1.5) and plateau.rate == 0.05


@pytest.mark.parametrize("base, arguments", [(Plateau, (0.1,)), (Step, (0.1, 3)), (EarlyStopping, (np.ones(2),))])
def test_a_subclass_may_have_attributes_of_its_own(base, arguments):
    class Mine(base):
        def __init__(self, *arguments):
            self.history = []
            super().__init__(*arguments)
            self.history = [1]

    mine = Mine(*arguments)
    assert mine.history == [1] and type(pickle.loads(pickle.dumps(base(*arguments)))) is base
    with pytest.raises(AttributeError, match="is fixed"):
        setattr(mine, next(iter(base.__annotations__)), 1)


def test_numpy_numbers_become_plain_ones():
    cosine = Cosine(np.float32(0.5), np.int64(10))
    assert (type(cosine.lr), type(cosine.steps)) == (float, int) and cosine == Cosine(0.5, 10)


# The metric of 30 epochs; with each set of options, the epochs after which the rate falls from 0.1, and the last rate:
# recorded from torch.optim.lr_scheduler.ReduceLROnPlateau of torch 2.13.0 and keras.callbacks.ReduceLROnPlateau of 3.15.1.
METRICS = [1.0, 0.9, 0.95, 0.91, 0.89995, 0.8999, 0.9, 0.9, 0.7, 0.8, 0.8, 0.8, 0.8, 0.69, *[0.7] * 8, 0.5, *[0.6] * 7]
TORCH = [
    ({"patience": 2}, [4, 11, 16, 19, 25, 28], 1e-7),
    ({"patience": 2, "cooldown": 2}, [4, 11, 16, 21, 26], 1e-6),
    ({"patience": 0, "factor": 0.5}, [2, 3, 4, 6, 7, *range(9, 13), *range(14, 22), *range(23, 29)], 1.19209e-8),
    ({"patience": 1, "threshold": 0.05, "threshold_mode": "abs", "cooldown": 1, "min_lr": 0.003}, [3, 6], 0.003),
    ({"patience": 0, "min_change": 0.001}, [2, 3], 0.001),
    ({"patience": 2, "mode": "max", "factor": 0.5}, [3, 6, 9, 12, 15, 18, 21, 24, 27], 0.1 / 2**9),
]
KERAS = [
    ({"patience": 2}, [3, 5, 7, 10, 12, 15, 17, 19, 21, 24, 26, 28], 1e-13),
    ({"patience": 2, "cooldown": 2}, [3, 6, 10, 15, 18, 21, 24, 27], 1e-9),
    ({"patience": 0, "factor": 0.5}, [*range(2, 8), *range(9, 13), *range(14, 22), *range(23, 30)], 2.98023e-9),
    ({"patience": 4, "threshold": 0.05, "cooldown": 1, "min_lr": 0.003}, [5, 12], 0.003),
    ({"patience": 3, "mode": "max", "factor": 0.5}, [3, 6, 9, 12, 15, 18, 21, 24, 27], 0.1 / 2**9),
]


@pytest.mark.parametrize(
    "make, options, falls, last", [(Plateau, *row) for row in TORCH] + [(Plateau.keras, *row) for row in KERAS]
)
def test_plateau_counts_as_the_frameworks_do(make, options, falls, last):
    plateau = make(0.1, **options)
    assert [k for k, metric in enumerate(METRICS) if plateau.update(metric)] == falls
    assert plateau(0) == plateau.rate == pytest.approx(last, rel=1e-5)


def test_nan_and_infinity_are_no_improvement():
    plateau = Plateau(0.1, patience=1)
    metrics = (math.inf, math.nan, 5.0, math.nan, math.nan)
    assert [plateau.update(metric) for metric in metrics] == [False, True, False, False, True]
    assert plateau.best == 5.0


@pytest.mark.parametrize("patience, stops_at", [(0, 2), (2, 3), (5, 18), (7, 20), (8, 21), (50, None)])
def test_early_stopping_counts_as_keras_does(patience, stops_at):
    stopping = EarlyStopping(np.ones(3), patience=patience)
    assert next((k for k, metric in enumerate(METRICS) if stopping.update(metric)), None) == stops_at


STRUCTURES = [
    lambda w, b: w,
    lambda w, b: [w, b],
    lambda w, b: {"w": w, 3: b},
    lambda w, b: [{"params": [w], "lr": 0.1}, {"params": {"b": b}}],
    lambda w, b: [memoryview(w), b],
]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (17, 59)])
def test_early_stopping_restores_the_best_bits(structure, shape):
    w, b = np.full(shape, 1.5, np.float32, order="F"), np.array([math.nan, -0.0, 5e-324])
    start = w.copy(), b.copy()
    stopping = EarlyStopping(structure(w, b), patience=2)
    w[...] = 2.5
    assert not stopping.update(1.0)
    best = w.copy()
    w[...] = 3.5
    assert not stopping.update(1.0) and stopping.update(math.nan)
    stopping.restore()
    assert np.array_equal(bits(w), bits(best)) and np.array_equal(bits(b), bits(start[1]))
    assert (stopping.bad, stopping.best) == (0, 1.0)
    w[...] = 9
    fresh = EarlyStopping(structure(w, b))
    w[...] = 8
    fresh.restore()  # before any update: as they were when it was made
    assert (w == 9).all()


def train(optimizer, w, gradients):
    for gradient in gradients:
        optimizer.step(gradient)
    return w.copy()


def test_restart_from_the_best_with_a_smaller_rate(backend):
    """Parameters, state and counts are those of the best moment, the rate is the reduced one: as a run from there."""
    gradients = np.random.default_rng(2).standard_normal((6, 7))
    w, want = np.ones(7), np.ones(7)
    plateau = Plateau(0.1, patience=0)
    optimizer = fastrms.Adam(w, lr=plateau, backend=backend)
    stopping = EarlyStopping(w, optimizer=optimizer)
    for gradient, metric in zip(gradients[:4], (3.0, 2.0, math.nan, 2.0), strict=True):
        optimizer.step(gradient)
        stopping.update(metric)
        if plateau.update(metric):
            stopping.restore()
    assert plateau.rate == 0.1 * 0.1 * 0.1 and optimizer.lr is plateau and optimizer.steps == 2
    reference = fastrms.Adam(want, lr=0.1, backend=backend)
    train(reference, want, gradients[:2])
    reference.lr = 0.1 * 0.1 * 0.1
    assert np.array_equal(train(optimizer, w, gradients[4:]), train(reference, want, gradients[4:]))


def test_early_stopping_takes_a_flat_buffer():
    flat = fastrms.FlatBuffer({"w": (2, 3), "b": (3,)})
    stopping = EarlyStopping(flat, patience=1)
    flat.data[...] = 1
    assert not stopping.update(0.5)
    flat.data[...] = 2
    assert stopping.update(0.6)
    stopping.restore()
    assert (flat.data == 1).all()


def test_early_stopping_that_fails_has_kept_what_it_had():
    """state_dict() is refused in a streaming block: neither the parameters nor the state are exchanged then."""
    w = np.ones(4, np.float32)
    optimizer = fastrms.Adam({"w": w}, lr=0.1)
    stopping = EarlyStopping({"w": w}, optimizer=optimizer)
    stopping.update(5.0)
    optimizer.step({"w": np.ones(4, np.float32)})
    with optimizer.streaming(), pytest.raises(RuntimeError):
        stopping.update(1.0)
    stopping.restore()
    assert (w == 1).all() and optimizer.steps == 0 and stopping.best == 5.0


def test_the_state_dict_of_early_stopping_is_its_own():
    w = np.ones(4, np.float32)
    optimizer = fastrms.Adam(w)
    stopping = EarlyStopping(w, optimizer=optimizer)
    saved = stopping.state_dict()
    saved["optimizer"]["tensors"][0]["state"]["exp_avg"][:] = 7
    assert not stopping.state_dict()["optimizer"]["tensors"][0]["state"]["exp_avg"].any()
    with pytest.raises(ValueError, match=r"^this has the keys \['garbage'\], not those of a state_dict of fastrms"):
        stopping.load_state_dict({**saved, "optimizer": {"garbage": 1}})
    with pytest.raises(ValueError, match="state_dict of this EarlyStopping"):
        stopping.load_state_dict({**saved, "bad": "garbage"})


@pytest.mark.parametrize("wrong, words", [
    (lambda saved: saved["optimizer"], r"keys \['optimizer', .*\]; a state_dict of an EarlyStopping has 'best', too: pass "),
    (lambda saved: {"best": 1.0, "bad": 0, "params": {}}, "has 'optimizer', too: pass what its state_dict"),
    (lambda saved: None, "this is a NoneType, not a state_dict of an EarlyStopping: pass what its state_dict"),
    (lambda saved: {**saved, "params": {"params['v']": 1}}, r"has no params\['w'\] \(it has params\['v'\]\): load it"),
    (lambda saved: {**saved, "params": None}, r"has no params\['w'\] \(it has no parameters\): load it"),
])  # fmt: skip
def test_a_dict_that_is_no_state_dict_of_early_stopping(wrong, words):
    """The sentence names what is missing, and nothing has changed."""
    w = np.ones(4, np.float32)
    stopping = EarlyStopping({"w": w}, optimizer=fastrms.Adam({"w": w}))
    stopping.update(5.0)
    before = dict(vars(stopping))
    with pytest.raises(ValueError, match=words):
        stopping.load_state_dict(wrong(stopping.state_dict()))
    assert all(vars(stopping)[name] is value for name, value in before.items())


def test_early_stopping_is_resumed():
    """By pickle; in another memory order; a dict that does not fit changes nothing."""
    w, b = np.arange(6.0).reshape(2, 3), np.ones(3, np.float32)
    optimizer = fastrms.Adam([w, b])
    stopping = EarlyStopping([w, b], patience=3, optimizer=optimizer)
    optimizer.step([w + 1, b + 1])
    stopping.update(1.0), stopping.update(2.0)
    best = w.copy(), b.copy()
    optimizer.step([w + 1, b + 1])
    saved = pickle.loads(pickle.dumps(stopping.state_dict()))
    moved = [np.asfortranarray(np.zeros((2, 3))), np.zeros(3, np.float32)]
    other = EarlyStopping(moved, patience=3, optimizer=fastrms.Adam(moved))
    same = dict.fromkeys(saved["params"], b)
    for change in ({"bad": -1}, {"best": "x"}, {"params": {}}, {"optimizer": None}, {"params": same}):
        with pytest.raises(ValueError):
            other.load_state_dict({**saved, **change})
        assert (other.best, other.bad) == (None, 0)
    other.load_state_dict(saved)
    assert (other.best, other.bad) == (1.0, 1) and not other.update(3.0) and other.update(3.0)
    other.restore()
    assert all(np.array_equal(x, y) for x, y in zip(moved, best, strict=True)) and other._optimizer.steps == 1


SCHEDULES = [
    Step(0.1, 2, 0.5), Exponential(0.1, 0.7, 3, staircase=True), Cosine(0.1, 7, 0.01, 3, 0.001), Plateau(0.1, patience=1)
]  # fmt: skip


def fed(schedule, k):
    if isinstance(schedule, Plateau):
        schedule.update(METRICS[k])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_schedule_travels_with_the_optimizer(schedule, backend):
    """Through JSON, in mid-run, into an optimizer that has another lr; then the same bits as the unbroken run."""
    schedule = pickle.loads(pickle.dumps(schedule))
    w, gradients = np.ones(7, np.float32), np.random.default_rng(1).standard_normal((10, 7)).astype(np.float32)
    optimizer = fastrms.RMSProp([{"params": w}], lr=schedule, backend=backend)
    for k in range(5):
        fed(schedule, k)
        optimizer.step([gradients[k]])
    saved = optimizer.state_dict()
    saved["groups"] = json.loads(json.dumps(saved["groups"]))
    resumed = w.copy()
    other = fastrms.RMSProp([{"params": resumed}], lr=3.0, backend=backend)
    other.load_state_dict(saved)
    assert type(other.lr) is type(schedule) and vars(other.lr) == vars(schedule) and other.lr is not schedule
    for k in range(5, 10):
        fed(schedule, k), fed(other.lr, k)
        optimizer.step([gradients[k]]), other.step([gradients[k]])
    assert np.array_equal(bits(w), bits(resumed)) and vars(other.lr) == vars(schedule)


def grouped(*rates):
    return fastrms.RMSProp([{"params": np.ones(2), "lr": rate} for rate in rates])


def test_a_plateau_that_is_held_takes_the_saved_counters_over():
    """Whoever feeds it goes on feeding the one that rules; groups that shared one share it again."""
    plateau = Plateau(0.1, patience=0)
    plateau.update(1.0), plateau.update(1.0)
    saved = grouped(plateau, plateau, 0.5).state_dict()
    held = Plateau(7.0)
    for rates in ((held, held, 0.3), (held, 0.3, 0.3), (0.2, 0.2, 0.2)):
        held.__init__(7.0)
        optimizer = grouped(*rates)
        optimizer.load_state_dict(saved)
        first, second, third = optimizer.lr
        assert first is second and vars(first) == vars(plateau) and third == 0.5
        assert (first is held) == (held in rates)


def test_what_a_load_may_not_replace():
    """A Plateau is never lost silently, a foreign callable never taken away; a refusal changes nothing."""
    foreign = lambda step: 0.25  # noqa: E731
    one, two = Plateau(0.1), Plateau(0.2)
    for own, saved, words in [
        ((one, 0.1), (Step(0.1, 2), 0.1), "lr is a Plateau here, the saved one is a Step"),
        ((one, one), (one, two), "share a Plateau"),
        ((one, two), (one, one), "share a Plateau"),
    ]:
        optimizer, described = grouped(*own), grouped(*saved).state_dict()
        before = [dict(vars(p)) for p in (one, two)]
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(described)
        assert [dict(vars(p)) for p in (one, two)] == before
        assert all(rate is mine or rate == mine for rate, mine in zip((g["lr"] for g in optimizer.groups), own, strict=True))
    for own, saved, want in [
        ((foreign, one), (Step(0.1, 2), 0.7), (foreign, one)),
        ((Step(0.1, 2), 0.5), (0.3, Step(0.2, 3)), (Step(0.1, 2), Step(0.2, 3))),
        ((Step(0.1, 2), 0.5), (Cosine(0.3, 4), foreign), (Cosine(0.3, 4), 0.5)),
    ]:
        optimizer = grouped(*own)
        optimizer.load_state_dict(grouped(*saved).state_dict())
        assert optimizer.lr == list(want)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "Nothing"}, {"lr": -1.0}, {"bad": -1}, {"bad": 1.5}, {"best": "x"}, {"rate": None}, {"speed": 1},
        {"object": []}, {"counting": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_schedule_is_refused(change):
    optimizer, held = grouped(0.1), Plateau(0.3)
    saved = grouped(Plateau(0.1)).state_dict()
    saved["groups"][0]["lr"].update(change)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert optimizer.lr == 0.1
    before, optimizer = dict(vars(held)), grouped(held)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert vars(held) == before and optimizer.lr is held


def test_a_subclass_of_ours_is_foreign():
    """Its code could not be brought back, so it is left out like any callable."""

    class Slow(Step):
        def __call__(self, step):
            return super().__call__(step) / 2

    assert "lr" not in grouped(Slow(0.1, 2)).state_dict()["groups"][0]


def test_import_fastrms_does_not_import_schedules():
    code = "import sys, fastrms; assert 'fastrms.schedules' not in sys.modules; fastrms.schedules.Step(0.1, 2)"
    subprocess.run([sys.executable, "-c", code], check=True)


THEIRS = [  # (class, parameter of another framework, ours)
    (Step, "step_size", "every"), (Step, "gamma", "factor"), (Step, "initial_learning_rate", "lr"),
    (Exponential, "gamma", "factor"), (Exponential, "decay_rate", "factor"), (Exponential, "decay_steps", "every"),
    (Exponential, "init_value", "lr"), (Exponential, "transition_steps", "every"),
    (Cosine, "T_max", "steps"), (Cosine, "eta_min", "end"), (Cosine, "warmup_steps", "warmup"),
    (Cosine, "decay_steps", "steps"),
    (Cosine, "initial_learning_rate", "lr"), (Cosine, "init_value", "start"), (Cosine, "peak_value", "lr"),
    (Cosine, "end_value", "end"), (Cosine, "alpha", "end"), (Cosine, "warmup_target", "lr"),
    (Plateau, "min_delta", "threshold"), (Plateau, "eps", "min_change"), (EarlyStopping, "min_delta", "threshold"),
]  # fmt: skip


@pytest.mark.parametrize("kind, name, ours", THEIRS)
def test_a_keyword_of_another_framework_gets_our_word(kind, name, ours):
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__} has no parameter '{name}'; for {name} write {ours}\b.*; it has "
    ):
        kind(0.1, **{name: 5})


def test_no_schedule_sends_to_a_parameter_that_it_lacks():
    with pytest.raises(TypeError, match=r"^Step has no parameter 'T_max'; it has lr, every, factor$"):
        Step(0.1, 5, T_max=3)
    with pytest.raises(TypeError, match="'min_delta'; for min_delta write threshold"):
        Plateau.keras(0.1, min_delta=0.1)
    assert Step(0.1, factor=0.5, every=3)(6) == 0.1 * 0.5**2
