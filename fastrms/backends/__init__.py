"""The backends by name, and what each of them offers.

The module of a backend has

available()     None, or the reason why it cannot be used here
update(recipe, step, grad_scale, param, grad, states)    one step on flat arrays, in place
Plan            a subclass of the Plan below
memory          the module of fastrms.memory for its arrays, where that is not host
"""

import importlib.util
import os
from typing import NamedTuple

from ..memory import device, host

OK, BUSY, OVERLAP, NOT_HELD, NONFINITE, STREAMING, NO_RATE, NOT_GATHERED = (
    0,
    1,
    2,
    5,
    6,
    7,
    9,
    10,
)  # what a Plan answers, as in csrc/fastrms_decl.h
ON_NONFINITE = ("propagate", "skip", "raise")  # in the order of csrc/fastrms_decl.h
HOST = ("c", "numba", "numpy")  # in the order of preference
NAMES = (*HOST, "cuda")
FOR_OWN_RULES = ("numba", "numpy", "cuda")


class Found(NamedTuple):
    """What a step found in the gradients before it wrote anything; None stands for what it did not look for.
    tensor: the index of the first tensor with a nonfinite element, -1 where there is none."""

    grad_norm: float | None
    nonfinite: int | None
    tensor: int


class Plan:
    """All tensors of one optimizer, bound to a backend: this class declares what every backend's Plan offers.

    The caller has checked all arguments, so a Plan trusts them; only overlapping buffers are found by the Plan itself.  A
    method that answers with a status has done all that it was asked for where this is OK.  Otherwise it has changed nothing:
    BUSY means that another thread is in a method, STREAMING that a streamed step is open (from stream_step, that none is),
    OVERLAP that two buffers would share a byte, NOT_HELD that there are no gradients, and NO_RATE that set_rates() gave no
    learning rate for this step.  NONFINITE is the exception: the step was left out, but change() has taken over what it was
    given.

    Parameters
    ----------
    params : list of Buffer
    states : list of lists of flat arrays
        The states of each param, in the order of its rule.
    recipe_of : list of int
        The index in recipes for each param.
    recipes : list of Recipe or OwnRecipe
    nonfinite : {"propagate", "skip", "raise"}
        What a step does about gradients that are not finite; with the last two it answers NONFINITE and updates nothing.
    zero_grad : bool
        Whether a step writes zeros over the gradients, also a step that "skip" leaves out.
    """

    steps: int  #: how many steps were made
    tensor_steps: list  #: how many updates each tensor has had
    most_rate_rows = 1  #: for how many steps set_rates() takes learning rates
    capturable = False  #: whether a CUDA graph may capture a step, for which bound gradients must stay held
    takes_pointers = False  #: whether change() takes a torch_reader.Reader as the gradients of a step

    def join(self, exchange):
        """Find norms and nonfinite elements together with other ranks from now on; exchange: a shards.Exchange."""
        raise NotImplementedError

    def bound_step(self):
        """(step, step_held, argument) for one step from the held gradients: step(argument) and step_held(argument, number)
        return a status.  step_held makes the step only while the plan holds the gradients that change() was told to hold
        under this number."""
        raise NotImplementedError

    def step_looking(self, number, grad_scale, clip_norm):
        """A step as change(run=True) makes it, from the gradients that are held under this number: (status, found), where
        found is a plain tuple in place of Found.  A backend without a short way for it answers NOT_HELD."""
        return NOT_HELD, None

    def addresses(self):
        """The addresses of the C function ``int fastrms_step(fastrms_plan *)`` and of its argument.  C backend only."""
        raise NotImplementedError

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        """Take over parameters, gradients and recipes, and make a step: all of it, or nothing (but see NONFINITE above).

        Parameters
        ----------
        params : list of Buffer, optional
            Where all parameters lie now.
        grads : list of Buffer, ndarray or None, or torch_reader.Reader, optional
            The gradients of this step, one per tensor; where it is None, the tensor and its step count stay as they are.
            Only a plan that takes_pointers is given a Reader.
        recipes : dict, optional
            Index -> Recipe, for the recipes that change.
        hold : int
            A number other than 0 where later steps may read grads, too; 0 where they may not.
        run : bool
            Whether to make a step.
        grad_scale : float
            Every gradient is multiplied by it.
        clip_norm : float, optional
            The norm of all grads * grad_scale is computed, and where it is larger than this, reduced to it.

        Returns
        -------
        status : int
        found : Found or None
            None where the step did not look at the gradients first.
        """
        raise NotImplementedError

    def set_rate(self, rate):
        """Give every recipe this learning rate for all steps from now on; returns a status."""
        raise NotImplementedError

    def set_rates(self, rates, first=0, rows=0):
        """Give every recipe a learning rate; returns a status.  New recipes, which bring their own, take the place of these.

        Parameters
        ----------
        rates : list of float
            One for each recipe; with rows, one row after the other.
        first, rows : int
            With rows, row r is for the step that comes after first + r steps; other steps are answered by NO_RATE.  Without,
            the rates are for all steps.
        """
        raise NotImplementedError

    def follow(self, groups):
        """Ask these Groups for the learning rates of all steps until other rates or recipes are given; returns whether the
        plan does that.  Their schedules depend on the step alone."""
        return False

    def stream_open(self):
        """Begin a step that is made tensor by tensor; returns a status."""
        raise NotImplementedError

    def stream_step(self, k, param, grad, rates, grad_scale):
        """Update tensor k from the Buffer grad; returns a status.  The first update counts the step.  param: the Buffer
        of the parameter where it has moved, else None; rates: the learning rate of each recipe, None for those of before."""
        raise NotImplementedError

    def stream_close(self):
        """End the streamed step, whether or not all tensors had their update."""
        raise NotImplementedError

    def copy(self, pairs, recipes=None, steps=None):
        """Copy flat arrays, (to, from) pairs, and take over recipes and step counts: all of it, or nothing.

        Parameters
        ----------
        pairs : list of pairs of flat arrays
        recipes : dict, optional
            As in change().
        steps : list of int, optional
            The step count of the plan, then that of each tensor.

        Returns
        -------
        status : int
        before : list of int or None
            The step counts as they were, in the same order.
        """
        raise NotImplementedError

    def pairs_of_storages(self, storages):
        """The pairs for copy() by which the plan takes over Storages of the same buffers with another seed, origin or
        rounding; one Storage or None for each tensor."""
        return [(self.storages, storages)]

    def steps_of(self, k):
        """How many updates tensor k has had."""
        raise NotImplementedError


def load(name):
    """The module of a backend.  Tools that freeze a program find each backend by these import statements."""
    if name == "c":
        from . import c as module
    elif name == "numba":
        from . import numba as module
    elif name == "numpy":
        from . import numpy as module
    else:
        from . import cuda as module
    return module


def find_spec(name):
    """importlib.util.find_spec, which raises where a stand-in without __spec__ took the place of a package.  Such a package
    is as good as absent."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:
        return None


def available_backends():
    """The backends that work here.

    Returns
    -------
    tuple of str
        Their names, in the order in which "auto" prefers them; "cuda", which "auto" takes for device arrays, is last.  Why
        one is missing is said by an optimizer that is made with ``backend=`` its name, and for C by show_config().
    """
    return tuple(name for name in NAMES if load(name).available() is None)


def choose(name, own_rule=None, array=None):
    """The backend module for name: "auto" takes "cuda" where an array is in device memory, else FASTRMS_BACKEND, else the
    first for the host that works here and runs an own rule."""
    source = f"backend={name!r}"
    if name == "auto" and array is not None and device.is_device_array(array):
        name, source = "cuda", "the arrays are in device memory, and backend='cuda'"
    elif name == "auto":
        name = os.environ.get("FASTRMS_BACKEND") or next(
            name for name in HOST if load(name).available() is None and (own_rule is None or name in FOR_OWN_RULES)
        )
        source = f"FASTRMS_BACKEND={name!r}"
    if name not in NAMES:
        raise ValueError(f"{source} is not one of 'auto', {', '.join(map(repr, NAMES))}")
    if own_rule is not None and name not in FOR_OWN_RULES:
        raise ValueError(f"{source} cannot run the rule of {own_rule}, which is Python: use 'numba', 'numpy' or 'cuda'")
    module = load(name)
    reason = module.available()
    if reason:
        raise RuntimeError(f"{source} is not available: {reason}")
    return module


def name_of(module):
    """The name of a backend module, as load() takes it."""
    return module.__name__.rpartition(".")[2]


def memory(module):
    """The module for the arrays of a backend: memory.host or memory.device."""
    return getattr(module, "memory", host)
