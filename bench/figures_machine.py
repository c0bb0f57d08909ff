"""The figures on all cores: against the ceilings, and against the other libraries that are installed."""

import numpy as np

import fastrms

from . import peers
from .check import check
from .contenders import DIVIDER, FASTRMS, IN_PLACE, NAIVE, OPTIMIZERS, contenders, streams, streams_ways
from .figures import Figure, at_least, at_most, share
from .machine import caches
from .problem import BACK_TO_BACK, IN_WORDS, RULES, WELL_PLACED, Problem, held_per_element
from .report import size_name
from .results import Results
from .timing import interleaved

SECONDS = 4.0  # of timing for each cell
OURS, STREAMED = FASTRMS["c"], 2**25
PLACED = f"{IN_WORDS[WELL_PLACED]}, where it does not say back to back"
RIVALS = {
    "rmsprop": {"torch foreach": 5, "torch.compile": 0.95, NAIVE: 9, IN_PLACE: 4},
    "adagrad": {"DeepSpeed": 0.95, "torch fused": 0.95},
    "adam": {"DeepSpeed": 0.95, "torch fused": 0.95, "optax": 1.25},
}
FASTEST = {2**20: {"rmsprop": 1.3, "adagrad": 1.2, "adam": 1.05}, 2**16: {"rmsprop": 2, "adagrad": 1.3, "adam": 1.3}}
DIVIDER_SHARE = {"rmsprop": 90, "adagrad": 90, "adam": 75}
available = {}


def prepare():
    """Let all libraries use all cores; returns the number of threads and the versions of the other libraries."""
    peers.use_threads(fastrms.get_num_threads())
    found, reasons = peers.available()
    available.update(found)
    return {"threads": fastrms.get_num_threads(), "peers": peers.versions() | reasons}


def measured(rule, size, names, threads=None):
    """The Results of one rule at one size, with the contenders of these names."""
    problem = Problem(rule, size, "float32")
    rivals = {name: make for name, make in available.items() if name in names}
    made, reasons = contenders(problem, threads or fastrms.get_num_threads(), names, rivals)
    check(problem, made)
    calls = {(contender.name, contender.way): contender.step for contender in made}
    results = Results("float32", WELL_PLACED)
    results.add(rule, size, made, interleaved(calls, SECONDS, pause=peers.PAUSE if rivals else 0.0), reasons)
    return results


def share_of_streams(rule, size):
    """The update's speed in percent of the ceiling's, in the ceiling's fastest way.  Both run over the same buffers, since
    one set of pages is up to 10 % faster than another.  A first pass finds that way, a second times both."""
    problem = Problem(rule, size, "float32")
    (ours,), _ = contenders(problem, 1, [OURS])
    check(problem, [ours])
    buffers = [problem.grads[-1], *ours.read()]
    ways = dict(streams_ways(size, fastrms.get_num_threads()))
    calls = {way: streams(problem, way, settings, buffers).step for way, settings in ways.items()}
    first = interleaved(calls, SECONDS / 2)
    fastest = min(calls, key=lambda way: first[way].minimum)
    final = interleaved({OURS: ours.step, fastest: calls[fastest]}, SECONDS)
    return 100 * final[fastest].minimum / final[OURS].minimum


def over(results, rule, size, rival, target):
    """One row; where the library is missing, it says that the target is not reached."""
    what = f"{rule}, {size_name(size)}: over {rival}"
    times = results.times(rule, size, rival, OURS)
    if times is None:
        reason = results.reasons.get((rule, rival), "not installed")
        return Figure(what, f">= {target}x", f"not measured: {reason}", False)
    return at_least(what, times, target)


def streaming():
    for rule in RULES:
        for size in (STREAMED, 2 * STREAMED):
            yield share(f"{rule}, {size_name(size)}: of the streams ceiling", share_of_streams(rule, size), 95)
        if rule in RIVALS:
            results = measured(rule, STREAMED, [OURS, *RIVALS[rule]])
            for rival, target in RIVALS[rule].items():
                yield over(results, rule, STREAMED, rival, target)


def back_to_back():
    for rule in DIVIDER_SHARE:
        for size in (STREAMED, 2 * STREAMED):
            calls, kept = {}, []
            for where in (WELL_PLACED, BACK_TO_BACK):
                kept.append(Problem(rule, size, "float32", where))
                (contender,), _ = contenders(kept[-1], 1, [OURS])
                calls[where] = contender.step
            timings = interleaved(calls, SECONDS)
            slower = timings[BACK_TO_BACK].minimum / timings[WELL_PLACED].minimum
            yield at_most(f"{rule}, {size_name(size)}, back to back: time over well placed", slower, 1.15)


def against_the_fastest():
    for size, targets in FASTEST.items():
        for rule, target in targets.items():
            yield over_fastest(measured(rule, size, [OURS, *available]), rule, size, target)


def over_fastest(results, rule, size, target):
    what = f"{rule}, {size_name(size)}: over the fastest peer"
    if not results.peers(rule):
        return Figure(what, f">= {target}x", "not measured: no peer is installed", False)
    fastest = min(results.peers(rule), key=lambda name: results.nanoseconds(rule, size, name))
    return at_least(f"{what} ({fastest})", results.times(rule, size, fastest, OURS), target)


def in_second_cache():
    threads = fastrms.get_num_threads()
    fastrms.set_num_threads(1)
    for rule, target in DIVIDER_SHARE.items():
        room = caches().get("L2", 2**19) // 2 // held_per_element(rule, "float32")
        size = 2 ** (room.bit_length() - 1)
        results = measured(rule, size, [OURS, DIVIDER], threads=1)
        percent = 100 * results.times(rule, size, DIVIDER, OURS)
        yield share(f"{rule}, {size_name(size)} (in L2), one thread: of the divider ceiling", percent, target)
    fastrms.set_num_threads(threads)


def small():
    results = measured("rmsprop", 1024, [OURS, NAIVE, *available])
    yield over(results, "rmsprop", 1024, NAIVE, 12)
    yield over_fastest(results, "rmsprop", 1024, 20)


def many():
    for rule in DIVIDER_SHARE:
        what = f"100 tensors of 1024, {rule}: over the fastest torch variant"
        rivals = peers.torch_on_many(rule, *many_arrays()) if "torch foreach" in available else {}
        if not rivals:
            yield Figure(what, ">= 15x", "not measured: torch is not installed", False)
            continue
        params, grads = many_arrays()
        optimizer = OPTIMIZERS[rule](params, backend="c")
        optimizer.bind(grads)
        timings = interleaved({OURS: optimizer.step} | rivals, SECONDS, pause=peers.PAUSE)
        fastest = min(rivals, key=lambda name: timings[name].minimum)
        yield at_least(f"{what} ({fastest})", timings[fastest].minimum / timings[OURS].minimum, 15)


def many_arrays(count=100, size=1024):
    """Parameters and gradients of many small tensors, as NumPy allocates them."""
    generator = np.random.default_rng(0)
    return [[generator.standard_normal(size, dtype=np.float32) for _ in range(count)] for _ in range(2)]


def two_threads():
    """The speed on all threads over that on one, at every size; both run on the same buffers."""
    for rule in DIVIDER_SHARE:
        slower = {}
        for size in (2**k for k in range(6, 26)):
            timings = threads_compared(rule, size)
            slower[size] = timings["all"].minimum / timings["one"].minimum
        yield at_least(f"{rule}, {size_name(STREAMED)}: one thread to all", 1 / slower[STREAMED], 1.3)
        worst = max(slower, key=slower.get)
        what = f"{rule}, all sizes: all threads' time over one thread's, worst ({size_name(worst)})"
        yield at_most(what, slower[worst], 1.05)


def threads_compared(rule, size):
    problem = Problem(rule, size, "float32")
    (contender,), _ = contenders(problem, 1, [OURS])
    counts = {"one": 1, "all": fastrms.get_num_threads()}
    calls = dict.fromkeys(counts, contender.step)
    for seconds in (0.25, 2.0, 8.0):  # again, for longer, where it seems to lose: the clock has two states
        timings = interleaved(calls, seconds, least_rounds=5, before=lambda key: fastrms.set_num_threads(counts[key]))
        if timings["all"].minimum <= timings["one"].minimum:
            break
    fastrms.set_num_threads(counts["all"])
    return timings


MEASUREMENTS = (streaming, back_to_back, against_the_fastest, in_second_cache, small, many, two_threads)
