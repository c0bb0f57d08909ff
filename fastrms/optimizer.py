"""Optimizer, the base of them all: parameters in groups, their hyper-parameters, and steps over all of them in one call."""

import numbers
import operator
import os
import threading
from inspect import signature
from typing import NamedTuple

import numpy as np

from . import backends, hyper, saved_formats, sizes, storage
from . import state as states
from .family import Family
from .gradients import Gradients
from .groups import Group, Groups, resolved
from .memory import host, placement, tree
from .names import Names
from .shards import join
from .streaming import Streaming
from .tensors import Tensors
from .words import kind_of, shown

ONE = 1.0
_NEVER = object()  # is no gradient
_new = tuple.__new__  # makes a StepInfo in half the time of StepInfo()


class StepInfo(NamedTuple):
    """What a step did.  On a GPU the host waits for what it is asked for, which is there until 1024 steps later; after
    that it is a RuntimeError.

    Attributes
    ----------
    applied : bool
        Whether the step was made.
    grad_norm : float or None
        The global norm of grads*grad_scale before clipping; None unless clip_norm was given.
    nonfinite : int or None
        How many elements of grads*grad_scale are NaN or infinite or have a square that overflows their dtype; None with
        ``nonfinite="propagate"``, which does not look.
    """

    applied: bool
    grad_norm: float | None
    nonfinite: int | None


APPLIED = StepInfo(True, None, None)


class LaterInfo(StepInfo):
    """The StepInfo of a step that is not waited for: what is asked for is read from the device then."""

    def __new__(cls, found):
        made = super().__new__(cls, True, None, None)
        made._found = found
        return made

    @property
    def applied(self):
        return not self._found.nonfinite

    @property
    def grad_norm(self):
        return self._found.grad_norm

    @property
    def nonfinite(self):
        return self._found.nonfinite

    def __iter__(self):
        return iter((self.applied, self.grad_norm, self.nonfinite))

    def __hash__(self):
        return hash(tuple(self))

    def __repr__(self):
        try:
            return repr(StepInfo(*self))
        except RuntimeError as error:
            return f"StepInfo({error})"

    def __reduce__(self):
        return StepInfo, tuple(self)

    _make = StepInfo._make  # for _replace(), too

    def __radd__(self, other):
        return other + tuple(self)

    def count(self, value):
        return tuple(self).count(value)

    def index(self, *arguments):
        return tuple(self).index(*arguments)


def of_tuple(function):
    """A method that calls a function of the module operator on what stands in a LaterInfo: a tuple reads its own memory."""
    return lambda self, *arguments: function(tuple(self), *arguments)


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "getitem", "contains", "add", "mul"):
    setattr(LaterInfo, f"__{_name}__", of_tuple(getattr(operator, _name)))
LaterInfo.__rmul__ = LaterInfo.__mul__


class OneThread:
    """A `with` block that one thread at a time may enter.  A forked child does not wait for a thread of its parent."""

    def __init__(self, name):
        self._name = name
        self._renew()

    def _renew(self):
        self._process = os.getpid()
        self._lock = threading.RLock()  # reentrant: an interrupt may have kept its thread from releasing it

    def __enter__(self):
        if not self._lock.acquire(False):
            if self._process == os.getpid():
                raise in_use(self._name)
            self._renew()
            self._lock.acquire()

    def __exit__(self, *error):
        self._lock.release()


def misplaced(value):
    """The error for what step() was given beside grads, by its place or as a closure."""
    if callable(value):
        return TypeError("step() calls no closure: compute the loss and the gradients first, then call opt.step(grads)")
    if isinstance(value, numbers.Real):
        return TypeError(f"grad_scale and clip_norm are given by name, {value!r} was not: write "
                         f"opt.step(grads, grad_scale={shown(value)})")  # fmt: skip
    return TypeError("step() takes the gradients in one argument, in the structure of params: opt.step([gw, gb])")


def in_use(name):
    return RuntimeError(f"this {name} is in use by another thread; give each thread its own, or a lock")


class Optimizer(Names, Family):
    """Base of the optimizers, and of rules of your own.

    A rule of your own, for the backends "numba", "numpy" and "cuda", is a subclass with the attributes below.  It gets
    groups, schedules, all checks, clipping, ``state_dict()`` and threads.  The options state, nonfinite, zero_grad and
    backend are those of fastrms.RMSProp.

    Attributes
    ----------
    defaults : dict
        The hyper-parameters of the rule and their values; lr may be a callable(step), first called with 0.
    state_names : tuple of str
        The names of the buffers that the rule keeps beside each parameter.
    coefficients : ``callable(step, **hyper) -> dict``
        The numbers that the rule needs at update number ``step`` (from 1), computed in double.
    rule : ``callable(param, grad, *states, *coefficients) -> tuple``
        The new param and states, in this order.  It is called on scalars (numba, cuda) or on read-only arrays (numpy), so
        it is elementwise and has no ``if``: see select, larger, clip and flush in fastrms.rules.  All arithmetic is in the
        dtype of param as long as every number in it is a coefficient.  grad arrives multiplied by grad_scale and the
        clip_norm factor.  ``coefficients``, ``rule`` and ``initial`` may be static methods.
    initial : callable(h, state_name) -> float, optional
        The value at which a state starts; 0.0 unless it is given.
    """

    # what step() reads: 20 ns faster than in the dict
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_argument",
        "_call",
        "_call_held",
        "_looking_grads",
        "_no_grads",
        "_same_grads",
        "_steady_grads",
    )

    def __new__(cls, params=None, *positional, **options):
        if cls is Optimizer:
            raise TypeError("Optimizer is the base of the optimizers; make an RMSProp, AdaGrad, Adam, AdamW or RProp")
        if positional and (callable(positional[0]) or isinstance(positional[0], (int, float))):
            raise TypeError(f"hyper-parameters are given by name, {positional[0]!r} was not: write "
                            f"{cls.__name__}(params, lr={positional[0]!r})")  # fmt: skip
        if positional:
            raise TypeError(f"{cls.__name__} takes its arrays in one argument, hyper-parameters by name: write "
                            f"{cls.__name__}([w, b], lr=0.01); gradients go to step() or bind()")  # fmt: skip
        return super().__new__(cls)

    def __init__(self, params, *, state=None, groups=None, dialect=None, nonfinite="propagate", zero_grad=False,
                 param_copy=None, seed=0, shards=None, backend="auto", stream=None, capturable=False, check=False,
                 **options):  # fmt: skip
        self._nonfinite, self._zero_grad = hyper.on_nonfinite("nonfinite", nonfinite), hyper.flag("zero_grad", zero_grad)
        structure, leaves, group_of, overrides = tree.arrange(params, groups)
        if not leaves:
            raise ValueError("params is empty: there is nothing to optimize")
        module = backends.choose(backend, self.own_rule, leaves[0])
        self._backend, self._dialect, self._patterns = backends.name_of(module), dialect, list(groups or ())
        stored = storage.of_groups(options, overrides)
        if state is not None and not self.trusts_state:
            storage.refuse_with_state(stored)
        self._tensors = Tensors(structure, leaves, group_of, backends.memory(module), stored)
        values = resolved(type(self), dialect, [{**options, **extra} for extra in overrides], self._patterns)
        self._groups = Groups(type(self), self._tensors, values)
        self._tensors.make_storage(stored, self._groups.rules, self.not_negative, param_copy, hyper.seed("seed", seed))
        if state is None:
            self._tensors.make_state(self._groups.initial, self._groups.rules)
        else:
            self._tensors.take_state(state, self._groups.rules, None if self.trusts_state else self.not_negative)
        self._tensors.make_low()
        self._groups.refuse_zero_state(values, self._tensors.state)
        extra = hyper.cuda_options(self._backend, stream, capturable, check)
        flats = [list(flats.values()) for flats in self._tensors.state]
        which = [tensor.recipe for tensor in self._tensors]
        gradients = self._nonfinite, self._zero_grad
        self._bind_plan(module.Plan(self._tensors.params, flats, which, self._groups.recipes, *gradients,
                                    *extra, **self._tensors.storages()))  # fmt: skip
        if shards is not None:
            join(self, shards)
        self._tensors.write_copies()

    def _bind_plan(self, plan):
        self._plan, self._one_thread = plan, OneThread(type(self).__name__)
        self._call, self._call_held, self._argument = plan.bound_step()
        self._gradients = Gradients(self._tensors, self._zero_grad)
        self._rates_from = self._rates_until = 0  # the steps for which the plan has the rates of foreseen schedules
        self._hold(None)

    # hyper-parameters

    def _change(self, changes):
        """Set hyper-parameters, (group, name, value) each: check everything, then hand the new recipes to the plan."""
        values = self._groups.changed(self._dialect, changes)
        if all(name == "lr" for _, name, _ in changes):
            return self._change_rates(values)
        recipes = self._groups.recipes_for(values, self._tensors.state, f"setting {changes[0][1]}={changes[0][2]!r}")
        with self._one_thread:
            self._forget_rates()
            self._change_plan(recipes=recipes, run=False)
            self._take_values(values, recipes)

    def _change_rates(self, values):
        """Set learning rates alone: a number in the plan for each recipe, or a schedule, which the next step asks."""
        groups, rates = self._groups, self._groups.constant_rates(values)
        asked = groups.scheduled or None in rates
        with self._one_thread:
            if asked:
                self._forget_rates()
            self._refuse_unless_ok(self._withhold_rates() if None in rates else self._plan.set_rates(rates))
            groups.take(values)
            if asked:
                self._forget_rates()

    def _take_values(self, values, recipes):
        self._groups.take(values, recipes.values())
        if self._groups.scheduled:
            self._withhold_rates()
        self._forget_rates()

    def _withhold_rates(self):
        """Let a step from C find no learning rate until Python has asked the schedules: the plan gets rates for a step that
        never comes.  Returns a status."""
        return self._plan.set_rates([0.0] * len(self._groups.rules), -1, 1)

    def _forget_rates(self):
        """Let the next step ask the schedules again.  This comes before the plan is told anything, as its recipes hold a
        rate of 0 where there is a schedule, and again where there is one from now on."""
        self._rates_until = 0
        self._hold(self._gradients.held)

    @property
    def _memory(self):
        return self._tensors.memory

    @property
    def groups(self):
        """The hyper-parameters of each group, as a tuple of mappings; setting one takes effect at the next step."""
        return tuple(Group(self, k) for k in range(len(self._groups.values)))

    @property
    def lr(self):
        """The learning rate: a float or callable(step); a list where the groups differ.  Setting one sets all groups."""
        rates = [values["lr"] for values in self._groups.values]
        return rates[0] if all(rate == rates[0] for rate in rates) else rates

    @lr.setter
    def lr(self, value):
        groups = self._groups
        if type(value) is float and 0.0 <= value <= groups.free_up_to:
            with self._one_thread:
                status = self._plan.set_rate(value)
                if status:
                    raise self._refusal(status)
                for values in groups.values:
                    values["lr"] = value
            return
        rates = value if isinstance(value, list) else [value] * len(self._groups.values)
        if len(rates) != len(self._groups.values):
            raise ValueError(f"lr={shown(value)} has {len(rates)} entries, there are {len(self._groups.values)} groups")
        self._change([(k, "lr", rate) for k, rate in enumerate(rates)])

    def __reduce__(self):
        raise TypeError(
            f"{kind_of(self)} cannot be copied or pickled, as it updates your memory; make a new one and load its "
            f"state_dict()"
        )

    def __repr__(self):
        name, count = type(self).__name__, len(self._tensors)
        try:
            made = f"{self.steps} steps made"
        except RuntimeError as error:  # in a capture, or on a device that has failed
            made = str(error)
        return f"<{name} of {count} tensor(s) on backend {self._backend!r}, {made}>"

    @property
    def backend(self):
        """The name of the backend that runs the updates: "c", "numba", "numpy" or "cuda"."""
        return self._backend

    @property
    def dialect(self):
        """The framework whose defaults were taken, or None."""
        return self._dialect

    @property
    def nonfinite(self):
        """What a step does about gradients that are not finite: "propagate", "skip" or "raise"."""
        return self._nonfinite

    # steps

    def _hold(self, held):
        """Note what the plan holds, and whether step() may call the backend at once: no step may need Python.  A plain step
        has nothing to tell either."""
        gradients = self._gradients
        gradients.hold(held)
        steady = held is not None and not (self._tensors.of_torch or gradients.may_move)  # torch may move what it has
        again = steady and type(held) in tree.STEADY and not self._zero_grad  # else it is asked whether it may be written
        known = None if steady and gradients.holds_bound else held if again else _NEVER
        direct = not self._asks_schedules()
        plain = direct and self._nonfinite == "propagate"
        self._no_grads = None if plain and known is None else _NEVER
        self._same_grads = held if plain and again else _NEVER, gradients.number, gradients.held_shape
        self._looking_grads = known if direct else _NEVER, gradients.number, gradients.held_shape
        self._steady_grads = known, gradients.number, gradients.held_shape

    def _asks_schedules(self):
        """Whether a schedule must be asked at the next step."""
        return self._groups.scheduled and not self._rates_until

    # grad_scale and clip_norm are given by name, and closure takes what is not: a `*` in their place costs 28 ns of 156 at
    # 64 elements, `**` for all other names 20 ns, this 1 ns (CPython 3.11)
    def step(self, grads=None, closure=None, grad_scale=None, clip_norm=None):
        """Update all parameters in place from grads, or from the bound gradients where grads is None.

        In this order: nonfinite elements are counted, the norm is taken, the rule clips, decays and updates, gradients are
        zeroed.  Gradients are left untouched, but for ``zero_grad=True``.

        Parameters
        ----------
        grads : array, sequence, mapping or FlatBuffer gradients, optional
            The structure of params, each gradient of the dtype, shape and memory order of its parameter.  A None in it
            leaves that tensor and its step count alone.
        grad_scale : float, default 1.0
            Multiplies every gradient (1/loss_scale); from 1e-30 to 1e30.
        clip_norm : float, optional
            Above 0: where the norm of all grads*grad_scale exceeds it, they are scaled down to it (inf: only measure).

        Returns
        -------
        StepInfo

        Raises
        ------
        TypeError, ValueError
            Before anything is written, with a sentence that names the argument.
        FloatingPointError
            With ``nonfinite="raise"`` where a gradient is not finite; nothing was updated.
        RuntimeError
            When another thread uses this optimizer or a streaming block is open.
        """
        if grad_scale is None and clip_norm is None and closure is None:
            if grads is self._no_grads:
                if not self._call(self._argument):
                    return APPLIED
            else:
                same, number, shape = self._same_grads
                if (
                    grads is same
                    and (shape is None or grads.shape == shape)  # it may have been reshaped in place
                    and not self._call_held(self._argument, number)
                ):
                    return APPLIED
        if closure is not None:
            raise misplaced(closure)
        grad_scale = ONE if grad_scale is None else grad_scale
        info = self._looking_step(self._looking_grads, grads, grad_scale, clip_norm)
        if info is not None:
            return info
        with self._one_thread:
            return self._checked_step(grads, grad_scale, clip_norm)

    def _looking_step(self, held, grads, grad_scale, clip_norm):
        """The StepInfo of a step that may look at its gradients first, made at once where the plan holds these; None where
        there is no such short way.  held: the object whose memory it holds, its number and its shape."""
        known, number, shape = held
        if grads is not known or (known is not None and shape is not None and grads.shape != shape):
            return None
        if type(grad_scale) is not float or not 1e-30 <= grad_scale <= 1e30:
            return None
        if clip_norm is not None and (type(clip_norm) is not float or not clip_norm > 0):
            return None
        status, found = self._plan.step_looking(number, grad_scale, clip_norm)
        if status == backends.OK:
            return APPLIED if found is None else _new(StepInfo, (True, found[0], found[1]))
        return self._info(backends.Found._make(found)) if status == backends.NONFINITE else None

    def _checked_step(self, grads, grad_scale, clip_norm):
        if grad_scale is not ONE:
            grad_scale = hyper.scale("grad_scale", grad_scale)
        if clip_norm is not None:
            clip_norm = hyper.above_zero("clip_norm", clip_norm)
        tensors, gradients = self._tensors, self._gradients
        if self._groups.scheduled and self._renew_rates():
            self._hold(gradients.held)
        info = self._looking_step(self._steady_grads, grads, grad_scale, clip_norm)
        if info is not None:
            return info
        if tensors.of_torch and not (grads is None and self._plan.capturable):
            grads = gradients.listed(grads)
            leaves = gradients.torch_leaves(grads)
            reader = leaves and tensors.reader(self._plan)
            info = reader and self._read_step(reader, leaves, grad_scale, clip_norm)
            if info:
                return info
        params = tensors.moved(tensors.of_torch) if tensors.of_torch else None
        accepted, hold = gradients.accept(grads, anew=params is not None)
        if accepted is not None:
            self._hold(None)
        number = 0 if hold is None else gradients.next_number()
        found = self._change_plan(params, accepted, None, number, True, grad_scale, clip_norm)
        if hold is not None:
            self._hold(hold)
        return APPLIED if found is None else self._info(found)

    def _read_step(self, reader, leaves, grad_scale, clip_norm):
        """The StepInfo of a step from gradients that are torch tensors, a list with one for each tensor or None, whose
        addresses this Reader finds; None where it cannot be made so."""
        if not reader.read(leaves):
            return None
        if self._gradients.held is not None:
            self._hold(None)
        try:
            found = self._change_plan(None, reader.given(), None, 0, True, grad_scale, clip_norm, reader)
        finally:
            reader.done()
        if found is None:
            return APPLIED
        return None if found == backends.OVERLAP else self._info(found)

    def _change_plan(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None,
                     reader=None):  # fmt: skip
        """plan.change, with the sentence where it refuses; the owners of the memory learn of what it wrote.  reader: the
        Reader that has read grads; where buffers overlap, OVERLAP is returned then."""
        status = None  # stays so where an interrupt cuts the step
        try:
            status, found = self._plan.change(params, grads, recipes, hold, run, grad_scale, clip_norm)
        finally:
            if run and (self._tensors.of_torch or self._zero_grad):
                self._tell_owners(status, params, grads, reader)
        if status == backends.OVERLAP:
            if reader is not None:
                return status
            self._tensors.refuse_overlap(params, enumerate(grads or ()))
        if status not in (backends.OK, backends.NONFINITE):
            raise self._refusal(status)
        if params is not None:
            self._tensors.take(params)
        return found

    def _tell_owners(self, status, params, grads, reader):
        """Let the owners of parameters, and of gradients that a step zeroes, know that their memory was written."""
        stepped = status in (None, backends.OK)
        zeroes = self._zero_grad and (stepped or (status == backends.NONFINITE and self._nonfinite == "skip"))
        if reader is not None:
            return reader.wrote(stepped, zeroes)
        gradients, params = self._gradients, params or self._tensors.params
        if grads is None:  # those that are held, or one array for all
            grads = gradients.bound if gradients.holds_bound else params
        rows = zip(self._tensors, params, grads, strict=True)
        written = [buffer for tensor, param, grad in rows if grad is not None for buffer in (param, *tensor.lent.values())]
        zeroed = [grad for grad in grads if hasattr(grad, "owner")]
        self._memory.wrote((written if stepped else []) + (zeroed if zeroes else []))

    def _info(self, found):
        """StepInfo, or FloatingPointError: the plan has left the step out where gradients are not finite."""
        if type(found) is not backends.Found:
            return LaterInfo(found)
        if found.nonfinite and self._nonfinite == "raise":
            where = "a tensor of another rank" if found.tensor < 0 else self._tensors[found.tensor].grad_name
            raise FloatingPointError(
                f"{found.nonfinite} element(s) of the gradients are NaN or infinite or have a square that overflows, the "
                f"first of them in {where}; nothing was updated"
            )
        return StepInfo(not found.nonfinite, found.grad_norm, found.nonfinite)

    def _renew_rates(self):
        """Give the plan the learning rates of the next step, and of many where the schedules are foreseen; it may have those
        already.  Returns whether it has them for later steps from now on."""
        groups = self._groups
        if groups.foreseen and self._plan.follow(groups):
            return False
        steps = self._plan.steps
        if self._rates_from <= steps < self._rates_until:
            return False
        if self._rates_until:
            self._rates_until = 0
        rows = self._plan.most_rate_rows if groups.foreseen else 1
        self._refuse_unless_ok(self._plan.set_rates(groups.rates(steps, rows), steps, rows))
        if rows > 1:
            self._rates_from, self._rates_until = steps, steps + rows
        return rows > 1

    def _refuse_unless_ok(self, status):
        if status != backends.OK:
            raise self._refusal(status)

    def _refusal(self, status):
        if status == backends.STREAMING:
            return RuntimeError(f"a streaming block of this {type(self).__name__} is open; leave it first")
        return in_use(type(self).__name__)

    def bind(self, grads):
        """Name gradient buffers that stay where they are: step() without grads reads them, without checking them again.

        Parameters
        ----------
        grads : array, sequence, mapping or FlatBuffer gradients
            As in step().  A torch tensor whose gradient is set to None and made anew each step does not stay.

        Raises
        ------
        TypeError, ValueError
            As step() does.
        """
        if grads is None:
            raise TypeError("grads is None; bind() needs the gradient buffers")
        gradients = self._gradients
        bound = gradients.acquire(self._tensors.structure.leaves(grads, "grads"), self._zero_grad)
        with self._one_thread:
            self._hold(None)
            self._change_plan(grads=bound, hold=gradients.next_number(), run=False)
            gradients.bound, gradients.bound_object = bound, grads
            self._hold(grads)

    def zero_grad(self, set_to_none=False):
        """Write zeros over the gradients that are held: those of bind(), or the array that step() was given twice.

        ``zero_grad=True`` of the constructor does the same in each step, while the gradient is in cache.

        Parameters
        ----------
        set_to_none : bool, default False
            True, torch's default, is refused: the memory of gradients is yours.

        Raises
        ------
        ValueError
            Where no gradients are held, or where one is read-only.
        RuntimeError
            When another thread uses this optimizer.
        """
        if set_to_none:
            raise ValueError(
                "set_to_none=True is for the owner of the gradients: call model.zero_grad() of your torch module"
            )
        with self._one_thread:
            if self._gradients.held is None and self._gradients.bound is None:
                raise ValueError("no gradients are held that could be zeroed: bind() them first, or pass zero_grad=True to "
                                 "the constructor, and each step zeroes the gradients that it was given")  # fmt: skip
            buffers = self._gradients.held_buffers()
            for buffer in buffers:
                buffer.flat.fill(0)
            self._memory.wrote(buffers)

    def streaming(self, grad_scale=1.0, **options):
        """A step that is made tensor by tensor, while each gradient is still in cache, as a `with` block::

            with opt.streaming() as s:
                s.step("w3", g)             # g may be one scratch array for all tensors, one after the other

        The name is the key in a mapping, the index in a sequence, 0 for a single array, and (group index, key or index)
        in a list of groups.  Same bits and same counts as one step() with these gradients and None for the others: the
        first update in the block counts the step, and asks a schedule.  While the block is open, everything else that
        needs the optimizer whole is refused (RuntimeError).  Leaving the block early takes nothing back; ``s.updated`` says
        what was updated.  There is no clip_norm, which needs all gradients at once.

        Parameters
        ----------
        grad_scale : float, default 1.0
            As in step().

        Raises
        ------
        ValueError
            Unless ``nonfinite="propagate"``.
        TypeError
            For a FlatBuffer, which is updated as one: stream its mapping flat.params.
        """
        if options:
            raise TypeError(f"streaming() takes grad_scale alone, no {next(iter(options))}: clip_norm and nonfinite need "
                            f"all gradients at once, which step() gets")  # fmt: skip
        if self._nonfinite != "propagate":
            raise ValueError(
                f"nonfinite={self._nonfinite!r} looks at all gradients before the first update, which a streamed step "
                f"cannot do: it needs nonfinite='propagate'"
            )
        return Streaming(self, hyper.scale("grad_scale", grad_scale))

    def _open_stream(self):
        self._refuse_unless_ok(self._plan.stream_open())

    def _stream_read(self, k, grad):
        """_stream() of a torch tensor whose address C reads, from constant learning rates; False where it cannot."""
        reader = self._tensors.reader(self._plan)
        read = reader.read_one(k, grad) if reader and not self._zero_grad else None
        if read is None:
            return False
        status = None
        try:
            status = self._plan.stream_step(k, None, read, None, 1.0)
        finally:
            if status in (None, backends.OK):
                reader.wrote_one(k)
        if status == backends.OVERLAP:
            self._tensors.refuse_overlap(None, [(k, grad)])
        self._refuse_unless_ok(status)
        return True

    def _stream(self, k, grad, grad_scale, first):
        """Update tensor k alone, within a streamed step."""
        tensor = self._tensors[k]
        if grad is None:
            raise TypeError(f"{tensor.grad_name} is None; a tensor without a gradient is left out of the block")
        buffer = self._tensors.acquire_grad(k, grad, self._zero_grad)
        params = self._tensors.moved([k]) if k in self._tensors.of_torch else None
        rates = self._groups.rates(self.steps, 1) if first and self._groups.scheduled else None
        status = None
        try:
            status = self._plan.stream_step(k, params and params[k], buffer, rates, grad_scale)
        finally:
            if status in (None, backends.OK):
                written = [params[k] if params else tensor.param, *tensor.lent.values()]
                self._memory.wrote([*written, buffer] if self._zero_grad else written)
        if status == backends.OVERLAP:
            self._tensors.refuse_overlap(params, [(k, buffer)])
        if status != backends.OK:
            raise self._refusal(status)
        if params is not None:
            self._tensors.take(params)
            self._hold(None)

    @property
    def steps(self):
        """Number of steps made."""
        return self._plan.steps

    @property
    def tensor_steps(self):
        """How many updates each tensor has had: a step without a gradient for it does not count.  A list of int."""
        return self._plan.tensor_steps

    @property
    def c_step(self):
        """(function address, plan address): one step of the bound gradients from C, Cython or @njit code without Python,
        by ``int step(void *plan)``.

        It answers FASTRMS_OK (0) when the step was made, FASTRMS_NONFINITE (6) when ``nonfinite="skip"`` or ``"raise"`` left
        it out, FASTRMS_BUSY (1) when another thread is in a step, FASTRMS_STREAMING (7) when a streaming block is open, and
        FASTRMS_NO_RATE (9) where lr has become a schedule; only with FASTRMS_OK was anything updated.  Good while this
        optimizer, the gradients and the parameters live where they
        are.  RuntimeError on other backends than C and where a step needs Python.
        """
        if self._backend != "c":
            raise RuntimeError(f"c_step needs backend='c', this {type(self).__name__} runs on {self._backend!r}")
        if not self._gradients.holds_bound:
            raise RuntimeError(
                "c_step needs gradients that stay: bind() them first, or again after a step with other gradients"
            )
        if self._groups.scheduled or self._tensors.of_torch or self._gradients.may_move:
            raise RuntimeError("c_step cannot serve a callable lr or torch tensors, which need Python at every step")
        return self._plan.addresses()

    def advance(self):
        """With backend="cuda" and capturable=True, before a captured CUDA graph with step() in it is launched again: count
        the step, unless ``nonfinite="skip"`` leaves that to the device, and write its coefficients there, an lr set since
        included."""
        if self._backend != "cuda" or self._gradients.held is None:
            raise RuntimeError("advance() needs backend='cuda', capturable=True and bound gradients: see bind()")
        if self._groups.scheduled:
            self._renew_rates()
        self._plan.advance()

    # state

    @property
    def state(self):
        """Mapping: state name -> the state arrays, in the structure of params (None where a tensor has no such state).

        The arrays are those in use, the caller's own memory where ``state=`` was given: write into them.  What is stored in
        a format is an object whose numbers np.asarray() copies, and whose ``bits`` are those in use.  The mapping itself
        cannot be changed.
        """
        self._tensors.refuse_moved_state()
        return states.mapping(self._tensors)

    def state_dict(self):
        """Everything but the parameters, as plain values and copies: hyper-parameters, step counts, state.

        A resumed run has the bits of an unbroken one, where params are in the same order.  States that are stored in a
        format are in it as they are, uint16 for bf16 and fp16, uint8 for q8, and so are the master of a parameter, or its
        remainder, the formats, the seed and the rounding.  A schedule of fastrms.schedules is in it with its counters, any
        other callable lr is left out.  Pickle it together with the parameters, or see save().

        Returns
        -------
        dict
        """
        self._tensors.refuse_moved_state()
        kept = [*map(saved_formats.kept, self._tensors)]
        copies = [{name: np.empty(flat.size, flat.dtype) for name, flat in flats.items()} for flats in kept]
        counts = self._copy(copies, kept)
        groups = states.described(self._groups.values)
        return {"optimizer": type(self).__name__, "dialect": self._dialect, "steps": counts[0], "groups": groups,
                "patterns": list(self._patterns), "tensors": states.saved(self._tensors, copies, counts[1:])}  # fmt: skip

    def _copy(self, to, source, recipes=None, steps=None, also=()):
        """Copy the state of all tensors, and what else there is to copy, in one call of the backend; returns the step counts
        before."""
        pairs = [(mine[name], other[name]) for mine, other in zip(to, source, strict=True) for name in mine]
        pairs += also
        status, before = self._plan.copy(pairs, recipes, steps)
        if status:
            raise self._refusal(status)
        return before

    def load_state_dict(self, d, convert=None):
        """Take over what state_dict() gave, hyper-parameters, seed and rounding included.

        A callable lr of this optimizer stays, unless it is of fastrms.schedules and so is the saved one; a Plateau stays the
        object that it is, with the saved counters.  Tensors are matched by name.

        Parameters
        ----------
        d : dict
            What state_dict() of an optimizer of the same class and parameters gave.
        convert : "float32", "bf16", "fp16" or "q8", optional
            The format of states in d that this optimizer keeps in another one.  They are decoded, and rounded to the nearest
            number of that format; numbers beyond the largest of fp16 become this.  Without, d must have the same formats.
            Tensors with q8 states have stochastic rounding from then on, too, whatever d says.

        Raises
        ------
        ValueError
            With nothing changed, where d does not fit this optimizer, or holds a negative or NaN second moment.
        """
        self._load(d, convert=convert)

    def _load(self, d, trusted=False, convert=None):
        """load_state_dict(); a state that is trusted may hold what this optimizer has made itself, NaN included."""
        try:
            loaded = self._checked_state_dict(d, trusted, convert)
        except states.MALFORMED as error:
            raise ValueError(f"this is not a state_dict of fastrms: {error!r}") from None
        tensors, made = self._tensors, loaded.storages
        new = [{name: flats[name] for name in t.state} for t, flats in zip(tensors, loaded.flats, strict=True)]
        recipes = self._groups.recipes_for(loaded.values, new, "this state_dict")
        tensors.refuse_moved_state()
        with self._one_thread:
            self._forget_rates()
            also = self._plan.pairs_of_storages(made) if any(made) else ()
            self._copy([*map(saved_formats.kept, tensors)], loaded.flats, recipes, loaded.steps, also)
            for tensor, storage_of in zip(tensors, made, strict=True):
                tensor.storage = storage_of
            self._memory.wrote([buffer for tensor in self._tensors for buffer in tensor.given.values()])  # no param_copy
            self._dialect = loaded.dialect
            for plateau, saved in loaded.plateaus:
                vars(plateau).update(vars(saved))
            self._take_values(loaded.values, recipes)

    def _checked_state_dict(self, d, trusted=False, convert=None):
        """The contents of a state_dict, checked against this optimizer."""
        return states.checked(d, type(self), self._tensors, self._groups.values, self._patterns, trusted, convert)

    def save(self, path):
        """Write state_dict() to a safetensors file (extra `checkpoint`), float values exact.  You save the parameters.

        The file is written beside path, synced and renamed, so path is at any moment the old file or the new one; a writer
        that is killed may leave its part as path.<random>.tmp.  A symbolic link is followed; the mode, owner and group of an
        existing file stay; a device or a FIFO is written to.

        Parameters
        ----------
        path : str, bytes or os.PathLike

        Raises
        ------
        OSError
            As the filesystem has it, with the old file untouched.
        ImportError
            Without safetensors.
        """
        from . import checkpoint

        checkpoint.save(self, path)

    def load(self, path, convert=None):
        """Take over what save() wrote, as load_state_dict() does; the next steps have the bits of an unbroken run.

        Parameters
        ----------
        path : str, bytes or os.PathLike
        convert : str, optional
            As in load_state_dict().

        Raises
        ------
        ValueError
            Naming path, where the file is damaged, foreign, or does not fit this optimizer; nothing has changed then.
        OSError
            As the filesystem has it; nothing has changed then.
        """
        from . import checkpoint

        checkpoint.load(self, path, convert)

    def to_torch_state_dict(self):
        """What ``load_state_dict()`` of torch.optim's RMSprop, Adagrad, Adam, AdamW or Rprop takes, for an optimizer of
        as many groups, and the same parameters in the same order.  A schedule becomes its present rate, and states in a
        format become float32; a master is left out.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            Naming a hyper-parameter that torch does not have (clip_value, nesterov, eps_root, ...).
        TypeError
            Where torch has no such rule.
        ImportError
            Without torch.
        """
        from . import torch_state

        return torch_state.exported(self)

    def load_torch_state_dict(self, d, convert=None):
        """Take over what ``state_dict()`` of torch's optimizer of this name gave, hyper-parameters included.

        What torch does not have (clip_value, nesterov, eps_root, ...) keeps its value, and so does a callable lr of this
        optimizer.  Parameters are matched by their order.  steps becomes the largest step of a parameter.

        Parameters
        ----------
        d : dict
            Its tensors may be anything that params may be.
        convert : "float32", optional
            Needed where this optimizer keeps states in a format: they are rounded to the nearest number of it.

        Raises
        ------
        ValueError
            With nothing changed, where d does not fit this optimizer, or is of another one of torch: AdamW takes that of
            Adam only without weight_decay.
        TypeError
            Where torch has no such rule.
        """
        from . import torch_state

        torch_state.imported(self, d, convert)

    @property
    def formats(self):
        """How the tensors with buffers in formats are kept, by name: a dict with "formats", name of a state, "master" or
        "remainder" -> its format, "rounding" and "seed", as state_dict() has them."""
        return {tensor.name: saved_formats.described(tensor) for tensor in self._tensors if tensor.storage}

    @property
    def nbytes(self):
        """The bytes of all buffers of a step: a dict by the names of the buffers ("param", "grad", the states, "master" or
        "remainder", "param_copy") with the attributes total, elements and per_parameter."""
        return sizes.of_optimizer(self._tensors, self._grad_dtypes())

    def _known_grads(self):
        return self._gradients.bound or [None] * len(self._tensors)

    def _grad_dtypes(self):
        """The dtype of each gradient: of the last step or bind(), before these of a FlatBuffer, or else of the update."""
        seen = map(self._plan.grad_dtype, range(len(self._tensors)))
        rows = zip(seen, self._tensors, self._tensors.structure.twins(), strict=True)
        return [dtype or (tensor if twin is None else twin).dtype for dtype, tensor, twin in rows]

    def report(self):
        """What runs, on what, with how many bytes, and which of your buffers lie badly: a text for people.

        Returns
        -------
        str
        """
        said = f", dialect {self._dialect!r}" if self._dialect else ""
        lines = [f"{type(self).__name__} on backend {self._backend!r}{said}"]
        without_c = backends.load("c").available()
        if without_c and self._backend in backends.HOST and not self.own_rule:
            lines.append(f"The C backend is not available: {without_c}")
        lines += map(self._line_of, range(len(self._groups.recipes)))
        if not self.own_rule:
            lines.append("The general form of a rule also computes clip_value, L2 weight_decay, eps_root, nesterov and "
                         "RMSProp's bias_correction=\"corrected\"; the neutral form serves steps without them.")  # fmt: skip
        arrays = self._tensors.of_the_caller(self._known_grads()) if self._memory is host else ()
        for name, other in (pair for named in arrays for pair in placement.collisions(named)):
            lines.append(
                f"{name} and {other} start at nearly the same offset modulo 4 KiB and may evict each other from cache: "
                f"start one of them some {placement.FAR} bytes further on"
            )
        return "\n".join(lines)

    def _line_of(self, k):
        """The line of report() on the tensors of recipe k."""
        key, recipe = self._tensors.keys[k], self._groups.recipes[k]
        rows = [row for row in zip(self._tensors, self._grad_dtypes(), strict=True) if row[0].recipe == k]
        buffers = ", ".join(f"{name} {size:.4g}" for name, size in sizes.per_element(rows, sizes.stored).items())
        moved = sizes.moved_per_element(rows, self._zero_grad)
        form = "" if self.own_rule else f", {'general' if recipe.general else 'neutral'} form"
        if self._backend == "c":
            form += f" by {backends.load('c').isa_of(recipe.rule, key.dtype, recipe.general)}"
        return (
            f"group {key.group}: rule {recipe.rule}{form}, {key.dtype}, {len(rows)} tensor(s), "
            f"{sum(tensor.param.size for tensor, _ in rows)} elements, {moved:.4g} bytes moved per element; bytes of each "
            f"buffer per element: {buffers}"
        )


Optimizer.streaming.__signature__ = signature(lambda self, grad_scale=1.0: None)
Optimizer.step.__signature__ = signature(lambda self, grads=None, *, grad_scale=ONE, clip_norm=None: None)
