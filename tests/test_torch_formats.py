"""Storage formats in fastrms.torch: bf16 and fp16 gradients and parameters, states in bf16, fp16 and q8, masters."""

import copy
import io
import itertools
import pickle
import re

import numpy as np
import pytest

import fastrms

torch = pytest.importorskip("torch", reason="not installed: torch")
ft = pytest.importorskip("fastrms.torch")
pytestmark = pytest.mark.peers

NAMES = ("RMSprop", "Adagrad", "Adam", "AdamW", "Rprop")
MORE = {"RMSprop": {"momentum": 0.9, "weight_decay": 0.1}, "Adagrad": {"initial_accumulator_value": 1e-9}}
STATES = {
    "RMSprop": ("square_avg", "momentum_buffer"), "Adagrad": ("sum",), "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"), "Rprop": ("prev", "step_size"),
}  # fmt: skip
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = {None: F32, "bf16": BF16, "fp16": FP16, "q8": torch.uint8}
SHAPES = [(300, 7), (5,), (), (0, 3), (1000,), (33, 2)]
MASTERS = {F32: (None,), BF16: (None, "float32", "split16", "split8"), FP16: (None, "float32")}
LOW = {"float32": ("master", F32), "split16": ("remainder", torch.int16), "split8": ("remainder", torch.int8)}
ROUNDINGS = ("nearest", "stochastic")
CASES = [
    (name, dtype, {"state_format": format, "master": master, "rounding": rounding})
    for name, format, (dtype, masters), rounding in itertools.product(NAMES, FORMATS, MASTERS.items(), ROUNDINGS)
    for master in masters
    if (name != "Rprop" or format in (None, "bf16")) and (format, rounding) != ("q8", "nearest")
]
STOCHASTIC = [case for case in CASES if case[2]["rounding"] == "stochastic"]
SOME = [case for case in CASES if case[0] in ("RMSprop", "Adam") and case in STOCHASTIC]


def case_id(case):
    name, dtype, options = case
    return " ".join(map(str, (name, str(dtype).removeprefix("torch."), *options.values())))


def random(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype, shapes=SHAPES):
    return [torch.nn.Parameter(random(shape, k, dtype)) for k, shape in enumerate(shapes)]


def groups_of(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]


def give(param, grad):
    """Give a parameter a gradient of any dtype."""
    if grad is None or grad.dtype == param.dtype:
        param.grad = grad
        return
    param.grad = torch.empty_like(param)
    param.grad.data = grad


def give_grads(params, step, dtype=None, absent=True):
    for k, param in enumerate(params):
        grad = 0.1 * random(param.shape, 100 * step + k)
        give(param, None if absent and (k + step) % 4 == 0 else grad.to(dtype or param.dtype))


def made(name, params, options, **more):
    return getattr(ft, name)(groups_of(params), seed=7, **MORE.get(name, {}), **options, **more)


def run(params, optimizer, steps, first=0, dtype=None):
    for step in range(first, first + steps):
        give_grads(params, step, dtype)
        optimizer.step()


def raw(tensor):
    """The bytes of a tensor in memory order."""
    array = tensor.detach().contiguous().reshape(-1)
    return array.view(torch.uint8).numpy().tobytes() if array.numel() else b""


def held(params, optimizer):
    """All that an optimizer has written, as bytes."""
    return [
        (raw(param), *((name, x.dtype, raw(x)) for name, x in sorted(optimizer.state.get(param, {}).items())))
        for param in params
    ]


def ours_like(optimizer, params, options):
    """An optimizer of fastrms over arrays with the numbers of these parameters, and these arrays."""
    arrays = [param.detach().clone() for param in params]
    if params[0].dtype is F32:
        arrays = [array.numpy() for array in arrays]
    values = [optimizer._checked(group) for group in optimizer.param_groups]
    groups = [{**group, **mine} for group, mine in zip(groups_of(arrays), values, strict=True)]
    options = {name: value for name, value in options.items() if value is not None}
    return getattr(fastrms, optimizer.kind)(groups, seed=7, **options), arrays


def as_bytes(array):
    return raw(array) if torch.is_tensor(array) else np.asarray(array).tobytes()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_bits_are_those_on_numpy_arrays(case):
    """A parameter without a gradient at first is not yet among those of the step; its random numbers are the same."""
    name, dtype, options = case
    params = parameters(dtype)
    optimizer = made(name, params, options)
    ours, arrays = ours_like(optimizer, params, options)
    for step in range(5):
        give_grads(params, step, (dtype, BF16, FP16, F32)[step % 4])
        optimizer.step()
        grads = [param.grad for param in params]
        ours.step([grads[:2], grads[2:]])
        assert [raw(param) for param in params] == [*map(as_bytes, arrays)], step
    for key in STATES[name]:
        stored = [x for group in ours.state[key] for x in group]
        for param, state in zip(params, stored, strict=True):
            assert raw(optimizer.state[param][key]) == as_bytes(getattr(state, "bits", state)), key


@pytest.mark.parametrize("case", STOCHASTIC, ids=case_id)
def test_the_tensors_of_a_state(case):
    """They have the dtype of the format and the layout of the parameter; q8 is flat."""
    name, dtype, options = case
    param = torch.nn.Parameter(random((6, 5), 1, dtype).t() if options["state_format"] != "q8" else random((6, 5), 1, dtype))
    param.grad = torch.ones_like(param)
    optimizer = getattr(ft, name)([param], **MORE.get(name, {}), **options)
    optimizer.step()
    state = optimizer.state[param]
    wanted = dict.fromkeys(STATES[name], FORMATS[options["state_format"]])
    if options["master"]:
        key, of_low = LOW[options["master"]]
        wanted[key] = of_low
    if options["state_format"] == "q8":
        wanted["q8_shape"] = torch.int64
    assert {key: x.dtype for key, x in state.items() if key != "step"} == wanted
    for key, x in state.items():
        if x.dtype is torch.uint8:
            assert x.shape == (64 + 4,)
        elif key == "q8_shape":
            assert x.tolist() == [6, 5]
        elif key != "step":
            assert (x.shape, x.stride()) == (param.shape, param.stride()) and not x.requires_grad


def test_masters_of_split16_are_those_of_float32():
    first, second = parameters(BF16), parameters(BF16)
    optimizers = [made("Adam", p, {"master": m}) for p, m in ((first, "float32"), (second, "split16"))]
    for params, optimizer in zip((first, second), optimizers, strict=True):
        run(params, optimizer, 6)
    for param, other in zip(first, second, strict=True):
        master, low = optimizers[0].state[param]["master"], optimizers[1].state[other]["remainder"]
        joined = (other.detach().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
        assert raw(joined) == raw(master) and raw(master.to(BF16)) == raw(param)


def test_seeds_are_read_back():
    param = parameters(F32, [(3,)])[0]
    optimizer = ft.Adam([param], state_format="bf16", seed=2**63)
    assert optimizer.seed == copy.deepcopy(optimizer).seed == 2**63 and ft.Adam([param]).seed == 0


def test_seeds_and_roundings_count():
    runs = {}
    for options in ({"seed": 0}, {"seed": 1}, {"seed": 0, "rounding": "nearest"}):
        params = parameters(F32)
        optimizer = ft.Adam(params, state_format="bf16", **options)
        run(params, optimizer, 3)
        runs[str(options)] = str(held(params, optimizer))
    assert len({*runs.values()}) == 3


# gradients


@pytest.fixture(params=[BF16, FP16], ids=["bf16", "fp16"])
def half(request):
    return request.param


@pytest.mark.parametrize("options", [
    {}, {"clip_norm": 0.01}, {"clip_norm": float("inf"), "nonfinite": "skip"}, {"zero_grad": True}, {"state_format": "bf16"},
])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_half_are_those_in_float32(name, options, half):
    params, others = parameters(F32), parameters(F32)
    optimizers = [getattr(ft, name)(p, **options) for p in (params, others)]
    for step in range(4):
        give_grads(params, step, half)
        for param, other in zip(params, others, strict=True):
            other.grad = None if param.grad is None else param.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert optimizers[0].step_info == optimizers[1].step_info
        assert all(param.grad is None or param.grad.dtype is half for param in params)
        assert not options.get("zero_grad") or not any(p.grad.any() for p in params if p.grad is not None)
    assert held(params, optimizers[0]) == held(others, optimizers[1])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_grad_dtype(half):
    param, other = parameters(F32, [(9, 4)])[0], parameters(F32, [(9, 4)])[0]
    param.grad_dtype = half
    (param.to(half) * 3).sum().backward()
    assert param.grad.dtype is half
    other.grad = param.grad.float()
    for each in (param, other):
        ft.RMSprop([each]).step()
    assert raw(param) == raw(other)


def test_gradients_in_half_take_the_short_way(half, monkeypatch):
    params = parameters(F32)
    optimizers = [ft.Adam(params, state_format=format) for format in (None, "bf16", "q8")]
    lower = parameters(BF16)
    optimizers.append(ft.Adam(lower, master="float32", state_format="bf16"))
    for optimizer in optimizers:
        give_grads(lower, 0, half, absent=False)
        give_grads(params, 0, half, absent=False)
        optimizer.step()
    monkeypatch.setattr(fastrms.torch_core.Core, "checked_step", None)
    for optimizer in optimizers:
        optimizer.step()
        assert optimizer.step_info.applied


@pytest.mark.parametrize("case", SOME, ids=case_id)
def test_other_ways_and_backends_have_the_same_bits(case, monkeypatch):
    name, dtype, options = case
    found = []
    for backend, library in (("c", True), ("c", False), ("numpy", False)):
        if not library:
            monkeypatch.setattr(fastrms.torch_reader, "library", lambda: None)
        monkeypatch.setenv("FASTRMS_BACKEND", backend)
        params = parameters(dtype)
        optimizer = made(name, params, options, clip_norm=0.1)
        run(params, optimizer, 3)
        assert {core.optimizer.backend for core in optimizer._cores} == {backend}
        found.append(held(params, optimizer))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype, options", [(F32, {}), (F32, {"state_format": "q8"}), (BF16, {"master": "split16"})])
def test_steps_in_the_backward_pass(dtype, options):
    models = [torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.to(dtype)
    plain, streamed = (ft.Adam(model.parameters(), seed=3, **options) for model in models)
    handle = ft.step_in_backward(streamed)
    for step in range(3):
        x = random((11, 7), step, dtype)
        plain.zero_grad()
        for model in models:
            (model(x) ** 2).sum().backward()
        plain.step()
    handle.remove()
    assert held(models[0].parameters(), plain) == held(models[1].parameters(), streamed)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_steps_in_the_backward_pass_from_gradients_in_half(half):
    param, other = parameters(F32, [(9, 4)])[0], parameters(F32, [(9, 4)])[0]
    param.grad_dtype = half
    plain, streamed = ft.Adam([other]), ft.Adam([param])
    ft.step_in_backward(streamed)
    for step in range(3):
        x = random((9, 4), step, half)
        (param.to(half) * x).sum().backward()
        other.grad = x.float()
        plain.step()
    assert held([param], streamed) == held([other], plain)


@pytest.mark.parametrize("make", [
    lambda: random((7, 5), 1, BF16).t(), lambda: torch.ones((), dtype=BF16).expand(5, 7),
    lambda: random((5, 14), 1, BF16)[:, ::2],
])  # fmt: skip
def test_a_gradient_in_half_of_another_layout(make):
    params = parameters(F32, [(5, 7)]), parameters(F32, [(5, 7)])
    grad = make()
    for (param,), mine in zip(params, (grad, grad.float().contiguous()), strict=True):
        give(param, mine)
        ft.Adam([param]).step()
    assert raw(params[0][0]) == raw(params[1][0])


@pytest.mark.parametrize("dtype, wrong", [(torch.float64, BF16), (F32, torch.float64), (BF16, torch.float64)])
def test_a_gradient_of_a_wrong_dtype_is_refused(dtype, wrong):
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = ft.Adam([param], **({"master": "float32"} if dtype is BF16 else {}))
    give(param, torch.ones(4, dtype=wrong))
    with pytest.raises(TypeError, match=r"grads\[0\]\[0\].* has dtype (bfloat16|float64)"):
        optimizer.step()
    assert (param == 1).all()


# what is refused


@pytest.mark.parametrize("kind, shape, options, words", [
    (BF16, (3,), {}, r"bfloat16: say how it is updated, by master='float32'.*rounding='stochastic'.*model\.float\(\)"),
    (FP16, (3,), {"state_format": "bf16"}, "float16: say how it is updated"),
    (F32, (3,), {"master": "float32"}, "has dtype float32: put it into a group of parameters without master"),
    (FP16, (3,), {"master": "split16"}, "pass master='float32'"),
    (torch.float64, (3,), {"state_format": "bf16"}, "is for tensors that are updated in float32"),
    (F32, (3,), {"state_format": "q8", "amsgrad": True}, "'q8' cannot hold max_exp_avg_sq of params"),
    (F32, (3,), {"state_format": "int8"}, "state_format='int8'"), (F32, (3,), {"rounding": "up"}, "rounding='up'"),
    (BF16, (3,), {"master": "double"}, "master='double'"), (F32, (3,), {"seed": -1}, "seed=-1"),
    (F32, (3,), {"seed": True}, "seed=True"),
])  # fmt: skip
def test_what_cannot_be_is_refused_at_once(kind, shape, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ft.Adam([torch.nn.Parameter(torch.ones(shape, dtype=kind))], **options)
    fine = torch.nn.Parameter(torch.ones(2))
    optimizer = ft.Adam([fine])
    group = {"params": [torch.nn.Parameter(torch.ones(shape, dtype=kind))], **options}
    with pytest.raises((TypeError, ValueError), match="seed" if "seed" in options else words):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name, options", [("RMSprop", {"centered": True}), ("Rprop", {})])
def test_states_that_need_floats(name, options):
    for format in ("fp16", "q8"):
        with pytest.raises(ValueError, match=f"state_format='{format}' cannot hold (grad_avg|prev) of params"):
            getattr(ft, name)([torch.nn.Parameter(torch.ones(3))], state_format=format, **options)


def test_q8_needs_contiguous_parameters():
    param = torch.nn.Parameter(random((2, 3, 4, 5), 1).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"contiguous memory; params\[0\]\[0\] has strides"):
        ft.Adam([param], state_format="q8")
    param = torch.nn.Parameter(random((2, 3, 4, 5), 1))
    optimizer = ft.Adam([param], state_format="q8")
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = raw(param)
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="strides"):
        optimizer.step()
    assert raw(param) == before


def change_of_group(optimizer, state):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def change_of_memory(optimizer, state):
    state["exp_avg"].share_memory_()


def change_of_state(optimizer, state):
    state["exp_avg"] = state["exp_avg"].clone()


@pytest.mark.parametrize("turn, words", [
    (lambda x: x.to(memory_format=torch.channels_last), r"params\[0\]\[0\] has strides"),
    (lambda x: x.reshape(4, 5, 2, 3), r"q8 of the shape \(2, 3, 4, 5\), the parameter has \(4, 5, 2, 3\)"),
])  # fmt: skip
@pytest.mark.parametrize("change", [change_of_group, change_of_memory, change_of_state])
def test_blocks_are_not_those_of_other_elements(change, turn, words):
    """Neither where the optimizer looks at all of its parameters anew; back in its old memory order, it goes on."""
    params = [torch.nn.Parameter(random((2, 3, 4, 5), 1)) for _ in range(2)]
    optimizers = [ft.Adam([param], state_format="q8") for param in params]
    for param, optimizer in zip(params, optimizers, strict=True):
        run([param], optimizer, 1, first=1)
    first, optimizer = params[0], optimizers[0]
    first.data = turn(first.data)
    change(optimizer, optimizer.state[first])
    first.grad, before = torch.ones_like(first), held([first], optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        assert held([first], optimizer) == before
    first.data = first.data.contiguous().reshape(2, 3, 4, 5)
    for param, optimizer in zip(params, optimizers, strict=True):
        run([param], optimizer, 1, first=2)
    assert held(params[:1], optimizers[0]) == held(params[1:], optimizers[1])


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
def test_a_q8_state_of_another_shape_is_refused(shape):
    param, other = parameters(F32, [(2, 3)])[0], parameters(F32, [shape])[0]
    optimizer = ft.Adam([param], state_format="q8")
    run([param], optimizer, 1, first=1)
    saved = optimizer.state_dict()
    for mine, convert in (("q8", None), (None, "q8"), ("bf16", "q8")):
        loading = ft.Adam([other], state_format=mine)
        words = re.escape(f"in the state_dict is in q8 of the shape (2, 3), the parameter has {shape}:")
        with pytest.raises(ValueError, match=words):
            loading.load_state_dict(saved, convert=convert)
        assert not loading.state
    plain = ft.Adam([param])
    plain.load_state_dict(saved, convert="q8")
    assert "q8_shape" not in plain.state[param]
    again = ft.Adam([param], state_format="q8")
    again.load_state_dict(plain.state_dict(), convert="float32")
    assert again.state[param]["q8_shape"].tolist() == [2, 3]


def test_a_q8_state_without_its_shape_is_taken():
    """As it was saved before there was one."""
    param = parameters(F32, [(2, 3)])[0]
    optimizer, other = (ft.Adam([param], state_format="q8") for _ in range(2))
    run([param], optimizer, 1, first=1)
    saved = optimizer.state_dict()
    shape = saved["state"][0].pop("q8_shape")
    other.load_state_dict(saved)
    assert torch.equal(other.state[param]["q8_shape"], shape)


@pytest.mark.parametrize("options", [{"state_format": "bf16"}, {"rounding": "stochastic", "state_format": "fp16"}])
def test_a_model_may_turn_to_another_memory_format(options):
    dtype = BF16 if "rounding" in options else F32
    params = [torch.nn.Parameter(random((2, 3, 4, 5), 1, dtype)) for _ in range(2)]
    optimizers = [ft.Adam([param], **{**options, "rounding": "nearest"}) for param in params]
    for step in range(3):
        if step == 1:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
        for param, optimizer in zip(params, optimizers, strict=True):
            grad = random((2, 3, 4, 5), step, dtype)
            param.grad = grad.to(memory_format=torch.channels_last) if not param.is_contiguous() else grad
            optimizer.step()
    assert held([params[0]], optimizers[0]) == held([params[1]], optimizers[1])
    assert optimizers[0].state[params[0]]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


# groups


def test_groups_have_formats_of_their_own():
    params = parameters(F32, [(40,), (50,)]) + parameters(BF16, [(60,)])
    optimizer = ft.Adam([{"params": [params[0]]}, {"params": [params[1]], "state_format": "q8"}], state_format="bf16")
    optimizer.add_param_group({"params": [params[2]], "master": "split16", "state_format": None})
    run(params, optimizer, 3)
    found = [{name: x.dtype for name, x in optimizer.state[param].items() if name != "step"} for param in params]
    assert [state["exp_avg"] for state in found] == [BF16, torch.uint8, F32] and found[2]["remainder"] is torch.int16


def test_the_rounding_of_a_group_may_change():
    first, second = (parameters(F32, [(40,)]) for _ in range(2))
    optimizer, other = (ft.Adam(params, state_format="bf16") for params in (first, second))
    run(first, optimizer, 3, first=1)
    run(second, other, 2, first=1)
    other.param_groups[0]["rounding"] = "nearest"
    run(second, other, 1, first=3)
    assert raw(optimizer.state[first[0]]["exp_avg"]) != raw(other.state[second[0]]["exp_avg"])


def test_a_format_that_changes_later_is_refused():
    param = parameters(F32, [(40,)])[0]
    optimizer = ft.Adam([param])
    run([param], optimizer, 1, first=1)
    before = raw(param)
    optimizer.param_groups[0]["state_format"] = "bf16"
    for _ in range(2):
        with pytest.raises(TypeError, match="has dtype float32; what is stored in bf16 is bfloat16: formats stay"):
            run([param], optimizer, 1, first=1)
    assert raw(param) == before


@pytest.mark.parametrize("theirs, mine", [("bf16", None), ("q8", None), ("fp16", None), ("q8", "bf16"), ("bf16", "q8")])
def test_a_format_that_is_taken_away_or_exchanged_is_refused(theirs, mine):
    param = parameters(F32, [(40,)])[0]
    optimizer = ft.Adam([param], state_format=theirs)
    run([param], optimizer, 1, first=1)
    before, dtype = held([param], optimizer), str(FORMATS[theirs]).removeprefix("torch.")
    optimizer.param_groups[0]["state_format"] = mine
    with pytest.raises(
        TypeError, match=f"state.'exp_avg'.* has dtype {dtype}[,;] .*: formats stay as they are once there is"
    ):
        run([param], optimizer, 1, first=1)
    assert held([param], optimizer) == before
    optimizer.param_groups[0]["state_format"] = theirs
    run([param], optimizer, 1, first=1)


@pytest.mark.parametrize("theirs, mine", [
    ("float32", None), ("split16", None), ("split8", None), ("float32", "split16"), ("split16", "float32"),
])  # fmt: skip
def test_a_master_is_not_left_behind(theirs, mine):
    """Its bits would be lost, and be those of an older parameter when it came back."""
    params, others = parameters(BF16, [(40,), (50,)]), parameters(BF16, [(40,), (50,)])
    optimizers = [ft.Adam(some, master=theirs, rounding="stochastic") for some in (params, others)]
    key = "master" if theirs == "float32" else "remainder"
    for some, each in zip((params, others), optimizers, strict=True):
        run(some, each, 2, first=1)
    optimizer, before = optimizers[0], held(params, optimizers[0])
    optimizer.param_groups[0]["master"] = mine
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"params\[0\]\[0\] has a {key}, .* set master='{theirs}' again, .*\['{key}'\]"
        ):
            run(params, optimizer, 1, first=3)
        assert held(params, optimizer) == before
    optimizer.param_groups[0]["master"] = theirs
    for some, each in zip((params, others), optimizers, strict=True):
        run(some, each, 1, first=3)
    assert held(params, optimizer) == held(others, optimizers[1])
    optimizer.param_groups[0]["master"] = mine
    for param in params:
        del optimizer.state[param][key]
    run(params, optimizer, 1, first=4)
    assert key not in optimizer.state[params[0]]
    optimizer.load_state_dict(optimizer.state_dict())


# states that people exchange


@pytest.mark.parametrize("change, words", [
    (lambda x: x.to(FP16), "stored in bf16 is bfloat16"), (lambda x: x[:-1], "shape"), (lambda x: x.float(), "float32"),
])  # fmt: skip
def test_an_exchanged_state_in_a_format_is_checked(change, words):
    param = parameters(F32, [(40,)])[0]
    optimizer = ft.Adam([param], state_format="bf16")
    run([param], optimizer, 1, first=1)
    good, before = optimizer.state[param]["exp_avg"], raw(param)
    optimizer.state[param]["exp_avg"] = change(good)
    with pytest.raises((TypeError, ValueError), match=words):
        run([param], optimizer, 1, first=1)
    assert raw(param) == before
    optimizer.state[param]["exp_avg"] = mine = good.clone()
    run([param], optimizer, 1, first=2)
    assert optimizer.state[param]["exp_avg"] is mine and raw(mine) != raw(good)


@pytest.mark.parametrize("state_format", ["q8", "bf16"])
def test_an_exchanged_state_is_a_tensor(state_format):
    param = parameters(F32, [(400,)])[0]
    optimizer = ft.Adam([param], state_format=state_format)
    run([param], optimizer, 1, first=1)
    for other in (np.zeros(400, np.uint8), [0]):
        optimizer.state[param]["exp_avg"] = other
        with pytest.raises(
            TypeError, match=rf"is an? (ndarray|list); what is stored in {state_format} is a torch tensor of "
        ):
            run([param], optimizer, 1, first=1)


def test_names_and_pairs_are_explained():
    for wrong, right in (("RMSProp", "RMSprop"), ("AdaGrad", "Adagrad"), ("RProp", "Rprop")):
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; write fastrms.torch.{right}$"):
            getattr(ft, wrong)
    with pytest.raises(AttributeError, match=r"no attribute 'NAdam'$"):
        _ = ft.NAdam
    params = parameters(F32, [(4,)])
    with pytest.raises(TypeError, match=r"^betas=0\.9 is a float; it must be 2 numbers, such as betas=\(0\.9, 0\.999\)$"):
        ft.Adam(params, betas=0.9)
    with pytest.raises(TypeError, match=r"^param_copy is an option of fastrms.Adam and its kin; .* master='float32'"):
        ft.Adam(params, param_copy=[torch.zeros(4, dtype=BF16)])
    for dtype in ("bfloat16", "float16"):
        half = parameters(getattr(torch, dtype), [(4,)])
        with pytest.raises(TypeError, match=rf"^params\[0\] has dtype {dtype}: say how it is updated, .* model\.float\(\)$"):
            fastrms.Adam(half)


@pytest.mark.parametrize("change", [lambda x: x[4:], lambda x: torch.cat([x, x])[1 : 1 + x.numel()]])
def test_an_exchanged_state_in_q8_is_checked(change):
    param = parameters(F32, [(400,)])[0]
    optimizer = ft.Adam([param], state_format="q8")
    run([param], optimizer, 1, first=1)
    optimizer.state[param]["exp_avg"] = change(optimizer.state[param]["exp_avg"])
    with pytest.raises(ValueError, match=r"has shape \(\d+,\) and starts at address .*; q8 of .* multiple of 4"):
        run([param], optimizer, 1, first=1)


@pytest.mark.parametrize("case", SOME, ids=case_id)
def test_states_may_be_shared_and_moved(case):
    name, dtype, options = case
    params, others = parameters(dtype), parameters(dtype)
    optimizer, other = made(name, params, options), made(name, others, options)
    run(params, optimizer, 2)
    run(others, other, 2)
    optimizer.share_memory()
    run(params, optimizer, 1, first=2)
    for state in optimizer.state.values():
        assert all(x.is_shared() for x in state.values() if x.numel())
        for x in [x for x in state.values() if x.dim()]:
            x.data = x.data.clone()
    run(params, optimizer, 1, first=3)
    other.make_state()
    run(others, other, 2, first=2)
    assert held(params, optimizer) == held(others, other)


# copies and state dicts


def copied_by(way, params, optimizer, name, options):
    if way == "deepcopy":
        return copy.deepcopy((params, optimizer))
    if way == "pickle":
        return pickle.loads(pickle.dumps((params, optimizer)))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = made(name, twins, options)
    other.load_state_dict(torch.load(file, weights_only=True))
    return twins, other


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("case", STOCHASTIC, ids=case_id)
def test_a_copy_has_the_same_bits_and_goes_on_as_the_original(case, way):
    name, dtype, options = case
    params = parameters(dtype)
    optimizer = made(name, params, options)
    run(params, optimizer, 3)
    twins, other = copied_by(way, params, optimizer, name, options)
    assert held(params, optimizer) == held(twins, other)
    run(params, optimizer, 3, first=3)
    assert held(params, optimizer) != held(twins, other)
    run(twins, other, 3, first=3)
    assert held(params, optimizer) == held(twins, other)


def saved_by(options, dtype=F32, kind=None):
    """The state_dict of an Adam after some steps, and its parameters."""
    params = parameters(dtype)
    optimizer = (kind or ft.Adam)(groups_of(params), **options)
    run(params, optimizer, 3)
    return optimizer.state_dict(), params


def numbers(state, key, param):
    """The numbers of a state of a parameter, whatever its format, in float32."""
    if state[key].dtype is not torch.uint8:
        return state[key].float()
    format = fastrms.formats.FORMATS["q8u" if key == "exp_avg_sq" else "q8"]
    decoded = fastrms.formats.decode(format, state[key].numpy().copy(), param.numel())
    return torch.from_numpy(decoded).view(param.shape)


@pytest.mark.parametrize("mine", FORMATS)
@pytest.mark.parametrize("theirs", FORMATS)
def test_another_format_is_refused_unless_it_is_named(theirs, mine):
    saved, params = saved_by({"state_format": theirs})
    optimizer = ft.Adam(groups_of(params), state_format=mine)
    if theirs == mine:
        return optimizer.load_state_dict(saved)
    name, before = theirs or "float32", str(optimizer.state_dict())
    said = f"exp_avg of params.* is stored in {name} in the state_dict, and in {mine or 'float32'} in this optimizer: make"
    for convert in (None, mine or "float32"):
        with pytest.raises(ValueError, match=rf"{said} the optimizer with .*, or pass convert='{name}'"):
            optimizer.load_state_dict(saved, convert=convert)
        assert str(optimizer.state_dict()) == before
    optimizer.load_state_dict(saved, convert=name)
    for k, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq") if k in saved["state"] else ():
            assert optimizer.state[param][key].dtype is FORMATS[mine]
            wanted, found = numbers(saved["state"][k], key, param), numbers(optimizer.state[param], key, param)
            most = float(wanted.abs().max()) if wanted.numel() else 0.0
            assert torch.allclose(found, wanted, rtol=0.07, atol=2.0**-24 + 1e-4 * most)
    run(params, optimizer, 2)


def test_convert_is_checked():
    saved, params = saved_by({})
    with pytest.raises(ValueError, match="convert='int8'"):
        ft.Adam(groups_of(params)).load_state_dict(saved, convert="int8")


def test_a_state_of_torch_needs_its_name_and_bf16_of_torch_does_not():
    """torch.optim keeps the states of float32 parameters in float32, and those of bf16 parameters in bf16."""
    saved, params = saved_by({}, kind=torch.optim.Adam)
    optimizer = ft.Adam(groups_of(params), state_format="bf16")
    with pytest.raises(ValueError, match=r"stored in float32 .* convert='float32'"):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved, convert="float32")
    assert raw(optimizer.state[params[1]]["exp_avg"]) == raw(saved["state"][1]["exp_avg"].to(BF16))
    saved, params = saved_by({}, BF16, torch.optim.Adam)
    for options in ({"rounding": "nearest"}, {"master": "float32"}, {"master": "split16"}):
        optimizer = ft.Adam(groups_of(params), state_format="bf16", **options)
        optimizer.load_state_dict(saved)
        run(params, optimizer, 2)
        assert optimizer.state[params[1]]["exp_avg"].dtype is BF16


def test_states_in_bf16_and_fp16_go_to_torch():
    """torch gives them the dtype of the parameter, which holds their numbers exactly."""
    for format in ("bf16", "fp16"):
        saved, params = saved_by({"state_format": format})
        theirs = torch.optim.Adam(groups_of(params))
        theirs.load_state_dict(saved)
        for k, param in enumerate(params):
            if k in saved["state"]:
                assert torch.equal(theirs.state[param]["exp_avg"], saved["state"][k]["exp_avg"].float())
        run(params, theirs, 1)


@pytest.mark.parametrize("theirs, mine, words", [
    ({"master": "float32"}, {"rounding": "nearest"}, "has a master of .* would lose: make it with master='float32'"),
    ({"master": "split16"}, {"master": "float32"}, "has a remainder of .* make it with master='split16'"),
    ({"master": "split8"}, {"rounding": "nearest"}, "has a remainder of .* make it with master='split8'"),
    ({"master": "split8"}, {"master": "split16"}, "is split8 in the .* and split16 .* make it with master='split8'"),
])  # fmt: skip
def test_a_master_is_not_lost(theirs, mine, words):
    saved, params = saved_by(theirs, BF16)
    optimizer = ft.Adam(groups_of(params), **mine)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


def test_a_damaged_q8_is_refused():
    saved, params = saved_by({"state_format": "q8"})
    for wrong, words in ((lambda x: x[:-4], "shape"), (lambda x: torch.cat([x[:-1], x[-1:] * 0 + 255]), "damaged blocks")):
        d = copy.deepcopy(saved)
        d["state"][1]["exp_avg"] = wrong(d["state"][1]["exp_avg"])
        with pytest.raises(ValueError, match=rf"exp_avg of params\[0\]\[1\] in the state_dict has .*{words}"):
            ft.Adam(groups_of(params), state_format="q8").load_state_dict(d)


def test_options_of_the_optimizer_stay_and_hooks_see_tensors():
    saved, params = saved_by({"state_format": "bf16", "lr": 0.5})
    optimizer, seen = ft.Adam(groups_of(params), state_format="bf16", rounding="nearest"), []

    def hook(optimizer, d):
        seen.extend(d["state"][1].values())

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.extend(optimizer.state[params[1]].values()))
    optimizer.load_state_dict(saved)
    assert seen and all(map(torch.is_tensor, seen))
    assert optimizer.param_groups[0]["rounding"] == "nearest" and optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


# training as people do it


def net(dtype=F32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(7, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3)).to(dtype)


def trained(model, optimizer, around, steps=60):
    """The first and the last loss of training on a small problem.  around(x): the loss, and what follows."""
    x = random((64, 7), 1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(around(model, x, x[:, :3].sin(), optimizer).detach()))
    return losses[0], losses[-1]


def plain(model, x, y, optimizer):
    dtype = next(model.parameters()).dtype
    loss = ((model(x.to(dtype)).float() - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def under_autocast(model, x, y, optimizer):
    with torch.autocast("cpu", dtype=BF16):
        loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


class Scaled:
    """float16 with a GradScaler, which finds a step that overflows."""

    def __init__(self):
        self.scaler, self.steps, self.skipped = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5), 0, 0

    def __call__(self, model, x, y, optimizer):
        with torch.autocast("cpu", dtype=FP16):
            loss = ((model(x).float() - y) ** 2).mean()
        self.scaler.scale(loss).backward()
        self.steps += 1
        if self.steps == 7:
            model[0].bias.grad[0] = float("inf")
        self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped += not optimizer.step_info.applied
        return loss


@pytest.mark.parametrize("options", [
    {}, {"state_format": "bf16"}, {"state_format": "fp16"}, {"state_format": "q8"},
    {"state_format": "bf16", "clip_norm": 1.0},
])  # fmt: skip
@pytest.mark.parametrize("way", [plain, under_autocast, Scaled])
def test_float32_parameters_are_trained(way, options):
    around = way() if way is Scaled else way
    model = net()
    first, last = trained(model, ft.Adam(model.parameters(), lr=1e-2, **options), around)
    assert last < 0.2 * first
    if way is Scaled:
        assert around.skipped >= 1


@pytest.mark.parametrize("options", [
    {"master": "float32"}, {"master": "float32", "state_format": "bf16"}, {"master": "split16", "state_format": "bf16"},
    {"master": "split8", "state_format": "q8"}, {"rounding": "stochastic"},
    {"rounding": "stochastic", "state_format": "bf16"},
])  # fmt: skip
@pytest.mark.parametrize("name, lr", [("Adam", 1e-2), ("RMSprop", 1e-3)])
def test_a_model_in_bf16_is_trained(name, lr, options):
    model = net(BF16)
    first, last = trained(model, getattr(ft, name)(model.parameters(), lr=lr, **options), plain, 150)
    assert last < 0.3 * first and all(param.dtype is BF16 for param in model.parameters())


def test_small_updates_are_lost_by_rounding_to_nearest_alone():
    """Each step is a sixteenth of half the distance of two bf16 numbers at 1."""
    found = {}
    for options in ({"rounding": "nearest"}, {"rounding": "stochastic"}, {"master": "float32"}, {"master": "split8"}):
        param = torch.nn.Parameter(torch.ones(4000, dtype=BF16))
        optimizer = ft.Adam([param], lr=2.0**-13, **options)
        for _ in range(64):
            param.grad = torch.ones_like(param)
            optimizer.step()
        found[str(options)] = float(1 - param.detach().float().mean())
    lost, *kept = found.values()
    assert lost == 0 and kept == pytest.approx([2.0**-7] * 3, rel=0.1)


def test_formats_do_not_pass_through_the_form_of_torch():
    """load_torch_state_dict() of fastrms takes floats; fastrms.torch makes them."""
    for format in ("bf16", "q8"):
        saved, params = saved_by({"state_format": format})
        ours = fastrms.Adam(groups_of([param.detach().clone() for param in params]))
        with pytest.raises(ValueError, match=r"exp_avg of params.* has dtype (bfloat16|uint8), which stores a state in a"):
            ours.load_torch_state_dict(saved)
        floats = ft.Adam(groups_of(params))
        floats.load_state_dict(saved, convert=format)
        ours.load_torch_state_dict(floats.state_dict())
        assert as_bytes(ours.state["exp_avg"][0][1]) == raw(floats.state[params[1]]["exp_avg"])


def test_a_gradient_in_half_whose_storage_was_resized_is_refused(half):
    param = parameters(F32, [(4096,)])[0]
    optimizer = ft.Adam([param])
    give(param, torch.ones(4096, dtype=half))
    optimizer.step()
    before = raw(param)
    param.grad.untyped_storage().resize_(4096)
    with pytest.raises(ValueError, match=r"gradient|grads.*storage was resized"):
        optimizer.step()
    assert raw(param) == before


def test_a_model_in_fp16_is_trained_with_a_scaler():
    model, scaled = net(FP16), Scaled()
    first, last = trained(model, ft.Adam(model.parameters(), lr=1e-2, master="float32"), scaled)
    assert last < 0.2 * first and scaled.skipped >= 1 and model[0].weight.dtype is FP16


@pytest.mark.parametrize("dtype, then, options", [
    (F32, BF16, {}), (F32, BF16, {"state_format": "bf16"}), (BF16, F32, {"master": "float32"}),
    (BF16, FP16, {"rounding": "nearest"}),
])  # fmt: skip
def test_a_model_that_turns_to_another_dtype_is_refused(dtype, then, options):
    model = net(dtype)
    params, optimizer = [*model.parameters()], ft.Adam(model.parameters(), **options)
    give_grads(params, 0, absent=False)
    optimizer.step()
    model.to(then)
    give_grads(params, 1, absent=False)
    before = [*map(raw, params)]
    name = str(then).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"params\[0\]\[0\].* has dtype {name}\b") as error:
        optimizer.step()
    if dtype is BF16:
        assert "and had bfloat16 when it was bound: turn the model back, by model.to(torch.bfloat16)" in str(error.value)
    assert [*map(raw, params)] == before and "uint16" not in str(error.value)


def test_a_master_that_is_removed_is_made_from_the_parameter():
    """What is written into a parameter counts only if its master learns of it."""
    params = parameters(BF16, [(40,), (50,)])
    optimizer = ft.Adam(params, master="float32", lr=1e-4)
    run(params, optimizer, 2)
    with torch.no_grad():
        for param in params:
            param.fill_(8)
    del optimizer.state[params[0]]["master"]
    run(params, optimizer, 1, first=2)
    assert (params[0] - 8).abs().max() < 0.1 and (params[1] - 8).abs().max() > 1
