"""The attributes of an optimizer: which can be set, which dir() shows, and what to write for those that it lacks."""

import inspect

from . import hyper
from .family import Family
from .words import shown


class Instead:
    """An attribute that people know from elsewhere: reading it says what to write here."""

    def __init__(self, sentence):
        self._sentence = sentence

    def __set_name__(self, owner, name):
        self._name = name

    def __get__(self, instance, owner=None):
        raise AttributeError(f"{owner.__name__} has no attribute {self._name!r}: {self._sentence}")


class Names:
    """The part of an optimizer that guards its attributes."""

    __slots__ = ()

    param_groups = Instead("the groups are opt.groups, and opt.groups[0]['lr'] = 0.1 takes effect at the next step")
    add_param_group = Instead("parameters cannot be added; make a new optimizer, of all of them or of the new ones")
    minimize = Instead("compute the gradients, then call opt.step(grads)")
    apply_gradients = Instead("call opt.step(grads), with grads in the structure of params")
    iterations = Instead("the number of steps made is opt.steps")
    learning_rate = Instead("the learning rate is opt.lr")

    def __setattr__(self, name, value):
        if name == "lr" or name[:1] == "_" or self._declares(name):
            return object.__setattr__(self, name, value)
        if name in self.defaults:
            raise AttributeError(f"set {name} of a group: opt.groups[0][{name!r}] = {shown(value)}")
        if any(name in vars(c) for c in type(self).__mro__):
            getattr(self, name)  # an Instead says what to write
            raise AttributeError(f"{name} of an optimizer cannot be set; make a new {type(self).__name__}")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{hyper.said_instead(name)}")

    @classmethod
    def _declares(cls, name):
        """Whether a user's subclass declares this attribute in its class body."""
        foreign = [c for c in cls.__mro__ if not f"{c.__module__}.".startswith("fastrms.") and c is not object]
        return any(name in vars(c) or name in inspect.get_annotations(c) for c in foreign)

    def __dir__(self):
        hidden = {*vars(Family), *vars(Names), "coefficients", "family", "rule"}
        return sorted(name for name in super().__dir__() if name[:2] == "__" or not (name in hidden or name[0] == "_"))
