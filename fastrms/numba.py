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

try:
    import numba
    from numba.extending import overload
except ModuleNotFoundError as error:
    if error.name != "numba":
        raise
    needs = "fastrms.numba needs Numba: pip install numba (what the extra fastrms[numba] names)"
    raise ModuleNotFoundError(needs, name="numba") from None

from . import jitted
from . import rules as texts
from .backends.numba.kernels import compiler
from .backends.numba.kernels import jitted as compiled_rule

rmsprop, rmsprop_parallel = jitted.updates("rmsprop")
adagrad, adagrad_parallel = jitted.updates("adagrad")
adam, adam_parallel = jitted.updates("adam")
rprop, rprop_parallel = jitted.updates("rprop")


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
