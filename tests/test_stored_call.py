"""Calls on raw arrays that are stored in formats: the bits of an optimizer of the same array, and what they refuse."""

import contextlib
import itertools

import numpy as np
import pytest
from conftest import FUNCTIONS
from test_same_bits import OPTIMIZERS
from test_storage import numbers, raw, refused, stored

import fastrms
from fastrms import family, formats, storage, stored_call

STATE_FORMATS = [None, "bf16", "fp16", "q8"]
ROUNDINGS = ["stochastic", "nearest"]
SHAPE = (3, 101)
N = 64
KINDS = [("float32", None), ("float32", "bf16"), ("float32", "fp16"), ("bf16", None), ("bf16", "fp16"), ("fp16", None)]
CASES = [
    pytest.param(*case.values, state_format, rounding, id=f"{case.id}-{state_format}-{rounding}")
    for case in OPTIMIZERS
    for state_format in STATE_FORMATS
    for rounding in ROUNDINGS
    if not refused(*case.values, state_format)
    and (state_format, rounding) != ("q8", "nearest")
    and not callable(case.values[1].get("lr"))  # a schedule needs an optimizer
]


def function_of(make):
    """The name and the function of the class of an optimizer."""
    return next((name, getattr(fastrms, name)) for name, known in FUNCTIONS.items() if issubclass(make, known))


def call_options(make, name, options):
    """(the options of a call, those of init_state) for an optimizer with these."""
    values = {key: value for key, value in make.defaults.items() if value != FUNCTIONS[name].defaults.get(key)} | options
    once = (*FUNCTIONS[name].fixed, *(("lr",) if name == "rprop" else ()))
    flags = FUNCTIONS[name].implied()
    return {key: value for key, value in values.items() if key not in once and not (key in flags and value is True)}, values


def both(make, options, kind, state_format, grad, backend, rounding, steps=4, seed=3):
    """What an optimizer and calls make of the same arrays: two lists of the bits of all that they have written."""
    format, copied = kind
    rng = np.random.default_rng(5)
    values = rng.standard_normal(SHAPE).astype(np.float32)
    (param, other), said = (stored(format, values) for _ in range(2)), {"rounding": rounding, "seed": seed}
    copies = [copied and stored(copied, np.zeros(SHAPE, np.float32)) for _ in range(2)]
    optimizer = make(param, backend=backend, state_format=state_format, param_copy=copies[0], **options, **said)
    name, call = function_of(make)
    for_call, for_state = call_options(make, name, options)
    state = fastrms.init_state(name, other, state_format=state_format, **for_state)
    for step in range(1, steps + 1):
        gradient = stored(grad, rng.standard_normal(SHAPE).astype(np.float32))
        optimizer.step(gradient, grad_scale=0.5)
        call(other, gradient, **state, step=step, grad_scale=0.5, backend=backend, param_copy=copies[1], **for_call, **said)
    (tensor,) = optimizer._tensors
    found = [other, *([copies[1]] if copied else []), *state.values()]
    wanted = [param, *([copies[0]] if copied else []), *tensor.state.values()]
    return [[raw(x) for x in arrays] for arrays in (found, wanted)]


@pytest.mark.parametrize("make, options, state_format, rounding", CASES)
def test_calls_have_the_bits_of_an_optimizer(backend, make, options, state_format, rounding):
    for k, kind in enumerate(KINDS):
        grad = ("bf16", "fp16", "float32")[(k + len(options)) % 3]
        found, wanted = both(make, options, kind, state_format, grad, backend, rounding)
        assert all(np.array_equal(x, y) for x, y in zip(found, wanted, strict=True)), (kind, grad)


@pytest.mark.parametrize("grad", ["bf16", "fp16"])
def test_gradients_in_a_format_need_no_option(backend, grad):
    """Neither step nor rounding: nothing but the gradient is stored in a format."""
    w, same = np.ones(N, np.float32), np.ones(N, np.float32)
    sums = [np.zeros(N, np.float32) for _ in range(2)]
    gradient = stored(grad, np.linspace(-1, 1, N, dtype=np.float32))
    for _ in range(3):
        fastrms.adagrad(w, gradient, sums[0], backend=backend)
        fastrms.adagrad(same, numbers(gradient), sums[1], backend=backend)
    assert np.array_equal(w, same) and np.array_equal(*sums) and (w != 1).any()


def test_seeds_and_steps_have_other_random_numbers(backend):
    made = []
    for seed, step in ((0, 1), (1, 1), (0, 2)):
        w = stored("bf16", np.ones(2000, np.float32))
        fastrms.rmsprop(w, np.ones(2000, np.float32), np.ones(2000, np.float32), lr=1e-3, step=step, rounding="stochastic",
                        seed=seed, backend=backend)  # fmt: skip
        made.append(raw(w))
    assert not any(np.array_equal(x, y) for x, y in ((made[0], made[1]), (made[0], made[2]), (made[1], made[2])))


def test_arrays_of_other_libraries(backend):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    w, v, copy, gradient = (np.ones(N, np.float32), *(np.zeros(N, bfloat16) for _ in range(2)), np.full(N, 0.5, bfloat16))
    fastrms.rmsprop(w, gradient, v, lr=0.25, rho=0.5, eps=1e-30, step=1, param_copy=copy, backend=backend)
    assert (v.astype(np.float32) == 0.125).all() and np.array_equal(copy, w.astype(bfloat16)) and (w < 1).all()


def test_tensors_of_torch_learn_that_they_were_written(backend):
    torch = pytest.importorskip("torch")
    w, v, copy = torch.ones(N), torch.zeros(N, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.float16)
    gradient = torch.full((N,), 0.5, dtype=torch.bfloat16)
    before = [x._version for x in (w, v, copy, gradient)]
    fastrms.rmsprop(w, gradient, v, step=1, param_copy=copy, backend=backend)
    assert [x._version - k for x, k in zip((w, v, copy, gradient), before, strict=True)] == [1, 1, 1, 0]
    assert torch.equal(copy, w.half()) and (v > 0).all()


@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("format", ["float32", "bf16"])
def test_init_state_makes_what_the_calls_take(state_format, format):
    param = stored(format, np.asfortranarray(np.ones((3, 5), np.float32)))
    state = fastrms.init_state("adagrad", param, state_format=state_format, initial_value=0.5)["sum"]
    if state_format == "q8":
        assert state.dtype == np.uint8 and state.shape == (formats.stored_bytes(storage.Q8U, 15),)
        found = formats.decode(storage.Q8U, state, 15)
    else:
        assert state.shape == (3, 5) and isinstance(state, fastrms.Stored) == (state_format == "bf16")
        assert getattr(state, "dtype", None) == {None: np.float32, "fp16": np.float16}.get(state_format)
        found = numbers(state)
    assert (found == 0.5).all()


@pytest.mark.parametrize("name, value", [("rounding", "nearest"), ("seed", 3), ("param_copy", 0), ("backend", "c")])
def test_init_state_says_where_an_option_belongs(name, value):
    w = np.ones(N, np.float32)
    with pytest.raises(TypeError, match=rf"^{name} does not change which state is made: .* pass it to adam\(\)$"):
        fastrms.init_state("adam", w, **{name: value})
    with pytest.raises(TypeError, match=r"^master='split16' is for optimizer objects: pass the float32 master as param"):
        fastrms.init_state("adam", w, master="split16")


def refusals():
    """Parts of a sentence, behind what tells equal ones apart, and the call that it refuses: its function, its arrays and
    its options."""
    w = g = v = lambda: np.ones(N, np.float32)
    half = lambda: stored("bf16", np.ones(N, np.float32))  # noqa: E731
    fp16 = lambda: np.ones(N, np.float16)  # noqa: E731
    q8 = lambda: np.zeros(formats.stored_bytes(storage.Q8, N), np.uint8)  # noqa: E731
    double = lambda: np.ones(N)  # noqa: E731

    def damaged():
        made = q8()
        made[-4:] = 255
        return made

    def read_only():
        made = q8()
        made.flags.writeable = False
        return made

    return {
        "or say rounding='stochastic' or 'nearest'": ("rmsprop", (half, g, v), {}),
        "param has dtype bf16: pass a float32 copy of it as param and this array": ("adagrad", (half, g, v), {}),
        "param_copy is a list; it must be bf16 or fp16": ("adagrad", (w, g, v), {"param_copy": [1]}),
        "nonfinite is an option of a whole AdaGrad": ("adagrad", (w, g, v), {"nonfinite": "skip"}),
        "param has dtype float16": ("adam", (fp16, g, v, v), {"step": 1}),
        "grad has dtype float16": ("adagrad", (double, fp16, double), {}),
        "param_copy is for parameters that": ("adagrad", (double, double, double), {"param_copy": fp16}),
        "param_copy has dtype float32": ("adagrad", (w, g, v), {"param_copy": w}),
        "grad has dtype uint16; say which": ("adagrad", (w, lambda: np.ones(N, np.uint16), v), {}),
        "rmsprop|rounding='stochastic' needs step": ("rmsprop", (w, g, half), {}),
        "adagrad|rounding='stochastic' needs step": ("adagrad", (w, g, half), {"rounding": "stochastic"}),
        "rprop|rounding='stochastic' needs step": ("rprop", (w, g, half, v), {}),
        "param|rounding='stochastic' needs step": ("adagrad", (half, g, v), {"rounding": "stochastic"}),
        "rounding='up'": ("adagrad", (w, g, v), {"rounding": "up"}),
        "seed=-1": ("adagrad", (w, g, v), {"seed": -1}),
        "step=0": ("adagrad", (w, g, half), {"step": 0}),
        "prev cannot be in fp16": ("rprop", (w, g, fp16, v), {"step": 1}),
        "prev cannot be in q8": ("rprop", (w, g, q8, v), {"step": 1}),
        "grad_avg cannot be in bf16": ("rmsprop", (w, g, v), {"grad_avg": half, "step": 1}),
        "max_exp_avg_sq cannot be in q8": ("adam", (w, g, v, v), {"max_exp_avg_sq": q8, "step": 1}),
        "with shape (128,); a state in q8 of 64 elements has shape (68,)": (
            "adagrad", (w, g, lambda: np.zeros(128, np.uint8)), {"step": 1},
        ),
        "sum is read-only": ("adagrad", (w, g, read_only), {"step": 1}),
        "sum has damaged blocks": ("adagrad", (w, g, damaged), {"step": 1}),
        "cannot have rounding='nearest'": ("adagrad", (w, g, q8), {"step": 1, "rounding": "nearest"}),
        "sum holds a 0": ("adagrad", (w, g, q8), {"step": 1, "eps": 0.0}),
        "master='float32' is for optimizer objects": ("adagrad", (w, g, v), {"master": "float32"}),
        "state_format='q8' is for optimizer objects": ("adagrad", (w, g, v), {"state_format": "q8"}),
    }  # fmt: skip


@pytest.mark.parametrize("sentence", refusals())
def test_what_a_call_cannot_do_is_refused_before_anything_is_written(backend, sentence):
    name, arrays, options = refusals()[sentence]
    arrays = [make() for make in arrays]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    written = [*arrays, *(x for x in options.values() if hasattr(x, "shape"))]
    before = [raw(x).copy() for x in written]
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(fastrms, name)(*arrays, backend=backend, **options)
    assert (sentence.partition("|")[2] or sentence) in str(error.value)
    assert all(np.array_equal(raw(x), y) for x, y in zip(written, before, strict=True))


def test_zeros_in_a_format_are_found_by_their_numbers(backend):
    """-0.0 is one, too; a sum of ones is none."""
    w, ones = np.ones(N, np.float32), np.ones(N, np.float32)
    for make, said in ((lambda x: stored("bf16", x), {}), (lambda x: stored("fp16", x), {})):
        for value in (0.0, -0.0):
            total = make(np.where(np.arange(N) == 7, np.float32(value), ones))
            with pytest.raises(ValueError, match="sum holds a 0"):
                fastrms.adagrad(w, ones, total, step=1, eps=0.0, backend=backend, **said)
        fastrms.adagrad(w, ones, make(ones), step=1, eps=0.0, backend=backend)
    assert (w < 1).all()


NAMES = ["param", "grad", "exp_avg", "exp_avg_sq", "param_copy"]


def arrays_of_adam(at):
    """The arrays of a call of Adam, of 4, 2, 1, 2 and 2 bytes an element, in one block of memory.  at: where they begin."""
    memory, dtypes = np.zeros(4096, np.uint8), (np.float32, np.uint16, np.uint8, np.float16, np.float16)
    sizes = [4 * N, 2 * N, formats.stored_bytes(storage.Q8, N), 2 * N, 2 * N]
    made = [memory[start : start + size].view(dtype) for start, size, dtype in zip(at, sizes, dtypes, strict=True)]
    made[1] = fastrms.Stored(made[1], "bf16")
    return memory, dict(zip(NAMES, made, strict=True)), sizes


@pytest.mark.parametrize("first, second", [*itertools.permutations(range(len(NAMES)), 2)])
def test_arrays_of_a_call_may_not_share_a_byte(backend, first, second):
    for shared in (0, 4, 68):
        at = [512 * k for k in range(5)]
        sizes = arrays_of_adam(at)[2]
        at[second] = at[first] + sizes[first] - shared
        memory, arrays, _ = arrays_of_adam(at)
        said = f"{NAMES[first]} and {NAMES[second]} overlap in memory"
        with pytest.raises(ValueError, match=said) if shared else contextlib.nullcontext():
            fastrms.adam(**arrays, step=1, backend=backend)
        assert not memory.any()


def test_every_option_of_a_call_is_that_of_a_class():
    assert stored_call.OPTIONS.items() <= family.OPTIONS.items()
