"""The results for people: rich tables, the README's block and the JSON file."""

import json
import re
from datetime import date
from pathlib import Path

from rich.table import Table

from .contenders import CEILING, FASTRMS, IN_PLACE, NAIVE, NAMES, PLACEMENT
from .machine import in_words, software

README = Path("README.md")
LABELS_WIDTH, COLUMN_WIDTH = 36, 9
README_SIZES = 6


def size_name(size):
    """2^20 for a large power of two, the number itself otherwise."""
    return f"2^{size.bit_length() - 1}" if size >= 4096 and size & (size - 1) == 0 else str(size)


def number(value):
    """Three significant digits, for reading."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measures(results):
    """(title, quantity, contenders) of each section of a table."""
    fast = list(FASTRMS.values())
    return (
        ("ns per element", results.per_element, NAMES),
        ("GB/s", results.bandwidth, NAMES),
        ("times naive", results.over_naive, (IN_PLACE, *fast)),
        ("times in-place", results.over_in_place, fast),
        ("% of ceiling", results.share_of_ceiling, fast),
    )


def tables(results, rule, width):
    """The tables of one rule, split where the sizes do not fit into `width`."""
    sizes = results.sizes()
    columns = max(1, (width - LABELS_WIDTH) // COLUMN_WIDTH)
    return [table(results, rule, sizes[k : k + columns]) for k in range(0, len(sizes), columns)]


def table(results, rule, sizes):
    shown = Table(title=f"{rule}, {results.dtype}", title_justify="left", title_style="bold")
    shown.add_column("")
    shown.add_column("elements")
    for size in sizes:
        shown.add_column(size_name(size), justify="right", min_width=5)
    for title, quantity, names in measures(results):
        for name in (name for name in results.contenders() if name in names):
            style = "bold" if name == FASTRMS["c"] else "dim" if name == CEILING else None
            cells = [number(quantity(rule, size, name)) for size in sizes]
            if any(cells):
                shown.add_row(title, name, *cells, style=style)
                title = ""
        shown.add_section()
    return shown


def header(machine, placement):
    return f"{in_words(machine)}\n{software(machine)}\nplacement: {placement}"


def write_json(path, results, machine, clocks, command):
    """Everything that was measured, in nanoseconds per call."""
    content = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine,
        "placement": PLACEMENT,
        "dtype": results.dtype,
        "empty_call_ns": clocks,
        "results": [
            {"rule": rule, "size": size, "contender": contender, **timing._asdict()}
            for (rule, size, contender), timing in results.timings.items()
        ],
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def check_readme(path, name):
    """ValueError where the block to rewrite is missing."""
    begin, end = markers(name)
    if not path.exists() or not re.search(f"{begin}.*{end}", path.read_text(), re.DOTALL):
        raise ValueError(f"{path} needs the lines {begin} and {end}: the table goes between them")


def write_readme(path, name, text):
    """Put text between the markers of the block `name`."""
    begin, end = markers(name)
    block = f"{begin}\n{text}\n{end}"
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: block, path.read_text(), flags=re.DOTALL))


def markers(name):
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def markdown(results, machine, command):
    """One table: nanoseconds per element, and how many times as fast as naive NumPy."""
    sizes = spread(results.sizes(), README_SIZES)
    lines = [
        f"Nanoseconds per element ({results.dtype}; in brackets: times as fast as naive NumPy), one column per size:",
        "",
        f"| rule | | {' | '.join(map(size_name, sizes))} |",
        f"|---|---|{'---:|' * len(sizes)}",
    ]
    for rule in results.rules():
        for name in results.contenders():
            cells = [markdown_cell(results, rule, size, name) for size in sizes]
            lines.append(f"| {rule} | {name} | {' | '.join(cells)} |")
    lines += ["", f"{in_words(machine)}; {software(machine)}; {date.today().isoformat()}; `{command}`."]
    lines += [f"Placement: {PLACEMENT}."]
    return "\n".join(lines)


def markdown_cell(results, rule, size, name):
    taken = number(results.per_element(rule, size, name))
    if name in (NAIVE, CEILING) or not taken:
        return taken
    cell = f"{taken} ({number(results.over_naive(rule, size, name))}x)"
    return f"**{cell}**" if name == FASTRMS["c"] else cell


def spread(values, count):
    """At most `count` of the values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]
