"""Interleaved timing: every round times each call once, so that a change of the machine's speed meets all of them."""

import time
from statistics import median
from timeit import Timer
from typing import NamedTuple

MEASUREMENT = 1e-3  # seconds that one measurement lasts at least
MOST_ROUNDS = 400


class Timing(NamedTuple):
    """Nanoseconds of one call: the minimum and the median over the rounds; repetitions: calls per measurement."""

    minimum: float
    median: float
    rounds: int
    repetitions: int


def interleaved(calls, seconds, least_rounds=3):
    """Timings of `calls` (name -> function without arguments), in rounds until `seconds` are over."""
    timers = {name: Timer(call) for name, call in calls.items()}
    end = time.perf_counter() + seconds
    repetitions = {name: calibrate(timer) for name, timer in timers.items()}
    samples = {name: [] for name in calls}
    rounds = 0
    while rounds < least_rounds or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(repetitions[name]) / repetitions[name] * 1e9)
        rounds += 1
    return {name: Timing(min(taken), median(taken), rounds, repetitions[name]) for name, taken in samples.items()}


def calibrate(timer):
    """How many calls make one measurement."""
    repetitions = 1
    while (taken := timer.timeit(repetitions)) < MEASUREMENT:
        repetitions = max(2 * repetitions, int(1.1 * MEASUREMENT / max(taken, 1e-7) * repetitions))
    return repetitions


def clock():
    """Nanoseconds of an empty Python call; two that differ tell that the machine's speed changed in between."""
    return min(Timer(empty).repeat(20, 20_000)) / 20_000 * 1e9


def empty():
    pass
