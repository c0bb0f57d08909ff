"""The pictures of a run, each as .png and .svg: time per element and GB/s over size, and speed-up bars."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .contenders import CEILINGS, DIVIDER, FASTRMS, IN_PLACE, NAIVE, ON_LAYERS, STREAMS
from .machine import in_words, threads
from .problem import held_per_element
from .report import number, size_name, spread

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers tell the lines apart without colour.
STYLES = {
    NAIVE: {"color": "#D55E00", "marker": "o"},
    IN_PLACE: {"color": "#E69F00", "marker": "s"},
    FASTRMS["numpy"]: {"color": "#56B4E9", "marker": "^"},
    FASTRMS["numba"]: {"color": "#009E73", "marker": "v"},
    **{FASTRMS[way]: {"color": "#009E73", "marker": "v"} for way in ON_LAYERS},
    FASTRMS["c"]: {"color": "#0072B2", "marker": "D", "linewidth": 2.4},
    STREAMS: {"color": "#000000", "linestyle": "--", "linewidth": 1.2},
    DIVIDER: {"color": "#000000", "linestyle": ":", "linewidth": 1.2},
}
PEER_MARKERS = "xP*hpd<>1"
BARS = 4  # the most sizes in the picture of speed-ups


def draw(results, machine):
    """Write all pictures; returns their names."""
    lines = {"time": (results.per_element, "nanoseconds per element"), "bandwidth": (results.bandwidth, "GB/s")}
    written = []
    for what, (quantity, label) in lines.items():
        written += save(draw_lines(results, machine, quantity, label), what)
    return written + save(draw_bars(results, machine), "speedup")


def save(figure, what):
    names = [f"fastrms-bench-{what}.{kind}" for kind in ("png", "svg")]
    for name in names:
        figure.savefig(name, dpi=150)
    return names


def grid(results, machine, title):
    """(figure, grid of panels), one panel per rule."""
    count = len(results.rules())
    columns = 2 if count == 4 else count
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 1.4 + 4.0 * rows), layout="constrained")
    figure.suptitle(f"{title}, {results.dtype}, {threads(machine)}\n{in_words(machine)}", fontsize=11)
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def draw_lines(results, machine, quantity, label):
    figure, panels = grid(results, machine, "One in-place update")
    for panel, rule in zip(panels.ravel(), results.rules(), strict=True):
        draw_rule(panel, results, rule, quantity)
        draw_caches(panel, results, rule, machine["caches"])
    for panel in panels[:, 0]:
        panel.set_ylabel(label)
    for panel in panels[-1]:
        panel.set_xlabel("elements (dotted: all buffers of the update fill that cache)")
    handles = {}
    for panel in panels.ravel():
        handles.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    legend = {"loc": "outside lower center", "ncols": min(3 * panels.shape[1], len(handles)), "frameon": False}
    figure.legend(handles.values(), handles.keys(), **legend)
    return figure


def style(results, name):
    if name in STYLES:
        return STYLES[name]
    place = results.peers().index(name)
    return {"color": f"{0.35 + 0.05 * place:.2f}", "marker": PEER_MARKERS[place], "linewidth": 1.0}


def draw_rule(panel, results, rule, quantity):
    for name in results.contenders(rule):
        points = [(size, quantity(rule, size, name)) for size in results.sizes()]
        measured = [(size, value) for size, value in points if value is not None]
        panel.plot(*zip(*measured, strict=True), label=name, **{"markersize": 5, "linewidth": 1.6, **style(results, name)})
    panel.set_title(rule)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(which="major", color="0.88")
    panel.spines[["top", "right"]].set_visible(False)


def draw_caches(panel, results, rule, caches):
    """Draw a thin line at each size whose buffers just fill a cache."""
    sizes = results.sizes()
    for name, capacity in caches.items():
        size = capacity / held_per_element(rule, results.dtype)
        if sizes[0] < size < sizes[-1]:
            panel.axvline(size, color="0.5", linewidth=0.9, linestyle=":", zorder=0)
            panel.text(size, 0.99, f"{name} ", transform=panel.get_xaxis_transform(), ha="right", va="top", color="0.4")


def draw_bars(results, machine):
    """How many times as fast the best of fastrms is as each other contender, at a few sizes."""
    figure, panels = grid(results, machine, "How many times as fast fastrms makes one in-place update")
    sizes = spread(results.sizes(), BARS)
    for panel, rule in zip(panels.ravel(), results.rules(), strict=True):
        draw_rule_bars(panel, results, rule, sizes)
    handles, labels = panels.ravel()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=BARS, frameon=False)
    return figure


def draw_rule_bars(panel, results, rule, sizes):
    own = FASTRMS["c"] if FASTRMS["c"] in results.contenders(rule) else FASTRMS["numpy"]
    others = [name for name in results.contenders() if name not in (*CEILINGS, own)]
    height = 0.8 / len(sizes)
    for place, size in enumerate(sizes):
        times = [results.times(rule, size, other, own) or 0 for other in others]
        at = [row + (place - (len(sizes) - 1) / 2) * height for row in range(len(others))]
        bars = panel.barh(at, times, height, label=f"{size_name(size)} elements", color=f"C{place}")
        panel.bar_label(bars, [f"{number(value)}x" if value else "" for value in times], fontsize=6, padding=2)
    panel.set_title(f"{rule}: {own}")
    panel.set_yticks(range(len(others)), others)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.axvline(1, color="0.3", linewidth=0.9)
    panel.set_ylim(len(others) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)
