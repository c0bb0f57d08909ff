"""What fastrms.numba needs in jitted code: checks of arguments, recipes.py compiled as it stands, calls of kernels."""

from collections import namedtuple
from types import FunctionType

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from . import hyper, recipes, rules
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


def word(value, one, other, true):
    """The number of a word, which must be `one` or `other`; 0 for False, `true` for True.  ValueError for another word."""


@overload(word, prefer_literal=True, **DEFAULT)
def _word_by_type(value, one, other, true):
    def number(value, one, other, true):
        made = known if known >= 0 else _number_of_word(value)
        if made != one and made != other:
            raise ValueError("fastrms: bias_correction, nesterov or amsgrad has a value that means nothing here")
        return made

    def of_flag(value, one, other, true):
        if value and true < 0:
            raise ValueError("fastrms: nesterov=True does not say which; say 'dozat' or 'folded'")
        return true if value else 0

    if isinstance(value, types.Boolean | types.BooleanLiteral):
        return of_flag
    if not isinstance(value, types.UnicodeType | types.StringLiteral):
        raise _refused(f"takes a word, True or False where it is given a {value}")
    known = recipes.WORDS.get(getattr(value, "literal_value", ""), -1)
    return number


@compiler
def _number_of_word(word):
    return CORRECTED if word == "corrected" else FOLDED if word == "folded" else DOZAT if word == "dozat" else NONE


def positive(value):
    """clip_value as a double; ValueError for 0, which recipes.py takes for None."""


@overload(positive, **DEFAULT)
def _positive_by_type(value):
    def positive(value):
        if not value > 0:
            raise ValueError(clip_value_refused)
        return number(value)

    clip_value_refused = hyper.refusal("clip_value")
    return positive


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


@compiler
def refuse_zeros(eps, eps_root, sum):
    """AdaGrad without eps divides by the root of its sum: a zero in it would give 0/0."""
    if recipes.rounded(eps, sum.itemsize) == 0 and recipes.rounded(eps_root, sum.itemsize) == 0:
        for x in sum.flat:
            if x == 0:
                raise ValueError("fastrms: eps and eps_root are both 0 in the dtype of param and sum holds a 0: 0/0")


def _hyper(optimizer):
    """A named tuple for the hyper-parameters of an optimizer that a step needs."""
    return namedtuple(f"_{optimizer.__name__}", [name for name in optimizer.defaults if name != "initial_value"])


def _refusal(sentences):
    """refuse(number) for jitted code, which raises the sentence of that number; there are nine at most.  Numba raises only
    constants, so each sentence has a variable; one function of nine branches compiles in a fifth of the time of nine
    functions."""
    if len(sentences) > 9:
        raise ValueError(f"a family has {len(sentences)} checks: give refuse() a variable and a branch for each of them")
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = [*sentences, *[""] * (9 - len(sentences))]

    @compiler
    def refuse(number):
        if number == 0:
            raise ValueError(s0)
        if number == 1:
            raise ValueError(s1)
        if number == 2:
            raise ValueError(s2)
        if number == 3:
            raise ValueError(s3)
        if number == 4:
            raise ValueError(s4)
        if number == 5:
            raise ValueError(s5)
        if number == 6:
            raise ValueError(s6)
        if number == 7:
            raise ValueError(s7)
        raise ValueError(s8)

    return refuse


def _coefficients_of(family, known):
    """coefficients(h, step, grad_scale, itemsize) for jitted code: (whether general, coefficients in double).  known: the
    names in h."""
    checks_of, recipe_of, right, _ = recipes.FAMILIES[family]
    refuse = _refusal([hyper.refusal(name, known) for name in right._fields])

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

    return coefficients


def family(optimizer, name):
    """The named tuple of the hyper-parameters of an optimizer, and its coefficients() for jitted code."""
    hyper_parameters = _hyper(optimizer)
    return hyper_parameters, _coefficients_of(name, hyper_parameters._fields)


# the way to the kernels


def _refuse_types(arrays):
    """Raise an error at compilation for types of arrays that a kernel cannot take."""
    param = arrays[0]
    for array in arrays:
        if not isinstance(array, types.Array) or array.dtype not in REAL or array.layout == "A":
            raise _refused(f"updates contiguous arrays of float32 or float64, not {array}")
        if (array.dtype, array.ndim, array.layout) != (param.dtype, param.ndim, param.layout):
            raise _refused(f"needs arrays of one dtype and memory order, not {param} and {array}")
    if not all(array.mutable for array in (param, *arrays[2:])):
        raise _refused("updates param and its states in place: of these arrays only grad may be read-only")


def _addresses(arrays, shape):
    """The addresses of contiguous arrays; ValueError where one has another shape."""


@overload(_addresses, **DEFAULT)
def _addresses_by_type(arrays, shape):
    if len(arrays) == 0:
        return lambda arrays, shape: ()

    def addresses(arrays, shape):
        if arrays[0].shape != shape:
            raise ValueError("fastrms: param, grad and states must have one shape")
        return (np.intp(arrays[0].ctypes.data),) + _addresses(arrays[1:], shape)

    return addresses


@compiler
def _refuse_places(table, size, itemsize):
    """ValueError unless buffers at the addresses from place 5 of the table, of `size` elements, are apart and aligned."""
    for k in range(5, len(table)):
        if table[k] % itemsize != 0:
            raise ValueError("fastrms: one of param, grad and the states is not aligned to its dtype; pass a copy")
        for other in range(5, k):
            if abs(table[k] - table[other]) < size * itemsize:
                raise ValueError("fastrms: two of param, grad and the states overlap in memory")


def runner(rule, family, parallel):
    """run(general, values, param, grad, *states) for jitted code; general, values: what the family's coefficients() gave."""
    wanted = rules.coefficient_names(rules.RULES[rule])
    known = recipes.FAMILIES[family].values._fields
    place = tuple(known.index(name) if name in known else -1 for name in wanted)

    def run(general, values, *arrays):
        """This is never called itself, only its overload."""

    @overload(run, **DEFAULT)
    def run_by_type(general, values, *arrays):
        _refuse_types(arrays)
        dtype, real = REAL[arrays[0].dtype], arrays[0].dtype
        fixed = tuple(recipes.constants(dtype).get(name, 0.0) for name in wanted)
        kernels = [kernel(rule, form, dtype, parallel) for form in (False, True)]
        return _implementation(*kernels, _some_threads if parallel else _no_threads, real, place, fixed)

    return run


_no_threads = compiler(lambda: ())
_some_threads = compiler(lambda: (np.intp(numba.get_num_threads()),))


def _implementation(neutral, full, threads, real, place, fixed):
    def run(general, values, *arrays):
        coefficients = np.empty(len(place), real)
        for k in range(len(place)):
            coefficients[k] = values[place[k]] if place[k] >= 0 else fixed[k]
        table = np.empty(len(arrays) + 5, np.intp)
        chosen(general, coefficients, table, arrays)

    @compiler
    def chosen(general, coefficients, table, arrays):  # the caller keeps the memory behind the addresses alive
        table[0], table[1], table[2], table[3] = 1, coefficients.ctypes.data, 0, 0  # one tensor; one row of coefficients
        table[4] = arrays[0].size
        places = _addresses(arrays, arrays[0].shape)
        for k in range(len(places)):
            table[5 + k] = places[k]
        _refuse_places(table, arrays[0].size, arrays[0].itemsize)
        arguments = (np.intp(table.ctypes.data), np.intp(0)) + threads()
        if general:
            full(*arguments)
        else:
            neutral(*arguments)

    return run
