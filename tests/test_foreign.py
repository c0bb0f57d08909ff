"""Arrays of other libraries.  torch CPU tensors and Parameters: the same memory, read anew at every step, refused where
it is not what it was.  JAX arrays: read-only."""

import re
import sys

import numpy as np
import pytest
from conftest import bits

import fastrms
from fastrms.memory import device, host
from fastrms.schedules import EarlyStopping

pytestmark = pytest.mark.peers


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="not installed: torch")


def test_parameters_and_grads_are_used_in_place(torch, backend):
    param = torch.nn.Parameter(torch.ones(3, 5))
    other = torch.ones(7, dtype=torch.float64)
    want, want_other = np.ones((3, 5), np.float32), np.ones(7)
    optimizer = fastrms.Adam([param, other], backend=backend)
    reference = fastrms.Adam([want, want_other], backend=backend)
    for step in range(5):
        param.grad = None
        ((param * (step + 1)) ** 2).sum().backward()  # a new gradient tensor every time
        reference.step([param.grad.numpy().copy(), want_other + 1])
        optimizer.step([param.grad, other + 1])
        assert np.array_equal(bits(param.detach().numpy()), bits(want))
        assert np.array_equal(bits(other.numpy()), bits(want_other))


def test_data_that_moves_is_followed(torch, backend):
    param, grad = torch.nn.Parameter(torch.zeros(1000)), torch.ones(1000)
    optimizer = fastrms.AdaGrad([param], lr=1.0, backend=backend)
    optimizer.bind([grad])
    optimizer.step()
    param.data = torch.full((1000,), 5.0)
    optimizer.step()
    assert torch.allclose(param.detach(), torch.tensor(5 - 2**-0.5)) and optimizer.steps == 2


def test_swapped_data_is_followed(torch, backend):
    p, q = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.ones(100))
    optimizer = fastrms.AdaGrad([p, q], lr=1.0, backend=backend)
    p.data, q.data = q.data, p.data
    optimizer.step([torch.ones(100), torch.ones(100)])
    assert torch.allclose(p.detach(), torch.zeros(100)) and torch.allclose(q.detach(), -torch.ones(100))


def changed(torch, how):
    """A parameter, bound, whose data is then exchanged for something that does not fit."""
    param = torch.nn.Parameter(torch.zeros(4, 4))
    data = {
        "transposed": lambda: torch.zeros(4, 4).t(),
        "dtype": lambda: param.data.view(torch.int32),
        "shape": lambda: torch.zeros(16),
        "gradient": lambda: None,
    }[how]
    return param, data


@pytest.mark.parametrize("how", ["transposed", "dtype", "shape", "gradient"])
def test_data_that_no_longer_fits_is_refused(torch, backend, how):
    param, data = changed(torch, how)
    grad = torch.ones(4, 4)
    optimizer = fastrms.AdaGrad([param], backend=backend)
    optimizer.bind([grad])
    optimizer.step()
    if how == "dtype":
        param = optimizer._tensors[0].param.owner
        param.requires_grad_(False)
    param.data = grad if how == "gradient" else data()
    before = grad.clone()
    with pytest.raises((TypeError, ValueError), match=r"params\[0\]"):
        optimizer.step()
    assert optimizer.steps == 1 and torch.equal(grad, before)


@pytest.mark.parametrize("size", [0, 64])
def test_storage_that_was_taken_away_is_refused(torch, backend, size):
    lost = torch.ones(1 << 12)
    lost.untyped_storage().resize_(size)
    w = np.zeros(1 << 12, np.float32)
    with pytest.raises((TypeError, ValueError), match="grads"):
        fastrms.AdaGrad(w, backend=backend).step(lost)
    with pytest.raises((TypeError, ValueError), match="params"):
        fastrms.AdaGrad(lost, backend=backend)
    assert (w == 0).all()


@pytest.mark.parametrize("kind", ["bfloat16", "half", "int", "meta", "sparse", "negated", "strided", "expanded"])
def test_tensors_that_cannot_be_used_are_refused(torch, backend, kind):
    make = {
        "bfloat16": lambda: torch.ones(4, dtype=torch.bfloat16),
        "half": lambda: torch.ones(4, dtype=torch.float16),
        "int": lambda: torch.ones(4, dtype=torch.int32),
        "meta": lambda: torch.ones(4, device="meta"),
        "sparse": lambda: torch.ones(4).to_sparse(),
        "negated": lambda: torch.complex(torch.ones(4), torch.ones(4)).conj().imag.contiguous().neg().view(4)._neg_view(),
        "strided": lambda: torch.ones(8)[::2],
        "expanded": lambda: torch.ones(1).expand(4),
    }[kind]
    w = np.zeros(4, np.float32)
    if kind not in ("bfloat16", "half"):  # which gradients may be
        with pytest.raises((TypeError, ValueError), match="grads"):
            fastrms.RMSProp(w, backend=backend).step(make())
    with pytest.raises((TypeError, ValueError), match="params"):
        fastrms.RMSProp(make(), backend=backend)
    assert (w == 0).all()


REMEDIES = {  # kind: (tensor, what the sentence about it says)
    "expanded": (lambda torch: torch.ones(1).expand(4), "not dense.*contiguous"),
    "expanded, as from sum()": (lambda torch: torch.tensor(1.0).expand(4, 1), "not dense.*contiguous"),
    "every second": (lambda torch: torch.ones(8)[::2], "not dense.*contiguous"),
    "at the end of a storage": (lambda torch: torch.ones(9)[1::2], "not dense.*contiguous"),
    "half": (lambda torch: torch.ones(4, dtype=torch.float16), r"float16.*\.float\(\)"),
    "bfloat16": (lambda torch: torch.ones(4, dtype=torch.bfloat16), r"bfloat16.*\.float\(\)"),
    "int": (lambda torch: torch.ones(4, dtype=torch.int64), r"int64.*\.float\(\)"),
    "complex": (lambda torch: torch.ones(4, dtype=torch.complex64), "complex64.*view_as_real"),
    "sparse": (lambda torch: torch.ones(4).to_sparse(), r"layout.*\.to_dense\(\)"),
    "meta": (lambda torch: torch.ones(4, device="meta"), "meta.*no numbers.*to_empty"),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_the_sentence_about_a_tensor_is_true(torch, backend, kind):
    make, words = REMEDIES[kind]
    w = np.zeros(make(torch).shape, np.float32)
    as_grad = lambda x: fastrms.RMSProp([w], backend=backend).step([x])  # noqa: E731
    as_param = lambda x: fastrms.RMSProp([x], backend=backend)  # noqa: E731
    for use in (as_param,) if kind in ("bfloat16", "half") else (as_grad, as_param):
        with pytest.raises((TypeError, ValueError), match=rf"^(params|grads)\[0\] .*{words}") as info:
            use(make(torch))
        assert "resized" not in str(info.value)


def test_lazy_parameters_need_a_forward_pass(torch, backend):
    layer = torch.nn.LazyLinear(3)
    with pytest.raises(TypeError, match=r"params\[0\] is an UninitializedParameter.*one forward pass"):
        fastrms.Adam(layer.parameters(), backend=backend)
    layer(torch.ones(2, 4))
    assert fastrms.Adam(layer.parameters(), backend=backend).steps == 0


def test_modules_are_asked_for_their_parameters(torch, backend):
    layer = torch.nn.Linear(3, 2)
    modules = layer, torch.nn.Sequential(layer), torch.nn.ModuleList([layer]), torch.nn.ParameterDict({"w": layer.weight})
    for module in modules:
        with pytest.raises(TypeError, match=rf"params is an? {type(module).__name__}.*params\.parameters\(\)"):
            fastrms.Adam(module, backend=backend)
    for named in (layer.named_parameters(), list(layer.named_parameters())):
        with pytest.raises(TypeError, match=r"params\[0\] is a tuple.*dict\(model.named_parameters\(\)\)"):
            fastrms.Adam(named, backend=backend)
    for params in (layer.parameters(), dict(layer.named_parameters()), torch.nn.ParameterList(layer.parameters())):
        assert fastrms.Adam(params, backend=backend).steps == 0


@pytest.mark.parametrize("library, make", [
    ("pandas", lambda pandas: pandas.Series([1.0, 2.0])),
    ("pandas", lambda pandas: pandas.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})),
    ("polars", lambda polars: polars.Series([1.0, 2.0])),
    ("xarray", lambda xarray: xarray.DataArray(np.ones(2))),
    ("scipy.sparse", lambda sparse: sparse.eye(3)),
])  # fmt: skip
def test_objects_of_other_libraries_are_refused_with_a_remedy_that_works(library, make, backend):
    x = make(pytest.importorskip(library, reason=f"not installed: {library}"))
    with pytest.raises(TypeError, match=r"params is an? \w+.* in place .*pass params[.\[].*, and keep that array") as info:
        fastrms.Adam(x, backend=backend)
    remedy = str(info.value).rpartition("pass ")[2].removesuffix(", and keep that array")
    array = eval(remedy, {"params": x})
    fastrms.Adam(array, backend=backend).step(np.ones_like(array))


def test_empty_tensors_count_their_steps(torch, backend):
    empty = torch.nn.Parameter(torch.ones(0, 3))
    optimizer = fastrms.Adam([empty], backend=backend)
    optimizer.step([torch.ones(0, 3)])
    assert optimizer.tensor_steps == [1]


def test_jax_arrays_are_gradients_but_not_parameters(backend):
    jax = pytest.importorskip("jax", reason="not installed: jax")
    w, want = np.ones(1003, np.float32), np.ones(1003, np.float32)
    grads = jax.grad(lambda x: (x**3).sum())(jax.numpy.linspace(0.1, 1.0, 1003, dtype="float32"))
    optimizer = fastrms.Adam(w, backend=backend)
    optimizer.step(grads)
    optimizer.bind(grads)
    optimizer.step()
    reference = fastrms.Adam(want, backend=backend)
    for _ in range(2):
        reference.step(np.array(grads))
    assert np.array_equal(bits(w), bits(want))
    with pytest.raises(ValueError, match=r"params is read-only, as every JAX array: .*np\.array\(params\).*as gradients"):
        fastrms.Adam(grads, backend=backend)
    with pytest.raises(ValueError, match=r"square_avg is read-only, as every JAX array"):
        fastrms.rmsprop(w, grads, jax.numpy.zeros(1003, "float32"), backend=backend)
    halves = grads.astype(jax.numpy.bfloat16)
    optimizer.step(halves)
    reference.step(np.array(halves.astype("float32")))
    assert np.array_equal(bits(w), bits(want))
    with pytest.raises(TypeError, match=r"grads is traced by JAX.*outside of jax\.jit") as info:
        jax.jit(optimizer.step)(grads)
    assert "\n" not in str(info.value)
    grads.delete()
    with pytest.raises(TypeError, match=r"grads is a JAX array that was deleted"):
        optimizer.step(grads)
    assert optimizer.steps == 3


# the owner learns of a write

TENSORS = {
    "plain": lambda torch: torch.tensor([1.0, -0.0, float("nan"), 5e-324]),
    "parameter": lambda torch: torch.nn.Parameter(torch.ones(3, 5)),
    "double": lambda torch: torch.ones(7, dtype=torch.float64),
    "0-d": lambda torch: torch.tensor(-0.0),
    "empty": lambda torch: torch.ones(0, 3),
    "transposed": lambda torch: torch.ones(3, 5).t(),
    "view": lambda torch: torch.ones(8)[2:5],
    "with a history": lambda torch: torch.nn.Parameter(torch.ones(3)) * 2,
}


def without_increment(torch, monkeypatch):
    monkeypatch.delattr(torch.autograd.graph, "increment_version")


def with_increment_of_one(torch, monkeypatch):
    """torch 2.1 to 2.4 took a single tensor."""

    def increment_version(tensor):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError("increment_version(): argument 'tensor' must be Tensor, not list")

    monkeypatch.setattr(torch.autograd.graph, "increment_version", increment_version)


@pytest.mark.parametrize("age", [None, without_increment, with_increment_of_one])
@pytest.mark.parametrize("memory", [host, device])
def test_torch_counts_a_write(torch, monkeypatch, memory, age):
    if age is not None:
        age(torch, monkeypatch)
    tensors = {name: make(torch) for name, make in TENSORS.items()}
    buffers = [host.acquire(x, name, writable=True) for name, x in tensors.items()]
    others = [host.acquire(np.ones(3), "other", writable=True), np.ones(3), None]
    before = {name: (x._version, bits(x.detach().numpy())) for name, x in tensors.items()}
    memory.wrote([*others, *buffers])
    for name, x in tensors.items():
        assert x._version > before[name][0] and np.array_equal(bits(x.detach().numpy()), before[name][1]), name
    memory.wrote(iter(others))


def test_inference_tensors_have_no_count(torch):
    with torch.inference_mode():
        tensors = [torch.ones(3), torch.ones(3)]
    counted = torch.ones(3)
    host.wrote([host.acquire(x, "x", writable=True) for x in (*tensors, counted)])
    assert counted._version > 0
    stopping = EarlyStopping(tensors)
    stopping.restore()


def test_without_torch_a_write_costs_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    host.wrote(None)  # not even looked at


def test_a_restored_parameter_counts_as_changed(torch):
    """A backward pass through the parameters as they were before raises, as it does after torch's own writes."""
    param, x = torch.nn.Parameter(torch.full((1,), 2.0)), torch.full((1,), 3.0, requires_grad=True)
    stopping = EarlyStopping([param])
    with torch.no_grad():
        param += 5
    loss = (param * x).sum()
    stopping.restore()
    assert param.item() == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_in_a_torch_tensor_learns_of_writes_and_stays_where_it_is(torch, backend):
    for w in (torch.ones(33), np.ones(33, np.float32)):
        copy, grad = torch.zeros(33, dtype=torch.bfloat16), np.linspace(-1, 1, 33, dtype=np.float32)
        optimizer, before = fastrms.Adam(w, param_copy=copy, backend=backend), copy._version
        assert before > 0 and (copy == 1).all()
        for grads in (grad, torch.from_numpy(grad), None):
            optimizer.step(grads)
            assert copy._version > before and torch.equal(copy, torch.as_tensor(w).bfloat16())
            before = copy._version
            optimizer.bind(grad)
        with optimizer.streaming() as stream:
            stream.step(0, grad)
        assert copy._version > before and torch.equal(copy, torch.as_tensor(w).bfloat16())
        old, kept = copy.view(torch.int16).numpy(), np.asarray(w).copy()
        was = old.copy()
        copy.data = torch.zeros(33, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"^param_copy was given other memory .* make a new one$"):
            optimizer.step(grad)
        assert np.array_equal(old, was) and np.array_equal(kept, w) and not copy.any() and optimizer.steps == 4


def test_loading_does_not_write_a_copy(torch, backend):
    """Nor does it tell the tensor so: a backward pass may need it."""
    copy, state = torch.zeros(33, dtype=torch.bfloat16), {name: torch.zeros(33) for name in ("exp_avg", "exp_avg_sq")}
    for given in (None, state):
        optimizer = fastrms.Adam(torch.ones(33), param_copy=copy, state=given, backend=backend)
        optimizer.step(torch.ones(33))
        saved, before, numbers = optimizer.state_dict(), copy._version, copy.clone()
        counts = [x._version for x in state.values()]
        optimizer.load_state_dict(saved)
        assert copy._version == before and torch.equal(copy, numbers)
        assert all((x._version > count) == (given is not None) for x, count in zip(state.values(), counts, strict=True))


@pytest.mark.parametrize("what", ["param_copy", "state['square_avg']"])
def test_a_tensor_that_is_cut_into_groups_must_keep_its_memory(torch, backend, what):
    """The optimizer has views of it, which do not learn that it was given other memory."""
    flat = fastrms.FlatBuffer({"w": (4,), "b": (3,)})
    tensor = torch.zeros(7, dtype=torch.bfloat16 if what == "param_copy" else torch.float32)
    given = {"param_copy": tensor} if what == "param_copy" else {"state": {"square_avg": tensor}}
    optimizer = fastrms.RMSProp(flat, groups={"b": {"lr": 0.5}}, backend=backend, **given)
    flat.grad[:] = 1
    optimizer.step(flat.grads)
    old, before = tensor.view(torch.uint8), tensor.clone()
    tensor.data = torch.zeros_like(tensor)
    saved, kept = fastrms.RMSProp(flat, groups={"b": {"lr": 0.5}}).state_dict(), flat.data.copy()
    for call in (lambda: optimizer.step(flat.grads), lambda: optimizer.load_state_dict(saved), optimizer.state_dict):
        with pytest.raises(ValueError, match=rf"^{re.escape(what)} was given other memory .*; make a new one$"):
            call()
        assert np.array_equal(kept, flat.data) and torch.equal(old, before.view(torch.uint8)) and optimizer.steps == 1
