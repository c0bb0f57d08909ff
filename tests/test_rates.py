"""Learning rates that change: the same bits, whichever way a rate gets into a step; schedules are asked for each step, ours
for many steps at once."""

import threading

import numpy as np
import pytest
from conftest import BACKENDS, CLASSES, backends, bits, c
from test_build import needs_c

import fastrms
from fastrms.schedules import Cosine, Exponential, Plateau, Step

RATED = [made for made in CLASSES if "lr" not in made.fixed]
OPTIONS = {"weight_decay": 0.1, "decoupled": True}
SIZES = (1003, 7, 1)


def problem(dtype=np.float32):
    rng = np.random.default_rng(5)
    return [[rng.standard_normal(n).astype(dtype) for n in SIZES] for _ in range(2)]


def rate_of(step):
    return [0.1, 0.1, 0.025, 0.0, 0.3, 1e-6, 0.3][step % 7]


class Rates:
    """A schedule that counts how often it is asked."""

    def __init__(self, rate=rate_of):
        self.rate, self.asked = rate, []

    def __call__(self, step):
        self.asked.append(step)
        return self.rate(step)


def by_new_recipes(optimizer, grads, step):
    """A changed lr and another hyper-parameter that stays: whole new recipes."""
    optimizer.groups[0].update(lr=rate_of(step), weight_decay=OPTIONS["weight_decay"])
    optimizer.step(grads)


def by_attribute(optimizer, grads, step):
    optimizer.lr = rate_of(step)
    optimizer.step(grads)


def by_group(optimizer, grads, step):
    optimizer.groups[0]["lr"] = rate_of(step)
    optimizer.step(grads)


def by_measuring(optimizer, grads, step):
    optimizer.lr = rate_of(step)
    optimizer.step(grads, clip_norm=np.inf)


def by_streaming(optimizer, grads, step):
    optimizer.lr = rate_of(step)
    with optimizer.streaming() as stream:
        for k, grad in enumerate(grads):
            stream.step(k, grad)


def by_schedule(optimizer, grads, step):
    if step == 0:
        optimizer.lr = rate_of
    optimizer.step(grads)


def by_bound(optimizer, grads, step):
    if step == 0:
        optimizer.bind(grads)
    optimizer.lr = rate_of(step)
    optimizer.step()


WAYS = [by_attribute, by_group, by_measuring, by_streaming, by_schedule, by_bound]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", RATED)
def test_every_way_to_change_a_rate_has_the_same_bits(make, backend, dtype):
    results = []
    for way in (by_new_recipes, *WAYS):
        params, grads = problem(dtype)
        optimizer = make(params, backend=backend, lr=0.5, **OPTIONS)
        for step in range(9):
            way(optimizer, grads, step)
        results.append([bits(x) for x in params])
    assert not np.array_equal(results[0][0], bits(problem(dtype)[0][0]))
    for way, result in zip(WAYS, results[1:], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True)), way


@pytest.mark.parametrize("make", RATED)
def test_a_rate_is_refused_where_it_would_not_be_finite(make):
    """Every lr up to the largest float32, by every way: refused with nothing changed, or finite coefficients."""
    params, grads = problem()
    optimizer = make(params, lr=0.1, **OPTIONS)
    optimizer.bind(grads)
    for rate in (1e30, 1e36, 1e37, 2e38, 3.4e38):
        refused = []
        for change in (lambda r: setattr(optimizer, "lr", r), lambda r: optimizer.groups[0].update(lr=r, weight_decay=0.1)):
            before = optimizer.lr
            try:
                change(rate)
            except ValueError:
                refused.append(True)
                assert optimizer.lr == before
            else:
                refused.append(False)
                optimizer.lr = 0.1
        assert len(set(refused)) == 1, (rate, refused)
    for rate in (-1.0, np.nan, np.inf, 1e39):
        with pytest.raises(ValueError, match="lr"):
            optimizer.lr = rate
        assert optimizer.lr == 0.1


@pytest.mark.parametrize("schedule", [Step(0.1, 50, 0.5), Exponential(0.1, 0.99), Cosine(0.1, 600, warmup=40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_of_ours_is_that_of_its_numbers(schedule, backend):
    """Over several tables of rates, with steps that are left out and counts that jump."""
    (a, other), (grads, _) = (problem()[0], problem()[0]), problem()
    optimizer = fastrms.Adam(a, lr=schedule, backend=backend, nonfinite="skip")
    reference = fastrms.Adam(other, lr=0.0, backend=backend)
    wrong = [np.full_like(g, np.nan) for g in grads]
    optimizer.bind(grads)
    for step in range(700):
        reference.lr = schedule(step)
        if step % 100 == 3:
            optimizer.step(wrong)  # left out: the count stays
            optimizer.bind(grads)
        optimizer.step()
        reference.step(grads)
    assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, other, strict=True))
    saved = reference.state_dict()
    saved["steps"], saved["groups"] = 10, optimizer.state_dict()["groups"]
    optimizer.load_state_dict(saved)
    reference.load_state_dict({**saved, "groups": reference.state_dict()["groups"]})
    for x, y in zip(a, other, strict=True):
        x[:] = y[:] = 1
    reference.lr = schedule(10)
    optimizer.step()
    reference.step(grads)
    assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_of_ones_own_is_asked_once_for_each_step(backend):
    params, grads = problem()
    rates = Rates()
    optimizer = fastrms.RMSProp(params, lr=rates, backend=backend)
    optimizer.bind(grads)
    for step in range(5):
        optimizer.step(*([grads] if step % 2 else []))
    with optimizer.streaming() as stream:
        assert rates.asked == [0, 1, 2, 3, 4]
        stream.step(1, grads[1])
        stream.step(0, grads[0])
    assert rates.asked == [0, 1, 2, 3, 4, 5]


@needs_c
def test_a_subclass_of_our_schedules_is_asked_for_each_step():
    class Mine(Cosine):
        def __call__(self, step):
            asked.append(step)
            return super().__call__(step)

    asked = []
    params, grads = problem()
    optimizer = fastrms.RMSProp(params, lr=Mine(0.1, 100), backend="c")
    optimizer.bind(grads)
    for _ in range(4):
        optimizer.step()
    assert asked == [0, 1, 2, 3]


@needs_c
def test_our_schedules_need_no_python_between_tables(monkeypatch):
    params, grads = problem()
    optimizer = fastrms.RMSProp(params, lr=Cosine(0.1, 10_000), backend="c")
    optimizer.bind(grads)
    asked = []
    real = type(optimizer)._checked_step
    monkeypatch.setattr(type(optimizer), "_checked_step", lambda self, *rest: asked.append(self.steps) or real(self, *rest))
    for _ in range(600):
        optimizer.step()
    assert asked == [0, 256, 512] and optimizer.steps == 600


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_gives_way_to_a_number_and_back(backend):
    params, grads = problem()
    same = problem()[0]
    optimizer, reference = fastrms.RMSProp(params, backend=backend), fastrms.RMSProp(same, backend=backend)
    optimizer.bind(grads)
    for rate in (Cosine(0.1, 50), 0.25, lambda step: 0.125, 0.5, Step(0.3, 2), 0.0, Cosine(0.2, 9)):
        optimizer.lr = rate
        for _ in range(3):
            reference.lr = rate(reference.steps) if callable(rate) else rate
            optimizer.step()
            reference.step(grads)
        optimizer.groups[0]["rho"] = reference.groups[0]["rho"] = 0.9
        optimizer.step()
        reference.lr = rate(reference.steps) if callable(rate) else rate
        reference.step(grads)
    assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(params, same, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_have_rates_of_their_own(backend):
    params, grads = problem()
    same = problem()[0]
    groups = [{"params": params[:1], "lr": Cosine(0.1, 50)}, {"params": params[1:], "lr": 0.3}]
    optimizer = fastrms.AdaGrad(groups, backend=backend)
    alone = [fastrms.AdaGrad(same[:1], lr=Cosine(0.1, 50)), fastrms.AdaGrad(same[1:], lr=0.3)]
    for step in range(4):
        if step == 2:
            optimizer.groups[1]["lr"] = alone[1].lr = 0.7
        optimizer.step([grads[:1], grads[1:]])
        alone[0].step(grads[:1])
        alone[1].step(grads[1:])
    assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(params, same, strict=True))


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_looks_at_held_gradients_tells_the_same(backend, nonfinite):
    """The short way and the checked way: same bits, same StepInfo."""
    results = []
    for short in (True, False):
        params, grads = problem()
        optimizer = fastrms.Adam(params, backend=backend, nonfinite=nonfinite)
        if short:
            optimizer.bind(grads)
        infos = []
        for k, clip_norm in enumerate([None, 1.0, np.inf, 1e-30, 0.5, None]):
            if k == 4 and nonfinite == "skip":
                grads[1][0] = np.nan
            infos.append(optimizer.step(None if short else [g for g in grads], grad_scale=0.5, clip_norm=clip_norm))
        results.append((infos, [bits(x) for x in params], optimizer.steps))
    assert str(results[0][0]) == str(results[1][0]) and results[0][2] == results[1][2]
    assert all(np.array_equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


CALLS = {"rmsprop": 1, "adagrad": 1, "adam": 2}  # how many states each has


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_functional_call_takes_any_rate(name, backend):
    """Through the cache of hyper-parameters: the default, floats, other numbers, and what is refused."""
    function, step = getattr(fastrms, name), {"step": 3} if name == "adam" else {}
    made = {"rmsprop": fastrms.RMSProp, "adagrad": fastrms.AdaGrad, "adam": fastrms.Adam}[name]
    for dialect in (None, "keras"):
        for rate in (None, 0.5, 0.25, 0.0, 1, np.float32(0.1), np.float64(0.3), 0.5):
            said = {} if rate is None else {"lr": rate}
            results = []
            for extra in ({}, {"rho": 0.99} if name == "rmsprop" else {"eps_root": 0.0} if dialect is None else {}):
                param, grad = np.linspace(-1, 1, 33), np.linspace(2, -2, 33)
                states = [np.full(33, 0.5) for _ in range(CALLS[name])]
                function(param, grad, *states, **step, **said, **(extra if dialect is None else {}), dialect=dialect,
                         backend=backend)  # fmt: skip
                results.append(bits(param))
            assert np.array_equal(*results)
            param, grad = np.linspace(-1, 1, 33), np.linspace(2, -2, 33)
            states = [np.full(33, 0.5) for _ in range(CALLS[name])]
            usual = float(made(np.ones(3), dialect=dialect).lr if rate is None else rate)
            function(param, grad, *states, **step, lr=usual, dialect=dialect, backend="numpy")
            assert np.array_equal(bits(param), results[0]), (dialect, rate)
    before = param.copy()
    for rate, error in ((None, TypeError), (np.nan, ValueError), (-1.0, ValueError), ("x", TypeError),
                        (Cosine(1, 2), TypeError), (True, TypeError), (np.inf, ValueError)):  # fmt: skip
        with pytest.raises(error, match="lr"):
            function(param, grad, *states, **step, lr=rate, backend=backend)
    assert np.array_equal(param, before)


@needs_c
def test_functional_calls_of_threads_keep_their_rates():
    """Threads that share the hyper-parameters of the last call, but not lr."""
    grad, rates, wrong = np.ones(64, np.float32), np.linspace(0.1, 0.9, 8), []

    def work(rate):
        want, total = np.zeros(64, np.float32), np.zeros(64, np.float32)
        fastrms.adagrad(want, grad, total, lr=rate, backend="numpy")
        for _ in range(3000):
            param, total = np.zeros(64, np.float32), np.zeros(64, np.float32)
            fastrms.adagrad(param, grad, total, lr=rate)
            if not np.array_equal(param, want):
                wrong.append(rate)

    threads = [threading.Thread(target=work, args=(float(rate),)) for rate in rates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_c
def test_rates_in_c():
    """fastrms_set_rates: one row for all steps, rows for some steps, and an answer where there is none."""
    ffi, lib = c.ffi, c.lib
    params, grads = problem()
    optimizer = fastrms.AdaGrad(params[0], lr=0.5, backend="c")
    optimizer.bind(grads[0])
    plan, same, total = optimizer._plan._plan, problem()[0][0], np.zeros(SIZES[0], np.float32)
    recipes = plan.recipe

    def both(rate):
        assert lib.fastrms_step(plan) == lib.FASTRMS_OK and recipes[0].lr == rate
        fastrms.adagrad(same, grads[0], total, lr=rate)
        assert np.array_equal(bits(params[0]), bits(same))

    both(0.5)
    table = ffi.new("double[]", [0.25, 0.125, 0.125])
    assert lib.fastrms_set_rates(plan, 1, 3, table) == lib.FASTRMS_OK
    for rate in (0.25, 0.125, 0.125):
        both(rate)
    number = optimizer._gradients.number
    for step in (lambda: lib.fastrms_step(plan), lambda: lib.fastrms_step_held(plan, number),
                 lambda: lib.fastrms_step_with(plan, number, 1.0, -1.0, ffi.NULL),
                 lambda: -lib.fastrms_step_clipped(plan, number, 1.0, 1.0),
                 lambda: lib.fastrms_change(plan, ffi.NULL, ffi.NULL, ffi.NULL, 0, 1, 1.0, -1.0, ffi.NULL)):  # fmt: skip
        assert step() == lib.FASTRMS_NO_RATE == backends.NO_RATE
    assert plan.steps == 4 and np.array_equal(bits(params[0]), bits(same))
    assert lib.fastrms_set_rates(plan, 9, 1, table) == lib.FASTRMS_OK and lib.fastrms_step(plan) == lib.FASTRMS_NO_RATE
    assert lib.fastrms_set_rates(plan, 0, 0, ffi.new("double[]", [0.75])) == lib.FASTRMS_OK
    both(0.75)
    assert lib.fastrms_set_rate(plan, 0.5) == lib.FASTRMS_OK
    both(0.5)
    assert lib.fastrms_set_rates(plan, 9, 1, table) == lib.fastrms_set_rate(plan, 0.75) == lib.FASTRMS_OK
    both(0.75)
    lib.fastrms_stream_open(plan)
    assert lib.fastrms_set_rates(plan, 0, 0, table) == lib.fastrms_set_rate(plan, 0.5) == lib.FASTRMS_STREAMING
    lib.fastrms_stream_close(plan)
    both(0.75)


@needs_c
def test_a_step_from_c_has_no_rate_once_there_is_a_schedule():
    """Not the rate of before, and not 0."""
    import ctypes

    params, grads = problem()
    optimizer = fastrms.AdaGrad(params, lr=0.5, backend="c")
    optimizer.bind(grads)
    function, plan = optimizer.c_step
    step = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(function)
    assert step(plan) == c.lib.FASTRMS_OK
    changes = [
        lambda: setattr(optimizer, "lr", Cosine(0.5, 100)),
        lambda: optimizer.groups[0].update(lr=lambda step: 0.1, eps=1e-9),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ]
    for change in changes:
        change()
        before = [bits(x).copy() for x in params]
        assert step(plan) == c.lib.FASTRMS_NO_RATE
        assert all(np.array_equal(bits(x), y) for x, y in zip(params, before, strict=True))
        optimizer.step()
        assert not np.array_equal(bits(params[0]), before[0])
    optimizer.lr = 0.25
    assert step(plan) == c.lib.FASTRMS_OK


def two_groups(**of_the_second):
    w, b = np.ones(4, np.float32), np.ones(3, np.float32)
    optimizer = fastrms.RMSProp([{"params": [w]}, {"params": b, **of_the_second}])
    return optimizer, [[np.ones_like(w)], np.ones_like(b)]


def at_17(rate):
    return lambda step: rate if step == 17 else 0.1


@pytest.mark.parametrize("rate, error, said", [
    (-1.0, ValueError, r"^group 1: lr\(17\)=-1.0 must be finite"),
    ("x", TypeError, r"^group 1: lr\(17\)='x' is a str"),
    (1e39, ValueError, r"^lr\(17\) of group 1: lr=1e\+39 is not finite in float32"),
])  # fmt: skip
def test_an_error_of_a_schedule_names_the_step_and_the_group(rate, error, said):
    optimizer, grads = two_groups(lr=at_17(rate))
    for _ in range(17):
        optimizer.step(grads)
    state = optimizer.state["square_avg"]
    before = bits(state[1]).copy()
    with pytest.raises(error, match=said):
        optimizer.step(grads)
    assert optimizer.steps == 17 and np.array_equal(bits(state[1]), before)


def test_an_error_of_a_rate_names_the_group_where_there_are_several():
    with pytest.raises(ValueError, match=r"^group 1: lr=-1.0 must be"):
        two_groups(lr=-1)
    with pytest.raises(ValueError, match=r"^group 1: lr=1e\+39 is not finite"):
        two_groups(lr=1e39)
    optimizer, _ = two_groups()
    for rate, said in ((-1, r"^group 1: lr=-1.0 must be"), (1e39, r"^group 1: lr=1e\+39 is not finite")):
        with pytest.raises(ValueError, match=said):
            optimizer.lr = [0.1, rate]
        with pytest.raises(ValueError, match=said):
            optimizer.groups[1]["lr"] = rate
    assert optimizer.lr == 0.01
    alone = fastrms.RMSProp(np.ones(3, np.float32), lr=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"^lr\(0\)=-1.0 must be"):
        alone.step(np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"^lr=-1.0 must be"):
        alone.lr = -1


def test_a_rate_that_is_too_large_is_named():
    """Adam divides its rate at the first step by 1 - beta1: what overflows is a coefficient."""
    with pytest.raises(ValueError, match=r"^lr=1e\+38 is too large: the coefficient step_size"):
        fastrms.Adam(np.ones(3, np.float32), lr=1e38)


@pytest.mark.parametrize("schedule", [Cosine, Step, Plateau])
def test_the_class_of_a_schedule_is_no_schedule(schedule):
    said = rf"lr={schedule.__name__} is a class.*lr={schedule.__name__}\(\.\.\.\)"
    with pytest.raises(TypeError, match=said):
        fastrms.RMSProp(np.ones(3, np.float32), lr=schedule)
    optimizer = fastrms.RMSProp(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=said):
        optimizer.lr = schedule
    assert optimizer.lr == 0.01
