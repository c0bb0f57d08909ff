"""RMSProp, AdaGrad, Adam, AdamW and RProp: what they do, their hyper-parameters and defaults, their rules and states.

The mathematics is in rules.py; how hyper-parameters become the coefficients of a rule, made anew at each change of one, in
recipes.py; structure, groups and state are in optimizer.py, steps in gradients.py.
"""

from . import hyper, recipes
from .optimizer import Optimizer
from .recipes import rounded

COMMON = {
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
    "clip_value": None,
}


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
        return recipes.recipe("rmsprop", RMSProp.rule_name(h), h, dtype)

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
        return recipes.recipe("adagrad", "adagrad", h, dtype)

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
        return recipes.recipe("adam", Adam.rule_name(h), h, dtype)


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
        return recipes.recipe("rprop", "rprop", h, dtype)

    @staticmethod
    def initial(h, state_name):
        return h.lr if state_name == "step_size" else 0.0
