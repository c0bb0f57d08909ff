"""A whole trainer in one Numba function, on scikit-learn's handwritten digits: gradient and update without Python between.

Three ways to the same weights, to the last bit: the update compiled into the trainer (fastrms.numba.rmsprop), the bound
C step called from it by its address (opt.c_step), and the same gradient function and the same C step called from Python.

Run with `python examples/trainer_numba.py`; prints the time of a step and the test accuracy of each.
"""

import argparse
import ctypes
import sys
import time

import numpy as np

try:
    from numba import njit
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("numba", "rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[numba,examples]'")

import fastrms
import fastrms.numba

PIXELS, HIDDEN, DIGITS = 64, 24, 10
FIRST, SECOND = PIXELS * HIDDEN, HIDDEN * DIGITS  # two layers without bias, in one flat array
BATCH = 16
LEARNING_RATE = 1e-3


@njit(error_model="numpy")
def scores_of(weights, images):
    """Hidden activities and the score of each digit."""
    hidden = np.tanh(images @ weights[:FIRST].reshape(PIXELS, HIDDEN))
    return hidden, hidden @ weights[FIRST:].reshape(HIDDEN, DIGITS)


@njit(error_model="numpy")
def fill_gradient(weights, gradient, images, digits):
    """The gradient of the mean cross-entropy of these images."""
    hidden, delta = scores_of(weights, images)
    for i in range(len(digits)):
        delta[i] = np.exp(delta[i] - delta[i].max())
        delta[i] /= delta[i].sum()
        delta[i, digits[i]] -= np.float32(1)
    delta /= np.float32(len(digits))
    inner = delta @ weights[FIRST:].reshape(HIDDEN, DIGITS).T * (np.float32(1) - hidden * hidden)
    gradient[:FIRST] = (images.T @ inner).ravel()
    gradient[FIRST:] = (hidden.T @ delta).ravel()


@njit(error_model="numpy")
def train_with_numba(weights, gradient, square_avg, images, digits, batches):
    for batch in batches:
        fill_gradient(weights, gradient, images[batch], digits[batch])
        fastrms.numba.rmsprop(weights, gradient, square_avg, lr=LEARNING_RATE)


@njit(error_model="numpy")
def train_with_c_step(weights, gradient, step, plan, images, digits, batches):
    for batch in batches:
        fill_gradient(weights, gradient, images[batch], digits[batch])
        if step(plan) != 0:
            raise RuntimeError("the C step was refused")


def train_from_python(weights, gradient, optimizer, images, digits, batches):
    for batch in batches:
        fill_gradient(weights, gradient, images[batch], digits[batch])
        optimizer.step()


def by_numba(weights, gradient, data):
    square_avg = np.zeros_like(weights)
    return lambda: train_with_numba(weights, gradient, square_avg, *data)


def by_c_step(weights, gradient, data):
    optimizer = fastrms.RMSProp(weights, lr=LEARNING_RATE, backend="c")
    optimizer.bind(gradient)
    function, plan = optimizer.c_step
    step = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(function)
    # the plan lives as long as its optimizer, which is kept here
    return lambda kept=optimizer: train_with_c_step(weights, gradient, step, plan, *data)


def by_python(weights, gradient, data):
    optimizer = fastrms.RMSProp(weights, lr=LEARNING_RATE)
    optimizer.bind(gradient)
    return lambda: train_from_python(weights, gradient, optimizer, *data)


def trained(make, data, rounds):
    """Train some rounds from the same start; returns the weights, and the seconds of the fastest round."""
    start = np.random.default_rng(0).standard_normal(FIRST + SECOND).astype(np.float32) * np.float32(0.1)
    weights, gradient = start.copy(), np.empty_like(start)
    make(weights, gradient, (data[0], data[1], data[2][:1]))()  # compiles
    seconds = []
    for _ in range(rounds):
        weights[:] = start
        run = make(weights, gradient, data)
        before = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - before)
    return weights, min(seconds)


def digits_in_batches(epochs):
    """Training images, digits and batches of their indices in random order; test images and digits."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split((images / 16).astype(np.float32), digits, test_size=0.25, random_state=0, stratify=digits)
    train_images, test_images, train_digits, test_digits = parts
    random, whole = np.random.default_rng(1), len(train_digits) // BATCH * BATCH
    orders = [random.permutation(len(train_digits))[:whole].reshape(-1, BATCH) for _ in range(epochs)]
    return (train_images, train_digits, np.concatenate(orders)), (test_images, test_digits)


def ways():
    """The ways that this installation has; without C, the update from Python is that of Numba or NumPy."""
    found = {"one @njit function, fastrms.numba.rmsprop": by_numba}
    if "c" in fastrms.available_backends():
        found["one @njit function, opt.c_step"] = by_c_step
    found[f"Python loop, opt.step() on {fastrms.available_backends()[0]}"] = by_python
    return found


def main(arguments=None):
    """Train in every way; returns way -> (weights, seconds per step, test accuracy)."""
    parser = argparse.ArgumentParser(description="Trains a small network on handwritten digits inside one Numba function.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which the fastest counts (default: 3)")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.rounds < 1:
        parser.error("--epochs and --rounds must be at least 1")
    data, (images, digits) = digits_in_batches(options.epochs)
    results, table = {}, Table("trainer", "us per step", "test accuracy", "weights")
    for name, make in ways().items():
        weights, seconds = trained(make, data, options.rounds)
        accuracy = float((scores_of(weights, images)[1].argmax(axis=1) == digits).mean())
        results[name] = weights, seconds / len(data[2]), accuracy
        first = next(iter(results.values()))[0]
        equal = "equal to the last bit" if np.array_equal(weights, first) else "DIFFERENT"
        table.add_row(name, f"{seconds / len(data[2]) * 1e6:.1f}", f"{accuracy:.2%}", equal)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
