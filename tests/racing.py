"""Processes that update one buffer at once.  `python tests/racing.py spawn` (or fork), which test_shared_memory.py runs.

Exact cases show that no word is torn and that each was written by one update.  With rho or beta 0 the new averages depend on
the gradient alone, so there is a small set of words that updates may write into a state, whatever they read there.  A
parameter moves by whole multiples of a number M, so its word, put together from halves of two others, would be none.
Wild cases have the hyper-parameters of every day and gradients of all magnitudes: no word is NaN, no mean or sum of squares
negative.
"""

import multiprocessing
import sys
import time
from itertools import product

import numpy as np
from test_oracle import RULES

import fastrms
from fastrms import backends

WORKERS, SIZE, LARGE, ZONE, GUARD = 3, 1003, 300_001, 5, 77.25  # SIZE and ZONE are odd, so that vectors cross cache lines
SECONDS, PATIENCE = 0.02, 100
ROOT = {"float32": 2.0**50, "float64": 2.0**100}  # divides every update: beside its square no gradient's square counts
M = {"float32": 251.0, "float64": 2.0**26 + 1}


class Case:
    """A rule on a backend, with exact or wild numbers."""

    def __init__(self, rule, backend, dtype, exact, size=SIZE, threads=1):
        self.rule, self.backend, self.dtype, self.exact, self.size, self.threads = rule, backend, dtype, exact, size, threads
        name, hyper = RULES[rule]
        self.make = getattr(fastrms, name)
        self.hyper = {**hyper, **(self.forgetting(name) if exact else {}), "backend": backend}
        if exact and "momentum" in hyper:
            self.hyper["momentum"] = 1e-30

    def forgetting(self, name):
        """Hyper-parameters with which an update is the gradient, and forgets the averages before it."""
        root, m = ROOT[self.dtype.name], M[self.dtype.name]
        return {
            "RMSProp": {"lr": root, "rho": 0.0, "eps": 0.0, "eps_root": root**2},
            "AdaGrad": {"lr": root, "eps": 0.0, "initial_value": root**2},
            "Adam": {"lr": root, "beta1": 0.0, "beta2": 0.0, "bias_correction": False, "eps": 0.0, "eps_root": root**2},
            "RProp": {"lr": m, "eta_plus": 2.0, "step_min": m, "step_max": 4 * m},
        }[name]

    def __str__(self):
        return f"{self.rule} {self.backend} {self.dtype.name} {'exact' if self.exact else 'wild'} of {self.size}"

    def gradients(self):
        """The values of gradients, of both signs."""
        if self.exact:
            return np.array([1, -1, 3, -3], self.dtype) * self.dtype.type(M[self.dtype.name])
        limits = np.finfo(self.dtype)
        root = np.sqrt(limits.max)
        sizes = [0.0, limits.smallest_subnormal, limits.tiny, 1e-10, 1.0, 1e10, root / 16]
        if self.make is not fastrms.Adam:  # it may divide a mean of one update by the root of an older square, 0 and eps
            sizes += [root * 2, limits.max / 16]
        return np.array([sign * size for size in sizes for sign in (1, -1)], self.dtype)

    def optimizer(self, param, state=None):
        return self.make(param, state=state, **self.hyper)

    def first_words(self):
        """The words that everything starts with: the parameter, then the states by name."""
        param = np.zeros(1, self.dtype)
        return param, {name: x.copy() for name, x in self.optimizer(param).state.items()}

    def laid(self, block):
        """Views into a block of bytes, with guard zones: the parameter, then the states by name."""
        whole = np.frombuffer(block, self.dtype)
        starts = range(ZONE, whole.size, self.size + ZONE)
        views = [whole[start : start + self.size] for start, _ in zip(starts, range(4), strict=False)]
        return whole, views[0], dict(zip(self.first_words()[1], views[1:], strict=False))


def cases():
    dtypes = [np.dtype(np.float32), np.dtype(np.float64)]
    host = [name for name in fastrms.available_backends() if name in backends.HOST]
    for rule, backend, dtype in product(RULES, host, dtypes):
        for exact in (True, False):
            if backend != "numba" or exact == (dtype == np.float64):  # to load its kernels takes long
                yield Case(rule, backend, dtype, exact)
    if "c" in host:
        yield Case("adam", "c", dtypes[0], exact=False, size=LARGE, threads=2)


def distinct(*arrays):
    """The distinct words of arrays, by their bits."""
    words = np.concatenate(arrays)
    return np.unique(words.view(f"u{words.itemsize}")).view(words.dtype)


def reachable(case):
    """For each state the words that it may have after any updates, each from any mixture of such words."""
    _, state = case.first_words()
    words, grads = list(state.values()), case.gradients()
    while True:
        *read, grad = (x.reshape(-1) for x in np.meshgrid(*words, grads, indexing="ij"))
        case.optimizer(np.zeros_like(grad), dict(zip(state, read, strict=True))).step(grad)
        new = [distinct(old, written) for old, written in zip(words, read, strict=True)]
        if list(map(len, new)) == list(map(len, words)):
            return dict(zip(state, words, strict=True))
        assert max(map(len, new)) < 100, f"{case}: updates do not forget"
        words = new


def judge(case, allowed, param, state):
    """Assert that updates may have written these words.  Other processes may be writing them now."""
    for name, x in {"param": param, **state}.items():
        bits = x.view(f"u{x.itemsize}")
        seen = (bits | bits.dtype.type(0)).view(x.dtype)  # word by word: memcpy, which x.copy() is, may copy single bytes
        if not case.exact:
            assert not np.isnan(seen).any(), f"{case}: {name} is NaN"
            assert name != "param" or np.isfinite(seen).all(), f"{case}: {name} is infinite"
            assert name not in case.make.not_negative or (seen >= 0).all(), f"{case}: {name} is negative"
            continue
        if name == "param":
            strange = seen[np.fmod(seen, M[case.dtype.name]) != 0]
        else:
            strange = seen[~np.isin(seen.view(f"u{x.itemsize}"), allowed[name].view(f"u{x.itemsize}"))]
        assert not strange.size, f"{case}: {name} has {strange}, which no update writes"


def work(block, barrier, number):
    """What a worker does: in each case it makes steps until its time is over."""
    for case in cases():
        fastrms.set_num_threads(case.threads)
        _, param, state = case.laid(block)
        rng = np.random.default_rng(number)
        grads = [rng.choice(case.gradients(), case.size) for _ in range(4)]
        grads += [-grad for grad in grads]  # so that exact parameters stay small enough to be exact
        barrier.wait(PATIENCE)
        optimizer = case.optimizer(param, state)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for grad in grads:
                optimizer.step(grad)
        del optimizer, param, state
        barrier.wait(PATIENCE)


def watch(case, block, barrier, allowed):
    """What the parent does in a case; the number of times that it has looked."""
    whole, param, state = case.laid(block)
    whole.fill(GUARD)
    first, states = case.first_words()
    param[:] = first
    for name, x in state.items():
        x[:] = states[name]
    barrier.wait(PATIENCE)
    end, looks = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        judge(case, allowed, param, state)
        looks += 1
    barrier.wait(PATIENCE)
    judge(case, allowed, param, state)
    changed = [name for name, x in state.items() if (x != states[name]).any()]
    assert changed or (case.exact and case.rule == "adagrad"), f"{case}: nothing was updated"
    for x in (param, *state.values()):
        x.fill(GUARD)
    assert (whole == GUARD).all(), f"{case}: something outside was written"
    return looks


def main(method):
    context = multiprocessing.get_context(method)
    every = list(cases())
    allowed = [reachable(case) if case.exact else None for case in every]  # Numba's kernels are on disk after it
    block = context.RawArray("d", 4 * (LARGE + 2 * ZONE))
    barrier = context.Barrier(WORKERS + 1)
    workers = [context.Process(target=work, args=(block, barrier, number), daemon=True) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    looks = sum(watch(case, block, barrier, words) for case, words in zip(every, allowed, strict=True))
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0] * WORKERS
    print(f"fine: {len(every)} cases, {looks} looks")


if __name__ == "__main__":
    main(sys.argv[1])
