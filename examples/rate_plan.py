"""A learning-rate plan in three stages, for a network that soon knows its 600 handwritten digits by heart.

1. A large constant rate: a number.
2. The rate falls when the validation loss has not improved for some epochs, down to a bound: fastrms.schedules.Plateau.
3. From the best weights so far on, a small constant rate until the validation loss stops improving:
   fastrms.schedules.EarlyStopping, which restores the best weights of all stages.

The count of epochs without improvement has to be compared with a patience; a circulating sample tests `>= 0` and so lowers
the rate at every epoch.

Run with `python examples/rate_plan.py`; prints the end of each stage and draws fastrms-plan.png.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

from network import Network, batches

import fastrms
from fastrms.schedules import EarlyStopping, Plateau

LARGE, MIDDLE, SMALL = 1e-2, 1e-3, 3e-4  # the rates: of stage 1, at the end of stage 2, of stage 3
PATIENCE = 8  # of stage 3, in epochs


class Epoch(NamedTuple):
    """One line of the history."""

    stage: int
    rate: float
    training: float  # mean loss of the batches
    validation: float


class Trainer:
    """A 64-64-10 network, its optimizer and the history of its epochs."""

    def __init__(self, images, classes, validation, random):
        self.images, self.classes, self.validation, self.random = images, classes, validation, random
        self.network = Network((64, 64, 10), random)
        self.optimizer = fastrms.RMSProp(self.network.weights, lr=LARGE)
        self.optimizer.bind(self.network.gradients)
        self.history = []

    def epoch(self, stage, rate):
        """Train on every image once; returns the validation loss."""
        losses = []
        for batch in batches(32, len(self.images), self.random):
            losses.append(self.network.backward(self.images[batch], self.classes[batch]))
            self.optimizer.step()
        self.history.append(Epoch(stage, rate, float(np.mean(losses)), self.network.loss(*self.validation)))
        return self.history[-1].validation


def three_stages(trainer, first, most):
    """Make `first` epochs of stage 1, then the other stages of at most `most` epochs each; leaves the best weights."""
    optimizer = trainer.optimizer
    stopping = EarlyStopping(trainer.network.weights, patience=PATIENCE, optimizer=optimizer)
    for _ in range(first):
        stopping.update(trainer.epoch(1, LARGE))
    optimizer.lr = plateau = Plateau(LARGE, factor=0.5, patience=2, min_lr=MIDDLE)
    for _ in range(most):
        loss = trainer.epoch(2, plateau.rate)
        stopping.update(loss)
        if plateau.update(loss) and plateau.rate == MIDDLE:
            break
    stopping.restore()  # also the optimizer's averages of that epoch
    optimizer.lr = SMALL
    for _ in range(most):
        if stopping.update(trainer.epoch(3, SMALL)):
            break
    stopping.restore()


def draw(history, picture):
    """Draw the rate above and the losses below, with a line between stages and a dot at the epoch that was restored."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    epochs, (stages, rates, training, validation) = range(1, len(history) + 1), zip(*history, strict=True)
    above.step(epochs, rates, where="mid", color="black")
    above.set(ylabel="rate", yscale="log", title="1: large, 2: falls on a plateau, 3: small, with early stopping")
    below.plot(epochs, training, color="#0072B2", label="training")
    below.plot(epochs, validation, color="#D55E00", label="validation")
    best = int(np.argmin(validation))
    below.plot(epochs[best], validation[best], "o", color="#D55E00", label=f"restored: epoch {epochs[best]}")
    below.set(xlabel="epoch", ylabel="mean cross-entropy", yscale="log")
    below.legend(frameon=False, loc="lower left")
    for stage in (2, 3):
        for panel in (above, below):
            panel.axvline(stages.index(stage) + 0.5, color="0.6", linestyle="--")
    figure.savefig(picture, dpi=100)


def show(history, loss, accuracy):
    table = Table("stage", "epochs", "last rate", "last loss", "validation", "its least")
    for stage in (1, 2, 3):
        part = [epoch for epoch in history if epoch.stage == stage]
        least = min(epoch.validation for epoch in part)
        table.add_row(str(stage), str(len(part)), *(f"{value:.3g}" for value in [*part[-1][1:], least]))
    Console().print(table)
    Console().print(f"validation loss with the restored weights: {loss:.3g}; accuracy on other images: {accuracy:.1%}")


def parse(arguments):
    parser = argparse.ArgumentParser(description="Trains with a learning rate in three stages.")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--images", type=int, default=600, help="to train on, and as many to validate with (default: 600)")
    parser.add_argument("--first", type=int, default=15, help="epochs of stage 1 (default: 15)")
    parser.add_argument("--most", type=int, default=60, help="epochs of the other stages, at most (default: 60)")
    parser.add_argument("--picture", default="fastrms-plan.png", help="where it is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 50 <= options.images <= 800 or options.first < 1 or options.most < 1:
        parser.error("--images must be 50 to 800, --first and --most at least 1")
    return options


def main(arguments=None):
    """Train; returns the history and, with the restored weights, the validation loss and the accuracy on other images."""
    options = parse(arguments)
    images, digits = load_digits(return_X_y=True)
    split = {"train_size": options.images, "random_state": options.seed}
    images, others, digits, other_digits = train_test_split(
        (images / 16).astype(np.float32), digits, stratify=digits, **split
    )
    held, others, held_digits, other_digits = train_test_split(others, other_digits, stratify=other_digits, **split)
    trainer = Trainer(images, digits, (held, held_digits), np.random.default_rng(options.seed))
    three_stages(trainer, options.first, options.most)
    loss, accuracy = trainer.network.loss(held, held_digits), trainer.network.accuracy(others, other_digits)
    draw(trainer.history, options.picture)
    show(trainer.history, loss, accuracy)
    return trainer.history, loss, accuracy


if __name__ == "__main__":
    main()
