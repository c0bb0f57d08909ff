"""The numbers that PyTorch, Keras, TensorFlow, Optax and MindSpore publish in their own tests, and that each
hyper-parameter is noticed: changed alone, it makes a comparison fail that passed before.

golden.json: entries with the source of the numbers (repository, path, test, commit) and the source's tolerance.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import CLASSES, FAMILIES

import fastrms

ENTRIES = {entry["id"]: entry for entry in json.loads((Path(__file__).parent / "golden.json").read_text())}
TRAP = "seed_003/rmsprop_trace_TRAP"
USABLE = [name for name, entry in ENTRIES.items() if not entry.get("do_not_use_as_golden")]
BACKENDS = [name for name in fastrms.available_backends() if name != "cuda"]

# Losses of MindSpore's RProp that are near 0, where float32 itself leaves fewer digits (the entries' notes).
NEAR_ZERO_LOSSES = {"17": {"float32": 5e-5, "float64": 3e-4}, "18": {"float32": 5e-5, "float64": 3e-4}}


# golden.json's words and ours


def ours(given):
    """Our hyper-parameters for an entry's; a word that is not known here is an error, not ignored."""
    given = dict(given)
    names = {"eps_inside": "eps_root", "eps_outside": "eps", "v0": "initial_value", "lr_in_buffer": "lr_in_momentum"}
    hyper = {ours: given.pop(theirs) for theirs, ours in names.items() if theirs in given}
    if "wd_mode" in given:
        hyper["decoupled"] = {"l2": False, "decoupled_before": True}[given.pop("wd_mode")]
    if "bias_correction" in given:
        hyper["bias_correction"] = {"fold_lr": "folded", "torch": "corrected"}[given.pop("bias_correction")]
    if "variant" in given:
        hyper["zero_on_flip"] = {"iRprop-": True, "Rprop-": False}[given.pop("variant").split()[0]]
    same = {"lr", "rho", "momentum", "centered", "weight_decay", "lr_decay", "beta1", "beta2", "amsgrad"}
    same |= {"eta_minus", "eta_plus", "step_min", "step_max"}
    assert set(given) <= same, set(given) - same
    return {**hyper, **given}


STATE_NAMES = {"rms": "square_avg", "momentum": "momentum_buffer"}


# gradients


def product(a, b):
    """a @ b, summed in order: BLAS would round float32 differently on another machine."""
    return (a[:, :, None] * b).sum(axis=1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def joined(inputs, hidden, d_hidden, d_output):
    """The gradient of a two-layer net in the order weights, biases, weights, biases."""
    first, second = product(d_hidden.T, inputs), product(d_output.T, hidden)
    return np.concatenate([first.ravel(), d_hidden.sum(0), second.ravel(), d_output.sum(0)])


def sigmoid_mlp(p, step):
    """PyTorch's baseline: 2-3-1 sigmoids, the loss is the sum of the outputs."""
    inputs = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], p.dtype)
    first, bias, second, last = np.split(p, [6, 9, 12])
    hidden = sigmoid(product(inputs, first.reshape(3, 2).T) + bias)
    output = sigmoid(product(hidden, second.reshape(1, 3).T) + last)
    d_output = output * (1 - output)
    d_hidden = product(d_output, second.reshape(1, 3)) * hidden * (1 - hidden)
    return joined(inputs, hidden, d_hidden, d_output), output.sum()


def relu_mlp(p, step):
    """MindSpore's RProp test: 8-4-1, inputs i, target i + 1, summed squared error."""
    inputs, target = np.full((2, 8), step - 1, p.dtype), np.full((2, 1), step, p.dtype)
    first, bias, second, last = np.split(p, [32, 36, 40])
    before = product(inputs, first.reshape(4, 8).T) + bias
    hidden = np.maximum(before, 0)
    error = product(hidden, second.reshape(1, 4).T) + last - target
    d_output = 2 * error
    d_hidden = product(d_output, second.reshape(1, 4)) * (before > 0)
    return joined(inputs, hidden, d_hidden, d_output), (error**2).sum()


def quadratic(p, step):
    return 2 * p, (p**2).sum()


GENERATORS = {"sigmoid_mlp_2_3_1_sum": sigmoid_mlp, "relu_mlp_8_4_1_mse_sum": relu_mlp, "quadratic": quadratic}


def gradient_of(entry):
    """function(p, step) -> (gradient, loss at p)."""
    grads = entry["grads"]
    if isinstance(grads, dict):
        return GENERATORS[grads["generator"]]
    return lambda p, step: (np.array(grads[step - 1], p.dtype), np.nan)


# runs


def run(entry, backend, dtype, **changed):
    """What the entry says something about, at each step it names: {step: {"expected": ..., state name: ...}}."""
    param = np.array(entry["p0"], dtype)
    maker = getattr(fastrms, changed.pop("optimizer", FAMILIES[entry["optimizer"]].__name__))
    optimizer = maker(param, backend=backend, **{**ours(entry["hyperparameters"]), **changed})
    gradient, what = gradient_of(entry), entry.get("expected_is", "parameters")
    found = {}
    for step in range(1, entry["steps"] + 1):
        grad, loss = gradient(param, step)
        optimizer.step(grad)
        if str(step) in entry["expected"]:
            after = gradient(param, step)[1]
            value = loss if "BEFORE" in what else after if "AFTER" in what else param.copy()
            state = {theirs: optimizer.state[STATE_NAMES[theirs]].copy() for theirs in entry.get("expected_state", {})}
            found[str(step)] = {"expected": value, **state}
    return found


def tolerance(entry, step, dtype):
    stated = entry.get("suggested_tolerance_with_recovered_p0") or entry["tolerance"]
    if entry["optimizer"] == "rprop" and step in NEAR_ZERO_LOSSES:
        return {**stated, "rtol": NEAR_ZERO_LOSSES[step][dtype]}
    return stated


def misses(entry, found, dtype):
    """The places where a run misses the published numbers, and by how much."""
    missed = []
    for what, published in {"expected": entry["expected"], **entry.get("expected_state", {})}.items():
        for step, value in published.items():
            within = np.allclose(found[step][what], value, **tolerance(entry, step, dtype))
            if not within:
                missed.append((what, step, np.abs(found[step][what] - np.array(value)).max()))
    return missed


def dtypes(entry):
    return [dtype for dtype in entry["dtype"].split("/") if dtype != "float16"]


RUNS = [
    pytest.param(name, dtype, backend, id=f"{name}-{dtype}-{backend}")
    for name in USABLE
    for dtype in dtypes(ENTRIES[name])
    for backend in BACKENDS
]


@cache
def unchanged(name, dtype, backend):
    return run(ENTRIES[name], backend, dtype)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_published_numbers(name, dtype, backend):
    assert misses(ENTRIES[name], unchanged(name, dtype, backend), dtype) == []


def test_all_entries_ran():
    """No entry, and no number of one, is left out in silence."""
    ran = {name for name in USABLE for backend in BACKENDS if unchanged(name, dtypes(ENTRIES[name])[0], backend)}
    numbers = sum(np.size(value) for name in ran for value in ENTRIES[name]["expected"].values())
    print(f"{len(ran)} golden entries ran, {len(RUNS)} runs, {numbers} published numbers")
    assert len(ENTRIES) == 33
    assert len(ran) == 32
    assert numbers == 1735
    assert sum("expected_state" in entry for entry in ENTRIES.values()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_is_not_golden(backend):
    """The article's printed trace comes from a bug in its code: both coordinates start from y.  Its notes say what is
    right."""
    entry = {**ENTRIES[TRAP], "steps": 2, "expected": {"1": None, "2": None}}
    found = run(entry, backend, "float64")
    assert np.allclose(found["1"]["expected"], (-0.06595602, 0.34064900), rtol=0, atol=5e-9)
    assert np.allclose(found["2"]["expected"], (-0.02886236, 0.27929536), rtol=0, atol=5e-9)
    printed = ENTRIES[TRAP]["expected"]
    for step in "12":
        assert np.isclose(found[step]["expected"][1], printed[step][1], rtol=0, atol=1e-7)
    assert abs(found["1"]["expected"][0] - printed["1"][0]) > 0.5


# Every hyper-parameter is noticed.  A row: hyper-parameter -> (what notices it, the value it is changed to).  What
# notices is a golden entry, or, where no published number covers it, the settings of a run against the oracle.
TORCH = "pytorch_cpp_baseline/"


def late(done):
    return 0.01 if done < 10 else 0.001


NOTICED = {
    "RMSProp": {
        "lr": (TORCH + "RMSprop", 0.1001),
        "rho": (TORCH + "RMSprop", 0.9901),
        "eps": (TORCH + "RMSprop", 2e-8),
        "eps_root": ("tf1/rmsprop/with_momentum", 2e-5),
        "momentum": (TORCH + "RMSprop_with_weight_decay_and_centered_and_momentum", 0.9001),
        "nesterov": ({"momentum": 0.9, "nesterov": True}, False),
        "centered": (TORCH + "RMSprop_with_weight_decay_and_centered", False),
        "weight_decay": (TORCH + "RMSprop_with_weight_decay", 0.01001),
        "decoupled": (TORCH + "RMSprop_with_weight_decay", True),
        "maximize": (TORCH + "RMSprop", True),
        "clip_value": ({"clip_value": 0.5}, 0.5001),
        "initial_value": ("tf1/rmsprop/without_momentum", 1.0001),
        "lr_in_momentum": ({"momentum": 0.9, "lr": late, "lr_in_momentum": True}, False),
        "bias_correction": ({"bias_correction": "corrected", "eps": 0.1}, "folded"),
    },
    "AdaGrad": {
        "lr": (TORCH + "Adagrad", 1.0001),
        "eps": (TORCH + "Adagrad", 2e-7),
        "eps_root": ("keras3/adagrad", 0.01),
        "lr_decay": (TORCH + "Adagrad_with_weight_decay_and_lr_decay", 0.001001),
        "initial_value": ("tf1/adagrad/basic", 0.1001),
        "weight_decay": (TORCH + "Adagrad_with_weight_decay", 0.01001),
        "decoupled": (TORCH + "Adagrad_with_weight_decay", True),
        "maximize": (TORCH + "Adagrad", True),
        "clip_value": ({"clip_value": 0.5}, 0.5001),
    },
    "Adam": {
        "lr": (TORCH + "Adam", 1.0001),
        "beta1": (TORCH + "Adam", 0.9001),
        "beta2": (TORCH + "Adam", 0.99901),
        "eps": (TORCH + "Adam", 2e-8),
        "eps_root": ({"eps_root": 1e-3}, 1.001e-3),
        "amsgrad": (TORCH + "Adam_with_weight_decay_and_amsgrad", False),
        "nesterov": ({"nesterov": "dozat"}, "folded"),
        "bias_correction": (TORCH + "Adam", "corrected"),
        "weight_decay": (TORCH + "Adam_with_weight_decay", 0.01001),
        "decoupled": (TORCH + "Adam_with_weight_decay", True),
        "maximize": (TORCH + "Adam", True),
        "clip_value": ({"clip_value": 0.5}, 0.5001),
    },
    "RProp": {
        "lr": ("mindspore/loss_default_rprop", 0.0101),
        "eta_minus": ("mindspore/loss_default_rprop", 0.501),
        "eta_plus": ("mindspore/loss_default_rprop", 1.201),
        "step_min": ("mindspore/loss_not_default_rprop", 2e-3),
        "step_max": ({"step_max": 0.02}, 0.0201),
        "zero_on_flip": ("mindspore/loss_default_rprop", False),
        "maximize": ("mindspore/loss_default_rprop", True),
        "clip_value": ({"clip_value": 0.5, "zero_on_flip": False, "lr": 0.1}, 0.5001),
    },
}
NOTICED["AdamW"] = {**NOTICED["Adam"], "decoupled": ("keras3/adamw", False), "weight_decay": ("keras3/adamw", 0.6)}
ROWS = [(name, parameter) for name, rows in NOTICED.items() for parameter in rows]
ORACLE_ULPS = 64


def passes_golden(name, entry_name, **changed):
    entry = ENTRIES[entry_name]
    dtype = dtypes(entry)[-1]
    return misses(entry, run(entry, BACKENDS[0], dtype, optimizer=name, **changed), dtype) == []


def passes_oracle(name, hyper, **changed):
    """20 steps in float64; the oracle has the settings, ours has them with the change."""
    random = np.random.default_rng(7)
    param = random.normal(size=40)
    judge = oracle.ORACLES[name](param, np.longdouble, **hyper)
    optimizer = getattr(fastrms, name)(param, backend=BACKENDS[0], **{**hyper, **changed})
    for _ in range(20):
        grad = random.normal(size=40) + 0.25
        judge.step(grad)
        optimizer.step(grad)
    pairs = [(param, judge.theta), *((optimizer.state[key], value) for key, value in judge.state().items())]
    return all((np.abs(a - b) <= ORACLE_ULPS * np.spacing(np.abs(a).max())).all() for a, b in pairs)


@pytest.mark.parametrize(("name", "parameter"), ROWS)
def test_every_hyper_parameter_is_noticed(name, parameter):
    witness, value = NOTICED[name][parameter]
    passes = passes_golden if isinstance(witness, str) else passes_oracle
    assert passes(name, witness), "the unchanged comparison must pass"
    assert not passes(name, witness, **{parameter: value}), f"nothing noticed {parameter}={value!r}"


@pytest.mark.parametrize("name", [make.__name__ for make in CLASSES])
def test_no_hyper_parameter_is_forgotten(name):
    assert set(NOTICED[name]) == set(getattr(fastrms, name).defaults)


def test_table_of_witnesses():
    """pytest -s prints which comparison notices which hyper-parameter; most of each class are published numbers."""
    for name, rows in NOTICED.items():
        for parameter, (witness, value) in rows.items():
            by = witness if isinstance(witness, str) else f"the oracle with {witness}"
            print(f"{name:8} {parameter:16} -> {value!s:10} noticed by {by}")
        assert sum(isinstance(witness, str) for witness, _ in rows.values()) > len(rows) / 2, name
