"""Checks of reliability, each scaled up to minutes: `python -m tests.soak` runs them all and writes what they found.

A check is a function in a module of this package, with the decorator below.  Its docstring is what is promised, its
arguments are its bounds, and it returns its figure in words; an exception is a failure, NotRun what is missing here.  The
decorator has the bounds of the short form, which tests/test_soak.py runs.  Each check has a process of its own, which is
ended where it takes too long.
"""

import importlib
import inspect
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900  # seconds for a check, on a busy machine
CHECKS = {}


class NotRun(Exception):
    """A check cannot run here; the text says why."""


class Outcome(NamedTuple):
    """What a check found; outcome: passed, failed or not run; figure: in words, the reason where it did not pass."""

    name: str
    promise: str
    outcome: str
    figure: str
    seconds: float


def check(short):
    """Register a function as a check, with the bounds of its short form; None: it has none."""

    def register(function):
        CHECKS[function.__name__] = function
        function.short = short
        return function

    return register


def find():
    """All checks, by name: those of every module of this package."""
    sys.path[:0] = [str(folder) for folder in (ROOT, ROOT / "tests") if str(folder) not in sys.path]
    for module in pkgutil.iter_modules(__path__):
        if module.name != "__main__":
            importlib.import_module(f"{__name__}.{module.name}")
    return CHECKS


def promise(name):
    return " ".join(inspect.getdoc(find()[name]).split())


def outcome_of(function, bounds):
    """(passed, failed or not run; the figure or the reason)"""
    try:
        return "passed", function(**bounds)
    except NotRun as missing:
        return "not run", str(missing)
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {str(error)[-600:]}"


def run(name, short=False, patience=PATIENCE):
    """The Outcome of a check in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "tests.soak", "--one", name, "--json", str(found), *["--short"] * short]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
        said = ended(process, patience)
        outcome, figure = json.loads(found.read_text()) if found.exists() else ("failed", said)
    return Outcome(name, promise(name), outcome, figure, round(time.perf_counter() - start, 1))


def ended(process, patience):
    """What a process has said when it ended, with all that it started; it is killed after so many seconds."""
    try:
        said = process.communicate(timeout=patience)[1]
        return f"ended with {process.returncode}: {said[-600:]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"did not end within {patience} s"


def run_one(name, short, path):
    """What the process of a check does."""
    function = find()[name]
    bounds = function.short if short else {}
    found = ("not run", "it has no short form") if bounds is None else outcome_of(function, bounds)
    Path(path).write_text(json.dumps(found))
