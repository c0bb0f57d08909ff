"""The CUDA backend on this machine's GPU, in one command: `python -m bench.gpu`

Runs the GPU tests, then times every rule, storage formats, other libraries, calls from Python and other ways to write the
kernels.  Takes under 6 minutes, needs neither a network nor a compiler, and goes on after a failure.  Writes
fastrms-gpu.json, .md and, with matplotlib, .png.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fastrms.backends.cuda import toolchain

from . import gpu_formats, gpu_kernels, gpu_peers, gpu_report, gpu_variants
from .gpu_measure import Gpu, smi

SECONDS = 340.0  # after which no part begins
TESTS_SHARE = 0.6  # of this time, for the tests
SIZES = (20, 22, 24, 26, 28)
FOLDER = Path(__file__).parents[1]


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sizes", type=exponents, default=SIZES, help="powers of two of elements (default 20,22,24,26,28)")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no part begins (default %(default)s)")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    parser.add_argument("--python", default=shlex.quote(sys.executable) + " -m", help=argparse.SUPPRESS)
    parser.add_argument("--parts", help=f"only these, separated by commas: {', '.join(gpu_report.SECTIONS)}")
    return parser.parse_args(arguments)


def exponents(text):
    return tuple(int(part) for part in text.split(","))


class Run:
    """The parts of a run, each of which may fail alone; what was found is written after each."""

    def __init__(self, options, gpu, command):
        self.options, self.start = options, time.perf_counter()
        self.parts = {}
        self.found = {"date": date.today().isoformat(), "command": command, "double": gpu.is_double}
        self.found |= {"machine": gpu.describe(), "parts": self.parts}
        self.chosen = options.parts.split(",") if options.parts else list(gpu_report.SECTIONS)

    def part(self, name, function):
        """Run a part, and keep what it returns, or why there is nothing."""
        if name not in self.chosen:
            return
        begun, before = time.perf_counter(), smi()
        if begun - self.start > self.options.seconds:
            self.parts[name] = {"left out": "there was no time left"}
            return
        try:
            self.parts[name] = {"found": function()}
        except Exception:
            self.parts[name] = {"failed": traceback.format_exc()}
        self.parts[name] |= {"seconds": time.perf_counter() - begun, "nvidia-smi": [before, smi()]}
        said = "failed" if "failed" in self.parts[name] else "done"
        print(f"{name}: {said}, {time.perf_counter() - begun:.1f} s", flush=True)
        if said == "failed":
            print(self.parts[name]["failed"], flush=True)
        self.write()

    def write(self):
        """Write what was found as JSON and as a page."""
        self.found["seconds"] = time.perf_counter() - self.start
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "fastrms-gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (out / "fastrms-gpu.md").write_text(gpu_report.markdown(self.found))

    def failed(self):
        """The names of the parts that failed."""
        bad = self.parts.get("tests", {}).get("found", {}).get("failed")
        return [name for name, part in self.parts.items() if "failed" in part] + (["tests"] if bad else [])


def tests(python, seconds):
    """How the GPU tests went, in a process of their own: an illegal address would end this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tests.xml")
        command = [*shlex.split(python), "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={path}",
                   "--durations=8", str(FOLDER / "tests/test_gpu.py"), str(FOLDER / "tests/test_cuda.py")]  # fmt: skip
        start = time.perf_counter()
        try:
            run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, timeout=seconds)
            output = run.stdout + run.stderr
        except subprocess.TimeoutExpired as error:
            output = f"they took more than {seconds:.0f} s\n" + (error.stdout or b"").decode()
        if not path.exists():
            raise RuntimeError(output[-6000:])
        suite = ElementTree.parse(path).getroot().find("testsuite")
    failures = [failure for case in suite.iter("testcase") for failure in failures_of(case)]
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    return {"passed": counts["tests"] - bad - counts["skipped"], "failed": bad, "skipped": counts["skipped"],
            "failures": failures, "seconds": time.perf_counter() - start, "output": output[-20000:]}  # fmt: skip


def failures_of(case):
    """A line for what went wrong in a test."""
    for kind in ("failure", "error"):
        for found in case.findall(kind):
            yield f"{case.get('name')}: {found.get('message', '')[:300]}"


def rules(gpu, sizes):
    rows = []
    for exponent in sizes:
        rows += gpu_kernels.rules(gpu, 1 << exponent, np.float32)
        if exponent < 28:
            rows += gpu_kernels.rules(gpu, 1 << exponent, np.float64)
    others = [name for name in gpu_kernels.MAKERS if name not in gpu_kernels.MAIN]
    return rows + gpu_kernels.rules(gpu, 1 << min(26, sizes[-1]), np.float32, others)


def measure(run, gpu):
    """All parts but the tests."""
    sizes = run.options.sizes
    large = 1 << min(26, sizes[-1])
    small, counts = (10, 20 if large >= 1 << 26 else 12), 100 if large >= 1 << 26 else 5
    run.part("calls from Python", lambda: gpu_peers.python_cost(gpu))
    run.part("many tensors", lambda: [gpu_kernels.many(gpu, counts, 1 << exponent) for exponent in small])
    run.part("views", lambda: gpu_kernels.offsets(gpu, large))
    run.part("rules", lambda: rules(gpu, sizes))
    formats = [(rule, 1 << exponent) for rule in ("rmsprop", "adam") for exponent in sizes if exponent <= 26]
    run.part("formats", lambda: [row for which in formats for row in gpu_formats.formats(gpu, *which)])
    if gpu_peers.has("torch"):
        sets = [(1 << exponent, 1) for exponent in sizes if 20 <= exponent <= 26] + [
            (1 << small[0], 100),
            (1 << small[1], 100),
        ]
        run.part("torch", lambda: [row for size, count in sets for row in gpu_peers.of_torch(gpu, size, count)])
    if gpu_peers.has("cupy"):
        run.part("CuPy", lambda: [row for e in sizes if e in (24, 26) for row in gpu_peers.of_cupy(gpu, 1 << e)])
    if gpu_peers.has("jax") and gpu_peers.has("optax"):
        sets = [*((1 << exponent, 1) for exponent in sizes if exponent in (24, 26)), (1 << small[0], 100)]
        run.part("Optax", lambda: [row for which in sets for row in gpu_peers.of_optax(gpu, *which)])
    run.part("variants", lambda: [row for rule in ("rmsprop", "adam") for row in gpu_variants.compare(gpu, rule, large)])


def main(arguments=None):
    options = parse(arguments)
    reason = toolchain.available()
    if reason:
        sys.exit(f"there is nothing to measure: {reason}")
    gpu = Gpu()
    run = Run(options, gpu, shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)]))
    print(f"{run.found['machine']['name']}; {run.found['machine']['nvidia-smi']}", flush=True)
    if not options.no_tests:
        run.part("tests", lambda: tests(options.python, TESTS_SHARE * options.seconds))
    measure(run, gpu)
    run.write()
    drawn = gpu_report.draw(run.found, options.out / "fastrms-gpu.png")
    print(gpu_report.markdown(run.found))
    print(f"wrote fastrms-gpu.json, .md{', .png' if drawn else ''} in {os.path.abspath(options.out)}")
    sys.exit(f"failed: {', '.join(run.failed())}" if run.failed() else 0)


if __name__ == "__main__":
    main()
