"""Public docstrings have numpydoc's form: every parameter is described, every result, and what is raised."""

import importlib
import importlib.util
import inspect
import re

import pytest
from conftest import CLASSES, FUNCTIONS

import fastrms
from fastrms import memory, mpi, rules, schedules

MODULES = [fastrms, mpi, schedules]
if importlib.util.find_spec("torch"):
    MODULES.append(importlib.import_module("fastrms.torch"))


def public():
    """(name, object) of every public function, class and method."""
    for module in MODULES:
        for name in getattr(module, "__all__", vars(module)):
            item = getattr(module, name)
            if name.startswith("_") or not callable(item) or not getattr(item, "__module__", "").startswith("fastrms"):
                continue
            yield f"{module.__name__}.{name}", item
            if inspect.isclass(item):
                members = [(n, getattr(item, n)) for n in vars(item) if not n.startswith("_")]
                yield from ((f"{name}.{n}", m) for n, m in members if inspect.isroutine(m))


def sections(text):
    """The sections of a docstring: heading -> lines."""
    found = {}
    lines = inspect.cleandoc(text).splitlines()
    for k, line in enumerate(lines):
        if k + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[k + 1]) and len(lines[k + 1]) == len(line):
            found[line] = []
        elif found and not re.fullmatch(r"-{3,}", line):
            found[list(found)[-1]].append(line)
    return found


def described(lines):
    """The names that a section describes: those at its left margin, before a colon."""
    heads = [line.partition(" : ")[0] for line in lines if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


FAMILY = {"recipe", "rule_name", "initial", "needs_positive_state", "at_step", "resolve", "checked", "checked_recipe"}
PUBLIC = [(name, item) for name, item in public() if name.rpartition(".")[2] not in FAMILY]


@pytest.mark.parametrize(("name", "item"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_every_parameter_is_described(name, item):
    text = inspect.getdoc(item)
    summary = text.partition("\n\n")[0]
    assert summary.endswith((".", ":")), "it begins with a whole sentence"
    if issubclass(item, (tuple, fastrms.Optimizer)) if inspect.isclass(item) else False:
        return  # below
    found = sections(text)
    wanted = {p.name for p in inspect.signature(item).parameters.values()} - {"self"}
    if item in [getattr(fastrms, name) for name in FUNCTIONS]:  # its class describes the hyper-parameters
        wanted -= {*FUNCTIONS[item.__name__].defaults, "dialect", "backend"}
    assert wanted <= described(found.get("Parameters", [])), name
    assert not wanted or "Raises" in found or "Returns" in found, name


@pytest.mark.parametrize("make", CLASSES)
def test_every_hyper_parameter_is_described(make):
    found = sections(inspect.getdoc(make))
    names = described(found["Parameters"])
    missing = {*make.defaults, "params"} - names
    text = "\n".join(found["Parameters"])
    assert not missing or all(re.search(rf"\b{name}\b", text) for name in missing), missing
    assert "Raises" in found


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule_and_helper_says_what_it_is(rule):
    found = sections(rules.RULES[rule].__doc__)
    assert "Source:" in inspect.getdoc(rules.RULES[rule])
    assert described(found["Parameters"]) == {*rules.arguments(rules.RULES[rule])} and "Returns" in found
    assert all(inspect.getdoc(helper) for helper in rules.HELPERS)


def test_the_jitted_functions_are_described():
    numba = pytest.importorskip("fastrms.numba")
    for name in FUNCTIONS:
        for function in (getattr(numba, name), getattr(numba, f"{name}_parallel")):
            found = sections(function.__doc__)
            assert "Parameters" in found and "Raises" in found, name
            names = described(found["Parameters"])
            wanted = {p.name for p in inspect.signature(function.py_func).parameters.values()}
            assert wanted - {*FUNCTIONS[name].defaults} <= names, wanted - names
            assert names <= {*inspect.signature(function.py_func).parameters, "..."}, names
            assert "contiguous" in function.__doc__ and "TypingError" in function.__doc__ and "**" not in names, name


def test_the_interface_of_the_memory_modules_is_written_down():
    assert all(name in memory.__doc__ for name in ("acquire", "wrote", "same_layout"))
