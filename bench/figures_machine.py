"""The figures that a machine is judged by: fastrms against the hardware, the other libraries that are installed, its own
Numba backend and naive NumPy.  On two threads, where a row does not say one."""

import time
from functools import partial
from statistics import median

import fastrms

from . import model, peers
from .check import check
from .contenders import CEILINGS, DIVIDER, FASTRMS, NAIVE, contenders, row, streams, streams_ways
from .figures import Figure, at_least, share, times_as_fast
from .machine import caches
from .measure import measure
from .problem import IN_WORDS, PLACES, RULES, WELL_PLACED, Problem, held_per_element
from .report import size_name
from .results import Results
from .timing import at_places, interleaved, sampled

SECONDS = 4.0  # of timing for each cell
ROUNDS, STEPS, GAP = 10, 30, 1e-3  # of steps with a gap of so many seconds before each
LOOP = 5e-3  # seconds of steps back to back
OURS, STREAMED = FASTRMS["c"], 2**25
SIZES = (2**16, 2**18, 2**20)
OVER_FASTEST = {"rmsprop": 1.3, "adagrad": 1.2, "adam": 1.15, "rprop": 1.3}
OVER_ONE_THREAD = {2**15: 1.4, 2**16: 1.7, 2**18: 1.85, 2**20: 1.9}
DIVIDER_SHARE = {"rmsprop": 97, "adagrad": 97, "adam": 90}
IN_MEMORY = {"adagrad": ("DeepSpeed", "torch fused"), "adam": ("DeepSpeed", "torch fused")}
SMALL = model.Asked("rmsprop", ((1000,),))
RATES = {  # way of calling: what is asked, how it is made, target
    "bound, clip_norm": (SMALL._replace(clip=True), partial(model.optimizer, "c", OURS), 4),
    "bound, lr=Cosine(...)": (SMALL._replace(schedule=True), partial(model.optimizer, "c", OURS), 4),
    "bound, opt.lr = x": (SMALL._replace(schedule=True), partial(model.optimizer, "c", OURS, assigned=True), 3),
    "functional, another lr": (SMALL._replace(how="functional", schedule=True), partial(model.functional, "c", OURS), 2),
}
PLACED = f"{IN_WORDS[WELL_PLACED]}; the 1000 elements lie where NumPy allocates them"
available = {}


def prepare():
    """Let all libraries use two threads; returns their number and the versions of the other libraries."""
    threads = min(2, fastrms.get_num_threads())
    fastrms.set_num_threads(threads)
    peers.use_threads(threads)
    found, reasons = peers.available()
    available.update(found)
    return {"threads": threads, "peers": peers.versions(), "missing": reasons}


def measured(rule, size, *names):
    """The Results of one rule at one size: fastrms, the ceilings and the contenders of these names."""
    results = Results("float32", WELL_PLACED)
    measure(results, rule, size, SECONDS, (OURS, *CEILINGS, *names), available)
    return results


def over(results, what, target, rivals):
    """One row: how many times as fast fastrms is as the fastest of the rivals, and what a ceiling would be."""
    rule, size, _ = next(iter(results.timings))
    found = [name for name in rivals if (rule, size, name) in results.timings]
    if not found:
        reasons = {results.reasons.get((rule, name), "not installed") for name in rivals}
        return Figure(what, f">= {target}x", f"not measured: {', '.join(sorted(reasons)) or 'not installed'}", False)
    fastest = min(found, key=lambda name: results.nanoseconds(rule, size, name))
    times = results.times(rule, size, fastest, OURS)
    most = results.times(rule, size, fastest, results.nearer_ceiling(rule, size))
    return at_least(what, times, target)._replace(at_most=times_as_fast(most), beside="" if fastest in what else fastest)


def against_the_fastest():
    """Peers and the Numba backend, in one run for each cell."""
    numba = [row("numba", fastrms.get_num_threads())] if "numba" in fastrms.available_backends() else []
    for rule, target in OVER_FASTEST.items():
        for size in SIZES:
            results = measured(rule, size, *numba, *available)
            yield over(results, f"{rule}, {size_name(size)}: over the fastest peer", target, available)
            yield over(results, f"{rule}, {size_name(size)}: over our Numba backend", 1.0, numba)


def two_over_one():
    """Two threads over one, back to back and with pauses between the steps."""
    threads = fastrms.get_num_threads()
    for rule in DIVIDER_SHARE if threads > 1 else ():
        for size, target in OVER_ONE_THREAD.items():
            problem = Problem(rule, size, "float32")
            made, _ = contenders(problem, threads, [OURS, *CEILINGS])
            check(problem, made)
            what = f"{rule}, {size_name(size)}: two threads over one"
            yield back_to_back(f"{what}, back to back", made, threads, target)
            yield every_millisecond(f"{what}, a step every 1 ms", made[0].step, threads)


def back_to_back(what, made, threads, target):
    """The median of the ratios of each round, in loops so long that what precedes them does not count.  At most: the time of
    one thread over that of the ceiling on all, each of which has a divider of its own."""
    ours, *limits = made
    calls = {"one": [ours.step], "all": [ours.step], **{(limit.name, limit.way): [limit.step] for limit in limits}}
    threads_of = lambda key: fastrms.set_num_threads(1 if key == "one" else threads)  # noqa: E731
    samples, _ = sampled(calls, SECONDS / 2, 5, threads_of, LOOP)
    fastrms.set_num_threads(threads)
    ((one,), (every,)) = samples["one"], samples["all"]
    ways = {limit.name: [min(samples[key][0]) for key in samples if key[0] == limit.name] for limit in limits}
    ways[DIVIDER].append(min(samples[DIVIDER, "alone"][0]) / threads)
    ratio = median(slow / fast for slow, fast in zip(one, every, strict=True))
    return at_least(what, ratio, target)._replace(at_most=times_as_fast(min(one) / max(map(min, ways.values()))))


def every_millisecond(what, step, threads):
    ratios = {}
    for name, wait in (("busy", busy), ("asleep", asleep)):
        taken = {1: [], threads: []}
        for _ in range(ROUNDS):
            for number, times in taken.items():
                fastrms.set_num_threads(number)
                times.append(median(after(wait, step) for _ in range(STEPS)))
        ratios[name] = median(slow / fast for slow, fast in zip(*taken.values(), strict=True))
    measured = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items())
    return Figure(what, ">= 0.97x", measured, min(ratios.values()) >= 0.97)


def after(wait, step):
    wait()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def busy():
    end = time.perf_counter() + GAP
    while time.perf_counter() < end:
        pass


def asleep():
    time.sleep(GAP)


def in_second_cache():
    threads = fastrms.get_num_threads()
    fastrms.set_num_threads(1)
    for rule, target in DIVIDER_SHARE.items():
        room = caches().get("L2", 2**19) // 2 // held_per_element(rule, "float32")
        size = 2 ** (room.bit_length() - 1)
        percent = 100 * measured(rule, size).times(rule, size, DIVIDER, OURS)
        what = f"{rule}, in L2, one thread: of the divider's ceiling"
        yield share(what, percent, target)._replace(beside=size_name(size))
    fastrms.set_num_threads(threads)


def in_memory():
    for rule in RULES:
        what = f"{rule}, {size_name(STREAMED)}"
        yield share(f"{what}: of the streams' ceiling", share_of_streams(rule, STREAMED), 95)
        if rule in IN_MEMORY:
            results = measured(rule, STREAMED, *IN_MEMORY[rule])
            for rival in IN_MEMORY[rule]:
                yield over(results, f"{what}: over {rival}", 0.98, [rival])


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


def small():
    results = measured("rmsprop", 1024, NAIVE, *available)
    yield over(results, "rmsprop, 1024, bound: over naive NumPy", 13, [NAIVE])
    yield over(results, "rmsprop, 1024, bound: over the fastest framework", 20, available)


def changing_rates():
    """Over naive NumPy with a constant rate and without clipping.  At most: the same of a bound step without either."""
    made = {NAIVE: (SMALL, model.naive), OURS: (SMALL, partial(model.optimizer, "c", OURS))}
    made |= {way: (asked, make) for way, (asked, make, _) in RATES.items()}
    kept = {name: [model.ready(make, asked) for _ in range(PLACES)] for name, (asked, make) in made.items()}
    timings = at_places({name: [contender.step for contender in places] for name, places in kept.items()}, SECONDS)
    times = {name: timings[NAIVE].minimum / timing.minimum for name, timing in timings.items()}
    for way, (*_, target) in RATES.items():
        what = f"rmsprop, 1000, {way}: over naive NumPy"
        yield at_least(what, times[way], target)._replace(at_most=times_as_fast(times[OURS]))


MEASUREMENTS = (against_the_fastest, two_over_one, in_second_cache, in_memory, small, changing_rates)
