"""RMSProp, AdaGrad, Adam, AdamW and RProp: what they do, their hyper-parameters and defaults, their rules and states.

The mathematics is in rules.py; how hyper-parameters become the coefficients of a rule, made anew at each change of one, in
recipes.py; structure, groups and state are in optimizer.py, steps in gradients.py.
"""

from . import hyper, recipes
from .optimizer import Optimizer
from .recipes import rounded

__all__ = ["AdaGrad", "Adam", "AdamW", "RMSProp", "RProp"]

COMMON = {
    "weight_decay": 0.0,
    "decoupled": False,
    "maximize": False,
    "clip_value": None,
}


class RMSProp(Optimizer):
    """RMSProp divides each gradient by a running root mean square of it.

    One step computes, for every element::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param          (the prepared gradient)
        square_avg = rho*square_avg + (1 - rho)*g**2
        w = square_avg            centered: max(square_avg - grad_avg**2, floor*square_avg)
        u = lr*g / (sqrt(w + eps_root) + eps)
        momentum > 0: momentum_buffer = momentum*momentum_buffer + u;  u = momentum_buffer
                      nesterov:  u = momentum*momentum_buffer + u
        param = param - u         decoupled: param - (u + lr*weight_decay*param), and g without weight_decay*param

    where grad_avg = rho*grad_avg + (1 - rho)*g, and floor is 2**-20 in float32 and 2**-49 in float64: just above the
    rounding of square_avg.  The parameters and the state are updated in place.

    Parameters
    ----------
    params : array, sequence, mapping, FlatBuffer or list of groups
        What is updated in place: float32 or float64 arrays of any shape, each dense in any memory order, or arrays of bf16
        or fp16 where master or rounding is given (of ml_dtypes, torch tensors, float16, fastrms.Stored).  A group is a
        mapping ``{"params": ..., "lr": ...}`` with hyper-parameters of its own.
    lr : float or callable, default 0.01
        Step size, finite and at least 0.  A callable gets the number of steps made, first 0, and gives the lr of the next.
    rho : float in [0, 1), default 0.99
        Share of the averages that is kept at each step.
    eps, eps_root : float >= 0, default 1e-8 and 0
        Added to the root, and below it.  They must not both be 0.
    momentum : float in [0, 1), default 0
        Share of momentum_buffer that is kept at each step; 0 means that there is no such buffer.
    nesterov : bool, default False
        Whether momentum looks one step ahead; it needs momentum > 0.
    centered : bool, default False
        Whether the variance divides, in place of the mean square.
    weight_decay : float >= 0, default 0
        Added to the gradient as weight_decay*param (L2), or, with decoupled, taken from the parameter.
    decoupled : bool, default False
        Whether weight_decay acts beside the update, scaled by lr.
    maximize : bool, default False
        Whether to go up the gradient.
    clip_value : float > 0 or None, default None
        Bound of each element of grad*grad_scale.  The norm of all gradients is clipped by ``step(clip_norm=...)``.
    initial_value : float >= 0, default 0
        What square_avg starts with; 1 in TF1 and MindSpore.  It is not used where ``state`` is given.
    lr_in_momentum : bool, default False
        Whether lr multiplies u before it enters momentum_buffer (Keras, TF1, Optax) and not after (PyTorch).  This is the
        same while lr stays as it is.
    bias_correction : False, "corrected" or "folded", default False
        "corrected" (as True) divides the averages by 1 - rho**t in update number t (Optax); "folded" multiplies lr by
        sqrt(1 - rho**t) and is not for centered=True.
    state : mapping, optional
        state name -> arrays in the structure of params (None for a tensor whose rule has no such state): what the state of
        another optimizer gives, or arrays in memory that processes share.  They are checked as params are, and then updated
        in place.  Nothing is written into them here, so whoever owns them has given them their first values; init_state()
        shows which.  Steps are counted from 0; load_state_dict() sets another count.
    groups : mapping of pattern to hyper-parameters, optional
        Overrides by the names of a mapping or FlatBuffer: ``{"*.bias": {"weight_decay": 0}}``.  The first pattern that
        matches str(name), as fnmatch.fnmatchcase has it, counts; each must match a name.  opt.groups[0] is for the rest.
    dialect : "torch", "keras", "tf1", "mindspore", "optax" or None, default None
        That framework's defaults and semantics; explicit arguments win.
    nonfinite : "propagate", "skip" or "raise", default "propagate"
        What a step does where elements of grad*grad_scale, before any clipping, are NaN or infinite or have a square that
        overflows the dtype.  "propagate" does not look; "skip" updates nothing in any tensor, counts no step and says so
        in StepInfo; "raise" does the same and raises FloatingPointError.
    zero_grad : bool, default False
        Whether a step writes zeros over the gradients, which must be writable then.  A skipped step does so, too, and one
        that raises does not.
    state_format : "bf16", "fp16", "q8" or None, default None
        How states are stored, for parameters that are updated in float32; None is float32 itself.  Each is off by at most:
        bf16 2**-8 of the number; fp16 2**-11 of it, or 2**-24 below 2**-14, and numbers beyond 65504 become this; q8, 8 bits
        with a scale for each 256 elements, 1/16 of the number, or 2**-17 of the largest in the block for small numbers with
        a sign.  A mean of squares that is not 0 stays above 0 in fp16 and q8.  fp16 is for large gradients alone: squares
        of those below 0.008 are too small for it, and training stalls.  A group may have its own, as with the next two.  Not
        for centered=True, and q8 neither for amsgrad nor RProp, nor fp16 for RProp.
    master : "float32", "split16", "split8" or None, default None
        What bf16 and fp16 parameters are updated in.  "float32" keeps a float32 of each; "split16" and "split8" keep, for
        bf16 parameters, 16 or 8 bits more of each, which together are a float32 exactly, or to 2**-16 of it; None keeps
        nothing, and rounds each new parameter.
    rounding : "stochastic" or "nearest", default "stochastic"
        How states in formats are rounded, and parameters without master or with "split8".  Stochastic rounding is right in
        the mean, so that many small changes add up; its error is less than twice as large.  Copies, and parameters with
        another master, are rounded to nearest.  States in "q8" are rounded at random alone: 8 bits would lose most changes.
    param_copy : arrays in the structure of params, optional
        bf16 or fp16 arrays into which each step writes the new parameters, rounded to nearest; None for a tensor without.
        They hold the present parameters as soon as the optimizer is made.  Whoever writes into a parameter later writes into
        its copy, too; load_state_dict() touches neither.
    seed : int, default 0
        From 0 to 2**64 - 1.  The bits of stochastic rounding depend on it, on the number of the update, and on the position
        of the element among all elements of params, and on nothing else.
    shards : fastrms.Shards, optional
        Where the tensors lie in tensors that are spread over several ranks: clip_norm and nonfinite are then global.
    backend : "auto", "c", "numba", "numpy" or "cuda", default "auto"
        What computes; "auto" takes the fastest, and "cuda" for arrays in device memory.
    stream, capturable, check : optional
        Only for backend "cuda": where to launch (None: where the arrays' library works); whether coefficients are kept in
        device memory, for CUDA graphs; whether to wait for each step and raise its error.

    Attributes
    ----------
    state : mapping
        square_avg, grad_avg (centered) and momentum_buffer (momentum > 0), each in the structure of params.

    Raises
    ------
    TypeError
        Where an argument is of a wrong kind.  Nothing has changed then.
    ValueError
        Where an argument has a value that it must not have, here or at a step.  Nothing has changed then.

    References
    ----------
    Hinton, Coursera lecture 6e, 2012.  Graves, "Generating sequences with recurrent neural networks", 2013, equations 38
    to 45 (centered, momentum).  Sutskever et al., ICML 2013 (nesterov).  The defaults are those of torch.optim.RMSprop.
    """

    _numbers = recipes.FAMILIES["rmsprop"]
    defaults = {
        "lr": 0.01, "rho": 0.99, "eps": 1e-8, "eps_root": 0.0, "momentum": 0.0, "nesterov": False, "centered": False,
        **COMMON, "initial_value": 0.0, "lr_in_momentum": False, "bias_correction": False,
    }  # fmt: skip
    not_negative = ("square_avg",)

    @staticmethod
    def initial(h, state_name):
        return h.initial_value if state_name == "square_avg" else 0.0


class AdaGrad(Optimizer):
    """AdaGrad divides each gradient by the root of the sum of its squares since the start.

    Update number t, from 1, computes for every element::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param
        sum = sum + g**2
        rate = lr/(1 + (t-1)*lr_decay)
        param = param - rate*g / (sqrt(sum + eps_root) + eps)

    With decoupled, g is without weight_decay*param, and the last line is
    ``param = param - (rate*g / (sqrt(sum + eps_root) + eps) + rate*weight_decay*param)``.

    Parameters
    ----------
    lr : float or callable, default 0.01
        Step size, finite and at least 0, or a function of the number of steps made, first called with 0.
    eps, eps_root : float >= 0, default 1e-10 and 0
        Added to the root, and below it.  They may both be 0 only where no element of the sum is (TF1).
    lr_decay : float >= 0, default 0
        How fast the step size falls with the number of updates, decoupled weight decay included (PyTorch).
    initial_value : float >= 0, default 0
        What the sum starts with; 0.1 in Keras, TF1, Optax and MindSpore.
    params, state, groups, weight_decay, decoupled, maximize, clip_value, dialect, nonfinite, zero_grad, shards, backend :
        As in RMSProp.
    state_format, master, rounding, param_copy, seed :
        As in RMSProp.

    Attributes
    ----------
    state : mapping
        sum, in the structure of params.

    Raises
    ------
    TypeError, ValueError
        As RMSProp does.

    References
    ----------
    Duchi, Hazan, Singer, JMLR 12, 2011, the diagonal form.  The defaults and lr_decay are those of torch.optim.Adagrad.
    """

    _numbers = recipes.FAMILIES["adagrad"]
    defaults = {"lr": 0.01, "eps": 1e-10, "eps_root": 0.0, "lr_decay": 0.0, "initial_value": 0.0, **COMMON}
    not_negative = ("sum",)

    @staticmethod
    def needs_positive_state(h, dtype):
        return rounded(h.eps, dtype) == 0 and rounded(h.eps_root, dtype) == 0

    @staticmethod
    def initial(h, state_name):
        return h.initial_value


class Adam(Optimizer):
    """Adam keeps running means of the gradient and of its square, corrected for their start at 0.

    Update number t, from 1, computes for every element::

        g = clip(grad*grad_scale, -clip_value, clip_value) + weight_decay*param
        exp_avg = beta1*exp_avg + (1 - beta1)*g
        exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*g**2
        m, v = exp_avg/(1 - beta1**t), exp_avg_sq/(1 - beta2**t)
        param = param - lr*m / (sqrt(v + eps_root) + eps)

    With decoupled, g is without weight_decay*param, and the last line is
    ``param = param - (lr*m / (sqrt(v + eps_root) + eps) + lr*weight_decay*param)``.

    Parameters
    ----------
    lr : float or callable, default 1e-3
        Step size, finite and at least 0, or a function of the number of steps made, first called with 0.
    beta1, beta2 : float in [0, 1), default 0.9 and 0.999
        Shares of exp_avg and of exp_avg_sq that are kept at each step.
    eps, eps_root : float >= 0, default 1e-8 and 0
        Added to the root, and below it.  They must not both be 0.
    amsgrad : bool or "corrected", default False
        True divides by the root of the largest exp_avg_sq so far, corrected as v is; "corrected" by that of the largest v
        so far (Optax), and needs bias_correction="corrected".
    nesterov : False, "dozat" or "folded", default False
        "dozat" puts beta1*m' + (1 - beta1)*g/(1 - beta1**t) in place of m, where m' = exp_avg/(1 - beta1**(t+1)) (Optax);
        "folded" puts beta1*exp_avg + (1 - beta1)*g in place of exp_avg (TF, MindSpore).  True does not say which, and is
        refused.
    bias_correction : "corrected", "folded" or False, default "corrected"
        "corrected" (as True) is the formula above.  "folded" takes the raw averages as m and v, and
        lr*sqrt(1 - beta2**t)/(1 - beta1**t) as lr, so that eps is the paper's "epsilon hat" (Keras, TF1, MindSpore).
        False takes the raw averages and lr as they are.
    params, state, groups, weight_decay, decoupled, maximize, clip_value, dialect, nonfinite, zero_grad, shards, backend :
        As in RMSProp.
    state_format, master, rounding, param_copy, seed :
        As in RMSProp.

    Attributes
    ----------
    state : mapping
        exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq, each in the structure of params.

    Raises
    ------
    TypeError, ValueError
        As RMSProp does.

    Notes
    -----
    Powers of beta are those of beta1 and beta2 as the dtype holds them, so that the correction stays exact over very many
    steps.  A gradient so large that its square overflows the dtype leaves the element where it is from then on.

    References
    ----------
    Kingma, Ba, ICLR 2015.  Reddi, Kale, Kumar, ICLR 2018 (amsgrad).  Dozat, ICLR workshop 2016 (nesterov).  The defaults
    are those of torch.optim.Adam.
    """

    _numbers = recipes.FAMILIES["adam"]
    defaults = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "eps_root": 0.0, "amsgrad": False, "nesterov": False,
        "bias_correction": "corrected", **COMMON,
    }  # fmt: skip
    checks = {"nesterov": hyper.choice(False, "dozat", "folded")}
    not_negative = ("exp_avg_sq", "max_exp_avg_sq")


class AdamW(Adam):
    """AdamW is Adam whose weight decay acts beside the update: decoupled=True and weight_decay=0.01 are its defaults.

    Update number t computes, with m and v as in Adam::

        param = param - (lr*m / (sqrt(v + eps_root) + eps) + lr*weight_decay*param)

    Parameters
    ----------
    weight_decay : float >= 0, default 0.01
        Share of the parameter, times lr, that is taken from it at each step; dialect="keras", "mindspore" and "optax"
        make it 0.004, 0 and 1e-4.
    decoupled : bool, default True
        False makes this Adam with L2 weight decay.
    lr, beta1, beta2, eps, eps_root, amsgrad, nesterov, bias_correction :
        As in Adam.
    params, state, groups, maximize, clip_value, dialect, nonfinite, zero_grad, shards, backend :
        As in RMSProp.
    state_format, master, rounding, param_copy, seed :
        As in RMSProp.

    Raises
    ------
    TypeError, ValueError
        As RMSProp does.

    References
    ----------
    Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    defaults = {**Adam.defaults, "decoupled": True, "weight_decay": 0.01}


class RProp(Optimizer):
    """RProp moves each weight by its own step, which grows while the gradient keeps its sign and shrinks when that flips.

    One step computes, for every element::

        g = clip(grad*grad_scale, -clip_value, clip_value)
        s = sign(g)*sign(prev)
        step_size = clip(step_size*(eta_plus if s > 0, eta_minus if s < 0, else 1), step_min, step_max)
        g = 0 where s < 0           (zero_on_flip)
        param = param - sign(g)*step_size
        prev = g

    It is meant for gradients of the whole data set, without noise.

    Parameters
    ----------
    lr : float >= 0, default 0.01
        The first step_size of every weight, in the unit of the parameter.  It is used once and cannot be a schedule.
    eta_minus, eta_plus : float, default 0.5 and 1.2
        Factors by which step_size shrinks and grows: 0 < eta_minus < 1 < eta_plus.
    step_min, step_max : float, default 1e-6 and 50
        Bounds of step_size: 0 <= step_min <= step_max.
    zero_on_flip : bool, default True
        Whether a weight whose gradient has flipped its sign waits for one step (iRprop-); False is plain Rprop-.
    params, state, groups, maximize, clip_value, dialect, nonfinite, zero_grad, shards, backend :
        As in RMSProp.
    state_format, master, rounding, param_copy, seed :
        As in RMSProp.

    Attributes
    ----------
    state : mapping
        prev, the gradient of the step before, and step_size, each in the structure of params.

    Raises
    ------
    TypeError, ValueError
        As RMSProp does.

    References
    ----------
    Riedmiller, Braun, 1993 (Rprop).  Igel, Huesken, 2000 (iRprop-).  The defaults are those of torch.optim.Rprop.
    """

    _numbers = recipes.FAMILIES["rprop"]
    defaults = {
        "lr": 0.01, "eta_minus": 0.5, "eta_plus": 1.2, "step_min": 1e-6, "step_max": 50.0, "zero_on_flip": True,
        "maximize": False, "clip_value": None,
    }  # fmt: skip
    checks = {"lr": hyper.non_negative}
    fixed = ("lr",)
    not_negative = ("step_size",)

    @staticmethod
    def initial(h, state_name):
        return h.lr if state_name == "step_size" else 0.0
