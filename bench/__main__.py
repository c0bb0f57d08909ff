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

from . import first_step, machine, model, model_command, peers, timing
from .check import WrongContender
from .contenders import CEILINGS
from .measure import measure
from .problem import AS_ALLOCATED, BACK_TO_BACK, RULES, WELL_PLACED
from .report import PAGE
from .results import Results

QUICK_SIZES = [2**k for k in range(6, 25, 3)]
FULL_SIZES = [2**k for k in range(6, 27)]
QUICK_RULES = ("rmsprop", "adagrad", "adam")
QUICK_SECONDS, FULL_SECONDS = 0.5, 4.0  # of timing for each rule and size
QUICK_PLACEMENTS = 2**21  # the largest size at which a quick run compares placements
QUICK_LIMIT = 34.0  # seconds after which a quick run begins nothing more,
AGAIN_LIMIT = 38.0  # and after which it measures nothing again
MOST_AGAIN = 4  # how often a contender that was faster than a ceiling is measured again, with the ceiling
HOW = "gradients bound once (default), other arrays at each step, one call for each tensor, or torch tensors"
PIPE_WIDTH = 150  # columns where the output is not a terminal


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench", description="Times fastrms against NumPy and other libraries.")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds: ends within a minute")
    parser.add_argument("--sizes", type=positive_numbers, help="numbers of elements: 64,1024,65536")
    parser.add_argument("--rules", type=known_rules, help=f"out of {','.join(RULES)}")
    parser.add_argument("--threads", type=int, default=1, help="of fastrms and the peers (default: 1); NumPy has one")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--peers", action="store_true", help="torch, Optax, DeepSpeed, ...: those that are installed")
    parser.add_argument("--json", metavar="FILE", help="write all that was measured to FILE")
    parser.add_argument("--docs", "--readme", action="store_true", help=f"rewrite the table in {PAGE}")
    own = parser.add_argument_group("a model of your own", "in place of the tables: microseconds of a step")
    own.add_argument("--shapes", type=known_shapes, help="of its tensors: 784x512,512,512x10")
    own.add_argument("--how", choices=model.HOWS, help=HOW)
    own.add_argument("--clip", action="store_true", help=f"each step clips the norm of all gradients to {model.CLIP}")
    own.add_argument("--schedule", action="store_true", help="the rate changes at each step, by a cosine")
    options = parser.parse_args(arguments)
    refuse(parser, options)
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else FULL_SIZES)
    options.how = options.how or "bound"
    options.rules = options.rules or (QUICK_RULES if options.quick or options.shapes else RULES)
    return options


def refuse(parser, options):
    """Exit with a sentence where options do not go together."""
    if not options.shapes:
        useless = [name for name in ("how", "clip", "schedule") if getattr(options, name)]
        if useless:
            parser.error(f"--{useless[0]} needs --shapes, the tensors of your model")
    elif options.sizes:
        parser.error("--sizes is for the tables, --shapes for a model: give one of the two")
    elif options.schedule and "rprop" in (options.rules or ()):
        parser.error("--schedule is not for rprop, which uses its lr once")


def known_shapes(text):
    try:
        shapes = tuple(tuple(int(side) for side in part.split("x")) for part in text.split(","))
    except ValueError:
        shapes = ((0,),)
    if any(side < 1 for shape in shapes for side in shape):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shapes of numbers above 0, such as 784x512,512")
    return shapes


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
        if rule not in RULES:
            raise argparse.ArgumentTypeError(f"{rule!r} is not one of {', '.join(RULES)}")
    return tuple(text.split(","))


class Run:
    """One run of the benchmark: it measures what the options ask for, cell by cell, into one Results for each placement."""

    def __init__(self, options, rivals, console):
        self.options, self.rivals, self.console = options, rivals, console
        self.seconds = QUICK_SECONDS if options.quick else FULL_SECONDS
        self.start = time.perf_counter()
        self.results = {where: Results(options.dtype, where) for where in (WELL_PLACED, AS_ALLOCATED, BACK_TO_BACK)}

    def measure(self):
        """Measure every size well placed, and one large size also as it is allocated and back to back: the largest, or in a
        quick run the largest up to QUICK_PLACEMENTS."""
        sizes, rules = self.options.sizes, self.options.rules
        most = QUICK_PLACEMENTS if self.options.quick else sizes[-1]
        large = max((size for size in sizes if size <= most), default=sizes[0])
        cells = [(WELL_PLACED, size, rule) for size in sizes for rule in rules]
        cells += [(where, large, rule) for where in (AS_ALLOCATED, BACK_TO_BACK) for rule in rules]
        cells.sort(key=lambda cell: cell[1])  # small sizes first: a quick run may not reach the last
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("", total=len(cells))
            for where, size, rule in cells:
                progress.update(task, description=f"{rule} {report.size_name(size)} {where}")
                if self.is_late():
                    left_out = f"{rule}, {report.size_name(size)} elements, {where}"
                    self.console.print(f"no time left in --quick, which ends within a minute; left out: {left_out}")
                else:
                    self.measure_one(where, size, rule)
                progress.advance(task)
        return self.results

    def measure_one(self, where, size, rule):
        """Time all contenders, and time again, with the ceilings and in new buffers, those that were faster than a ceiling:
        the ceiling may have been disturbed in all of its rounds, or its pages may have been slower."""
        results = self.results[where]
        measure(results, rule, size, self.seconds, peers=self.rivals)
        for _ in range(MOST_AGAIN):
            faster = {name for *cell, name in results.above_ceiling() if cell == [rule, size]}
            if not faster or self.is_late(AGAIN_LIMIT):
                break
            measure(results, rule, size, self.seconds, faster.union(CEILINGS), self.rivals)

    def is_late(self, limit=QUICK_LIMIT):
        """Whether this is a quick run and has lasted longer than limit."""
        return self.options.quick and time.perf_counter() - self.start > limit


def show(results, reasons, console):
    placed = results[WELL_PLACED]
    for rule in placed.rules():
        for table in report.tables(placed, rule, console.width):
            console.print(table)
    if any(other.timings for other in results.values() if other is not placed):
        console.print(report.placement_table(results))
    console.print(report.LEGEND)
    for line in report.footnotes(placed):
        console.print(line)
    for name, reason in reasons.items():
        console.print(f"{name}: {reason}", markup=False)
    for line in report.complaints(placed):
        console.print(f"[bold]{line}")


def main(arguments=None):
    options = parse(arguments)
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    try:
        fastrms.set_num_threads(options.threads)
    except ValueError as error:
        sys.exit(f"--threads: {error}")
    if options.shapes:
        try:
            return model_command.run(options, command, console)
        except (ValueError, WrongContender) as error:
            sys.exit(str(error))
    rivals, reasons = gather_peers(options)
    facts = machine.describe() | ({"peers": peers.versions()} if rivals else {})
    try:
        if options.docs:
            report.check_page(PAGE, "bench")
        console.print(report.header(facts))
        clocks = [timing.clock()]
        compiling = first_step.sentence()
        results = Run(options, rivals, console).measure()
        clocks.append(timing.clock())
    except (ValueError, WrongContender) as error:
        sys.exit(str(error))
    show(results, reasons, console)
    if compiling:
        console.print(compiling)
    console.print(f"empty Python call: {report.clocks_in_words(clocks)}")
    console.print(f"wrote {', '.join(write(options, results, facts, clocks, command))}")


def gather_peers(options):
    """(name -> function, name -> why it is missing) of the other libraries, which are set to the same number of threads."""
    if not options.peers:
        return {}, {}
    peers.use_threads(options.threads)
    return peers.available()


def write(options, results, facts, clocks, command):
    """Write the files that the options ask for; returns their names."""
    written = picture.draw(results[WELL_PLACED], facts)
    if options.json:
        report.write_json(options.json, results, facts, clocks, command)
        written.append(options.json)
    if options.docs:
        report.write_page(PAGE, "bench", report.markdown(results, facts, clocks, command))
        written.append(str(PAGE))
    return written


if __name__ == "__main__":
    main()
