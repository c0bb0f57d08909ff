"""Other libraries on the same GPU: torch's fused and foreach optimizers, CuPy's expression, and Optax compiled by XLA, where
they are installed."""

import importlib.util
import os
from functools import partial

import numpy as np

import fastrms

from .gpu_kernels import LR, bound, row
from .peers import jitted
from .problem import bytes_per_element

FUSED = {  # name -> (class of torch.optim, options, its rule)
    "torch fused Adam": ("Adam", {"fused": True}, "adam"),
    "torch fused AdamW": ("AdamW", {"fused": True}, "adam"),
    "torch fused Adagrad": ("Adagrad", {"fused": True}, "adagrad"),
    "torch foreach RMSprop": ("RMSprop", {"foreach": True}, "rmsprop"),
    "torch foreach Adam": ("Adam", {"foreach": True}, "adam"),
}


def has(name):
    """Whether a library is installed."""
    return importlib.util.find_spec(name) is not None


def torch_tensors(count, size, seed=0):
    import torch

    torch.manual_seed(seed)
    return [torch.randn(size, device="cuda") for _ in range(count)]


def torch_optimizer(name, count, size):
    """A torch optimizer over tensors with gradients, after one step."""
    import torch

    kind, options, _ = FUSED[name]
    params = [torch.nn.Parameter(p) for p in torch_tensors(count, size)]
    for param, grad in zip(params, torch_tensors(count, size, 1), strict=True):
        param.grad = grad
    optimizer = getattr(torch.optim, kind)(params, lr=LR, **options)
    optimizer.step()
    return optimizer


def clipping(count, size):
    """Name -> a step that clips the norm of all gradients before it."""
    import torch

    theirs = torch_optimizer("torch fused Adam", count, size)
    params = theirs.param_groups[0]["params"]

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        theirs.step()

    ours = fastrms.Adam(torch_tensors(count, size), lr=LR)
    ours.bind(torch_tensors(count, size, 1))
    return {
        "torch clip_grad_norm_ and fused Adam": clip_and_step,
        "fastrms Adam with clip_norm": lambda: ours.step(clip_norm=1.0),
    }


def of_torch(gpu, size, count=1):
    """A row for each optimizer of torch, beside ours on torch tensors."""
    steps, refused = {}, []
    for name in FUSED:
        try:
            steps[name] = torch_optimizer(name, count, size).step
        except Exception as error:  # what it does not offer on CUDA
            refused.append({"what": name, "elements": size, "refused": str(error).partition("\n")[0][:200]})
    steps |= clipping(count, size)
    for make in (fastrms.Adam, fastrms.RMSProp):
        optimizer = make(torch_tensors(count, size), lr=LR)
        optimizer.bind(torch_tensors(count, size, 1))
        steps[f"fastrms {make.__name__}"] = optimizer.step
    found = gpu.milliseconds(steps, most=50)
    rules = {name: FUSED[name][2] if name in FUSED else "adam" if "Adam" in name else "rmsprop" for name in found}
    moved = {name: bytes_per_element(rules[name], np.float32) + 4 * ("clip" in name) for name in found}  # reads grad twice
    rows = [row(name, count * size, np.float32, moved[name], taken) for name, taken in found.items()]
    return [{**made, "tensors": count} for made in rows] + refused


def of_cupy(gpu, size):
    """CuPy's expression of RMSProp, and the same as one ElementwiseKernel."""
    import cupy

    grad = cupy.random.standard_normal(size, dtype=cupy.float32)
    param, v = cupy.random.standard_normal(size, dtype=cupy.float32), cupy.zeros(size, cupy.float32)

    def expression():
        nonlocal v
        v = np.float32(0.99) * v + np.float32(0.01) * grad * grad
        param[...] -= np.float32(LR) * grad / (cupy.sqrt(v) + np.float32(1e-8))

    fused = cupy.ElementwiseKernel(
        "float32 g, float32 lr", "float32 p, float32 v",
        "v = 0.99f * v + 0.01f * g * g; p = p - lr * g / (sqrtf(v) + 1e-8f)", "rmsprop_of_cupy",
    )  # fmt: skip
    w = cupy.zeros(size, cupy.float32)
    steps = {"CuPy expression": expression, "CuPy ElementwiseKernel": lambda: fused(grad, np.float32(LR), param, w)}
    moved = bytes_per_element("rmsprop", np.float32)
    return [row(name, size, np.float32, moved, taken) for name, taken in gpu.milliseconds(steps, most=50).items()]


def of_optax(gpu, size, count=1):
    """Optax's Adam and RMSProp, update and apply_updates in one compiled function with donated parameters and states, beside
    ours.  XLA works on streams of its own, so all are timed by the clock of the host, over many steps."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes three quarters of the memory
    import jax
    import optax

    if jax.default_backend() != "gpu" and not gpu.is_double:
        return [{"what": "Optax", "elements": count * size, "tensors": count, "refused": "this JAX has no GPU"}]
    steps = {}
    for name, rule, ours in (("Adam", optax.adam(LR), fastrms.Adam), ("RMSProp", optax.rmsprop(LR), fastrms.RMSProp)):
        arrays = [_ours(gpu, count, size, seed) for seed in (0, 1000)]
        steps[f"fastrms {name}, host's clock"] = bound(ours, *arrays, lr=LR).step, gpu.synchronize
        steps[f"Optax {name}, host's clock"] = _optax_step(jax, rule, size, count)
    found = gpu.host_milliseconds(steps)
    moved = {name: bytes_per_element("adam" if "Adam" in name else "rmsprop", np.float32) for name in found}
    rows = [row(name, count * size, np.float32, moved[name], taken) for name, taken in found.items()]
    return [{**made, "tensors": count} for made in rows]


def _optax_step(jax, rule, size, count):
    """(step, wait) of a rule of Optax over arrays of random numbers."""
    keys = jax.random.split(jax.random.key(0), 2 * count)
    params, grads = ([jax.random.normal(key, size) for key in some] for some in (keys[:count], keys[count:]))
    own, update = [params, rule.init(params)], jitted(rule)

    def step():
        own[:] = update(*own, grads)

    return step, lambda: jax.block_until_ready(own)


def python_cost(gpu):
    """Microseconds that Python takes for a call, by library and way: what a training loop pays."""
    found = {}
    for name, arrays in {"fastrms": partial(_ours, gpu), "CuPy": _of_cupy, "torch": torch_tensors}.items():
        try:
            found |= {f"{way}, arrays of {name}": cost for way, cost in _costs(gpu, arrays).items()}
        except ImportError:
            continue
    for count in (1, 300) if has("torch") else ():
        for name in ("torch fused Adam", "torch foreach RMSprop"):
            found[f"{name}, {count} of 64"] = gpu.python_microseconds(torch_optimizer(name, count, 64).step, 5)
        found[f"fastrms.torch.Adam, {count} of 64"] = gpu.python_microseconds(_in_place_of_torch(count, 64).step, 5)
    return found


def _in_place_of_torch(count, size):
    import torch

    import fastrms.torch

    params = [torch.nn.Parameter(p) for p in torch_tensors(count, size)]
    for param, grad in zip(params, torch_tensors(count, size, 1), strict=True):
        param.grad = grad
    return fastrms.torch.Adam(params, lr=LR)


def _ours(gpu, count, size, seed=0):
    return [gpu.random(size, seed=seed + k) for k in range(count)]


def _of_cupy(count, size, seed=0):
    import cupy

    return [cupy.random.standard_normal(size, dtype=cupy.float32) for _ in range(count)]


def _costs(gpu, arrays):
    one, grads = fastrms.Adam(arrays(1, 64), lr=LR), arrays(1, 64, 1)
    bound = fastrms.Adam(arrays(1, 64), lr=LR)
    bound.bind(grads)
    many, most = fastrms.Adam(arrays(300, 64), lr=LR), arrays(300, 64, 1)
    other = arrays(300, 64, 2)
    pairs = [most, other]
    yielded = iter(pairs * 10_000)
    many_bound = fastrms.Adam(arrays(300, 64), lr=LR)
    many_bound.bind(most)
    return {
        "bound step of 1": gpu.python_microseconds(bound.step),
        "step(g) of 1": gpu.python_microseconds(lambda: one.step(grads)),
        "bound step of 300": gpu.python_microseconds(many_bound.step, 5),
        "step(g) of 300": gpu.python_microseconds(lambda: many.step(most), 5),
        "step(g) of 300 that move": gpu.python_microseconds(lambda: many.step(next(yielded)), 5),
    }
