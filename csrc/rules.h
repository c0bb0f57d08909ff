/* THE MATHEMATICS in C: one infix block per rule.  No loops, no types, no threads.
 *
 * fastrms/rules.py says the same in Python, with the same names in the same order of operations;
 * the tests hold the two equal to the last bit.  Only + - * /, sqrt and select, all correctly
 * rounded, so every compiler and instruction set agrees.  No literals: a coefficient arrives
 * ready-made in the compute dtype.  GENERAL is a compile-time constant: the lines under it serve
 * the hyper-parameters that are off by default.
 *
 * kernels.inc includes this file once per dtype and form.  A rule is its _NAMES list (state
 * buffers S, coefficients C, in the order of the Python arguments), its block, and its name in RULES. */

#define RULES(X, with) X(rmsprop, with) X(rmsprop_momentum, with) X(rmsprop_centered, with) \
    X(rmsprop_centered_momentum, with) X(adagrad, with) X(adam, with) X(adam_amsgrad, with) X(rprop, with)

HELPER larger(real x, real y) { return select(y > x, y, x); }

HELPER clip(real x, real low, real high)
{
    x = select(low > x, low, x);
    return select(high < x, high, x);
}

HELPER flush(real x, real tiny, real zero) { return select(fabs(x) < tiny, zero, x); }

HELPER sign(real x, real zero, real one) { return select(x > zero, one, select(x < zero, -one, zero)); }

HELPER prepare(real grad, real param, real grad_scale, real grad_rescale, real clip_low, real clip_high, real weight_decay)
{
    real g = grad * grad_scale;
    if (GENERAL)
        g = clip(g * grad_rescale, clip_low, clip_high) + weight_decay * param;
    return g;
}

/* RMSProp (Hinton 2012): divide each gradient by a running root mean square. */
#define rmsprop_NAMES(S, C) S(square_avg) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(rho) C(one_minus_rho) C(v_scale) C(eps_root) \
    C(in_scale) C(eps) C(decay) C(tiny) C(zero)
RULE(rmsprop)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero);
    real w = square_avg;
    if (GENERAL)
        w = w * v_scale + eps_root;
    real u = in_scale * g / (sqrt(w) + eps);
    param = param - (u + decay * param);
}
END(rmsprop)

/* RMSProp with momentum: the step itself is averaged (Graves 2013; Sutskever 2013 for nesterov). */
#define rmsprop_momentum_NAMES(S, C) S(square_avg) S(momentum_buffer) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(rho) C(one_minus_rho) C(v_scale) C(eps_root) \
    C(in_scale) C(eps) C(momentum) C(nesterov_b) C(nesterov_u) C(out_scale) C(decay) C(tiny) C(zero)
RULE(rmsprop_momentum)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero);
    real w = square_avg;
    if (GENERAL)
        w = w * v_scale + eps_root;
    real u = in_scale * g / (sqrt(w) + eps);
    momentum_buffer = flush(momentum * momentum_buffer + u, tiny, zero);
    real b = momentum_buffer;
    if (GENERAL)
        b = nesterov_b * b + nesterov_u * u;
    param = param - (out_scale * b + decay * param);
}
END(rmsprop_momentum)

/* Centered RMSProp (Graves 2013): divide by the running standard deviation.  The floor keeps the
 * cancellation v - a*a above the rounding of v itself.  It stands first in larger(), which keeps its first
 * argument where the second is NaN: after finite gradients whose square overflows, v - a*a is inf - inf, and
 * the floor, which is infinite then, makes the update 0, as in plain RMSProp.  A NaN gradient makes the floor NaN. */
#define rmsprop_centered_NAMES(S, C) S(square_avg) S(grad_avg) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(rho) C(one_minus_rho) C(v_scale) C(floor) \
    C(eps_root) C(in_scale) C(eps) C(decay) C(tiny) C(zero)
RULE(rmsprop_centered)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero);
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero);
    real v = square_avg, a = grad_avg;
    if (GENERAL) {
        v = v * v_scale;
        a = a * v_scale;
    }
    real w = larger(floor * v, v - a * a);
    if (GENERAL)
        w = w + eps_root;
    real u = in_scale * g / (sqrt(w) + eps);
    param = param - (u + decay * param);
}
END(rmsprop_centered)

/* Centered RMSProp with momentum (Graves 2013, equations 38 to 45). */
#define rmsprop_centered_momentum_NAMES(S, C) S(square_avg) S(grad_avg) S(momentum_buffer) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(rho) C(one_minus_rho) C(v_scale) C(floor) \
    C(eps_root) C(in_scale) C(eps) C(momentum) C(nesterov_b) C(nesterov_u) C(out_scale) C(decay) C(tiny) C(zero)
RULE(rmsprop_centered_momentum)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero);
    grad_avg = flush(rho * grad_avg + one_minus_rho * g, tiny, zero);
    real v = square_avg, a = grad_avg;
    if (GENERAL) {
        v = v * v_scale;
        a = a * v_scale;
    }
    real w = larger(floor * v, v - a * a);
    if (GENERAL)
        w = w + eps_root;
    real u = in_scale * g / (sqrt(w) + eps);
    momentum_buffer = flush(momentum * momentum_buffer + u, tiny, zero);
    real b = momentum_buffer;
    if (GENERAL)
        b = nesterov_b * b + nesterov_u * u;
    param = param - (out_scale * b + decay * param);
}
END(rmsprop_centered_momentum)

/* AdaGrad (Duchi, Hazan, Singer 2011): divide by the root of the sum of squares since the start. */
#define adagrad_NAMES(S, C) S(sum) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(eps_root) C(lr) C(eps) C(decay) \
    C(tiny) C(zero)
RULE(adagrad)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    sum = flush(sum + g * g, tiny, zero);
    real w = sum;
    if (GENERAL)
        w = w + eps_root;
    real u = lr * g / (sqrt(w) + eps);
    param = param - (u + decay * param);
}
END(adagrad)

/* Adam (Kingma, Ba 2015): RMSProp on a running mean of the gradient, both corrected for their start at 0. */
#define adam_NAMES(S, C) S(exp_avg) S(exp_avg_sq) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(beta1) C(one_minus_beta1) C(beta2) \
    C(one_minus_beta2) C(m_scale) C(g_scale) C(v_scale) C(eps_root) C(step_size) C(root_scale) C(eps) \
    C(decay) C(tiny) C(zero)
RULE(adam)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    exp_avg = flush(beta1 * exp_avg + one_minus_beta1 * g, tiny, zero);
    exp_avg_sq = flush(beta2 * exp_avg_sq + (one_minus_beta2 * g) * g, tiny, zero);
    real m = exp_avg, w = exp_avg_sq;
    if (GENERAL) {
        m = m_scale * m + g_scale * g;
        w = w * v_scale + eps_root;
    }
    real u = step_size * m / (sqrt(w) * root_scale + eps);
    param = param - (u + decay * param);
}
END(adam)

/* AMSGrad (Reddi, Kale, Kumar 2018): Adam that divides by the largest second moment so far. */
#define adam_amsgrad_NAMES(S, C) S(exp_avg) S(exp_avg_sq) S(max_exp_avg_sq) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(weight_decay) C(beta1) C(one_minus_beta1) C(beta2) \
    C(one_minus_beta2) C(max_scale) C(m_scale) C(g_scale) C(v_scale) C(eps_root) C(step_size) C(root_scale) C(eps) \
    C(decay) C(tiny) C(zero)
RULE(adam_amsgrad)
{
    real g = prepare(grad, param, grad_scale, grad_rescale, clip_low, clip_high, weight_decay);
    exp_avg = flush(beta1 * exp_avg + one_minus_beta1 * g, tiny, zero);
    exp_avg_sq = flush(beta2 * exp_avg_sq + (one_minus_beta2 * g) * g, tiny, zero);
    max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq * max_scale);
    real m = exp_avg, w = max_exp_avg_sq;
    if (GENERAL) {
        m = m_scale * m + g_scale * g;
        w = w * v_scale + eps_root;
    }
    real u = step_size * m / (sqrt(w) * root_scale + eps);
    param = param - (u + decay * param);
}
END(adam_amsgrad)

/* RProp (Riedmiller, Braun 1993), iRprop- (Igel, Huesken 2000): a step size per weight, grown while the
 * sign of its gradient stays and shrunk when it flips.  flip_below is 0 for iRprop-, -inf for plain Rprop-. */
#define rprop_NAMES(S, C) S(prev) S(step_size) \
    C(grad_scale) C(grad_rescale) C(clip_low) C(clip_high) C(eta_minus) C(eta_plus) C(step_min) C(step_max) \
    C(flip_below) C(zero) C(one)
RULE(rprop)
{
    real g = prepare(grad, zero, grad_scale, grad_rescale, clip_low, clip_high, zero);
    real direction = sign(g, zero, one);
    real s = direction * sign(prev, zero, one);
    real eta = select(s > zero, eta_plus, select(s < zero, eta_minus, one));
    step_size = clip(step_size * eta, step_min, step_max);
    param = param - select(s < flip_below, zero, direction) * step_size;
    prev = select(s < flip_below, zero, g);
}
END(rprop)
