"""The figures of the storage formats: updates with fewer bytes against those in float32, and against 8-bit optimizers and
prime-rl's kernel.

All are bound steps of fastrms in rounds with each other.  A ratio of bytes is that of the bytes which an update has to move:
the gradient is read, everything else is read and written.
"""

from functools import partial

import numpy as np

import fastrms

from . import peers
from .contenders import OPTIMIZERS, STREAMS, streams, streams_ways
from .figures import Figure, at_least, at_most, times_as_fast
from .machine import in_words
from .problem import IN_WORDS, WELL_PLACED, CannotDo, Problem, allocate, bytes_moved
from .report import size_name
from .timing import interleaved

SECONDS = 4.0  # of timing for each row of contenders
LARGE, MIDDLE = 2**25, 2**20
SIZES = LARGE, MIDDLE, 2**16
IN_L2 = 2**15
PLACED = IN_WORDS[WELL_PLACED]
FLOAT32, BF16, NEAREST, Q8, SPLIT = "float32", "bf16 states", "bf16 states, nearest", "q8 states", "split16 and bf16 states"
SETTINGS = {  # name -> (whether gradients are bf16, whether the parameter is, options)
    FLOAT32: (False, False, {}),
    BF16: (True, False, {"state_format": "bf16"}),
    NEAREST: (True, False, {"state_format": "bf16", "rounding": "nearest"}),
    Q8: (True, False, {"state_format": "q8"}),
    SPLIT: (True, True, {"state_format": "bf16", "master": "split16"}),
}


def prepare():
    """Return the number of threads, which is left at all cores."""
    return {"threads": fastrms.get_num_threads(), "peers": peers.versions()}


def halves(floats):
    """These numbers in bf16, rounded towards 0."""
    return fastrms.Stored((floats.view(np.uint32) >> 16).astype(np.uint16), "bf16")


def bound(rule, size, name):
    """An optimizer with one of the SETTINGS, whose step() is bound."""
    grad_is_half, param_is_half, options = SETTINGS[name]
    problem = Problem(rule, size, "float32")
    grad, param = (halves(x) if half else x for x, half in ((problem.grad, grad_is_half), (problem.start, param_is_half)))
    if not param_is_half:
        (param,) = allocate(size, [np.dtype(np.float32)], WELL_PLACED)
        param[:] = problem.start
    optimizer = OPTIMIZERS[rule](param, backend="c", **options)
    optimizer.bind(grad)
    return optimizer


def moved(rule, name):
    """The bytes per element that a step with one of the SETTINGS moves."""
    return bytes_moved(bound(rule, 256, name))


def fewer_bytes(rule, name):
    """How many times the bytes of a step with one of the SETTINGS go into those of a step in float32."""
    return moved(rule, FLOAT32) / moved(rule, name)


def nanoseconds(rule, size, names, others=()):
    """name -> nanoseconds per element of its shortest step.  others: name -> function, in rounds with them."""
    timings = interleaved({name: bound(rule, size, name).step for name in names} | dict(others), SECONDS)
    return {name: timing.minimum / size for name, timing in timings.items()}


def beside_streams(rule, size):
    """The same for all SETTINGS and, as STREAMS, for the fastest loop that does nothing but move the bytes of float32."""
    problem, threads = Problem(rule, size, "float32"), fastrms.get_num_threads()
    buffers = problem.new_buffers()
    ways = {way: streams(problem, way, settings, buffers).step for way, settings in streams_ways(size, threads)}
    times = nanoseconds(rule, size, SETTINGS, ways)
    return times | {STREAMS: min(times[way] for way in ways)}


def ceiling(rule, name, times):
    """The nanoseconds per element in which STREAMS would move the bytes of a step."""
    return times[STREAMS] / fewer_bytes(rule, name)


def row(rule, size, name, times, target):
    ratio = fewer_bytes(rule, name)
    over = times[FLOAT32] / times[name]
    measured = f"{over:.2f}x: {times[name]:.3f} against {times[FLOAT32]:.3f} ns per element"
    what = f"{rule}, {size_name(size)}, all threads: {name}, over float32 (bytes: {ratio:.2f}x)"
    most = times_as_fast(times[FLOAT32] / ceiling(rule, name, times))
    return Figure(what, f">= {target:.2f}x" if target else "", measured, over >= target, most)


MEASURED = {}  # (rule, size) -> what beside_streams() gave: the picture has it


def in_memory():
    """Where memory limits an update, fewer bytes are fewer nanoseconds."""
    targets = {("rmsprop", Q8): 1.3, ("adam", Q8): 1.6, ("adam", SPLIT): 1.0}
    for rule in ("rmsprop", "adam"):
        for size in SIZES:
            times = MEASURED[rule, size] = beside_streams(rule, size)
            for name in (BF16, NEAREST, Q8, SPLIT):
                target = targets.get((rule, name), 0.95 * fewer_bytes(rule, name))
                yield row(rule, size, name, times, target if size == LARGE else 0.0)


def draw(path, facts):
    """A picture of what in_memory() measured: a bar for each time, and a line where its bytes have their ceiling."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 6), layout="constrained")
    picture.suptitle(f"One update through storage formats, all threads\n{in_words(facts)}, {facts['isa']}", fontsize=10)
    panels = picture.subplots(2, len(SIZES), squeeze=False)
    for panel, ((rule, size), times) in zip(panels.ravel(), MEASURED.items(), strict=True):
        ceilings = [ceiling(rule, name, times) for name in SETTINGS]
        labels = [f"{name}\n{moved(rule, name):.4g} bytes" for name in SETTINGS]
        bars = panel.barh(labels, [times[name] for name in SETTINGS], 0.7, color="#56B4E9", label="measured")
        panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        for place, most in enumerate(ceilings):
            panel.plot(
                [most, most], [place - 0.45, place + 0.45], color="#000000", label="" if place else "ceiling of the bytes"
            )
        panel.set_title(f"{rule}, {size_name(size)} elements", fontsize=9)
        panel.set_xlim(0, 1.15 * max(*(times[name] for name in SETTINGS), *ceilings))
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        if panel not in panels[:, 0]:
            panel.set_yticklabels([])
    for panel in panels[-1]:
        panel.set_xlabel("nanoseconds per element", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    picture.savefig(path, dpi=150)


def in_cache():
    """Where arithmetic limits an update, decoding and encoding come on top of it."""
    threads = fastrms.get_num_threads()
    fastrms.set_num_threads(1)
    for rule in ("rmsprop", "adam"):
        times = nanoseconds(rule, IN_L2, (FLOAT32, BF16, NEAREST, Q8))
        for name, target in ((BF16, 1.35), (NEAREST, 1.35), (Q8, 2.0)):
            yield at_most(
                f"{rule}, {size_name(IN_L2)}, one thread: {name}, time over float32", times[name] / times[FLOAT32], target
            )
    fastrms.set_num_threads(threads)


def over_8_bits():
    """States in 8 bits against those of bitsandbytes and of torchao, where these are installed."""
    for rule, name, peer, target in (
        ("rmsprop", "bitsandbytes 8-bit", peers.bitsandbytes, 25),
        ("adam", "bitsandbytes 8-bit", peers.bitsandbytes, 25),
        ("adam", "torchao AdamW8bit, compiled by torch", torchao, 1.5),
    ):
        what = f"{rule}, {size_name(MIDDLE)}: q8 states over {name}"
        try:
            theirs = peer(Problem(rule, MIDDLE, "float32"))
        except (CannotDo, ImportError) as error:
            yield Figure(what, f">= {target}x", f"not measured: {error}", True)
            continue
        timings = interleaved({"ours": bound(rule, MIDDLE, Q8).step, "theirs": theirs.step}, SECONDS)
        yield at_least(what, timings["theirs"].minimum / timings["ours"].minimum, target)


def torchao(problem):
    library = peers.load("torchao.optim")
    return peers.optimizing("torchao", problem, partial(library.AdamW8bit, lr=0.001, weight_decay=0.0), 0, [])


def over_prime_rl():
    """Adam in float32 with gradients in bf16 and a bf16 copy of the parameters, against the kernel of prime-rl, which was
    made for this; then with clipping, for which prime-rl's trainer computes the norm by torch beforehand."""
    threads = fastrms.get_num_threads()
    what = "adam, {}, {} thread(s){}: bf16 gradients, bf16 copy, over prime-rl"
    for size in (LARGE, MIDDLE):
        for count in sorted({1, threads}):
            try:
                contenders = with_copy(size, count)
            except (CannotDo, ImportError) as error:
                yield Figure(what.format(size_name(size), count, ""), ">= 1.0x", f"not measured: {error}", True)
                continue
            timings = interleaved(contenders, SECONDS)
            for clipped in ("", ", clipping"):
                ratio = timings["theirs" + clipped].minimum / timings["ours" + clipped].minimum
                yield at_least(what.format(size_name(size), count, clipped), ratio, 1.0)
    fastrms.set_num_threads(threads)


def with_copy(size, threads):
    """name -> step of ours and of prime-rl's, without and with clipping, on so many threads."""
    torch, library = peers.load("torch"), peers.load("cpu_adam")
    torch.set_num_threads(threads)
    fastrms.set_num_threads(threads)
    problem = Problem("adam", size, "float32")
    settings = {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "gradient_scale": 1.0}
    grad, param, mean, square = peers.tensors(problem, None)
    grad, copy, step = grad.bfloat16(), param.bfloat16(), torch.zeros(())
    (mine,) = allocate(size, [np.dtype(np.float32)], WELL_PLACED)
    mine[:] = problem.start
    optimizer = fastrms.Adam(mine, param_copy=copy.clone(), backend="c")
    optimizer.bind(grad.clone())

    def theirs():
        library.adamw_step([param], [grad], [mean], [square], [step], [copy], **settings)

    def clipped():
        torch.linalg.vector_norm(grad, dtype=torch.float32).item()
        theirs()

    ours = {"ours": optimizer.step, "ours, clipping": lambda: optimizer.step(clip_norm=1e9)}
    return {**ours, "theirs": theirs, "theirs, clipping": clipped}


MEASUREMENTS = (in_memory, in_cache, over_8_bits, over_prime_rl)
