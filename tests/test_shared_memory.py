"""State that the caller gives, buffers that processes share, and steps of many processes on them at once."""

import mmap
import subprocess
import sys
import weakref
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, Guarded, bits
from test_oracle import RULES
from test_readme import example

import fastrms

WATCHDOG = 300  # seconds
SIZES = [0, 1, 3, 17, 1003, 4099]
NAMES = [f"w{size}" for size in SIZES]


def made(rule, params, **options):
    name, hyper = RULES[rule]
    return getattr(fastrms, name)(params, **hyper, **options)


def numbers(size, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, size]).standard_normal(size).astype(dtype)


def copied(state):
    """The arrays of opt.state again, each in a guarded memory of its own at an odd offset."""
    return {name: {key: Guarded(x, offset=k % 3) for k, (key, x) in enumerate(of.items())} for name, of in state.items()}


def arrays(guarded):
    return {name: {key: guard.array for key, guard in of.items()} for name, of in guarded.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_given_state_has_the_bits_of_one_that_the_optimizer_made(rule, dtype, backend):
    ours, theirs = ({name: numbers(size, dtype) for name, size in zip(NAMES, SIZES, strict=True)} for _ in range(2))
    reference = made(rule, theirs, backend=backend)
    guarded = copied(reference.state)
    optimizer = made(rule, ours, state=arrays(guarded), backend=backend)
    for step in range(5):
        grads = {name: numbers(x.size, dtype, seed=step + 1) for name, x in ours.items()}
        if step == 3:
            grads["w17"] = None
        for other in (optimizer, reference):
            other.step(grads, clip_norm=10.0 if step == 2 else None)
    for name, of in reference.state.items():
        for key, x in of.items():
            assert optimizer.state[name][key].ctypes.data == guarded[name][key].array.ctypes.data or not x.size
            assert np.array_equal(bits(guarded[name][key].array), bits(x)), (name, key)
            assert guarded[name][key].intact()
    assert all(np.array_equal(bits(ours[name]), bits(theirs[name])) for name in ours)
    assert optimizer.tensor_steps == reference.tensor_steps


@pytest.mark.parametrize("rule", [rule for rule in RULES if "adam" not in rule])  # Adam counts the steps of each
def test_two_optimizers_may_keep_one_state(rule, backend):
    """A3C's shared RMSProp within one process: the steps of both are those of one optimizer."""
    w, reference = numbers(1003), numbers(1003)
    first = made(rule, w, backend=backend)
    second = made(rule, w, state=first.state, backend=backend)
    alone = made(rule, reference, backend=backend)
    for step, optimizer in enumerate((first, second, second, first)):
        grad = numbers(1003, seed=step)
        optimizer.step(grad)
        alone.step(grad)
    assert np.array_equal(bits(w), bits(reference)) and (first.steps, second.steps) == (2, 2)


def test_the_state_of_init_state_fits(backend):
    w, other, grad = numbers(35).reshape(5, 7), numbers(35).reshape(5, 7), numbers(35, seed=1).reshape(5, 7)
    options = {"momentum": 0.9, "initial_value": 1.0}
    state = fastrms.init_state("rmsprop", w, **options)
    optimizer, reference = (fastrms.RMSProp(x, momentum=0.9, state=s, initial_value=1.0, backend=backend)
                            for x, s in ((w, state), (other, None)))  # fmt: skip
    optimizer.step(grad)
    reference.step(grad)
    assert (
        np.array_equal(bits(w), bits(other)) and optimizer.state["square_avg"].ctypes.data == state["square_avg"].ctypes.data
    )


def test_nothing_is_written_before_the_first_step(backend):
    w, state = numbers(9), {"square_avg": np.arange(9, dtype=np.float32)}
    optimizer = fastrms.RMSProp(w, state=state, initial_value=7.0, backend=backend)
    assert state["square_avg"].tolist() == list(range(9)) and optimizer.steps == 0
    saved = optimizer.state_dict()
    saved["steps"] = saved["tensors"][0]["steps"] = 41
    optimizer.load_state_dict(saved)
    assert optimizer.steps == 41


def by_group(backend, **options):
    params = [{"params": [numbers(5)], "momentum": 0.9}, {"params": {"a": numbers(3)}, "momentum": 0.9, "centered": True},
              {"params": numbers(4)}]  # fmt: skip
    return fastrms.RMSProp(params, backend=backend, **options)


def test_groups_whose_rules_have_other_states(backend):
    """The states of a tensor stand in the order of its rule, whatever the order in which the groups first name them."""
    reference = by_group(backend)
    twin = by_group(backend)
    optimizer = by_group(backend, state=twin.state)
    assert list(optimizer.state) == ["square_avg", "momentum_buffer", "grad_avg"]
    assert optimizer.state["momentum_buffer"][2] is None and optimizer.state["grad_avg"][0][0] is None
    for step in range(3):
        grads = [[numbers(5, seed=step)], {"a": numbers(3, seed=step)}, numbers(4, seed=step)]
        for other in (optimizer, reference):
            other.step(grads)
    mine, other = optimizer.state_dict(), reference.state_dict()
    for a, b in zip(mine["tensors"], other["tensors"], strict=True):
        assert all(np.array_equal(bits(a["state"][name]), bits(b["state"][name])) for name in b["state"])


SHAPES = {"a": (3, 4), "empty": 0, "b": 5, "c": ()}
FLAT_STATES = {
    "of another optimizer": lambda state: state["square_avg"],
    "one array": lambda state: np.zeros(18, np.float32),
    "views of a FlatBuffer": lambda state: fastrms.FlatBuffer(SHAPES).params,
    "a buffer": lambda state: memoryview(np.zeros(18, np.float32)),
}


@pytest.mark.parametrize("kind", FLAT_STATES)
@pytest.mark.parametrize("groups", [None, {"b": {"lr": 0.5}}], ids=["one tensor", "groups"])
def test_the_state_of_a_flat_buffer(kind, groups, backend):
    flat, other = fastrms.FlatBuffer(SHAPES), fastrms.FlatBuffer(SHAPES)
    reference = fastrms.RMSProp(other, groups=groups, backend=backend)
    given = FLAT_STATES[kind](fastrms.RMSProp(fastrms.FlatBuffer(SHAPES), groups=groups, backend=backend).state)
    optimizer = fastrms.RMSProp(flat, state={"square_avg": given}, groups=groups, backend=backend)
    flat.grad[...] = other.grad[...] = numbers(18)
    for _ in range(3):
        optimizer.step(flat.grad)
        reference.step(other.grad)
    assert np.array_equal(bits(flat.data), bits(other.data)) and flat.data.all()
    given = np.concatenate([x.reshape(-1) for x in given.values()]) if hasattr(given, "values") else np.asarray(given)
    assert np.array_equal(bits(given), bits(np.concatenate([x.reshape(-1) for x in reference.state["square_avg"].values()])))


def test_the_state_of_a_group_of_a_flat_buffer_may_be_missing(backend):
    def make(state=None):
        return fastrms.RMSProp(fastrms.FlatBuffer(SHAPES), groups={"b": {"momentum": 0.5}}, state=state, backend=backend)

    state = make(make().state).state
    assert state["momentum_buffer"]["a"] is None and state["momentum_buffer"]["b"].shape == (5,)


ADAM = ("exp_avg", "exp_avg_sq")
MEMORY = np.zeros(23, np.float32)
OVERLAPPING = [MEMORY[at : at + 12].reshape(4, 3) for at in (0, 11)]
STRIDED = np.zeros((4, 6), np.float32)[:, ::2]


def negative(value):
    x = np.ones((4, 3), np.float32)
    x[2, 1] = value
    return x


def read_only():
    x = np.zeros((4, 3), np.float32)
    x.flags.writeable = False
    return x


def zeros(shape=(4, 3), dtype=np.float32):
    return np.zeros(shape, dtype)


W = zeros()
REFUSED = {  # the state of Adam({"w": W}), the kind of error, what it says
    "no mapping": (lambda: [zeros(), zeros()], TypeError, "state is a list; it must be a mapping"),
    "a name missing": (lambda: {"exp_avg": {"w": zeros()}}, ValueError, "state has no 'exp_avg_sq'; with these"),
    "a name too many": (lambda: good(sum={"w": zeros()}), ValueError, "state has 'sum'; "),
    "another structure": (lambda: good(exp_avg=[zeros()]), TypeError, r"state\['exp_avg'\] is a list; it must be a mapping"),
    "a key missing": (lambda: good(exp_avg={}), ValueError, r"state\['exp_avg'\] has no 'w'"),
    "a key too many": (lambda: good(exp_avg={"w": zeros(), "v": zeros()}), ValueError, r"state\['exp_avg'\] has 'v'"),
    "None": (lambda: good(exp_avg={"w": None}), ValueError,
             r"state\['exp_avg'\]\['w'\] is None, and the rule of params\['w'\]"),
    "a number": (lambda: good(exp_avg={"w": 0.0}), TypeError, r"state\['exp_avg'\]\['w'\] is a float"),
    "dtype": (lambda: one(zeros(dtype=np.float64)), TypeError, r"\['w'\] has dtype float64, params\['w'\] has float32"),
    "integers": (lambda: one(zeros(dtype=np.int32)), TypeError, r"\['w'\] has dtype int32; fastrms updates"),
    "shape": (lambda: one(zeros((3, 4))), ValueError, r"\['w'\] has shape \(3, 4\), params\['w'\] has \(4, 3\)"),
    "order": (lambda: one(np.asfortranarray(zeros())), ValueError, r"\['w'\] has strides \(1, 4\)"),
    "gaps": (lambda: one(STRIDED), ValueError, r"\['w'\] has shape .* it is not dense"),
    "read-only": (lambda: one(read_only()), ValueError, r"\['w'\] is read-only"),
    "the parameter": (lambda: one(W), ValueError, r"params\['w'\] and state\['exp_avg_sq'\]\['w'\] overlap"),
    "part of another": (lambda: good(exp_avg={"w": OVERLAPPING[0]}, exp_avg_sq={"w": OVERLAPPING[1]}),
                        ValueError, r"state\['exp_avg'\]\['w'\] and state\['exp_avg_sq'\]\['w'\] overlap"),
    "negative": (lambda: one(negative(-1e-30)), ValueError, r"state\['exp_avg_sq'\]\['w'\] holds a negative number or NaN"),
    "NaN": (lambda: one(negative(np.nan)), ValueError, r"state\['exp_avg_sq'\]\['w'\] holds a negative number or NaN"),
}  # fmt: skip


def good(**other):
    return {"exp_avg": {"w": zeros()}, "exp_avg_sq": {"w": zeros()}, **other}


def one(array):
    return good(exp_avg_sq={"w": array})


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused(case, backend):
    state, kind, said = REFUSED[case]
    with pytest.raises(kind, match=said):
        fastrms.Adam({"w": W}, state=state(), backend=backend)
    assert not W.any()


def test_a_state_that_the_rule_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"state\['momentum_buffer'\]\[1\]\[0\] is given, and the rule of params\[1\]\[0\] has no"
    ):
        fastrms.RMSProp([{"params": [zeros()], "momentum": 0.5}, {"params": [zeros()]}],
                        state={"square_avg": [[zeros()], [zeros()]], "momentum_buffer": [[zeros()], [zeros()]]})  # fmt: skip


def test_minus_zero_and_negative_means_are_fine():
    fastrms.Adam(W, state={"exp_avg": negative(-3.0), "exp_avg_sq": negative(-0.0)})


def test_adagrad_without_eps_needs_a_sum_above_zero(backend):
    with pytest.raises(ValueError, match="the sum of params holds a 0: 0/0"):
        fastrms.AdaGrad(W, eps=0.0, state={"sum": negative(0.0)}, backend=backend)
    fastrms.AdaGrad(W.copy(), eps=0.0, state={"sum": negative(1.0)}, backend=backend).step(negative(1.0))


REFUSED_FLAT = {
    "gap": (lambda: {"a": zeros((3, 4)), "empty": zeros(0), "b": zeros(5), "c": zeros(())},
            ValueError, r"state\['square_avg'\]\['b'\] does not follow in memory"),
    "shape": (lambda: {**fastrms.FlatBuffer(SHAPES).params, "c": zeros(1)}, ValueError, r"\['c'\] has shape \(1,\)"),
    "key": (lambda: {"a": zeros((3, 4))}, ValueError, r"state\['square_avg'\] has no 'empty'"),
    "length": (lambda: zeros(17), ValueError, r"state\['square_avg'\] has shape \(17,\), the FlatBuffer has 18 elements"),
    "dtype": (lambda: zeros(18, np.float64), TypeError, r"state\['square_avg'\] has dtype float64"),
    "None": (lambda: None, ValueError, r"state\['square_avg'\] is None"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_FLAT)
def test_a_state_that_does_not_fit_a_flat_buffer_is_refused(case):
    state, kind, said = REFUSED_FLAT[case]
    with pytest.raises(kind, match=said):
        fastrms.RMSProp(fastrms.FlatBuffer(SHAPES), state={"square_avg": state()})


def test_a_gradient_must_not_be_the_state(backend):
    flat = fastrms.FlatBuffer(SHAPES)
    optimizer = fastrms.RMSProp(flat, state={"square_avg": flat.grad}, backend=backend)
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.step(flat.grad)


def test_own_rules_take_a_given_state(backend):
    from test_own_rules import Limited

    if backend == "c":
        pytest.skip("own rules are Python")
    w, other, grad = numbers(33), numbers(33), numbers(33, seed=1)
    reference = Limited(other, backend=backend)
    state = {name: x.copy() for name, x in reference.state.items()}
    optimizer = Limited(w, state=state, backend=backend)
    for made in (optimizer, reference):
        made.step(grad)
        made.step(grad)
    assert np.array_equal(bits(w), bits(other)) and np.array_equal(state["prev"], reference.state["prev"])


# torch tensors as the state


@pytest.mark.parametrize("what", ["step", "stream", "load"])
def test_a_torch_tensor_learns_that_it_was_written(what, backend):
    torch = pytest.importorskip("torch")
    w, state = numbers(9), {name: [torch.zeros(9)] for name in ADAM}
    optimizer = fastrms.Adam([w], state=state, backend=backend)
    before = [x._version for (x,) in state.values()]
    if what == "load":
        optimizer.load_state_dict(fastrms.Adam([w.copy()]).state_dict())
    elif what == "step":
        optimizer.step([numbers(9, seed=1)])
        optimizer.step([numbers(9, seed=1)], clip_norm=1.0)
    else:
        with optimizer.streaming() as stream:
            stream.step(0, numbers(9, seed=1))
    assert all(x._version > version for (x,), version in zip(state.values(), before, strict=True))
    assert what == "load" or all(x.all() for (x,) in state.values())


@pytest.mark.parametrize("how", ["share", "data"])
def test_a_torch_tensor_with_other_memory_is_refused(how, backend):
    torch = pytest.importorskip("torch")
    w, state = [torch.zeros(9)], {name: [torch.zeros(9)] for name in ADAM}
    optimizer = fastrms.Adam(w, state=state, backend=backend)
    saved, grad = optimizer.state_dict(), [torch.ones(9)]
    optimizer.step(grad)
    before = w[0].clone()
    (tensor,) = state["exp_avg"]
    if how == "share":
        tensor.share_memory_()
    else:
        tensor.data = torch.zeros(9)
    uses = [lambda: optimizer.step(grad), lambda: optimizer.state, optimizer.state_dict,
            lambda: optimizer.load_state_dict(saved)]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match=r"state\['exp_avg'\] of params\[0\] was given other memory"):
            use()
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of params"), optimizer.streaming() as stream:
        stream.step(0, grad[0])
    assert torch.equal(w[0], before) and optimizer.steps == 1


@pytest.mark.parametrize("of_params", ["numpy", "torch"])
def test_a_torch_tensor_that_becomes_a_part_of_itself_is_refused(of_params, backend):
    torch = pytest.importorskip("torch")
    w, grad = (torch.zeros(9), torch.ones(9)) if of_params == "torch" else (numbers(9), numbers(9))
    state = {"square_avg": torch.zeros(9)}
    optimizer = fastrms.RMSProp([w], state={"square_avg": [state["square_avg"]]}, backend=backend)
    optimizer.step([grad])
    state["square_avg"].data = state["square_avg"].data[:5]
    with pytest.raises(ValueError, match=r"state\['square_avg'\] of params\[0\] has shape \(5,\)"):
        optimizer.step([grad])
    assert optimizer.steps == 1


def test_a_shared_tensor_that_stays_is_updated(backend):
    torch = pytest.importorskip("torch")
    state = {"square_avg": torch.zeros(9).share_memory_()}
    optimizer = fastrms.RMSProp(torch.zeros(9).share_memory_(), state=state, backend=backend)
    for _ in range(3):
        optimizer.step(torch.ones(9))
    assert state["square_avg"].all() and np.shares_memory(optimizer.state["square_avg"], state["square_avg"].numpy())


def test_a_torch_state_of_a_flat_buffer():
    torch = pytest.importorskip("torch")
    state = torch.zeros(18).share_memory_()
    flat = fastrms.FlatBuffer(SHAPES)
    optimizer = fastrms.RMSProp(flat, state={"square_avg": state})
    flat.grad[...], before = 1.0, state._version
    optimizer.step(flat.grad)
    assert state.all() and state._version > before
    parts = torch.split(state, [x.size for x in flat.params.values()])
    named = {name: part.reshape(x.shape) for part, (name, x) in zip(parts, flat.params.items(), strict=True)}
    with pytest.raises(ValueError, match="one array"):  # nobody would look whether these get other memory
        fastrms.RMSProp(flat, state={"square_avg": named})


@pytest.mark.parametrize("how", ["alone", "group", "patterns"])
@pytest.mark.parametrize("what", ["data", "grad"])
def test_a_flat_buffer_over_a_tensor_that_moves_is_refused(what, how, backend):
    """The optimizer would use other memory than flat.params shows."""
    torch = pytest.importorskip("torch")
    over = {name: torch.ones(11).share_memory_() for name in ("data", "grad")}
    flat = fastrms.FlatBuffer({"a": (2, 3), "b": 5}, **over)
    groups = {"groups": {"b": {"lr": 0.5}}} if how == "patterns" else {}
    params, grads = ([{"params": flat}], [flat.grads]) if how == "group" else (flat, flat.grads)
    optimizer = fastrms.Adam(params, backend=backend, **groups)
    bound = fastrms.Adam(params, backend=backend, **groups)
    bound.bind(grads)
    for _ in range(3):
        optimizer.step(grads)
        bound.step()
    before = flat.data.copy()
    over[what].data = torch.full((11,), 5.0)
    makes = lambda: fastrms.Adam(params, backend=backend, **groups)  # noqa: E731
    for use in (lambda: optimizer.step(grads), bound.step, makes):
        with pytest.raises(ValueError, match=f"tensor under {what} of the FlatBuffer was given other memory"):
            use()
    assert np.array_equal(flat.data, before) and (over[what] == 5).all() and optimizer.steps == 3


def test_a_state_of_a_flat_buffer_that_moves_is_refused(backend):
    torch = pytest.importorskip("torch")
    flat, state = fastrms.FlatBuffer({"a": (2, 3), "b": 5}), torch.zeros(11)
    optimizer = fastrms.RMSProp(flat, state={"square_avg": state}, backend=backend)
    optimizer.step(flat.grads)
    state.data = torch.zeros(11)
    with pytest.raises(ValueError, match=r"state\['square_avg'\] of params was given other memory"):
        optimizer.step(flat.grads)


# memory that processes share


def test_the_report_names_a_state_that_lies_badly():
    memory, size = mmap.mmap(-1, 1 << 20), 1 << 16
    flat = fastrms.FlatBuffer({"w": size}, data=memory)
    for start, bad in ((4 * size, True), (4 * size + 1024, False)):
        state = np.frombuffer(memory, np.float32, size, offset=start)
        text = fastrms.RMSProp(flat, state={"square_avg": state}).report()
        assert ("params and state['square_avg'] of params start at nearly the same offset" in text) is bad


def test_the_views_that_make_up_a_state_stay():
    """Each of them, as they need not be of one array."""
    views = dict(fastrms.FlatBuffer({"a": 3, "b": 2}).params)
    left = [weakref.ref(view) for view in views.values()]
    optimizer = fastrms.RMSProp(fastrms.FlatBuffer({"a": 3, "b": 2}), state={"square_avg": views})
    del views
    assert all(ref() is not None for ref in left)
    del optimizer
    assert all(ref() is None for ref in left)


def test_the_memory_of_the_state_stays_while_it_is_used():
    memory = mmap.mmap(-1, 4096)
    optimizer = fastrms.RMSProp(numbers(9), state={"square_avg": memoryview(memory)[:36].cast("f")})
    with pytest.raises(BufferError):
        memory.close()
    optimizer.step(numbers(9, seed=1))
    del optimizer
    memory.close()


def test_the_example_of_the_page():
    names = {"fastrms": fastrms, "np": np}
    threads = fastrms.get_num_threads()
    try:
        use, close = example("SharedMemory(create=True").split("\ndel ")
        exec(use, names)
    finally:
        fastrms.set_num_threads(threads)
    block, count = names["block"], names["count"]
    seen = np.frombuffer(block.buf, np.float32).copy()
    assert not seen[: 784 * 10].any() and np.allclose(seen[784 * 10 : count], -7e-3) and (seen[-10:] > 0).all()
    with pytest.raises(BufferError):
        block.close()
    exec(f"del {close}", names)
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)


# many processes at once


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_race(method):
    """No torn word, no word that no update writes, no NaN, no negative square, nothing outside, and no crash."""
    fork = "ignore:This process:DeprecationWarning"  # Python 3.12 warns where NumPy has threads
    command = [sys.executable, "-W", "error", "-W", fork, Path(__file__).with_name("racing.py"), method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG)
    assert run.stdout.startswith("fine: ") and not run.returncode, run.stdout + run.stderr


def bound(rule, h, dtype):
    """How far an update may move a parameter, by docs/shared-memory.md."""
    if rule == "rprop":
        return h["step_max"]
    if rule == "adagrad":
        return h["lr"]
    floor = (2.0**10 if dtype == np.float32 else 2.0**24.5) if "centered" in rule else 1
    return h["lr"] * floor / np.sqrt(1 - h["rho"]) / (1 - h["momentum"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if "adam" not in rule])
def test_an_update_from_any_mixture_of_words_is_bounded(rule, dtype):
    """As far as one process alone could move it, and not further."""
    rng, size = np.random.default_rng(0), 20_000
    limits = np.finfo(dtype)

    def wild():
        return (rng.standard_normal(size) * 10.0 ** rng.uniform(-0.4, 0.4, size) ** 3 * limits.max**0.2).astype(dtype) * (
            rng.random(size) < 0.9
        )

    w = np.zeros(size, dtype)
    h = dict(made(rule, w).groups[0])
    state = {name: wild() for name in made(rule, w).state}
    for name in {"square_avg", "sum"} & state.keys():
        state[name] = state[name] ** 2
    if rule == "rprop":
        state["step_size"] = rng.uniform(h["step_min"], h["step_max"], size).astype(dtype)
    if "momentum_buffer" in state:  # what such updates have left in it
        state["momentum_buffer"] = rng.uniform(-1, 1, size).astype(dtype) * dtype.type(bound(rule, h, dtype) / h["lr"])
    made(rule, w, state=state).step(wild())
    assert (abs(w) <= bound(rule, h, dtype) * 1.0001).all() and abs(w).max() > bound(rule, h, dtype) / 10
