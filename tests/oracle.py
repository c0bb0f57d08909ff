"""The textbook oracle: RMSProp, AdaGrad, Adam and RProp as their papers write them, for any NumPy float type.

Written from the papers and the frameworks' documents, never from fastrms' own rules or coefficients; slow on purpose.
An oracle holds ``theta`` and its averages in `real`, float64 to judge float32 and np.longdouble to judge float64,
and makes one step per call.  ``state()`` names the averages as PyTorch does, which is how fastrms names them.
"""

import numpy as np


class Oracle:
    """What every optimizer shares: the step count t, the schedule, and how the gradient is prepared."""

    def __init__(self, theta, real, *, lr, weight_decay=0.0, decoupled=False, maximize=False, clip_value=None):
        self.real = real
        self.theta = np.array(theta, real)
        self.t = 0
        self.lr = lr if callable(lr) else lambda done: lr
        self.lam = real(weight_decay)
        self.decoupled = decoupled
        self.maximize = maximize
        self.clip_value = clip_value

    def zeros(self, start=0.0):
        return np.full(self.theta.shape, start, self.real)

    def step(self, gradient, grad_scale=1.0):
        """theta_t from theta_(t-1) and the gradient there; a callable lr is asked with t - 1."""
        eta = self.real(self.lr(self.t))
        self.t += 1
        g = self.prepared(np.asarray(gradient).astype(self.real) * self.real(grad_scale))
        self.theta = self.theta - self.move(g, self.rate(eta)) - self.decoupled_decay(self.rate(eta))

    def prepared(self, g):
        """Unscaled above; then the sign, the clip by value, and L2 regularisation, in this order."""
        if self.maximize:
            g = -g
        if self.clip_value is not None:
            g = np.clip(g, -self.real(self.clip_value), self.real(self.clip_value))
        return g if self.decoupled else g + self.lam * self.theta

    def decoupled_decay(self, eta):
        """Loshchilov and Hutter 2019: theta decays by eta*lambda, beside the gradient's step."""
        return eta * self.lam * self.theta if self.decoupled else self.real(0)

    def rate(self, eta):
        return eta


class RMSProp(Oracle):
    """Hinton 2012 (lecture 6e); Graves 2013, equations 38 to 45 (centered, momentum); Sutskever 2013 (nesterov)."""

    def __init__(
        self, theta, real, *, rho=0.99, eps=1e-8, eps_root=0.0, momentum=0.0, nesterov=False, centered=False,
        initial_value=0.0, lr_in_momentum=False, bias_correction=False, lr=0.01, **common,
    ):  # fmt: skip
        super().__init__(theta, real, lr=lr, **common)
        self.rho, self.mu = real(rho), real(momentum)
        self.eps, self.eps_root = real(eps), real(eps_root)
        self.nesterov, self.centered, self.lr_in_momentum = nesterov, centered, lr_in_momentum
        self.bias_correction = bias_correction
        self.n = self.zeros(initial_value)
        self.g_bar = self.zeros()
        self.delta = self.zeros()

    def move(self, g, eta):
        one = self.real(1)
        self.n = self.rho * self.n + (one - self.rho) * g**2
        self.g_bar = self.rho * self.g_bar + (one - self.rho) * g
        if self.bias_correction == "folded":
            eta = eta * np.sqrt(one - self.rho**self.t)
        direction = g / (np.sqrt(self.second_moment() + self.eps_root) + self.eps)
        return self.with_momentum(direction, eta)

    def second_moment(self):
        bias = self.real(1) - self.rho**self.t if self.bias_correction == "corrected" else self.real(1)
        n, g_bar = self.n / bias, self.g_bar / bias
        if not self.centered:
            return n
        variance = n - g_bar**2
        if not (variance >= 0).all():
            raise ArithmeticError("the textbook has no answer for a variance below 0")
        return variance

    def with_momentum(self, direction, eta):
        if self.mu == 0:
            return eta * direction
        update = eta * direction if self.lr_in_momentum else direction
        self.delta = self.mu * self.delta + update
        applied = self.mu * self.delta + update if self.nesterov else self.delta
        return applied if self.lr_in_momentum else eta * applied

    def state(self):
        named = {"square_avg": self.n}
        if self.centered:
            named["grad_avg"] = self.g_bar
        if self.mu > 0:
            named["momentum_buffer"] = self.delta
        return named


class AdaGrad(Oracle):
    """Duchi, Hazan, Singer 2011, the diagonal form; lr_decay as in PyTorch's document."""

    def __init__(self, theta, real, *, eps=1e-10, eps_root=0.0, lr_decay=0.0, initial_value=0.0, lr=0.01, **common):
        super().__init__(theta, real, lr=lr, **common)
        self.delta, self.delta_root, self.lr_decay = real(eps), real(eps_root), real(lr_decay)
        self.G = self.zeros(initial_value)

    def rate(self, eta):
        return eta / (self.real(1) + self.real(self.t - 1) * self.lr_decay)

    def move(self, g, eta):
        self.G = self.G + g**2
        return eta * g / (np.sqrt(self.G + self.delta_root) + self.delta)

    def state(self):
        return {"sum": self.G}


class Adam(Oracle):
    """Kingma, Ba 2015, algorithm 1 ("corrected") and the note under it ("folded", where eps is epsilon hat);
    Reddi, Kale, Kumar 2018 (amsgrad); Dozat 2016 (nesterov)."""

    def __init__(
        self, theta, real, *, beta1=0.9, beta2=0.999, eps=1e-8, eps_root=0.0, amsgrad=False, nesterov=False,
        bias_correction="corrected", lr=1e-3, **common,
    ):  # fmt: skip
        super().__init__(theta, real, lr=lr, **common)
        self.beta1, self.beta2, self.eps, self.eps_root = real(beta1), real(beta2), real(eps), real(eps_root)
        self.amsgrad, self.nesterov, self.bias_correction = amsgrad, nesterov, bias_correction
        self.m, self.v, self.v_max = self.zeros(), self.zeros(), self.zeros()

    def bias(self, beta, steps):
        return self.real(1) - beta**steps if self.bias_correction else self.real(1)

    def move(self, g, eta):
        one = self.real(1)
        self.m = self.beta1 * self.m + (one - self.beta1) * g
        self.v = self.beta2 * self.v + (one - self.beta2) * g**2
        if self.bias_correction == "folded":
            alpha = eta * np.sqrt(one - self.beta2**self.t)
            return alpha * self.first_moment(g) / (np.sqrt(self.largest(self.v) + self.eps_root) + self.eps)
        return eta * self.first_moment(g) / (np.sqrt(self.corrected_second_moment() + self.eps_root) + self.eps)

    def first_moment(self, g):
        """m hat; with nesterov, what it will be once g has come a second time."""
        now, ahead = self.bias(self.beta1, self.t), self.bias(self.beta1, self.t + 1)
        if self.nesterov == "dozat":
            return self.beta1 * self.m / ahead + (self.real(1) - self.beta1) * g / now
        if self.nesterov == "folded":
            return (self.beta1 * self.m + (self.real(1) - self.beta1) * g) / now
        return self.m / now

    def corrected_second_moment(self):
        bias = self.bias(self.beta2, self.t)
        return self.largest(self.v / bias) if self.amsgrad == "corrected" else self.largest(self.v) / bias

    def largest(self, v):
        if self.amsgrad:
            self.v_max = np.maximum(self.v_max, v)
            return self.v_max
        return v

    def state(self):
        named = {"exp_avg": self.m, "exp_avg_sq": self.v}
        return {**named, "max_exp_avg_sq": self.v_max} if self.amsgrad else named


class AdamW(Adam):
    """Loshchilov, Hutter 2019: Adam with decoupled decay."""

    def __init__(self, theta, real, *, weight_decay=0.01, decoupled=True, **hyper):
        super().__init__(theta, real, weight_decay=weight_decay, decoupled=decoupled, **hyper)


class RProp(Oracle):
    """Igel, Huesken 2000: Rprop- (algorithm 2) and, with zero_on_flip, iRprop- (algorithm 4)."""

    def __init__(
        self, theta, real, *, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0, zero_on_flip=True,
        lr=0.01, **common,
    ):  # fmt: skip
        super().__init__(theta, real, lr=lr, **common)
        self.eta_minus, self.eta_plus = real(eta_minus), real(eta_plus)
        self.delta_min, self.delta_max = real(step_min), real(step_max)
        self.zero_on_flip = zero_on_flip
        self.delta, self.g_last = self.zeros(lr), self.zeros()

    def move(self, g, eta):
        kept, flipped = g * self.g_last > 0, g * self.g_last < 0
        self.delta[kept] = np.minimum(self.delta[kept] * self.eta_plus, self.delta_max)
        self.delta[flipped] = np.maximum(self.delta[flipped] * self.eta_minus, self.delta_min)
        if self.zero_on_flip:
            g = np.where(flipped, self.real(0), g)
        self.g_last = g
        return np.sign(g) * self.delta

    def state(self):
        return {"prev": self.g_last, "step_size": self.delta}


ORACLES = {oracle.__name__: oracle for oracle in (RMSProp, AdaGrad, Adam, AdamW, RProp)}
