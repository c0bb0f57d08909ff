"""Own rules: a user's subclass of Optimizer with state_names, coefficients and rule, for NumPy, Numba and CUDA.

A rule is elementwise: each element of its results depends on the same element of its arguments and on coefficients, so that
one text serves scalars, arrays and chunks of arrays.  It has no ``if``; ``select``, ``larger`` and ``clip`` of
``fastrms.rules`` stand for it.  It changes nothing in place.  ``@staticmethod`` may be written above it or left out.
"""

import dis
import math
import sys
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from inspect import Parameter, signature
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import rules

PROBE = 7  # elements on which a rule is tried


@dataclass(frozen=True)
class OwnRule:
    """A rule that a subclass of Optimizer brings.  As a rule of rules.py it has, beside its own coefficients, grad_scale and
    grad_rescale, which are multiplied into grad before ``function`` is called."""

    name: str
    function: Any
    states: tuple
    coefficients: tuple  # without grad_scale and grad_rescale
    kept: dict = field(default_factory=dict, compare=False, repr=False)  # what was made from it, which goes with it

    def __str__(self):
        return self.name


def remembered(function):
    """functools.cache for a function whose first argument is a rule: what is made from an own rule is kept on this rule, so
    that both are freed with the class that brought it."""
    of_names = cache(function)

    @wraps(function)
    def found(rule, *rest):
        if not isinstance(rule, OwnRule):
            return of_names(rule, *rest)
        key = (function, *rest)
        if key not in rule.kept:
            rule.kept[key] = function(rule, *rest)
        return rule.kept[key]

    return found


class OwnRecipe(NamedTuple):
    """An own rule with its hyper-parameters; coefficients() of the subclass makes the coefficients of a step from them."""

    rule: OwnRule
    dtype: Any
    coefficients: Any  # the function of the subclass
    hyper: dict
    grad_rescale: float = 1.0

    general = False  # there is one form of an own rule

    fixed = False
    ahead = None  # the subclass is asked step by step

    def rescaled(self, grad_rescale):
        """This recipe with a second factor of the gradient, as Recipe.rescaled."""
        return self._replace(grad_rescale=grad_rescale)

    def at(self, step, grad_scale):
        """The coefficients of update number `step` (from 1), in double."""
        given = self.coefficients(step, **self.hyper)
        if not isinstance(given, dict):
            raise TypeError(
                f"coefficients of {self.rule} gives a {type(given).__name__}; it must give a dict: name -> number"
            )
        if set(given) != set(self.rule.coefficients):
            raise ValueError(f"coefficients of {self.rule} gives {', '.join(given)}; "
                             f"its rule takes {', '.join(self.rule.coefficients)}")  # fmt: skip
        values = [float(given[name]) for name in self.rule.coefficients]
        if any(map(math.isnan, values)):
            raise ValueError(f"coefficients of {self.rule} gives a NaN at step {step}: {given}")
        return [grad_scale, self.grad_rescale, *values]


def plain(rule):
    """The rule with its states and coefficients renamed, so that no name has another meaning in the text of a kernel."""
    if not isinstance(rule, OwnRule):
        return rule
    states = tuple(f"own_state_{k}" for k in range(len(rule.states)))
    numbers = tuple(f"own_number_{k}" for k in range(len(rule.coefficients)))
    return replace(rule, states=states, coefficients=numbers, kept={})


def rule_of(cls):
    """The OwnRule of a subclass of Optimizer, its arguments checked."""
    function, states = cls.rule, cls.state_names
    if isinstance(states, str) or not all(isinstance(name, str) for name in states):
        raise TypeError(f"state_names={states!r} of {cls.__name__} must be a tuple of names")
    names = _arguments(cls.__name__, function)
    first = ("param", "grad", *states)
    if names[: len(first)] != first:
        raise TypeError(f"rule of {cls.__name__} takes {', '.join(names)}; its first arguments must be {', '.join(first)}")
    taken = next((name for name in ("grad_scale", "grad_rescale") if name in names), None)
    if taken:
        raise TypeError(f"rule of {cls.__name__} takes {taken}, which is multiplied into grad before it is called")
    if not callable(getattr(cls, "coefficients", None)):
        raise TypeError(f"{cls.__name__} has a rule, but no coefficients(step, **hyper) that returns the numbers it needs")
    if "lr" not in cls.defaults:
        raise TypeError(f"defaults={cls.defaults!r} of {cls.__name__} must have a learning rate, lr")
    return OwnRule(cls.__name__, function, tuple(states), names[len(first) :])


def _arguments(name, function):
    """The names of the arguments of a rule, which must be a plain function of arguments that are given by position."""
    if not isinstance(function, FunctionType):
        kind = "a classmethod" if isinstance(function, MethodType) else f"a {type(function).__name__}"
        raise TypeError(f"rule of {name} is {kind}; it must be a plain function, with @staticmethod or nothing above it")
    parameters = signature(function).parameters
    wrong = next((p for p in parameters.values() if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    if wrong is not None:
        kind = "by name only" if wrong.kind is Parameter.KEYWORD_ONLY else "in any number"
        raise TypeError(f"rule of {name} takes {wrong.name} {kind}; its arguments are given by position: leave out the `*`")
    return tuple(parameters)


def recipe(rule, coefficients, hyper, dtype):
    """An OwnRecipe; an error where the coefficients of the first step cannot be made."""
    made = OwnRecipe(rule, dtype, coefficients, hyper)
    made.at(1, 1.0)
    return made


def checked(rule, results):
    """The results of an own rule; TypeError unless they are a tuple of the new param and states."""
    if not isinstance(results, tuple) or len(results) != 1 + len(rule.states):
        raise TypeError(
            f"the rule of {rule} must return a tuple ({', '.join(('param', *rule.states))}{',' * (not rule.states)})"
        )
    return results


def function_of(rule, select, compiler=None):
    """The function of an own rule, in which ``select`` and the helpers of fastrms.rules are those of a backend.

    Parameters
    ----------
    rule : OwnRule
    select : callable(condition, x, y)
    compiler : callable(function), optional
        It wraps the function, each helper, and each function of the user's that reaches a helper.
    """
    return _Exchange(select, compiler).rebuilt(rule.function)


class _Exchange:
    """The functions of fastrms.rules exchanged for those of a backend in what a rule reaches: its globals, its closure, the
    modules fastrms and fastrms.rules, and functions of the user's."""

    def __init__(self, select, compiler):
        self.compiler, names = compiler, _helpers(select, compiler)
        self.functions = {rules.select: select, **{helper: names[helper.__name__] for helper in rules.HELPERS}}
        package, ours = sys.modules[__package__], _with(rules, **names)
        self.modules = {rules: ours, package: _with(package, rules=ours)}

    def value(self, x):
        """What stands for a value that a rule reaches; the value itself where it reaches nothing that is exchanged."""
        if isinstance(x, ModuleType):
            return self.modules.get(x, x)
        function = getattr(x, "py_func", x) if callable(x) and not isinstance(x, type) else None  # that of a jitted function
        if not isinstance(function, FunctionType):
            return x
        if function not in self.functions:
            self.functions[function] = x  # for a function that calls itself
            reached = [*_names(function).values(), *map(_content, function.__closure__ or ())]
            if (self.compiler is None and function is not x) or any(self.value(y) is not y for y in reached):
                self.functions[function] = self.rebuilt(function)
        return self.functions[function]

    def rebuilt(self, function):
        names = {name: self.value(x) for name, x in _names(function).items()}
        cells = function.__closure__ and tuple(
            cell if (x := _content(cell)) is cell else CellType(self.value(x)) for cell in function.__closure__
        )
        made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        return made if self.compiler is None else self.compiler(made)


@cache  # for all classes: Numba never frees a jitted function whose globals hold this function
def _helpers(select, compiler):
    """The globals of the functions in rules.HELPERS, and these functions themselves, by their names."""
    names = {"GENERAL": True, "select": select}
    for helper in rules.HELPERS:
        made = rules.rebuilt(helper, names)
        names[helper.__name__] = made if compiler is None else compiler(made)
    return names


def _with(module, **names):
    """A copy of a module with other values for these names."""
    made = ModuleType(module.__name__)
    vars(made).update(vars(module), **names)
    return made


def _names(function):
    """The globals that a function may use, by their names."""
    used, known = {"__name__", "__builtins__", *_names_in(function.__code__)}, function.__globals__
    return {name: known[name] for name in used if name in known}


def _names_in(code):
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _content(cell):
    """What a cell of a closure holds; the cell itself while it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


class NotElementwiseError(ValueError):
    """What is said of a rule whose results depend on other elements."""


class Near(np.ndarray):
    """Numbers so near to each other that a rule with an ``if`` takes the same branch for all: that of the first."""

    def __bool__(self):
        return bool(self.flat[0])


def refuse_unless_elementwise(rule, function, coefficients, must_run):
    """Try an own rule, as a function of arrays, on arrays and on the elements of these arrays one by one.

    It is tried with the coefficients of its first step, and with others: a learning rate may begin at 0, which hides all
    else, and a bound may be one that no number of the trial passes.

    Parameters
    ----------
    rule : OwnRule
    function : callable
        The rule as a function of arrays and its coefficients.
    coefficients : array
    must_run : bool
        Whether the backend calls the rule with arrays.  Where it does not, a rule that cannot take arrays is tried on
        numbers that are near to each other, and let through where it cannot take these either, or draws random numbers.

    Raises
    ------
    ValueError
        An element of its results depends on other elements, as with a sum or a norm, which would be those of a chunk; with
        must_run also where it writes into its arguments or does not accept an array, as with an ``if``.
    TypeError
        With must_run: a result is no real number.
    """
    coefficients = np.asarray(coefficients, float)
    with np.errstate(all="ignore"):
        if must_run:
            _compare(rule, function, _arrays(rule), coefficients)
        elif _is_random(rule, function, coefficients):
            return
        others = () if _loops(rule.function) else _stand_ins(coefficients.size)  # a loop may go on with these for ever
        for numbers in (coefficients, *others):
            for trials in (_arrays, _near_arrays):
                try:
                    _compare(rule, function, trials(rule), numbers)
                    break
                except NotElementwiseError:
                    raise
                except Exception:  # the rule need not take these coefficients, and on scalars no arrays
                    continue


def _is_random(rule, function, coefficients):
    """Whether a rule gives other results when it is called again."""
    for trials in (_arrays, _near_arrays):
        try:
            first, second = (_tried_on(rule, function, next(trials(rule)), coefficients) for _ in range(2))
            return not np.array_equal(first, second, equal_nan=True)
        except Exception:
            continue
    return False


def _loops(function):
    """Whether a function holds a loop: a jump to what stands before."""
    jumps = (*dis.hasjabs, *dis.hasjrel)
    return any(step.opcode in jumps and step.argval <= step.offset for step in dis.get_instructions(function))


def _stand_ins(count):
    """Coefficients to try a rule with: always the same numbers, all of about 1, and in every two of them one that is a
    million times the other."""
    ones = 0.5 + 0.5 * abs(np.sin(np.arange(1.0, count + 1)))
    yield ones
    for place in range(max(1, (count - 1).bit_length())):
        large = np.arange(count) >> place & 1
        yield ones * 1e3 ** (2.0 * large - 1)
        yield ones * 1e3 ** (1 - 2.0 * large)


def _arrays(rule):
    """Lists of arrays to try a rule with: param, grad and the states, of several magnitudes."""
    numbers = np.sin(np.arange(1.0, 1 + PROBE * (2 + len(rule.states)))).reshape(-1, PROBE)
    numbers[2:] = abs(numbers[2:])  # some states are never negative
    for of_param, of_others in ((1.0, 1.0), (1e-3, 1e3), (1e3, 1e-3)):
        yield [numbers[0] * of_param, *(numbers[1:] * of_others)]


def _near_arrays(rule):
    """The same with arrays of numbers that are near to each other."""
    near = 1 + 1e-6 * np.arange(PROBE)
    for buffers in _arrays(rule):
        for k in range(0, PROBE, 2):
            yield [(x[k] * near).view(Near) for x in buffers]


def _compare(rule, function, trials, coefficients):
    for buffers in trials:
        whole = _tried_on(rule, function, buffers, coefficients)
        single = [_tried_on(rule, function, [x[k : k + 1] for x in buffers], coefficients) for k in range(PROBE)]
        for results, parts in zip(whole, zip(*single, strict=True), strict=True):
            _refuse_different(rule, results, np.concatenate(parts))


def _tried_on(rule, function, buffers, coefficients):
    """The results of a rule as arrays of the size of its arguments."""
    try:
        results = function(*buffers, *coefficients)
        for name, x in zip(("param", *rule.states), results, strict=True):
            if np.asarray(x).dtype.kind not in "biuf":
                kind = "None" if x is None else np.asarray(x).dtype
                raise TypeError(f"the rule of {rule} gives {kind} as the new {name}; it must give real numbers")
        return [np.broadcast_to(x, buffers[0].shape) for x in results]
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError) and "arrays can be converted to" not in str(error):
            raise
        raise ValueError(f"the rule of {rule} does not run on backend='numpy': {_remedy(error)}") from error


def _remedy(error):
    """What to do about a rule that does not take an array."""
    if "read-only" in str(error):
        return "its arguments are read-only: write `param = param - ...`, never `param -= ...`"
    if isinstance(error, TypeError):
        return f"it cannot take an array ({error}): take np.sqrt and the like in place of math.sqrt, float() and int()"
    return (
        f"it cannot take an array ({error}): a rule has no `if`, see select in fastrms.rules; import it at the top of the "
        f"file, not in the rule"
    )


def _refuse_different(rule, whole, single):
    size = np.max(np.abs(whole[np.isfinite(whole)]), initial=0.0)
    if not np.allclose(whole, single, rtol=1e-9, atol=1e-9 * size, equal_nan=True):
        raise NotElementwiseError(
            f"the rule of {rule} is not elementwise: an element of its results depends on other elements, as with a sum, a "
            f"norm or a maximum, and only a chunk of them is there; compute such a number before the step and pass it as a "
            f"hyper-parameter"
        )
