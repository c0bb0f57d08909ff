"""The figures of what a step does beside the update: clipping by norm, looking for nonfinite gradients, zeroing, streaming.

Each may add the time of one pass over the gradients: that which NumPy takes for such a pass alone, on the same buffers.
"""

import numpy as np

import fastrms

from .check import WrongContender
from .figures import Figure, at_least
from .problem import IN_WORDS, WELL_PLACED, allocate
from .report import size_name
from .timing import interleaved

SECONDS = 6.0  # of timing for each cell
SIZES, SMALL = (2**20, 2**25), 64
TENSOR, BATCH, SLACK = 2**20, 8, 1.25  # SLACK: by how much a pass may exceed its ceiling; the others: the streamed step
CLIP, SKIP, BOTH, ZERO = "clip_norm", 'nonfinite="skip"', "both of these", "zero_grad"
PLACED = f"{IN_WORDS[WELL_PLACED]}; the tensors of the streamed step lie where NumPy allocates them"


def prepare():
    """Return the number of threads, which is left at all cores."""
    return {"threads": fastrms.get_num_threads()}


def passes():
    """What each option adds to a step, against a pass of a trivial loop over the gradient."""
    for make in (fastrms.RMSProp, fastrms.Adam):
        for size in SIZES:
            timings = interleaved(calls_of(make, size), SECONDS)
            times = {name: timing.minimum / size for name, timing in timings.items()}
            for name, kind in ((CLIP, "read"), (SKIP, "read"), (BOTH, "read"), (ZERO, "write")):
                what = f"{make.__name__}, {size_name(size)}: {name}"
                yield extra(what, times[name] - times["plain"], times[kind], kind)


def extra(what, added, ceiling, kind):
    """One row: the nanoseconds per element that were added, and those of the pass that they may cost."""
    measured = f"{added:+.2f} ns per element, {kind} alone {ceiling:.2f}"
    return Figure(what, f"<= {SLACK} x one {kind}", measured, added <= SLACK * ceiling)


def calls_of(make, size):
    """Name -> function: steps with each option over the same buffers, and passes that only read or write the gradient."""
    param, grad = allocate(size, [np.dtype(np.float32)] * 2, WELL_PLACED)
    param.fill(1)
    grad.fill(1e-3)

    def bound(**options):
        optimizer = make(param, backend="c", **options)
        optimizer.bind(grad)
        return optimizer

    plain, zeroing, looking = bound(), bound(zero_grad=True), bound(nonfinite="skip")
    measured = looking.step(clip_norm=1e9)
    if measured.nonfinite != 0 or not np.isclose(measured.grad_norm, 1e-3 * size**0.5):
        raise WrongContender(f"fastrms.{make.__name__} found {measured} in gradients of 1e-3")
    return {
        "plain": plain.step,
        CLIP: lambda: plain.step(clip_norm=1e9),
        SKIP: looking.step,
        BOTH: lambda: looking.step(clip_norm=1e9),
        ZERO: zeroing.step,
        "read": lambda: grad.max(),
        "write": lambda: grad.fill(1e-3),
    }


def through_python():
    """The time of a bound step of a small tensor that needs Python, to look for nonfinite gradients or for a schedule."""
    param, grad = np.ones(SMALL, np.float32), np.full(SMALL, 1e-3, np.float32)
    kinds = {
        "plain": {},
        SKIP: {"nonfinite": "skip"},
        "lr as a function, rate as before": {"lr": lambda step: 1e-3},
        "lr as a function, another rate": {"lr": lambda step: 1 / (1000 + step)},
    }
    calls = {}
    for name, options in kinds.items():
        optimizer = fastrms.RMSProp(param, backend="c", **options)
        optimizer.bind(grad)
        calls[name] = optimizer.step
    times = {name: timing.minimum / 1000 for name, timing in interleaved(calls, SECONDS).items()}
    for name, most in zip(list(kinds)[1:], (5, 15, 40), strict=True):
        added = times[name] - times["plain"]
        yield Figure(f"RMSProp, {SMALL}, bound: {name}", f"<= {most} us more", f"{added:+.1f} us", added <= most)


def streamed():
    """Gradients by matrix products, tensor by tensor, with one step after them all or streamed through one scratch array."""
    for make in (fastrms.RMSProp, fastrms.Adam):
        layers = Layers(SIZES[-1] // TENSOR, int(TENSOR**0.5))
        wholes, parts = layers.params(), layers.params()
        calls = {"whole": layers.whole(make, wholes), "streamed": layers.streamed(make, parts)}
        for call in calls.values():
            call()
        if not all(np.array_equal(a, b) for a, b in zip(wholes, parts, strict=True)):
            raise WrongContender(f"fastrms.{make.__name__}: the streamed step differs from the whole one")
        timings = interleaved(calls, SECONDS)
        gain = timings["whole"].minimum / timings["streamed"].minimum
        what = f"{make.__name__}, {size_name(SIZES[-1])} in tensors of {size_name(TENSOR)}"
        yield at_least(f"{what}: gradients and step, streamed over whole", gain, 1.2)


class Layers:
    """Square weight matrices, and the activities and deltas of a batch, from which a backward pass makes their gradients."""

    def __init__(self, count, side):
        random = np.random.default_rng(0)
        self.count, self.side = count, side
        self.activities, self.deltas = (random.standard_normal((count, BATCH, side), dtype=np.float32) for _ in range(2))

    def params(self):
        return [np.ones((self.side, self.side), np.float32) for _ in range(self.count)]

    def gradient(self, k, out):
        return np.matmul(self.activities[k].T, self.deltas[k], out=out)

    def whole(self, make, params):
        optimizer, grads = make(params, backend="c"), self.params()
        optimizer.bind(grads)

        def step():
            for k, grad in enumerate(grads):
                self.gradient(k, grad)
            optimizer.step()

        return step

    def streamed(self, make, params):
        optimizer, scratch = make(params, backend="c"), np.empty_like(params[0])

        def step():
            with optimizer.streaming() as s:
                for k in range(self.count):
                    s.step(k, self.gradient(k, scratch))

        return step


MEASUREMENTS = (passes, through_python, streamed)
