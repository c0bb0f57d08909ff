"""The C kernels through cffi: buffers are bound in C structs, and a step is one call for all tensors and groups."""

import os
from pathlib import Path

import numpy as np

from .. import backends, rules
from ..memory import host
from . import NOT_GATHERED, OK, ON_NONFINITE, Found

try:
    from .._core import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "fastrms._core":
        raise
    ffi = lib = None
else:
    import _cffi_backend  # noqa: F401  _core imports it in C, where tools that freeze a program do not see it

RULE_INDEX = {}
FOUND = ffi and ffi.typeof("fastrms_found *")
PIECE = np.dtype([*((f"{k}", "i8") for k in range(5)), *((f"{k}", "i4") for k in range(5, 9))])  # a fastrms_piece
HALVES = {host.BF16: lib.FASTRMS_BF16, host.FP16: lib.FASTRMS_FP16} if lib else {}
DTYPE_OF = {format: dtype for dtype, format in HALVES.items()}
DOUBLES = ffi and ffi.typeof("double[]")
ISAS = [ffi.string(lib.fastrms_isa_name(k)).decode() for k in range(lib.fastrms_isa_count())] if lib else []


def available():
    built = "fastrms was built without its C extension (FASTRMS_NO_EXT=1)"
    return None if lib else f"{built}, or {Path(__file__).parents[2]} is a source tree: run `pip install -e .` there"


def isas():
    """The instruction sets in this binary that this CPU supports, the most able first."""
    return [name for k, name in enumerate(ISAS) if lib.fastrms_isa_supported(k)]


def isa():
    """The instruction set that is forced, else the most able that a kernel may use; None without the C extension."""
    return ISAS[lib.fastrms_isa_get()] if lib else None


def isa_of(rule, dtype, general):
    """The instruction set that the kernel of a rule is taken from; where none is forced, it is measured at first use."""
    return ISAS[lib.fastrms_isa_of(RULE_INDEX[rule], np.dtype(dtype).itemsize, general)]


def compiler():
    """The compiler that built the kernels, with its version, or None without the C extension."""
    return ffi.string(lib.fastrms_compiler()).decode() if lib else None


def built(fact):
    """What the extension knows of its build: its "sources", a hash of them, or the "flags" of the compiler; None where it is
    older than that or missing."""
    return ffi.string(getattr(lib, f"fastrms_built_{fact}")).decode() if hasattr(lib, f"fastrms_built_{fact}") else None


def use_isa(name):
    """Force an instruction set for the whole process; None takes the fastest for each kernel.  ValueError if this CPU or
    binary lacks it."""
    if name is not None and name not in ISAS:
        raise ValueError(f"FASTRMS_ISA={name!r} is not in this build, which has {', '.join(map(repr, ISAS))}")
    if lib.fastrms_isa_set(-1 if name is None else ISAS.index(name)) < 0 and name is not None:
        raise ValueError(f"FASTRMS_ISA={name!r} is not supported by this CPU")


def _compare_texts():
    """ImportError unless rules.h and rules.py name the same rules and arguments, as they do not in a stale build."""
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


def fill_recipe(slot, recipe):
    """Write a recipe into a fastrms_recipe."""
    slot.rule = RULE_INDEX[recipe.rule]
    slot.itemsize = recipe.dtype.itemsize
    slot.general = recipe.general
    slot.lr = recipe.rate
    slot.rated = sum(1 << k for k in recipe.rated)
    slot.coefficients = len(recipe.values)
    slot.value[0 : len(recipe.values)] = list(recipe.values.values())
    slot.corrections = len(recipe.corrections)
    for k, correction in enumerate(recipe.corrections):
        slot.correction[k] = correction._asdict()  # the fields have the same names in C


def pointer(address):
    return ffi.cast("void *", address)


def update(recipe, step, grad_scale, param, grad, states):
    """One step on flat arrays, in place."""
    made = ffi.new("fastrms_recipe *")
    fill_recipe(made, recipe)
    addresses = [ffi.from_buffer(flat) for flat in (param, grad, *states)]
    addresses += [ffi.NULL] * (2 + lib.FASTRMS_MAX_STATES - len(addresses))
    status = lib.fastrms_update(made, param.size, step, grad_scale, *addresses)
    if status != OK:
        raise RuntimeError(f"fastrms_update answered {status}: buffers overlap, are misaligned or missing")


def storage_fields(storage):
    """The fields of a fastrms_storage."""
    return {
        "param": storage.param.number, "state": [format.number for format in storage.states],
        "copy_format": storage.copy_format.number, "stochastic": storage.stochastic,
        "low": ffi.NULL if storage.low is None else pointer(host.ours(storage.low).address),
        "copy": ffi.NULL if storage.copy is None else pointer(storage.copy.address),
        "seed": storage.seed, "origin": storage.origin,
    }  # fmt: skip


def storage_table(storages):
    """A fastrms_storage[] of Storages, in which a place stays empty for each None."""
    made = ffi.new("fastrms_storage[]", len(storages))
    for k, storage in enumerate(storages):
        if storage is not None:
            made[k] = storage_fields(storage)
    return made


def format_of(grad):
    """The number of the format of a gradient, a Buffer, an array or None."""
    return 0 if grad is None else HALVES.get(grad.dtype, 0)


def formats_of(grads):
    """A C array of the formats of gradients, which a torch_reader.Reader has ready; NULL where all are in their compute
    dtype, as arrays always are."""
    if type(grads) is not list:
        return grads.formats
    if host.Buffer not in set(map(type, grads)):
        return ffi.NULL
    found = [*map(format_of, grads)]
    return ffi.new("int32_t[]", found) if any(found) else ffi.NULL


class Gathering:
    """A fastrms_shards, whose gather function calls a shards.Exchange."""

    def __init__(self, exchange):
        self.exchange, self.error = exchange, None
        self._message = ffi.new("char[]", exchange.length)
        self._own, self._all = (pieces_array(pieces) for pieces in (exchange.own, exchange.pieces))
        self.shards = ffi.new("fastrms_shards *")
        self.shards.own, self.shards.own_pieces = self._own, len(exchange.own)
        self.shards.piece, self.shards.pieces = self._all, len(exchange.pieces)
        self.shards.message, self.shards.gather = self._message, lib.fastrms_gather

    def gather(self):
        """Set shards.gathered; returns 0, or 1 where it failed, and then `error` says why."""
        try:
            self._gathered = self.exchange(ffi.buffer(self._message)[:])
            self.shards.gathered = ffi.from_buffer(self._gathered)
            self.error = None
        except BaseException as error:
            self.error = error
        return int(self.error is not None)

    def raise_error(self):
        try:
            raise self.error
        finally:
            self.error = None


def pieces_array(pieces):
    """A fastrms_piece[] of these Pieces."""
    return ffi.from_buffer("fastrms_piece[]", np.array(pieces, PIECE))


if lib:

    @ffi.def_extern(name="fastrms_gather", error=1)
    def _gather(shards):
        return ffi.from_handle(shards.context).gather()


class Plan(backends.Plan):
    """A backends.Plan that consists of a fastrms_plan and the tables that it points to."""

    most_rate_rows = 256
    takes_pointers = True

    def __init__(self, params, states, recipe_of, recipes, nonfinite="propagate", zero_grad=False, storages=None):
        self._pointers = ffi.typeof("void *[]")
        self._tensor = ffi.new("fastrms_tensor[]", len(params))
        self._recipe = ffi.new("fastrms_recipe[]", len(recipes))
        self._grad = ffi.new(self._pointers, len(params))
        self._dtypes = [recipes[index].dtype for index in recipe_of]
        for index, recipe in enumerate(recipes):
            fill_recipe(self._recipe[index], recipe)
        for k, (param, state) in enumerate(zip(params, states, strict=True)):
            addresses = [pointer(host.ours(flat).address) for flat in state]
            at = pointer(param.address)
            self._tensor[k] = {"size": param.size, "recipe": recipe_of[k], "param": at, "state": addresses}
        self._storage = storage_table(storages) if storages else None
        for k, storage in enumerate(storages or ()):
            if storage is not None:
                self._tensor[k].storage = self._storage + k
        self._scratch = ffi.new("double[]", lib.fastrms_scratch_bytes(len(params), self._tensor) // 8)
        self._plan = ffi.new("fastrms_plan *")
        tables = len(params), self._tensor, len(recipes), self._recipe, self._grad
        lib.fastrms_plan_init(self._plan, *tables, self._scratch)
        self._plan.on_nonfinite, self._plan.zero_grad = ON_NONFINITE.index(nonfinite), zero_grad
        self._watches = nonfinite != "propagate"

    def grad_dtype(self, k):
        """The dtype of the gradient of tensor k that the plan took over last, None where it has none."""
        return DTYPE_OF.get(self._tensor[k].grad_format, self._dtypes[k]) if self._grad[k] else None

    def join(self, exchange):
        self._gathering = Gathering(exchange)
        self._handle = ffi.new_handle(self._gathering)
        self._gathering.shards.context = self._handle
        self._plan.shards = self._gathering.shards

    def bound_step(self):
        return lib.fastrms_step, lib.fastrms_step_held, self._plan

    def step_looking(self, number, grad_scale, clip_norm):
        if self._watches:
            found = ffi.new(FOUND)
            norm = -1.0 if clip_norm is None else clip_norm
            status = lib.fastrms_step_with(self._plan, number, grad_scale, norm, found)
            seen = self._seen(found, clip_norm)
        elif clip_norm is None:
            return lib.fastrms_step_with(self._plan, number, grad_scale, -1.0, ffi.NULL), None
        else:
            norm = lib.fastrms_step_clipped(self._plan, number, grad_scale, clip_norm)
            status, seen = -int(norm) if norm < 0.0 else OK, (norm, None, None)
        if status == NOT_GATHERED:
            self._gathering.raise_error()
        return status, seen

    def addresses(self):
        return tuple(int(ffi.cast("uintptr_t", x)) for x in (ffi.addressof(lib, "fastrms_step"), self._plan))

    def change(self, params=None, grads=None, recipes=None, hold=0, run=True, grad_scale=1.0, clip_norm=None):
        looks = run and (clip_norm is not None or self._watches)
        found = ffi.new(FOUND) if looks else ffi.NULL
        status = lib.fastrms_change_as(
            self._plan,
            ffi.NULL if params is None else ffi.new(self._pointers, [pointer(param.address) for param in params]),
            ffi.NULL if grads is None else self._addresses(grads),
            ffi.NULL if grads is None else formats_of(grads),
            self._recipes_with(recipes) if recipes else ffi.NULL,
            hold,
            run,
            grad_scale,
            -1.0 if clip_norm is None else clip_norm,
            found,
        )
        if status == NOT_GATHERED:
            self._gathering.raise_error()
        return status, Found._make(self._seen(found, clip_norm)) if looks else None

    def _seen(self, found, clip_norm):
        """The fields of a Found, None for what the step did not look for."""
        norm = None if clip_norm is None else found.grad_norm
        return norm, found.nonfinite if self._watches else None, found.tensor

    def stream_open(self):
        return lib.fastrms_stream_open(self._plan)

    def set_rate(self, rate):
        return lib.fastrms_set_rate(self._plan, rate)

    def set_rates(self, rates, first=0, rows=0):
        made = ffi.new(DOUBLES, rates)
        status = lib.fastrms_set_rates(self._plan, first, rows, made)
        if not status:
            self._rates = made  # the plan reads it
        return status

    def stream_step(self, k, param, grad, rates, grad_scale):
        return lib.fastrms_stream_step(
            self._plan,
            k,
            ffi.NULL if param is None else pointer(param.address),
            self._address(grad),
            format_of(grad),
            ffi.NULL if rates is None else ffi.new(DOUBLES, rates),
            grad_scale,
        )

    def stream_close(self):
        lib.fastrms_stream_close(self._plan)

    def _addresses(self, grads):
        """A C array of the addresses of all gradients, which a torch_reader.Reader has ready."""
        return ffi.new(self._pointers, [self._address(grad) for grad in grads]) if type(grads) is list else grads.pointers

    def _address(self, grad):
        if type(grad) is np.ndarray:
            return ffi.from_buffer(grad)
        if grad is None:
            return ffi.NULL
        return pointer(grad.address) if grad.size else self._tensor  # an empty tensor may lie at 0, which means "none"

    def _recipes_with(self, recipes):
        made = ffi.new("fastrms_recipe[]", len(self._recipe))
        ffi.memmove(made, self._recipe, ffi.sizeof(made))
        for index, recipe in recipes.items():
            fill_recipe(made[index], recipe)
        return made

    def copy(self, pairs, recipes=None, steps=None):
        to, source = ([ffi.from_buffer(pair[side]) for pair in pairs] for side in (0, 1))
        before = ffi.new("int64_t[]", len(self._tensor) + 1)
        status = lib.fastrms_copy(
            self._plan,
            len(pairs),
            ffi.new(self._pointers, to),
            ffi.new(self._pointers, source),
            ffi.new("int64_t[]", [pair[0].nbytes for pair in pairs]),
            self._recipes_with(recipes) if recipes else ffi.NULL,
            ffi.NULL if steps is None else ffi.new("int64_t[]", steps),
            before,
        )
        return status, list(before)

    def pairs_of_storages(self, storages):
        tables = self._storage, storage_table(storages)
        return [tuple(np.frombuffer(ffi.buffer(table), np.uint8) for table in tables)]

    @property
    def steps(self):
        return self._plan.steps

    @property
    def tensor_steps(self):
        return [self._tensor[k].steps for k in range(len(self._tensor))]

    def steps_of(self, k):
        return self._tensor[k].steps
