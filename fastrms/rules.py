"""THE MATHEMATICS in Python: one infix block per rule, on scalars.  No loops, no arrays, no hyper-parameters.

csrc/rules.h says the same in C, with the same names in the same order of operations; the tests hold the two
equal to the last bit.  Only + - * /, sqrt and select, all correctly rounded, so every backend agrees.  No
literals: a coefficient arrives ready-made in the compute dtype.  The lines under GENERAL serve the
hyper-parameters that are off by default; a backend compiles each rule with GENERAL False and True.

A rule takes param, grad, its states and its coefficients, all of one floating-point type, and returns the new param and
states.  What its arguments mean stands in MEANINGS; what the coefficients are made of, in recipes.py.
"""

from inspect import cleandoc
from types import FunctionType

from numpy import sqrt, where

GENERAL = True


def select(condition, x, y):
    """x where the condition holds, else y.

    They are numbers, arrays, or the stand-ins for numbers by which a rule is recorded, which answer to NumPy's where.  Numba
    has a form of its own, which chooses between two numbers.
    """
    return where(condition, x, y) if hasattr(condition, "__array_function__") else x if condition else y


def larger(x, y):
    """The larger of two numbers; x where they are equal or y is NaN."""
    return select(y > x, y, x)


def clip(x, low, high):
    """x between low and high; NaN stays NaN."""
    x = select(low > x, low, x)
    return select(high < x, high, x)


def flush(x, tiny, zero):
    """x, or +0 where its magnitude is below tiny: no subnormal number stays in a state and slows every later step."""
    return select(abs(x) < tiny, zero, x)


def sign(x, zero, one):
    """1, -1, or 0 for x = 0 and for NaN, in the type of one."""
    return select(x > zero, one, select(x < zero, -one, zero))


def prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay):
    """The gradient scaled, and in the general form clipped and with L2 weight decay."""
    g = grad * grad_scale
    if GENERAL:
        g = clip(g * grad_rescale, clip_low, clip_high) + weight_decay * param
    return g


def variance(v, a, v_scale, floor):
    """The variance of which v is the mean of the squares and a the mean, both corrected by v_scale; at least floor*v.

    The floor keeps the cancellation v - a*a above the rounding of v itself.  It stands first in larger(), which keeps its
    first argument where the second is NaN: after finite gradients whose square overflows, v - a*a is inf - inf, and the
    floor, which is infinite then, makes the update 0, as in plain RMSProp.  A NaN gradient makes the floor NaN.
    """
    if GENERAL:
        v = v * v_scale
        a = a * v_scale
    return larger(floor * v, v - a * a)


def rmsprop(param, grad, square_avg,
            grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, eps_root,
            in_scale, eps, decay, tiny, zero):  # fmt: skip
    """RMSProp divides each gradient by a running root mean square, square_avg.

    Source: Hinton, Coursera lecture 6e, 2012.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    w = square_avg
    if GENERAL:
        w = w * v_scale + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, square_avg


def rmsprop_momentum(param, grad, square_avg, momentum_buffer,
                     grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, eps_root,
                     in_scale, eps, momentum, nesterov_b, nesterov_u, out_scale, decay, tiny, zero):  # fmt: skip
    """RMSProp with momentum: momentum_buffer is a decaying sum of the steps, which moves the parameter.

    Source: Graves 2013; Sutskever et al. 2013 for nesterov.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    w = square_avg
    if GENERAL:
        w = w * v_scale + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    momentum_buffer = flush(momentum * momentum_buffer + u, tiny, zero)
    b = momentum_buffer
    if GENERAL:
        b = nesterov_b * b + nesterov_u * u
    param = param - (out_scale * b + decay * param)
    return param, square_avg, momentum_buffer


def rmsprop_centered(param, grad, square_avg, grad_avg,
                     grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, floor,
                     eps_root, in_scale, eps, decay, tiny, zero):  # fmt: skip
    """Centered RMSProp divides by the running standard deviation: grad_avg is the running mean.

    Source: Graves 2013.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero)
    w = variance(square_avg, grad_avg, v_scale, floor)
    if GENERAL:
        w = w + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, square_avg, grad_avg


def rmsprop_centered_momentum(param, grad, square_avg, grad_avg, momentum_buffer,
                              grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale,
                              floor, eps_root, in_scale, eps, momentum, nesterov_b, nesterov_u, out_scale, decay,
                              tiny, zero):  # fmt: skip
    """Centered RMSProp with momentum.

    Source: Graves 2013, equations 38 to 45.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero)
    w = variance(square_avg, grad_avg, v_scale, floor)
    if GENERAL:
        w = w + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    momentum_buffer = flush(momentum * momentum_buffer + u, tiny, zero)
    b = momentum_buffer
    if GENERAL:
        b = nesterov_b * b + nesterov_u * u
    param = param - (out_scale * b + decay * param)
    return param, square_avg, grad_avg, momentum_buffer


def adagrad(param, grad, sum,
            grad_scale, grad_rescale, clip_low, clip_high, weight_decay, eps_root, lr, eps, decay, tiny, zero):  # fmt: skip
    """AdaGrad divides by the root of the sum of squares since the start.

    Source: Duchi, Hazan, Singer 2011, the diagonal form.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    sum = flush(sum + g * g, tiny, zero)
    w = sum
    if GENERAL:
        w = w + eps_root
    u = lr * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, sum


def adam(param, grad, exp_avg, exp_avg_sq,
         grad_scale, grad_rescale, clip_low, clip_high, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
         m_scale, g_scale, v_scale, eps_root, step_size, root_scale, eps, decay, tiny, zero):  # fmt: skip
    """Adam is RMSProp on a running mean of the gradient, exp_avg; it and exp_avg_sq are corrected for their start at 0.

    Source: Kingma, Ba 2015.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    exp_avg = flush(beta1 * exp_avg + one_minus_beta1 * g, tiny, zero)
    exp_avg_sq = flush(beta2 * exp_avg_sq + (one_minus_beta2 * g) * g, tiny, zero)
    m, w = exp_avg, exp_avg_sq
    if GENERAL:
        m = m_scale * m + g_scale * g
        w = w * v_scale + eps_root
    u = step_size * m / (sqrt(w) * root_scale + eps)
    param = param - (u + decay * param)
    return param, exp_avg, exp_avg_sq


def adam_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
                 grad_scale, grad_rescale, clip_low, clip_high, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                 max_scale, m_scale, g_scale, v_scale, eps_root, step_size, root_scale, eps, decay,
                 tiny, zero):  # fmt: skip
    """AMSGrad is Adam that divides by the largest second moment so far, max_exp_avg_sq.

    Source: Reddi, Kale, Kumar 2018.
    """
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    exp_avg = flush(beta1 * exp_avg + one_minus_beta1 * g, tiny, zero)
    exp_avg_sq = flush(beta2 * exp_avg_sq + (one_minus_beta2 * g) * g, tiny, zero)
    max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq * max_scale)
    m, w = exp_avg, max_exp_avg_sq
    if GENERAL:
        m = m_scale * m + g_scale * g
        w = w * v_scale + eps_root
    u = step_size * m / (sqrt(w) * root_scale + eps)
    param = param - (u + decay * param)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


def rprop(param, grad, prev, step_size,
          grad_scale, grad_rescale, clip_low, clip_high, eta_minus, eta_plus, step_min, step_max, flip_below,
          zero, one):  # fmt: skip
    """RProp keeps a step size per weight, grown while the sign of its gradient stays and shrunk when it flips.

    Source: Riedmiller, Braun 1993; Igel, Huesken 2000 for iRprop-.
    """
    g = prepare(grad, zero, grad_scale, grad_rescale, clip_low, clip_high, zero)
    direction = sign(g, zero, one)
    s = direction * sign(prev, zero, one)
    eta = select(s > zero, eta_plus, select(s < zero, eta_minus, one))
    step_size = clip(step_size * eta, step_min, step_max)
    param = param - select(s < flip_below, zero, direction) * step_size
    prev = select(s < flip_below, zero, g)
    return param, prev, step_size


HELPERS = (larger, clip, flush, sign, prepare, variance)
RULES = {
    function.__name__: function
    for function in (
        rmsprop,
        rmsprop_momentum,
        rmsprop_centered,
        rmsprop_centered_momentum,
        adagrad,
        adam,
        adam_amsgrad,
        rprop,
    )
}


MEANINGS = {
    "param": "An element of the parameter, of the floating-point type that all arguments have.",
    "grad": "Its gradient as it comes.",
    "square_avg, exp_avg_sq": "Running mean of the squares of the prepared gradient.",
    "grad_avg, exp_avg": "Running mean of the prepared gradient.",
    "momentum_buffer": "Decaying sum of the steps.",
    "sum": "Sum of the squares of the prepared gradient since the start.",
    "max_exp_avg_sq": "Largest exp_avg_sq so far.",
    "prev": "Prepared gradient of the step before, 0 after a flip of its sign.",
    "step_size of rprop": "Step of this weight.",
    "grad_scale": "Factor of the gradient: that of step(), that of clip_norm, and -1 for maximize.",
    "grad_rescale": "Second factor of the gradient, for a clip_norm whose factor grad_scale cannot hold; else 1.",
    "clip_low, clip_high": "Bounds of an element of the scaled gradient; -inf and inf where there are none.",
    "weight_decay": "L2 decay: param times this is added to the gradient.",
    "rho, beta1, beta2": "Share of a running mean that is kept.",
    "one_minus_rho, one_minus_beta1, one_minus_beta2": "Share of a running mean that is new.",
    "v_scale, max_scale": "Factor of a second moment that corrects it for its start at 0; 1 where it needs none.",
    "root_scale": "The same for the root of a second moment.",
    "m_scale, g_scale": "What of exp_avg and of the gradient is applied; 1 and 0 without nesterov.",
    "floor": "Least share of square_avg that counts as a variance: 2**-20 in float32, 2**-49 in float64.",
    "eps_root, eps": "Added below the root, and to it.",
    "in_scale, out_scale": "Step size before momentum, and after it; one of the two is 1.",
    "lr, step_size": "Step size.",
    "momentum": "Share of momentum_buffer that is kept.",
    "nesterov_b, nesterov_u": "What of momentum_buffer and of the step is applied; 1 and 0 without nesterov.",
    "eta_minus, eta_plus": "Factors of step_size where the sign of the gradient has flipped, and where it has stayed.",
    "step_min, step_max": "Bounds of step_size.",
    "flip_below": "0 where a weight waits for a step after a flip (iRprop-), -inf where it does not (Rprop-).",
    "decay": "Decoupled decay: param times this is subtracted from param.",
    "tiny": "Smallest normal number.",
    "zero, one": "0 and 1.",
}


def meaning(name, rule):
    """What an argument of a rule means."""
    names = (f"{name} of {rule.__name__}", name)
    return next((text for wanted in names for key, text in MEANINGS.items() if wanted in key.split(", ")), "")


def document(rule):
    """Parameters and Returns of a rule for its docstring, in numpydoc's form."""
    names, states = arguments(rule), state_names(rule)
    parameters = "".join(f"{name} : float\n    {meaning(name, rule)}\n" for name in names)
    returned = "".join(f"{name} : float\n" for name in ("param", *states))
    underlined = "Parameters\n----------\n" + parameters, "Returns\n-------\n" + returned
    rule.__doc__ = "\n\n".join((cleandoc(rule.__doc__ or ""), *underlined))


def find(rule):
    """The function of a rule named in RULES; an own rule (own_rules.py) stands for itself."""
    return RULES[rule] if isinstance(rule, str) else rule


def arguments(rule):
    """The argument names of a rule: param, grad, its states, its coefficients (grad_scale is the first)."""
    if not isinstance(rule, FunctionType):
        return ("param", "grad", *rule.states, "grad_scale", "grad_rescale", *rule.coefficients)
    return rule.__code__.co_varnames[: rule.__code__.co_argcount]


def state_names(rule):
    """The names of the state buffers of a rule."""
    names = arguments(rule)
    return names[2 : names.index("grad_scale")]


def coefficient_names(rule):
    """The names of the coefficients of a rule, grad_scale first."""
    names = arguments(rule)
    return names[names.index("grad_scale") :]


for _rule in RULES.values():
    document(_rule)


def compile_rule(rule, general, select=select):
    """The same text with GENERAL fixed, and with the select of a backend."""
    names = {"GENERAL": general, "select": select, "sqrt": sqrt}
    for function in (*HELPERS, rule):
        names[function.__name__] = FunctionType(function.__code__, names, function.__name__)
    return names[rule.__name__]
