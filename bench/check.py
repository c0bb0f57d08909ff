"""Nothing is timed that is wrong: every contender is compared with formulas in float64, element by element.

The formulas are written from the papers, independently of fastrms and of the baselines.  In a large buffer only some blocks
are compared, spread from the first element to the last.
"""

import numpy as np

from .contenders import DIVIDER, STREAMS
from .problem import first_value

STEPS = 2  # even: the signs flipped after every step are back where they were
ULPS = {4: 16, 8: 2048}  # by itemsize; relative to the element's largest magnitude.  1 - 0.999**step loses 9 bits
BLOCK, BLOCKS = 1 << 15, 16
LR = {"rmsprop": 0.01, "adagrad": 0.01, "adam": 0.001, "rprop": 0.01}


class WrongContender(Exception):
    """A contender whose result is not that of the formula."""


def rmsprop(step, grad, param, square_avg, lr=LR["rmsprop"]):
    square_avg = 0.99 * square_avg + (1 - 0.99) * grad**2
    return param - lr * grad / (np.sqrt(square_avg) + 1e-8), square_avg


def adagrad(step, grad, param, total, lr=LR["adagrad"]):
    total = total + grad**2
    return param - lr * grad / (np.sqrt(total) + 1e-10), total


def adam(step, grad, param, mean, square, lr=LR["adam"]):
    mean = 0.9 * mean + (1 - 0.9) * grad
    square = 0.999 * square + (1 - 0.999) * grad**2
    corrected = np.sqrt(square / (1 - 0.999**step))
    return param - lr * mean / (1 - 0.9**step) / (corrected + 1e-8), mean, square


def rprop(step, grad, param, previous, size):
    product = grad * previous
    size = np.clip(np.select([product > 0, product < 0], [size * 1.2, size * 0.5], size), 1e-6, 50)
    grad = np.where(product < 0, 0, grad)
    return param - np.sign(grad) * size, grad, size


def streams(step, grad, param, first, *others):
    """The formula of the streams' ceiling."""
    return param + (first + grad), first + grad, *(state + grad for state in others)


def divider(step, grad, param, *states):
    """The formula of the divider's ceiling, which leaves x / sqrt(x) for the first elements."""
    return np.sqrt(np.abs(grad)), *states


FORMULAS = {function.__name__: function for function in (rmsprop, adagrad, adam, rprop)}


def check(problem, contenders):
    """Make STEPS steps with every contender and compare the results; WrongContender names the first that is off."""
    for _ in range(STEPS):
        for contender in contenders:
            contender.step()
        problem.flip()
        for contender in contenders:
            contender.changed()
    zeros = [0.0] * len(problem.state_names)
    for part in blocks(problem.size):
        results = {
            "update": reference(problem, part, FORMULAS[problem.rule], first_states(problem)),
            STREAMS: reference(problem, part, streams, zeros),
            DIVIDER: reference(problem, part, divider, zeros),
        }
        for contender in contenders:
            compare(problem, contender, part, *results[contender.formula])


def blocks(size):
    """The parts that are compared: all of a small buffer, or BLOCKS of a large one, among them the first and the last."""
    starts = range(0, size, BLOCK)
    if len(starts) > BLOCKS:
        starts = np.linspace(0, size - BLOCK, BLOCKS, dtype=int)
        starts -= starts % 2  # the signs are flipped at even places
    return [slice(int(start), int(start) + BLOCK + 1) for start in starts]


def first_states(problem):
    return [float(problem.dtype.type(first_value(name))) for name in problem.state_names]


def reference(problem, part, formula, states):
    """The parameter and states of one block after all steps, and the largest magnitude that each element had meanwhile."""
    grad = problem.grad[part].astype(np.float64)
    buffers = [problem.start[part].astype(np.float64), *(np.full_like(grad, first) for first in states)]
    largest = [np.abs(buffer) for buffer in buffers]
    for step in range(1, STEPS + 1):
        buffers = formula(step, grad, *buffers)
        largest = [np.maximum(most, np.abs(buffer)) for most, buffer in zip(largest, buffers, strict=True)]
        grad[::2] *= -1
    return buffers, largest


def compare(problem, contender, part, expected, largest):
    names = ("param", *problem.state_names)
    for name, buffer, value, most in zip(names, contender.read(), expected, largest, strict=False):
        found = buffer[part]
        value, most = value[: len(found)], most[: len(found)]  # the divider has a few elements only
        allowed = ULPS[problem.dtype.itemsize] * np.finfo(problem.dtype).eps * most
        if contender.tolerance is not None:
            allowed = contender.tolerance * LR[problem.rule]
        with np.errstate(all="ignore"):  # a wrong contender may hold anything
            close = np.abs(found - value) <= allowed
        if not close.all():
            where = int(np.argmin(close))
            raise WrongContender(
                f"{contender.name} is wrong: {problem.rule}, {problem.size} elements of {problem.dtype}, "
                f"{name}[{part.start + where}] is {found[where]!r}, the formula gives {value[where]!r}"
            )
