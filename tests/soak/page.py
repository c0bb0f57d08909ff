"""docs/trust.md: the tables of what the checks found, between the markers of the page."""

from pathlib import Path

PAGE = Path("docs/trust.md")
WORDS = {"passed": "passed", "failed": "**failed**", "not run": "not run"}


def cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def checks(found):
    """One row for each check."""
    lines = ["| check | what is promised | found | |", "| --- | --- | --- | --- |"]
    for row in found["checks"]:
        took = f"{WORDS[row['outcome']]}, {row['seconds']:.0f} s"
        lines.append(f"| `{row['name']}` | {cell(row['promise'])} | {cell(row['figure'])} | {took} |")
    count = {word: sum(row["outcome"] == word for row in found["checks"]) for word in WORDS}
    said = ", ".join(f"{number} {word}" for word, number in count.items())
    minutes = sum(row["seconds"] for row in found["checks"]) / 60
    footer = f"{said}; {minutes:.0f} minutes in all; {found['machine']}; {found['date']}; `{found['command']}`."
    return "\n".join([*lines, "", footer])


def others(found):
    """One row for each library, one column for each question."""
    questions, rows = found["peers"]["questions"], found["peers"]["rows"]
    lines = [f"| | {' | '.join(cell(words) for words in questions.values())} |", f"| --- |{' --- |' * len(questions)}"]
    for name, answers in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(answers[key]) for key in questions)} |")
    asked = found["peers"]
    versions = ", ".join(f"{name} {version}" for name, version in asked["versions"].items())
    return "\n".join([*lines, "", f"{versions}; {asked['machine'].split(';')[0]}; {asked['date']}; `{asked['command']}`."])


def write(path, found):
    from bench import report

    for name, table in (("checks", checks), ("peers", others)):
        if name in found:
            report.write_page(path, f"soak-{name}", table(found))
