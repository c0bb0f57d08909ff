"""The figures of fastrms.torch: whole steps of torch optimizers on CPU tensors, beside those of torch.optim.

Every time is that of ``step()`` alone, with everything around the update.  A step with new gradients also sets them, whose
time, measured by itself, is taken off again.  torch runs on one thread, too, and its faster time counts.
"""

import sys
from itertools import cycle, pairwise
from statistics import median

try:
    import torch
except ImportError:
    sys.exit("torch is missing, to which these figures compare: pip install -e '.[torch]'")

import fastrms
import fastrms.torch

from .check import WrongContender
from .figures import Figure
from .timing import sampled

SECONDS = 10.0  # of timing for each cell
MEASUREMENT = 2e-2  # seconds: ten steps of the slowest, after the rest that the threads of torch need
NET, TENSORS, SIZE, LARGE, SETS = (64, 64, 64, 10), 100, 1000, 2**25, 20
DEPTH, WIDTH = 24, 256  # of the network whose gradients are counted
PLACED = "parameters and gradients where torch allocates them"
SETTING = "setting the gradients"
CONTENDERS = {
    "torch RMSprop": lambda params: torch.optim.RMSprop(params).step,
    "torch RMSprop, foreach": lambda params: torch.optim.RMSprop(params, foreach=True).step,
    "torch Adam, fused": lambda params: torch.optim.Adam(params, fused=True).step,
    "fastrms.torch.RMSprop": lambda params: fastrms.torch.RMSprop(params).step,
    "fastrms.torch.Adam": lambda params: fastrms.torch.Adam(params).step,
    "fastrms.RMSProp": lambda params: listed(fastrms.RMSProp(params), params),
    "fastrms.Adam": lambda params: listed(fastrms.Adam(params), params),
}
RIVALS = {"RMS": "torch RMSprop", "Adam": "torch Adam, fused"}


def prepare():
    """Return the number of threads, which is left at all cores, and the version of torch."""
    return {"threads": fastrms.get_num_threads(), "peers": {"torch": torch.__version__}}


def listed(optimizer, params):
    return lambda: optimizer.step([param.grad for param in params])


def net():
    layers = [torch.nn.Linear(*sizes) for sizes in pairwise(NET)]
    return [param for layer in layers for param in layer.parameters()]


def many():
    return [torch.nn.Parameter(torch.randn(SIZE)) for _ in range(TENSORS)]


def gradients(params):
    return [1e-3 * torch.randn_like(param) for param in params]


def checked(make, names):
    """name -> (step, parameters); WrongContender where two of one kind do not move the parameters alike."""
    made, moved, start = {}, {}, make()
    grads = gradients(start)
    for name in names:
        params = [torch.nn.Parameter(param.detach().clone()) for param in start]
        step = CONTENDERS[name](params)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        step()
        made[name] = step, params
        moved.setdefault("Adam" if "Adam" in name else "RMS", []).append((name, params))
    for (first, expected), *others in moved.values():
        for name, params in others:
            if not all(torch.allclose(p, q, atol=1e-6) for p, q in zip(params, expected, strict=True)):
                raise WrongContender(f"{name} and {first} move the parameters differently")
    return made


def times(make, names, new_gradients):
    """name -> (minimum, median) of a step in microseconds."""
    made, calls = checked(make, names), {}
    for name, (step, params) in made.items():
        calls[name] = with_new_gradients(step, params) if new_gradients else step
    if new_gradients:
        calls[SETTING] = with_new_gradients(lambda: None, make())
    torch.set_num_threads(fastrms.get_num_threads())
    found = taken(calls)
    torch.set_num_threads(1)
    alone = taken({name: call for name, call in calls.items() if name.startswith("torch")})
    found |= {name: min(found[name], alone[name]) for name in alone}
    off = found.pop(SETTING, (0.0, 0.0))
    return {name: (least - off[0], middle - off[1]) for name, (least, middle) in found.items()}


def taken(calls):
    """name -> (minimum, median) of a call in microseconds."""
    samples, _ = sampled({name: [call] for name, call in calls.items()}, SECONDS, measurement=MEASUREMENT)
    return {name: (min(of_call) / 1e3, median(of_call) / 1e3) for name, (of_call,) in samples.items()}


def with_new_gradients(step, params):
    """step() with other gradient tensors each time."""
    sets = cycle([gradients(params) for _ in range(SETS)])

    def call():
        for param, grad in zip(params, next(sets), strict=True):
            param.grad = grad
        step()

    return call


def rows(what, make, targets, names=tuple(CONTENDERS), new_gradients=False):
    """A Figure for each contender of ours, over the torch optimizer that does the same."""
    found = times(make, names, new_gradients)
    for name in names:
        if name.startswith("fastrms"):
            kind = "Adam" if "Adam" in name else "RMS"
            rival = RIVALS[kind] if RIVALS[kind] in found else "torch RMSprop, foreach"
            (mine, my_median), (theirs, their_median) = found[name], found[rival]
            measured = f"{theirs / mine:.1f}x: {microseconds(mine, my_median)} against {microseconds(theirs, their_median)}"
            yield Figure(f"{what}: {name} over {rival}", f">= {targets[kind]}x", measured, theirs / mine >= targets[kind])


def microseconds(minimum, median):
    digits = 1 if minimum < 100 else 0
    return f"{minimum:.{digits}f} us ({median:.{digits}f})"


def small():
    yield from rows(f"net {'-'.join(map(str, NET))}, 6 tensors", net, {"RMS": 8, "Adam": 4})


def hundred():
    yield from rows(f"{TENSORS} tensors of {SIZE}", many, {"RMS": 10, "Adam": 5})


def hundred_anew():
    yield from rows(f"{TENSORS} tensors of {SIZE}, new gradients", many, {"RMS": 8, "Adam": 4}, new_gradients=True)


def large():
    names = "torch RMSprop, foreach", "fastrms.torch.RMSprop"
    yield from rows("one tensor of 2^25", lambda: [torch.nn.Parameter(torch.randn(LARGE))], {"RMS": 5}, names)


def in_backward():
    """The most elements that gradients have at a time while the backward pass makes the step, as a share of all."""
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    params, alive = list(model.parameters()), []
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.numel() for p in params if p.grad is not None))
        )
    fastrms.torch.step_in_backward(fastrms.torch.Adam(params))
    model(torch.randn(8, WIDTH)).sum().backward()
    share = 100 * max(alive) / sum(param.numel() for param in params)
    what = f"step_in_backward, {DEPTH} layers of {WIDTH}: gradients alive at most"
    yield Figure(what, "<= 10 % of all", f"{share:.1f} %", share <= 10)


MEASUREMENTS = (small, hundred, hundred_anew, large, in_backward)
