"""A two-layer network on scikit-learn's handwritten digits, its weights updated in place by fastrms.

All weights are slices of one flat array and all gradients slices of another, so that a step is one call on two
buffers that never move: `optimizer.bind(gradients)` once, `optimizer.step()` after every batch.

Run with `python examples/digits.py`; prints the test accuracy of each optimizer and draws fastrms-digits.png.
"""

import argparse
import sys

import numpy as np

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

import fastrms

PIXELS, HIDDEN, DIGITS = 64, 128, 10
BATCH = 32
PICTURE = "fastrms-digits.png"
OPTIMIZERS = {  # how each one is made, and whether it sees all images at every step
    "RMSProp": (lambda weights: fastrms.RMSProp(weights, lr=1e-3), False),
    "AdaGrad": (lambda weights: fastrms.AdaGrad(weights, lr=3e-2), False),
    "Adam": (lambda weights: fastrms.Adam(weights, lr=2e-3), False),
    "AdamW": (lambda weights: fastrms.AdamW(weights, lr=2e-3, weight_decay=0.05), False),
    "RProp": (lambda weights: fastrms.RProp(weights, lr=1e-3), True),
}


class Network:
    """64 pixels -> 128 tanh -> softmax over 10 digits; `weights` and `gradients` are flat, the layers views of them."""

    def __init__(self, random):
        shapes = ((PIXELS, HIDDEN), (HIDDEN,), (HIDDEN, DIGITS), (DIGITS,))
        size = sum(int(np.prod(shape)) for shape in shapes)
        self.weights = np.zeros(size, np.float32)
        self.gradients = np.zeros(size, np.float32)
        self.layers = slices(self.weights, shapes)
        self.layer_gradients = slices(self.gradients, shapes)
        for layer in (self.layers[0], self.layers[2]):
            layer[:] = random.standard_normal(layer.shape) / np.sqrt(len(layer))

    def forward(self, images):
        """Hidden activities and the probability of each digit."""
        first, first_bias, second, second_bias = self.layers
        hidden = np.tanh(images @ first + first_bias)
        scores = hidden @ second + second_bias
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)

    def backward(self, images, digits):
        """Fill `gradients` for the mean cross-entropy of these images; returns the loss."""
        hidden, probabilities = self.forward(images)
        rows = np.arange(len(digits))
        loss = -np.log(probabilities[rows, digits] + 1e-12).mean()
        probabilities[rows, digits] -= 1
        delta = probabilities / len(digits)
        first, first_bias, second, second_bias = self.layer_gradients
        np.matmul(hidden.T, delta, out=second)
        delta.sum(axis=0, out=second_bias)
        delta = delta @ self.layers[2].T * (1 - hidden**2)
        np.matmul(images.T, delta, out=first)
        delta.sum(axis=0, out=first_bias)
        return float(loss)

    def accuracy(self, images, digits):
        return float((self.forward(images)[1].argmax(axis=1) == digits).mean())


def slices(flat, shapes):
    """Views of consecutive parts of a flat array, in these shapes."""
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]


def digits_for(seed):
    """Images and digits to train on and to test with, split by the seed; pixels from 0 to 1."""
    images, digits = load_digits(return_X_y=True)
    return train_test_split((images / 16).astype(np.float32), digits, test_size=0.25, random_state=seed, stratify=digits)


def train(make, full_batch, seed, epochs):
    """Train; returns the mean loss of each epoch, and the accuracy on the test images."""
    train_images, test_images, train_digits, test_digits = digits_for(seed)
    random = np.random.default_rng(seed)
    network = Network(random)
    optimizer = make(network.weights)
    optimizer.bind(network.gradients)
    losses = []
    for _ in range(epochs):
        order = random.permutation(len(train_digits))
        batches = [order] if full_batch else np.array_split(order, len(order) // BATCH)
        epoch_losses = []
        for batch in batches:
            epoch_losses.append(network.backward(train_images[batch], train_digits[batch]))
            optimizer.step()
        losses.append(np.mean(epoch_losses))
    return losses, network.accuracy(test_images, test_digits)


def draw(losses):
    """Draw the loss of each epoch, averaged over the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
    for (name, runs), colour, dashes in zip(losses.items(), colours, ("-", "-", "-", "--", ":"), strict=True):
        mean = np.mean(runs, axis=0)
        panel.plot(np.arange(1, len(mean) + 1), mean, dashes, color=colour, label=name, linewidth=2)
    panel.set(xlabel="epoch", ylabel="training loss (mean cross-entropy)", yscale="log")
    panel.set_title("Handwritten digits, 64-128-10 network (RProp: one step an epoch)")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(PICTURE, dpi=150)


def show(console, accuracies):
    table = Table("optimizer", "test accuracy", "spread", caption=f"mean and standard deviation; {PICTURE} shows the loss")
    for name, values in accuracies.items():
        table.add_row(name, f"{np.mean(values):.2%}", f"{np.std(values):.2%}")
    console.print(table)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Trains a small network on handwritten digits with each optimizer.")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each optimizer (default: 5)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images (default: 40)")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    return options


def main(arguments=None):
    """Train with every optimizer; returns the test accuracies, one for each seed, by optimizer."""
    options = parse(arguments)
    console = Console()
    losses = {name: [] for name in OPTIMIZERS}
    accuracies = {name: [] for name in OPTIMIZERS}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(OPTIMIZERS) * options.seeds)
        for name, (make, full_batch) in OPTIMIZERS.items():
            progress.update(task, description=name)
            for seed in range(options.seeds):
                curve, accuracy = train(make, full_batch, seed, options.epochs)
                losses[name].append(curve)
                accuracies[name].append(accuracy)
                progress.advance(task)
    draw(losses)
    show(console, accuracies)
    return accuracies


if __name__ == "__main__":
    main()
