"""A reader's own model: tensors of any shapes, updated in the way that the reader calls, beside naive NumPy and frameworks.

bound: the gradients are bound once and stay where they are.  step: each step is given other gradient arrays.  functional:
one call for each tensor.  torch: torch tensors, whose gradients are other tensors at each step, as after backward().
"""

import math
from functools import partial
from itertools import count, cycle
from statistics import median
from typing import NamedTuple

import numpy as np

import fastrms
from fastrms.memory import placement
from fastrms.schedules import Cosine

from . import peers, timing
from .baselines import Naive
from .check import FORMULAS, LR, WrongContender
from .contenders import BACKENDS, NAIVE, OPTIMIZERS, Contender, row, step_counter
from .problem import PLACES, CannotDo, first_value, state_names

HOWS = ("bound", "step", "functional", "torch")
CLIP = 1.0  # the norm; that of the gradients is larger, so that every step clips
SETS = 4  # of gradients, which follow each other
CHECKED, TIMED = 8, 10**7  # steps of the schedule: where it is checked the rate falls visibly, where it is timed for long
RATES = 256  # learning rates of a caller who changes them
STEPS, GROWTH = 3, -3.0  # how many steps are checked, and by what the gradients are multiplied after each
TOLERANCE = 0.01  # of lr
PLACED = (
    f"every tensor lies where NumPy allocates it; a model below {placement.LARGE >> 10} KiB is made {PLACES} times, and the "
    "median of these places counts"
)


class Asked(NamedTuple):
    """What is to be measured.  shapes: a tuple of tuples of numbers; clip: whether a step reduces the norm of all gradients
    to CLIP; schedule: whether the rate changes at each step."""

    rule: str
    shapes: tuple
    how: str = "bound"
    clip: bool = False
    schedule: bool = False
    dtype: str = "float32"

    def elements(self):
        return sum(map(math.prod, self.shapes))

    def in_words(self):
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.shapes[:6]) + ", ..." * (len(self.shapes) > 6)
        clip, schedule = f", clip_norm={CLIP}", ", lr=Cosine(...)"
        if self.how == "functional":  # these calls have neither
            clip, schedule = f", the norm of all gradients clipped to {CLIP} by grad_scale", ", another lr at each step"
        options = clip * self.clip + schedule * self.schedule
        return f"{self.rule}, {self.dtype}, {shapes} ({self.elements():,} elements), {self.how}{options}"


class Model:
    """The arrays of one contender: parameters, and sets of gradients which its steps use in turn."""

    def __init__(self, asked, steps):
        self.asked, self.rule, self.steps = asked, asked.rule, steps
        draw = partial(np.random.default_rng(0).standard_normal, dtype=np.dtype(asked.dtype))
        self.params = [draw(shape) for shape in asked.shapes]
        self.sets = [[draw(shape) for shape in asked.shapes] for _ in range(1 if asked.how == "bound" else SETS)]
        self.lr = Cosine(LR[asked.rule], steps) if asked.schedule else LR[asked.rule]

    def states(self):
        """New states of each tensor."""
        values = [first_value(name) for name in state_names(self.rule)]
        return [[np.full_like(param, value) for value in values] for param in self.params]

    def rates(self):
        """The options with which a function is called at each step: with a schedule the rate, else none.  The rates are
        computed beforehand, since the schedule is the caller's; they come again after RATES steps."""
        return cycle([{"lr": self.lr(step)} for step in range(RATES)] if self.asked.schedule else [{}])


def naive(model):
    """The formulas of the textbooks, for one tensor after the other."""
    update, sets, rates = getattr(Naive, model.rule), cycle(model.sets), model.rates()
    tensors = [(p, s, step_counter(model.rule)) for p, s in zip(model.params, model.states(), strict=True)]

    def step():
        grads, rate = next(sets), next(rates)
        if model.asked.clip:
            norm = np.sqrt(sum((grad**2).sum() for grad in grads))
            if norm > CLIP:
                grads = [grad * (CLIP / norm) for grad in grads]
        for (param, states, steps), grad in zip(tensors, grads, strict=True):
            update(param, grad, *states, **steps, **rate)

    return Contender(NAIVE, step, lambda: model.params)


def optimizer(backend, name, model, assigned=False):
    """An optimizer of fastrms.  assigned: opt.lr is set before each step, in place of a schedule."""
    rates, options = model.rates(), {"clip_norm": CLIP} if model.asked.clip else {}
    on_torch = Tensors(model) if model.asked.how == "torch" else None
    gradients = on_torch.backward if on_torch else partial(next, cycle(model.sets))
    params = on_torch.params if on_torch else model.params
    opt = OPTIMIZERS[model.rule](params, backend=backend, lr=LR[model.rule] if assigned else model.lr)

    def step():
        opt.step(gradients(), **options)

    if model.asked.how == "bound":
        opt.bind(model.sets[0])
        step = partial(opt.step, **options) if options else opt.step

    def assigning():
        opt.lr = next(rates)["lr"]
        step()

    return Contender(name, assigning if assigned else step, lambda: model.params)


def functional(backend, name, model):
    """The functions on raw arrays; the caller takes the norm."""
    update, sets, rates, numbers = getattr(fastrms, model.rule), cycle(model.sets), model.rates(), count(1)
    tensors = list(zip(model.params, model.states(), strict=True))
    if backend != fastrms.available_backends()[0]:  # which is taken where none is named
        update = partial(update, backend=backend)

    def step():
        grads, options = next(sets), next(rates)
        if model.rule == "adam":
            options["step"] = next(numbers)
        if model.asked.clip:
            norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
            options["grad_scale"] = min(1.0, CLIP / norm)
        for (param, states), grad in zip(tensors, grads, strict=True):
            update(param, grad, *states, **options)

    return Contender(name, step, lambda: model.params)


class Tensors:
    """The model's arrays as torch's Parameters and gradients, in the same memory."""

    def __init__(self, model):
        torch = peers.load("torch")
        self.params = [torch.nn.Parameter(torch.from_numpy(param)) for param in model.params]
        self.sets = cycle([[torch.from_numpy(grad) for grad in grads] for grads in model.sets])
        if model.asked.how == "bound":
            self.backward()

    def backward(self):
        """Give each Parameter its next gradient, as backward() does, and return the gradients."""
        for param, grad in zip(self.params, next(self.sets), strict=True):
            param.grad = grad
        return [param.grad for param in self.params]


def of_torch(variant, model):
    """An optimizer of torch.optim, with torch's own clipping and schedule."""
    torch, tensors = peers.load("torch"), Tensors(model)
    setting, rules = peers.VARIANTS[variant]
    if model.rule not in rules:
        raise CannotDo(f"{variant} has no {OPTIMIZERS[model.rule].__name__}")
    name, settings = peers.TORCH[model.rule]
    opt = getattr(torch.optim, name)(tensors.params, **settings, **setting)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, model.steps) if model.asked.schedule else None

    def step():
        if model.asked.how != "bound":
            tensors.backward()
        if model.asked.clip:
            torch.nn.utils.clip_grad_norm_(tensors.params, CLIP)
        opt.step()
        if schedule:
            schedule.step()

    return Contender(variant, step, lambda: model.params)


def of_optax(model):
    """optax' update of all tensors as one jitted function, with its own clipping and schedule."""
    optax = peers.load("optax")
    import jax

    if model.rule not in peers.OPTAX:
        raise CannotDo("optax's RProp moves one step late (optax#1725)")
    settings = dict(peers.OPTAX[model.rule])
    if model.asked.schedule:
        settings["learning_rate"] = optax.cosine_decay_schedule(settings["learning_rate"], model.steps)
    rule = getattr(optax, model.rule)(**settings)
    if model.asked.clip:
        rule = optax.chain(optax.clip_by_global_norm(CLIP), rule)
    update, params = peers.jitted(rule), [jax.numpy.array(param) for param in model.params]
    own, sets = [params, rule.init(params)], []

    def changed():
        sets[:] = [[jax.numpy.array(grad) for grad in grads] for grads in model.sets]

    changed()
    turn = cycle(range(len(sets)))

    def step():
        own[:] = jax.block_until_ready(update(*own, sets[next(turn)]))

    return Contender("optax", step, lambda: own[0], changed=changed)


def check(model, contender):
    """Make some steps, with larger gradients each time, and compare the parameters with the formula in float64."""
    wanted = after_steps(model)
    for _ in range(STEPS):
        contender.step()
        for grad in [grad for grads in model.sets for grad in grads]:
            grad *= GROWTH
        contender.changed()
    for k, (found, value) in enumerate(zip(contender.read(), wanted, strict=True)):
        off = np.abs(np.asarray(found) - value).max(initial=0)
        if not off <= TOLERANCE * LR[model.rule]:
            raise WrongContender(f"{contender.name} is wrong: {model.asked.in_words()}: tensor {k} is off by {off}")


def after_steps(model):
    """The parameters after the steps of a check, by the formula of the rule."""
    tensors = [[buffer.astype(np.float64) for buffer in (p, *s)] for p, s in zip(model.params, model.states(), strict=True)]
    for number, rate in zip(range(STEPS), model.rates(), strict=False):
        grads = [grad.astype(np.float64) * GROWTH**number for grad in model.sets[number % len(model.sets)]]
        norm = math.sqrt(sum(np.vdot(grad, grad) for grad in grads))
        scale = min(1.0, CLIP / norm) if model.asked.clip else 1.0
        for k, grad in enumerate(grads):
            tensors[k] = FORMULAS[model.rule](number + 1, scale * grad, *tensors[k], **rate)
    return [param for param, *_ in tensors]


def makers(asked, threads):
    """Name -> function of a Model: naive NumPy, and fastrms on every backend."""
    found, make = {NAIVE: naive}, functional if asked.how == "functional" else optimizer
    for backend in (backend for backend in BACKENDS if backend in fastrms.available_backends()):
        name = row(backend, threads)
        found[name] = partial(make, backend, name)
    if asked.schedule and asked.how != "functional":
        found[f"{name}, opt.lr = x"] = partial(make, backend, f"{name}, opt.lr = x", assigned=True)
    return found


def frameworks(asked):
    """(name -> function of a Model, name -> why it is missing) of the frameworks."""
    known = {variant: partial(of_torch, variant) for variant in peers.VARIANTS}
    if asked.how != "torch":
        known["optax"] = of_optax
    installed, reasons = peers.available(list(known))
    return {name: known[name] for name in installed}, reasons


def ready(make, asked):
    """The contender on a new model, after another on such a model was checked.  It has made its first step, which may
    compile."""
    checked = Model(asked, CHECKED)
    check(checked, make(checked))
    contender = make(Model(asked, TIMED))
    contender.step()
    return contender


def measure(asked, seconds, threads):
    """(name -> nanoseconds of a step in each round, name -> why it does not take part).  A small model is made several
    times, at other places of memory; the frameworks, whose calls take far longer than its update, make it once."""
    others, reasons = frameworks(asked)
    small = asked.elements() * np.dtype(asked.dtype).itemsize < placement.LARGE
    made = {
        name: [ready(make, asked) for _ in range(PLACES if small else 1)] for name, make in makers(asked, threads).items()
    }
    for name, make in others.items():
        try:
            made[name] = [ready(make, asked)]
        except CannotDo as error:
            reasons[name] = str(error)
    samples, _ = timing.sampled({name: [c.step for c in places] for name, places in made.items()}, seconds)
    return {name: timing.middle(places) for name, places in samples.items()}, reasons


class Row(NamedTuple):
    """Microseconds of a step, the median and the 10th and 90th percentile over the rounds, and how many times as fast as
    naive NumPy a step is: the median of the ratios of each round."""

    contender: str
    median: float
    low: float
    high: float
    over_naive: float


def rows(samples):
    for name, taken in samples.items():
        low, high = np.quantile(taken, [0.1, 0.9]) / 1e3
        ratio = median(slow / fast for slow, fast in zip(samples[NAIVE], taken, strict=True))
        yield Row(name, median(taken) / 1e3, float(low), float(high), ratio)
