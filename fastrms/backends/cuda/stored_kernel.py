"""The text of a CUDA kernel around a rule whose buffers are stored in formats: it decodes, updates and encodes in registers.

A thread updates four elements at once, so that a vector of bf16 has 64 bits and one of float32 128; all buffers of a tensor
must share the number of elements to the next vector, else there are no vectors.  Where a state is in q8, the 32 threads of a
warp update a block of 256 elements, eight each, and find the largest of them by exchanging registers; such a kernel moves
single elements, which the threads of a warp have side by side, and needs no alignment.
"""

from numba import cuda
from numba.cuda import types

from ... import formats, own_rules, rules
from . import codecs, intrinsics
from .kernel import KERNEL, head, indented
from .table import BEHIND, BLOCKS, LANES, THREADS, WARP

ELEMENTS = range(formats.Q8_BLOCK // WARP)  # of a thread


KERNEL_IN_BLOCKS = """\
def kernel({arguments}):
    block = uint64(cuda.blockIdx.x)
{head}\
    unit = block * uint64({blocks}) + uint64(cuda.threadIdx.x) // uint64({warp})
    lane = uint64(cuda.threadIdx.x) % uint64({warp})
    if unit * uint64({q8_block}) < size:
        at = unit * uint64({q8_block}) + lane
        last, valid = size - uint64(1), uint32(min(size - min(at, size), uint64({q8_block})))
{of_block}"""


def parts(rule, made):
    """(name, Format) of each buffer of a tensor, in the order of its addresses."""
    names = ["param", "grad", *rules.state_names(rule), *(f"copy_{k}" for k in range(len(made.copies)))]
    found = [made.written[0], made.grad, *made.written[1:], *made.copies]
    return [(name, formats.FORMATS[format]) for name, format in zip(names, found, strict=True)]


def buffers(rule, made):
    """Name -> type of an element of each array; that of what split formats and blocks have beside it ends in _low."""
    found = {}
    for name, format in parts(rule, made):
        low = types.int32 if format.in_blocks else codecs.STORED[format.low] if format.low else None
        found |= {name: codecs.STORED[format.dtype], **({f"{name}_low": low} if low else {})}
    return {name: "real" if kind is types.float32 else str(kind) for name, kind in found.items()}


def behind(made):
    """What follows on the addresses in a row of the table: the position of the first element, where numbers are random."""
    return [*BEHIND, *["origin"] * bool(made.streams)]


def keys(rule, made):
    """The names of the keys of random numbers."""
    return [f"key_{('param', *rules.state_names(rule))[k]}" for k in made.streams]


def arguments(rule, kind):
    """The arguments of a kernel, as kernel.arguments()."""
    rule, made = own_rules.plain(rule), kind.formats
    numbers = [name for name in behind(made) if name != "first_block"]
    single = {name: f"{one}*" for name, one in buffers(rule, made).items()} | dict.fromkeys(numbers, "uint64")
    where = {"table": "uint64*", "tensor_of": "uint32*"} if kind.many else single
    given = dict.fromkeys(rules.coefficient_names(rule), "real") | dict.fromkeys(keys(rule, made), "uint32")
    return {**where, **({"coefficients": "real*"} if kind.capturable else given)}


def functions(rule, made):
    """What the text calls: name -> device function."""
    rule, stride = own_rules.plain(rule), WARP if made.in_blocks else 1
    found = {"uint32": types.uint32, "bits": codecs.device_function(1, [types.uint32], lambda lane, x: [codecs.bits(x)])}
    found |= {"magnitudes": codecs.magnitudes(), "of_warp": of_warp}
    found["load"], found["store"] = intrinsics.vectors(LANES)
    for kind in (types.uint8, types.uint16, types.int32):
        found |= {str(kind): kind, f"pointer_{kind}": intrinsics.pointer_to(kind)}
    for name, format in parts(rule, made):
        if format.number:
            found[f"decode_{name}"] = codecs.decoder(format.name)
            found[f"encode_{name}"] = codecs.encoder(format.name, f"key_{name}" in keys(rule, made), stride)
        if format.in_blocks:
            found[f"base_{name}"] = codecs.base_of(format.name)
    return found


@cuda.jit(device=True, inline="always")
def of_warp(x):
    """The largest number of a warp."""
    for k in range(5):
        x = max(x, cuda.shfl_xor_sync(0xFFFFFFFF, x, 16 >> k))
    return x


def kernel_text(rule, dtype, kind):
    """The Python source of a kernel, which calls `rule` and what functions() gives."""
    rule, made = own_rules.plain(rule), kind.formats
    pointers = {name: "pointer" if one == "real" else f"pointer_{one}" for name, one in buffers(rule, made).items()}
    names = [*rules.coefficient_names(rule)]
    lines = head(pointers, behind(made), names, kind)
    if kind.capturable:
        lines += [f"{key}, = bits(coefficients[uint64({k})])" for k, key in enumerate(keys(rule, made), len(names))]
    common = {"arguments": ", ".join(arguments(rule, kind)), "head": indented(lines, 1)}
    if made.in_blocks:
        lines = indented(block_body(rule, kind), 2)
        return KERNEL_IN_BLOCKS.format(**common, blocks=BLOCKS, warp=WARP, q8_block=formats.Q8_BLOCK, of_block=lines)
    itemsize = formats.FORMATS[made.written[0]].dtype.itemsize
    return KERNEL.format(
        **common,
        threads=THREADS,
        vector=LANES * itemsize,
        itemsize=itemsize,
        lanes=LANES,
        first="at",
        of_vector=indented(body(rule, kind, "load({}, at)".format, "store({}, at, {})".format, LANES), 2),
        of_element=indented(body(rule, kind, "{}[at]".format, "{}[at] = {}".format), 3),
    )


def body(rule, kind, read, write, lanes=0):
    """The lines that update what lies at `at`."""
    stored = buffers(rule, kind.formats)
    zeros = f"{stored['grad']}(0)"
    cleared = write("grad", f"({f'{zeros}, ' * lanes})" if lanes else zeros)
    arrays = [name for name in stored if name.removesuffix("_low") != "grad"]
    return [*update(rule, kind, lambda name, format: [read(array) for array in arrays_of(name, format)]),
            *encoded(rule, kind.formats), *(write(name, f"new_{name}") for name in arrays),
            *[cleared] * kind.zero_grad]  # fmt: skip


def arrays_of(name, format):
    return [name, *[f"{name}_low"] * (format.low is not None or format.in_blocks)]


def update(rule, kind, read):
    """The lines that decode all, and call the rule.  read(name, Format): what is decoded."""
    made, lines = kind.formats, []
    for name, format in parts(rule, made)[: 1 + len(made.written)]:
        given = ", ".join(read(name, format))
        lines.append(f"old_{name}, = decode_{name}({given})" if format.number else f"old_{name} = {given}")
    states = rules.state_names(rule)
    results = ", ".join(f"updated_{name}" for name in ("param", *states))
    given = [f"old_{name}" for name in ("param", "grad", *states)]
    return [*lines, f"{results}, = rule({', '.join([*given, *rules.coefficient_names(rule)])})"]


def encoded(rule, made, bases=()):
    """The lines that make of each updated number what is stored.  bases: the names of those that are in blocks."""
    lines = ["position = uint32(origin + at)"] * bool(made.streams)
    for name, format in parts(rule, made):
        number = f"updated_{'param' if name.startswith('copy_') else name}"
        if name == "grad" or not format.number:
            lines += [f"new_{name} = {number}"] * (name != "grad")
            continue
        given = [number, *[f"new_{name}_low"] * format.in_blocks]
        given += ["position", f"key_{name}"] if f"key_{name}" in keys(rule, made) else []
        results = ", ".join(f"new_{array}" for array in arrays_of(name, format)[: 1 + (format.low is not None)])
        lines.append(f"{results}, = encode_{name}({', '.join(given)})")
    return lines


def block_body(rule, kind):
    """The lines by which a warp updates a block of 256 elements; `valid`: how many there are from that of a thread on.
    Threads behind the last element read this one, and write nothing."""
    stored, found = buffers(rule, kind.formats), parts(rule, kind.formats)

    def read(name, format):
        gathered = ["".join(f"{array}[from_{k}], " for k in ELEMENTS) for array in arrays_of(name, format)]
        return [f"({gathered[0]})", f"{name}_low[unit]"] if format.in_blocks else [f"({text})" for text in gathered]

    lines = [f"from_{k} = min(at + uint64({WARP * k}), last)" for k in ELEMENTS]
    lines += update(rule, kind, read)
    in_blocks = [name for name, format in found if format.in_blocks]
    for name in in_blocks:
        tops = ", ".join(f"top[{k}]" for k in ELEMENTS)
        lines += [f"top, = magnitudes(updated_{name}, valid)", f"new_{name}_low, = base_{name}(of_warp(max({tops})))"]
    lines += encoded(rule, kind.formats)
    written = [name for name in stored if name.removesuffix("_low") not in ("grad", *in_blocks)] + in_blocks
    for k in ELEMENTS:
        lines.append(f"if valid > uint32({WARP * k}):")
        lines += [f"    {name}[from_{k}] = new_{name}[{k}]" for name in written]
        lines += [f"    grad[from_{k}] = {stored['grad']}(0)"] * kind.zero_grad
    return [*lines, "if lane == uint64(0):", *(f"    {name}_low[unit] = new_{name}_low" for name in in_blocks)]
