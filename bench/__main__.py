"""The benchmark's command: `python -m bench --help`."""

import argparse
import shlex
import sys
import time

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from . import picture, report
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("rich", "matplotlib"):
        raise
    sys.exit(f"{error.name} is missing, which the benchmark needs: pip install -e '.[bench]'")

import fastrms

from . import machine, timing
from .check import WrongContender, check
from .contenders import OPTIMIZERS, PLACEMENT, Problem
from .report import README
from .results import Results

QUICK_SIZES = [2**k for k in range(6, 25, 2)]
FULL_SIZES = [2**k for k in range(6, 25)]
QUICK_RULES = ("rmsprop", "adagrad", "adam")
QUICK_SECONDS, FULL_SECONDS = 0.35, 2.0  # of timing, for each rule and size
QUICK_LIMIT = 40.0  # seconds; a quick run begins no further size after that
PIPE_WIDTH = 150  # columns where the output is not a terminal


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times fastrms against NumPy.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: ends within a minute")
    parser.add_argument("--sizes", type=positive_numbers, help="numbers of elements: 64,1024,65536")
    parser.add_argument("--rules", type=known_rules, help=f"out of {','.join(OPTIMIZERS)}")
    parser.add_argument("--threads", type=int, default=1, help="of fastrms (default: 1); NumPy has one")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write every minimum and median to FILE")
    parser.add_argument("--readme", action="store_true", help=f"rewrite the table in {README}")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else FULL_SIZES)
    options.rules = options.rules or (QUICK_RULES if options.quick else tuple(OPTIMIZERS))
    return options


def positive_numbers(text):
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 64,1024")
    return sizes


def known_rules(text):
    for rule in text.split(","):
        if rule not in OPTIMIZERS:
            raise argparse.ArgumentTypeError(f"{rule!r} is not one of {', '.join(OPTIMIZERS)}")
    return tuple(text.split(","))


def measure(options, console):
    """All rules and sizes, with a progress bar; the sizes that a quick run has no time for are left out."""
    results = Results(options.dtype)
    seconds = QUICK_SECONDS if options.quick else FULL_SECONDS
    cells = [(rule, size) for size in options.sizes for rule in options.rules]
    end = time.perf_counter() + QUICK_LIMIT
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cells))
        for rule, size in cells:
            progress.update(task, description=f"{rule} {report.size_name(size)}")
            if options.quick and time.perf_counter() > end:
                console.print(f"no time left in --quick: {rule}, {size} elements is left out")
            else:
                results.add(rule, size, measure_one(rule, size, options.dtype, seconds))
            progress.advance(task)
    return results


def measure_one(rule, size, dtype, seconds):
    problem = Problem(rule, size, dtype)
    check(problem)
    return timing.interleaved({contender.name: contender.step for contender in problem.contenders}, seconds)


def show(results, console):
    for rule in results.rules():
        for table in report.tables(results, rule, console.width):
            console.print(table)
    console.print("Minima over interleaved rounds; GB/s: the bytes that the rule must move, over the time taken.")
    console.print("ceiling: a C loop of one addition per stream over the same buffers; in memory no update can be faster.")


def main(arguments=None):
    options = parse(arguments)
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    try:
        fastrms.set_num_threads(options.threads)
    except ValueError as error:
        sys.exit(f"--threads: {error}")
    facts = machine.describe()
    try:
        if options.readme:
            report.check_readme(README, "bench")
        console.print(report.header(facts, PLACEMENT))
        clocks = [timing.clock()]
        results = measure(options, console)
        clocks.append(timing.clock())
    except (ValueError, WrongContender) as error:
        sys.exit(str(error))
    show(results, console)
    console.print(f"empty Python call: {clocks[0]:.0f} ns at the start, {clocks[1]:.0f} ns at the end")
    console.print(f"wrote {', '.join(write(options, results, facts, clocks, command))}")


def write(options, results, facts, clocks, command):
    """The files that were asked for; their names."""
    picture.draw(results, facts)
    written = list(picture.FILES)
    if options.json:
        report.write_json(options.json, results, facts, clocks, command)
        written.append(options.json)
    if options.readme:
        report.write_readme(README, "bench", report.markdown(results, facts, command))
        written.append(str(README))
    return written


if __name__ == "__main__":
    main()
