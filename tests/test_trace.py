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


@pytest.mark.parametrize(
    "function, complaint",
    [
        (lambda param, grad, t0: (param if grad > t0 else grad,), "it branches"),
        (lambda param, grad, t0: (param - 2 * grad,), "it holds 2; every number in it must be a coefficient"),
        (lambda param, grad, t0: (param**t0,), r"it holds \*\*"),
        (lambda param, grad, t0: param, "must return the new param and states"),
        (lambda param, grad, t0: (param, grad), "must return the new param and states"),
    ],
)
def test_what_cannot_be_written_down_is_refused(function, complaint):
    with pytest.raises(TypeError, match=complaint):
        trace.trace(own(function), False)
