"""What storage formats do to the loss: three networks on real data, with states and parameters in fewer bytes.

RMSProp and Adam train a network on scikit-learn's digits, one on 5,000 images of MNIST and one that predicts the next
character of Python's language reference, once with everything in float32 and once with each format, from the same weights
on the same batches.  The loss is the mean over the last fifth of the steps.  One more float32 run starts from weights that
are rounded to bf16: its distance from the first is what a change of nothing but the last bits makes.  At last the digits are
trained with gradients that are multiplied by a small number: RMSProp and Adam divide by it again, and only a format whose
range is too small shows it.

    python examples/formats.py            # a minute on one core; prints the tables, draws fastrms-formats.png
    python examples/formats.py --quick    # a try
"""

import argparse
import functools
import pydoc_data.topics
import sys
from typing import NamedTuple

import numpy as np

try:
    import ml_dtypes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from threadpoolctl import threadpool_limits
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "ml_dtypes", "rich", "threadpoolctl"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples,test]'")

import digits
import mnist
from network import Network, batches

import fastrms
from fastrms import formats

CONTEXT, WINDOWS = 6, 30_000  # characters that the text network sees; how many places of the text it is trained on
SEEN = "float32, forward in bf16"  # the run whose bits split16 must give
CONTROL = "float32, other start"  # weights that are rounded to bf16 once, before the first step
RUNS = {  # label: options of the optimizer, whether the parameters are bf16
    "float32": ({}, False),
    CONTROL: ({}, False),
    "bf16 states": ({"state_format": "bf16"}, False),
    "bf16 states, nearest": ({"state_format": "bf16", "rounding": "nearest"}, False),
    "q8 states": ({"state_format": "q8"}, False),
    "fp16 states": ({"state_format": "fp16"}, False),
    "bf16 parameters": ({"master": None, "rounding": "stochastic"}, True),
    "bf16 parameters, nearest": ({"master": None, "rounding": "nearest"}, True),
    "bf16 parameters, split16": ({"master": "split16"}, True),
    "bf16 parameters, split8": ({"master": "split8"}, True),
}
SCALES = (1, 0.1, 0.01, 0.001)  # by which the gradients of the digits are multiplied
SCALED = ("float32", "bf16 states", "fp16 states", "q8 states")
OPTIMIZERS = {"RMSProp": fastrms.RMSProp, "Adam": fastrms.Adam}


class Task(NamedTuple):
    """A network and its data.

    make : callable
        From a random generator to a network.
    data : callable
        To inputs and classes.
    batch, epochs : int
    rates : dict of float
        The highest learning rate of each optimizer; it rises for a tenth of the steps, then falls to 0 as a cosine does.
    """

    make: object
    data: object
    batch: int
    epochs: int
    rates: dict


@functools.cache
def handwritten():
    images, _, classes, _ = digits.digits_for(0)
    return images, classes


@functools.cache
def mnist_images():
    images, _, classes, _ = mnist.digits_for(0, 5000)
    return images, classes


@functools.cache
def text():
    """For some places of the language reference the characters before it, each a 1 among zeros, and the character there."""
    letters = np.frombuffer("".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    kinds, codes = np.unique(letters, return_inverse=True)
    places = np.random.default_rng(0).choice(len(codes) - CONTEXT, WINDOWS, replace=False)
    before = codes[places[:, None] + np.arange(CONTEXT)]
    return OneHot(before, len(kinds)), codes[places + CONTEXT]


class OneHot:
    """Rows of small integers; those that are asked for become rows of ones among zeros."""

    def __init__(self, codes, kinds):
        self.codes, self.kinds = codes, kinds
        self.width = codes.shape[1] * kinds

    def __getitem__(self, rows):
        codes = self.codes[rows]
        made = np.zeros((codes.size, self.kinds), np.float32)
        made[np.arange(codes.size), codes.ravel()] = 1
        return made.reshape(len(codes), self.width)


def text_network(random):
    inputs, _ = text()
    return Network((inputs.width, 96, inputs.kinds), random)


TASKS = {
    "digits": Task(digits.Network, handwritten, 32, 12, {"RMSProp": 1e-3, "Adam": 2e-3}),
    "MNIST": Task(lambda random: Network((784, 64, 32, 10), random), mnist_images, 64, 4, {"RMSProp": 1e-3, "Adam": 1e-3}),
    "text": Task(text_network, text, 128, 2, {"RMSProp": 1e-3, "Adam": 2e-3}),
}


def arrays(of):
    """A list of the weights or gradients of a network, which are a list or one flat array."""
    return of if isinstance(of, list) else [of]


def as_split16_shows(weights):
    """The bf16 part of float32 numbers, as float32."""
    high = formats.split16_high(weights.ravel().view(np.uint32))
    return (high << 16).view(np.float32).reshape(weights.shape)


def train(task, name, run, seed, epochs, grad_scale=1.0):
    """Train, with gradients times grad_scale; returns the loss of every step, the parameters as the optimizer has them, and
    the optimizer."""
    options, halves = ({}, False) if run == SEEN else RUNS[run]
    random = np.random.default_rng(seed)
    network, (inputs, classes) = task.make(random), task.data()
    seen = arrays(network.weights)
    if run in (CONTROL, SEEN):
        for weight in seen:
            weight[...] = weight.astype(ml_dtypes.bfloat16)
    apart = halves or run == SEEN  # the network sees what is made of the parameters
    params = [weight.astype(ml_dtypes.bfloat16 if halves else np.float32) for weight in seen] if apart else seen
    steps = epochs * len(batches(task.batch, len(classes), np.random.default_rng(0)))
    rate = fastrms.schedules.Cosine(task.rates[name], steps, warmup=steps // 10)
    optimizer = OPTIMIZERS[name](params, lr=rate, seed=seed, **options)
    optimizer.bind(arrays(network.gradients))
    losses = []
    for batch in (batch for _ in range(epochs) for batch in batches(task.batch, len(classes), random)):
        if apart:
            for weight, param in zip(seen, params, strict=True):
                weight[...] = as_split16_shows(param) if run == SEEN else param
        losses.append(network.backward(inputs[batch], classes[batch]))
        optimizer.step(grad_scale=grad_scale)
    return losses, params, optimizer


def final(losses):
    """The mean over the last fifth of the steps."""
    return float(np.mean(losses[-max(1, len(losses) // 5) :]))


def refuse_other_bits(task, name, seed, epochs, found):
    """AssertionError unless split16 gave every loss and every parameter of the float32 run that sees the same bf16."""
    losses, params, _ = found
    want, floats, _ = train(task, name, SEEN, seed, epochs)
    assert losses == want, "a loss of split16 is not that of float32"
    for param, number in zip(params, floats, strict=True):
        assert np.array_equal(param.astype(np.float32), as_split16_shows(number)), "a parameter of split16 differs"


def excess(results, task, name, run):
    """How far the final loss is above that of float32, in percent, for each seed."""
    found = results[task, name]
    return (np.array(found[run]) / np.array(found["float32"]) - 1) * 100


def rows(results, name):
    """The table of one optimizer: a row for each run, a column for each network."""
    made = [("stored", *TASKS)]
    for run in RUNS:
        cells = []
        for task in TASKS:
            if run == "float32":
                losses = results[task, name][run]
                cells.append(f"loss {np.mean(losses):.4f} ± {np.std(losses) / np.mean(losses):.1%}")
            else:
                over = excess(results, task, name, run)
                cells.append(f"{over.mean():+.2f} ± {over.std():.2f} ({abs(over).max():.2f})")
        made.append((run, *cells))
    return made


def scaled(seeds, epochs):
    """The final losses on the digits with gradients times each of SCALES, one for each seed, by (optimizer, run, scale)."""
    return {
        (name, run, scale): [final(train(TASKS["digits"], name, run, seed, epochs, scale)[0]) for seed in range(seeds)]
        for name in OPTIMIZERS
        for run in SCALED
        for scale in SCALES
    }


def scaled_rows(small):
    """The table of scaled(): a row for each optimizer and run, a column for each of SCALES."""
    made = [("stored", *(f"gradients x {scale:g}" for scale in SCALES))]
    for name in OPTIMIZERS:
        for run in SCALED:
            losses = [f"{np.mean(small[name, run, scale]):.4f}" for scale in SCALES]
            made.append((f"{name}, {run}", *losses))
    return made


def verdicts(results):
    """Sentences: which states are within 1 % of float32, and how often stochastic rounding of parameters beats nearest."""
    made = []
    for run in ("bf16 states", "bf16 states, nearest", "q8 states", "fp16 states"):
        means = {f"{name} on {task}": excess(results, task, name, run).mean() for task, name in results}
        outside = [f"{where} ({mean:+.2f} %)" for where, mean in means.items() if abs(mean) > 1]
        made.append(f"{run}: mean within 1 % of float32 in {len(means) - len(outside)} of {len(means)}"
                    + (f", not for {', '.join(outside)}" if outside else ""))  # fmt: skip
    pairs = [(s, n) for found in results.values()
             for s, n in zip(found["bf16 parameters"], found["bf16 parameters, nearest"], strict=True)]  # fmt: skip
    better = sum(s < n for s, n in pairs)
    made.append(
        f"bf16 parameters without master: stochastic rounding has the lower loss in {better} of {len(pairs)} trainings"
    )
    made.append("split16: every loss and every bf16 parameter has the bits of the float32 run that sees the same bf16")
    return made


def draw(results, path):
    """Draw the excess over float32 of every seed and its mean, a panel for each network and optimizer."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    names = [run for run in RUNS if run != "float32"]
    panels = figure.subplots(len(OPTIMIZERS), len(TASKS), sharex=True, sharey=True)
    for (task, name), panel in zip(((t, n) for n in OPTIMIZERS for t in TASKS), panels.flat, strict=True):
        panel.axvspan(-1, 1, color="0.92")
        panel.axvline(0, color="0.6", linewidth=1)
        for place, run in enumerate(names):
            over = excess(results, task, name, run)
            colour = "#D55E00" if run.endswith("nearest") else "#0072B2"
            panel.plot(over, np.full(len(over), place), "o", color=colour, markersize=4, alpha=0.4)
            panel.plot(over.mean(), place, "|", color=colour, markersize=16, markeredgewidth=2)
        panel.set_title(f"{name}, {task}", fontsize=10)
        panel.set_xscale("symlog", linthresh=2)
        panel.set_yticks(range(len(names)), names)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("final loss above float32's, % (each seed, and their mean; grey: within 1 %)", fontsize=10)
    figure.savefig(path, dpi=100)


def show(console, results, small):
    for name in OPTIMIZERS:
        show_table(console, name, rows(results, name))
    show_table(console, "Small gradients: loss on digits", scaled_rows(small))
    console.print("final loss above float32's, %: mean ± standard deviation over the seeds (largest magnitude)")
    for sentence in verdicts(results):
        console.print(f"* {sentence}", highlight=False)


def show_table(console, title, made):
    table = Table(*made[0], title=title, box=None)
    for row in made[1:]:
        table.add_row(*row)
    console.print(table)


def as_markdown(results, small):
    parts = [table_as_markdown(name, rows(results, name)) for name in OPTIMIZERS]
    parts.append("".join(f"* {sentence}.\n" for sentence in verdicts(results)))
    return "\n".join([*parts, table_as_markdown("Small gradients", scaled_rows(small))])


def table_as_markdown(title, made):
    made = [made[0], ["---"] + ["---:"] * (len(made[0]) - 1), *made[1:]]
    return f"## {title}\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in made)


def parse(arguments):
    parser = argparse.ArgumentParser(description="Trains three networks with states and parameters in storage formats.")
    parser.add_argument("--seeds", type=int, help="runs of each format (default: 5, with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="one epoch of each network")
    parser.add_argument("--picture", default="fastrms-formats.png", help="where it is drawn (default: %(default)s)")
    parser.add_argument("--markdown", help="a file to which the tables are written too")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 5)
    return options


def measure(seeds, quick, progress):
    """The final losses, one for each seed, by (task, optimizer) and run."""
    results = {(task, name): {run: [] for run in RUNS} for task in TASKS for name in OPTIMIZERS}
    bar = progress.add_task("", total=len(results) * len(RUNS) * seeds)
    for (task, name), found in results.items():
        epochs = 1 if quick else TASKS[task].epochs
        for seed in range(seeds):
            for run in RUNS:
                progress.update(bar, description=f"{task}, {name}, {run}", advance=1)
                trained = train(TASKS[task], name, run, seed, epochs)
                found[run].append(final(trained[0]))
                if run == "bf16 parameters, split16":
                    refuse_other_bits(TASKS[task], name, seed, epochs, trained)
    return results


def main(arguments=None):
    """Train; returns the final losses, one for each seed, by (task, optimizer) and run."""
    options, console = parse(arguments), Console()
    with threadpool_limits(1), Progress(console=console, transient=True) as progress:
        results = measure(options.seeds, options.quick, progress)
        small = scaled(options.seeds, 1 if options.quick else TASKS["digits"].epochs)
    show(console, results, small)
    if options.markdown:
        with open(options.markdown, "w") as file:
            file.write(as_markdown(results, small))
    draw(results, options.picture)
    return results


if __name__ == "__main__":
    main()
