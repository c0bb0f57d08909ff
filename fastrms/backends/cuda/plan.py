"""The plan in device memory: a step is one driver call for all tensors that share hyper-parameters and step count."""

import os
import threading
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...memory import device
from ...memory.device import LEGACY_STREAM
from ...storage import FLOAT, of_buffer
from .. import NONFINITE, OK, Found, plan
from ..c import DTYPE_OF, ffi
from ..coefficients import Coefficients
from .decide import Decision
from .driver import capturing, stream_handle, wait
from .kernel import Kind
from .launch import AHEAD, Launch
from .norm import Nonfinite, Norm
from .table import EXACT, Formats

TWO_DTYPES = ("clip_norm on backend='cuda' is for tensors of one dtype, these are float32 and float64: use grad_scale or "
              "clip_value")  # fmt: skip
CAPTURING = "a CUDA graph is being captured, "
NOT_CAPTURABLE = f"{CAPTURING}which would always have the coefficients of now: make the optimizer with capturable=True"
UNBOUND = f"{CAPTURING}which always reads the same gradients: bind(grads) them in the capture, and call step() without grads"
WAITS = f"{CAPTURING}in which check=True and nonfinite='raise' cannot wait for a step: make the optimizer without them"
ABSENT = (
    f"{CAPTURING}in which nonfinite='skip' cannot count the steps of tensors without a gradient: bind one for each tensor"
)
COUNTS = f"{CAPTURING}in which the host cannot wait to learn how many steps were made: ask before or after it"
STREAMED = f"{CAPTURING}in which a step cannot be made tensor by tensor: bind() all gradients and call step()"
STEP_FIRST = f"{CAPTURING}in which no memory can be allocated: make one step of as many gradients before the capture"
OTHER_KERNEL = ("this needs another kernel, which a captured CUDA graph does not launch: give the hyper-parameter a value "
                "other than its neutral one from the start")  # fmt: skip


KEPT = 256  # launches that a plan keeps for another step, unless a graph may need them: each has up to 96 KB on the device
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


class Decided:
    """What a step has found about which the device decides; the host waits for what it is asked for.  number: of all steps
    that were launched, or None in a captured graph, for its last launch; later: a norm.Later where the step clips."""

    tensor = -1

    def __init__(self, plan, number, later):
        self._plan, self._decision = weakref.ref(plan), plan._decision  # somebody may keep it, and not the parameters
        self._number, self._later = number, later

    @property
    def nonfinite(self):
        plan = self._plan()
        if plan:
            return plan.nonfinite_of(self._number)
        device.wait(self._decision.index)
        return self._decision.found(self._number)

    @property
    def grad_norm(self):
        return self._later and self._later.grad_norm


class Plan(plan.Plan):
    """A plan in device memory.  Tensors that share hyper-parameters and step count share a launch.

    It overrides plan.Plan where that uses NumPy arrays, makes an update, or runs a step.
    """

    _decision = None  # a Decision, where the device decides whether a step is made
    _rates_of = None  # number of a step -> the learning rate of each recipe, where the plan follows schedules

    def __init__(self, params, states, recipe_of, recipes, nonfinite, zero_grad, options, storages=None):
        super().__init__(params, states, recipe_of, recipes, nonfinite, zero_grad, storages)
        self._options, self._device, self._process = options, params[0].device, os.getpid()
        self._source = device.stream_source(params[0])
        self._explicit = None if options.stream is None else stream_handle(options.stream)
        self._joins = self._explicit is not None and device.library_stream(params[0]) is not None
        self._clips, self._norm, self._scale = False, None, 1.0  # _clips: updates take clip_norm's factor from the device
        self._nonfinite = None if nonfinite == "propagate" else Nonfinite(self._device)
        self._aimed = None  # the updates for which what looks at the gradients was aimed
        self._launches = {}  # (recipe, form, kind, tensors) -> Launch; kept, all where a captured graph may need them
        self._read_last = None, None  # (addresses, gradients) of _read()
        self.capturable = options.capturable
        self._recorded = False  # whether the step that is being made is recorded in a CUDA graph and not run
        self._entered, self._several = threading.local(), device.count() > 1
        self._on_device(device.wait, self._device)  # what filled the arrays of a caller's state is finished then
        if nonfinite == "skip":
            self._decision = Decision(self._device, device.allocate)

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
        index = self.recipe_of[first]
        rates = self._rates_of and (self._rates_of, index)
        one_serves_all = recipe.fixed and not (rates or (formats and formats.streams))
        rows = 0 if self._decision is None else 1 if one_serves_all else AHEAD
        kind = Kind(len(members) > 1, self.capturable or self._clips or rows > 0, self.zero_grad, formats)
        key = index, recipe.general, kind, *members
        if key not in self._launches:
            if not self.capturable and len(self._launches) >= KEPT:
                self._launches = {}  # where other tensors have no gradient at each step, others share a launch
            self._launches[key] = Launch(recipe, kind, self._device, self._allocate)
        launch = self._launches[key]
        tensors = [self._stored(k, grads[k]) if formats else (self.params[k], grads[k], self.states[k]) for k in members]
        launch.aim(coefficients, self.missed[first], tensors, self._allocate, rates, rows)
        return launch

    def follow(self, groups):
        if self._decision is None:
            return False
        if self._rates_of is None:
            self._rates_of = lru_cache(AHEAD)(lambda number: groups.rates(number - 1, 1))
            self._stale()
        return True

    def _set_recipes(self, recipes):
        self._rates_of = None if recipes else self._rates_of
        super()._set_recipes(recipes)

    def _take_rates(self, rates):
        if self._rates_of:  # the recipes have a rate of 0, which may be what is given
            self._rates_of = None
            self._stale()
        super()._take_rates(rates)

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
        handle, library = self._streams()
        apart = library != handle
        self._recorded = (handle != LEGACY_STREAM or apart) and self._is_recorded({handle, library})
        numbers = self._numbers(handle)
        if (clip_norm is not None) != self._clips:
            self._stale()
            self._clips = clip_norm is not None
        self._prepare(numbers[0], grad_scale)
        if self._waits or apart:
            self._wait(handle, {*self._waits, library})
        if not self._recorded:
            self._send(handle, *numbers)
        elif self._decision and self._absent:
            raise RuntimeError(ABSENT)
        if self._decision and not self._recorded:
            self._decision.sure = False  # until the launch is done
            self._expect()
        found = self._look(handle, grad_scale, clip_norm)
        if self._decision and not self._recorded:
            self._decision.sure = True
        status = NONFINITE if type(found) is Found and found.nonfinite else OK
        if status == OK:
            for launch in self._updates:
                launch.run(numbers[0], handle)
            if self._decision and self._updates:
                self._decision.zero(handle)
            if not self._recorded:
                self._count(numbers[0])
        self._finish(handle, library)
        return status, found

    def _numbers(self, handle):
        """The least and the largest number that this step may have: the same, unless the device decides."""
        if self._decision is None:
            return self._steps + 1, self._steps + 1
        return self._decision.numbers(handle, not self._recorded)

    def _expect(self):
        """Note that the device will decide about one more step."""
        if self._decision and self._updates:
            self._decision.looked += 1

    def _look(self, handle, grad_scale, clip_norm):
        """What the gradients are found to be, or None: a Found, for which the host waits, or what is read when asked for."""
        looks = self._nonfinite is not None
        if not self._updates:  # there are no gradients
            return Found(0.0 if self._clips else None, 0 if looks else None, -1) if self._clips or looks else None
        if looks:
            self._nonfinite.count(handle, grad_scale)
        if self._decision:
            self._decision.launch(handle)
        later = self._norm.run(handle, grad_scale, clip_norm) if self._clips else None
        if self._decision:
            return Decided(self, None if self._recorded else self._decision.looked, later)
        return Found(later and later.read(handle), *self._nonfinite.read(handle)) if looks else later

    def _count(self, number):
        if self._decision is None:
            return super()._count(number)
        if not self._updates:
            self.steps += 1
        elif not self._absent or self._left_out():
            return
        self._miss()

    def _miss(self):
        """Count a step that was made without the absent gradients."""
        self.missed = [missed + (k in self._absent) for k, missed in enumerate(self.missed)]

    def _left_out(self):
        """Whether the last step was left out; an interrupt while the host waits does not keep it from being counted."""
        number = self._decision.looked
        try:
            return self.nonfinite_of(number)
        except KeyboardInterrupt:  # it comes when the wait is over
            if not self.nonfinite_of(number):
                self._miss()
            raise

    @property
    def steps(self):
        """The number of steps made, for which the host waits where the device decides."""
        if self._decision is None:
            return self._steps
        return self._settle()[0]

    @steps.setter
    def steps(self, number):
        if self._decision is None:
            self._steps = number
        else:
            self._settle()
            self._decision.set(number)

    def _settle(self):
        """Wait until the device has decided about all steps that were launched; returns what Decision.see() does."""
        return self._on_device(self._settle_on, self._streams()[0])

    def _settle_on(self, handle):
        seen = self._decision.see()
        if not seen[1]:
            return seen
        if handle != LEGACY_STREAM and capturing(handle):
            raise RuntimeError(COUNTS)
        return self._decision.settle(handle)

    def nonfinite_of(self, number):
        """How many elements that are not finite step `number` of all that were launched has found, or the last one for None;
        the host waits."""
        self._settle()
        return self._decision.found(number)

    def _advance(self):
        handle, _ = self._streams()
        self._recorded = False
        numbers = self._numbers(handle)
        self._prepare(numbers[0], self._scale)
        self._send(handle, *numbers)
        self._expect()
        self._count(numbers[0])

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
            update.send(handle, number, number)
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
        capturable, check = self.capturable, self._options.check or self.nonfinite == "raise"
        refusal = NOT_CAPTURABLE if not capturable else UNBOUND if not self.held else WAITS if check else None
        if refusal:
            raise RuntimeError(refusal)
        return True

    def _prepare(self, number, grad_scale):
        """Make the launches and the coefficients of this step, where there are none."""
        aimed = self._updates is not None and (self._aimed is self._updates or not self._updates)
        if number >= self._until or grad_scale != self._scale or not aimed:
            if self._updates is None:
                self._waits, self._unsent = self._foreign_streams(), True
            self._make_updates(number, grad_scale)
            if self._updates and self._aimed is not self._updates:
                self._aim_looks()
            self._plain_until = 0  # a launch needs its stream

    def _aim_looks(self):
        """Tell what looks at the gradients where they are."""
        grads = {k: grad for k, grad in enumerate(self.grads) if grad is not None and grad.size}
        if self._clips:
            self._norm = self._norm or Norm(self._device)
            self._norm.aim([*grads.values()], self._updates, self._allocate)
        if self._nonfinite:
            self._nonfinite.aim(grads, self._allocate)
        if self._decision:
            self._decision.aim(self._nonfinite, self._updates, self.zero_grad, self._allocate)
        self._aimed = self._updates  # last: there may be no memory, or an interrupt

    def _send(self, handle, number, last):
        if self._unsent:
            for launch in self._updates:
                launch.send(handle, number, last)
            if self._updates:
                for looks in (self._norm if self._clips else None, self._nonfinite, self._decision):
                    if looks:
                        looks.send(handle)
            # the coefficients on the device may change at each step
            self._unsent = self.capturable or self._clips or self._decision is not None

    def _foreign_streams(self):
        """The streams that arrays name; the stream of a launch waits for them, the host does not."""
        pairs = zip(self.params, self.grads, strict=True)
        buffers = [buffer for param, grad in pairs if grad is not None for buffer in (param, grad)]
        return {handle for handle in map(device.named_stream, buffers) if handle is not None}
