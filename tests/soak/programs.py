"""Checks by C programs: guard pages, processors under qemu, fuzzing, sanitizers and valgrind; and the suite's own tests."""

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import ROOT, NotRun, check
from .long import need_c

CPUS = ("qemu64", "Nehalem", "Haswell", "max")
SANITIZERS = "address,undefined"


def need(*names):
    """The path of the first of these programs that is installed."""
    for name in names:
        if shutil.which(name):
            return shutil.which(name)
    raise NotRun(f"{' or '.join(names)} is not installed")


def said(*command, **environment):
    """Standard output and error of a command that must succeed."""
    environment = {**os.environ, **environment}
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=environment)
    told = run.stdout + run.stderr
    faults = "; ".join(re.findall(r".*(?:runtime error|ERROR:|WARNING: ThreadSanitizer|\wError: ).*", told))[:200]
    assert run.returncode == 0, f"{command[0]} ended with {run.returncode}: {faults} ... {told[-300:]}"
    return run.stdout.strip(), run.stderr


def library(compiler="gcc", sanitize="", flags=""):
    """The static library, built as a user builds it; it stays, and is made again after a change."""
    into = ROOT / "build" / "soak" / (f"{compiler}-fuzzer" if flags else compiler)
    settings = [f"CC={need(compiler)}", f"BUILD={into}", f"SANITIZE={sanitize}", f"CFLAGS={flags}"]
    said(need("make"), "-s", "-j2", "-C", ROOT / "csrc", *settings)
    return into / sanitize / "libfastrms.a"


def built(source, compiler="gcc", *flags, sanitize="", of_library=""):
    """A program of tests/c with the library."""
    linked = library(compiler, sanitize, of_library)
    program = linked.parent / "-".join([source, *(flag.strip("-") for flag in flags if "=" not in flag)])
    checked = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    options = ["-g", "-O1", *flags, *checked, f"-I{ROOT / 'csrc'}", ROOT / "tests" / "c" / f"{source}.c"]
    said(compiler, *options, linked, "-lm", "-pthread", "-o", program)
    return program


@check({"most": 1025, "step": 205})
def guard_pages(most=1025, step=1):
    """Every kernel of every tier stays within its buffers between two pages that may not be touched, at every length
    and 64 offsets from either page, and each element has the bits of a call that has it alone."""
    return f"lengths 0 to {most}: {said(built('guard'), most, step)[0]}, 0 faults"


@check({"calls": 2000, "arm": False})
def other_processors(calls=50_000, arm=True):
    """Processors from 2008 on, and aarch64, all emulated by qemu, run what they have, and have the bits of this one."""
    emulator = need("qemu-x86_64")
    program = built("any_call", "gcc", "-static")
    native = said(program, calls)[0]
    digest, runs = native.rpartition(" ")[2], [f"this CPU: {tiers(native)}"]
    for name, command in [(cpu, [emulator, "-cpu", cpu, program]) for cpu in CPUS] + (on_arm() if arm else []):
        found = said(*command, calls)[0]
        assert found.endswith(digest), f"{name}: {found}; here: {native}"
        runs.append(f"{name}: {tiers(found)}")
    return f"{calls:,} calls, the same digest on each ({'; '.join(runs)}); 0 SIGILL"


def tiers(line):
    count = int(re.search(r"(\d+) tiers", line)[1])
    return f"{count} tier{'s' * (count > 1)}"


def on_arm():
    """The same program for aarch64, where its compiler and emulator are installed."""
    compiler, emulator = "aarch64-linux-gnu-gcc", shutil.which("qemu-aarch64")
    return [("aarch64", [emulator, built("any_call", compiler, "-static")])] if shutil.which(compiler) and emulator else []


@check({"calls": 5000, "sanitize": ""})
def any_call(calls=500_000, sanitize=SANITIZERS):
    """Any bytes as a call of the C library: hyper-parameters, sizes, offsets, NaN, missing and overlapping buffers.  No
    access outside of a buffer, no undefined behaviour, what is refused changes nothing, all tiers have the same bits."""
    return f"{said(built('any_call', sanitize=sanitize), calls)[0]}; sanitizers {sanitize or 'none'}: 0 reports"


@check(None)
def fuzzing(seconds=60):
    """The same by libFuzzer, which looks for bytes that reach new code, under AddressSanitizer and UBSan."""
    compiler = Path(need("clang", "clang-14", "clang-15", "clang-16")).name
    checked = f"-w -g -fno-sanitize-recover=all -fsanitize={SANITIZERS}"
    options = [*checked.split(), "-fsanitize=fuzzer", "-DLIBFUZZER=1"]
    program = built("any_call", compiler, *options, of_library=f"{checked},fuzzer-no-link")
    with tempfile.TemporaryDirectory() as corpus:
        limits = (f"-max_total_time={seconds}", "-max_len=256", f"-artifact_prefix={corpus}/")
        log = said(program, *limits, "-print_final_stats=1", corpus)[1]
    return f"{int(re.search(r'number_of_executed_units: (.*)', log)[1]):,} executions in {seconds} s, 0 findings"


@check(None)
def thread_sanitizer(callers=32, forks=40):
    """The pool under ThreadSanitizer: many callers at once, and forks while they step; no data race."""
    program = built("stress", sanitize="thread")
    options = {"TSAN_OPTIONS": "die_after_fork=0:report_thread_leaks=0"}
    found = [said(program, *arguments, **options)[0] for arguments in ((callers, 0), (3, forks))]
    assert all(line.startswith("faults 0") for line in found), found
    return f"{'; '.join(found)}; 0 reports"


@check(None)
def memcheck(calls=30_000):
    """valgrind's memcheck: no read of what was never written, nothing lost."""
    options = [need("valgrind"), "-q", "--error-exitcode=9"]
    found = said(*options, "--leak-check=full", built("any_call"), calls)[0]
    said(*options, built("formats"))  # which frees nothing
    return f"{found}; tests/c/formats.c; 0 reports"


# the interface in Python

OF_ATHERIS = """
import sys
import atheris
with atheris.instrument_imports(include=["fastrms"]):
    import fastrms
from tests.soak.any_python import one_input
atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
"""


@check({"programs": 300})
def any_python(programs=10_000):
    """Any bytes as a small program in Python: arrays of all kinds, hyper-parameters, gradients, steps, saved states.  C and
    NumPy have the same bits and say the same; a refusal is a sentence, and has changed nothing."""
    need_c()
    from .any_python import one_input

    for seed in range(programs):
        try:
            one_input(random.Random(seed).randbytes(120))
        except BaseException as error:
            raise AssertionError(f"program {seed}: {type(error).__name__}: {error}") from error
    return f"{programs:,} programs, each on C and NumPy"


@check(None)
def python_fuzzing(seconds=60):
    """The same by atheris (libFuzzer), which looks for bytes that reach new lines of fastrms."""
    if importlib.util.find_spec("atheris") is None:
        raise NotRun("atheris is not installed: pip install atheris")
    with tempfile.TemporaryDirectory() as corpus:
        limits = (f"-max_total_time={seconds}", "-max_len=128", "-len_control=0", f"-artifact_prefix={corpus}/")
        log = "".join(said(sys.executable, "-c", OF_ATHERIS, *limits, "-print_final_stats=1", corpus))
    return f"{int(re.search(r'number_of_executed_units: (.*)', log)[1]):,} executions in {seconds} s, 0 findings"


@check(None)
def properties(seconds=45):
    """What the tests of properties promise, for as many examples as Hypothesis finds in this time."""
    made, runs, end = 0, 0, time.monotonic() + seconds
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    files = [path for path, text in texts.items() if "from hypothesis import" in text]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "hypothesis"]
    while runs == 0 or time.monotonic() < end:
        log = said(*command, "--hypothesis-show-statistics", f"--hypothesis-seed={runs}", *files)[0]
        made += sum(map(int, re.findall(r"- (\d+) passing(?: examples)?, 0 failing", log)))
        files = [path for path in files if "derandomize=True" not in texts[path]]  # with the same examples every time
        runs += 1
    return f"{made:,} examples, {runs} seeds"


# what the test suite has, as it stands


def of_suite(name, promise, *arguments):
    """Register a check that runs tests of the suite: its figure is how many passed."""

    def passed():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-600:] + run.stderr[-300:]
        return f"`pytest {' '.join(arguments)}`: {re.search(r'[0-9]+ passed', run.stdout)[0]}"

    passed.__name__, passed.__doc__ = name, promise
    check(None)(passed)


of_suite(
    "sanitized_tests",
    "The suite's programs in C, the trainer and the formats under AddressSanitizer, UBSan and ThreadSanitizer: no report.",
    *("tests/test_threads.py", "tests/test_c_library.py", "-k", "sanit"),
)
of_suite(
    "same_bits",
    "Every backend, tier, form, length, offset and tail has the same bits, and a resumed run those of an unbroken one.",
    "tests/test_same_bits.py",
)
of_suite(
    "textbook", "Within ULPs of the papers' formulas in higher precision, also after 10,000 steps.", "tests/test_oracle.py"
)
of_suite(
    "bad_inputs",
    "Dtypes, byte orders, strides, read-only, overlapping and misaligned buffers: an error, and nothing has changed.",
    "tests/test_arrays.py",
)
of_suite(
    "nonfinite",
    "NaN and infinite gradients are counted exactly, and skipped or refused as a whole where that is asked for.",
    "tests/test_step.py",
)
of_suite(
    "build", "Wheel and sdist install; every kernel is vectorised and free of contracted operations.", "tests/test_build.py"
)
