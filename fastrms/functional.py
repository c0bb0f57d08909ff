"""One update on raw arrays, in place: rmsprop, adagrad, adam, rprop; and init_state for the arrays they need."""

import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import backends, hyper, rules, storage, stored_call
from .family import OPTIONS
from .memory import device, host
from .optimizers import AdaGrad, Adam, RMSProp, RProp
from .recipes import Recipe
from .tensors import new_state
from .words import kind_of, shown

_c = backends.load("c")
_c_update = _c.lib and _c.lib.fastrms_update_at_rate
_c_one = _c.lib and _c.lib.fastrms_update_one_state
_from_buffer = _c.ffi and _c.ffi.from_buffer
_BYTES = _c.ffi and _c.ffi.typeof("char[]")
_NULL = _c.ffi and _c.ffi.NULL  # for the states that a rule lacks
_ndarray = np.ndarray
_PLAIN_KINDS = {float, int, bool, str, type(None)}  # values that cannot change behind the cache
ONE = 1.0
_WRONG = (AttributeError, BufferError, KeyError, OverflowError, TypeError, ValueError)
_CACHE_SIZE = 256
_UNSAID = object()  # the learning rate of the class and the dialect


class Prepared(NamedTuple):
    """What a call needs; it is made once per set of hyper-parameters other than lr."""

    values: dict  # the hyper-parameters, with the default of lr
    recipe: Recipe  # with the default of lr
    module: Any  # the backend
    c_recipe: Any  # a fastrms_recipe for C's short way; None on other backends, and where the state is checked for zeros
    positive_state: bool


class Call:
    """The call of one rule on raw arrays.  given: the hyper-parameters that follow from which state arrays are passed, where
    the caller does not say them."""

    __slots__ = ("cache", "given", "last", "names", "optimizer", "rule")

    def __init__(self, optimizer, rule):
        self.optimizer, self.rule = optimizer, rule
        self.names = ("param", "grad", *rules.state_names(rules.RULES[rule]))
        self.given = {name: state in self.names for name, state in optimizer.implied().items()}
        self.cache = {}
        # of the last call: options, kinds of their values where these matter, dtype, fastrms_recipe, its lr, its most_rate
        self.last = (None,) * 6

    def run(self, rate, options, step, grad_scale, param, grad, first, second=None, third=None):
        """Make the update.  For exact ndarrays and the hyper-parameters of the last call, but for lr, there is a short way,
        with the same checks in less Python: from_buffer refuses what is strided or read-only, and C what overlaps, is
        misaligned or is missing.  Everything else goes through checked()."""
        if grad_scale is not ONE:
            grad_scale = hyper.scale("grad_scale", grad_scale)
        try:
            last, kinds, dtype, recipe, usual, most = self.last
            number = 1 if step is None else step
            lr = usual if rate is _UNSAID else rate
            if (
                options == last
                and (kinds is None or kinds == [*map(type, options.values())])
                and type(number) is int
                and type(lr) is float
                and 0.0 <= lr <= most
                and type(param) is type(grad) is type(first) is _ndarray
                and param.dtype is grad.dtype is first.dtype is dtype
                and param.shape == grad.shape == first.shape
            ):
                param_at, first_at = _from_buffer(_BYTES, param, True), _from_buffer(_BYTES, first, True)
                if second is None:
                    if not _c_one(recipe, lr, param.size, number, grad_scale, param_at, _from_buffer(grad), first_at):
                        return
                elif type(second) is _ndarray and second.dtype is dtype and second.shape == param.shape:
                    grad_at, second_at = _from_buffer(grad), _from_buffer(_BYTES, second, True)
                    third_at = _NULL if third is None else _pointer(third, param)
                    if not _c_update(
                        recipe, lr, param.size, number, grad_scale, param_at, grad_at, first_at, second_at, third_at
                    ):
                        return
        except _WRONG:
            pass  # checked() says what is wrong
        if step is not None:
            step = hyper.step_count("step", step, least=1)
        buffers = param, grad, first, second, third
        self.checked(rate, options, step, grad_scale, buffers[: len(self.names)])

    def checked(self, rate, options, step, grad_scale, buffers):
        """Make the update for any array-likes, or say in an error what is wrong with them.  step: None where it was not
        said."""
        stored, options = stored_call.taken(options)
        memory = host
        if options.get("backend", "auto") in ("auto", "cuda"):
            memory = backends.memory(backends.choose(options.get("backend", "auto"), array=buffers[0]))
        acquired, copy = self.acquired(memory, buffers, stored)
        param, _, *states = acquired
        made = stored_call.storage_of(acquired, copy, self.names, stored, self.optimizer.not_negative, step)
        if memory is not host:
            options = {**options, "backend": "cuda"}
        prepared = self.prepared(storage.compute_dtype(param), options)
        recipe = prepared.recipe if rate is _UNSAID else self.at_rate(prepared, options.get("dialect"), rate)
        if prepared.positive_state and stored_call.holds_zero(param, states):
            raise ValueError(f"eps and eps_root are both 0 in {recipe.dtype} and {self.names[2]} holds a 0: 0/0")
        try:
            stored_call.update(prepared.module, made, recipe, step or 1, grad_scale, acquired)
        finally:
            memory.wrote([param, *states, copy])

    def acquired(self, memory, buffers, stored):
        """The Buffers of the arguments, checked against each other, and that of param_copy or None.  stored: the options of
        stored_call.OPTIONS that are given."""
        made = stored_call.acquired(memory, buffers, self.names, stored)
        copy = stored_call.acquired_copy(memory, stored.get("param_copy"), made[0])
        host.refuse_overlap([*zip(self.names, made, strict=True), *([] if copy is None else [("param_copy", copy)])])
        return made, copy

    def prepared(self, dtype, options):
        """The Prepared of these options, from the cache or from prepare().  The key holds the kinds of the values, too,
        since values of different kinds may be equal (True == 1)."""
        kinds = [*map(type, options.values())]
        plain = _PLAIN_KINDS.issuperset(kinds)
        key = (dtype, *options, *options.values(), *kinds) if plain else None
        prepared = self.cache.get(key)
        if prepared is None:
            prepared = self.prepare(dtype, **options)
            if len(self.cache) >= _CACHE_SIZE:
                self.cache.clear()
            if plain:
                self.cache[key] = prepared
        if plain and prepared.c_recipe is not None:
            # only whole numbers have equals of another kind, which may be refused (True == 1.0)
            numbers = [value for value in options.values() if isinstance(value, (int, float))]
            kinds = kinds if any(value == value // 1 for value in numbers) else None
            self.last = options, kinds, dtype, prepared.c_recipe, prepared.recipe.rate, prepared.recipe.most_rate
        return prepared

    def at_rate(self, prepared, dialect, rate):
        """The recipe of a call with another learning rate than the default."""
        rate = self.optimizer.checked(dialect, "lr", rate)
        refuse_schedule(rate)
        if rate > prepared.recipe.most_rate:
            return self.optimizer.checked_recipe(SimpleNamespace(**{**prepared.values, "lr": rate}), prepared.recipe.dtype)
        return prepared.recipe.at_rate(rate)

    def refuse_unknown(self, options):
        """TypeError for an argument that neither the function nor its class has."""
        known = self.optimizer.defaults
        unknown = next((name for name in options if name not in known and name not in OPTIONS), None)
        if unknown is not None:
            name = self.rule.partition("_")[0]
            has = [p.name for p in inspect.signature(globals()[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise TypeError(
                f"{name} has no argument {unknown!r}{hyper.said_instead(unknown, known)}; it has {', '.join(has)}"
            )

    def prepare(self, dtype, *, backend="auto", dialect=None, **options):
        """Check the hyper-parameters that the caller gave, and make their Prepared."""
        useless = next((name for name in options if name in self.optimizer.fixed), None)
        if useless is not None:
            raise TypeError(f"{useless} is used once, when the state is made: pass it to init_state")
        self.refuse_unknown(options)
        values = self.optimizer.resolve(dialect, {**self.given, **options})
        h = SimpleNamespace(**values)
        recipe = self.optimizer.checked_recipe(h, dtype)
        if recipe.rule != self.rule:
            needed, given = ", ".join(rules.state_names(rules.RULES[recipe.rule])), ", ".join(self.names[2:])
            said = "".join(f"with {name}={options[name]!r}, " for name in self.given if name in options)
            raise ValueError(f"{said}these hyper-parameters need {needed} (the state of {recipe.rule}); given is {given}")
        positive = self.optimizer.needs_positive_state(h, dtype)
        module = backends.choose(backend)
        c_recipe = None
        if module is _c and not positive:
            c_recipe = _c.ffi.new("fastrms_recipe *")
            _c.fill_recipe(c_recipe, recipe)
        return Prepared(values, recipe, module, c_recipe, positive)


def refuse_schedule(rate):
    if callable(rate):
        raise TypeError(f"lr={rate!r} must be a number here; a schedule needs an optimizer object")


def _pointer(state, param):
    """The address of a third state; cffi raises where it is not an ndarray like param."""
    like = type(state) is _ndarray and state.dtype is param.dtype and state.shape == param.shape
    return _from_buffer(_BYTES, state if like else None, True)


_rmsprop = Call(RMSProp, "rmsprop")
_rmsprop_momentum = Call(RMSProp, "rmsprop_momentum")
_rmsprop_centered = Call(RMSProp, "rmsprop_centered")
_rmsprop_centered_momentum = Call(RMSProp, "rmsprop_centered_momentum")
_adagrad = Call(AdaGrad, "adagrad")
_adam = Call(Adam, "adam")
_adam_amsgrad = Call(Adam, "adam_amsgrad")
_rprop = Call(RProp, "rprop")


def rmsprop(
    param, grad, square_avg, *, grad_avg=None, momentum_buffer=None, step=None, grad_scale=ONE, lr=_UNSAID, **options
):
    """One RMSProp update of param and its state, in place (Hinton 2012, Coursera lecture 6e).

    ::

        g = grad*grad_scale, clipped and decayed;  square_avg = rho*square_avg + (1 - rho)*g**2
        param = param - lr*g/(sqrt(square_avg + eps_root) + eps)

    The arrays are all of one shape, memory order and dtype (float32 or float64; see param_copy for bf16, fp16 and q8), and
    share no byte.  init_state() makes the state.

    Parameters
    ----------
    param : array
        Is updated.
    grad : array
        Is only read.
    square_avg : array
        The running mean of squares; is updated, and holds no negative number.
    grad_avg : array, optional
        The running mean of gradients; where it is given, the centered form is used.
    momentum_buffer : array, optional
        The averaged step, which momentum > 0 needs.
    step : int, optional
        The number of this update, from 1; only bias_correction and stochastic rounding need it.
    grad_scale : float, default 1.0
        Multiplies grad; from 1e-30 to 1e30.
    **options
        The hyper-parameters of fastrms.RMSProp, where the whole formula stands; dialect; backend.
    param_copy, rounding, seed : optional
        As in fastrms.RMSProp, with the same bits.  For a float32 param, grad may be bf16 or fp16, and the state may be in
        the formats that init_state() makes; where rounding is given, param may be bf16 or fp16, too.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, with a sentence that names the argument.
    """
    if step is None and "bias_correction" in options and options["bias_correction"]:
        raise ValueError("bias_correction needs step, the number of this update from 1")
    if grad_avg is None and momentum_buffer is None:
        return _rmsprop.run(lr, options, step, grad_scale, param, grad, square_avg)
    if grad_avg is None:
        return _rmsprop_momentum.run(lr, options, step, grad_scale, param, grad, square_avg, momentum_buffer)
    if momentum_buffer is None:
        return _rmsprop_centered.run(lr, options, step, grad_scale, param, grad, square_avg, grad_avg)
    return _rmsprop_centered_momentum.run(lr, options, step, grad_scale, param, grad, square_avg, grad_avg, momentum_buffer)


def adagrad(param, grad, sum, *, step=None, grad_scale=ONE, lr=_UNSAID, **options):
    """One AdaGrad update of param and sum, in place (Duchi, Hazan, Singer 2011).

    ::

        g = grad*grad_scale, clipped and decayed;  sum = sum + g**2
        param = param - lr/(1 + (step-1)*lr_decay)*g/(sqrt(sum + eps_root) + eps)

    The arrays are all of one shape, memory order and dtype (float32 or float64; see param_copy for bf16, fp16 and q8), and
    share no byte.

    Parameters
    ----------
    param : array
        Is updated.
    grad : array
        Is only read.
    sum : array
        The sum of squares; is updated, and holds no negative number.
    step : int, optional
        The number of this update, from 1, which lr_decay and stochastic rounding need; 1 where it is not given.
    grad_scale : float, default 1.0
        Multiplies grad; from 1e-30 to 1e30.
    **options
        The hyper-parameters of fastrms.AdaGrad, where the whole formula stands; dialect; backend.
    param_copy, rounding, seed : optional
        As in fastrms.AdaGrad, with the same bits.  For a float32 param, grad may be bf16 or fp16, and the state may be in
        the formats that init_state() makes; where rounding is given, param may be bf16 or fp16, too.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, with a sentence that names the argument.
    """
    return _adagrad.run(lr, options, step, grad_scale, param, grad, sum)


def adam(param, grad, exp_avg, exp_avg_sq, *, step, max_exp_avg_sq=None, grad_scale=ONE, lr=_UNSAID, **options):
    """One Adam update of param and its state, in place (Kingma, Ba 2015).

    ::

        g = grad*grad_scale, clipped and decayed
        exp_avg = beta1*exp_avg + (1 - beta1)*g;  exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*g**2
        m, v = exp_avg/(1 - beta1**step), exp_avg_sq/(1 - beta2**step)
        param = param - lr*m/(sqrt(v + eps_root) + eps)

    The arrays are all of one shape, memory order and dtype (float32 or float64; see param_copy for bf16, fp16 and q8), and
    share no byte.

    Parameters
    ----------
    param : array
        Is updated.
    grad : array
        Is only read.
    exp_avg, exp_avg_sq : array
        The running means of gradients and of their squares; are updated.  The second holds no negative number.
    step : int
        The number of this update, from 1 (not from 0).
    max_exp_avg_sq : array, optional
        The largest mean of squares so far; where it is given, amsgrad is used.
    grad_scale : float, default 1.0
        Multiplies grad; from 1e-30 to 1e30.
    **options
        The hyper-parameters of fastrms.Adam, where the whole formula stands; dialect; backend.
    param_copy, rounding, seed : optional
        As in fastrms.Adam, with the same bits.  For a float32 param, grad may be bf16 or fp16, and the state may be in
        the formats that init_state() makes; where rounding is given, param may be bf16 or fp16, too.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, with a sentence that names the argument.
    """
    if max_exp_avg_sq is None:
        return _adam.run(lr, options, step, grad_scale, param, grad, exp_avg, exp_avg_sq)
    return _adam_amsgrad.run(lr, options, step, grad_scale, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)


def rprop(param, grad, prev, step_size, *, step=None, grad_scale=ONE, **options):
    """One RProp update of param, prev and step_size, in place (Riedmiller, Braun 1993).

    ::

        s = sign(g)*sign(prev);  step_size = clip(step_size*(eta_plus, 1 or eta_minus), step_min, step_max)
        g = 0 where s < 0;  param = param - sign(g)*step_size;  prev = g

    The arrays are all of one shape, memory order and dtype (float32 or float64; see param_copy for bf16, fp16 and q8), and
    share no byte.

    Parameters
    ----------
    param : array
        Is updated.
    grad : array
        Is only read.
    prev : array
        The gradient of the previous update, 0 at first; is updated.
    step_size : array
        The step of each weight, lr everywhere at first; is updated.  init_state() makes both.
    grad_scale : float, default 1.0
        Multiplies grad; from 1e-30 to 1e30.
    **options
        The hyper-parameters of fastrms.RProp, where the whole formula stands; dialect; backend.
    step : int, optional
        The number of this update, from 1; only stochastic rounding needs it.
    param_copy, rounding, seed : optional
        As in fastrms.RProp, with the same bits.  For a float32 param, grad may be bf16 or fp16, and the state may be in
        the formats that init_state() makes; where rounding is given, param may be bf16 or fp16, too.

    Raises
    ------
    TypeError, ValueError
        Before anything is written, with a sentence that names the argument.
    """
    return _rprop.run(_UNSAID, options, step, grad_scale, param, grad, prev, step_size)


def init_state(optimizer, param, *, dialect=None, state_format=None, **options):
    """Make the state arrays for a first call of rmsprop(), adagrad(), adam() or rprop().

    ``state = init_state("rmsprop", w, momentum=0.9); rmsprop(w, g, **state, momentum=0.9)``.

    Parameters
    ----------
    optimizer : {"rmsprop", "adagrad", "adam", "rprop"}
    param : array
        The parameter that the state belongs to.
    dialect : str, optional
        As in the optimizer's class.
    state_format : "bf16", "fp16", "q8" or None, default None
        How the state is stored, as in the optimizer's class; None is float32, or float64 for a float64 param.  The calls
        read it off the arrays, and have no such option.
    **options
        The hyper-parameters of that class.  They decide which arrays there are and at what values these start: RMSProp's
        square_avg and AdaGrad's sum at initial_value, RProp's step_size at lr, all others at 0.

    Returns
    -------
    dict of str to array
        Well-placed arrays of the shape and memory order of param, and of its dtype; float32 for a param in bf16 or fp16.
        With a state_format, those in bf16 are fastrms.Stored arrays, which np.asarray() decodes, and those in fp16 float16
        arrays; those in q8 are flat arrays of bytes, which only these calls can read.

    Raises
    ------
    TypeError, ValueError
        With a sentence that names the argument.
    """
    if isinstance(param, str):
        names = ", ".join(map(repr, OPTIMIZERS))
        raise TypeError(f"optimizer is {kind_of(optimizer)}; it must be one of {names}, and comes before param: "
                        f"write init_state({param!r}, param)")  # fmt: skip
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
        meant = str(getattr(optimizer, "__name__", optimizer)).lower().replace("_", "")
        remedy = f": write {meant!r}" if meant in OPTIMIZERS else ""
        raise ValueError(f"optimizer={shown(optimizer)} is not one of {', '.join(map(repr, OPTIMIZERS))}{remedy}")
    maker = OPTIMIZERS[optimizer]
    memory = device if device.is_device_array(param) else host
    stored_call.refuse_in_init_state(options, optimizer)
    stored = {"state_format": storage.CHECKS["state_format"]("state_format", state_format)}
    buffer = memory.acquire(param, "param", writable=True, halves=True)
    h = SimpleNamespace(**maker.resolve(dialect, options))
    refuse_schedule(h.lr)
    rule = maker.checked_recipe(h, storage.compute_dtype(buffer)).rule
    made = stored_call.state_formats(rule, buffer, maker.not_negative, **stored)
    flats = new_state(rule, lambda name: maker.initial(h, name), buffer, memory, formats=made)
    return {name: stored_call.shown(flat, format, buffer) for (name, flat), format in zip(flats.items(), made, strict=True)}


OPTIMIZERS = {  # the functions and their classes
    "rmsprop": RMSProp,
    "adagrad": AdaGrad,
    "adam": Adam,
    "rprop": RProp,
}
__all__ = [*OPTIMIZERS, "init_state"]


def _show_signature(function, optimizer):
    """inspect.signature and help() show every hyper-parameter with its default; editors read __init__.pyi."""
    given = inspect.signature(function).parameters.values()
    own = [p for p in given if p.kind != p.VAR_KEYWORD and p.default is not _UNSAID]
    skip = {"centered", *optimizer.fixed} | {p.name for p in own}
    rest = {**optimizer.defaults, "dialect": None, "backend": "auto", **stored_call.OPTIONS}
    keyword = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in rest.items() if n not in skip]
    function.__signature__ = inspect.Signature([*own, *keyword])


for _name, _optimizer in OPTIMIZERS.items():
    _show_signature(globals()[_name], _optimizer)
