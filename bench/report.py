"""The results for people: rich tables, the blocks of docs/performance.md and the JSON file."""

import json
import re
from datetime import date
from pathlib import Path

from rich.table import Table

from . import peers
from .contenders import CEILINGS, DIVIDER, FASTRMS, IN_PLACE, NAIVE
from .machine import in_words, software
from .problem import IN_WORDS, PLACEMENTS, WELL_PLACED
from .results import ABOVE

PAGE = Path("docs/performance.md")
LABELS_WIDTH, COLUMN_WIDTH = 36, 9
PAGE_SIZES = 6
LEGEND = f"""\
naive NumPy: the formula of the textbook, which makes temporary arrays.  in-place NumPy: the same with out= and two scratch
arrays.  fastrms c, numba, numpy: opt.step() on this backend, with bound gradients.  The NumPy backend is for machines
without C and Numba; in cache it is slower than naive NumPy.
streams: a C loop of one addition per stream, the fastest of several orders.  divider: the rule's square root and division
on data in L1.  No update can be faster than the slower of the two, the ceiling; up to {100 * ABOVE:.0f} % of it are noise.
All times are minima over interleaved rounds, and "times naive" and "times in-place" are ratios of these minima.  GB/s: the
bytes that the rule must move, over the time taken."""


def size_name(size):
    """A large power of two as 2^20, any other size as the number itself."""
    return f"2^{size.bit_length() - 1}" if size >= 4096 and size & (size - 1) == 0 else str(size)


def clocks_in_words(clocks):
    """What an empty Python call took, before and after what was measured."""
    return f"{clocks[0]:.0f} ns at the start, {clocks[1]:.0f} ns at the end; if they differ, the machine changed its speed"


def number(value):
    """Three significant digits, for reading."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measures(results, rule):
    """(title, quantity, contenders) of each section of a table."""
    names = results.contenders(rule)
    updates = [name for name in names if name not in CEILINGS]
    return (
        ("ns per element", results.per_element, names),
        ("GB/s", results.bandwidth, [name for name in names if name != DIVIDER]),
        ("times naive", results.over_naive, [name for name in updates if name != NAIVE]),
        ("times in-place", results.over_in_place, [name for name in updates if name not in (NAIVE, IN_PLACE)]),
        ("% of ceiling", results.share_of_ceiling, [name for name in updates if name not in (NAIVE, IN_PLACE)]),
    )


def tables(results, rule, width):
    """The tables of one rule, split where the sizes do not fit into `width`."""
    sizes = results.sizes()
    columns = max(1, (width - LABELS_WIDTH) // COLUMN_WIDTH)
    return [table(results, rule, sizes[k : k + columns]) for k in range(0, len(sizes), columns)]


def table(results, rule, sizes):
    absent = [f"{name}: {reason}" for (where, name), reason in results.reasons.items() if where == rule]
    shown = Table(title=f"{rule}, {results.dtype}", title_justify="left", title_style="bold", caption="\n".join(absent))
    shown.caption_justify = "left"
    shown.add_column("")
    shown.add_column("elements")
    for size in sizes:
        shown.add_column(size_name(size), justify="right", min_width=5)
    for title, quantity, names in measures(results, rule):
        for name in names:
            style = "bold" if name == FASTRMS["c"] else "dim" if name in CEILINGS else None
            cells = [number(quantity(rule, size, name)) for size in sizes]
            if any(cells):
                shown.add_row(title, name, *cells, style=style)
                title = ""
        shown.add_section()
    return shown


def placement_rows(results):
    """(rule, size, contender, nanoseconds per element in each placement) where more than one was measured."""
    placed = results[WELL_PLACED]
    size = max((size for other in results.values() if other is not placed for size in other.sizes()), default=None)
    for rule in placed.rules():
        for name in (name for name in placed.contenders(rule) if name not in CEILINGS):
            yield rule, size, name, [results[where].per_element(rule, size, name) for where in PLACEMENTS]


def placement_table(results):
    explained = "\n".join(f"{where}: {words}" for where, words in IN_WORDS.items() if where != WELL_PLACED)
    shown = Table(title="placement: ns per element", title_justify="left", title_style="bold", caption=explained)
    shown.caption_justify = "left"
    for column in ("rule", "elements", "contender", *PLACEMENTS):
        shown.add_column(column, justify="right" if column in PLACEMENTS else "left")
    for rule, size, name, times in placement_rows(results):
        shown.add_row(rule, size_name(size), name, *map(number, times), style="bold" if name == FASTRMS["c"] else None)
    return shown


def footnotes(results):
    """What readers must know of the peers that took part."""
    return [f"{name}: {note}." for name, note in peers.NOTES.items() if name in results.peers()]


def header(machine, placed=IN_WORDS[WELL_PLACED]):
    return f"{in_words(machine)}\n{software(machine)}\nplacement: {placed}"


def complaints(results):
    """A sentence on each measurement that cannot be right, and what to do about it."""
    return [
        f"DISTURBED: {name}, {rule}, {size_name(size)} elements: {results.share_of_ceiling(rule, size, name):.0f} % of the "
        f"{results.nearer_ceiling(rule, size)} ceiling, where at most {100 * ABOVE:.0f} % are possible: the machine changed "
        f"its speed or did other work while the two were measured; run this again on an idle machine"
        for rule, size, name in results.above_ceiling()
    ]


def write_json(path, results, machine, clocks, command):
    """Write everything that was measured, in nanoseconds per call."""
    content = {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine,
        "placements": IN_WORDS,
        "dtype": results[WELL_PLACED].dtype,
        "empty_call_ns": clocks,
        "invalid": complaints(results[WELL_PLACED]),
        "results": [
            {"placement": where, "rule": rule, "size": size, "contender": name, "way": measured.ways[rule, size, name]}
            | timing._asdict()
            for where, measured in results.items()
            for (rule, size, name), timing in measured.timings.items()
        ],
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def check_page(path, name):
    """ValueError where the block to rewrite is missing."""
    begin, end = markers(name)
    if not path.exists() or not re.search(f"{begin}.*{end}", path.read_text(), re.DOTALL):
        raise ValueError(f"{path} needs the lines {begin} and {end}: the table goes between them")


def write_page(path, name, text):
    """Put text between the markers of the block `name`."""
    begin, end = markers(name)
    block = f"{begin}\n{text}\n{end}"
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: block, path.read_text(), flags=re.DOTALL))


def markers(name):
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def markdown(results, machine, clocks, command):
    """Two tables: nanoseconds per element with the ratios over both NumPy baselines, and the placements."""
    placed = results[WELL_PLACED]
    sizes = spread(placed.sizes(), PAGE_SIZES)
    lines = [
        f"Nanoseconds per element ({placed.dtype}; in brackets: times as fast as naive and as in-place NumPy), one column "
        "per size. Last row per rule: how close fastrms (C) comes to the hardware limit that binds.",
        "",
        f"| rule | | {' | '.join(map(size_name, sizes))} |",
        f"|---|---|{'---:|' * len(sizes)}",
    ]
    for rule in placed.rules():
        for name in placed.contenders(rule):
            cells = [markdown_cell(placed, rule, size, name) for size in sizes]
            lines.append(f"| {rule} | {name} | {' | '.join(cells)} |")
        shares = [share_in_words(placed, rule, size) for size in sizes]
        lines.append(f"| {rule} | share | {' | '.join(shares)} |")
    lines += ["", *markdown_placements(results), "", *(f"* {line}" for line in footnotes(placed)), "", *complaints(placed)]
    lines += [f"{in_words(machine)}; {software(machine)}; {date.today().isoformat()}; `{command}`."]
    lines += [f"An empty Python call took {clocks[0]:.0f} ns at the start and {clocks[1]:.0f} ns at the end of the run."]
    return "\n".join(lines)


def markdown_cell(results, rule, size, name):
    taken = number(results.per_element(rule, size, name))
    if name == NAIVE or name in CEILINGS or not taken:
        return taken
    over = [results.over_naive(rule, size, name)]
    if name != IN_PLACE:
        over.append(results.over_in_place(rule, size, name))
    cell = f"{taken} ({', '.join(f'{number(times)}x' for times in over)})"
    return f"**{cell}**" if name == FASTRMS["c"] else cell


def share_in_words(results, rule, size):
    share = results.share_of_ceiling(rule, size, FASTRMS["c"])
    return f"{share:.0f} % of {results.nearer_ceiling(rule, size)}" if share else ""


def markdown_placements(results):
    rows = list(placement_rows(results))
    lines = [
        f"<details><summary>Placement, {size_name(rows[0][1])} elements, nanoseconds per element</summary>",
        "",
        f"| rule | | {' | '.join(PLACEMENTS)} |",
        f"|---|---|{'---:|' * len(PLACEMENTS)}",
    ]
    lines += [f"| {rule} | {name} | {' | '.join(map(number, times))} |" for rule, _, name, times in rows]
    return [*lines, "", *(f"* *{where.capitalize()}*: {words}." for where, words in IN_WORDS.items()), "", "</details>"]


def spread(values, count):
    """At most `count` of the values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(k * (len(values) - 1) / (count - 1))] for k in range(count)]
