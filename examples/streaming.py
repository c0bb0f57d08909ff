"""A network on scikit-learn's handwritten digits whose weights are updated while its backward pass still runs.

The gradient of each layer is computed into one scratch array, the same for all layers, and `opt.streaming()` updates that
layer at once, while the gradient is in cache: no array holds all gradients.  The weights are those of whole steps, to
the last bit.

Run with `python examples/streaming.py`; prints the time of a batch and the test accuracy for either kind of step.
"""

import argparse
import sys
import time
from itertools import pairwise

import numpy as np

try:
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

import fastrms

PIXELS, DIGITS, BATCH, LEARNING_RATE = 64, 10, 64, 1e-4


def new_weights(hidden, layers):
    """Weight matrices by name; no biases."""
    random, sizes = np.random.default_rng(0), [PIXELS, *[hidden] * layers, DIGITS]
    return {
        f"w{k}": (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        for k, shape in enumerate(pairwise(sizes))
    }


def forward(weights, images):
    """The activities of every layer; the last ones are the scores of the digits."""
    activities = [images]
    for name, matrix in weights.items():
        values = activities[-1] @ matrix
        activities.append(values if name == list(weights)[-1] else np.tanh(values))
    return activities


def backward(weights, activities, digits, scratch):
    """Yield (name, gradient of the mean cross-entropy) of each layer, the last layer first.  scratch(name) is the array for
    the gradient; the caller may change the weights of a layer as soon as it has its gradient."""
    delta = np.exp(activities[-1] - activities[-1].max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(digits)), digits] -= 1
    delta /= len(digits)
    for k, name in reversed(list(enumerate(weights))):
        gradient = np.matmul(activities[k].T, delta, out=scratch(name))
        if k:
            delta = (delta @ weights[name].T) * (1 - activities[k] ** 2)
        yield name, gradient


def train_whole(weights, batches):
    """Train with whole steps: all gradients first, then one step."""
    optimizer = fastrms.RMSProp(weights, lr=LEARNING_RATE)
    gradients = {name: np.empty_like(matrix) for name, matrix in weights.items()}
    optimizer.bind(gradients)
    for images, digits in batches:
        for _ in backward(weights, forward(weights, images), digits, gradients.get):
            pass
        optimizer.step()


def train_streamed(weights, batches):
    """Train with streamed steps: each layer is updated as soon as its gradient is there."""
    optimizer = fastrms.RMSProp(weights, lr=LEARNING_RATE)
    memory = np.empty(max(matrix.size for matrix in weights.values()), np.float32)

    def scratch(name):
        return memory[: weights[name].size].reshape(weights[name].shape)

    for images, digits in batches:
        with optimizer.streaming() as s:
            for name, gradient in backward(weights, forward(weights, images), digits, scratch):
                s.step(name, gradient)


def digits_in_batches(epochs):
    """Batches of training images and digits in random order; test images and digits."""
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split((images / 16).astype(np.float32), digits, test_size=0.25, random_state=0, stratify=digits)
    train_images, test_images, train_digits, test_digits = parts
    random = np.random.default_rng(1)
    orders = [random.permutation(len(train_digits)) for _ in range(epochs)]
    chosen = [order[k : k + BATCH] for order in orders for k in range(0, len(order), BATCH)]
    return [(train_images[batch], train_digits[batch]) for batch in chosen], (test_images, test_digits)


def main(arguments=None):
    """Train either way; returns way -> (weights, seconds per batch, test accuracy)."""
    parser = argparse.ArgumentParser(description="Trains a network on digits with updates inside the backward pass.")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images (default: 5)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the hidden layers (default: 512)")
    parser.add_argument("--layers", type=int, default=3, help="hidden layers (default: 3)")
    options = parser.parse_args(arguments)
    if min(options.epochs, options.hidden, options.layers) < 1:
        parser.error("--epochs, --hidden and --layers must be at least 1")
    batches, (images, digits) = digits_in_batches(options.epochs)
    results, table = {}, Table("the step", "ms per batch", "test accuracy", "weights")
    for way, train in {"whole": train_whole, "streamed": train_streamed}.items():
        weights = new_weights(options.hidden, options.layers)
        start = time.perf_counter()
        train(weights, batches)
        seconds = (time.perf_counter() - start) / len(batches)
        accuracy = float((forward(weights, images)[-1].argmax(axis=1) == digits).mean())
        results[way] = weights, seconds, accuracy
        first = results["whole"][0]
        equal = all(np.array_equal(weights[name], first[name]) for name in weights)
        words = "equal to the last bit" if equal else "DIFFERENT"
        table.add_row(way, f"{seconds * 1e3:.2f}", f"{accuracy:.2%}", words)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
