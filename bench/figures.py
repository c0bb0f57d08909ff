"""The project's target figures, each measured in interleaved runs: `python -m bench.figures SET [--docs]`.

numpy: against NumPy, one thread, in rounds with NumPy alone.   machine: on two threads, against the ceilings, the other
libraries installed and naive NumPy, in rounds with all of them.
step: on all cores, what clipping, looking for nonfinite gradients, zeroing and streaming add or gain.
flat: FlatBuffer against separate arrays, and huge pages against small ones, one thread.
numba: the Numba backend against the C backend, on one thread and on all.
torch: steps of fastrms.torch and fastrms on torch tensors against torch.optim; --docs writes into docs/torch.md.
clients: the step's share of the training time in stable-baselines3, with its optimizers and with ours; --docs as torch.
formats: updates in bf16 and 8 bits against float32, bitsandbytes, torchao and prime-rl; --docs writes table and picture in
docs/formats.md.
shards: steps of fastrms.torch on DTensors in 2 and 4 processes against torch.optim; --docs writes into docs/shards.md.
What machine and formats measure is stored for each machine in bench/machines, and --docs writes the table of all machines.
"""

import argparse
import sys
import time
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "rich":
        raise
    sys.exit("rich is missing, which the benchmark needs: pip install -e '.[bench]'")

import fastrms

from . import machine, machines, report
from .check import WrongContender
from .timing import clock

PAGES = {"torch": Path("docs/torch.md"), "clients": Path("docs/torch.md"), "shards": Path("docs/shards.md"),
         "formats": Path("docs/formats.md")}  # fmt: skip
PICTURES = {"formats": Path("docs/formats-bytes.png")}


class Figure(NamedTuple):
    """One row: what was measured, the target and the measurement in words, and whether the target is reached.  at_most:
    the measurement that the hardware would allow.  beside: what was compared, where that differs between machines."""

    what: str
    target: str
    measured: str
    ok: bool
    at_most: str = ""
    beside: str = ""


def times_as_fast(times):
    return f"{times:.2f}x" if times < 2 else f"{times:.1f}x"


def at_least(what, times, target):
    return Figure(what, f">= {target}x", times_as_fast(times), times >= target)


def at_most(what, times, target):
    return Figure(what, f"<= {target}x", f"{times:.2f}x", times <= target)


def share(what, percent, target):
    return Figure(what, f">= {target} %", f"{percent:.1f} %", percent >= target)


def main(arguments=None):
    in_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__, formatter_class=in_lines)
    sets = ("numpy", "machine", "step", "flat", "numba", "torch", "clients", "shards", "formats")
    parser.add_argument("set", nargs="?", choices=sets, default="numpy", help="which (default: numpy)")
    parser.add_argument("--docs", "--readme", action="store_true", help=f"rewrite their table in {report.PAGE}")
    parser.add_argument("--stored", action="store_true", help="--docs without measuring: from bench/machines")
    options = parser.parse_args(arguments)
    if options.stored and not (options.set in machines.SETS and options.docs):
        parser.error(f"--stored goes with {' --docs or '.join(machines.SETS)} --docs: only those figures are stored")
    if not options.stored:
        measured = measure_set(options)
    if options.docs:
        text = machines.markdown(options.set) if options.set in machines.SETS else markdown(options.set, *measured)
        page = PAGES.get(options.set, report.PAGE)
        report.write_page(page, f"figures-{options.set}", text)
    if options.docs and options.set in PICTURES and not options.stored:
        import_module(f".figures_{options.set}", __package__).draw(PICTURES[options.set], measured[0])


def measure_set(options):
    """Measure and print the set that the options name, and store it; returns (facts of the machine, figures)."""
    if "c" not in fastrms.available_backends():
        sys.exit("the figures are those of the C backend, and fastrms was built without its C extension")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    facts, figures = measure(options.set, console)
    if options.set in machines.SETS:
        console.print(f"wrote {machines.store(options.set, facts, figures)}", soft_wrap=True)
    return facts, figures


def measure(name, console):
    """Measure and print one set; returns (facts of the machine, figures)."""
    chosen = import_module(f".figures_{name}", __package__)
    facts = machine.describe() | chosen.prepare()
    start, first_clock, figures = time.perf_counter(), clock(), []
    console.print(f"{machine.in_words(facts)}\n{machine.software(facts)}\nplacement: {chosen.PLACED}", markup=False)
    try:
        for measurement in track(chosen.MEASUREMENTS, "measuring", console=console, transient=True):
            figures += measurement()
    except WrongContender as error:
        sys.exit(str(error))
    console.print(table(figures))
    console.print(f"empty Python call: {report.clocks_in_words([first_clock, clock()])}")
    console.print(f"{time.perf_counter() - start:.0f} s")
    return facts, figures


def table(figures):
    """Rows in red where the target is missed; a column for what the hardware allows where that is known."""
    known = any(figure.at_most for figure in figures)
    titles = ("what", "target", "measured", *["at most"] * known, "ok")
    shown = Table(*titles, caption="float32; times: minima of interleaved rounds")
    for figure in figures:
        measured = figure.measured + (f" ({figure.beside})" if figure.beside else "")
        cells = (figure.what, figure.target, measured, *[figure.at_most] * known, "yes" if figure.ok else "NO")
        shown.add_row(*map(escape, cells), style=None if figure.ok else "bold red")
    return shown


def markdown(name, facts, figures):
    command = f"`python -m bench.figures {name} --docs`"
    return "\n".join(
        ["| what | target | measured |", "| --- | ---: | ---: |"]
        + [f"| {figure.what} | {figure.target} | {machines.in_cell(figure._asdict())} |" for figure in figures]
        + ["", f"{machine.in_words(facts)}; {machine.software(facts)}; {date.today().isoformat()}; {command}."]
    )


if __name__ == "__main__":
    main()
