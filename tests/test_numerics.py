"""The choices of the mathematics that are easy to undo by accident: each has a test that fails then."""

import ctypes
import shutil
import subprocess
import threading

import numpy as np
import pytest
from conftest import BACKENDS, CLASSES, DTYPES, WAYS, bits, c, raw_recipe, wild_values

import fastrms
from fastrms import backends, recipes, rules


def test_decoupled_decay_at_a_small_lr(backend):
    """param*(1 - lr*wd) rounds to no decay at all in float32 here; param - (u + decay*param) does not."""
    w = np.full(7, 1e-3, np.float32)
    start = w.copy()
    optimizer = fastrms.AdamW(w, lr=1e-6, weight_decay=0.01, eps=1.0, backend=backend)
    grad = np.full(7, 1e-7, np.float32)
    want = start.astype(np.float64)
    oracle = fastrms.AdamW(want, lr=1e-6, weight_decay=0.01, eps=1.0, backend=backend)
    for _ in range(3000):
        optimizer.step(grad)
        oracle.step(grad.astype(np.float64))
    decayed = start[0] - want[0]
    assert decayed > 3000 * 0.99e-8 * 1e-3  # the decay alone
    per_step_lost = 3000 * np.spacing(np.float32(1e-3)) / 2  # what rounding may lose when each step is rounded
    assert abs(float(w[0]) - want[0]) < per_step_lost


def test_decay_is_added_to_the_update_before_it_is_rounded(backend):
    """At param 6, lr 1.1e-6 and weight decay 0.02, 1 - lr*wd is exactly 1 in float32: the decay must not go that way."""
    w = np.array([6.0], np.float32)
    optimizer = fastrms.RMSProp(w, lr=1.1e-6, rho=0.0, eps=1e-30, weight_decay=0.02, decoupled=True, backend=backend)
    optimizer.step(np.array([0.5], np.float32))
    assert np.float32(1 - 2.2e-8) == 1
    assert w[0] == np.float32(6.0 - (1.1e-6 + 6 * 2.2e-8)) != np.float32(6.0 - 1.1e-6)


@pytest.mark.parametrize("rho", [0.99, 0.999])
@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_centered_floor(backend, rho, noise, dtype):
    """v - a*a cancels for steady gradients: no NaN (torch) and no jump of lr*g/eps (a clamp at 0)."""
    rng = np.random.default_rng(0)
    w = np.zeros(64, dtype)
    optimizer = fastrms.RMSProp(w, lr=1e-3, rho=rho, centered=True, backend=backend)
    floor = 2.0**-20 if dtype == np.float32 else 2.0**-49
    longest = 1e-3 / np.sqrt(floor) * 1.01
    steady = np.linspace(0.1, 3.0, 64)
    for _ in range(4000):
        before = w.copy()
        optimizer.step((steady * (1 + noise * rng.standard_normal(64))).astype(dtype))
        assert np.isfinite(w).all()
        assert np.abs(w - before).max() <= longest
    if (noise, rho) == (0.0, 0.99):
        v, a = optimizer.state["square_avg"], optimizer.state["grad_avg"]
        assert (v - a * a <= 0).any()  # the cancellation was there


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_correction_matches_the_rounded_coefficients(beta, dtype):
    """The average of a constant, corrected, is that constant at every step: with 1 - b**t it is 1.3e-5 off in float32."""
    decay, weight = recipes.rounded(beta, dtype), recipes.rounded(1 - beta, dtype)
    average, worst, worst_textbook = 0.0, 0.0, 0.0
    for step in range(1, 10_001):
        average = decay * average + weight
        worst = max(worst, abs(average / recipes.series(decay, weight, step) - 1))
        worst_textbook = max(worst_textbook, abs(average / (1 - beta**step) - 1))
    assert worst < 1e-12
    if dtype == np.float32 and beta == 0.999:
        assert worst_textbook > 1e-5


def test_bias_correction_after_ten_thousand_steps(backend):
    """A constant gradient moves Adam by lr at every step, in float32 as in float64."""
    steps = 10_000 if backend == "c" else 2000
    w = np.zeros(1, np.float32)
    optimizer = fastrms.Adam(w, lr=1.0, eps=1e-30, backend=backend)
    grad = np.full(1, 3.0, np.float32)
    optimizer.bind(grad)
    for _ in range(steps):
        optimizer.step()
    assert abs(float(w[0]) / -steps - 1) < 2e-6


@pytest.mark.skipif(c.lib is None, reason="without the C extension")
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 7, 64, 1000, 123_457, 2**40 + 3])
@pytest.mark.parametrize("decay, weight", [(0.9, 0.1), (0.999, 0.001), (0.0, 1.0), (float(np.float32(0.99)), 0.01)])
def test_series_is_the_same_in_c_and_python(terms, decay, weight):
    got = c.lib.fastrms_series(decay, weight, terms)
    assert got == recipes.series(decay, weight, terms)
    around = np.arange(terms, terms + 5)
    assert recipes.many(decay, weight, around).tolist() == [recipes.series(decay, weight, int(n)) for n in around]
    if decay and terms < 1000:
        assert got == pytest.approx(weight * sum(decay**k for k in range(terms)), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make, names", [
    (lambda w, b: fastrms.RMSProp(w, rho=0.5, momentum=0.5, centered=True, backend=b),
     ("square_avg", "grad_avg", "momentum_buffer")),
    (lambda w, b: fastrms.Adam(w, beta1=0.5, beta2=0.5, backend=b), ("exp_avg", "exp_avg_sq")),
    (lambda w, b: fastrms.AdaGrad(w, backend=b), ("sum",)),
])  # fmt: skip
def test_no_subnormal_stays_in_a_state(backend, dtype, make, names):
    """Zero gradients let the averages decay: to zero, not to a subnormal that slows every later step for ever."""
    w = np.ones(50, dtype)
    optimizer = make(w, backend)
    optimizer.step(np.full(50, np.sqrt(np.finfo(dtype).tiny) / 2 if names == ("sum",) else 1e-3, dtype))
    tiny = np.finfo(dtype).tiny
    for _ in range(1200):
        optimizer.step(np.zeros(50, dtype))
        for name in names:
            state = np.abs(optimizer.state[name])
            assert not ((state > 0) & (state < tiny)).any()
    assert all((optimizer.state[name] == 0).all() for name in names)


@pytest.fixture(scope="module")
def fp_mode(tmp_path_factory):
    """get() and set() of this thread's MXCSR, by a few lines of C."""
    compiler = shutil.which("cc")
    if compiler is None or c.lib is None or np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("needs a C compiler and the C extension")
    source = tmp_path_factory.mktemp("mode") / "mode.c"
    source.write_text(
        "#include <xmmintrin.h>\nunsigned get(void){return _mm_getcsr();}\nvoid set(unsigned m){_mm_setcsr(m);}\n"
    )
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("name, isa", [(name, isa) for name, isa in WAYS if name != "numpy"])
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_caller_that_flushes_denormals_gets_the_same_bits(fp_mode, rule, name, isa):
    """FTZ and DAZ of the calling thread (in C another rounding mode, too) neither change our bits nor are changed by us."""
    module = backends.load(name)
    if isa:
        c.use_isa(isa)
    dtype = np.dtype(np.float32)
    recipe = raw_recipe(rule, dtype, True)
    count = 2 + len(rules.state_names(rules.RULES[rule]))
    buffers = [np.abs(wild_values(1003, dtype, k)) * dtype.type(1e-30) for k in range(count)]
    want = [b.copy() for b in buffers]
    module.update(recipe, 1, 1.0, want[0], want[1], want[2:])
    got = [b.copy() for b in buffers]
    default = fp_mode.get()
    other = 0x1F80 | 0x8040 | 0x2000 * (name == "c")  # flush to zero, denormals are zero, round down
    fp_mode.set(other)
    try:
        module.update(recipe, 1, 1.0, got[0], got[1], got[2:])
        after = fp_mode.get()
    finally:
        fp_mode.set(default)
        c.use_isa(c.isas()[0])
    assert after & ~0x3F == other
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))


def test_the_mode_test_bites(fp_mode):
    """In that mode plain NumPy does give other bits."""
    small = np.full(64, 1e-40, np.float32)
    want = small * np.float32(0.5)
    result = []

    def work():
        fp_mode.set(0x1F80 | 0x8040)
        result.append(small * np.float32(0.5))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not np.array_equal(bits(result[0]), bits(want))


@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.Adam, fastrms.AdamW])
@pytest.mark.parametrize("eps, dtype", [(0.0, np.float32), (1e-60, np.float32), (0.0, np.float64)])
def test_eps_of_zero_is_an_error_after_rounding(backend, make, eps, dtype):
    w = np.ones(3, dtype)
    with pytest.raises(ValueError, match=r"eps=.* and eps_root=.* are both 0"):
        make(w, eps=eps, backend=backend)
    make(w, eps=eps, eps_root=1e-10, backend=backend)
    optimizer = make(w, backend=backend)
    with pytest.raises(ValueError, match="both 0"):
        optimizer.groups[0]["eps"] = eps
    assert optimizer.groups[0]["eps"] == 1e-8


def test_adagrad_without_eps(backend):
    """Allowed while no sum is 0, which would give 0/0."""
    w, g = np.ones(4, np.float32), np.array([1, 0, 2, 0], np.float32)
    with pytest.raises(ValueError, match="holds a 0"):
        fastrms.AdaGrad(w, eps=0.0, backend=backend)
    fastrms.AdaGrad(w, eps=0.0, initial_value=0.1, backend=backend).step(g)
    assert np.isfinite(w).all()
    total = np.array([1, 1, 0, 1], np.float32)
    with pytest.raises(ValueError, match="sum holds a 0"):
        fastrms.adagrad(w, g, total, eps=0.0, backend=backend)
    assert total[0] == 1
    optimizer = fastrms.AdaGrad(w, backend=backend)
    with pytest.raises(ValueError, match="holds a 0"):
        optimizer.groups[0]["eps"] = 0.0
    saved = optimizer.state_dict()
    saved["groups"][0]["eps"] = 0.0
    with pytest.raises(ValueError, match="holds a 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.groups[0]["eps"] == 1e-10


def test_sign_of_nan_is_zero(backend):
    """RProp does not move on a NaN gradient, and moves again on the next finite one."""
    w = np.ones(3, np.float32)
    optimizer = fastrms.RProp(w, lr=0.1, backend=backend)
    optimizer.step(np.array([np.nan, 1, -1], np.float32))
    assert np.array_equal(w, np.array([1, np.float32(1) - np.float32(0.1), np.float32(1) + np.float32(0.1)], np.float32))
    optimizer.step(np.array([2, 1, 1], np.float32))
    assert w[0] == np.float32(1) - np.float32(0.1)  # s = 0: the step size neither grew nor shrank
    assert np.isfinite(w).all()


@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.Adam])
def test_a_square_that_overflows_by_itself(backend, make):
    """(1 - rho)*g first: g*g is infinite in float32 from 1.85e19 on, and an infinite average freezes its element."""
    w = np.zeros(2, np.float32)
    optimizer = make(w, backend=backend)
    optimizer.step(np.array([1.9e19, -1.9e19], np.float32))
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(1.9e19) * np.float32(1.9e19))
    state = optimizer.state["square_avg" if make is fastrms.RMSProp else "exp_avg_sq"]
    assert np.isfinite(state).all()
    assert w[0] < 0 < w[1]


FORMS = [
    *[(fastrms.RMSProp, options) for centered in (False, True) for momentum in (0.0, 0.9) for options in (
        {"centered": centered, "momentum": momentum},
        {"centered": centered, "momentum": momentum, "eps_root": 1e-8, "bias_correction": "corrected"},
        {"centered": centered, "momentum": momentum, "weight_decay": 0.1, "nesterov": momentum > 0},
    )],
    (fastrms.AdaGrad, {}), (fastrms.AdaGrad, {"eps_root": 1e-8, "lr_decay": 0.1}),
    (fastrms.Adam, {}), (fastrms.Adam, {"bias_correction": "folded"}),
    (fastrms.Adam, {"eps_root": 1e-8, "weight_decay": 0.1}), (fastrms.Adam, {"amsgrad": True}),
    (fastrms.Adam, {"amsgrad": "corrected", "nesterov": "folded"}),
    (fastrms.Adam, {"nesterov": "dozat"}), (fastrms.RProp, {}), (fastrms.RProp, {"clip_value": 1e30}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make, options", FORMS, ids=lambda x: "-".join(x) if isinstance(x, dict) else x.__name__)
def test_finite_gradients_of_any_size_leave_parameters_finite(backend, make, options, dtype):
    """Where a square overflows, the average is infinite and the update 0; the largest number itself needs an lr below 1, and
    nesterov="dozat" adds two numbers of its size."""
    largest = float(np.finfo(dtype).max)
    sizes = [largest**0.5 * factor for factor in (0.3, 0.9, 1.1, 10.0, 120.0)] + [largest / 1e8, largest / 4, largest / 2]
    for lr in (1.0, 1e-3):
        w = np.ones(2 * len(sizes) + 2, dtype)
        optimizer = make(w, lr=lr, backend=backend, **options)
        top = largest if lr < 1 and options.get("nesterov") != "dozat" else largest / 2
        for step in range(4):
            signs = -1.0 if step % 2 else 1.0
            optimizer.step(np.array([*sizes, *[signs * size for size in sizes], top, signs * top], dtype))
            assert np.isfinite(w).all(), (lr, step, w)
        for _ in range(3):
            optimizer.step(np.full(w.size, 0.1, dtype))
        assert np.isfinite(w).all(), (lr, w)


LARGEST = float(np.finfo(np.float32).max)
BEYOND = [  # a gradient whose square overflows: whether its parameter is NaN after it, and after the next gradient
    (fastrms.RMSProp, {}, 1e21, False, False), (fastrms.AdaGrad, {}, 2e19, False, False),
    (fastrms.Adam, {}, 1e21, False, False), (fastrms.Adam, {"beta1": 0.0}, 1e21, False, False),
    (fastrms.RMSProp, {"rho": 0.0}, 2e19, False, True), (fastrms.Adam, {"beta2": 0.0}, 2e19, False, True),
    (fastrms.RMSProp, {"centered": True, "rho": 0.0}, 2e19, False, True),
    *[(make, {"lr": 2.0}, LARGEST, True, True) for make in (fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam)],
    (fastrms.Adam, {"nesterov": "dozat"}, LARGEST * 0.7, True, True),
    (fastrms.Adam, {"nesterov": "dozat"}, LARGEST * 0.66, False, False),
    *[(make, {"lr": 0.99}, LARGEST, False, False) for make in (fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam)],
]  # fmt: skip


@pytest.mark.parametrize("make, options, size, at_once, later", BEYOND)
def test_what_the_guide_says_of_a_square_that_overflows(backend, make, options, size, at_once, later):
    """The element stays where it is for ever, or becomes NaN in two cases; a step that looks at gradients is left out."""
    w, kept, other = (np.ones(2, np.float32) for _ in range(3))
    optimizer = make(w, backend=backend, **options)
    optimizer.step(np.array([size, 1.0], np.float32))
    assert np.isnan(w[0]) == at_once and (at_once or w[0] == 1)
    for _ in range(3):
        optimizer.step(np.ones(2, np.float32))
    assert np.isnan(w[0]) == later and (later or w[0] == 1) and w[1] < 1
    looking, plain = (make(x, backend=backend, nonfinite=n, **options) for x, n in ((kept, "skip"), (other, "propagate")))
    assert looking.step(np.array([size, 1.0], np.float32)) == (False, None, 1) and (kept == 1).all()
    for optimizer in (looking, plain):
        optimizer.step(np.ones(2, np.float32))
    assert np.array_equal(kept, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"bias_correction": "corrected"}, {"eps_root": 1e-8}])
def test_centered_rmsprop_shows_a_nan_gradient(backend, options, dtype):
    """The floor of the variance hides only what finite gradients make: inf - inf."""
    w = np.ones(3, dtype)
    optimizer = fastrms.RMSProp(w, centered=True, backend=backend, **options)
    optimizer.step(np.array([np.nan, 1.0, np.finfo(dtype).max], dtype))
    assert np.isnan(w[0]) and w[1] < 1 and w[2] == 1


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-310])
def test_clip_norm_of_huge_and_tiny_doubles(backend, scale):
    """The sum of squares would overflow or vanish: it is scaled by the largest magnitude."""
    w = np.zeros(10_000)
    g = np.full(10_000, scale)
    info = fastrms.RMSProp(w, lr=1.0, rho=0.0, eps=0.01, backend=backend).step(g, clip_norm=1.0)
    assert info.grad_norm == pytest.approx(scale * 100, rel=1e-3 if scale < 1e-300 else 1e-14)
    if scale == 1e200:
        assert w[0] == pytest.approx(-0.5, rel=1e-12)  # clipped to 0.01: 0.01/(0.01 + eps)
        bounded = fastrms.RMSProp(w, backend=backend).step(g, clip_norm=1e200)
        assert bounded.grad_norm == info.grad_norm


class Descent(fastrms.Optimizer):
    """A rule of one's own, on the backends that run it."""

    defaults = {"lr": 0.1, "maximize": False}
    state_names = ("last",)

    @staticmethod
    def coefficients(step, lr, maximize):
        return {"lr": -lr if maximize else lr}

    def rule(param, grad, last, lr):
        return param - lr * grad, grad


HUGE = {  # what clipping by norm makes of the factor: subnormal or 0 in float32, in float64; with a norm beyond any double
    "float32": ([np.float32(1e38)], [70_001]),
    "float32, largest": ([np.finfo(np.float32).max], [70_001]),
    "float64": ([np.finfo(np.float64).max], [70_001]),
    "both": ([np.float32(3e38), np.float64(1.5e308), np.float32(2.0), np.float64(-3.0)], [1003, 50_001, 5, 3]),
    "like float32 in float64": ([np.float64(1e41)], [1003]),
}
MAKERS = [*CLASSES, Descent]


def huge_steps(make, backend, kind, clip_norm, prescaled):
    """(params and states after a usual step, one of huge gradients, and a usual step; what the huge one told).  prescaled:
    these gradients are multiplied by the factor here, in extended precision, and not clipped."""
    rng = np.random.default_rng(0)
    values, sizes = HUGE[kind]
    huge = [v * rng.uniform(0.5, 1.0, n).astype(v.dtype) for v, n in zip(values, sizes, strict=True)]
    usual = [rng.standard_normal(n).astype(v.dtype) for v, n in zip(values, sizes, strict=True)]
    if prescaled:
        exact = [g.astype(np.longdouble) for g in huge]
        norm = np.sqrt(sum((g**2).sum() for g in exact))
        huge = [(g * (np.longdouble(clip_norm) / norm)).astype(v.dtype) for g, v in zip(exact, values, strict=True)]
    params = [np.ones(n, v.dtype) for v, n in zip(values, sizes, strict=True)]
    optimizer = make(params, backend=backend, maximize=True)
    optimizer.step(usual)
    info = optimizer.step(huge) if prescaled else optimizer.step(huge, clip_norm=clip_norm)
    optimizer.step(usual)
    states = [x for tensor in optimizer.state_dict()["tensors"] for x in tensor["state"].values()]
    return [*params, *states], info


@pytest.mark.parametrize("clip_norm", [1.0, 1e-9, 1e12])
@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("make", MAKERS)
def test_finite_gradients_of_any_size_are_clipped(make, kind, clip_norm):
    """The result is the one of gradients that were scaled beforehand, and has the same bits on every backend."""
    if np.finfo(np.longdouble).maxexp <= 1024:
        pytest.skip("no extended precision here")
    names = [name for name in BACKENDS if make is not Descent or name in backends.FOR_OWN_RULES]
    with np.errstate(all="raise", under="ignore"):
        clipped = {name: huge_steps(make, name, kind, clip_norm, prescaled=False) for name in names}
        wanted, _ = huge_steps(make, "numpy", kind, clip_norm, prescaled=True)
    for results, info in clipped.values():
        assert info.applied and info.grad_norm > 1e40
        for got, want, same in zip(results, wanted, clipped["numpy"][0], strict=True):
            eps = 4 * np.finfo(got.dtype).eps  # of the largest: averages of both signs cancel
            assert np.allclose(got, want, rtol=1e-5 if got.itemsize == 4 else 1e-12, atol=eps * abs(want).max())
            assert np.array_equal(bits(got), bits(same))


def test_clip_norm_against_its_formula(backend):
    rng = np.random.default_rng(2)
    params = [np.zeros(1003, np.float32), np.zeros((7, 3))]
    grads = [rng.standard_normal(1003).astype(np.float32), rng.standard_normal((7, 3))]
    kept = [g.copy() for g in grads]
    optimizer = fastrms.AdaGrad(params, backend=backend)
    info = optimizer.step(grads, grad_scale=0.25, clip_norm=2.0)
    norm = 0.25 * np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads))
    assert info.applied and info.grad_norm == pytest.approx(norm, rel=1e-13)
    want = (grads[1] * (0.25 * 2.0 / norm)) ** 2
    assert np.allclose(optimizer.state["sum"][1], want, rtol=1e-12)
    assert all(np.array_equal(a, b) for a, b in zip(grads, kept, strict=True))
    below = fastrms.AdaGrad(np.zeros(3), backend=backend)
    assert below.step(np.ones(3), clip_norm=5.0).grad_norm == pytest.approx(3**0.5)
    assert (below.state["sum"] == 1).all()
    measured = fastrms.AdaGrad(np.zeros(3), backend=backend)
    assert measured.step(np.full(3, 1e6), clip_norm=float("inf")).grad_norm == pytest.approx(1e6 * 3**0.5)
    assert (measured.state["sum"] == 1e12).all()


def test_norm_of_tiny_gradients_beside_zeros(backend):
    """A block of zeros has no magnitude of its own to scale the others by."""
    grads = np.concatenate([np.full(4096, 1e-200), np.zeros(4096)])
    info = fastrms.AdaGrad(np.zeros(8192), backend=backend).step(grads, clip_norm=1.0)
    assert info.grad_norm == pytest.approx(6.4e-199, rel=1e-14)


def test_a_nan_gradient_with_clip_norm_is_not_hidden(backend):
    w = np.zeros(3)
    info = fastrms.RMSProp(w, backend=backend).step(np.array([1.0, np.nan, 2.0]), clip_norm=1.0)
    assert np.isnan(info.grad_norm) and np.isnan(w).all()


def test_a_step_size_clip_is_compare_and_select():
    """clip lets NaN pass, larger keeps its first argument on a tie or NaN, flush gives +0, sign(NaN) is 0."""
    for backend in {"numpy", *[name for name, _ in WAYS]}:
        assert backends.load(backend).available() is None
    assert np.isnan(rules.clip(np.nan, -1.0, 1.0))
    assert rules.larger(1.0, np.nan) == 1.0 and np.isnan(rules.larger(np.nan, 1.0))
    assert not np.signbit(rules.flush(-1e-40, 1e-38, 0.0)) and rules.flush(-1e-38, 1e-38, 0.0) == -1e-38
    assert rules.sign(np.nan, 0.0, 1.0) == 0.0


@pytest.mark.parametrize("rule", rules.RULES)
def test_the_docstring_of_a_rule_says_what_each_argument_means(rule):
    function = rules.RULES[rule]
    for name in rules.arguments(function):
        meaning = rules.meaning(name, function)
        assert meaning and f"{name} : float\n    {meaning}\n" in function.__doc__
    used = {name for other in rules.RULES.values() for name in rules.arguments(other)}
    assert {name.partition(" of ")[0] for key in rules.MEANINGS for name in key.split(", ")} == used
    assert all(helper.__doc__ for helper in (rules.select, *rules.HELPERS))
