"""What fastrms is compared with: each rule in NumPy, as people write it and with every temporary avoided.

The functions take flat arrays and use the default hyper-parameters; each class has one for each rule.  `steps` counts
Adam's updates from 1.
"""

import numpy as np


class Naive:
    """The formulas of the textbooks, line by line: short, but every operator makes a new array."""

    @staticmethod
    def rmsprop(param, grad, square_avg, *, lr=0.01, rho=0.99, eps=1e-8):
        square_avg[:] = rho * square_avg + (1 - rho) * grad**2
        param -= lr * grad / (np.sqrt(square_avg) + eps)

    @staticmethod
    def adagrad(param, grad, sum, *, lr=0.01, eps=1e-10):
        sum += grad**2
        param -= lr * grad / (np.sqrt(sum) + eps)

    @staticmethod
    def adam(param, grad, exp_avg, exp_avg_sq, *, steps, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
        step = next(steps)
        exp_avg[:] = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq[:] = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        mean = exp_avg / (1 - beta1**step)
        variance = exp_avg_sq / (1 - beta2**step)
        param -= lr * mean / (np.sqrt(variance) + eps)

    @staticmethod
    def rprop(param, grad, prev, step_size, *, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0):
        agreement = np.sign(grad) * np.sign(prev)
        eta = np.where(agreement > 0, eta_plus, np.where(agreement < 0, eta_minus, 1.0)).astype(param.dtype)
        step_size[:] = np.clip(step_size * eta, step_min, step_max)
        prev[:] = np.where(agreement < 0, 0, grad)
        param -= np.sign(prev) * step_size


class InPlace:
    """The same formulas without temporaries: `out=` everywhere, and one scratch array, for RProp also a mask."""

    @staticmethod
    def rmsprop(param, grad, square_avg, scratch, *, lr=0.01, rho=0.99, eps=1e-8):
        np.multiply(grad, grad, out=scratch)
        scratch *= 1 - rho
        square_avg *= rho
        square_avg += scratch
        np.sqrt(square_avg, out=scratch)
        scratch += eps
        np.divide(grad, scratch, out=scratch)
        scratch *= lr
        param -= scratch

    @staticmethod
    def adagrad(param, grad, sum, scratch, *, lr=0.01, eps=1e-10):
        np.multiply(grad, grad, out=scratch)
        sum += scratch
        np.sqrt(sum, out=scratch)
        scratch += eps
        np.divide(grad, scratch, out=scratch)
        scratch *= lr
        param -= scratch

    @staticmethod
    def adam(param, grad, exp_avg, exp_avg_sq, scratch, *, steps, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
        step = next(steps)
        np.multiply(grad, 1 - beta1, out=scratch)
        exp_avg *= beta1
        exp_avg += scratch
        np.multiply(grad, grad, out=scratch)
        scratch *= 1 - beta2
        exp_avg_sq *= beta2
        exp_avg_sq += scratch
        np.sqrt(exp_avg_sq, out=scratch)
        scratch *= 1 / (1 - beta2**step) ** 0.5
        scratch += eps
        np.divide(exp_avg, scratch, out=scratch)
        scratch *= lr / (1 - beta1**step)
        param -= scratch

    @staticmethod
    def rprop(param, grad, prev, step_size, scratch, mask, *, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0):
        np.sign(grad, out=scratch)
        np.sign(prev, out=prev)
        scratch *= prev
        np.greater(scratch, 0, out=mask)
        np.multiply(step_size, eta_plus, out=step_size, where=mask)
        np.less(scratch, 0, out=mask)
        np.multiply(step_size, eta_minus, out=step_size, where=mask)
        np.clip(step_size, step_min, step_max, out=step_size)
        np.copyto(prev, grad)
        np.copyto(prev, 0, where=mask)
        np.sign(prev, out=scratch)
        scratch *= step_size
        param -= scratch
