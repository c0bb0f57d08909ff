"""Other ways to write the CUDA kernels, side by side with the one that is used: hints for the caches on loads and stores,
128 and 512 threads per block, two vectors per thread.  They have the same bits, or are left out with the reason."""

import re

import numpy as np

import fastrms
from fastrms.backends.coefficients import Coefficients
from fastrms.backends.cuda import intrinsics, kernel, launch, lower, table, toolchain
from fastrms.memory import device

from .gpu_kernels import LR, row
from .problem import bytes_per_element

HINTS = {  # what stands behind ld.global and st.global
    "plain": ("", ""),
    ".cs": (".cs", ".cs"),
    "loads L1::no_allocate": (".L1::no_allocate", ""),
    "loads L1::evict_first": (".L1::evict_first", ""),
    "loads and stores L1::no_allocate": (".L1::no_allocate", ".L1::no_allocate"),
}
VARIANTS = {name: (hints, 256, 1) for name, hints in HINTS.items()} | {
    "128 threads": (HINTS["plain"], 128, 1),
    "512 threads": (HINTS["plain"], 512, 1),
    "two vectors": (HINTS["plain"], 256, 2),
    "two vectors, 128 threads": (HINTS["plain"], 128, 2),
}
DTYPE = np.dtype(np.float32)


def text_of(rule, threads, vectors):
    """The text of the kernel; with two vectors, both are loaded before anything is computed, and there is no tail."""
    found = fastrms.rules.RULES[rule]
    text = kernel.kernel_text(found, DTYPE, kernel.Kind()).replace(f"uint64({table.THREADS})", f"uint64({threads})")
    if vectors == 1:
        return text
    states, names = fastrms.rules.state_names(found), list(fastrms.rules.coefficient_names(found))
    buffers, updated = ["param", "grad", *states], ["param", *states]
    lines = [f"first = (block * uint64({2 * threads}) + uint64(cuda.threadIdx.x)) * uint64({table.width(DTYPE)})",
             f"second = first + uint64({threads * table.width(DTYPE)})"]  # fmt: skip
    lines += [f"{name}_{at} = load({name}, {at})" for at in ("first", "second") for name in buffers]
    for at in ("first", "second"):
        given = ", ".join([f"{name}_{at}" for name in buffers] + names)
        lines.append(", ".join(f"{name}_{at}" for name in updated) + f", = rule({given})")
    lines += [f"store({name}, {at}, {name}_{at})" for at in ("first", "second") for name in updated]
    head = text.partition("    thread =")[0]
    return head + "".join(f"    {line}\n" for line in lines)


def ptx_of(rule, name, cc):
    """The PTX of a variant."""
    (load, store), threads, vectors = VARIANTS[name]
    compiler = toolchain.compiler()
    names = {"address": intrinsics.address, "uint64": compiler.types.uint64, "cuda": compiler.cuda}
    names["load"], names["store"] = intrinsics.vectors(table.width(DTYPE))
    names["rule"] = lower.lower(compiler.operations_of(rule, False))
    exec(text_of(rule, threads, vectors), names)
    entry = f"{rule}_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}"
    signature = compiler.signature(rule, DTYPE, kernel.Kind())
    ptx = compiler.named_ptx(names["kernel"], signature, entry, cc, launch_bounds=threads)
    return entry, ptx.replace("ld.global", f"ld.global{load}").replace("st.global", f"st.global{store}")


def variant(gpu, rule, name, tensor):
    """A Launch of a variant over one tensor, (param, grad, states)."""
    from cuda.core import ObjectCode

    _, threads, vectors = VARIANTS[name]
    make = fastrms.RMSProp if rule == "rmsprop" else fastrms.Adam
    recipe = make.checked_recipe(make.at_step(make.resolve(None, {"lr": LR})), DTYPE)
    made = launch.Launch(recipe, kernel.Kind(), gpu.index, device.allocate)
    made.aim(Coefficients(recipe), 0, [tensor], device.allocate)
    made.make_coefficients(1, 1.0)
    entry, ptx = ptx_of(rule, name, gpu.cc)
    found = ObjectCode.from_cubin(toolchain.compiler().link(ptx, gpu.cc)).get_kernel(entry)
    param, grad, states = tensor
    count = param.size // table.width(DTYPE)
    head = [*(buffer.address for buffer in (param, grad, *states)), param.size, count]
    made.arguments = launch.Arguments(found, head, made._tail(), -(-count // (threads * vectors)), threads)
    return made


def compare(gpu, rule, size):
    """A row for each variant of a rule; `size` is a multiple of 2^12."""
    states = len(fastrms.rules.state_names(fastrms.rules.RULES[rule]))
    param, grad = gpu.random(size), gpu.random(size, seed=1)
    tensor = param, grad, [device.allocate(size, DTYPE, gpu.index) for _ in range(states)]
    rows, steps, want = [], {}, None
    for name in VARIANTS:
        try:
            made = variant(gpu, rule, name, tensor)
            got = after_one_step(made, gpu, tensor)
        except Exception as error:  # of the assembler: this GPU has no such instruction
            rows.append({"what": name, "rule": rule, "refused": str(error)[:300]})
            continue
        want = got if want is None else want
        if any(not np.array_equal(a, b) for a, b in zip(got, want, strict=True)):
            rows.append({"what": name, "rule": rule, "refused": "its bits are not those of the others"})
            continue
        steps[name] = lambda made=made: made.run(1, device.LEGACY_STREAM)
    return rows + [{**row(name, size, DTYPE, bytes_per_element(rule, DTYPE), taken), "rule": rule}
                   for name, taken in gpu.milliseconds(steps, rounds=11).items()]  # fmt: skip


def after_one_step(made, gpu, tensor):
    """The bits of some elements after a step from the same numbers."""
    param, _, states = tensor
    device.copy(gpu.part(param, 0, min(param.size, 1 << 16)), np.ones(min(param.size, 1 << 16), DTYPE))
    for state in states:
        state.fill(0.0)
    made.run(1, device.LEGACY_STREAM)
    return [gpu.part(array, 0, min(array.size, 1 << 16)).to_host().view(np.uint32) for array in (param, *states)]
