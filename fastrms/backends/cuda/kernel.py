"""The text of a CUDA kernel around a rule.

A kernel is told how many vectors it may use (table.py).  They begin at the first element whose address is a multiple of
their size; the elements before it, the head, and those that the vectors leave behind them are updated one per thread, by
the same rule.  There is no loop, hence no limit at 2^31 elements, and every index is a uint64 compared with a uint64 (with
an int64 Numba would compare doubles).
"""

from typing import Any, NamedTuple

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
        CUDA graph; else they are arguments.  Behind them, and behind the keys of random numbers, is a number that is 0
        where the step is left out: the kernel does nothing then.
    zero_grad : bool
        The kernel writes zeros over the gradient.
    formats : table.Formats, optional
        How the buffers are stored, where they are not all in the dtype of the update.
    """

    many: bool = False
    capturable: bool = False
    zero_grad: bool = False
    formats: Any = None


KERNEL = """\
def kernel({arguments}):
    block = uint64(cuda.blockIdx.x)
{head}\
    thread = block * uint64({threads}) + uint64(cuda.threadIdx.x)
    head = (uint64(0) - start) % uint64({vector}) // uint64({itemsize})
    if thread < vectors:
        {first} = thread * uint64({lanes}) + head
{of_vector}\
    else:
        single = thread - vectors
        at = single if single < head else single + vectors * uint64({lanes})
        if at < size:
{of_element}"""  # of_vector updates the elements from {first} on, of_element the one at `at`


def kernel_name(rule, general, dtype, kind):
    """The name of a kernel in PTX, on disk and in errors."""
    form = "general" if general else "neutral"
    kinds = [getattr(on, "name", name) for name, on in kind._asdict().items() if on]
    return "_".join(["fastrms", str(rule), form, str(dtype), *kinds])


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
    buffers, updated, lanes = ["param", "grad", *states], ["param", *states], width(dtype)
    stored = [*((name, f"{name}_lanes") for name in updated), *[("grad", f"({'nothing, ' * lanes})")] * kind.zero_grad]
    loads = ", ".join([f"load({name}, first)" for name in buffers] + names)
    of_vector = [", ".join(f"{name}_lanes" for name in updated) + f", = rule({loads})",
                 *(f"store({name}, first, {vector})" for name, vector in stored)]  # fmt: skip
    elements = ", ".join([f"{name}[at]" for name in buffers] + names)
    of_element = [", ".join(f"{name}[at]" for name in updated) + f", = rule({elements})"]
    of_element += ["grad[at] = nothing"] * kind.zero_grad
    return KERNEL.format(
        arguments=", ".join(arguments(rule, kind)),
        head=indented(head(dict.fromkeys(buffers, "pointer"), BEHIND, names, kind), 1),
        threads=THREADS,
        vector=VECTOR,
        itemsize=dtype.itemsize,
        lanes=lanes,
        first="first",
        of_vector=indented(of_vector, 2),
        of_element=indented(of_element, 3),
    )


def indented(lines, depth):
    return "".join(f"{'    ' * depth}{line}\n" for line in lines)


def _tensor(buffers, behind, kind):
    """The lines that note where the parameter starts; in a launch over many tensors a block finds its tensor first."""
    if not kind.many:
        return ["start = address(param)"]
    row = [*(f"{name} = {pointer}(table[row + uint64({k})])" for k, (name, pointer) in enumerate(buffers.items())),
           *(f"{name} = table[row + uint64({k})]" for k, name in enumerate(behind, len(buffers)))]  # fmt: skip
    return [
        f"row = uint64(tensor_of[block]) * uint64({len(row)})",
        "start = table[row]",
        *row,
        "block = block - first_block",
    ]


def head(buffers, behind, names, kind):
    """The lines before a thread knows what it updates.  buffers: their names, and what makes pointers to each; behind: what
    follows on them in a row of the table; names: of the coefficients."""
    lines = _tensor(buffers, behind, kind)
    if kind.capturable:
        lines += [f"{name} = coefficients[uint64({k})]" for k, name in enumerate(names)]
        last = len(names) + (len(kind.formats.streams) if kind.formats else 0)
        lines.append(f"made = coefficients[uint64({last})] != real(0)")
        lines += [f"{count} = {count} if made else uint64(0)" for count in ("size", "vectors")]
    return [*lines, *["nothing = real(0)"] * (kind.zero_grad and not kind.formats)]
