"""What exists here: backends, instruction sets, rules.  Tests run over all of it, and the header says how much that is."""

import atexit
import contextlib
import functools
import importlib.util
import subprocess
import tempfile

import numpy as np
import pytest

import fastrms
from fastrms import backends, optimizers, recipes, rules
from fastrms.self_check import bits, forced, raw_recipe, wild_values  # noqa: F401  the tests have them from here

c = backends.load("c")
BACKENDS = tuple(name for name in fastrms.available_backends() if name in backends.HOST)  # test_cuda.py has the GPU
WAYS = [("c", isa) for isa in c.isas()] + [(name, None) for name in BACKENDS if name != "c"]
DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
CLASSES = [
    made
    for made in vars(optimizers).values()
    if isinstance(made, type) and issubclass(made, fastrms.Optimizer) and made is not fastrms.Optimizer
]
FAMILIES = {make.__name__.lower(): make for make in CLASSES}  # as their functions are named, in Python and in C
FUNCTIONS = {name: make for name, make in FAMILIES.items() if hasattr(fastrms, name)}


def recipe_of(make):
    """The name in recipes.FAMILIES for a class: its own, or that of the class from which it is derived."""
    return next(base.__name__.lower() for base in make.__mro__ if base.__name__.lower() in recipes.FAMILIES)


def begin(item):
    """The function `begin` of the module of a test, None where it has none."""
    return getattr(getattr(item, "module", None), "begin", None)


def pytest_collection_modifyitems(session, items):
    """Tests of what other processes do come last; these processes begin before the first test."""
    items.sort(key=lambda item: begin(item) is not None)


def pytest_collection_finish(session):
    for function in () if session.config.option.collectonly else dict.fromkeys(map(begin, session.items)):
        if function is not None:
            function()


def in_background(command, cwd):
    """A function that gives (status, stdout, stderr) of a process, which begins now, when it has ended."""
    out, err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  they are read when the process has ended
    process = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd)
    atexit.register(process.kill)

    @functools.cache
    def ended():
        process.wait()
        return process.returncode, *((stream.seek(0), stream.read())[1] for stream in (out, err))

    return ended


def pytest_report_header(config):
    built = [c.ffi.string(c.lib.fastrms_isa_name(k)).decode() for k in range(c.lib.fastrms_isa_count())] if c.lib else []
    return [
        f"fastrms {fastrms.__version__} from {fastrms.__file__}: {len(WAYS)} tiers run "
        f"({', '.join(isa or name for name, isa in WAYS)}), {len(c.isas())} of {len(built)} built instruction sets "
        f"({', '.join(built)}), {len(rules.RULES)} rules",
        "all tests together take 5 to 12 minutes on 2 cores",
    ]


NEEDED = {  # what tests are skipped without: module -> its name for people
    "numba": "numba", "torch": "torch", "jax": "jax", "optax": "optax", "keras": "keras", "deepspeed": "deepspeed",
    "numba_cuda": "numba-cuda", "mpi4py": "mpi4py",
}  # fmt: skip


def pytest_unconfigure(config):
    """The last line of a run with skipped tests."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if skipped:
        missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
        missing += [] if "cuda" in fastrms.available_backends() else ["a GPU"]
        reporter.write_line(
            f"{skipped} skipped tests are normal: they need what is not installed or not there ({', '.join(missing)}), or a "
            f"combination that does not exist; the lines above say which."
        )


@contextlib.contextmanager
def folder_with_page(path, monkeypatch, block):
    """An empty folder to work in, with a page that has this block of tables; restores the number of threads."""
    monkeypatch.chdir(path)
    (path / "docs").mkdir()
    (path / "docs/performance.md").write_text(f"before\n<!-- {block}:begin -->\nold\n<!-- {block}:end -->\nafter\n")
    threads = fastrms.get_num_threads()
    yield path
    fastrms.set_num_threads(threads)


@pytest.fixture(params=WAYS, ids=[isa or name for name, isa in WAYS])
def tier(request):
    """The backend module with one instruction set forced."""
    name, isa = request.param
    with forced(isa):
        assert isa in (None, fastrms.isa())
        yield backends.load(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


class Guarded:
    """An array at an odd offset with a guard zone on both sides."""

    ZONE = 16

    def __init__(self, values, offset=0):
        self.memory = np.full(values.size + 2 * self.ZONE + 8, 77.25, values.dtype)
        start = self.ZONE + offset
        self.array = self.memory[start : start + values.size]
        self.array[:] = values
        self.outside = np.ones(self.memory.size, bool)
        self.outside[start : start + values.size] = False

    def intact(self):
        return bool((self.memory[self.outside] == 77.25).all())


# for the beginning of a program in a string, indented as those in the tests are
THREADS_AT_ONCE = """
    import threading

    def at_once(count, work):
        errors = []

        def run():
            try:
                work()
            except BaseException as error:
                errors.append(error)

        runners = [threading.Thread(target=run, daemon=True) for _ in range(count)]
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join()
        assert not errors, errors[0]
"""


@pytest.fixture
def pool():
    """pool(threads, chunk): also small steps of the C backend are shared out; as before afterwards."""
    before = fastrms.get_num_threads()

    def set_pool(count, chunk):
        fastrms.set_num_threads(count)
        if c.lib:
            c.lib.fastrms_set_chunks(chunk, 1)

    yield set_pool
    fastrms.set_num_threads(before)
    if c.lib:
        c.lib.fastrms_set_chunks(8 * 1024, 32 * 1024)
