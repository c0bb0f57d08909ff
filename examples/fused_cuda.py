"""Gradient and Adam update in one CUDA kernel of your own: the weights that are nearest to a target.

The gradient never goes to memory.  Run as a script it compiles for --cc 9.0 and prints the PTX; no GPU is needed.
"""

from numba import cuda
from numba.cuda import types

import fastrms.cuda
from fastrms import rules
from fastrms.backends import ptx

adam = fastrms.cuda.neutral_rules.adam
COEFFICIENTS = rules.coefficient_names(rules.RULES["adam"])

SOURCE = f"""
def fused(weight, exp_avg, exp_avg_sq, target, size, {", ".join(COEFFICIENTS)}):
    at = uint64(cuda.blockIdx.x) * uint64(256) + uint64(cuda.threadIdx.x)
    if at < size:
        grad = weight[at] - target[at]
        updated = adam(weight[at], grad, exp_avg[at], exp_avg_sq[at], {", ".join(COEFFICIENTS)})
        weight[at], exp_avg[at], exp_avg_sq[at] = updated
"""


def compile_fused(cc):
    """The PTX of the fused kernel, in float32."""
    names = {"cuda": cuda, "uint64": types.uint64, "adam": adam}
    exec(SOURCE, names)
    real = types.float32
    signature = types.void(*[types.CPointer(real)] * 4, types.uint64, *[real] * len(COEFFICIENTS))
    return ptx.named_ptx(names["fused"], signature, "fused", cc)


if __name__ == "__main__":
    print(compile_fused((9, 0)))
