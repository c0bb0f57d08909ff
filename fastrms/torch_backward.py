"""Steps that are made while a backward pass runs: each parameter as soon as its gradient is there, which is then freed."""

import weakref

import torch

from .optimizer import APPLIED
from .torch_base import Optimizer, nothing
from .words import kind_of


def step_in_backward(optimizer):
    """Let every backward pass be a step of an optimizer.

    Each parameter is updated when its gradient is complete, and the gradient is freed at once, so that few of them exist at
    any time.  The parameters get the bits of ``loss.backward(); optimizer.step(); optimizer.zero_grad()``; calls of step()
    and zero_grad() find no gradients any more and may stay, as may learning-rate schedulers.  The states of all parameters
    that require a gradient are made at once.  There is no accumulation over several passes, no closure, no GradScaler, and
    no clip_norm.  The parameters keep the optimizer, and itself each other, in memory until remove() is called.

    Parameters
    ----------
    optimizer : fastrms.torch optimizer
        Of parameters in host memory.

    Returns
    -------
    InBackward
        Its remove() ends this.

    Raises
    ------
    TypeError
        For another optimizer.
    ValueError
        For one with clip_norm or nonfinite, which need all gradients before the first update, for one with parameters on a
        GPU, and for one that makes its steps so already.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is {kind_of(optimizer)}; it must be one of fastrms.torch")
    if optimizer.clip_norm is not None or optimizer.nonfinite != "propagate":
        raise ValueError(f"clip_norm={optimizer.clip_norm!r} and nonfinite={optimizer.nonfinite!r} look at all gradients "
                         f"before the first update, which a step in the backward pass cannot do")  # fmt: skip
    if optimizer.in_backward() is not None:
        raise ValueError("this optimizer makes its steps in the backward pass already")
    params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
    if any(param.is_cuda for param in params):
        raise ValueError("a step in the backward pass needs parameters in host memory, some of these are on a GPU")
    return InBackward(optimizer, params)


class InBackward:
    """What step_in_backward() has set up; remove() takes it back."""

    def __init__(self, optimizer, params):
        optimizer.make_state()
        self._optimizer, self._pass = optimizer, None  # the number of the backward pass whose step is open
        self._cores = []
        self._hooks = [param.register_post_accumulate_grad_hook(self._take) for param in params]
        optimizer.in_backward = weakref.ref(self)  # the hooks keep it alive

    def remove(self):
        """Leave steps to step() again."""
        self.finish()
        for hook in self._hooks:
            hook.remove()
        self._optimizer.in_backward = nothing

    def finish(self):
        """End the step of a backward pass."""
        with self._optimizer._one_thread:
            self._pass, cores, self._cores = None, self._cores, []
            for core in cores:
                core.stream_close()
                self._optimizer.step_info = APPLIED

    def _begin(self, number):
        self.finish()  # of a pass that failed
        self._optimizer._be_known()
        if any(param.requires_grad for param in self._optimizer._idle):  # its state has been taken away
            self._optimizer.make_state()
        self._optimizer._cores = [core.present() for core in self._optimizer._cores]
        self._where = {id(param): (core, k) for core in self._optimizer._cores for k, param in enumerate(core.params)}
        for core in self._optimizer._cores:
            core.stream_open()
            self._cores.append(core)
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        self._pass = number

    def _take(self, param):
        """Update a parameter whose gradient is complete, and free the gradient, if it is still in a group."""
        number = torch._C._current_graph_task_id()
        with self._optimizer._one_thread:
            if self._pass != number:
                self._begin(number)
            if id(param) in self._where:
                core, k = self._where[id(param)]
                core.stream_step(k, param.grad)
                param.grad = None
