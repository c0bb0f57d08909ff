"""The benchmark as a user runs it, small: it checks its contenders, prints tables, writes its files, and can say no."""

import itertools
import json
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, folder_with_page

import fastrms

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bench import __main__ as command
from bench import check, machine, measure, report, timing
from bench.contenders import CEILINGS, DIVIDER, FASTRMS, IN_PLACE, NAIVE, STREAMS, Contender, contenders
from bench.picture import STYLES
from bench.problem import (
    BACK_TO_BACK,
    PLACEMENTS,
    PLACES,
    RULES,
    WELL_PLACED,
    Problem,
    allocate,
    at_places,
    bytes_per_element,
    divides,
)
from bench.results import Results
from bench.timing import Timing, interleaved

ROOT = Path(__file__).parent.parent
needs_c = pytest.mark.skipif("c" not in BACKENDS, reason="the ceilings are C loops")


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """The command in an empty folder with the page of its tables; restores the number of threads."""
    with folder_with_page(tmp_path, monkeypatch, "bench") as folder:
        yield folder


def test_a_small_run_writes_tables_pictures_and_json(small_run, capsys):
    command.main(["--quick", "--sizes", "64,1003", "--rules", "rmsprop,rprop", "--json", "out.json", "--docs"])
    out = capsys.readouterr().out
    titles = ("ns per element", "GB/s", "times naive", "times in-place", "placement:", "empty Python call")
    for words in (NAIVE, IN_PLACE, *PLACEMENTS, *titles, *(CEILINGS if "c" in BACKENDS else ())):
        assert words in out
    assert ("first step of fastrms numba" in out) == ("numba" in BACKENDS)
    for what in ("time", "bandwidth", "speedup"):
        assert (small_run / f"fastrms-bench-{what}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (small_run / f"fastrms-bench-{what}.svg").read_text()
    page = (small_run / "docs/performance.md").read_text()
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page
    assert re.search(r"\| rmsprop \| naive NumPy \|", page)
    assert command.parse(["--readme"]).docs  # the name that it had
    check_json(json.loads((small_run / "out.json").read_text()))


def test_every_name_in_the_tables_is_explained_below_them():
    for name in (NAIVE, IN_PLACE, *CEILINGS, "fastrms c, numba, numpy"):
        assert f"{name}:" in report.LEGEND
    for title in ("times naive", "times in-place", "GB/s", "ceiling"):
        assert title in report.LEGEND
    caption = report.placement_table({where: Results("float32", where) for where in PLACEMENTS}).caption
    assert all(f"{where}: " in caption for where in PLACEMENTS if where != WELL_PLACED)


def check_json(content):
    timed = {(row["placement"], row["rule"], row["size"], row["contender"]) for row in content["results"]}
    names = [NAIVE, IN_PLACE, *(FASTRMS[backend] for backend in BACKENDS)]
    placed = {
        (WELL_PLACED, rule, size, name)
        for rule in ("rmsprop", "rprop")
        for size in (64, 1003)
        for name in names + ([STREAMS] + [DIVIDER] * (rule == "rmsprop") if "c" in BACKENDS else [])
    }
    elsewhere = {(where, rule, 1003, name) for where in PLACEMENTS[1:] for rule in ("rmsprop", "rprop") for name in names}
    assert timed == placed | elsewhere
    assert all(row["minimum"] > 0 and row["median"] >= row["minimum"] for row in content["results"])
    assert content["machine"]["compiler"] == (fastrms.backends.load("c").compiler() if "c" in BACKENDS else None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_contender_is_checked(rule, dtype):
    """One wrong number in any contender, ceilings and their ways included, stops the benchmark and is named."""
    problem = Problem(rule, 1003, dtype)
    made, _ = contenders(problem, 2)
    check.check(problem, made)
    for victim in range(len(made)):
        problem = Problem(rule, 1003, dtype)
        made, _ = contenders(problem, 2)
        made[victim].read()[0][-1] += 0.01
        if made[victim].formula == DIVIDER:  # it writes its quotients anew
            made[victim] = made[victim]._replace(step=lambda: None)
        with pytest.raises(check.WrongContender, match=re.escape(made[victim].name)):
            check.check(problem, made)


def test_the_ceilings_take_every_way():
    problem = Problem("adam", 2**18, "float32")
    ways = [(contender.name, contender.way) for contender in contenders(problem, 2)[0] if contender.name in CEILINGS]
    assert len(set(ways)) == len(ways) == (7 if "c" in BACKENDS else 0)


class Disturbed:
    """Stands for timing.at_places: the ceilings take longer than fastrms c in the first `times` measurements."""

    def __init__(self, times):
        self.times, self.measured = times, []

    def __call__(self, calls, seconds):
        self.measured.append({name for name, _ in calls})
        disturbed = len(self.measured) <= self.times
        speeds = dict.fromkeys(CEILINGS, 1e6 if disturbed else 1e3) | {FASTRMS["c"]: 1e4}
        return {(name, way): Timing(speeds.get(name, 1e7), 1e7, 3, 1) for name, way in calls}


@pytest.fixture
def only_timings(small_run, monkeypatch):
    """A small run without the first compilation and without pictures."""
    monkeypatch.setattr(command.first_step, "sentence", lambda: None)
    monkeypatch.setattr(command.picture, "draw", lambda results, facts: [])
    return small_run


@needs_c
@pytest.mark.parametrize("times", [0, 1, 3, 100])
def test_a_disturbed_ceiling_is_measured_again_and_never_fails_the_run(only_timings, monkeypatch, capsys, times):
    disturbed = Disturbed(times)
    monkeypatch.setattr(command.timing, "at_places", disturbed)
    command.main(["--quick", "--sizes", "4096", "--rules", "rmsprop", "--json", "out.json"])
    out = capsys.readouterr().out
    of_placed = [names for names in disturbed.measured if STREAMS in names]
    assert len(of_placed) == min(times, 4) + 1
    assert all(names == {FASTRMS["c"], *CEILINGS} for names in of_placed[1:])
    assert ("DISTURBED: fastrms c, rmsprop, 2^12 elements" in out) == (times > 4)
    assert bool(json.loads((only_timings / "out.json").read_text())["invalid"]) == (times > 4)


@needs_c
def test_a_quick_run_that_is_late_measures_nothing_again(only_timings, monkeypatch, capsys):
    disturbed = Disturbed(100)
    monkeypatch.setattr(command.timing, "at_places", disturbed)
    monkeypatch.setattr(command.Run, "is_late", lambda run, limit=0: bool(disturbed.measured))
    command.main(["--quick", "--sizes", "4096", "--rules", "rmsprop"])
    assert len(disturbed.measured) == 1 and "no time left" in capsys.readouterr().out


def test_a_wrong_result_fails_the_run(only_timings, monkeypatch):
    def wrong(problem, made):
        raise check.WrongContender("naive NumPy is wrong")

    monkeypatch.setattr(measure, "check", wrong)
    with pytest.raises(SystemExit) as info:
        command.main(["--quick", "--sizes", "64", "--rules", "rmsprop"])
    assert info.value.code == "naive NumPy is wrong"  # which Python prints, and ends with status 1


def test_a_machine_that_hides_itself_is_described(monkeypatch):
    def hidden(*arguments, **options):
        raise OSError("hidden")

    monkeypatch.setattr(machine.Path, "read_text", hidden)
    monkeypatch.setattr(machine.os, "sched_getaffinity", hidden, raising=False)
    facts = machine.describe()
    assert facts["caches"] == {} and facts["cores"] and "caches unknown" in machine.in_words(facts)


def test_a_contender_above_the_ceiling_is_complained_about():
    results = Results("float32", WELL_PLACED)
    made = [Contender(name, None, None) for name in (FASTRMS["c"], STREAMS, DIVIDER)]
    speeds = {FASTRMS["c"]: 80.0, STREAMS: 50.0, DIVIDER: 100.0}
    results.add("adam", 2**20, made, {(name, ""): Timing(ns, ns, 3, 1) for name, ns in speeds.items()}, {})
    assert results.nearer_ceiling("adam", 2**20) == DIVIDER
    assert results.above_ceiling() == [("adam", 2**20, FASTRMS["c"])]
    assert "125 % of the divider ceiling" in report.complaints(results)[0]
    slower = {(name, ""): Timing(1.2 * ns, ns, 3, 1) for name, ns in speeds.items()}
    results.add("rmsprop", 2**20, made, slower | {(FASTRMS["c"], ""): Timing(111.0, 119.0, 3, 1)}, {})
    assert len(results.above_ceiling()) == 1


def test_of_several_ways_the_fastest_counts():
    results = Results("float32", WELL_PLACED)
    made = [Contender(STREAMS, None, None, way) for way in ("slow", "fast", "medium")]
    timings = {(STREAMS, way): Timing(ns, ns, 3, 1) for way, ns in (("slow", 9.0), ("fast", 5.0), ("medium", 7.0))}
    results.add("adam", 64, made, timings, {})
    assert results.nanoseconds("adam", 64, STREAMS) == 5.0 and results.ways["adam", 64, STREAMS] == "fast"


def test_rounds_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = interleaved(calls, 0.0, least_rounds=4)
    assert [timing.rounds for timing in timings.values()] == [4, 4]
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes >= 2 * 4 - 1  # a, b for the calibration, then a, b in every round


def test_every_contender_begins_after_a_rest_and_its_places_follow_each_other(monkeypatch):
    events = []
    monkeypatch.setattr(timing.time, "sleep", events.append)
    monkeypatch.setattr(timing, "calibrate", lambda timer, measurement: (1, False))
    calls = {name: [partial(events.append, f"{name}{place}") for place in range(2)] for name in "ab"}
    timings = timing.at_places(calls, 0.0, least_rounds=2)
    assert events == [timing.REST, "a0", "a1", timing.REST, "b0", "b1"] * 2
    assert [taken.rounds for taken in timings.values()] == [2, 2] and timing.REST >= 0.01


def test_of_several_places_the_median_counts(monkeypatch):
    taken = {"x": [[3.0, 4.0], [9.0, 9.0], [1.0, 1.0]]}
    monkeypatch.setattr(timing, "sampled", lambda *arguments: (taken, {"x": 7}))
    assert timing.at_places({"x": [None] * 3}, 0.0) == {"x": Timing(3.0, 3.5, 2, 7)}


def test_small_buffers_lie_at_several_places():
    problems = at_places("adam", 1000, "float32")
    lines = {tuple(buffer.ctypes.data % 4096 // 64 for buffer in problem.new_buffers()) for problem in problems}
    assert len(problems) == len(lines) == PLACES >= 5
    assert len(at_places("adam", 2**16, "float32")) == len(at_places("adam", 1000, "float32", BACK_TO_BACK)) == 1
    buffers = problems[0].new_buffers(scratch=[bool])
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(buffers, 2))


def test_each_place_is_measured_and_the_peers_at_the_first(monkeypatch):
    """All buffers of a cell live as long as it is timed: the ceilings keep addresses only."""
    seen, at, kept = {}, [], []

    def timed(calls, seconds):
        assert all(reference() for reference in kept)
        seen.update({key: len(places) for key, places in calls.items()})
        return {key: Timing(1.0, 1.0, 1, 1) for key in calls}

    def peer(problem):
        at.append(problem.place)
        return Contender("peer", None, None)

    monkeypatch.setattr(measure.timing, "at_places", timed)
    monkeypatch.setattr(measure, "check", lambda _, made: kept.extend(weakref.ref(c.read) for c in made if c.read))
    results = Results("float32", WELL_PLACED)
    measure.measure(results, "rmsprop", 64, 0.0, peers={"peer": peer})
    assert at == [0] and seen.pop(("peer", "")) == 1 and set(seen.values()) == {PLACES} and kept
    assert ("rmsprop", 64, "peer") in results.timings


def test_the_header_names_every_instruction_set_of_the_cpu_and_the_one_that_ran():
    facts = machine.describe()
    assert facts["isas"] == fastrms.backends.load("c").isas()
    named = f"instruction set {facts['isa']} (of {', '.join(facts['isas']) or 'none'})"
    assert named in machine.software(facts) and named in report.header(facts)
    both = machine.software(facts | {"isa": "middle", "isas": ["best", "middle", "least"]})
    assert "instruction set middle (of best, middle, least)" in both


def test_bytes_and_divisions_come_from_the_rule():
    assert bytes_per_element("rmsprop", "float32") == 20
    assert bytes_per_element("adam", np.float64) == 56
    assert [divides(rule) for rule in RULES] == [True, True, True, False]


def test_placements_lie_as_they_say():
    dtypes = [np.dtype(np.float32)] * 4
    starts = [array.ctypes.data for array in allocate(2**16, dtypes, BACK_TO_BACK)]
    assert starts[0] % 4096 == 0 and np.diff(starts).tolist() == [2**18] * 3
    apart = [array.ctypes.data % 4096 for array in allocate(2**16, dtypes, WELL_PLACED)]
    assert min(abs(a - b) for k, a in enumerate(apart) for b in apart[:k]) >= 384


@pytest.mark.parametrize("arguments", [["--sizes", "0"], ["--sizes", "big"], ["--rules", "sgd"], ["--dtype", "int8"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_the_pytest_benchmarks_run():
    """`pytest bench` collects every rule and size, and one of each contender runs."""
    run = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*run, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for rule in RULES:
        assert f"[{rule}-64-naive_NumPy-1]" in listed
    done = subprocess.run([*run, "--benchmark-disable", "-k", "adagrad-64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d passed", done.stdout), done.stdout


@pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not installed")
def test_numba_is_a_row_for_one_thread_and_for_its_layer():
    for threads, name in ((1, "fastrms numba"), (2, f"fastrms numba ({fastrms.backends.load('numba').started()[0]})")):
        made, _ = contenders(Problem("adagrad", 64, "float32"), threads)
        assert [contender.name for contender in made if "numba" in contender.name] == [name]
        assert name in FASTRMS.values() and name in STYLES


@needs_c
def test_ceilings_and_updates_differ():
    """The ceilings are loops of their own: no contender's buffers are another's."""
    made, _ = contenders(Problem("adam", 64, "float32"), 2)
    buffers = [buffer for contender in made for buffer in contender.read()]
    assert len({buffer.ctypes.data for buffer in buffers}) == len(buffers)
