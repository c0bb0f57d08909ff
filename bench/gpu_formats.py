"""Speed of the CUDA kernels with storage formats, beside float32 and as many plain streams of float32, the ceiling."""

from .contenders import OPTIMIZERS
from .figures_formats import FLOAT32, SETTINGS
from .gpu_kernels import CEILINGS, LR, bound, row
from .problem import bytes_moved, state_names

COPY = "float32 with a bf16 copy"
ALL = SETTINGS | {COPY: (True, False, {})}


def formats(gpu, rule, size):
    """A row for float32, each of the settings and the ceiling.  GB/s count the bytes that a step moves, in its formats."""
    floats = param, grad = gpu.random(size), gpu.random(size, seed=1)
    halves = gpu.bf16(size), gpu.bf16(size, seed=1)
    optimizers = {}
    for name, (grad_is_half, param_is_half, options) in ALL.items():
        more = {"param_copy": gpu.bf16(size)} if name == COPY else {}
        arrays = (floats, halves)[param_is_half][0], (floats, halves)[grad_is_half][1]
        optimizers[name] = bound(OPTIMIZERS[rule], *arrays, lr=LR, **options, **more)
    plain = CEILINGS[len(state_names(rule))]
    optimizers[plain.__name__] = bound(plain, param, grad)
    found = gpu.milliseconds({name: optimizer.step for name, optimizer in optimizers.items()})
    rows = [row(name, size, "float32", bytes_moved(optimizers[name]), taken) for name, taken in found.items()]
    for made in rows:
        made |= {"rule": rule, "over float32": found[FLOAT32] / found[made["what"]]}
        made["% of streams"] = 100 * made["GB/s"] / rows[-1]["GB/s"]
    return rows
