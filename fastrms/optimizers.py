"""RMSProp, AdaGrad, Adam, AdamW and RProp: hyper-parameters -> coefficients of a rule, in double, once per step.

The mathematics is in rules.py; structure, groups and state are in optimizer.py, steps in gradients.py.
"""

import math
from types import SimpleNamespace

from . import hyper, recipes
from .optimizer import Optimizer
from .recipes import DIVIDE, OVER_ROOT, TIMES_ROOT, Correction, rounded

COMMON = {
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
    "clip_value": None,
}


def common(h, dtype):
    """The coefficients that every rule shares."""
    clip = math.inf if h.clip_value is None else h.clip_value
    if rounded(clip, dtype) == 0:
        raise ValueError(f"clip_value={clip!r} is 0 in {dtype}")
    return {
        "grad_scale": -1.0 if h.maximize else 1.0,
        "clip_low": -clip,
        "clip_high": clip,
        "weight_decay": 0.0 if h.decoupled else h.weight_decay,
        "decay": h.lr * h.weight_decay if h.decoupled else 0.0,
    }


def needs_general(h):
    return h.clip_value is not None or (h.weight_decay > 0 and not h.decoupled) or h.eps_root > 0


def decaying(h, name, dtype):
    """A decay rate and its complement as the dtype holds them; the rate must stay below 1."""
    rate = rounded(getattr(h, name), dtype)
    if rate >= 1:
        raise ValueError(f"{name}={getattr(h, name)!r} rounds to 1 in {dtype}")
    return rate, rounded(1 - getattr(h, name), dtype)


def refuse_zero_eps(h, dtype):
    if rounded(h.eps, dtype) == 0 and rounded(h.eps_root, dtype) == 0:
        raise ValueError(f"eps={h.eps!r} and eps_root={h.eps_root!r} are both 0 in {dtype}: a zero average would give 0/0")


class RMSProp(Optimizer):
    """Divide each gradient by a running root mean square of it (Hinton 2012, Coursera lecture 6e).

    ::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param          (prepared gradient)
        square_avg = rho*square_avg + (1 - rho)*g**2
        w = square_avg            centered: max(square_avg - grad_avg**2, floor*square_avg)      (Graves 2013)
        u = lr*g / (sqrt(w + eps_root) + eps)
        momentum > 0: momentum_buffer = momentum*momentum_buffer + u;  u = momentum_buffer
                      nesterov:  u = momentum*momentum_buffer + u
        floor = 2**-20 (float32), 2**-49 (float64): above the rounding of square_avg
        param = param - u         decoupled: param - (u + lr*weight_decay*param)

    params: one array, a sequence, a mapping, a FlatBuffer, or a list of groups ``{"params": ..., "lr": ...}``; float32 or
    float64.   groups: hyper-parameters by name, of a mapping or FlatBuffer: ``{"*.bias": {"weight_decay": 0}}``; the first
    pattern that matches counts (fnmatch.fnmatchcase on str(name)), each must get a name, opt.groups[0] is for the rest.
    lr: step size >= 0, or callable(step) first called with 0.   rho in [0, 1): decay of the averages.
    eps, eps_root >= 0: added outside and inside the square root; not both 0.
    momentum in [0, 1).   nesterov, centered: bool.   lr_in_momentum: lr multiplies u before it enters the buffer
    (Keras, TF1, Optax) and not after (PyTorch); the same while lr is constant.
    bias_correction: False, "corrected" (averages divided by 1 - rho**t; Optax), "folded" (lr * sqrt(1 - rho**t)).
    weight_decay >= 0: L2, or decoupled.   maximize: ascend.   clip_value: bound on each gradient element, or None.
    initial_value: start of square_avg (1 in TF1 and MindSpore).
    nonfinite: what a step does where elements of grad*grad_scale, before any clipping, are NaN or infinite or have a square
    that overflows the dtype: "propagate" does not look; "skip" updates nothing in any tensor, counts no step and says so in
    StepInfo; "raise" does the same and raises FloatingPointError.   zero_grad: a step writes zeros over the gradients
    (writable arrays, then), a skipped one too; not one that raises.
    dialect: None or "torch", "keras", "tf1", "mindspore", "optax": that framework's defaults; explicit arguments win.
    backend: "auto", "c", "numba", "numpy", or "cuda" for arrays in device memory, where "auto" means that.
    Only with "cuda": stream, where to launch (None: where the arrays' library works); capturable, coefficients in device
    memory for CUDA graphs; check, wait for each step and raise its error.
    State: square_avg, grad_avg (centered), momentum_buffer (momentum > 0), of the shape and dtype of each parameter.
    Raises TypeError for wrong kinds, ValueError for wrong values; nothing has changed then.
    """

    defaults = {
        "lr": 0.01, "rho": 0.99, "eps": 1e-8, "eps_root": 0.0, "momentum": 0.0, "nesterov": False, "centered": False,
        **COMMON, "initial_value": 0.0, "lr_in_momentum": False, "bias_correction": False,
    }  # fmt: skip

    @staticmethod
    def rule_name(h):
        return "rmsprop" + "_centered" * h.centered + "_momentum" * (h.momentum > 0)

    @staticmethod
    def recipe(h, dtype):
        refuse_zero_eps(h, dtype)
        decaying(h, "momentum", dtype)
        if h.nesterov and h.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0")
        if h.centered and h.bias_correction == "folded":
            raise ValueError("bias_correction='folded' cannot serve centered=True, which corrects two averages")
        rho, weight = decaying(h, "rho", dtype)
        lr_first = h.lr_in_momentum or h.momentum == 0
        values = {
            **recipes.constants(dtype), **common(h, dtype),
            "rho": h.rho, "one_minus_rho": 1 - h.rho, "v_scale": 1.0, "eps_root": h.eps_root, "eps": h.eps,
            "in_scale": h.lr if lr_first else 1.0, "out_scale": 1.0 if lr_first else h.lr,
            "momentum": h.momentum, "nesterov_b": h.momentum if h.nesterov else 1.0, "nesterov_u": float(h.nesterov),
        }  # fmt: skip
        corrections = {
            False: [],
            "corrected": [Correction("v_scale", DIVIDE, rho, weight)],
            "folded": [Correction("in_scale" if lr_first else "out_scale", TIMES_ROOT, rho, weight)],
        }[h.bias_correction]
        general = needs_general(h) or h.nesterov or h.bias_correction == "corrected"
        return recipes.make(RMSProp.rule_name(h), dtype, general, values, corrections)

    @staticmethod
    def initial(h, state_name):
        return h.initial_value if state_name == "square_avg" else 0.0


class AdaGrad(Optimizer):
    """Divide each gradient by the root of the sum of its squares since the start (Duchi, Hazan, Singer 2011).

    ::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param
        sum = sum + g**2
        param = param - (lr/(1 + (t-1)*lr_decay) * g / (sqrt(sum + eps_root) + eps)   decoupled: + lr*weight_decay*param)

    lr: step size >= 0, or callable(step) first called with 0.   lr_decay >= 0: as above, t counts from 1 (PyTorch).
    eps, eps_root >= 0: outside and inside the root; both 0 only where the sum starts above 0 (TF1).
    initial_value: start of the sum (0.1 in Keras, TF1, Optax, MindSpore).
    params, weight_decay, decoupled, maximize, clip_value, dialect, nonfinite, zero_grad, backend: as in RMSProp.
    State: sum.  Raises as RMSProp does.
    """

    defaults = {"lr": 0.01, "eps": 1e-10, "eps_root": 0.0, "lr_decay": 0.0, "initial_value": 0.0, **COMMON}

    @staticmethod
    def rule_name(h):
        return "adagrad"

    @staticmethod
    def recipe(h, dtype):
        values = {**recipes.constants(dtype), **common(h, dtype), "eps_root": h.eps_root, "lr": h.lr, "eps": h.eps}
        linear = [Correction(name, DIVIDE, h.lr_decay, linear=True) for name in ("lr", "decay")] if h.lr_decay else []
        return recipes.make("adagrad", dtype, needs_general(h), values, linear)

    @staticmethod
    def needs_positive_state(h, dtype):
        return rounded(h.eps, dtype) == 0 and rounded(h.eps_root, dtype) == 0

    @staticmethod
    def initial(h, state_name):
        return h.initial_value


class Adam(Optimizer):
    """Running means of the gradient and of its square, corrected for their start at 0 (Kingma, Ba 2015).

    ::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param
        exp_avg = beta1*exp_avg + (1 - beta1)*g
        exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*g**2
        m, v = exp_avg/(1 - beta1**t), exp_avg_sq/(1 - beta2**t)
        param = param - (lr*m / (sqrt(v + eps_root) + eps)   decoupled: + lr*weight_decay*param)

    lr: step size >= 0, or callable(step) first called with 0.   beta1, beta2 in [0, 1).
    eps, eps_root >= 0: outside and inside the root; not both 0.
    amsgrad: True divides by the largest exp_avg_sq so far (Reddi, Kale, Kumar 2018), "corrected" by the largest v (Optax).
    nesterov: "dozat" (Dozat 2016, as Optax has it: beta1*m' + (1 - beta1)*g/(1 - beta1**t), m' one step ahead) or
    "folded" (TF, MindSpore: beta1*exp_avg + (1 - beta1)*g in place of exp_avg).  True is refused: it does not say which.
    bias_correction: "corrected" as above (True means that), "folded": lr*sqrt(1 - beta2**t)/(1 - beta1**t) on the raw
    averages, so that eps is the paper's "epsilon hat" (Keras, TF1, MindSpore), False: none.
    params, weight_decay, decoupled, maximize, clip_value, dialect, nonfinite, zero_grad, backend: as in RMSProp.
    State: exp_avg, exp_avg_sq, max_exp_avg_sq (amsgrad).  Raises as RMSProp does.
    """

    defaults = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0, "amsgrad": False, "nesterov": False,
        "bias_correction": "corrected", **COMMON,
    }  # fmt: skip
    checks = {"nesterov": hyper.choice(False, "dozat", "folded")}

    @staticmethod
    def rule_name(h):
        return "adam_amsgrad" if h.amsgrad else "adam"

    @staticmethod
    def recipe(h, dtype):
        refuse_zero_eps(h, dtype)
        form = h.bias_correction
        if h.amsgrad == "corrected" and form != "corrected":
            raise ValueError(f"amsgrad='corrected' needs bias_correction='corrected', which is {form!r}")
        values = {
            **recipes.constants(dtype), **common(h, dtype),
            "beta1": h.beta1, "one_minus_beta1": 1 - h.beta1, "beta2": h.beta2, "one_minus_beta2": 1 - h.beta2,
            "m_scale": h.beta1 if h.nesterov else 1.0, "g_scale": 1 - h.beta1 if h.nesterov else 0.0,
            "max_scale": 1.0, "v_scale": 1.0, "root_scale": 1.0,
            "eps_root": h.eps_root, "step_size": h.lr, "eps": h.eps,
        }  # fmt: skip
        first, second = decaying(h, "beta1", dtype), decaying(h, "beta2", dtype)
        corrections = []
        if form and h.nesterov == "dozat":
            corrections = [Correction("m_scale", DIVIDE, *first, ahead=1), Correction("g_scale", DIVIDE, *first)]
        elif form:
            corrections = [Correction("step_size", DIVIDE, *first)]
        if form == "folded":
            corrections.append(Correction("step_size", TIMES_ROOT, *second))
        elif form and h.amsgrad == "corrected":
            corrections.append(Correction("max_scale", DIVIDE, *second))
        elif form and h.eps_root > 0:
            corrections.append(Correction("v_scale", DIVIDE, *second))
        elif form:
            corrections.append(Correction("root_scale", OVER_ROOT, *second))
        return recipes.make(Adam.rule_name(h), dtype, needs_general(h) or h.nesterov, values, corrections)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019): Adam with decoupled=True, weight_decay=0.01.

    ::

        param = param - (lr*m/(sqrt(v + eps_root) + eps) + lr*weight_decay*param)

    with m and v as in Adam; parameters, state and errors as there.  dialect="keras", "mindspore", "optax" give the
    decay 0.004, 0 and 1e-4 of those frameworks.
    """

    defaults = {**Adam.defaults, "decoupled": True, "weight_decay": 0.01}


class RProp(Optimizer):
    """A step size per weight that grows while the sign of its gradient stays and shrinks when it flips
    (Riedmiller, Braun 1993; the default is iRprop-, Igel, Huesken 2000).

    ::

        g = clip(grad*grad_scale, -clip_value, clip_value)
        s = sign(g)*sign(prev)
        step_size = clip(step_size*(eta_plus if s > 0, eta_minus if s < 0, else 1), step_min, step_max)
        g = 0 where s < 0           (zero_on_flip)
        param = param - sign(g)*step_size;  prev = g

    lr >= 0: the first step_size; it is used once and cannot be a schedule.   0 < eta_minus < 1 < eta_plus.
    0 <= step_min <= step_max.   zero_on_flip: False gives plain Rprop-, which moves even when the sign flips.
    params, maximize, clip_value, dialect, nonfinite, zero_grad, backend: as in RMSProp.
    State: prev, step_size.  Raises as RMSProp does.
    """

    defaults = {
        "lr": 0.01, "eta_minus": 0.5, "eta_plus": 1.2, "step_min": 1e-6, "step_max": 50.0, "zero_on_flip": True,
        "maximize": False, "clip_value": None,
    }  # fmt: skip
    checks = {"lr": hyper.non_negative}
    fixed = ("lr",)

    @staticmethod
    def rule_name(h):
        return "rprop"

    @staticmethod
    def recipe(h, dtype):
        if not rounded(h.eta_minus, dtype) < 1 < rounded(h.eta_plus, dtype):
            raise ValueError(f"eta_minus={h.eta_minus!r} and eta_plus={h.eta_plus!r} must lie below and above 1")
        if h.step_min > h.step_max:
            raise ValueError(f"step_min={h.step_min!r} is above step_max={h.step_max!r}")
        values = {
            **recipes.constants(dtype), **common(SimpleNamespace(**vars(h), weight_decay=0.0, decoupled=False), dtype),
            "eta_minus": h.eta_minus, "eta_plus": h.eta_plus, "step_min": h.step_min, "step_max": h.step_max,
            "flip_below": 0.0 if h.zero_on_flip else -math.inf,
        }  # fmt: skip
        return recipes.make("rprop", dtype, h.clip_value is not None, values)

    @staticmethod
    def initial(h, state_name):
        return h.lr if state_name == "step_size" else 0.0
