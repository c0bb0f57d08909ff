"""THE MATHEMATICS in Python: one infix block per rule, on scalars.  No loops, no arrays, no hyper-parameters.

csrc/rules.h says the same in C, with the same names in the same order of operations; the tests hold the two
equal to the last bit.  Only + - * /, sqrt and select, all correctly rounded, so every backend agrees.  No
literals: a coefficient arrives ready-made in the compute dtype.  The lines under GENERAL serve the
hyper-parameters that are off by default; a backend compiles each rule with GENERAL False and True.

A rule takes param, grad, its states, its coefficients, and returns the new param and states.
"""

from types import FunctionType

from numpy import sqrt

GENERAL = True


def select(condition, x, y):
    return x if condition else y


def larger(x, y):
    return select(y > x, y, x)


def clip(x, low, high):
    x = select(low > x, low, x)
    return select(high < x, high, x)


def flush(x, tiny, zero):
    return select(abs(x) < tiny, zero, x)


def sign(x, zero, one):
    return select(x > zero, one, select(x < zero, -one, zero))


def prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay):
    g = grad * grad_scale
    if GENERAL:
        g = clip(g * grad_rescale, clip_low, clip_high) + weight_decay * param
    return g


# RMSProp (Hinton 2012): divide each gradient by a running root mean square.
def rmsprop(param, grad, square_avg,
            grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, eps_root,
            in_scale, eps, decay, tiny, zero):  # fmt: skip
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    w = square_avg
    if GENERAL:
        w = w * v_scale + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, square_avg


# RMSProp with momentum: the step itself is averaged (Graves 2013; Sutskever 2013 for nesterov).
def rmsprop_momentum(param, grad, square_avg, momentum_buffer,
                     grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, eps_root,
                     in_scale, eps, momentum, nesterov_b, nesterov_u, out_scale, decay, tiny, zero):  # fmt: skip
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


# Centered RMSProp (Graves 2013): divide by the running standard deviation.  The floor keeps the
# cancellation v - a*a above the rounding of v itself.  It stands first in larger(), which keeps its first
# argument where the second is NaN: after finite gradients whose square overflows, v - a*a is inf - inf, and
# the floor, which is infinite then, makes the update 0, as in plain RMSProp.  A NaN gradient makes the floor NaN.
def rmsprop_centered(param, grad, square_avg, grad_avg,
                     grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale, floor,
                     eps_root, in_scale, eps, decay, tiny, zero):  # fmt: skip
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero)
    v, a = square_avg, grad_avg
    if GENERAL:
        v = v * v_scale
        a = a * v_scale
    w = larger(floor * v, v - a * a)
    if GENERAL:
        w = w + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, square_avg, grad_avg


# Centered RMSProp with momentum (Graves 2013, equations 38 to 45).
def rmsprop_centered_momentum(param, grad, square_avg, grad_avg, momentum_buffer,
                              grad_scale, grad_rescale, clip_low, clip_high, weight_decay, rho, one_minus_rho, v_scale,
                              floor, eps_root, in_scale, eps, momentum, nesterov_b, nesterov_u, out_scale, decay,
                              tiny, zero):  # fmt: skip
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero)
    v, a = square_avg, grad_avg
    if GENERAL:
        v = v * v_scale
        a = a * v_scale
    w = larger(floor * v, v - a * a)
    if GENERAL:
        w = w + eps_root
    u = in_scale * g / (sqrt(w) + eps)
    momentum_buffer = flush(momentum * momentum_buffer + u, tiny, zero)
    b = momentum_buffer
    if GENERAL:
        b = nesterov_b * b + nesterov_u * u
    param = param - (out_scale * b + decay * param)
    return param, square_avg, grad_avg, momentum_buffer


# AdaGrad (Duchi, Hazan, Singer 2011): divide by the root of the sum of squares since the start.
def adagrad(param, grad, sum,
            grad_scale, grad_rescale, clip_low, clip_high, weight_decay, eps_root, lr, eps, decay, tiny, zero):  # fmt: skip
    g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay)
    sum = flush(sum + g * g, tiny, zero)
    w = sum
    if GENERAL:
        w = w + eps_root
    u = lr * g / (sqrt(w) + eps)
    param = param - (u + decay * param)
    return param, sum


# Adam (Kingma, Ba 2015): RMSProp on a running mean of the gradient, both corrected for their start at 0.
def adam(param, grad, exp_avg, exp_avg_sq,
         grad_scale, grad_rescale, clip_low, clip_high, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
         m_scale, g_scale, v_scale, eps_root, step_size, root_scale, eps, decay, tiny, zero):  # fmt: skip
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


# AMSGrad (Reddi, Kale, Kumar 2018): Adam that divides by the largest second moment so far.
def adam_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
                 grad_scale, grad_rescale, clip_low, clip_high, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                 max_scale, m_scale, g_scale, v_scale, eps_root, step_size, root_scale, eps, decay,
                 tiny, zero):  # fmt: skip
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


# RProp (Riedmiller, Braun 1993), iRprop- (Igel, Huesken 2000): a step size per weight, grown while the
# sign of its gradient stays and shrunk when it flips.  flip_below is 0 for iRprop-, -inf for plain Rprop-.
def rprop(param, grad, prev, step_size,
          grad_scale, grad_rescale, clip_low, clip_high, eta_minus, eta_plus, step_min, step_max, flip_below,
          zero, one):  # fmt: skip
    g = prepare(grad, zero, grad_scale, grad_rescale, clip_low, clip_high, zero)
    direction = sign(g, zero, one)
    s = direction * sign(prev, zero, one)
    eta = select(s > zero, eta_plus, select(s < zero, eta_minus, one))
    step_size = clip(step_size * eta, step_min, step_max)
    param = param - select(s < flip_below, zero, direction) * step_size
    prev = select(s < flip_below, zero, g)
    return param, prev, step_size


HELPERS = (larger, clip, flush, sign, prepare)
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


def find(rule):
    """The function of a rule named in RULES; an own rule (own_rules.py) stands for itself."""
    return RULES[rule] if isinstance(rule, str) else rule


def arguments(rule):
    """The argument names of a rule: param, grad, its states, its coefficients (grad_scale is the first)."""
    if not isinstance(rule, FunctionType):
        return ("param", "grad", *rule.states, "grad_scale", "grad_rescale", *rule.coefficients)
    return rule.__code__.co_varnames[: rule.__code__.co_argcount]


def state_names(rule):
    names = arguments(rule)
    return names[2 : names.index("grad_scale")]


def coefficient_names(rule):
    names = arguments(rule)
    return names[names.index("grad_scale") :]


def rebuilt(function, names, compiler=lambda function: function):
    """The same code with other global names."""
    return compiler(FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__))


def compile_rule(rule, general, compiler=lambda function: function, **primitives):
    """The same text with GENERAL fixed and select and sqrt (`primitives`) exchanged; `compiler` wraps each function."""
    names = {"GENERAL": general, "select": select, "sqrt": sqrt, **primitives}
    for helper in HELPERS:
        names[helper.__name__] = rebuilt(helper, names, compiler)
    return rebuilt(rule, names, compiler)
