"""README.md and docs/: every example runs, the commands are those of CI, the tables say what the code says."""

import copy
import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, FAMILIES, c, forced
from test_build import COMPILER

import fastrms
from fastrms import dialects

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for folder in (ROOT, ROOT / "docs") for path in sorted(folder.glob("*.md"))}
CUDA_EXAMPLES = "cupy.ones", "torch.cuda.CUDAGraph"  # they need a GPU; tests/test_gpu.py runs the second


def page(name):
    return PAGES[ROOT / "docs" / f"{name}.md"]


def block(text, name):
    return re.search(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.S)[1].strip()


def code_blocks():
    """The Python examples of the README, then those of every page."""
    return [code for text in PAGES.values() for code in re.findall(r"```python\n(.*?)```", text, re.S)]


def example(words):
    """The only example with these words in it."""
    (code,) = (code for code in code_blocks() if words in code)
    return code


def small_arrays(value=2.0):
    """w, b and their gradients gw, gb, as the examples call them."""
    w, b = np.ones(5, np.float32), np.ones(3, np.float32)
    return {"fastrms": fastrms, "w": w, "b": b, "gw": w * np.float32(value), "gb": b * np.float32(value)}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_every_example_is_executed():
    """Each Python block of README and docs is the example of exactly one test."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    executed = {*re.findall(r"\bexample\(\"([^\"]+)\"\)", tests), *CUDA_EXAMPLES}
    for code in code_blocks():
        assert sum(words in code for words in executed) == 1, f"no test, or several, for this example:\n{code}"


def test_the_first_example_runs_and_trains():
    names = {}
    exec(example("here that of the sum"), names)
    assert code_blocks()[0] == example("here that of the sum") and len(code_blocks()[0].strip().splitlines()) <= 10
    assert 0 < names["w"][0] < 0.5 and names["opt"].steps == 100


def test_the_example_of_use_runs():
    names = small_arrays()
    exec(example("clip_value=10.0"), names)
    assert names["info"].grad_norm > 0 and (names["w"] < 1).all() and (names["b"] < 1).all()
    assert [group["weight_decay"] for group in names["opt"].groups] == [0.0, 0.0] and names["opt"].dialect == "keras"
    assert names["state"]["exp_avg"].all()


def test_the_guides_example_runs():
    names = small_arrays()
    exec(example("1 / 1024, clip_norm=1.0)   # info.grad_norm"), names)
    assert names["info"].grad_norm > 0 and (names["w"] < 1).all() and (names["b"] < 1).all()
    assert names["opt"].steps == 1


def test_the_flat_buffer_examples_run():
    names = {}
    exec(example("FlatBuffer(shapes)"), names)
    flat = names["flat"]
    assert names["opt"].steps == 1 and (flat.params["w1.bias"] < 0).all() and not flat.params["w2.bias"].any()
    names = small_arrays()
    exec(example("FlatBuffer.like({"), names)
    assert names["opt"].steps == 1 and (names["flat"].params["w"] == 1).all()  # values copied, gradients of 0


def test_the_schedules_and_checkpoints_run(tmp_path, monkeypatch):
    """Five bad epochs: the rate falls once, and the best parameters come back."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"fastrms": fastrms, "w": np.ones(5, np.float32), "gw": np.ones(5, np.float32)}
    exec(example("import Cosine"), names)
    exec(example("opt.save(").partition("\n")[2], names)  # the optimizer is this one, with its Plateau
    assert names["plateau"].rate == 0.01 * 0.1 and names["opt"].lr is names["plateau"]
    assert names["opt"].steps == 2 and (tmp_path / "run.safetensors").exists()


def test_the_checkpoint_of_parameters_and_optimizer_runs(tmp_path, monkeypatch):
    """Saved, one step on, loaded: as before that step.  Here the step comes between writing and reading."""
    monkeypatch.chdir(tmp_path)
    names = small_arrays()
    names["opt"] = opt = fastrms.Adam({"w": names["w"], "b": names["b"]})
    grads = {"w": names["gw"], "b": names["gb"]}
    opt.step(grads)
    kept, steps = names["w"].copy(), opt.steps
    write, read = re.split(r"\n\n(?=with open\(\"run.pickle\", \"rb\"\))", example("run.pickle"))
    exec(write, names)
    opt.step(grads)
    exec(read, names)
    assert np.array_equal(names["w"], kept) and opt.steps == steps == 1


def test_the_example_of_gradients_in_the_step_runs(capsys):
    for value, said in ((1.0, ""), (np.inf, "8 elements overflowed: nothing was updated\n")):
        names = small_arrays(value)
        exec(example("info.nonfinite"), names)
        assert capsys.readouterr().out == said and (names["gw"] == 0).all() and names["opt"].steps == (not said)


@pytest.mark.parametrize("name, needs", [
    ("step", ()), ("checkpoints", ("safetensors",)), ("formats", ("ml_dtypes",)), ("shared-memory", ()),
    ("torch", ("torch",)),
])  # fmt: skip
def test_the_examples_of_a_page_run_in_their_order(name, needs, request, tmp_path, monkeypatch):
    """As one script, with no more than the arrays or the model that the page speaks of."""
    for module in needs:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = {**(request.getfixturevalue("model") if name == "torch" else small_arrays()), "np": np}
    if name == "step":
        names |= {"layers": {"w": names["w"]}, "scratch": {"w": names["gw"]}, "backward": lambda name, out: out}
    threads = fastrms.get_num_threads()
    try:
        exec("\n".join(re.findall(r"```python\n(.*?)```", page(name), re.S)), names)
    finally:
        fastrms.set_num_threads(threads)


def test_the_streaming_example_runs():
    w = {"first": np.ones(5, np.float32), "second": np.ones(3, np.float32)}
    names = {
        "fastrms": fastrms,
        "layers": w,
        "backward": lambda name, out: out,
        "scratch": {k: v * 2 for k, v in w.items()},
    }
    exec(example("opt.streaming"), names)
    assert names["s"].updated == ["second", "first"] and names["opt"].steps == 1 and all((v < 1).all() for v in w.values())


def test_the_numba_examples_run():
    numba = pytest.importorskip("numba")
    names = {}
    exec(example("w[i] * np.float32(2)"), names)
    assert 0 < names["w"][0] < 0.5
    import fastrms.numba

    short, w = {"numba": numba, "fastrms": fastrms}, np.ones(1000, np.float32)
    exec(example("g[:] = 2 * w"), short)
    short["train"](w, np.empty_like(w), np.zeros_like(w))
    assert np.allclose(w, names["w"])


@pytest.fixture
def model():
    """names for the examples with torch: a small model, its input, and a loss of it."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    made, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    return {"fastrms": fastrms, "torch": torch, "model": made, "x": x, "loss": made(x).sum()}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return all((old != new).all() for old, new in zip(before, model.parameters(), strict=True))


def test_the_readmes_example_with_torch_runs(model):
    before = weights(model["model"])
    exec(example("# in place of torch.optim.RMSprop"), model)
    assert moved(model["model"], before) and model["opt"].state[model["model"].weight]["step"] == 1


def test_the_examples_with_torch_run(model):
    before = weights(model["model"])
    exec(example("p.grad for name, p in model.named_parameters()})"), model)
    after = weights(model["model"])
    assert moved(model["model"], before) and model["opt"].steps == 1
    exec(example("p.new_zeros("), model)
    assert moved(model["model"], after) and model["fast"].steps == 1


def test_the_examples_with_torch_optimizers_run(model, capsys):
    param, before = model["model"].weight, weights(model["model"])
    exec(example("fastrms.torch.RMSprop(model.parameters(), lr=1e-3)"), model)
    assert moved(model["model"], before) and model["opt"].state[param]["step"] == 3
    exec(example("theirs.load_state_dict"), model)
    assert model["theirs"].state[param]["step"] == 1 == model["opt"].state[param]["step"]
    exec(example("opt.step_info.applied"), model)
    assert capsys.readouterr().out.startswith("True ")
    before = weights(model["model"])
    exec(example("step_in_backward(opt)"), model)
    assert moved(model["model"], before) and model["opt"].state[param]["step"] == 1
    exec(example("copy.deepcopy(model).to(torch.bfloat16)"), model)
    assert "remainder torch.int16" in capsys.readouterr().out
    exec(example("torch.autocast("), model)
    assert capsys.readouterr().out == "torch.bfloat16\n"


def test_adamax_is_its_formula():
    names, w = {}, np.ones(7)
    exec(example("class AdaMax"), names)
    opt, theta, m, u = names["AdaMax"](w, lr=0.1), w.copy(), 0.0, 0.0
    for step in range(1, 6):
        grad = np.linspace(-1, 2, 7) / step
        opt.step(grad)
        m, u = 0.9 * m + 0.1 * grad, np.maximum(0.999 * u, abs(grad) + 1e-8)
        theta = theta - 0.1 / (1 - 0.9**step) * m / u
    assert np.allclose(w, theta, rtol=1e-13)


def test_an_own_rule_is_short():
    for words in ("class Lion", "class AdaMax"):
        text = next(text for text in code_blocks() if words in text).split(words)[1]
        assert len([line for line in text.splitlines() if line.strip()]) <= 12


def test_the_readmes_lines_of_c_are_those_of_the_program():
    short = re.search(r"```c\n(.*?)```", README, re.S)[1]
    assert short and all(line.rstrip(";") in page("c") for line in short.splitlines())


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_the_readmes_lines_of_c_compile(tmp_path):
    """In a function whose arguments are what the lines are about; the program of docs/c.md: tests/test_c_library.py."""
    (short,) = re.findall(r"```c\n(.*?)```", README, re.S)
    given = "int64_t step, float *param, float *grad, float *square_avg"
    (tmp_path / "lines.c").write_text(f"#include <fastrms.h>\nvoid lines({given});\nvoid lines({given})\n{{\n{short}}}\n")
    flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    run = subprocess.run([COMPILER, *flags, str(tmp_path / "lines.c")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_output_of_the_program_in_c_is_what_python_computes():
    """That the program prints it: tests/test_c_library.py."""
    from test_c_library import want

    assert f"It prints `{want().strip()}`" in page("c")


# docs/problems.md


def test_the_example_of_a_fused_rmsprop_runs(model):
    before = weights(model["model"])
    exec(example("fastrms.torch.RMSprop(model.parameters(), lr=0.01)"), model)
    assert moved(model["model"], before) and model["opt"].state[model["model"].weight]["step"] == 1


@pytest.mark.skipif(c.lib is None, reason="without the C extension there is one way to compute")
def test_the_example_of_one_digest_prints_one_for_every_instruction_set(capsys):
    for tier in c.isas():
        names = {**small_arrays(), "hashlib": hashlib}
        names["w"], names["gw"] = np.linspace(-1, 1, 1003, dtype=np.float32), np.linspace(2, 3, 1003, dtype=np.float32)
        with forced(tier):
            exec(example("hashlib.sha256(w)"), names)
    digests = capsys.readouterr().out.split()
    assert len(digests) == len(c.isas()) and len(set(digests)) == 1


def test_the_example_of_clipping_runs(model):
    """Two steps, the first of them clipped, are those of torch.optim after clip_grad_norm_; gradients stay as they are."""
    torch, theirs = model["torch"], copy.deepcopy(model["model"])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    make, *rest = example("in place of clip_grad_norm_").splitlines()
    exec(make, model)
    for scale, clipped in ((1.0, True), (0.02, False)):
        for net in (theirs, model["model"]):
            net.zero_grad()
        (scale * theirs(model["x"]).sum()).backward()
        exec("\n".join(rest), {**model, "loss": scale * model["model"](model["x"]).sum()})
        pairs = list(zip(theirs.parameters(), model["model"].parameters(), strict=True))
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item()
        optimizer.step()
        assert (norm > 0.5) == clipped and np.isclose(model["opt"].step_info.grad_norm, norm, rtol=1e-6)
        assert all(torch.allclose(p, q, rtol=1e-6) for p, q in pairs)


def test_the_example_of_zero_gradients_leaves_zero(capsys):
    exec(example("1000 * [np.zeros_like(gw)]"), {**small_arrays(), "np": np})
    assert capsys.readouterr().out == "0.0\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_example_of_a_fork_runs():
    """In a process of its own, whose child would hang with OpenMP."""
    given = "import os, numpy as np, fastrms; fastrms.set_num_threads(2); gw = np.ones(1 << 20); opt = fastrms.Adam(gw + 1)"
    printed = example("os.fork()").replace("os.waitpid(pid, 0)", "print(os.waitpid(pid, 0)[1], opt.steps)")
    code = f"{given}\n{printed}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "0 1\n", run.stderr


def test_the_example_of_tensorflows_rmsprop_is_its_formula(model):
    before = weights(model["model"])
    exec(example("alpha=0.99, eps_root=1e-5"), model)
    for old, new in zip(before, model["model"].parameters(), strict=True):
        want = old - 7e-4 * new.grad / (0.99 * 1 + 0.01 * new.grad**2 + 1e-5).sqrt()
        assert model["torch"].allclose(new, want, rtol=1e-6) and not model["torch"].equal(new, old)


def test_the_example_of_a_resumed_run_has_the_same_bits():
    """Saved; two steps, as if the run went on; loaded; the same two steps again."""
    names = {**small_arrays(), "pickle": pickle}
    names["opt"] = opt = fastrms.Adam(names["w"])
    opt.step(names["gw"])
    save, *load = example("saved = pickle.dumps(").splitlines()
    exec(save, names)
    runs = []
    for resume in ("", "\n".join(load)):
        exec(resume, names)
        for _ in range(2):
            opt.step(names["gw"])
        runs.append(names["w"].tobytes())
    assert runs[0] == runs[1] and opt.steps == 3


def test_the_example_of_bf16_parameters_trains(model):
    """They move in 300 steps, each too small for bf16; those of torch.optim do not."""
    torch, rest = model["torch"], "\n".join(example("low = model.to").splitlines()[1:])
    for make, trains in ((example("low = model.to"), True), ("opt = torch.optim.AdamW(low.parameters(), lr=1e-5)", False)):
        low = torch.nn.Linear(3, 2).to(torch.bfloat16)
        torch.nn.init.ones_(low.weight)
        names = {**model, "low": low}
        exec(make, names)
        for _ in range(300):
            exec(rest, names)
        assert (low.weight != 1).all() == trains


# the tables


def shown(value):
    return f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')


def dialect_table():
    """The table of docs/dialects.md, from the code: per optimizer, our defaults and what each framework has instead."""
    lines = [f"| | ours, torch | {' | '.join(d for d in dialects.DIALECTS if d != 'torch')} |", "| --- " * 6 + "|"]
    for make in CLASSES:
        presets = {d: of.get(make.__name__) for d, of in dialects.DIALECTS.items()}
        names = dict.fromkeys(name for preset in presets.values() for name in preset or ())
        cells = [", ".join(f"{name} {shown(make.defaults[name])}" for name in names) or "(defaults)"]
        for d, preset in presets.items():
            if d != "torch":
                said = [f"{name} {shown(value)}" for name, value in (preset or {}).items() if value != make.defaults[name]]
                cells.append("none" if preset is None else ", ".join(said) or "as ours")
        lines.append(f"| {make.__name__} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_dialect_table_is_the_code():
    assert block(page("dialects"), "dialects") == dialect_table(), f"put this between the markers:\n{dialect_table()}"


def test_our_defaults_are_torchs():
    assert all(preset == {} for preset in dialects.DIALECTS["torch"].values())


SUMMARY = {"1024": "1,024", "2^16": "65,536", "2^25": "33,554,432"}  # column of the benchmark's table: in words


def measured():
    """rule -> contender -> column -> nanoseconds per element as written, out of the table in docs/performance.md."""
    lines = [line for line in block(page("performance"), "bench").splitlines() if line.startswith("|")]
    columns, found = [cell.strip() for cell in lines[0].split("|")[3:-1]], {}
    for line in lines[2:]:
        rule, name, *cells = (cell.strip().strip("*") for cell in line.split("|")[1:-1])
        if len(cells) == len(columns) and name != "share":  # else it is of another table
            numbers = {column: cell.split(" ")[0] for column, cell in zip(columns, cells, strict=True)}
            found.setdefault(rule, {})[name] = numbers
    return found


def summary():
    """The README's table, from the benchmark's in docs/performance.md."""
    lines = [
        "| ns per element, float32 | elements | naive NumPy | in-place NumPy | fastest other library | **fastrms** "
        "| hardware limit |",
        "| --- " + "| ---: " * 6 + "|",
    ]
    for rule, found in measured().items():
        peers = [name for name in found if not name.startswith(("fastrms", "naive", "in-place", "streams", "divider"))]
        for column, size in SUMMARY.items():
            times = {name: float(numbers[column]) for name, numbers in found.items() if numbers[column]}
            best = min((name for name in peers if name in times), key=times.get)
            limit = max((name for name in ("streams", "divider") if name in times), key=times.get)
            cells = [found[name][column] for name in ("naive NumPy", "in-place NumPy", best, "fastrms c", limit)]
            cells[2:4] = [f"{cells[2]} ({best})", f"**{cells[3]}**"]
            lines.append(f"| {FAMILIES[rule].__name__} | {size} | {' | '.join(cells)} |")
    machine = re.search(r"^(.*?, \d+ cores).*(\d{4}-\d\d-\d\d);", block(page("performance"), "bench"), re.M)
    return "\n".join([*lines, "", f"{machine[1]}, {machine[2]}; two threads (NumPy: one).", called_as_a_trainer_does()])


def called_as_a_trainer_does():
    """The README's sentence on a whole model, from the table of a reader's own model in docs/performance.md."""
    table = block(page("performance"), "model")
    elements = re.search(r"\(([\d,]+) elements\), step, clip_norm=1.0, lr=Cosine", table)[1]
    times = {tuple(row[:2]): row[2] for row in re.findall(r"^\| (\w+) \| ([^|]+) \| (\d+) \|", table, re.M)}
    said = [
        f"{FAMILIES[rule].__name__} {times[rule, 'fastrms c']} us, naive NumPy {times[rule, 'naive NumPy']} us"
        for rule, name in times
        if name == "naive NumPy"
    ]
    return f"A step with fresh gradients, `clip_norm` and a `Cosine` lr, {elements} elements: {'; '.join(said)}."


def test_the_readmes_table_is_the_benchmarks():
    assert block(README, "summary") == summary(), f"put this between the markers:\n{summary()}"


# commands, files, links


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = re.search(r"<!-- tests -->\n```\n(.*?)\n```", README)[1]
    assert command == 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/python -m pytest'
    line = next(line for line in script.splitlines() if line.startswith("tests="))
    found = subprocess.run(["bash", "-c", f'{line}; echo "$tests"'], cwd=ROOT, capture_output=True, text=True).stdout
    assert found.strip() == command and 'eval "$tests"' in script


def test_nothing_is_installed_from_where_there_is_no_release():
    for path, text in PAGES.items():
        assert not re.search(r"pip install \"?fastrms", text), path


def test_extras_named_in_the_pages_exist():
    made = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    extras = re.findall(r"^([\w-]+) = ", made, re.M)
    for path, text in PAGES.items():
        for named in re.findall(r"pip install [^`\n]*?\.\[([\w,-]+)\]", text):
            assert set(named.split(",")) <= set(extras), (path, named)


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_named_in_the_pages_exist():
    for path, text in PAGES.items():
        for named in re.findall(r"`((?:tests|csrc|fastrms|examples|bench|docs)/[\w./-]+)(?:::\w+)?`", text):
            assert (ROOT / named).exists(), (path, named)
        for named, anchor in re.findall(r"\]\(([\w./-]*)#?([\w-]*)\)", text):
            target = path.parent / named if named else path
            assert target.exists(), (path, named)
            assert not anchor or anchor in anchors(target.read_text()), (path, named, anchor)
        for test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
            assert f"def {test[1]}(" in (ROOT / test[0]).read_text()


def test_every_page_is_linked_from_the_readme():
    for path in PAGES:
        assert path.name == "README.md" or re.search(rf"\]\({path.relative_to(ROOT)}[)#]", README), path
