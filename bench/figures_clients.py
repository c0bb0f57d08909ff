"""The figures in other people's trainers: what the optimizer's step takes of a whole training, with theirs and with ours.

stable-baselines3's A2C on CartPole learns from 5 steps of an environment at a time: tensors are small and updates many.
"""

import time
from statistics import median

from . import peers
from .figures import Figure

ROUNDS, STEPS = 5, 2000  # of each training; steps of the environment, 5 to an update
PLACED = "every tensor lies where torch allocates it; figures are medians of 5 trainings"
RMSPROP, LIKE_TF = "torch.optim.RMSprop", "SB3's RMSpropTFLike"


def prepare():
    """Let torch and fastrms use one thread, which suits networks of 64 units; returns versions."""
    import fastrms

    fastrms.set_num_threads(1)
    peers.use_threads(1)
    return {"threads": 1, "peers": peers.versions()}


def optimizers():
    """Name -> (class, options) of what A2C takes by itself, what its documentation advises, and ours in their place."""
    import torch
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    import fastrms.torch

    ours = fastrms.torch.RMSprop
    return {
        RMSPROP: (torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-5}),
        f"ours for {RMSPROP}": (ours, {"alpha": 0.99, "eps": 1e-5}),
        LIKE_TF: (RMSpropTFLike, {"alpha": 0.99, "eps": 1e-5}),
        f"ours for {LIKE_TF}": (ours, {"dialect": "tf1", "alpha": 0.99, "eps_root": 1e-5}),
    }


def trained(optimizer, options):
    """(seconds of a whole training, seconds of these in the optimizer's step)."""
    from stable_baselines3 import A2C

    policy = {"optimizer_class": optimizer, "optimizer_kwargs": options}
    model = A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=policy)
    step, inside = model.policy.optimizer.step, []

    def timed():
        start = time.perf_counter()
        step()
        inside.append(time.perf_counter() - start)

    model.policy.optimizer.step = timed
    start = time.perf_counter()
    model.learn(STEPS)
    return time.perf_counter() - start, sum(inside)


def share_of_training():
    """The step's share of the training time, which ours is to halve, and both trainings."""
    found = {name: [] for name in optimizers()}
    for _ in range(ROUNDS):
        for name, (optimizer, options) in optimizers().items():
            found[name].append(trained(optimizer, options))
    for name in (RMSPROP, LIKE_TF):
        theirs, ours = found[name], found[f"ours for {name}"]
        shares = [median(inside / whole for whole, inside in runs) * 100 for runs in (theirs, ours)]
        steps = [median(inside for _, inside in runs) / (STEPS / 5) * 1e6 for runs in (theirs, ours)]
        wholes = [median(whole for whole, _ in runs) for runs in (theirs, ours)]
        yield Figure(
            f"A2C, the step's share of the training, {name} and ours",
            f"<= {shares[0] / 2:.1f} %",
            f"{shares[0]:.1f} % and {shares[1]:.1f} % ({steps[0]:.0f} and {steps[1]:.0f} us; {wholes[0]:.2f} and "
            f"{wholes[1]:.2f} s in all)",
            shares[1] <= shares[0] / 2,
        )


MEASUREMENTS = (share_of_training,)
