"""What the optimizers differ in: their hyper-parameters, and the recipes that these make.  Nothing here knows a tensor."""

from inspect import Parameter, Signature
from math import isfinite
from types import SimpleNamespace

from . import dialects, hyper, own_rules, recipes

OPTIONS = {  # the arguments of every optimizer beside its hyper-parameters
    "state": None,
    "groups": None,
    "dialect": None,
    "nonfinite": "propagate",
    "zero_grad": False,
    "state_format": None,
    "master": None,
    "rounding": "stochastic",
    "param_copy": None,
    "seed": 0,
    "shards": None,
    "backend": "auto",
    "stream": None,
    "capturable": False,
    "check": False,
}


class Family:
    """The part of an optimizer's class that is declared or computed from hyper-parameters alone."""

    __slots__ = ()

    defaults: dict = {}
    checks: dict = {}  # for hyper-parameters whose range differs from that in hyper.CHECKS
    fixed: tuple = ("initial_value",)  # hyper-parameters that are used once, when the state is made
    _numbers = None  # the Numbers of recipes.py for a family of fastrms; None for own rules
    state_names: tuple = ()
    not_negative: tuple = ()  # states in which a negative number or NaN can only be damage
    trusts_state = False  # whether state= may hold anything that an optimizer makes: NaN, formats, masters
    own_rule = None

    def __init_subclass__(cls):
        if "rule" in vars(cls):
            if cls._numbers is not None:
                raise TypeError(f"{cls.__name__} has a rule of its own; derive it from fastrms.Optimizer itself")
            cls.own_rule = own_rules.rule_of(cls)
        ours = (c.__name__ for c in cls.__mro__ if c.__module__ == "fastrms.optimizers")
        cls.family = next(ours, f"{cls.__name__} (a rule of your own)")  # dialects and torch's state_dict go by it
        keywords = [Parameter(n, Parameter.KEYWORD_ONLY, default=v) for n, v in {**cls.defaults, **OPTIONS}.items()]
        if not cls.defaults:  # stands for what a subclass will declare
            keywords.append(Parameter("options", Parameter.VAR_KEYWORD))
        cls.__signature__ = Signature([Parameter("params", Parameter.POSITIONAL_OR_KEYWORD), *keywords])

    @classmethod
    def resolve(cls, dialect, options):
        """All hyper-parameters, checked.  The dialect overrides the defaults, and explicit options override both."""
        unknown = next((name for name in options if name not in cls.defaults), None)
        if unknown in OPTIONS:
            raise TypeError(f"{unknown} is an option of a whole {cls.__name__}: pass it to the constructor, "
                            f"{cls.__name__}(params, {unknown}=...)")  # fmt: skip
        if unknown is not None:
            said = hyper.said_instead(unknown, cls.defaults)
            raise TypeError(f"{cls.__name__} has no hyper-parameter {unknown!r}{said}; it has {', '.join(cls.defaults)}; "
                            f"its options are {', '.join(OPTIONS)}")  # fmt: skip
        values = {**cls.defaults, **dialects.preset(dialect, cls.family), **options}
        return {name: cls.checked(dialect, name, value) for name, value in values.items()}

    @classmethod
    def check_of(cls, name):
        """The function that checks a hyper-parameter by itself: check(name, value) gives the value that is kept."""
        return cls.checks.get(name) or hyper.CHECKS.get(name, hyper.finite)

    @classmethod
    def checked(cls, dialect, name, value):
        """One hyper-parameter's value in the form in which it is kept; TypeError or ValueError where it may not have it."""
        value = cls.check_of(name)(name, value)
        return dialects.meaning_of_true(dialect, name) if value is True else value

    @classmethod
    def implied(cls):
        """Name -> state of the flags that, on raw arrays, follow from whether this state is passed."""
        return {name: state for state, name in cls._numbers.optional.items() if cls.defaults[name] is False}

    @staticmethod
    def at_step(values, step=None):
        """Hyper-parameters as attributes.  A callable lr is evaluated at the number of steps done; it is 0 for None."""
        h = SimpleNamespace(**values)
        if callable(values["lr"]):
            h.lr = 0.0 if step is None else hyper.non_negative(f"lr({step})", values["lr"](step))
        return h

    @classmethod
    def checked_recipe(cls, h, dtype):
        """The recipe of h; ValueError where a number of h is not finite in dtype."""
        for name, value in vars(h).items():
            if isinstance(value, float) and not isfinite(recipes.rounded(value, dtype)):
                raise ValueError(f"{name}={value!r} is not finite in {dtype}")
        return cls.recipe(h, dtype)

    @classmethod
    def recipe(cls, h, dtype):
        """The recipe of h, whose numbers are finite in dtype."""
        if cls._numbers is not None:
            return recipes.recipe(cls._numbers, h, dtype)
        if cls.own_rule is None:
            raise TypeError(f"{cls.__name__} has no rule; see help(fastrms.Optimizer)")
        return own_rules.recipe(cls.own_rule, cls.coefficients, vars(h), dtype)

    @staticmethod
    def initial(h, state_name):
        """The value at which a state starts."""
        return 0.0

    @staticmethod
    def needs_positive_state(h, dtype):
        """Whether a zero in the state would give 0/0."""
        return False
