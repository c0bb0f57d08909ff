"""How people use the optimizers of fastrms.torch: groups, schedulers, closures, hooks, scalers, copies; and each known fault
of its peers as a trap."""

import copy
import gc
import importlib
import io
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import fastrms
from fastrms import torch_reader
from fastrms.optimizer import Optimizer

torch = pytest.importorskip("torch", reason="not installed: torch")
ft = pytest.importorskip("fastrms.torch")
torch_base, torch_core = (importlib.import_module(f"fastrms.{name}") for name in ("torch_base", "torch_core"))
pytestmark = pytest.mark.peers

register_optimizer_step_pre_hook = importlib.import_module("torch.optim.optimizer").register_optimizer_step_pre_hook
NAMES = ("RMSprop", "Adagrad", "Adam", "AdamW", "Rprop")


def net(seed=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def backward(model, seed):
    x = torch.randn(11, 7, generator=torch.Generator().manual_seed(seed))
    loss = (model(x) ** 2).sum()
    loss.backward()
    return loss


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def near(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in pairs)


def parameter(*shape, value=1.0):
    param = torch.nn.Parameter(torch.full(shape, value))
    param.grad = torch.ones(shape)
    return param


# groups, rates and schedulers


def groups_of(model):
    return [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "weight_decay": 0.2}]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Rprop"])
def test_groups_that_are_changed_between_steps(name):
    model, twin = net(), net()
    optimizers = getattr(torch.optim, name)(groups_of(model)), getattr(ft, name)(groups_of(twin))
    for step in range(6):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            groups = optimizer.param_groups
            if step == 2:
                groups[0]["lr"] *= 0.1
            if step == 4:
                groups[1]["weight_decay"], groups[1]["eps"] = 0.0, 1e-3
            train(each, optimizer, 1, first=step)
        assert near(model, twin)


def test_schedulers_can_be_chained():
    model, twin = net(), net()
    optimizers = torch.optim.Adam(groups_of(model)), ft.Adam(groups_of(twin))
    rates = torch.optim.lr_scheduler
    schedulers = [
        [rates.ChainedScheduler([rates.ConstantLR(o, 0.5, 2), rates.ExponentialLR(o, 0.9)]),
         rates.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=False)]
        for o in optimizers
    ]  # fmt: skip
    for step in range(5):
        for each, optimizer, two in zip((model, twin), optimizers, schedulers, strict=True):
            train(each, optimizer, 1, first=step)
            for scheduler in two:
                scheduler.step()
    assert near(model, twin)
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_a_new_rate_takes_effect_without_new_cores(monkeypatch):
    model = net()
    optimizer = ft.RMSprop(model.parameters())
    train(model, optimizer, 1)
    monkeypatch.setattr(fastrms.torch_base, "Core", None)
    for rate in (0.5, 0.25, torch.tensor(0.125), 1):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, 1)
        assert optimizer._cores[0].optimizer.lr == rate


def test_a_refused_rate_names_itself_and_changes_nothing():
    param = parameter(3)
    optimizer = ft.Adam([param])
    optimizer.step()
    before = param.detach().clone()
    for rate in (-1.0, float("nan"), "fast"):
        optimizer.param_groups[0]["lr"] = rate
        with pytest.raises((TypeError, ValueError), match="lr"):
            optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_a_callable_rate_is_refused_with_what_torch_has_for_it():
    param = parameter(3)
    with pytest.raises(TypeError, match=r"lr=.*lr_scheduler"):
        ft.RMSprop([param], lr=lambda step: 0.1)
    optimizer = ft.RMSprop([param])
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lambda step: 0.1
        with pytest.raises(TypeError, match=r"lr=.*lr_scheduler"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
    assert optimizer.state[param]["step"] == 2


def test_parameters_can_be_added():
    model, twin = net(), net()
    optimizers = torch.optim.Adam(model[0].parameters()), ft.Adam(twin[0].parameters())
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        train(each, optimizer, 2)
        optimizer.add_param_group({"params": list(each[2].parameters()), "lr": 0.1})
        train(each, optimizer, 2, first=2)
    assert near(model, twin)
    assert optimizers[1].state[twin[2].bias]["step"] == 2 and optimizers[1].state[twin[0].bias]["step"] == 4


def test_a_parameter_that_takes_the_place_of_another_is_updated():
    old, new = parameter(3), parameter(3)
    optimizer = ft.Adam([old])
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    before = old.detach().clone()
    optimizer.step()
    assert torch.equal(old, before) and optimizer.state[new]["step"] == 1 and not torch.equal(new, torch.ones(3))


def test_named_parameters_give_names_to_sentences():
    model = net()
    optimizer = ft.Adam(model.named_parameters())
    backward(model, 0)
    model[2].weight.grad = None
    model[2].weight.data = torch.ones(3, 4)
    model[2].weight.grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(TypeError, match=r"grads\[0\]\['2\.weight'\].*sparse"):
        optimizer.step()


def test_parameters_of_equal_names_are_all_updated():
    params = [parameter(3), parameter(3)]
    optimizer = ft.RMSprop([("w", param) for param in params])
    optimizer.step()
    del optimizer.param_groups[0]["params"][1]  # its name stays
    optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [2, 1]
    assert not any(torch.equal(param, torch.ones(3)) for param in params)


@pytest.mark.parametrize("name, flag", [("RMSprop", "momentum"), ("RMSprop", "centered"), ("Adam", "amsgrad")])
def test_a_group_may_turn_to_a_rule_with_more_state(name, flag):
    model = net()
    optimizer = getattr(ft, name)(model.parameters())
    train(model, optimizer, 2)
    squares = optimizer.state[model[0].bias]["square_avg" if name == "RMSprop" else "exp_avg_sq"]
    optimizer.param_groups[0][flag] = 0.5 if flag == "momentum" else True
    train(model, optimizer, 2, first=2)
    state = optimizer.state[model[0].bias]
    assert state["step"] == 4 and squares is state["square_avg" if name == "RMSprop" else "exp_avg_sq"]
    assert {"momentum": "momentum_buffer", "centered": "grad_avg", "amsgrad": "max_exp_avg_sq"}[flag] in state


# closures and hooks


def test_a_closure_computes_the_gradients_with_grad_enabled():
    model = net()
    optimizer = ft.Adam(model.parameters())

    def closure():
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[2] < losses[0] and optimizer.state[model[0].bias]["step"] == 3
    assert optimizer.step() is None


def test_an_exception_in_a_closure_changes_nothing():
    model = net()
    optimizer = ft.RMSprop(model.parameters())
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert optimizer.state[model[0].bias]["step"] == 1
    train(model, optimizer, 1)


@pytest.mark.parametrize("given, options, words", [
    ((), {"clip_norm": 1.0}, r"no argument 'clip_norm': pass it to the constructor, Adam\(params, clip_norm=1.0\)"),
    ((), {"grad_scale": 2.0}, "no argument 'grad_scale': .*scaler.step"),
    ((), {"grads": []}, "no argument 'grads': .*param.grad"),
    (([torch.ones(3)],), {}, "closure is a list; .*param.grad"), ((torch.ones(3),), {}, "closure is a Tensor; .*param.grad"),
])  # fmt: skip
@pytest.mark.parametrize("hooked", [False, True])
def test_what_step_does_not_take_is_refused_with_the_remedy(given, options, words, hooked):
    param, calls = parameter(3), []
    optimizer = ft.Adam([param])
    if hooked:
        optimizer.register_step_pre_hook(lambda *arguments: calls.append(arguments))
    with pytest.raises(TypeError, match=words):
        optimizer.step(*given, **options)
    assert not calls and not optimizer.state[param] and (param == 1).all()


def test_step_hooks():
    model, seen = net(), []
    optimizer = ft.Adam(model.parameters())
    train(model, optimizer, 1)
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, named: seen.append(("before", o, args[1:]))),
        optimizer.register_step_post_hook(lambda o, args, named: seen.append(("after", o, named))),
        register_optimizer_step_pre_hook(lambda o, args, named: seen.append("all"))]  # fmt: skip
    optimizer.step()
    assert seen == ["all", ("before", optimizer, ()), ("after", optimizer, {})]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 3 and optimizer.state[model[0].bias]["step"] == 3


@pytest.mark.filterwarnings("ignore")  # the profiler warns where there is a GPU that it does not look at
def test_the_profiler_sees_steps():
    model = net()
    optimizer = ft.Adam(model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1)
    assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}


# attributes


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), True, "1"])
def test_a_wrong_clip_norm_is_refused_when_it_is_set(value):
    optimizer = ft.RMSprop([parameter(3)], clip_norm=1.0)
    with pytest.raises((TypeError, ValueError), match="clip_norm"):
        optimizer.clip_norm = value
    assert optimizer.clip_norm == 1.0
    optimizer.clip_norm = 0.5
    optimizer.step()
    assert copy.deepcopy(optimizer).clip_norm == 0.5 and abs(optimizer.step_info.grad_norm - 3**0.5) < 1e-6
    optimizer.clip_norm = None
    optimizer.step()
    assert optimizer.step_info.grad_norm is None


def test_nonfinite_may_be_set():
    param = parameter(3)
    optimizer = ft.RMSprop([param])
    optimizer.step()
    before = param.detach().clone()
    param.grad[1] = float("nan")
    with pytest.raises(ValueError, match="nonfinite"):
        optimizer.nonfinite = "ignore"
    optimizer.nonfinite = "skip"
    optimizer.step()
    assert optimizer.step_info.nonfinite == 1 and torch.equal(param, before) and optimizer.state[param]["step"] == 1


# gradient scalers


@pytest.mark.parametrize("unscaled", [False, True])
def test_gradient_scaler(unscaled):
    model, twin = net(), net()
    optimizer, plain = (ft.Adam(each.parameters(), eps=0.1) for each in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(x) ** 2).sum()).backward()
        if step == 2:
            model[0].bias.grad[0] = float("inf")
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(twin, plain, 1, first=step)
        assert optimizer.step_info.applied == (step != 2) and not hasattr(optimizer, "found_inf")
    assert same(model, twin)


# copies


def copied_by(way, model, optimizer):
    if way == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if way == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = net(seed=9)
    other = type(optimizer)(twin.parameters(), clip_norm=optimizer.clip_norm)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    return twin, other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_as_the_original(name, way):
    model = net()
    optimizer = getattr(ft, name)(model.parameters(), clip_norm=0.5)
    train(model, optimizer, 3)
    twin, other = copied_by(way, model, optimizer)
    assert other.clip_norm == 0.5 and same(model, twin)
    train(model, optimizer, 3, first=3)
    assert not same(model, twin)
    train(twin, other, 3, first=3)
    assert same(model, twin)


def test_a_loaded_state_is_checked_and_copied():
    param = parameter(3)
    optimizer, other = ft.Adam([param]), ft.Adam([parameter(4)])
    optimizer.step()
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of params\[0\]\[0\].*shape \(4,\).*\(3,\)"):
        optimizer.load_state_dict(other.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["eps"] = -1
    with pytest.raises(ValueError, match="eps"):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert saved["state"][0]["step"] == 1 and optimizer.state[param]["step"] == 2


CLASSES = ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "RMSprop", "Rprop", "SGD")


def state_dict_of(kind, steps, **options):
    """The state_dict of an optimizer of this class after some steps."""
    optimizer = kind([parameter(3)], **options)
    for _ in range(steps):
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("d, words", [
    (fastrms.RMSProp([torch.ones(3)]).state_dict(), "of fastrms.RMSProp, .*: RMSprop takes .*to_torch_state_dict"),
    ({"model": 1}, "has the keys .'model'., not those of a state_dict of torch"), ([], "a list, not a state_dict of torch"),
], ids=["fastrms", "checkpoint", "list"])  # fmt: skip
def test_what_is_no_state_dict_of_torch_is_refused(d, words):
    with pytest.raises(ValueError, match=words):
        ft.RMSprop([parameter(3)]).load_state_dict(d)


def test_adamw_takes_the_state_of_adam_as_in_torch():
    made = []
    for library in (torch.optim, ft):
        param = parameter(3)
        adam, adamw = torch.optim.Adam([param], weight_decay=0.5), library.AdamW([param])
        adam.step()
        adamw.load_state_dict(adam.state_dict())
        adamw.step()
        made.append((param, adamw.param_groups[0]["decoupled_weight_decay"], adamw.param_groups[0]["weight_decay"]))
    assert made[0][1:] == made[1][1:] == (True, 0.5) and torch.allclose(made[0][0], made[1][0])


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_class_is_refused(name, steps):
    """torch takes it, and fails in a step, or starts anew.  Before its first step Adamax says nothing that Adam does not."""
    kinds = [*(getattr(torch.optim, other) for other in CLASSES), *(getattr(ft, other) for other in NAMES)]
    for kind in kinds:
        if kind.__name__ == name or {kind.__name__, name} == {"Adam", "AdamW"} or (kind.__name__ == "Adamax" and not steps):
            continue
        optimizer = getattr(ft, name)([parameter(3)])
        optimizer.step()
        before = str(optimizer.state_dict())
        with pytest.raises(ValueError, match=rf"param_groups\[0\].* has .* and no .*: it is no state of {name}; load it"):
            optimizer.load_state_dict(state_dict_of(kind, steps, lr=0.25))
        assert str(optimizer.state_dict()) == before
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_the_same_class_may_have_more_and_less(name, steps):
    """Older versions of torch lack some names in groups; schedulers and people add others, and states may be incomplete."""
    for kind in (getattr(torch.optim, name), getattr(ft, name)):
        saved, optimizer = state_dict_of(kind, steps, lr=0.25), getattr(ft, name)([parameter(3)])
        for absent in ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "amsgrad",
                       "momentum", "centered"):  # fmt: skip
            saved["param_groups"][0].pop(absent, None)
        saved["param_groups"][0].update(initial_lr=0.5, mine="kept")
        if steps:
            saved["state"][0] = {"mine": torch.ones(3), **saved["state"][0]}
        optimizer.load_state_dict(saved)
        optimizer.step()
        group = optimizer.param_groups[0]
        assert (group["lr"], group["initial_lr"], group["mine"]) == (0.25, 0.5, "kept")
        assert optimizer.state[group["params"][0]]["step"] == steps + 1
        for absent in [*saved["state"].get(0, ())]:
            del saved["state"][0][absent]
            optimizer.load_state_dict(saved)


def test_a_state_dict_holds_plain_dicts():
    optimizer = ft.Adam([parameter(3)])
    optimizer.step()
    assert type(optimizer.state_dict()["state"][0]) is dict


# what users do to the state


def test_states_that_are_exchanged_are_used():
    param = parameter(3)
    optimizer = ft.RMSprop([param])
    optimizer.step()
    mine = torch.full((3,), 4.0)
    optimizer.state[param]["square_avg"] = mine
    optimizer.step()
    assert torch.allclose(mine, torch.full((3,), 4 * 0.99 + 0.01))
    optimizer.state[param] = {"step": torch.tensor(7.0), "square_avg": mine, "note": "kept"}
    optimizer.step()
    assert torch.allclose(mine, torch.full((3,), (4 * 0.99 + 0.01) * 0.99 + 0.01))
    assert optimizer.state[param]["step"] == 8 and optimizer.state[param]["note"] == "kept"
    del optimizer.state[param]["square_avg"]
    optimizer.step()
    assert torch.allclose(optimizer.state[param]["square_avg"], torch.full((3,), 0.01))
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_states_that_are_given_other_memory_are_followed():
    """share_memory_(), and state.data = ..., let the tensor stay and its memory go."""
    param = parameter(3)
    optimizer = ft.Adam([param])
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg"].share_memory_()
    state["exp_avg_sq"].data = torch.ones(3)
    optimizer.step()
    assert torch.allclose(state["exp_avg"], torch.full((3,), 0.19)) and state["exp_avg"].is_shared()
    assert torch.allclose(state["exp_avg_sq"], torch.full((3,), 1.0)) and state["step"] == 2


@pytest.mark.parametrize("name, value", [("clip_norm", 1.0), ("nonfinite", "skip"), ("zero_grad", True), ("dialect", "tf1")])
def test_what_is_for_all_groups_is_refused_in_one(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* stands in a group of parameters; .* to the constructor"):
        ft.RMSprop([{"params": [parameter(3)], name: value}])
    optimizer = ft.RMSprop([parameter(3)])
    with pytest.raises(ValueError, match=f"{name}=.* stands in a group"):
        optimizer.add_param_group({"params": [parameter(3)], name: value})
    assert len(optimizer.param_groups) == 1


def test_a_state_with_other_memory_does_not_bring_an_old_rate_back():
    param = parameter(3)
    optimizer = ft.RMSprop([param], lr=1.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    before = param.detach().clone()
    optimizer.state[param]["square_avg"].share_memory_()
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("name, value", [("weight_decay", 0.1), ("lr", torch.tensor(0.1)), ("lr", 1), ("lr", 0.5)])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_state_is_given_other_memory_and_a_hyper_parameter_changed(name, value, in_backward):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in "ab"]
    optimizers = [torch.optim.RMSprop(params[:1]), ft.RMSprop(params[1:])]
    if in_backward:
        ft.step_in_backward(optimizers[1])
    for step in range(4):
        for param, optimizer in zip(params, optimizers, strict=True):
            optimizer.zero_grad()
            (param * 2).sum().backward()
            optimizer.step()
            if step == 1:
                state = optimizer.state[param]["square_avg"]
                state.data = state.data.clone()
                optimizer.param_groups[0][name] = value
    assert torch.allclose(*params)


@pytest.mark.parametrize("then", ["step", "rate", "decay", "group", "in backward"])
def test_a_model_may_turn_to_another_memory_format(then):
    model = torch.nn.Conv2d(3, 4, 3)
    twin = copy.deepcopy(model)
    optimizers = [package.Adam(each.parameters()) for package, each in ((torch.optim, twin), (ft, model))]
    if then == "in backward":
        ft.step_in_backward(optimizers[1])
    for step in range(4):
        for each, optimizer in zip((twin, model), optimizers, strict=True):
            optimizer.zero_grad()
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
            (each(x) ** 2).sum().backward()
            optimizer.step()
            if step == 1:
                each.to(memory_format=torch.channels_last)
                group = optimizer.param_groups[0]
                group["lr"] = 0.5 if then == "rate" else group["lr"]
                group["weight_decay"] = 0.1 if then == "decay" else 0
                if then == "group":
                    optimizer.add_param_group({"params": [parameter(3)]})
        assert near(model, twin)
    assert optimizers[1].state[model.weight]["exp_avg"].stride() == model.weight.stride()


def test_a_state_that_becomes_a_part_of_itself_is_refused():
    param = parameter(9)
    optimizer = ft.RMSprop([param])
    optimizer.step()
    state, before = optimizer.state[param]["square_avg"], param.detach().clone()
    state.data = state.data[:5]
    with pytest.raises(ValueError, match=r"state\['square_avg'\].* has shape \(5,\)"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_a_count_that_is_written_counts(name):
    params, twins = [parameter(3), parameter(2)], [parameter(3), parameter(2)]
    optimizers = getattr(torch.optim, name)(params), getattr(ft, name)(twins)
    for optimizer, some in zip(optimizers, (params, twins), strict=True):
        optimizer.param_groups[0]["lr_decay"] = 0.1
        optimizer.step()
        optimizer.state[some[1]]["step"].fill_(40)
        optimizer.step()
        assert optimizer.state[some[1]]["step"] == 41 and optimizer.state[some[0]]["step"] == 2
    assert all(torch.allclose(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0])
def test_a_count_that_is_none_is_refused(count):
    params = [parameter(3), parameter(3)]
    optimizer = ft.Adam(params)
    optimizer.step()
    optimizer.state[params[1]]["step"].fill_(count)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step.*params\[0\]\[1\]"):
            optimizer.step()
    optimizer.state[params[1]]["step"].fill_(1)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2]


def test_counts_go_on_beyond_those_of_float32():
    param = parameter(3)
    optimizer = ft.Adam([param])
    optimizer.step()
    optimizer.state[param]["step"].fill_(2**24 - 2)
    for count in range(2**24 - 1, 2**24 + 4):
        optimizer.step()
        assert optimizer.state[param]["step"].item() == count == optimizer._cores[0].optimizer.tensor_steps[0]
    saved = optimizer.state_dict()
    assert saved["state"][0]["step"].item() == 2**24 + 3
    other = ft.Adam([parameter(3)])
    other.load_state_dict(saved)
    other.step()
    assert other.state_dict()["state"][0]["step"].item() == 2**24 + 4


class Interrupted:
    """A plan that an interrupt follows: Ctrl-C comes when the call of C has returned."""

    def __init__(self, plan):
        self._plan = plan

    def __getattr__(self, name):
        return getattr(self._plan, name)

    def change(self, *arguments):
        self._plan.change(*arguments)
        raise KeyboardInterrupt


@pytest.mark.parametrize("lacking", ["nothing", "library"])
def test_a_step_before_an_interrupt_is_counted(lacking, monkeypatch):
    if lacking == "library":
        monkeypatch.setattr(torch_reader, "library", lambda: None)
    params = [parameter(3), parameter(2), parameter(4)]
    optimizer = ft.Adam(params)
    optimizer.step()
    params[1].grad, inner = None, optimizer._cores[0].optimizer
    plan, inner._plan = inner._plan, Interrupted(inner._plan)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    inner._plan = plan
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 1, 2] == inner.tensor_steps
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 1, 3] == inner.tensor_steps


PLACES = [  # in a step; where a runner stops: before or after a call of these
    ("complete", torch_base, "complete", "before"),  # makes the state
    ("made", torch_base.Optimizer, "_know", "before"),  # the core has just been made
    ("updated", Optimizer, "_change_plan", "after"),  # and not yet counted
    ("counted", torch_core.Core, "_count", "after"),
]


@pytest.mark.parametrize("owner, name, when", [row[1:] for row in PLACES], ids=[row[0] for row in PLACES])
@pytest.mark.parametrize("way", ["step", "load_state_dict", "make_state", "share_memory"])
def test_a_second_thread_is_refused_in_the_whole_of_a_step_and_changes_nothing(owner, name, when, way, monkeypatch):
    param, entered, go = parameter(3), threading.Event(), threading.Event()
    optimizer = ft.RMSprop([param])
    saved, call = ft.RMSprop([param]).state_dict(), getattr(owner, name)

    def stopping(*arguments, **named):
        answer = call(*arguments, **named) if when == "after" else None
        if threading.current_thread() is runner:
            entered.set()
            go.wait(60)
        return answer if when == "after" else call(*arguments, **named)

    monkeypatch.setattr(owner, name, stopping)
    runner = threading.Thread(target=optimizer.step, daemon=True)
    runner.start()
    assert entered.wait(60)
    try:
        with pytest.raises(RuntimeError, match="this RMSprop is in use by another thread"):
            getattr(optimizer, way)(*([saved] if way == "load_state_dict" else []))
    finally:
        go.set()
        runner.join()
    assert optimizer.state[param]["step"] == 1
    twin = parameter(3)
    ft.RMSprop([twin]).step()
    assert torch.equal(param, twin)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


@pytest.mark.parametrize("interval", [1e-6, 5e-3] * 3)
def test_of_steps_from_two_threads_each_is_made_or_refused(interval):
    """Both would make the state.  The bits are those of as many steps of one thread."""
    param, twin = parameter(1 << 16), parameter(1 << 16)
    optimizer, alone = ft.RMSprop([param]), ft.RMSprop([twin])
    barrier, made, refused = threading.Barrier(2), [], []

    def run():
        barrier.wait(60)
        for _ in range(50):
            try:
                optimizer.step()
            except RuntimeError as error:
                refused.append(str(error))
            else:
                made.append(alone.step)

    runners = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
    finally:
        sys.setswitchinterval(before)
    for step in made:
        step()
    assert len(made) + len(refused) == 100 and all("in use by another thread" in words for words in refused)
    assert optimizer.state[param]["step"] == len(made) and torch.equal(param, twin)


def test_a_step_is_refused_while_another_thread_is_in_a_step_of_the_backward_pass(monkeypatch):
    param, entered, go = parameter(3), threading.Event(), threading.Event()
    optimizer, call = ft.RMSprop([param]), torch_core.Core.stream_step
    handle = ft.step_in_backward(optimizer)

    def stopping(*arguments):
        entered.set()
        go.wait(60)
        call(*arguments)

    monkeypatch.setattr(torch_core.Core, "stream_step", stopping)
    runner = threading.Thread(target=param.sum().backward, daemon=True)
    runner.start()
    assert entered.wait(60)
    try:
        with pytest.raises(RuntimeError, match="in use by another thread"):
            optimizer.step()
    finally:
        go.set()
        runner.join()
    assert optimizer.state[param]["step"] == 1 and optimizer.step_info.applied
    handle.remove()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the threads of autograd for a GPU do not survive a fork")
def test_share_memory_shares_states_and_counts():
    """In a process of its own: other tests start threads of autograd, which a fork does not have."""
    program = [sys.executable, "-c", "import test_torch_use; test_torch_use.share_with_a_child()"]
    done = subprocess.run(program, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def share_with_a_child():
    model = net()
    model.share_memory()
    optimizer = ft.Adam(model.parameters())
    optimizer.share_memory()
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))  # a plain copy has memory of its own
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=train, args=(model, optimizer, 3))
    process.start()
    process.join()
    assert process.exitcode == 0
    state = optimizer.state[model[0].bias]
    assert state["step"] == 3 and all(value.is_shared() for value in state.values())
    train(twin, other, 3)
    assert same(model, twin)
    train(model, optimizer, 1, first=3)
    train(twin, other, 1, first=3)
    assert same(model, twin) and state["step"] == 4


# traps


def test_states_are_made_at_the_first_gradient():
    params = [parameter(3), parameter(2)]
    params[1].grad = None
    optimizer = ft.Adam(params)
    assert not optimizer.state
    optimizer.step()
    assert list(optimizer.state) == [params[0]] and torch.equal(params[1], torch.ones(2))
    params[1].grad, params[0].grad = torch.ones(2), None
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]
    params[1].requires_grad_(False)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 2]
    params[1].grad = None
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 2


def looked_at(optimizer, param):
    assert not optimizer.state[param]  # which makes an entry


def cleared(optimizer, param):
    param.grad = torch.ones(3)
    optimizer.step()
    param.grad = None
    optimizer.state[param].clear()


def loaded_empty(optimizer, param):
    saved = optimizer.state_dict()
    saved["state"][1] = {}
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("way", [looked_at, cleared, loaded_empty])
@pytest.mark.parametrize("late", [False, True])
def test_a_parameter_with_an_empty_state_is_updated_once_it_has_a_gradient(way, late):
    params = [parameter(3), parameter(3)]
    optimizer = ft.Adam(params)
    params[1].grad = None
    if late:
        optimizer.step()
    way(optimizer, params[1])
    optimizer.step()
    params[1].grad, before = torch.ones(3), params[1].detach().clone()
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1 and not torch.equal(params[1], before)


def test_no_gradient_at_all_is_no_step():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ft.Adam([param])
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("shape, order", [((4, 5), "transposed"), ((2, 3, 4, 5), "channels last")])
def test_a_gradient_of_another_layout(shape, order):
    """It is copied for the step; the result is that of a gradient of the parameter's layout."""
    other = {
        "transposed": lambda x: x.t().contiguous().t(),
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
    }
    grad = torch.randn(shape)
    for lay_param, lay_grad in ((lambda x: x, other[order]), (other[order], lambda x: x), (other[order], other[order])):
        param, twin = torch.nn.Parameter(lay_param(torch.ones(shape))), torch.nn.Parameter(torch.ones(shape))
        param.grad, twin.grad = lay_grad(grad.clone()), grad.clone()
        before = param.stride(), param.grad.stride()
        for each in (param, twin):
            optimizer = ft.Adam([each])
            optimizer.step()
            optimizer.step()
        assert torch.equal(param, twin) and (param.stride(), param.grad.stride()) == before


def negated():
    return torch.complex(torch.ones(4), torch.ones(4)).conj().imag.contiguous().neg().view(4)._neg_view()


def zero_without_memory():
    return torch._efficientzerotensor(4)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [lambda: torch.conj(torch.full((4,), 1 - 2j)).imag, negated, zero_without_memory])
def test_a_gradient_whose_numbers_torch_has_not_written(make, name, in_backward):
    """It is copied for the step, as torch.optim does it."""
    param, twin, plain = parameter(4), parameter(4), make().clone()
    optimizer, other = getattr(ft, name)([param], lr=0.1), getattr(ft, name)([twin], lr=0.1)
    if in_backward:
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", make()))
        handle = ft.step_in_backward(optimizer)
    for step in range(3):
        param.grad, twin.grad = make() if step else torch.ones(4), plain if step else torch.ones(4)
        if in_backward and step:
            param.grad = None
            param.sum().backward()
        else:
            optimizer.step()
        other.step()
        assert torch.equal(param, twin)
    assert not in_backward or handle.remove() is None


@pytest.mark.parametrize("make", [negated, zero_without_memory])
def test_a_gradient_whose_numbers_torch_has_not_written_is_zeroed(make):
    param = parameter(4)
    optimizer = ft.Adam([param], zero_grad=True)
    for _ in range(2):
        param.grad = make()
        optimizer.step()
        assert torch.equal(param.grad, torch.zeros(4))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"zero_grad": True}, {"nonfinite": "skip"}])
@pytest.mark.parametrize("lacking", [None, "library"])
def test_a_gradient_may_serve_several_parameters(options, lacking, monkeypatch):
    if lacking:
        monkeypatch.setattr(torch_reader, "library", lambda: None)
    params, twins = ([parameter(3, value=value) for value in (1.0, 2.0, 3.0)] for _ in range(2))
    optimizer, other = ft.Adam(params, **options), ft.Adam(twins, **options)
    for step in range(3):
        shared = torch.tensor([1.0, 2.0, 3.0])
        for k, (param, twin) in enumerate(zip(params, twins, strict=True)):
            is_shared = k != 1 and step != 1
            param.grad, twin.grad = shared if is_shared else shared.clone(), shared.clone()
        optimizer.step()
        other.step()
        assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))
        assert optimizer.step_info == other.step_info
        assert all(torch.equal(param.grad, twin.grad) for param, twin in zip(params, twins, strict=True))
    params[0].grad = params[1].detach()
    params[2].grad = params[0].grad
    with pytest.raises(ValueError, match=r"params\[0\]\[1\] .*overlap|and params\[0\]\[1\] overlap"):
        optimizer.step()
    memory = torch.ones(5)
    params[0].grad, params[2].grad = memory[:3], memory[2:]
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] and grads\[0\]\[2\] overlap"):
        optimizer.step()


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_gradient_of_another_layout_is_zeroed(nonfinite):
    param = parameter(3, 4)
    optimizer = ft.Adam([param], zero_grad=True, nonfinite=nonfinite)
    for value in (1.0, float("nan")):
        param.grad = torch.full((4, 3), value).t()
        optimizer.step()
        assert torch.equal(param.grad, torch.zeros(3, 4))


def expanded():
    return torch.ones(1).expand(4)


def resized(size):
    made = torch.ones(4096)
    made.untyped_storage().resize_(size)
    return made


def shrunken():
    made = torch.ones(4096)[1024:]
    made.untyped_storage().resize_(4 * 3072)  # as many bytes as the view has, but not where it is
    return made


GRADS = {  # a gradient that must not be used: what is said about it
    "sparse": (4, lambda: torch.ones(4).to_sparse(), "sparse"),
    "negated": (4, negated, "resolve_neg"),
    "no storage": (4096, lambda: resized(0), "resized|without memory|storage"),
    "half a storage": (4096, lambda: resized(8192), "resized|without memory|storage"),
    "shrunken storage": (3072, shrunken, "resized|without memory|storage"),
}


@pytest.mark.parametrize("where, kind", [
    *(("fastrms", kind) for kind in GRADS), *(("fastrms.torch", kind) for kind in GRADS if kind != "negated"),
])  # fmt: skip
def test_a_gradient_that_cannot_be_used_is_refused_before_anything_is_written(kind, where):
    size, make, words = GRADS[kind]
    params = [parameter(3), parameter(size), parameter(3)]
    optimizer = ft.RMSprop(params) if where == "fastrms.torch" else fastrms.RMSProp(params)
    step = optimizer.step if where == "fastrms.torch" else lambda: optimizer.step([param.grad for param in params])
    step()
    before = [param.detach().clone() for param in params]
    good = params[1].grad
    params[1].grad = make()
    with pytest.raises((TypeError, ValueError), match=rf"grads.*\[1\].*({words})"):
        step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    params[1].grad = good
    step()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind, make, words", [
    ("dtype", lambda: torch.ones(4, dtype=torch.float64), "float64"),
    ("shape", lambda: torch.ones(2, 2), "shape"), ("expanded", expanded, "not dense"),
    ("meta", lambda: torch.ones(4, device="meta"), "meta"), ("strided", lambda: torch.ones(8)[::2], "not dense"),
    ("complex", lambda: torch.ones(4, dtype=torch.complex64), "complex64"),
])  # fmt: skip
def test_gradients_passed_to_fastrms_are_compared_with_their_parameters(kind, make, words):
    params = [parameter(4), parameter(4)]
    optimizer = fastrms.RMSProp(params)
    optimizer.step([param.grad for param in params])
    before = [param.detach().clone() for param in params]
    with pytest.raises((TypeError, ValueError), match=rf"grads\[1\].*{words}"):
        optimizer.step([params[0].grad, make()])
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True)) and optimizer.steps == 1


def test_a_gradient_with_fewer_rows_and_the_same_strides_is_refused():
    param = parameter(3, 4)
    optimizer = fastrms.RMSProp([param])
    optimizer.step([param.grad])
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(2, 4\)"):
        optimizer.step([torch.ones(3, 4)[:2]])
    empty = parameter(0)
    optimizer = fastrms.RMSProp([empty])
    optimizer.step([empty.grad])
    with pytest.raises(TypeError, match=r"grads\[0\] is on device meta"):
        optimizer.step([torch.ones(0, device="meta")])


def test_a_subclass_of_tensor_is_looked_at_in_full():
    class Named(torch.Tensor):
        pass

    param = parameter(3)
    optimizer = fastrms.RMSProp([param])
    named = torch.ones(3).as_subclass(Named)
    assert not optimizer._tensors.reader(optimizer._plan).read([named])
    optimizer.step([named])
    assert optimizer.steps == 1 and not torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("make, words", [
    (lambda: torch.ones(4, dtype=torch.complex64), "complex64.*view_as_real"),
    (lambda: torch.ones(4, device="meta"), "meta"),
    (lambda: torch.ones(4, dtype=torch.bfloat16), r"bfloat16.*\.float\(\)"), (lambda: torch.ones(8)[::2], "not dense"),
    (expanded, "not dense"), (negated, "resolve_neg"), (lambda: torch.ones(4).to_sparse(), "layout"),
])  # fmt: skip
def test_a_parameter_that_cannot_be_updated_is_refused_at_once(make, words):
    fine = parameter(3)
    with pytest.raises((TypeError, ValueError), match=rf"params\[0\]\[1\].*{words}"):
        ft.Adam([fine, make().requires_grad_()])
    optimizer = ft.Adam([fine])
    with pytest.raises((TypeError, ValueError), match=rf"params\[1\]\[0\].*{words}"):
        optimizer.add_param_group({"params": [make().requires_grad_()]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_lazy_parameters_need_a_forward_pass():
    with pytest.raises(TypeError, match="UninitializedParameter"):
        ft.Adam(torch.nn.LazyLinear(3).parameters())


def test_data_that_is_exchanged_is_followed():
    param = parameter(3)
    optimizer = ft.Adagrad([param], lr=1.0)
    optimizer.step()
    old = param.data
    param.data = torch.full((3,), 5.0)
    optimizer.step()
    assert torch.allclose(param, torch.full((3,), 5 - 2**-0.5)) and torch.equal(old, torch.zeros(3))
    torch.utils.swap_tensors(param, parameter(3, value=9.0))
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(param, torch.full((3,), 9 - 3**-0.5))


def test_data_of_another_shape_is_refused():
    param = parameter(4)
    optimizer = ft.Adam([param])
    optimizer.step()
    param.grad = None
    param.data = torch.ones(2, 2)
    param.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"params\[0\]\[0\].*shape \(2, 2\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones(2, 2))


def test_a_parameter_that_is_transposed_in_place_is_refused():
    """It lies where it did and has as many elements; only its strides are others."""
    for where in (torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3, 4))):
        optimizer = ft.Adam([where])
        where.grad = torch.ones_like(where)
        optimizer.step()
        with torch.no_grad():
            where.t_()
        where.grad = None
        where.grad = torch.ones_like(where)
        with pytest.raises(ValueError, match=r"strides|shape"):
            optimizer.step()


def test_shared_storage_is_refused():
    base = torch.ones(10)
    params = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[5:])]
    optimizer = ft.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()
    assert torch.equal(base, torch.ones(10))
    param = torch.nn.Parameter(torch.ones(6))
    optimizer = ft.Adam([param])
    param.grad = param.detach()
    with pytest.raises(ValueError, match="overlap"):
        optimizer.step()
    assert torch.equal(param, torch.ones(6))


def test_overlap_is_found_in_a_later_step():
    """The ranges of buffers keep their order from step to step; a gradient that has moved must be found among them."""
    params = [torch.nn.Parameter(torch.ones(50)) for _ in range(40)]
    for optimizer in (fastrms.Adam(params), fastrms.Adam(params, backend="numpy")):
        for step in range(3):
            grads = [torch.ones(50) for _ in params]
            optimizer.step(grads[:: 1 - 2 * (step % 2)])
            before = [param.detach().clone() for param in params]
            for k in (0, 17, 39):
                grads = [torch.ones(50) for _ in params]
                grads[k] = params[39 - k].detach()
                with pytest.raises(ValueError, match="overlap"):
                    optimizer.step(grads)
                shared = torch.ones(60)
                grads[k], grads[(k + 1) % 40] = shared[:50], shared[10:]
                with pytest.raises(ValueError, match="overlap"):
                    optimizer.step(grads)
            assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_a_write_is_counted_by_autograd():
    param = torch.nn.Parameter(torch.full((1,), 2.0))
    optimizer = ft.Adam([param])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_not_kept_alive():
    param = parameter(3)
    optimizer, other = ft.Adam([param]), fastrms.Adam([param])
    for step in (optimizer.step, lambda: other.step([param.grad])):
        param.grad = torch.ones(3)
        step()
        gone = weakref.ref(param.grad)
        param.grad = None
        assert gone() is None


def test_before_the_first_step_none_was_made():
    param = parameter(3)
    optimizer = ft.Adam([param])
    assert optimizer.step_info == (False, None, None)
    optimizer.step()
    assert optimizer.step_info == (True, None, None) == copy.deepcopy(optimizer).step_info
    optimizer = ft.Adam([param])
    handle = ft.step_in_backward(optimizer)
    assert not optimizer.step_info.applied
    param.sum().backward()
    assert optimizer.step_info.applied
    handle.remove()


def test_an_optimizer_is_freed_without_the_collector():
    param = parameter(3)
    torch.optim.Adam([param])  # the first optimizer of a process imports torch._dynamo, which keeps its caller until gc runs
    gc.collect()
    gc.disable()
    try:
        optimizer = ft.Adam([param])
        optimizer.step()
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


# the way of reading in C


def test_this_torch_is_read_in_c():
    """Otherwise every step takes the long way, with the same results."""
    assert torch_reader.library() is not None


@pytest.mark.parametrize("lacking", ["library", "c"])
def test_without_that_a_step_has_the_same_bits(lacking, monkeypatch):
    model, twin = net(), net()
    train(model, ft.Adam(model.parameters()), 3)
    if lacking == "c":
        monkeypatch.setenv("FASTRMS_BACKEND", "numpy")
    monkeypatch.setattr(torch_reader, "library", lambda: None)
    optimizer = ft.Adam(twin.parameters())
    train(twin, optimizer, 3)
    assert same(model, twin) and optimizer.state[twin[0].bias]["step"] == 3
    assert optimizer._cores[0].optimizer.backend == ("numpy" if lacking == "c" else "c")


def test_the_usual_step_takes_the_short_way(monkeypatch):
    model = net()
    optimizer = ft.Adam(model.parameters())
    train(model, optimizer, 1)
    monkeypatch.setattr(fastrms.torch_core.Core, "checked_step", None)
    train(model, optimizer, 3)
    plain = fastrms.RMSProp(list(model.parameters()))
    monkeypatch.setattr(fastrms.optimizer.Tensors, "moved", None)
    for seed in range(3):
        model.zero_grad()
        backward(model, seed)
        plain.step([param.grad for param in model.parameters()])
    plain.bind([param.grad for param in model.parameters()])
    plain.step()
    assert plain.steps == 4


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_that_another_thread_has_changed_is_not_read(count):
    params = [parameter(3), parameter(3)]
    optimizer = fastrms.Adam(params)
    assert not optimizer._tensors.reader(optimizer._plan).read([torch.ones(3)] * count)


def test_another_layout_of_objects_is_not_trusted(monkeypatch):
    class Broken(torch_reader.Library):
        pass

    monkeypatch.setattr(torch_reader, "place", lambda pairs: (_ for _ in ()).throw(LookupError()))
    assert torch_reader.library.__wrapped__() is None


# imports


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_fastrms_imports_no_torch():
    done = run("import fastrms, sys; print('torch' in sys.modules, 'fastrms.torch' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_without_torch_the_extra_is_named():
    done = run("import sys; sys.modules['torch'] = None\nimport fastrms.torch")
    assert "ImportError" in done.stderr and "fastrms[torch]" in done.stderr
    done = run("import sys; sys.modules['torch'] = None\nimport fastrms\nfastrms.torch")
    assert "AttributeError" in done.stderr and "fastrms[torch]" in done.stderr


def test_it_is_reached_as_an_attribute():
    done = run("import fastrms; print(fastrms.torch.Adam.__name__, 'torch' in dir(fastrms))")
    assert done.stdout.split() == ["Adam", "True"], done.stderr


# steps in the backward pass


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_the_backward_pass_have_the_bits_of_the_plain_loop(name):
    model, twin = net(), net()
    optimizer, other = getattr(ft, name)(groups_of(model)), getattr(ft, name)(groups_of(twin))
    ft.step_in_backward(other)
    rates = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, other)]
    for step in range(5):
        for each, one, rate in zip((model, twin), (optimizer, other), rates, strict=True):
            train(each, one, 1, first=step)
            rate.step()
        assert same(model, twin) and all(param.grad is None for param in twin.parameters())
    assert other.state[twin[0].bias]["step"] == 5


def test_few_gradients_exist_at_a_time():
    layers = [torch.nn.Linear(32, 32) for _ in range(16)]
    model = torch.nn.Sequential(*layers)
    live = []
    for layer in layers:  # before ours, which frees the gradient
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: live.append(sum(param.grad.numel() for param in model.parameters() if param.grad is not None))
        )
    ft.step_in_backward(ft.Adam(model.parameters()))
    model(torch.randn(4, 32)).sum().backward()
    assert len(live) == 16 and max(live) <= 32 * 33


def test_layers_that_take_no_part_and_passes_that_fail():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            raise ZeroDivisionError

    first, second, third = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    optimizer = ft.Adam([*first.parameters(), *second.parameters(), *third.parameters()])
    handle = ft.step_in_backward(optimizer)
    x = torch.ones(2, 3)
    with pytest.raises(ZeroDivisionError):
        second(Failing.apply(first(x))).sum().backward()
    counts = [optimizer.state[layer.bias]["step"].item() for layer in (first, second, third)]
    assert counts == [0, 1, 0]
    second(first(x)).sum().backward()
    assert [optimizer.state[layer.bias]["step"].item() for layer in (first, second, third)] == [1, 2, 0]
    handle.remove()
    second(first(x)).sum().backward()
    assert first.bias.grad is not None
    optimizer.step()
    assert [optimizer.state[layer.bias]["step"].item() for layer in (first, second, third)] == [2, 3, 0]
    ft.step_in_backward(optimizer)


def fresh_loaded(optimizer, twin):
    for each in (optimizer, twin):
        each.load_state_dict(ft.Adam([torch.nn.Parameter(torch.ones(3)) for _ in "ab"]).state_dict())


def partly_loaded(optimizer, twin):
    for each in (optimizer, twin):
        saved = each.state_dict()
        del saved["state"][1]
        each.load_state_dict(saved)


def all_cleared(optimizer, twin):
    optimizer.state.clear()
    twin.state.clear()


def one_removed(optimizer, twin):
    del optimizer.param_groups[0]["params"][1], twin.param_groups[0]["params"][1]


@pytest.mark.parametrize("change", [fresh_loaded, partly_loaded, all_cleared, one_removed])
def test_states_and_parameters_may_go_between_steps_in_the_backward_pass(change):
    params, twins = ([torch.nn.Parameter(torch.ones(3)) for _ in "ab"] for _ in range(2))
    optimizer, other = ft.Adam(params, lr=0.1), ft.Adam(twins, lr=0.1)
    ft.step_in_backward(optimizer)
    for step in range(4):
        (params[0] * params[1]).sum().backward()
        (twins[0] * twins[1]).sum().backward()
        other.step()
        twins[0].grad = twins[1].grad = None
        assert all(torch.equal(param, twin) for param, twin in zip(params, twins, strict=True))
        if step == 1:
            change(optimizer, other)
    assert [optimizer.state[p]["step"] for p in params] == [other.state[p]["step"] for p in twins]


def test_a_model_is_freed_after_remove():
    param = torch.nn.Parameter(torch.ones(3))
    handle = ft.step_in_backward(ft.Adam([param]))
    param.sum().backward()
    handle.remove()
    gone = weakref.ref(param)
    del param, handle
    gc.collect()
    assert gone() is None


def test_a_step_in_the_backward_pass_refuses_what_is_set_later():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ft.Adam([param])
    handle = ft.step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"clip_norm=1\.0.*backward.*remove\(\)"):
        optimizer.clip_norm = 1.0
    with pytest.raises(ValueError, match=r"nonfinite='skip'.*backward.*remove\(\)"):
        optimizer.nonfinite = "skip"
    optimizer.clip_norm, optimizer.nonfinite = None, "propagate"
    handle.remove()
    optimizer.clip_norm, optimizer.nonfinite = 1.0, "skip"


def test_a_step_in_the_backward_pass_refuses_a_scaler():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = ft.Adam([param]), torch.amp.GradScaler("cpu")
    handle = ft.step_in_backward(optimizer)
    scaler.scale(param.sum()).backward()
    with pytest.raises(ValueError, match=r"GradScaler.*remove\(\)"):
        scaler.step(optimizer)
    optimizer.step()
    handle.remove()
    scaler.update(1024.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert optimizer.state[param]["step"] == 2


def test_what_a_step_in_the_backward_pass_refuses():
    param = parameter(3)
    with pytest.raises(TypeError, match=r"fastrms\.torch"):
        ft.step_in_backward(torch.optim.Adam([param]))
    with pytest.raises(ValueError, match=r"clip_norm=1\.0"):
        ft.step_in_backward(ft.Adam([param], clip_norm=1.0))
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        ft.step_in_backward(ft.Adam([param], nonfinite="skip"))
    optimizer = ft.Adam([param])
    ft.step_in_backward(optimizer)
    with pytest.raises(ValueError, match="already"):
        ft.step_in_backward(optimizer)
    param.grad = None
    other = torch.nn.Parameter(torch.ones(3))
    other.register_post_accumulate_grad_hook(lambda x: setattr(x, "grad", torch.ones(3).to_sparse()))
    ft.step_in_backward(ft.Adam([other]))
    with pytest.raises(TypeError, match=r"grads\[0\]\[0\].*sparse"):
        other.sum().backward()
    assert torch.equal(other, torch.ones(3))


@pytest.mark.filterwarnings("ignore")  # torch.compile looks at .grad of all tensors
def test_a_compiled_function_leaves_its_graph_for_a_step():
    model, twin = net(), net()
    optimizer, other = ft.Adam(model.parameters()), ft.Adam(twin.parameters())

    @torch.compile(backend="eager")
    def compiled(x):
        loss = (model(x) ** 2).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss * 2

    for _ in range(3):
        x = torch.ones(11, 7)
        loss = compiled(x)
        plain = (twin(x) ** 2).sum()
        plain.backward()
        other.step()
        other.zero_grad()
        assert torch.equal(loss, plain * 2) and same(model, twin)
