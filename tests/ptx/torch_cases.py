"""fastrms.torch on the driver double, run by test_launch.py in a process of its own: its tensors on the GPU are those of
torch for the CPU, which say that they are on a GPU, as host memory stands for device memory here."""

import types

import launch_cases  # the double comes first
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")

import fastrms.torch as ft  # noqa: E402

driver = launch_cases.driver
F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GPU = torch.device("cuda", 0)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU.  What is made from it is there, too, unless it is asked for on the CPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: GPU)

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        asked = dict(kwargs or {})
        to_host = function is torch.Tensor.cpu or asked.pop("device", None) == "cpu"
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*[x.as_subclass(torch.Tensor) if to_host and isinstance(x, cls) else x for x in args], **asked)
        return made.as_subclass(cls) if type(made) is torch.Tensor and not to_host else made


to = torch.Tensor.to


def moved(tensor, *where, **more):
    return tensor.as_subclass(OnGpu) if where == (GPU,) else to(tensor, *where, **more)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)  # of a torch for CUDA
    monkeypatch.setattr(torch.Tensor, "to", moved)


SHAPES = [(7, 5), (300,), (0,), (), (64,)]


def tensors(dtype, on_gpu, seed=0):
    made = [torch.as_tensor(launch_cases.numbers(*shape, seed=seed + k)).to(dtype) for k, shape in enumerate(SHAPES)]
    return [x.as_subclass(OnGpu) if on_gpu else x for x in made]


class Pair:
    """The same optimizer over equal parameters on the GPU and on the host."""

    def __init__(self, make, dtype, **options):
        self.sides = []
        for on_gpu in (True, False):
            params = [x.requires_grad_() for x in tensors(dtype, on_gpu)]
            self.sides.append((params, make(params, **options)))

    def step(self, dtype, seed, without=()):
        for on_gpu, (params, optimizer) in zip((True, False), self.sides, strict=True):
            for k, (param, grad) in enumerate(zip(params, tensors(dtype, on_gpu, seed), strict=True)):
                param.grad = None if k in without else grad
            optimizer.step()

    def same(self):
        (params, ours), (wanted, theirs) = self.sides
        for k, (param, want) in enumerate(zip(params, wanted, strict=True)):
            assert equal(param, want), k
            for name, x in theirs.state[want].items():
                assert equal(ours.state[param][name], x), (k, name)
                on_gpu = isinstance(ours.state[param][name], OnGpu)
                assert on_gpu == (name not in ("step", "q8_shape")), name


def equal(a, b):
    a, b = (x.detach().as_subclass(torch.Tensor).reshape(-1) for x in (a, b))
    integers = {4: torch.int32, 2: torch.int16}.get(a.element_size(), a.dtype)
    return a.dtype == b.dtype and np.array_equal(a.view(integers).numpy(), b.view(integers).numpy())


CASES = [  # dtype of the parameters, of the gradients, options
    (F32, F32, {}),
    (F32, F32, {"state_format": "bf16"}),
    (F32, F32, {"state_format": "q8"}),
    (BF16, BF16, {"master": "float32", "state_format": "fp16"}),
    (BF16, BF16, {"master": "split16"}),
    (BF16, BF16, {"master": "split8", "state_format": "q8"}),
    (BF16, BF16, {"rounding": "stochastic", "state_format": "bf16"}),
    (FP16, FP16, {"rounding": "nearest"}),
]


@pytest.mark.parametrize("param, grad, options", CASES, ids=str)
def test_torch_formats_have_the_bits_of_the_host(driver, param, grad, options):
    pair = Pair(ft.Adam, param, seed=7, **options)
    driver.launches.clear()
    for seed, without in ((10, ()), (20, (1,)), (30, ())):
        pair.step(grad, seed, without)
    assert driver.launches
    pair.same()


@pytest.mark.parametrize("make", [ft.RMSprop, ft.Adagrad, ft.AdamW])
def test_torch_formats_of_other_rules(driver, make):
    options = {"initial_accumulator_value": 0.1} if make is ft.Adagrad else {}
    pair = Pair(make, F32, state_format="q8", **options)
    for seed in (10, 20):
        pair.step(F32, seed)
    pair.same()


@pytest.mark.parametrize("param, grad, options", CASES[1:6], ids=str)
def test_torch_formats_are_saved_and_loaded(driver, param, grad, options):
    """From the GPU to the host and back; a converted state."""
    pair, other = Pair(ft.Adam, param, **options), Pair(ft.Adam, param, **options)
    pair.step(grad, 10)
    pair.step(grad, 20, (1,))
    for (_, to), (params, _), (_, source) in zip(other.sides, other.sides, reversed(pair.sides), strict=True):
        to.load_state_dict(source.state_dict())
        with torch.no_grad():
            for mine, x in zip(params, pair.sides[1][0], strict=True):
                mine.copy_(x.detach())
    for made in (pair, other):
        made.step(grad, 30)
        made.same()
    assert all(equal(a, b) for a, b in zip(pair.sides[0][0], other.sides[0][0], strict=True))
    if param is F32:
        plain = Pair(ft.Adam, param)
        for (_, to), (_, source) in zip(plain.sides, reversed(pair.sides), strict=True):
            to.load_state_dict(source.state_dict(), convert=options["state_format"])
        plain.same()


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"zero_grad": True}], ids=str)
def test_torch_skips_what_the_host_skips(driver, options):
    """state["step"] is on the host and tells of it at once."""
    pair = Pair(ft.Adam, F32, nonfinite="skip", **options)
    for seed, without in ((10, ()), (20, (3,)), (30, ()), (40, ())):
        pair.step(F32, seed, without)
        for k, bad in ((1, float("nan")), (4, float("inf"))):
            for params, optimizer in pair.sides:
                for param in params:
                    param.grad = torch.zeros_like(param.detach())
                if seed == 20:
                    params[k].grad[3] = bad
                optimizer.step()
        said = [optimizer.step_info for _, optimizer in pair.sides]
        assert [info.applied for info in said] == [seed != 20] * 2 and said[0].nonfinite == said[1].nonfinite
        pair.same()
    (param, *_), ours = pair.sides[0]
    assert ours.state[param]["step"].item() == 4 + 6


def test_a_parameter_on_a_gpu_of_which_nothing_is_said_is_refused(driver):
    (param, *_) = tensors(BF16, True)
    with pytest.raises(TypeError, match="has dtype bfloat16: say how it is updated, by master='float32'"):
        ft.Adam([param.requires_grad_()])
