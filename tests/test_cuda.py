"""The CUDA backend where there is none: nothing is imported, and each thing that is missing has its own sentence.  And
The tests on a GPU at the end are skipped, with the reason, where there is no GPU."""

import gc
import importlib
import subprocess
import sys
import weakref

import numpy as np
import pytest
from conftest import bits

import fastrms
from fastrms.backends.cuda import toolchain
from fastrms.memory import host

reason = toolchain.available()


def test_importing_fastrms_imports_no_cuda():
    code = "import fastrms, sys; print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'numba', 'numba_cuda')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_three_sentences_for_what_is_missing(monkeypatch):
    class Driver:
        cuInit = staticmethod(lambda flags: 100)

    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    assert "numba-cuda is not installed: pip install 'numba-cuda[cu13]'" in toolchain.available.__wrapped__()
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name: Driver)
    assert "the NVIDIA driver finds no CUDA device" in toolchain.available.__wrapped__()
    monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert "there is no NVIDIA driver" in toolchain.available.__wrapped__()


def test_the_cuda_target_of_numba_itself_is_refused(monkeypatch):
    numba_cuda = pytest.importorskip("numba.cuda", reason="needs numba")
    monkeypatch.setattr(toolchain, "find_spec", lambda name: object())
    monkeypatch.setattr(numba_cuda, "implementation", "Built-in", raising=False)
    with pytest.raises(RuntimeError, match="deprecated target, which is not supported; numba-cuda is not installed: pip"):
        toolchain.compiler()


def test_fastrms_cuda_without_numba_cuda_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastrms.cuda", raising=False)
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^numba-cuda is not installed: pip install 'numba-cuda\[cu13\]'"):
        importlib.import_module("fastrms.cuda")


def in_process(code):
    """What code prints in a process in which a warning is an error."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    return run.stdout + run.stderr


NUMPY_WITHOUT_IT = """
import numpy
given = numpy.__getattr__
def others(name):
    if name == "row_stack":
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")
    return given(name)
vars(numpy).pop("row_stack", None)
numpy.__getattr__ = others
"""


def test_a_numpy_without_what_numba_cuda_uses_is_named():
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    said = in_process(NUMPY_WITHOUT_IT + "import fastrms.cuda")
    assert f"cannot be used with NumPy {np.__version__}" in said and "pip install 'numpy<2.5'" in said


def test_the_import_gives_no_warning():
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    assert in_process("import fastrms.cuda; print('fine')") == "fine\n"


class OnDevice:
    __cuda_array_interface__ = {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}


def test_device_arrays_on_host_backends_name_the_remedy():
    for name in ("c", "numpy"):
        with pytest.raises(
            (TypeError, RuntimeError), match=r"is in device memory.*copy it to a NumPy array|is not available"
        ):
            fastrms.RMSProp(OnDevice(), backend=name)
    with pytest.raises(TypeError, match="in device memory"):
        host.acquire(OnDevice(), "grads", writable=False)


@pytest.mark.skipif(reason is None, reason="there is a GPU")
def test_device_arrays_and_auto_ask_for_what_is_missing():
    for call in (lambda: fastrms.RMSProp(OnDevice()), lambda: fastrms.RMSProp(np.ones(3), backend="cuda")):
        with pytest.raises(RuntimeError, match="backend='cuda' is not available: "):
            call()


@pytest.mark.parametrize("option", [{"capturable": True}, {"check": True}, {"stream": 1}])
def test_what_only_cuda_knows(option):
    with pytest.raises(TypeError, match=r"needs backend='cuda'; this runs on 'numpy'"):
        fastrms.RMSProp(np.ones(3), backend="numpy", **option)


def test_an_own_rule_is_freed_with_its_class():
    """What was compiled from it goes with it."""
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    from test_own_rules import plain_descent

    from fastrms.backends.cuda.kernel import Kind

    def used():
        function = lambda param, grad, lr: (param - lr * grad,)  # noqa: E731
        rule = plain_descent(function).own_rule
        arguments = rule, False, np.dtype("f4"), Kind(), (9, 0)
        made = toolchain.compiler().compiled(*arguments)
        assert made.cubin and toolchain.compiler().compiled(*arguments) is made
        return weakref.ref(function)

    of_function = used()
    gc.collect()
    assert of_function() is None


def test_what_an_own_rule_may_choose_by_can_be_compiled():
    pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
    from test_trace import RECORDED, own

    from fastrms.backends.cuda.kernel import Kind

    for function, *_ in RECORDED.values():
        assert toolchain.compiler().compile_ptx(own(function), False, np.dtype("f4"), Kind(), (9, 0))


# on a GPU


def test_gpu_libraries():
    """Say once which GPU tests do not run, and why."""
    if reason:
        pytest.skip(f"the GPU tests did not run: there is no GPU ({reason})")


def libraries():
    """(name, to the device, to the host) of the array libraries here."""
    cupy = pytest.importorskip("cupy", reason="the GPU tests need CuPy")
    torch = pytest.importorskip("torch", reason="the GPU tests need torch")
    return (cupy.asarray, cupy.asnumpy), (lambda x: torch.as_tensor(x).cuda(), lambda x: x.cpu().numpy())


@pytest.mark.gpu
@pytest.mark.skipif(reason is not None, reason=f"the GPU tests need a GPU: {reason}")
@pytest.mark.parametrize("library", [0, 1])
@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.RProp])
def test_on_a_real_gpu(make, library):
    to_device, to_host = libraries()[library]
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(n).astype(np.float32) for n in (1003, 5, 1 << 20)]
    grads = [rng.standard_normal(p.size).astype(np.float32) for p in params]
    there, there_grads = [to_device(p) for p in params], [to_device(g) for g in grads]
    ours, theirs = make(there, check=True), make(params, backend="numpy")
    for _ in range(5):
        ours.step(there_grads)
        theirs.step(grads)
    assert all(np.array_equal(bits(to_host(a)), bits(b)) for a, b in zip(there, params, strict=True))
