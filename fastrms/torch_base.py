"""The base of the torch optimizers: a torch.optim.Optimizer whose step is one call of C for each device."""

import inspect
import sys
from collections import defaultdict
from functools import wraps
from operator import attrgetter, itemgetter

import torch
from torch.optim import optimizer as of_torch

from . import hyper, saved_formats
from .dialects import meaning_of_true, preset
from .memory import device, host
from .optimizer import APPLIED, OneThread, StepInfo
from .storage import FLOAT, low, refuse_undecided, takes_halves
from .torch_core import (
    KINDS,
    LOW,
    STATES,
    Core,
    Member,
    Note,
    State,
    complete,
    new_state,
    state_names,
    stored_state,
)
from .torch_formats import (
    SHAPE,
    held,
    loaded,
    master_of,
    options_of,
    refuse_other_shape,
    refuse_stale_master,
    shape_of,
    shown,
)
from .torch_reader import same_items
from .torch_shards import part_of, refuse_other_spread, refuse_sums, refuse_zero
from .torch_state import FILLED, FLAGS, NAMES, refuse_foreign
from .words import kind_of

REASONS = {
    "capturable": ": this optimizer keeps its coefficients in host memory; for CUDA graphs use fastrms.Adam(..., "
    "backend='cuda', capturable=True) and its kin",
    "differentiable": ": updates are made in place and cannot be differentiated; use torch.optim",
}
OURS = ("dialect", "clip_norm", "nonfinite", "zero_grad", "seed")  # arguments of an optimizer that belong to no group
GRAD = attrgetter("grad")
BEFORE_ALL, AFTER_ALL = of_torch._global_optimizer_pre_hooks, of_torch._global_optimizer_post_hooks
profiling = torch.autograd._profiler_enabled


def nothing():
    """None."""


def arguments(init):
    """A constructor whose signature says all: self._start gets, by name, the arguments that were given."""
    signature = inspect.signature(init)

    @wraps(init)
    def wrapper(self, *args, **named):
        if "param_copy" in named:
            raise TypeError("param_copy is an option of fastrms.Adam and its kin; here the bf16 or fp16 tensors are the "
                            "parameters, and master='float32' keeps a float32 of each")  # fmt: skip
        unknown = next((name for name in named if name not in signature.parameters), None)
        if unknown is not None:
            raise no_argument(type(self).__name__, self._names, unknown, [*signature.parameters][1:])
        given = signature.bind(self, *args, **named).arguments
        del given["self"]
        defaults = {name: p.default for name, p in signature.parameters.items() if name not in ("self", "params")}
        self._start(given.pop("params"), given, defaults)

    return wrapper


class Optimizer(torch.optim.Optimizer):
    """The base of RMSprop, Adagrad, Adam, AdamW and Rprop, each of which names a ``kind``, its class in fastrms."""

    kind = ""
    _seed = 0  # of optimizers that were pickled before there was one
    in_backward = staticmethod(nothing)  # gives what step_in_backward() has made
    _step_supports_amp_scaling = True  # GradScaler then leaves grad_scale and found_inf to step()

    def _start(self, params, given, defaults):
        """Make an optimizer of these arguments: `given` are those that were passed, `defaults` torch's."""
        refuse(given)
        options = {name: given.pop(name, defaults.get(name)) for name in OURS}
        self.dialect = options["dialect"]
        self.step_info, self._cores, self._note = StepInfo(False, None, None), None, Note()
        self._one_thread = OneThread(type(self).__name__)
        self.clip_norm, self.nonfinite = options["clip_norm"], options["nonfinite"]
        if self.clip_norm is not None or self.nonfinite != "propagate":
            refuse_zero(sys._getframe(2))
        self.zeroes_grad, self._seed = hyper.flag("zero_grad", options["zero_grad"]), hyper.seed("seed", options["seed"])
        super().__init__(params, self._defaults(given, defaults))

    def _defaults(self, given, defaults):
        """The entries of a group: torch's, then what torch lacks.  What was given wins over the dialect, this over torch."""
        kind, made = KINDS[self.kind], {name: value for name, value in defaults.items() if name not in OURS}
        ours = {**kind.defaults, **preset(self.dialect, kind.family)}
        for theirs, mine in self._names.items():
            if self.dialect is not None or theirs not in made:
                made[theirs] = tuple(ours[name] for name in mine) if isinstance(mine, tuple) else ours[mine]
        known = {name for mine in self._names.values() for name in ([mine] if isinstance(mine, str) else mine)}
        made = {**made, **{name: value for name, value in ours.items() if name not in known}, **given}
        self._checked(made)
        return made

    @property
    def _names(self):
        """torch's name of each hyper-parameter: ours, or a tuple of ours."""
        return NAMES[self.kind]

    def _checked(self, group):
        """The hyper-parameters of a group in our names; TypeError or ValueError that names one as torch does."""
        kind, rows = KINDS[self.kind], []
        for theirs, ours in self._names.items():
            value = frozen(theirs, group[theirs])
            if isinstance(ours, str):
                rows.append((ours, theirs, value))
                continue
            if not hasattr(value, "__len__"):
                raise TypeError(f"{theirs}={value!r} is {kind_of(value)}; it must be {len(ours)} numbers, such as "
                                f"{theirs}={tuple(kind.defaults[name] for name in ours)}")  # fmt: skip
            if len(value) != len(ours):
                raise ValueError(f"{theirs}={value!r} must be {len(ours)} numbers")
            rows += [(name, f"{theirs}[{k}]", value[k]) for k, name in enumerate(ours)]
        named = {name for name, _, _ in rows}
        rows += [(name, name, frozen(name, group[name])) for name in kind.defaults if name not in named]
        values = {name: kind.check_of(name)(said, no_function(said, value)) for name, said, value in rows}
        values = {name: meaning_of_true(self.dialect, name) if x is True else x for name, x in values.items()}
        state_names(self.kind, values)  # ValueError where they do not go together
        return values

    def add_param_group(self, param_group):
        """Add parameters, with hyper-parameters of their own where param_group has these, as torch's optimizers do."""
        misplaced = next((name for name in OURS if name in param_group), None) if isinstance(param_group, dict) else None
        if misplaced is not None:
            raise ValueError(f"{misplaced}={param_group[misplaced]!r} stands in a group of parameters; it is for all: "
                             f"pass {misplaced} to the constructor")  # fmt: skip
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            values, options = self._checked(group), options_of(group)
            for label, param in labelled(group):
                name = f"params[{len(self.param_groups) - 1}][{label!r}]"
                refuse_sums(param, name)
                refuse_undecided(param, name, options)
                halves = {"halves": True} if takes_halves(options) else {}
                memory_of(param).acquire(part_of(param), name, writable=True, **halves)
                stored_state(self.kind, values, options, param, name)
        except BaseException:
            del self.param_groups[-1]
            raise

    @property
    def clip_norm(self):
        """The bound of the norm of all gradients, or None."""
        return self._clip_norm

    @clip_norm.setter
    def clip_norm(self, value):
        value = None if value is None else hyper.above_zero("clip_norm", value)
        self._refuse_in_backward("clip_norm", value, None)
        self._clip_norm = value

    @property
    def seed(self):
        """What the random numbers of stochastic rounding depend on, beside steps and positions."""
        return self._seed

    @property
    def nonfinite(self):
        """What a step does where a gradient is NaN or infinite: "propagate", "skip" or "raise"."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value):
        value = hyper.on_nonfinite("nonfinite", value)
        self._refuse_in_backward("nonfinite", value, "propagate")
        self._nonfinite = value
        self._note.changed = True  # the cores are made anew

    def _refuse_in_backward(self, name, value, allowed):
        """ValueError where steps are made in the backward pass and this value is not the one that they can serve."""
        if value != allowed and self.in_backward() is not None:
            raise ValueError(f"{name}={value!r} looks at all gradients before the first update, which a step in the "
                             f"backward pass cannot do; call remove() of what step_in_backward() gave")  # fmt: skip

    # what each step looks at

    def _is_known(self):
        """Whether groups, hyper-parameters and states are those for which the cores were made, or only learning rates, the
        first of the values of each group, are others; the cores then take them over."""
        if self._cores is None or self._note.changed or len(self.param_groups) != len(self._known):
            return False
        rates, objects = False, [*self.state.values()]
        for group, (count, getter, known) in zip(self.param_groups, self._known, strict=True):
            params, values = group["params"], getter(group)
            if len(params) != count:
                return False
            objects += params
            if values != known:
                if values[1:] != known[1:] or type(values[0]) is not float:
                    return False
                rates = True
        if not same_items(objects, self._objects):
            return False
        if self._idle and any(grad is not None for grad in map(GRAD, self._idle)):
            return False
        if rates:
            self._take_rates()
        return True

    def _take_rates(self):
        """Give the cores the learning rates of all groups, which are all that has changed."""
        rates = [group["lr"] for group in self.param_groups]
        for core in self._cores:
            core.set_rates(rates)
        self._known = [(n, getter, (rate, *known[1:])) for rate, (n, getter, known) in zip(rates, self._known, strict=True)]

    def _renew(self, needs_state=lambda param: param.grad is not None):
        """Make the cores anew, or give them new hyper-parameters where nothing else has changed."""
        values = [self._checked(group) for group in self.param_groups]
        stored = [*map(options_of, self.param_groups)]
        for core in self._cores or ():
            core.lay_out_states()
        members = self._members(values, stored, needs_state)
        if not self._has_same(members) or not self._takes(values, stored):
            self._cores = None
            by_device = {}
            for member in members:
                by_device.setdefault(member.param.device, []).append(member)
            options = {"nonfinite": self.nonfinite, "zero_grad": self.zeroes_grad, "seed": self._seed}
            self._cores = [Core(self.kind, some, values, stored, options) for some in by_device.values()]
        self._know()

    def _members(self, values, stored, needs_state):
        """A Member for every parameter that has a state or needs one; what its state lacks is made."""
        members, end = [], 0
        for number, group in enumerate(self.param_groups):
            wanted = {"step", *state_names(self.kind, values[number]), *low(stored[number].get("master"))}
            for label, param in labelled(group):
                origin, end = end, end + param.numel()
                if not needs_state(param) and not self.state.get(param):
                    continue
                state = self.state[param]
                if type(state) is not State or state.note is not self._note:
                    state = self.state[param] = State(state, self._note)
                name = f"params[{number}][{label!r}]"
                refuse_stale_master(state, wanted, name)
                if not wanted <= state.keys():
                    complete(self.kind, values[number], stored[number], param, state, name)
                members.append(Member(number, label, param, state, origin))
        return members

    def _has_same(self, members):
        """Whether the cores have these members, with the states that they have now."""
        if self._cores is None or self._note.changed:
            return False
        mine = [member for core in self._cores for member in core.members]
        keys = [sorted((m.group, m.origin, id(m.param), id(m.state)) for m in some) for some in (mine, members)]
        return keys[0] == keys[1]

    def _takes(self, values, stored):
        """Give the cores new hyper-parameters; False where these ask for other states, or are to be stored otherwise."""
        kept = [[state_names(self.kind, values[g]) for g in core.groups] for core in self._cores]
        if kept != [core.names for core in self._cores] or any(core.stored != stored for core in self._cores):
            return False
        self._cores = [core.present() for core in self._cores]
        for core in self._cores:
            core.set_values(values)
        return True

    def _know(self):
        """Note what _is_known() compares with."""
        self._known = []
        for group in self.param_groups:
            names = [name for name in self.defaults if name not in FLAGS and name in group]
            values = tuple(frozen(name, group[name]) for name in names)
            self._known.append((len(group["params"]), itemgetter(*names), values))
        params = [param for group in self.param_groups for param in group["params"]]
        self._objects = [*self.state.values(), *params]
        updated = {id(param) for core in self._cores for param in core.params}
        self._idle = [param for param in params if id(param) not in updated]
        self._note.changed = False

    # a step

    def step(self, closure=None, **options):
        """Make a step from the gradients that the parameters have.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and the gradients, and returns the loss.

        Returns
        -------
        loss : tensor or None
            What closure returned.

        Raises
        ------
        RuntimeError
            When another thread uses this optimizer; this step is not made and not counted.
        """
        if options or not (closure is None or callable(closure)):
            raise misplaced(type(self).__name__, closure, options)
        if BEFORE_ALL or AFTER_ALL or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or profiling():
            return self._hooked_step() if closure is None else self._hooked_step(closure)
        if closure is not None:
            return self._plain_step(closure)
        self._update()

    step.__signature__ = inspect.signature(lambda self, closure=None: None)
    step.hooked = True  # torch shall not add its hooks and the entry of its profiler, 5 us, to every step

    def _plain_step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def _hooked_step(self, *closure):
        return WITH_HOOKS(self, *closure)

    def _update(self):
        """Make a step from the gradients that the parameters have; RuntimeError where another thread is in one."""
        grad_scale = 1.0
        with self._one_thread:
            if "found_inf" in self.__dict__:  # a GradScaler calls
                self._refuse_scaler()
                if self.found_inf is not None and float(self.found_inf):  # the int 0 without a gradient
                    self.step_info = StepInfo(False, None, None)
                    return
                if self.grad_scale is not None:
                    grad_scale = 1.0 / self.grad_scale.item()
            if self.in_backward is not nothing and self.in_backward():
                self.in_backward().finish()
            if not self._is_known():
                self._renew()
            self.step_info = self._step_cores(grad_scale)

    def _refuse_scaler(self):
        """ValueError where steps are made in the backward pass: they have used the gradients with their scale."""
        if self.in_backward() is not None:
            del self.found_inf, self.grad_scale  # a later step() is not that of a GradScaler
            raise ValueError("a GradScaler cannot serve steps in the backward pass, which have used the scaled gradients; "
                             "call remove() of what step_in_backward() returned before the backward pass")  # fmt: skip

    def _be_known(self):
        """Make sure that the cores are those of the present groups, hyper-parameters and states."""
        if not self._is_known():
            self._renew()

    def _step_cores(self, grad_scale):
        info = APPLIED
        for number, core in enumerate(self._cores):
            grads = list(map(GRAD, core.params))
            info = core.step(grads, grad_scale, self._clip_norm)
            if info is None:
                core = self._cores[number] = core.present()
                info = core.checked_step(grads, grad_scale, self.clip_norm)
        return info

    # the state

    def make_state(self):
        """Make the states of all parameters that require a gradient now, and not at their first step with one."""
        with self._one_thread:
            self._renew(lambda param: param.requires_grad)

    def share_memory(self):
        """Move all states, the numbers of steps included, into memory that processes share; torch's Adagrad has this."""
        with self._one_thread:
            self.make_state()
            for state in self.state.values():
                for name, value in state.items():
                    if name != "step" and torch.is_tensor(value):
                        part_of(value).share_memory_()
            for core in self._cores:
                core.share_counts()
            self._note.changed = True  # the states have moved

    def load_state_dict(self, state_dict, convert=None):
        """Take over what state_dict() of this class, or of the class of torch.optim with this name, gave.

        The numbers are copied.  Hyper-parameters that torch does not have keep their values, and so do state_format, master
        and rounding.  States must have the formats of this optimizer; torch.optim has its states in the dtype of the
        parameter.  A master that the dict lacks is made from its parameter.

        Parameters
        ----------
        state_dict : dict
        convert : "float32", "bf16", "fp16" or "q8", optional
            The format of states in state_dict that this optimizer keeps in another one.  They are decoded, and rounded to
            the nearest number of that format.

        Raises
        ------
        ValueError
            With nothing changed, where it does not fit this optimizer, or is of another class, or none of torch.
        """
        saved_formats.check("convert", convert)
        with self._one_thread:
            self._load(state_dict, convert)

    def _load(self, state_dict, convert):
        before, hook = dict(vars(self)), self.register_load_state_dict_pre_hook(held({*STATES, SHAPE}))
        try:
            super().load_state_dict(state_dict)
            for number, group in enumerate(self.param_groups):
                self._copy_loaded(number, group, convert)
        except BaseException:
            vars(self).update(before)
            raise
        finally:
            hook.remove()

    def _copy_loaded(self, number, group, convert):
        """Copy the loaded states of a group to memory of their own."""
        values, options = self._checked(group), options_of(group)
        for label, param in labelled(group):
            if param in self.state:
                name = f"params[{number}][{label!r}]"
                formats = stored_state(self.kind, values, options, param, name)
                self.state[param] = copied(KINDS[self.kind], param, self.state[param], name, formats, convert)

    def __getstate__(self):
        kept = ("dialect", "_clip_norm", "_nonfinite", "zeroes_grad", "_seed", "step_info")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state):
        states = {key: shown(x) if isinstance(x, dict) else x for key, x in state["state"].items()}
        super().__setstate__({**state, "state": defaultdict(dict, states)})
        self._cores, self._note = None, Note()
        self._one_thread = vars(self).get("_one_thread") or OneThread(type(self).__name__)  # load_state_dict() is in it
        for number, group in enumerate(self.param_groups):
            self._refuse_foreign(group, f"param_groups[{number}]")
            for name, value in self.defaults.items():  # what older versions, and torch, do not have
                group.setdefault(name, value)

    def _refuse_foreign(self, group, name):
        """ValueError where a group, or the state of one of its parameters, lacks what torch has always written for this
        class, and has what the class does not know: it is of another class.  Other additions, which torch lets people make,
        stay."""
        always = [name for name in self._names if name not in FILLED]
        refuse_foreign(type(self), group, always, {*self.defaults, "params", "param_names"}, name)
        always = state_names(self.kind, KINDS[self.kind].defaults)
        for label, param in labelled(group):
            if state := self.state.get(param):
                refuse_foreign(
                    type(self), state, always, {*STATES, SHAPE, "step"}, f"the state of {name}['params'][{label!r}]"
                )

    def state_dict(self):
        d = super().state_dict()
        return {**d, "state": {key: dict(x) if isinstance(x, State) else x for key, x in d["state"].items()}}


# not in the class: torch's function, whose code all optimizers share, must stay one that torch.compile looks into
WITH_HOOKS = torch.optim.Optimizer.profile_hook_step(Optimizer._plain_step)


def no_argument(kind, names, unknown, known):
    """The TypeError for an argument that a class with these NAMES lacks, and which may be a name of ours, or of another
    framework's."""
    ours = hyper.OUR_WORD.get(unknown, unknown)
    instead = next((theirs for theirs, mine in names.items() if ours == mine or ours in (*mine, " and ".join(mine))), None)
    said = f"; for {unknown} write {instead}" if instead in known else ""
    return TypeError(f"{kind} has no argument {unknown!r}{said}; it has {', '.join(known)}")


def misplaced(kind, closure, options):
    """The TypeError for what step() was given beside a closure, or as one."""
    for name, value in options.items():
        remedy = "it reads the gradients in param.grad of each parameter"
        if name in OURS:
            remedy = f"pass it to the constructor, {kind}(params, {name}={value!r})"
        elif name == "grad_scale":
            remedy = "a torch.amp.GradScaler gives it, by scaler.step(optimizer)"
        return TypeError(f"step() has no argument {name!r}: {remedy}")
    return TypeError(f"closure is {kind_of(closure)}; it must be callable or left out: step() reads the gradients "
                     f"in param.grad of each parameter, where loss.backward() writes them")  # fmt: skip


def refuse(given):
    """ValueError for an argument of torch's optimizers that fastrms lacks; foreach and fused say how torch loops, and do not
    matter here."""
    for name in ("capturable", "differentiable"):
        if given.get(name) not in (None, False):
            raise ValueError(f"{name}={given[name]!r}{REASONS[name]}")
    for name in ("foreach", "fused"):
        if given.get(name) not in (None, False, True):
            raise ValueError(f"{name}={given[name]!r} must be None, True or False")


def frozen(name, value):
    """A hyper-parameter as plain numbers, in place of tensors of one element."""
    if isinstance(value, (tuple, list)):
        return type(value)(frozen(name, x) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} is a tensor of {value.numel()} elements; it must have one")
    return float(value)


def no_function(name, value):
    """A hyper-parameter as it is; TypeError for a function, which an optimizer of fastrms takes as a learning rate."""
    if callable(value):
        raise TypeError(f"{name}={value!r} is callable; it must be a value: to change the learning rate from step to step, "
                        f"use torch.optim.lr_scheduler, such as its LambdaLR")  # fmt: skip
    return value


def labelled(group):
    """(label, parameter) pairs of a group: what error sentences call each, its name, or its index unless all have names of
    their own."""
    params, names = group["params"], group.get("param_names") or ()
    if not len(params) == len(names) == len({*names}):
        names = range(len(params))
    return zip(names, params, strict=True)


def copied(kind, param, state, name, formats, convert):
    """A loaded state in memory of its own, in the layout of the parameter, which error sentences call `name`.  formats: name
    -> Format of what its state shall have."""
    made = {}
    refuse_other_shape(state, param, name, " in the state_dict")
    for key, value in state.items():
        if key == "step" or not torch.is_tensor(value) or key not in STATES:
            made[key] = value.clone() if torch.is_tensor(value) else value
            continue
        if key in LOW.values() and key not in formats:
            raise ValueError(f"the state_dict has a {key} of {name}, which this optimizer would lose: make it with "
                             f"master={master_of(key, value)!r}")  # fmt: skip
        refuse_other_spread(value, param, f"{key} of {name}")
        if value.dtype is not torch.uint8 and value.shape != param.shape:
            raise ValueError(f"{key} of {name} in the state_dict has shape {tuple(value.shape)}, the parameter has "
                             f"{tuple(param.shape)}")  # fmt: skip
        format = formats.get(key, FLOAT)
        made[key] = new_state(param, [x for x in made.values() if torch.is_tensor(x) and x.dim()], 0.0, format)
        parts = part_of(made[key]), key, part_of(value), part_of(param), format
        loaded(*parts, key not in kind.not_negative, convert, name)
    made.pop(SHAPE, None)
    return {**made, SHAPE: shape_of(param)} if any(format.in_blocks for format in formats.values()) else made


def memory_of(param):
    """The module of fastrms.memory for this tensor."""
    return device if param.is_cuda else host
