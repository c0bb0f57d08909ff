"""What `python -m bench.figures` has measured of the sets in SETS, a file for each machine, and the tables of them all."""

import json
import re
from datetime import date
from pathlib import Path

from .machine import in_words, software

FOLDER = Path(__file__).parent / "machines"  # a folder for each set
SETS = ("machine", "formats")


def store(name, facts, figures):
    """Write the file of this machine for a set of figures, named after its processor, cores and caches; returns its path."""
    words = re.sub(r"\((r|tm)\)", "", in_words(facts).lower())
    path = FOLDER / name / f"{re.sub('[^a-z0-9]+', '-', words).strip('-')}.json"
    content = {"command": f"python -m bench.figures {name}", "date": date.today().isoformat(), "machine": facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"figures": [figure._asdict() for figure in figures]}, indent=1) + "\n")
    return path


def stored(name):
    """What the files of a set hold, the newest measurement first."""
    found = [json.loads(path.read_text()) for path in sorted((FOLDER / name).glob("*.json"))]
    return sorted(found, key=lambda content: content["date"], reverse=True)


def markdown(name):
    """One row for each figure, one column for each machine."""
    machines = stored(name)
    names = [in_words(content["machine"]) for content in machines]
    targets = {figure["what"]: figure["target"] for content in machines for figure in content["figures"]}
    found = [{figure["what"]: in_cell(figure) for figure in content["figures"]} for content in machines]
    lines = [f"| what | target | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(machines)}"]
    for what, target in targets.items():
        lines.append(f"| {what} | {target} | {' | '.join(cells.get(what, '') for cells in found)} |")
    for name, content in zip(names, machines, strict=True):
        lines += ["", f"{name}: {software(content['machine'])}; {content['date']}; `{content['command']}`."]
    return "\n".join(lines)


def in_cell(figure):
    """The measurement, and where the target is missed what the machine allows."""
    beside = f" ({figure['beside']})" if figure["beside"] else ""
    most = f"; at most {figure['at_most']}" if figure["at_most"] else ""
    fine = figure["ok"] or figure["measured"].startswith("not measured")
    return figure["measured"] + beside if fine else f"**{figure['measured']}{beside}, missed{most}**"
