"""The CUDA backend on a GPU: `pytest -m gpu`.  Every test is skipped where there is none.

On the driver double of tests/ptx these tests run, too, as far as they need neither CuPy nor torch."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLASSES, DTYPES, backends, bits, raw_recipe, wild_values

import fastrms
from bench.gpu_kernels import MAKERS
from fastrms import formats, rules, storage
from fastrms.backends.coefficients import Coefficients
from fastrms.backends.cuda import table, toolchain
from fastrms.memory import device

REASON = toolchain.available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"the GPU tests need a GPU: {REASON}"),
              pytest.mark.filterwarnings("default")]  # fmt: skip
if REASON is None:
    from gpu_arrays import LIBRARIES, OfTorch, Ours, has

    from fastrms.backends.cuda.kernel import Kind
    from fastrms.backends.cuda.launch import Launch
else:
    LIBRARIES, Kind = [SimpleNamespace(name="none")], lambda *on, **more: (on, more)
    has = bool

KINDS = [Kind(), Kind(capturable=True), Kind(many=True), Kind(True, True), Kind(zero_grad=True), Kind(True, True, True)]
SIZES = [*range(10), 1023, 1024, 1025, 1026, 1027, 4099]
GUARD = 77.25
ON_DOUBLE = "FASTRMS_DRIVER_DOUBLE" in os.environ  # set by tests/ptx/on_double.py
cupy_only = pytest.mark.skipif(REASON is None and not has("cupy"), reason="needs CuPy")
torch_only = pytest.mark.skipif(REASON is None and not has("torch"), reason="needs torch")
gpu_only = pytest.mark.skipif(ON_DOUBLE, reason="the driver double does not have this")


@pytest.fixture(params=LIBRARIES, ids=lambda kind: kind.name)
def library(request):
    return request.param


def numbers(size, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def same(a, b):
    return np.array_equal(bits(a), bits(b))


class Field:
    """A buffer of each tensor, guarded on both sides, in one piece of host memory and one of device memory."""

    def __init__(self, places, values):
        self.places, size = places, max(start + size for start, size in places) + 16
        self.host = np.full(size, GUARD, values.dtype)
        for start, size in places:
            self.host[start : start + size] = values[:size]
        self.there = Ours.to_device(self.host)

    def parts(self):
        return [Ours.part(self.there, start, size) for start, size in self.places]

    def expect(self, values):
        for start, size in self.places:
            self.host[start : start + size] = values[:size].view(self.host.dtype)

    def is_as_expected(self):
        return same(self.there.to_host(), self.host)


def places(apart):
    """(start, size) of a buffer of each tensor: every size at every offset to a multiple of 16 bytes."""
    start, found = 16, []
    for size in SIZES:
        for offset in range(4):
            found.append((start + (offset + apart) % 4, size))
            start += -(-(size + 4) // 16) * 16 + 16
    return found


def made(rule, general, dtype, kind):
    """A kernel run on tensors of every size at every offset, with the gradients of every third one at another offset."""
    recipe = raw_recipe(rule, dtype, general)
    count = 2 + len(rules.state_names(rules.RULES[rule]))
    values = [wild_values(max(SIZES), dtype, k) for k in range(count)]
    shifted = [(a if k % 3 else b) for k, (a, b) in enumerate(zip(places(0), places(1), strict=True))]
    fields = [Field(shifted if k == 1 else places(0), v) for k, v in enumerate(values)]
    tensors = [(param, grad, states) for param, grad, *states in zip(*(f.parts() for f in fields), strict=True)]
    for group in [tensors] if kind.many else [[tensor] for tensor in tensors if tensor[0].size]:
        launch(recipe, kind, group)
    param, grad, *states = [v.copy() for v in values]
    with np.errstate(all="ignore"):
        backends.load("numpy").update(recipe, 1, 1.0, param, grad, states)
    for field, result in zip((fields[0], *fields[2:]), (param, *states), strict=True):
        field.expect(result)
    if kind.zero_grad:
        fields[1].expect(np.zeros_like(grad))
    return fields


def launch(recipe, kind, tensors):
    launch, handle = Launch(recipe, kind, 0, device.allocate), device.LEGACY_STREAM
    launch.aim(Coefficients(recipe), 0, tensors, device.allocate)
    launch.make_coefficients(1, 1.0)
    launch.send(handle, 1, 1)
    launch.run(1, handle)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("rule", rules.RULES)
def test_every_kernel_has_the_bits_of_numpy(rule, general, dtype, kind):
    """Guard zones between the tensors stay as they are, and so do the gradients, where they are not to be zeroed."""
    if ON_DOUBLE and (general or kind.capturable or rule not in ("rmsprop", "adam")):
        pytest.skip("tests/ptx runs all of them")
    assert all(field.is_as_expected() for field in made(rule, general, dtype, kind))


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_have_the_bits_of_numpy(library, make, dtype):
    sizes = (1003, 5, 0, 1 << 16)
    params, grads = ([numbers(size, k + seed, dtype) for k, size in enumerate(sizes)] for seed in (0, 9))
    there, there_grads = map(library.to_device, params), list(map(library.to_device, grads))
    there = list(there)
    ours, theirs = make(there), make(params, backend="numpy")
    ours.bind(there_grads)
    for step in range(6):
        if "lr" not in make.fixed:
            ours.lr = theirs.lr = 0.01 / (step + 1)
        ours.step(None if step % 2 else there_grads)
        theirs.step(grads)
    assert all(same(library.to_host(a), b) for a, b in zip(there, params, strict=True))


def test_gradients_that_move_and_that_are_missing(library):
    params, theirs = [numbers(700, k) for k in range(5)], [numbers(700, k) for k in range(5)]
    there = list(map(library.to_device, params))
    optimizer, reference = fastrms.Adam(there), fastrms.Adam(theirs, backend="numpy")
    for step in range(5):
        grads = [None if k == step else numbers(700, 10 * step + k) for k in range(5)]
        optimizer.step([None if g is None else library.to_device(g) for g in grads])
        reference.step(grads)
    assert optimizer.tensor_steps == reference.tensor_steps
    assert all(same(library.to_host(a), b) for a, b in zip(there, theirs, strict=True))


@pytest.mark.parametrize("zero_grad", [False, True])
def test_views_of_one_array(library, zero_grad):
    """As parameters in a flat buffer are, at any offset; the numbers around them stay as they are."""
    memory, grads = numbers(5000), numbers(5000, 1)
    starts, sizes = (1, 1002, 2003, 3001), (1000, 1001, 997, 1999)
    want = memory.copy()
    there, there_grads = library.to_device(memory), library.to_device(grads)
    parts = lambda array: [library.part(array, *place) for place in zip(starts, sizes, strict=True)]  # noqa: E731
    optimizer = fastrms.RMSProp(parts(there), zero_grad=zero_grad)
    views = [want[a : a + b] for a, b in zip(starts, sizes, strict=True)]
    left = grads.copy()
    reference = fastrms.RMSProp(views, backend="numpy", zero_grad=zero_grad)
    for _ in range(2):
        optimizer.step(parts(there_grads))
        reference.step([left[a : a + b] for a, b in zip(starts, sizes, strict=True)])
    assert same(library.to_host(there), want) and same(library.to_host(there_grads), left)


def test_a_streamed_step(library):
    params, theirs, grads = ([numbers(700 + k, k + seed) for k in range(4)] for seed in (0, 0, 9))
    there = list(map(library.to_device, params))
    optimizer, reference = fastrms.Adam(there), fastrms.Adam(theirs, backend="numpy")
    for order in ((2, 0, 3), (1, 2, 0, 3)):
        with optimizer.streaming() as s, reference.streaming() as r:
            for k in order:
                s.step(k, library.to_device(grads[k]))
                r.step(k, grads[k])
    optimizer.step(list(map(library.to_device, grads)))
    reference.step(grads)
    assert optimizer.tensor_steps == reference.tensor_steps
    assert all(same(library.to_host(a), b) for a, b in zip(there, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"clip_value": 0.5}, {"maximize": True}], ids=str)
def test_clip_norm(library, options, dtype):
    """Large enough for many blocks and segments; the norm of a step may be asked for after later steps."""
    sizes = (5000, 3, 300_000 if ON_DOUBLE else 3_000_000, 4096)
    params, theirs, grads = ([numbers(size, k + seed, dtype) for k, size in enumerate(sizes)] for seed in (0, 0, 9))
    grads[0] *= dtype.type(1e15)
    there, there_grads = list(map(library.to_device, params)), list(map(library.to_device, grads))
    optimizer, reference = fastrms.Adam(there, **options), fastrms.Adam(theirs, backend="numpy", **options)
    found = []
    for clip_norm in (1.0, 1e6, None, 0.01, np.inf):
        options = {"grad_scale": 0.5, "clip_norm": clip_norm}
        found.append((optimizer.step(there_grads, **options), reference.step(grads, **options)))
    assert [tuple(a) == tuple(b) for a, b in found] == [True] * 5
    assert all(same(library.to_host(a), b) for a, b in zip(there, theirs, strict=True))


def test_gradients_that_are_not_finite(library):
    params, theirs, grads = ([numbers(size, k + seed) for k, size in enumerate((5000, 3, 300_000))] for seed in (0, 0, 9))
    there = list(map(library.to_device, params))
    optimizer = fastrms.Adam(there, nonfinite="skip", zero_grad=True)
    reference = fastrms.Adam(theirs, nonfinite="skip", zero_grad=True, backend="numpy")
    for at in (None, 299_999, 17, None):
        given = [grad.copy() for grad in grads]
        if at is not None:
            given[2][at], given[1][0] = np.nan, 2e19
        there_grads = list(map(library.to_device, given))
        with np.errstate(all="ignore"):
            assert optimizer.step(there_grads) == reference.step(given)
        assert all(same(library.to_host(a), b) for a, b in zip(there_grads, given, strict=True))
    assert optimizer.steps == 2 and all(same(library.to_host(a), b) for a, b in zip(there, theirs, strict=True))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "zero_grad": True}, {"state_format": "q8"}], ids=str)
def test_skipped_steps_that_nobody_waits_for(library, options):
    """The host knows neither which steps were made nor the number of the next one, and the rate changes between them."""
    sizes, random = (1 << 18, 3, 1003), np.random.default_rng(8)
    params, theirs = ([numbers(size, k) for k, size in enumerate(sizes)] for _ in range(2))
    there, infos, kept = list(map(library.to_device, params)), [], []
    optimizer = fastrms.AdamW(there, nonfinite="skip", **options)
    reference = fastrms.AdamW(theirs, nonfinite="skip", backend="numpy", **options)
    for k in range(60):
        grads = [numbers(size, 100 + k) for size in sizes]
        if k % 7 in (2, 3, 5):
            grads[random.integers(3)][random.integers(3)] = np.nan
        if k % 5 == 4:
            optimizer.lr = reference.lr = 0.1 / (1 + k)
        kept.append((list(map(library.to_device, grads)), grads))
        said = {"clip_norm": 1.0 if k % 11 == 3 else None, "grad_scale": 0.5 if k > 40 else 1.0}
        mine = optimizer.step(kept[-1][0], **said)
        with np.errstate(all="ignore"):
            infos.append((mine, reference.step(grads, **said)))
    assert optimizer.steps == reference.steps < 40
    assert all(repr(a) == repr(b) for a, b in infos)
    assert all(same(library.to_host(a), b) for a, b in zip(there, theirs, strict=True))
    assert all(same(library.to_host(a), b) for mine, yours in kept for a, b in zip(mine, yours, strict=True))


def test_state_goes_to_the_host_and_back(library):
    grad = library.to_device(numbers(999, 1))
    optimizer = fastrms.Adam(library.to_device(numbers(999)))
    optimizer.step(grad)
    saved = optimizer.state_dict()
    optimizer.step(grad)
    twice = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    optimizer.step(grad)
    assert optimizer.steps == 2
    for a, b in zip(optimizer.state_dict()["tensors"], twice["tensors"], strict=True):
        assert all(same(a["state"][name], b["state"][name]) for name in ("exp_avg", "exp_avg_sq"))


FORMATS = [  # parameter, gradient, options
    ("float32", "bf16", {"state_format": "bf16"}),
    ("float32", "fp16", {"state_format": "q8"}),
    ("bf16", "bf16", {"master": "split16", "state_format": "fp16"}),
    ("bf16", "float32", {"master": "split8", "rounding": "nearest"}),
    ("bf16", "bf16", {"rounding": "stochastic", "state_format": "bf16"}),
    ("fp16", "fp16", {"master": "float32", "state_format": "q8"}),
]


def in_format(name, x, to_device=np.array):
    """Float32 numbers in a format, in memory of the host or of a library's arrays."""
    if name == "float32":
        return to_device(x)
    codes = storage.stored(formats.FORMATS[name], x)
    return to_device(codes.view(np.float16)) if name == "fp16" else fastrms.Stored(to_device(codes.view(np.int16)), "bf16")


@pytest.mark.parametrize("param, grad, options", FORMATS, ids=str)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_storage_formats(library, param, grad, options, clip_norm):
    sizes = (1003, 5, 0, 257, 1 << 16)
    where = (library.to_device, library.to_host), (np.array, np.asarray)
    found = []
    for to, back in where:
        params = [in_format(param, numbers(size, k), to) for k, size in enumerate(sizes)]
        copies = [in_format("bf16", numbers(size), to) for size in sizes]
        backend = "numpy" if to is np.array else "cuda"
        optimizer = fastrms.Adam(params, param_copy=copies, seed=7, backend=backend, **options)
        for step in range(3):
            grads = [in_format(grad, numbers(size, 9 + k + step), to) for k, size in enumerate(sizes)]
            norm = optimizer.step([None, *grads[1:]] if step == 1 else grads, clip_norm=clip_norm).grad_norm
        arrays = [back(getattr(x, "array", x)) for x in (*params, *copies)]
        states = [x for entry in optimizer.state_dict()["tensors"] for x in entry["state"].values()]
        found.append([norm, *(np.asarray(x).reshape(-1).view(np.uint8) for x in (*arrays, *states))])
    assert found[0][0] == found[1][0] and all(map(np.array_equal, found[0][1:], found[1][1:]))


IN_FORMATS = [(rule, said) for rule in MAKERS for said in storage.SIGNED
              if not any((said, name) in storage.NEEDS_FLOATS for name in rules.state_names(rules.RULES[rule]))]  # fmt: skip


@pytest.mark.parametrize("rule, state_format", IN_FORMATS)
def test_storage_formats_of_every_rule(library, rule, state_format):
    """Views of one array at any offset, with gradients at the same or at others, whose surroundings stay as they are."""
    if ON_DOUBLE and rule not in ("rmsprop", "adam"):
        pytest.skip("tests/ptx runs all of them")
    (make, options), starts, sizes = MAKERS[rule], (1, 1002, 2003, 3001), (1000, 1001, 997, 1999)
    halves = storage.stored(formats.FORMATS["bf16"], numbers(5002, 1)).view(np.int16)
    for apart in (0, 1):
        found = []
        for to, back, part, backend in ((library.to_device, library.to_host, library.part, "cuda"),
                                        (np.array, np.asarray, lambda x, a, n: x[a : a + n], "numpy")):  # fmt: skip
            whole = params, grads, copies = [to(x) for x in (numbers(5000), halves, np.zeros(5003, np.int16))]
            views = [[part(x, at + by, n) for at, n in zip(starts, sizes, strict=True)]
                     for x, by in ((params, 0), (grads, apart), (copies, 0))]  # fmt: skip
            grads, copies = ([fastrms.Stored(x, "bf16") for x in some] for some in views[1:])
            named = {"param_copy": copies, "state_format": state_format, "zero_grad": True, "backend": backend}
            optimizer = make(views[0], **options, **named)
            for _ in range(2):  # the second with gradients of 0
                optimizer.step(grads)
            states = [x for entry in optimizer.state_dict()["tensors"] for x in entry["state"].values()]
            found.append([np.asarray(x).reshape(-1).view(np.uint8) for x in (*map(back, whole), *states)])
        assert all(map(np.array_equal, *found)), apart


def test_functions(library):
    ours, theirs, grad = numbers(999), numbers(999), numbers(999, 1)
    there, there_grad = library.to_device(ours), library.to_device(grad)
    state, want = fastrms.init_state("rmsprop", there), fastrms.init_state("rmsprop", theirs)
    for _ in range(3):
        fastrms.rmsprop(there, there_grad, **state, lr=0.1)
        fastrms.rmsprop(theirs, grad, **want, lr=0.1, backend="numpy")
    assert same(library.to_host(there), theirs)


def test_the_callers_rates_reach_a_busy_stream_in_order():
    """Rows of coefficients are written while the stream is far behind; each step finds its own."""
    ours, theirs, grad = numbers(1000), numbers(1000), numbers(1000, 1)
    there, scratch = Ours.to_device(ours), device.allocate(1 << (10 if ON_DOUBLE else 28), np.dtype("f4"), 0)
    stream = device.current(0).create_stream()
    optimizer = fastrms.Adam(there, capturable=True, stream=stream)
    reference = fastrms.Adam(theirs, backend="numpy")
    optimizer.bind(Ours.to_device(grad))
    for step in range(300):
        if step % 50 == 0:
            for _ in range(10):  # some 4 ms of work
                device.call_driver("work", "cuMemsetD8Async", scratch.address, 1, scratch.nbytes, int(stream.handle))
        optimizer.lr = reference.lr = 0.01 + 1e-4 * step
        optimizer.step()
        reference.step(grad)
    stream.sync()
    assert same(there.to_host(), theirs)


def test_a_large_table_behind_a_busy_stream():
    """A table of some MB is sent while the stream is behind, and replaced before it is read."""
    size, tensors = (4099, 3) if ON_DOUBLE else (1 << 27, 2)
    stream = device.current(0).create_stream()
    params = [device.allocate(size, np.dtype("f4"), 0) for _ in range(tensors)]
    grads = [[device.allocate(size, np.dtype("f4"), 0) for _ in range(tensors)] for _ in range(2)]
    for k, array in enumerate([*params, *grads[0], *grads[1]]):
        array.fill(0.5 + k)
    optimizer = fastrms.AdaGrad(params, stream=stream)
    theirs = [np.full(7, 0.5 + k, np.float32) for k in range(tensors)]
    reference = fastrms.AdaGrad(theirs, backend="numpy")
    for step in range(4):
        optimizer.step(grads[step % 2])
        reference.step([np.full(7, 0.5 + k + tensors * (1 + step % 2), np.float32) for k in range(tensors)])
    stream.sync()
    for param, want in zip(params, theirs, strict=True):
        for part in (Ours.part(param, 0, 7), Ours.part(param, size - 7, 7)):
            assert same(part.to_host(), want)


def test_two_threads_with_optimizers_of_their_own(library):
    results, errors = {}, []

    def train(seed):
        try:
            there = library.to_device(numbers(10_000, seed))
            optimizer, grad = fastrms.Adam(there), library.to_device(numbers(10_000, seed + 1))
            optimizer.bind(grad)
            for _ in range(50):
                optimizer.step()
            results[seed] = library.to_host(there)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, result in results.items():
        theirs = numbers(10_000, seed)
        reference = fastrms.Adam(theirs, backend="numpy")
        for _ in range(50):
            reference.step(numbers(10_000, seed + 1))
        assert same(result, theirs)


def in_process(code):
    """What a program prints."""
    head = "import sys; sys.path.insert(0, {!r})\nimport numpy as np, fastrms\nfrom gpu_arrays import Ours\n"
    text = head.format(os.path.dirname(__file__)) + code
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    return run.stdout + run.stderr


SOME = """
param = Ours.to_device(np.ones(1000, np.float32))
optimizer = fastrms.RMSProp(param, check={check})
optimizer.bind(Ours.to_device(np.ones(1000, np.float32)))
optimizer.step()
"""

PLANTED = """
launch = optimizer._plan._updates[0]
launch.arguments._head[0] = 16  # an address that nothing has
optimizer.step()
"""


@gpu_only
def test_an_error_of_a_kernel_is_found_by_check():
    said = in_process(SOME.format(check=True) + PLANTED)
    assert "RuntimeError: this step or work before it failed on the GPU: CUDA_ERROR_" in said


@gpu_only
def test_an_error_of_a_kernel_comes_up_at_the_next_synchronisation():
    said = in_process(SOME.format(check=False) + PLANTED + "print('went on')\nparam.to_host()\n")
    assert "went on" in said and "RuntimeError: work done before failed on the GPU: CUDA_ERROR_" in said


@gpu_only
def test_a_forked_child_is_told_to_make_its_own():
    forked = """
import os
if os.fork() == 0:
    try:
        optimizer.step()
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
optimizer.step()
print(optimizer.steps, optimizer.state["square_avg"].to_host()[0] > 0)
"""
    said = in_process(SOME.format(check=False) + forked)
    assert "CUDA does not survive a fork: make this optimizer in the child" in said and "2 True" in said, said


@gpu_only
@pytest.mark.parametrize("offset", [0, 1])
def test_more_than_two_to_the_31_elements(offset):
    """The first and the last elements; 26 GB of device memory."""
    size, free = (1 << 31) + 5, device.call_driver("asking for memory", "cuMemGetInfo")[0]
    if free < 4 * 4 * size:
        pytest.skip(f"{free / 1e9:.0f} GB of device memory are free, which does not suffice")
    whole = [device.allocate(size + offset, np.dtype("f4"), 0) for _ in range(2)]
    param, grad = (Ours.part(array, offset, size) for array in whole)
    whole[0].fill(0.75)
    whole[1].fill(-1.5)
    theirs = np.full(9, 0.75, np.float32)
    for array in whole:  # something else at both ends
        for start in (0, size + offset - 9):
            device.copy(Ours.part(array, start, 9), numbers(9, start % 7))
    ends = [0, size - 9, (1 << 31) - 4]
    before = [(Ours.part(param, start, 9).to_host(), Ours.part(grad, start, 9).to_host()) for start in ends]
    optimizer = fastrms.RMSProp(param)
    assert table.vectors([param.address, grad.address], size, 4) > 1 << 28
    optimizer.step(grad)
    for start, (theirs, gradient) in zip(ends, before, strict=True):
        fastrms.RMSProp(theirs, backend="numpy").step(gradient)
        assert same(Ours.part(param, start, 9).to_host(), theirs)


FLAT_LIBRARIES = [pytest.param("cupy", marks=cupy_only), pytest.param("torch", marks=torch_only)]


@pytest.mark.parametrize("name", FLAT_LIBRARIES)
@pytest.mark.parametrize("options", [{}, {"state_format": "bf16"}], ids=str)
def test_a_flat_buffer_in_device_memory(name, options):
    """Views of one array of the library; a group for some names; clipped steps."""
    (library,) = (kind for kind in LIBRARIES if kind.name == name)
    shapes, groups = {"w": (31, 7), "b": 5, "v": (1003,), "b2": ()}, {"b*": {"lr": 0.1}}
    given = {key: numbers(int(np.prod(shape)), k).reshape(shape) for k, (key, shape) in enumerate(shapes.items())}
    flat, theirs = (
        fastrms.FlatBuffer.like({k: library.to_device(x) for k, x in given.items()}),
        fastrms.FlatBuffer.like(given),
    )
    for k, key in enumerate(shapes):
        theirs.grads[key][...] = numbers(theirs.grads[key].size, 9 + k).reshape(shapes[key])
        flat.grads[key][...] = library.to_device(theirs.grads[key])
    optimizer = fastrms.Adam(flat, groups=groups, **options)
    reference = fastrms.Adam(theirs, groups=groups, backend="numpy", **options)
    for clip_norm in (None, 0.5, None):
        assert (
            optimizer.step(flat.grads, clip_norm=clip_norm).grad_norm
            == reference.step(theirs.grads, clip_norm=clip_norm).grad_norm
        )
    assert same(library.to_host(flat.data), theirs.data) and same(library.to_host(flat.params["w"]), theirs.params["w"])


# CuPy


@cupy_only
def test_the_current_stream_of_cupy_is_used():
    import cupy

    stream, theirs, grad = cupy.cuda.Stream(non_blocking=True), numbers(1 << 20), numbers(1 << 20, 1)
    reference = fastrms.Adam(theirs, backend="numpy")
    with stream:
        there, there_grad = cupy.asarray(theirs), cupy.asarray(grad)
        optimizer = fastrms.Adam(there)
        for _ in range(5):
            made = there_grad * 2  # in the memory of the stream, freed at once
            optimizer.step(made)
            del made
            reference.step(grad * 2)
        got = there.get(stream=stream)
    stream.synchronize()
    assert same(got, theirs)


@cupy_only
def test_a_stream_of_yours_is_ordered_with_that_of_cupy():
    import cupy

    stream, theirs, grad = cupy.cuda.Stream(non_blocking=True), numbers(1 << 22), numbers(1 << 22, 1)
    there, there_grad = cupy.asarray(theirs), cupy.asarray(grad)
    optimizer, reference = fastrms.Adam(there, stream=stream), fastrms.Adam(theirs, backend="numpy")
    for step in range(5):
        made = there_grad * (step + 1)
        optimizer.step(made)
        del made
        other = cupy.full(1 << 22, cupy.nan, cupy.float32)  # where the gradient was
        del other
        reference.step(grad * np.float32(step + 1))
    assert same(there.get(), theirs)


@cupy_only
@pytest.mark.parametrize("options", [{}, {"state_format": "bf16"}, {"state_format": "q8"}, {"nonfinite": "skip"},
                                     {"nonfinite": "skip", "state_format": "bf16"}], ids=str)  # fmt: skip
def test_a_graph_captured_by_cupy(options):
    """States in formats are rounded at random: each launch of the graph has the keys of its step."""
    import cupy

    stream, theirs, grad = cupy.cuda.Stream(non_blocking=True), [numbers(999), numbers(5)], [numbers(999, 1), numbers(5, 1)]
    reference = fastrms.Adam(theirs, backend="numpy", **options)
    with stream:
        there, there_grads = list(map(cupy.asarray, theirs)), list(map(cupy.asarray, grad))
        optimizer = fastrms.Adam(there, capturable=True, **options)
        optimizer.bind(there_grads)
        optimizer.step()
        stream.begin_capture()
        optimizer.step()
        graph = stream.end_capture()
        for step in range(5):
            optimizer.lr = 0.1 / (step + 1)
            there_grads[1][2] = np.nan if options.get("nonfinite") and step % 2 else grad[1][2]
            optimizer.advance()
            graph.launch(stream)
        stream.synchronize()
    reference.step(grad)
    for step in range(5):
        reference.lr = 0.1 / (step + 1)
        given = [grad[0], grad[1].copy()]
        given[1][2] = np.nan if options.get("nonfinite") and step % 2 else grad[1][2]
        reference.step(given)
    assert all(same(a.get(), b) for a, b in zip(there, theirs, strict=True))
    assert optimizer.steps == (4 if options.get("nonfinite") else 6)


# torch


def torch_parameters(shapes, seed=0):
    import torch

    return [torch.nn.Parameter(torch.as_tensor(numbers(int(np.prod(s)), seed + k).reshape(s)).cuda())
            for k, s in enumerate(shapes)]  # fmt: skip


@torch_only
def test_parameters_of_a_network_of_torch():
    """A loop as people write it: zero_grad, backward, step, against the same gradients in NumPy."""
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.Tanh(), torch.nn.Linear(31, 3)).cuda()
    theirs = [p.detach().cpu().numpy().copy() for p in net.parameters()]
    optimizer, reference = fastrms.Adam(list(net.parameters()), lr=0.01), fastrms.Adam(theirs, lr=0.01, backend="numpy")
    for _ in range(5):
        net.zero_grad()
        net(torch.randn(8, 13, device="cuda")).square().mean().backward()
        grads = [p.grad for p in net.parameters()]
        optimizer.step(grads)
        reference.step([g.cpu().numpy() for g in grads])
    assert all(same(OfTorch.to_host(p), t) for p, t in zip(net.parameters(), theirs, strict=True))


@torch_only
@pytest.mark.parametrize("zero_to_none", [False, True])
def test_optimizers_of_fastrms_torch(zero_to_none):
    """In place of those of torch, with the bits of NumPy; and close to torch's fused Adam."""
    import torch

    import fastrms.torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(13, 31), torch.nn.Tanh(), torch.nn.Linear(31, 3)).cuda()
    theirs = [p.detach().cpu().numpy().copy() for p in net.parameters()]
    fused = [torch.nn.Parameter(p.detach().clone()) for p in net.parameters()]
    optimizer, reference = fastrms.torch.Adam(net.parameters(), lr=0.01), fastrms.Adam(theirs, lr=0.01, backend="numpy")
    of_torch = torch.optim.Adam(fused, lr=0.01, fused=True)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=zero_to_none)
        net(torch.randn(8, 13, device="cuda")).square().mean().backward()
        for param, other in zip(net.parameters(), fused, strict=True):
            other.grad = param.grad.clone()
        reference.step([p.grad.cpu().numpy() for p in net.parameters()])
        optimizer.step()
        of_torch.step()
    assert all(same(OfTorch.to_host(p), t) for p, t in zip(net.parameters(), theirs, strict=True))
    assert all(torch.allclose(p, f, atol=1e-5) for p, f in zip(net.parameters(), fused, strict=True))


@torch_only
@pytest.mark.parametrize("param, options", [
    ("float32", {"state_format": "bf16"}),
    ("float32", {"state_format": "q8"}),
    ("bfloat16", {"master": "split16", "state_format": "bf16"}),
    ("bfloat16", {"master": "split8", "state_format": "q8"}),
    ("float16", {"master": "float32", "state_format": "fp16"}),
], ids=str)  # fmt: skip
def test_optimizers_of_fastrms_torch_with_formats(param, options):
    """The bits of the same optimizer on the host; a state goes from one to the other."""
    import torch

    import fastrms.torch

    found = []
    for where in ("cuda", "cpu"):
        params = [
            torch.as_tensor(numbers(size, size)).to(where, getattr(torch, param)).requires_grad_() for size in (700, 33)
        ]
        optimizer = fastrms.torch.Adam(params, seed=3, **options)
        for step in range(3):
            for p in params:
                p.grad = torch.as_tensor(numbers(p.numel(), step)).to(p)
            optimizer.step()
        state = [x for p in params for name, x in optimizer.state[p].items() if name not in ("step", "q8_shape")]
        assert all(x.device.type == where for x in state)
        found.append((params, optimizer, [x.detach().cpu().flatten().view(torch.uint8) for x in (*params, *state)]))
    assert all(map(torch.equal, found[0][2], found[1][2]))
    (params, optimizer, _), (_, other, _) = found
    optimizer.load_state_dict(other.state_dict())
    assert all(torch.equal(optimizer.state[p]["exp_avg"].cpu(), x["exp_avg"])
               for p, x in zip(params, other.state_dict()["state"].values(), strict=True))  # fmt: skip


@torch_only
def test_gradients_of_torch_that_stay_and_that_move():
    """The addresses are read in C where this torch allows it."""
    import torch

    params = torch_parameters([(700,), (3, 5), (1001,)])
    theirs = [OfTorch.to_host(p).copy() for p in params]
    optimizer, reference = fastrms.Adam(params), fastrms.Adam(theirs, backend="numpy")
    kept = [[torch.randn_like(p) for p in params] for _ in range(2)]
    for step in range(8):
        grads = [g if step != 5 or k else None for k, g in enumerate(kept[(step // 3) % 2])]
        optimizer.step(grads, clip_norm=0.5 if step == 6 else None)
        reference.step([None if g is None else g.cpu().numpy() for g in grads], clip_norm=0.5 if step == 6 else None)
    assert all(same(OfTorch.to_host(p), t) for p, t in zip(params, theirs, strict=True))
    assert optimizer.tensor_steps == reference.tensor_steps and params[0]._version > 0


@torch_only
def test_layouts_and_streams_of_torch():
    import torch

    (param,) = torch_parameters([(4, 3, 5, 7)])
    param = param.detach().to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(param)
    theirs = param.detach().cpu().numpy().copy()
    stream = torch.cuda.Stream()
    optimizer, reference = fastrms.RMSProp(param), fastrms.RMSProp(theirs, backend="numpy")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step(grad)
    torch.cuda.current_stream().wait_stream(stream)
    reference.step(np.ascontiguousarray(grad.cpu().numpy()))
    assert same(OfTorch.to_host(param), theirs)
    with pytest.raises(ValueError, match="strides"):
        optimizer.step(grad.contiguous())


@torch_only
@pytest.mark.parametrize("many", [1, 3])
def test_a_graph_captured_by_torch(many):
    """With a rate that changes; the gradients are made in the graph, so they are bound there."""
    import torch

    params = torch_parameters([(1003,)] * many)
    theirs = [OfTorch.to_host(p).copy() for p in params]
    optimizer, reference = fastrms.Adam(params, capturable=True), fastrms.Adam(theirs, backend="numpy")
    loss = lambda: sum((p * p).sum() / 2 for p in params)  # noqa: E731  its gradient is p
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss().backward()
        optimizer.step([p.grad for p in params])
    torch.cuda.current_stream().wait_stream(side)
    reference.step([t.copy() for t in theirs])
    for p in params:
        p.grad = None
    graph, refused = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        loss().backward()
        try:
            optimizer.step([p.grad for p in params])
        except RuntimeError as error:
            refused.append(str(error))
        optimizer.bind([p.grad for p in params])
        optimizer.step()
    for step in range(5):
        optimizer.lr = reference.lr = 0.1 / (step + 1)
        optimizer.advance()
        graph.replay()
        reference.step([t.copy() for t in theirs])
    assert "bind(grads) them in the capture" in refused[0]
    assert all(same(OfTorch.to_host(p), t) for p, t in zip(params, theirs, strict=True)) and optimizer.steps == 6


@torch_only
def test_a_graph_captured_by_torch_that_skips():
    """Gradients of which some launches of the graph make infinite ones."""
    import torch

    params, factor = torch_parameters([(1003,), (5,)]), torch.ones((), device="cuda")
    theirs = [OfTorch.to_host(p).copy() for p in params]
    options = {"nonfinite": "skip", "zero_grad": True}
    optimizer = fastrms.Adam(params, capturable=True, **options)
    reference = fastrms.Adam(theirs, backend="numpy", **options)
    grads, side = [torch.zeros_like(p) for p in params], torch.cuda.Stream()
    optimizer.bind(grads)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    reference.step([np.zeros_like(t) for t in theirs])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for grad, param in zip(grads, params, strict=True):
            grad.copy_(param.detach() * factor)
        optimizer.step()
    for step in range(12):
        optimizer.lr = reference.lr = 0.1 / (step + 1)
        factor.fill_(float("inf") if step % 3 == 1 else 1.0)
        optimizer.advance()
        graph.replay()
        with np.errstate(all="ignore"):
            reference.step([t * np.float32(np.inf if step % 3 == 1 else 1.0) for t in theirs])
    assert optimizer.steps == reference.steps == 9 and not any(grad.any() for grad in grads)
    assert all(same(OfTorch.to_host(p), t) for p, t in zip(params, theirs, strict=True))


@torch_only
def test_the_example_of_a_graph_runs(capsys):
    import torch

    page = Path(__file__).parents[1] / "docs" / "cuda.md"
    if not page.exists():
        pytest.skip("docs are not here")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "torch.cuda.CUDAGraph" in code)
    model, x = torch.nn.Linear(5, 3, device="cuda"), torch.randn(64, 5, device="cuda")
    exec(code, {"fastrms": fastrms, "torch": torch, "model": model, "x": x})
    assert "103 steps; the last launch: StepInfo(applied=True, grad_norm=" in capsys.readouterr().out


@torch_only
def test_what_a_capture_by_torch_refuses():
    import torch

    params = torch_parameters([(1003,)] * 2)
    grads = [torch.ones_like(p) for p in params]
    plain, new = fastrms.Adam(params), fastrms.Adam(params, capturable=True)
    plain.bind(grads)
    new.bind(grads)
    plain.step()
    torch.cuda.synchronize()
    before, refused, graph = [p.detach().clone() for p in params], [], torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for optimizer in (plain, new):
            try:
                optimizer.step()
            except RuntimeError as error:
                refused.append(str(error))
        torch.ones(3, device="cuda")
    assert "capturable=True" in refused[0] and "make one step" in refused[1]
    assert (plain.steps, new.steps) == (1, 0)
    new.step()
    assert new.steps == 1 and not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@torch_only
def test_a_stream_of_yours_is_ordered_with_that_of_torch():
    import torch

    (param,) = torch_parameters([(1 << 22,)])
    theirs, grad, stream = OfTorch.to_host(param).copy(), numbers(1 << 22, 1), torch.cuda.Stream()
    there_grad = torch.as_tensor(grad).cuda()
    optimizer, reference = fastrms.Adam(param, stream=stream), fastrms.Adam(theirs, backend="numpy")
    for step in range(5):
        made = there_grad * (step + 1)
        optimizer.step(made)
        del made
        other = torch.full((1 << 22,), float("nan"), device="cuda")  # where the gradient was
        del other
        reference.step(grad * np.float32(step + 1))
    assert same(OfTorch.to_host(param), theirs)


@torch_only
def test_what_torch_has_and_fastrms_has_not():
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"params has dtype {str(dtype)[6:]}; fastrms updates float32 and float64 on"):
            fastrms.RMSProp(torch.ones(9, dtype=dtype, device="cuda"))
    with pytest.raises(ValueError, match="lazily negated"):
        fastrms.RMSProp(torch._neg_view(torch.ones(9, device="cuda")))
    shrunk = torch.ones(9, device="cuda")
    shrunk.untyped_storage().resize_(4)
    with pytest.raises(ValueError, match="storage was resized"):
        fastrms.RMSProp(shrunk)


@torch_only
def test_memory_of_a_dropped_optimizer_is_freed_after_its_kernel():
    """States are freed while their kernel waits in a stream that is not ordered with the default one."""
    import torch

    stream, (param,) = torch.cuda.Stream(), torch_parameters([(1 << 20,)])
    theirs, grad = OfTorch.to_host(param).copy(), torch.ones_like(param)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(1e8))
        optimizer = fastrms.Adam(param)
        torch.cuda._sleep(int(1e8))
        optimizer.step(grad)
        del optimizer
    other = fastrms.Adam(torch.ones(1 << 20, device="cuda"), lr=0.1)
    other.step(torch.full((1 << 20,), 5.0, device="cuda"))
    torch.cuda.synchronize()
    fastrms.Adam(theirs, backend="numpy").step(np.ones(1 << 20, np.float32))
    assert same(OfTorch.to_host(param), theirs)
