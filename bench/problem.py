"""What is updated: one rule at one size and dtype, in buffers of a stated placement.

Well placed: every buffer starts where fastrms.memory.placement puts it, staggered modulo 4 KiB against its neighbours.
It leaves small buffers where they are; these are tried at several places, since a small update may be up to twice as slow
where its buffers collide modulo 4 KiB.
As allocated: where the library or NumPy puts it.  Back to back: one after the other in an arena that starts at a page,
so that buffers of 2^k elements collide in every cache; fastrms still places its own states.
"""

import numpy as np

from fastrms import rules, sizes
from fastrms.memory import placement

WELL_PLACED, AS_ALLOCATED, BACK_TO_BACK = PLACEMENTS = ("well placed", "as allocated", "back to back")
RULES = ("rmsprop", "adagrad", "adam", "rprop")
LINES = placement.PAGE // placement.LINE
PLACES = 5  # at how many a small buffer is tried
IN_WORDS = {
    WELL_PLACED: "every buffer starts where fastrms.memory.placement.place puts it, staggered modulo 4 KiB against its "
    f"neighbours; a buffer below {placement.LARGE >> 10} KiB is tried at {PLACES} places, of which the median counts",
    AS_ALLOCATED: "every buffer lies where its library, or NumPy, allocates it",
    BACK_TO_BACK: "all buffers of a contender lie back to back from a page boundary, but for the states of fastrms",
}


class CannotDo(Exception):
    """Why a contender does not take part in a problem."""


class Problem:
    """The gradient and the parameters that all contenders start from; each gets buffers of its own.

    place: below PLACES; small buffers that are well placed start at other lines of a page at each.
    """

    def __init__(self, rule, size, dtype, placement=WELL_PLACED, place=0):
        self.rule, self.size, self.dtype, self.placement, self.place = rule, size, np.dtype(dtype), placement, place
        self.state_names = state_names(rule)
        random = np.random.default_rng(size)
        self.grad = random.standard_normal(size, dtype=self.dtype)
        self.start = random.standard_normal(size, dtype=self.dtype)
        self.grads = [self.grad]

    def new_buffers(self, states=None, scratch=()):
        """[gradient, parameter, states, scratch arrays of these dtypes], with the values that the problem starts from."""
        count = len(self.state_names) if states is None else states
        dtypes = [self.dtype] * (2 + count) + [np.dtype(dtype) for dtype in scratch]
        buffers = allocate(self.size, dtypes, self.placement, self.place)
        for buffer, values in zip(buffers, (self.grad, self.start, *map(first_value, self.state_names)), strict=False):
            buffer[:] = values
        self.grads.append(buffers[0])
        return buffers

    def flip(self):
        """Change the sign of every second gradient, in all contenders' buffers."""
        for grad in self.grads:
            grad[::2] *= -1


def state_names(rule):
    """The names of the rule's states, in the order of its arguments."""
    return rules.state_names(rules.RULES[rule])


def first_value(state_name):
    """The value that a state starts at: lr for RProp's step sizes, 0 for all others."""
    return 0.01 if state_name == "step_size" else 0.0


def at_places(rule, size, dtype, where=WELL_PLACED):
    """The Problem at each place where it is tried: at one, but for small buffers that are well placed."""
    small = where == WELL_PLACED and size * np.dtype(dtype).itemsize < placement.LARGE
    return [Problem(rule, size, dtype, where, place) for place in range(PLACES if small else 1)]


def allocate(size, dtypes, where, place=0):
    """Arrays that are read and written side by side, in one of the PLACEMENTS."""
    if where == AS_ALLOCATED:
        return [np.empty(size, dtype) for dtype in dtypes]
    if where == BACK_TO_BACK:
        return arena(size, dtypes)
    arrays, random = [], np.random.default_rng(place)
    for dtype in dtypes:
        if size * dtype.itemsize < placement.LARGE:
            arrays.append(at_line(int(random.integers(LINES)), size, dtype))
        else:
            arrays.append(placement.place(size, dtype, [array.ctypes.data for array in arrays]))
    return arrays


def at_line(line, size, dtype):
    """A new array that starts at this line of a page."""
    memory = np.empty(size * dtype.itemsize + 2 * placement.PAGE, np.uint8)
    start = -memory.ctypes.data % placement.PAGE + line * placement.LINE
    return memory[start : start + size * dtype.itemsize].view(dtype)


def arena(size, dtypes):
    memory = np.empty(sum(size * dtype.itemsize for dtype in dtypes) + placement.PAGE, np.uint8)
    start, arrays = -memory.ctypes.data % placement.PAGE, []
    for dtype in dtypes:
        arrays.append(memory[start : start + size * dtype.itemsize].view(dtype))
        start += size * dtype.itemsize
    return arrays


def bytes_per_element(rule, dtype):
    """The bytes that an update has to move: the gradient is read, the parameter and the states are read and written."""
    return (3 + 2 * len(state_names(rule))) * np.dtype(dtype).itemsize


def bytes_moved(optimizer):
    """The bytes per element that a step of an optimizer of fastrms has to move, whatever its buffers are stored in, as its
    report() says."""
    rows = zip(optimizer._tensors, optimizer._grad_dtypes(), strict=True)
    return sizes.moved_per_element([*rows], optimizer._zero_grad)


def held_per_element(rule, dtype):
    """The bytes that must fit into a cache: parameter, gradient and states."""
    return (2 + len(state_names(rule))) * np.dtype(dtype).itemsize


def divides(rule):
    """Whether the rule takes a square root and divides by it, once per element."""
    return "sqrt" in rules.RULES[rule].__code__.co_names
