"""What a step does with gradients: those that are not finite are counted, skipped or refused, all or nothing; zeroing."""

import contextlib
import ctypes

import numpy as np
import pytest
from conftest import BACKENDS, CLASSES, DTYPES, Guarded, backends, bits
from test_own_rules import Lion
from test_same_bits import OPTIMIZERS

import fastrms
from fastrms import recipes

SIZES = [0, 1, 7, 1003, 5003]


@pytest.fixture(params=[(1, 8192), (2, 333)], ids=["serial", "shared"])
def shared_out(request, pool):
    pool(*request.param)


def own(backend):
    return [Lion] if backend in backends.FOR_OWN_RULES else []


def gradients(dtype, seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [Guarded(rng.standard_normal(size).astype(dtype), offset) for offset, size in enumerate(sizes)]


def arrays(guarded):
    return [g.array for g in guarded]


def everything(params, optimizer):
    """Bits of parameters and states, and all counts."""
    states = [x for tensor in optimizer._tensors for x in tensor.state.values()]
    return [bits(x).tobytes() for x in [*params, *states]], optimizer.steps, optimizer.tensor_steps


@pytest.mark.parametrize("make", [*CLASSES, Lion])
def test_arguments(make):
    w = np.ones(3)
    for wrong in ("ignore", None, True):
        with pytest.raises(ValueError, match=f"nonfinite={wrong!r} is not one of 'propagate', 'skip', 'raise'"):
            make(w, nonfinite=wrong, backend="numpy")
    with pytest.raises(TypeError, match="zero_grad=1 must be True or False"):
        make(w, zero_grad=1, backend="numpy")
    optimizer = make(w, nonfinite="skip", zero_grad=True, backend="numpy")
    assert (optimizer.nonfinite, optimizer._zero_grad) == ("skip", True)
    for name in ("nonfinite", "zero_grad"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, "raise")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_norm", [None, 10.0])
@pytest.mark.parametrize("grad_scale", [1.0, 2.0**-60, 1e25])
def test_the_count(tier, shared_out, dtype, clip_norm, grad_scale):
    """NaN, infinite, or a square beyond the dtype, after scaling: as NumPy counts it; over all tensors, but for None."""
    name, edge = tier.__name__.rpartition(".")[2], np.sqrt(np.finfo(dtype).max)
    grads = arrays(gradients(dtype, sizes=[*SIZES[:4], 270_007]))  # the last one in two segments
    beyond = [np.nextafter(edge, dtype.type(np.inf)), -np.finfo(dtype).max]
    wild = np.array([np.nan, np.inf, -np.inf, edge, *beyond, 1e-30], dtype)
    grads[2][:] = wild
    grads[4][::1000] = np.resize(wild, grads[4][::1000].size)
    params = [np.zeros_like(g) for g in grads]
    optimizer = fastrms.RMSProp(params, nonfinite="skip", maximize=True, clip_value=1.0, backend=name)
    plain = fastrms.RMSProp([np.zeros_like(g) for g in grads], backend=name)
    with np.errstate(all="ignore"):
        scaled = [g * dtype.type(grad_scale) for g in grads]
        counts = [int((~np.isfinite(s * s)).sum()) for s in scaled]
    for passed, count in ((grads, sum(counts)), ([*grads[:4], None], sum(counts[:4])), ([None, None, grads[2], None, None],
                                                                                     counts[2])):  # fmt: skip
        info = optimizer.step(passed, grad_scale=grad_scale, clip_norm=clip_norm)
        want = plain.step(passed, grad_scale=grad_scale, clip_norm=clip_norm)
        assert info.nonfinite == count > 0 and type(info.nonfinite) is int and not info.applied
        assert want.applied and want.nonfinite is None
        assert info.grad_norm == want.grad_norm or (np.isnan(info.grad_norm) and np.isnan(want.grad_norm))
    assert optimizer.steps == 0 and all((p == 0).all() for p in params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_and_raise_change_nothing(backend, shared_out, dtype):
    for make in (*CLASSES, *own(backend)):
        for nonfinite, clip_norm in (("skip", None), ("skip", 5.0), ("raise", None), ("raise", 5.0)):
            grads = gradients(dtype)
            params = [g.array.copy() for g in grads]
            optimizer = make(dict(enumerate(params)), nonfinite=nonfinite, backend=backend)
            optimizer.step(dict(enumerate(arrays(grads))))
            before = everything(params, optimizer)
            for where, value in ((3, np.nan), (4, np.inf)):
                grads[where].array[-1] = value
                kept = [bits(g.array) for g in grads]
                if nonfinite == "skip":
                    info = optimizer.step(dict(enumerate(arrays(grads))), clip_norm=clip_norm)
                    assert not info.applied and info.nonfinite == where - 2
                else:
                    with pytest.raises(FloatingPointError, match=rf"^{where - 2} element.*of them in grads\[3\]; noth"):
                        optimizer.step(dict(enumerate(arrays(grads))), clip_norm=clip_norm)
                assert everything(params, optimizer) == before
                assert all(np.array_equal(bits(g.array), k) for g, k in zip(grads, kept, strict=True))
            assert all(g.intact() for g in grads)


@pytest.mark.parametrize("how", ["bound", "the same array", "fresh"])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_step_is_tried_once_however_it_is_called(backend, how, zero_grad):
    """Clean, skipped, clean: as two steps of an optimizer that never saw the bad gradient."""
    w, g, want = np.ones(7), np.ones(7), np.ones(7)
    optimizer = fastrms.Adam(w, nonfinite="skip", zero_grad=zero_grad, backend=backend)
    reference = fastrms.Adam(want, backend=backend)
    if how == "bound":
        optimizer.bind(g)
    for k, value in enumerate((0.5, 1.5, np.nan, 2.5, np.inf, np.inf, 3.5)):
        g[:] = value
        info = optimizer.step() if how == "bound" else optimizer.step(g if how == "the same array" else g[:])
        assert info == fastrms.StepInfo(bool(np.isfinite(value)), None, 0 if np.isfinite(value) else 7), k
        if info.applied:
            reference.step(np.full(7, value))
        assert (g == 0).all() if zero_grad else np.array_equal(g, np.full(7, value), equal_nan=True)
    assert np.array_equal(w, want) and optimizer.steps == 4


def test_schedules_do_not_move_over_a_skipped_step(backend):
    asked = []
    optimizer = fastrms.RMSProp(np.ones(3), lr=lambda k: asked.append(k) or 0.1, nonfinite="skip", backend=backend)
    for value in (1.0, np.nan, 1.0):
        optimizer.step(np.full(3, value))
    assert asked == [0, 1, 1] and optimizer.steps == 2


@pytest.mark.parametrize("make, options", OPTIMIZERS)
def test_same_bits_with_and_without(backend, shared_out, make, options):
    """Clean gradients: neither looking nor zeroing changes a bit, on any backend, with clipping and skipped tensors."""
    dtypes = [np.float32, np.float64, np.float32, np.float64]
    results = []
    for name, extra in (("numpy", {}), (backend, {"nonfinite": "skip", "zero_grad": True}), (backend, {"zero_grad": True}),
                        (backend, {"nonfinite": "raise"})):  # fmt: skip
        params = [np.ones(size, dtype) for size, dtype in zip((7, 0, 9001, 1), dtypes, strict=True)]
        optimizer = make(params, backend=name, **options, **extra)
        for step in range(4):
            rng = np.random.default_rng(step)
            grads = [Guarded(rng.standard_normal(p.size).astype(p.dtype), k) for k, p in enumerate(params)]
            passed = arrays(grads) if step != 2 else [*arrays(grads)[:3], None]
            kept = bits(grads[3].array)
            info = optimizer.step(passed, grad_scale=0.5, clip_norm=3.0 if step % 2 else None)
            assert info.applied and info.nonfinite == (0 if "nonfinite" in extra else None)
            if "zero_grad" in extra:
                assert all((bits(g) == 0).all() for g in passed if g is not None)
                assert step != 2 or np.array_equal(bits(grads[3].array), kept)
            assert all(g.intact() for g in grads)
        results.append(everything(params, optimizer))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_grad_of_every_size(backend, shared_out, dtype):
    """Around the tiles in which C does it, in one tensor and over several."""
    sizes = [0, 1, 7, 4095, 4096, 4097, 8192, 8193, 12_289]
    want, got = ([np.ones(size, dtype) for size in sizes] for _ in range(2))
    plain, zeroing = fastrms.Adam(want, backend=backend), fastrms.Adam(got, zero_grad=True, backend=backend)
    grads = gradients(dtype, sizes=sizes)
    plain.step(arrays(grads))
    assert zeroing.step(arrays(grads)) is fastrms.optimizer.APPLIED
    assert everything(want, plain) == everything(got, zeroing)
    assert all(g.intact() and (bits(g.array) == 0).all() for g in grads)


def test_what_zeroing_needs_and_when_it_happens(backend):
    w, g = [np.ones(5), np.ones(3)], [np.ones(5), np.ones(3)]
    g[1].flags.writeable = False
    optimizer = fastrms.RMSProp(w, zero_grad=True, backend=backend)
    for call in (optimizer.step, optimizer.bind):
        with pytest.raises(ValueError, match=r"grads\[1\] is read-only"):
            call(g)
    fastrms.RMSProp(w, backend=backend).step(g)
    assert optimizer.steps == 0 and (g[0] == 1).all()
    for nonfinite, zeroed in (("skip", True), ("raise", False)):
        grad = np.array([1.0, np.nan, 2.0])
        optimizer = fastrms.RMSProp({"a": w[0], "b": w[1]}, nonfinite=nonfinite, zero_grad=True, backend=backend)
        try:
            assert not optimizer.step({"a": None, "b": grad}).applied
        except FloatingPointError as error:
            assert "1 element(s)" in str(error) and "grads['b']" in str(error) and not zeroed
        assert (grad == 0).all() if zeroed else np.isnan(grad[1]) and grad[2] == 2


def test_the_fast_path_stays_fast(backend):
    """Bound steps that have nothing to tell need no Python; those that look do."""
    w, g = np.ones(5), np.ones(5)
    for options, fast in (({}, True), ({"zero_grad": True}, True), ({"nonfinite": "skip"}, False)):
        optimizer = fastrms.RMSProp(w, backend=backend, **options)
        optimizer.bind(g)
        assert (optimizer._no_grads is None) == fast


def test_bound_gradients_stay_bound_when_a_step_is_given_them(backend):
    w, g = np.ones(5), np.ones(5)
    optimizer = fastrms.RMSProp(w, backend=backend)
    optimizer.bind(g)
    optimizer.step(g, clip_norm=1.0)
    assert optimizer._no_grads is None  # step() is still the fast path
    optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.skipif("c" not in BACKENDS, reason="without the C extension there is no c_step")
def test_c_step_answers_6_where_it_left_a_step_out():
    w, g = np.ones(5), np.array([1, np.nan, 1, 1, np.inf])
    for nonfinite, zero_grad in (("skip", False), ("skip", True), ("raise", True)):
        optimizer = fastrms.RMSProp(w, nonfinite=nonfinite, zero_grad=zero_grad, backend="c")
        optimizer.bind(g.copy())
        function, address = optimizer.c_step
        step = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(function)
        zeroed = nonfinite == "skip" and zero_grad
        assert step(address) == 6 and (step(address) == 0) == zeroed
        assert optimizer.steps == zeroed and (w == 1).all()


def test_a_gradient_that_became_read_only_is_not_zeroed(backend):
    """However often the same array came before."""
    w, g = np.ones(4, np.float32), np.ones(4, np.float32)
    optimizer = fastrms.Adam(w, zero_grad=True, backend=backend)
    for _ in range(3):
        optimizer.step(g)
    g[:] = 1
    g.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.step(g)
    assert (g == 1).all() and optimizer.steps == 3


@pytest.mark.parametrize("place", ["take", 1, 2, 3, 4])  # the number of the look at `fixed`
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "c"])
def test_ctrl_c_while_coefficients_are_made(name, place, monkeypatch):
    """The steps that follow are those of an optimizer that was never interrupted."""

    looks = []

    def interrupted(recipe):
        looks.append(recipe)
        if place in ("take", len(looks)):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return False

    ours, theirs, grad = np.ones(9), np.ones(9), np.full(9, 0.5)
    optimizer, reference = fastrms.Adam(ours, backend=name), fastrms.Adam(theirs, backend=name)
    optimizer.bind(grad)
    for _ in range(7):
        optimizer.step()
        reference.step(grad)
    if place == "take":
        monkeypatch.setattr(backends.load(name).Update, "take", interrupted)
    else:
        monkeypatch.setattr(recipes.Recipe, "fixed", property(interrupted))
    with contextlib.suppress(KeyboardInterrupt):
        optimizer.step(grad_scale=2.0)
    monkeypatch.undo()
    if optimizer.steps == 8:  # as many looks there are not
        reference.step(grad, grad_scale=2.0)
    for _ in range(9):
        optimizer.step(grad_scale=2.0)
        reference.step(grad, grad_scale=2.0)
    assert np.array_equal(bits(ours), bits(theirs)) and optimizer.steps == reference.steps


@pytest.mark.parametrize("name", BACKENDS)
def test_bound_steps_that_are_more_than_updates(name):
    """No gradient for one, another grad_scale, a plan that looks: the short way of a bound step passes over none."""
    params = [np.ones(9), np.ones(5)]
    optimizer = fastrms.Adam(params, backend=name)
    optimizer.bind([np.ones(9), None])
    for _ in range(4):
        optimizer.step()
    assert optimizer.tensor_steps == [4, 0] and (params[1] == 1).all()

    ours, theirs, grad = np.ones(9), np.ones(9), np.full(9, 0.5)
    optimizer, reference = fastrms.AdaGrad(ours, backend=name), fastrms.AdaGrad(theirs, backend="numpy")
    optimizer.bind(grad)
    for scale in (None, None, 0.5, None, 0.25, 0.25, None, None):
        optimizer.step(**({"grad_scale": scale} if scale else {}))
        reference.step(grad * (scale or 1.0))
    assert np.array_equal(bits(ours), bits(theirs))

    looking = fastrms.RMSProp(np.ones(9), backend=name, nonfinite="skip")
    looking.bind(grad)
    looking.step()
    grad[3] = np.nan
    call, _, argument = looking._plan.bound_step()
    assert call(argument) == backends.NONFINITE and looking.steps == 1
