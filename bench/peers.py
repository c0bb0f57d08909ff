"""The peers: PyTorch four times, optax, DeepSpeed, prime-rl, bitsandbytes and Thinc, each one function of a Problem.

Each runs at the best setting that its documentation shows.  Importing this module imports none of the libraries.
"""

import contextlib
import importlib
import logging
import math
import os
import platform
import sys
import warnings
from functools import partial
from importlib import metadata
from itertools import count
from pathlib import Path

import numpy as np

from .contenders import OPTIMIZERS, Contender
from .problem import AS_ALLOCATED, CannotDo

INSTALL = "pip install -e '.[peers]'"
BY_HAND = {"cpu_adam": "docs/performance.md says how it is found"}  # what no registry has
DISTRIBUTIONS = ("torch", "jax", "optax", "deepspeed", "bitsandbytes", "thinc")
TORCH = {  # class, settings
    "rmsprop": ("RMSprop", {"lr": 0.01, "alpha": 0.99, "eps": 1e-8}),
    "adagrad": ("Adagrad", {"lr": 0.01, "eps": 1e-10}),
    "adam": ("Adam", {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8}),
    "rprop": ("Rprop", {"lr": 0.01, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)}),
}
VARIANTS = {  # of torch.optim, and the rules that they have
    "torch for-loop": ({"foreach": False}, tuple(TORCH)),
    "torch foreach": ({"foreach": True}, tuple(TORCH)),
    "torch fused": ({"fused": True}, ("adagrad", "adam")),
}
TORCH_STATES = {
    "rmsprop": ["square_avg"],
    "adagrad": ["sum"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "rprop": ["prev", "step_size"],
}
OPTAX = {
    "rmsprop": {"learning_rate": 0.01, "decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False},
    # Its eps is inside the root, where the square of 1e-10 comes nearest to 1e-10 outside.
    "adagrad": {"learning_rate": 0.01, "initial_accumulator_value": 0.0, "eps": 1e-20},
    "adam": {"learning_rate": 0.001, "b1": 0.9, "b2": 0.999, "eps": 1e-8},
}
DEEPSPEED_STATES = {"adagrad": ["exp_avg_sq"], "adam": ["exp_avg", "exp_avg_sq"]}
VECTOR = 16  # elements; DeepSpeed updates the rest of a buffer in another loop
# Tolerances in multiples of lr.  A state of one byte that shares a scale with a larger one is rounded up so far that its
# second step vanishes.
EIGHT_BIT = {"rmsprop": 7.1, "adagrad": 0.71, "adam": 1.0}
ROUGH = 0.01
NOTES = {
    "optax": "XLA takes no buffers from outside: optax runs on those that XLA allocates, in every placement",
    "bitsandbytes 8-bit": "its states are one byte per element; on a CPU it is a sequence of PyTorch operations",
    "Thinc": "its kernel consumes the gradient, so every step begins with a copy of it; it has one thread",
}


def load(library):
    """Import a library, set up to run on the CPU and to log nothing."""
    os.environ.update(JAX_PLATFORMS="cpu", DS_ACCELERATOR="cpu")
    with warnings.catch_warnings(), silence():
        warnings.simplefilter("ignore")
        if library == "optax":
            start_xla()
        return importlib.import_module(library)


@contextlib.contextmanager
def silence():
    """Keep libraries from logging at import that there is no GPU."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def start_xla():
    """Start XLA with the wanted number of threads: it makes one for each processor that the process may use at that time."""
    processors = os.sched_getaffinity(0)
    threads = int(os.environ.get("OMP_NUM_THREADS", len(processors)))
    os.sched_setaffinity(0, sorted(processors)[:threads])
    try:
        import jax

        # In float64, for 1 - 0.999**step in float32 is off by 1e-5; arrays keep the dtype of the problem.
        jax.config.update("jax_enable_x64", True)
        jax.devices()
    finally:
        os.sched_setaffinity(0, processors)


def use_threads(number):
    """Let the peers run on so many threads; to be called before the first is loaded, since XLA and OpenMP read it once."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(number)


def available(names=None):
    """(name -> peer, name -> why it cannot take part): those of `names`, or all, by whether the library can be imported."""
    found, reasons = {}, {}
    for name, peer in PEERS.items():
        if names is None or name in names:
            try:
                load(LIBRARIES[name])
                found[name] = peer
            except ModuleNotFoundError as error:
                install = BY_HAND.get(error.name, INSTALL)
                reasons[name] = f"not installed: {install}" if error.name == LIBRARIES[name] else f"lacks {error.name}"
            except Exception as error:  # whatever a broken installation raises
                reasons[name] = f"fails to import: {error}"
    return found, reasons


def versions():
    """The versions of the installed libraries, by the names of their distributions."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def require(problem, library, rules, dtypes=("float32",)):
    if problem.rule not in rules:
        raise CannotDo(f"{library} has no {OPTIMIZERS[problem.rule].__name__}")
    if problem.dtype.name not in dtypes:
        raise CannotDo(f"{library} has no {problem.dtype.name}")


def torch_for_loop(problem):
    return of_torch("torch for-loop", problem, foreach=False)


def torch_foreach(problem):
    return of_torch("torch foreach", problem, foreach=True)


def torch_fused(problem):
    """PyTorch's fused kernels for the CPU, which it does not have for every rule."""
    require(problem, "torch fused", ("adagrad", "adam"), ("float32", "float64"))
    return of_torch("torch fused", problem, fused=True)


def torch_compile(problem):
    """A compiled function that calls optimizer.step, as in PyTorch's recipe; with the tensor lr that schedulers need."""
    torch = load("torch")
    torch._logging.set_logs(dynamo=logging.ERROR)  # it warns that PyTorch's own profiling is left out
    torch.compiler.reset()  # beyond eight sizes the code would run uncompiled
    made = of_torch("torch.compile", problem, lr=torch.from_numpy(np.array(TORCH[problem.rule][1]["lr"], problem.dtype)))
    # Compiled code makes 1 - 0.999**step in float32, off by 1e-5; with a counter in float64 it would take twice the time.
    tolerance = ROUGH if problem.rule == "adam" else None
    return made._replace(step=torch.compile(lambda: made.step(), dynamic=False), tolerance=tolerance)


def of_torch(name, problem, **setting):
    """A contender from torch.optim."""
    torch = load("torch")
    rule, settings = TORCH[problem.rule]
    make = partial(getattr(torch.optim, rule), **{**settings, **setting})
    return optimizing(name, problem, make, torch.tensor(0.0), TORCH_STATES[problem.rule])


def optimizing(name, problem, make, step, state_names):
    """A contender made from a torch.optim.Optimizer; its states of these names are moved where the problem wants them."""
    torch = load("torch")
    grad, values, *states = tensors(problem, None if state_names else 0)
    param = torch.nn.Parameter(values)
    param.grad = grad
    optimizer = make([param])
    if state_names:
        optimizer.state[param] = {"step": step, **dict(zip(state_names, states, strict=True))}
    read = [param.detach().numpy(), *(state.numpy() for state in states)]
    return Contender(name, optimizer.step, lambda: read, changed=partial(grad.copy_, torch.from_numpy(problem.grad)))


def tensors(problem, states):
    """The problem's buffers as tensors, in memory of PyTorch's own where the problem has every library allocate its own."""
    torch = load("torch")
    shared = [torch.from_numpy(array) for array in problem.new_buffers(states)]
    return [tensor.clone() for tensor in shared] if problem.placement == AS_ALLOCATED else shared


def optax(problem):
    """optax on XLA's own buffers, which are updated in place because they are donated."""
    if problem.rule == "rprop":
        raise CannotDo("optax's RProp moves one step late (optax#1725)")
    rule = getattr(load("optax"), problem.rule)(**OPTAX[problem.rule])
    import jax

    update, own = jitted(rule), [param := jax.numpy.array(problem.start), rule.init(param), jax.numpy.array(problem.grad)]

    def step():
        own[:2] = jax.block_until_ready(update(*own))

    def changed():
        own[2] = jax.numpy.array(problem.grad)

    tolerance = ROUGH if problem.rule == "adagrad" else None  # an eps inside the root differs where the gradient is tiny
    return Contender("optax", step, lambda: arrays_in(own[:2]), changed=changed, tolerance=tolerance)


def jitted(rule):
    """update and apply_updates as one jitted function, to which parameter and states are donated."""
    import jax
    import optax

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(param, state, grad):
        change, state = rule.update(grad, state, param)
        return optax.apply_updates(param, change), state

    return update


def arrays_in(tree):
    """The parameter and the states of optax, without its counter."""
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim]


def deepspeed(problem):
    """DeepSpeed, which compiles its kernels at first use with g++ and ninja, and keeps them in ~/.cache/torch_extensions."""
    require(problem, "DeepSpeed on a CPU", DEEPSPEED_STATES)
    load("deepspeed")
    find_ninja()
    rule, settings = TORCH[problem.rule]
    optimizers = importlib.import_module(f"deepspeed.ops.{problem.rule}")
    make = partial(getattr(optimizers, f"DeepSpeedCPU{rule}"), **settings)
    try:
        if problem.rule == "adagrad":
            return restoring(problem, optimizing("DeepSpeed", problem, make, 0, DEEPSPEED_STATES["adagrad"]))
        made = optimizing("DeepSpeed", problem, partial(make, adamw_mode=False), 0, DEEPSPEED_STATES["adam"])
    except RuntimeError as error:
        reason = str(error.__cause__).split("\n")[0]
        raise CannotDo(f"DeepSpeed's kernels cannot be built: {reason}") from error
    return made._replace(tolerance=ROUGH)  # 1 - 0.999**step is made in float32, and off by 1e-5


def find_ninja():
    """Put the folder in which pip installs ninja on the path, where it is not: the virtual environment may be inactive."""
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ["PATH"]:
        os.environ["PATH"] = f"{beside}:{os.environ['PATH']}"


def restoring(problem, made):
    """Restore the gradient, which DeepSpeed's AdaGrad overwrites where it does not use vectors."""
    if platform.machine() == "x86_64" and problem.size % VECTOR == 0:
        return made

    def step():
        made.step()
        made.changed()

    return made._replace(step=step)


def prime_rl(problem):
    """The kernel of prime-rl's AdamW on the CPU, without decay; the module compiles it at first use."""
    require(problem, "prime-rl", ("adam",))
    torch, library = load("torch"), load("cpu_adam")
    find_ninja()
    settings = {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "gradient_scale": 1.0}
    try:
        library.adamw_step([], [], [], [], [], **settings)
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).split("\n")[0]
        raise CannotDo(f"prime-rl's kernel cannot be built: {first}") from error
    grad, *buffers = tensors(problem, None)
    param, mean, square = buffers
    step = partial(library.adamw_step, [param], [grad], [mean], [square], [torch.zeros(())], **settings)
    read = [buffer.numpy() for buffer in buffers]
    changed = partial(grad.copy_, torch.from_numpy(problem.grad))
    return Contender("prime-rl", step, lambda: read, changed=changed, tolerance=ROUGH)  # it makes 1 - 0.999 in float32


def bitsandbytes(problem):
    """bitsandbytes with states of one byte at all sizes, though its default is 32 bits below 4096 elements."""
    require(problem, "bitsandbytes 8-bit", EIGHT_BIT)
    library = load("bitsandbytes")
    rule, settings = TORCH[problem.rule]
    make = partial(getattr(library.optim, f"{rule}8bit"), min_8bit_size=0, **settings)
    return optimizing("bitsandbytes 8-bit", problem, make, 0, [])._replace(tolerance=EIGHT_BIT[problem.rule], compact=True)


def thinc(problem):
    """The kernel of Thinc's Adam, without its Optimizer.  Its betas are float32, and it adds eps before the correction."""
    require(problem, "Thinc", ("adam",))
    load("thinc")
    kernel = importlib.import_module("thinc.backends").NumpyOps().adam
    grad, param, mean, square = problem.new_buffers()
    beta1, beta2, steps = float(np.float32(0.9)), float(np.float32(0.999)), count(1)

    def step():
        np.copyto(grad, problem.grad)
        number = next(steps)
        root = math.sqrt(1 - beta2**number)
        kernel(param, grad, mean, square, beta1, beta2, 1e-8 * root, 0.001 * root / (1 - beta1**number))

    return Contender("Thinc", step, lambda: [param, mean])  # the last state holds 1 - 0.999 in float32, off by 1e-5


PEERS = {
    "torch for-loop": torch_for_loop,
    "torch foreach": torch_foreach,
    "torch fused": torch_fused,
    "torch.compile": torch_compile,
    "optax": optax,
    "DeepSpeed": deepspeed,
    "prime-rl": prime_rl,
    "bitsandbytes 8-bit": bitsandbytes,
    "Thinc": thinc,
}
LIBRARIES = dict.fromkeys(PEERS, "torch") | {
    "optax": "optax",
    "DeepSpeed": "deepspeed",
    "prime-rl": "cpu_adam",
    "bitsandbytes 8-bit": "bitsandbytes",
    "Thinc": "thinc",
}
