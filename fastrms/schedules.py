"""Learning rates that change: functions of the step, and plateau reduction and early stopping, which are fed a metric.

A schedule is callable(step) -> rate, step being the number of steps made, 0 first; it goes where an lr goes.  Step,
Exponential, Cosine and Plateau are stored in state_dict() and save(), counters included; other callables are not.
"""

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from . import graph_breaks, hyper, words
from .memory import host, tree
from .state import MALFORMED

_factor = hyper.within("above 0 and at most 1", lambda value: 0 < value <= 1)
_count, _period = partial(hyper.step_count, least=0), partial(hyper.step_count, least=1)
_MODE, _THRESHOLD_MODE = hyper.choice("min", "max"), hyper.choice("rel", "abs")


def _check(owner, **checks):
    """Replace the given values by the checked ones."""
    for name, check in checks.items():
        object.__setattr__(owner, name, check(name, getattr(owner, name)))


_OUR_WORD = {  # the parameters of PyTorch's, Keras' and Optax' schedules, and what to write here: alternatives, parted by |
    "step_size": "every",
    "gamma": "factor",
    "T_max": "steps",
    "eta_min": "end",
    "learning_rate": "lr",
    "initial_learning_rate": "lr",
    "init_value": "start where there is a warm-up, else lr | lr",
    "peak_value": "lr",
    "warmup_target": "lr",
    "decay_steps": "steps, which counts the warm-up in | every",
    "transition_steps": "every",
    "decay_rate": "factor",
    "end_value": "end",
    "alpha": "end, which is a rate and not a share of lr",
    "warmup_steps": "warmup",
    "min_delta": "threshold",
    "eps": "min_change",
}


def _said_instead(name, known):
    """The end of a sentence that says what to write for a parameter of another framework, from the names in `known`."""
    words = [text for text in _OUR_WORD.get(name, "").split(" | ") if text.split(" ")[0].strip(",") in known]
    return f"; for {name} write {words[0]}" if words else ""


def _told(made):
    """The constructor `made`, with a sentence of ours for a keyword that it does not have."""
    names = [*inspect.signature(made).parameters][1:]

    @functools.wraps(made)
    def __init__(self, *values, **options):
        unknown = next((name for name in options if name not in names), None)
        if unknown is not None:
            said = _said_instead(unknown, names)
            raise TypeError(f"{type(self).__name__} has no parameter {unknown!r}{said}; it has {', '.join(names)}")
        made(self, *values, **options)

    return __init__


def _closed(counters=""):
    """Class decorator: setting an attribute raises AttributeError and says what to do, as nothing would use
    the value.  counters: what is said of the attributes that the object changes itself.  A subclass may have others.
    The constructor says what to write for a keyword of another framework."""

    def close(cls):
        cls.__init__ = _told(cls.__init__)
        names = tuple(cls.__annotations__)

        def __setattr__(self, name, value):
            if type(self) is not cls and name not in names:
                return object.__setattr__(self, name, value)
            kind = words.with_article(cls.__name__)
            fault = f"{name} of {kind} is fixed"
            if name not in names:
                fault = f"{kind} has no attribute {name!r} (it has {', '.join(names)}), and they are fixed"
            raise AttributeError(f"{fault}: make a new {cls.__name__}{counters}")

        cls.__setattr__ = __setattr__
        return cls

    return close


@_closed()
@dataclass(frozen=True)
class Step:
    """lr * factor**(step // every): PyTorch's StepLR, counted in steps and not in epochs.

    Parameters
    ----------
    lr : float
        The first rate, at least 0.
    every : int
        After how many steps the rate falls, at least 1.
    factor : float, default 0.1
        By what it falls; above 0 and at most 1.

    Raises
    ------
    TypeError, ValueError
        For a value of another kind or range.
    """

    depends_on_step_alone = True  # an optimizer may ask for the rates of many steps at once
    lr: float
    every: int
    factor: float = 0.1

    def __post_init__(self):
        _check(self, lr=hyper.non_negative, every=_period, factor=_factor)

    def __call__(self, step):
        return self.lr * self.factor ** (step // self.every)


@_closed()
@dataclass(frozen=True)
class Exponential:
    """lr * factor**(step/every): Keras' ExponentialDecay, and with every=1 PyTorch's ExponentialLR.

    Parameters
    ----------
    lr : float
        The first rate, at least 0.
    factor : float
        By what the rate falls in `every` steps; above 0 and at most 1.
    every : int, default 1
        In steps, at least 1.
    staircase : bool, default False
        Whether the exponent is rounded down.

    Raises
    ------
    TypeError, ValueError
        For a value of another kind or range.
    """

    depends_on_step_alone = True  # an optimizer may ask for the rates of many steps at once
    lr: float
    factor: float
    every: int = 1
    staircase: bool = False

    def __post_init__(self):
        _check(self, lr=hyper.non_negative, factor=_factor, every=_period, staircase=hyper.flag)

    def __call__(self, step):
        return self.lr * self.factor ** (step // self.every if self.staircase else step / self.every)


@_closed()
@dataclass(frozen=True)
class Cosine:
    """From start up to lr in `warmup` steps, then down to end at step number `steps`, where it stays.

    ::

        step < warmup:  start + (lr - start) * step/warmup
        then:           end + (lr - end) * (1 + cos(pi * (step - warmup)/(steps - warmup)))/2

    Source: Loshchilov, Hutter 2017 (SGDR), without restarts; the whole is Optax' warmup_cosine_decay_schedule, whose
    decay_steps counts the warm-up in, as `steps` does.

    Parameters
    ----------
    lr : float
        The highest rate, at least 0.
    steps : int
        The number of the step at which the rate reaches `end`.
    end, start : float, default 0.0
        The last and the first rate, at least 0.
    warmup : int, default 0
        In steps, below `steps`.

    Raises
    ------
    TypeError, ValueError
        For a value of another kind or range.
    """

    depends_on_step_alone = True  # an optimizer may ask for the rates of many steps at once
    lr: float
    steps: int
    end: float = 0.0
    warmup: int = 0
    start: float = 0.0

    def __post_init__(self):
        rate = hyper.non_negative
        _check(self, lr=rate, steps=_period, end=rate, warmup=_count, start=rate)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be below steps={self.steps}, which counts it in")

    def __call__(self, step):
        if step < self.warmup:
            if step < 0:
                raise ValueError(f"step={step!r} must be at least 0")
            return self.start + (self.lr - self.start) * (step / self.warmup)
        if step >= self.steps:
            return self.end
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.end + (self.lr - self.end) * 0.5 * (1 + math.cos(math.pi * done))


def _improves(metric, on):
    """Whether metric beats on.best by on.threshold; best None stands for the worst there is.  NaN beats nothing."""
    sign = -1 if on.mode == "min" else 1
    best = -sign * math.inf if on.best is None else on.best
    bar = best * (1 + sign * on.threshold) if on.threshold_mode == "rel" else best + sign * on.threshold
    return sign * metric > sign * bar


def _metric(value):
    """A metric as a float; NaN may come, it counts as no improvement."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric={words.shown(value)} is {words.kind_of(value)}; it must be a number") from None
    except OverflowError:
        raise ValueError("metric is too large for a float") from None


@_closed("; its counters are set by count(rate, best, bad, cooling)")
@dataclass(frozen=True, eq=False)
class Plateau:
    """The rate falls by `factor` when the metric given to update() has stopped improving.

    An update() that is no improvement is a bad one.  The rate becomes max(rate*factor, min_lr).  The defaults are those of
    PyTorch's ReduceLROnPlateau; keras() gives those of Keras'.

    Parameters
    ----------
    lr : float
        The first rate, at least 0.
    factor : float, default 0.1
        By what it falls; between 0 and 1.
    patience : int, default 10
        How many bad updates in a row are borne; see counting.
    threshold : float, default 1e-4
        How much a metric must improve, at least 0.  NaN never improves.
    threshold_mode : {"rel", "abs"}
        An improvement is a metric below best*(1 - threshold) with "rel", which is meant for positive metrics, or below
        best - threshold with "abs"; with mode="max", above best*(1 + threshold) or best + threshold.
    mode : {"min", "max"}
        Whether a smaller or a larger metric is better.
    cooldown : int, default 0
        For how many updates after a reduction bad ones are not counted; see counting.
    min_lr : float, default 0.0
        The rate does not fall below it.
    min_change : float, default 1e-8
        A change of this size or less is not made.
    counting : {"torch", "keras"}
        "torch" reduces when there are more than `patience` bad updates in a row, and does not count the next `cooldown`;
        "keras" reduces when there are `patience` of them (0 means 1), and does not count the next `cooldown` - 1.

    Attributes
    ----------
    rate : float
        The present rate.
    best : float or None
        The best metric so far.
    bad, cooling : int
        The bad updates in a row, and for how many updates they are still not counted.

    Raises
    ------
    TypeError, ValueError
        For a value of another kind or range.
    """

    lr: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    mode: str = "min"
    cooldown: int = 0
    min_lr: float = 0.0
    min_change: float = 1e-8
    counting: str = "torch"
    rate: float = field(init=False)
    best: float | None = field(init=False, default=None)
    bad: int = field(init=False, default=0)
    cooling: int = field(init=False, default=0)

    def __post_init__(self):
        _check(self, lr=hyper.non_negative, factor=_factor, patience=_count, threshold=hyper.non_negative,
               threshold_mode=_THRESHOLD_MODE, mode=_MODE, cooldown=_count, min_lr=hyper.non_negative,
               min_change=hyper.non_negative, counting=hyper.choice("torch", "keras"))  # fmt: skip
        if self.factor == 1:
            raise ValueError("factor=1.0 would reduce nothing; it must be below 1")
        vars(self).update(rate=self.lr, best=None, bad=0, cooling=0)

    @classmethod
    def keras(cls, lr, factor=0.1, patience=10, **options):
        """A Plateau with the values of Keras' ReduceLROnPlateau: counting "keras", an absolute threshold, any change made.

        Parameters
        ----------
        lr, factor, patience : float, float, int
            As in Plateau.
        **options
            The other parameters of Plateau.

        Returns
        -------
        Plateau
        """
        return cls(lr, factor, patience, **{"threshold_mode": "abs", "min_change": 0.0, "counting": "keras", **options})

    def __call__(self, step):
        return self.rate

    def count(self, rate, best, bad, cooling):
        """Set the counters, as they once were.

        Parameters
        ----------
        rate, best, bad, cooling : float, float or None, int, int
            The attributes of these names.

        Raises
        ------
        TypeError, ValueError
            For a value of another kind or range.
        """
        best = None if best is None else hyper.number("best", best)
        rate, bad, cooling = hyper.non_negative("rate", rate), _count("bad", bad), _count("cooling", cooling)
        vars(self).update(rate=rate, best=best, bad=bad, cooling=cooling)

    def update(self, metric):
        """Count one metric.

        Parameters
        ----------
        metric : float
            Usually the loss of an epoch.

        Returns
        -------
        bool
            Whether the rate was reduced.

        Raises
        ------
        TypeError
            For what is no number.
        """
        metric = _metric(metric)
        improved = _improves(metric, self)
        counted = self.cooling <= (self.counting == "keras")
        vars(self).update(
            best=metric if improved else self.best,
            bad=self.bad + 1 if counted and not improved else 0,
            cooling=max(self.cooling - 1, 0),
        )
        if self.bad < (max(self.patience, 1) if self.counting == "keras" else self.patience + 1):
            return False
        return self._reduce()

    def _reduce(self):
        before, reduced = self.rate, max(self.rate * self.factor, self.min_lr)
        rate = reduced if before - reduced > self.min_change else before
        vars(self).update(rate=rate, bad=0, cooling=self.cooldown)
        return rate < before


@_closed("; best and bad are set by update() and load_state_dict()")
class EarlyStopping:
    """Says when to stop, and keeps the parameters (with optimizer=: and its state) of the best metric.

    ::

        stopping = EarlyStopping(params, patience=5)
        for epoch in ...:
            ...
            if stopping.update(loss):
                break
        stopping.restore()

    Restarting from the best parameters with a smaller rate is this and a Plateau:
    ``if plateau.update(loss): stopping.restore()``.

    Parameters
    ----------
    params : array, sequence, mapping, FlatBuffer or list of groups
        What an optimizer takes, of float32 or float64 in host memory.  They are copied here (so restore() may come at any
        time) and at every improvement.
    patience : int, default 10
        After how many updates in a row without an improvement it stops, as Keras' EarlyStopping counts; 0 means 1.
    threshold, threshold_mode, mode
        As in Plateau.
    optimizer : Optimizer, optional
        One whose state is kept and restored, too.

    Attributes
    ----------
    best : float or None
        The best metric so far.
    bad : int
        The updates since.

    Raises
    ------
    TypeError, ValueError
        For a value of another kind or range.
    """

    patience: int
    threshold: float
    threshold_mode: str
    mode: str
    best: float | None
    bad: int

    def __init__(self, params, patience=10, threshold=0.0, threshold_mode="abs", mode="min", optimizer=None):
        vars(self).update(
            patience=_count("patience", patience),
            threshold=hyper.non_negative("threshold", threshold),
            threshold_mode=_THRESHOLD_MODE("threshold_mode", threshold_mode),
            mode=_MODE("mode", mode),
        )
        structure, leaves, _, _ = tree.arrange(params, None)
        if not leaves:
            raise ValueError("params is empty: there is nothing to keep")
        if isinstance(optimizer, type):
            raise TypeError(f"optimizer={optimizer.__name__} is a class; pass the optimizer that is in use, an object of "
                            f"it: {optimizer.__name__}(params)")  # fmt: skip
        if optimizer is not None and not hasattr(optimizer, "load_state_dict"):
            raise TypeError(f"optimizer={words.shown(optimizer)} is no optimizer of fastrms")
        vars(self).update(best=None, bad=0, _names=structure.names("params"), _leaves=leaves, _optimizer=optimizer)
        self._keep()

    def _buffers(self):
        """Each parameter; torch may have moved it since."""
        named = zip(self._leaves, self._names, strict=True)
        return [host.acquire(leaf, name, writable=True) for leaf, name in named]

    def _keep(self):
        state = None if self._optimizer is None else self._optimizer.state_dict()
        kept = [np.array(host.shaped(buffer.flat, buffer)) for buffer in self._buffers()]
        vars(self).update(_kept=kept, _kept_state=state)

    def update(self, metric):
        """Count one metric, and copy the parameters if it is the best.

        Parameters
        ----------
        metric : float
            Usually the loss on held-out data.

        Returns
        -------
        bool
            Whether to stop.

        Raises
        ------
        TypeError
            For what is no number.
        """
        metric = _metric(metric)
        if _improves(metric, self):
            self._keep()
            vars(self).update(best=metric, bad=0)
        else:
            vars(self).update(bad=self.bad + 1)
        return self.bad >= max(self.patience, 1)

    def restore(self):
        """Write the best parameters back, in place; the optimizer, if given, gets its state and step counts of that moment
        and keeps its hyper-parameters, lr included.  The bad updates are counted anew."""
        buffers = self._buffers()
        for buffer, kept, name in zip(buffers, self._kept, self._names, strict=True):
            if (buffer.size, buffer.dtype) != (kept.size, kept.dtype):
                raise ValueError(f"{name} has changed its size or dtype since it was kept")
        if self._optimizer is not None:
            groups = [{name: value for name, value in group.items() if name != "lr"} for group in self._optimizer.groups]
            self._optimizer._load({**self._kept_state, "dialect": self._optimizer.dialect, "groups": groups}, trusted=True)
        host.wrote(buffers)  # before the write, so that an interrupt cannot come between the two
        for buffer, kept in zip(buffers, self._kept, strict=True):
            np.copyto(host.shaped(buffer.flat, buffer), kept.reshape(buffer.shape))
        vars(self).update(bad=0)

    def state_dict(self):
        """The best metric, the count, the parameters and optimizer state kept, as plain values and copies: pickle it.

        Returns
        -------
        dict
        """
        params = {name: np.array(kept) for name, kept in zip(self._names, self._kept, strict=True)}
        return {"best": self.best, "bad": self.bad, "params": params, "optimizer": copy.deepcopy(self._kept_state)}

    def load_state_dict(self, d):
        """Take over what state_dict() gave.

        Parameters
        ----------
        d : dict

        Raises
        ------
        ValueError
            With nothing changed, where d does not fit these parameters.
        """
        self._refuse_without_keys(d)
        try:
            best = None if d["best"] is None else hyper.number("best", d["best"])
            bad, params, state = _count("bad", d["bad"]), d["params"], copy.deepcopy(d["optimizer"])
            if state is not None and self._optimizer is not None:
                self._optimizer._checked_state_dict(state)
            arrays_of = [params[name] for name in self._names]
            fits = [(x.shape, x.dtype) == (b.shape, b.dtype) for x, b in zip(arrays_of, self._buffers(), strict=True)]
        except MALFORMED as error:
            raise ValueError(f"this is not a state_dict of this EarlyStopping: {error!r}") from None
        if not all(fits) or (state is None) != (self._optimizer is None):
            raise ValueError("the state_dict is of an EarlyStopping with other parameters or without its optimizer")
        vars(self).update(_kept=[np.array(x) for x in arrays_of], _kept_state=state, best=best, bad=bad)

    def _refuse_without_keys(self, d):
        """ValueError unless d has what state_dict() writes, each of these parameters included."""
        if not isinstance(d, Mapping):
            raise ValueError(f"this is {words.kind_of(d)}, not a state_dict of an EarlyStopping: pass what its "
                             f"state_dict() gave")  # fmt: skip
        if missing := [key for key in ("best", "bad", "params", "optimizer") if key not in d]:
            raise ValueError(f"this has the keys {[*d]}; a state_dict of an EarlyStopping has {missing[0]!r}, too: pass "
                             f"what its state_dict() gave")  # fmt: skip
        params = d["params"] if isinstance(d["params"], Mapping) else {}
        if missing := [name for name in self._names if name not in params]:
            raise ValueError(f"the state_dict has no {missing[0]} (it has {', '.join(map(str, params)) or 'no parameters'})"
                             f": load it into an EarlyStopping of the parameters that it was saved with")  # fmt: skip


KINDS = {kind.__name__: kind for kind in (Step, Exponential, Cosine, Plateau)}  # those that a state_dict can hold

graph_breaks.at(Step, Exponential, Cosine, Plateau, EarlyStopping)
