"""What is said of wrong arguments that people have written: what is wrong, with its remedy."""

import numpy as np
import pytest

import fastrms
from fastrms import words
from fastrms.memory import host
from fastrms.schedules import Cosine, EarlyStopping


def array(*shape):
    return np.ones(shape or (4, 3), np.float32)


def loaded(optimizer, saved, **options):
    return lambda: optimizer.load_state_dict(saved.state_dict(), **options)


def lacking(name):
    optimizer = fastrms.RMSProp(array())
    saved = optimizer.state_dict()
    del saved[name]
    return lambda: optimizer.load_state_dict(saved)


def float32():
    return fastrms.RMSProp(array())


def float64():
    return fastrms.RMSProp(np.ones(3))


def of_two():
    return {"w": array(), "b": array(3)}


ONE_ARRAY = "the state_dict has no {}: its params is one array; make this optimizer over one array, as the saved one was"
MANY_ARRAYS = (
    "the state_dict has no params, it has {}: make this optimizer over the same names or places of arrays, as the saved "
    "one was"
)
AGAIN = "make this optimizer with the class, the parameters and the options of the saved one"
GROUP = (
    "{} is a {} without the key 'params' (it has {}): in a list of groups each has its arrays under this key, and nested "
    "mappings are not flattened; without groups pass one mapping with a key for each array, such as 'layer.weight'"
)
SAME = array()
SHOWN = "<ndarray of shape (4, 3), float32>"
SHAPES = "grads has shape {}, params has {}"
WRONG = [
    # state_dicts of other structures
    (loaded(fastrms.RMSProp({"w": array()}), fastrms.RMSProp(array())), ValueError, ONE_ARRAY.format("params['w']")),
    (loaded(fastrms.RMSProp([array()]), fastrms.RMSProp(array())), ValueError, ONE_ARRAY.format("params[0]")),
    (
        loaded(fastrms.RMSProp({"w": array()}), fastrms.RMSProp(array(), state_format="q8")),
        ValueError,
        ONE_ARRAY.format("params['w']"),
    ),
    (loaded(fastrms.RMSProp(array()), fastrms.RMSProp({"w": array()})), ValueError, MANY_ARRAYS.format("params['w']")),
    (
        loaded(fastrms.RMSProp(array()), fastrms.RMSProp(of_two())),
        ValueError,
        MANY_ARRAYS.format("params['w'], params['b']"),
    ),
    (
        loaded(fastrms.RMSProp(array()), fastrms.Adam(array())),
        ValueError,
        f"the state_dict is of Adam, this is RMSProp: {AGAIN}",
    ),
    (
        loaded(fastrms.RMSProp({"w": array()}), fastrms.RMSProp(of_two())),
        ValueError,
        f"the state_dict has 2 tensors, this optimizer has 1: {AGAIN}",
    ),
    (
        loaded(fastrms.RMSProp(of_two(), groups={"b": {"lr": 0.1}}), fastrms.RMSProp(of_two())),
        ValueError,
        f"the state_dict has 1 groups, this optimizer has 2: {AGAIN}",
    ),
    (
        loaded(fastrms.RMSProp(array()), fastrms.RMSProp(array(), momentum=0.9)),
        ValueError,
        f"the state_dict has state ['momentum_buffer', 'square_avg'] for params, this optimizer has ['square_avg']: {AGAIN}",
    ),
    (lacking("groups"), ValueError, "this is not a state_dict of fastrms: it lacks the key 'groups'"),
    (
        loaded(fastrms.RMSProp(array()), fastrms.RMSProp(array(), state_format="bf16"), convert="q8"),
        ValueError,
        "square_avg of params is stored in bf16 in the state_dict, which is not convert='q8', and in float32 in this "
        "optimizer: make the optimizer with state_format='bf16', or pass convert='bf16', which decodes it and rounds it to "
        "the nearest float32",
    ),
    # parameters
    (
        lambda: fastrms.Adam(array().astype(np.uint16)),
        TypeError,
        "params has dtype uint16: where these are the bits of bf16 or fp16 numbers, pass fastrms.Stored(params, 'bf16') or "
        "fastrms.Stored(params, 'fp16') with master='float32'; where they are integers, params.astype(np.float32), a copy, "
        "and keep that array",
    ),
    (
        lambda: fastrms.RMSProp([1.0, 2.0]),
        TypeError,
        "params is a list of numbers, which has no buffer to use in place: pass np.array(params, np.float32), and keep that "
        "array",
    ),
    (lambda: fastrms.RMSProp([{"lr": 0.1}]), TypeError, GROUP.format("params[0]", "dict", "'lr'")),
    (lambda: fastrms.RMSProp([{"param": array()}]), TypeError, GROUP.format("params[0]", "dict", "'param'")),
    (lambda: fastrms.RMSProp([{"params": array()}, {}]), TypeError, GROUP.format("params[1]", "dict", "no keys")),
    (
        lambda: fastrms.RMSProp([{"params": array()}, np.ones(2, np.float32)]),
        TypeError,
        "params[1] is an ndarray among groups: in a list of groups each is a mapping with its arrays under the key 'params'",
    ),
    # gradients and states
    *[
        (
            lambda optimizer=optimizer, value=value: optimizer().step(value),
            TypeError,
            f"grads is {kind}, which has no buffer to use in place: pass np.array(grads, np.{dtype}), and keep that array",
        )
        for optimizer, dtype in ((float32, "float32"), (float64, "float64"))
        for value, kind in (([1.0, 2.0], "a list"), (np.sum(array()), "a float32"), (1, "an int"))
    ],
    (
        lambda: float64().step(np.ones(3, int)),
        TypeError,
        "grads has dtype int64; fastrms updates float32 and float64: pass grads.astype(np.float64), a copy, and keep that "
        "array",
    ),
    (
        lambda: fastrms.RMSProp(np.ones(3), state={"square_avg": [0.0] * 3}),
        TypeError,
        "state['square_avg'] is a list, which has no buffer to use in place: pass np.array(state['square_avg'], "
        "np.float64), and keep that array",
    ),
    (
        lambda: fastrms.rmsprop(np.ones(3), [1.0] * 3, np.zeros(3)),
        TypeError,
        "grad is a list, which has no buffer to use in place: pass np.array(grad, np.float64), and keep that array",
    ),
    (
        lambda: fastrms.rmsprop(np.ones(3), np.ones(3), np.zeros(3, int)),
        TypeError,
        "square_avg has dtype int64; fastrms updates float32 and float64: pass square_avg.astype(np.float64), a copy, and "
        "keep that array",
    ),
    (
        lambda: fastrms.RMSProp(array(5)).step(array(1, 5)),
        ValueError,
        SHAPES.format((1, 5), (5,)) + ": pass grads.reshape(5)",
    ),
    (
        lambda: fastrms.RMSProp(array(4, 3)).step(array(12)),
        ValueError,
        SHAPES.format((12,), (4, 3)) + ": pass grads.reshape((4, 3))",
    ),
    (
        lambda: fastrms.RMSProp(array(4, 3)).step(array(3, 4)),
        ValueError,
        SHAPES.format((3, 4), (4, 3)) + ": pass np.ascontiguousarray(grads.T)",
    ),
    (
        lambda: fastrms.RMSProp(array(4, 3)).step(array(2, 6)),
        ValueError,
        SHAPES.format((2, 6), (4, 3)) + "; give both the same shape",
    ),
    (
        lambda: fastrms.RMSProp(array(5)).step(array(4)),
        ValueError,
        SHAPES.format((4,), (5,)) + "; give both the same shape",
    ),
    (
        lambda: fastrms.RMSProp(SAME).step(SAME),
        ValueError,
        "grads and params overlap in memory; every buffer of a step must be separate: pass arrays that share no memory, "
        "such as a copy",
    ),
    # options
    (
        lambda: fastrms.RMSProp(of_two(), groups=[{"params": array(), "lr": 0.1}]),
        TypeError,
        f"groups=[{{'params': {SHOWN}, 'lr': 0.1}}] must be a mapping name pattern -> mapping of hyper-parameters; a list "
        "of groups is itself params: [{'params': w, 'lr': 0.1}, ...]",
    ),
    *[
        (
            lambda name=name: fastrms.RMSProp(array(), **{name: array()}),
            TypeError,
            f"{name}={SHOWN} is an ndarray; it must be a number",
        )
        for name in ("lr", "eps")
    ],
    *[
        (
            lambda name=name: fastrms.RMSProp(array()).step(array(), **{name: array()}),
            TypeError,
            f"{name}={SHOWN} is an ndarray; it must be a number",
        )
        for name in ("clip_norm", "grad_scale")
    ],
    (
        lambda: fastrms.RMSProp(array(), array()),
        TypeError,
        "RMSProp takes its arrays in one argument, hyper-parameters by name: write RMSProp([w, b], lr=0.01); gradients go "
        "to step() or bind()",
    ),
    *[
        (
            lambda name=name, value=value: fastrms.RMSProp(array()).streaming(**{name: value}),
            TypeError,
            f"streaming() takes grad_scale alone, no {name}: clip_norm and nonfinite need all gradients at once, which "
            "step() gets",
        )
        for name, value in (("clip_norm", 1.0), ("nonfinite", "skip"))
    ],
    *[
        (
            lambda optimizer=optimizer: fastrms.init_state(optimizer, array()),
            ValueError,
            f"optimizer={optimizer!r} is not one of 'rmsprop', 'adagrad', 'adam', 'rprop'{remedy}",
        )
        for optimizer, remedy in (
            ("RMSProp", ": write 'rmsprop'"),
            ("AdaGrad", ": write 'adagrad'"),
            ("rms_prop", ": write 'rmsprop'"),
            (fastrms.Adam, ": write 'adam'"),
            (fastrms.rprop, ": write 'rprop'"),
            ("sgd", ""),
        )
    ],
    (
        lambda: fastrms.RMSProp({"w": array(), "b": array()}, groups={"b": {"learning_rate": 0.1}}),
        TypeError,
        "groups['b']: RMSProp has no hyper-parameter 'learning_rate'; for learning_rate write lr",
    ),
    (
        lambda: fastrms.rmsprop(array(), array(), 0 * array(), alpha=0.1),
        TypeError,
        "rmsprop has no argument 'alpha'; for alpha write rho; it has grad_avg, momentum_buffer, step, grad_scale, lr, rho, "
        "eps, eps_root, momentum, nesterov, weight_decay, decoupled, maximize, clip_value, lr_in_momentum, "
        "bias_correction, dialect, backend, param_copy, rounding, seed",
    ),
    (
        lambda: fastrms.init_state(array(), "adam"),
        TypeError,
        "optimizer is an ndarray; it must be one of 'rmsprop', 'adagrad', 'adam', 'rprop', and comes before param: write "
        "init_state('adam', param)",
    ),
    (
        lambda: EarlyStopping(array(), optimizer=fastrms.RMSProp),
        TypeError,
        "optimizer=RMSProp is a class; pass the optimizer that is in use, an object of it: RMSProp(params)",
    ),
    (lambda: Cosine(0.1, steps=5)(-1), ValueError, "step=-1 must be at least 0"),
]


@pytest.mark.parametrize("call, error, sentence", WRONG, ids=lambda x: x[:60] if isinstance(x, str) else "")
def test_what_is_said(call, error, sentence):
    with pytest.raises(error) as raised:
        call()
    said = str(raised.value)
    assert said == sentence or said.startswith(f"{sentence};")


def test_q8_of_a_flat_buffer_becomes_that_of_names_as_the_sentence_says():
    params = of_two()
    whole = fastrms.Adam(fastrms.FlatBuffer.like(params), state_format="q8")
    each = fastrms.Adam(params, state_format="q8")
    with pytest.raises(ValueError) as raised:
        each.load_state_dict(whole.state_dict())
    assert str(raised.value) == (
        "the state_dict has no params['w']: params was saved whole, as q8 states of a FlatBuffer are; load it into an "
        "optimizer of such a FlatBuffer without state_format, with convert='q8', and load the state_dict() of that one here "
        "with convert='float32'"
    )
    plain = fastrms.Adam(fastrms.FlatBuffer.like(params))
    plain.load_state_dict(whole.state_dict(), convert="q8")
    each.load_state_dict(plain.state_dict(), convert="float32")


def test_load_speaks_of_no_state_dict_beside(tmp_path):
    pytest.importorskip("safetensors.numpy")
    fastrms.RMSProp(array(), state_format="bf16").save(tmp_path / "o")
    with pytest.raises(ValueError, match="or pass convert='bf16', which decodes it") as raised:
        fastrms.RMSProp(array()).load(tmp_path / "o")
    assert "beside" not in str(raised.value)


@pytest.mark.parametrize("schedule", [lambda: 0.1, lambda step, epoch: 0.1, lambda *, step: 0.1])
@pytest.mark.parametrize("make", [
    lambda schedule: fastrms.RMSProp(array(), lr=schedule),
    lambda schedule: setattr(fastrms.RMSProp(array()), "lr", schedule),
    lambda schedule: fastrms.RMSProp([{"params": array(), "lr": schedule}]),
], ids=["constructor", "lr", "group"])  # fmt: skip
def test_a_schedule_that_cannot_be_called_is_refused_at_once(make, schedule):
    with pytest.raises(TypeError, match=r"^lr=<function .*> cannot be called with the number of steps made, .*"
                                        r": it must take one argument, such as lr=lambda step: "):  # fmt: skip
        make(schedule)


def test_a_schedule_that_cannot_say_what_it_takes_is_called():
    class Unsaid:
        __signature__ = "none"

        def __call__(self, step):
            return 0.5

    for schedule in (Unsaid(), {0: 0.5}.__getitem__, lambda *steps: 0.5, lambda step, scale=0.5: scale):
        w = array(3)
        fastrms.AdaGrad(w, lr=schedule).step(array(3))
        assert (w == 0.5).all()


def test_the_kind_of_a_thing_has_its_article():
    things = (
        (1, "an int"),
        ([], "a list"),
        (array(), "an ndarray"),
        (fastrms.RMSProp(array()), "an RMSProp"),
        (None, "a NoneType"),
    )
    assert all(words.kind_of(thing) == said for thing, said in things)


def test_an_array_is_shown_by_its_shape():
    w = array()
    shown = words.shown([(w,), {"w": w, "n": (1, 2)}, np.float32(3), "x"])
    assert shown == f"[({SHOWN},), {{'w': {SHOWN}, 'n': (1, 2)}}, {np.float32(3)!r}, 'x']"


def test_no_reshaping_is_advised_of_what_was_bound_in_another_shape():
    now, before = (host.acquire(array(*shape), "params", writable=True) for shape in ((1, 5), (5,)))
    with pytest.raises(ValueError, match=r"^params has shape \(1, 5\), params when it was bound has \(5,\)$"):
        host.same_layout(now, "params", before, "params when it was bound")
