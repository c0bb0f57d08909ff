"""From hyper-parameters to coefficients, in Python and in Numba, which compiles the same text; C is in test_c_library.py."""

import functools
import importlib
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DTYPES, FAMILIES, c, recipe_of
from test_build import ROOT
from test_c_library import random_hyper

import fastrms
from fastrms import hyper, recipes

STEPS = [1, 2, 3, 17, 1000, 2**40 + 3, 2**62]


def test_the_twins_have_the_same_functions_in_the_same_order():
    """Those of recipes.c that recipes.py has too; what only one of them needs does not count."""
    in_python = re.findall(r"^def (\w+)\(", (ROOT / "fastrms" / "recipes.py").read_text(), re.M)
    in_c = re.findall(
        r"^(?:static )?(?:int|double|void|const char \*) ?(\w+)\(", (ROOT / "csrc" / "recipes.c").read_text(), re.M
    )
    in_c = [name.removeprefix("fastrms_") for name in in_c]
    both = [name for name in in_c if name in in_python]
    assert both == [name for name in in_python if name in both]
    assert len(both) > 20 and {*recipes.FAMILIES, "evaluate", "series", "overflowing"} <= set(both)


def test_every_class_has_a_recipe_and_every_recipe_a_class():
    """The tests that run over FAMILIES leave none out, and each class is public."""
    assert {recipe_of(make) for make in FAMILIES.values()} == set(recipes.FAMILIES)
    assert {make.__name__ for make in FAMILIES.values()} | {*recipes.FAMILIES} <= {*fastrms.__all__}


def in_python(family, hyper_parameters, dtype, step, scale):
    """(whether the form is general, coefficient -> value), or None where it is refused."""
    make = FAMILIES[family]
    try:
        recipe = make.checked_recipe(make.at_step(make.resolve(None, hyper_parameters)), dtype)
    except ValueError:
        return None
    return recipe.general, dict(zip(recipe.values, recipe.at(step, scale), strict=True))


@pytest.fixture
def jitted():
    pytest.importorskip("numba")
    return importlib.import_module("fastrms.jitted")


@functools.cache
def jitted_family(base):
    return importlib.import_module("fastrms.jitted").coefficients_of(FAMILIES[base])


def in_numba(jitted, family, hyper_parameters, dtype, step, scale):
    """The same from jitted code."""
    base = recipe_of(FAMILIES[family])
    kind, coefficients = jitted_family(base)
    numbers = {name: recipes.WORDS.get(value, value) for name, value in hyper_parameters.items() if name in kind._fields}
    h = kind(**{name: x if isinstance(x, float) else int(x) for name, x in numbers.items()})
    try:
        general, made = coefficients(h, step, scale, dtype.itemsize)
    except ValueError:
        return None
    names = recipes.FAMILIES[base].values._fields
    return bool(general), dict(zip(names, made.tolist(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_numba_computes_the_coefficients_of_python(jitted, family, dtype):
    """Every one of the rule, to the last bit, at any step; and it refuses what Python refuses."""
    rng, refusals = random.Random(f"jitted {family} {dtype}"), 0
    for _ in range(1000):
        given = random_hyper(family, rng)
        arguments = family, given, dtype, rng.choice(STEPS), rng.choice([1.0, 0.3, 1e-3])
        want, got = in_python(*arguments), in_numba(jitted, *arguments)
        assert (want is None) == (got is None), arguments
        if want is None:
            refusals += 1
            continue
        common = {name: value for name, value in want[1].items() if name not in recipes.CONSTANTS}
        assert got[0] == want[0] and common == {name: got[1][name] for name in common}, arguments
    assert 0 < refusals < 950


@pytest.mark.parametrize("terms", [0, -1, -(2**40)])
def test_a_series_without_terms_is_0(terms):
    """It ends, too: -1 shifted to the right never becomes 0."""
    assert recipes.series(0.9, 0.1, terms) == 0
    if c.lib is not None:
        assert c.lib.fastrms_series(0.9, 0.1, terms) == 0


@pytest.mark.parametrize("terms", [0, -1, -(2**40)])
def test_a_jitted_series_without_terms_is_0(jitted, terms):
    assert jitted.compiler(lambda terms: recipes.series(0.9, 0.1, terms))(terms) == 0


@pytest.mark.parametrize("make, wrong, words", [
    (fastrms.RMSProp, {"rho": 1 - 1e-9}, r"rho=0\.999999999 rounds in float32 to a number that is not in \[0, 1\)"),
    (fastrms.RMSProp, {"clip_value": 1e-46}, "clip_value=1e-46 rounds in float32 to a number that is not finite and"),
    (fastrms.RMSProp, {"nesterov": True}, "nesterov=True needs momentum > 0"),
    (fastrms.RMSProp, {"centered": True, "bias_correction": "folded"}, "cannot serve centered=True"),
    (fastrms.Adam, {"eps": 1e-50}, r"eps=1e-50 and eps_root=0\.0 are both 0 in float32"),
    (fastrms.Adam, {"amsgrad": "corrected", "bias_correction": False}, "amsgrad='corrected' needs bias_correction"),
    (fastrms.Adam, {"lr": 1e38, "beta1": 0.9999}, r"step_size=1e\+38.*first step, is not finite in float32"),
    (fastrms.RProp, {"eta_minus": 1.0}, r"eta_minus=1\.0 is not below 1 in float32"),
    (fastrms.RProp, {"eta_plus": 1 + 1e-9}, "is not above 1 in float32"),
    (fastrms.RProp, {"step_min": 51.0}, r"step_min=51\.0 is above step_max=50\.0"),
    (fastrms.Adam, {"beta1": 1.0}, r"beta1=1\.0 must be in \[0, 1\)"),
])  # fmt: skip
def test_what_is_refused_is_named_with_its_value(make, wrong, words):
    with pytest.raises(ValueError, match=words):
        make(np.ones(3, np.float32), **wrong)


def test_every_hyper_parameter_has_a_sentence_without_its_value():
    for family in recipes.FAMILIES.values():
        for name in family.right._fields:
            assert name in hyper.refusal(name) and "{" not in hyper.refusal(name)


def test_a_family_speaks_of_no_hyper_parameter_that_it_lacks():
    """Not even where a family of tomorrow has no eps_root, no momentum, or a check that knows no range."""
    h, dtype = SimpleNamespace(eps=0.0, nesterov=True, word="x", step_min=1.0), np.dtype(np.float32)
    assert hyper.forbidden("eps", h, dtype) == "eps=0.0 is 0 in float32: a zero average would give 0/0"
    assert (
        hyper.forbidden("step_min", h, dtype)
        == "step_min=1.0 rounds in float32 to a number that is not finite and at least 0"
    )
    for name, value in (("nesterov", True), ("word", "x")):
        sentence = f"{name}={value!r} does not go with the other hyper-parameters in float32"
        assert hyper.forbidden(name, h, dtype) == sentence
    assert "eps_root" not in hyper.refusal("eps", ["eps"]) and "0/0" in hyper.refusal("eps", ["eps"])
    assert "eps and eps_root are both 0" in hyper.refusal("eps")


def test_a_family_may_have_any_number_of_checks(jitted):
    """A tenth sentence is not left out in silence."""
    refuse = jitted.refusal([f"wrong {k}" for k in range(12)])
    for k in range(12):
        with pytest.raises(ValueError, match=f"^wrong {k}$"):
            refuse(k)


@pytest.mark.parametrize("name", ["rho", "eps", "weight_decay", "momentum"])
def test_only_lr_may_be_a_schedule(name):
    with pytest.raises(TypeError, match=f"{name}=.* must be a number; only lr may be a schedule"):
        fastrms.RMSProp(np.ones(3), **{name: lambda step: 0.1})


def test_the_words_of_other_frameworks_have_ours():
    assert hyper.said_instead("alpha") == "; for alpha write rho"
    assert hyper.said_instead("betas") == "; for betas write beta1 and beta2"
    assert hyper.said_instead("fused").startswith("; leave fused out: ")
    assert hyper.said_instead("speed") == ""
    ours = {name for make in FAMILIES.values() for name in make.defaults}
    assert not ours & {*hyper.OUR_WORD, *hyper.NOT_NEEDED}
    meant = {word for text in hyper.OUR_WORD.values() for word in re.findall(r"\w+", text)}
    assert {"rho", "lr", "beta1", "beta2", "eps", "eta_minus", "eta_plus", "step_min", "step_max", "initial_value"} <= meant


SAID = {  # (family, name of another framework) -> what is said; "" where the family has nothing like it
    ("rmsprop", "alpha"): "; for alpha write rho",
    ("adagrad", "alpha"): "",
    ("rmsprop", "betas"): "",
    ("adamw", "betas"): "; for betas write beta1 and beta2",
    ("rprop", "epsilon"): "",
    ("adagrad", "initial_accumulator_value"): "; for initial_accumulator_value write initial_value",
    ("adam", "initial_accumulator_value"): "",
    ("adagrad", "decay"): "; for decay write lr_decay for the step size or weight_decay for the parameters, or, in an "
    "optimizer, a schedule as lr",
    ("rprop", "decay"): "",
    ("adam", "momentum_decay"): "; leave momentum_decay out: nesterov has no schedule of its own here",
    ("adagrad", "momentum_decay"): "",
    ("rprop", "fused"): "; leave fused out: every update is fused",
}


@pytest.mark.parametrize("family, name", SAID)
def test_no_one_is_sent_to_a_name_that_the_class_lacks(family, name):
    make = FAMILIES[family]
    with pytest.raises(TypeError) as caught:
        make(np.ones(3), **{name: 0.5})
    assert str(caught.value).startswith(f"{make.__name__} has no hyper-parameter {name!r}{SAID[family, name]}; it has lr, ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_of_a_class_are_its_own(family):
    """Every name that we know of, in every class."""
    known = FAMILIES[family].defaults
    for name in {*hyper.OUR_WORD, *hyper.NOT_NEEDED}:
        told = {*re.findall(r"\w+", hyper.said_instead(name, known))} - {name}
        assert told & {*hyper.CHECKS} <= {*known}, name


@pytest.mark.parametrize("name", ["clip_norm", "clipnorm", "max_norm"])
def test_what_a_function_is_told_is_true(name):
    """A function has no step(): the sentence says whose it is."""
    w = np.ones(3)
    with pytest.raises(TypeError, match=rf"for {name} write .*\boptimizer\b"):
        fastrms.rmsprop(w, w + 1, w + 2, **{name: 1.0})
    with pytest.raises(
        TypeError, match=r"grad_scale, which multiplies the gradients, an argument of step\(\) and of the func"
    ):
        fastrms.rmsprop(w, w + 1, w + 2, loss_scale=2.0)
