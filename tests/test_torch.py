"""fastrms.torch beside torch.optim: every option in every dtype, after the list of cases in PyTorch's own test suite
(OptimizerInfo in torch/testing/_internal/common_optimizers.py); and the bits of fastrms on NumPy arrays."""

import copy
import inspect

import numpy as np
import pytest
from conftest import bits

import fastrms

torch = pytest.importorskip("torch", reason="not installed: torch")
ft = pytest.importorskip("fastrms.torch")
pytestmark = pytest.mark.peers

NAMES = ("RMSprop", "Adagrad", "Adam", "AdamW", "Rprop")
OPTIONS = {
    "RMSprop": [
        {}, {"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.1}, {"alpha": 0.9, "eps": 1e-5},
        {"weight_decay": 0.1, "centered": True}, {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "momentum": 0.9, "maximize": True}, {"centered": True, "maximize": True},
    ],
    "Adagrad": [
        {}, {"lr": 0.1}, {"maximize": True}, {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, {"eps": 1e-3},
    ],
    "Adam": [
        {}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True}, {"betas": (0.5, 0.75), "eps": 1e-4}, {"amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "AdamW": [
        {}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, {"amsgrad": True},
        {"betas": (0.5, 0.75), "weight_decay": 0},
    ],
    "Rprop": [{}, {"lr": 2e-4}, {"etas": (0.2, 1.5)}, {"lr": 2e-4, "step_sizes": (2e-5, 100.0)}, {"maximize": True}],
}  # fmt: skip
CASES = [(name, options) for name in NAMES for options in OPTIONS[name]]
DTYPES = [torch.float32, torch.float64]
BOUND = 8  # ULP of an element before or after a step, or of its change (measured: 5); torch has another order of operations
ADAM_FLOAT64 = 256  # torch has 1 - beta2**step, the difference of nearly equal numbers, in float64
STEPS = 6
LAYOUTS = {
    "vector": lambda dtype: torch.randn(67, dtype=dtype),
    "scalar": lambda dtype: torch.randn((), dtype=dtype),
    "empty": lambda dtype: torch.randn(0, 3, dtype=dtype),
    "transposed": lambda dtype: torch.randn(5, 13, dtype=dtype).t(),
    "channels last": lambda dtype: torch.randn(2, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last),
    "view": lambda dtype: torch.randn(99, dtype=dtype)[17:50],
}


def case_id(case):
    return " ".join(map(str, case)) if isinstance(case, tuple) else None


@pytest.fixture(params=CASES, ids=case_id)
def case(request):
    torch.manual_seed(5)
    return request.param


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    return request.param


def parameters(dtype, layouts=LAYOUTS):
    return [torch.nn.Parameter(LAYOUTS[name](dtype)) for name in layouts]


def give_grads(*lists):
    """The same new gradients, of many magnitudes, for the parameters of each list."""
    for params in zip(*lists, strict=True):
        grad = torch.randn_like(params[0]) * 10 ** (4 * torch.rand_like(params[0]) - 4)
        for param in params:
            param.grad = grad.clone()


def twins(name, options, dtype):
    """(torch's optimizer, ours, the parameters of each), which are equal."""
    params = parameters(dtype)
    mine = [torch.nn.Parameter(param.detach().clone()) for param in params]
    return getattr(torch.optim, name)(params, **options), getattr(ft, name)(mine, **options), params, mine


def numpy_of(tensor):
    return tensor.detach().numpy()


def ulps(after, expected, *others):
    """The largest difference in ULP of the largest element among expected and others, place by place."""
    unit = np.spacing(np.max([abs(numpy_of(x)) for x in (expected, *others)], axis=0))
    return float((abs(numpy_of(after) - numpy_of(expected)) / unit).max(initial=0))


def bound(name, dtype):
    return ADAM_FLOAT64 if name.startswith("Adam") and dtype is torch.float64 else BOUND


def values(optimizer, param):
    return {"param": param, **optimizer.state[param]}


def copies(optimizer, params):
    return [{name: x.detach().clone() for name, x in values(optimizer, param).items()} for param in params]


def assert_near(present, expected, old, grad, most):
    """Each value near that of torch, measured by what went into it; afterwards it is that of torch."""
    decayed = grad.abs() + 0.1 * old["param"].abs()
    for name, value in expected.items():
        assert (present[name].shape, present[name].dtype) == (value.shape, value.dtype), name
        before = old.get(name, torch.zeros_like(value))
        others = (before - value,) if name == "param" else (decayed, decayed**2) if name != "step" else ()
        assert ulps(present[name], value, before, *others) <= most, name
        with torch.no_grad():
            present[name].copy_(value)


def test_each_step_is_that_of_torch(case, dtype):
    """Each step starts from the parameters and states that torch has, so that its own difference is measured."""
    theirs, ours, params, mine = twins(*case, dtype)
    for _ in range(STEPS):
        give_grads(params, mine)
        old = copies(theirs, params)
        theirs.step()
        ours.step()
        for param, twin, before in zip(params, mine, old, strict=True):
            assert param.numel() < 2 or not torch.equal(param, before["param"])
            assert ours.state[twin].keys() == theirs.state[param].keys()
            assert_near(values(ours, twin), values(theirs, param), before, param.grad, bound(type(theirs).__name__, dtype))


def ours_for(name, options):
    """The class and the arguments of fastrms for those of torch."""
    optimizer = getattr(ft, name)([torch.nn.Parameter(torch.ones(1))], **options)
    values = optimizer._checked(optimizer.param_groups[0])
    return getattr(fastrms, optimizer.kind), values


def test_bits_are_those_on_numpy_arrays(case, dtype):
    name, options = case
    _, ours, _, mine = twins(name, options, dtype)
    kind, values = ours_for(name, options)
    arrays = [numpy_of(param).copy(order="K") for param in mine]
    optimizer = kind(arrays, **values)
    for step in range(STEPS):
        give_grads(mine)
        if step == 3:
            ours.param_groups[0]["lr"] /= 4
            if name != "Rprop":
                optimizer.lr /= 4
        ours.step()
        optimizer.step([numpy_of(param.grad) for param in mine])
        for param, array in zip(mine, arrays, strict=True):
            assert np.array_equal(bits(numpy_of(param)), bits(array))
    for k, param in enumerate(mine):
        for key, value in optimizer.state.items():
            assert np.array_equal(bits(numpy_of(ours.state[param][key])), bits(value[k])), key


def test_states_go_to_torch_and_back(case, dtype):
    """Theirs is loaded, goes on as ours, and is given back: as if torch had gone on, but for the rounding of each step."""
    name, options = case
    theirs, ours, params, mine = twins(name, options, dtype)
    other = getattr(torch.optim, name)(params, **options)
    for optimizer, source in ((theirs, None), (ours, theirs), (other, ours)):
        if source is not None:
            optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        for _ in range(3):
            give_grads(params, mine)
            optimizer.step()
            of, to = (mine, params) if optimizer is ours else (params, mine)
            with torch.no_grad():
                for param, twin in zip(of, to, strict=True):
                    twin.copy_(param)
    state = other.state[params[0]]
    assert state["step"] == 9 and all(torch.isfinite(value).all() for value in state.values())
    assert other.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_a_loaded_state_goes_on_as_the_one_it_came_from(case, dtype):
    theirs, ours, params, mine = twins(*case, dtype)
    for _ in range(3):
        give_grads(params, mine)
        theirs.step()
    with torch.no_grad():
        for param, twin in zip(params, mine, strict=True):
            twin.copy_(param)
    ours.load_state_dict(theirs.state_dict())
    give_grads(params, mine)
    old = copies(theirs, params)
    theirs.step()  # writes its own state, which ours has copied
    ours.step()
    for param, twin, before in zip(params, mine, old, strict=True):
        assert_near(values(ours, twin), values(theirs, param), before, param.grad, bound(type(theirs).__name__, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_torch_with_what_it_lacks_behind(name):
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = inspect.signature(getattr(ft, name)).parameters
    for parameter in theirs.values():
        mine = ours[parameter.name]
        assert (mine.kind, mine.default) == (parameter.kind, parameter.default)
    positional = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    beside = {"dialect", "clip_norm", "nonfinite", "zero_grad", "eps_root", "clip_value", "decoupled",
              "state_format", "master", "rounding", "seed"}  # fmt: skip
    assert ours.keys() - theirs.keys() <= beside
    group = getattr(ft, name)([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    for key, value in getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1))]).param_groups[0].items():
        assert key == "params" or (group[key] == value and type(group[key]) is type(value)), key


@pytest.mark.parametrize("name", NAMES)
def test_tensor_hyper_parameters(name, dtype):
    """lr as a tensor that a scheduler writes into."""
    theirs, ours, params, mine = twins(name, {}, dtype)
    rates = torch.tensor(0.01, dtype=dtype), torch.tensor([0.01], dtype=dtype)
    for optimizer, rate in zip((theirs, ours), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
    for _ in range(4):
        give_grads(params, mine)
        old = copies(theirs, params)
        theirs.step()
        ours.step()
        for param, twin, before in zip(params, mine, old, strict=True):
            assert_near(values(ours, twin), values(theirs, param), before, param.grad, bound(type(theirs).__name__, dtype))
        for rate in rates:
            rate.mul_(0.5)
    made = getattr(ft, name)(parameters(dtype), lr=torch.tensor(0.5))
    assert made.param_groups[0]["lr"] == 0.5 and torch.is_tensor(made.param_groups[0]["lr"])
    if name.startswith("Adam"):
        made = getattr(ft, name)(parameters(dtype), betas=(torch.tensor(0.5), torch.tensor(0.75)))
        assert tuple(map(float, made.param_groups[0]["betas"])) == (0.5, 0.75)


@pytest.mark.parametrize("name, argument, value", [
    *[(name, "capturable", True) for name in NAMES if name != "Adagrad"],
    *[(name, "differentiable", True) for name in NAMES],
    ("Adam", "foreach", "yes"), ("RMSprop", "lr", -1.0), ("RMSprop", "alpha", 1.5), ("RMSprop", "momentum", -0.1),
    ("Adam", "betas", (1.0, 0.9)), ("Adam", "betas", (0.9,)), ("Adam", "eps", float("nan")), ("Adagrad", "lr_decay", -1),
    ("Rprop", "etas", (1.1, 1.2)), ("Rprop", "step_sizes", (1.0, 0.5)), ("AdamW", "weight_decay", -1),
    ("Adam", "lr", torch.ones(2)), ("Adam", "clip_norm", 0.0), ("Adam", "nonfinite", "ignore"), ("Adam", "zero_grad", 1),
    ("Adam", "clip_value", 0.0), ("Adam", "eps_root", -1.0), ("Rprop", "dialect", "keras"), ("Adam", "lr", "fast"),
    ("RMSprop", "initial_accumulator_value", 1.0), ("Adam", "centered", True),
])  # fmt: skip
def test_what_is_refused_is_named(name, argument, value):
    said = {"etas": "eta_minus=1.1", "step_sizes": "step_min"}.get(argument, argument)
    with pytest.raises((TypeError, ValueError), match=said):
        getattr(ft, name)([torch.nn.Parameter(torch.ones(3))], **{argument: value})


@pytest.mark.parametrize("name, argument, words", [
    ("RMSprop", "rho", "RMSprop has no argument 'rho'; for rho write alpha; it has params, lr"),
    ("Adam", "beta1", "for beta1 write betas"), ("Adam", "beta_2", "for beta_2 write betas"),
    ("Adam", "learning_rate", "for learning_rate write lr"), ("Adam", "decoupled", "write decoupled_weight_decay"),
    ("AdamW", "decoupled", "AdamW has no argument 'decoupled'; it has"), ("Rprop", "step_min", "write step_sizes"),
    ("Adagrad", "initial_value", "write initial_accumulator_value"), ("Adam", "epochs", "no argument 'epochs'; it has"),
])  # fmt: skip
def test_an_argument_of_another_name_is_refused_with_its_name_here(name, argument, words):
    with pytest.raises(TypeError, match=words):
        getattr(ft, name)([torch.nn.Parameter(torch.ones(3))], **{argument: 0.5})


def test_the_remedy_for_parameters_of_integers_works():
    with pytest.raises(TypeError, match=r"pass what is trained, list\(model.parameters\(\)\)$"):
        ft.RMSprop([torch.ones(3, dtype=torch.int)])
    model = torch.nn.Linear(3, 2)
    ft.RMSprop(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_foreach_and_fused_change_nothing(name):
    for argument in {"foreach", "fused"} & inspect.signature(getattr(ft, name)).parameters.keys():
        for value in (None, False, True):
            optimizer = getattr(ft, name)([torch.nn.Parameter(torch.ones(3))], **{argument: value})
            assert optimizer.param_groups[0][argument] is value


# what torch lacks


@pytest.mark.parametrize("dialect, options", [
    ("tf1", {}), ("tf1", {"alpha": 0.99, "momentum": 0.9}), ("keras", {}), ("optax", {"momentum": 0.9}), ("mindspore", {}),
])  # fmt: skip
def test_dialects(dialect, options, dtype):
    params = parameters(dtype)
    arrays = [numpy_of(param).copy(order="K") for param in params]
    ours = ft.RMSprop(params, dialect=dialect, **options)
    names = {"alpha": "rho"}
    optimizer = fastrms.RMSProp(arrays, dialect=dialect, **{names.get(key, key): x for key, x in options.items()})
    for _ in range(3):
        give_grads(params)
        ours.step()
        optimizer.step([numpy_of(param.grad) for param in params])
    for param, array in zip(params, arrays, strict=True):
        assert np.array_equal(bits(numpy_of(param)), bits(array))
    group = ours.param_groups[0]
    assert group["alpha"] == options.get("alpha", 0.9) and group["lr"] == optimizer.lr


def test_clipping_by_norm_and_value_and_zeroed_gradients():
    params, arrays = (
        [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(3))],
        [np.ones(5, "f"), np.ones(3, "f")],
    )
    ours = ft.Adam(params, clip_norm=0.5, clip_value=0.25, eps_root=1e-9, zero_grad=True)
    optimizer = fastrms.Adam(arrays, clip_value=0.25, eps_root=1e-9)
    for _ in range(3):
        give_grads(params)
        grads = [numpy_of(param.grad).copy() for param in params]
        info = optimizer.step(grads, clip_norm=0.5)
        versions = [param.grad._version for param in params]
        ours.step()
        assert ours.step_info == info and info.grad_norm > 0
        assert all((param.grad == 0).all() for param in params)
        assert all(param.grad._version > old for param, old in zip(params, versions, strict=True))
    assert np.array_equal(bits(numpy_of(params[0])), bits(arrays[0]))


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_gradients_that_are_not_finite(nonfinite):
    param = torch.nn.Parameter(torch.ones(4))
    ours = ft.RMSprop([param], nonfinite=nonfinite)
    param.grad = torch.tensor([1.0, float("nan"), float("inf"), 1.0])
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"grads\[0\]\[0\]"):
            ours.step()
    else:
        ours.step()
    assert (param == 1).all() == (nonfinite != "propagate")
    assert ours.state[param]["step"] == (nonfinite == "propagate")
    assert ours.step_info.applied == (nonfinite == "propagate")
    if nonfinite == "propagate":
        other = torch.nn.Parameter(torch.ones(1))
        other.grad = torch.ones(1)
        ours.add_param_group({"params": [other]})
        ours.step()  # goes on, as torch does
        assert ours.state[param]["step"] == 2


def test_decoupled_decay_for_rmsprop():
    param, array = torch.nn.Parameter(torch.ones(4)), np.ones(4, "f")
    ours = ft.RMSprop([param], decoupled=True, weight_decay=0.1)
    optimizer = fastrms.RMSProp(array, decoupled=True, weight_decay=0.1)
    param.grad = torch.arange(4.0)
    ours.step()
    optimizer.step(np.arange(4, dtype="f"))
    assert np.array_equal(bits(numpy_of(param)), bits(array))
