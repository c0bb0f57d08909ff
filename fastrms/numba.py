"""Kernels and scalar rules for people's own Numba code: to be called from @njit and @njit(parallel=True) functions.

``rmsprop(param, grad, square_avg, lr=0.01, ...)``, ``adagrad``, ``adam`` and ``rprop`` make one update in place, with
the keywords, defaults and bits of the functions of the same names in fastrms; grad_avg, momentum_buffer and
max_exp_avg_sq are the optional states.  ``rmsprop_parallel`` and so on divide it among Numba's own threads.
``rules`` holds the scalar rules (general form), ``neutral_rules`` those without the lines under GENERAL, for own loops:
``param[i], square_avg[i] = rules.rmsprop(param[i], grad[i], square_avg[i], grad_scale, clip_low, ...)``; every number
is rounded to the type of param first.

Arrays: float32 or float64, any number of dimensions, contiguous, all of one dtype, order and shape; anything else is
refused.  Hyper-parameters are not checked, overlap is not seen.  A function of yours that was kept by cache=True
goes on with the fastrms it was compiled with.  Parallel forms, like any parallel Numba code, may not be used by two
Python threads at once under the workqueue layer, nor after a fork under omp; fastrms.RMSProp(..., backend="numba")
and its like are safe there.
"""

from collections import namedtuple
from functools import cache
from math import sqrt
from types import ModuleType

import numba
import numpy as np
from numba import types
from numba.extending import overload

from . import recipes
from . import rules as texts
from .backends.numba.kernels import OPTIONS, compiler, jitted, kernel

_REAL = {types.float32: np.dtype(np.float32), types.float64: np.dtype(np.float64)}
_DEFAULT = {"jit_options": OPTIONS}


# what the four have in common


def _rounded(param, value):
    """The double that the dtype of param holds for value."""


@overload(_rounded, **_DEFAULT)
def _rounded_by_type(param, value):
    real = param.dtype
    return lambda param, value: np.float64(real(value))


def _choice(option, first, second, true):
    """0 for False, 1 and 2 for these words, `true` for True; ValueError for anything else."""


@overload(_choice, **_DEFAULT)
def _choice_by_type(option, first, second, true):
    def of_words(option, first, second, true):
        if option != first and option != second:
            raise ValueError("fastrms: bias_correction, nesterov or amsgrad has a value that means nothing here")
        return 1 if option == first else 2

    def of_flags(option, first, second, true):
        if option and true < 0:
            raise ValueError("fastrms: True does not say which; say it in a word")
        return true if option else 0

    return of_words if isinstance(option, (types.UnicodeType, types.StringLiteral)) else of_flags


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


_names = {}
for _text in (recipes.twice, recipes.one_more, recipes.doubled, recipes.series):
    _names[_text.__name__] = compiler(texts.rebuilt(_text, _names))
_series = _names["series"]


# the way to the kernels


def _refuse_types(arrays):
    """What a kernel of flat arrays cannot take, as an error of compilation."""
    param = arrays[0]
    for array in arrays:
        if not isinstance(array, types.Array) or array.dtype not in _REAL or array.layout == "A":
            raise numba.errors.TypingError(f"fastrms updates contiguous arrays of float32 or float64, not {array}")
        if (array.dtype, array.ndim, array.layout) != (param.dtype, param.ndim, param.layout):
            raise numba.errors.TypingError(f"fastrms needs arrays of one dtype and memory order, not {param} and {array}")


def _runner(rule, names, parallel):
    """run(general, values, param, grad, *states) for jitted code: values[k] is the coefficient names[k], in double."""
    wanted = texts.coefficient_names(texts.RULES[rule])
    place = tuple(names.index(name) if name in names else -1 for name in wanted)

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


def _implementation(neutral, full, more, real, place, fixed):
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
        arguments = (np.intp(table.ctypes.data), np.intp(0)) + more()
        if general:
            full(*arguments)
        else:
            neutral(*arguments)

    return run


# hyper-parameters -> coefficients in double, as in optimizers.py


@compiler
def _scale(maximize, grad_scale):
    return -grad_scale if maximize else grad_scale


_RMSPropValues = namedtuple(
    "_RMSPropValues",
    "grad_scale clip_low clip_high weight_decay rho one_minus_rho v_scale eps_root in_scale eps "
    "momentum nesterov_b nesterov_u out_scale decay",
)


@compiler
def _rmsprop_values(param, buffer, lr, rho, eps, eps_root, momentum, nesterov, weight_decay, decoupled, maximize, clip,
                    lr_in_momentum, bias_correction, step, grad_scale):  # fmt: skip
    form = _choice(bias_correction, "corrected", "folded", 1)
    corrected, folded = form == 1, form == 2
    share = _series(_rounded(param, rho), _rounded(param, 1 - rho), step) if corrected or folded else 1.0
    rate = lr * sqrt(share) if folded else lr
    first = lr_in_momentum or not buffer
    general = clip < np.inf or (weight_decay > 0 and not decoupled) or eps_root > 0 or nesterov or corrected
    return general, _RMSPropValues(
        _scale(maximize, grad_scale), -clip, clip, 0.0 if decoupled else weight_decay, rho, 1 - rho,
        1.0 / share if corrected else 1.0, eps_root, rate if first else 1.0, eps, momentum,
        momentum if nesterov else 1.0, 1.0 if nesterov else 0.0, 1.0 if first else rate,
        lr * weight_decay if decoupled else 0.0,
    )  # fmt: skip


_AdaGradValues = namedtuple("_AdaGradValues", "grad_scale clip_low clip_high weight_decay eps_root lr eps decay")


@compiler
def _adagrad_values(lr, eps, eps_root, lr_decay, weight_decay, decoupled, maximize, clip, step, grad_scale):
    general = clip < np.inf or (weight_decay > 0 and not decoupled) or eps_root > 0
    slower = 1 + np.float64(step - 1) * lr_decay
    return general, _AdaGradValues(
        _scale(maximize, grad_scale), -clip, clip, 0.0 if decoupled else weight_decay, eps_root, lr / slower, eps,
        lr * weight_decay / slower if decoupled else 0.0,
    )  # fmt: skip


_AdamValues = namedtuple(
    "_AdamValues",
    "grad_scale clip_low clip_high weight_decay beta1 one_minus_beta1 beta2 one_minus_beta2 max_scale m_scale g_scale "
    "v_scale eps_root step_size root_scale eps decay",
)


@compiler
def _adam_scales(lr, beta1, eps_root, largest, nesterov, form, first, ahead, second):
    """max_scale, m_scale, g_scale, v_scale, step_size, root_scale; first, ahead and second: the sums of the averages'
    weights so far, 1 without correction."""
    m_scale, g_scale = (beta1, 1 - beta1) if nesterov else (1.0, 0.0)
    if nesterov == 1:
        m_scale, g_scale, rate = m_scale / ahead, g_scale / first, lr
    else:
        rate = lr / first
    if form == 2:
        return 1.0, m_scale, g_scale, 1.0, rate * sqrt(second), 1.0
    if largest == 1:
        return 1.0 / second, m_scale, g_scale, 1.0, rate, 1.0
    if eps_root > 0:
        return 1.0, m_scale, g_scale, 1.0 / second, rate, 1.0
    return 1.0, m_scale, g_scale, 1.0, rate, 1.0 / sqrt(second)


@compiler
def _adam_values(param, lr, beta1, beta2, eps, eps_root, largest, nesterov, form, weight_decay, decoupled,
                 maximize, clip, step, grad_scale):  # fmt: skip
    first = ahead = second = 1.0
    if form:
        first = _series(_rounded(param, beta1), _rounded(param, 1 - beta1), step)
        ahead = _series(_rounded(param, beta1), _rounded(param, 1 - beta1), step + 1)
        second = _series(_rounded(param, beta2), _rounded(param, 1 - beta2), step)
    scales = _adam_scales(lr, beta1, eps_root, largest, nesterov, form, first, ahead, second)
    max_scale, m_scale, g_scale, v_scale, step_size, root_scale = scales
    general = clip < np.inf or (weight_decay > 0 and not decoupled) or eps_root > 0 or nesterov > 0
    return general, _AdamValues(
        _scale(maximize, grad_scale), -clip, clip, 0.0 if decoupled else weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        max_scale, m_scale, g_scale, v_scale, eps_root, step_size, root_scale, eps, lr * weight_decay if decoupled else 0.0,
    )  # fmt: skip


_RPropValues = namedtuple("_RPropValues", "grad_scale clip_low clip_high eta_minus eta_plus step_min step_max flip_below")


# the four, in two forms


def _rmsprop_of(parallel):
    names = _RMSPropValues._fields
    plain, momentum_only = _runner("rmsprop", names, parallel), _runner("rmsprop_momentum", names, parallel)
    centered = _runner("rmsprop_centered", names, parallel)
    both = _runner("rmsprop_centered_momentum", names, parallel)

    @compiler
    def rmsprop(
        param, grad, square_avg, lr=0.01, rho=0.99, eps=1e-8, eps_root=0.0, momentum=0.0, nesterov=False, weight_decay=0.0,
        decoupled=False, maximize=False, clip_value=None, lr_in_momentum=False, bias_correction=False, step=1,
        grad_scale=1.0, grad_avg=None, momentum_buffer=None,
    ):  # fmt: skip
        """One RMSProp update in place, as fastrms.rmsprop makes it."""
        clip = np.inf if clip_value is None else clip_value
        buffer = momentum_buffer is not None
        if buffer != (momentum > 0):
            raise ValueError("fastrms: momentum > 0 and momentum_buffer go together")
        general, values = _rmsprop_values(
            param, buffer, lr, rho, eps, eps_root, momentum, nesterov, weight_decay, decoupled, maximize, clip,
            lr_in_momentum, bias_correction, step, grad_scale,
        )  # fmt: skip
        if grad_avg is None:
            if momentum_buffer is None:
                plain(general, values, param, grad, square_avg)
            else:
                momentum_only(general, values, param, grad, square_avg, momentum_buffer)
        elif momentum_buffer is None:
            centered(general, values, param, grad, square_avg, grad_avg)
        else:
            both(general, values, param, grad, square_avg, grad_avg, momentum_buffer)

    return rmsprop


def _adagrad_of(parallel):
    run = _runner("adagrad", _AdaGradValues._fields, parallel)

    @compiler
    def adagrad(
        param, grad, sum, lr=0.01, eps=1e-10, eps_root=0.0, lr_decay=0.0, weight_decay=0.0, decoupled=False, maximize=False,
        clip_value=None, step=1, grad_scale=1.0,
    ):  # fmt: skip
        """One AdaGrad update in place, as fastrms.adagrad makes it."""
        clip = np.inf if clip_value is None else clip_value
        general, values = _adagrad_values(
            lr, eps, eps_root, lr_decay, weight_decay, decoupled, maximize, clip, step, grad_scale
        )
        run(general, values, param, grad, sum)

    return adagrad


def _adam_of(parallel):
    plain = _runner("adam", _AdamValues._fields, parallel)
    largest = _runner("adam_amsgrad", _AdamValues._fields, parallel)

    @compiler
    def adam(
        param, grad, exp_avg, exp_avg_sq, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, eps_root=0.0, nesterov=False,
        bias_correction="corrected", weight_decay=0.0, decoupled=False, maximize=False, clip_value=None, grad_scale=1.0,
        max_exp_avg_sq=None, amsgrad=None,
    ):  # fmt: skip
        """One Adam update in place, as fastrms.adam makes it; step counts from 1."""
        clip = np.inf if clip_value is None else clip_value
        form = _choice(bias_correction, "corrected", "folded", 1)
        if amsgrad is None:  # noqa: SIM108  Numba leaves out the branch that would not compile
            maximum = 0 if max_exp_avg_sq is None else 2
        else:
            maximum = _choice(amsgrad, "corrected", "corrected", 2)
        if (max_exp_avg_sq is not None) != (maximum > 0) or (maximum == 1 and form != 1):
            raise ValueError("fastrms: amsgrad needs max_exp_avg_sq, and amsgrad='corrected' needs that bias_correction")
        general, values = _adam_values(
            param, lr, beta1, beta2, eps, eps_root, maximum, _choice(nesterov, "dozat", "folded", -1), form, weight_decay,
            decoupled, maximize, clip, step, grad_scale,
        )  # fmt: skip
        if max_exp_avg_sq is None:
            plain(general, values, param, grad, exp_avg, exp_avg_sq)
        else:
            largest(general, values, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)

    return adam


def _rprop_of(parallel):
    run = _runner("rprop", _RPropValues._fields, parallel)

    @compiler
    def rprop(
        param, grad, prev, step_size, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0, zero_on_flip=True,
        maximize=False, clip_value=None, grad_scale=1.0,
    ):  # fmt: skip
        """One RProp update in place, as fastrms.rprop makes it."""
        clip = np.inf if clip_value is None else clip_value
        flip_below = 0.0 if zero_on_flip else -np.inf
        values = _RPropValues(_scale(maximize, grad_scale), -clip, clip, eta_minus, eta_plus, step_min, step_max, flip_below)
        run(clip < np.inf, values, param, grad, prev, step_size)

    return rprop


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
