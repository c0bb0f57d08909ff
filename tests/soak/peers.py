"""The same questions put to other libraries: `python -m tests.soak --peers` asks those that are installed.

Each optimizer answers in a process of its own, on two CPUs, and once more on one CPU.  All have their own defaults, but
short memories (0.9), so that averages die soon, and states of 32 bits.  An answer begins with holds or FAILS.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from functools import partial
from importlib import metadata, util

import numpy as np

from . import ROOT

LARGE, MIDDLE, SMALL = 1_000_003, 20_011, 130  # MIDDLE: too small for several threads
PATIENCE = 400  # seconds for an optimizer
NAMES = ("fastrms", "torch", "deepspeed", "bitsandbytes", "optax", "jax", "numpy")


# the optimizers


class OfTorch:
    """An optimizer with the interface of torch.optim, over one parameter."""

    def __init__(self, make, start):
        import torch

        self.param = torch.nn.Parameter(torch.from_numpy(start.copy()))
        self.optimizer = make([self.param])

    def step(self, grad):
        import torch

        self.param.grad = torch.from_numpy(grad)
        self.optimizer.step()

    def read(self):
        return self.param.detach().numpy()

    def states(self):
        kept = self.optimizer.state[self.param].values()
        return [x.numpy() for x in kept if getattr(x, "shape", None) == self.param.shape]

    def count(self, new=None):
        state = self.optimizer.state[self.param]
        if new is not None:
            state["step"] = state["step"] * 0 + new
        return int(state["step"]) if "step" in state else None


class OfOptax:
    def __init__(self, rule, start):
        from bench.peers import jitted

        self.update = jitted(rule)
        import jax

        self.jax, self.param = jax, jax.numpy.array(start)
        self.state = rule.init(self.param)

    def step(self, grad):
        made = self.update(self.param, self.state, self.jax.numpy.array(grad))
        self.param, self.state = self.jax.block_until_ready(made)

    def read(self):
        return np.asarray(self.param)

    def states(self):
        return [np.asarray(leaf) for leaf in self.jax.tree.leaves(self.state) if leaf.ndim]

    def count(self, new=None):
        counts = [leaf for leaf in self.jax.tree.leaves(self.state) if leaf.ndim == 0 and leaf.dtype.kind == "i"]
        if new is not None:
            count = partial(self.jax.numpy.array, new)
            self.state = self.jax.tree.map(lambda x: x if x.ndim else count(dtype=x.dtype), self.state)
        return int(counts[0]) if counts else None


class Ours:
    def __init__(self, make, start):
        self.param = start.copy()
        self.optimizer = make(self.param)

    def step(self, grad):
        self.optimizer.step(grad)

    def read(self):
        return self.param

    def states(self):
        return list(self.optimizer.state.values())

    def count(self, new=None):
        if new is not None:
            saved = self.optimizer.state_dict()
            saved["steps"] = saved["tensors"][0]["steps"] = new
            self.optimizer.load_state_dict(saved)
        return self.optimizer.steps


def of_torch(name, **options):
    import torch

    return partial(OfTorch, partial(getattr(torch.optim, name), lr=0.01, **options))


def of_deepspeed(name, **options):
    from bench import peers

    ops = peers.load("deepspeed").ops
    peers.find_ninja()
    module = {"DeepSpeedCPUAdam": "adam", "DeepSpeedCPUAdagrad": "adagrad"}[name]
    return partial(OfTorch, partial(getattr(getattr(ops, module), name), lr=0.01, **options))


def of_bitsandbytes(name, **options):
    from bench import peers

    return partial(OfTorch, partial(getattr(peers.load("bitsandbytes").optim, name), lr=0.01, **options))


def of_optax(name, **options):
    from bench import peers

    return partial(OfOptax, getattr(peers.load("optax"), name)(0.01, **options))


def of_fastrms(name, **options):
    import fastrms

    return partial(Ours, partial(getattr(fastrms, name), lr=0.01, **options))


SHORT = {"betas": (0.9, 0.9)}
CONTENDERS = {  # the names of tests/peers_bf16_tails.py where it has them
    "fastrms RMSProp": (of_fastrms, "RMSProp", {"rho": 0.9}),
    "fastrms RMSProp, centered": (of_fastrms, "RMSProp", {"rho": 0.9, "centered": True}),
    "fastrms AdaGrad": (of_fastrms, "AdaGrad", {}),
    "fastrms Adam": (of_fastrms, "Adam", {"beta1": 0.9, "beta2": 0.9}),
    "torch RMSprop": (of_torch, "RMSprop", {"alpha": 0.9}),
    "torch RMSprop, centered": (of_torch, "RMSprop", {"alpha": 0.9, "centered": True}),
    "torch SGD, momentum, fused": (of_torch, "SGD", {"momentum": 0.9, "fused": True}),
    "torch Adagrad, fused": (of_torch, "Adagrad", {"fused": True}),
    "torch Adam, fused": (of_torch, "Adam", {**SHORT, "fused": True}),
    "DeepSpeed CPUAdagrad": (of_deepspeed, "DeepSpeedCPUAdagrad", {}),
    "DeepSpeed CPUAdam": (of_deepspeed, "DeepSpeedCPUAdam", SHORT),
    "bitsandbytes RMSprop, 32-bit states": (of_bitsandbytes, "RMSprop", {"alpha": 0.9}),
    "bitsandbytes Adam, 32-bit states": (of_bitsandbytes, "Adam", SHORT),
    "Optax rmsprop": (of_optax, "rmsprop", {"decay": 0.9}),
    "Optax rmsprop, centered": (of_optax, "rmsprop", {"decay": 0.9, "centered": True}),
    "Optax adagrad": (of_optax, "adagrad", {}),
    "Optax adam": (of_optax, "adam", {"b1": 0.9, "b2": 0.9}),
}


# the questions; each makes optimizers and answers in words


def numbers(size, seed):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def stepped(make, start, grads):
    optimizer = make(start)
    for grad in grads:
        optimizer.step(grad.copy())
    return optimizer.read().copy()


def digest(make):
    """same bits from 1 and 2 CPUs"""
    return hashlib.sha256(stepped(make, numbers(LARGE, 0), [numbers(LARGE, seed) for seed in range(1, 6)])).hexdigest()


def tails(make):
    """float32: an element has the same bits at every place of tensors of length 1 to 130"""
    start, grads = numbers(SMALL, 0), [numbers(SMALL, seed) for seed in range(1, 9)]
    alone = np.concatenate([stepped(make, start[k : k + 1], [grad[k : k + 1] for grad in grads]) for k in range(SMALL)])
    wrong = {n: int((stepped(make, start[:n], [g[:n] for g in grads]) != alone[:n]).sum()) for n in range(1, SMALL + 1)}
    first = next((n for n, count in wrong.items() if count), None)
    return "holds" if first is None else f"FAILS from length {first} on: up to {max(wrong.values())} elements differ"


def dying(make):
    """gradients of zero do not slow it down"""
    optimizer, grad, times = make(numbers(MIDDLE, 0)), np.zeros(MIDDLE, np.float32), []
    optimizer.step(np.full(MIDDLE, 1e-6, np.float32))
    for _ in range(1500):
        start = time.perf_counter()
        optimizer.step(grad)
        times.append(time.perf_counter() - start)
    ratio, tiny = min(times[-200:]) / min(times[:200]), np.finfo(np.float32).tiny
    left = sum(int(((x != 0) & (np.abs(x) < tiny)).sum()) for x in optimizer.states())
    said = f"{ratio:.1f} times the time after 1,500 steps; {left:,} subnormal numbers in its states"
    return f"holds: {said}" if ratio < 1.5 else f"FAILS: {said}"


def counting(make):
    """counts beyond 2^24 and 2^31"""
    optimizer, found = make(numbers(3, 0)), []
    optimizer.step(numbers(3, 1))
    if optimizer.count() is None:
        return "it has no count"
    for power in (24, 31):
        optimizer.count(2**power - 2)
        for _ in range(4):
            optimizer.step(numbers(3, 1))
        if optimizer.count() != 2**power + 2:
            found.append(f"four steps after 2^{power} - 2 it says 2^{power}{optimizer.count() - 2**power:+d}")
    return f"FAILS: {'; '.join(found)}" if found else "holds"


def untouched(make):
    """gradients are left as they were"""
    for size in (7, 1003):
        optimizer, grad = make(numbers(size, 0)), numbers(size, 1)
        kept = grad.copy()
        optimizer.step(grad)
        if not np.array_equal(grad, kept):
            return f"FAILS: {int((grad != kept).sum())} of {size} elements are overwritten"
    return "holds"


def one_nan(make):
    """a NaN in a gradient leaves all other elements alone"""
    grad = numbers(1003, 1)
    bad = grad.copy()
    bad[500] = np.nan
    want, got = (stepped(make, numbers(1003, 0), [g, grad]) for g in (grad, bad))
    others = np.arange(1003) != 500
    return "holds" if np.array_equal(want[others], got[others]) else "FAILS: others have changed"


def steady(make):
    """constant gradients leave parameters finite"""
    optimizer, grad = make(np.zeros(64, np.float32)), np.linspace(0.1, 3, 64).astype(np.float32)
    for step in range(4000):
        optimizer.step(grad)
        if not np.isfinite(optimizer.read()).all():
            return f"FAILS: {int((~np.isfinite(optimizer.read())).sum())} of 64 are not finite after {step + 1} steps"
    return "holds"


def forking(make):
    """steps in a forked child after steps in the parent"""
    optimizer, grad = make(numbers(LARGE, 0)), numbers(LARGE, 1)
    optimizer.step(grad.copy())
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        optimizer.step(grad.copy())
        os._exit(0 if np.isfinite(optimizer.read()).all() else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return "FAILS: the child hangs"
    return "holds" if status == 0 else f"FAILS: the child ends with {status}"


ASKED = (digest, tails, dying, counting, untouched, one_nan, steady, forking)  # the last one may not come back
QUESTIONS = {question.__name__: question for question in ASKED}
HALF = "bf16: the same, by `tests/peers_bf16_tails.py`"


def answer(name, questions):
    """What the process of an optimizer does: one line of JSON for each answer."""
    of, kind, options = CONTENDERS[name]
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    make = of(kind, **options)
    for question in questions:
        try:
            said = QUESTIONS[question](make)
        except Exception as error:
            said = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        print("\n" + json.dumps([question, said]), flush=True)


# the table


def asked(python, name, questions, cpus):
    """question -> answer, by a process on so many CPUs."""
    command = [python, "-m", "tests.soak.peers", name, *questions]
    allowed = sorted(os.sched_getaffinity(0))[:cpus]
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: os.sched_setaffinity(0, allowed))  # fmt: skip
        said, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        said, errors = process.communicate()[0], f"no answer within {PATIENCE} s"
    found = dict(json.loads(line) for line in said.splitlines() if line.startswith('["'))
    last = errors.strip().splitlines()[-1][:150] if errors.strip() else "no answer"
    return {question: found.get(question, f"not run: {last}") for question in questions}


def same_bits(alone, together):
    """What two digests say."""
    if "not run" in alone + together:
        return next(text for text in (alone, together) if "not run" in text)
    return "holds" if alone == together else "FAILS: other bits"


def halves(python):
    """name -> answer for bf16, from tests/peers_bf16_tails.py."""
    run = subprocess.run([python, "tests/peers_bf16_tails.py"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = [line.split(None, 2) for line in run.stdout.splitlines() if "torch.bfloat16" in line]
    ours = {f"fastrms {rule}, states None, master None": f"fastrms {rule}" for rule in ("RMSProp", "AdaGrad", "Adam")}
    found = {}
    for verdict, _, rest in lines:
        name, _, more = rest.partition(": ")
        found[ours.get(name, name)] = verdict + (f" {more}" if more else "")
    return found


def versions():
    return {name: metadata.version(name) for name in NAMES if util.find_spec(name)}


def words():
    """The questions, by the names of the answers."""
    return {key: question.__doc__ for key, question in QUESTIONS.items()} | {"half": HALF}


def table(python=sys.executable):
    """Everything of this comparison that the page needs."""
    of = json.loads(subprocess.run([python, "-m", "tests.soak.peers"], cwd=ROOT, capture_output=True, text=True).stdout)
    rows, half = {}, halves(python)
    for name in CONTENDERS:
        if name.split()[0].lower() not in of:
            continue
        rows[name] = asked(python, name, list(QUESTIONS), 2)
        rows[name]["digest"] = same_bits(asked(python, name, ["digest"], 1)["digest"], rows[name]["digest"])
        rows[name]["half"] = half.get(name, "not asked")
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    said = {"date": date.today().isoformat(), "command": "python -m tests.soak --peers", "versions": of}
    return said | {"questions": words(), "rows": rows}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(sys.argv[1], sys.argv[2:])
    else:
        print(json.dumps(versions()))
