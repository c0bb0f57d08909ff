"""What is timed: one rule at one size, done by NumPy twice, by fastrms on each backend, and by the ceiling.

The ceiling (fastrms_streams in C) reads and writes the same streams with next to no arithmetic: no update can be
faster once the buffers are larger than the caches.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

import fastrms
from fastrms import placement, rules

from .baselines import InPlace, Naive

OPTIMIZERS = {"rmsprop": fastrms.RMSProp, "adagrad": fastrms.AdaGrad, "adam": fastrms.Adam, "rprop": fastrms.RProp}
NAIVE, IN_PLACE, CEILING = "naive NumPy", "in-place NumPy", "ceiling"
FASTRMS = {"numpy": "fastrms numpy", "c": "fastrms c"}
NAMES = (NAIVE, IN_PLACE, *FASTRMS.values(), CEILING)
PLACEMENT = "every buffer starts where fastrms.placement.place puts it, staggered modulo 4 KiB against its neighbours"


class Contender(NamedTuple):
    """One way to make the update.  `step()` makes one on `buffers`: the parameter, then the states."""

    name: str
    step: Callable
    buffers: list


class Problem:
    """One rule at one size: a gradient and a start that all share, a parameter and states for each contender."""

    def __init__(self, rule, size, dtype):
        self.rule, self.size, self.dtype = rule, size, np.dtype(dtype)
        self.state_names = rules.state_names(rules.RULES[rule])
        random = np.random.default_rng(size)
        self.grad = place_beside(size, self.dtype, [])
        random.standard_normal(out=self.grad, dtype=self.dtype)
        self.start = random.standard_normal(size, dtype=self.dtype)
        backends = [name for name in FASTRMS if name in fastrms.available_backends()]
        self.contenders = [naive(self), in_place(self), *(bound(self, backend) for backend in backends)]
        if "c" in backends:
            self.contenders.append(ceiling(self))

    def new_param(self):
        param = place_beside(self.size, self.dtype, [self.grad])
        param[:] = self.start
        return param

    def new_buffers(self):
        """The gradient, a parameter and states, each placed away from the others."""
        streams = [self.grad, self.new_param()]
        for name in self.state_names:
            state = place_beside(self.size, self.dtype, streams)
            state.fill(first_value(name))
            streams.append(state)
        return streams


def first_value(state_name):
    """What a state starts at: RProp's step sizes at lr, all others at 0."""
    return 0.01 if state_name == "step_size" else 0.0


def place_beside(size, dtype, streams):
    return placement.place(size, np.dtype(dtype), [address(stream) for stream in streams])


def address(array):
    return array.__array_interface__["data"][0]


def bytes_per_element(rule, dtype):
    """What an update has to move: the gradient is read, the parameter and the states are read and written."""
    return (3 + 2 * len(rules.state_names(rules.RULES[rule]))) * np.dtype(dtype).itemsize


def held_per_element(rule, dtype):
    """What must fit into a cache: parameter, gradient and states."""
    return (2 + len(rules.state_names(rules.RULES[rule]))) * np.dtype(dtype).itemsize


def step_counter(rule):
    return {"steps": count(1)} if rule == "adam" else {}


def naive(problem):
    grad, param, *states = problem.new_buffers()
    step = partial(getattr(Naive, problem.rule), param, grad, *states, **step_counter(problem.rule))
    return Contender(NAIVE, step, [param, *states])


def in_place(problem):
    grad, param, *states = problem.new_buffers()
    scratch = [place_beside(problem.size, problem.dtype, [grad, param, *states])]
    if problem.rule == "rprop":
        scratch.append(place_beside(problem.size, bool, [grad, param, *states, *scratch]))
    step = partial(getattr(InPlace, problem.rule), param, grad, *states, *scratch, **step_counter(problem.rule))
    return Contender(IN_PLACE, step, [param, *states])


def bound(problem, backend):
    """fastrms with bound buffers; it places its states itself."""
    param = problem.new_param()
    optimizer = OPTIMIZERS[problem.rule](param, backend=backend)
    optimizer.bind(problem.grad)
    states = [optimizer.state[name] for name in problem.state_names]
    return Contender(FASTRMS[backend], optimizer.step, [param, *states])


def ceiling(problem):
    from fastrms._core import ffi, lib

    grad, param, *states = problem.new_buffers()
    for state in states:
        state.fill(0)
    pointers = [ffi.from_buffer(array) for array in (param, grad, *states)]
    padding = [ffi.NULL] * (lib.FASTRMS_MAX_STATES - len(states))
    step = partial(lib.fastrms_streams, problem.size, problem.dtype.itemsize, len(states), *pointers, *padding)
    return Contender(CEILING, step, [param, *states])
