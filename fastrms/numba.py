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

from functools import cache
from types import ModuleType

import numba
from numba.extending import overload

from . import jitted, optimizers
from . import rules as texts
from .backends.numba.kernels import compiler
from .backends.numba.kernels import jitted as compiled_rule
from .recipes import CORRECTED, DOZAT, FOLDED

# the families, in two forms

_RMSProp, _of_rmsprop = jitted.family(optimizers.RMSProp, "rmsprop")
_AdaGrad, _of_adagrad = jitted.family(optimizers.AdaGrad, "adagrad")
_Adam, _of_adam = jitted.family(optimizers.Adam, "adam")
_RProp, _of_rprop = jitted.family(optimizers.RProp, "rprop")


def _rmsprop_of(parallel):
    rules = "rmsprop", "rmsprop_momentum", "rmsprop_centered", "rmsprop_centered_momentum"
    plain, momentum_only, centered_only, both = (jitted.runner(rule, "rmsprop", parallel) for rule in rules)

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
        clip = 0.0 if clip_value is None else jitted.positive(clip_value)
        centered = 0 if grad_avg is None else 1
        h = _RMSProp(
            lr=jitted.number(lr), rho=jitted.number(rho), eps=jitted.number(eps), eps_root=jitted.number(eps_root),
            momentum=jitted.number(momentum),
            nesterov=jitted.flag(nesterov), centered=centered, weight_decay=jitted.number(weight_decay),
            decoupled=jitted.flag(decoupled), maximize=jitted.flag(maximize),
            clip_value=clip, lr_in_momentum=jitted.flag(lr_in_momentum),
            bias_correction=jitted.word(bias_correction, CORRECTED, FOLDED, CORRECTED),
        )  # fmt: skip
        general, values = _of_rmsprop(h, jitted.count(step), jitted.factor(grad_scale), param.itemsize)
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
    run = jitted.runner("adagrad", "adagrad", parallel)

    @compiler
    def adagrad(
        param, grad, sum, lr=0.01, eps=1e-10, eps_root=0.0, lr_decay=0.0, weight_decay=0.0, decoupled=False, maximize=False,
        clip_value=None, step=1, grad_scale=1.0,
    ):  # fmt: skip
        """One AdaGrad update of param and its states, in place, with the bits of fastrms.adagrad (Duchi et al. 2011).

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
        clip = 0.0 if clip_value is None else jitted.positive(clip_value)
        h = _AdaGrad(
            lr=jitted.number(lr), eps=jitted.number(eps), eps_root=jitted.number(eps_root), lr_decay=jitted.number(lr_decay),
            weight_decay=jitted.number(weight_decay), decoupled=jitted.flag(decoupled), maximize=jitted.flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_adagrad(h, jitted.count(step), jitted.factor(grad_scale), param.itemsize)
        jitted.refuse_zeros(h.eps, h.eps_root, sum)
        run(general, values, param, grad, sum)

    return adagrad


def _adam_of(parallel):
    plain, largest = jitted.runner("adam", "adam", parallel), jitted.runner("adam_amsgrad", "adam", parallel)

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
        if amsgrad is None:
            largest_of = 0 if max_exp_avg_sq is None else 1
        else:
            largest_of = jitted.word(amsgrad, CORRECTED, CORRECTED, 1)
        if (max_exp_avg_sq is not None) != (largest_of > 0):
            raise ValueError("fastrms: amsgrad and max_exp_avg_sq go together")
        clip = 0.0 if clip_value is None else jitted.positive(clip_value)
        h = _Adam(
            lr=jitted.number(lr), beta1=jitted.number(beta1), beta2=jitted.number(beta2),
            eps=jitted.number(eps), eps_root=jitted.number(eps_root),
            amsgrad=largest_of, nesterov=jitted.word(nesterov, DOZAT, FOLDED, -1),
            bias_correction=jitted.word(bias_correction, CORRECTED, FOLDED, CORRECTED),
            weight_decay=jitted.number(weight_decay), decoupled=jitted.flag(decoupled), maximize=jitted.flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_adam(h, jitted.count(step), jitted.factor(grad_scale), param.itemsize)
        if max_exp_avg_sq is None:
            plain(general, values, param, grad, exp_avg, exp_avg_sq)
        else:
            largest(general, values, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)

    return adam


def _rprop_of(parallel):
    run = jitted.runner("rprop", "rprop", parallel)

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
        clip = 0.0 if clip_value is None else jitted.positive(clip_value)
        h = _RProp(
            lr=0.0, eta_minus=jitted.number(eta_minus), eta_plus=jitted.number(eta_plus), step_min=jitted.number(step_min),
            step_max=jitted.number(step_max), zero_on_flip=jitted.flag(zero_on_flip), maximize=jitted.flag(maximize),
            clip_value=clip,
        )  # fmt: skip
        general, values = _of_rprop(h, 1, jitted.factor(grad_scale), param.itemsize)
        run(general, values, param, grad, prev, step_size)

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
        made = compiled_rule(rule, general)
        made.compile((real,) * count)
        made.disable_compile()
        return made

    def call(param, *rest):
        """Only its overload is ever called."""

    @overload(call, **jitted.DEFAULT)
    def call_by_type(param, *rest):
        if param not in jitted.REAL or len(rest) != count - 1:
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
