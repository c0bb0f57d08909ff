"""The checks of `python -m tests.soak`, each in its short form, and the page docs/trust.md, which says what they have found.

In the short form nothing that is timed can fail, and a check has minutes, so that a busy machine does not matter.
"""

import json
import re
import subprocess
import sys

import pytest

from tests import soak
from tests.soak import __main__ as command
from tests.soak import page, peers

CHECKS = soak.find()
SHORT = [name for name, function in CHECKS.items() if function.short is not None]
PAGE = (soak.ROOT / page.PAGE).read_text()


@pytest.mark.parametrize("name", SHORT)
def test_short_form(name):
    outcome = soak.run(name, short=True, patience=600)
    if outcome.outcome == "not run":
        pytest.skip(outcome.figure)
    assert outcome.outcome == "passed", outcome.figure


# what was found, and the page


@pytest.fixture(scope="module")
def found():
    return json.loads(command.FOUND.read_text())


def block(name):
    return re.search(rf"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", PAGE, re.S)[1]


def test_the_page_says_what_was_found(found):
    """`python -m tests.soak --stored --docs` writes it again."""
    assert block("soak-checks") == page.checks(found)
    assert block("soak-peers") == page.others(found)


def test_what_was_found_is_of_these_checks(found):
    """A new check, or one that promises something else now, is to be run."""
    assert [row["name"] for row in found["checks"]] == list(CHECKS)
    for row in found["checks"]:
        assert tuple(row) == soak.Outcome._fields and row["outcome"] in ("passed", "not run"), row
        assert row["promise"] == soak.promise(row["name"]), row["name"]
    assert sum(row["seconds"] for row in found["checks"]) < 1800  # as the command says
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]) and "cores" in found["machine"] and found["command"]


def test_what_others_answered_is_to_these_questions(found):
    asked = found["peers"]
    assert asked["questions"] == peers.words() and {"fastrms", "torch"} <= {*asked["versions"]}
    assert {*asked["rows"]} <= {*peers.CONTENDERS}
    for name, answers in asked["rows"].items():
        assert {*answers} == {*asked["questions"]}, name
        assert not name.startswith("fastrms") or not any("FAILS" in said for said in answers.values()), name
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", asked["date"]) and asked["machine"] and asked["command"]


SAID = {
    "date": "2001-02-03", "machine": "a machine, 2 cores", "command": "the command",
    "checks": [
        {"name": "one", "promise": "a | b", "outcome": "passed", "figure": "7", "seconds": 61.0},
        {"name": "two", "promise": "c", "outcome": "failed", "figure": "x\ny", "seconds": 59.0},
        {"name": "three", "promise": "d", "outcome": "not run", "figure": "no compiler", "seconds": 0.4},
    ],
    "peers": {
        "date": "2001-02-03", "machine": "a machine; Linux", "command": "the other command",
        "versions": {"numpy": "1", "torch": "2"},
        "questions": {"tails": "the same | bits"}, "rows": {"torch Adam": {"tails": "holds"}},
    },
}  # fmt: skip


def test_a_table_of_checks():
    lines = page.checks(SAID).splitlines()
    assert lines[2:5] == [
        "| `one` | a \\| b | 7 | passed, 61 s |",
        "| `two` | c | x y | **failed**, 59 s |",
        "| `three` | d | no compiler | not run, 0 s |",
    ]
    assert lines[-1] == "1 passed, 1 failed, 1 not run; 2 minutes in all; a machine, 2 cores; 2001-02-03; `the command`."


def test_a_table_of_other_libraries(tmp_path):
    lines = page.others(SAID).splitlines()
    assert lines[0] == "| | the same \\| bits |" and lines[2] == "| torch Adam | holds |"
    assert lines[-1] == "numpy 1, torch 2; a machine; 2001-02-03; `the other command`."
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- soak-peers:begin -->\nold\n<!-- soak-peers:end -->\nafter\n")
    page.write(path, SAID)
    assert path.read_text() == f"before\n<!-- soak-peers:begin -->\n{page.others(SAID)}\n<!-- soak-peers:end -->\nafter\n"


# the command


def test_outcomes():
    def missing():
        raise soak.NotRun("no compiler")

    assert soak.outcome_of(lambda n: f"{n} calls", {"n": 3}) == ("passed", "3 calls")
    assert soak.outcome_of(missing, {}) == ("not run", "no compiler")
    assert soak.outcome_of(lambda: 1 / 0, {}) == ("failed", "ZeroDivisionError: division by zero")
    assert soak.outcome_of(lambda: sys.exit(5), {}) == ("failed", "SystemExit: 5")


def test_what_a_fuzzer_found_is_said_whatever_it_says_afterwards():
    code = "import sys; sys.exit(\"KeyError: 'lr'\\n\" + 1000 * '.')"
    with pytest.raises(AssertionError, match="ended with 1: KeyError: 'lr'"):
        soak.programs.said(sys.executable, "-c", code)


@pytest.mark.parametrize(("code", "said"), [
    ("import time; time.sleep(1000)", "did not end within 0.5 s"),
    ("import os; os.fork() or os.execvp('sleep', ['sleep', '1000']); os.wait()", "did not end within 0.5 s"),
    ("import sys; sys.exit('it has died')", "ended with 1: it has died"),
])  # fmt: skip
def test_a_process_is_ended_with_all_that_it_started(code, said):
    start = [sys.executable, "-c", code]
    process = subprocess.Popen(start, start_new_session=True, stderr=subprocess.PIPE, text=True)
    patience = 0.5 if "0.5" in said else 600
    assert soak.ended(process, patience).strip() == said


def test_a_check_without_a_short_form(tmp_path):
    soak.run_one("memcheck", True, tmp_path / "outcome.json")
    assert json.loads((tmp_path / "outcome.json").read_text()) == ["not run", "it has no short form"]


def test_single_checks_take_their_place_in_the_file(tmp_path, monkeypatch, capsys):
    path, names = tmp_path / "found.json", list(CHECKS)
    old = [{"name": name, "promise": "", "outcome": "failed", "figure": "", "seconds": 1.0} for name in names[:3]]
    path.write_text(json.dumps({"checks": old, "peers": "as it was"}))
    monkeypatch.setattr(command, "run", lambda name, short: soak.Outcome(name, "p", "passed", "f", 2.0))
    assert command.main([names[1], "--json", str(path)]) == f"failed: {names[0]}, {names[2]}"
    found = json.loads(path.read_text())
    assert [(row["name"], row["outcome"]) for row in found["checks"]] == [
        (names[0], "failed"), (names[1], "passed"), (names[2], "failed"),
    ]  # fmt: skip
    assert found["peers"] == "as it was" and found["command"] == command.COMMAND
    assert command.main([*names, "--json", str(path)]) is None and "passed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "no check is called nothing" in capsys.readouterr().err
