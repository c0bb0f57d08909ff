"""The text of a CUDA kernel around a rule.

A kernel is told how many vectors it may use (table.py).  They begin at the first element whose address is a multiple of
their size; the elements before it, the head, and those that the vectors leave behind them are updated one per thread, by
the same rule.  There is no loop, hence no limit at 2^31 elements, and every index is a uint64 compared with a uint64 (with
an int64 Numba would compare doubles).
"""

from typing import NamedTuple

from ... import own_rules, rules
from .table import BEHIND, THREADS, VECTOR, width


class Kind(NamedTuple):
    """Where a kernel finds its tensors and its coefficients.

    Parameters
    ----------
    many : bool
        The kernel finds any number of tensors through a table of pointers; else one tensor is among its arguments.
    capturable : bool
        The kernel reads the coefficients from device memory, where they may change between two launches of a captured
        CUDA graph; else they are arguments.
    """

    many: bool = False
    capturable: bool = False


KERNEL = """\
def kernel({arguments}):
    block = uint64(cuda.blockIdx.x)
{head}\
    thread = block * uint64({threads}) + uint64(cuda.threadIdx.x)
    head = (uint64(0) - start) % uint64({vector}) // uint64({itemsize})
    if thread < vectors:
        first = thread * uint64({width}) + head
        {lanes} = rule({loads})
{stores}\
    else:
        single = thread - vectors
        at = single if single < head else single + vectors * uint64({width})
        if at < size:
            {results} = rule({elements})
"""


def kernel_name(rule, general, dtype, kind):
    """The name of a kernel in PTX, on disk and in errors."""
    form = "general" if general else "neutral"
    return "_".join(["fastrms", str(rule), form, str(dtype), *(name for name, on in kind._asdict().items() if on)])


def arguments(rule, kind):
    """The arguments of a kernel: their names, and their types as in C, where real is the dtype."""
    rule = own_rules.plain(rule)
    names = rules.coefficient_names(rule)
    buffers = dict.fromkeys(("param", "grad", *rules.state_names(rule)), "real*")
    where = {"table": "uint64*", "tensor_of": "uint32*"} if kind.many else {**buffers, "size": "uint64", "vectors": "uint64"}
    return {**where, **({"coefficients": "real*"} if kind.capturable else dict.fromkeys(names, "real"))}


def kernel_text(rule, dtype, kind):
    """The Python source of a kernel; `rule` is the device function that it calls, load and store move vectors."""
    rule = own_rules.plain(rule)
    states, names = rules.state_names(rule), list(rules.coefficient_names(rule))
    buffers, updated = ["param", "grad", *states], ["param", *states]
    return KERNEL.format(
        arguments=", ".join(arguments(rule, kind)),
        head="".join(f"    {line}\n" for line in [*_tensor(buffers, kind), *_coefficients(names, kind)]),
        threads=THREADS,
        vector=VECTOR,
        itemsize=dtype.itemsize,
        width=width(dtype),
        lanes=", ".join(f"{name}_lanes" for name in updated) + ",",
        loads=", ".join([f"load({name}, first)" for name in buffers] + names),
        stores="".join(f"        store({name}, first, {name}_lanes)\n" for name in updated),
        results=", ".join(f"{name}[at]" for name in updated) + ",",
        elements=", ".join([f"{name}[at]" for name in buffers] + names),
    )


def _tensor(buffers, kind):
    """The lines that note where the parameter starts; in a launch over many tensors a block finds its tensor first."""
    if not kind.many:
        return ["start = address(param)"]
    row = [*(f"{name} = pointer(table[row + uint64({k})])" for k, name in enumerate(buffers)),
           *(f"{name} = table[row + uint64({k})]" for k, name in enumerate(BEHIND, len(buffers)))]  # fmt: skip
    return [
        f"row = uint64(tensor_of[block]) * uint64({len(row)})",
        "start = table[row]",
        *row,
        "block = block - first_block",
    ]


def _coefficients(names, kind):
    """The lines that read the coefficients of a captured graph."""
    return [f"{name} = coefficients[uint64({k})]" for k, name in enumerate(names)] if kind.capturable else []
