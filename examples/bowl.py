"""Down the bowl f(x, y) = x^2 + y^2: 50 steps of RMSProp, RProp, AdaGrad, Adam and momentum from one seeded start.

The set-up is that of a widely copied text: NumPy's legacy seed 1, bounds -1 to 1, RMSProp with rate 0.01, rho 0.99 and eps
1e-8 outside the root.  The trace printed there has an index error: a stale index makes both new coordinates start from the
old y, so its x after the first step is 0.54064896 instead of -0.06595602.  Its y column is right.  Both are printed here.

Run with `python examples/bowl.py`; draws fastrms-bowl.png.
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


class Momentum(fastrms.Optimizer):
    """Gradient descent with momentum, as torch.optim.SGD: velocity = momentum*velocity + grad, param -= lr*velocity."""

    defaults = {"lr": 0.01, "momentum": 0.9}
    state_names = ("velocity",)

    @staticmethod
    def coefficients(step, lr, momentum):
        return {"lr": lr, "momentum": momentum}

    @staticmethod
    def rule(param, grad, velocity, lr, momentum):
        velocity = momentum * velocity + grad
        return param - lr * velocity, velocity


COLOUR = "#D55E00"
OPTIMIZERS = {  # NumPy for Momentum: two numbers are not worth compiling its rule for
    "RMSProp": lambda point: fastrms.RMSProp(point, lr=0.01, rho=0.99, eps=1e-8),
    "RProp": lambda point: fastrms.RProp(point, lr=0.01),
    "AdaGrad": lambda point: fastrms.AdaGrad(point, lr=0.1),
    "Adam": lambda point: fastrms.Adam(point, lr=0.05),
    "Momentum": lambda point: Momentum(point, lr=0.03, momentum=0.8, backend="numpy"),
}


def bowl(x, y):
    return x**2 + y**2


def start_of(seed):
    return -1 + np.random.RandomState(seed).rand(2) * 2


def path(make, start, steps):
    """The points of a descent, the start first: an array of shape (steps + 1, 2)."""
    point, gradient = start.copy(), np.empty(2)
    optimizer = make(point)
    optimizer.bind(gradient)
    points = [start]
    for _ in range(steps):
        np.multiply(point, 2, out=gradient)
        optimizer.step()
        points.append(point.copy())
    return np.array(points)


def circulating_path(start, steps):
    """RMSProp with the index error: `point[1] - ...` where each coordinate's own `point - ...` belongs."""
    point, average, points = start, np.zeros(2), [start]
    for _ in range(steps):
        gradient = 2 * point
        average = 0.99 * average + 0.01 * gradient**2
        point = point[1] - 0.01 * gradient / (1e-8 + np.sqrt(average))
        points.append(point)
    return np.array(points)


def draw(paths, circulating, picture):
    """Draw each optimizer's path, on the surface and below that on the contours."""
    figure = Figure(figsize=(2.4 * len(paths), 4.8), layout="constrained")
    half = 1.1 * np.abs([*paths.values(), circulating]).max()
    x, y = np.meshgrid(*[np.linspace(-half, half, 41)] * 2)
    for column, (name, points) in enumerate(paths.items(), start=1):
        surface = figure.add_subplot(2, len(paths), column, projection="3d", title=name, computed_zorder=False)
        surface.plot_wireframe(x, y, bowl(x, y), color="0.7", linewidth=0.5, rcount=8, ccount=8, antialiased=False)
        surface.plot(*points.T, bowl(*points.T), ".-", color=COLOUR, linewidth=1, markersize=3)
        surface.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5), zticks=(0, 0.5))
        flat = figure.add_subplot(2, len(paths), column + len(paths), aspect="equal", xlabel="x", ylabel="y" * (column == 1))
        flat.contour(x, y, bowl(x, y), levels=6, colors="0.7", linewidths=0.5, antialiased=False)
        if name == "RMSProp":
            flat.plot(*circulating.T, ":", color="#0072B2", linewidth=1.5, label="circulating trace")
            flat.legend(loc="lower right", fontsize=8)
        flat.plot(*points.T, ".-", color=COLOUR, linewidth=1, markersize=4)
        flat.set(xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5), title=f"f = {bowl(*points[-1]):.0e} at the end")
    figure.savefig(picture, dpi=100)


def show(paths, circulating):
    right, console = paths["RMSProp"], Console()
    table = Table("step", "x", "y", "circulating x", "circulating y", title="RMSProp")
    for step in sorted({0, 1, 2, 3, 4, 5, 10, 20, len(right) - 1}):
        if step < len(right):
            table.add_row(str(step), *(f"{value:.8f}" for value in [*right[step], *circulating[step]]))
    console.print(table)
    console.print("The circulating trace starts both coordinates from y at every step; its y column is right.")
    table = Table("optimizer", "x", "y", "f(x, y)", title=f"after {len(right) - 1} steps")
    for name, points in paths.items():
        table.add_row(name, *(f"{value:.8f}" for value in points[-1]), f"{bowl(*points[-1]):.2e}")
    console.print(table)


def main(arguments=None):
    """Descend with every optimizer; returns the paths by optimizer, and the path of the circulating code."""
    parser = argparse.ArgumentParser(description="Descends x^2 + y^2 with every optimizer and draws the paths.")
    parser.add_argument("--seed", type=int, default=1, help="of the start (default: 1)")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    parser.add_argument("--picture", default="fastrms-bowl.png", help="where it is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    start = start_of(options.seed)
    paths = {name: path(make, start, options.steps) for name, make in OPTIMIZERS.items()}
    circulating = circulating_path(start, options.steps)
    draw(paths, circulating, options.picture)
    show(paths, circulating)
    return paths, circulating


if __name__ == "__main__":
    main()
