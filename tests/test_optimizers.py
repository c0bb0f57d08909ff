"""The optimizers as objects: structures, groups, schedules, binding, state, dialects, report."""

import copy
import json
import pickle
import threading

import numpy as np
import pytest
from conftest import CLASSES, FUNCTIONS, bits, c

import fastrms
from fastrms import dialects


def arrays(count=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((k + 1, 3)).astype(dtype) for k in range(count)]


@pytest.mark.parametrize("make", CLASSES)
def test_every_structure_gives_the_same_step(make, backend):
    params, grads = arrays(), arrays()[::-1]
    grads = [
        g.reshape(-1)[: p.size].reshape(p.shape) if g.size >= p.size else np.resize(g, p.shape)
        for g, p in zip(grads, params, strict=True)
    ]
    want = [p.copy() for p in params]
    for w, g in zip(want, grads, strict=True):
        make(w, backend=backend).step(g)

    def check(build, gradients):
        mine = [p.copy() for p in params]
        optimizer = make(build(mine), backend=backend)
        for bound in (False, True):
            if bound:
                for p, m in zip(params, mine, strict=True):
                    m[...] = p
                optimizer.load_state_dict(make(build(mine), backend=backend).state_dict())
                optimizer.bind(gradients)
            optimizer.step() if bound else optimizer.step(gradients)
            assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(mine, want, strict=True))
        return optimizer

    keys = ["w", "b", 3]
    check(lambda m: m, grads)
    check(tuple, tuple(grads))
    check(lambda m: iter(m), grads)
    check(lambda m: dict(zip(keys, m, strict=True)).values(), grads)
    mapping = check(lambda m: dict(zip(keys, m, strict=True)), dict(zip(reversed(keys), reversed(grads), strict=True)))
    groups = check(lambda m: [{"params": m[0]}, {"params": m[1:]}], [grads[0], grads[1:]])
    nested = check(lambda m: [{"params": {"a": m[0]}}, {"params": m[1:]}], [{"a": grads[0]}, grads[1:]])
    name = next(iter(mapping.state))
    assert list(mapping.state[name]) == keys
    assert groups.state[name][0].shape == params[0].shape and len(groups.state[name][1]) == 2
    assert nested.state[name][0]["a"].shape == params[0].shape


def test_structures_that_do_not_match(backend):
    w, b = arrays(2)
    mapped = fastrms.Adam({"w": w, "b": b}, backend=backend)
    for grads, error, words in [
        ({"w": w + 1}, ValueError, "grads has no 'b'"),
        ({"w": w + 1, "b": b + 1, "c": b + 2}, ValueError, "grads has 'c'"),
        ([w + 1, b + 1], TypeError, "mapping"),
        (w + 1, TypeError, "mapping"),
    ]:
        with pytest.raises(error, match=words):
            mapped.step(grads)
    listed = fastrms.Adam([w, b], backend=backend)
    for grads, error, words in [
        ([w + 1], ValueError, "1 entries"),
        ({"w": w}, TypeError, "sequence|plain|must be"),
        (w + 1, TypeError, "sequence"),
    ]:
        with pytest.raises(error, match=words):
            listed.step(grads)
    grouped = fastrms.Adam([{"params": w}, {"params": [b]}], backend=backend)
    with pytest.raises(ValueError, match="one entry for each of the 2 groups"):
        grouped.step([w + 1])
    single = fastrms.Adam(w, backend=backend)
    for grads, words in [
        ([w + 1], r"^grads is a list; it must be one array, as params is: pass grads\[0\]$"),
        ({"w": w + 1}, r"^grads is a dict; it must be one array, as params is: pass grads\['w'\]$"),
        ((w + 1, b + 1), "^grads is a tuple; it must be one array, as params is$"),
        ([1.0, 2.0], r"np\.array\(grads"),
    ]:
        with pytest.raises(TypeError, match=words):
            single.step(grads)
    with pytest.raises(TypeError, match=r"^grads\[0\] is a list; it must be one array.*: pass grads\[0\]\[0\]$"):
        grouped.step([[w + 1], [b + 1]])
    for empty in ([], {}, (), [{"params": []}]):
        with pytest.raises(ValueError, match="empty"):
            fastrms.Adam(empty, backend=backend)
    assert mapped.steps == listed.steps == grouped.steps == single.steps == 0


def test_none_skips_a_tensor_and_its_count(backend):
    params = arrays()
    kept = params[1].copy()
    optimizer = fastrms.Adam(params, backend=backend)
    optimizer.step([params[0] * 2, None, params[2] * 2])
    optimizer.step([None, None, None])
    assert np.array_equal(params[1], kept)
    assert optimizer.tensor_steps == [1, 0, 1] and optimizer.steps == 2
    optimizer.bind([None, params[1] * 2, None])
    optimizer.step()
    first = kept - np.float32(1e-3) * np.sign(kept)  # Adam's first step is lr*sign(g), however late it comes
    assert np.allclose(params[1], first, atol=1e-6)
    assert optimizer.tensor_steps == [1, 1, 1]


def test_groups_have_their_own_hyper_parameters(backend):
    params = arrays(2)
    want = [p.copy() for p in params]
    optimizer = fastrms.RMSProp(
        [{"params": params[0], "momentum": 0.9, "lr": 0.1}, {"params": [params[1]], "rho": 0.5}],
        lr=0.2,
        backend=backend,
    )
    optimizer.step([want[0] * 1, [want[1] * 1]])
    assert [g["lr"] for g in optimizer.groups] == [0.1, 0.2] == optimizer.lr
    assert optimizer.state["momentum_buffer"][0].shape == want[0].shape and optimizer.state["momentum_buffer"][1] == [None]
    g = [w.copy() for w in want]
    fastrms.RMSProp(want[0], momentum=0.9, lr=0.1, backend=backend).step(g[0])
    fastrms.RMSProp(want[1], rho=0.5, lr=0.2, backend=backend).step(g[1])
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(params, want, strict=True))
    with pytest.raises(TypeError, match="'beta1'"):
        fastrms.RMSProp([{"params": params[0], "beta1": 0.9}], backend=backend)


@pytest.mark.parametrize("how", ["lr", "group", "callable", "rebuilt"])
def test_lr_changes_take_effect_at_the_next_step(backend, how):
    rates = [0.1, 0.01, 0.3, 0.05]
    w, g = np.ones(7, np.float32), np.linspace(1, 2, 7, dtype=np.float32)
    want = w.copy()
    state = fastrms.init_state("rmsprop", want, momentum=0.9)
    for rate in rates:
        fastrms.rmsprop(want, g, **state, momentum=0.9, lr=rate, backend=backend)
    calls = []

    def schedule(step):
        calls.append(step)
        return rates[step]

    optimizer = fastrms.RMSProp(w, momentum=0.9, lr=schedule if how == "callable" else 1.0, backend=backend)
    optimizer.bind(g)
    for rate in rates:
        if how == "lr":
            optimizer.lr = rate
        elif how == "group":
            optimizer.groups[0]["lr"] = rate
        elif how == "rebuilt":
            saved = optimizer.state_dict()
            optimizer = fastrms.RMSProp(w, momentum=0.9, lr=rate, backend=backend)
            saved["groups"][0]["lr"] = rate
            optimizer.load_state_dict(saved)
            optimizer.bind(g)
        optimizer.step()
    assert np.array_equal(bits(w), bits(want))
    assert how != "callable" or (calls == [0, 1, 2, 3] and optimizer.lr is schedule)


def test_changing_what_decides_the_state_is_refused(backend):
    w = np.ones(3, np.float32)
    for make, name, value in [
        (fastrms.RMSProp, "momentum", 0.9), (fastrms.RMSProp, "centered", True), (fastrms.Adam, "amsgrad", True),
        (fastrms.RMSProp, "initial_value", 1.0), (fastrms.RProp, "lr", 0.5),
    ]:  # fmt: skip
        optimizer = make(w, backend=backend)
        before = dict(optimizer.groups[0])
        with pytest.raises(ValueError, match=name):
            optimizer.groups[0][name] = value
        assert dict(optimizer.groups[0]) == before
    with pytest.raises(ValueError, match="lr"):
        fastrms.RProp(w, backend=backend).lr = 0.5
    with pytest.raises(KeyError, match="rho"):
        fastrms.Adam(w, backend=backend).groups[0]["rho"] = 0.5
    with pytest.raises(TypeError, match="lr"):
        fastrms.RProp(w, lr=lambda step: 0.1, backend=backend)


@pytest.mark.parametrize("make", CLASSES)
def test_state_dict_travels(make, backend):
    """By pickle and by JSON; a dict that does not fit is refused and changes nothing."""
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4)}
    grads = {"w": np.full((2, 3), 0.5, np.float32), "b": np.arange(4.0)}
    optimizer = make(params, backend=backend)
    optimizer.step(grads)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    json.dumps({key: value for key, value in saved.items() if key != "tensors"})
    other = make({k: v.copy() for k, v in params.items()}, backend=backend)
    other.load_state_dict(saved)
    assert other.steps == 1 and [dict(g) for g in other.groups] == [dict(g) for g in optimizer.groups]
    before = pickle.dumps(other.state_dict())

    def damaged(change):
        d = pickle.loads(pickle.dumps(saved))
        change(d)
        return d

    first = next(iter(saved["tensors"][0]["state"]))
    for words, change in [
        ("of Other", lambda d: d.update(optimizer="Other")),
        ("2 groups", lambda d: d["groups"].append(d["groups"][0])),
        ("1 tensors", lambda d: d["tensors"].pop()),
        ("steps=-1", lambda d: d.update(steps=-1)),
        ("steps=1.5", lambda d: d["tensors"][1].update(steps=1.5)),
        ("2..62", lambda d: d["tensors"][0].update(steps=2**63)),
        ("has no params", lambda d: d["tensors"][0].update(name="params['v']")),
        ("dialect", lambda d: d.update(dialect="jax")),
        ("not a state_dict", lambda d: d["tensors"][0].update(state=[])),
        ("lr", lambda d: d["groups"][0].update(lr=10**400)),
        ("lr", lambda d: d["groups"][0].update(lr=-1.0)),
        ("'speed'", lambda d: d["groups"][0].update(speed=1)),
        ("must be an ndarray", lambda d: d["tensors"][0]["state"].update({first: np.zeros(6, np.float32)})),
        ("must be an ndarray", lambda d: d["tensors"][1]["state"].update({first: np.zeros(4, np.float32)})),
        ("must be an ndarray", lambda d: d["tensors"][1]["state"].update({first: [0.0] * 4})),
        ("has state", lambda d: d["tensors"][1]["state"].pop(first)),
        ("not a state_dict", lambda d: d.pop("tensors")),
    ]:
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(damaged(change))
        assert pickle.dumps(other.state_dict()) == before
    with pytest.raises(ValueError, match="state_dict"):
        other.load_state_dict([])
    if make is fastrms.RMSProp:
        with pytest.raises(ValueError, match="rmsprop_momentum"):
            make(params, momentum=0.9, backend=backend).load_state_dict(
                damaged(
                    lambda d: [t["state"].update(momentum_buffer=t["state"]["square_avg"]) for t in d["tensors"]] and None
                )
            )
    state = optimizer.state[first]["w"]
    state[...] = 7  # a live view, in the parameter's shape
    assert (optimizer.state[first]["w"] == 7).all()


@pytest.mark.parametrize("make", CLASSES)
def test_a_hyper_parameter_that_was_not_saved_gets_its_default(make):
    """The state may have been saved before there was this hyper-parameter; lr stays as it is."""
    changed = {"maximize": True, "clip_value": 2.0}
    saved = make(np.ones(3), lr=0.5, **changed).state_dict()
    for name in make.defaults:
        other = make(np.ones(3), lr=0.25, **changed)
        other.load_state_dict({**saved, "groups": [{key: x for key, x in saved["groups"][0].items() if key != name}]})
        stays = 0.25 if name == "lr" else make.defaults[name]
        assert dict(other.groups[0]) == {**saved["groups"][0], name: stays}, name


def test_a_callable_lr_is_not_saved_and_stays(backend):
    w = np.ones(3, np.float32)
    schedule = lambda step: 0.1  # noqa: E731
    scheduled, plain = fastrms.RMSProp(w, lr=schedule, backend=backend), fastrms.RMSProp(w.copy(), lr=0.5, backend=backend)
    assert "lr" not in scheduled.state_dict()["groups"][0]
    plain.load_state_dict(scheduled.state_dict())
    assert plain.lr == 0.5
    scheduled.load_state_dict(plain.state_dict())
    assert scheduled.lr is schedule


def test_state_is_matched_by_name_whatever_the_order(backend):
    w, b = np.ones(3, np.float32), np.ones(3, np.float32)
    first = fastrms.Adam({"w": w, "b": b}, backend=backend)
    first.step({"w": w + 1, "b": b + 5})
    other = fastrms.Adam({"b": b.copy(), "w": w.copy()}, backend=backend)
    other.load_state_dict(first.state_dict())
    assert np.array_equal(other.state["exp_avg"]["w"], first.state["exp_avg"]["w"])
    assert not np.array_equal(other.state["exp_avg"]["w"], other.state["exp_avg"]["b"])


def test_a_loaded_dialect_is_reported(backend):
    keras = fastrms.Adam(np.ones(3), dialect="keras", backend=backend)
    torch = fastrms.Adam(np.ones(3), dialect="torch", backend=backend)
    torch.load_state_dict(keras.state_dict())
    assert torch.dialect == "keras" and dict(torch.groups[0]) == dict(keras.groups[0])


def test_a_schedule_that_stands_still_takes_other_changes_over(backend):
    """Its recipe is kept while the rate is the same, and only then."""
    rates = [0.1, 0.1, 0.1, 0.1, 0.2, 0.2]
    made = [fastrms.RMSProp(np.ones(5), lr=lr, backend=backend) for lr in (0.1, lambda step: rates[step])]
    for step, rate in enumerate(rates):
        if step == 2:
            for optimizer in made:
                optimizer.groups[0]["weight_decay"] = 0.5
        if rate != 0.1:
            made[0].lr = rate
        for optimizer in made:
            optimizer.step(np.full(5, 0.5))
    assert np.array_equal(made[0]._tensors[0].param.owner, made[1]._tensors[0].param.owner)


def test_lr_of_all_groups_is_set_or_none(backend):
    """float64 could take the value, float32 cannot: neither group has it then."""
    optimizer = fastrms.RMSProp([{"params": np.ones(3)}, {"params": np.ones(3, np.float32)}], backend=backend)
    with pytest.raises(ValueError, match="lr=1e"):
        optimizer.lr = 1e39
    assert optimizer.lr == 0.01
    optimizer.lr = [0.5, 0.25]
    assert optimizer.lr == [0.5, 0.25]
    with pytest.raises(ValueError, match="3 entries"):
        optimizer.lr = [1.0, 2.0, 3.0]


def test_hyper_parameters_are_not_attributes(backend):
    """Assigning one must not be ignored silently."""
    optimizer = fastrms.RMSProp(np.ones(3), backend=backend)
    with pytest.raises(AttributeError, match=r"opt.groups\[0\]\['rho'\] = 0.5"):
        optimizer.rho = 0.5
    with pytest.raises(TypeError, match="base"):
        fastrms.Optimizer(np.ones(3))


def test_copies_are_refused_with_the_way_to_go(backend):
    optimizer = fastrms.RMSProp(np.ones(3), backend=backend)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load its state_dict"):
            way(optimizer)


def test_a_schedule_is_asked_once_per_step_and_dtype(backend):
    """Never for a report, a change of something else, or beyond its end."""
    rates, asked = [0.1, 0.2, 0.3], []
    optimizer = fastrms.RMSProp(np.ones(3), lr=lambda step: asked.append(step) or rates[step], backend=backend)
    assert asked == []
    for _ in range(3):
        optimizer.step(np.ones(3))
    optimizer.report()
    optimizer.groups[0]["eps"] = 1e-6
    optimizer.load_state_dict(optimizer.state_dict())
    assert asked == [0, 1, 2]


def test_gradients_that_only_the_step_holds(backend):
    """Generators, lazy mappings and temporaries live until the step is done."""
    size = 1 << 18
    params = [np.zeros(size, np.float32) for _ in range(3)]
    fastrms.RMSProp(params, lr=1.0, rho=0.0, backend=backend).step(np.full(size, k, np.float32) for k in (1, 2, 3))
    assert all(np.allclose(p, -1) for p in params)

    class Lazy(dict):
        def __getitem__(self, key):
            return np.full(size, 2, np.float32)

    w = np.zeros(size, np.float32)
    fastrms.RMSProp({"w": w}, lr=1.0, rho=0.0, backend=backend).step(Lazy(w=None))
    assert np.allclose(w, -1)


def test_functions_tell_values_of_one_kind_from_another():
    """np.float32(0.1) == 0.1 and True == 1: what was used last must not be taken for them."""
    g, total = np.ones(4), np.zeros(4)
    fastrms.adagrad(np.zeros(4), g, np.zeros(4), lr=np.float32(0.1))
    w = np.zeros(4)
    fastrms.adagrad(w, g, np.zeros(4), lr=0.1)
    assert w[0] == -0.1 / (1 + 1e-10)
    rate = np.array(0.1)
    for value in (0.1, 10.0):
        rate[...] = value
        w = np.zeros(4)
        fastrms.adagrad(w, g, np.zeros(4), lr=rate)
        assert w[0] == -value / (1 + 1e-10)
    fastrms.adagrad(w, g, total, lr=1)
    with pytest.raises(TypeError, match="lr=True"):
        fastrms.adagrad(w, g, total, lr=True)


@pytest.mark.parametrize("name, options", [
    ("rmsprop", {}), ("rmsprop", {"momentum": 0.9, "nesterov": True}), ("rmsprop", {"centered": True}),
    ("rmsprop", {"momentum": 0.5, "centered": True, "bias_correction": "corrected", "dialect": "optax"}),
    ("rmsprop", {"dialect": "tf1", "momentum": 0.9}), ("adagrad", {"lr_decay": 0.1}), ("adagrad", {"dialect": "keras"}),
    ("adam", {}), ("adam", {"amsgrad": True, "weight_decay": 0.1}), ("adam", {"dialect": "optax", "amsgrad": True}),
    ("rprop", {}), ("rprop", {"zero_on_flip": False, "maximize": True}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_and_optimizers_are_the_same_steps(name, options, dtype, backend):
    make = FUNCTIONS[name]
    function = getattr(fastrms, name)
    rng = np.random.default_rng(8)
    start = rng.standard_normal((3, 7)).astype(dtype)
    a, b = start.copy(), start.copy()
    optimizer = make(a, backend=backend, **options)
    state = fastrms.init_state(name, b, **options)
    assert list(state) == list(optimizer.state)
    rest = {key: value for key, value in options.items() if key != "centered"}
    needs_step = name in ("adam", "adagrad") or "bias_correction" in options
    for step in range(1, 12):
        grad = rng.standard_normal((3, 7)).astype(dtype)
        optimizer.step(grad, grad_scale=0.5)
        assert (
            function(b, grad, **state, backend=backend, grad_scale=0.5, **rest, **({"step": step} if needs_step else {}))
            is None
        )
        assert np.array_equal(bits(a), bits(b))
    assert all(np.array_equal(bits(state[k]), bits(optimizer.state[k])) for k in state)


def test_functions_refuse_state_that_does_not_fit(backend):
    w, g, v, b = (np.ones(5, np.float32) for _ in range(4))
    for arguments, options, words in [
        ((w, g, v), {"momentum": 0.9}, "rmsprop_momentum"),
        ((w, g, v), {"centered": True}, "centered=True"),
        ((w, g, v), {"bias_correction": "corrected"}, "step"),
        ((w, g, v), {"lr": lambda step: 0.1}, "schedule"),
        ((w, g, v), {"momentum_buffer": b}, "momentum_buffer"),
        ((w, g, v), {"dialect": "jax"}, "dialect"),
        ((w, g, v), {"lr": np.array([0.1, 0.2])}, "lr"),
        ((w, g, v), {"speed": 1}, "'speed'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            fastrms.rmsprop(*arguments, backend=backend, **options)
    with pytest.raises(ValueError, match="adam_amsgrad"):
        fastrms.adam(w, g, v, b, step=1, amsgrad=True, backend=backend)
    with pytest.raises(ValueError, match="'adamw'"):
        fastrms.init_state("adamw", w)
    assert (w == 1).all() and (v == 1).all() and (b == 1).all()
    fastrms.rmsprop(w, g, v, lr=np.array(0.1), backend=backend)  # a 0-d array is a number


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("dialect", dialects.DIALECTS)
def test_a_dialect_is_a_set_of_explicit_parameters(make, dialect, backend):
    preset = dialects.DIALECTS[dialect].get(make.__name__)
    w = np.ones(4, np.float32)
    if preset is None:
        with pytest.raises(ValueError, match=f"{dialect!r} has no {make.__name__}"):
            make(w, dialect=dialect, backend=backend)
        return
    assert preset.keys() <= make.defaults.keys()
    said, spelled = make(w, dialect=dialect, backend=backend), make(w.copy(), backend=backend, **preset)
    assert dict(said.groups[0]) == dict(spelled.groups[0])
    explicit = make(w.copy(), dialect=dialect, lr=0.123, backend=backend)
    assert explicit.lr == 0.123


def test_optax_amsgrad_is_the_corrected_one(backend):
    w = np.ones(4, np.float32)
    assert fastrms.Adam(w, dialect="optax", amsgrad=True, backend=backend).groups[0]["amsgrad"] == "corrected"
    assert fastrms.Adam(w, dialect="torch", amsgrad=True, backend=backend).groups[0]["amsgrad"] is True
    assert fastrms.Adam(w, bias_correction=True, backend=backend).groups[0]["bias_correction"] == "corrected"


def test_maximize_is_the_negated_gradient(backend):
    rng = np.random.default_rng(0)
    for make in CLASSES:
        a, b = np.ones(9, np.float32), np.ones(9, np.float32)
        up, down = make(a, maximize=True, backend=backend), make(b, backend=backend)
        for _ in range(5):
            g = rng.standard_normal(9).astype(np.float32)
            up.step(g)
            down.step(-g)
        assert np.array_equal(bits(a), bits(b))


def test_clip_value_is_the_clipped_gradient(backend):
    rng = np.random.default_rng(0)
    for make in CLASSES:
        a, b = np.ones(9, np.float32), np.ones(9, np.float32)
        clipped, plain = make(a, clip_value=0.5, backend=backend), make(b, backend=backend)
        for _ in range(5):
            g = rng.standard_normal(9).astype(np.float32)
            clipped.step(g, grad_scale=0.5)
            plain.step(np.clip(g * np.float32(0.5), -0.5, 0.5).astype(np.float32))
        assert np.array_equal(bits(a), bits(b))


def test_the_bound_fast_path_is_taken_and_left(backend):
    """No Python between steps while everything stands still; exact again after every change."""
    w, want, g = np.ones(33, np.float32), np.ones(33, np.float32), np.ones(33, np.float32)
    optimizer, reference = fastrms.Adam(w, backend=backend), fastrms.Adam(want, backend=backend)
    slow = []
    checked = optimizer._checked_step
    optimizer._checked_step = lambda *a: slow.append(1) or checked(*a)

    def both(step, grads):
        step()
        reference.step(grads)
        assert np.array_equal(bits(w), bits(want))

    optimizer.bind(g)
    both(optimizer.step, g)
    both(lambda: optimizer.step(g), g)
    assert not slow
    both(lambda: optimizer.step(g, grad_scale=1.0), g)
    other = np.full(33, 2, np.float32)
    both(lambda: optimizer.step(other), other)
    both(optimizer.step, g)
    assert len(slow) == 3
    both(optimizer.step, g)
    optimizer.lr = reference.lr = 0.5
    both(optimizer.step, g)
    assert len(slow) == 3
    optimizer.lr = lambda step: 0.25
    reference.lr = 0.25
    both(optimizer.step, g)
    both(optimizer.step, g)
    assert len(slow) == 5
    optimizer.lr = 0.125
    reference.lr = 0.125
    both(optimizer.step, g)
    both(optimizer.step, g)
    assert len(slow) <= 6


def test_report_says_what_runs(backend):
    optimizer = fastrms.RMSProp(
        {"w": np.ones(5, np.float32), "b": np.ones(3)}, momentum=0.9, clip_value=1.0, dialect="keras", backend=backend
    )
    text = optimizer.report()
    for words in (backend, "keras", "rmsprop_momentum", "general", "float32", "float64", "28 bytes", "56 bytes"):
        assert words in text


def test_report_names_the_kernel_and_explains_its_form(backend):
    for options, form in (({}, "neutral"), ({"eps_root": 1e-8}, "general")):
        text = fastrms.RMSProp(np.ones(5, np.float32), backend=backend, **options).report()
        by = f" by {c.isa_of('rmsprop', 'float32', form == 'general')}" if backend == "c" else ""
        assert f"rule rmsprop, {form} form{by}, float32" in text
        assert "general form of a rule also computes clip_value" in text and ("not available" in text) == (not c.lib)


def test_a_rate_that_has_changed_is_not_in_the_way_of_a_report():
    optimizer = fastrms.Adam(np.ones(3), weight_decay=0.1)
    optimizer.lr = 0.5
    assert "rule adam, general form" in optimizer.report()
    optimizer.groups[0]["weight_decay"] = 0.0
    assert "rule adam, neutral form" in optimizer.report()


def test_zero_dimensional_and_empty(backend):
    scalar, empty = np.array(2.0), np.empty((0, 3), np.float32)
    optimizer = fastrms.Adam([scalar, empty], lr=0.5, backend=backend)
    info = optimizer.step([np.array(1.0), np.empty((0, 3), np.float32)], clip_norm=10.0)
    assert scalar == pytest.approx(1.5) and info == (True, 1.0, None) and optimizer.tensor_steps == [1, 1]
    assert optimizer.state["exp_avg"][0].shape == () and optimizer.state["exp_avg"][1].shape == (0, 3)


def test_environment_chooses_the_backend(monkeypatch):
    w = np.ones(3, np.float32)
    monkeypatch.setenv("FASTRMS_BACKEND", "numpy")
    assert fastrms.Adam(w).backend == "numpy"
    monkeypatch.setenv("FASTRMS_BACKEND", "fortran")
    with pytest.raises(ValueError, match="FASTRMS_BACKEND='fortran'"):
        fastrms.Adam(w)
    assert fastrms.Adam(w, backend="numpy").backend == "numpy"


def test_signatures_and_docstrings_show_every_hyper_parameter():
    import inspect

    for make in CLASSES:
        parameters = inspect.signature(make).parameters
        common = {"state", "groups", "dialect", "nonfinite", "zero_grad", "shards", "backend", "stream", "capturable"}
        common |= {"check", "state_format", "master", "rounding", "param_copy", "seed"}
        assert parameters.keys() == {"params", *make.defaults, *common}
        family = make.__mro__[1] if make is fastrms.AdamW else make
        text = family.__doc__ + fastrms.RMSProp.__doc__
        assert all(name in text for name in parameters)
    for name in ("rmsprop", "adagrad", "adam", "rprop"):
        assert "eta_minus" in inspect.signature(fastrms.rprop).parameters
        assert getattr(fastrms, name).__doc__.count("Raises") == 1


def test_another_thread_between_a_step_and_its_notes_is_refused(backend, monkeypatch):
    """And what is noted afterwards is what the plan holds: the next step uses the gradients that it was given."""
    w = np.zeros(4, np.float32)
    optimizer = fastrms.RMSProp(w, lr=1.0, rho=0.0, backend=backend)
    up, down = np.ones(4, np.float32), -np.ones(4, np.float32)
    optimizer.step(up.copy())
    optimizer.step(up)
    change, refused = optimizer._change_plan, []

    def other():
        for _ in range(2):
            try:
                optimizer.step(down)
            except RuntimeError as error:
                refused.append(str(error))

    def interrupted(*arguments, **keywords):
        found = change(*arguments, **keywords)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found

    monkeypatch.setitem(vars(optimizer), "_change_plan", interrupted)
    optimizer.step(up)
    monkeypatch.undo()
    before = w.copy()
    optimizer.step(up)
    assert (w < before).all() and len(refused) == 2 and "in use by another thread" in refused[0]


def test_the_gradients_that_a_step_means_are_those_it_uses(backend):
    """The fast path names what it means: where the plan has come to hold others, the backend refuses."""
    w = np.zeros(4, np.float32)
    optimizer = fastrms.RMSProp(w, lr=1.0, rho=0.0, backend=backend)
    up, down = np.ones(4, np.float32), -np.ones(4, np.float32)
    for grad in (up, up, up):
        optimizer.step(grad)
    meant = optimizer._same_grads
    for grad in (down, down, down):
        optimizer.step(grad)
    before = w.copy()
    optimizer._same_grads = meant  # as another thread read it, before
    optimizer.step(up)
    assert (w < before).all()
