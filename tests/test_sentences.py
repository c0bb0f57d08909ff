"""What is said of wrong arguments that people have written: what is wrong, with its remedy."""

import numpy as np
import pytest

import fastrms
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
    # options
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
