"""Groups of parameters with hyper-parameters of their own, and the recipes that these make for the tensors."""

from collections.abc import MutableMapping
from math import inf
from types import SimpleNamespace

from . import hyper
from .family import OPTIONS


class Group(MutableMapping):
    """The hyper-parameters of one group; setting one checks it and takes effect at the next step."""

    __slots__ = ("_index", "_optimizer")

    def __init__(self, optimizer, index):
        self._optimizer, self._index = optimizer, index

    @property
    def _values(self):
        return self._optimizer._groups.values[self._index]

    def __getitem__(self, name):
        return self._values[name]

    def __setitem__(self, name, value):
        self.update({name: value})

    def update(self, other=(), **values):
        """Set several hyper-parameters at once, or none where one of them is refused."""
        values = dict(other, **values)
        unknown = next((name for name in values if name not in self._values), None)
        if unknown in OPTIONS:
            raise ValueError(f"{unknown} is used once, when the optimizer is made: make a new one with {unknown}=..., and "
                             f"load the state_dict() of this one into it, with convert= where states were stored in another "
                             f"format")  # fmt: skip
        if unknown is not None:
            raise KeyError(f"{unknown!r} is not a hyper-parameter; there are {', '.join(self._values)}")
        if values:
            self._optimizer._change([(self._index, name, value) for name, value in values.items()])

    def __delitem__(self, name):
        raise TypeError("a hyper-parameter cannot be deleted")

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def __repr__(self):
        return f"Group({self._values})"


class Groups:
    """The hyper-parameters of all groups of an optimizer.

    ``values`` lists the hyper-parameters of each group by name, and ``recipes`` the recipe of each RecipeKey of the tensors,
    whose learning rate may have changed since; ``rules`` has their rules.  ``scheduled`` is True where a learning rate is a
    schedule, ``foreseen`` where all schedules depend on the step alone.  Up to ``free_up_to``, a learning rate may be set
    for all groups without another check; it is negative where none may.
    """

    def __init__(self, family, tensors, values):
        self._family, self._tensors = family, tensors
        self.take(values, self._made(values))
        self.rules = [recipe.rule for recipe in self.recipes]

    def take(self, values, recipes=None):
        """Replace the hyper-parameters of all groups.  recipes: those that they make, None where only a rate has changed."""
        self.values, self._asked = values, (None, None)
        if recipes is not None:
            self.recipes = list(recipes)
            self._most_rates = [recipe.most_rate for recipe in self.recipes]
        keys = self._tensors.keys
        self.scheduled = any(callable(values[key.group]["lr"]) for key in keys)
        self.foreseen = self.scheduled and all(map(is_foreseen, (values[key.group]["lr"] for key in keys)))
        self.free_up_to = -1.0 if self.scheduled or "lr" in self._family.fixed else min(self._most_rates)

    def _made(self, values):
        """The recipe of each RecipeKey.  A learning rate that is a schedule counts as 0 here; each step evaluates it."""
        return [self._recipe(key, values, values[key.group]["lr"]) for key in self._tensors.keys]

    def _recipe(self, key, values, rate, step=None):
        """The recipe of a RecipeKey for a learning rate, that of a schedule after `step` steps; ValueError where a
        coefficient would not be finite in its dtype."""
        h, at = self._family.at_step({**values[key.group], "lr": rate}), "" if step is None else f"lr({step})"
        return checked_in(key.group, values, self._family.checked_recipe, h, key.dtype, at=at)

    def _checked_rate(self, k, values, rate, step=None):
        """A learning rate of RecipeKey k; ValueError where a coefficient would not be finite in its dtype."""
        if rate > self._most_rates[k]:
            self._recipe(self._tensors.keys[k], values, rate, step)
        return rate

    def constant_rates(self, values):
        """The learning rate of each RecipeKey, None where it is a schedule."""
        rates = [values[key.group]["lr"] for key in self._tensors.keys]
        return [None if callable(rate) else self._checked_rate(k, values, rate) for k, rate in enumerate(rates)]

    def ask(self, steps):
        """The learning rate of each RecipeKey for the step that comes after `steps` steps.  Schedules are evaluated, and
        rates() gives the same rates for this step without evaluating them again."""
        self._asked = None, None
        self._asked = steps, self.rates(steps, 1)
        return self._asked[1]

    def rates(self, steps, rows):
        """The learning rate of each RecipeKey for `rows` steps, the first of which comes after `steps` steps, one row after
        the other; schedules are evaluated."""
        if (steps, 1) == (self._asked[0], rows):
            return self._asked[1]
        rates, keys = [], self._tensors.keys
        for step in range(steps, steps + rows):
            rate_of = {}
            for k, key in enumerate(keys):
                if key.group not in rate_of:
                    rate_of[key.group] = self._rate_at(key.group, step)
                rates.append(self._checked_rate(k, self.values, rate_of[key.group], step))
        return rates

    def _rate_at(self, group, step):
        rate = self.values[group]["lr"]
        if callable(rate):
            rate = rate(step)
            if type(rate) is not float or not 0 <= rate < inf:
                return checked_in(group, self.values, hyper.non_negative, f"lr({step})", rate)
        return rate

    def initial(self, key, name):
        """The value at which a state of this name starts."""
        return self._family.initial(SimpleNamespace(**self.values[key.group]), name)

    def changed(self, dialect, changes):
        """The hyper-parameters of all groups after changes, a list of (group index, name, value)."""
        values = list(self.values)
        for index, name, value in changes:
            if name in self._family.fixed:
                raise ValueError(f"{name} is used once, when the state is made; make a new {self._family.__name__}")
            checked = checked_in(index, values, self._family.checked, dialect, name, value)
            values[index] = {**values[index], name: checked}
        return values

    def recipes_for(self, values, state, source):
        """Index -> recipe for new hyper-parameters of all groups; ValueError where they do not fit the state.  source: what
        the error says they come from."""
        recipes = self._made(values)
        for recipe, rule in zip(recipes, self.rules, strict=True):
            if recipe.rule != rule:
                raise ValueError(f"{source} turns {rule} into {recipe.rule}, which has other state; "
                                 f"make a new {self._family.__name__}")  # fmt: skip
        self.refuse_zero_state(values, state)
        return dict(enumerate(recipes))

    def refuse_zero_state(self, values, state):
        """AdaGrad without eps divides by the root of its sum: a zero in it would give 0/0."""
        keys = [(SimpleNamespace(**values[key.group]), key.dtype) for key in self._tensors.keys]
        needs = [self._family.needs_positive_state(h, dtype) for h, dtype in keys]
        for tensor, flats in zip(self._tensors, state, strict=True):
            if needs[tensor.recipe] and any(self._tensors.holds_zero(flat, tensor.param.size) for flat in flats.values()):
                h, dtype = keys[tensor.recipe]
                raise ValueError(f"eps={h.eps!r} and eps_root={h.eps_root!r} are both 0 in {dtype}, and the sum of "
                                 f"{tensor.name} holds a 0: 0/0; set initial_value or an eps")  # fmt: skip


def resolved(family, dialect, given, patterns):
    """The hyper-parameters of all groups, checked.  given: for each group the options that it was given, by name; patterns:
    those of the groups from 1, if they go by pattern."""
    labels = [None, *(f"groups[{pattern!r}]" for pattern in patterns)] if patterns else [None] * len(given)
    return [
        checked_in(index, given, family.resolve, dialect, options, label=label)
        for index, (options, label) in enumerate(zip(given, labels, strict=True))
    ]


def checked_in(index, groups, check, *arguments, at="", label=None):
    """check(*arguments) for the group with this index.  In front of its errors stand `at` and, where there are several
    groups, the label or the index."""
    try:
        return check(*arguments)
    except (TypeError, ValueError) as error:
        where = " of ".join(filter(None, (at, (label or f"group {index}") if len(groups) > 1 else "")))
        if where:
            error.args = (f"{where}: {error}",)
        raise


def is_foreseen(rate):
    """Whether the learning rates of all steps are known: that of a schedule which depends on the step alone."""
    return not callable(rate) or vars(type(rate)).get("depends_on_step_alone", False)
