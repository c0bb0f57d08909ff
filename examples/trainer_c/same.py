"""Makes in Python the steps that trainer.c made, from the gradients it wrote, and compares the weights bit by bit.

Run with `python examples/trainer_c/same.py weights.bin steps.bin`.
"""

import math
import sys

import numpy as np

import fastrms

SHAPES = (32, 64), (10, 32), (32,), (10,)  # weights, weights, biases, biases
SIZES = [math.prod(shape) for shape in SHAPES]


def tensors(flat):
    """The tensors of a flat array, as views: weights and biases."""
    parts = np.split(flat, np.cumsum(SIZES)[:-1])
    views = [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]
    return views[:2], views[2:]


def replay(steps):
    """The weights after all steps.  steps: the first weights and the gradients of each step, one row each."""
    final = steps[0].copy()
    weights, biases = tensors(final)
    optimizer = fastrms.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=3e-3)
    for gradient in steps[1:]:
        optimizer.step(tensors(gradient), grad_scale=1 / 32, clip_norm=1.0)
    return final


def main(weights, steps):
    """Whether both are the same to the last bit."""
    final = replay(np.fromfile(steps, np.float32).reshape(-1, sum(SIZES)))
    same = final.tobytes() == np.fromfile(weights, np.float32).tobytes()
    print("equal to the last bit" if same else "DIFFERENT")
    return same


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
