"""What `python -m bench.gpu` found, for people: fastrms-gpu.md and fastrms-gpu.png."""

from .gpu_kernels import MAKERS
from .report import number, size_name

RULES, FORMATS = "rules", "formats"
NOT_TIMES = (
    "**The driver double of the tests ran this on a CPU: the times are made up, and only say that the script works.**"
)


def markdown(found):
    """The page."""
    machine, parts = found["machine"], found["parts"]
    lines = [f"# fastrms on {machine['name']}", ""]
    if found["double"]:
        lines += [NOT_TIMES, ""]
    software = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines += [f"{found['date']}; CUDA of the driver {machine['CUDA of the driver']}; {machine['nvidia-smi']}; {software}; "
              f"`{found['command']}`.", ""]  # fmt: skip
    for title, make in SECTIONS.items():
        part = parts.get(title)
        if part is not None:
            lines += [f"## {title}", "", *(failed(part) if "failed" in part else make(part["found"])), ""]
    lines += [f"{title}: {part['left out']}" for title, part in parts.items() if "left out" in part]
    return "\n".join(lines).rstrip() + "\n"


def failed(part):
    return ["It failed:", "", "```", part["failed"].rstrip(), "```"]


def table(head, rows):
    return [f"| {' | '.join(head)} |", f"|{'---|' * 1}{'---:|' * (len(head) - 1)}", *(f"| {' | '.join(r)} |" for r in rows)]


def of_tests(found):
    lines = [f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, {found['seconds']:.0f} s."]
    return lines + [f"* {name}" for name in found["failures"]]


def of_rules(rows):
    """GB/s of each rule and size, with the share of the ceiling of as many streams in brackets."""
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = [row for row in rows if row["dtype"] == dtype]
        sizes = sorted({row["elements"] for row in chosen})
        cells = {(row["what"], row["elements"]): row for row in chosen}
        names = dict.fromkeys(row["what"] for row in chosen)
        body = [[name, *(of_cell(cells.get((name, size))) for size in sizes)] for name in names]
        lines += ["", *table([f"{dtype}: GB/s (% of streams)", *map(size_name, sizes)], body)]
    return lines[1:]


def of_cell(row):
    if row is None:
        return ""
    share = f" ({row['% of streams']:.0f})" if "% of streams" in row else ""
    return f"{row['GB/s']:.0f}{share}"


def of_formats(rows):
    """As of_rules(), and how many times as fast as float32; of each way the bytes that it moves."""
    lines = ["Gradients are in bf16, but for float32 and for the streams; GB/s count the bytes that are moved."]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        chosen = [row for row in rows if row["rule"] == rule]
        sizes = sorted({row["elements"] for row in chosen})
        cells = {(row["what"], row["elements"]): f"{of_cell(row)}, {row['over float32']:.2f}x" for row in chosen}
        names = {row["what"]: row["bytes per element"] for row in chosen}
        body = [[name, number(moved), *(cells.get((name, size), "") for size in sizes)] for name, moved in names.items()]
        head = [f"{rule}: GB/s (% of streams), speed over float32", "bytes per element", *map(size_name, sizes)]
        lines += ["", *table(head, body)]
    return lines


def of_rates(rows):
    body = [[str(row["what"]), *(str(row.get(name, "")) for name in ("rule", "tensors", "dtype")),
             size_name(row["elements"]) if "elements" in row else "", number(row.get("us")), number(row.get("GB/s")),
             row.get("refused", "")] for row in rows]  # fmt: skip
    return table(["", "rule", "tensors", "dtype", "elements", "us", "GB/s", "left out because"], body)


def of_many(rows):
    body = [[f"{row['tensors']} x {size_name(row['elements'])}", number(row["us"]), number(row["us of one tensor"]),
             f"{row['us'] / row['us of one tensor']:.2f}", number(row["us with clip_norm"]),
             number(row["us with nonfinite=\"skip\""])] for row in rows]  # fmt: skip
    return table(["tensors", "us", "us of one tensor of that size", "ratio", "us with clip_norm",
                  "us with nonfinite=\"skip\""], body)  # fmt: skip


def of_costs(found):
    return table(["one call from Python", "us"], [[name, number(taken)] for name, taken in found.items()])


SECTIONS = {
    "tests": of_tests,
    RULES: of_rules,
    "many tensors": of_many,
    "views": of_rates,
    FORMATS: of_formats,
    "torch": of_rates,
    "CuPy": of_rates,
    "Optax": of_rates,
    "calls from Python": of_costs,
    "variants": of_rates,
}


def draw(found, path):
    """Bars: what each way reaches of the memory's bandwidth at the largest size; returns whether matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return False
    rows = bars(found["parts"])
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, rates = [row["what"] for row in rows], [row["GB/s"] for row in rows]
    colors = ["tab:blue" if name.partition(":")[0] in MAKERS or name.startswith("fastrms") else
              "lightgray" if name == "copy" or name.endswith("Streams") else "tab:orange" for name in names]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(rows) + 1.2))
    axes.barh(names, rates, color=colors)
    axes.bar_label(axes.containers[0], fmt="%.0f", padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="GB/s that the rule must move", xlim=(0, 1.1 * max(rates)))
    axes.set_title(f"{found['machine']['name']}, {size_name(rows[0]['elements'])} elements, float32", fontsize="medium")
    if found["double"]:
        figure.text(0.5, 0.5, "made-up times of the driver double", ha="center", rotation=20, fontsize=16, color="red")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return True


def bars(parts):
    """The float32 rows of all parts at 2^26 elements, or at the largest size below; those of formats with their rule."""
    rows = [row for name in (RULES, "torch", "CuPy", "Optax") for row in parts.get(name, {}).get("found", ())]
    stored = [row for row in parts.get(FORMATS, {}).get("found", ()) if not row["what"].endswith("Streams")]
    rows += [{**row, "what": f"{row['rule']}: {row['what']}"} for row in stored]
    rows = [row for row in rows if row.get("dtype") == "float32" and row.get("tensors", 1) == 1]
    size = max((row["elements"] for row in rows if row["elements"] <= 1 << 26), default=0)
    return list({row["what"]: row for row in rows if row["elements"] == size}.values())
