"""What fastrms.numba needs in jitted code: checks of arguments, recipes.py compiled as it stands, calls of kernels."""

import inspect
from collections import namedtuple
from types import FunctionType

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from . import dialects, functional, hyper, optimizers, recipes, rules
from .backends.numba.kernels import OPTIONS, compiler, kernel
from .recipes import CORRECTED, DOZAT, FOLDED, NONE

REAL = {types.float32: np.dtype(np.float32), types.float64: np.dtype(np.float64)}
DEFAULT = {"jit_options": OPTIONS}


# the functions of recipes.py are jitted as they stand; where they take a dtype, jitted code passes its itemsize

register_jitable(**OPTIONS)(rules.select)
for _text in vars(recipes).values():
    if isinstance(_text, FunctionType) and _text.__module__ == recipes.__name__ and _text is not recipes.rounded:
        register_jitable(**OPTIONS)(_text)


@overload(recipes.rounded, **DEFAULT)
def _rounded(value, dtype):
    return lambda value, dtype: np.float64(np.float32(value)) if dtype == 4 else value


# the arguments of an update, checked and converted to the numbers that recipes.py takes


def _refused(sentence):
    return numba.errors.TypingError(f"fastrms {sentence}")


def number(value):
    """A hyper-parameter as a double."""


@overload(number, **DEFAULT)
def _number_by_type(value):
    if not isinstance(value, (types.Float, types.Integer)):
        raise _refused(f"takes a number where it is given a {value}")
    return lambda value: np.float64(value)


def flag(value):
    """True or False as a number."""


@overload(flag, **DEFAULT)
def _flag_by_type(value):
    if not isinstance(value, types.Boolean):
        raise _refused(f"takes True or False where it is given a {value}")
    return lambda value: 1 if value else 0


def word(name, allowed):
    """A function for the number of a word, of True or of False; ValueError for what is not among those allowed."""

    def word(value):
        """This is never called itself, only its overload."""

    refused = f"fastrms: {name} must be one of {', '.join(map(repr, allowed))}"
    true = recipes.WORDS.get(dialects.meaning_of_true(None, name), 1) if True in allowed else -1
    numbers = tuple(recipes.WORDS[word] for word in allowed if isinstance(word, str))

    @overload(word, prefer_literal=True, **DEFAULT)
    def word_by_type(value):
        def of_word(value):
            made = known if known >= 0 else _number_of_word(value)
            if made not in numbers:
                raise ValueError(refused)
            return made

        def of_flag(value):
            if value and true < 0:
                raise ValueError(refused)
            return true if value else 0

        if isinstance(value, types.Boolean | types.BooleanLiteral):
            return of_flag
        if not isinstance(value, types.UnicodeType | types.StringLiteral):
            raise _refused(f"takes a word, True or False where it is given a {value}")
        known = recipes.WORDS.get(getattr(value, "literal_value", ""), -1)
        return of_word

    return word


@compiler
def _number_of_word(word):
    return CORRECTED if word == "corrected" else FOLDED if word == "folded" else DOZAT if word == "dozat" else NONE


def positive(name):
    """A function for a number above 0 as a double, 0 for None; ValueError for 0, which recipes.py takes for None."""

    def positive(value):
        """This is never called itself, only its overload."""

    refused = hyper.refusal(name)

    @overload(positive, **DEFAULT)
    def positive_by_type(value):
        def of_number(value):
            if not value > 0:
                raise ValueError(refused)
            return number(value)

        return (lambda value: 0.0) if value == types.none else of_number

    return positive


def conversion(optimizer, name):
    """The function of jitted code that checks the kind of a hyper-parameter and makes it a number."""
    check = optimizer.check_of(name)
    if hasattr(check, "allowed"):
        return word(name, check.allowed)
    if check is hyper.optional_positive:
        return positive(name)
    return flag if check is hyper.flag else number


def count(step):
    """The number of an update as an int64; ValueError where it is out of range."""


@overload(count, **DEFAULT)
def _count_by_type(step):
    if not isinstance(step, types.Integer):
        raise _refused(f"takes the number of this update, an integer from 1, as step, not a {step}")

    def count(step):
        if step < 1 or step > most:
            raise ValueError("fastrms: step must be from 1 to 2**62")
        return np.int64(step)

    most = hyper.MOST_STEPS
    return count


@compiler
def factor(grad_scale):
    if not 1e-30 <= number(grad_scale) <= 1e30:
        raise ValueError("fastrms: grad_scale must be from 1e-30 to 1e30")
    return number(grad_scale)


# from hyper-parameters to coefficients


def function_of(name, text, **names):
    """The function of that name in a text, which knows the names."""
    exec(compile(text, "<fastrms.numba>", "exec"), names)
    return names[name]


def refusal(sentences):
    """refuse(number) for jitted code, which raises the sentence of that number.  Numba raises only constants, so there is a
    branch for each; one function of nine branches compiles in a fifth of the time of nine functions."""
    branches = [f"    if number == {k}:\n        raise ValueError({sentence!r})\n" for k, sentence in enumerate(sentences)]
    return compiler(function_of("refuse", "def refuse(number):\n" + "".join(branches)))


def coefficients_of(optimizer):
    """A named tuple for the hyper-parameters of an optimizer, and coefficients(h, step, grad_scale, itemsize) for jitted
    code, which gives (whether the form is general, the coefficients in double)."""
    checks_of, recipe_of = optimizer._numbers.checks, optimizer._numbers.recipe
    refuse = refusal([hyper.refusal(name, optimizer.defaults) for name in optimizer._numbers.right._fields])

    @compiler
    def coefficients(h, step, grad_scale, itemsize):
        checks = checks_of(h, itemsize)
        for k in range(len(checks)):
            if not checks[k]:
                refuse(k)
        general, values, corrections = recipe_of(h, itemsize)
        if recipes.overflowing(values, corrections, itemsize) >= 0:
            raise ValueError("fastrms: lr or weight_decay makes a coefficient that is not finite in the dtype of param")
        made = np.empty(len(values))
        for k in range(len(values)):
            made[k] = values[k]
        recipes.evaluate(made, corrections, step, grad_scale)
        return general, made

    return namedtuple(f"_{optimizer.__name__}", optimizer.defaults), coefficients


@compiler
def refuse_zeros(state):
    for x in state.flat:
        if x == 0:
            raise ValueError("fastrms: eps and eps_root are both 0 in the dtype of param and sum holds a 0: 0/0")


# the way to the kernels


def _refuse_others(array):
    """Raise an error at compilation for a type that is no array of numbers of ours."""
    if not isinstance(array, types.Array) or array.dtype not in REAL or array.layout == "A":
        raise _refused(f"updates contiguous arrays of float32 or float64, not {array}")


def itemsize(*buffers):
    """The bytes of a number of the first buffer; all that are there must be arrays."""


@overload(itemsize, **DEFAULT)
def _itemsize_by_type(*buffers):
    for buffer in buffers:
        if buffer != types.none:
            _refuse_others(buffer)
    return lambda *buffers: buffers[0].itemsize


def _refuse_types(arrays):
    """Raise an error at compilation for types of arrays that a kernel cannot take."""
    param = arrays[0]
    for array in arrays:
        _refuse_others(array)
        if (array.dtype, array.ndim, array.layout) != (param.dtype, param.ndim, param.layout):
            raise _refused(f"needs arrays of one dtype and memory order, not {param} and {array}")
    if not all(array.mutable for array in (param, *arrays[2:])):
        raise _refused("updates param and its states in place: of these arrays only grad may be read-only")


@compiler
def _address(array, shape):
    """The address of a contiguous array; ValueError where it has another shape."""
    if array.shape != shape:
        raise ValueError("fastrms: param, grad and states must have one shape")
    return np.intp(array.ctypes.data)


@compiler
def _refuse_places(table, size, itemsize):
    """ValueError unless buffers at the addresses from place 5 of the table, of `size` elements, are apart and aligned."""
    for k in range(5, len(table)):
        if table[k] % itemsize != 0:
            raise ValueError("fastrms: one of param, grad and the states is not aligned to its dtype; pass a copy")
        for other in range(5, k):
            if abs(table[k] - table[other]) < size * itemsize:
                raise ValueError("fastrms: two of param, grad and the states overlap in memory")


def runner(optimizer, parallel):
    """run(general, values, param, grad, *states) for jitted code, from what coefficients() gave.  The states are all that
    the optimizer can have, None for those that its present rule lacks."""
    of_states, known = optimizer._numbers.rules, optimizer._numbers.values._fields

    def run(general, values, *buffers):
        """This is never called itself, only its overload."""

    @overload(run, **DEFAULT)
    def run_by_type(general, values, *buffers):
        there = [k for k, kind in enumerate(buffers) if kind != types.none]
        arrays, states = [buffers[k] for k in there], tuple([*of_states][-1][k - 2] for k in there[2:])
        _refuse_types(arrays)
        if states not in of_states:
            raise _refused(f"has no rule of {optimizer.__name__} with just the states {', '.join(states)}")
        rule, dtype = of_states[states], REAL[arrays[0].dtype]
        wanted = rules.coefficient_names(rules.RULES[rule])
        place = tuple(known.index(name) if name in known else -1 for name in wanted)
        fixed = tuple(recipes.constants(dtype).get(name, 0.0) for name in wanted)
        kernels = [kernel(rule, form, dtype, parallel) for form in (False, True)]
        threads = _some_threads if parallel else _no_threads
        return _implementation(*kernels, threads, arrays[0].dtype, place, fixed, _addresses_of(there))

    return run


_no_threads = compiler(lambda: ())
_some_threads = compiler(lambda: (np.intp(numba.get_num_threads()),))


def _addresses_of(places):
    """addresses(buffers) for jitted code: those of the buffers at these places, which have the shape of the first."""
    each = ", ".join(f"address(buffers[{k}], buffers[0].shape)" for k in places)
    return compiler(function_of("addresses", f"def addresses(buffers):\n    return {each}", address=_address))


def _implementation(neutral, full, threads, real, place, fixed, addresses_of):
    def run(general, values, *buffers):
        coefficients = np.empty(len(place), real)
        for k in range(len(place)):
            coefficients[k] = values[place[k]] if place[k] >= 0 else fixed[k]
        addresses = addresses_of(buffers)
        table = np.empty(5 + len(addresses), np.intp)
        table[0], table[1], table[2], table[3] = 1, coefficients.ctypes.data, 0, 0  # one tensor; one row of coefficients
        table[4] = buffers[0].size
        for k in range(len(addresses)):
            table[5 + k] = addresses[k]
        _refuse_places(table, buffers[0].size, buffers[0].itemsize)
        arguments = (np.intp(table.ctypes.data), np.intp(0)) + threads()
        if general:
            full(*arguments)
        else:
            neutral(*arguments)
        table[0] = coefficients[0] = 0  # until here they are used, and not freed, though above only by their addresses

    return run


# the updates

# The text of an update is made from the function in fastrms and the class of its optimizer.  That of rprop begins so:
#     def rprop(param, grad, prev, step_size, eta_minus=0.5, eta_plus=1.2, ..., grad_scale=1.0):
#         h = Hyper(lr=0.0, eta_minus=number_of_eta_minus(eta_minus), eta_plus=number_of_eta_plus(eta_plus), ...)
UPDATE = """\
def {name}({arguments}):
    size = itemsize({buffers})
    h = Hyper({numbers})
    general, values = coefficients(h, count({step}), factor(grad_scale), size)
{checks}    run(general, values, {buffers})
"""
OPTIONAL = """\
    if ({state} is not None) != (h.{name} > 0):
        raise ValueError("fastrms: {name} and {state} go together")
"""
POSITIVE = """\
    if needs_positive_state(h, size):
        refuse_zeros({state})
"""


def updates(name):
    """The function fastrms.<name> for jitted code, and its parallel form."""
    optimizer, function = functional.OPTIMIZERS[name], getattr(functional, name)
    kind, coefficients = coefficients_of(optimizer)
    names = {f"number_of_{hyper}": conversion(optimizer, hyper) for hyper in optimizer.defaults}
    names |= {"Hyper": kind, "coefficients": coefficients, "count": count, "factor": factor, "refuse_zeros": refuse_zeros}
    names |= {"itemsize": itemsize, "needs_positive_state": compiler(optimizer.needs_positive_state)}
    names |= {"__name__": "fastrms.numba"}
    text, made = text_of(function, optimizer), []
    for parallel in (False, True):
        update = function_of(name, text, run=runner(optimizer, parallel), **names)
        update.__doc__ = document(function, optimizer)
        made.append(compiler(update))
    return made


def text_of(function, optimizer):
    """The text of the update that does what `function` does."""
    given = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    if optimizer is optimizers.RProp:  # only random numbers depend on its step, and there are none in jitted code
        del given["step"]
    states, optional = [*optimizer._numbers.rules][-1], optimizer._numbers.optional
    checks = [OPTIONAL.format(name=name, state=state) for state, name in optional.items()]
    checks += [POSITIVE.format(state=states[0])] * ("needs_positive_state" in vars(optimizer))
    return UPDATE.format(
        name=function.__name__,
        arguments=", ".join(arguments_of(optimizer, given)),
        numbers=", ".join(f"{name}={number}" for name, number in numbers_of(optimizer, given).items()),
        checks="".join(checks),
        step="step" if "step" in given else 1,
        buffers=", ".join(["param", "grad", *states]),
    )


def arguments_of(optimizer, given):
    """The arguments of an update, with defaults: those that must be given, the hyper-parameters, the others.  given: name ->
    default of the same function in fastrms."""
    implied, needed = optimizer.implied(), [name for name in given if given[name] is inspect.Parameter.empty]
    defaults = {name: default for name, default in optimizer.defaults.items() if name not in implied}
    defaults |= {"step": 1, "grad_scale": 1.0, **dict.fromkeys([*optimizer._numbers.optional, *implied])}
    return needed + [f"{name}={defaults[name]!r}" for name in defaults if name in given and name not in needed]


def numbers_of(optimizer, given):
    """Name of a hyper-parameter -> the expression that makes it a number."""
    numbers = {name: f"number_of_{name}({name})" if name in given else "0.0" for name in optimizer.defaults}
    for name, state in optimizer.implied().items():
        follows = f"0 if {state} is None else 1"
        numbers[name] = f"({follows}) if {name} is None else {numbers[name]}" if name in given else follows
    return numbers


DOCUMENTED = """\
{first}, {second}, ... : optional
    The hyper-parameters of fastrms.{name}, with its defaults: numbers, True, False or words.

Raises
------
numba.errors.TypingError
    Where an argument is of another kind; when the calling function is compiled.
ValueError
    Where an argument has a value that it must not have; nothing has been written then.
"""


def document(function, optimizer):
    """The docstring of an update: that of `function` as far as its hyper-parameters, then what is said in jitted code."""
    common = inspect.cleandoc(function.__doc__ or "").partition("\n**options")[0] + "\n"
    apart = "share no byte; they are contiguous, and only grad may be read-only."
    first, second, *_ = (name for name in optimizer.defaults if name not in optimizer.fixed)
    special = DOCUMENTED.format(first=first, second=second, name=optimizer.__name__)
    return common.replace("share no byte.", apart) + special
