"""The rules on a GPU, with one driver call per step and rule.

    trace.py (above), lower.py, kernel.py, intrinsics.py, compile.py    a rule becomes machine code
    table.py, launch.py, plan.py, driver.py                             a step becomes a driver call
    norm.py, norm_kernels.py                                            clip_norm, and gradients that are not finite
    toolchain.py, __main__.py                                           what must be installed; how to see a kernel

Nothing is synchronised, allocated or copied in a step of gradients that lie where they lay.  Errors of a kernel come up at
the next synchronisation, somewhere else; check=True looks for them after each step.  No GPU is needed to see what would
run: python -m fastrms.backends.cuda --cc 9.0 --rule adam --sass
"""

from ...memory import device as memory
from .plan import Options, Plan, update
from .toolchain import available

__all__ = ["Options", "Plan", "available", "memory", "update"]
