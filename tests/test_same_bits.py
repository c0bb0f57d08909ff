"""Promise 1: one result, to the last bit, for every backend, instruction set, form, length, offset and tail."""

import platform
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, DTYPES, Guarded, backends, bits, c, raw_recipe

import fastrms
from fastrms import rules
from fastrms.self_check import wild_buffers

LENGTHS = [*range(131), 255, 257, 1003, 4099]
LONGEST = max(LENGTHS)
ON_LINUX = (platform.system(), platform.machine()) == ("Linux", "x86_64")
CASES = [
    pytest.param(rule, general, dtype, id=f"{rule}-{'general' if general else 'neutral'}-{dtype}")
    for rule in rules.RULES
    for general in (False, True)
    for dtype in DTYPES
]


def scalar_reference(recipe, buffers):
    """The rule of rules.py as it stands there, element by element in Python on NumPy scalars."""
    rule = rules.compile_rule(rules.RULES[recipe.rule], recipe.general)
    coefficients = [recipe.dtype.type(value) for value in recipe.at(1, 1.0)]
    with np.errstate(all="ignore"):
        rows = [rule(*numbers, *coefficients) for numbers in zip(*buffers, strict=True)]
    return [np.array(column, recipe.dtype) for column in zip(*rows, strict=True)]


@pytest.mark.skipif(c.lib is None or not ON_LINUX, reason="no C extension, or another system or CPU than x86-64 Linux")
def test_no_tier_of_this_cpu_is_missing():
    """A compiler's library that says of every CPU that it has no AVX makes slow wheels, and all else passes."""
    features = set(Path("/proc/cpuinfo").read_text().split())
    assert ("avx2" in c.isas()) == ("avx2" in features)
    assert ("avx512" in c.isas()) == ({"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vbmi2", "fma"} <= features)


@pytest.mark.parametrize("rule, general, dtype", CASES)
def test_every_tier_computes_the_scalar_rule(tier, rule, general, dtype):
    recipe = raw_recipe(rule, dtype, general)
    buffers = wild_buffers(rule, dtype, 2003)
    expected = scalar_reference(recipe, buffers)
    param, grad, *states = [b.copy() for b in buffers]
    tier.update(recipe, 1, 1.0, param, grad, states)
    for got, want in zip([param, *states], expected, strict=True):
        assert np.array_equal(bits(got), bits(want))
    assert np.array_equal(bits(grad), bits(buffers[1]))


@pytest.mark.parametrize("rule, general, dtype", CASES)
def test_lengths_offsets_and_tails(tier, rule, general, dtype):
    recipe = raw_recipe(rule, dtype, general)
    buffers = wild_buffers(rule, dtype, LONGEST)
    param, grad, *states = [b.copy() for b in buffers]
    backends.load("numpy").update(recipe, 1, 1.0, param, grad, states)
    expected = [bits(b) for b in (param, *states)]
    for count, size in enumerate(LENGTHS):
        for offset in range(8):
            offsets = [(offset + k * (1 + count % 3)) % 8 for k in range(len(buffers))]
            guarded = [Guarded(b[:size], o) for b, o in zip(buffers, offsets, strict=True)]
            param, grad, *states = [g.array for g in guarded]
            tier.update(recipe, 1, 1.0, param, grad, states)
            for got, want in zip([param, *states], expected, strict=True):
                assert np.array_equal(bits(got), want[:size]), (size, offset)
            assert np.array_equal(bits(grad), bits(buffers[1][:size]))
            assert all(g.intact() for g in guarded), (size, offset)


@pytest.mark.parametrize("rule, general, dtype", CASES)
def test_a_million_values(tier, rule, general, dtype):
    recipe = raw_recipe(rule, dtype, general)
    buffers = wild_buffers(rule, dtype, 1_000_003)
    results = []
    for module in (tier, backends.load("numpy")):
        param, grad, *states = [b.copy() for b in buffers]
        module.update(recipe, 1, 1.0, param, grad, states)
        results.append([param, *states])
    for got, want in zip(*results, strict=True):
        assert np.array_equal(bits(got), bits(want))


@pytest.mark.parametrize("rule, dtype", [(rule, dtype) for rule in rules.RULES for dtype in DTYPES])
def test_both_forms_agree_where_the_general_one_is_neutral(tier, rule, dtype):
    """On finite non-zero values, which is all that is promised for a change of form."""
    recipe = raw_recipe(rule, dtype, False)
    neutral = {"grad_rescale": 1.0, "clip_low": -np.inf, "clip_high": np.inf, "weight_decay": 0.0, "v_scale": 1.0,
               "eps_root": 0.0, "m_scale": 1.0, "g_scale": 0.0, "nesterov_b": 1.0, "nesterov_u": 0.0}  # fmt: skip
    values = {name: neutral.get(name, value) for name, value in recipe.values.items()}
    rng = np.random.default_rng(5)
    count = 2 + len(rules.state_names(rules.RULES[rule]))
    buffers = [rng.uniform(0.5, 2.0, 1003).astype(dtype) for _ in range(count)]
    results = []
    for general in (False, True):
        param, grad, *states = [b.copy() for b in buffers]
        tier.update(recipe._replace(general=general, values=values), 3, 1.0, param, grad, states)
        results.append([param, *states])
    for got, want in zip(*results, strict=True):
        assert np.array_equal(bits(got), bits(want))


OPTIMIZERS = [
    pytest.param(fastrms.RMSProp, {}, id="rmsprop"),
    pytest.param(fastrms.RMSProp, {"momentum": 0.9, "nesterov": True, "centered": True}, id="rmsprop-all"),
    pytest.param(fastrms.RMSProp, {"bias_correction": "corrected", "rho": 0.999}, id="rmsprop-corrected"),
    pytest.param(fastrms.RMSProp, {"bias_correction": "folded", "momentum": 0.5}, id="rmsprop-folded"),
    pytest.param(fastrms.AdaGrad, {"lr_decay": 0.01, "weight_decay": 0.1, "decoupled": True}, id="adagrad"),
    pytest.param(fastrms.Adam, {}, id="adam"),
    pytest.param(fastrms.Adam, {"nesterov": "dozat", "eps_root": 1e-9, "weight_decay": 0.1}, id="adam-dozat"),
    pytest.param(fastrms.Adam, {"nesterov": "folded", "bias_correction": "folded"}, id="adam-folded"),
    pytest.param(fastrms.Adam, {"amsgrad": "corrected", "clip_value": 0.5}, id="amsgrad-corrected"),
    pytest.param(fastrms.AdamW, {"amsgrad": True, "maximize": True}, id="adamw-amsgrad"),
    pytest.param(fastrms.Adam, {"lr": lambda step: 1e-3 / (1 + step)}, id="adam-schedule"),
    pytest.param(fastrms.RProp, {}, id="rprop"),
]


def test_every_class_is_among_them():
    assert {param.values[0] for param in OPTIMIZERS} == {*CLASSES}


def many_steps(make, options, backend, dtypes, steps=40):
    """Bits of everything after some steps over several tensors, with groups, scaling, clipping and a skipped tensor."""
    rng = np.random.default_rng(11)
    shapes = [(3, 5), (1003,), (0,), (), (7, 1)]
    params = [rng.standard_normal(s).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
    optimizer = make([{"params": params[:2], "maximize": True}, {"params": params[2:]}], backend=backend, **options)
    norms = []
    for step in range(steps):
        grads = [np.asarray(rng.standard_normal(s), d) for s, d in zip(shapes, dtypes, strict=True)]
        if step % 5 == 2:
            grads[3] = None
        info = optimizer.step([grads[:2], grads[2:]], grad_scale=1.0 / 3, clip_norm=5.0 if step % 2 else None)
        norms.append(np.float64(info.grad_norm if info.grad_norm is not None else 0.0))
    states = [x for tensor in optimizer.state_dict()["tensors"] for x in tensor["state"].values()]
    return [bits(x) for x in [*params, *states, np.array(norms)]], optimizer.tensor_steps


@pytest.mark.parametrize("make, options", OPTIMIZERS)
def test_optimizers_over_many_steps(tier, make, options):
    dtypes = [np.float32, np.float64, np.float32, np.float64, np.float32]
    name = tier.__name__.rpartition(".")[2]
    got, counts = many_steps(make, options, name, dtypes)
    want, reference_counts = many_steps(make, options, "numpy", dtypes)
    assert counts == reference_counts == [40, 40, 40, 32, 40]
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("make, options", OPTIMIZERS)
def test_resume_is_bit_exact_at_every_step(backend, make, options):
    rng = np.random.default_rng(3)
    grads = [{"w": rng.standard_normal((4, 9)).astype(np.float32), "b": rng.standard_normal(3)} for _ in range(25)]
    start = {"w": np.ones((4, 9), np.float32), "b": np.ones(3)}

    def fresh(params):
        return make(params, backend=backend, **options)

    def finish(params, optimizer, first):
        for g in grads[first:]:
            optimizer.step(g)
        return [bits(params[k]) for k in params] + [bits(s[k]) for s in optimizer.state.values() for k in params]

    whole = {k: v.copy() for k, v in start.items()}
    want = finish(whole, fresh(whole), 0)
    walker = {k: v.copy() for k, v in start.items()}
    running = fresh(walker)
    for step in range(len(grads)):
        copy = {k: v.copy() for k, v in walker.items()}
        resumed = fresh(copy)
        resumed.load_state_dict(running.state_dict())
        assert resumed.steps == step
        assert all(np.array_equal(a, b) for a, b in zip(finish(copy, resumed, step), want, strict=True)), step
        running.step(grads[step])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4095, 4096, 4097, 100_003, 1_000_003])
def test_norm(tier, dtype, size):
    """The norm has one order of additions: the same bits from C and NumPy, and near the exact value."""
    w = np.zeros(size, dtype)
    optimizer = fastrms.RMSProp(w, backend=tier.__name__.rpartition(".")[2])
    reference = fastrms.RMSProp(w.copy(), backend="numpy")
    for seed in range(8):
        grads = np.random.default_rng(seed).standard_normal(size).astype(dtype) * dtype.type(10.0 ** (seed - 4))
        got = optimizer.step(grads, clip_norm=1.0).grad_norm
        assert got == reference.step(grads, clip_norm=1.0).grad_norm
        exact = np.sqrt(np.sum(grads.astype(np.longdouble) ** 2))
        assert abs(got - exact) <= 1e-13 * exact
