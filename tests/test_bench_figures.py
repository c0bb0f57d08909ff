"""`python -m bench.figures machine`, small: its rows, and what it prints, stores, writes into the page and refuses."""

import json
import re
from pathlib import Path

import pytest
from conftest import BACKENDS

import fastrms

pytest.importorskip("rich")
from bench import (
    contenders,
    figures,
    figures_formats,
    figures_machine,
    figures_numpy,
    machine,
    machines,
    model,
    peers,
    report,
    timing,
)
from bench.figures import Figure
from bench.problem import PLACES
from bench.results import Results

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
needs_c = pytest.mark.skipif("c" not in BACKENDS, reason="the figures are those of C")
SPREAD = ("2^12", "2^13")
FACTS = {"cpu": "Some(R) CPU", "cores": 2, "caches": {"L2": 2**20}, "python": "3", "numpy": "2", "fastrms": "1"}
FACTS |= {"compiler": "gcc", "isa": "best", "isas": ["best", "least"], "threads": 2, "peers": {"torch": "9"}}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with a block for the table, an empty folder for the machines, and the number of threads as it was."""
    path = tmp_path / "performance.md"
    path.write_text("before\n<!-- figures-machine:begin -->\nold\n<!-- figures-machine:end -->\nafter\n")
    monkeypatch.setattr(report, "PAGE", path)
    monkeypatch.setattr(machines, "FOLDER", tmp_path / "machines")
    threads = fastrms.get_num_threads()
    yield path
    fastrms.set_num_threads(threads)


@pytest.fixture
def tiny(page, monkeypatch):
    """Two sizes, one short round, and naive NumPy in the place of all peers but DeepSpeed."""
    monkeypatch.setattr(figures_machine, "SECONDS", 0.0)
    monkeypatch.setattr(figures_machine, "ROUNDS", 1)
    monkeypatch.setattr(figures_machine, "STEPS", 2)
    monkeypatch.setattr(figures_machine, "SIZES", (2**12, 2**13))
    monkeypatch.setattr(figures_machine, "OVER_ONE_THREAD", {2**12: 1.4, 2**13: 1.7})
    monkeypatch.setattr(figures_machine, "STREAMED", 2**14)
    monkeypatch.setattr(figures_machine, "available", {})
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr(timing, "MEASUREMENT", 1e-5)
    stand_in = {"torch fused": lambda problem: contenders.naive(problem)._replace(name="torch fused")}
    monkeypatch.setattr(peers, "available", lambda: (stand_in, {"DeepSpeed": "not installed: pip"}))
    monkeypatch.setattr(peers, "use_threads", lambda number: None)
    fastrms.set_num_threads(2)
    return page


def rows():
    """Every row that the figures of a machine have: what -> target."""
    wanted = {}
    for rule, over in {"rmsprop": "1.3", "adagrad": "1.2", "adam": "1.15", "rprop": "1.3"}.items():
        for size in SPREAD:
            wanted[f"{rule}, {size}: over the fastest peer"] = f">= {over}x"
            wanted[f"{rule}, {size}: over our Numba backend"] = ">= 1.0x"
        wanted[f"{rule}, 2^14: of the streams' ceiling"] = ">= 95 %"
    for rule, share in {"rmsprop": 97, "adagrad": 97, "adam": 90}.items():
        for size, over in zip(SPREAD, ("1.4", "1.7"), strict=True):
            wanted[f"{rule}, {size}: two threads over one, back to back"] = f">= {over}x"
            wanted[f"{rule}, {size}: two threads over one, a step every 1 ms"] = ">= 0.97x"
        wanted[f"{rule}, in L2, one thread: of the divider's ceiling"] = f">= {share} %"
    for rule in ("adagrad", "adam"):
        wanted |= {f"{rule}, 2^14: over {name}": ">= 0.98x" for name in ("DeepSpeed", "torch fused")}
    wanted["rmsprop, 1024, bound: over naive NumPy"] = ">= 13x"
    wanted["rmsprop, 1024, bound: over the fastest framework"] = ">= 20x"
    ways = {"bound, clip_norm": 4, "bound, lr=Cosine(...)": 4, "bound, opt.lr = x": 3, "functional, another lr": 2}
    return wanted | {f"rmsprop, 1000, {way}: over naive NumPy": f">= {over}x" for way, over in ways.items()}


@needs_c
def test_every_row_is_measured_printed_stored_and_shown(tiny, capsys):
    figures.main(["machine", "--docs"])
    out, page = capsys.readouterr().out, tiny.read_text()
    (path,) = machines.FOLDER.glob("machine/*.json")
    stored = json.loads(path.read_text())
    assert str(path) in out.replace("\n", "") and f"instruction set {fastrms.isa()}" in out
    assert {row["what"]: row["target"] for row in stored["figures"]} == rows()
    assert stored["machine"]["threads"] == 2 and stored["machine"]["isas"] and stored["command"].endswith("figures machine")
    for row in stored["figures"]:
        assert row["what"] in out and f"| {row['what']} | {row['target']} | " in page
        check_measured(row)
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page


def check_measured(row):
    """The number, what it is compared with, and what the hardware allows where that is another number."""
    what, measured = row["what"], row["measured"]
    if "DeepSpeed" in what or ("Numba" in what and "numba" not in BACKENDS):
        assert measured.startswith("not measured: not installed") and not row["ok"]
    elif "every 1 ms" in what:
        assert re.fullmatch(r"[\d.]+x busy, [\d.]+x asleep", measured)
    else:
        assert re.fullmatch(r"[\d.]+(x| %)", measured)
        assert bool(row["at_most"]) == measured.endswith("x")
        beside = (
            "torch fused" if "fastest" in what else "fastrms numba (" if "Numba" in what else "2^" if "in L2" in what else ""
        )
        assert row["beside"].startswith(beside) and (row["beside"] != "") == (beside != "")


def test_the_numba_backend_and_the_peers_run_beside_c(monkeypatch):
    """All of a cell is one interleaved run: the ratios are of the same minutes."""
    asked = []

    def measured(rule, size, *names):
        asked.append(names)
        return Results("float32", "well placed")

    monkeypatch.setattr(figures_machine, "available", {"one": None, "two": None})
    monkeypatch.setattr(figures_machine, "measured", measured)
    monkeypatch.setattr(figures_machine, "over", lambda results, what, target, rivals: list(rivals))
    first, numba = list(figures_machine.against_the_fastest())[:2]
    assert first == ["one", "two"] and asked[0] == (*numba, "one", "two")
    assert [name.startswith("fastrms numba") for name in numba] == [True] * ("numba" in BACKENDS)


def test_machines_stand_side_by_side(page):
    machines.store(
        "machine", FACTS, [Figure("a", ">= 2x", "1.50x", False, "1.60x"), Figure("b", ">= 1x", "3.0x", True, "4x", "optax")]
    )
    (old,) = machines.FOLDER.glob("machine/*.json")
    old.write_text(re.sub(r'"date": "[\d-]+"', '"date": "2020-01-01"', old.read_text()))
    other = FACTS | {"cpu": "Yet Another CPU"}
    path = machines.store(
        "machine", other, [Figure("a", ">= 2x", "2.5x", True), Figure("c", ">= 1x", "not measured: x", False)]
    )
    assert path.name == "yet-another-cpu-2-cores-l2-1-mib.json"
    figures.main(["machine", "--docs", "--stored"])
    lines = page.read_text().splitlines()
    assert lines[2] == "| what | target | Yet Another CPU, 2 cores, L2 1 MiB | Some(R) CPU, 2 cores, L2 1 MiB |"
    assert lines[4:7] == [
        "| a | >= 2x | 2.5x | **1.50x, missed; at most 1.60x** |",
        "| c | >= 1x | not measured: x |  |",
        "| b | >= 1x |  | 3.0x (optax) |",
    ]
    text = page.read_text()
    assert (
        "instruction set best (of best, least), up to 2 threads (NumPy: one), torch 9; 2" in text
        and "`python -m bench.figures machine`." in text
    )


def test_a_machine_has_one_file(page):
    for number in ("1.50x", "1.70x"):
        machines.store("machine", FACTS, [Figure("a", ">= 2x", number, False)])
    (content,) = machines.stored("machine")
    assert content["figures"][0]["measured"] == "1.70x"


@pytest.mark.parametrize("name", machines.SETS)
def test_the_page_shows_the_machines_that_are_stored(name):
    page = PAGE.parent.parent / figures.PAGES.get(name, report.PAGE)
    found = re.search(f"<!-- figures-{name}:begin -->\n(.*)\n<!-- figures-{name}:end -->", page.read_text(), re.S)
    assert found[1] == machines.markdown(name), f"run `python -m bench.figures {name} --docs --stored`"
    assert machines.stored(name) and all(
        machine.in_words(content["machine"]) in found[1] for content in machines.stored(name)
    )


@pytest.mark.parametrize("arguments", [["machine", "--stored"], ["numpy", "--stored", "--docs"]])
def test_only_a_machines_figures_are_stored(arguments, capsys):
    with pytest.raises(SystemExit):
        figures.main(arguments)
    assert "--stored goes with machine --docs or formats --docs: only those figures are stored" in capsys.readouterr().err


def test_the_gap_is_not_timed(monkeypatch):
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(figures_machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(figures_machine.time, "sleep", spend)
    assert figures_machine.after(figures_machine.asleep, lambda: spend(2.0)) == 2.0
    assert now == [2.0 + figures_machine.GAP] and figures_machine.GAP == 1e-3


@needs_c
def test_the_rates_are_over_plain_naive_numpy():
    assert model.Asked("rmsprop", ((1000,),)) == figures_machine.SMALL
    for asked, *_ in figures_machine.RATES.values():
        assert asked.elements() == 1000 and (asked.clip or asked.schedule)


@needs_c
def test_small_figures_against_numpy_are_those_of_several_places(monkeypatch):
    places = []

    def timed(calls, seconds):
        places.append({len(several) for several in calls.values()})
        return {key: timing.Timing(1.0, 1.0, 1, 1) for key in calls}

    monkeypatch.setattr(timing, "at_places", timed)
    made = [*figures_numpy.functional(), *figures_numpy.bound()]
    assert places == [{PLACES}] * 3
    assert [figure.what for figure in made] == [
        "fastrms.rmsprop(w, g, v, lr=0.01), 64: over naive",
        "bound step(), 64, RMSProp: over naive",
        "bound step(), 1024, RMSProp: over naive",
    ]
    assert {figure.measured for figure in made} == {"1.00x"}


@needs_c
def test_the_picture_of_formats_has_the_ceiling_of_each(page, monkeypatch, tmp_path, capsys):
    """A row says what its bytes allow, and the picture has a bar and a line for each row."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "formats.md"
    path.write_text("<!-- figures-formats:begin -->\n<!-- figures-formats:end -->\n")
    monkeypatch.setattr(figures, "PAGES", {"formats": path})
    monkeypatch.setattr(figures, "PICTURES", {"formats": tmp_path / "formats.png"})
    monkeypatch.setattr(figures_formats, "SIZES", (2**12,))
    monkeypatch.setattr(figures_formats, "LARGE", 2**12)
    monkeypatch.setattr(figures_formats, "MEASURED", {})
    monkeypatch.setattr(figures_formats, "MEASUREMENTS", (figures_formats.in_memory,))
    monkeypatch.setattr(figures_formats, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "REST", 0.0)
    monkeypatch.setattr(timing, "MEASUREMENT", 1e-5)
    figures.main(["formats", "--docs"])
    assert path.read_text().count("| rmsprop, 2^12, ") == path.read_text().count("| adam, 2^12, ") == 4
    assert (tmp_path / "formats.png").stat().st_size > 10_000
    times = {name: 1.0 for name in figures_formats.SETTINGS} | {contenders.STREAMS: 0.5}
    row = figures_formats.row("adam", 2**12, figures_formats.BF16, times, 1.4)
    assert row.at_most == "3.1x" and not row.ok and "; at most 3.1x**" in machines.in_cell(row._asdict())


@needs_c
def test_storage_formats_are_compared_by_the_bytes_that_they_move():
    """Of Adam: the gradient, twice the parameter and its lower bits, twice each of two states."""
    moved = {"bf16 states": 2 + 8 + 8, "q8 states": 2 + 8 + 4 * (1 + 4 / 256), "split16 and bf16 states": 2 + 8 + 8}
    for name, count in moved.items():
        assert figures_formats.fewer_bytes("adam", name) == (4 + 8 + 16) / count
