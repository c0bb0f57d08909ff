"""People's own rules: a subclass of Optimizer has checks, groups, state_dict, clipping and threads, on NumPy and Numba."""

import functools
import gc
import math
import weakref

import numpy as np
import pytest
from conftest import BACKENDS, DTYPES, backends, bits
from test_readme import example

import fastrms
from fastrms import own_rules, rules
from fastrms.backends import trace
from fastrms.rules import clip, flush, larger, prepare, select, sign

names = {}
exec(example("class Lion"), names)
Lion = names["Lion"]


class Limited(fastrms.Optimizer):
    """A rule that uses what fastrms.rules offers, and whose coefficients change with the step."""

    defaults = {"lr": 0.1, "limit": 1.0, "form": "slow"}
    state_names = ("largest", "prev")

    @staticmethod
    def coefficients(step, lr, limit, form):
        return {"one": 1.0, "zero": 0.0, "tiny": 1e-30, "rate": lr / step if form == "slow" else lr, "high": limit,
                "low": -limit}  # fmt: skip

    @staticmethod
    def rule(param, grad, largest, prev, rate, low, high, tiny, zero, one):
        g = clip(grad, low, high)
        largest = flush(larger(largest, abs(g)), tiny, zero)
        return param - rate * sign(g, zero, one) * sign(prev, zero, one) * largest, largest, g

    @staticmethod
    def initial(h, state_name):
        return h.limit / 2 if state_name == "largest" else 1.0


class Named(fastrms.Optimizer):
    """States and coefficients named like what the text around a rule may name."""

    defaults = {"lr": 0.1}
    state_names = ("size", "first", "table", "vectors")

    @staticmethod
    def coefficients(step, lr):
        return {"row": lr / step, "i": 0.5, "number": 0.25, "kernel": 0.125, "rule": 2.0, "coefficients": 3.0, "at": 1.0}

    def rule(param, grad, size, first, table, vectors, i, row, kernel, number, rule, coefficients, at):
        size = i * size + grad
        first = first - number * size
        table = at * table + kernel * first
        vectors = vectors + rule * table
        return param - row * (size + coefficients * vectors), size, first, table, vectors


OWN = [name for name in BACKENDS if name in backends.FOR_OWN_RULES]


@pytest.fixture(params=OWN)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_lion_is_its_formula(backend, dtype):
    """The class of docs/own-rules.md against Chen et al. 2023, algorithm 2, in double."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((7, 30)).astype(dtype)
    theta, m = w.astype(float), 0.0
    optimizer = Lion(w, lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.1, backend=backend)
    for _ in range(50):
        g = rng.standard_normal(w.shape).astype(dtype)
        optimizer.step(g, grad_scale=0.5)
        update = np.sign(0.8 * m + 0.2 * 0.5 * g.astype(float))
        theta = theta - 0.01 * (update + 0.1 * theta)
        m = 0.95 * m + 0.05 * 0.5 * g.astype(float)
    assert np.allclose(w, theta, rtol=0, atol=50 * 4 * np.finfo(dtype).eps)
    assert np.allclose(optimizer.state["exp_avg"], m, rtol=0, atol=50 * np.finfo(dtype).eps)


def trained(make, backend, steps=30, **options):
    """Bits after steps over groups, two dtypes, a schedule, clipping by norm, and a tensor that is skipped at times."""
    rng = np.random.default_rng(2)
    params = {"w": rng.standard_normal((5, 7)).astype("f4"), "b": rng.standard_normal(3), "big": rng.standard_normal(5003)}
    groups = [{"params": {"w": params["w"]}, "lr": lambda step: 0.1 / (1 + step)}, {"params": [params["b"], params["big"]]}]
    optimizer = make(groups, backend=backend, **options)
    norms = []
    for step in range(steps):
        grads = [{"w": rng.standard_normal((5, 7)).astype("f4")}, [rng.standard_normal(3), rng.standard_normal(5003)]]
        if step % 4 == 1:
            grads[1][0] = None
        norms.append(optimizer.step(grads, grad_scale=0.25, clip_norm=3.0).grad_norm)
    assert optimizer.tensor_steps == [30, 22, 30]
    states = [x for tensor in optimizer.state_dict()["tensors"] for x in tensor["state"].values()]
    return [bits(x) for x in [*params.values(), *states, np.array(norms)]]


@pytest.mark.parametrize("make", [Lion, Limited, Named])
def test_same_bits_on_every_backend(make):
    results = [trained(make, name) for name in OWN]
    for result in results:
        assert all(np.array_equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads for every tensor, however small."""
    module = backends.load("numba")
    monkeypatch.setattr(module, "LEAST", dict.fromkeys(module.LEAST, 1))
    monkeypatch.setattr(module, "SMALLEST", 1)
    before = fastrms.get_num_threads()
    fastrms.set_num_threads(2)
    yield
    fastrms.set_num_threads(before)


def test_in_parallel(backend, two_threads):
    assert all(np.array_equal(a, b) for a, b in zip(trained(Lion, backend), trained(Lion, "numpy"), strict=True))


def test_state_dict_resumes(backend):
    rng = np.random.default_rng(3)
    grads = [rng.standard_normal(50) for _ in range(12)]
    whole, part = np.ones(50), np.ones(50)
    running, first = Limited(whole, backend=backend), Limited(part, backend=backend)
    for g in grads:
        running.step(g)
    for g in grads[:5]:
        first.step(g)
    resumed = Limited(part, backend=backend, limit=3.0)
    resumed.load_state_dict(first.state_dict())
    for g in grads[5:]:
        resumed.step(g)
    assert np.array_equal(whole, part) and resumed.steps == 12 and resumed.groups[0]["limit"] == 1.0
    assert all(np.array_equal(resumed.state[k], running.state[k]) for k in ("largest", "prev"))


def test_checks(backend):
    w = np.ones(3)
    optimizer = Lion(w, backend=backend)
    for bad, error in ((np.ones(4), ValueError), (np.ones(3, "f4"), TypeError), (w, ValueError), ([1.0] * 3, TypeError)):
        with pytest.raises(error, match="grads"):
            optimizer.step(bad)
    with pytest.raises(TypeError, match="Lion has no hyper-parameter 'rho'; it has lr"):
        Lion(w, rho=0.9, backend=backend)
    with pytest.raises(ValueError, match=r"beta1=1\.5 must be in"):
        Lion(w, beta1=1.5, backend=backend)
    with pytest.raises(TypeError, match="limit="):
        Limited(w, limit=[1], backend=backend)
    with pytest.raises(ValueError, match="limit=inf must be finite"):
        Limited(w, limit=np.inf, backend=backend)
    optimizer.groups[0]["lr"] = 0.5
    optimizer.step(np.ones(3))
    assert (w == 0.5).all() and "rule Lion" in optimizer.report() and optimizer.backend == backend
    with pytest.raises(ValueError, match="backend='c' cannot run the rule of Lion"):
        Lion(w, backend="c")
    assert Lion(w).backend == OWN[0]


def make(**names):
    return type("Mine", (fastrms.Optimizer,), {"defaults": {"lr": 0.1}, **names})


def test_a_wrong_definition_is_named(backend):
    with pytest.raises(TypeError, match="first arguments must be param, grad, momentum"):
        make(state_names=("momentum",), rule=lambda param, grad, lr: param)
    with pytest.raises(TypeError, match=r"state_names='momentum' of Mine must be a tuple"):
        make(state_names="momentum", rule=lambda param, grad, lr: param)
    with pytest.raises(TypeError, match="takes grad_scale"):
        make(rule=lambda param, grad, grad_scale: param)
    with pytest.raises(TypeError, match=r"derive it from fastrms\.Optimizer"):
        type("Mine", (fastrms.Adam,), {"rule": lambda param, grad: param})
    with pytest.raises(TypeError, match="Mine has no rule"):
        make()(np.ones(3), backend="numpy")
    rule = staticmethod(lambda param, grad, rate: (param - rate * grad,))
    with pytest.raises(ValueError, match="coefficients of Mine gives lr; its rule takes rate"):
        make(rule=rule, coefficients=lambda step, lr: {"lr": lr})(np.ones(3), backend=backend)
    with pytest.raises(ValueError, match="gives a NaN at step 1"):
        make(rule=rule, coefficients=lambda step, lr: {"rate": float("nan")})(np.ones(3), backend=backend)


def test_coefficients_are_asked_once_when_an_optimizer_is_made(backend):
    asked = []

    class Counted(fastrms.Optimizer):
        defaults = {"lr": 0.1}

        def coefficients(step, lr):
            asked.append((step, lr))
            return {"lr": lr}

        def rule(param, grad, lr):
            return (param - lr * grad,)

    optimizer = Counted(np.ones(3), backend=backend)
    assert asked == [(1, 0.1)] and optimizer.report() and len(asked) == 1


def test_a_late_error_of_coefficients_changes_nothing(backend):
    rule = staticmethod(lambda param, grad, rate: (param - rate * grad,))
    mine = make(rule=rule, coefficients=lambda step, lr: {"rate": lr / (3 - step)})
    params = [np.ones(3), np.ones(4)]
    optimizer = mine(params, backend=backend)
    optimizer.step([None, np.ones(4)])
    optimizer.step([np.ones(3), np.ones(4)])
    before = [p.copy() for p in params]
    with pytest.raises(ZeroDivisionError):
        optimizer.step([np.ones(3), np.ones(4)])
    assert optimizer.steps == 2 and all(np.array_equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_rule_of_the_wrong_kind_changes_nothing(backend):
    """One result too few; and a number that is no coefficient, which Numba would compute with in float64."""
    w = np.ones(8, np.float32)
    few = make(rule=staticmethod(lambda param, grad, lr: param - lr * grad), coefficients=lambda step, lr: {"lr": lr})
    with pytest.raises(TypeError, match="Mine"):
        few(w, backend=backend).step(w + 1)
    literal = make(rule=staticmethod(lambda param, grad, lr: (param - 0.3 * lr * grad,)),
                   coefficients=lambda step, lr: {"lr": lr})  # fmt: skip
    if backend == "numba":
        with pytest.raises(TypeError, match="the rule of Mine computes float64 from float32; every number"):
            literal(w, backend=backend).step(w + 1)
        branch = make(
            rule=staticmethod(lambda param, grad, lr: (param - str(lr),)), coefficients=lambda step, lr: {"lr": lr}
        )
        with pytest.raises(TypeError, match="Numba cannot compile the rule of Mine for float32"):
            branch(w, backend=backend).step(w + 1)
    assert (w == 1).all()


class HeavyBall(fastrms.Optimizer):
    """Polyak 1964: the state is the parameter before the step."""

    defaults = {"lr": 0.1, "beta": 0.9}
    state_names = ("before",)

    @staticmethod
    def coefficients(step, lr, beta):
        return {"lr": lr, "beta": beta if step > 1 else 0.0}

    def rule(param, grad, before, lr, beta):
        return param - lr * grad + beta * (param - before), param


class Exchange(fastrms.Optimizer):
    """Two states that change places, one of them by a view of it; a third is the gradient of the step before."""

    defaults = {"lr": 0.1}
    state_names = ("a", "b", "previous_grad")

    @staticmethod
    def coefficients(step, lr):
        return {"lr": lr}

    @staticmethod
    def initial(h, state_name):
        return {"a": 1.0, "b": 2.0}.get(state_name, 0.0)

    def rule(param, grad, a, b, previous_grad, lr):
        return param - lr * previous_grad, b, a, grad


SIZES = [1, 3, 16384, 50001]  # the last two: one chunk of the NumPy backend, and several


@pytest.mark.parametrize("size", SIZES)
def test_a_result_that_is_an_argument_is_its_value_before_the_step(backend, size):
    w, expected, before = np.ones(size), 1.0, 0.0
    optimizer = HeavyBall(w, backend=backend)
    for step in range(4):
        expected, before = expected - 0.1 * 0.5 + (0.9 * (expected - before) if step else 0.0), expected
        optimizer.step(np.ones(size), grad_scale=0.5)
    assert np.allclose(w, expected, rtol=1e-14) and np.allclose(optimizer.state["before"], before, rtol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_states_may_change_places(backend, size):
    w = np.ones(size)
    optimizer = Exchange(w, backend=backend)
    for step in range(3):
        assert (optimizer.state["a"] == 1 + step % 2).all() and (optimizer.state["b"] == 2 - step % 2).all()
        optimizer.step(np.full(size, float(step)))
    assert (optimizer.state["previous_grad"] == 2).all() and np.allclose(w, 0.9)


def plain_descent(rule):
    return make(rule=staticmethod(rule), coefficients=lambda step, lr: {"lr": lr})


def writes_param(param, grad, lr):
    param -= lr * grad
    return (param,)


def writes_grad(param, grad, lr):
    grad *= lr
    return (param - grad,)


@pytest.mark.parametrize("rule", [writes_param, writes_grad])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rule_that_writes_into_its_arguments(backend, dtype, rule):
    """On scalars it only gives a name another value; on arrays it is refused, and nothing is written."""
    w, g = np.ones(20000, dtype), np.ones(20000, dtype)
    optimizer = plain_descent(rule)(w, backend=backend)
    if backend == "numpy":
        with pytest.raises(ValueError, match=r"the rule of Mine .* its arguments are read-only: write `param = param - "):
            optimizer.step(g)
        assert (w == 1).all() and optimizer.steps == 0
    else:
        optimizer.step(g)
        assert np.allclose(w, 0.9)
    assert (g == 1).all()


REDUCTIONS = {
    "sum": lambda param, grad, lr: (param - lr * grad / (lr + np.sum(abs(grad))),),
    "norm": lambda param, grad, lr: (param - lr * grad / (lr + np.linalg.norm(grad)),),
    "max": lambda param, grad, lr: (param - lr * grad / (lr + abs(grad).max()),),
    "mean of param": lambda param, grad, lr: (param - lr * param.mean(),),
    "clip by norm": lambda param, grad, lr: (param - lr * grad * np.minimum(1, 1 / np.linalg.norm(grad)),),
    "neighbour": lambda param, grad, lr: (param - lr * np.roll(grad, 1),),
}


@pytest.mark.parametrize("lr", [0.1, 1e-6])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_rule_that_reduces_is_refused(name, lr):
    """On NumPy; Numba has no norm of a scalar, and its own sentence for that."""
    w = np.ones(20000, np.float32)
    with pytest.raises(ValueError, match="the rule of Mine is not elementwise"):
        plain_descent(REDUCTIONS[name])(w, lr=lr, backend="numpy").step(w + 1)
    assert (w == 1).all()


def centered_by_assignment(param, grad, lr):
    grad -= np.mean(grad)
    return (param - lr * grad,)


def centered_where_positive(param, grad, lr):
    if grad > lr:
        return (param - lr * (grad - np.mean(grad)),)
    return (param,)


OF_A_SCALAR = {  # what Numba compiles, since the mean of a scalar is this scalar
    **{name: (lambda reduced: lambda param, grad, lr: (param - lr * (grad - reduced(grad)),))(getattr(np, name))
       for name in ("mean", "sum", "prod", "max", "min", "std", "var")},
    "cumsum": lambda param, grad, lr: (param - lr * np.cumsum(grad)[0],),
    "assignment": centered_by_assignment,
    "if": centered_where_positive,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_A_SCALAR)
def test_a_reduction_is_refused_on_every_backend(backend, name):
    w = np.ones(20)
    optimizer = plain_descent(OF_A_SCALAR[name])(w, backend=backend)
    with pytest.raises((ValueError, TypeError), match="the rule of Mine") as raised:
        optimizer.step(np.arange(20.0))
    if backend == "numba" and name not in ("cumsum", "std", "var"):  # Numba may refuse these itself
        assert "is not elementwise" in str(raised.value)
    assert (w == 1).all() and optimizer.steps == 0


def mean_of(x):
    return np.mean(x)


def centered_in_a_branch(param, grad, lr):
    if grad > 1e30:
        grad = np.mean(grad)
    return (param - lr * grad,)


HIDDEN = {
    "function": lambda param, grad, lr: (param - lr * mean_of(grad),),
    "keyword": lambda param, grad, lr: (param - lr * np.mean(a=grad),),
    "array": lambda param, grad, lr: (param - lr * np.mean(np.asarray(grad)),),
    "method": lambda param, grad, lr: (param - lr * np.asarray(grad).mean(),),
    "any": lambda param, grad, lr: (param - select(np.any(grad > lr), grad, lr),),
    "branch": centered_in_a_branch,
}


@pytest.mark.parametrize("name", [*HIDDEN, "jitted"])
def test_a_hidden_reduction_is_refused(backend, name):
    rule = HIDDEN.get(name)
    if rule is None:
        jitted = pytest.importorskip("numba", reason="needs numba").njit(mean_of)
        rule = lambda param, grad, lr: (param - lr * jitted(grad),)  # noqa: E731
    w = np.ones(20)
    words = "the rule of Mine is not elementwise" if (backend, name) != ("numpy", "branch") else "has no `if`"
    with pytest.raises(ValueError, match=words):
        plain_descent(rule)(w, backend=backend).step(np.arange(20.0))
    assert (w == 1).all()


def test_a_sum_of_other_numbers_is_no_reduction(backend):
    """Of an array that the rule has from elsewhere."""
    weights, w = np.ones(3), np.ones(20)
    plain_descent(lambda param, grad, lr: (param - lr * grad * np.sum(weights),))(w, backend=backend).step(np.ones(20))
    assert np.allclose(w, 0.7)


@pytest.mark.parametrize("function", [np.sum, np.mean, np.max, np.prod, np.cumsum])
def test_a_reduction_cannot_be_written_down(function):
    rule = own_rules.OwnRule("Mine", lambda param, grad, lr: (param - lr * function(grad),), (), ("lr",))
    with pytest.raises(TypeError, match=f"it calls np.{function.__name__}"):
        trace.trace(rule, False)


def test_a_learning_rate_that_starts_at_0_hides_no_reduction(backend):
    w = np.ones(20)
    optimizer = plain_descent(OF_A_SCALAR["mean"])(w, lr=lambda step: 0.1 * step, backend=backend)
    with pytest.raises(ValueError, match="the rule of Mine is not elementwise"):
        optimizer.step(np.arange(20.0))


@pytest.mark.parametrize("most", [1e-5, 1.0, 1e5, 1e30])
@pytest.mark.parametrize("order", [("one", "most"), ("most", "one")])
def test_a_bound_that_is_not_reached_hides_no_reduction(backend, most, order):
    def by_norm(param, grad, lr, one, most):
        return (param - lr * grad * np.minimum(one, most / np.sqrt(np.sum(grad * grad))),)

    def by_norm_too(param, grad, lr, most, one):
        return by_norm(param, grad, lr, one, most)

    rule = staticmethod(by_norm if order[0] == "one" else by_norm_too)
    mine = make(rule=rule, coefficients=lambda step, lr: {"lr": lr, "one": 1.0, "most": most})
    w = np.ones(20)
    with pytest.raises((ValueError, TypeError), match="the rule of Mine"):
        mine(w, backend=backend).step(np.arange(20.0))
    assert (w == 1).all()


def test_a_rule_need_not_take_other_coefficients_than_its_own(backend):
    """It is tried with others, which may be out of its range."""

    def rule(param, grad, lr, beta):
        return (param - lr * math.sqrt(1 - beta * beta) * grad,)

    def checked(param, grad, lr, beta):
        assert beta == 0.6
        return (param - lr * grad,)

    w = np.ones(20)
    names = {"coefficients": lambda step, lr: {"lr": lr, "beta": 0.6}}
    make(rule=rule, **names)(w, backend=backend).step(np.ones(20))
    assert np.allclose(w, 1 - 0.1 * 0.8)
    if backend == "numpy":
        make(rule=checked, **names)(w, backend=backend).step(np.ones(20))


def of_scalars(param, grad, lr):
    if grad > lr:
        return (param - lr * math.sqrt(grad),)
    return (param,)


def noisy(param, grad, lr):
    return (param - lr * (grad + np.random.random()),)


def until_small(param, grad, lr):
    while abs(grad) > lr:  # for ever where lr is 0
        grad = grad - grad * (lr / abs(grad))
    return (param - grad,)


@pytest.mark.skipif("numba" not in OWN, reason="numba is not installed")
@pytest.mark.parametrize("rule", [of_scalars, noisy, until_small, lambda param, grad, lr: (param - lr * max(grad, lr),)])
def test_numba_runs_what_only_scalars_take(rule):
    w = np.ones(20)
    plain_descent(rule)(w, lr=0.15, backend="numba").step(np.linspace(0.2, 3, 20))
    assert (w < 1).all()


def test_functions_of_scalars_have_a_sentence_on_numpy():
    with pytest.raises(ValueError, match=r"cannot take an array .*: take np\.sqrt and the like"):
        plain_descent(lambda param, grad, lr: (param - math.sqrt(grad),))(np.ones(4), backend="numpy").step(np.ones(4))
    with pytest.raises(ValueError, match=r"the rule of Mine cannot take an array .*: it takes arrays of any size"):
        plain_descent(lambda param, grad, lr: (param - grad[:3],))(np.ones(4), backend="numpy").step(np.ones(4))


def positive(x, zero):
    return select(x > zero, x, zero)


def twice_removed(x, zero):
    return positive(x, zero)


def test_helpers_wherever_a_rule_reaches_them(backend):
    """By the module, by the package, in a closure, and in functions of the user's, jitted or not."""
    from fastrms.rules import larger as inner

    cases = [
        lambda param, grad, lr, zero: (param - lr * rules.select(grad > zero, grad, zero),),
        lambda param, grad, lr, zero: (param - lr * fastrms.rules.larger(grad, zero),),
        lambda param, grad, lr, zero: (param - lr * inner(grad, zero),),
        lambda param, grad, lr, zero: (param - lr * positive(grad, zero),),
        lambda param, grad, lr, zero: (param - lr * twice_removed(grad, zero),),
    ]
    if "numba" in OWN:
        import numba

        jitted, square = numba.njit(positive), numba.njit(lambda x: x * x / x)
        cases.append(lambda param, grad, lr, zero: (param - lr * jitted(grad, zero),))
        cases.append(lambda param, grad, lr, zero: (param - lr * inner(square(grad), zero),))
    for k, rule in enumerate(cases):
        w = np.ones(20)
        mine = make(rule=staticmethod(rule), coefficients=lambda step, lr: {"lr": lr, "zero": 0.0})
        mine(w, backend=backend).step(np.linspace(-1.1, 1, 20))
        assert np.allclose(w, 1 - 0.1 * np.maximum(np.linspace(-1.1, 1, 20), 0)), k
    assert rules.select is select and rules.larger is larger and positive.__globals__["select"] is select


def test_a_helper_that_is_imported_in_the_rule(backend):
    """NumPy runs it as it is; Numba cannot compile an import."""

    def rule(param, grad, lr):
        from fastrms.rules import larger

        return (param - larger(grad, lr),)

    w = np.ones(4)
    optimizer = plain_descent(rule)(w, backend=backend)
    if backend == "numba":
        with pytest.raises(TypeError, match="Numba cannot compile the rule of Mine"):
            optimizer.step(np.ones(4))
    else:
        optimizer.step(np.array([-1, 0, 1, 2.0]))
        assert np.allclose(w, 1 - np.array([0.1, 0.1, 1, 2]))


def excess(x):
    return np.exp(x) - x


def test_functions_of_the_users_need_no_compiler(backend):
    """Those that use no helper, too, and those that call each other."""

    def twice(x, zero):
        return excess(positive(x, zero)) + excess(x)

    w, g = np.ones(20), np.linspace(-1, 1, 20)
    mine = make(rule=staticmethod(lambda param, grad, lr, zero: (param - lr * twice(grad, zero),)),
                coefficients=lambda step, lr: {"lr": lr, "zero": 0.0})  # fmt: skip
    mine(w, backend=backend).step(g)
    assert np.allclose(w, 1 - 0.1 * (excess(np.maximum(g, 0)) + excess(g)))


def test_what_users_have_compiled_keeps_their_options():
    numba = pytest.importorskip("numba", reason="needs numba")
    jitted, w = numba.njit(excess, fastmath=True), np.ones(20)
    plain_descent(lambda param, grad, lr: (param - lr * jitted(grad),))(w, backend="numba").step(np.ones(20))
    assert jitted.signatures == [(numba.float64,)] and np.allclose(w, 1 - 0.1 * excess(1.0))


def test_a_condition_may_be_chosen_by_where(backend):
    w, g = np.ones(20), np.linspace(-1, 1, 20)
    plain_descent(lambda param, grad, lr: (param - lr * np.where(grad > lr, grad, lr),))(w, backend=backend).step(g)
    assert np.allclose(w, 1 - 0.1 * np.maximum(g, 0.1))


@pytest.mark.parametrize("dtype", [*DTYPES, None])
def test_select_of_numbers_and_arrays(dtype):
    one, two = (1.0, 2.0) if dtype is None else np.array([1, 2], dtype)
    assert select(one < two, one, two) == one and type(select(one > two, one, two)) is type(two)
    many = np.array([one, two, one])
    assert (
        np.array_equal(select(many > one, many, two), [two, two, two]) and select(many > one, many, two).dtype == many.dtype
    )
    assert np.array_equal(clip(np.array([-1.0, np.nan, 3.0]), 0.0, 1.0), [0, np.nan, 1], equal_nan=True)


def test_prepare_clips_and_decays_in_an_own_rule(backend):
    rule = staticmethod(lambda param, grad, lr, low, high, decay, one: (
        param - lr * prepare(grad, param, one, one, low, high, decay),))  # fmt: skip
    numbers = {"low": -0.5, "high": 0.5, "decay": 0.25, "one": 1.0}
    w = np.ones(4)
    make(rule=rule, coefficients=lambda step, lr: {"lr": lr, **numbers})(w, backend=backend).step(np.full(4, 9.0))
    assert np.allclose(w, 1 - 0.1 * 0.75)


def dropped(backend):
    """Weak references to a class that was used and is gone, to its rule, and to an array that this closed over."""
    held, numbers = np.ones(5_000_000), np.ones(4)

    def first(x):
        return x * held[0]

    def rule(param, grad, lr, zero):
        return (param - lr * first(positive(grad, zero)) * held[0],)

    mine = make(rule=rule, coefficients=lambda step, lr: {"lr": lr, "zero": 0.0})
    mine(numbers, backend=backend).step(np.ones(4))
    return weakref.ref(mine), weakref.ref(rule), weakref.ref(held)


def test_an_own_rule_is_freed_with_its_class(backend):
    left = dropped(backend)
    gc.collect()
    assert [x() for x in left] == [None] * 3


def test_an_own_rule_on_several_threads_is_freed_with_its_class(backend, two_threads):
    test_an_own_rule_is_freed_with_its_class(backend)


def test_a_name_that_has_no_value_is_left_alone():
    """In the closure of a rule, where nothing reads it."""
    if not OWN:
        later = 1.0

    def rule(param, grad, lr):
        return (param - lr * grad if lr is not None else later,)

    w = np.ones(4)
    plain_descent(rule)(w, backend="numpy").step(np.ones(4))
    assert np.allclose(w, 0.9)


def test_wrong_kinds_of_rules_have_a_sentence():
    def plain(param, grad, lr):
        return (param - lr * grad,)

    coefficients = {"coefficients": lambda step, lr: {"lr": lr}}
    wrong = [(classmethod(lambda cls, param, grad, lr: (param,)), "is a classmethod"),
             (staticmethod(functools.partial(plain)), "is a partial")]  # fmt: skip
    if "numba" in OWN:
        import numba

        wrong.append((staticmethod(numba.njit(plain)), "is a CPUDispatcher"))
    for rule, words in wrong:
        with pytest.raises(TypeError, match=f"rule of Mine {words}; it must be a plain function"):
            make(rule=rule, **coefficients)
    with pytest.raises(TypeError, match=r"rule of Mine takes lr by name only; .* leave out the `\*`"):
        make(rule=lambda param, grad, *, lr: (param,), **coefficients)
    with pytest.raises(TypeError, match="rule of Mine takes rest in any number"):
        make(rule=lambda param, grad, *rest: (param,), **coefficients)


@pytest.mark.parametrize("new, kind", [(lambda grad: None, "None"), (lambda grad: np.sqrt(grad + 0j), "complex"),
                                       (lambda grad: "x", "<U1")])  # fmt: skip
def test_results_that_are_no_real_numbers_have_a_sentence(new, kind):
    mine = make(state_names=("last",), rule=lambda param, grad, last, lr: (param - lr * grad, new(grad)),
                coefficients=lambda step, lr: {"lr": lr})  # fmt: skip
    w = np.ones(4)
    with pytest.raises(TypeError, match=f"the rule of Mine gives {kind}.* as the new last; it must give real numbers"):
        mine(w, backend="numpy").step(np.ones(4))
    assert (w == 1).all()


def test_an_if_is_refused_on_arrays():
    w = np.ones(1)
    with pytest.raises(ValueError, match="a rule has no `if`, see select"):
        plain_descent(lambda param, grad, lr: (param - lr if grad > 0 else param,))(w, backend="numpy").step(w + 1)
    assert (w == 1).all()


def test_a_rule_may_use_any_elementwise_function():
    """Whose arrays and single elements may differ in the last bit; and a result that is a number for all elements."""
    w, g = np.ones(20000, np.float32), np.full(20000, 0.25, np.float32)
    rule = make(state_names=("last",), rule=lambda param, grad, last, lr: (param - lr * (np.exp(grad) - np.tanh(param)), lr),
                coefficients=lambda step, lr: {"lr": lr})  # fmt: skip
    optimizer = rule(w, backend="numpy")
    optimizer.step(g)
    assert np.allclose(w, 1 - 0.1 * (np.exp(0.25) - np.tanh(1)), rtol=1e-6)
    assert (optimizer.state["last"] == np.float32(0.1)).all()
