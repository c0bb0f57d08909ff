"""The rules on a GPU: kernels of ptx.py, launched by cuda.core with one driver call per step and rule.

Nothing is synchronised, allocated or copied in a step of bound gradients.  Errors of a kernel come up at the next
synchronisation, somewhere else; check=True looks for them after each step.  No GPU is needed to see what would run:
python -m fastrms.backends.cuda --cc 9.0 --rule adam --sass
"""

import argparse
import ctypes
import os
import re
import sys
import threading
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import rules
from ..memory import device
from . import OK, find_spec, plan

memory = device
VECTOR, THREADS = 16, 256  # bytes per thread, threads per block
NORMLESS = "clip_norm needs a sum over all gradients, which backend='cuda' does not make: use grad_scale or clip_value"
BLIND = "looks at all gradients before the first update, which backend='cuda' does not do: use nonfinite='propagate'"
NO_PACKAGE = "numba-cuda is not installed: pip install 'fastrms[cu13]' or 'fastrms[cu12]'"


@cache
def available():
    """None, or the reason why not: no package, no driver, no device."""
    if not find_spec("numba_cuda"):
        return NO_PACKAGE
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver: libcuda.so.1 was not found"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return None if status == 0 and count.value else f"the NVIDIA driver finds no CUDA device (cuInit answered {status})"


def compiler():
    """The module ptx, where numba-cuda stands in for Numba's own CUDA target."""
    from numba import cuda

    if getattr(cuda, "implementation", None) != "NVIDIA":
        raise RuntimeError(f"numba.cuda is Numba's own deprecated target, which is not supported; {NO_PACKAGE}")
    from . import ptx

    return ptx


@cache
def loaded(rule, general, dtype, kind, index):
    """A kernel, ready to launch on a device."""
    from cuda.core import ObjectCode

    made = compiler().compiled(rule, general, dtype, kind, tuple(device.current(index).compute_capability))
    return ObjectCode.from_cubin(made.cubin).get_kernel(made.name)


def vectors(addresses, size, itemsize):
    """How many 128-bit vectors a tensor has: none where a buffer is not aligned."""
    return 0 if any(address % VECTOR for address in addresses) else size * itemsize // VECTOR


def blocks(size, vectors, itemsize):
    """How many blocks update a tensor: a thread per vector, and one per element that is left."""
    return -(-(vectors + size - vectors * (VECTOR // itemsize)) // THREADS)


def table(tensors, itemsize):
    """(rows, tensor_of) of the kernels for many tensors.  tensors: (addresses, size) each."""
    rows, tensor_of = [], []
    for addresses, size in tensors:
        count = vectors(addresses, size, itemsize)
        rows.append([*addresses, size, count, len(tensor_of)])
        tensor_of += [len(rows) - 1] * blocks(size, count, itemsize)
    return np.array(rows, np.uint64).reshape(-1), np.array(tensor_of, np.uint32)


class Options(NamedTuple):
    """What only this backend knows.  stream: where to launch, instead of where the arrays' library works now.
    capturable: coefficients in device memory, for CUDA graphs.   check: wait for each step and raise its error."""

    stream: Any = None
    capturable: bool = False
    check: bool = False


def stream_handle(stream):
    """The handle of a stream of cuda.core, CuPy, torch, Numba, or an integer."""
    if stream is not None and hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1]) or device.LEGACY_STREAM
    for name in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, name):
            stream = getattr(stream, name)
            stream = getattr(stream, "value", stream)
    if not isinstance(stream, int) or isinstance(stream, bool):
        raise TypeError(f"stream={stream!r} is not a CUDA stream: pass one of CuPy, torch, cuda.core, or its handle")
    return stream or device.LEGACY_STREAM


@lru_cache(maxsize=64)
def stream_of(handle):
    from cuda.core import Stream

    return Stream.from_handle(handle)


def write(to, host, stream):
    """Copy a NumPy array to a DeviceArray on a stream; the driver has read it when this returns."""
    from cuda.bindings import driver

    answer = driver.cuMemcpyHtoDAsync(to.address, host.ctypes.data, host.nbytes, int(stream.handle))
    device.checked(answer, "writing tables or coefficients")


def zero(buffer, stream):
    """Write zeros over a DeviceBuffer on a stream."""
    from cuda.bindings import driver

    if buffer.size:
        device.checked(driver.cuMemsetD8Async(buffer.address, 0, buffer.nbytes, int(stream.handle)), "zeroing gradients")


def capturing(stream):
    """Whether a CUDA graph is being captured on the stream: what is launched then is recorded and not run."""
    from cuda.bindings import driver

    return bool(device.checked(driver.cuStreamIsCapturing(int(stream.handle)), "asking whether it captures")[0])


class Launch(plan.Update):
    """One kernel over one or many tensors that share their coefficients."""

    def __init__(self, recipe, many, capturable, index):
        from cuda.core import LaunchConfig, launch

        self.itemsize, self.index = recipe.dtype.itemsize, index
        kind = compiler().Kind(many, capturable)
        self.name = compiler().kernel_name(recipe.rule, recipe.general, recipe.dtype, kind)
        self.kernel = loaded(recipe.rule, recipe.general, recipe.dtype, kind, index)
        self.make_config, self.launch = LaunchConfig, launch
        self.table, self.table_host, self.table_sent = None, None, True
        self.count = len(rules.coefficient_names(rules.find(recipe.rule)))
        self.device_row = device.place(self.count, recipe.dtype, index) if capturable else None
        self.sent = None

    def aim(self, coefficients, missed, tensors):
        """Take other tensors, or the same ones elsewhere: (param, grad, states) of DeviceBuffers."""
        super().__init__(coefficients, missed, tensors=())  # this is kept for ever, but gradients go
        found = [([buffer.address for buffer in (param, grad, *states)], param.size) for param, grad, states in tensors]
        if len(found) == 1:
            addresses, size = found[0]
            count = vectors(addresses, size, self.itemsize)
            self.head, grid = (*addresses, size, count), blocks(size, count, self.itemsize)
        else:
            self.head, grid = self._aim_many(*table(found, self.itemsize))
        self.config = self.make_config(grid=grid, block=THREADS)

    def take(self):
        """A float32 goes to cuda.core as the integer of its bits, of which the driver takes the low four bytes: cuda.core
        would widen a Python float, and a NumPy number costs it 0.5 us more."""
        bits = memoryview(self.coefficients.rows).cast("B")
        self.words = bits.cast("I" if self.itemsize == 4 else "d")

    def _aim_many(self, rows, tensor_of):
        """The table goes to the device before the next launch; the memory stays while the sizes do."""
        host = np.concatenate([rows.view(np.uint32), tensor_of])
        if self.table is None or self.table.size != host.size:
            self.table = device.place(host.size, host.dtype, self.index)
        if not np.array_equal(self.table_host, host):
            self.table_host, self.table_sent = host, False
        return (self.table.address, self.table.address + rows.nbytes), tensor_of.size

    def send(self, stream, number):
        """Write to the device what has changed: the table, and the coefficients of a capturable kernel."""
        if not self.table_sent:
            write(self.table, self.table_host, stream)
            self.table_sent = True
        if self.device_row is not None:
            row = self.coefficients.rows[(number - self.first) * self.stride]
            if row.tobytes() != self.sent:
                write(self.device_row, row, stream)
                self.sent = row.tobytes()

    def run(self, number, stream):
        if self.device_row is None:
            start = (number - self.first) * self.stride * self.count
            tail = self.words[start : start + self.count]
        else:
            tail = (self.device_row.address,)
        try:
            self.launch(stream, self.config, self.kernel, *self.head, *tail)
        except Exception as error:  # of cuda.core, whose own classes are not public
            raise RuntimeError(f"launching {self.name} failed: {error}") from error


def update(recipe, step, grad_scale, param, grad, states):
    """One step on DeviceBuffers, in place."""
    if param.size:
        device.current(param.device)
        made = Launch(recipe, False, False, param.device)
        made.aim(plan.Coefficients(recipe), 0, [(param, grad, states)])
        made.ready(step, grad_scale)
        made.run(step, stream_of(device.stream_source(param)()))


class Plan(plan.Plan):
    """Bound buffers in device memory.  Tensors that share hyper-parameters and step count share a launch."""

    def __init__(self, params, states, sets, recipes, nonfinite, zero_grad, options):
        if nonfinite != "propagate":
            raise ValueError(f"nonfinite={nonfinite!r} {BLIND}")
        super().__init__(params, states, sets, recipes, nonfinite, zero_grad)
        self._options, self._device, self._process = options, params[0].device, os.getpid()
        self._explicit = None if options.stream is None else stream_of(stream_handle(options.stream))
        self._source = device.stream_source(params[0])
        self._made = {}  # Launches by (set, tensors): a captured graph may need them later
        self._entered, self._several = threading.local(), device.count() > 1
        self._entered.once = True  # by what made the state

    # what the parent does with NumPy arrays

    flat_grad = ours = staticmethod(lambda buffer: buffer)
    assign = staticmethod(device.copy)

    # what is launched

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        if clip_norm is not None:
            raise ValueError(NORMLESS)
        if self._options.capturable:
            self._refuse_other_forms(recipes or {})
        return super().change(params, grads, recipes, hold, run, grad_scale, clip_norm)

    def _refuse_other_forms(self, recipes):
        for index, recipe in recipes.items():
            if recipe.general != self.recipes[index].general:
                raise ValueError("this needs another kernel, which a captured CUDA graph does not launch: give "
                                 "the hyper-parameter a value other than its neutral one from the start")  # fmt: skip

    def _set_recipes(self, recipes):
        if any(recipe.general != self.recipes[index].general for index, recipe in (recipes or {}).items()):
            self._made = {}
        super()._set_recipes(recipes)

    def _prepare(self, number, grad_scale):
        if self._updates is None:
            self._waits, self._unsent = self._foreign_streams(), True
        super()._prepare(number, grad_scale)
        self._plain_until = 0  # a launch needs its stream

    def _update(self, members, grads):
        first, key = members[0], (self.sets[members[0]], *members)
        recipe = self.recipes[self.sets[first]]
        if key not in self._made:
            self._made[key] = Launch(recipe, len(members) > 1, self._options.capturable, self._device)
        tensors = [(self.params[k], grad, self.states[k]) for k, grad in zip(members, grads, strict=True)]
        self._made[key].aim(self._coefficients(self.sets[first], first), self.missed[first], tensors)
        return self._made[key]

    def _run(self, grad_scale, clip_norm):
        number, stream = self._ready_to_launch(grad_scale)
        recorded = self._options.capturable and capturing(stream)
        for handle in self._waits:
            if handle != int(stream.handle):
                stream.wait(stream_of(handle))
        if not recorded:
            self._send(stream, number)
        for launch in self._updates:
            launch.run(number, stream)
        if self.zero_grad:
            for grad in filter(None, self.grads):
                zero(grad, stream)
        if not recorded:
            self._count(number)
        if self._options.check:
            stream.sync()
        return OK, None

    def advance(self):
        """Before a captured graph is launched again: count its step, and write the coefficients of that step."""
        number, stream = self._ready_to_launch(1.0)
        self._send(stream, number)
        self._count(number)

    def _send(self, stream, number):
        if self._unsent:
            for launch in self._updates:
                launch.send(stream, number)
            self._unsent = self._options.capturable  # its coefficients are others at each step

    def _ready_to_launch(self, grad_scale):
        """The step and the stream; the device is current, and launches and coefficients fit what is held."""
        if self._several or os.getpid() != self._process or not hasattr(self._entered, "once"):
            self._enter_device()
        number = self.steps + 1
        if number >= self._until or grad_scale != self._scale:
            self._prepare(number, grad_scale)
        return number, self._explicit or stream_of(self._source())

    def _enter_device(self):
        """The device is made current once per thread (idents are given again), and at each step where there are several."""
        if os.getpid() != self._process:
            raise RuntimeError("CUDA does not survive a fork: make this optimizer in the child")
        device.current(self._device)
        self._entered.once = True

    def _foreign_streams(self):
        """Streams that arrays name: the launch waits for them on the device, not here."""
        pairs = zip(self.params, self.grads, strict=True)
        buffers = [buffer for param, grad in pairs if grad is not None for buffer in (param, grad)]
        return {handle for handle in map(device.named_stream, buffers) if handle is not None}


def main(arguments=None):
    """Print what a kernel is made of: its Python, PTX and SASS, registers and spills.  Needs no GPU."""
    parser = argparse.ArgumentParser(prog="python -m fastrms.backends.cuda", description=main.__doc__)
    parser.add_argument("--cc", default="9.0", help="compute capability, 8.0 and above (default 9.0)")
    parser.add_argument("--rule", default="rmsprop", choices=rules.RULES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    for name in ("general", "many", "capturable"):
        parser.add_argument(f"--{name}", action="store_true")
    for name in ("source", "ptx", "sass"):
        parser.add_argument(f"--{name}", action="store_true", help=f"print only the {name} and the figures")
    chosen = parser.parse_args(arguments)
    if not re.fullmatch(r"\d{1,2}\.\d", chosen.cc):
        parser.error(f"--cc {chosen.cc} is not a compute capability such as 9.0")
    if not find_spec("numba_cuda"):
        parser.error(NO_PACKAGE)
    show(chosen, tuple(map(int, chosen.cc.split("."))))


def show(chosen, cc):
    from . import lowered, sass

    ptx, rule, dtype = compiler(), rules.RULES[chosen.rule], np.dtype(chosen.dtype)
    kind = ptx.Kind(chosen.many, chosen.capturable)
    name, text = ptx.compile_ptx(chosen.rule, chosen.general, dtype, kind, cc)
    made = sass.assemble(text, cc)
    texts = {"source": lowered.text(rule, chosen.general) + "\n" + ptx.kernel_text(rule, dtype, kind, name)}
    texts |= {"ptx": text, "sass": made.listing}
    wanted = [name for name in texts if getattr(chosen, name)] or ["source", "ptx", "sass"]
    for part in wanted:
        sys.stdout.write(f"{texts[part]}\n")
    sys.stdout.write(f"{name}, sm_{cc[0]}{cc[1]}: {made.registers} registers, {made.spills} bytes spilled, "
                     f"{sum(made.operations.values())} instructions, {len(text)} bytes of PTX\n")  # fmt: skip


if __name__ == "__main__":
    main()
