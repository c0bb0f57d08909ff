"""Linear regression y = w*x + b by RMSProp: mean-squared loss, its gradients by hand, a falling learning rate.

loss = mean((w*x + b - y)^2),  dw = 2 mean((w*x + b - y) x),  db = 2 mean(w*x + b - y)

RMSProp's step does not shrink with the gradient: at a constant rate the line goes on wavering around the best one by about
half that rate.  A rate that falls by 1 % at each step (any function of the step will do) takes it to least squares.

Run with `python examples/linear_regression.py`; prints both solutions and draws fastrms-regression.png.
"""

import argparse
import sys

import numpy as np

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "rich"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

import fastrms

SLOPE, INTERCEPT, NOISE = 1.7, -0.6, 0.5  # what the points are made from


def points(count, random):
    x = random.uniform(-2, 2, count)
    return x, SLOPE * x + INTERCEPT + NOISE * random.standard_normal(count)


def fill_gradient(line, gradient, x, y):
    """Write (dw, db) of the mean-squared loss at line = (w, b), and return the loss."""
    error = line[0] * x + line[1] - y
    gradient[:] = 2 * (error * x).mean(), 2 * error.mean()
    return float((error**2).mean())


def fit(x, y, steps):
    """Make these steps from (0, 0); returns (w, b) and the loss before each step."""
    line, gradient = np.zeros(2), np.empty(2)
    optimizer = fastrms.RMSProp(line, lr=lambda step: 0.1 * 0.99**step, rho=0.9)
    optimizer.bind(gradient)
    losses = []
    for _ in range(steps):
        losses.append(fill_gradient(line, gradient, x, y))
        optimizer.step()
    return line, losses


def draw(x, y, line, losses, least, picture):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, y, "o", color="#0072B2", markersize=4, alpha=0.6, label="data")
    ends = np.array([x.min(), x.max()])
    left.plot(ends, line[0] * ends + line[1], color="#D55E00", linewidth=2, label="RMSProp")
    left.set(xlabel="x", ylabel="y", title=f"w = {line[0]:.4f}, b = {line[1]:.4f}")
    left.legend(frameon=False)
    right.plot(np.array(losses) - least, color="#D55E00", linewidth=2)
    right.set(xlabel="step", ylabel="mean-squared loss above the least", yscale="log", title="RMSProp, rate 0.1 · 0.99^step")
    for panel in (left, right):
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=100)


def show(line, best):
    table = Table("", "w", "b", title="y = w x + b")
    table.add_row("made from", str(SLOPE), str(INTERCEPT))
    for name, (w, b) in {"least squares": best, "RMSProp": line}.items():
        table.add_row(name, f"{w:.6f}", f"{b:.6f}")
    table.add_row("difference", *(f"{x:.1e}" for x in np.abs(line - best)))
    Console().print(table)


def main(arguments=None):
    """Fit the line; returns (w, b) by RMSProp and by least squares."""
    parser = argparse.ArgumentParser(description="Fits a line by RMSProp, and compares it with least squares.")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default: 0)")
    parser.add_argument("--points", type=int, default=100, help="number of points (default: 100)")
    parser.add_argument("--steps", type=int, default=1000, help="RMSProp steps (default: 1000)")
    parser.add_argument("--picture", default="fastrms-regression.png", help="where it is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.points < 2 or options.steps < 1:
        parser.error("--points must be at least 2, --steps at least 1")
    x, y = points(options.points, np.random.default_rng(options.seed))
    line, losses = fit(x, y, options.steps)
    best, (least, *_), *_ = np.polyfit(x, y, 1, full=True)
    draw(x, y, line, losses, least / len(x), options.picture)
    show(line, best)
    return line, best


if __name__ == "__main__":
    main()
