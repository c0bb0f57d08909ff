"""The plan in device memory: a step is one driver call for all tensors that share hyper-parameters and step count."""

import os
import threading
from typing import Any, NamedTuple

import numpy as np

from ...memory import device
from ...memory.device import LEGACY_STREAM
from ...storage import FLOAT, of_buffer
from .. import NONFINITE, OK, Found, plan
from ..c import DTYPE_OF, ffi
from ..coefficients import Coefficients
from .driver import capturing, stream_handle, wait
from .kernel import Kind
from .launch import Launch
from .norm import Nonfinite, Norm
from .table import EXACT, Formats

TWO_DTYPES = ("clip_norm on backend='cuda' is for tensors of one dtype, these are float32 and float64: use grad_scale or "
              "clip_value")  # fmt: skip
CAPTURING = "a CUDA graph is being captured, "
NOT_CAPTURABLE = f"{CAPTURING}which would always have the coefficients of now: make the optimizer with capturable=True"
UNBOUND = f"{CAPTURING}which always reads the same gradients: bind(grads) them in the capture, and call step() without grads"
WAITS = f"{CAPTURING}in which check=True and nonfinite cannot wait for a step: make the optimizer without them"
STREAMED = f"{CAPTURING}in which a step cannot be made tensor by tensor: bind() all gradients and call step()"
STEP_FIRST = f"{CAPTURING}in which no memory can be allocated: make one step of as many gradients before the capture"
OTHER_KERNEL = ("this needs another kernel, which a captured CUDA graph does not launch: give the hyper-parameter a value "
                "other than its neutral one from the start")  # fmt: skip


LIES = ("address", "stream", "dtype")  # of a gradient, what a launch depends on


class Options(NamedTuple):
    """The arguments that only this backend takes.

    Parameters
    ----------
    stream : stream of cuda.core, CuPy, torch or Numba, or its handle, optional
        Where to launch; by default it is the stream on which the arrays' library works at the time.
    capturable : bool, default False
        Keep the coefficients in device memory, for CUDA graphs.
    check : bool, default False
        Wait for each step and raise its error.
    """

    stream: Any = None
    capturable: bool = False
    check: bool = False


def update(recipe, step, grad_scale, param, grad, states, storage=None):
    """One step on DeviceBuffers, in place; storage: their Storage, where they are stored in formats."""
    if param.size:
        stored = storage is not None or of_buffer(grad) is not FLOAT
        tensor = plan.StoredTensor(storage, 0, param, grad, states) if stored else (param, grad, states)
        with device.entered(param.device):
            made = Launch(recipe, Kind(formats=formats_of(tensor) if stored else None), param.device, device.allocate)
            made.aim(Coefficients(recipe), 0, [tensor], device.allocate)
            made.make_coefficients(step, grad_scale)
            made.run(step, device.stream_source(param)())


def formats_of(tensor):
    """The Formats of a StoredTensor."""
    written, copies = (tuple(part.format.name for part in parts) for parts in (tensor.written, tensor.copies))
    stochastic = tensor.storage.stochastic and any(name not in EXACT for name in written)
    return Formats(written, tensor.read[1].format.name, copies, stochastic)


class Plan(plan.Plan):
    """A plan in device memory.  Tensors that share hyper-parameters and step count share a launch.

    It overrides plan.Plan where that uses NumPy arrays, makes an update, or runs a step.
    """

    def __init__(self, params, states, recipe_of, recipes, nonfinite, zero_grad, options, storages=None):
        super().__init__(params, states, recipe_of, recipes, nonfinite, zero_grad, storages)
        self._options, self._device, self._process = options, params[0].device, os.getpid()
        self._source = device.stream_source(params[0])
        self._explicit = None if options.stream is None else stream_handle(options.stream)
        self._joins = self._explicit is not None and device.library_stream(params[0]) is not None
        self._clips, self._norm, self._normed = False, None, None  # _clips: updates take clip_norm's factor from the device
        self._scale = 1.0
        self._nonfinites, self._which, self._looked = (
            {},
            {},
            None,
        )  # dtype -> Nonfinite and indices; the updates at that time
        self._launches = {}  # (recipe, form, kind, tensors) -> Launch; kept, as a captured graph may need them
        self._read_last = None, None  # (addresses, gradients) of _read()
        self.capturable = options.capturable
        self._recorded = False  # whether the step that is being made is recorded in a CUDA graph and not run
        self._entered, self._several = threading.local(), device.count() > 1
        self._on_device(device.wait, self._device)  # what filled the arrays of a caller's state is finished then

    takes_pointers = True
    flat_grad = ours = staticmethod(device.ours)

    @staticmethod
    def assign(to, source):
        if isinstance(to, list):  # of Storages
            to[:] = source
        else:
            device.copy(to, source)

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        if clip_norm is not None and len({recipe.dtype for recipe in self.recipes}) > 1:
            raise ValueError(TWO_DTYPES)
        for index, recipe in (recipes or {}).items():
            if self.capturable and recipe.general != self.recipes[index].general:
                raise ValueError(OTHER_KERNEL)
        if grads is not None and type(grads) is not list:
            grads = self._read(grads)
        return super().change(params, grads, recipes, hold, run, grad_scale, clip_norm)

    def _read(self, reader):
        """The gradients that a torch_reader.Reader has read: the list of the last time where they still lie there."""
        addresses = bytes(ffi.buffer(reader.pointers, ffi.sizeof("void *") * len(self.params)))
        read = addresses, bytes(ffi.buffer(reader.formats, ffi.sizeof("int32_t") * len(self.params)))
        if read != self._read_last[0]:
            dtypes = self._dtypes(np.frombuffer(read[1], np.int32).tolist())
            rows = zip(reader.leaves, np.frombuffer(addresses, np.uintp).tolist(), self.params, dtypes, strict=True)
            grads = [None if leaf is None else param._replace(address, dtype) for leaf, address, param, dtype in rows]
            if reader.absent:  # an empty gradient has the same address as a missing one
                return grads
            self._read_last = read, grads
        return self._read_last[1]

    def _dtypes(self, formats):
        """Of gradients in the formats that C has read."""
        pairs = zip(formats, self.recipe_of, strict=True)
        return [DTYPE_OF[format] if format else self.recipes[index].dtype for format, index in pairs]

    def _lies_as_before(self, params, grads):
        """Whether the tables of the last step serve this one, too."""
        if grads is None or (params is not self.params and [p.address for p in params] != [p.address for p in self.params]):
            return False
        return all(
            new is old or (new and old and all(getattr(new, name) == getattr(old, name) for name in LIES))
            for new, old in zip(grads, self.grads, strict=True)
        )

    def _would_overlap(self, params, grads):
        buffers = [buffer for buffer in (*params, *grads, *self._beside_params()) if buffer is not None and buffer.size]
        starts, ends = (np.array([getattr(buffer, end) for buffer in buffers]) for end in ("address", "end"))
        order = starts.argsort()
        return bool((ends[order[:-1]] > starts[order[1:]]).any())

    def _update(self, coefficients, members, grads):
        recipe, first = coefficients.recipe, members[0]
        formats, *_ = self._stored_as(first, grads[first]) or [None]
        kind = Kind(len(members) > 1, self.capturable or self._clips, self.zero_grad, formats)
        key = self.recipe_of[first], recipe.general, kind, *members
        if key not in self._launches:
            self._launches[key] = Launch(recipe, kind, self._device, self._allocate)
        launch = self._launches[key]
        tensors = [self._stored(k, grads[k]) if formats else (self.params[k], grads[k], self.states[k]) for k in members]
        launch.aim(coefficients, self.missed[first], tensors, self._allocate)
        return launch

    def _stored(self, k, grad):
        return plan.StoredTensor(self.storages[k], self.missed[k], self.params[k], grad, self.states[k])

    def _stored_as(self, k, grad):
        """None, or what tensors stored in formats must share to be updated in one launch: their Formats, and what random
        numbers depend on."""
        if not super()._stored_as(k, grad):
            return None
        made = self._stored(k, grad)
        return formats_of(made), made.storage.seed, self.missed[k]

    def _allocate(self, size, dtype, index):
        if self._recorded:
            raise RuntimeError(STEP_FIRST)
        return device.allocate(size, dtype, index)

    def _run(self, grad_scale, clip_norm):
        return self._on_device(self._launch_step, grad_scale, clip_norm)

    def advance(self):
        """Count the step of a captured graph, and write its coefficients, before the graph is launched again."""
        self._on_device(self._advance)

    def _on_device(self, work, *arguments):
        """Call work while the device is the current one.  Where there is one device, each thread makes it so once; else the
        device of the caller is restored.  A threading.local notes the threads, since their idents are given again."""
        if os.getpid() != self._process:
            raise RuntimeError("CUDA does not survive a fork: make this optimizer in the child")
        if self._several:
            with device.entered(self._device):
                return work(*arguments)
        if not hasattr(self._entered, "once"):
            device.current(self._device)
            self._entered.once = True
        return work(*arguments)

    def _launch_step(self, grad_scale, clip_norm):
        """Make a step; returns (status, what it found out about the gradients or None)."""
        number, (handle, library) = self.steps + 1, self._streams()
        apart = library != handle
        self._recorded = (handle != LEGACY_STREAM or apart) and self._is_recorded({handle, library})
        if (clip_norm is not None) != self._clips:
            self._stale()
            self._clips = clip_norm is not None
        self._prepare(number, grad_scale)
        if self._waits or apart:
            self._wait(handle, {*self._waits, library})
        if not self._recorded:
            self._send(handle, number)
        found = Found(0.0, None, -1) if self._clips else None  # of no gradients
        if self._clips and self._updates:
            found = self._norm.run(handle, grad_scale, clip_norm)
        if self.nonfinite != "propagate":
            found = self._look(handle, grad_scale, found)
        status = NONFINITE if found and found.nonfinite else OK
        if status == OK:
            for launch in self._updates:
                launch.run(number, handle)
            if not self._recorded:
                self._count(number)
        elif self.zero_grad and self.nonfinite == "skip":
            self._zero_gradients()
        self._finish(handle, library)
        return status, found

    def _look(self, handle, grad_scale, later):
        """Found of the gradients, for which the host waits.  later: where the norm will be, Found of none, or None."""
        if self._looked is not self._updates:
            self._aim_nonfinites()
            self._looked = self._updates
        total, tensors = 0, []
        for dtype, which in self._which.items():
            count, first = self._nonfinites[dtype].count(handle, grad_scale)
            total += count
            tensors += [which[first]] if count else []
        norm = later.read(handle) if later and self._updates else later and later.grad_norm
        return Found(norm, total, min(tensors, default=-1))

    def _aim_nonfinites(self):
        self._which = {}
        for k, grad in enumerate(self.grads):
            if grad is not None and grad.size:
                self._which.setdefault(grad.dtype, []).append(k)
        for dtype, which in self._which.items():
            if dtype not in self._nonfinites:
                self._nonfinites[dtype] = Nonfinite(dtype, self._device)
            self._nonfinites[dtype].aim([self.grads[k] for k in which], self._allocate)

    def _advance(self):
        number, (handle, _) = self.steps + 1, self._streams()
        self._recorded = False
        self._prepare(number, self._scale)
        self._send(handle, number)
        self._count(number)

    def stream_step(self, k, param, grad, rates, grad_scale):
        return self._on_device(self._stream_step, k, param, grad, rates, grad_scale)

    def _stream_step(self, *arguments):
        if any(handle != LEGACY_STREAM and capturing(handle) for handle in self._streams()):
            raise RuntimeError(STREAMED)
        return super().stream_step(*arguments)

    def _run_streamed(self, update, number, k, grad):
        handle, library = self._streams()
        self._wait(handle, {library, *map(device.named_stream, (self.params[k], grad))} - {None})
        if grad.size:
            update.send(handle, number)
            update.run(number, handle)
        self._finish(handle, library)

    def _streams(self):
        """The handle of the stream on which to launch now, and of that on which the library of the arrays works, where it
        has one."""
        handle = self._explicit or self._source()
        return handle, self._source() if self._joins else handle

    @staticmethod
    def _wait(handle, others):
        for other in others - {handle}:
            wait(handle, other)

    def _finish(self, handle, library):
        """Let what follows on the stream of the library, which may free the gradients, come after the launches."""
        if library != handle:
            wait(library, handle)
        if self._options.check:
            device.call_driver("this step or work before it", "cuStreamSynchronize", handle)

    def _is_recorded(self, handles):
        """Whether a CUDA graph is being captured, which can only follow later steps where all it needs was given."""
        if not any(handle != LEGACY_STREAM and capturing(handle) for handle in handles):
            return False
        capturable, check = self.capturable, self._options.check or self.nonfinite != "propagate"
        refusal = NOT_CAPTURABLE if not capturable else UNBOUND if not self.held else WAITS if check else None
        if refusal:
            raise RuntimeError(refusal)
        return True

    def _prepare(self, number, grad_scale):
        """Make the launches and the coefficients of this step, where there are none."""
        if number >= self._until or grad_scale != self._scale:
            if self._updates is None:
                self._waits, self._unsent = self._foreign_streams(), True
            self._make_updates(number, grad_scale)
            if self._clips and self._updates and self._normed is not self._updates:
                self._aim_norm()
            self._plain_until = 0  # a launch needs its stream

    def _aim_norm(self):
        self._norm = self._norm or Norm(self._device)
        self._norm.aim([g for g in self.grads if g is not None and g.size], self._updates, self._allocate)
        self._normed = self._updates  # last: there may be no memory

    def _send(self, handle, number):
        if self._unsent:
            for launch in self._updates:
                launch.send(handle, number)
            if self._clips and self._updates:
                self._norm.table.send(handle)
            self._unsent = self.capturable or self._clips  # the coefficients on the device may change at each step

    def _foreign_streams(self):
        """The streams that arrays name; the stream of a launch waits for them, the host does not."""
        pairs = zip(self.params, self.grads, strict=True)
        buffers = [buffer for param, grad in pairs if grad is not None for buffer in (param, grad)]
        return {handle for handle in map(device.named_stream, buffers) if handle is not None}
