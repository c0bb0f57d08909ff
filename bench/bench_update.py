"""pytest-benchmark over rule x size x contender x threads: `pytest bench`; compare runs with `--benchmark-compare`.

A group is one rule at one size; the names in it are the same on every machine.  Each contender is checked first.
"""

import pytest

import fastrms
from bench.check import check
from bench.contenders import FASTRMS, IN_PLACE, NAIVE, contenders, row
from bench.problem import RULES, Problem, bytes_per_element

SIZES = (64, 1024, 2**14, 2**17, 2**20, 2**24)
ALONE = (NAIVE, IN_PLACE, FASTRMS["numpy"])  # these have one thread
THREADED = [backend for backend in ("numba", "c") if backend in fastrms.available_backends()]
CONTENDERS = [(name, 1) for name in ALONE] + [(row(b, threads), threads) for b in THREADED for threads in (1, 2)]
CASES = [(rule, size, *contender) for rule in RULES for size in SIZES for contender in CONTENDERS]


@pytest.fixture
def use_threads():
    before = fastrms.get_num_threads()
    yield fastrms.set_num_threads
    fastrms.set_num_threads(before)


@pytest.mark.parametrize(
    ("rule", "size", "name", "threads"), CASES, ids=[f"{r}-{s}-{n.replace(' ', '_')}-{t}" for r, s, n, t in CASES]
)
def test_update(benchmark, use_threads, rule, size, name, threads):
    use_threads(threads)
    problem = Problem(rule, size, "float32")
    (contender,), _ = contenders(problem, threads, names=[name])
    check(problem, [contender])
    benchmark.group = f"{rule} {size}"
    benchmark.extra_info["bytes_moved"] = size * bytes_per_element(rule, "float32")
    benchmark(contender.step)
