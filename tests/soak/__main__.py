"""`python -m tests.soak`: run the checks of reliability, in less than 30 minutes; what they found is in soak/found.json.

With names: only these checks; in a file that --json names, they take the place of those of the same name.
--short: with small bounds, in about 30 s; writes nothing, either, unless --json says where.
--peers: put the same questions to the other libraries that are installed, instead of running the checks.
--docs: write the tables of docs/trust.md, too; --stored: from the file, without running anything.
"""

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path

from . import ROOT, find, page, peers, run, run_one

COMMAND = "python -m tests.soak"
FOUND = ROOT / "tests" / "soak" / "found.json"


def options(arguments):
    in_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=in_lines)
    parser.add_argument("names", nargs="*", help=f"which checks; all are: {', '.join(find())}")
    for flag in ("short", "peers", "docs", "stored"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", help="the file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = {*chosen.names} - {*find()}
    if unknown:
        parser.error(f"no check is called {', '.join(sorted(unknown))}")
    return chosen


def machine():
    """Processor, system and versions, in words; bench.machine knows them."""
    from bench import machine

    found = machine.describe()
    return f"{machine.in_words(found)}; Linux {platform.release()}; {machine.software(found)}"


def run_all(chosen, before):
    """After each check, what was found, with date, machine, versions and command; before: the outcomes to keep of others."""
    rows = {row["name"]: row for row in before if chosen.names}
    said = {"date": date.today().isoformat(), "machine": machine(), "command": COMMAND + " --short" * chosen.short}
    for name in chosen.names or find():
        outcome = run(name, chosen.short)
        print(f"{outcome.outcome:8} {outcome.seconds:6.1f} s  {name}: {outcome.figure}", flush=True)
        rows[name] = outcome._asdict()
        yield said | {"checks": [rows[name] for name in find() if name in rows]}


def found_by(chosen, before):
    """What there is to write, time and again: an interrupted run has lost nothing."""
    if chosen.peers:
        yield {"peers": peers.table() | {"machine": machine()}}
    elif not chosen.stored:
        yield from run_all(chosen, before.get("checks", []))


def main(arguments=None):
    """The words with which the program ends; None where all went well."""
    chosen = options(arguments)
    if chosen.one:
        return run_one(chosen.one, chosen.short, chosen.json)
    path = Path(chosen.json or FOUND)
    found = json.loads(path.read_text()) if path.exists() else {}
    for more in found_by(chosen, found):
        found |= more
        if chosen.json or not (chosen.names or chosen.short):
            path.write_text(json.dumps(found, indent=1) + "\n")
    if chosen.docs:
        page.write(ROOT / page.PAGE, found)
    failed = [outcome["name"] for outcome in found.get("checks", []) if outcome["outcome"] == "failed"]
    return f"failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
