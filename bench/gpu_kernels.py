"""Speed of the CUDA kernels of fastrms: every rule, beside a copy and beside the same number of plain streams; many tensors;
views at an offset; and other ways to write the kernel."""

import numpy as np

import fastrms
from fastrms.memory import device

from .problem import bytes_moved

MAKERS = {  # name of the rule -> (class, options)
    "rmsprop": (fastrms.RMSProp, {}),
    "adagrad": (fastrms.AdaGrad, {}),
    "adam": (fastrms.Adam, {}),
    "rprop": (fastrms.RProp, {}),
    "rmsprop_momentum": (fastrms.RMSProp, {"momentum": 0.9}),
    "rmsprop_centered": (fastrms.RMSProp, {"centered": True}),
    "rmsprop_centered_momentum": (fastrms.RMSProp, {"centered": True, "momentum": 0.9}),
    "adam_amsgrad": (fastrms.Adam, {"amsgrad": True}),
}
MAIN = ("rmsprop", "adagrad", "adam", "rprop")
LR = 1e-6  # numbers stay ordinary


class Streams(fastrms.Optimizer):
    """The ceiling: one addition for each buffer that a rule with this number of states writes, and no more."""

    defaults = {"lr": 0.5}
    coefficients = staticmethod(lambda step, lr: {"lr": lr})


class FiveStreams(Streams):
    state_names = ("a",)

    @staticmethod
    def rule(param, grad, a, lr):
        a = lr * (a + grad)
        return lr * (param + a), a


class SevenStreams(Streams):
    state_names = ("a", "b")

    @staticmethod
    def rule(param, grad, a, b, lr):
        a, b = lr * (a + grad), lr * (b - grad)
        return lr * (param + a) + b, a, b


class NineStreams(Streams):
    state_names = ("a", "b", "c")

    @staticmethod
    def rule(param, grad, a, b, c, lr):
        a, b, c = lr * (a + grad), lr * (b - grad), lr * (c + grad)
        return lr * (param + a) + (b + c), a, b, c


CEILINGS = {1: FiveStreams, 2: SevenStreams, 3: NineStreams}


def bound(make, params, grads, **options):
    """A bound optimizer after one step."""
    optimizer = make(params, backend="cuda", **options)
    optimizer.bind(grads)
    optimizer.step()
    return optimizer


def row(name, size, dtype, bytes_per_element, milliseconds):
    return {"what": name, "elements": size, "dtype": str(np.dtype(dtype)), "us": 1e3 * milliseconds,
            "bytes per element": bytes_per_element, "GB/s": bytes_per_element * size / milliseconds / 1e6}  # fmt: skip


def rules(gpu, size, dtype, names=MAIN):
    """A row for each rule of these names, for their ceilings and for a copy."""
    param, grad = gpu.random(size, dtype), gpu.random(size, dtype, 1)
    other = device.allocate(size, np.dtype(dtype), gpu.index)
    steps, taken = {"copy": lambda: copy(other, grad)}, {"copy": 2 * grad.dtype.itemsize}
    optimizers = {name: bound(MAKERS[name][0], param, grad, lr=LR, **MAKERS[name][1]) for name in names}
    for states in sorted({len(optimizer.state) for optimizer in optimizers.values()}):
        optimizers[CEILINGS[states].__name__] = bound(CEILINGS[states], param, grad)
    for name, optimizer in optimizers.items():
        steps[name], taken[name] = optimizer.step, bytes_moved(optimizer)
    found = gpu.milliseconds(steps)
    rows = [row(name, size, dtype, taken[name], milliseconds) for name, milliseconds in found.items()]
    ceiling = {made["bytes per element"]: made["GB/s"] for made in rows if made["what"].endswith("Streams")}
    for made in rows:
        if made["what"] in names:
            made["% of streams"] = 100 * made["GB/s"] / ceiling[made["bytes per element"]]
    return rows


def copy(to, source):
    device.call_driver("copying", "cuMemcpyDtoDAsync", to.address, source.address, to.nbytes, device.LEGACY_STREAM)


def many(gpu, count, size):
    """Adam over many tensors beside one tensor of all their elements; microseconds of a step on the GPU."""
    params, grads = ([gpu.random(size, seed=k) for k in range(seed, seed + count)] for seed in (0, 1000))
    optimizer = bound(fastrms.Adam, params, grads, lr=LR)
    one = bound(fastrms.Adam, gpu.random(count * size), gpu.random(count * size, seed=1), lr=LR)
    clipped, skipping = (bound(fastrms.Adam, params, grads, lr=LR, nonfinite=what) for what in ("propagate", "skip"))
    steps = {"": optimizer.step, " of one tensor": one.step, " with clip_norm": lambda: clipped.step(clip_norm=1.0),
             " with nonfinite=\"skip\"": skipping.step}  # fmt: skip
    for step in steps.values():
        step()
    found = gpu.milliseconds(steps)
    return {"tensors": count, "elements": size, **{f"us{name}": 1e3 * taken for name, taken in found.items()}}


def offsets(gpu, size):
    """RMSProp on views: aligned, at a shared offset, and with the gradient at another offset than the parameter."""
    places = {"aligned": (0, 0), "shared offset": (1, 1), "other offsets": (1, 2)}
    optimizers = {name: bound(fastrms.RMSProp, gpu.random(size, offset=a), gpu.random(size, seed=1, offset=b), lr=LR)
                  for name, (a, b) in places.items()}  # fmt: skip
    found = gpu.milliseconds({name: optimizer.step for name, optimizer in optimizers.items()})
    return [row(name, size, np.float32, bytes_moved(optimizers[name]), taken) for name, taken in found.items()]
