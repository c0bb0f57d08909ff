"""The C kernels through cffi: bound buffers in C structs, one call per step for all tensors and groups."""

import os

import numpy as np

from .. import arrays, rules

try:
    from .._core import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "fastrms._core":
        raise
    ffi = lib = None

OK = 0
RULE_INDEX = {}


def available():
    return None if lib else "fastrms was built without its C extension (FASTRMS_NO_EXT=1)"


def isas():
    """Instruction sets in this binary that this CPU runs, best first."""
    return [_isa_name(k) for k in range(lib.fastrms_isa_count()) if lib.fastrms_isa_supported(k)] if lib else []


def isa():
    """The instruction set that runs, or None without the C extension."""
    return _isa_name(lib.fastrms_isa_get()) if lib else None


def use_isa(name):
    """Force an instruction set for the whole process; ValueError if this CPU or binary has it not."""
    names = [_isa_name(k) for k in range(lib.fastrms_isa_count())]
    if name not in names:
        raise ValueError(f"FASTRMS_ISA={name!r} is not in this build, which has {', '.join(map(repr, names))}")
    if lib.fastrms_isa_set(names.index(name)) < 0:
        raise ValueError(f"FASTRMS_ISA={name!r} is not supported by this CPU")


def _isa_name(index):
    return ffi.string(lib.fastrms_isa_name(index)).decode()


def _compare_texts():
    """Both texts of the mathematics must name the same rules and arguments: a stale build is refused."""
    count = lib.fastrms_rule_count()
    in_c = {
        ffi.string(lib.fastrms_rule_name(k)).decode(): ffi.string(lib.fastrms_rule_arguments(k)).decode().split()
        for k in range(count)
    }
    in_python = {name: list(rules.arguments(rule)) for name, rule in rules.RULES.items()}
    for name in in_c.keys() | in_python.keys():
        if in_c.get(name) != in_python.get(name):
            raise ImportError(f"csrc/rules.h and fastrms/rules.py differ in the rule {name!r}: rebuild the C extension")
    RULE_INDEX.update({name: k for k, name in enumerate(in_c)})


if lib:
    _compare_texts()
    if os.environ.get("FASTRMS_ISA"):
        use_isa(os.environ["FASTRMS_ISA"])


def fill_group(group, recipe):
    """Write a recipe into a fastrms_group."""
    names = list(recipe.values)
    group.rule = RULE_INDEX[recipe.rule]
    group.itemsize = recipe.dtype.itemsize
    group.general = recipe.general
    group.coefficients = len(names)
    group.value[0 : len(names)] = list(recipe.values.values())
    group.corrections = len(recipe.corrections)
    for k, correction in enumerate(recipe.corrections):
        slot = group.correction[k]
        slot.coefficient = names.index(correction.coefficient)
        slot.operation = correction.operation
        slot.linear = correction.linear
        slot.ahead = correction.ahead
        slot.decay = correction.decay
        slot.weight = correction.weight


def pointer(address):
    return ffi.cast("void *", address)


def update(recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place."""
    group = ffi.new("fastrms_group *")
    fill_group(group, recipe)
    addresses = [ffi.from_buffer(flat) for flat in (param, grad, *states)]
    addresses += [ffi.NULL] * (2 + lib.FASTRMS_MAX_STATES - len(addresses))
    status = lib.fastrms_update(group, param.size, step, grad_scale, *addresses)
    assert status == OK, "buffers overlap: the caller checks them"


class Plan:
    """Bound buffers.  params: Buffers; states: flat arrays per param; sets: index into recipes per param."""

    def __init__(self, params, states, sets, recipes):
        count = len(params)
        self._tensor = ffi.new("fastrms_tensor[]", count)
        self._group = ffi.new("fastrms_group[]", len(recipes))
        self._grad = ffi.new("void *[]", count)
        self.incoming = ffi.new("void *[]", count)
        self._ready = ffi.new("double[]", count * lib.FASTRMS_MAX_COEFFICIENTS)
        self._starts = ffi.new("int64_t[]", count + 1)
        self._segments = ffi.new("fastrms_squares[]", sum(lib.fastrms_segments(param.size) for param in params))
        self._ranges = ffi.new("uintptr_t[]", count * (2 + lib.FASTRMS_MAX_STATES) * 2)
        self._plan = ffi.new("fastrms_plan *")
        self._params, self._states = list(params), states
        for index, recipe in enumerate(recipes):
            self.set_recipe(index, recipe)
        for k, (param, state) in enumerate(zip(params, states, strict=True)):
            tensor = self._tensor[k]
            tensor.size = param.size
            tensor.group = sets[k]
            self.set_param(k, param)
            for slot, flat in enumerate(state):
                tensor.state[slot] = pointer(arrays.own(flat).address)
        plan = self._plan
        plan.tensors, plan.tensor, plan.group = count, self._tensor, self._group
        plan.grad, plan.incoming = self._grad, self.incoming
        plan.ready, plan.ranges = self._ready, self._ranges
        plan.starts, plan.segments = self._starts, self._segments
        plan.states = max(map(len, states))
        plan.grad_scale, plan.clip_norm = 1.0, -1.0

    def acquire(self):
        return lib.fastrms_acquire(self._plan) == OK

    def release(self):
        lib.fastrms_release(self._plan)

    def set_recipe(self, index, recipe):
        fill_group(self._group[index], recipe)
        self._plan.unchanging = 0

    def set_param(self, k, buffer):
        self._params[k] = buffer
        self._tensor[k].param = pointer(buffer.address)

    def set_grads(self, grads, buffers):
        """Take over the gradients (Buffers, or ndarrays that match already, or None).  True: some buffers overlap."""
        incoming = self.incoming
        for k, grad in enumerate(grads):
            if grad is None:
                incoming[k] = ffi.NULL
            elif type(grad) is np.ndarray:
                incoming[k] = ffi.from_buffer(grad)
            else:  # an empty torch tensor lies at address 0, which would mean "no gradient"
                incoming[k] = pointer(grad.address) if grad.address else self._tensor
        return lib.fastrms_set_grads(self._plan) != OK

    def run(self, grad_scale=1.0, clip_norm=None):
        """One step over all tensors that have a gradient; the norm of the gradients if clip_norm asks for it."""
        plan = self._plan
        if grad_scale == 1.0 and clip_norm is None:
            lib.fastrms_run(plan)
            return None
        plan.grad_scale = grad_scale
        plan.clip_norm = -1.0 if clip_norm is None else clip_norm
        lib.fastrms_run(plan)
        plan.grad_scale, plan.clip_norm = 1.0, -1.0
        return None if clip_norm is None else plan.grad_norm

    def set_ready(self, ready):
        """Whether the gradients that the plan points to are held, so that a step may read them at once."""
        self._plan.ready_to_step = ready

    def bound_step(self):
        """A function and its argument for one step of the bound buffers; it answers 0 when the step was made."""
        return lib.fastrms_step, self._plan

    @property
    def steps(self):
        return self._plan.steps

    @property
    def tensor_steps(self):
        return [self._tensor[k].steps for k in range(len(self._tensor))]

    def set_steps(self, steps, tensor_steps):
        self._plan.steps = steps
        for k, count in enumerate(tensor_steps):
            self._tensor[k].steps = count
