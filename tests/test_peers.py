"""Live comparison of every dialect with the framework it names: PyTorch, Keras 3, Optax, TensorFlow 1, MindSpore.

Marker `peers`.  A framework that is not installed is skipped with the reason.  Each test makes 24 steps on fixed random
gradients, from the framework's own defaults unless it requires a value, and halves the learning rate in mid-run.
KERAS_BACKEND chooses Keras' backend (torch where it is there, else jax).
"""

import importlib
import importlib.util
import inspect
import os
import warnings

import numpy as np
import pytest

import fastrms

# The frameworks' own warnings (deprecations, missing GPUs) are not ours to raise.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

STEPS, SIZE, HALVED_AT = 24, 67, 12

# ULP of the largest parameter after any of the steps; the measured maximum is in brackets.
BOUNDS = {
    # Decoupled decay is param*(1 - lr*decay), float32 sqrt is not correctly rounded on every build, loops use FMA.
    ("torch", "float32"): 15,  # (6.0)
    ("torch", "float64"): 12,  # (5.0)
    # param - param*decay*lr as a step of its own, and beta**t in the variable's dtype.
    ("keras", "float32"): 25,  # (9.0)
    ("keras", "float64"): 15,  # (5.0)
    ("optax", "float32"): 10,  # (2.5)
    ("optax", "float64"): 12,  # (4.5)
    # 1 - beta and the running beta**t are made in the variable's dtype: float32(1) - float32(0.999) is off by 1.3e-5.
    ("tf1", "float32"): 60,  # (22.0)
    ("tf1", "float64"): 12,  # (5.0)
    # As TF1; no bias correction in AdamW takes the 1.3e-5 out again.
    ("mindspore", "float32"): 50,  # (19.5)
}


def imported(*names):
    """The modules, or skip; a framework may warn while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            pytest.skip(f"not installed: {error}")


@pytest.fixture(scope="module")
def torch():
    return imported("torch")[0]


@pytest.fixture(scope="module")
def keras():
    if "KERAS_BACKEND" not in os.environ:
        os.environ["KERAS_BACKEND"] = "torch" if importlib.util.find_spec("torch") else "jax"
    if os.environ["KERAS_BACKEND"] == "jax":
        imported("jax")[0].config.update("jax_enable_x64", True)
    return imported("keras")[0]


@pytest.fixture(scope="module")
def optax():
    jax, optax = imported("jax", "optax")
    jax.config.update("jax_enable_x64", True)
    return optax


@pytest.fixture(scope="module")
def train():
    """TensorFlow 1's optimizers."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return imported("tensorflow")[0].compat.v1.train


@pytest.fixture(scope="module")
def mindspore():
    return imported("mindspore")[0]


# the problem: gradients of many magnitudes, so that an eps of 1e-10 to 1e-6 shows wherever it stands; one is always 0


def problem(dtype):
    random = np.random.default_rng(11)
    gradients = random.normal(size=(STEPS, SIZE)) * 10 ** random.uniform(-7, 0, SIZE)
    gradients[:, 0] = 0
    return (0.1 * random.normal(size=SIZE)).astype(dtype), gradients.astype(dtype)


def ours(name, dialect, dtype, options, halve=True):
    """Our parameters after each step."""
    param, gradients = problem(dtype)
    optimizer = getattr(fastrms, name)(param, dialect=dialect, **options)
    path = []
    for k, gradient in enumerate(gradients):
        if halve and k == HALVED_AT:
            optimizer.lr = optimizer.lr / 2
        optimizer.step(gradient)
        path.append(param.copy())
    return np.array(path)


def ulps(path, expected):
    """The largest error in ULP of the largest parameter."""
    assert path.dtype == expected.dtype
    assert np.isfinite(expected).all()
    assert np.mean(expected[-1] != expected[0]) > 0.75, "the peer must move"
    return float((np.abs(path - expected) / np.spacing(np.abs(expected).max())).max())


def assert_near(path, expected, framework):
    error = ulps(path, np.array(expected))
    print(f"{error:.1f} ULP")
    assert error <= BOUNDS[framework, str(path.dtype)]


def cases(table):
    """pytest parameters name, theirs, ours from {name: [(theirs, ours)]}."""
    return [
        pytest.param(name, theirs, mine, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in theirs.items()) or 'defaults'}")
        for name, rows in table.items()
        for theirs, mine in rows
    ]


BOTH = pytest.mark.parametrize("dtype", ["float32", "float64"])


# PyTorch

TORCH_NAMES = {"RMSProp": "RMSprop", "AdaGrad": "Adagrad", "Adam": "Adam", "AdamW": "AdamW", "RProp": "Rprop"}
TORCH = {
    "RMSProp": [
        ({}, {}),
        ({"alpha": 0.9, "eps": 1e-4}, {"rho": 0.9, "eps": 1e-4}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"centered": True}, {"centered": True}),
        ({"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"foreach": True, "momentum": 0.9}, {"momentum": 0.9}),
        (
            {"weight_decay": 0.1, "momentum": 0.9, "centered": True, "maximize": True, "eps": 1e-3},
            {"weight_decay": 0.1, "momentum": 0.9, "centered": True, "maximize": True, "eps": 1e-3},
        ),
    ],
    "AdaGrad": [
        ({}, {}),
        ({"lr_decay": 0.1}, {"lr_decay": 0.1}),
        ({"initial_accumulator_value": 0.1, "eps": 1e-4}, {"initial_value": 0.1, "eps": 1e-4}),
        ({"weight_decay": 0.1, "maximize": True}, {"weight_decay": 0.1, "maximize": True}),
        ({"fused": True, "lr_decay": 0.1}, {"lr_decay": 0.1}),
    ],
    "Adam": [
        ({}, {}),
        ({"betas": (0.8, 0.9), "eps": 1e-4}, {"beta1": 0.8, "beta2": 0.9, "eps": 1e-4}),
        ({"amsgrad": True, "betas": (0.9, 0.9)}, {"amsgrad": True, "beta2": 0.9}),
        ({"weight_decay": 0.1, "maximize": True}, {"weight_decay": 0.1, "maximize": True}),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True}, {"weight_decay": 0.1, "decoupled": True}),
        ({"fused": True, "weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    "AdamW": [
        ({}, {}),
        (
            {"weight_decay": 0.5, "maximize": True, "amsgrad": True},
            {"weight_decay": 0.5, "maximize": True, "amsgrad": True},
        ),
        ({"fused": True}, {}),
    ],
    "RProp": [
        ({}, {}),
        (
            {"lr": 1e-3, "etas": (0.3, 1.5), "step_sizes": (1e-4, 0.01), "maximize": True},
            {"lr": 1e-3, "eta_minus": 0.3, "eta_plus": 1.5, "step_min": 1e-4, "step_max": 0.01, "maximize": True},
        ),
        ({"lr": 1.0, "step_sizes": (1e-4, 0.01)}, {"lr": 1.0, "step_min": 1e-4, "step_max": 0.01}),
    ],
}


@BOTH
@pytest.mark.parametrize(("name", "theirs", "mine"), cases(TORCH))
def test_torch(torch, name, theirs, mine, dtype):
    start, gradients = problem(dtype)
    param = torch.nn.Parameter(torch.from_numpy(start))
    optimizer = getattr(torch.optim, TORCH_NAMES[name])([param], **theirs)
    path = []
    for k, gradient in enumerate(gradients):
        if k == HALVED_AT and name != "RProp":
            optimizer.param_groups[0]["lr"] /= 2
        param.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(param.detach().numpy().copy())
    assert_near(ours(name, "torch", dtype, mine, halve=name != "RProp"), path, "torch")


# state_dicts of torch, there and back in mid-run


def torch_steps(torch, optimizer, params, gradients):
    for gradient in gradients:
        for param, part in zip(params, np.split(gradient, [40]), strict=True):
            param.grad = torch.from_numpy(part.copy())
        optimizer.step()


def our_steps(optimizer, gradients):
    for gradient in gradients:
        optimizer.step(np.split(gradient, [40]))


@BOTH
@pytest.mark.parametrize("there", [True, False], ids=["from-torch", "to-torch"])
@pytest.mark.parametrize(("name", "theirs", "mine"), cases(TORCH))
def test_torch_takes_over_in_mid_run_and_we_from_torch(torch, name, theirs, mine, there, dtype):
    """The receiver is made with other numbers; it takes those of the state_dict, and both go on alike."""
    start, gradients = problem(dtype)
    ours = [part.copy() for part in np.split(start, [40])]
    params = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in ours]
    maker, structural = getattr(torch.optim, TORCH_NAMES[name]), ("momentum", "centered", "amsgrad")
    given = {k: v for k, v in (theirs if not there else mine).items() if k in structural}
    torch_optimizer = maker(params, **(theirs if there else {**given, "lr": 0.5}))
    our_optimizer = getattr(fastrms, name)(ours, **({**given, "lr": 0.5} if there else mine))
    if there:
        torch_steps(torch, torch_optimizer, params, gradients[:HALVED_AT])
        our_optimizer.load_torch_state_dict(torch_optimizer.state_dict())
        for x, param in zip(ours, params, strict=True):
            x[...] = param.detach().numpy()
    else:
        our_steps(our_optimizer, gradients[:HALVED_AT])
        torch_optimizer.load_state_dict(our_optimizer.to_torch_state_dict())
        for x, param in zip(ours, params, strict=True):
            param.data.copy_(torch.from_numpy(x))
    torch_steps(torch, torch_optimizer, params, gradients[HALVED_AT:])
    our_steps(our_optimizer, gradients[HALVED_AT:])
    expected = np.concatenate([start, *(param.detach().numpy() for param in params)]).reshape(2, -1)
    assert_near(np.concatenate([start, *ours]).reshape(2, -1), expected, "torch")
    steps = [int(state["step"]) for state in torch_optimizer.state_dict()["state"].values()]
    assert steps == [t["steps"] for t in our_optimizer.state_dict()["tensors"]] == [STEPS, STEPS]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_groups_and_tensors_without_gradient(torch, name):
    """Two groups, a tensor that torch has no state for, steps that differ; there and back gives the same state_dict."""
    params = [torch.nn.Parameter(torch.full((2, 3), k + 1.0)) for k in range(3)]
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2}]
    theirs = getattr(torch.optim, TORCH_NAMES[name])(groups)
    for k in range(2):
        params[0].grad, params[2].grad = torch.ones(2, 3), torch.ones(2, 3) if k else None
        theirs.step()
    ours = getattr(fastrms, name)([{"params": params[:2]}, {"params": params[2:]}])
    ours.load_torch_state_dict(theirs.state_dict())
    assert ours.lr == [0.1, 0.2] and ours.steps == 2
    assert [t["steps"] for t in ours.state_dict()["tensors"]] == [2, 0, 1]
    other = getattr(fastrms, name)([{"params": params[:2]}, {"params": params[2:]}])
    other.load_torch_state_dict(ours.to_torch_state_dict())
    assert str(other.state_dict()) == str(ours.state_dict())
    assert [group["params"] for group in ours.to_torch_state_dict()["param_groups"]] == [[0, 1], [2]]
    before, ones = [p.detach().clone() for p in params], [np.ones((2, 3), np.float32) for _ in range(3)]
    ours.step([ones[:2], ones[2:]])
    want = [p.detach().clone() for p in params]
    for p, x in zip(params, before, strict=True):
        p.data.copy_(x)
        p.grad = torch.ones(2, 3)
    theirs.step()
    assert all(torch.allclose(p, x, rtol=1e-6, atol=0) for p, x in zip(params, want, strict=True))


# Keras 3

KERAS_NAMES = {"RMSProp": "RMSprop", "AdaGrad": "Adagrad", "Adam": "Adam", "AdamW": "AdamW"}
KERAS = {
    "RMSProp": [
        ({}, {}),
        ({"rho": 0.99, "epsilon": 1e-3}, {"rho": 0.99, "eps_root": 1e-3}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"centered": True}, {"centered": True}),
        ({"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9}),
        ({"weight_decay": 0.1, "momentum": 0.9}, {"weight_decay": 0.1, "momentum": 0.9}),
        ({"clipvalue": 0.01, "epsilon": 1e-5}, {"clip_value": 0.01, "eps_root": 1e-5}),
    ],
    "AdaGrad": [
        ({}, {}),
        ({"initial_accumulator_value": 0.01, "epsilon": 1e-3}, {"initial_value": 0.01, "eps_root": 1e-3}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    "Adam": [
        ({}, {}),
        ({"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}, {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3}),
        ({"amsgrad": True, "beta_2": 0.9}, {"amsgrad": True, "beta2": 0.9}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    "AdamW": [({}, {}), ({"weight_decay": 0.5, "amsgrad": True}, {"weight_decay": 0.5, "amsgrad": True})],
}


@BOTH
@pytest.mark.parametrize(("name", "theirs", "mine"), cases(KERAS))
def test_keras(keras, name, theirs, mine, dtype):
    keras.config.set_floatx(dtype)
    start, gradients = problem(dtype)
    variable = keras.Variable(start, dtype=dtype)
    optimizer = getattr(keras.optimizers, KERAS_NAMES[name])(**theirs)
    path = []
    for k, gradient in enumerate(gradients):
        if k == HALVED_AT:
            optimizer.learning_rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate)) / 2
        optimizer.apply([keras.ops.convert_to_tensor(gradient, dtype=dtype)], [variable])
        path.append(np.array(keras.ops.convert_to_numpy(variable)))
    assert_near(ours(name, "keras", dtype, mine), path, "keras")


# Optax, which requires a learning rate; a schedule is called with the number of steps done, as ours is

OPTAX_NAMES = {"rmsprop": "RMSProp", "adagrad": "AdaGrad", "adam": "Adam", "amsgrad": "Adam", "adamw": "AdamW"}
OPTAX = {
    "rmsprop": [
        ({}, {}),
        ({"eps_in_sqrt": False}, {"eps": 1e-8, "eps_root": 0.0}),
        ({"decay": 0.99, "initial_scale": 1.0, "eps": 1e-3}, {"rho": 0.99, "initial_value": 1.0, "eps_root": 1e-3}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
        ({"centered": True}, {"centered": True}),
        ({"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9}),
        ({"bias_correction": True}, {"bias_correction": "corrected"}),
    ],
    "adagrad": [
        ({}, {}),
        ({"initial_accumulator_value": 0.01, "eps": 1e-3}, {"initial_value": 0.01, "eps_root": 1e-3}),
    ],
    "adam": [
        ({}, {}),
        (
            {"b1": 0.8, "b2": 0.9, "eps": 1e-4, "eps_root": 1e-6},
            {"beta1": 0.8, "beta2": 0.9, "eps": 1e-4, "eps_root": 1e-6},
        ),
        ({"nesterov": True}, {"nesterov": "dozat"}),
    ],
    "amsgrad": [
        ({"b2": 0.9}, {"amsgrad": True, "beta2": 0.9}),
        ({"b2": 0.9, "eps_root": 1e-6}, {"amsgrad": True, "beta2": 0.9, "eps_root": 1e-6}),
    ],
    "adamw": [
        ({}, {}),
        ({"weight_decay": 0.5, "nesterov": True}, {"weight_decay": 0.5, "nesterov": "dozat"}),
    ],
}


def optax_path(optax, transform, dtype):
    import jax.numpy as jnp

    start, gradients = problem(dtype)
    param = jnp.asarray(start)
    state = transform.init(param)
    path = []
    for gradient in gradients:
        updates, state = transform.update(jnp.asarray(gradient), state, param)
        param = optax.apply_updates(param, updates)
        path.append(np.asarray(param))
    return np.array(path)


@BOTH
@pytest.mark.parametrize(("name", "theirs", "mine"), cases(OPTAX))
def test_optax(optax, name, theirs, mine, dtype):
    import jax.numpy as jnp

    transform = getattr(optax, name)(lambda done: jnp.where(done < HALVED_AT, 0.01, 0.005), **theirs)
    schedule = {"lr": lambda done: 0.01 if done < HALVED_AT else 0.005}
    path = ours(OPTAX_NAMES[name], "optax", dtype, {**mine, **schedule}, halve=False)
    assert_near(path, optax_path(optax, transform, dtype), "optax")


def lagged_rprop(dtype):
    """RProp that moves by what the step before should have moved, and not at all where the sign flips now."""
    param, gradients = problem(dtype)
    optimizer = fastrms.RProp(param.copy(), dialect="optax", lr=0.01)
    last, path = np.zeros_like(param), []
    for gradient in gradients:
        flips = gradient * optimizer.state["prev"] < 0
        optimizer.step(gradient)
        param = param - np.where(flips, 0, last).astype(dtype)
        last = np.sign(optimizer.state["prev"]) * optimizer.state["step_size"]
        path.append(param)
    return np.array(path)


@BOTH
def test_optax_rprop(optax, dtype):
    """Optax 0.2.8 emits the previous step's update (its pull request 1725); ours is the paper's.  Either way the step
    sizes are the same, and Optax' path is one of the two."""
    theirs = optax_path(optax, optax.rprop(0.01), dtype)
    papers = ours("RProp", "optax", dtype, {"lr": 0.01}, halve=False)
    lagged = lagged_rprop(dtype)
    assert ulps(lagged, papers) > 1e6
    errors = ulps(papers, theirs), ulps(lagged, theirs)
    print(f"{errors[0]:.1f} ULP from the paper's, {errors[1]:.1f} ULP from the lagging form")
    assert min(errors) <= BOUNDS["optax", dtype]


# TensorFlow 1.  np.float64 values: a Python float becomes float32 there whatever the variable is.

TF1_NAMES = {"RMSProp": "RMSPropOptimizer", "AdaGrad": "AdagradOptimizer", "Adam": "AdamOptimizer"}
TF1 = {
    "RMSProp": [
        ({}, {}),
        ({"decay": 0.99, "epsilon": 1e-3}, {"rho": 0.99, "eps_root": 1e-3}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"centered": True}, {"centered": True}),
        ({"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9}),
    ],
    "AdaGrad": [({}, {}), ({"initial_accumulator_value": 0.01}, {"initial_value": 0.01})],
    "Adam": [({}, {}), ({"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3}, {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3})],
}


def exact(maker, given):
    """The maker's defaults and the given values with every float as np.float64."""
    signature = inspect.signature(maker)
    values = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    return {name: np.float64(v) if isinstance(v, float) else v for name, v in {**values, **given}.items()}


@BOTH
@pytest.mark.parametrize(("name", "theirs", "mine"), cases(TF1))
def test_tf1(train, name, theirs, mine, dtype):
    import tensorflow as tf

    start, gradients = problem(dtype)
    variable = tf.Variable(start)
    rate = [np.float64(0.01)]
    maker = getattr(train, TF1_NAMES[name])
    options = exact(maker, {**theirs, "learning_rate": lambda: rate[0]})
    optimizer = maker(**options)
    path = []
    for k, gradient in enumerate(gradients):
        if k == HALVED_AT:
            rate[0] = rate[0] / 2
        optimizer.apply_gradients([(tf.constant(gradient), variable)])
        path.append(variable.numpy().copy())
    assert_near(ours(name, "tf1", dtype, {**mine, "lr": 0.01}), path, "tf1")


@BOTH
def test_tf1_nesterov(train, dtype):
    """Only TensorFlow's kernel has the flag; the Python class does not pass it on."""
    import tensorflow as tf

    start, gradients = problem(dtype)
    param, m, v = tf.Variable(start), tf.Variable(np.zeros_like(start)), tf.Variable(np.zeros_like(start))
    scalar = np.dtype(dtype).type
    path = []
    for t, gradient in enumerate(gradients, 1):
        tf.raw_ops.ResourceApplyAdam(
            var=param.handle, m=m.handle, v=v.handle, beta1_power=scalar(0.9**t), beta2_power=scalar(0.999**t),
            lr=scalar(0.01), beta1=scalar(0.9), beta2=scalar(0.999), epsilon=scalar(1e-8), grad=gradient,
            use_nesterov=True,
        )  # fmt: skip
        path.append(param.numpy().copy())
    mine = {"lr": 0.01, "nesterov": "folded"}
    assert_near(ours("Adam", "tf1", dtype, mine, halve=False), path, "tf1")


# MindSpore, float32 on the CPU

MINDSPORE_NAMES = {"AdaGrad": "Adagrad", "AdamW": "AdamWeightDecay", "RProp": "Rprop"}
MINDSPORE = {
    "RMSProp": [
        ({}, {}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"centered": True}, {"centered": True}),
        ({"centered": True, "decay": 0.99, "epsilon": 1e-3}, {"centered": True, "rho": 0.99, "eps_root": 1e-3}),
        ({"centered": True, "momentum": 0.9}, {"centered": True, "momentum": 0.9}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    "AdaGrad": [
        ({}, {}),
        ({"accum": 1e-7}, {"initial_value": 1e-7}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
    "Adam": [
        ({}, {}),
        ({"beta1": 0.8, "beta2": 0.9, "eps": 1e-3}, {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"use_nesterov": True}, {"nesterov": "folded"}),
        ({"use_amsgrad": True, "beta2": 0.9}, {"amsgrad": True, "beta2": 0.9}),
    ],
    "AdamW": [({}, {}), ({"weight_decay": 0.5, "eps": 1e-3}, {"weight_decay": 0.5, "eps": 1e-3})],
    "RProp": [
        ({}, {}),
        (
            {"learning_rate": 1e-3, "etas": (0.3, 1.5), "step_sizes": (1e-4, 0.01)},
            {"lr": 1e-3, "eta_minus": 0.3, "eta_plus": 1.5, "step_min": 1e-4, "step_max": 0.01},
        ),
    ],
}


def mindspore_path(mindspore, name, theirs, start, gradients):
    parameter = mindspore.Parameter(mindspore.Tensor(start.copy()), name="weight")
    optimizer = getattr(mindspore.nn, MINDSPORE_NAMES.get(name, name))([parameter], **theirs)
    path = []
    for gradient in gradients:
        optimizer((mindspore.Tensor(gradient.copy()),))
        path.append(parameter.asnumpy().copy())
    return np.array(path)


@pytest.mark.parametrize(("name", "theirs", "mine"), cases(MINDSPORE))
def test_mindspore(mindspore, name, theirs, mine):
    path = mindspore_path(mindspore, name, theirs, *problem("float32"))
    assert_near(ours(name, "mindspore", "float32", mine, halve=False), path, "mindspore")


@pytest.mark.parametrize(("name", "theirs"), [("RMSProp", {"momentum": 0.9}), ("AdaGrad", {}), ("Adam", {})])
def test_mindspore_lr_in_mid_run(mindspore, name, theirs):
    """A list of rates, one per step."""
    rates = [0.01] * HALVED_AT + [0.005] * (STEPS - HALVED_AT)
    path = mindspore_path(mindspore, name, {**theirs, "learning_rate": rates}, *problem("float32"))
    assert_near(ours(name, "mindspore", "float32", {**theirs, "lr": 0.01}), path, "mindspore")


def test_mindspore_rmsprop_has_its_eps_in_two_places(mindspore):
    """Uncentered on the CPU, its vectorised loop adds eps outside the root and the scalar tail inside, and where the
    tails lie changes with its search for a number of threads.  The preset is the tail's, which its GPU and its
    centered kernel share.  Five elements fill no vector of eight: all tail.  Among 67 both forms are there."""
    theirs, (start, gradients) = {"decay": 0.5, "epsilon": 0.1}, problem("float32")
    inside, outside = {"rho": 0.5, "eps_root": 0.1}, {"rho": 0.5, "eps_root": 0.0, "eps": 0.1}
    tail = mindspore_path(mindspore, "RMSProp", theirs, start[-5:], gradients[:, -5:])
    assert_near(ours("RMSProp", "mindspore", "float32", inside, halve=False)[:, -5:], tail, "mindspore")
    first = mindspore_path(mindspore, "RMSProp", theirs, start, 1e4 * gradients[:1])[0]
    candidates = []
    for options in (inside, outside):
        param = start.copy()
        fastrms.RMSProp(param, dialect="mindspore", **options).step(1e4 * gradients[0])
        candidates.append(np.abs(param - first) / np.spacing(np.abs(first).max()))
    assert np.minimum(*candidates).max() <= BOUNDS["mindspore", "float32"]
    assert candidates[0].max() > 1000


# schedules


def random_metrics(seed):
    """Multiples of 1/64, so that float32 and float64 compare them alike; thresholds are odd multiples of 1/128."""
    rng = np.random.default_rng(seed)
    falling = 2 - np.minimum(np.cumsum(rng.random(80)) / 30, 0.7)
    return (np.round((falling + rng.normal(size=80) * rng.choice([0.01, 0.1])) * 64) / 64).tolist()


def torch_rates(torch, metrics, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    names = {"eps": "min_change"}
    given = {name: options[names.get(name, name)] for name in (*PLATEAU, "threshold_mode", "eps", "threshold")}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **given)
    for metric in metrics:
        scheduler.step(metric)
        yield optimizer.param_groups[0]["lr"]


def keras_rates(keras, metrics, options):
    given = {name: options[name] for name in PLATEAU}
    callback = keras.callbacks.ReduceLROnPlateau("loss", min_delta=options["threshold"], **given)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.optimizer = keras.optimizers.SGD(0.1)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, metric in enumerate(metrics):
        callback.on_epoch_end(epoch, {"loss": metric})
        yield float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


PLATEAU = ("factor", "patience", "mode", "cooldown", "min_lr")


def plateau_options(seed):
    rng = np.random.default_rng(seed)
    return {
        "factor": 0.5, "patience": int(rng.integers(0, 5)), "mode": str(rng.choice(["min", "min", "max"])),
        "cooldown": int(rng.integers(0, 4)), "min_lr": float(rng.choice([0, 0.003])),
        "threshold": float(rng.choice([1, 3, 9])) / 128, "threshold_mode": str(rng.choice(["abs", "rel"])),
        "min_change": float(rng.choice([0, 0.001])),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_torch_plateau(torch, seed):
    options, metrics = plateau_options(seed), random_metrics(seed)
    plateau = fastrms.schedules.Plateau(0.1, **options)
    mine = [(plateau.update(metric), plateau.rate)[1] for metric in metrics]
    assert mine == list(torch_rates(torch, metrics, options)) and mine[-1] < 0.1


@pytest.mark.parametrize("seed", range(40))
def test_keras_plateau(keras, seed):
    options, metrics = plateau_options(seed), random_metrics(seed)
    del options["threshold_mode"], options["min_change"]
    plateau = fastrms.schedules.Plateau.keras(0.1, **options)
    mine = [(plateau.update(metric), plateau.rate)[1] for metric in metrics]
    theirs = list(keras_rates(keras, metrics, options))  # float32
    assert np.allclose(mine, theirs, rtol=1e-5, atol=0) and mine[-1] < 0.1


@pytest.mark.parametrize("patience", [0, 1, 3, 6])
@pytest.mark.parametrize("seed", range(8))
def test_keras_early_stopping(keras, seed, patience):
    metrics, model = random_metrics(seed), keras.Sequential([keras.layers.Dense(1)])
    callback = keras.callbacks.EarlyStopping("loss", min_delta=1 / 128, patience=patience, mode="min")
    callback.set_model(model)
    callback.on_train_begin()
    stopping = fastrms.schedules.EarlyStopping(np.ones(1), patience, threshold=1 / 128)
    for epoch, metric in enumerate(metrics):
        callback.on_epoch_end(epoch, {"loss": metric})
        assert stopping.update(metric) == (callback.stopped_epoch == epoch > 0)
        if callback.stopped_epoch:
            return


def torch_schedule(torch, make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_torch_schedules(torch):
    kinds = torch.optim.lr_scheduler
    for mine, make in [
        (fastrms.schedules.Step(0.1, 7, 0.3), lambda o: kinds.StepLR(o, 7, 0.3)),
        (fastrms.schedules.Exponential(0.1, 0.9), lambda o: kinds.ExponentialLR(o, 0.9)),
        (fastrms.schedules.Cosine(0.1, 50, end=0.01), lambda o: kinds.CosineAnnealingLR(o, 50, eta_min=0.01)),
    ]:
        assert np.allclose([mine(t) for t in range(51)], list(torch_schedule(torch, make, 51)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("staircase", [False, True])
def test_keras_exponential(keras, staircase):
    theirs = keras.optimizers.schedules.ExponentialDecay(0.1, 7, 0.3, staircase=staircase)
    mine = fastrms.schedules.Exponential(0.1, 0.3, 7, staircase=staircase)
    assert np.allclose([mine(t) for t in range(50)], [float(theirs(t)) for t in range(50)], rtol=1e-5, atol=0)


def test_optax_cosine_and_its_schedules_as_ours(optax):
    """Float32 there.  An Optax schedule goes where ours goes."""
    theirs = optax.warmup_cosine_decay_schedule(0.01, 0.1, 5, 20, 0.001)
    mine = fastrms.schedules.Cosine(0.1, 20, end=0.001, warmup=5, start=0.01)
    assert np.allclose([mine(t) for t in range(25)], [float(theirs(t)) for t in range(25)], rtol=2e-6, atol=0)
    paths = [ours("Adam", "optax", "float64", {"lr": lr}, halve=False) for lr in (mine, theirs)]
    assert np.allclose(*paths, rtol=1e-5, atol=1e-7)
