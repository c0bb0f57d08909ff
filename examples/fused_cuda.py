"""Gradient and Adam update in one CUDA kernel of your own: the weights that are nearest to a target.

The gradient never goes to memory.  Run as a script it compiles for --cc 9.0 and prints the PTX; no GPU is needed.
"""

import sys

try:
    from numba import cuda
    from numba.cuda import types
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "numba":
        raise
    sys.exit("numba is missing, which this example needs: pip install -e '.[cu13]', or cu12")

import fastrms.cuda
from fastrms import rules

adam = fastrms.cuda.neutral_rules.adam
COEFFICIENTS = rules.coefficient_names(rules.RULES["adam"])
uint64 = types.uint64  # indices are compared with the size, and an int64 would be compared as a double


def fused(weight, exp_avg, exp_avg_sq, target, size, coefficients):
    at = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    if at < size:
        grad = weight[at] - target[at]
        updated = adam(weight[at], grad, exp_avg[at], exp_avg_sq[at], *coefficients)
        weight[at], exp_avg[at], exp_avg_sq[at] = updated


def compile_fused(cc):
    """The PTX of the fused kernel, in float32; coefficients are one argument each, in the order of COEFFICIENTS."""
    real = types.float32
    signature = types.void(*[types.CPointer(real)] * 4, uint64, types.UniTuple(real, len(COEFFICIENTS)))
    return fastrms.cuda.compile_ptx(fused, signature, cc)


if __name__ == "__main__":
    print(compile_fused((9, 0)))
