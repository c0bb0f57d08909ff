"""The project's target figures, each measured in interleaved runs: `python -m bench.figures SET [--docs]`.

numpy: against NumPy, one thread.   machine: on all cores, against the ceilings and the other libraries installed.
step: on all cores, what clipping, looking for nonfinite gradients, zeroing and streaming add or gain.
flat: FlatBuffer against separate arrays, and huge pages against small ones, one thread.
numba: the Numba backend against the C backend, on one thread and on all.
"""

import argparse
import sys
import time
from datetime import date
from importlib import import_module
from typing import NamedTuple

try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "rich":
        raise
    sys.exit("rich is missing, which the benchmark needs: pip install -e '.[bench]'")

import fastrms

from . import machine, report
from .check import WrongContender
from .timing import clock


class Figure(NamedTuple):
    """One row: what was measured, the target and the measurement in words, and whether the target is reached."""

    what: str
    target: str
    measured: str
    ok: bool


def at_least(what, times, target):
    return Figure(what, f">= {target}x", f"{times:.2f}x" if times < 2 else f"{times:.1f}x", times >= target)


def at_most(what, times, target):
    return Figure(what, f"<= {target}x", f"{times:.2f}x", times <= target)


def share(what, percent, target):
    return Figure(what, f">= {target} %", f"{percent:.1f} %", percent >= target)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description="Measures the target figures.")
    sets = ("numpy", "machine", "step", "flat", "numba")
    parser.add_argument("set", nargs="?", choices=sets, default="numpy", help="which (default: numpy)")
    parser.add_argument("--docs", "--readme", action="store_true", help=f"rewrite their table in {report.PAGE}")
    options = parser.parse_args()
    if "c" not in fastrms.available_backends():
        sys.exit("the figures are those of the C backend, and fastrms was built without its C extension")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    facts, figures = measure(options.set, console)
    if options.docs:
        report.write_page(report.PAGE, f"figures-{options.set}", markdown(options.set, facts, figures))


def measure(name, console):
    """Measure and print one set; returns (facts of the machine, figures)."""
    chosen = import_module(f".figures_{name}", __package__)
    facts = machine.describe() | chosen.prepare()
    start, first_clock, figures = time.perf_counter(), clock(), []
    console.print(f"{machine.in_words(facts)}\n{machine.software(facts)}\nplacement: {chosen.PLACED}")
    try:
        for measurement in track(chosen.MEASUREMENTS, "measuring", console=console, transient=True):
            figures += measurement()
    except WrongContender as error:
        sys.exit(str(error))
    table = Table("what", "target", "measured", "ok", caption="float32; times: minima of interleaved rounds")
    for figure in figures:
        table.add_row(*figure[:3], "yes" if figure.ok else "NO", style=None if figure.ok else "bold red")
    console.print(table)
    console.print(f"empty Python call: {first_clock:.0f} ns at the start, {clock():.0f} ns at the end")
    console.print(f"{time.perf_counter() - start:.0f} s")
    return facts, figures


def markdown(name, facts, figures):
    command = f"`python -m bench.figures {name} --docs`"
    return "\n".join(
        ["| what | target | measured |", "| --- | ---: | ---: |"]
        + [f"| {f.what} | {f.target} | {f.measured if f.ok else f'**{f.measured}, missed**'} |" for f in figures]
        + ["", f"{machine.in_words(facts)}; {machine.software(facts)}; {date.today().isoformat()}; {command}."]
    )


if __name__ == "__main__":
    main()
