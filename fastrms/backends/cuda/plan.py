"""The plan in device memory: a step is one driver call for all tensors that share hyper-parameters and step count."""

import os
import threading
from typing import Any, NamedTuple

from ...memory import device
from .. import OK, plan
from ..coefficients import Coefficients
from .driver import capturing, stream_handle, stream_of, zero
from .launch import Launch

NORMLESS = "clip_norm needs a sum over all gradients, which backend='cuda' does not make: use grad_scale or clip_value"
BLIND = "looks at all gradients before the first update, which backend='cuda' does not do: use nonfinite='propagate'"
OTHER_KERNEL = ("this needs another kernel, which a captured CUDA graph does not launch: give the hyper-parameter a value "
                "other than its neutral one from the start")  # fmt: skip


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


def update(recipe, step, grad_scale, param, grad, states):
    """One step on DeviceBuffers, in place."""
    if param.size:
        device.current(param.device)
        made = Launch(recipe, False, False, param.device)
        made.aim(Coefficients(recipe), 0, [(param, grad, states)])
        made.make_coefficients(step, grad_scale)
        made.run(step, stream_of(device.stream_source(param)()))


class Plan(plan.Plan):
    """A plan in device memory.  Tensors that share hyper-parameters and step count share a launch.

    It overrides plan.Plan where that uses NumPy arrays, makes an update, or runs a step.
    """

    def __init__(self, params, states, recipe_of, recipes, nonfinite, zero_grad, options):
        if nonfinite != "propagate":
            raise ValueError(f"nonfinite={nonfinite!r} {BLIND}")
        super().__init__(params, states, recipe_of, recipes, nonfinite, zero_grad)
        self._options, self._device, self._process = options, params[0].device, os.getpid()
        self._explicit = None if options.stream is None else stream_of(stream_handle(options.stream))
        self._source = device.stream_source(params[0])
        self._launches = {}  # (recipe, form, tensors) -> Launch; kept, as a captured graph may need them
        self._entered, self._several = threading.local(), device.count() > 1
        device.wait(self._device)  # this enters the device, and what filled the arrays of a caller's state is finished
        self._entered.once = True

    flat_grad = ours = staticmethod(device.ours)
    assign = staticmethod(device.copy)

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        if clip_norm is not None:
            raise ValueError(NORMLESS)
        for index, recipe in (recipes or {}).items():
            if self._options.capturable and recipe.general != self.recipes[index].general:
                raise ValueError(OTHER_KERNEL)
        return super().change(params, grads, recipes, hold, run, grad_scale)

    def _update(self, coefficients, members, grads):
        recipe, first = coefficients.recipe, members[0]
        key = self.recipe_of[first], recipe.general, *members
        if key not in self._launches:
            self._launches[key] = Launch(recipe, len(members) > 1, self._options.capturable, self._device)
        launch = self._launches[key]
        launch.aim(coefficients, self.missed[first], [(self.params[k], grads[k], self.states[k]) for k in members])
        return launch

    def _run(self, grad_scale, clip_norm):
        number, stream = self._next_launch(grad_scale)
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
                zero(grad.address, grad.nbytes, stream)
        if not recorded:
            self._count(number)
        if self._options.check:
            stream.sync()
        return OK, None

    def advance(self):
        """Count the step of a captured graph, and write its coefficients, before the graph is launched again."""
        number, stream = self._next_launch(1.0)
        self._send(stream, number)
        self._count(number)

    def _send(self, stream, number):
        if self._unsent:
            for launch in self._updates:
                launch.send(stream, number)
            self._unsent = self._options.capturable  # its coefficients may change at each step

    def _next_launch(self, grad_scale):
        """(number of the step, stream).  Makes the device current, and the launches and coefficients of this step."""
        if self._several or os.getpid() != self._process or not hasattr(self._entered, "once"):
            self._enter_device()
        number = self.steps + 1
        if number >= self._until or grad_scale != self._scale:
            if self._updates is None:
                self._waits, self._unsent = self._foreign_streams(), True
            self._make_updates(number, grad_scale)
            self._plain_until = 0  # a launch needs its stream
        return number, self._explicit or stream_of(self._source())

    def _enter_device(self):
        """Make the device current: once per thread, or at each step where there are several devices.  A threading.local
        notes the threads, since their idents are given again."""
        if os.getpid() != self._process:
            raise RuntimeError("CUDA does not survive a fork: make this optimizer in the child")
        device.current(self._device)
        self._entered.once = True

    def _foreign_streams(self):
        """The streams that arrays name; the stream of a launch waits for them, the host does not."""
        pairs = zip(self.params, self.grads, strict=True)
        buffers = [buffer for param, grad in pairs if grad is not None for buffer in (param, grad)]
        return {handle for handle in map(device.named_stream, buffers) if handle is not None}
