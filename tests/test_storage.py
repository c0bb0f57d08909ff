"""Tensors that are stored in formats: same bits from every backend, instruction set, thread count and tile; the body of a
loop and its tail; and what masters, copies and rounding promise."""

import ctypes
import functools
import itertools

import numpy as np
import pytest
from conftest import BACKENDS, WAYS, backends, bits, c, forced
from ml_dtypes import bfloat16
from test_formats import Buffers
from test_numerics import fp_mode as mode_of_thread
from test_same_bits import OPTIMIZERS
from test_shards import Communicator, at_once, no_error

import fastrms
from fastrms import formats, storage
from fastrms.backends import plan
from fastrms.memory import host

SIZES = [7, 257, 0, 1, 1003]
STATE_FORMATS = [None, "bf16", "fp16", "q8"]
PARAMS = {  # id -> format of the parameter, master, format of the copy
    "float32": ("float32", None, None),
    "float32+bf16": ("float32", None, "bf16"),
    "float32+fp16": ("float32", None, "fp16"),
    "bf16": ("bf16", None, None),
    "bf16-float32": ("bf16", "float32", None),
    "bf16-float32+fp16": ("bf16", "float32", "fp16"),
    "bf16-split16": ("bf16", "split16", None),
    "bf16-split8+bf16": ("bf16", "split8", "bf16"),
    "fp16": ("fp16", None, None),
    "fp16-float32": ("fp16", "float32", None),
}
GRADIENTS = ["bf16", "fp16", "float32"]
ROUNDINGS = ["stochastic", "nearest"]
FLOAT, BF16, FP16 = (formats.FORMATS[name] for name in ("float32", "bf16", "fp16"))

each_rule = pytest.mark.parametrize("make, options", OPTIMIZERS)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
each_master = pytest.mark.parametrize("master", ["float32", "split16", "split8", None])


def refused(make, options, state_format):
    """Whether a state of a rule cannot be stored in this format."""
    optimizer = make(np.zeros(1, np.float32), **options)
    return any((state_format, name) in storage.NEEDS_FLOATS for name in optimizer.state)


CASES = [
    pytest.param(*case.values, state_format, id=f"{case.id}-{state_format}")
    for case in OPTIMIZERS
    for state_format in STATE_FORMATS
    if not refused(*case.values, state_format)
]


def stored(format, x):
    """Float32 numbers as an array that fastrms takes for this format."""
    if format == "float32":
        return x.copy()
    made = np.empty(x.shape, np.uint16)
    formats.encode(formats.FORMATS[format], x.reshape(-1), made.reshape(-1), x.size, formats.Rounding())
    return made.view(np.float16) if format == "fp16" else fastrms.Stored(made, "bf16")


def raw(x):
    """The bits of what stored() gave, or of any array."""
    array = np.asarray(getattr(x, "array", x)).reshape(-1)
    return array.view(f"u{array.itemsize}")


def numbers(x):
    """The numbers of what stored() gave."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32)
    return formats.decode(BF16, raw(x), raw(x).size)


def round_to_nearest(optimizer):
    """Let the plan of an optimizer round its states to nearest."""
    tensors, plan = optimizer._tensors, optimizer._plan
    made = [tensor.storage._replace(stochastic=False) for tensor in tensors]
    assert plan.copy(plan.pairs_of_storages(made))[0] == backends.OK
    for tensor, storage_of in zip(tensors, made, strict=True):
        tensor.storage = storage_of


class Run:
    """An optimizer of several tensors, and what it has written."""

    def __init__(self, make, options, backend, kind="float32", sizes=SIZES, data=1, **said):
        format, master, copy = PARAMS[kind]
        rng = np.random.default_rng(data)
        self.params = [stored(format, rng.standard_normal(size).astype(np.float32)) for size in sizes]
        self.copies = copy and [stored(copy, np.zeros(size, np.float32)) for size in sizes]
        if format != "float32":
            said = {"rounding": "stochastic", "master": master, **said}
        to_nearest = said.get("state_format") == "q8" and said.get("rounding") == "nearest"
        said = {**said, "rounding": "stochastic"} if to_nearest else said
        self.optimizer = make(self.params, backend=backend, param_copy=self.copies, **options, **said)
        if to_nearest:  # an optimizer refuses this pair, a plan does not
            round_to_nearest(self.optimizer)
        self.sizes, self.rng, self.infos = sizes, rng, []

    def gradients(self, format):
        return [stored(format, self.rng.standard_normal(size).astype(np.float32) * np.float32(0.1)) for size in self.sizes]

    def steps(self, format, count):
        """Steps of all kinds: scaled, clipped, and without the gradient of one tensor."""
        for step in range(count):
            grads = self.gradients(format)
            if step % 3 == 1:
                grads[0] = None
            clip_norm = 0.5 if step % 2 else None
            self.infos.append(self.optimizer.step(grads, grad_scale=1 / 3 if step == 2 else 1.0, clip_norm=clip_norm))
        return self

    def states(self):
        return [flat for tensor in self.optimizer._tensors for flat in tensor.state.values()]

    def lows(self):
        made = [tensor.storage and tensor.storage.low for tensor in self.optimizer._tensors]
        return [low for low in made if low is not None]

    def buffers(self):
        return [raw(x).copy() for x in (*self.params, *(self.copies or ()), *self.states(), *self.lows())]

    def outcome(self):
        return self.buffers(), self.infos, self.optimizer.tensor_steps


def same(found, wanted):
    (found, *more), (wanted, *others) = found, wanted
    assert more == others
    for k, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert np.array_equal(x, y), f"buffer {k}: {np.flatnonzero(x != y)[:9]}"


def in_every_way(work):
    """work(backend) has the same outcome on all tiers."""
    wanted = work("numpy")
    for backend, isa in WAYS:
        with forced(isa):
            same(work(backend), wanted)


# one result


@each_rounding
@pytest.mark.parametrize("make, options, state_format", CASES)
@pytest.mark.parametrize("kind", PARAMS)
def test_every_tier_has_the_same_bits(make, options, state_format, kind, rounding):
    grad = GRADIENTS[(list(PARAMS).index(kind) + STATE_FORMATS.index(state_format) + len(options)) % 3]
    said = {"state_format": state_format, "rounding": rounding}
    in_every_way(lambda backend: Run(make, options, backend, kind, SIZES[:4], **said).steps(grad, 4).outcome())


@each_rounding
@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_ten_steps_of_larger_tensors(state_format, grad, rounding):
    kind = list(PARAMS)[(3 * STATE_FORMATS.index(state_format) + GRADIENTS.index(grad)) % len(PARAMS)]
    said = {"state_format": state_format, "rounding": rounding, "seed": 2**64 - 1}
    sizes = [255, 256, 5000, 3, 513]
    in_every_way(lambda backend: run_of_adam(backend, kind, sizes, said).steps(grad, 10).outcome())


def run_of_adam(backend, kind, sizes, said):
    return Run(fastrms.Adam, {"lr": 0.01, "weight_decay": 0.1}, backend, kind, sizes, data=4, **said)


fp_mode = mode_of_thread  # a fixture


LARGE = [5000, 257, 16384, 1003, 40001]  # the tile of Python is 16384


@pytest.mark.skipif(c.lib is None, reason="without the C extension there are no threads")
@pytest.mark.parametrize(
    "kind, state_format",
    [("float32+bf16", "q8"), ("bf16-split8+bf16", "bf16"), ("bf16", "fp16"), ("bf16-float32", None), ("bf16-split16", "q8"),
     ("float32", None)],
)  # fmt: skip
def test_threads_chunks_and_tiles_change_nothing(pool, monkeypatch, kind, state_format):
    def work(backend):
        return run_of_adam(backend, kind, LARGE, {"state_format": state_format}).steps("bf16", 2).outcome()

    wanted = work("numpy")
    monkeypatch.setattr(plan, "TILE", 768)
    same(work("numpy"), wanted)
    for threads, chunk in ((1, 700), (2, 1), (3, 256), (3, 5000), (2, 100_000)):
        pool(threads, chunk)
        same(work("c"), wanted)


# bodies and tails.  Plans are made as an optimizer makes them, with every buffer between guard zones.

LENGTHS = [*range(131), 255, 256, 257, 511, 512, 513, 1003]
LONGEST = max(LENGTHS)
LAYOUTS = {  # parameter, master, exp_avg, exp_avg_sq, gradient, copy
    "bf16-states": ("float32", None, "bf16", "bf16", "bf16", "bf16"),
    "fp16-states": ("float32", None, "fp16s", "fp16s", "fp16", "fp16"),
    "q8-states": ("float32", None, "q8", "q8u", "bf16", None),
    "bf16": ("bf16", None, "float32", "float32", "bf16", None),
    "fp16": ("fp16", None, "q8", "bf16", "fp16", None),
    "bf16-float32": ("bf16", "float32", "bf16", "float32", "float32", "fp16"),
    "fp16-float32": ("fp16", "float32", "float32", "fp16s", "fp16", None),
    "split16": ("split16", "split16", "float32", "q8u", "bf16", "bf16"),
    "split8": ("split8", "split8", "fp16s", "q8u", "bf16", None),
    "bf16-grad": ("float32", None, "float32", "float32", "bf16", None),
}


@functools.cache
def start():
    """The parameter, the gradient and the states; the first element of each block is the largest by far."""
    rng = np.random.default_rng(6)
    made = [rng.standard_normal(LONGEST).astype(np.float32) for _ in range(4)]
    made[3] = abs(made[3])
    for x in made[1:]:
        x[:: formats.Q8_BLOCK] = 50.0
    return made


def offsets_of(offset):
    return ((offset + k * (1 + offset % 3)) % 8 for k in itertools.count())


class Bare:
    """A plan of one tensor of Adam in a layout, and its buffers."""

    def __init__(self, backend, layout, size, offset, stochastic=True):
        param, self.master, *others, copy = LAYOUTS[layout]
        param, self.copied, *others = (formats.FORMATS[name or "float32"] for name in (param, copy, *others))
        first, second, grad = others
        numbers, offsets = [x[:size] for x in start()], offsets_of(offset)
        self.param, self.grad, self.first, self.second = (
            Buffers(format, size, at).encode(x, formats.Rounding())
            for format, x, at in zip(
                (param, grad, first, second), (numbers[0], numbers[1], *numbers[2:]), offsets, strict=False
            )
        )
        self.low = Buffers(FLOAT, size, next(offsets)).encode(numbers[0], formats.Rounding()) if self.has_floats else None
        self.copy = Buffers(self.copied, size, next(offsets)) if copy else None
        self.storage = self.made_storage(param, first, second, stochastic)
        recipe = fastrms.Adam(np.zeros(1, np.float32), lr=0.01)._groups.recipes[0]
        states = [[floats(x) for x in (self.first, self.second)]]
        self.plan = backends.load(backend).Plan([self.buffer(self.param)], states, [0], [recipe], storages=[self.storage])

    @property
    def has_floats(self):
        return self.master == "float32"

    def made_storage(self, param, first, second, stochastic):
        low = floats(self.low) if self.has_floats else self.param.low
        copy = self.copy and self.buffer(self.copy)
        return storage.Storage(param, (first, second), self.master, low, copy, self.copied, stochastic, 5, 2**32 - 100)

    @staticmethod
    def buffer(made):
        """The Buffer of Buffers."""
        array = floats(made)
        return host.ours(array.view(np.float16) if made.format is FP16 else array)

    def step(self, count=1, **more):
        for _ in range(count):
            status, found = self.plan.change(grads=[self.buffer(self.grad)], **more)
        return status, found

    def all(self):
        return [made for made in (self.param, self.first, self.second, self.low, self.copy, self.grad) if made is not None]

    def elements(self, size):
        """The bits of the first elements of all buffers."""
        parts = [(x, x.stored, x.low) for x in self.all()]
        return [part for x, *at in parts for part in formats.parts_of(x.format, *at, x.size, 0, size)]


def floats(made):
    """The array of Buffers, in float32 where it is."""
    return made.stored.view(np.float32) if made.format is FLOAT else made.stored


@functools.cache
def longest(layout):
    bare = Bare("numpy", layout, LONGEST, 0)
    bare.step(3)
    return bare


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, isa", WAYS, ids=[isa or name for name, isa in WAYS])
def test_body_equals_tail(backend, isa, layout):
    with forced(isa):
        for length in LENGTHS:
            for offset in (0, 1 + length % 7):
                bare = Bare(backend, layout, length, offset)
                assert bare.step(3) == (0, None)
                for k, (x, y) in enumerate(zip(bare.elements(length), longest(layout).elements(length), strict=True)):
                    assert np.array_equal(x, y), (length, offset, k)
                assert all(x.intact() for x in bare.all()), (length, offset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_elements_are_updated(layout):
    """Also those of whole vectors, of which a step must not leave any as it was; in bf16 some elements stay by rounding."""
    bare = Bare("numpy", layout, LONGEST, 0)
    before = decoded(bare.param, bare.low)
    bare.step(1)
    after = decoded(bare.param, bare.low)
    moved = after != before
    assert moved[: LONGEST // 16 * 16].reshape(-1, 16).any(axis=1).all() and abs(after - before).max() < 0.1
    assert layout in ("bf16", "fp16") or moved.mean() > 0.99
    if bare.copy:
        assert np.array_equal(bare.copy.stored, Buffers(bare.copied, LONGEST).encode(after, formats.Rounding()).stored)


def decoded(param, low):
    return param.decode() if low is None else low.decode()


def test_parameters_may_move(backend):
    """A plan takes over other memory of a parameter in a format, and leaves the old memory alone."""
    for layout in LAYOUTS:
        bare, other = Bare(backend, layout, 700, 1), Bare(backend, layout, 700, 1)
        for made in (bare, other):
            made.step()
        old, before = bare.param, bare.param.memory[0][0].copy()
        bare.param = Buffers(old.format, 700, 5)
        bare.param.stored[:], bare.param.low = old.stored, old.low
        bare.step(2, params=[bare.buffer(bare.param)])
        other.step(2)
        assert np.array_equal(bare.param.stored, other.param.stored) and np.array_equal(old.memory[0][0], before)
        assert not np.array_equal(bare.param.stored, old.stored) and bare.param.intact()


def test_states_are_copied_in_their_formats(backend):
    for layout in LAYOUTS:
        bare = Bare(backend, layout, 700, 1)
        flats = [floats(bare.first), floats(bare.second)]
        saved = [np.empty_like(flat) for flat in flats]
        assert bare.plan.copy(list(zip(saved, flats, strict=True))) == (0, [0, 0])
        start = [flat.copy() for flat in flats]
        bare.step(2)
        assert all(np.array_equal(raw(x), raw(y)) for x, y in zip(saved, start, strict=True))
        bare.plan.copy(list(zip(flats, saved, strict=True)), steps=[7, 7])
        assert all(np.array_equal(raw(x), raw(y)) for x, y in zip(saved, flats, strict=True)) and bare.first.intact()
        assert bare.plan.tensor_steps == [7]


# several formats in one optimizer, and gradients of all kinds


def test_groups_have_their_formats(backend):
    formats = [None, None, "q8", "bf16", "fp16"]
    said = [{"state_format": format, "rounding": ROUNDINGS[k % 2]} for k, format in enumerate(formats)]

    def work(backend):
        rng = np.random.default_rng(3)
        dtypes = [np.float64, *4 * [np.float32]]
        params = [[rng.standard_normal(n).astype(d) for n in (300, 5)] for d in dtypes]
        groups = [{"params": mine, **extra} for mine, extra in zip(params, said, strict=True)]
        optimizer = fastrms.RMSProp(groups, backend=backend, momentum=0.5)
        for _ in range(5):
            optimizer.step([[rng.standard_normal(n).astype(d) for n in (300, 5)] for d in dtypes], clip_norm=9.0)
        flats = [flat for tensor in optimizer._tensors for flat in tensor.state.values()]
        return [raw(x).copy() for x in (*itertools.chain(*params), *flats)], {str(flat.dtype) for flat in flats}

    found, kinds = work(backend)
    assert kinds == {"float64", "float32", "uint8", "uint16"}
    same((found, kinds), work("numpy"))


def test_gradients_may_change_their_format():
    def work(backend):
        run = Run(fastrms.Adam, {}, backend, "float32", state_format="bf16")
        for format in (*GRADIENTS, *GRADIENTS[::-1]):
            run.steps(format, 3)
        mixed = [(run.gradients(GRADIENTS[k % 3]))[k] for k in range(len(SIZES))]
        run.infos.append(run.optimizer.step(mixed, clip_norm=0.01))
        bound = run.gradients("bf16")
        run.optimizer.bind(bound)
        for _ in range(3):
            run.infos += [run.optimizer.step(), run.optimizer.step(clip_norm=0.5)]
        run.infos.append(run.optimizer.step(run.gradients("float32")))
        return run.outcome()

    in_every_way(work)


def test_one_step_may_have_all_formats():
    """Of tensors that share their hyper-parameters, some are stored in formats or have such gradients, and some do not."""

    def work(backend):
        rng = np.random.default_rng(7)
        sizes = [300, 20, 300, 1, 20, 7]
        params = [stored("float32", rng.standard_normal(size).astype(np.float32)) for size in sizes]
        copies = [None, stored("bf16", np.zeros(20, np.float32)), None, stored("fp16", np.zeros(1, np.float32)), None, None]
        optimizer = fastrms.Adam(params, param_copy=copies, backend=backend)
        infos = []
        for step in range(6):
            grads = [stored(("float32", *GRADIENTS)[(k + step) % 4], abs(params[k]) / 8) for k in range(len(sizes))]
            grads[step] = None
            infos.append(optimizer.step(grads, clip_norm=1.0 if step % 2 else None))
        flats = [flat for tensor in optimizer._tensors for flat in tensor.state.values()]
        return [raw(x).copy() for x in (*params, copies[1], copies[3], *flats)], infos

    in_every_way(work)


@pytest.mark.parametrize("grad", ["bf16", "fp16"])
def test_gradients_in_a_format_are_those_numbers(backend, grad):
    """A float32 optimizer makes of bf16 or fp16 gradients what it makes of the same numbers in float32."""
    half, whole = (Run(fastrms.RMSProp, {"momentum": 0.9}, backend) for _ in range(2))
    for _ in range(5):
        grads = half.gradients(grad)
        half.infos.append(half.optimizer.step(grads, clip_norm=1.0))
        whole.infos.append(whole.optimizer.step([numbers(g) for g in grads], clip_norm=1.0))
    same(half.outcome(), whole.outcome())


@pytest.mark.parametrize("kind", PARAMS)
def test_gradients_that_are_not_finite(kind):
    """They are propagated to the same numbers; the payload of a NaN is not promised."""

    def work(backend):
        run = Run(fastrms.Adam, {}, backend, kind, state_format="bf16")
        grads = run.gradients("bf16")
        for at, value in ((3, np.inf), (4, -np.inf), (100, np.nan), (256, 3e38)):
            raw(grads[1])[at] = np.array([value], np.float32).view(np.uint32)[0] >> 16
        run.optimizer.step(grads)
        shown = [x for state in run.optimizer.state.values() for x in map(np.asarray, state)]
        lows = [low for low in run.lows() if low.dtype == np.float32]
        return [bits(x) for x in (*map(numbers, run.params), *shown, *lows)], None

    in_every_way(work)


@pytest.mark.parametrize("zero_grad", [False, True])
def test_steps_with_gradients_that_are_not_finite_are_skipped(zero_grad):
    def work(backend):
        run = Run(fastrms.Adam, {}, backend, "bf16-split8+bf16", state_format="q8", nonfinite="skip", zero_grad=zero_grad)
        run.steps("bf16", 3)
        grads, before = run.gradients("bf16"), run.outcome()
        raw(grads[1])[200], raw(grads[4])[7] = 0x7F80, 0xFFC0
        info = run.optimizer.step(grads, clip_norm=1.0)
        assert info.nonfinite == 2 and not info.applied
        same(run.outcome(), before)
        assert all((raw(grad) == 0).all() == zero_grad for grad in grads if raw(grad).size)
        return run.steps("bf16", 2).outcome()

    in_every_way(work)


def test_a_step_with_a_gradient_that_is_not_finite_raises(backend):
    run = Run(fastrms.Adam, {}, backend, "bf16", nonfinite="raise")
    grads, before = run.gradients("fp16"), run.outcome()
    raw(grads[1])[3] = 0x7E00
    with pytest.raises(FloatingPointError, match=r"1 element.* grads\[1\]"):
        run.optimizer.step(grads)
    same(run.outcome(), before)


def test_a_square_that_overflows_is_not_finite(backend):
    """3e38 is finite in bf16; its square overflows in float32, in which the rule squares."""
    run = Run(fastrms.RMSProp, {}, backend, nonfinite="skip")
    grads = run.gradients("bf16")
    raw(grads[4])[0] = np.array([3e38], np.float32).view(np.uint32)[0] >> 16
    assert run.optimizer.step(grads).nonfinite == 1


@pytest.mark.parametrize("grad", GRADIENTS)
def test_gradients_are_zeroed(grad):
    def work(backend):
        run = Run(fastrms.RMSProp, {}, backend, "float32+bf16", state_format="q8", zero_grad=True)
        for clip_norm in (None, 0.1):
            memory = [np.full(size + 64, 0x3C3C, np.uint16 if grad != "float32" else np.uint32) for size in SIZES]
            views = [array[31 : 31 + size] for array, size in zip(memory, SIZES, strict=True)]
            kinds = {"bf16": lambda x: fastrms.Stored(x, "bf16"), "fp16": lambda x: x.view(np.float16)}
            run.optimizer.step([kinds.get(grad, lambda x: x.view(np.float32))(x) for x in views], clip_norm=clip_norm)
            assert not any(view.any() for view in views)
            assert all((array[:31] == 0x3C3C).all() and (array[-33:] == 0x3C3C).all() for array in memory)
        return run.outcome()

    in_every_way(work)


@pytest.mark.parametrize(
    "kind, state_format", [("float32+bf16", "q8"), ("bf16-split8+bf16", "bf16"), ("bf16-float32", None)]
)
def test_streamed_steps_are_steps(backend, kind, state_format):
    whole, parts = (Run(fastrms.Adam, {}, backend, kind, state_format=state_format) for _ in range(2))
    for step in range(6):
        grads = [parts.gradients(GRADIENTS[step % 3])[k] for k in range(len(SIZES))]
        grads[step % 5] = None
        whole.optimizer.step(grads)
        with parts.optimizer.streaming() as stream:
            for k in np.random.default_rng(step).permutation(len(SIZES)).tolist():
                if grads[k] is not None:
                    stream.step(k, grads[k])
    same(parts.outcome(), whole.outcome())
    with parts.optimizer.streaming() as stream, pytest.raises(ValueError, match="overlap"):
        stream.step(1, fastrms.Stored(raw(parts.params[1]).view(np.uint16)[:257], "bf16"))
    same(parts.outcome(), whole.outcome())


def test_bits_depend_on_the_updates_of_the_tensor_alone(backend):
    """A step without a gradient does not count for the random numbers of a tensor, whatever the other tensors do."""
    one, several = (Run(fastrms.RMSProp, {}, backend, "bf16", sizes, state_format="q8") for sizes in ([300], [300, 40]))
    rng = np.random.default_rng(8)
    for step in range(7):
        grad = stored("bf16", rng.standard_normal(300).astype(np.float32))
        other = stored("bf16", np.ones(40, np.float32))
        several.optimizer.step([None if step % 3 == 1 else grad, other])
        if step % 3 != 1:
            one.optimizer.step([grad])
    assert several.optimizer.tensor_steps == [5, 7]
    assert np.array_equal(raw(one.params[0]), raw(several.params[0]))
    assert all(np.array_equal(x, y) for x, y in zip(one.states(), several.states(), strict=False))


def test_seeds_and_tensors_have_other_noise(backend):
    """Equal tensors with equal gradients are rounded by other random numbers, as are those of another seed."""
    made = []
    for seed in (0, 1):
        params = [stored("bf16", np.ones(2000, np.float32)) for _ in range(2)]
        optimizer = fastrms.RMSProp(params, lr=1e-4, rounding="stochastic", seed=seed, backend=backend)
        optimizer.step([stored("bf16", np.ones(2000, np.float32)) for _ in range(2)])
        made += [raw(param) for param in params]
    assert all((x != y).any() for x, y in itertools.combinations(made, 2))


def test_ranks_have_the_bits_of_one_process(backend):
    """The norm over parts of bf16 tensors, cut within a block, is that of the whole."""
    size, cut = 9000, 4999
    values = np.random.default_rng(2).standard_normal(size).astype(np.float32)

    def of(part, **more):
        optimizer = fastrms.RMSProp(stored("bf16", values[part]), master="float32", backend=backend, **more)
        return [optimizer.step(stored(format, values[part]), clip_norm=1.0).grad_norm for format in ("bf16", "float32")]

    whole, comm = of(slice(None)), Communicator(2)

    def work(rank):
        part = (slice(0, cut), slice(cut, size))[rank]
        return of(part, shards=fastrms.Shards(comm.gather_of(rank), [(0, part.start, size)]))

    assert no_error(at_once(2, work)) == [whole, whole]


class Momentum(fastrms.Optimizer):
    """A rule of the tests' own."""

    defaults = {"lr": 0.01, "decay": 0.9}
    state_names = ("average",)

    def coefficients(step, lr, decay):
        return {"lr": lr / (1 + 0.1 * step), "decay": decay}

    def rule(param, grad, average, lr, decay):
        average = decay * average + grad
        return param - lr * average, average


@pytest.mark.parametrize(
    "kind, state_format", [("float32+fp16", "q8"), ("fp16", "fp16"), ("bf16", "q8"), ("fp16-float32", None)]
)
@pytest.mark.parametrize("backend, isa", WAYS, ids=[isa or name for name, isa in WAYS])
def test_a_caller_that_flushes_denormals_gets_the_same_bits(fp_mode, backend, isa, kind, state_format):
    """Subnormal numbers of fp16 are decoded as subnormal floats, and no caller changes how numbers are rounded."""
    default, outcomes = fp_mode.get(), []
    other = 0x1F80 | 0x8040 | 0x2000 * (backend == "c")  # flush to zero, denormals are zero, round down
    for mode in (default, other):
        run = Run(fastrms.Adam, {"lr": 1e-6}, backend, kind, [300], state_format=state_format)
        for param in run.params:
            if kind.startswith("fp16"):
                raw(param)[:] &= 0x83FF
        if run.lows():
            run.lows()[0][:] = numbers(run.params[0])
        grads = [stored("fp16", run.rng.standard_normal(300).astype(np.float32) * np.float32(1e-6)) for _ in range(3)]
        with forced(isa):
            fp_mode.set(mode)
            try:
                for grad in grads:
                    run.optimizer.step([grad])
                assert fp_mode.get() & ~0x3F == mode & ~0x3F
            finally:
                fp_mode.set(default)
        outcomes.append(run.outcome())
    same(*outcomes)


@pytest.mark.parametrize("grad", [*GRADIENTS, "float64"])
@pytest.mark.parametrize("backend, isa", WAYS, ids=[isa or name for name, isa in WAYS])
def test_a_caller_that_flushes_denormals_gets_the_same_norm(fp_mode, backend, isa, grad):
    """Gradients that are subnormal have their norm, and the step that is clipped by it; as shards, too."""
    smallest = {"bf16": 2.0**-133, "fp16": 2.0**-24, "float32": 2.0**-149, "float64": 2.0**-1074}[grad]
    numbers, clip_norm = np.arange(1, 301) % 97 * np.float64(smallest), smallest * 2.0**93
    gradient = numbers if grad == "float64" else stored(grad, numbers.astype(np.float32))
    other = 0x1F80 | 0x8040 | 0x2000 * (backend == "c")  # flush to zero, denormals are zero, round down
    outcomes, decoded = [], backend != "numpy" or grad in ("bf16", "fp16")  # rules in NumPy have the mode of the caller
    for mode, shards in itertools.product((fp_mode.get(), other), (None, fastrms.Shards(lambda x: [x], [(0, 0, 300)]))):
        param = np.zeros(300, np.float64 if grad == "float64" else np.float32)
        optimizer = fastrms.AdaGrad(param, backend=backend, shards=shards, initial_value=1.0)
        default = fp_mode.get()
        with forced(isa):
            fp_mode.set(mode)
            try:
                info = optimizer.step(gradient, grad_scale=2.0**90, clip_norm=clip_norm)
            finally:
                fp_mode.set(default)
        outcomes.append((info.grad_norm.hex(), raw(param).tobytes() if decoded else None))
        assert info.grad_norm > 2.0**98 * smallest
    assert len({*outcomes}) == 1


@pytest.mark.parametrize("state_format", STATE_FORMATS)
@pytest.mark.parametrize("kind", ["float32+bf16", "bf16", "bf16-split16"])
def test_own_rules_may_be_stored_in_formats(state_format, kind):
    own = [name for name in BACKENDS if name != "c"]
    made = [Run(Momentum, {}, name, kind, state_format=state_format).steps("bf16", 5).outcome() for name in own]
    for outcome in made[1:]:
        same(outcome, made[0])


# what masters, copies and rounding promise


@each_rule
def test_split16_is_float32(backend, make, options):
    """The parameter and its remainder are, over a hundred steps, exactly the float32 that the rule alone makes."""
    split = Run(make, options, backend, "bf16-split16", [300, 7])
    plain = make([numbers(param) for param in split.params], backend=backend, **options)
    for _ in range(100):
        grads = split.gradients("bf16")
        split.optimizer.step(grads)
        plain.step([numbers(grad) for grad in grads])
    for tensor, other in zip(split.optimizer._tensors, plain._tensors, strict=True):
        whole = formats.decode(tensor.storage.param, raw(tensor.param.owner), tensor.param.size, tensor.storage.low)
        assert np.array_equal(raw(whole), raw(other.param.flat))
        assert all(np.array_equal(raw(x), raw(y)) for x, y in zip(tensor.state.values(), other.state.values(), strict=True))


@each_rule
@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_float32_master_is_the_plain_run(backend, make, options, format):
    run = Run(make, options, backend, f"{format}-float32", [300, 7])
    plain = make([numbers(param) for param in run.params], backend=backend, **options)
    for _ in range(20):
        grads = run.gradients("bf16")
        run.optimizer.step(grads)
        plain.step([numbers(grad) for grad in grads])
    for low, param, other in zip(run.lows(), run.params, plain._tensors, strict=True):
        assert np.array_equal(raw(low), raw(other.param.flat))
        assert np.array_equal(raw(param), raw(stored(format, low)))


@pytest.mark.parametrize("copy", ["bf16", "fp16"])
def test_a_copy_is_the_nearest(backend, copy):
    run = Run(fastrms.Adam, {}, backend, f"float32+{copy}").steps("float32", 3)
    plain = Run(fastrms.Adam, {}, backend).steps("float32", 3)
    for param, made, other in zip(run.params, run.copies, plain.params, strict=True):
        assert np.array_equal(raw(param), raw(other))
        assert np.array_equal(raw(made), raw(stored(copy, param)))


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_stochastic_rounding_moves_where_nearest_stalls(backend, format):
    """Each step is a hundredth of the distance of two numbers of the format."""
    moved = {}
    for rounding in ROUNDINGS:
        param = stored(format, np.full(4000, 1.25, np.float32))
        lr = 0.01 * {"bf16": 2.0**-7, "fp16": 2.0**-10}[format]
        optimizer = fastrms.RMSProp(param, lr=lr, rho=0.5, rounding=rounding, backend=backend, bias_correction="corrected")
        for _ in range(50):
            optimizer.step(np.ones(4000, np.float32))
        moved[rounding] = (1.25 - numbers(param).astype(np.float64).mean()) / lr
    assert moved["nearest"] == 0 and 0.9 * 50 < moved["stochastic"] < 1.1 * 50


@each_master
def test_masters_keep_small_steps(backend, master):
    """split16 and float32 lose nothing of steps that are too small for bf16, split8 little."""
    param = stored("bf16", np.full(4000, 1.25, np.float32))
    optimizer = fastrms.RMSProp(param, lr=1e-4, rho=0.5, master=master, rounding="nearest", backend=backend,
                                bias_correction="corrected")  # fmt: skip
    for _ in range(400):
        optimizer.step(np.ones(4000, np.float32))
    expected = 1.25 - (400 * 1e-4 if master else 0)
    assert abs(numbers(param) - expected).max() <= (2.0**-8 if master else 0)


# refusals

N = 64


def refusals():
    """Parts of a sentence, and what it refuses."""
    whole = lambda: np.ones(N, np.float32)  # noqa: E731
    half = lambda: stored("bf16", np.ones(N, np.float32))  # noqa: E731
    wrong = np.zeros(N - 1, np.float16)
    bf16 = lambda: np.ones(N, bfloat16)  # noqa: E731
    undecided = "say how it is updated, by master='float32' (from a float32 copy) or rounding='stochastic'"
    return {
        f"params has dtype bfloat16: {undecided}": (fastrms.Adam, bf16, {}),
        f"params has dtype float16: {undecided}": (fastrms.RMSProp, lambda: np.ones(N, np.float16), {}),
        f"params has dtype bf16: {undecided}": (fastrms.Adam, half, {"state_format": "bf16"}),
        "or train in float32: params.astype(np.float32)": (fastrms.Adam, bf16, {"master": None}),
        "or train in float32: np.asarray(params)": (fastrms.Adam, half, {"master": None}),
        "pass state_format='bf16', which may be that of its group": (fastrms.RProp, whole, {"state_format": "fp16"}),
        "pass state_format=None, which may be that of its group": (fastrms.Adam, lambda: np.ones(N), {"state_format": "q8"}),
        "pass master=None, which may be that of its group alone": (fastrms.Adam, whole, {"master": "split8"}),
        "param_copy is a str; it must be bf16 or fp16": (fastrms.Adam, whole, {"param_copy": "bf16"}),
        "param_copy is a bool; it must be bf16 or fp16": (fastrms.Adam, whole, {"param_copy": True}),
        "param_copy is a list; it must be one array, as params is": (fastrms.Adam, whole, {"param_copy": [wrong]}),
        "its options are state, groups, dialect": (fastrms.Adam, whole, {"state_dtype": "bf16"}),
        "state_format='q4'": (fastrms.Adam, whole, {"state_format": "q4"}),
        "master='split4'": (fastrms.Adam, half, {"master": "split4"}),
        "rounding='up'": (fastrms.Adam, whole, {"rounding": "up"}),
        "updated in float32": (fastrms.Adam, lambda: np.ones(N), {"state_format": "bf16"}),
        "cannot hold prev": (fastrms.RProp, whole, {"state_format": "q8"}),
        "cannot hold max_exp_avg_sq": (fastrms.Adam, whole, {"state_format": "q8", "amsgrad": True}),
        "cannot hold grad_avg": (fastrms.RMSProp, whole, {"state_format": "bf16", "centered": True}),
        "cannot have rounding='nearest'": (fastrms.AdaGrad, whole, {"state_format": "q8", "rounding": "nearest"}),
        "needs none": (fastrms.Adam, whole, {"master": "float32"}),
        "pass master='float32'": (fastrms.Adam, lambda: np.ones(N, np.float16), {"master": "split16"}),
        "must be bf16 or fp16": (fastrms.Adam, whole, {"param_copy": np.zeros(N, np.float32)}),
        "param_copy has shape": (fastrms.Adam, whole, {"param_copy": wrong}),
        "param_copy is for parameters": (fastrms.Adam, lambda: np.ones(N), {"param_copy": np.zeros(N, np.float16)}),
        "seed=-1": (fastrms.Adam, whole, {"seed": -1}),
    }


@pytest.mark.parametrize(
    "options, extra",
    [({"rounding": "nearest"}, {"state_format": "q8"}), ({"state_format": "q8"}, {"rounding": "nearest"}),
     ({}, {"state_format": "q8", "rounding": "nearest"})],
)  # fmt: skip
def test_a_group_of_q8_states_is_not_rounded_to_nearest(backend, monkeypatch, options, extra):
    """It is refused before the array of any parameter is looked at, and so before anything is allocated."""
    monkeypatch.setattr(host, "acquire", None)
    params, groups = {"w": np.ones(N, np.float32), "b": np.ones(3, np.float32)}, {"b": extra}
    with pytest.raises(ValueError, match="pass rounding='stochastic', or state_format='bf16'"):
        fastrms.Adam(params, groups=groups, backend=backend, **options)


def test_groups_of_q8_and_of_bf16_states_differ_in_rounding(backend):
    params = {"w": np.ones(N, np.float32), "b": np.ones(3, np.float32)}
    groups = {"w": {"state_format": "q8"}, "b": {"state_format": "bf16", "rounding": "nearest"}}
    optimizer = fastrms.Adam(params, groups=groups, backend=backend)
    assert [tensor.storage.stochastic for tensor in optimizer._tensors] == [True, False]


@pytest.mark.parametrize("sentence", refusals())
def test_what_cannot_be_stored_is_refused(backend, sentence):
    make, param, options = refusals()[sentence]
    param = param()
    before = raw(param).copy()
    with pytest.raises((ValueError, TypeError)) as error:
        make(param, backend=backend, **options)
    assert sentence in str(error.value)
    assert np.array_equal(raw(param), before)


def test_each_group_says_how_its_parameters_in_bf16_are_updated():
    """What another group says does not count, and a group may take back what is said for all."""
    half, other = np.ones(N, bfloat16), np.ones(N, bfloat16)
    for groups, options in (
        ([{"params": [half], "master": "float32"}, {"params": [other]}], {}),
        ([{"params": [half]}, {"params": [other], "master": None}], {"master": "float32"}),
    ):
        with pytest.raises(TypeError, match=r"^params\[1\]\[0\] has dtype bfloat16: say how it is updated"):
            fastrms.Adam(groups, **options)
    fastrms.Adam([{"params": [half], "master": "float32"}, {"params": [other], "rounding": "nearest"}])


def test_options_of_the_whole_optimizer_stand_in_no_group():
    for name, value in (("seed", 3), ("param_copy", np.zeros(N, np.float16)), ("backend", "c")):
        with pytest.raises(TypeError, match=rf"^{name} is an option of a whole Adam: pass it to the constructor"):
            fastrms.Adam([{"params": [np.ones(N, np.float32)], name: value}])


@pytest.mark.parametrize(
    "name, value", [("state_format", "q8"), ("master", "float32"), ("rounding", "nearest"), ("seed", 1)]
)
def test_formats_of_a_group_are_not_changed_later(name, value):
    optimizer = fastrms.Adam(np.ones(N, np.float32), state_format="bf16")
    with pytest.raises(ValueError, match=rf"^{name} is used once, .*: make a new one with {name}="):
        optimizer.groups[0][name] = value


@pytest.mark.parametrize("grad", [np.ones(N, bfloat16), np.ones(N, np.float16), stored("bf16", np.ones(N, np.float32))])
def test_float64_has_no_gradients_in_16_bits(grad):
    optimizer, w = fastrms.Adam(np.ones(N)), np.ones(N)
    with pytest.raises(TypeError, match=r"^grads has dtype b?float16, params has float64; .*: grads\.astype\(np\.float64\)"):
        optimizer.step(grad)
    with pytest.raises(TypeError, match=r"^grad has dtype b?float16, param has float64; .*: grad\.astype\(np\.float64\)"):
        fastrms.adam(w, grad, np.ones(N), np.ones(N), step=1)
    assert (w == 1).all()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_numbers_of_stored(shape, format, order):
    x = np.array(np.random.default_rng(3).standard_normal(shape), np.float32, order=order)
    there = x.astype(bfloat16 if format == "bf16" else np.float16)
    made = fastrms.Stored(there.view(np.uint16 if order == "C" else np.int16), format)
    found = np.asarray(made)
    assert found.dtype == np.float32 and found.shape == shape and np.array_equal(found, there.astype(np.float32))
    assert np.asarray(made, np.float64).dtype == np.float64 and np.array_equal(np.array(made, copy=True), found)
    with pytest.raises(ValueError, match=f"the numbers of {format} are decoded to float32, which is a copy"):
        made.__array__(copy=False)


@pytest.mark.parametrize("array, said", [
    (np.ones(3, np.float32), "an ndarray of float32"), (np.ones(3, np.float16), "an ndarray of float16"),
    (np.ones(3, bfloat16), "an ndarray of bfloat16"), (np.ones(3, np.uint8), "an ndarray of uint8"), ([1, 2], "a list"),
    (None, "a NoneType"), (3, "an int"), ("bf16", "a str"), (stored("bf16", np.ones(3, np.float32)), "a Stored"),
])  # fmt: skip
def test_stored_takes_bits_alone(array, said):
    with pytest.raises(TypeError, match=rf"^array is {said}; Stored takes an array of uint16 or int16 .* without Stored$"):
        fastrms.Stored(array, "bf16")
    with pytest.raises(ValueError, match=r"^format='q8' is not one of 'bf16', 'fp16'$"):
        fastrms.Stored(np.zeros(3, np.uint16), "q8")


def test_gradients_that_do_not_fit_are_refused_before_anything_is_written(backend):
    run = Run(fastrms.Adam, {}, backend, "bf16-split8+bf16", state_format="q8").steps("bf16", 2)
    before, optimizer = run.outcome(), run.optimizer
    bad = {
        "dtype float64": np.zeros(1003), "dtype uint16; say which": np.zeros(1003, np.uint16),
        "shape": np.zeros(1002, np.float16), "params[4] overlap": run.params[4],
        "grads[4] and param_copy[4] overlap": run.copies[4],
    }  # fmt: skip
    for sentence, grad in bad.items():
        grads = run.gradients("bf16")
        grads[4] = grad
        with pytest.raises((ValueError, TypeError)) as error:
            optimizer.step(grads)
        assert sentence in str(error.value)
        same(run.outcome(), before)


def places(optimizer):
    """Name -> first address and the one behind the last, of all buffers of an optimizer but gradients."""
    made = {}
    for k, tensor in enumerate(optimizer._tensors):
        low = {"master" if tensor.storage.master == "float32" else "remainder": tensor.storage.low}
        for name, flat in {**tensor.state, **low}.items():
            if flat is not None:
                made[f"{name} of params[{k}]"] = host.ours(flat)
        made |= {f"params[{k}]": tensor.param, f"param_copy[{k}]": tensor.storage.copy}
    return {name: (buffer.address, buffer.end) for name, buffer in made.items() if buffer is not None}


def at_address(start, format, size):
    """A gradient that begins at an address."""
    memory = (ctypes.c_char * (size * (4 if format == "float32" else 2))).from_address(start)
    array = np.frombuffer(memory, {"bf16": np.uint16, "fp16": np.float16, "float32": np.float32}[format])
    return fastrms.Stored(array, "bf16") if format == "bf16" else array


@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize(
    "kind, state_format",
    [("float32+bf16", "q8"), ("bf16-split8+bf16", "bf16"), ("bf16-split16", None), ("fp16-float32", "fp16"),
     ("bf16-float32+fp16", "q8")],
)  # fmt: skip
def test_the_sentence_names_the_two_that_overlap(backend, kind, state_format, grad):
    """A gradient shares its last or its first 4 bytes with each other buffer, whose elements may be of another size.  Where
    it reaches into a neighbour of that, too, either may be named."""
    run = Run(fastrms.Adam, {}, backend, kind, [N, N], state_format=state_format).steps("bf16", 1)
    before, buffers, size, found = run.outcome(), places(run.optimizer), N * (4 if grad == "float32" else 2), set()
    for first, end in buffers.values():
        for start in (first - size + 4, end - 4):
            with pytest.raises(ValueError, match="every buffer of a step must be separate") as error:
                run.optimizer.step([at_address(start, grad, N), None])
            named = str(error.value).partition(" overlap in memory")[0].split(" and ")
            (other,) = {*named} - {"grads[0]"}
            assert len(named) == 2 and buffers[other][0] < start + size and start < buffers[other][1], error.value
            found.add(other)
    assert found == buffers.keys()
    same(run.outcome(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_of_a_buffer_is_its_own(backend, layout):
    """A gradient may lie beside any buffer of a plan, and may share no byte with it."""
    bare, size = Bare(backend, layout, 16, 0), 16
    for memory, start, end in [of for made in bare.all() if made is not bare.grad for of in made.memory]:
        for first, fits in ((start - 2 * size, True), (start - 2 * size + 1, False), (end - 1, False), (end, True)):
            array = memory[first : first + 2 * size].view(np.uint16)
            before = [x.copy() for x in bare.elements(size)]
            status, _ = bare.plan.change(grads=[host.ours(array)], run=False)
            assert bare.plan.stream_open() == backends.OK
            streamed = backends.OK if fits else bare.plan.stream_step(0, None, host.ours(array), None, 1.0)
            bare.plan.stream_close()
            assert status == streamed == (backends.OK if fits else backends.OVERLAP), (memory.size, first - start)
            assert all(np.array_equal(x, y) for x, y in zip(bare.elements(size), before, strict=True))


def test_buffers_end_where_their_bytes_end(backend):
    """Parameters, copies and gradients of 2 bytes an element may lie one behind the other."""
    memory = np.zeros(8 * N, np.uint16)
    parts = [memory[k * N : (k + 1) * N] for k in range(8)]
    for part in parts[:2]:
        part[:] = 0x3F80
    one, two, first, second, grad, other, *_ = (fastrms.Stored(part, "bf16") for part in parts)
    optimizer = fastrms.Adam([one, two], param_copy=[first, second], master="split8", backend=backend)
    optimizer.step([grad, other])
    optimizer.step([other, grad], clip_norm=1.0)
    assert (memory[: 4 * N] == 0x3F80).all() and not memory[4 * N :].any()
    with optimizer.streaming() as stream:
        stream.step(0, grad)
        with pytest.raises(ValueError, match="overlap"):
            stream.step(1, fastrms.Stored(memory[4 * N - 1 : 5 * N - 1], "bf16"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master", ["split16", "split8"])
def test_zeros_may_be_written_into_a_split_parameter(backend, master):
    """Pruning, and a parameter that starts anew: the remainders are those of the numbers that stood there."""
    start = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    w = fastrms.Stored((start.view(np.uint32) >> 16).astype(np.uint16), "bf16")
    optimizer = fastrms.RMSProp(w, master=master, backend=backend)
    for seed in range(3):
        optimizer.step(np.random.default_rng(seed).standard_normal(1000).astype(np.float32))
    w.array[:500], w.array[500:] = 0, 0x8000
    optimizer.step(np.zeros(1000, np.float32))
    assert not (w.array & 0x7FFF).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_copy_holds_the_parameter_from_the_start(backend, dtype):
    """Also where the first step is left out; and a refused optimizer has written nothing."""
    w = np.random.default_rng(0).standard_normal(70_001).astype(dtype)
    memory = np.full(w.size + 8, 0x1234, np.uint16)
    copy = fastrms.Stored(memory[5:-3], "bf16")
    options = {"master": "float32"} if dtype == np.float16 else {}
    with pytest.raises(ValueError):
        fastrms.Adam(w, param_copy=copy, lr=-1.0, backend=backend, **options)
    assert (memory == 0x1234).all()
    optimizer = fastrms.Adam(w, param_copy=copy, nonfinite="skip", backend=backend, **options)
    want = storage.stored(storage.BF16, w.astype(np.float32))
    assert np.array_equal(memory[5:-3], want) and (memory[[0, 1, 2, 3, 4, -3, -2, -1]] == 0x1234).all()
    assert not optimizer.step(np.full(w.size, np.nan, np.float32)).applied
    assert np.array_equal(memory[5:-3], want)
