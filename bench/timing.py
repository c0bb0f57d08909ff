"""Interleaved timing: every round times each call once, so that a change of the machine's speed meets all of them."""

import time
from statistics import median
from timeit import Timer
from typing import NamedTuple

MEASUREMENT = 1e-3  # seconds; one measurement lasts at least this long
MOST_ROUNDS = 400
WARM_UP = 2e-2  # seconds; a shorter call is first made once untimed, to bring its data into the caches


class Timing(NamedTuple):
    """The nanoseconds of one call, minimum and median over the rounds; repetitions: calls per measurement."""

    minimum: float
    median: float
    rounds: int
    repetitions: int


def interleaved(calls, seconds, least_rounds=3, pause=0.0, before=lambda key: None):
    """Timings of `calls` (key -> function without arguments), in rounds until `seconds` are over.

    pause: seconds to sleep before each measurement, so that another library's threads stop spinning.
    before(key): is called before each measurement of key, untimed.
    """
    samples, repetitions = sampled(calls, seconds, least_rounds, pause, before)
    return {key: Timing(min(taken), median(taken), len(taken), repetitions[key]) for key, taken in samples.items()}


def paired(calls, seconds, pause=0.0):
    """The time of the second of two calls over that of the first: the median of the ratios of each round, in which the
    machine is in one state for both."""
    first, second = sampled(calls, seconds, pause=pause)[0].values()
    return median(b / a for a, b in zip(first, second, strict=True))


def sampled(calls, seconds, least_rounds=3, pause=0.0, before=lambda key: None):
    """(key -> nanoseconds of a call in each round, key -> how many calls made one measurement)."""
    timers = {key: Timer(call) for key, call in calls.items()}
    end = time.perf_counter() + seconds
    calibrated = {key: calibrate(timer) for key, timer in timers.items()}
    samples = {key: [] for key in calls}
    rounds = 0
    while rounds < least_rounds or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for key, (repetitions, short) in calibrated.items():
            time.sleep(pause)
            before(key)
            if short:
                calls[key]()
            samples[key].append(timers[key].timeit(repetitions) / repetitions * 1e9)
        rounds += 1
    return samples, {key: repetitions for key, (repetitions, _) in calibrated.items()}


def calibrate(timer):
    """(how many calls make one measurement, whether one call is short enough for a warm-up)."""
    repetitions = 1
    while (taken := timer.timeit(repetitions)) < MEASUREMENT:
        repetitions = max(2 * repetitions, int(1.1 * MEASUREMENT / max(taken, 1e-7) * repetitions))
    return repetitions, taken < WARM_UP


def clock():
    """Nanoseconds of an empty Python call; where two results differ, the machine's speed has changed in between."""
    return min(Timer(empty).repeat(20, 20_000)) / 20_000 * 1e9


def empty():
    pass
