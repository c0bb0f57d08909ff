"""`python -m bench --shapes ...`: measures a reader's own model rule by rule, and writes its tables."""

import json
from datetime import date
from pathlib import Path

from rich.table import Table

from . import machine, model, peers, report

SECONDS = 12.0  # of timing for each rule, a quarter of that in a quick run
COLUMNS = ("", "median us", "10 %", "90 %", "times naive")
CAPTION = "times naive: naive NumPy's time over that of the row, the median of these ratios over the rounds"


def run(options, command, console):
    """Measure and print all rules; write the files that the options ask for."""
    peers.use_threads(options.threads)
    missing = peers.available(["torch fused"])[1] if options.how == "torch" else {}
    for reason in missing.values():
        raise ValueError(f"--how torch needs torch: {reason}")
    if options.docs:
        report.check_page(report.PAGE, "model")
    facts = machine.describe() | {"peers": peers.versions()}
    console.print(report.header(facts, model.PLACED))
    measured = {}
    for rule in options.rules:
        asked = model.Asked(rule, options.shapes, options.how, options.clip, options.schedule, options.dtype)
        samples, reasons = model.measure(asked, SECONDS / (4 if options.quick else 1), options.threads)
        measured[asked] = list(model.rows(samples))
        console.print(f"\n{asked.in_words()}", style="bold")
        console.print(table(measured[asked]))
        for name, reason in reasons.items():
            console.print(f"{name}: {reason}", markup=False)
    if options.json:
        Path(options.json).write_text(json.dumps(content(measured, facts, command), indent=1) + "\n")
    if options.docs:
        report.write_page(report.PAGE, "model", markdown(measured, facts, command))


def cells(row):
    return [row.contender, *map(report.number, row[1:-1]), f"{report.number(row.over_naive)}x"]


def table(rows):
    shown = Table(caption=CAPTION, caption_justify="left")
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        shown.add_row(*cells(row), style="bold" if row.contender.startswith("fastrms c") else None)
    return shown


def content(measured, facts, command):
    """What the JSON file holds: microseconds of a step."""
    results = [asked._asdict() | row._asdict() for asked, rows in measured.items() for row in rows]
    return {"command": command, "date": date.today().isoformat(), "machine": facts, "results": results}


def markdown(measured, facts, command):
    lines = ["| rule | | median us | 10 % | 90 % | times naive |", "|---|---|---:|---:|---:|---:|"]
    lines += [f"| {asked.rule} | {' | '.join(cells(row))} |" for asked, rows in measured.items() for row in rows]
    lines += ["", f"{next(iter(measured)).in_words().partition(', ')[2]}; {model.PLACED}; {CAPTION}."]
    lines += [f"{machine.in_words(facts)}; {machine.software(facts)}; {date.today().isoformat()}; `{command}`."]
    return "\n".join(lines)
