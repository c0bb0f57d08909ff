"""The backend on the driver double, run by test_launch.py in a process of its own: pytest tests/ptx/launch_cases.py.

cuda.core and fastrms run as they are; only libcuda.so.1 is a double, whose launches execute the PTX on the CPU."""

import contextlib
import copy
import ctypes
import gc
import pickle
import sys
import threading
import types
import weakref
from functools import partial

import double

DRIVER = double.start()  # before anything asks for a driver

import cuda.core  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import bits  # noqa: E402
from test_storage import PARAMS, raw, stored  # noqa: E402

import fastrms  # noqa: E402
from fastrms import saved_formats  # noqa: E402
from fastrms.backends import OK, OVERLAP  # noqa: E402
from fastrms.backends.c import ffi  # noqa: E402
from fastrms.backends.cuda import decide as deciding  # noqa: E402
from fastrms.backends.cuda import kernel, norm, table, toolchain  # noqa: E402
from fastrms.backends.cuda import launch as launching  # noqa: E402
from fastrms.backends.cuda import plan as planning  # noqa: E402
from fastrms.memory import device  # noqa: E402
from fastrms.rules import select  # noqa: E402

LEGACY = 1
toolchain.available.cache_clear()  # conftest.py has asked already
compiler = toolchain.compiler()
_compiled, _compiled_norm = compiler.compiled, compiler.compiled_norm


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """The double with everything allowed again; it learns each kernel's PTX from what the backend compiles."""
    monkeypatch.setattr(compiler, "compiled", lambda *arguments: DRIVER.learn(_compiled(*arguments)))
    monkeypatch.setattr(compiler, "compiled_norm", lambda *arguments: DRIVER.learn(_compiled_norm(*arguments)))
    DRIVER.regions, DRIVER.fail, DRIVER.errors = [], 0, []
    DRIVER.library.double_capturing(0)
    DRIVER.library.double_busy(0)
    yield DRIVER
    assert not DRIVER.errors


class OnDevice:
    """A producer's array: __cuda_array_interface__ over host memory that stands for device memory."""

    def __init__(self, array, stream=None, version=3):
        self.array, self.stream, self.version = array, stream, version

    @property
    def __cuda_array_interface__(self):
        data = (self.array.ctypes.data, not self.array.flags.writeable)
        made = {"shape": self.array.shape, "typestr": self.array.dtype.str, "data": data, "version": self.version,
                "strides": self.array.strides}  # fmt: skip
        return {**made, "stream": self.stream} if self.version > 2 else made


class Stream:
    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def numbers(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def aligned(size, seed=0):
    """Numbers that start at a multiple of 16 bytes, as device memory does."""
    memory = np.empty(size + 4, np.float32)
    array = memory[-memory.ctypes.data % 16 // 4 :][:size]
    array[:] = numbers(size, seed=seed)
    return array


def same(a, b):
    return np.array_equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.AdamW, fastrms.RProp])
def test_steps_have_the_bits_of_the_host(driver, make, dtype):
    ours, theirs, grad = numbers(1003, dtype=dtype), numbers(1003, dtype=dtype), numbers(1003, dtype=dtype, seed=1)
    optimizer, reference = make(OnDevice(ours)), make(theirs, backend="numpy")
    assert optimizer.backend == "cuda"
    optimizer.bind(OnDevice(grad))
    reference.bind(grad)
    for _ in range(4):
        optimizer.step()
        reference.step()
    assert same(ours, theirs)
    for name, state in reference.state.items():
        assert same(optimizer.state[name].to_host(), state)


def test_a_bound_step_is_one_driver_call(driver):
    for capable in ({}, {"weight_decay": 0.1}):
        optimizer = fastrms.RMSProp(OnDevice(numbers(100_003)), **capable)
        optimizer.bind(OnDevice(numbers(100_003)))
        optimizer.step()
        assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 1}
        assert driver.launches[0][1:] == (98, 256, LEGACY)


def test_many_tensors_are_one_driver_call(driver):
    shapes = [(3, 5), (1003,), (0,), (), (257, 4)]
    ours, theirs, grads = ([numbers(*shape, seed=k) for k, shape in enumerate(shapes)] for _ in range(3))
    optimizer, reference = fastrms.Adam([OnDevice(x) for x in ours]), fastrms.Adam(theirs, backend="numpy")
    optimizer.bind([OnDevice(g) for g in grads])
    reference.bind(grads)
    optimizer.step()
    reference.step()
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 1}
    reference.step()
    optimizer.step([None, *map(OnDevice, grads[1:])])  # another table, and other counts from now on
    reference.step([None, *grads[1:]])
    optimizer.step([OnDevice(g) for g in grads])
    reference.step(grads)
    assert optimizer.tensor_steps == reference.tensor_steps == [3, 4, 4, 4, 4]
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("offset", [0, 1])
def test_misaligned_buffers_take_no_vectors(driver, offset):
    """Where the parameter and the gradient do not share the offset to a multiple of 16 bytes."""
    memory, theirs, grad = aligned(1004), aligned(1004), aligned(1004, seed=1)
    ours = memory[offset:1001]
    optimizer, reference = fastrms.RMSProp(OnDevice(ours)), fastrms.RMSProp(theirs[offset:1001], backend="numpy")
    optimizer.step(OnDevice(grad[: 1001 - offset]))
    reference.step(grad[: 1001 - offset])
    assert driver.launches[-1][1] == (1 if offset == 0 else 4) and same(memory, theirs)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000])
def test_views_that_share_an_offset_take_vectors(driver, offset, size, many):
    """The states are placed at the offset of their parameter."""
    memory = [aligned(1004, seed=k) for k in range(3 * many)]
    want = [array.copy() for array in memory]
    views, expected = ([array[offset:][:size] for array in arrays] for arrays in (memory, want))
    optimizer = fastrms.RMSProp([OnDevice(view) for view in views[:many]])
    optimizer.step([OnDevice(view) for view in views[many : 2 * many]])
    fastrms.RMSProp(expected[:many], backend="numpy").step(expected[many : 2 * many])
    assert all(same(a, b) for a, b in zip(memory, want, strict=True)) and driver.launches[-1][1] == many
    state = optimizer._tensors[0].state["square_avg"]
    assert (
        table.vectors([view.ctypes.data for view in views[:2]] + [state.address], size, 4) == max(0, size - -offset % 4) // 4
    )


def test_the_stream_is_the_callers_or_the_producers(driver):
    grad = OnDevice(numbers(64), stream=0x7770)
    fastrms.RMSProp(OnDevice(numbers(64), stream=0x7770)).step(grad)
    assert driver.launches[-1][3] == 0x7770
    for stream in (0x8880, Stream(0x8880)):
        fastrms.RMSProp(OnDevice(numbers(64)), stream=stream).step(OnDevice(numbers(64)))
        assert driver.launches[-1][3] == 0x8880
    fastrms.RMSProp(OnDevice(numbers(64), version=2)).step(OnDevice(numbers(64)))
    assert driver.launches[-1][3] == LEGACY


def test_another_stream_is_waited_for_on_the_device(driver):
    optimizer = fastrms.RMSProp(OnDevice(numbers(64), stream=0x7770))
    optimizer.bind(OnDevice(numbers(64), stream=0x9990))
    calls = driver.census(optimizer.step)
    assert calls["cuStreamWaitEvent"] == 1 and not any("Synchronize" in name for name in calls)


def test_capturable_reads_a_changed_lr_from_the_device(driver):
    ours, theirs, grad, calls = numbers(99), numbers(99), numbers(99, seed=1), {}
    optimizer = fastrms.Adam(OnDevice(ours), capturable=True, stream=0x7770)
    reference = fastrms.Adam(theirs, backend="numpy")
    optimizer.bind(OnDevice(grad))
    optimizer.step()
    reference.step(grad)
    graph = driver.capture(lambda: calls.update(driver.census(optimizer.step)))
    assert calls == {"cuStreamIsCapturing": 1, "cuLaunchKernelEx": 1} and optimizer.steps == 1
    optimizer.lr = reference.lr = 0.25
    assert driver.census(optimizer.advance) == {"cuMemcpyHtoDAsync_v2": 1}
    driver.replay(graph)
    reference.step(grad)
    assert same(ours, theirs) and optimizer.steps == 2
    with pytest.raises(ValueError, match="a captured CUDA graph does not launch"):
        optimizer.groups[0]["clip_value"] = 1.0


def captured(driver, call):
    """What a capture refuses, refused before anything is launched or counted."""
    driver.library.double_capturing(1)
    driver.launches.clear()
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured") as refusal:
        call()
    driver.library.double_capturing(0)
    assert not driver.launches
    return str(refusal.value)


def test_a_capture_of_gradients_that_are_not_bound_is_refused(driver):
    """It would always read the gradients of the step before.  Gradients bound in the capture are read by the graph."""
    ours, theirs, grads, new = ([numbers(33, seed=j + k) for k in range(3)] for j in (0, 0, 3, 6))
    optimizer = fastrms.Adam([OnDevice(x) for x in ours], capturable=True, stream=0x7770)
    reference = fastrms.Adam(theirs, backend="numpy")
    there = [OnDevice(g) for g in new]
    for grad in (grads, new):
        optimizer.step([OnDevice(g) for g in grad])
        reference.step(grad)
        assert "bind(grads) them in the capture" in captured(driver, lambda: optimizer.step(there))
    assert optimizer.steps == 2
    optimizer.step([OnDevice(g) for g in grads])
    reference.step(grads)
    calls = {}

    def bound():
        optimizer.bind(there)
        calls.update(driver.census(optimizer.step))

    graph = driver.capture(bound)
    assert calls == {"cuStreamIsCapturing": 1, "cuLaunchKernelEx": 1}
    optimizer.advance()
    driver.replay(graph)
    reference.step(new)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)) and optimizer.steps == reference.steps == 4


@pytest.mark.parametrize("many", [1, 3])
def test_a_capture_without_capturable_is_refused(driver, many):
    optimizer = fastrms.Adam([OnDevice(numbers(33)) for _ in range(many)], stream=0x7770)
    grads = [OnDevice(numbers(33)) for _ in range(many)]
    optimizer.bind(grads)
    optimizer.step()
    optimizer.step()
    assert "capturable=True" in captured(driver, optimizer.step)  # though nothing has changed
    assert "capturable=True" in captured(driver, lambda: optimizer.step([OnDevice(numbers(33)) for _ in range(many)]))
    assert optimizer.steps == 2
    waiting = fastrms.RMSProp(OnDevice(numbers(9)), stream=0x7770, capturable=True, check=True)
    waiting.bind(OnDevice(numbers(9)))
    waiting.step()
    assert "check" in captured(driver, waiting.step)


@pytest.mark.parametrize("many", [1, 3])
def test_a_first_step_in_a_capture_is_refused_before_it_asks_for_memory(driver, many):
    optimizer = fastrms.Adam([OnDevice(numbers(33)) for _ in range(many)], stream=0x7770, capturable=True)
    optimizer.bind([OnDevice(numbers(33)) for _ in range(many)])
    calls = driver.census(lambda: captured(driver, optimizer.step))
    assert set(calls) == {"cuStreamIsCapturing"} and optimizer.steps == 0
    optimizer.step()
    assert optimizer.steps == 1


def test_the_device_of_the_caller_is_restored(driver, monkeypatch):
    """Where there are several; they are counted by the driver, which sees only those that this process may use."""
    monkeypatch.setattr(cuda.core.Device, "get_all_devices", None, raising=False)
    driver.library.double_devices(2)
    assert device.count() == 2
    current, of_caller = ctypes.c_void_p(), 0x101
    driver.library.cuCtxSetCurrent(ctypes.c_void_p(of_caller))
    optimizer = fastrms.Adam([OnDevice(numbers(9)), OnDevice(numbers(9))], capturable=True)
    saved = optimizer.state_dict()
    bind, load = lambda: optimizer.bind([OnDevice(numbers(9)) for _ in range(2)]), lambda: optimizer.load_state_dict(saved)
    new = lambda: fastrms.init_state("rmsprop", OnDevice(numbers(9)))  # noqa: E731
    for call in (bind, optimizer.step, optimizer.advance, optimizer.state_dict, load, new):
        call()
        driver.library.cuCtxGetCurrent(ctypes.byref(current))
        assert current.value == of_caller
    driver.fail = 700
    with pytest.raises(RuntimeError, match="launching"):
        optimizer.step()
    driver.library.cuCtxGetCurrent(ctypes.byref(current))
    assert current.value == of_caller
    driver.library.double_devices(1)


class OfCuPy(OnDevice):
    """As an array of CuPy, which is used on the stream that is CuPy's current one, and of which parts are views."""

    device = contextlib.nullcontext()
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __getitem__(self, key):
        return type(self)(self.array[key])

    def __setitem__(self, key, value):
        self.array[key] = value.array

    def reshape(self, shape):
        return type(self)(self.array.reshape(shape))


OfCuPy.__module__ = "cupy._core.core"


@pytest.fixture
def cupy(monkeypatch):
    """A stand-in for CuPy with a current stream."""
    library = types.ModuleType("cupy")
    library.current = types.SimpleNamespace(ptr=0x7770)
    library.zeros = lambda size, dtype: OfCuPy(np.zeros(size, dtype))
    library.cuda = types.SimpleNamespace(get_current_stream=lambda: library.current)
    monkeypatch.setitem(sys.modules, "cupy", library)
    return library


def test_a_stream_of_yours_and_that_of_the_library_wait_for_each_other(driver, cupy):
    optimizer = fastrms.RMSProp(OfCuPy(numbers(64)))
    optimizer.bind(OfCuPy(numbers(64)))
    optimizer.step()
    assert driver.census(optimizer.step) == {"cuStreamIsCapturing": 1, "cuLaunchKernelEx": 1}
    assert driver.launches[-1][3] == 0x7770
    optimizer = fastrms.RMSProp(OfCuPy(numbers(64)), stream=0x8880)
    optimizer.bind(OfCuPy(numbers(64)))
    optimizer.step()
    driver.waits()
    calls = driver.census(optimizer.step)
    assert driver.waits() == [(0x8880, 0x7770), (0x7770, 0x8880)] and not any("Synchronize" in name for name in calls)
    assert driver.launches[-1][3] == 0x8880
    cupy.current.ptr = 0x8880
    optimizer.step()
    assert driver.waits() == []


SHAPES = {"w": (3, 5), "b": (), "none": (0, 2), "v": 1003, "b2": 7}


@pytest.mark.parametrize("groups", [None, {"b*": {"lr": 0.1}}], ids=["one", "groups"])
@pytest.mark.parametrize("options", [{}, {"state_format": "bf16"}, {"state_format": "q8"}], ids=str)
def test_a_flat_buffer_in_device_memory(driver, cupy, groups, options):
    """The library of its arrays allocates; a step is one driver call per run of names; the bits are those of the host."""
    size = 15 + 1 + 0 + 1003 + 7
    flat = fastrms.FlatBuffer(SHAPES, data=OfCuPy(np.zeros(size, np.float32)))
    theirs = fastrms.FlatBuffer(SHAPES)
    for made in (flat, theirs):
        for k, name in enumerate(SHAPES):
            values = numbers(*made.params[name].shape, seed=k), numbers(*made.params[name].shape, seed=9 + k)
            for view, value in zip((made.params[name], made.grads[name]), values, strict=True):
                view[...] = value if made is theirs else OfCuPy(value)
    optimizer = fastrms.Adam(flat, groups=groups, **options)
    reference = fastrms.Adam(theirs, groups=groups, backend="numpy", **options)
    assert type(flat.data) is type(flat.grad) is OfCuPy and optimizer.backend == "cuda"
    optimizer.bind(flat.grads)
    for k in range(3):
        calls = driver.census(lambda k=k: optimizer.step(*[[], [flat.grads], [flat.grad]][k]))
        reference.step(theirs.grads)
        assert calls["cuLaunchKernelEx"] == (2 if groups else 1)
    optimizer.step(flat.grads, clip_norm=0.5)
    reference.step(theirs.grads, clip_norm=0.5)
    assert same(flat.data.array, theirs.data) and same(flat.params["w"].array, theirs.params["w"])
    saved, wanted = (made.state_dict()["tensors"] for made in (optimizer, reference))
    for mine, other in zip(saved, wanted, strict=True):
        assert mine["name"] == other["name"]
        assert all(np.array_equal(mine["state"][name], other["state"][name]) for name in other["state"])
    for name in SHAPES:
        found = optimizer.state["exp_avg"][name]
        found = found.to_host().reshape(found.shape) if isinstance(found, device.DeviceArray) else np.asarray(found)
        assert same(found, np.asarray(reference.state["exp_avg"][name])), name
    if not options:
        again = fastrms.Adam(flat, groups=groups, state=optimizer.state)
        again.load_state_dict(reference.state_dict())
        assert again.steps == 4 and again.report()
    assert optimizer.nbytes["grad"] == reference.nbytes["grad"] == 4 * size


def test_a_flat_buffer_like_arrays_in_device_memory(driver, cupy):
    given = {"w": OfCuPy(numbers(3, 5)), "b": OfCuPy(numbers(4, seed=1))}
    flat = fastrms.FlatBuffer.like(given)
    assert all(same(flat.params[name].array, x.array) for name, x in given.items()) and not flat.grad.array.any()
    assert flat.params["w"].array.base is not None and "2 array(s), 19 float32" in repr(flat)
    fastrms.RMSProp(flat).step(flat.grads)
    for error, match, call in (
        (TypeError, "a copy is FlatBuffer.like", lambda: flat.__reduce__()),
        (ValueError, r"params\['a'\] and data overlap in memory", lambda: fastrms.FlatBuffer.like(
            {"a": flat.data[:5], "b": OfCuPy(numbers(14))}, data=flat.data)),
        (TypeError, "in device memory has parts of an array of CuPy or torch", lambda: fastrms.FlatBuffer.like(
            {"a": OnDevice(numbers(5))})),
        (TypeError, r"params\['b'\] \(ndarray\) is in host memory", lambda: fastrms.FlatBuffer.like(
            {"a": OfCuPy(numbers(5)), "b": numbers(5)})),
        (TypeError, r"params\['b'\] has dtype float64, params\['a'\] has float32", lambda: fastrms.FlatBuffer.like(
            {"a": OfCuPy(numbers(5)), "b": OfCuPy(numbers(5, dtype=np.float64))})),
        (TypeError, r"params\['b'\] \(ndarray\) is in host memory", lambda: fastrms.FlatBuffer.like(
            {"b": numbers(5)}, data=OfCuPy(numbers(5)))),
        (TypeError, r"data \(ndarray\) is in host memory", lambda: fastrms.FlatBuffer.like(
            {"b": OfCuPy(numbers(5))}, data=numbers(5))),
        (TypeError, r"grad \(ndarray\) is in host memory", lambda: fastrms.FlatBuffer(
            [5], data=OfCuPy(numbers(5)), grad=numbers(5))),
        (ValueError, r"data has shape \(6,\); the shapes have 5 numbers", lambda: fastrms.FlatBuffer(
            [5], data=OfCuPy(numbers(6)))),
        (TypeError, "data has dtype float64; the FlatBuffer has float32: pass dtype=np.float64", lambda: fastrms.FlatBuffer(
            [5], data=OfCuPy(numbers(5, dtype=np.float64)))),
        (ValueError, "data and grad overlap", lambda: fastrms.FlatBuffer([5], data=flat.data[:5], grad=flat.data[3:8])),
        (ValueError, "data is not dense|not dense", lambda: fastrms.FlatBuffer([5], data=OfCuPy(numbers(10)[::2]))),
        (TypeError, "is in host memory; backend='cuda'", lambda: fastrms.RMSProp(flat).step(numbers(19))),
        (TypeError, "it must be the grads or grad of the FlatBuffer", lambda: fastrms.RMSProp(
            fastrms.FlatBuffer([19]), backend="numpy").step(flat.grad)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_memory_is_freed_when_no_kernel_can_use_it(driver):
    optimizer = fastrms.Adam([OnDevice(numbers(33)) for _ in range(3)], stream=0x7770, capturable=True)
    optimizer.step([OnDevice(numbers(33)) for _ in range(3)])
    left = [optimizer]
    del optimizer
    freed = driver.census(left.clear)
    assert freed["cuMemFreeAsync"] >= 7 and driver.library.double_freed_in_use() == 0


def test_what_the_driver_may_not_have_read_is_kept(driver):
    optimizer = fastrms.RMSProp([OnDevice(numbers(9)) for _ in range(3)])
    driver.library.double_busy(1)
    for _ in range(5):
        optimizer.step([OnDevice(numbers(9)) for _ in range(3)])
    (launch,) = optimizer._plan._updates
    assert len(launch.table.reading) == 6  # five times the rows, once the tensors of the blocks
    driver.library.double_busy(0)
    optimizer.step([OnDevice(numbers(9)) for _ in range(3)])
    assert len(launch.table.reading) == 1


def test_gradients_at_the_same_addresses_need_nothing_new(driver, monkeypatch):
    """As those of a backward pass, which are other objects at each step, but mostly lie where those before were."""
    made = lambda calls: {name: count for name, count in calls.items() if "PointerGet" not in name}  # noqa: E731
    aimed, aim = [], launching.Launch.aim
    monkeypatch.setattr(launching.Launch, "aim", lambda self, *rest: (aimed.append(self), aim(self, *rest)))
    params, grads = [numbers(33, seed=k) for k in range(3)], [numbers(33, seed=k) for k in range(3)]
    theirs = [p.copy() for p in params]
    optimizer, reference = fastrms.Adam([OnDevice(p) for p in params]), fastrms.Adam(theirs, backend="numpy")
    for step in range(4):
        there = [OnDevice(g) for g in grads]
        calls = driver.census(lambda there=there: optimizer.step(there))
        reference.step(grads)
        assert step == 0 or made(calls) == {"cuLaunchKernelEx": 1}
    assert len(aimed) == 1
    grads[1] = grads[1].copy()
    calls = driver.census(lambda: optimizer.step([OnDevice(g) for g in grads]))
    reference.step(grads)
    assert len(aimed) == 2 and calls["cuMemcpyHtoDAsync_v2"] == 1  # the rows of the table, not the tensors of the blocks
    calls = driver.census(lambda: optimizer.step([OnDevice(g, stream=0x9990) for g in grads]))
    reference.step(grads)
    assert calls["cuStreamWaitEvent"] == 1
    optimizer.step([None, *map(OnDevice, grads[1:])])
    reference.step([None, *grads[1:]])
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))


def test_addresses_that_were_read_in_c_are_taken(driver):
    """As fastrms.torch_reader.Reader reads those of torch tensors: a table is made only where they have changed."""
    params, theirs, grads = ([numbers(33, seed=k) for k in range(3)] for _ in range(3))
    optimizer, reference = fastrms.Adam([OnDevice(p) for p in params]), fastrms.Adam(theirs, backend="numpy")
    plan = optimizer._plan
    assert plan.takes_pointers
    for leaves in (grads, grads, [None, *grads[1:]], grads, [grads[0], grads[1].copy(), grads[2]]):
        addresses = [0 if leaf is None else leaf.ctypes.data for leaf in leaves]
        pointers = ffi.new("void *[]", [ffi.cast("void *", address) for address in addresses])
        formats = ffi.new("int32_t[]", 3)
        reader = types.SimpleNamespace(pointers=pointers + 0, leaves=leaves, absent=leaves[0] is None, formats=formats + 0)
        before = plan._updates
        assert plan.change(grads=reader)[0] == OK
        assert (plan._updates is before) == (reference.steps == 1)
        reference.step(leaves)
    half = stored("bf16", grads[2])  # at an address at which a float32 could lie, too
    pointers[2], formats[2] = ffi.cast("void *", half.array.ctypes.data), 1
    plan.change(grads=types.SimpleNamespace(pointers=pointers + 0, leaves=leaves, absent=False, formats=formats + 0))
    reference.step([leaves[0], leaves[1], half])
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))
    assert optimizer.tensor_steps == reference.tensor_steps
    empty = fastrms.Adam([OnDevice(numbers(0)), OnDevice(numbers(9))])
    pointers = ffi.new("void *[]", [ffi.NULL, ffi.cast("void *", grads[0].ctypes.data)])
    for leaves in ([None, grads[0]], [numbers(0), grads[0]]):
        reader = types.SimpleNamespace(
            pointers=pointers + 0, leaves=leaves, absent=leaves[0] is None, formats=ffi.new("int32_t[]", 2) + 0
        )
        empty._plan.change(grads=reader)
    assert empty.tensor_steps == [1, 2]
    overlapping = ffi.new("void *[]", [ffi.cast("void *", params[0].ctypes.data)] * 3)
    reader = types.SimpleNamespace(pointers=overlapping + 0, leaves=grads, absent=False, formats=formats + 0)
    assert plan.change(grads=reader)[0] == OVERLAP and optimizer.steps == reference.steps


def test_a_dtype_that_numpy_does_not_have_is_named(driver, monkeypatch):
    class View:
        @property
        def dtype(self):
            raise NotImplementedError("Unsupported AOTI dtype code")

    monkeypatch.setattr(device, "_view", lambda x, interface, name: View())
    with pytest.raises(TypeError, match="params has a dtype that NumPy does not have; fastrms updates float32 and float64"):
        fastrms.RMSProp(OnDevice(numbers(9)))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_memory_is_filled_with_any_number(driver, dtype, value):
    array = device.allocate(5, np.dtype(dtype), 0)
    array.fill(value)
    assert same(array.to_host(), np.full(5, value, dtype))


def test_the_table_of_a_launch():
    """Each block has its tensor, each tensor the blocks from first_block on."""
    sizes = [1, 0, 2049, 1024, 7, 262_144]
    rows, tensor_of = table.table([([4096 + 4 * k, 8192 + 4 * k], size) for k, size in enumerate(sizes)], 4)
    rows = rows.reshape(-1, 5)
    assert rows.dtype == np.uint64 and tensor_of.dtype == np.uint32
    for k, (_, _, size, vectors, first) in enumerate(rows.tolist()):
        count = table.blocks(size, vectors, 4)
        assert size == sizes[k] and (tensor_of[first : first + count] == k).all() and (tensor_of == k).sum() == count


def test_state_goes_to_the_host_and_back(driver):
    grad = OnDevice(numbers(9))
    optimizer = fastrms.Adam(OnDevice(numbers(9)))
    optimizer.step(grad)
    saved = optimizer.state_dict()
    host = fastrms.Adam(numbers(9, seed=3), backend="numpy")
    host.load_state_dict(saved)  # a state_dict is of NumPy arrays: it goes from one backend to the other
    optimizer.step(grad)
    optimizer.load_state_dict(saved)
    assert optimizer.steps == 1 and same(optimizer.state["exp_avg"].to_host(), host.state["exp_avg"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.AdamW, fastrms.RProp])
def test_a_given_state_is_used_in_place(driver, make, dtype):
    ours, theirs, grads = ([numbers(size, dtype=dtype, seed=k) for k, size in enumerate((0, 3, 1003))] for _ in range(3))
    reference = make(theirs, backend="numpy")
    state = {name: [x.copy() for x in of] for name, of in reference.state.items()}
    given = {name: [OnDevice(x, stream=0x7770) for x in of] for name, of in state.items()}
    optimizer = make([OnDevice(x) for x in ours], state=given)
    for _ in range(3):
        optimizer.step([OnDevice(g) for g in grads])
        reference.step(grads)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    for name, of in reference.state.items():
        assert all(same(a, b) for a, b in zip(state[name], of, strict=True))
        (_, _, shown) = optimizer.state[name]
        assert shown.address == state[name][2].ctypes.data and same(shown.to_host(), of[2])
    make([OnDevice(x) for x in ours], state=optimizer.state).load_state_dict(reference.state_dict())


def test_a_state_that_does_not_fit_is_refused(driver):
    w, grad = numbers(9), numbers(9)
    for error, match, array in (
        (TypeError, r"state\['square_avg'\] \(ndarray\) is in host memory", np.zeros(9, np.float32)),
        (ValueError, r"state\['square_avg'\] holds a negative number or NaN", OnDevice(np.full(9, -1, np.float32))),
        (ValueError, r"params and state\['square_avg'\] overlap", OnDevice(w)),
        (ValueError, r"state\['square_avg'\] has shape \(8,\)", OnDevice(np.zeros(8, np.float32))),
    ):
        with pytest.raises(error, match=match):
            fastrms.RMSProp(OnDevice(w), state={"square_avg": array})
    with pytest.raises(ValueError, match="holds a 0: 0/0"):
        fastrms.AdaGrad(OnDevice(w), eps=0.0, state={"sum": OnDevice(np.zeros(9, np.float32))})
    with pytest.raises(ValueError, match="holds a 0: 0/0"):
        fastrms.adagrad(OnDevice(w), OnDevice(grad), OnDevice(np.zeros(9, np.float32)), eps=0.0)


def test_a_rule_without_state_enters_the_device(driver):
    class Descent(fastrms.Optimizer):
        defaults = {"lr": 0.5}
        coefficients = staticmethod(lambda step, lr: {"lr": lr})
        rule = staticmethod(lambda param, grad, lr: (param - lr * grad,))

    calls = driver.census(lambda: Descent(OnDevice(numbers(9)), state={}))
    assert any("CtxSetCurrent" in name for name in calls)


def test_functions_and_own_rules(driver):
    ours, theirs, grad = numbers(33), numbers(33), numbers(33, seed=1)
    state = fastrms.init_state("rmsprop", OnDevice(ours))
    fastrms.rmsprop(OnDevice(ours), OnDevice(grad), **state, lr=0.1)
    fastrms.rmsprop(theirs, grad, **fastrms.init_state("rmsprop", theirs), lr=0.1, backend="numpy")
    assert same(ours, theirs)
    fastrms.rmsprop(OnDevice(ours), OnDevice(grad), state["square_avg"], lr=0.1, backend="cuda")

    class Momentum(fastrms.Optimizer):
        defaults = {"lr": 0.1, "momentum": 0.9}
        state_names = ("buffer",)

        @staticmethod
        def coefficients(step, lr, momentum):
            return {"lr": lr, "momentum": momentum}

        def rule(param, grad, buffer, lr, momentum):
            buffer = momentum * buffer + grad
            return param - lr * buffer, buffer

    optimizer, reference = Momentum(OnDevice(ours)), Momentum(ours.copy(), backend="numpy")
    optimizer.step(OnDevice(grad), grad_scale=0.5)
    reference.step(grad, grad_scale=0.5)
    assert same(ours, reference._tensors[0].param.owner)


@pytest.mark.parametrize("many", [1, 3])
def test_the_form_may_change_and_change_back(driver, many):
    """Each form has its launch, with the table and the coefficients of the time."""
    ours, theirs, grads = [[numbers(33, seed=k) for k in range(many)] for _ in range(3)]
    optimizer, reference = fastrms.Adam([OnDevice(x) for x in ours]), fastrms.Adam(theirs, backend="numpy")
    for clip_value in (None, 0.5, None, 0.25):
        for made, held in ((optimizer, [OnDevice(g) for g in grads]), (reference, grads)):
            made.groups[0]["clip_value"] = clip_value
            made.step(held)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len({name for name, *_ in driver.launches[-4:]}) == 2


@pytest.mark.parametrize("many", [1, 3])
def test_an_own_rule_may_name_its_numbers_as_it_likes(driver, many):
    from test_own_rules import Named

    ours, theirs, grads = [[numbers(33, seed=k) for k in range(many)] for _ in range(3)]
    optimizer, reference = Named([OnDevice(x) for x in ours]), Named(theirs, backend="numpy")
    for _ in range(2):
        optimizer.step([OnDevice(g) for g in grads])
        reference.step(grads)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_own_rule_may_choose_by_any_comparison(driver):
    class Chosen(fastrms.Optimizer):
        defaults = {"lr": 0.5}
        state_names = ("same", "other")

        @staticmethod
        def coefficients(step, lr):
            return {"lr": lr, "zero": 0.0, "one": 1.0}

        @staticmethod
        def rule(param, grad, same, other, lr, zero, one):
            same = select(grad == one, one, same + one)
            other = select(grad != one, lr, zero)
            return np.where(grad > zero, param - lr, param), same, other

    ours, theirs = np.zeros(33, np.float32), np.zeros(33, np.float32)
    grad = np.resize(np.array([1, 2, 0, -0.0, np.nan, np.inf], np.float32), 33)
    optimizer, reference = Chosen(OnDevice(ours)), Chosen(theirs, backend="numpy")
    optimizer.step(OnDevice(grad))
    reference.step(grad)
    assert same(ours, theirs)
    assert all(same(optimizer.state[name].to_host(), reference.state[name]) for name in ("same", "other"))


def test_an_own_rule_is_freed_with_its_class(driver):
    def used():
        class Descent(fastrms.Optimizer):
            defaults = {"lr": 0.5}
            coefficients = staticmethod(lambda step, lr: {"lr": lr})
            rule = staticmethod(lambda param, grad, lr: (param - lr * grad,))

        Descent(OnDevice(numbers(9))).step(OnDevice(numbers(9)))
        return weakref.ref(Descent), weakref.ref(Descent.rule)

    left = used()
    gc.collect()
    assert [x() for x in left] == [None, None]


def test_every_thread_makes_the_device_current(driver):
    """Also one that has the ident of a thread that has ended."""
    optimizer, calls = fastrms.RMSProp(OnDevice(numbers(64))), []
    optimizer.bind(OnDevice(numbers(64)))
    optimizer.step()
    for _ in range(4):
        thread = threading.Thread(target=lambda: calls.append(driver.census(optimizer.step)))
        thread.start()
        thread.join()
    assert all(any("CtxSetCurrent" in name for name in census) for census in calls) and len(calls) == 4
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 1}


def test_gradients_of_former_steps_are_freed(driver):
    optimizer, former = fastrms.RMSProp([OnDevice(numbers(9)) for _ in range(3)]), []
    for k in range(3):
        grads = [None if j == k else OnDevice(numbers(9)) for j in range(3)]
        former += [weakref.ref(grad.array) for grad in grads if grad is not None]
        optimizer.step(grads)
    optimizer.step([OnDevice(numbers(9)) for _ in range(3)])
    del grads
    gc.collect()
    assert not any(ref() is not None for ref in former)


def test_what_is_refused_is_refused_before_any_launch(driver):
    read_only = numbers(8)
    read_only.flags.writeable = False
    memory, host = numbers(16), numbers(8)
    for error, match, params, grads in (
        (ValueError, "read-only", read_only, None),
        (ValueError, "overlap in memory", memory[:8], memory[4:12]),
        (ValueError, "has shape", memory[:8], numbers(9)),
        (TypeError, "float64, params has float32", memory[:8], numbers(8, dtype=np.float64)),
        (ValueError, "not dense", memory[::2], None),
        (TypeError, "fastrms updates float32 and float64", memory[:8].astype(np.int32), None),
    ):
        driver.launches.clear()
        with pytest.raises(error, match=match):
            fastrms.RMSProp(OnDevice(params)).step(OnDevice(grads))
        assert not driver.launches
    optimizer = fastrms.RMSProp(OnDevice(memory[:8]))
    with pytest.raises(TypeError, match=r"is in host memory; backend='cuda' updates device memory: pass cupy.asarray"):
        optimizer.step(host)
    with pytest.raises(TypeError, match="is in host memory"):
        fastrms.RMSProp(host, backend="cuda")
    both = [numbers(8), numbers(8, dtype=np.float64)], [numbers(8), numbers(8, dtype=np.float64)]
    with pytest.raises(ValueError, match="clip_norm on backend='cuda' is for tensors of one dtype, these are float32 and"):
        fastrms.RMSProp([*map(OnDevice, both[0])]).step([*map(OnDevice, both[1])], clip_norm=1.0)
    with pytest.raises(TypeError, match="is not a CUDA stream"):
        fastrms.RMSProp(OnDevice(host), stream="left")
    assert not driver.launches and optimizer.steps == 0


def test_zero_grad_zeroes_on_the_stream(driver):
    params, grads = [numbers(9), numbers(1003)], [numbers(9), numbers(1003)]
    want = [p.copy() for p in params]
    fastrms.RMSProp(want, backend="numpy").step(grads)
    optimizer = fastrms.RMSProp([OnDevice(p) for p in params], zero_grad=True)
    calls = driver.census(lambda: optimizer.step([OnDevice(g) for g in grads]))
    assert calls["cuLaunchKernelEx"] == 1 and not any("Memset" in name for name in calls)  # the kernel does it
    assert all(np.array_equal(bits(p), bits(w)) for p, w in zip(params, want, strict=True))
    assert all((g == 0).all() for g in grads) and optimizer.steps == 1
    optimizer.step([None, OnDevice(grads[1])])
    read_only = numbers(9)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[0\] is read-only"):
        optimizer.step([OnDevice(read_only), None])


def spoiled(grads, where):
    """Copies with numbers that are not finite, or whose square overflows, at (tensor, index, number)."""
    made = [grad.copy() for grad in grads]
    for k, at, value in where:
        made[k][at] = value
    return made


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("kinds", ["fff", "fdf", "ddd"])
def test_gradients_that_are_not_finite(driver, nonfinite, kinds, clip_norm):
    """Skipped or refused as on the host: the same counts, the same sentence; nothing is updated."""
    if clip_norm and kinds == "fdf":  # tensors of two dtypes are not clipped
        return
    huge = 1e200 if "d" in kinds else 2e20
    sizes, dtypes = [5000, 3, 300_000], [np.dtype(kind) for kind in kinds]
    params, theirs, plain = ([numbers(n, dtype=t, seed=k) for k, (n, t) in enumerate(zip(sizes, dtypes, strict=True))]
                             for _ in range(3))  # fmt: skip
    options = {"nonfinite": nonfinite, "zero_grad": nonfinite == "skip"}
    optimizer = fastrms.Adam([OnDevice(p) for p in params], **options)
    reference = fastrms.Adam(theirs, backend="numpy", **options)
    for where in (
        [],
        [(2, 299_999, np.nan)],
        [(1, 0, np.inf), (2, 5, -np.inf), (2, 4097, 2e19)],
        [(0, 4999, 3e38)],
        [(1, 2, huge)],
        [],
    ):
        grads = [spoiled(plain, where) for _ in range(2)]
        results = []
        with np.errstate(all="ignore"):
            for made, there in ((optimizer, [OnDevice(g) for g in grads[0]]), (reference, grads[1])):
                try:
                    results.append(tuple(made.step(there, grad_scale=0.75, clip_norm=clip_norm)))
                except FloatingPointError as error:
                    results.append(str(error))
        assert str(results[0]) == str(results[1])
        assert all(same(a, b) for a, b in zip(grads[0], grads[1], strict=True))
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))
    assert optimizer.tensor_steps == reference.tensor_steps and optimizer.steps < 5


def test_skipping_waits_for_nothing(driver):
    """Two launches for the count, one that decides, one for the update; the coefficients of later steps are there."""
    optimizer = fastrms.Adam([OnDevice(numbers(5000)), OnDevice(numbers(3))], nonfinite="skip")
    grads = numbers(5000), numbers(3)
    optimizer.bind([OnDevice(grad) for grad in grads])
    for _ in range(2):
        optimizer.step()
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 4}
    grads[1][2] = np.inf
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 4} and optimizer.steps == 3
    grads[1][2] = 1
    optimizer.step(clip_norm=1.0)
    assert driver.census(lambda: optimizer.step(clip_norm=1.0)) == {"cuLaunchKernelEx": 7}
    optimizer.lr = 0.5
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 4, "cuMemcpyHtoDAsync_v2": 1} and optimizer.steps == 6
    writes = sum(driver.census(optimizer.step).get("cuMemcpyHtoDAsync_v2", 0) for _ in range(1100))
    assert writes <= 8 and optimizer.steps == 1106


def test_raising_waits_for_its_stream_alone(driver):
    optimizer = fastrms.Adam([OnDevice(numbers(5000)), OnDevice(numbers(3))], nonfinite="raise")
    grads = numbers(5000), numbers(3)
    optimizer.bind([OnDevice(grad) for grad in grads])
    optimizer.step()
    looking = {"cuLaunchKernelEx": 3, "cuMemcpyDtoHAsync_v2": 1, "cuStreamSynchronize": 1}
    assert driver.census(optimizer.step) == looking
    optimizer.step(clip_norm=1.0)
    twice = {"cuMemcpyDtoHAsync_v2": 2, "cuStreamSynchronize": 2}
    calls = driver.census(lambda: optimizer.step(clip_norm=1.0))
    assert calls == {"cuLaunchKernelEx": 6, "cuMemcpyHtoDAsync_v2": 1, **twice}  # the coefficients of this step


class Behind:
    """Steps on a device that is behind, and the same on the host: gradients that are finite or not, of arrays that change or
    stay, and all that may be changed between two steps."""

    def __init__(self, driver, seed, family=fastrms.Adam, dtypes="ff", **options):
        self.driver, self.random = driver, np.random.default_rng(seed)
        sizes = (1003, 5000) if "d" not in dtypes else (7, 4100)
        self.params, self.theirs = (
            [numbers(n, dtype=t, seed=n) for n, t in zip(sizes, dtypes, strict=True)] for _ in range(2)
        )
        self.options = {"nonfinite": "skip", **options}
        with np.errstate(all="ignore"):
            self.optimizer = family([OnDevice(p) for p in self.params], **self.options)
            self.reference = family(self.theirs, backend="numpy", **self.options)
        self.infos, self.kept = [], []

    def grads(self, absent=0.0, bad=0.4):
        made = [numbers(p.size, dtype=p.dtype, seed=self.random.integers(1 << 30)) for p in self.params]
        if self.random.random() < bad:
            made[self.random.integers(2)][self.random.integers(5)] = [np.nan, np.inf, -np.inf][self.random.integers(3)]
        if self.random.random() < absent:
            made[self.random.integers(2)] = None
        return made

    def step(self, grads, **said):
        ours = [None if g is None else g.copy() for g in grads]
        self.kept.append((ours, grads))
        info = self.optimizer.step([None if g is None else OnDevice(g) for g in ours], **said)
        with np.errstate(all="ignore"):
            self.infos.append((info, self.reference.step(grads, **said)))

    def check(self):
        for info, wanted in self.infos:
            assert repr(info) == repr(wanted) and info.applied == wanted.applied
        assert self.optimizer.steps == self.reference.steps
        assert self.optimizer.tensor_steps == self.reference.tensor_steps
        assert all(same(a, b) for a, b in zip(self.params, self.theirs, strict=True))
        for mine, yours in zip(*(made.state_dict()["tensors"] for made in (self.optimizer, self.reference)), strict=True):
            assert all(same(mine["state"][name], there) for name, there in yours["state"].items())
        for ours, theirs in self.kept:
            assert all(a is b is None or same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("family, dtypes, options", [
    (fastrms.Adam, "ff", {}), (fastrms.AdamW, "dd", {"weight_decay": 0.1}), (fastrms.RMSProp, "ff", {}),
    (fastrms.Adam, "fd", {}), (fastrms.RMSProp, "ff", {"bias_correction": "corrected", "momentum": 0.9}),
    (fastrms.RMSProp, "ff", {"state_format": "bf16"}), (fastrms.Adam, "ff", {"state_format": "q8"}),
])  # fmt: skip
def test_skipped_steps_of_a_device_that_is_behind(driver, family, dtypes, options, zero_grad):
    """Nothing is decided when the next steps are launched, whose numbers and coefficients the host cannot know; a step that
    no other knows of may ask for any of them."""
    clips = "d" not in dtypes or "f" not in dtypes
    both = Behind(driver, 5, family, dtypes, zero_grad=zero_grad, **options)
    with driver.later():
        for k in range(60):
            if k % 7 == 3:
                both.optimizer.lr = both.reference.lr = float(both.random.random())
            scale = 1.0 if k < 40 else 0.5 ** (k % 3)
            both.step(both.grads(), grad_scale=scale, clip_norm=1.0 if clips and k % 5 == 4 else None)
            if k == 30:
                driver.finish()
            if k in (20, 45):
                assert both.optimizer.steps == both.reference.steps
        assert len(driver.queue) > 40
    both.check()
    assert 20 < both.optimizer.steps < 50


def like_a_plateau(step):
    """A rate that does not depend on the step alone, as far as fastrms knows."""
    return 0.1 / (1 + step % 5)


class Programs(Behind):
    """Random programs: what may happen before a step, and how it is made, is drawn from `random`."""

    RATES = (
        0.0,
        0.5,
        like_a_plateau,
        fastrms.schedules.Cosine(0.5, 40, warmup=5),
        fastrms.schedules.Exponential(0.1, 0.5, 3),
    )
    KINDS = (
        ("ff", {}), ("ff", {"zero_grad": True}), ("dd", {}), ("fd", {}),
        ("ff", {"state_format": "bf16"}), ("ff", {"state_format": "q8", "zero_grad": True}),
    )  # fmt: skip

    def __init__(self, driver, seed):
        draw = np.random.default_rng([seed, 1])
        dtypes, options = self.KINDS[draw.integers(len(self.KINDS))]
        family = (fastrms.Adam, fastrms.AdamW, fastrms.RMSProp, fastrms.AdaGrad)[draw.integers(4)]
        super().__init__(driver, seed, family, dtypes, lr=self.RATES[draw.integers(len(self.RATES))], **options)
        self.clips = [None, None, 1.0, np.inf] if len(set(dtypes)) == 1 else [None]
        self.saved, self.both = None, (self.optimizer, self.reference)
        self.events = [
            self.set_rate,
            self.set_eps,
            self.ask_counts,
            self.save,
            self.load,
            driver.finish,
            self.ask,
            self.set_counts,
        ]

    def set_rate(self):
        self.optimizer.lr = self.reference.lr = self.RATES[self.random.integers(len(self.RATES))]

    def set_eps(self):
        for made in self.both:
            made.groups[0]["eps"] = 1e-3 if made.steps % 2 else 1e-4

    def ask_counts(self):
        assert self.optimizer.tensor_steps == self.reference.tensor_steps and self.optimizer.steps == self.reference.steps

    def save(self):
        self.saved = [made.state_dict() for made in self.both]

    def load(self):
        for made, saved in zip(self.both, self.saved or (), strict=False):
            made.load_state_dict(saved)

    def ask(self):
        if self.infos:
            info, wanted = self.infos[self.random.integers(len(self.infos))]
            assert repr(info) == repr(wanted)

    def set_counts(self):
        count = [0, 3, 2000][self.random.integers(3)]
        for made in self.both:
            made._copy([], [], steps=[count] * 3)

    def interrupted(self):
        """A step that an interrupt cuts off before the decision; nothing is made of it."""
        target, name = [(norm.Nonfinite, "count"), (deciding.Decision, "launch"), (deciding.Decision, "aim")][
            self.random.integers(3)
        ]

        def cut(*_):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as context, contextlib.suppress(KeyboardInterrupt):
            context.setattr(target, name, cut)
            self.step(self.grads())

    def step_anyhow(self):
        clip = self.clips[self.random.integers(len(self.clips))]
        self.step(self.grads(absent=0.2), grad_scale=[1.0, 1.0, 0.5][self.random.integers(3)], clip_norm=clip)


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_of_steps_that_may_be_skipped(driver, seed):
    both = Programs(driver, seed)
    with driver.later():
        for _ in range(40):
            if both.random.random() < 0.4:
                both.events[both.random.integers(len(both.events))]()
            if both.random.random() < 0.08:
                both.interrupted()
            both.step_anyhow()
    both.check()


def test_step_counts_that_are_set_back(driver):
    """As fastrms.torch does for state["step"]; the hyper-parameters stay the same."""
    both = Behind(driver, 9)
    with driver.later():
        for k in range(30):
            if k in (10, 20):
                both.optimizer._copy([], [], steps=[40 - 2 * k] * 3)
                both.reference._copy([], [], steps=[40 - 2 * k] * 3)
            if k == 15:
                both.optimizer.lr = both.reference.lr = 0.5
            both.step(both.grads())
    both.check()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_an_interrupt_before_a_decision(driver, monkeypatch, capturable, asked):
    """Nothing was launched, and later steps find what they have found themselves, whether or not the host has waited."""
    both = Behind(driver, 10)
    if capturable:
        both.optimizer = fastrms.Adam([OnDevice(p) for p in both.params], nonfinite="skip", capturable=True)
    both.step(both.grads(bad=0))

    def interrupted(handle):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(both.optimizer._plan._decision, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            both.optimizer.step([OnDevice(g) for g in both.grads()])
    assert not asked or both.optimizer.steps == 1
    with driver.later():
        for _ in range(9):
            both.step(both.grads())
    both.check()


@pytest.mark.parametrize("bad", [0, 1])
def test_an_interrupt_while_the_host_waits_for_a_count(driver, monkeypatch, bad):
    both, call_driver = Behind(driver, 10), device.call_driver
    both.step(both.grads(bad=0))
    grads = [spoiled(both.grads(bad=0), [(0, 3, np.nan)] * bad)[0], None]

    def interrupted(what, function, *arguments):
        if function == "cuStreamSynchronize":
            monkeypatch.setattr(device, "call_driver", call_driver)
            call_driver(what, function, *arguments)
            raise KeyboardInterrupt
        return call_driver(what, function, *arguments)

    with driver.later():
        monkeypatch.setattr(device, "call_driver", interrupted)
        with pytest.raises(KeyboardInterrupt):
            both.optimizer.step([g if g is None else OnDevice(g) for g in grads])
    with np.errstate(all="ignore"):
        both.reference.step(grads)
    both.check()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_an_interrupt_at_any_write_to_the_device(driver, monkeypatch, nonfinite, before):
    """Before it or after it: what the next step needs is written again, although the step before it had the same there."""
    write, at, cut = launching.write, 0, True
    options = {"nonfinite": nonfinite, "capturable": True}
    while cut:
        params, cut = [[numbers(n, seed=n) for n in (9, 300)] for _ in range(2)], False
        optimizer, reference = (
            fastrms.Adam(list(map(OnDevice, params[0])), **options),
            fastrms.Adam(params[1], nonfinite=nonfinite, backend="numpy"),
        )
        grads = [numbers(n, seed=n + 1) for n in (9, 300)]
        there, left = [OnDevice(grad) for grad in grads], at

        def interrupted(*arguments):
            nonlocal left, cut
            left, cut = left - 1, cut or left == 0
            if left != -1 or not before:
                write(*arguments)
            if left == -1:
                raise KeyboardInterrupt

        optimizer.step(there)
        with monkeypatch.context() as context:
            context.setattr(launching, "write", interrupted)
            context.setattr(deciding, "write", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                optimizer.step([there[0], None])
        reference.step(grads)
        if not cut:
            reference.step([grads[0], None])
        for _ in range(2):
            optimizer.step(there)
            reference.step(grads)
        assert all(same(a, b) for a, b in zip(*params, strict=True)), at
        at += 1
    assert at > 1


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_looks_at_gradients_looks_at_them_the_second_time(driver, monkeypatch, error):
    """Where there was no memory for it, or an interrupt: not at those of before."""
    both = Behind(driver, 3, fastrms.RMSProp)

    def fails(*arguments):
        raise error

    for bad in (0, 1):
        grads = both.grads(bad=bad)
        there = [OnDevice(grad.copy()) for grad in grads]
        with monkeypatch.context() as context:
            context.setattr(norm.Nonfinite, "aim", fails)
            with pytest.raises(error):
                both.optimizer.step(there)
        with np.errstate(all="ignore"):
            both.infos.append((both.optimizer.step(there), both.reference.step(grads)))
    both.check()


def test_a_thread_that_asks_for_counts_while_another_steps(driver, monkeypatch):
    """One that has read the counts before two steps, and one that asks when a step is expected and not yet launched."""
    optimizer, grads = fastrms.Adam(OnDevice(numbers(9)), nonfinite="skip"), (numbers(9), np.full(9, np.inf, np.float32))
    first, decision = optimizer.step(OnDevice(grads[0])), optimizer._plan._decision
    seen, launch, read, go = decision.seen.array, decision.launch, threading.Event(), threading.Event()

    class Slow:
        def __getitem__(self, at):
            found = seen[at]
            if threading.current_thread() is slow and not read.is_set():
                read.set()
                go.wait()
            return found

    def asked(handle):
        other = threading.Thread(target=lambda: first.applied)
        other.start()
        other.join()
        launch(handle)

    slow = threading.Thread(target=lambda: optimizer.steps)
    with monkeypatch.context() as context:
        context.setattr(decision.seen, "array", Slow())
        slow.start()
        read.wait()
        for _ in range(2):
            optimizer.step(OnDevice(grads[0]))
        assert optimizer.steps == 3
        go.set()
        slow.join()
        assert optimizer.steps == 3
        context.setattr(decision, "launch", asked)
        optimizer.step(OnDevice(grads[0]))
    infos = [optimizer.step(OnDevice(grad)) for grad in reversed(grads)]
    assert [info.applied for info in infos] == [False, True] and optimizer.steps == 5


def test_a_tensor_without_a_gradient_in_a_skipped_step(driver):
    both = Behind(driver, 6)
    with driver.later():
        for _ in range(40):
            both.step(both.grads(absent=0.3))
    both.check()
    assert len(set(both.optimizer.tensor_steps)) == 2 and both.optimizer.steps < 40


@pytest.mark.parametrize("family", [fastrms.Adam, fastrms.RMSProp])
def test_the_rates_of_skipped_steps_by_a_schedule(driver, family):
    """A schedule of the step alone is asked for all steps that may come; another one, or a number, takes its place."""
    both, schedules = Behind(driver, 8, family, lr=fastrms.schedules.Cosine(0.5, 40, warmup=5)), fastrms.schedules
    rates = {15: schedules.Exponential(0.1, 0.5, 3), 25: 0.125, 30: schedules.Cosine(0.3, 50, warmup=3)}
    with driver.later():
        for k in range(40):
            if k in rates:
                both.optimizer.lr = both.reference.lr = rates[k]
            if k == 20:
                both.optimizer.groups[0]["eps"] = both.reference.groups[0]["eps"] = 1e-3
            if k == 35:  # a number, and what makes other recipes
                for made in (both.optimizer, both.reference):
                    made.groups[0].update(lr=0.25, eps=1e-2)
            both.step(both.grads(), clip_norm=1.0 if k % 9 == 4 else None)
        assert len(driver.queue) > 60  # memory for more rows is allocated once, which waits
    both.check()
    assert both.optimizer.steps < 40


def test_skipped_steps_of_a_schedule_and_of_loaded_states(driver):
    both = Behind(driver, 7, lr=lambda step: 1.0 / (1 + step))
    with driver.later():
        for _ in range(9):
            both.step(both.grads())
        saved, there = both.optimizer.state_dict(), both.reference.state_dict()
        assert saved["steps"] == there["steps"] == both.reference.steps < 9
        for _ in range(9):
            both.step(both.grads())
        both.optimizer.load_state_dict(saved)
        both.reference.load_state_dict(there)
        both.step([np.full_like(p, np.nan) for p in both.params])
        for _ in range(9):
            both.step(both.grads())
    both.check()


def test_more_skipped_steps_than_coefficients_ahead(driver):
    """The host waits where more steps are undecided than it can write coefficients for; rows beyond the last one begin again
    at the first."""
    param, theirs = numbers(3), numbers(3)
    optimizer, reference = (
        fastrms.Adam(OnDevice(param), nonfinite="skip"),
        fastrms.Adam(theirs, nonfinite="skip", backend="numpy"),
    )
    grads = [numbers(3, seed=1), np.array([1, np.nan, 0], np.float32)]
    there, infos = [OnDevice(g) for g in grads], []
    with driver.later():
        for k in range(2300):
            infos.append(optimizer.step(there[k % 11 == 5]))
            reference.step(grads[k % 11 == 5])
            assert len(driver.queue) < 6 * launching.AHEAD
        assert len(driver.queue) > 500
    assert same(param, theirs) and optimizer.steps == reference.steps
    assert infos[-1].applied and not infos[2293].applied
    with pytest.raises(RuntimeError, match="not asked for within 1024 steps"):
        infos[100].applied  # noqa: B018
    assert repr(infos[100]).startswith("StepInfo(what this step found was not asked for")


def test_a_first_step_that_is_left_out(driver, monkeypatch):
    """Nothing of what stood in the memory of the coefficients is taken for some."""
    allocate = device.allocate

    def used(*arguments):
        made = allocate(*arguments)
        ctypes.memset(made.address, 0x3F, made.nbytes)
        return made

    monkeypatch.setattr(device, "allocate", used)
    both = Behind(driver, 11, fastrms.AdamW, "dd")
    for bad in (1, 0):
        both.step(both.grads(bad=bad))
    both.check()


@pytest.mark.parametrize("jump", [False, True])
def test_coefficients_after_many_steps_without_them(driver, monkeypatch, jump):
    """Of a launch for gradients in another format, or after step counts that were set; they stay in their memory."""
    param, theirs, write = numbers(3), numbers(3), launching.write
    optimizer, reference = (
        fastrms.Adam([x], nonfinite="skip", state_format="bf16", **more)
        for x, more in ((OnDevice(param), {}), (theirs, {"backend": "numpy"}))
    )

    def checked(address, array, handle):
        for made in optimizer._plan._launches.values():
            start, end = made.ahead.address, made.ahead.end
            assert not start <= address < end or (address + array.nbytes <= end and array.nbytes <= 65536)
        write(address, array, handle)

    monkeypatch.setattr(launching, "write", checked)
    grad, half = numbers(3, seed=1), np.zeros(3, np.uint16)
    for k in range(100):
        if jump and k == 80:
            for made in (optimizer, reference):
                made._copy([], [], steps=[5000, 5000])
        optimizer.step([OnDevice(grad)])
        reference.step([grad])
        for _ in range(1200 * (not jump and k == 90)):
            optimizer.step([fastrms.Stored(OnDevice(half), "bf16")])
            reference.step([fastrms.Stored(half, "bf16")])
    assert same(param, theirs) and optimizer.steps == reference.steps


@pytest.mark.parametrize("rate", [0.0, lambda step: 0.0], ids=["number", "callable"])
def test_a_rate_of_0_after_a_schedule(driver, rate):
    """It is the rate of the recipes of a plan that follows a schedule, whose coefficients are on the device already."""
    params, grad, schedule = [numbers(9), numbers(9)], numbers(9, seed=3), fastrms.schedules.Cosine(0.5, 40, warmup=5)
    there, bad = OnDevice(grad), np.full(9, np.nan, np.float32)
    optimizer = fastrms.Adam([OnDevice(params[0])], nonfinite="skip", lr=schedule)
    reference = fastrms.Adam([params[1]], nonfinite="skip", lr=schedule, backend="numpy")
    with driver.later(), np.errstate(all="ignore"):
        for k in range(8):
            if k == 7:
                optimizer.lr = reference.lr = rate
            optimizer.step([OnDevice(bad) if k == 1 else there])
            reference.step([bad if k == 1 else grad])
    assert same(*params)


TUPLE = False, None, 9


@pytest.mark.parametrize("use", [
    lambda info: info != TUPLE, lambda info: info == TUPLE, lambda info: False in info, lambda info: info + (1,),
    lambda info: (1,) + info, lambda info: info + info, lambda info: info * 2, lambda info: 2 * info,
    lambda info: info.count(False), lambda info: info.index(9), lambda info: info < (True,), lambda info: info >= (True,),
    lambda info: max(info, (False,)), lambda info: info == info, lambda info: {info: 1}[TUPLE],
    lambda info: [*reversed(info)],
    lambda info: info[1:], lambda info: info._replace(nonfinite=3), lambda info: repr(info._replace(nonfinite=3)),
    lambda info: info._asdict(), lambda info: info._make([1, 2, 3]), lambda info: pickle.loads(pickle.dumps(info)),
    copy.copy, copy.deepcopy, str, list, lambda info: len(info),
])  # fmt: skip
def test_a_step_info_is_a_tuple(driver, use):
    """Of what the device has found, whatever is done with it."""
    info = fastrms.Adam(OnDevice(numbers(9)), nonfinite="skip").step(OnDevice(np.full(9, np.nan, np.float32)))
    assert isinstance(info, fastrms.StepInfo) and use(info) == use(fastrms.StepInfo(*TUPLE))


def test_a_step_info_keeps_no_parameters(driver):
    arrays = [OnDevice(numbers(9)), OnDevice(numbers(9))]
    optimizer, seen = fastrms.Adam(arrays[0], nonfinite="skip"), [*map(weakref.ref, arrays)]
    with driver.later():
        info = optimizer.step(arrays.pop(), clip_norm=1.0)
    assert info.applied
    del optimizer, arrays
    gc.collect()
    assert [there() for there in seen] == [None, None] and info.nonfinite == 0 and info.grad_norm > 0


def test_launches_of_tensors_that_come_and_go(driver, monkeypatch):
    """Each set of tensors that share one has a launch, with memory; those of long ago are made again."""
    monkeypatch.setattr(planning, "KEPT", 3)
    params, random = [[numbers(5, seed=k) for k in range(6)] for _ in range(2)], np.random.default_rng(2)
    optimizer, reference = (
        fastrms.Adam(list(map(OnDevice, params[0])), nonfinite="skip"),
        fastrms.Adam(params[1], nonfinite="skip", backend="numpy"),
    )
    for k in range(20):
        grads = [numbers(5, seed=k + j) if random.random() < 0.5 else None for j in range(6)]
        optimizer.step([g if g is None else OnDevice(g) for g in grads])
        reference.step(grads)
        assert len(optimizer._plan._launches) <= 3
    assert all(same(a, b) for a, b in zip(*params, strict=True)) and optimizer.tensor_steps == reference.tensor_steps


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("grad", [None, numbers(0)], ids=["none", "empty"])
def test_a_first_step_that_clips_no_gradients(driver, grad, nonfinite):
    """It says what the host says, and a later one clips."""
    params = [numbers(0 if grad is not None else 3) for _ in range(2)]
    optimizer = fastrms.Adam([OnDevice(params[0])], nonfinite=nonfinite)
    reference = fastrms.Adam([params[1]], nonfinite=nonfinite, backend="numpy")
    given = [grad], [grad if grad is None else OnDevice(grad)]
    assert reference.step(given[0], clip_norm=1.0) == tuple(optimizer.step(given[1], clip_norm=1.0))
    later = numbers(params[0].size, seed=1)
    assert optimizer.step([OnDevice(later)], clip_norm=1.0).grad_norm == reference.step([later], clip_norm=1.0).grad_norm
    assert same(*params)


def test_a_capture_cannot_wait_for_what_is_not_finite(driver):
    optimizer = fastrms.RMSProp(OnDevice(numbers(9)), nonfinite="raise", capturable=True, stream=0x7770)
    optimizer.bind(OnDevice(numbers(9)))
    optimizer.step()
    assert "nonfinite='raise' cannot wait" in captured(driver, optimizer.step)
    optimizer = fastrms.Adam(
        [OnDevice(numbers(9))] * 1 + [OnDevice(numbers(3))], nonfinite="skip", capturable=True, stream=0x7770
    )
    optimizer.bind([OnDevice(numbers(9)), None])
    optimizer.step()
    assert "bind one for each tensor" in captured(driver, optimizer.step)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_captured_graph_that_skips(driver, clip_norm):
    """Each launch of it decides anew, with the coefficients that its step has then, also before the last one is decided."""
    params, theirs = ([numbers(9), numbers(1003, seed=1)] for _ in range(2))
    grads = numbers(9, seed=2), numbers(1003, seed=3)
    options = {"nonfinite": "skip", "zero_grad": True, "weight_decay": 0.1}
    optimizer = fastrms.AdamW([OnDevice(p) for p in params], capturable=True, stream=0x7770, **options)
    reference = fastrms.AdamW(theirs, backend="numpy", **options)
    optimizer.bind([OnDevice(g) for g in grads])
    for made, there in ((optimizer, None), (reference, [g.copy() for g in grads])):
        made.step(there, clip_norm=clip_norm)
    with driver.later():
        infos = []
        graph = driver.capture(lambda: infos.append(optimizer.step(clip_norm=clip_norm)))
        for k in range(30):
            if k % 4 == 1:
                optimizer.lr = reference.lr = 0.1 / (1 + k)
            new = spoiled([numbers(g.size, seed=10 + k) for g in grads], [(1, 700, np.nan)] * (k % 3 == 2))
            optimizer.advance()
            for grad, values in zip(grads, new, strict=True):  # as the backward pass in the graph
                driver.do(partial(np.copyto, grad, values.copy()))
            driver.replay(graph)
            with np.errstate(all="ignore"):
                wanted = reference.step(new, clip_norm=clip_norm)
        assert len(driver.queue) > 150
        assert repr(infos[0]) == repr(wanted)  # of the last launch
        assert not wanted.applied
    assert optimizer.steps == reference.steps == 21
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))
    assert all((g == 0).all() for g in grads)


def test_a_graph_that_skips_follows_a_schedule(driver):
    """RMSProp has one row of coefficients for all steps, with a schedule one for each: its kernels read the same."""
    params, grad = [numbers(9), numbers(9)], numbers(9, seed=2)
    optimizer = fastrms.RMSProp(OnDevice(params[0]), nonfinite="skip", capturable=True, stream=0x7770)
    reference = fastrms.RMSProp(params[1], nonfinite="skip", backend="numpy")
    optimizer.bind(OnDevice(grad))
    optimizer.step()
    reference.step(grad)
    graph = driver.capture(optimizer.step)
    rates = {1: fastrms.schedules.Cosine(0.5, 40, warmup=5), 3: 0.25, 4: fastrms.schedules.Cosine(0.3, 40, warmup=5)}
    for k in range(7):
        if k in rates:
            optimizer.lr = reference.lr = rates[k]
        grad[0] = np.nan if k in (2, 5) else k
        optimizer.advance()
        driver.replay(graph)
        with np.errstate(all="ignore"):
            reference.step(grad)
        assert same(*params)
    assert optimizer.steps == reference.steps == 6


def test_a_graph_that_skips_and_advance_out_of_step(driver):
    """Where an advance() is forgotten, a step has coefficients of before; the counts are right, and no wait is for ever."""
    param, grad, infos = numbers(9), numbers(9, seed=2), []
    optimizer = fastrms.RMSProp(OnDevice(param), nonfinite="skip", capturable=True, stream=0x7770)
    optimizer.bind(OnDevice(grad))
    optimizer.step()
    graph = driver.capture(lambda: infos.append(optimizer.step()))
    for _ in range(3):
        driver.replay(graph)
    optimizer.advance()
    driver.replay(graph)
    grad[0] = np.nan
    assert optimizer.steps == 5 and optimizer.step().nonfinite == 1
    with pytest.raises(RuntimeError, match="was called 1023 times more often than a graph was launched"):
        for _ in range(1100):
            optimizer.advance()
    driver.replay(graph)
    assert not infos[0].applied  # what the last launch has found
    grad[0] = 0
    assert optimizer.step().applied and infos[0].applied and optimizer.steps == 6


@pytest.mark.parametrize("zero_grad", [False, True])
def test_a_streamed_step_is_a_launch_per_tensor(driver, cupy, zero_grad):
    """In any order; the scratch gradient is the same for all; a step of all tensors follows."""
    sizes = [33, 0, 1003, 5]
    ours, theirs, grads = ([numbers(size, seed=j + k) for k, size in enumerate(sizes)] for j in (0, 0, 9))
    optimizer = fastrms.Adam([OfCuPy(x) for x in ours], zero_grad=zero_grad, stream=0x8880)
    reference = fastrms.Adam(theirs, backend="numpy", zero_grad=zero_grad)
    for order in ((3, 0, 1, 2), (2, 0)):
        with optimizer.streaming() as s, reference.streaming() as r:
            for k in order:
                scratch = [grads[k].copy(), grads[k].copy()]
                driver.waits()
                grad = OfCuPy(scratch[0])
                calls = driver.census(lambda s=s, k=k, grad=grad: s.step(k, grad))
                r.step(k, scratch[1])
                assert calls.get("cuLaunchKernelEx", 0) == (sizes[k] > 0) and same(*scratch)
                assert driver.waits() == [(0x8880, 0x7770), (0x7770, 0x8880)]
                assert not any("Synchronize" in name for name in calls)
    assert optimizer.tensor_steps == reference.tensor_steps == [2, 1, 2, 1]
    optimizer.step([OfCuPy(grad.copy()) for grad in grads])
    reference.step([grad.copy() for grad in grads])
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    with optimizer.streaming() as s:
        assert "tensor by tensor" in captured(driver, lambda: s.step(0, OfCuPy(numbers(33))))
    assert optimizer.steps == reference.steps == 3


def test_jax_arrays_are_refused_with_the_reason(driver):
    jax = type("Array", (OnDevice,), {"__module__": "jaxlib.xla_extension"})
    with pytest.raises(TypeError, match="params is a JAX array: JAX arrays are immutable"):
        fastrms.RMSProp(jax(numbers(8)))


SCALED = [
    (1e-3, 1.0),
    (1.0, 1.0),
    (1e12, 1.0),
    (1.0, np.inf),
    (1.0, 1e-30),
    (0.0, 1.0),
    (3e37, 1e-7),
    (np.nan, 1.0),
    (np.nan, np.inf),
]
OF_DOUBLES = [  # and a clip_norm
    (1e160, 1.0),
    (1e307, 1e300),
    (1e307, 1e-300),
    (1e-160, 1e-170),
    (1e-310, 1e-320),
    (np.inf, 1.0),
    ("apart", 1.0),
]


GENERAL = {"clip_value": 0.5}
CLIPPED = [
    *((*case, np.float32, options) for case in SCALED for options in ({}, GENERAL, {"maximize": True})),
    *((*case, np.float64, {}) for case in SCALED),
    *((*case, np.float64, GENERAL) for case in OF_DOUBLES),
    (1e160, 1.0, np.float64, {"maximize": True}),
]


@pytest.mark.parametrize("scale, clip_norm, dtype, options", CLIPPED)
def test_clip_norm_has_the_bits_of_the_host(driver, scale, clip_norm, dtype, options):
    """The norm and the update, for tensors of one block, of one segment, and of more; the last is missing once.  "apart":
    the blocks have magnitudes far from each other, and the sum of their squares is beyond a double."""
    sizes = [1, 4096, 5000, 0, 300_000, 7]
    params, grads = ([numbers(n, seed=seed + k, dtype=dtype) for k, n in enumerate(sizes)] for seed in (0, 9))
    if scale == "apart":
        grads = [g * dtype(10.0 ** (300 - 150 * k)) for k, g in enumerate(grads)]
        grads[4][7] = 1e250
    elif np.isfinite(scale):
        grads = [(g * dtype(scale)).astype(dtype) for g in grads]
    else:
        grads[2][3] = scale
    large = scale == "apart" or 1e30 < scale < np.inf
    if large and dtype is np.float32 and not options.get("clip_value"):
        return  # the neutral form has one factor in float32: see docs/cuda.md
    theirs = [p.copy() for p in params]
    optimizer = fastrms.Adam([OnDevice(p) for p in params], **options)
    reference = fastrms.Adam(theirs, backend="numpy", **options)
    for count in (6, 5, 6):
        given = [*grads[:count], *[None] * (6 - count)]
        there = [None if g is None else OnDevice(g) for g in given]
        ours = optimizer.step(there, grad_scale=0.75, clip_norm=clip_norm)
        want = reference.step(given, grad_scale=0.75, clip_norm=clip_norm)
        assert same(np.array(ours.grad_norm), np.array(want.grad_norm)) and tuple(ours)[2] is None and ours.applied
    assert all(same(a, b) for a, b in zip(params, theirs, strict=True))
    assert optimizer.tensor_steps == reference.tensor_steps


def test_a_clipped_step_waits_for_nothing(driver):
    """Three launches for the norm, one for the update; a plain step afterwards is as before."""
    ours, theirs, grad = numbers(5000), numbers(5000), numbers(5000, seed=1)
    for capturable in (False, True):
        optimizer = fastrms.RMSProp(OnDevice(ours), capturable=capturable)
        reference = fastrms.RMSProp(theirs, backend="numpy")
        optimizer.bind(OnDevice(grad))
        first = optimizer.step(grad_scale=0.5, clip_norm=0.5)
        optimizer.step(clip_norm=0.25)
        calls = driver.census(lambda optimizer=optimizer: optimizer.step(clip_norm=0.25))
        assert calls == {"cuLaunchKernelEx": 4}
        want = [
            reference.step(grad, grad_scale=scale, clip_norm=clip).grad_norm
            for scale, clip in ((0.5, 0.5), (1.0, 0.25), (1.0, 0.25))
        ]
        assert first.grad_norm == want[0] and first[1] == want[0]
        optimizer.step()
        assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 1}
        optimizer.step(clip_norm=0.25)
        for clip in (None, None, 0.25):
            reference.step(grad, clip_norm=clip)
        assert same(ours, theirs)


def test_a_factor_that_float32_holds_badly(driver):
    """The neutral form has one factor: close to the host, though not its bits."""
    ours, theirs, grad = numbers(5000), numbers(5000), numbers(5000, seed=1) * np.float32(1e33)
    fastrms.RMSProp(OnDevice(ours), lr=1e-4).step(OnDevice(grad), clip_norm=1e-4)
    fastrms.RMSProp(theirs, lr=1e-4, backend="numpy").step(grad, clip_norm=1e-4)
    assert np.allclose(ours, theirs, rtol=1e-4)


def test_a_graph_keeps_its_grad_scale(driver):
    ours, theirs, grad = numbers(99), numbers(99), numbers(99, seed=1)
    optimizer = fastrms.Adam(OnDevice(ours), capturable=True, stream=0x7770)
    reference = fastrms.Adam(theirs, backend="numpy")
    optimizer.bind(OnDevice(grad))
    optimizer.step(grad_scale=0.25)
    graph = driver.capture(lambda: optimizer.step(grad_scale=0.25))
    optimizer.advance()
    driver.replay(graph)
    for _ in range(2):
        reference.step(grad, grad_scale=0.25)
    assert same(ours, theirs)


def test_a_norm_is_there_for_a_while(driver):
    optimizer = fastrms.RMSProp(OnDevice(numbers(3)))
    optimizer.bind(OnDevice(numbers(3)))
    info = optimizer.step(clip_norm=1.0)
    driver.library.double_hook(None)
    for _ in range(norm.SLOTS - 1):
        optimizer.step(clip_norm=1.0)
    assert info.grad_norm > 0
    optimizer.step(clip_norm=1.0)
    with pytest.raises(RuntimeError, match="was not asked for within 1024 steps"):
        _ = info.grad_norm
    driver.library.double_hook(driver.hook)


def test_clip_norm_in_a_graph(driver):
    ours, theirs, grad, calls = numbers(999), numbers(999), numbers(999, seed=1), {}
    optimizer = fastrms.Adam(OnDevice(ours), capturable=True, stream=0x7770)
    reference = fastrms.Adam(theirs, backend="numpy")
    optimizer.bind(OnDevice(grad))
    optimizer.step()
    assert "make one step" in captured(driver, lambda: optimizer.step(clip_norm=0.5))
    optimizer.step(grad_scale=0.75, clip_norm=0.5)
    step = partial(optimizer.step, grad_scale=0.75, clip_norm=0.5)
    graph = driver.capture(lambda: calls.update(driver.census(step)))
    assert calls == {"cuStreamIsCapturing": 1, "cuLaunchKernelEx": 4} and optimizer.steps == 2
    for _ in range(3):
        optimizer.advance()
        driver.replay(graph)
    reference.step(grad)
    for _ in range(4):
        reference.step(grad, grad_scale=0.75, clip_norm=0.5)
    assert same(ours, theirs) and optimizer.steps == 5


def test_an_own_rule_is_clipped(driver):
    from test_own_rules import Named

    ours, theirs, grads = [[numbers(33, seed=k) * 1e15 for k in range(3)] for _ in range(3)]
    grads = [(g * np.float32(1e22)).astype(np.float32) for g in grads]
    optimizer, reference = Named([OnDevice(x) for x in ours]), Named(theirs, backend="numpy")
    for _ in range(2):
        optimizer.step([OnDevice(g) for g in grads], clip_norm=1e-7)
        reference.step(grads, clip_norm=1e-7)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_launch_that_fails_raises_and_counts_nothing(driver):
    optimizer = fastrms.RMSProp(OnDevice(numbers(8)))
    driver.fail = 700
    with pytest.raises(RuntimeError, match="launching fastrms_rmsprop_neutral_float32 failed"):
        optimizer.step(OnDevice(numbers(8)))
    assert optimizer.steps == 0


def test_check_waits_for_the_step(driver):
    optimizer = fastrms.RMSProp(OnDevice(numbers(8)), check=True)
    optimizer.bind(OnDevice(numbers(8)))
    assert driver.census(optimizer.step) == {"cuLaunchKernelEx": 1, "cuStreamSynchronize": 1}


def test_a_kernel_is_compiled_once_and_kept(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    arguments = "adagrad", False, np.dtype(np.float32), kernel.Kind(), (12, 0)
    made = _compiled.__wrapped__(*arguments)
    monkeypatch.setattr(compiler, "compile_ptx", None)
    assert _compiled.__wrapped__(*arguments) == made and made.cubin[:4] == b"\x7fELF"


# storage formats


def on_device(x):
    """What stored() gave as an array in device memory."""
    return fastrms.Stored(OnDevice(x.array), x.format) if isinstance(x, fastrms.Stored) else OnDevice(x)


class Pair:
    """An optimizer on the device and one of NumPy with the same options, on tensors of the same numbers."""

    SIZES = (1003, 0, 5, 257)

    def __init__(self, make, kind, sizes=SIZES, **options):
        param, master, copy = PARAMS[kind]
        self.sizes, self.seed = sizes, 50
        self.params, self.copies = ([self.made(name or "bf16") for _ in range(2)] for name in (param, copy))
        options |= {"master": master} if master else {}
        options = options if param == "float32" else {"rounding": "stochastic", **options}
        cuda = {name: options.pop(name) for name in ("capturable", "stream") if name in options}
        (mine, theirs), copies = self.params, self.copies if copy else [None] * 2
        there = copies[0] and [on_device(x) for x in copies[0]]
        self.optimizer = make([on_device(x) for x in mine], param_copy=there, **options, **cuda)
        self.reference = make(theirs, param_copy=copies[1], backend="numpy", **options)

    def made(self, name, first=0):
        return [stored(name, numbers(size, seed=first + k)) for k, size in enumerate(self.sizes)]

    def grads(self, name="bf16"):
        """Two equal lists."""
        self.seed += 10
        return self.made(name, self.seed), self.made(name, self.seed)

    def step(self, name="bf16", without=(), **more):
        mine, theirs = ([None if k in without else g for k, g in enumerate(grads)] for grads in self.grads(name))
        infos = [self.optimizer.step([None if g is None else on_device(g) for g in mine], **more),
                 self.reference.step(theirs, **more)]  # fmt: skip
        assert tuple(infos[0]) == tuple(infos[1])
        return mine, theirs

    def same(self):
        for mine, theirs in (self.params, self.copies):
            assert all(np.array_equal(raw(a), raw(b)) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(self.optimizer._tensors, self.reference._tensors, strict=True):
            for name, flat in saved_formats.kept(theirs).items():
                assert np.array_equal(raw(saved_formats.kept(mine)[name].to_host()), raw(flat)), name
        assert self.optimizer.tensor_steps == self.reference.tensor_steps


@pytest.mark.parametrize("kind, state_format", [*zip(PARAMS, [None, "bf16", "fp16", "q8"] * 3, strict=False)])
def test_formats_have_the_bits_of_the_host(driver, kind, state_format):
    """Steps with gradients of all formats, clipped, scaled and without some tensors."""
    pair = Pair(fastrms.Adam, kind, state_format=state_format, seed=2**64 - 1)
    pair.step("bf16")
    pair.step("fp16", without=(0, 2), grad_scale=0.75, clip_norm=0.5)
    pair.step("bf16")  # whose step counts differ now
    pair.same()


def test_tensors_in_one_format_are_one_driver_call(driver):
    pair = Pair(fastrms.RMSProp, "float32+bf16", state_format="bf16")
    mine, theirs = pair.grads()
    pair.optimizer.bind([on_device(g) for g in mine])
    pair.reference.bind(theirs)
    for _ in range(3):
        calls = driver.census(pair.optimizer.step)
        pair.reference.step()
    assert calls == {"cuLaunchKernelEx": 1}
    pair.same()


@pytest.mark.parametrize("state_format", ["bf16", "q8"])
def test_formats_in_a_graph(driver, state_format):
    """advance() writes the keys of the random numbers of the next step, too."""
    pair = Pair(fastrms.Adam, "bf16-split8+bf16", state_format=state_format, capturable=True, stream=0x7770)
    mine, theirs = pair.grads()
    pair.optimizer.bind([on_device(g) for g in mine])
    pair.reference.bind(theirs)
    pair.optimizer.step()
    graph = driver.capture(pair.optimizer.step)
    for _ in range(2):
        pair.optimizer.advance()
        driver.replay(graph)
    for _ in range(3):
        pair.reference.step()
    pair.same()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_halves_that_are_not_finite(driver, nonfinite):
    pair = Pair(fastrms.Adam, "bf16", state_format="bf16", nonfinite=nonfinite, zero_grad=nonfinite == "skip")
    for name, infinite in (("bf16", 0x7F80), ("fp16", 0x7E01), ("float32", np.nan), ("bf16", None)):
        grads, results = pair.grads(name), []
        for optimizer, there in ((pair.optimizer, grads[0]), (pair.reference, grads[1])):
            if infinite is not None:
                (there[2] if name == "float32" else raw(there[2]))[3] = infinite
            try:
                results.append(str(optimizer.step([on_device(g) if optimizer is pair.optimizer else g for g in there])))
            except FloatingPointError as error:
                results.append(str(error))
        assert results[0] == results[1] and all(np.array_equal(raw(a), raw(b)) for a, b in zip(*grads, strict=True))
    pair.same()
    assert pair.optimizer.steps == 1


@pytest.mark.parametrize("state_format", ["fp16", "q8"])
def test_formats_in_a_streamed_step(driver, state_format):
    pair = Pair(fastrms.Adam, "bf16-float32", state_format=state_format, zero_grad=True)
    for order in ((3, 0, 1, 2), (2, 0)):
        mine, theirs = pair.grads("fp16")
        with pair.optimizer.streaming() as s, pair.reference.streaming() as r:
            for k in order:
                s.step(k, on_device(mine[k]))
                r.step(k, theirs[k])
    pair.step()
    pair.same()


@pytest.mark.parametrize("kind", ["bf16-split16", "float32", "fp16-float32"])
@pytest.mark.parametrize("state_format", ["bf16", "q8"])
def test_formats_are_saved_and_loaded(driver, kind, state_format, tmp_path):
    """Between the device and the host in both ways, seed included; and converted."""
    pair, other = (Pair(fastrms.Adam, kind, state_format=state_format, seed=seed) for seed in (3, 4))
    pair.step()
    saved = pair.optimizer.state_dict()
    for mine, theirs in zip([*pair.params[0], *pair.params[1]], [*other.params[0], *other.params[1]], strict=True):
        raw(theirs)[:] = raw(mine)
    other.optimizer.load_state_dict(pair.reference.state_dict())
    other.reference.load_state_dict(saved)
    for both in (pair, other):
        both.seed = 200
        both.step()
        both.same()
    assert all(np.array_equal(raw(a), raw(b)) for a, b in zip(pair.params[0], other.params[0], strict=True))
    found = np.asarray(pair.optimizer.state["exp_avg"][0])
    assert found.dtype == np.float32 and np.array_equal(found, np.asarray(pair.reference.state["exp_avg"][0]))
    if kind == "float32":
        plain = fastrms.Adam([OnDevice(numbers(size)) for size in pair.sizes])
        plain.load_state_dict(saved, convert=state_format)


@pytest.mark.parametrize("state_format", [None, "bf16", "fp16", "q8"])
@pytest.mark.parametrize("param", ["float32", "bf16"])
def test_calls_on_raw_arrays_in_formats(driver, param, state_format):
    """init_state() makes states on the device; the bits are those of the host."""
    given, grad = [stored(param, numbers(259)) for _ in range(2)], stored("fp16", numbers(259, seed=1))
    copies = [stored("bf16", np.zeros(259, np.float32)) for _ in range(2)]
    there = on_device(given[0])
    states = [fastrms.init_state("rmsprop", x, initial_value=1.0, state_format=state_format) for x in (there, given[1])]
    said = {"rounding": "stochastic"} if param == "bf16" else {}
    for step in (1, 2):
        fastrms.rmsprop(there, on_device(grad), **states[0], step=step, param_copy=on_device(copies[0]), **said)
        fastrms.rmsprop(given[1], grad, **states[1], step=step, param_copy=copies[1], backend="numpy", **said)
    assert np.array_equal(raw(given[0]), raw(given[1])) and np.array_equal(raw(copies[0]), raw(copies[1]))
    flat = states[0]["square_avg"]
    assert np.array_equal(raw(getattr(flat, "array", flat).to_host()), raw(states[1]["square_avg"]))


def test_what_is_wrong_with_formats_is_refused_before_any_launch(driver):
    w, g, half = numbers(300), numbers(300), stored("bf16", numbers(300))
    driver.launches.clear()
    with pytest.raises(TypeError, match="params has dtype uint16; fastrms updates float32 and float64"):
        fastrms.Adam(OnDevice(half.array))
    with pytest.raises(TypeError, match=r"say which numbers its bits are: fastrms.Stored\(params, 'bf16'\)"):
        fastrms.Adam(OnDevice(half.array), rounding="stochastic")
    with pytest.raises(TypeError, match="params has dtype bf16: say how it is updated, by master='float32'"):
        fastrms.Adam(on_device(half))
    with pytest.raises(ValueError, match="cannot have rounding='nearest'"):
        fastrms.Adam(OnDevice(w), state_format="q8", rounding="nearest")
    with pytest.raises(TypeError, match="is in host memory; backend='cuda'"):
        fastrms.Adam(OnDevice(w), param_copy=half)
    with pytest.raises(ValueError, match="overlap in memory"):
        fastrms.Adam(OnDevice(w), param_copy=fastrms.Stored(OnDevice(w.view(np.uint16)[:300]), "bf16"))
    with pytest.raises(TypeError, match="array is an OnDevice; Stored takes an array of uint16 or int16"):
        fastrms.Stored(OnDevice(w), "bf16")
    state = fastrms.init_state("adagrad", OnDevice(w), state_format="q8")
    with pytest.raises(ValueError, match="a state in q8 of 300 elements has shape"):
        fastrms.adagrad(OnDevice(w), OnDevice(g), state["sum"][:-1], step=1)
    state["sum"].fill(255)
    with pytest.raises(ValueError, match="sum has damaged blocks"):
        fastrms.adagrad(OnDevice(w), OnDevice(g), **state, step=1)
    assert not driver.launches


def test_gradients_of_several_formats_in_one_step(driver):
    """The sums of all runs of tensors with one format, in their order; one memory that is bf16 and then fp16."""
    pair = Pair(fastrms.RMSProp, "float32", sizes=(5000, 7, 4097, 3, 9000), state_format="bf16")
    names = ["bf16", "bf16", "fp16", "float32", "bf16"]
    halves = [stored(name, numbers(size, seed=k)) for k, (name, size) in enumerate(zip(names, pair.sizes, strict=True))]
    there = [on_device(x) for x in halves]
    for grads, given in ((halves, there), ([None, *halves[1:]], [None, *there[1:]]), (halves, there)):
        infos = pair.optimizer.step(given, clip_norm=0.5), pair.reference.step(grads, clip_norm=0.5)
        assert infos[0].grad_norm == infos[1].grad_norm
        pair.optimizer.step(given)
        pair.reference.step(grads)
    pair.same()  # random numbers depend on the count of updates of a tensor, though the coefficients do not
    as_fp16 = [raw(halves[0]).view(np.float16), *halves[1:]]
    pair.optimizer.step([on_device(x) for x in as_fp16])
    pair.reference.step(as_fp16)
    pair.same()
