"""`python -m fastrms`: what it prints, and that it finds what is broken and says so by its exit status."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import backends, c

import fastrms
from fastrms import config, formats, rules, self_check

needs_c = pytest.mark.skipif(c.lib is None, reason="this installation was built without C on purpose (FASTRMS_NO_EXT=1)")
needs_numba = pytest.mark.skipif(backends.load("numba").available() is not None, reason="Numba cannot be used here")
ADAGRAD = [("adagrad", general, np.dtype(np.float32)) for general in (False, True)]


def run(*arguments, **environment):
    """(exit status, output) of a new process"""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def self_checked(broken, what="check", **environment):
    """(exit status, output) where a new process first runs the code that breaks something."""
    code = f"import sys, numpy as np\nfrom fastrms import config, rules, self_check\n{broken}\n"
    return run("-c", f"{code}sys.exit(self_check.main([{what!r}]))", **environment)


def line(out, name):
    (found,) = re.findall(rf"^{name} .*$", out, re.M)
    return " ".join(found.split())


def test_what_is_printed():
    status, out = run("-m", "fastrms", FASTRMS_NUM_THREADS="3")
    assert status == 0 and "self-check: nothing wrong, " in out and "by numba" not in out
    assert line(out, "fastrms") == f"fastrms {fastrms.__version__}" and line(out, "numpy") == f"numpy {np.__version__}"
    assert line(out, "threads") == "threads 3" and "affinity mask" in line(out, "limits")
    missing = [name for name in backends.NAMES if backends.load(name).available()]
    assert all(f"; no {name}: " in line(out, "backends") for name in missing)
    assert re.search(r"begin \d+ bytes apart modulo 4 KiB", line(out, "memory"))
    torch = "not installed" if importlib.util.find_spec("torch") is None else r"\d+\.\d+"
    assert re.fullmatch(f"torch {torch}.*", line(out, "torch"))


@needs_c
def test_every_tier_of_this_cpu_is_checked():
    status, out = run("-m", "fastrms", "check")
    assert status == 0 and "-ffp-contract=off" in line(out, "flags") and c.compiler() in line(out, "compiler")
    for isa in c.isas():
        assert line(out, isa).startswith(f"{isa} ok: {4 * len(rules.RULES)} kernels have the bits of NumPy, and so have "
                                         f"{len(formats.FORMATS)} storage formats")  # fmt: skip
    taken = re.findall(r"(\d+) of (\w+)", line(out, "kernels"))
    assert sum(int(count) for count, _ in taken) == 4 * len(rules.RULES) and {isa for _, isa in taken} <= {*c.isas()}


@needs_c
def test_a_forced_tier_is_restored(monkeypatch):
    before = c.isa()
    for isa in (None, c.isas()[-1]):
        monkeypatch.setenv("FASTRMS_ISA", isa or "")
        with self_check.forced(c.isas()[0]):
            assert c.isa() == c.isas()[0]
        assert c.isa() == (isa or before)
    monkeypatch.undo()
    c.use_isa(os.environ.get("FASTRMS_ISA") or None)
    status, out = run("-m", "fastrms", FASTRMS_ISA="baseline")
    assert status == 0 and line(out, "kernels") == f"kernels {4 * len(rules.RULES)} of baseline"


def test_neither_numba_nor_torch_is_imported():
    code = "import sys\nfrom fastrms import self_check\nself_check.main([])\nprint({'numba', 'torch'} & {*sys.modules})"
    assert run("-c", code)[1].endswith("\nset()\n")


def test_an_argument_that_is_none_is_refused():
    done = subprocess.run([sys.executable, "-m", "fastrms", "verfy"], capture_output=True, text=True)
    assert done.returncode == 2 and "'verfy'" in done.stderr and not done.stdout


def test_without_c_there_is_less_to_check():
    code = "import sys\nsys.modules['fastrms._core'] = None\nfrom fastrms import self_check\nsys.exit(self_check.main([]))"
    status, out = run("-c", code)
    assert status == 0 and "build not checked: fastrms was built without its C extension" in line(out, "build")
    assert line(out, "compiler") == "compiler None"


# what is broken is found


@needs_c
def test_a_rule_that_differs_is_found():
    """In one rule the text of Python is another than that of C."""
    status, out = self_checked(
        "import inspect\n"
        "text = inspect.getsource(rules.adagrad).replace('sum + g * g', 'sum - g * g')\n"
        "exec(text, vars(rules))\n"
        "rules.RULES['adagrad'] = rules.adagrad"
    )
    assert status == 1 and out.count("    rule ") == 4 * len(c.isas()) == out.count("    rule adagrad, ")
    for isa in c.isas():
        assert f"    rule adagrad, general form, float64, tier {isa}, 1 elements: param[0] is " in out
        assert line(out, isa) == f"{isa} WRONG"
    assert f"self-check: {4 * len(c.isas())} wrong, " in out


@pytest.mark.parametrize("buffer", ["param", "grad", "sum"])
@pytest.mark.parametrize("size", [0, 1, 7, 1003])
def test_the_length_and_the_buffer_are_named(buffer, size):
    """A kernel that changes one bit of one buffer at one length."""

    def update(recipe, step, grad_scale, param, grad, states):
        backends.load("numpy").update(recipe, step, grad_scale, param, grad, states)
        changed = {"param": param, "grad": grad, "sum": states[0]}[buffer]
        if changed.size == size > 0:
            changed.view(f"u{changed.itemsize}")[-1] ^= 1

    wrong = [*self_check.wrong_kernels(update, "broken", ADAGRAD[:1])]
    named = f"rule adagrad, neutral form, float32, tier broken, {size} elements: {buffer}[{size - 1}] is "
    assert [sentence[: len(named)] for sentence in wrong] == [named] * (size > 0)


@needs_c
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_a_format_that_differs_is_found(monkeypatch, what):
    """One byte of a stored tensor, and one number of those that are decoded."""
    right = getattr(self_check, what)

    def wrong(isa, format, *of):
        right(isa, format, *of)
        changed = of[1] if what == "encode" else of[-1]  # the memory of the tensor, or the numbers
        if format.name == "q8" and changed.size:
            changed.view(np.uint8)[0] ^= 2

    monkeypatch.setattr(self_check, what, wrong)
    for isa in c.isas():
        found = [*self_check.wrong_formats(isa)]
        name = "stored" if what == "encode" else "decoded"
        assert [sentence.partition("[0] is ")[0] for sentence in found] == [
            f"format q8, rounding {rounding}, tier {isa}, 1 elements: {name}" for rounding in ("nearest", "stochastic")
        ]


@needs_c
def test_a_step_that_differs_is_found(monkeypatch):
    """The random numbers of NumPy are others, so whatever is rounded at random differs."""
    monkeypatch.setattr(formats, "key", lambda seed, step, stream: 12345)
    self_check.reference_step.cache_clear()
    wrong = [*self_check.wrong_steps(c.isas()[-1])]
    self_check.reference_step.cache_clear()
    rounded = [options for options in self_check.OPTIONS if options.items().isdisjoint(
        {("state_format", None), ("master", "float32"), ("master", "split16")})]  # fmt: skip
    assert [sentence.partition(", float32, ")[0] for sentence in wrong] == [f"a step of Adam, {o}" for o in rounded]


@needs_c
def test_a_stale_build_is_found(tmp_path):
    """As after an edit of csrc that was not built.  The right sources are no complaint, wherever they are."""
    if not self_check.SOURCES.exists():
        pytest.skip("this installation has no sources beside it")
    sources = shutil.copytree(self_check.SOURCES, tmp_path / "csrc")
    elsewhere = f"from pathlib import Path\nself_check.SOURCES = Path({str(sources)!r})"
    status, out = self_checked(elsewhere)
    assert status == 0 and f"built from the sources in {sources}" in line(out, "build")
    with open(sources / "rules.h", "a") as file:
        file.write("\n")
    status, out = self_checked(elsewhere)
    assert status == 1 and line(out, "build") == "build WRONG" and "self-check: 1 wrong, " in out
    assert f"    the C extension is stale: it was built from sources with the hash {c.built('sources')}, " in out
    assert f": run `pip install -e .` in {tmp_path}\n" in out


def test_a_check_that_fails_is_wrong():
    status, out = self_checked("def fails(): raise OSError('no sources')\nself_check.stale_build = fails")
    assert (status, line(out, "build")) == ((1, "build WRONG") if c.lib else (0, line(out, "build")))
    assert not c.lib or "    OSError('no sources')\n" in out


# Numba's cache

ONLY_ADAGRAD = "config.kernels = lambda: [('adagrad', general, np.dtype('float32')) for general in (False, True)]"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for caches with the kernels of AdaGrad, and what verify says of it when it is sound."""
    folder = tmp_path_factory.mktemp("cache")
    for _ in range(2):  # compiled, and from the disk
        status, out = verified(folder)
        said = line(out, "by numba").partition("ok: ")[2]
        assert (status, said) == (0, "2 kernels have the bits of NumPy, and the cache on disk works")
    return folder


def verified(folder):
    return self_checked(ONLY_ADAGRAD, "verify", XDG_CACHE_HOME=str(folder), NUMBA_CACHE_DIR="")


def files_of(cache, form, kind):
    return sorted((cache / "fastrms" / "__pycache__").glob(f"fastrms_adagrad_{form}_float32_*.{kind}"))


@needs_numba
def test_a_poisoned_numba_cache_is_found(cache, tmp_path):
    """The machine code of one form in the place of the other's, as a cache may hold it that was copied or mixed up."""
    poisoned = shutil.copytree(cache, tmp_path / "cache")
    (neutral,), (general,) = (files_of(poisoned, form, "nbc") for form in ("neutral", "general"))
    shutil.copyfile(general, neutral)
    status, out = verified(poisoned)
    assert status == 1 and line(out, "by numba") == "by numba WRONG" and "self-check: 1 wrong, " in out
    assert "    rule adagrad, neutral form, float32, tier numba, 1 elements: " in out
    assert f"delete the folder {poisoned / 'fastrms'}, and run this again\n" in out
    shutil.rmtree(poisoned / "fastrms")
    assert verified(poisoned)[0] == 0, "the remedy works"


@needs_numba
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_numba_cache_is_found(cache, tmp_path, kind):
    damaged = shutil.copytree(cache, tmp_path / "cache")
    for form in ("neutral", "general"):
        for path in files_of(damaged, form, kind):
            path.write_bytes(path.read_bytes()[:100])
    status, out = verified(damaged)
    assert status == 1 and "self-check: 1 wrong" in out
    assert "    2 kernels of tier numba cannot be kept in Numba's cache" in out
    assert f"delete the folder {damaged / 'fastrms'}, and run this again" in out


@needs_numba
def test_a_numba_cache_that_cannot_be_written_is_found(tmp_path):
    """A file stands where the folder should be; permissions do not stop root."""
    (tmp_path / "cache").write_text("")
    status, out = verified(tmp_path / "cache")
    assert status == 1 and "NotADirectoryError" in out and "or set NUMBA_CACHE_DIR to a folder that can be written\n" in out


@needs_numba
def test_parallel_kernels_that_are_kept_are_checked():
    """A parallel kernel that was never compiled is left alone; one on disk is run and compared."""
    numba = backends.load("numba")
    assert not [*self_check.wrong_kernels(lambda *of: self_check.in_parallel(numba, *of), "numba, parallel", ADAGRAD)]
    kernels, _ = numba.compiler()
    assert {*ADAGRAD} <= {*self_check.kept_in_parallel(kernels)} <= {*config.kernels()}
