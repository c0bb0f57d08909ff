"""Promise 2: bad input gets a sentence that names it, and nothing has changed: no buffer, no counter."""

import array
import inspect
import itertools
import re
import threading
import time
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS, CLASSES, FUNCTIONS, bits, raw_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

import fastrms
from fastrms import memory
from fastrms.memory import device, host

SHAPE = (3, 4)


def good(seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)


def read_only():
    x = good()
    x.flags.writeable = False
    return x


def misaligned():
    memory = np.zeros(12 * 4 + 1, np.uint8)
    return memory[1:].view(np.float32).reshape(SHAPE)


class OnDevice:
    """Stands for CuPy and Numba device arrays."""

    __cuda_array_interface__ = {"shape": SHAPE, "typestr": "<f4", "data": (4096, False), "version": 3}


class OnDeviceByDlpack:
    def __dlpack__(self):
        raise AssertionError("must not be asked")

    def __dlpack_device__(self):
        return (2, 0)


class OnlyArrayMethod:
    """__array__ may make a copy; training the copy would be silent."""

    def __array__(self, dtype=None, copy=None):
        return good()


class Jaxlike:
    """A read-only buffer, as JAX gives."""

    def __init__(self):
        self.values = good()
        self.values.flags.writeable = False

    def __dlpack_device__(self):
        return (1, 0)

    @property
    def __array_interface__(self):
        return self.values.__array_interface__


class ArrayMaker(Mapping):
    """Makes its arrays anew at each access, as an NpzFile does; or views of one array."""

    def __init__(self, kept=None):
        self.kept = kept

    def __getitem__(self, key):
        return good() if self.kept is None else self.kept[:]

    def __iter__(self):
        return iter(("w",))

    def __len__(self):
        return 1


class Module:
    """Stands for a torch module."""

    def parameters(self):
        return [good()]


def object_of(library):
    """An object of a library that gives its numbers by __array__ only."""
    return type("Table", (OnlyArrayMethod,), {"__module__": f"{library}.core.table"})()


def memory_map(folder):
    path = folder / "weights"
    good().tofile(path)
    return np.memmap(path, np.float32, "r", shape=SHAPE)


# name: (array, error, words of the sentence).  Everything here is refused as parameter and as gradient.
BAD = {
    "list": (lambda: [[1.0] * 4] * 3, TypeError, "list"),
    "float": (lambda: 1.0, TypeError, "float"),
    "scalar": (lambda: np.float32(1), TypeError, "float32"),
    "string": (lambda: "w", TypeError, "str"),
    "bytes": (lambda: b"1234", TypeError, "bytes"),
    "integers": (lambda: np.ones(SHAPE, np.int32), TypeError, "int32"),
    "long double": (lambda: np.ones(SHAPE, np.longdouble), TypeError, "dtype"),
    "complex": (lambda: np.ones(SHAPE, np.complex64), TypeError, "complex64"),
    "object": (lambda: np.ones(SHAPE, object), TypeError, "object"),
    "structured": (lambda: np.zeros(SHAPE, [("x", "f4")]), TypeError, "dtype"),
    "byte order": (lambda: np.ones(SHAPE, ">f4"), TypeError, "dtype >f4, which is not in native byte order"),
    "masked": (lambda: np.ma.masked_array(good(), good() > 0), TypeError, "masked"),
    "bytearray": (lambda: memoryview(bytearray(48)), TypeError, "uint8"),
    "device": (OnDevice, TypeError, "device memory.*copy it"),
    "dlpack device": (OnDeviceByDlpack, TypeError, "device memory.*copy it"),
    "only __array__": (OnlyArrayMethod, TypeError, "OnlyArrayMethod.*in place"),
    "module": (Module, TypeError, r"parameters.*\.parameters\(\)"),
    "mapping": (lambda: {"w": good()}, TypeError, "dict; nested mappings are not flattened.*'layer.weight'"),
    "nested list": (lambda: [good(), good()], TypeError, "list; nested sequences are not flattened.*one list"),
    "named": (lambda: ("w", good()), TypeError, r"tuple, a \(name, array\) pair.*dict\(model.named_parameters\(\)\)"),
    "strided": (lambda: np.ones((3, 8), np.float32)[:, ::2], ValueError, "not dense"),
    "reversed": (lambda: np.ones(SHAPE, np.float32)[::-1], ValueError, "not dense"),
    "broadcast": (lambda: np.broadcast_to(np.float32(1), SHAPE), ValueError, "not dense|read-only"),
    "misaligned": (misaligned, ValueError, "aligned"),
}
# Refused as a parameter only: as gradients of float32 parameters, bf16 and fp16 are taken.
BAD_PARAM = {
    "half": (lambda: np.ones(SHAPE, np.float16), TypeError, "float16"),
    "bfloat16": (lambda: np.ones(SHAPE, ml_dtypes.bfloat16), TypeError, "bfloat16"),
    "read-only": (read_only, ValueError, "read-only"),
    "jax": (Jaxlike, ValueError, "read-only"),
    "None": (lambda: None, TypeError, "NoneType"),
}
# Refused as a gradient of a C-ordered float32 parameter only.
BAD_GRAD = {
    "other dtype": (lambda: good(dtype=np.float64), TypeError, "grads.*float64.*params.*float32"),
    "transposed": (lambda: good().T.copy(), ValueError, r"shape \(4, 3\).*\(3, 4\)"),
    "other size": (lambda: np.ones(11, np.float32), ValueError, "shape"),
    "flattened": (lambda: good().reshape(-1), ValueError, "shape"),
    "fortran": (lambda: np.asfortranarray(good()), ValueError, "memory order"),
    "nothing bound": (lambda: None, ValueError, "bind"),
}


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("case", [*BAD, *BAD_PARAM])
def test_refused_parameters(make, backend, case):
    value, error, words = {**BAD, **BAD_PARAM}[case]
    kept = good()
    before = bits(kept)
    with pytest.raises(error, match=words) as info:
        make({"ok": kept, "bad": value()}, backend=backend)
    assert "params['bad']" in str(info.value)
    assert np.array_equal(bits(kept), before)


REMEDIES = {  # what the sentence about a parameter says to do, over and above BAD
    "list": r"np\.array\(params\['w'\], np\.float32\)",
    "scalar": r"np\.array\(params\['w'\], np\.float32\)",
    "integers": r"params\['w'\]\.astype\(np\.float32\)",
    "half": r"params\['w'\]\.astype\(np\.float32\)",
    "bfloat16": r"params\['w'\]\.astype\(np\.float32\)",
    "long double": r"params\['w'\]\.astype\(np\.float64\)",
    "complex": r"params\['w'\]\.view\(np\.float32\)",
    "byte order": r"params\['w'\]\.astype\('float32'\)",
    "only __array__": r"np\.array\(params\['w'\]\)",
    "bytearray": r"np\.asarray\(params\['w'\]\)\.astype\(np\.float32\)",
    "strided": r"np\.ascontiguousarray\(params\['w'\]\)",
    "read-only": r"np\.array\(params\['w'\]\)",
}


@pytest.mark.parametrize("case", REMEDIES)
def test_the_sentence_names_a_remedy_that_works(case):
    """The expression in the sentence, carried out, gives something that is taken."""
    params = {"w": {**BAD, **BAD_PARAM}[case][0]()}
    with pytest.raises((TypeError, ValueError), match=REMEDIES[case]) as info:
        fastrms.RMSProp(params, backend="numpy")
    remedy = re.search(REMEDIES[case], str(info.value)).group()
    assert fastrms.RMSProp({"w": eval(remedy, {"np": np, "params": params})}, backend="numpy").steps == 0


@pytest.mark.parametrize("library, remedy", [
    ("pandas", ".to_numpy(copy=True)"), ("polars", ".to_numpy(writable=True)"), ("xarray", ".values"),
    ("scipy", ".toarray()"), ("h5py", "[...]"), ("zarr", "[...]"), ("dask", ".compute()"),
])  # fmt: skip
def test_objects_of_known_libraries_are_refused_with_their_way_to_an_array(library, remedy, backend):
    with pytest.raises(TypeError, match=re.escape(f"pass params['w']{remedy}")):
        fastrms.Adam({"w": object_of(library)}, backend=backend)


def test_a_memory_map_is_opened_for_writing(tmp_path, backend):
    mapped = memory_map(tmp_path)
    for param in (mapped, mapped[:2], np.asarray(mapped)):
        with pytest.raises(ValueError, match=r"params is read-only: it is a memory map.*mode='r\+'"):
            fastrms.Adam(param, backend=backend)
    fastrms.Adam(good(1), backend=backend).step(mapped)  # as a gradient it need not be writable
    writable = np.memmap(mapped.filename, np.float32, "r+", shape=SHAPE)
    fastrms.Adam(writable, backend=backend).step(good(1))
    assert not np.array_equal(mapped, good())


def test_what_makes_its_arrays_anew_is_refused(tmp_path, backend):
    np.savez(tmp_path / "weights.npz", w=good())
    with np.load(tmp_path / "weights.npz") as archive:
        for params in (archive, archive.values(), ArrayMaker(), [{"params": archive}]):
            with pytest.raises(TypeError, match=r"(NpzFile|ValuesView|ArrayMaker).*anew.*(dict|list)\(params\)"):
                fastrms.RMSProp(params, backend=backend)
        taken = dict(archive)
    fastrms.RMSProp(taken, backend=backend).step({"w": good(1)})
    kept = good()
    fastrms.RMSProp(ArrayMaker(kept), backend=backend).step(ArrayMaker())  # gradients are read once
    fastrms.RMSProp((x for x in [kept]), backend=backend)
    assert not np.array_equal(taken["w"], good()) and not np.array_equal(kept, good())


def test_a_flat_buffer_is_no_array_among_others(backend):
    flat = fastrms.FlatBuffer({"w": 3})
    for params in ([flat], {"flat": flat}, (flat, np.ones(3))):
        with pytest.raises(TypeError, match=r"FlatBuffer.*alone.*'params': flat"):
            fastrms.RMSProp(params, backend=backend)


@pytest.mark.parametrize(
    "case, position", [(c, k) for c in [*BAD, *BAD_GRAD] for k in range(3) if k == 0 or c != "nothing bound"]
)
def test_refused_gradients_change_nothing(backend, case, position):
    value, error, words = {**BAD, **BAD_GRAD}[case]
    if case == "nothing bound":
        params = good()
        optimizer = fastrms.Adam(params, backend=backend)
        optimizer.step(good(1))
        grads = None
    else:
        params = [good(k) for k in range(3)]
        optimizer = fastrms.Adam(params, backend=backend)
        optimizer.step([good(k) for k in range(3)])
        grads = [good(k + 3) for k in range(3)]
        grads[position] = value()
    check_unchanged(optimizer, params, lambda: optimizer.step(grads), error, words)
    if grads is not None:
        check_unchanged(optimizer, params, lambda: optimizer.bind(grads), error, words)


def everything(optimizer, params):
    params = params if isinstance(params, list) else [params]
    saved = optimizer.state_dict()
    states = [x for tensor in saved["tensors"] for x in tensor["state"].values()]
    return (
        [bits(x).tobytes() for x in [*params, *states]],
        saved["steps"],
        [t["steps"] for t in saved["tensors"]],
        saved["groups"],
    )


def check_unchanged(optimizer, params, action, error, words):
    before = everything(optimizer, params)
    with pytest.raises(error, match=words):
        action()
    assert everything(optimizer, params) == before


CALLS = {
    "rmsprop": lambda b, **k: fastrms.rmsprop(b["param"], b["grad"], b["square_avg"], lr=0.01, **k),
    "rmsprop full": lambda b, **k: fastrms.rmsprop(
        b["param"],
        b["grad"],
        b["square_avg"],
        grad_avg=b["grad_avg"],
        momentum_buffer=b["momentum_buffer"],
        momentum=0.9,
        **k,
    ),
    "adagrad": lambda b, **k: fastrms.adagrad(b["param"], b["grad"], b["sum"], **k),
    "adam": lambda b, **k: fastrms.adam(b["param"], b["grad"], b["exp_avg"], b["exp_avg_sq"], step=1, **k),
    "amsgrad": lambda b, **k: fastrms.adam(
        b["param"], b["grad"], b["exp_avg"], b["exp_avg_sq"], max_exp_avg_sq=b["max_exp_avg_sq"], step=1, **k
    ),
    "rprop": lambda b, **k: fastrms.rprop(b["param"], b["grad"], b["prev"], b["step_size"], **k),
}
BUFFERS = {
    "rmsprop": ("square_avg",),
    "rmsprop full": ("square_avg", "grad_avg", "momentum_buffer"),
    "adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "rprop": ("prev", "step_size"),
}


def buffers_of(name):
    return {key: abs(good(k)) for k, key in enumerate(("param", "grad", *BUFFERS[name]))}


def check_refused(name, buffers, backend, error, words, **options):
    """The call raises, its sentence names the argument, and no buffer has changed."""

    def hashes():
        return [
            bits(x).tobytes() for x in buffers.values() if isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float64)
        ]

    before = hashes()
    with pytest.raises(error, match=words) as info:
        CALLS[name](buffers, backend=backend, **options)
    assert hashes() == before
    return str(info.value)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("case", [*BAD, *BAD_PARAM, *BAD_GRAD])
def test_functions_refuse(name, backend, case):
    value, error, words = {**BAD, **BAD_PARAM, **BAD_GRAD}[case]
    if value() is None:
        error, words = TypeError, "NoneType"
    for key in ("param", "grad", *BUFFERS[name]):
        if key == "grad" and case in ("read-only", "jax"):
            continue
        if key != "param" and case in ("half", "bfloat16"):  # these are taken
            continue
        if value() is None and key in ("grad_avg", "momentum_buffer", "max_exp_avg_sq"):
            continue
        CALLS[name](buffers_of(name), backend=backend)  # the short way is open
        buffers = buffers_of(name)
        buffers[key] = value()
        if case in ("other dtype", "transposed"):
            words = "dtype|shape"  # these sentences name two buffers, in the order of the call
        sentence = check_refused(name, buffers, backend, error, words)
        assert key in sentence


def overlapping(kind):
    memory = np.abs(np.random.default_rng(0).standard_normal(64)).astype(np.float32)
    first = memory[:12]
    second = {"equal": memory[:12], "one element": memory[11:23], "shifted": memory[1:13], "inside": memory[6:18]}[kind]
    return first, second


@pytest.mark.parametrize("kind", ["equal", "one element", "shifted", "inside"])
@pytest.mark.parametrize("name", CALLS)
def test_functions_refuse_overlap(name, backend, kind):
    keys = ("param", "grad", *BUFFERS[name])
    for k, key in enumerate(keys):
        for other in keys[k + 1 :]:
            buffers = {key: np.ones(12, np.float32) for key in keys}
            CALLS[name](buffers, backend=backend)  # adjacent or separate buffers are fine
            buffers[key], buffers[other] = overlapping(kind)
            sentence = check_refused(name, buffers, backend, ValueError, "overlap")
            assert key in sentence and other in sentence


def test_bind_needs_gradients(backend):
    optimizer = fastrms.RMSProp(good(), backend=backend)
    with pytest.raises(TypeError, match="grads is None"):
        optimizer.bind(None)


def test_step_counts_stay_below_two_to_the_62(backend):
    w, g, m, v = (good(k) for k in range(4))
    fastrms.adam(w, g, m, abs(v), step=2**62, nesterov="dozat", backend=backend)
    with pytest.raises(ValueError, match=r"2\*\*62"):
        fastrms.adam(w, g, m, abs(v), step=2**62 + 1, backend=backend)


def test_subclasses_are_what_their_memory_is(backend):
    """np.matrix multiplies differently; a step on it must not."""
    matrix, plain = np.ones((2, 3)).view(np.matrix), np.ones((2, 3))
    fastrms.Adam(matrix, backend=backend).step(np.ones((2, 3)).view(np.matrix))
    fastrms.Adam(plain, backend=backend).step(np.ones((2, 3)))
    assert np.array_equal(np.asarray(matrix), plain)


def test_adjacent_buffers_are_fine(backend):
    memory = np.ones(36, np.float32)
    fastrms.rmsprop(memory[:12], memory[12:24], memory[24:], lr=0.1, backend=backend)
    assert (memory[:12] < 1).all() and (memory[12:24] == 1).all()


@pytest.mark.parametrize("kind", ["equal", "one element", "shifted", "inside"])
def test_optimizers_refuse_overlap(backend, kind):
    first, second = overlapping(kind)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] overlap"):
        fastrms.Adam([first, second], backend=backend)
    params = [first, np.ones(12, np.float32)]
    optimizer = fastrms.Adam(params, backend=backend)
    state = optimizer.state["exp_avg_sq"][1]
    for grads, names in (
        ([np.ones(12, np.float32), second], "params.0. and grads.1.|grads.1. and params.0."),
        ([second, first], "overlap"),
        ([np.ones(12, np.float32), state], "grads.1.*exp_avg_sq of params.1.|exp_avg_sq of params.1.*grads.1."),
    ):
        check_unchanged(optimizer, params, lambda g=grads: optimizer.step(g), ValueError, names)
        check_unchanged(optimizer, params, lambda g=grads: optimizer.bind(g), ValueError, "overlap")


def test_every_other_kind_of_array_is_updated_in_place(backend):
    values = np.linspace(1, 2, 12, dtype=np.float32)
    want = values.copy()
    fastrms.RMSProp(want, backend=backend).step(np.ones(12, np.float32))
    plain, raw, view = array.array("f", values), bytearray(values.tobytes()), values.copy()
    for param in (plain, memoryview(raw).cast("f"), memoryview(view)):
        fastrms.RMSProp(param, backend=backend).step(memoryview(array.array("f", [1.0] * 12)))
        assert np.array_equal(bits(np.asarray(param)), bits(want))
    read_only_grad = Jaxlike()
    w = good()
    optimizer = fastrms.RMSProp(w, backend=backend)
    optimizer.step(read_only_grad)
    optimizer.bind(read_only_grad)
    optimizer.step()
    assert optimizer.steps == 2 and not np.array_equal(w, good())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_any_dense_memory_order(backend, order):
    rng = np.random.default_rng(1)
    start, grad = rng.standard_normal((3, 4, 5)), rng.standard_normal((3, 4, 5))

    def laid_out(x):
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))

    want = start.copy()
    fastrms.Adam(want, backend=backend).step(grad)
    param, grads = laid_out(start), laid_out(grad)
    optimizer = fastrms.Adam(param, backend=backend)
    optimizer.step(grads)
    assert np.array_equal(bits(np.ascontiguousarray(param)), bits(want))
    assert optimizer.state["exp_avg"].strides == param.strides
    state = fastrms.init_state("adam", param)
    fastrms.adam(param, grads, state["exp_avg"], state["exp_avg_sq"], step=1, backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_bound_buffer_cannot_be_resized(backend):
    param, grad = np.ones(12, np.float32), np.ones(12, np.float32)
    optimizer = fastrms.RMSProp(param, backend=backend)
    optimizer.bind(grad)
    for bound in (param, grad):
        with pytest.raises(ValueError, match="resize"):
            bound.resize(1000)


def test_a_gradient_passed_twice_is_held_and_replaced(backend):
    param, grad = np.ones(12, np.float32), np.ones(12, np.float32)
    want = param.copy()
    reference = fastrms.RMSProp(want, backend=backend)
    optimizer = fastrms.RMSProp(param, backend=backend)
    for k in range(6):
        grad[:] = k + 1
        optimizer.step(grad)
        reference.step(grad.copy())
    other = np.full(12, -3, np.float32)
    optimizer.step(other)
    reference.step(other)
    grad.resize(50, refcheck=True)  # no longer held
    assert np.array_equal(bits(param), bits(want)) and optimizer.steps == 7


def test_a_list_of_gradients_is_read_anew_every_step(backend):
    """The same container with other arrays in it: no stale pointer."""
    param = [np.ones(5, np.float32)]
    optimizer = fastrms.RMSProp(param, lr=0.1, backend=backend)
    grads = [np.ones(5, np.float32)]
    optimizer.step(grads)
    after_one = param[0].copy()
    grads[0] = np.zeros(5, np.float32)
    optimizer.step(grads)
    assert np.array_equal(param[0], after_one)


def test_two_threads_on_one_optimizer(backend):
    """A second thread gets RuntimeError or its turn, and the count says how many steps were made."""
    param, grad = np.ones(300_000, np.float32), np.ones(300_000, np.float32)
    optimizer = fastrms.Adam(param, backend=backend)
    optimizer.bind(grad)
    refused, made = [], []

    def work():
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            try:
                optimizer.step()
                made.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert optimizer.steps == len(made) == optimizer.tensor_steps[0]
    assert refused and all("another thread" in sentence for sentence in refused)


BAD_HYPER = [
    ("lr", float("nan"), ValueError), ("lr", -0.1, ValueError), ("lr", float("inf"), ValueError), ("lr", "0.1", TypeError),
    ("lr", True, TypeError), ("lr", None, TypeError), ("lr", [0.1], TypeError), ("lr", 1e300, ValueError),
    ("rho", 1.0, ValueError), ("rho", -0.1, ValueError), ("rho", float("nan"), ValueError), ("rho", 0.999999999, ValueError),
    ("beta1", 1.0, ValueError), ("beta2", 1.5, ValueError), ("beta2", 1 - 1e-9, ValueError),
    ("eps", -1e-8, ValueError), ("eps", 0.0, ValueError), ("eps", 1e-60, ValueError), ("eps_root", float("inf"), ValueError),
    ("momentum", 1.0, ValueError), ("weight_decay", -1.0, ValueError), ("clip_value", 0.0, ValueError),
    ("clip_value", -1.0, ValueError), ("nesterov", True, ValueError), ("nesterov", 1, Exception), ("maximize", 1, TypeError),
    ("amsgrad", "raw", ValueError), ("bias_correction", "hat", ValueError), ("eta_minus", 1.5, ValueError),
    ("eta_plus", 0.9, ValueError), ("step_min", 100.0, ValueError), ("lr_decay", -1.0, ValueError),
    ("initial_value", -1.0, ValueError), ("dialect", "jax", ValueError), ("dialect", 3, ValueError),
    ("backend", "fortran", ValueError), ("beta", 0.9, TypeError),
]  # fmt: skip
BAD_HYPER_OF = [
    (kind, *case)
    for kind, maker in FUNCTIONS.items()
    for case in BAD_HYPER
    if case[0] in {*maker.defaults, "dialect", "backend", "beta"}
]


@pytest.mark.parametrize("kind, name, value, error", BAD_HYPER_OF)
def test_bad_hyper_parameters(kind, name, value, error, backend):
    options = {"backend": backend, name: value}
    with pytest.raises(error, match=name.split("_")[0]):
        FUNCTIONS[kind](good(), **options)
    if (kind, name) in (("rprop", "lr"), ("adagrad", "initial_value"), ("rmsprop", "initial_value")):
        error = TypeError  # of the state, which these calls are given
    if (kind, name) == ("adagrad", "eps"):
        return  # of the state, which these calls are given
    buffers = buffers_of(kind)
    before = [bits(x).tobytes() for x in buffers.values()]
    with pytest.raises(error):
        if kind == "rprop":
            fastrms.rprop(*buffers.values(), **options)
        else:
            getattr(fastrms, kind)(*buffers.values(), **options, **({"step": 1} if kind == "adam" else {}))
    assert [bits(x).tobytes() for x in buffers.values()] == before


@pytest.mark.parametrize(
    "step, error",
    [(0, ValueError), (-1, ValueError), (2**70, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)],
)
def test_bad_steps(backend, step, error):
    w, g, m, v = (good(k) for k in range(4))
    fastrms.adam(w, g, m, abs(v), step=1, backend=backend)  # the next call may go the short way
    before = [bits(x).tobytes() for x in (w, g, m, v)]
    with pytest.raises(error, match="step="):
        fastrms.adam(w, g, m, abs(v), step=step, backend=backend)
    assert [bits(x).tobytes() for x in (w, g, m, v)] == before


@pytest.mark.parametrize("options", [{"grad_scale": v} for v in (0.0, -1.0, float("nan"), float("inf"), "1", True)]
                         + [{"clip_norm": v} for v in (0.0, -1.0, float("nan"), "1", True)])  # fmt: skip
def test_bad_step_options(backend, options):
    param = good()
    optimizer = fastrms.RMSProp(param, backend=backend)
    check_unchanged(
        optimizer, param, lambda: optimizer.step(good(1), **options), (TypeError, ValueError), next(iter(options))
    )


def test_a_failing_schedule_changes_nothing(backend):
    schedule = {"value": 0.1}
    param = good()
    optimizer = fastrms.RMSProp(param, lr=lambda step: schedule["value"], backend=backend)
    optimizer.step(good(1))
    for bad in (float("nan"), -1.0, "fast", None):
        schedule["value"] = bad
        check_unchanged_but_schedule(optimizer, param, bad, schedule)


def check_unchanged_but_schedule(optimizer, param, bad, schedule):
    before = bits(param).tobytes(), optimizer.steps
    with pytest.raises((TypeError, ValueError), match=r"lr\(1\)"):
        optimizer.step(good(2))
    assert (bits(param).tobytes(), optimizer.steps) == before


kinds = st.sampled_from(sorted({**BAD, **BAD_GRAD}.keys() - {"nothing bound"}) + ["fine"])


@settings(max_examples=150, deadline=None)
@given(st.lists(kinds, min_size=1, max_size=5), st.sampled_from(BACKENDS))
def test_all_or_nothing_over_many_tensors(cases, backend):
    """Whatever the mix of gradients: the step is made whole or not at all."""
    table = {**BAD, **BAD_GRAD, "fine": (lambda: good(9), None, None)}
    params = [good(k) for k in range(len(cases))]
    optimizer = fastrms.AdamW(params, backend=backend)
    grads = [table[case][0]() for case in cases]
    before = everything(optimizer, params)
    if all(case == "fine" for case in cases):
        optimizer.step(grads)
        assert optimizer.steps == 1
    else:
        with pytest.raises((TypeError, ValueError)):
            optimizer.step(grads)
        assert everything(optimizer, params) == before


def test_the_backend_steps_only_with_gradients_that_are_held(backend):
    """After a step with passing gradients the plan points to memory that may be gone: a bare step must refuse."""
    param, grad = good(), good(1)
    optimizer = fastrms.RMSProp(param, backend=backend)
    assert optimizer._call(optimizer._argument) == 5  # FASTRMS_NOT_HELD: nothing bound yet
    optimizer.step(good(2))
    before = bits(param).tobytes()
    assert optimizer._call(optimizer._argument) == 5
    assert bits(param).tobytes() == before and optimizer.steps == 1
    optimizer.bind(grad)
    assert optimizer._call(optimizer._argument) == 0 and optimizer.steps == 2


def test_both_memory_modules_offer_what_is_written_down():
    """The functions that the docstring of fastrms.memory lists, with these parameters; a Buffer with these attributes."""
    listed = dict(re.findall(r"^(\w+)\((.*?)\)  ", memory.__doc__, re.MULTILINE))
    assert len(listed) == 9
    for module, (name, parameters) in itertools.product((host, device), listed.items()):
        assert ", ".join(inspect.signature(getattr(module, name)).parameters) == parameters.replace("=", ""), (module, name)
    attributes = re.findall(
        r"\b(owner|address|end|size|dtype|shape|strides|flat)\b", memory.__doc__.partition("attributes")[2]
    )
    of_device = device.DeviceBuffer(None, 64, (3,), (1,), np.dtype(np.float32), 0)
    for buffer in (host.ours(np.ones(3, np.float32)), of_device):
        assert all(hasattr(buffer, name) for name in attributes) and len(set(attributes)) == 8
        assert (buffer.end - buffer.address, buffer.size, buffer.shape, buffer.strides) == (12, 3, (3,), (1,))


@pytest.mark.skipif("c" not in fastrms.available_backends(), reason="without the C extension")
def test_the_c_interface_refuses_by_itself():
    """C callers have no Python above them: missing, misaligned and overlapping buffers are answered, not touched."""
    c = fastrms.backends.load("c")
    group = c.ffi.new("fastrms_recipe *")
    c.fill_recipe(group, raw_recipe("adam", np.dtype(np.float32), False))
    buffers = [np.ones(8, np.float32) for _ in range(4)]
    addresses = [c.ffi.from_buffer(b) for b in buffers]
    null = c.ffi.NULL
    update = c.lib.fastrms_update
    assert update(group, 7, 1, 1.0, *addresses[:3], null, null) == c.lib.FASTRMS_MISSING
    assert update(group, 7, 1, 1.0, null, *addresses[1:], null) == c.lib.FASTRMS_MISSING
    assert update(group, 7, 1, 1.0, addresses[0] + 1, *addresses[1:], null) == c.lib.FASTRMS_MISALIGNED
    assert update(group, 7, 1, 1.0, addresses[1] + 4, *addresses[1:], null) == c.lib.FASTRMS_OVERLAP
    assert all((b == 1).all() for b in buffers)
    assert update(group, 7, 1, 1.0, *addresses, null) == c.lib.FASTRMS_OK
    assert (buffers[0][:7] != 1).all() and buffers[0][7] == 1


@pytest.mark.parametrize("optimizer", sorted(FUNCTIONS))
def test_a_schedule_needs_an_optimizer(optimizer):
    w, rate = good(0), fastrms.schedules.Cosine(0.1, 10)
    with pytest.raises(TypeError, match=r"lr=Cosine.*must be a number"):
        fastrms.init_state(optimizer, w, lr=rate)
    states = fastrms.init_state(optimizer, w).values()
    if optimizer != "rprop":
        with pytest.raises(TypeError, match=r"lr=.*must be a number here"):
            getattr(fastrms, optimizer)(w, good(1), *states, lr=rate, **({"step": 1} if optimizer == "adam" else {}))
