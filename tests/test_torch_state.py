"""The way to and from torch's state_dicts, without torch; test_peers.py does it with torch.

torch_states.json: of each optimizer of torch 2.13.0 with unusual hyper-parameters, in float32, two groups, three tensors:
the state_dict after the first three gradients, the parameters then, and the parameters two steps later.  The second
tensor has no gradient in the first step, the third has none at all.
"""

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import fastrms
from fastrms.schedules import Plateau
from fastrms.torch_state import YOUNG, torch_form

RECORDED = json.loads((Path(__file__).parent / "torch_states.json").read_text())
NAMES = ["RMSProp", "AdaGrad", "Adam", "AdamW", "RProp"]
STRUCTURAL = {"RMSProp": {"centered": True, "momentum": 0.5}, "Adam": {"amsgrad": True}}


def arrays(values):
    return [np.array(x, np.float32) for x in values]


def recorded(name, as_array=np.array):
    """The state_dict, its tensors as arrays."""
    d = copy.deepcopy(RECORDED[name]["state_dict"])
    d["state"] = {
        int(number): {key: x if key == "step" else as_array(np.array(x, np.float32)) for key, x in state.items()}
        for number, state in d["state"].items()
    }
    return d


def made(name, params, **options):
    return getattr(fastrms, name)([{"params": params[:1]}, {"params": params[1:]}], **STRUCTURAL.get(name, {}), **options)


@pytest.mark.parametrize("as_array", [np.array, memoryview, np.asfortranarray, lambda x: x[...]], ids=range(4))
@pytest.mark.parametrize("name", NAMES)
def test_the_next_steps_are_torchs(name, as_array, backend):
    params, want = arrays(RECORDED[name]["before"]), arrays(RECORDED[name]["after"])
    optimizer = made(name, params, backend=backend)
    optimizer.load_torch_state_dict(recorded(name, as_array))
    assert [t["steps"] for t in optimizer.state_dict()["tensors"]] == [3, 2, 0] and optimizer.steps == 3
    assert optimizer.dialect == "torch"
    for gradient in np.array(RECORDED["gradients"], np.float32)[3:]:
        optimizer.step([[gradient[:3].reshape(1, 3)], [gradient[3:], None]])
    for x, expected in zip(params, want, strict=True):
        assert (np.abs(x - expected) <= 8 * np.spacing(np.abs(expected))).all()


def test_hyper_parameters_have_our_names():
    for name, group in [
        ("RMSProp", {"lr": 0.01, "rho": 0.9, "momentum": 0.9, "centered": True, "eps": 1e-8}),
        ("AdaGrad", {"lr": 0.01, "lr_decay": 0.1, "initial_value": 0.1}),
        ("Adam", {"beta1": 0.8, "beta2": 0.9, "maximize": True, "weight_decay": 0.1, "decoupled": False, "amsgrad": True}),
        ("AdamW", {"weight_decay": 0.5, "decoupled": True}),
        ("RProp", {"lr": 0.25, "eta_minus": 0.3, "eta_plus": 1.5, "step_max": 50.0}),
    ]:
        optimizer = made(name, arrays(RECORDED[name]["before"]), clip_value=1.0)
        optimizer.load_torch_state_dict(recorded(name))
        assert group.items() <= dict(optimizer.groups[0]).items()
        assert optimizer.groups[0]["clip_value"] == 1.0 and optimizer.lr[1] == 0.125


def test_what_torch_does_not_have_keeps_its_value_and_what_it_has_does_not():
    """A name that older versions of torch do not write is at its default there."""
    kept = {"clip_value": 2.0, "nesterov": "dozat", "eps_root": 1e-3, "bias_correction": "folded"}
    optimizer, d = fastrms.Adam(np.ones(3), maximize=True, decoupled=True, **kept), torch_form(fastrms.Adam(np.ones(3)))
    optimizer.load_torch_state_dict(d)
    assert dict(optimizer.groups[0]) == {**fastrms.Adam.defaults, **kept}
    optimizer = fastrms.Adam(np.ones(3), maximize=True, decoupled=True, **kept)
    for name in YOUNG:
        del d["param_groups"][0][name]
    optimizer.load_torch_state_dict(d)
    assert dict(optimizer.groups[0]) == {**fastrms.Adam.defaults, **kept}


def test_adamw_does_not_take_the_weight_decay_of_adam():
    l2 = torch_form(fastrms.Adam(np.ones(3), weight_decay=0.1))
    optimizer = fastrms.AdamW(np.ones(3))
    with pytest.raises(ValueError, match=r"param_groups\[0\] is of torch's Adam.*weight_decay=0.1.*fastrms.Adam"):
        optimizer.load_torch_state_dict(l2)
    assert optimizer.groups[0]["weight_decay"] == 0.01 and optimizer.groups[0]["decoupled"]
    optimizer.load_torch_state_dict(torch_form(fastrms.Adam(np.ones(3))))
    assert optimizer.groups[0]["weight_decay"] == 0.0
    optimizer = fastrms.AdamW(np.ones(3), decoupled=False)
    optimizer.load_torch_state_dict(l2)
    assert optimizer.groups[0]["weight_decay"] == 0.1 and not optimizer.groups[0]["decoupled"]


def test_older_versions_and_schedulers():
    """Keys that torch once did not write, that its schedulers add, and steps that were ints."""
    d = recorded("AdamW")
    for group in d["param_groups"]:
        del group["maximize"], group["decoupled_weight_decay"]
        group["initial_lr"] = 1.0
    d["state"][0]["step"] = 3
    optimizer = made("AdamW", arrays(RECORDED["AdamW"]["before"]))
    optimizer.load_torch_state_dict(d)
    assert optimizer.groups[0]["decoupled"] and optimizer.state_dict()["tensors"][0]["steps"] == 3


def test_a_callable_lr_stays():
    plateau = Plateau(0.5)
    optimizer = made("Adam", arrays(RECORDED["Adam"]["before"]), lr=plateau)
    optimizer.load_torch_state_dict(recorded("Adam"))
    assert optimizer.lr is plateau and plateau.rate == 0.5


@pytest.mark.parametrize(
    "words, change",
    [
        ("not a state_dict of torch.optim that fits Adam", lambda d: d.pop("state")),
        ("KeyError.'betas'", lambda d: d["param_groups"][0].pop("betas")),
        ("KeyError.'amsgrad'", lambda d: d["param_groups"][1].pop("amsgrad")),
        ("betas=.* must be 2 numbers", lambda d: d["param_groups"][1].update(betas=(0.9,))),
        ("beta2=1.5", lambda d: d["param_groups"][1].update(betas=(0.9, 1.5))),
        (r"groups of \[1, 1\] parameters, this optimizer has \[1, 2\]", lambda d: d["param_groups"][1]["params"].pop()),
        (r"groups of \[1\] parameters", lambda d: d["param_groups"].pop()),
        ("KeyError.'step'", lambda d: d["state"][0].pop("step")),
        ("step=2.5", lambda d: d["state"][0].update(step=2.5)),
        ("steps=-1", lambda d: d["state"][0].update(step=-1.0)),
        ("has state", lambda d: d["state"][1].pop("max_exp_avg_sq")),
        ("has state", lambda d: d["state"][1].update(mu_product=np.ones(2, np.float32))),
        ("must be an ndarray of float32, shape", lambda d: d["state"][0].update(exp_avg=np.ones(3, np.float32))),
        ("must be an ndarray of float32, shape", lambda d: d["state"][0].update(exp_avg=np.ones((1, 3)))),
        (r"exp_avg of params\[0\]\[0\] has dtype int64", lambda d: d["state"][0].update(exp_avg=np.ones((1, 3), int))),
    ],
)
def test_dicts_that_do_not_fit(words, change):
    optimizer = made("Adam", arrays(RECORDED["Adam"]["before"]))
    before, d = pickle.dumps(optimizer.state_dict()), recorded("Adam")
    change(d)
    with pytest.raises(ValueError, match=words):
        optimizer.load_torch_state_dict(d)
    assert pickle.dumps(optimizer.state_dict()) == before


def test_another_optimizers_dict():
    for name in NAMES:
        for other in NAMES:
            if {name, other} != {"Adam", "AdamW"} and name != other:
                with pytest.raises(ValueError, match=rf"param_groups\[0\] has .* and no .*: it is no state of {name}"):
                    made(name, arrays(RECORDED[name]["before"])).load_torch_state_dict(recorded(other))
    with pytest.raises(ValueError, match="this is a state_dict of fastrms: pass it to load_state_dict"):
        fastrms.Adam(np.ones(3)).load_torch_state_dict(fastrms.Adam(np.ones(3)).state_dict())
    with pytest.raises(ValueError, match="of torch's Adam, not AdamW"):
        made("AdamW", arrays(RECORDED["Adam"]["before"])).load_torch_state_dict(recorded("Adam"))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install torch"):
        fastrms.Adam(np.ones(3)).to_torch_state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_what_came_from_torch_goes_back_as_it_was(name):
    optimizer = made(name, arrays(RECORDED[name]["before"]))
    optimizer.load_torch_state_dict(recorded(name))
    d, want = torch_form(optimizer), recorded(name)
    for group, expected in zip(d["param_groups"], want["param_groups"], strict=True):
        assert expected.items() <= {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()}.items()
    for number, state in want["state"].items():
        assert state.keys() == d["state"][number].keys()
        assert all(np.array_equal(d["state"][number][key], x) for key, x in state.items())


@pytest.mark.parametrize(
    "name, options",
    [
        ("RMSProp", {"clip_value": 1.0}), ("RMSProp", {"eps_root": 1e-6}), ("RMSProp", {"bias_correction": "folded"}),
        ("RMSProp", {"nesterov": True, "momentum": 0.9}), ("RMSProp", {"lr_in_momentum": True, "momentum": 0.9}),
        ("RMSProp", {"decoupled": True, "weight_decay": 0.1}), ("AdaGrad", {"decoupled": True, "weight_decay": 0.1}),
        ("AdaGrad", {"eps_root": 1e-6}), ("Adam", {"nesterov": "dozat"}), ("Adam", {"bias_correction": False}),
        ("Adam", {"amsgrad": "corrected"}), ("Adam", {"eps_root": 1e-6}), ("AdamW", {"decoupled": False}),
        ("RProp", {"zero_on_flip": False}), ("RProp", {"clip_value": 0.5}),
    ],
)  # fmt: skip
def test_what_torch_does_not_have_is_refused_by_name(name, options):
    """Alone; without effect it passes."""
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))!r}"):
        torch_form(getattr(fastrms, name)(np.ones(3), **options))


def test_what_makes_no_difference_passes():
    for optimizer in [
        fastrms.RMSProp(np.ones(3), decoupled=True, lr_in_momentum=True, initial_value=1.0),
        fastrms.AdamW(np.ones(3), decoupled=False, weight_decay=0.0),
        fastrms.Adam(np.ones(3), decoupled=True, weight_decay=0.1),
    ]:
        assert torch_form(optimizer)["state"][0]["step"] == 0


def test_a_schedule_goes_as_its_present_rate():
    optimizer = fastrms.RMSProp(np.ones(3), lr=lambda step: 0.5 / (step + 1))
    optimizer.step(np.ones(3))
    assert torch_form(optimizer)["param_groups"][0]["lr"] == 0.25


def test_step_counts_that_torch_cannot_hold():
    optimizer = fastrms.RMSProp(np.ones(3))
    d = optimizer.state_dict()
    d["tensors"][0]["steps"] = 2**24 + 1
    optimizer.load_state_dict(d)
    with pytest.raises(ValueError, match="16777217 steps"):
        torch_form(optimizer)


def test_own_rules_have_no_counterpart():
    class Plain(fastrms.Optimizer):
        defaults = {"lr": 0.1}

        def coefficients(step, lr):
            return {"lr": lr}

        def rule(param, grad, lr):
            return (param - lr * grad,)

    optimizer = Plain(np.ones(3), backend="numpy")
    for call in (optimizer.to_torch_state_dict, lambda: optimizer.load_torch_state_dict({})):
        with pytest.raises(TypeError, match=r"torch\.optim has no Plain"):
            call()


@pytest.mark.parametrize("groups", [None, {"*.bias": {"weight_decay": 0.0}}])
def test_a_flat_buffer_goes_as_its_named_arrays(groups):
    """As the mapping of the same arrays goes, there and back."""
    shapes = {"a": (2, 3), "a.bias": (3,), "b": (3, 1), "b.bias": (1,)}
    flat = fastrms.FlatBuffer(shapes)
    flat.grad[...] = np.arange(flat.grad.size) - 5.5
    separate = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    of_flat = fastrms.Adam(flat, weight_decay=0.1, groups=groups)
    of_mapping = fastrms.Adam(separate, weight_decay=0.1, groups=groups)
    of_flat.step(flat.grad)
    of_mapping.step(dict(flat.grads))
    torchs, others = torch_form(of_flat), torch_form(of_mapping)
    assert torchs["param_groups"] == others["param_groups"] and torchs["state"].keys() == others["state"].keys()
    for number, state in torchs["state"].items():
        assert all(np.array_equal(x, others["state"][number][name]) for name, x in state.items())
    again = fastrms.Adam(fastrms.FlatBuffer(shapes), groups=groups)
    again.load_torch_state_dict(torchs)
    for name, tree in of_flat.state.items():
        assert all(np.array_equal(x, again.state[name][key]) for key, x in tree.items())


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(state={str(k): v for k, v in d["state"].items()}), "each must be listed once"),
    (lambda d: d["state"].update({7: d["state"][0]}), "each must be listed once"),
    (lambda d: d["param_groups"][0].update(params=[0, 0]), "each must be listed once"),
    (lambda d: d["param_groups"][0].update(betas=(0.9, 0.99, 0.999)), "betas=.* must be 2 numbers"),
    (lambda d: d["state"].update({0: np.zeros(3)}), "must be a mapping"),
])  # fmt: skip
def test_what_would_be_passed_over_is_refused(change, words):
    made = [fastrms.Adam([np.ones(2), np.ones(3)]) for _ in range(2)]
    made[0].step([np.ones(2), np.ones(3)])
    d = torch_form(made[0])
    change(d)
    with pytest.raises(ValueError, match=words):
        made[1].load_torch_state_dict(d)
    assert made[1].steps == 0
