"""One update on raw arrays, in place: rmsprop, adagrad, adam, rprop; and init_state for the arrays they need."""

import inspect
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import backends, hyper, rules
from .memory import device, host
from .optimizers import AdaGrad, Adam, RMSProp, RProp
from .recipes import Recipe

_c = backends.load("c")
_c_update = _c.lib and _c.lib.fastrms_update
_c_update_one = _c.lib and _c.lib.fastrms_update_one
_from_buffer = _c.ffi and _c.ffi.from_buffer
_BYTES = _c.ffi and _c.ffi.typeof("char[]")
_NULL = _c.ffi and _c.ffi.NULL  # for the states that a rule lacks
_ndarray = np.ndarray
_PLAIN_KINDS = {float, int, bool, str, type(None)}  # values that cannot change behind the cache
ONE = 1.0
_WRONG = (AttributeError, BufferError, KeyError, TypeError, ValueError)
_CACHE_SIZE = 256


def _same(options, last):
    """Equal hyper-parameters, of the same kinds too: True == 1.0."""
    return options == last and all(type(options[name]) is type(last[name]) for name in options)


class Prepared(NamedTuple):
    """What an update needs, made once per set of hyper-parameters."""

    recipe: Recipe
    update: Any  # of the backend, for flat arrays
    c_recipe: Any  # fastrms_recipe * for the short way through C; None on NumPy, or where the state must be looked at
    positive_state: bool


class Update:
    """The update of one rule on raw host.  given: hyper-parameters that its state arrays decide."""

    __slots__ = ("cache", "given", "last", "last_of_one", "names", "optimizer", "rule")

    def __init__(self, optimizer, rule, **given):
        self.optimizer, self.rule, self.given = optimizer, rule, given
        self.names = ("param", "grad", *rules.state_names(rules.RULES[rule]))
        self.cache = {}
        self.last = self.last_of_one = (None, None, None)  # hyper-parameters of the last call, dtype, C recipe

    def one(self, options, param, grad, state):
        """make for a rule with one state, at the first step, without grad_scale: the same with still less Python."""
        try:
            last, dtype, c_recipe = self.last_of_one
            if (
                options == last
                and type(param) is _ndarray is type(grad)
                and type(state) is _ndarray
                and param.dtype is dtype is grad.dtype
                and state.dtype is dtype
                and (
                    (param.ndim == grad.ndim == state.ndim == 1 and len(param) == len(grad) == len(state))  # no tuples
                    or param.shape == grad.shape == state.shape
                )
            ):
                for value in options.values():
                    if type(value) is not float:  # True == 1.0: make() tells them apart
                        break
                else:
                    if not _c_update_one(
                        c_recipe,
                        param.size,
                        _from_buffer(_BYTES, param, True),
                        _from_buffer(grad),
                        _from_buffer(_BYTES, state, True),
                    ):
                        return
        except _WRONG:
            pass  # the long way says what is wrong
        _refuse_bias_correction(options)
        self.make(1, ONE, options, param, grad, state)
        self.last_of_one = self.last

    def make(self, step, grad_scale, options, *buffers):
        """First the short way, for exact ndarrays and the hyper-parameters of the last call: the same checks with less
        Python.  from_buffer refuses what is strided or read-only, C what overlaps or is misaligned."""
        if type(step) is not int or not 0 < step <= hyper.MOST_STEPS:
            step = hyper.step_count("step", step, least=1)
        if grad_scale is not ONE:
            grad_scale = hyper.scale("grad_scale", grad_scale)
        try:
            last, dtype, c_recipe = self.last
            shape, (_, grad, *_) = buffers[0].shape, buffers
            if _same(options, last) and all(
                type(array) is _ndarray and array.dtype is dtype and array.shape == shape for array in buffers
            ):
                pointers = [_from_buffer(grad) if array is grad else _from_buffer(_BYTES, array, True) for array in buffers]
                pointers += [_NULL] * (5 - len(pointers))
                if not _c_update(c_recipe, buffers[0].size, step, grad_scale, *pointers):
                    return
        except _WRONG:
            pass  # the long way says what is wrong
        self.checked(buffers, step, grad_scale, options)

    def checked(self, buffers, step, grad_scale, options):
        """The same for any array-likes, with the sentences."""
        names, memory = self.names, host
        if options.get("backend", "auto") in ("auto", "cuda"):
            memory = backends.memory(backends.choose(options.get("backend", "auto"), array=buffers[0]))
        acquired = [memory.acquire(x, name, writable=name != "grad") for x, name in zip(buffers, names, strict=True)]
        param = acquired[0]
        for buffer, name in zip(acquired[1:], names[1:], strict=True):
            memory.same_layout(buffer, name, param, "param")
        host.refuse_overlap(zip(names, acquired, strict=True))
        if memory is not host:
            options = {**options, "backend": "cuda"}
        prepared = self.prepared(param.dtype, options)
        if prepared.positive_state and any((memory.on_host(buffer.flat) == 0).any() for buffer in acquired[2:]):
            raise ValueError(f"eps and eps_root are both 0 in {param.dtype} and {names[2]} holds a 0: 0/0")
        flats = [buffer.flat for buffer in acquired]
        prepared.update(prepared.recipe, step, grad_scale, flats[0], flats[1], flats[2:])

    def prepared(self, dtype, options):
        """prepare through the cache.  Equal keys may differ in kind (True == 1): those keep their kinds."""
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
            self.last = options, dtype, prepared.c_recipe
        return prepared

    def prepare(self, dtype, *, backend="auto", dialect=None, **options):
        """Prepared for hyper-parameters as the caller gave them, everything about them checked."""
        for name, value in self.given.items():
            if options.setdefault(name, value) != value:
                raise ValueError(f"{name}={options[name]!r} does not fit the state arrays of this call")
        useless = next((name for name in options if name == "initial_value" or name in self.optimizer.fixed), None)
        if useless is not None:
            raise TypeError(f"{useless} is used once, when the state is made: pass it to init_state")
        values = self.optimizer.resolve(dialect, options)
        if callable(values["lr"]):
            raise TypeError("lr must be a number here; a schedule needs an optimizer object")
        h = SimpleNamespace(**values)
        recipe = self.optimizer.checked_recipe(h, dtype)
        if recipe.rule != self.rule:
            needed, given = ", ".join(rules.state_names(rules.RULES[recipe.rule])), ", ".join(self.names[2:])
            raise ValueError(f"these hyper-parameters need {needed} (the state of {recipe.rule}); given is {given}")
        positive = self.optimizer.needs_positive_state(h, dtype)
        module = backends.choose(backend)
        c_recipe = None
        if module is _c and not positive:
            c_recipe = _c.ffi.new("fastrms_recipe *")
            _c.fill_recipe(c_recipe, recipe)
        return Prepared(recipe, module.update, c_recipe, positive)


def _refuse_bias_correction(options):
    if options.get("bias_correction"):
        raise ValueError("bias_correction needs step, the number of this update from 1")


_rmsprop = Update(RMSProp, "rmsprop", centered=False)
_rmsprop_momentum = Update(RMSProp, "rmsprop_momentum", centered=False)
_rmsprop_centered = Update(RMSProp, "rmsprop_centered", centered=True)
_rmsprop_centered_momentum = Update(RMSProp, "rmsprop_centered_momentum", centered=True)
_adagrad = Update(AdaGrad, "adagrad")
_adam = Update(Adam, "adam")
_adam_amsgrad = Update(Adam, "adam_amsgrad", amsgrad=True)
_adam_amsgrad_said = Update(Adam, "adam_amsgrad")  # amsgrad is among the options: it may be "corrected"
_rprop = Update(RProp, "rprop")


def rmsprop(param, grad, square_avg, *, grad_avg=None, momentum_buffer=None, step=None, grad_scale=ONE, **options):
    """One RMSProp update of param and its state, in place; returns None.

    ::

        g = grad*grad_scale, clipped and decayed;  square_avg = rho*square_avg + (1 - rho)*g**2
        param = param - lr*g/(sqrt(square_avg + eps_root) + eps)                          (Hinton 2012)

    param, grad, square_avg and the optional states: arrays of one shape, memory order and dtype (float32 or float64)
    that do not overlap; grad is only read, square_avg holds no negative number.  init_state makes them.
    grad_avg: state of the centered form, given for it; momentum_buffer: that of momentum > 0.
    step: number of this update from 1, needed with bias_correction only.   grad_scale, 1e-30 to 1e30, multiplies grad.
    The other keywords and the whole formula: fastrms.RMSProp.
    Raises TypeError or ValueError, naming the argument, before anything is written.
    """
    if step is None and grad_scale is ONE and grad_avg is None and momentum_buffer is None:
        return _rmsprop.one(options, param, grad, square_avg)
    if step is None:
        _refuse_bias_correction(options)
        step = 1
    if grad_avg is None and momentum_buffer is None:
        return _rmsprop.make(step, grad_scale, options, param, grad, square_avg)
    if grad_avg is None:
        return _rmsprop_momentum.make(step, grad_scale, options, param, grad, square_avg, momentum_buffer)
    if momentum_buffer is None:
        return _rmsprop_centered.make(step, grad_scale, options, param, grad, square_avg, grad_avg)
    states = square_avg, grad_avg, momentum_buffer
    return _rmsprop_centered_momentum.make(step, grad_scale, options, param, grad, *states)


def adagrad(param, grad, sum, *, step=1, grad_scale=ONE, **options):
    """One AdaGrad update of param and sum, in place; returns None.

    ::

        g = grad*grad_scale, clipped and decayed;  sum = sum + g**2
        param = param - lr/(1 + (step-1)*lr_decay)*g/(sqrt(sum + eps_root) + eps)         (Duchi, Hazan, Singer 2011)

    param, grad, sum: arrays of one shape, memory order and dtype (float32 or float64) that do not overlap; grad is
    only read, sum holds no negative number.   step: number of this update from 1, for lr_decay.
    grad_scale, 1e-30 to 1e30, multiplies grad.   The other keywords: fastrms.AdaGrad.   Raises as rmsprop does.
    """
    if type(step) is int and step == 1 and grad_scale is ONE:
        return _adagrad.one(options, param, grad, sum)
    return _adagrad.make(step, grad_scale, options, param, grad, sum)


def adam(param, grad, exp_avg, exp_avg_sq, *, step, max_exp_avg_sq=None, grad_scale=ONE, **options):
    """One Adam update of param and its state, in place; returns None.

    ::

        g = grad*grad_scale, clipped and decayed
        exp_avg = beta1*exp_avg + (1 - beta1)*g;  exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*g**2
        m, v = exp_avg/(1 - beta1**step), exp_avg_sq/(1 - beta2**step)
        param = param - lr*m/(sqrt(v + eps_root) + eps)                                   (Kingma, Ba 2015)

    param, grad, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq: arrays of one shape, memory order and dtype
    (float32 or float64) that do not overlap; grad is only read, the squares hold no negative number.
    step: number of this update, from 1.   grad_scale, 1e-30 to 1e30, multiplies grad.
    The other keywords: fastrms.Adam.   Raises as rmsprop does.
    """
    if max_exp_avg_sq is None:
        return _adam.make(step, grad_scale, options, param, grad, exp_avg, exp_avg_sq)
    update = _adam_amsgrad_said if "amsgrad" in options else _adam_amsgrad
    return update.make(step, grad_scale, options, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)


def rprop(param, grad, prev, step_size, *, grad_scale=ONE, **options):
    """One RProp update of param, prev and step_size, in place; returns None.

    ::

        s = sign(g)*sign(prev);  step_size = clip(step_size*(eta_plus, 1 or eta_minus), step_min, step_max)
        g = 0 where s < 0;  param = param - sign(g)*step_size;  prev = g                  (Riedmiller, Braun 1993)

    param, grad, prev, step_size: arrays of one shape, memory order and dtype (float32 or float64) that do not
    overlap; grad is only read.   step_size starts at lr everywhere, prev at 0 (init_state makes both).
    grad_scale, 1e-30 to 1e30, multiplies grad.   The other keywords: fastrms.RProp.   Raises as rmsprop does.
    """
    return _rprop.make(1, grad_scale, options, param, grad, prev, step_size)


def init_state(optimizer, param, *, dialect=None, **options):
    """Fresh state for the calls above: dict of well-placed arrays of the shape, memory order and dtype of param.

    optimizer: "rmsprop", "adagrad", "adam" or "rprop".   dialect and the other keywords: as in the optimizer's class;
    they decide which arrays there are and how they start (initial_value; lr for RProp's step_size).
    ``state = init_state("rmsprop", w, momentum=0.9); rmsprop(w, g, **state, momentum=0.9)``.
    Raises TypeError or ValueError, naming the argument.
    """
    if not isinstance(optimizer, str) or optimizer not in _BY_NAME:
        raise ValueError(f"optimizer={optimizer!r} is not one of {', '.join(map(repr, _BY_NAME))}")
    maker = _BY_NAME[optimizer]
    memory = device if device.is_device_array(param) else host
    buffer = memory.acquire(param, "param", writable=True)
    h = SimpleNamespace(**maker.resolve(dialect, options))
    maker.checked_recipe(h, buffer.dtype)
    flats = maker.new_state(h, maker.rule_name(h), buffer, memory)
    return {name: host.shaped(flat, buffer) for name, flat in flats.items()}


_BY_NAME = {"rmsprop": RMSProp, "adagrad": AdaGrad, "adam": Adam, "rprop": RProp}


def _show_signature(function, optimizer):
    """help() and editors see every hyper-parameter with its default."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    skip = {"initial_value", "centered", *optimizer.fixed} | {p.name for p in own}
    rest = {**optimizer.defaults, "dialect": None, "backend": "auto"}
    keyword = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in rest.items() if n not in skip]
    function.__signature__ = inspect.Signature([*own, *keyword])


for _function in (rmsprop, adagrad, adam, rprop):
    _show_signature(_function, _BY_NAME[_function.__name__])
