"""Interleaved timing: every round times each call once, so that a change of the machine's speed meets all of them."""

import time
from statistics import median
from timeit import Timer
from typing import NamedTuple

MEASUREMENT = 1e-3  # seconds; one measurement lasts at least this long
MOST_ROUNDS = 400
WARM_UP = 2e-2  # seconds; a shorter call is first made once untimed, to bring its data into the caches
REST = 1e-2  # seconds before each contender: GNU OpenMP's threads use a processor for 2.5 to 7.5 ms after their last loop


class Timing(NamedTuple):
    """The nanoseconds of one call, minimum and median over the rounds; repetitions: calls per measurement."""

    minimum: float
    median: float
    rounds: int
    repetitions: int


def interleaved(calls, seconds, least_rounds=3, before=lambda key: None):
    """Timings of `calls` (key -> function without arguments), in rounds until `seconds` are over.

    before(key): is called before each measurement of key, untimed.
    """
    return at_places({key: [call] for key, call in calls.items()}, seconds, least_rounds, before)


def at_places(calls, seconds, least_rounds=3, before=lambda key: None):
    """The same for calls that work on buffers at several places (key -> functions, one for each place): the timing of the
    place whose minimum is the median of the places."""
    samples, repetitions = sampled(calls, seconds, least_rounds, before)
    timings = {}
    for key, places in samples.items():
        taken = middle(places)
        timings[key] = Timing(min(taken), median(taken), len(taken), repetitions[key])
    return timings


def middle(places):
    """Of the samples at each place those of the place whose minimum is the median."""
    return sorted(places, key=min)[len(places) // 2]


def paired(calls, seconds, least_rounds=3, before=lambda key: None):
    """The time of the second of two calls over that of the first: the median of the ratios of each round, in which the
    machine is in one state for both."""
    samples, _ = sampled({key: [call] for key, call in calls.items()}, seconds, least_rounds, before)
    (first,), (second,) = samples.values()
    return median(b / a for a, b in zip(first, second, strict=True))


def sampled(calls, seconds, least_rounds=3, before=lambda key: None, measurement=MEASUREMENT):
    """(key -> nanoseconds of a call in each round, in a list for each place; key -> how many calls made one measurement).

    The threads of other libraries rest before each key, so that no contender pays for what another has left running.
    """
    timers = {key: [Timer(call) for call in places] for key, places in calls.items()}
    end = time.perf_counter() + seconds
    calibrated = {key: calibrate(places[0], measurement) for key, places in timers.items()}
    samples = {key: [[] for _ in places] for key, places in calls.items()}
    rounds = 0
    while rounds < least_rounds or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for key, (repetitions, short) in calibrated.items():
            time.sleep(REST)
            before(key)
            for call, timer, taken in zip(calls[key], timers[key], samples[key], strict=True):
                if short:
                    call()
                taken.append(timer.timeit(repetitions) / repetitions * 1e9)
        rounds += 1
    return samples, {key: repetitions for key, (repetitions, _) in calibrated.items()}


def calibrate(timer, measurement=MEASUREMENT):
    """(how many calls make one measurement, whether one call is short enough for a warm-up).  The shorter of two timings
    counts: after a rest, threads that sleep make the first call of some libraries a hundred times as long."""
    repetitions = 1
    while (taken := min(timer.repeat(2, repetitions))) < measurement:
        repetitions = max(2 * repetitions, int(1.1 * measurement / max(taken, 1e-7) * repetitions))
    return repetitions, taken < WARM_UP


def clock():
    """Nanoseconds of an empty Python call; where two results differ, the machine's speed has changed in between."""
    return min(Timer(empty).repeat(20, 20_000)) / 20_000 * 1e9


def empty():
    pass
