"""A classifier of ReLU layers in NumPy, which the other examples train: probabilities, gradients, mini-batches.

Its gradients are written into arrays that never move, so that an optimizer binds them once:
`optimizer = fastrms.RMSProp(network.weights)`, `optimizer.bind(network.gradients)`, and `optimizer.step()` after `backward`.
"""

from itertools import pairwise

import numpy as np


class Network:
    """Layers of these sizes, such as (784, 512, 256, 10), with softmax at the end, trained on the mean cross-entropy.

    weights, gradients: a matrix and a bias for each layer, of `dtype`.
    """

    def __init__(self, sizes, random, dtype=np.float32):
        self.weights = []
        for inputs, outputs in pairwise(sizes):
            matrix = random.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)  # He et al. 2015, equation 10
            self.weights += [matrix.astype(dtype), np.zeros(outputs, dtype)]
        self.gradients = [np.zeros_like(weight) for weight in self.weights]

    def activities(self, inputs):
        """The inputs, what each hidden layer makes of them and, last, the probability of each class."""
        *hidden, last = zip(self.weights[::2], self.weights[1::2], strict=True)
        outputs = [inputs]
        for matrix, bias in hidden:
            outputs.append(np.maximum(outputs[-1] @ matrix + bias, 0))
        scores = outputs[-1] @ last[0] + last[1]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(scores / scores.sum(axis=1, keepdims=True))
        return outputs

    def backward(self, inputs, classes):
        """Fill `gradients` for the mean cross-entropy of these examples, and return this loss."""
        *outputs, delta = self.activities(inputs)
        loss = cross_entropy(delta, classes)
        delta[np.arange(len(classes)), classes] -= 1
        delta /= len(classes)
        for layer in reversed(range(len(outputs))):
            np.matmul(outputs[layer].T, delta, out=self.gradients[2 * layer])
            delta.sum(axis=0, out=self.gradients[2 * layer + 1])
            if layer:
                delta = delta @ self.weights[2 * layer].T * (outputs[layer] > 0)
        return loss

    def probabilities(self, inputs):
        return self.activities(inputs)[-1]

    def loss(self, inputs, classes):
        return cross_entropy(self.probabilities(inputs), classes)

    def accuracy(self, inputs, classes):
        return float((self.probabilities(inputs).argmax(axis=1) == classes).mean())


def cross_entropy(probabilities, classes):
    """The mean of -log(probability of the right class); at most 27.6, which stands for a probability of 0."""
    return float(-np.log(probabilities[np.arange(len(classes)), classes] + 1e-12).mean())


def batches(size, count, random):
    """The indices 0 to count - 1 in random order, `size` at a time; the last batch may be shorter."""
    order = random.permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]
