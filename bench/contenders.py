"""The contenders: NumPy twice, fastrms on each backend, the two ceilings, and on demand the peers.

A contender is one function of a Problem, which raises CannotDo with the reason where it has no such rule.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import count
from timeit import Timer
from typing import NamedTuple

import numpy as np

import fastrms

from .baselines import InPlace, Naive
from .problem import WELL_PLACED, CannotDo, allocate, divides

OPTIMIZERS = {"rmsprop": fastrms.RMSProp, "adagrad": fastrms.AdaGrad, "adam": fastrms.Adam, "rprop": fastrms.RProp}
NAIVE, IN_PLACE, STREAMS, DIVIDER = "naive NumPy", "in-place NumPy", "streams", "divider"
CEILINGS = (STREAMS, DIVIDER)
BACKENDS = ("numpy", "numba", "c")
ON_LAYERS = tuple(f"numba ({layer})" for layer in ("omp", "tbb", "workqueue"))  # where a step may run on Numba's threads
FASTRMS = {way: f"fastrms {way}" for way in ("numpy", "numba", *ON_LAYERS, "c")}
IN_TURN, CHUNK = 1024, 16 * 1024  # elements: the blocks of streams in turn, the parts for threads
IN_L1 = 1024  # elements that the divider goes over again and again


class Contender(NamedTuple):
    """One way to make the update.  `step()` makes one update; `read()` gives [parameter, states] afterwards, or the
    first few of these.

    way: tells contenders of one name apart; the fastest of them counts.   formula: name of the formula for the check.
    tolerance: for arithmetic in another precision than the dtype's, how far a result may be off, in multiples of lr.
    compact: whether its states are smaller than the ceiling's.   changed(): is called after gradients changed in place.
    """

    name: str
    step: Callable
    read: Callable
    way: str = ""
    formula: str = "update"
    tolerance: float | None = None
    compact: bool = False
    changed: Callable = lambda: None


def contenders(problem, threads, names=None, peers=()):
    """(contenders of `names`, or all; name -> why it does not take part).  peers: name -> function of a Problem."""
    backends = [backend for backend in BACKENDS if backend in fastrms.available_backends()]
    makers = {NAIVE: naive, IN_PLACE: in_place, **{row(b, threads): partial(bound, b, threads) for b in backends}}
    makers.update(peers)
    made, reasons = [], {}
    for name, make in makers.items():
        if names is None or name in names:
            try:
                made.append(make(problem))
            except CannotDo as error:
                reasons[name] = str(error)
    if "c" in backends and problem.placement == WELL_PLACED:
        made += [ceiling for ceiling in ceilings(problem, threads) if names is None or ceiling.name in names]
    return made, reasons


def row(backend, threads):
    """The name of a backend's row; on several threads that of Numba names the threading layer."""
    if backend != "numba" or threads == 1:
        return FASTRMS[backend]
    layer, _ = fastrms.backends.load("numba").started()
    return FASTRMS.get(f"numba ({layer})", FASTRMS["numba"])


def step_counter(rule):
    return {"steps": count(1)} if rule == "adam" else {}


def naive(problem):
    grad, param, *states = problem.new_buffers()
    step = partial(getattr(Naive, problem.rule), param, grad, *states, **step_counter(problem.rule))
    return Contender(NAIVE, step, lambda: [param, *states])


def in_place(problem):
    scratch = [problem.dtype, bool] if problem.rule == "rprop" else [problem.dtype]
    grad, param, *others = problem.new_buffers(scratch=scratch)
    states = others[: len(problem.state_names)]
    step = partial(getattr(InPlace, problem.rule), param, grad, *others, **step_counter(problem.rule))
    return Contender(IN_PLACE, step, lambda: [param, *states])


def bound(backend, threads, problem):
    """fastrms with bound buffers; it places its states itself."""
    grad, param = problem.new_buffers(states=0)
    optimizer = OPTIMIZERS[problem.rule](param, backend=backend)
    optimizer.bind(grad)
    name = row(backend, threads)
    return Contender(name, optimizer.step, lambda: [param, *(optimizer.state[name] for name in problem.state_names)])


def ceilings(problem, threads):
    """The loops in C that no update can beat: one moves the same memory, one makes the same divisions."""
    for way, settings in streams_ways(problem.size, threads):
        yield streams(problem, way, settings)
    if divides(problem.rule):
        yield divider(problem, "alone", {"chunk": CHUNK})
        if threads > 1:
            yield divider(problem, "shared", {"chunk": CHUNK, "shared": 1})


def streams_ways(size, threads):
    """The orders in which the ceiling goes through memory; which is fastest depends on the size and the machine."""
    yield "together", {"chunk": CHUNK}
    yield f"in turn by {IN_TURN}", {"chunk": CHUNK, "block": IN_TURN}
    if threads > 1:
        yield f"together, shared by {CHUNK}", {"chunk": CHUNK, "shared": 1}
        yield "together, one part a thread", {"chunk": -(-size // threads), "shared": 1}
        yield f"in turn by {IN_TURN}, shared by {CHUNK}", {"chunk": CHUNK, "block": IN_TURN, "shared": 1}


def streams(problem, way, settings, buffers=None):
    """The loop in C over buffers [gradient, parameter, states]; it makes its own unless they are given."""
    from fastrms._core import lib

    grad, param, *states = buffers or problem.new_buffers()
    for state in [] if buffers else states:
        state.fill(0)
    step = partial(lib.fastrms_streams, job(problem, param, grad, states, settings))
    return Contender(STREAMS, step, lambda: [param, *states], way, STREAMS)


def divider(problem, way, settings):
    from fastrms._core import lib

    values, quotients = allocate(min(IN_L1, problem.size), [problem.dtype] * 2, WELL_PLACED)
    np.abs(problem.grad[:IN_L1], out=values)
    settings = settings | {"isa": fastest_divider(problem.dtype)}
    step = partial(lib.fastrms_divider, job(problem, quotients, values, [], settings))
    return Contender(DIVIDER, step, lambda kept_alive=values: [quotients], way, DIVIDER)


@cache
def fastest_divider(dtype):
    """The number of the instruction set that is fastest at divisions and square roots, as kernels take the fastest, too."""
    from fastrms._core import ffi, lib

    values, quotients = np.ones(IN_L1, dtype), np.ones(IN_L1, dtype)
    fields = {"size": 64 * IN_L1, "chunk": CHUNK, "itemsize": dtype.itemsize}
    fields |= {"param": ffi.from_buffer(quotients), "grad": ffi.from_buffer(values)}
    jobs = {
        isa: ffi.new("fastrms_ceiling *", fields | {"isa": isa})
        for isa in range(lib.fastrms_isa_count())
        if lib.fastrms_isa_supported(isa)
    }
    return min(jobs, key=lambda isa: min(Timer(partial(lib.fastrms_divider, jobs[isa])).repeat(9, 1)))


def job(problem, param, grad, states, settings):
    from fastrms._core import ffi, lib

    pointers = {"isa": lib.fastrms_isa_get(), "param": ffi.from_buffer(param), "grad": ffi.from_buffer(grad)}
    made = ffi.new("fastrms_ceiling *", {"size": problem.size, "itemsize": problem.dtype.itemsize, "states": len(states)})
    made.state = [ffi.from_buffer(state) for state in states]
    for name, value in (pointers | settings).items():
        setattr(made, name, value)
    return made
