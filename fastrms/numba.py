"""Kernels and scalar rules for people's own Numba code: to be called from @njit and @njit(parallel=True) functions.

``rmsprop(param, grad, square_avg, lr=0.01, ...)``, ``adagrad``, ``adam`` and ``rprop`` make one update in place, with
the keywords, defaults and bits of the functions of the same names in fastrms; grad_avg, momentum_buffer and
max_exp_avg_sq are the optional states.  ``rmsprop_parallel`` and so on divide it among Numba's own threads.
``rules`` holds the scalar rules (general form), ``neutral_rules`` those without the lines under GENERAL, for own loops:
``param[i], square_avg[i] = rules.rmsprop(param[i], grad[i], square_avg[i], grad_scale, clip_low, ...)``; every number
is rounded to the type of param first.

Arrays are float32 or float64, of any number of dimensions, contiguous, aligned, all of one dtype, order and shape; only grad
may be read-only.  An argument of another kind is a numba.errors.TypingError when your function is compiled.  Shapes that
differ, buffers that overlap and hyper-parameters out of range are a ValueError when it runs, before anything is written.
A function of yours that was kept by cache=True goes on with the fastrms it was compiled with.  Parallel forms, like any
parallel Numba code, may not be used by two Python threads at once under the workqueue layer, nor after a fork under omp;
fastrms.RMSProp(..., backend="numba") and its like are safe there.
"""

from collections import namedtuple
from functools import cache
from types import FunctionType, ModuleType

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from . import hyper, optimizers, recipes
from . import rules as texts
from .backends.numba.kernels import OPTIONS, compiler, jitted, kernel
from .recipes import CORRECTED, DOZAT, FOLDED, NONE

_REAL = {types.float32: np.dtype(np.float32), types.float64: np.dtype(np.float64)}
_DEFAULT = {"jit_options": OPTIONS}


# recipes.py in jitted code: its functions of plain numbers as they stand, with the itemsize in place of a dtype

register_jitable(**OPTIONS)(texts.select)
for _text in vars(recipes).values():
    if isinstance(_text, FunctionType) and _text.__module__ == recipes.__name__ and _text is not recipes.rounded:
        register_jitable(**OPTIONS)(_text)


@overload(recipes.rounded, **_DEFAULT)
def _rounded(value, dtype):
    return lambda value, dtype: np.float64(np.float32(value)) if dtype == 4 else value


# the arguments of an update as recipes.py wants them, or an error


def _refused(sentence):
    return numba.errors.TypingError(f"fastrms {sentence}")


def _number(value):
    """A hyper-parameter as a double."""


@overload(_number, **_DEFAULT)
def _number_by_type(value):
    if not isinstance(value, (types.Float, types.Integer)):
        raise _refused(f"takes a number where it is given a {value}")
    return lambda value: np.float64(value)


def _flag(value):
    """True or False as a number."""


@overload(_flag, **_DEFAULT)
def _flag_by_type(value):
    if not isinstance(value, types.Boolean):
        raise _refused(f"takes True or False where it is given a {value}")
    return lambda value: 1 if value else 0


def _word(value, one, other, true):
    """The number of a word, which must be `one` or `other`; 0 for False, `true` for True; ValueError for another."""


@overload(_word, prefer_literal=True, **_DEFAULT)
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


def _positive(value):
    """clip_value as a double; 0, which recipes.py takes for None, is no clip_value."""


@overload(_positive, **_DEFAULT)
def _positive_by_type(value):
    def positive(value):
        if not value > 0:
            raise ValueError(clip_value_refused)
        return _number(value)

    clip_value_refused = hyper.refusal("clip_value")
    return positive


def _count(step):
    """The number of an update."""


@overload(_count, **_DEFAULT)
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
def _factor(grad_scale):
    if not 1e-30 <= _number(grad_scale) <= 1e30:
        raise ValueError("fastrms: grad_scale must be from 1e-30 to 1e30")
    return _number(grad_scale)


@compiler
def _refuse_zeros(eps, eps_root, sum):
    """AdaGrad without eps divides by the root of its sum: a zero in it would give 0/0."""
    if recipes.rounded(eps, sum.itemsize) == 0 and recipes.rounded(eps_root, sum.itemsize) == 0:
        for x in sum.flat:
            if x == 0:
                raise ValueError("fastrms: eps and eps_root are both 0 in the dtype of param and sum holds a 0: 0/0")


def _hyper(optimizer):
    """The hyper-parameters that a step needs, as a named tuple."""
    return namedtuple(f"_{optimizer.__name__}", [name for name in optimizer.defaults if name != "initial_value"])


_RMSProp, _AdaGrad, _Adam, _RProp = map(_hyper, (optimizers.RMSProp, optimizers.AdaGrad, optimizers.Adam, optimizers.RProp))


def _refusal(sentences, place=0):
    """refuse(number) of jitted code raises the sentence of that number; what it raises must be a constant."""
    if not sentences:
        return compiler(lambda number: None)
    first, refuse_others = sentences[0], _refusal(sentences[1:], place + 1)

    @compiler
    def refuse(number):
        if number == place:
            raise ValueError(first)
        refuse_others(number)

    return refuse


def _coefficients_of(family):
    """coefficients(h, step, grad_scale, itemsize) of jitted code -> whether the form is general, coefficients in double."""
    checks_of, recipe_of, right, _ = recipes.FAMILIES[family]
    refuse = _refusal([hyper.refusal(name) for name in right._fields])

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


# the way to the kernels


def _refuse_types(arrays):
    """What a kernel of flat arrays cannot take, as an error of compilation."""
    param = arrays[0]
    for array in arrays:
        if not isinstance(array, types.Array) or array.dtype not in _REAL or array.layout == "A":
            raise _refused(f"updates contiguous arrays of float32 or float64, not {array}")
        if (array.dtype, array.ndim, array.layout) != (param.dtype, param.ndim, param.layout):
            raise _refused(f"needs arrays of one dtype and memory order, not {param} and {array}")
    if not all(array.mutable for array in (param, *arrays[2:])):
        raise _refused("updates param and its states in place: of these arrays only grad may be read-only")


def _addresses(arrays, shape):
    """Where contiguous arrays begin; ValueError where one has another shape."""


@overload(_addresses, **_DEFAULT)
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
    """Buffers of `size` elements, whose addresses are in the table from place 5, share no byte and are aligned."""
    for k in range(5, len(table)):
        if table[k] % itemsize != 0:
            raise ValueError("fastrms: one of param, grad and the states is not aligned to its dtype; pass a copy")
        for other in range(5, k):
            if abs(table[k] - table[other]) < size * itemsize:
                raise ValueError("fastrms: two of param, grad and the states overlap in memory")


def _runner(rule, family, parallel):
    """run(general, values, param, grad, *states) for jitted code; values: what coefficients() of the family gave."""
    wanted = texts.coefficient_names(texts.RULES[rule])
    known = recipes.FAMILIES[family].values._fields
    place = tuple(known.index(name) if name in known else -1 for name in wanted)

    def run(general, values, *arrays):
        """Only its overload is ever called."""

    @overload(run, **_DEFAULT)
    def run_by_type(general, values, *arrays):
        _refuse_types(arrays)
        dtype, real = _REAL[arrays[0].dtype], arrays[0].dtype
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
    def chosen(general, coefficients, table, arrays):  # the caller keeps what lies at the addresses
        table[0], table[1], table[2], table[3] = 1, coefficients.ctypes.data, 0, 0  # of one tensor, in one row
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


# the four families, in two forms


def _rmsprop_of(parallel):
    rules = "rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_centered_momentum"
    plain, momentum_only, centered_only, both = (_runner(rule, "rmsprop", parallel) for rule in rules)

    @compiler
    def rmsprop(
        param, grad, square_avg, lr=0.01, rho=0.99, eps=1e-8, eps_root=0.0, momentum=0.0, nesterov=False, weight_decay=0.0,
        decoupled=False, maximize=False, clip_value=None, lr_in_momentum=False, bias_correction=False, step=1,
        grad_scale=1.0, grad_avg=None, momentum_buffer=None,
    ):  # fmt: skip
        """One RMSProp update of param and its states, in place, with the bits of fastrms.rmsprop (Hinton 2012).

        ::

            g = grad*grad_scale, clipped and decayed;  square_avg = rho*square_avg + (1 - rho)*g**2
            param = param - lr*g/(sqrt(square_avg + eps_root) + eps)

        Parameters
        ----------
        param, grad, square_avg : array of float32 or float64
            Contiguous, of one dtype, shape and memory order, and apart in memory; only grad may be read-only.
        step : int, default 1
            Number of this update, from 1; it matters with bias_correction only.
        grad_scale : float, default 1
            Factor of the gradient, from 1e-30 to 1e30.
        grad_avg, momentum_buffer : array, optional
            The state of the centered form, and that of momentum > 0.
        lr, rho, ... : optional
            The hyper-parameters of fastrms.RMSProp, with its defaults; lr is a number.

        Raises
        ------
        numba.errors.TypingError
            Where an argument is of another kind; when the calling function is compiled.
        ValueError
            Where an argument has a value that it must not have; nothing has been written then.
        """
        if (momentum_buffer is not None) != (momentum > 0):
            raise ValueError("fastrms: momentum > 0 and momentum_buffer go together")
        clip = 0.0 if clip_value is None else _positive(clip_value)
        centered = 0 if grad_avg is None else 1
        h = _RMSProp(
            lr=_number(lr), rho=_number(rho), eps=_number(eps), eps_root=_number(eps_root), momentum=_number(momentum),
            nesterov=_flag(nesterov), centered=centered, weight_decay=_number(weight_decay),
            decoupled=_flag(decoupled), maximize=_flag(maximize),
            clip_value=clip, lr_in_momentum=_flag(lr_in_momentum),
            bias_correction=_word(bias_correction, CORRECTED, FOLDED, CORRECTED),
        )  # fmt: skip
        general, values = _of_rmsprop(h, _count(step), _factor(grad_scale), param.itemsize)
        if grad_avg is None:
            if momentum_buffer is None:
                plain(general, values, param, grad, square_avg)
            else:
                momentum_only(general, values, param, grad, square_avg, momentum_buffer)
        elif momentum_buffer is None:
            centered_only(general, values, param, grad, square_avg, grad_avg)
        else:
            both(general, values, param, grad, square_avg, grad_avg, momentum_buffer)

    return rmsprop


def _adagrad_of(parallel):
    run = _runner("adagrad", "adagrad", parallel)

    @compiler
    def adagrad(
        param, grad, sum, lr=0.01, eps=1e-10, eps_root=0.0, lr_decay=0.0, weight_decay=0.0, decoupled=False, maximize=False,
        clip_value=None, step=1, grad_scale=1.0,
    ):  # fmt: skip
        """One AdaGrad update of param and its states, in place, with the bits of fastrms.adagrad (Duchi, Hazan, Singer 2011).

        ::

            g = grad*grad_scale, clipped and decayed;  sum = sum + g**2
            param = param - lr/(1 + (step-1)*lr_decay)*g/(sqrt(sum + eps_root) + eps)

        Parameters
        ----------
        param, grad, sum : array of float32 or float64
            Contiguous, of one dtype, shape and memory order, and apart in memory; only grad may be read-only.
        step : int, default 1
            Number of this update, from 1; it matters with lr_decay only.
        grad_scale : float, default 1
            Factor of the gradient, from 1e-30 to 1e30.
        lr, eps, ... : optional
            The hyper-parameters of fastrms.AdaGrad, with its defaults.

        Raises
        ------
        numba.errors.TypingError, ValueError
            As rmsprop does.
        """
        clip = 0.0 if clip_value is None else _positive(clip_value)
        h = _AdaGrad(
            lr=_number(lr), eps=_number(eps), eps_root=_number(eps_root), lr_decay=_number(lr_decay),
            weight_decay=_number(weight_decay), decoupled=_flag(decoupled), maximize=_flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_adagrad(h, _count(step), _factor(grad_scale), param.itemsize)
        _refuse_zeros(h.eps, h.eps_root, sum)
        run(general, values, param, grad, sum)

    return adagrad


def _adam_of(parallel):
    plain, largest = _runner("adam", "adam", parallel), _runner("adam_amsgrad", "adam", parallel)

    @compiler
    def adam(
        param, grad, exp_avg, exp_avg_sq, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_root=0.0, nesterov=False,
        bias_correction="corrected", weight_decay=0.0, decoupled=False, maximize=False, clip_value=None, grad_scale=1.0,
        max_exp_avg_sq=None, amsgrad=None,
    ):  # fmt: skip
        """One Adam update of param and its states, in place, with the bits of fastrms.adam (Kingma, Ba 2015).

        ::

            g = grad*grad_scale, clipped and decayed
            exp_avg = beta1*exp_avg + (1 - beta1)*g;  exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*g**2
            m, v = exp_avg/(1 - beta1**step), exp_avg_sq/(1 - beta2**step)
            param = param - lr*m/(sqrt(v + eps_root) + eps)

        Parameters
        ----------
        param, grad, exp_avg, exp_avg_sq : array of float32 or float64
            Contiguous, of one dtype, shape and memory order, and apart in memory; only grad may be read-only.
        step : int
            Number of this update, from 1.
        grad_scale : float, default 1
            Factor of the gradient, from 1e-30 to 1e30.
        max_exp_avg_sq : array, optional
            The state of amsgrad, which is True where this is given, unless it is said.
        lr, beta1, ... : optional
            The hyper-parameters of fastrms.Adam, with its defaults.

        Raises
        ------
        numba.errors.TypingError, ValueError
            As rmsprop does.
        """
        if amsgrad is None:  # noqa: SIM108  Numba leaves out the branch that would not compile
            largest_of = 0 if max_exp_avg_sq is None else 1
        else:
            largest_of = _word(amsgrad, CORRECTED, CORRECTED, 1)
        if (max_exp_avg_sq is not None) != (largest_of > 0):
            raise ValueError("fastrms: amsgrad and max_exp_avg_sq go together")
        clip = 0.0 if clip_value is None else _positive(clip_value)
        h = _Adam(
            lr=_number(lr), beta1=_number(beta1), beta2=_number(beta2), eps=_number(eps), eps_root=_number(eps_root),
            amsgrad=largest_of, nesterov=_word(nesterov, DOZAT, FOLDED, -1),
            bias_correction=_word(bias_correction, CORRECTED, FOLDED, CORRECTED), weight_decay=_number(weight_decay),
            decoupled=_flag(decoupled), maximize=_flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_adam(h, _count(step), _factor(grad_scale), param.itemsize)
        if max_exp_avg_sq is None:
            plain(general, values, param, grad, exp_avg, exp_avg_sq)
        else:
            largest(general, values, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)

    return adam


def _rprop_of(parallel):
    run = _runner("rprop", "rprop", parallel)

    @compiler
    def rprop(
        param, grad, prev, step_size, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0, zero_on_flip=True,
        maximize=False, clip_value=None, grad_scale=1.0,
    ):  # fmt: skip
        """One RProp update of param and its states, in place, with the bits of fastrms.rprop (Riedmiller, Braun 1993).

        ::

            s = sign(g)*sign(prev);  step_size = clip(step_size*(eta_plus, 1 or eta_minus), step_min, step_max)
            g = 0 where s < 0;  param = param - sign(g)*step_size;  prev = g

        Parameters
        ----------
        param, grad, prev, step_size : array of float32 or float64
            Contiguous, of one dtype, shape and memory order, and apart in memory; only grad may be read-only.
        grad_scale : float, default 1
            Factor of the gradient, from 1e-30 to 1e30.
        eta_minus, eta_plus, ... : optional
            The hyper-parameters of fastrms.RProp, with its defaults, but lr: step_size starts with it, and prev with 0.

        Raises
        ------
        numba.errors.TypingError, ValueError
            As rmsprop does.
        """
        clip = 0.0 if clip_value is None else _positive(clip_value)
        h = _RProp(
            lr=0.0, eta_minus=_number(eta_minus), eta_plus=_number(eta_plus), step_min=_number(step_min),
            step_max=_number(step_max), zero_on_flip=_flag(zero_on_flip), maximize=_flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_rprop(h, 1, _factor(grad_scale), param.itemsize)
        run(general, values, param, grad, prev, step_size)

    return rprop


_of_rmsprop, _of_adagrad, _of_adam, _of_rprop = map(_coefficients_of, ("rmsprop", "adagrad", "adam", "rprop"))
rmsprop, rmsprop_parallel = _rmsprop_of(False), _rmsprop_of(True)
adagrad, adagrad_parallel = _adagrad_of(False), _adagrad_of(True)
adam, adam_parallel = _adam_of(False), _adam_of(True)
rprop, rprop_parallel = _rprop_of(False), _rprop_of(True)


# the scalar rules


def _scalar(rule, general):
    """The rule for scalars of the type of its first argument, to which the others are rounded."""
    count = len(texts.arguments(texts.RULES[rule]))

    @cache
    def compiled(real):
        made = jitted(rule, general)
        made.compile((real,) * count)
        made.disable_compile()
        return made

    def call(param, *rest):
        """Only its overload is ever called."""

    @overload(call, **_DEFAULT)
    def call_by_type(param, *rest):
        if param not in _REAL or len(rest) != count - 1:
            names = ", ".join(texts.arguments(texts.RULES[rule]))
            raise numba.errors.TypingError(f"fastrms.numba.rules.{rule} takes {names}, param a float32 or float64")
        typed = compiled(param)
        return lambda param, *rest: typed(param, *rest)

    return compiler(lambda param, *rest: call(param, *rest))


def _module(name, general):
    """A module: jitted code looks into nothing else."""
    module = ModuleType(f"{__name__}.{name}", f"The scalar rules, jitted; GENERAL is {general}.")
    vars(module).update({rule: _scalar(rule, general) for rule in texts.RULES})
    return module


rules, neutral_rules = _module("rules", True), _module("neutral_rules", False)
