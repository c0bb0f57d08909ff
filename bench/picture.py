"""The picture of a run: time per element over size, one panel per rule, fastrms-bench.png and .svg."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .contenders import CEILING, FASTRMS, IN_PLACE, NAIVE, held_per_element
from .machine import in_words, threads

# Okabe and Ito's palette: told apart by colour-blind readers; the markers tell the lines apart without colour.
STYLES = {
    NAIVE: {"color": "#D55E00", "marker": "o"},
    IN_PLACE: {"color": "#E69F00", "marker": "s"},
    FASTRMS["numpy"]: {"color": "#56B4E9", "marker": "^"},
    FASTRMS["c"]: {"color": "#0072B2", "marker": "D", "linewidth": 2.4},
    CEILING: {"color": "#000000", "linestyle": "--", "linewidth": 1.2},
}
FILES = ("fastrms-bench.png", "fastrms-bench.svg")


def draw(results, machine):
    rules = results.rules()
    columns = 2 if len(rules) == 4 else len(rules)
    rows = -(-len(rules) // columns)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 1.4 + 4.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = grid.ravel()
    for panel, rule in zip(panels, rules, strict=True):
        draw_rule(panel, results, rule)
        draw_caches(panel, results, rule, machine["caches"])
    for panel in grid[:, 0]:
        panel.set_ylabel("nanoseconds per element")
    for panel in grid[-1]:
        panel.set_xlabel("elements (dotted: all buffers of the update fill that cache)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if columns > 1 else 3, frameon=False)
    figure.suptitle(f"One in-place update, {results.dtype}, {threads(machine)}\n{in_words(machine)}", fontsize=11)
    for name in FILES:
        figure.savefig(name, dpi=150)


def draw_rule(panel, results, rule):
    for name in results.contenders():
        points = [(size, results.per_element(rule, size, name)) for size in results.sizes()]
        measured = [(size, taken) for size, taken in points if taken is not None]
        panel.plot(*zip(*measured, strict=True), label=name, **{"markersize": 5, "linewidth": 1.6, **STYLES[name]})
    panel.set_title(rule)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(which="major", color="0.88")
    panel.spines[["top", "right"]].set_visible(False)


def draw_caches(panel, results, rule, caches):
    """A thin line at the size whose streams fill a cache."""
    sizes = results.sizes()
    for name, capacity in caches.items():
        size = capacity / held_per_element(rule, results.dtype)
        if sizes[0] < size < sizes[-1]:
            panel.axvline(size, color="0.5", linewidth=0.9, linestyle=":", zorder=0)
            panel.text(size, 0.99, f"{name} ", transform=panel.get_xaxis_transform(), ha="right", va="top", color="0.4")
