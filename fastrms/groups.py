"""Groups of parameters with hyper-parameters of their own, and the recipes that these make for the tensors."""

from collections.abc import MutableMapping
from types import SimpleNamespace


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

    ``values`` lists the hyper-parameters of each group by name, ``rules`` the rule of each RecipeKey of the tensors, and
    ``scheduled`` the indices of the RecipeKeys whose learning rate is a schedule.
    """

    def __init__(self, family, tensors, values):
        self._family, self._tensors = family, tensors
        self.take(values)
        self.rules = [recipe.rule for recipe in self.recipes()]

    def take(self, values):
        """Replace the hyper-parameters of all groups."""
        self.values = values
        self._of_rate = {}  # index of a recipe -> (learning rate, recipe)
        self.scheduled = [k for k, key in enumerate(self._tensors.keys) if callable(values[key.group]["lr"])]

    def recipes(self, values=None):
        """The recipe of each RecipeKey.  A learning rate that is a schedule counts as 0 here; the next step evaluates it."""
        values = self.values if values is None else values
        keys = self._tensors.keys
        return [self._family.checked_recipe(self._family.at_step(values[key.group]), key.dtype) for key in keys]

    def initial(self, key, name):
        """The value at which a state of this name starts."""
        return self._family.initial(SimpleNamespace(**self.values[key.group]), name)

    def changed(self, dialect, changes):
        """The hyper-parameters of all groups after changes, a list of (group index, name, value)."""
        values = list(self.values)
        for index, name, value in changes:
            if name in self._family.fixed:
                raise ValueError(f"{name} is used once, when the state is made; make a new {self._family.__name__}")
            values[index] = {**values[index], name: self._family.checked(dialect, name, value)}
        return values

    def recipes_for(self, values, state, source):
        """Index -> recipe for new hyper-parameters of all groups; ValueError where they do not fit the state.  source: what
        the error says they come from."""
        recipes = self.recipes(values)
        for recipe, rule in zip(recipes, self.rules, strict=True):
            if recipe.rule != rule:
                raise ValueError(f"{source} turns {rule} into {recipe.rule}, which has other state; "
                                 f"make a new {self._family.__name__}")  # fmt: skip
        self.refuse_zero_state(values, state)
        return dict(enumerate(recipes))

    def refuse_zero_state(self, values, state):
        """AdaGrad without eps divides by the root of its sum: a zero in it would give 0/0."""
        for tensor, flats in zip(self._tensors, state, strict=True):
            key = self._tensors.keys[tensor.recipe]
            h = SimpleNamespace(**values[key.group])
            if self._family.needs_positive_state(h, key.dtype) and any(map(self._tensors.holds_zero, flats.values())):
                raise ValueError(f"eps={h.eps!r} and eps_root={h.eps_root!r} are both 0 in {key.dtype}, and the sum of "
                                 f"{tensor.name} holds a 0: 0/0; set initial_value or an eps")  # fmt: skip

    def scheduled_recipes(self, steps):
        """Index -> recipe of the next step, where lr is a schedule; it is made anew only where the rate has changed."""
        for k in self.scheduled:
            key = self._tensors.keys[k]
            h = self._family.at_step(self.values[key.group], steps)
            if k not in self._of_rate or self._of_rate[k][0] != h.lr:
                self._of_rate[k] = h.lr, self._family.checked_recipe(h, key.dtype)
        return {k: self._of_rate[k][1] for k in self.scheduled}
