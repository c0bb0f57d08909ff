"""A rule that is written down operation by operation has its bits, and is refused where it cannot be written down."""

import numpy as np
import pytest
from conftest import DTYPES, bits, raw_recipe
from test_same_bits import scalar_reference, wild_buffers

from fastrms import own_rules, rules
from fastrms.backends import trace


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_trace_has_the_bits_of_the_rule(rule, general, dtype):
    names = {"sqrt": np.sqrt}
    exec(trace.text(trace.trace(rules.RULES[rule], general)), names)
    recipe, buffers = raw_recipe(rule, dtype, general), wild_buffers(rule, dtype, 203)
    coefficients = np.array(recipe.at(1, 1.0)).astype(dtype)
    with np.errstate(all="ignore"):
        results = [names[rule](*numbers, *coefficients) for numbers in zip(*buffers, strict=True)]
    for got, want in zip(zip(*results, strict=True), scalar_reference(recipe, buffers), strict=True):
        assert {x.dtype for x in got} == {dtype} and np.array_equal(bits(got), bits(want))


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_operation_is_written_once(rule):
    """No result is computed that nothing uses: what is off in a form is not there."""
    made = trace.trace(rules.RULES[rule], False)
    used = {operand for operation in made.operations for operand in operation.operands} | set(made.results)
    assert {operation.result for operation in made.operations} <= used
    assert "clip_low" not in used and len({operation.result for operation in made.operations}) == len(made.operations)


def own(function, states=(), coefficients=("t0",)):
    return own_rules.OwnRule("Mine", function, states, coefficients)


def test_an_own_rule_may_name_its_numbers_as_operations_are_named():
    made = trace.trace(own(lambda param, grad, t0: (param - t0 * (t0 * grad),)), False)
    names = {}
    exec(trace.text(made), names)
    factors = [1.0] * (len(made.arguments) - 3)
    assert names["Mine"](10.0, 2.0, *factors, 0.5) == (9.5,)


def positive(x, zero):
    return rules.select(x > zero, x, zero)


def imported_within(param, grad, t0):
    from fastrms.rules import larger

    return (param - larger(grad, t0),)


RECORDED = {  # rules of (param, grad, t0), and what they give for 10.0, 2.0, 0.5 and 10.0, 0.25, 0.5
    "where": (lambda param, grad, t0: (param - np.where(grad > t0, grad, t0),), 8.0, 9.5),
    "select": (lambda param, grad, t0: (param - positive(grad, t0),), 8.0, 9.5),
    "clip": (lambda param, grad, t0: (param - rules.clip(grad, t0, t0 + t0),), 9.0, 9.5),
    "equal": (lambda param, grad, t0: (rules.select(grad == t0 * t0, param, grad),), 2.0, 10.0),
    "different": (lambda param, grad, t0: (rules.select(grad != t0 * t0, param, grad),), 10.0, 0.25),
    "a fixed condition": (lambda param, grad, t0: (rules.select(True, param, grad),), 10.0, 10.0),
    "imported within": (imported_within, 8.0, 9.5),
}


def run(function, *numbers):
    """The results of an own rule that was recorded."""
    made, names = trace.trace(own(function), False), {}
    exec(trace.text(made), names)
    return names["Mine"](*numbers[:2], 1.0, 1.0, *numbers[2:])


@pytest.mark.parametrize("name", RECORDED)
def test_what_an_own_rule_may_choose_by(name):
    function, *want = RECORDED[name]
    assert [run(function, 10.0, grad, 0.5) for grad in (2.0, 0.25)] == [(x,) for x in want]


def test_a_function_that_numba_compiled_is_recorded_as_its_text():
    jitted = pytest.importorskip("numba", reason="needs numba").njit(positive)
    assert run(lambda param, grad, t0: (param - jitted(grad, t0),), 10.0, 2.0, 0.5) == (8.0,)


@pytest.mark.parametrize(
    "function, complaint",
    [
        (lambda param, grad, t0: (param if grad > t0 else grad,), "it branches"),
        (lambda param, grad, t0: (param if grad == t0 else grad,), "it branches"),
        (lambda param, grad, t0: (param - np.where(grad > t0),), "it calls np.where"),
        (lambda param, grad, t0: (param - 2 * grad,), "it holds 2; every number in it must be a coefficient"),
        (lambda param, grad, t0: (param**t0,), r"it holds \*\*"),
        (lambda param, grad, t0: param, "must return the new param and states"),
        (lambda param, grad, t0: (param, grad), "must return the new param and states"),
    ],
)
def test_what_cannot_be_written_down_is_refused(function, complaint):
    with pytest.raises(TypeError, match=complaint):
        trace.trace(own(function), False)
