"""FlatBuffer: views that stay in it, placement, huge pages, the same bits as separate arrays; groups by name pattern."""

import copy
import enum
import mmap
import multiprocessing.shared_memory
import multiprocessing.sharedctypes
import pickle
import sys
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, DTYPES, bits, wild_values
from test_own_rules import Lion
from test_placement import address

import fastrms
from fastrms.memory import flat as flat_module
from fastrms.memory import placement

SHAPES = {"w1": (7, 3), "w1.bias": (7,), "scale": (), "none": (0, 4), "w2": (1003,), "w2.bias": (1,), 3: (2, 1, 5)}
NO_DECAY = {"*.bias": {"weight_decay": 0.0}}


def values(seed, dtype=np.float32, shapes=SHAPES):
    """Named arrays of all magnitudes, with NaN, infinities and subnormals."""
    return {
        name: wild_values(max(1, int(np.prod(shape))), np.dtype(dtype), seed + k)[: int(np.prod(shape))].reshape(shape)
        for k, (name, shape) in enumerate(shapes.items())
    }


def without_nan(arrays):
    """The same without NaN, and without the largest numbers: no state of theirs is NaN, which load_state_dict() refuses."""
    return {name: np.where(np.abs(array) < 1e15, array, 1).astype(array.dtype) for name, array in arrays.items()}


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def filled(params, grads):
    flat = fastrms.FlatBuffer.like(params)
    for name, grad in grads.items():
        flat.grads[name][...] = grad
    return flat


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and np.array_equal(bits(a[k]), bits(b[k])) for k in a
    )


# the buffer


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_the_buffer(dtype):
    """Any shape, C order, no gaps, both ways."""
    flat = fastrms.FlatBuffer(SHAPES, dtype)
    start = 0
    for name, shape in SHAPES.items():
        for whole, views in ((flat.data, flat.params), (flat.grad, flat.grads)):
            view = views[name]
            assert (view.shape, view.dtype) == (shape, dtype) and view.flags.c_contiguous and not view.any()
            assert address(view) == address(whole) + start * dtype.itemsize or not view.size
            view[...] = start + 1
            assert (whole[start : start + view.size] == start + 1).all()
        start += view.size
    assert flat.data.shape == flat.grad.shape == (start,) and flat.data.dtype == dtype
    assert list(flat.params) == list(flat.grads) == list(SHAPES) and len(flat.params) == len(SHAPES)
    assert repr(flat) == f"<FlatBuffer of {len(SHAPES)} array(s), {start} {dtype}>" and "'w2': (1003,)" in repr(flat.params)


def test_like_copies_values_in_any_layout():
    given = {"c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "0d": np.array(7.0)}
    given["strided"] = np.arange(12.0)[::2]
    flat = fastrms.FlatBuffer.like(given)
    assert same(dict(flat.params), given) and not flat.grad.any()
    flat.data += 1
    assert given["c"][0, 0] == 0
    listed = fastrms.FlatBuffer.like([np.ones(2, np.float32), memoryview(np.zeros((1, 1), np.float32))])
    assert list(listed.params) == [0, 1] and listed.data.tolist() == [1, 1, 0]
    assert [view.shape for view in fastrms.FlatBuffer([3, (2, 2), [1, 2], ()]).params.values()] == [(3,), (2, 2), (1, 2), ()]


class OfJax:
    """As an array of JAX, whose type has the interface of device arrays wherever its numbers are."""

    def __init__(self, array):
        self.__array_interface__, self.array = array.__array_interface__, array

    @property
    def __cuda_array_interface__(self):
        raise AttributeError


OfJax.__module__ = "jaxlib._jax"


def test_like_takes_arrays_of_jax_in_host_memory():
    given = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    flat = fastrms.FlatBuffer.like({name: OfJax(x) for name, x in given.items()})
    assert all(np.array_equal(flat.params[name], x) for name, x in given.items())
    jax = pytest.importorskip("jax")
    assert np.array_equal(fastrms.FlatBuffer.like([jax.numpy.ones(3)]).data, np.ones(3))


class Broken:
    def __dlpack_device__(self):
        raise RuntimeError("x")


@pytest.mark.parametrize("make, name", [
    (lambda x: fastrms.FlatBuffer.like({"w": x}), r"params\['w'\]"),
    (lambda x: fastrms.FlatBuffer([3], grad=x), "grad"),
])  # fmt: skip
def test_an_array_that_cannot_say_where_it_lies_is_named(make, name):
    with pytest.raises(TypeError, match=rf"^{name} is a Broken whose __dlpack_device__ fails"):
        make(Broken())


def test_like_takes_torch_tensors():
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 2)
    flat = fastrms.FlatBuffer.like(dict(layer.named_parameters()))
    assert list(flat.params) == ["weight", "bias"]
    assert np.array_equal(flat.params["weight"], layer.weight.detach().numpy())


@pytest.mark.parametrize("make, error, words", [
    (lambda: fastrms.FlatBuffer.like({"w": np.ones(2), "b": np.ones(2, np.float32)}), TypeError,
     r"params\['b'\] has dtype float32, params\['w'\] has float64"),
    (lambda: fastrms.FlatBuffer.like({"w": np.ones(2, int)}), TypeError, r"params\['w'\] .*float32 or float64"),
    (lambda: fastrms.FlatBuffer.like({"w": np.ones(2, ">f4")}), TypeError, r"params\['w'\] .*float32 or float64"),
    (lambda: fastrms.FlatBuffer.like({"w": [1.0]}), TypeError, r"params\['w'\] is a list"),
    (lambda: fastrms.FlatBuffer.like({"w": np.ma.ones(2)}), TypeError, r"params\['w'\] is a masked"),
    (lambda: fastrms.FlatBuffer.like(np.ones(2)), TypeError, "params is an ndarray"),
    (lambda: fastrms.FlatBuffer.like({}), ValueError, "params is empty"),
    (lambda: fastrms.FlatBuffer([]), ValueError, "shapes is empty"),
    (lambda: fastrms.FlatBuffer({"w": (3, -1)}), ValueError, r"shapes\['w'\]=\(3, -1\)"),
    (lambda: fastrms.FlatBuffer({"w": (3, 1.5)}), TypeError, r"shapes\['w'\]=\(3, 1.5\)"),
    (lambda: fastrms.FlatBuffer({"w": "3"}), TypeError, r"shapes\['w'\]='3'"),
    (lambda: fastrms.FlatBuffer({"w": 3}, np.float16), TypeError, "dtype=float16"),
    (lambda: fastrms.FlatBuffer({"w": 3}, "bf16"), TypeError, "dtype='bf16' must be np.float32, np.float64 or ml"),
])  # fmt: skip
def test_what_cannot_be_a_flat_buffer(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_nothing_can_leave_the_buffer():
    flat = fastrms.FlatBuffer(SHAPES)
    for views in (flat.params, flat.grads):
        with pytest.raises(TypeError, match=r"\['w1'\] is a view .*\['w1'\]\[\.\.\.\] = x"):
            views["w1"] = np.ones((7, 3), np.float32)
        with pytest.raises(KeyError):
            views["new"] = np.ones(3)
        with pytest.raises(TypeError):
            del views["w1"]
    for name in ("data", "grad", "params", "grads"):
        with pytest.raises(AttributeError, match=f"{name} of a FlatBuffer cannot be replaced"):
            setattr(flat, name, getattr(flat, name).copy() if name in ("data", "grad") else {})
    with pytest.raises(AttributeError, match="'gradient'"):
        flat.gradient = flat.grad
    flat.grads["w1"] += 1  # in place, which hands the same object back
    flat.grads["scale"] += 2
    flat.grad *= 3
    assert (flat.grads["w1"] == 3).all() and flat.grads["scale"] == 6 and flat.grad.sum() == 7 * 3 * 3 + 6


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_a_buffer_of_its_own(duplicate):
    params, grads = values(0), values(50)
    flat = filled(params, grads)
    other = duplicate(flat)
    assert same(dict(other.params), params) and same(dict(other.grads), grads)
    other.data.fill(1)
    other.grads["w1"][...] = 5
    assert (other.params["w2"] == 1).all() and (other.grad[:21] == 5).all() and same(dict(flat.params), params)
    snapshot = duplicate(flat.params)
    assert type(snapshot) is dict and same(snapshot, params)


# over memory of the caller

SIZE = 1043  # numbers of SHAPES
BLOCKS = []  # of shared memory, kept open


def shared_memory(dtype):
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=SIZE * dtype.itemsize)
    block.unlink()  # its name goes at once, its memory when the block is closed
    BLOCKS.append(block)
    return block.buf


def mapped_file(dtype):
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=(SIZE,))


def shared_tensor(dtype):
    torch = pytest.importorskip("torch")
    return torch.zeros(SIZE, dtype=getattr(torch, dtype.name)).share_memory_()


MEMORIES = {
    "SharedMemory": shared_memory,
    "mmap": lambda dtype: mmap.mmap(-1, 4 * mmap.PAGESIZE),
    "part of an mmap": lambda dtype: memoryview(mmap.mmap(-1, 4 * mmap.PAGESIZE))[72:],
    "RawArray": lambda dtype: multiprocessing.sharedctypes.RawArray(dtype.char, SIZE),
    "RawArray of bytes": lambda dtype: multiprocessing.sharedctypes.RawArray("c", SIZE * dtype.itemsize),
    "bytearray": lambda dtype: bytearray(SIZE * dtype.itemsize + 5),
    "ndarray": lambda dtype: np.zeros(SIZE, dtype),
    "memmap": mapped_file,
    "torch": shared_tensor,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_buffer_over_memory_of_the_caller(kind, dtype, backend):
    """Two FlatBuffers over the same memory are one, and a step has the bits of one with memory of its own."""
    memory, grads = MEMORIES[kind](dtype), values(1, dtype)
    own = filled(values(0, dtype), grads)
    laid = fastrms.FlatBuffer.like(values(0, dtype), data=memory)
    again = fastrms.FlatBuffer(SHAPES, dtype, data=memory)
    assert same(again.params, own.params) and again.data.ctypes.data == laid.data.ctypes.data
    assert not laid.grad.any() and laid.grad.ctypes.data != again.grad.ctypes.data
    again.grad[...] = own.grad
    optimizer, reference = fastrms.RMSProp(again, backend=backend), fastrms.RMSProp(own, backend=backend)
    for _ in range(2):
        optimizer.step(again.grad)
        reference.step(own.grad)
    assert same(laid.params, own.params)
    assert bytes(memory)[: own.data.nbytes] == laid.data.tobytes() if kind != "torch" else memory.sum().isnan()


def test_a_gradient_over_memory_of_the_caller():
    memory, grad = np.ones(8, np.float32), np.arange(8, dtype=np.float32)
    flat = fastrms.FlatBuffer({"a": 3, "b": (5, 1)}, data=memory, grad=grad)
    assert flat.data.tolist() == [1] * 8 and flat.grads["b"].reshape(-1).tolist() == [3, 4, 5, 6, 7]
    fastrms.RMSProp(flat).step(flat.grads)
    assert flat.grad.ctypes.data == grad.ctypes.data and memory[0] == 1 and (memory[1:] < 1).all()
    flat = fastrms.FlatBuffer.like({"a": np.full(8, 2, np.float32)}, grad=grad)
    assert flat.data.tolist() == [2] * 8 and flat.grad.tolist() == list(range(8))


def test_what_a_step_does_to_a_torch_tensor_below_is_counted(backend):
    tensor = shared_tensor(DTYPES[0]).requires_grad_()
    flat = fastrms.FlatBuffer(SHAPES, data=tensor)
    optimizer, before = fastrms.RMSProp(flat, groups={"w2": {"lr": 0.5}}, backend=backend), tensor._version
    flat.grad[...] = 1
    optimizer.step(flat.grad)
    assert tensor._version > before and tensor.all()


def read_only(dtype=np.uint8):
    array = np.zeros(SIZE * 4, np.uint8).view(dtype)
    array.flags.writeable = False
    return array


FLOAT = np.dtype(np.float32)
UNUSABLE = {
    "too few bytes": (lambda: bytearray(4 * SIZE - 1), ValueError, "data has 4171 bytes, 1043 numbers .* need 4172"),
    "too few numbers": (lambda: np.zeros(SIZE - 1, FLOAT), ValueError, "data has 1042 numbers, the shapes .* 1043 in all$"),
    "too many numbers": (lambda: np.zeros(SIZE + 1, FLOAT), ValueError, r"data has 1044 numbers.*: pass data\[:1043\]"),
    "float64": (lambda: np.zeros(SIZE), TypeError, "data has dtype float64; a FlatBuffer of float32 lies over.*: "
                "pass dtype=np.float64$"),
    "integers": (lambda: np.zeros(SIZE, np.int32), TypeError, "data has dtype int32; a FlatBuffer of float32.*: pass "
                 r"data\.astype\(np\.float32\), a copy$"),
    "misaligned": (lambda: np.zeros(4 * SIZE + 4, np.uint8)[1:], ValueError, "data starts at .* not aligned to 4 bytes"),
    "read-only bytes": (read_only, ValueError, "data is read-only; a FlatBuffer is written in place"),
    "read-only numbers": (lambda: read_only(FLOAT), ValueError, "data is read-only; a FlatBuffer is written in place"),
    "bytes": (lambda: bytes(4 * SIZE), TypeError, "data is a bytes"),
    "two dimensions": (lambda: np.zeros((SIZE, 1), FLOAT), ValueError, r"it must be contiguous and have one dimension"),
    "gaps": (lambda: np.zeros(2 * SIZE, FLOAT)[::2], ValueError, "it must be contiguous and have one dimension"),
    "a list": (lambda: [0.0] * SIZE, TypeError, "data is a list"),
    "masked": (lambda: np.ma.zeros(SIZE, FLOAT), TypeError, "data is a masked array"),
    "on a device": (lambda: OnDevice(), TypeError, r"data is an OnDevice; a FlatBuffer in device memory has.* CuPy or "
                    r"torch: pass cupy.asarray\(data\)"),
    "a locked Array": (lambda: multiprocessing.Array("f", SIZE), TypeError, r"pass data\.get_obj\(\)"),
    "a named block": (lambda: Block(), TypeError, r"pass np\.frombuffer\(data\.buf, np\.float32\)"),
    "a tensor of one process": (lambda: shared_tensor(FLOAT).clone(), ValueError, r"call data\.share_memory_\(\)"),
    "a tensor of bytes": (lambda: shared_tensor(FLOAT).byte(), TypeError, "data has dtype uint8"),
}  # fmt: skip


class OnDevice:
    __cuda_array_interface__ = {"shape": (SIZE,), "typestr": "<f4", "data": (4096, False), "version": 3}


class Block:
    """Stands for a SharedMemory, which would have to be closed."""

    __module__, buf = "multiprocessing.shared_memory", None


@pytest.mark.parametrize("which", ["data", "grad"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_memory_that_a_flat_buffer_cannot_use(case, which):
    make, error, words = UNUSABLE[case]
    with pytest.raises(error, match=words.replace("data", which)):
        fastrms.FlatBuffer(SHAPES, **{which: make()})


def test_memory_that_overlaps_is_refused():
    memory = np.arange(10, dtype=np.float32)
    with pytest.raises(ValueError, match="data and grad overlap in memory"):
        fastrms.FlatBuffer({"a": 6}, data=memory[:6], grad=memory[4:])
    with pytest.raises(
        ValueError, match=r"params\['a'\] and data overlap in memory; FlatBuffer\(shapes, data=...\) lies over"
    ):
        fastrms.FlatBuffer.like({"b": np.ones(3, np.float32), "a": memory[:3]}, data=memory[2:8])
    with pytest.raises(ValueError, match=r"params\['a'\] and grad overlap in memory"):
        fastrms.FlatBuffer.like({"a": memory[:3]}, grad=memory[2:5])
    assert memory.tolist() == list(range(10))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_buffer_over_memory_of_the_caller_is_not_copied(duplicate):
    """The other process would train a copy of its own and say nothing."""
    flat = fastrms.FlatBuffer({"a": 6}, data=np.zeros(6, np.float32))
    with pytest.raises(TypeError, match="the copy would not share it"):
        duplicate(flat)
    with pytest.raises(AttributeError, match="data of a FlatBuffer cannot be replaced"):
        flat.data = np.zeros(6, np.float32)
    assert fastrms.FlatBuffer.like(flat.params).data.tolist() == [0] * 6


def test_memory_stays_while_a_view_lives():
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    view = fastrms.FlatBuffer(SHAPES, data=memory).params["scale"]
    with pytest.raises(BufferError):
        memory.close()
    view[...] = 1
    del view
    memory.close()


# keys that are equal, and what opt.state gives


class Name(str, enum.Enum):
    W = "w"


class Number(enum.IntEnum):
    ONE = 1


EQUAL = [
    ("w", np.str_("w"), Name.W),
    (b"w", np.bytes_(b"w")),
    (1, np.int64(1), np.float32(1), True, np.True_, Number.ONE, Fraction(1), 1 + 0j, np.complex64(1), complex(1, -0.0)),
    (1j, np.complex64(1j), complex(-0.0, 1)),
    ((1 + 0j, "w"), (1, "w"), (True, "w")),
    (0.5, np.float32(0.5), Fraction(1, 2), Decimal("0.5")),
    (("w", 1), (np.str_("w"), np.int32(1)), (Name.W, Number.ONE)),
    (("w",), (np.str_("w"),)),
    (frozenset([0, 8, np.int64(16)]), frozenset([16, 8, 0])),  # which come in the order in which they were put in
]
UNEQUAL = [
    "w",
    "1",
    1,
    b"w",
    ("w",),
    ("w", 1),
    0.5,
    1j,
    1 + 1j,
    2**200,
    float("inf"),
    1e300,
    frozenset({"w"}),
    None,
    "('w',)",
]


@pytest.mark.parametrize("keys", EQUAL, ids=str)
def test_equal_keys_are_found_whatever_they_print(keys, backend):
    """A state_dict of params under one key is that of params under another key that equals it."""
    for saved in keys:
        source = fastrms.Adam({saved: np.ones(3), "other": np.ones(2)}, backend=backend)
        source.step({saved: np.ones(3), "other": np.ones(2)})
        for key in keys:
            assert key == saved and hash(key) == hash(saved)
            made = fastrms.Adam({key: np.ones(3), "other": np.ones(2)}, backend=backend)
            made.load_state_dict(source.state_dict())
            assert made.steps == 1 and np.array_equal(made.state["exp_avg"][saved], source.state["exp_avg"][key])
            flat = fastrms.Adam(fastrms.FlatBuffer({key: 3, "other": 2}, np.float64), backend=backend)
            flat.load_state_dict(source.state_dict())
            assert flat.steps == 1
    assert len({flat_module.key_text(key) for key in keys}) == 1


def test_other_keys_have_other_names():
    assert len({flat_module.key_text(key) for key in UNEQUAL}) == len(UNEQUAL)


@pytest.mark.parametrize("key", EQUAL[0] + EQUAL[2], ids=repr)
def test_patterns_match_what_a_key_equals(key, backend):
    for params in ({key: np.ones(3), "b": np.ones(2)}, fastrms.FlatBuffer({key: 3, "b": 2})):
        optimizer = fastrms.Adam(params, groups={"w" if key == "w" else "[0-9]": {"lr": 0.5}}, backend=backend)
        assert optimizer.lr == [0.001, 0.5]
        with pytest.raises(ValueError, match=r"gets none of (w|1), b: it matches"):
            fastrms.Adam(params, groups={"W": {"lr": 0.5}}, backend=backend)


@pytest.mark.parametrize("params, place", [
    (lambda: {"w": np.ones(3), "b": np.ones(2)}, "w"),
    (lambda: fastrms.FlatBuffer({"w": 3, "b": 2}), "w"),
    (lambda: [np.ones(3), np.ones(2)], 0),
])  # fmt: skip
def test_a_state_is_written_into_not_exchanged(params, place, backend):
    optimizer = fastrms.RMSProp(params(), backend=backend)
    state = optimizer.state["square_avg"]
    with pytest.raises(TypeError, match=r"\] is in use by the optimizer and stays; write into it: \[.*\]\[\.\.\.\] = x"):
        state[place] = np.full(3, 5.0)
    with pytest.raises(TypeError):
        del state[place]
    state[place][...] = 4
    state[place] += 1
    assert (optimizer.state["square_avg"][place] == 5).all()
    grouped = fastrms.RMSProp([{"params": params()}], backend=backend)
    with pytest.raises(TypeError, match=r"\[0\] is in use by the optimizer and stays; write into its arrays$"):
        grouped.state["square_avg"][0] = state
    with pytest.raises(TypeError):
        grouped.state["square_avg"][0][place] = state[place]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_states_copy_as_plain_collections(duplicate, backend):
    params = {"w": np.ones(3), "b": np.ones(2)}
    optimizer = fastrms.RMSProp(params, groups={"b": {"momentum": 0.9}}, backend=backend)
    states = optimizer.state["square_avg"]
    assert type(duplicate(states)) is dict and same(duplicate(states), states)
    assert repr(optimizer.state["momentum_buffer"]) == "ReadOnlyDict('w': None, 'b': (2,))"
    listed = fastrms.RMSProp(list(params.values()), backend=backend).state["square_avg"]
    assert type(duplicate(listed)) is list and [x.shape for x in duplicate(listed)] == [(3,), (2,)]
    assert repr(listed) == "ReadOnlyList((3,), (2,))" and listed == listed and listed != [] and listed[-1] is listed[1]


# placement


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.Adam])
@pytest.mark.parametrize("groups", [None, {"b": {"lr": 0.1}}])
def test_twins_and_states_lie_apart(dtype, make, groups):
    size = 1 << 17
    flat = fastrms.FlatBuffer({"a": size, "b": (size, 2), "c": size}, dtype)
    optimizer = make(flat, groups=groups)
    assert address(flat.data) % placement.LINE == address(flat.grad) % placement.LINE == 0
    tensors = optimizer._tensors
    for tensor, grad in zip(tensors, tensors.structure.twins(), strict=True):
        starts = [tensor.param.address, address(grad), *map(address, tensor.state.values())]
        assert all(placement.distance(a, b) >= placement.NEAR for k, a in enumerate(starts) for b in starts[:k])
    optimizer.bind(flat.grads)
    assert "same offset" not in optimizer.report()


def mapping_of(where):
    """(kilobytes in huge pages, flags) of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            inside = start <= where < end
        elif inside and first == "AnonHugePages:":
            huge = int(rest[0])
        elif inside and first == "VmFlags:":
            return huge, rest
    raise LookupError(f"{where:#x} is in no mapping")


def test_large_buffers_are_in_huge_pages():
    """By the advice of NumPy's allocator, from 4 MiB on; checked against a mapping that asks the system itself."""
    mmap = pytest.importorskip("mmap")
    if not (sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")):
        pytest.skip("huge pages are asked for on Linux only")
    size = 16 << 20
    asked = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    asked.madvise(mmap.MADV_HUGEPAGE)
    reference = np.frombuffer(asked, np.uint8)
    reference.fill(1)
    if mapping_of(address(reference))[0] < size // 2048:
        pytest.skip("this system gives no huge pages")
    flat = fastrms.FlatBuffer({"w": 10 << 20})  # 40 MiB: too large for memory that malloc hands out again
    for whole in (flat.data, flat.grad, fastrms.Adam(flat).state["exp_avg"]["w"]):
        huge, flags = mapping_of(address(whole) + whole.nbytes // 2)
        assert "hg" in flags or huge >= whole.nbytes // 2048  # asked for; a system short of memory gives none for a while


# steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [*CLASSES, Lion])
def test_the_same_bits_as_separate_arrays(make, dtype, backend):
    """FlatBuffer, mapping and list of groups, with one set of hyper-parameters and with an override by name."""
    if make is Lion and backend == "c":
        pytest.skip("own rules are Python")
    override = {"lr": 0.03} if make is fastrms.RProp else {"weight_decay": 0.25}
    params = values(0, dtype)
    for groups in (None, {"*.bias": override}):
        flat, mapped, listed = filled(params, {}), copies(params), copies(params)
        in_group = [name for name in params if groups and str(name).endswith(".bias")]
        rest = [name for name in params if name not in in_group]
        members = [{"params": {n: listed[n] for n in names}} for names in (rest, in_group) if names]
        members[-1].update(override if groups else {})
        made = [make(p, groups=g, backend=backend) for p, g in ((flat, groups), (mapped, groups), (members, None))]
        for step in range(3):
            grads = values(100 * step + 7, dtype)
            for name, grad in grads.items():
                flat.grads[name][...] = grad
            made[0].step(flat.grads)
            made[1].step(grads)
            made[2].step([{n: grads[n] for n in member["params"]} for member in members])
        assert same(dict(flat.params), mapped) and same(mapped, listed)
        for name, state in made[0].state.items():
            assert same(state, made[1].state[name])


def test_every_way_to_pass_the_gradient(backend):
    params, grads = values(0), values(9)
    for groups in (None, NO_DECAY):
        want = copies(params)
        reference = fastrms.Adam(want, weight_decay=0.1, groups=groups, backend=backend)
        for _ in range(3):
            reference.step(grads)
        for way in ("grads", "grad", "fresh", "bind grads", "bind grad", "bind fresh"):
            flat = filled(params, grads)
            given = {"grads": flat.grads, "grad": flat.grad, "fresh": flat.grad.copy()}[way.split()[-1]]
            optimizer = fastrms.Adam(flat, weight_decay=0.1, groups=groups, backend=backend)
            if way.startswith("bind"):
                optimizer.bind(given)
            for _ in range(3):
                optimizer.step() if way.startswith("bind") else optimizer.step(given)
            assert same(dict(flat.params), want), way
            assert optimizer._same_grads[0] is given  # the fast path from the third step on
        assert len(optimizer._tensors) == (1 if groups is None else 5)


@pytest.mark.parametrize("groups", [None, NO_DECAY])
def test_one_call_for_all(backend, groups):
    flat = filled(values(0), values(1))
    optimizer = fastrms.RMSProp(flat, groups=groups, backend=backend)
    optimizer.bind(flat.grads)
    calls = []
    for name in ("_call", "_call_held"):
        call = getattr(optimizer, name)
        setattr(optimizer, name, lambda *arguments, call=call: calls.append(arguments) or call(*arguments))
    optimizer.step()
    optimizer.step(flat.grads)
    assert len(calls) == 2 and optimizer.steps == 2
    assert optimizer.tensor_steps == [2] * (1 if groups is None else 5)


def test_a_mapping_of_views_is_held_as_well(backend):
    """Nobody can exchange an entry of flat.grads, so an optimizer of flat.params may keep it."""
    flat = filled(values(0), values(1))
    optimizer = fastrms.RMSProp(flat.params, backend=backend)
    optimizer.step(flat.grads)
    optimizer.step(flat.grads)
    assert optimizer._same_grads[0] is flat.grads
    optimizer.step(flat.grads)
    other = filled(values(0), values(1))
    fastrms.RMSProp(other, backend=backend).bind(other.grad)
    third = fastrms.RMSProp(other, backend=backend)
    for _ in range(3):
        third.step(other.grads)
    assert np.array_equal(bits(flat.data), bits(other.data)) and optimizer.steps == 3


def test_gradients_that_do_not_fit(backend):
    params = values(0)
    flat, other = filled(params, values(1)), filled(params, values(1))
    for groups in (None, NO_DECAY):
        optimizer = fastrms.RMSProp(flat, groups=groups, backend=backend)
        size = flat.grad.size
        for grads, error, words in [
            (dict(flat.grads), TypeError, rf"grads is a dict.* 1-D array of {size}: copy .*flat.grads\[name\]"),
            (other.grads, TypeError, "grads is a Views"),
            (flat, TypeError, "grads is a FlatBuffer"),
            (flat.params, TypeError, "grads is a Views"),
            ([flat.grad], TypeError, "grads is a list"),
            (flat.grad[:-1], ValueError, rf"grads has shape \({size - 1},\)"),
            (flat.grad.reshape(1, -1), ValueError, "one dimension"),
            (flat.grad.astype(np.float64), TypeError, r"grads.* has dtype float64, params.* has float32"),
            (np.ones(2 * size, np.float32)[::2], ValueError, "not dense"),
            (np.ma.masked_array(flat.grad), TypeError, "masked"),
            (flat.data, ValueError, "overlap"),
        ]:
            for use in (optimizer.step, optimizer.bind):
                with pytest.raises(error, match=words):
                    use(grads)
        assert optimizer.steps == 0 and same(dict(flat.params), params)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] overlap"):
        fastrms.RMSProp([{"params": flat}, {"params": flat}], backend=backend)
    with pytest.raises((TypeError, RuntimeError), match="cuda"):
        fastrms.RMSProp(flat, backend="cuda")


def test_flat_buffers_in_a_list_of_groups(backend):
    params, grads = without_nan(values(0)), without_nan(values(1))
    flat, alone, other = filled(params, grads), filled(params, grads), np.ones(3)
    optimizer = fastrms.Adam([{"params": flat, "lr": 0.1}, {"params": other}], backend=backend)
    optimizer.step([flat.grads, other * 2])
    optimizer.step([None, other * 2])
    fastrms.Adam(alone, lr=0.1, backend=backend).step(alone.grad)
    assert same(dict(flat.params), dict(alone.params)) and optimizer.tensor_steps == [1, 2]
    assert optimizer.state["exp_avg"][0]["w1"].shape == (7, 3) and optimizer.state["exp_avg"][1].shape == (3,)
    saved = optimizer.state_dict()
    assert saved["tensors"][0]["name"] == "params[0]['w1']" and saved["tensors"][-1]["name"] == "params[1]"
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("groups", [None, NO_DECAY, {"w*": {"momentum": 0.9}}])
def test_state_and_resume(backend, groups):
    """state has the shapes of the parameters; state_dict is that of a mapping of the same arrays, and resumes bit by bit."""
    params, grads = without_nan(values(0)), without_nan(values(1))

    def made(p):
        return fastrms.RMSProp(p, groups=groups, weight_decay=0.1, backend=backend)

    flat, unbroken, mapped = filled(params, grads), filled(params, grads), copies(params)
    first, reference, separate = made(flat), made(unbroken), made(mapped)
    for _ in range(4):
        reference.step(unbroken.grads)
    for _ in range(2):
        first.step(flat.grads)
        separate.step(grads)
    first.state["square_avg"]["w1"][...] += 0  # a live view
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    of_mapping = separate.state_dict()
    assert [t["name"] for t in saved["tensors"]] == [t["name"] for t in of_mapping["tensors"]]
    for mine, other in zip(saved["tensors"], of_mapping["tensors"], strict=True):
        assert mine["steps"] == other["steps"] == 2 and same(mine["state"], other["state"])
    for source, d in ((flat, saved), (flat, of_mapping)):
        resumed = filled(source.params, grads)
        second = made(resumed)
        second.load_state_dict(d)
        for _ in range(2):
            second.step(resumed.grads)
        assert np.array_equal(bits(resumed.data), bits(unbroken.data)) and second.steps == 4
    momentum = first.state.get("momentum_buffer")
    if groups and "w*" in groups:
        assert momentum["w1"].shape == (7, 3) and momentum["scale"] is None
    separate.load_state_dict(saved)


def test_state_dicts_that_do_not_fit(backend):
    params, grads = without_nan(values(0)), without_nan(values(1))
    flat = filled(params, grads)
    optimizer = fastrms.RMSProp(flat, groups=NO_DECAY, backend=backend)
    optimizer.step(flat.grads)
    before = pickle.dumps(optimizer.state_dict())
    for groups, words in [({"w*": {"weight_decay": 0.0}}, r"by the patterns \['w\*'\], this optimizer by \['\*.bias'\]"),
                          (None, "has 1 groups, this optimizer has 2")]:  # fmt: skip
        other = fastrms.RMSProp(copies(params), groups=groups, backend=backend).state_dict()
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(other)
    uneven = fastrms.RMSProp(copies(params), groups=NO_DECAY, backend=backend)
    uneven.step({**grads, "none": None})
    with pytest.raises(ValueError, match=r"1 steps for params\['w2'\], 0 steps for params\['none'\]; in this FlatBuffer"):
        optimizer.load_state_dict(uneven.state_dict())
    for words, change in [
        ("has no params\\['w1'\\]", lambda d: d["tensors"][0].update(name="w1")),
        (r"square_avg of params\['w2'\]", lambda d: d["tensors"][4]["state"].update(square_avg=np.zeros(3, np.float32))),
        (r"has state \[\] for params\['none'\]", lambda d: d["tensors"][3].update(state={})),
        ("has 6 tensors, this optimizer has 7", lambda d: d["tensors"].pop()),
        ("patterns", lambda d: d.pop("patterns")),
    ]:
        damaged = pickle.loads(before)
        change(damaged)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(damaged)
    assert pickle.dumps(optimizer.state_dict()) == before


# groups by pattern


@pytest.mark.parametrize("flattened", [True, False])
def test_the_first_pattern_that_matches_counts(backend, flattened):
    params = {name: np.full(shape, 2.0, np.float32) for name, shape in SHAPES.items()}
    grads = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    given = filled(params, grads) if flattened else copies(params)
    groups = {"w1.bias": {"lr": 0.5}, "*.bias": {"lr": 0.25}, "[0-9]": {"lr": 0.125}}
    optimizer = fastrms.RMSProp(given, groups=groups, lr=0.0, rho=0.0, eps=0.0, eps_root=1e-30, backend=backend)
    assert [group["lr"] for group in optimizer.groups] == [0.0, 0.5, 0.25, 0.125] == optimizer.lr
    optimizer.step(given.grads if flattened else grads)
    after = given.params if flattened else given
    rates = {"w1.bias": 0.5, "w2.bias": 0.25, 3: 0.125}
    for name in SHAPES:
        assert np.array_equal(bits(after[name]), bits(params[name] - np.float32(rates.get(name, 0.0)))), name
    optimizer.groups[2]["lr"] = 1.0
    assert optimizer.lr == [0.0, 0.5, 1.0, 0.125]
    optimizer.lr = 0.0
    before = copies(after)
    optimizer.step(given.grads if flattened else grads)
    assert same(dict(after), before)


def test_patterns_may_take_every_name(backend):
    w = np.ones(3, np.float32)
    optimizer = fastrms.RMSProp({"a": w}, groups={"*": {"lr": 0.5}}, backend=backend)
    assert [group["lr"] for group in optimizer.groups] == [0.01, 0.5] and "group 1" in optimizer.report()
    optimizer.step({"a": w + 1})
    optimizer.groups[0]["lr"] = 3.0
    assert fastrms.RMSProp({"a": w}, groups={}, backend=backend).lr == 0.01


@pytest.mark.parametrize("groups, error, words", [
    ({"*.gain": {"lr": 1.0}}, ValueError, r"groups\['\*\.gain'\] gets none of w, b\.bias"),
    ({"*": {"lr": 1.0}, "w": {"lr": 2.0}}, ValueError, r"groups\['w'\] gets none of .*earlier pattern"),
    ({"W": {"lr": 1.0}}, ValueError, r"groups\['W'\] gets none"),
    ({"w": {"lr": -1.0}}, ValueError, "lr=-1.0"),
    ({"w": {"rate": 1.0}}, TypeError, "'rate'"),
    ({"w": {"params": []}}, TypeError, "'params'"),
    ({"w": 0.1}, TypeError, "must be a mapping name pattern"),
    ({1: {"lr": 0.1}}, TypeError, "must be a mapping name pattern"),
    ([{"lr": 0.1}], TypeError, "must be a mapping name pattern"),
])  # fmt: skip
def test_groups_that_are_refused(backend, groups, error, words):
    params = {"w": np.ones(3, np.float32), "b.bias": np.ones(2, np.float32)}
    for given in (params, fastrms.FlatBuffer.like(params)):
        with pytest.raises(error, match=words):
            fastrms.RMSProp(given, groups=groups, backend=backend)


def test_patterns_need_names(backend):
    w = np.ones(3, np.float32)
    for params in (w, [w], iter([w]), [{"params": {"w": w}}]):
        with pytest.raises(TypeError, match=r"goes by name, and params is an? \w+ without names"):
            fastrms.RMSProp(params, groups={"w": {"lr": 0.1}}, backend=backend)


def test_the_type_of_the_arrays_may_be_named():
    """FlatBuffer[torch.Tensor], for type checkers."""
    named = fastrms.FlatBuffer[int]
    for made in (named({"w": 3}), named.like({"w": np.zeros(3, np.float32)})):
        assert type(made) is fastrms.FlatBuffer and not made.data.any() and made.data.size == 3
