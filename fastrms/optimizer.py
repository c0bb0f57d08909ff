"""Optimizer, the base of them all: structure and groups of parameters, hyper-parameters, state, state_dict."""

from collections.abc import MutableMapping
from inspect import Parameter, Signature
from math import isfinite
from types import SimpleNamespace

import numpy as np

from . import backends, dialects, hyper, own_rules, rules
from .gradients import Bound
from .memory import host, placement, tree
from .recipes import rounded

OPTIONS = {
    "nonfinite": "propagate",
    "zero_grad": False,
    "backend": "auto",
    "stream": None,
    "capturable": False,
    "check": False,
}


class Group(MutableMapping):
    """The hyper-parameters of one group; setting one checks it and takes effect at the next step."""

    def __init__(self, optimizer, index, values):
        self._optimizer = optimizer
        self._index = index
        self._values = values

    def __getitem__(self, name):
        return self._values[name]

    def __setitem__(self, name, value):
        if name not in self._values:
            raise KeyError(f"{name!r} is not a hyper-parameter; there are {', '.join(self._values)}")
        self._optimizer._change([(self._index, name, value)])

    def __delitem__(self, name):
        raise TypeError("a hyper-parameter cannot be deleted")

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __repr__(self):
        return f"Group({self._values})"


class Optimizer(Bound):
    """Base of the optimizers: binding, checking, stepping, state.

    A rule of your own, for the backends "numba" and "numpy", is a subclass with

    defaults       its hyper-parameters and their values; lr may be a callable(step), first called with 0
    state_names    of the buffers it keeps beside each parameter
    coefficients(step, **hyper) -> dict     what the rule needs at update number `step` (from 1), computed in double
    rule(param, grad, *states, *coefficients)     returns the new param and states, in this order; called on scalars
                   (numba) or on arrays (numpy), so it has no `if`: see select, larger, clip, flush in fastrms.rules.
                   All arithmetic is in the dtype of param as long as every number in it is a coefficient.
    initial(h, state_name)     how a state starts; 0.0 unless given.

    grad arrives multiplied by grad_scale and the clip_norm factor.  nonfinite, zero_grad: as in fastrms.RMSProp.
    """

    defaults: dict = {}
    checks: dict = {}
    fixed: tuple = ()
    state_names: tuple = ()
    own_rule = None

    def __init_subclass__(cls):
        if "rule" in vars(cls):
            if getattr(cls.recipe, "__func__", None) is not Optimizer.recipe.__func__:
                raise TypeError(f"{cls.__name__} has a rule of its own; derive it from fastrms.Optimizer itself")
            cls.own_rule = own_rules.rule_of(cls)
        cls.family = next((c.__name__ for c in cls.__mro__ if c.__name__ in dialects.DIALECTS["torch"]), cls.__name__)
        keywords = {**cls.defaults, "groups": None, "dialect": None, **OPTIONS}
        cls.__signature__ = Signature(
            [Parameter("params", Parameter.POSITIONAL_OR_KEYWORD)]
            + [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in keywords.items()]
        )

    def __init__(self, params, *, groups=None, dialect=None, nonfinite="propagate", zero_grad=False, backend="auto",
                 stream=None, capturable=False, check=False, **options):  # fmt: skip
        if type(self) is Optimizer:
            raise TypeError("Optimizer is the base of the optimizers; make an RMSProp, AdaGrad, Adam, AdamW or RProp")
        self.dialect = dialect
        self._nonfinite, self._zero_grad = hyper.on_nonfinite("nonfinite", nonfinite), hyper.flag("zero_grad", zero_grad)
        self._structure, leaves, group_of, overrides = tree.arrange(params, groups)
        if not leaves:
            raise ValueError("params is empty: there is nothing to optimize")
        module = backends.choose(backend, self.own_rule, leaves[0])
        self.backend, self._memory = module.__name__.rpartition(".")[2], backends.memory(module)
        self._patterns = list(groups or ())
        self._names = self._structure.names("params")
        self._grad_names = self._structure.names("grads")
        self._refuse_equal_names()
        self._params = [self._memory.acquire(x, n, writable=True) for x, n in zip(leaves, self._names, strict=True)]
        self._memory.same_device(self._params, self._names)
        host.refuse_overlap(zip(self._names, self._params, strict=True))
        self._groups = [Group(self, k, self.resolve(dialect, {**options, **extra})) for k, extra in enumerate(overrides)]
        self._sets = sorted({(g, p.dtype) for g, p in zip(group_of, self._params, strict=True)}, key=str)
        self._set_of = [self._sets.index((g, p.dtype)) for g, p in zip(group_of, self._params, strict=True)]
        recipes = [self._recipe(group, dtype) for group, dtype in self._sets]
        self._rules = [recipe.rule for recipe in recipes]
        self._allocate()
        gradients = self._nonfinite, self._zero_grad
        self._bind_params(module, recipes, (*gradients, *hyper.cuda_options(self.backend, stream, capturable, check)))

    def _refuse_equal_names(self):
        """state_dict() goes by name."""
        names = [name for parts in self._structure.parts("params") for name, _ in parts]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ValueError(f"two keys of params read alike: {twice}; their state could not be told apart")

    # hyper-parameters

    @classmethod
    def resolve(cls, dialect, options):
        """All hyper-parameters, checked: the defaults, over them the dialect's, over them the explicit options."""
        unknown = next((name for name in options if name not in cls.defaults), None)
        if unknown is not None:
            raise TypeError(f"{cls.__name__} has no hyper-parameter {unknown!r}; it has {', '.join(cls.defaults)}")
        values = {**cls.defaults, **dialects.preset(dialect, cls.family), **options}
        return {name: cls._checked(dialect, name, value) for name, value in values.items()}

    @classmethod
    def _checked(cls, dialect, name, value):
        value = (cls.checks.get(name) or hyper.CHECKS.get(name, hyper.finite))(name, value)
        return dialects.meaning_of_true(dialect, name) if value is True else value

    def _recipe(self, group, dtype):
        return self.checked_recipe(self.at_step(self._groups[group]._values), dtype)

    @classmethod
    def checked_recipe(cls, h, dtype):
        """The recipe, with every number finite in dtype."""
        for name, value in vars(h).items():
            if isinstance(value, float) and not isfinite(rounded(value, dtype)):
                raise ValueError(f"{name}={value!r} is not finite in {dtype}")
        return cls.recipe(h, dtype)

    @classmethod
    def recipe(cls, h, dtype):
        """The recipe of a subclass with its own rule; those of fastrms have their own recipes."""
        if cls.own_rule is None:
            raise TypeError(f"{cls.__name__} has no rule; see help(fastrms.Optimizer)")
        return own_rules.recipe(cls.own_rule, cls.coefficients, vars(h), dtype)

    @staticmethod
    def initial(h, state_name):
        return 0.0

    @staticmethod
    def at_step(values, step=None):
        """Hyper-parameters as attributes; a callable lr evaluated at the number of steps done, 0 where that is None."""
        h = SimpleNamespace(**values)
        if callable(values["lr"]):
            h.lr = 0.0 if step is None else hyper.non_negative(f"lr({step})", values["lr"](step))
        return h

    def _change(self, changes):
        """Set hyper-parameters, (group, name, value) each: check everything, then hand the new recipes to the plan."""
        values = [group._values for group in self._groups]
        for index, name, value in changes:
            if name in self.fixed or name == "initial_value":
                raise ValueError(f"{name} is used once, when the state is made; make a new {type(self).__name__}")
            values[index] = {**values[index], name: self._checked(self.dialect, name, value)}
        recipes = self._recipes_for(values, self._state, f"setting {changes[0][1]}={changes[0][2]!r}")
        with self._by_one:
            self._change_plan(recipes=recipes, run=False)
            self._take_values(values)

    def _recipes_for(self, values, state, source):
        """The recipe of every set for new hyper-parameters of all groups; a schedule is asked at the next step only."""
        recipes = {}
        for k, (group, dtype) in enumerate(self._sets):
            h = self.at_step(values[group])
            recipes[k] = self.checked_recipe(h, dtype)
            if recipes[k].rule != self._rules[k]:
                raise ValueError(f"{source} turns {self._rules[k]} into {recipes[k].rule}, which has other state; "
                                 f"make a new {type(self).__name__}")  # fmt: skip
            self._refuse_zero_state(h, self._sets[k], state)
        return recipes

    def _take_values(self, values):
        for group, new in zip(self._groups, values, strict=True):
            group._values = new
        self._note_schedules()
        self._point_to(self._pointed)

    @property
    def groups(self):
        """The hyper-parameters of each group, as mappings; setting one takes effect at the next step."""
        return list(self._groups)

    @property
    def lr(self):
        """The learning rate: a float or callable(step); a list where the groups differ.  Setting one sets all groups."""
        rates = [group["lr"] for group in self._groups]
        return rates[0] if all(rate == rates[0] for rate in rates) else rates

    @lr.setter
    def lr(self, value):
        rates = value if isinstance(value, list) else [value] * len(self._groups)
        if len(rates) != len(self._groups):
            raise ValueError(f"lr={value!r} has {len(rates)} entries, there are {len(self._groups)} groups")
        self._change([(k, "lr", rate) for k, rate in enumerate(rates)])

    def __setattr__(self, name, value):
        if name in self.defaults and name != "lr":
            raise AttributeError(f"set {name} of a group: opt.groups[0][{name!r}] = {value!r}")
        super().__setattr__(name, value)

    def __reduce__(self):
        raise TypeError(
            f"a bound {type(self).__name__} cannot be copied or pickled; make a new one and load its state_dict()"
        )

    def __repr__(self):
        return (
            f"<{type(self).__name__} of {len(self._params)} tensor(s) on backend {self.backend!r}, {self.steps} steps made>"
        )

    # state

    def _allocate(self):
        """State buffers for every parameter."""
        self._state = []
        for k, (param, twin) in enumerate(zip(self._params, self._structure.twins(), strict=True)):
            group, _ = self._sets[self._set_of[k]]
            h = SimpleNamespace(**self._groups[group]._values)
            self._state.append(self.new_state(h, self._rules[self._set_of[k]], param, self._memory, twin))
        for group, dtype in self._sets:
            self._refuse_zero_state(SimpleNamespace(**self._groups[group]._values), (group, dtype), self._state)

    @classmethod
    def new_state(cls, h, rule, param, memory, twin=None):
        """Flat state buffers for a parameter (Buffer), where the memory module places them.  twin: the flat gradient, where
        it is known, which runs beside them, too."""
        state, known = {}, [] if twin is None else [twin]
        for name in rules.state_names(rules.find(rule)):
            state[name] = memory.place_beside(param, [*known, *state.values()])
            state[name].fill(cls.initial(h, name))
        return state

    @staticmethod
    def needs_positive_state(h, dtype):
        return False

    def _refuse_zero_state(self, h, owner, state):
        """AdaGrad without eps divides by the root of its sum: a zero in it would give 0/0."""
        if not self.needs_positive_state(h, owner[1]):
            return
        for k, tensor in enumerate(state):
            if self._sets[self._set_of[k]] == owner and any(
                (self._memory.on_host(flat) == 0).any() for flat in tensor.values()
            ):
                raise ValueError(f"eps={h.eps!r} and eps_root={h.eps_root!r} are both 0 in {owner[1]}, and the sum of "
                                 f"{self._names[k]} holds a 0: 0/0; set initial_value or an eps")  # fmt: skip

    def _shaped(self, k, flat):
        """A flat state buffer as an array in the shape and memory order of its parameter."""
        return host.shaped(flat, self._params[k])

    @property
    def state(self):
        """Mapping: state name -> the state arrays, in the structure of params (None where a tensor has no such state)."""
        names = dict.fromkeys(name for tensor in self._state for name in tensor)
        return {
            name: self._structure.build(
                [self._shaped(k, tensor[name]) if name in tensor else None for k, tensor in enumerate(self._state)]
            )
            for name in names
        }

    @property
    def steps(self):
        """Number of steps made."""
        return self._plan.steps

    def state_dict(self):
        """Everything but the parameters, as plain values and copies: hyper-parameters, step counts, state.  A resumed
        run has the bits of an unbroken one.  A schedule of fastrms.schedules is in it with its counters, any other callable
        lr is left out.  Pickle it together with the parameters, or see save()."""
        from . import schedules

        copies = [{name: np.empty(flat.size, flat.dtype) for name, flat in tensor.items()} for tensor in self._state]
        steps, *tensor_steps = self._copy(copies, self._state)
        return {
            "optimizer": type(self).__name__,
            "dialect": self.dialect,
            "steps": steps,
            "groups": schedules.described(self._groups),
            "patterns": list(self._patterns),
            "tensors": [
                {
                    "name": name,
                    "steps": tensor_steps[k],
                    "state": {state: part.of(self._shaped(k, flat)) for state, flat in copies[k].items()},
                }
                for k, parts in enumerate(self._structure.parts("params"))
                for name, part in parts
            ],
        }

    def _copy(self, to, source, recipes=None, steps=None):
        """Copy the state of all tensors, in one call of the backend; returns the step counts before."""
        pairs = [(mine[name], other[name]) for mine, other in zip(to, source, strict=True) for name in mine]
        status, before = self._plan.copy(pairs, recipes, steps)
        if status:
            raise self._refusal(status)
        return before

    def load_state_dict(self, d):
        """Take over what state_dict() gave, hyper-parameters included.  A callable lr of this optimizer stays, unless it is
        of fastrms.schedules and so is the saved one; a Plateau stays the object that it is, with the saved counters.
        Tensors are matched by name.  ValueError, with nothing changed, where d does not fit this optimizer."""
        try:
            values, flats, steps, dialect, plateaus = self._checked_state_dict(d)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"this is not a state_dict of fastrms: {error!r}") from None
        recipes = self._recipes_for(values, flats, "this state_dict")
        with self._by_one:
            self._copy(self._state, flats, recipes, steps)
            super().__setattr__("dialect", dialect)
            for plateau, loaded in plateaus:
                vars(plateau).update(vars(loaded))
            self._take_values(values)

    def _checked_state_dict(self, d):
        """Group values, flat state arrays, step counts, dialect, and (Plateau of this optimizer, saved one) pairs out of a
        state_dict, checked against this optimizer."""
        from . import schedules

        if d["optimizer"] != type(self).__name__:
            raise ValueError(f"the state_dict is of {d['optimizer']}, this is {type(self).__name__}")
        dialects.preset(d["dialect"], self.family)
        parts = self._structure.parts("params")
        for what, count in (("groups", len(self._groups)), ("tensors", sum(map(len, parts)))):
            if len(d[what]) != count:
                raise ValueError(f"the state_dict has {len(d[what])} {what}, this optimizer has {count}")
        if d["patterns"] != self._patterns:
            raise ValueError(f"the state_dict has groups by the patterns {d['patterns']}, "
                             f"this optimizer by {self._patterns}")  # fmt: skip
        groups, plateaus = schedules.revived(d["groups"], [group["lr"] for group in self._groups])
        values = [self._checked_group(k, saved, d["dialect"]) for k, saved in enumerate(groups)]
        by_name = {tensor["name"]: tensor for tensor in d["tensors"]}
        missing = next((name for named in parts for name, _ in named if name not in by_name), None)
        if missing is not None:
            raise ValueError(f"the state_dict has no {missing}; it has {', '.join(map(str, by_name))}")
        flats = [self._checked_state(k, named, by_name) for k, named in enumerate(parts)]
        steps = [hyper.step_count("steps", d["steps"], least=0), *(self._one_count(named, by_name) for named in parts)]
        return values, flats, steps, d["dialect"], plateaus

    def _checked_group(self, k, saved, dialect):
        """All hyper-parameters of group k; its own lr where the saved group has none."""
        mine = self._groups[k]._values
        if saved.keys() | {"lr"} != mine.keys():
            name = next(iter((saved.keys() | {"lr"}) ^ mine.keys()))
            raise ValueError(f"groups[{k}] of the state_dict and {type(self).__name__} do not both have {name!r}")
        checked = {name: self._checked(dialect, name, value) for name, value in saved.items()}
        return {name: checked.get(name, mine["lr"]) for name in mine}

    @staticmethod
    def _one_count(named, by_name):
        """The step count of a tensor, from those of the arrays in it."""
        counts = {hyper.step_count("steps", by_name[name]["steps"], least=0): name for name, _ in named}
        if len(counts) > 1:
            said = ", ".join(f"{count} steps for {name}" for count, name in counts.items())
            raise ValueError(f"the state_dict has {said}; in this FlatBuffer they are one tensor with one count")
        return next(iter(counts))

    def _checked_state(self, k, named, by_name):
        """The flat state arrays of tensor k, from the saved ones of the arrays in it."""
        mine = self._params[k]
        flats = {name: np.empty(mine.size, mine.dtype) for name in self._state[k]}
        for name, part in named:
            saved = by_name[name]["state"]
            if saved.keys() != flats.keys():
                raise ValueError(f"the state_dict has state {sorted(saved)} for {name}, "
                                 f"this optimizer has {sorted(flats)}")  # fmt: skip
            for state, array in saved.items():
                to = part.of(self._shaped(k, flats[state]))
                if type(array) is not np.ndarray or (array.dtype, array.shape) != (to.dtype, to.shape):
                    raise ValueError(
                        f"{state} of {name} in the state_dict must be an ndarray of {to.dtype}, shape {to.shape}"
                    )
                to[...] = array
        return flats

    def save(self, path):
        """Write state_dict() to a safetensors file (extra `checkpoint`), float values exact; the parameters are yours to
        save.  The file is written beside path, synced and renamed, so path is at any moment the old file or the new one;
        a writer that is killed may leave its part as path.<random>.tmp.  A symbolic link is followed.  OSError as the
        filesystem has it, with the old file untouched; ImportError without safetensors."""
        from . import checkpoint

        checkpoint.save(self, path)

    def load(self, path):
        """Take over what save() wrote, as load_state_dict() does; the next steps have the bits of an unbroken run.
        ValueError, naming path, where the file is truncated, foreign, or does not fit this optimizer; OSError as the
        filesystem has it; nothing has changed then."""
        from . import checkpoint

        checkpoint.load(self, path)

    def to_torch_state_dict(self):
        """What ``load_state_dict()`` of torch.optim's RMSprop, Adagrad, Adam, AdamW or Rprop takes, for an optimizer of
        as many groups, and the same parameters in the same order.  A schedule becomes its present rate.
        ValueError names a hyper-parameter that torch does not have (clip_value, nesterov, eps_root, ...), TypeError a rule;
        ImportError without torch."""
        from . import torch_state

        return torch_state.exported(self)

    def load_torch_state_dict(self, d):
        """Take over what ``state_dict()`` of torch's optimizer of this name gave, hyper-parameters included; its tensors
        may be anything that params may be.  What torch does not have gets its default; a callable lr of this optimizer
        stays.  Parameters are matched by their order.  steps becomes the largest step of a parameter.
        ValueError, with nothing changed, where d does not fit this optimizer; TypeError where torch has no such rule."""
        from . import torch_state

        torch_state.imported(self, d)

    def report(self):
        """What runs, on what, and which of your buffers lie badly: a text for people."""
        lines = [
            f"{type(self).__name__} on backend {self.backend!r}" + (f", dialect {self.dialect!r}" if self.dialect else "")
        ]
        for index, (group, dtype) in enumerate(self._sets):
            mine = [k for k, s in enumerate(self._set_of) if s == index]
            size = sum(self._params[k].size for k in mine)
            form = "general" if self._recipe(group, dtype).general else "neutral"
            states = len(rules.state_names(rules.find(self._rules[index])))
            lines.append(
                f"group {group}: rule {self._rules[index]}, {form} form, {dtype}, {len(mine)} tensor(s), {size} elements, "
                f"{(3 + 2 * states) * dtype.itemsize} bytes moved per element"
            )
        for k, grad in enumerate(self._bound or []):
            if grad is not None and self._memory is host and placement.collide(self._params[k], grad):
                lines.append(
                    f"{self._names[k]} and {self._grad_names[k]} start at nearly the same offset modulo 4 KiB and may evict "
                    f"each other from cache: start one of them some {placement.STEP} bytes further on"
                )
        return "\n".join(lines)
