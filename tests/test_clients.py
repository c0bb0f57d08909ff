"""The optimizers of fastrms.torch in other people's trainers, run live (extra `peers`)."""

import inspect
from copy import deepcopy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
import fastrms.torch  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # what these packages warn of is not ours


def ulps(a, b):
    """The largest distance of two float32 tensors in units in the last place of the larger magnitude, elementwise."""
    a, b = a.detach().numpy(), b.detach().numpy()
    return float(np.max(np.abs(a - b) / np.spacing(np.maximum(np.abs(a), np.abs(b)))))


# stable-baselines3: A2C trains with torch's RMSprop, or with the RMSpropTFLike that its documentation advises


def trained(optimizer, steps, **options):
    """An A2C on CartPole after so many steps by an optimizer, or by the one that it takes by itself."""
    from stable_baselines3 import A2C

    policy = {"optimizer_class": optimizer, "optimizer_kwargs": options} if optimizer else None
    return A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=policy).learn(steps)


def rewards(model):
    return [episode["r"] for episode in model.ep_info_buffer]


@pytest.mark.parametrize("like_tf", [False, True])
def test_stable_baselines3_learns_the_same(like_tf):
    """The same episodes, and weights that differ by rounding alone, after 400 updates."""
    pytest.importorskip("stable_baselines3", reason="needs stable-baselines3")
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    options = {"alpha": 0.99, "eps": 1e-5}
    if like_tf:
        theirs = trained(RMSpropTFLike, 2000, **options)
        mine = trained(fastrms.torch.RMSprop, 2000, dialect="tf1", alpha=0.99, eps_root=1e-5)
    else:
        theirs, mine = trained(None, 2000), trained(fastrms.torch.RMSprop, 2000, **options)
    assert type(theirs.policy.optimizer) is (RMSpropTFLike if like_tf else torch.optim.RMSprop)
    assert type(mine.policy.optimizer) is fastrms.torch.RMSprop
    assert len(rewards(theirs)) > 20 and rewards(theirs) == rewards(mine)
    for a, b in zip(theirs.policy.parameters(), mine.policy.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# timm: RMSpropTF, with which EfficientNets are trained


@pytest.mark.parametrize("decoupled, weight_decay", [(False, 1e-5), (True, 1e-2)])
def test_timm_has_the_same_trajectory(decoupled, weight_decay):
    optim = pytest.importorskip("timm.optim", reason="needs timm")
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
    models = first, deepcopy(first)
    options = {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "weight_decay": weight_decay}
    theirs = optim.RMSpropTF(models[0].parameters(), eps=1e-3, decoupled_decay=decoupled, **options)
    mine = fastrms.torch.RMSprop(models[1].parameters(), dialect="tf1", eps_root=1e-3, decoupled=decoupled, **options)
    for step in range(20):
        for model, optimizer in zip(models, (theirs, mine), strict=True):
            torch.manual_seed(step)
            loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.randint(0, 10, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), f"step {step}"


# torchao: CPUOffloadOptimizer, which makes one optimizer for each parameter


def test_torchao_takes_it():
    """Without a GPU it can only be asked how it calls us: with a list of one group of one parameter, then the options."""
    low_bit = pytest.importorskip("torchao.optim", reason="needs torchao")
    offload = low_bit.CPUOffloadOptimizer
    assert "optimizer_class(" in inspect.getsource(offload)
    weight = torch.nn.Parameter(torch.ones(7))
    optimizer = fastrms.torch.AdamW([{"params": weight, "lr": 0.5}], weight_decay=0.0)
    weight.grad = torch.ones(7)
    optimizer.step()
    assert torch.allclose(weight, torch.full((7,), 0.5))
    if torch.cuda.is_available():
        there = torch.nn.Linear(64, 64, device="cuda")
        made = offload(there.parameters(), fastrms.torch.AdamW, lr=0.5, minimal_size=0)
        there(torch.ones(64, device="cuda")).sum().backward()
        before = there.weight.detach().clone()
        made.step()
        assert not torch.equal(before, there.weight)


# Megatron: HybridDeviceOptimizer(params, cpu_optimizer_cls=..., ...), which makes one for groups of CPU copies


def test_megatron_can_call_it():
    """As megatron.core.optimizer.cpu_offloading does: groups with options of their own, lr set in param_groups at each step,
    state_dict() moved into and out of; the sub-optimizers' state is read by parameter."""

    def made(kind):
        copies = [torch.nn.Parameter(torch.full((5,), float(k))) for k in range(3)]
        groups = [{"params": copies[:2], "wd_mult": 1.0}, {"params": copies[2:], "wd_mult": 0.0}]
        return kind(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)

    optimizer, reference = made(fastrms.torch.AdamW), made(torch.optim.AdamW)
    for step in range(3):
        for either in (optimizer, reference):
            for group in either.param_groups:
                group["lr"], group["weight_decay"] = 0.1 / (step + 1), 0.01 * group["wd_mult"]
                for param in group["params"]:
                    param.grad = torch.full((5,), 0.1 * (step + 1))
            either.step()
    for mine, theirs in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for a, b in zip(mine["params"], theirs["params"], strict=True):
            assert ulps(a, b) <= 4
            assert set(optimizer.state[a]) == set(reference.state[b])
    optimizer.load_state_dict(reference.state_dict())
