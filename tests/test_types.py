"""The type stubs say what the code does: every signature, and what mypy makes of right and wrong calls."""

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKENDS, CLASSES, FUNCTIONS

import fastrms

PACKAGE = Path(fastrms.__file__).parent
STUBS = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.pyi"))}
NUMBA = "numba" in BACKENDS
mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra `typing`)")
NOT_GIVEN = inspect.Parameter.empty


def is_overload(node):
    return any(isinstance(name, ast.Name) and name.id == "overload" for name in node.decorator_list)


def is_property(node):
    return any(ast.unparse(name) == "property" or ast.unparse(name).endswith(".setter") for name in node.decorator_list)


def functions(body):
    return [node for node in body if isinstance(node, ast.FunctionDef) and not is_property(node)]


def classes(stub):
    return [node for node in STUBS[stub].body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def default(node):
    """The default that a stub writes: a literal, or ... for one that is none."""
    return NOT_GIVEN if node is None else ast.literal_eval(node)


def said(node, method):
    """(name, kind, default) of each argument in a stub, without self or cls."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    found = [(a.arg, "POSITIONAL_OR_KEYWORD", default(d)) for a, d in zip(positional, defaults, strict=True)]
    static = any(ast.unparse(name) == "staticmethod" for name in node.decorator_list)
    found = found[1:] if method and not static else found
    found += [(a.arg, "KEYWORD_ONLY", default(d)) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return found + ([(arguments.kwarg.arg, "VAR_KEYWORD", NOT_GIVEN)] if arguments.kwarg else [])


def found(runtime):
    """The same of what is there."""
    runtime = getattr(runtime, "py_func", runtime)  # of Numba
    return [(p.name, p.kind.name, p.default) for p in inspect.signature(runtime).parameters.values()]


def equal(stub, code):
    """Names, order, kinds and defaults, the kinds of the defaults too: False == 0."""
    assert [argument[:2] for argument in stub] == [argument[:2] for argument in code]
    for (name, _, written), (_, _, real) in zip(stub, code, strict=True):
        assert written is ... or (type(written) is type(real) and written == real) or written is real, name


def signatures():
    """(stub, path) -> node of all public functions and methods; overloads have a test of their own."""
    made = {}
    for stub, tree in STUBS.items():
        made |= {(stub, node.name): node for node in functions(tree.body) if not is_overload(node)}
        for owner in classes(stub):
            methods = [node for node in functions(owner.body) if node.name != "__new__"]  # which stubtest compares
            made |= {(stub, f"{owner.name}.{node.name}"): node for node in methods}
    return made


SIGNATURES = signatures()


@pytest.mark.parametrize(("stub", "path"), SIGNATURES, ids=[".".join(key) for key in SIGNATURES])
def test_a_signature_in_a_stub_is_that_of_the_code(stub, path):
    if stub == "numba" and not NUMBA:
        pytest.skip("numba is not installed")
    if stub == "torch":
        pytest.importorskip("torch", reason="not installed: torch")
    if stub == "cuda":
        pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    runtime = fastrms if stub == "__init__" else importlib.import_module(f"fastrms.{stub}")
    for name in path.split("."):  # a constructor is its class, whose signature shows every keyword
        runtime = runtime if name == "__init__" else getattr(runtime, name)
    code = found(runtime)
    equal(said(SIGNATURES[stub, path], "." in path), code[1:] if code[:1] and code[0][0] == "self" else code)


def test_every_public_name_has_a_type():
    tree = STUBS["__init__"]
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imported = {alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(fastrms.__all__) <= defined | imported


@pytest.mark.parametrize("make", CLASSES)
def test_the_stub_of_an_optimizer_has_a_constructor_of_its_own(make):
    """One that it inherited would take any keyword."""
    (made,) = (node for node in classes("__init__") if node.name == make.__name__)
    assert "__init__" in [node.name for node in functions(made.body)]


def test_init_state_takes_the_hyper_parameters_of_each_rule():
    overloads = [node for node in functions(STUBS["__init__"].body) if is_overload(node)]
    assert [ast.unparse(node.args.args[0].annotation) for node in overloads] == [f"Literal[{rule!r}]" for rule in FUNCTIONS]
    for node, maker in zip(overloads, FUNCTIONS.values(), strict=True):
        hyper = [(name, "KEYWORD_ONLY", value) for name, value in maker.defaults.items()]
        first = [("optimizer", "POSITIONAL_OR_KEYWORD", NOT_GIVEN), ("param", "POSITIONAL_OR_KEYWORD", NOT_GIVEN)]
        also = [("dialect", "KEYWORD_ONLY", None), ("state_format", "KEYWORD_ONLY", None)]
        equal(said(node, False), [*first, *also, *hyper])


def test_every_rule_has_a_type():
    rules = {node.target.id for node in STUBS["rules"].body if isinstance(node, ast.AnnAssign)}
    assert set(fastrms.rules.RULES) <= rules


def environment(stubs):
    """Where mypy looks; what is installed it finds by itself."""
    return {**os.environ, "MYPYPATH": "" if stubs.parent.name in ("site-packages", "dist-packages") else str(stubs.parent)}


@mypy
def test_the_stubs_are_those_of_the_package(tmp_path):
    """mypy's stubtest, on a copy of the stubs alone: it would check the sources, too."""
    alone = tmp_path / "stubs" / "fastrms"
    alone.mkdir(parents=True)
    absent = [name for name in ("numba", "torch") if importlib.util.find_spec(name) is None]
    for path in [PACKAGE / "py.typed", *PACKAGE.glob("*.pyi")]:
        if path.name != "torch.pyi" or "torch" not in absent:  # it names types of torch
            shutil.copy(path, alone)
    allowed = tmp_path / "allowed"
    allowed.write_text("".join(f"fastrms.{name}\n" for name in ("cuda", *absent)))  # not importable everywhere
    command = [sys.executable, "-m", "mypy.stubtest", "--ignore-missing-stub", "--ignore-unused-allowlist"]
    command += ["--allowlist", str(allowed), "fastrms"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(alone))
    assert done.returncode == 0, done.stdout + done.stderr


PROGRAM = """\
import numpy as np
import fastrms
from fastrms.schedules import Cosine, EarlyStopping, Plateau

w, g = np.ones(3, np.float32), np.ones(3, np.float32)
state = fastrms.init_state("adam", w, amsgrad=True)
fastrms.adam(w, g, **state, step=1)
fastrms.rmsprop(w, g, np.zeros_like(w), rho=0.9, bias_correction="folded")
opt = fastrms.RMSProp({"w": w}, lr=Cosine(0.1, steps=5), groups={"w": {"weight_decay": 0.0}}, dialect="keras")
info = opt.step({"w": g}, clip_norm=1.0)
norm: float | None = info.grad_norm
opt.lr = Plateau(0.1, patience=2)
opt.groups[0]["rho"] = 0.5
opt.zero_grad()
stopping = EarlyStopping(w, optimizer=opt)
flat = fastrms.FlatBuffer.like({"w": w})
flat.params["w"] += 1
flat.data.sort()
there = fastrms.FlatBuffer[fastrms.Stored].like({"w": w})
word: str = there.data.format + there.grads["w"].format
fastrms.RMSProp(there).step(flat.grad)
groups = fastrms.Adam([{"params": [w], "lr": 0.1}], nesterov="dozat")
with groups.streaming() as s:
    s.step((0, 0), g)
fastrms.RMSProp(w, lrr=1)  # call-arg
fastrms.rmsprop(w, g, w, rh=0.9)  # call-arg
fastrms.AdamW(w, beta=0.9)  # call-arg
fastrms.Adam(w, nesterov=True)  # arg-type
fastrms.RProp(w, weight_decay=0.1)  # call-arg
fastrms.AdaGrad(w, dialect="tensorflow")  # arg-type
fastrms.init_state("rmsprop", w, momentun=0.9)  # call-overload
fastrms.RMSProp([1.0, 2.0])  # arg-type|list-item
Cosine(0.1, step=5)  # call-arg
opt.step(g, clip_nrm=1.0)  # call-arg
opt.learning_rate = 0.5  # attr-defined
opt.backend = "c"  # misc
flat.data.format  # attr-defined
"""


@mypy
def test_mypy_finds_what_is_misspelt(tmp_path):
    """Each line with a comment has an error of that kind, and no other line has any."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", program.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(PACKAGE))
    assert done.returncode == 1, done.stdout + done.stderr
    errors = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)
    assert "error" not in re.sub(r"^program\.py:.*\n", "", done.stdout, flags=re.M), done.stdout
    expected = {k: line.split("  # ")[1].split("|") for k, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line}
    seen = {int(line): code for line, code in errors}
    assert seen.keys() == expected.keys(), done.stdout
    assert all(code in expected[line] for line, code in seen.items()), done.stdout


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed (extra `typing`)")
def test_pyright_finds_what_is_misspelt_and_nothing_in_the_examples(tmp_path):
    """The same lines as mypy; and in the examples, where the types of other libraries have faults of their own, no line
    that speaks of fastrms."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = [str(program), *map(str, (PACKAGE.parent / "examples").glob("*.py"))]
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [(Path(d["file"]), d["range"]["start"]["line"]) for d in json.loads(done.stdout)["generalDiagnostics"]]
    lines = {(path, k): path.read_text().splitlines()[k] for path, k in errors}
    found = {line for (path, _), line in lines.items() if path == program}
    assert found == {line for line in PROGRAM.splitlines() if "  # " in line}, done.stdout
    examples = [line for (path, _), line in lines.items() if path != program]
    assert not [line for line in examples if re.search(r"fastrms|rules\.|optimizer\.", line)], done.stdout
