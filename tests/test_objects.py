"""An optimizer as an object: it is freed when it is dropped, its names mean something, and nothing is taken in silence."""

import gc
import inspect
import linecache
import subprocess
import sys
import weakref

import numpy as np
import pytest
from conftest import CLASSES

import fastrms
from fastrms import schedules


class Sign(fastrms.Optimizer):
    """A rule of one's own."""

    defaults = {"lr": 0.1}
    state_names = ("before",)

    @staticmethod
    def coefficients(step, lr):
        return {"lr": lr}

    @staticmethod
    def rule(param, grad, before, lr):
        return param - lr * grad, grad


def used(make, backend):
    """An optimizer on which everything was done once that leaves something behind."""
    w, g = np.ones(7), np.ones(7)
    optimizer = make({"w": w}, backend=backend)
    for _ in range(3):
        optimizer.step({"w": g})
    optimizer.bind({"w": g})
    optimizer.step()
    optimizer.step(clip_norm=1.0)
    with optimizer.streaming() as s:
        s.step("w", g)
    optimizer.groups[0]["lr"] if make is fastrms.RProp else setattr(optimizer, "lr", 0.2)
    optimizer.load_state_dict(optimizer.state_dict())
    for wrong in (lambda: optimizer.step({"w": g[:3]}), lambda: optimizer.step({"w": w}), lambda: optimizer.nothing):
        with pytest.raises((ValueError, AttributeError)):
            wrong()
    return optimizer, optimizer.groups, optimizer.state, optimizer.step, optimizer.report()


@pytest.mark.parametrize("make", [*CLASSES, Sign])
def test_what_is_dropped_is_freed(make, backend):
    """No cycle of references keeps an optimizer, its state or a gradient until the cyclic collector runs."""
    if make is Sign and backend == "c":
        pytest.skip("own rules are Python")
    used(make, backend)  # whatever is kept for ever has been made now
    gc.collect()
    gc.disable()
    try:
        everything = used(make, backend)
        gone = [weakref.ref(everything[0]), weakref.ref(everything[0]._plan) if backend != "c" else None]
        gone += [weakref.ref(flat) for tensor in everything[0]._tensors for flat in tensor.state.values()]
        gone += [weakref.ref(everything[0]._gradients.bound_object["w"])]
        del everything
        assert not any(reference and reference() is not None for reference in gone)
    finally:
        gc.enable()


def test_twenty_optimizers_take_the_memory_of_one():
    """The peak of twenty, one after the other, in a process of its own whose collector is off."""
    program = """
        import gc, numpy as np, fastrms
        gc.disable()
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
        w, g = np.zeros(2_500_000, np.float32), np.ones(2_500_000, np.float32)  # 10 MB each
        start, peak = resident(), 0
        for _ in range(20):
            o = fastrms.Adam(w); o.step(g); peak = max(peak, resident() - start)
        assert peak < 90, peak  # two at a time: 40 MB of state
    """
    if sys.platform != "linux":
        pytest.skip("/proc is Linux'")
    lines = "\n".join(line[8:] for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# names


@pytest.mark.parametrize("make", CLASSES)
def test_an_attribute_that_means_nothing_is_refused(make):
    optimizer = make(np.ones(3))
    foreign = "learning_rate", "alpha", "betas", "beta_1", "clip_norm", "grad_scale", "param_groups", "anything", "rho"
    ours = "backend", "dialect", "steps", "nonfinite", "capturable", "state", "groups", "step", "weight_decay"
    for name in foreign + ours:
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 0.5)
    group = optimizer.groups[0]
    for name in ("lr", "momentum"):
        with pytest.raises(AttributeError):
            setattr(group, name, 0.5)
    for wrong in (lambda: optimizer.groups.append({"lr": 1.0}), lambda: optimizer.groups.__setitem__(0, {"lr": 1.0})):
        with pytest.raises(AttributeError):
            wrong()


def test_attributes_of_a_subclass_are_its_own():
    class Mine(fastrms.Adam):
        note: str = ""

    optimizer = Mine(np.ones(3))
    optimizer.note = "tried"
    assert optimizer.note == "tried"
    with pytest.raises(AttributeError):
        optimizer.nota = "tired"


WORDS = [
    (lambda o: o.zero_grad(), ValueError, "zero_grad=True"),
    (lambda o: o.step(lambda: 1.0), TypeError, "closure"),
    (lambda o: o.step(closure=lambda: 1.0), TypeError, r"no closure.*opt\.step\(grads\)"),
    (lambda o: o.step(np.ones(3), 0.5), TypeError, r"by name, 0\.5 was not: write opt\.step\(grads, grad_scale=0\.5\)"),
    (lambda o: o.step(np.ones(3), np.ones(3)), TypeError, r"in one argument.*opt\.step\(\[gw, gb\]\)"),
    (lambda o: o.param_groups, AttributeError, "opt.groups"),
    (lambda o: o.add_param_group({"params": np.ones(2)}), AttributeError, "make a new"),
    (lambda o: o.apply_gradients([]), AttributeError, r"opt\.step\(grads\)"),
    (lambda o: o.learning_rate, AttributeError, r"opt\.lr"),
    (lambda o: fastrms.Adam(np.ones(2), 0.1), TypeError, r"Adam\(params, lr=0\.1\)"),
    (lambda o: fastrms.Adam(np.ones(2), betas=(0.9, 0.99)), TypeError, "beta1"),
    (lambda o: fastrms.RMSProp(np.ones(2), alpha=0.9), TypeError, "rho"),
    (lambda o: fastrms.RMSProp(np.ones(2), learning_rate=0.1), TypeError, "lr"),
    (lambda o: fastrms.RMSProp(np.ones(2), clip_norm=0.1), TypeError, r"step\("),
    (lambda o: fastrms.RMSProp(np.ones(2), rho=lambda step: 0.9), TypeError, "rho.*number"),
    (lambda o: fastrms.Adam([{"params": [np.ones(2)], "name": "encoder"}]), TypeError, "'name'"),
    (lambda o: fastrms.RMSProp(np.ones(2)).groups[0].__setitem__("momentum", 0.9), ValueError, "make a new"),
    (lambda o: fastrms.RMSprop, AttributeError, "RMSProp"),
    (lambda o: fastrms.Adagrad, AttributeError, "AdaGrad"),
    (lambda o: fastrms.Adamw, AttributeError, "write fastrms.AdamW$"),
]


@pytest.mark.parametrize(("call", "kind", "words"), WORDS)
def test_what_people_know_from_elsewhere_gets_a_sentence(call, kind, words):
    with pytest.raises(kind, match=words):
        call(fastrms.Adam([np.ones(3, np.float32)]))


def test_dir_shows_the_public_names():
    optimizer = fastrms.Adam(np.ones(3))
    shown = {name for name in dir(optimizer) if not name.startswith("__")}
    assert shown == {
        "advance", "backend", "bind", "c_step", "dialect", "formats", "groups", "load", "load_state_dict",
        "load_torch_state_dict", "lr", "nbytes", "nonfinite", "report", "save", "state", "state_dict", "step", "steps",
        "streaming", "tensor_steps", "to_torch_state_dict", "zero_grad",
    }  # fmt: skip
    loaded = {"numba", "cuda", "mpi", "torch"} & vars(fastrms).keys()
    assert set(dir(fastrms)) == {*fastrms.__all__, "schedules", "__version__", *loaded}
    assert all(hasattr(fastrms, name) for name in dir(fastrms))
    assert all(hasattr(optimizer, name) for name in shown - {"c_step"})


# what is taken is updated


def test_state_is_written_into_and_not_exchanged(backend):
    params = {"w": np.ones(3), "b": np.ones(2)}
    for structure in (params, list(params.values()), [{"params": params}], params["w"]):
        optimizer = fastrms.Adam(structure, backend=backend)
        with pytest.raises(TypeError):
            optimizer.state["exp_avg"] = np.ones(3)
        inner = optimizer.state["exp_avg"]
        if structure is not params["w"]:
            with pytest.raises(TypeError):
                inner["w" if structure is params else 0] = np.ones(3)
    optimizer.state["exp_avg"][...] = 7
    assert (optimizer.state["exp_avg"] == 7).all()


def test_a_gradient_that_was_reshaped_in_place_is_checked_again(backend):
    w, g = np.ones((2, 3)), np.ones((2, 3))
    optimizer = fastrms.RMSProp(w, backend=backend)
    for _ in range(3):
        optimizer.step(g)
    before = w.copy()
    try:
        g.shape = (3, 2)  # NumPy 2.5 warns
    except DeprecationWarning:
        pytest.skip("this NumPy does not reshape in place")
    with pytest.raises(ValueError, match="shape"):
        optimizer.step(g)
    assert np.array_equal(w, before) and optimizer.steps == 3


def test_zero_grad_zeroes_what_is_held(backend):
    w, g, other = {"w": np.ones(7)}, {"w": np.full(7, 2.0)}, np.full(7, 3.0)
    optimizer = fastrms.RMSProp(w, backend=backend)
    with pytest.raises(ValueError, match="bind"):
        optimizer.zero_grad()
    optimizer.bind(g)
    optimizer.step()
    optimizer.zero_grad()
    assert not g["w"].any() and w["w"].all() and optimizer.steps == 1
    alone = fastrms.RMSProp(w["w"], backend=backend)
    for _ in range(2):
        alone.step(other)
    alone.zero_grad()
    assert not other.any()
    flat = fastrms.FlatBuffer({"a": 3, "b": 2})
    whole = fastrms.RMSProp(flat, backend=backend)
    whole.bind(flat.grads)
    flat.grad[:] = 1
    whole.zero_grad()
    assert not flat.grad.any()
    frozen = np.ones(7)
    frozen.flags.writeable = False
    optimizer.bind({"w": frozen})
    with pytest.raises(ValueError, match="read-only"):
        optimizer.zero_grad()


def test_second_moments_of_a_state_dict_are_not_negative(backend):
    for make, name in ((fastrms.RMSProp, "square_avg"), (fastrms.AdaGrad, "sum"), (fastrms.Adam, "exp_avg_sq"),
                       (fastrms.RProp, "step_size")):  # fmt: skip
        optimizer = make(np.ones(3), backend=backend)
        optimizer.step(np.ones(3))
        for wrong in (-1.0, np.nan):
            d = optimizer.state_dict()
            d["tensors"][0]["state"][name][1] = wrong
            before = optimizer.state[name].copy()
            with pytest.raises(ValueError, match=f"{name} of params .*negative number or NaN"):
                optimizer.load_state_dict(d)
            assert np.array_equal(optimizer.state[name], before)


def test_a_torch_state_dict_of_many_tensors_loads_in_linear_time():
    """Work per tensor, counted and not timed: no lookup in a list of all tensors."""
    from fastrms import torch_state

    class Number(int):
        compared = 0

        def __eq__(self, other):
            Number.compared += 1
            return int(self) == int(other)

        __hash__ = int.__hash__

    count = 300
    optimizer = fastrms.Adam([np.ones(1) for _ in range(count)])
    optimizer.step([np.ones(1) for _ in range(count)])
    d = torch_state.torch_form(optimizer)
    d["state"] = {Number(k): state for k, state in d["state"].items()}
    for group in d["param_groups"]:
        group["params"] = [Number(k) for k in group["params"]]
    Number.compared = 0
    optimizer.load_torch_state_dict(d)
    assert Number.compared < 20 * count


# torch


def test_a_compiled_function_may_step(backend):
    """torch.compile leaves its graph at every function of fastrms."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch._dynamo")
    model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    optimizer = fastrms.Adam(model.parameters(), lr=schedules.Cosine(0.1, 100), backend=backend)
    square_avg, g = np.zeros(3), np.ones(3)

    def train(w):
        for p in model.parameters():
            p.grad = None
        model(x).pow(2).mean().backward()
        optimizer.step((p.grad for p in model.parameters()), clip_norm=1.0)
        optimizer.bind([p.grad for p in model.parameters()])
        optimizer.step()
        with optimizer.streaming() as s:
            for k, p in enumerate(model.parameters()):
                s.step(k, p.grad)
        optimizer.zero_grad()
        fastrms.rmsprop(w, g, square_avg, backend=backend)
        return model(x).sum() + optimizer.steps

    train(np.ones(3))
    w = np.ones(3)
    torch._dynamo.reset()
    torch.compile(train, backend="eager")(w)
    assert optimizer.steps == 6 and w[0] < 1


@pytest.mark.parametrize("zero_grad", [False, True])
def test_torch_learns_of_every_write(backend, zero_grad):
    """The version counter is raised, so that a backward pass over an updated weight is refused as with torch.optim."""
    torch = pytest.importorskip("torch")
    w, x = torch.nn.Parameter(torch.full((3,), 2.0)), torch.full((3,), 3.0, requires_grad=True)
    g, state = torch.ones(3), torch.zeros(3)
    optimizer = fastrms.RMSProp([w], backend=backend, zero_grad=zero_grad)

    def stream():
        with optimizer.streaming() as s:
            s.step(0, g)

    def restore():
        stopping = schedules.EarlyStopping([w])
        stopping.restore()

    optimizer.bind([g])
    zeroing = {"step", "clip", "bound", "stream"} if zero_grad else set()
    calls = {
        "step": lambda: optimizer.step([g]), "clip": lambda: optimizer.step([g], clip_norm=1.0), "bound": optimizer.step,
        "stream": stream, "restore": restore, "functional": lambda: fastrms.rmsprop(w, g, state, backend=backend),
    }  # fmt: skip
    for name, call in calls.items():
        loss, versions = (w * x).sum(), (w._version, g._version, state._version)
        call()
        assert w._version > versions[0], name
        assert (g._version > versions[1]) == (name in zeroing), name
        assert (state._version > versions[2]) == (name == "functional"), name
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    before = g._version
    optimizer.bind([g])
    optimizer.zero_grad()
    assert g._version > before and not g.any()
    before = w._version
    with pytest.raises(ValueError, match="shape"):
        optimizer.step([torch.ones(4)])
    assert w._version == before  # nothing was written


FIRST = {
    "functional": "torch.compile(lambda y: (fastrms.rmsprop(w, y, s, lr=0.1), y * 2)[1], backend='eager')(y)",
    "constructor": "torch.compile(lambda y: (fastrms.RMSProp([w]).step([y]), y * 2)[1], backend='eager')(y)",
    "config": "torch.compile(lambda y: (fastrms.available_backends(), fastrms.isa(), y * 2)[2], backend='eager')(y)",
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("order", ["import torch, fastrms", "import fastrms, torch"])
def test_torch_compile_may_meet_fastrms_first(first, order):
    """Whatever is imported and called first, in a process of its own, the graph breaks."""
    pytest.importorskip("torch._dynamo")
    code = f"{order}\nw, s, y = torch.ones(3), torch.zeros(3), torch.ones(3)\nassert ({FIRST[first]} == 2).all()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


def test_torch_that_is_still_being_imported_is_no_error(monkeypatch):
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    w = np.ones(3)
    fastrms.RMSProp([w]).step([w.copy()])
    fastrms.rmsprop(w, memoryview(w.copy()), np.zeros(3), lr=0.1)
    assert (w < 1).all()


def test_only_what_was_written_is_told(backend):
    """No gradient, or a step that was left out: the version stays, and a backward pass over the weight is right."""
    torch = pytest.importorskip("torch")
    w, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fastrms.RMSProp([w, frozen], backend=backend, nonfinite="skip")
    optimizer.step([torch.ones(3), None])
    assert w._version and not frozen._version
    before = w._version
    assert not optimizer.step([torch.full((3,), torch.nan), None]).applied and w._version == before


def test_zero_grad_zeroes_the_arrays_that_were_bound(backend):
    w, g, other = [np.ones(3), np.ones(2)], [np.ones(3), np.ones(2)], [np.ones(3), np.ones(2)]
    optimizer = fastrms.RMSProp(w, backend=backend)
    optimizer.bind(x for x in g)
    optimizer.zero_grad()
    assert not any(x.any() for x in g)
    held = {"w": np.ones(3)}
    mapped = fastrms.RMSProp({"w": np.ones(3)}, backend=backend)
    mapped.bind(held)
    bound, held["w"] = held["w"], np.ones(3)
    mapped.zero_grad()
    assert not bound.any() and held["w"].all()
    g[0][:] = 1
    optimizer.step(other)
    optimizer.zero_grad()
    assert not g[0].any() and other[0].all()


def test_several_hyper_parameters_are_set_at_once_or_not_at_all():
    optimizer = fastrms.RMSProp(np.ones(3), lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        optimizer.groups[0].update(lr=0.5, rho=2)
    assert optimizer.lr == 0.1
    optimizer.groups[0].update(lr=0.5, rho=0.5)
    assert optimizer.lr == 0.5 and optimizer.groups[0]["rho"] == 0.5


@pytest.mark.parametrize("line", range(1, 9))
def test_an_interrupt_while_a_block_opens_leaves_none_open(line, backend):
    """Ctrl-C at each line of Streaming.__enter__."""
    w = np.ones(3)
    optimizer, seen = fastrms.RMSProp(w, backend=backend), [0]

    def trace(frame, event, argument):
        if frame.f_code is type(block).__enter__.__code__:
            return at_line

    def at_line(frame, event, argument):
        seen[0] += event == "line"
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if seen[0] == line and not text.startswith("return"):  # where no interrupt comes: nothing is called there
            sys.settrace(None)
            raise KeyboardInterrupt
        return at_line

    block = optimizer.streaming()
    before = sys.gettrace()
    try:
        sys.settrace(trace)
        with block:
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    optimizer.step(w.copy())
    assert optimizer.steps == 1


def test_early_stopping_restores_whatever_it_kept(backend):
    """The state that was kept is the optimizer's own, NaN included; a parameter is not lost for it."""
    w = np.ones(2)
    optimizer = fastrms.RMSProp(w, backend=backend)
    optimizer.step(np.array([np.nan, 1.0]))
    stopping = schedules.EarlyStopping(w, optimizer=optimizer)
    kept = w.copy()
    optimizer.step(np.ones(2))
    stopping.restore()
    assert np.array_equal(w, kept, equal_nan=True) and optimizer.steps == 1


def test_measuring_the_norm_alters_nothing(backend):
    """clip_norm=inf: a NaN in one tensor poisons that element alone."""
    w = [np.ones(3), np.ones(2)]
    optimizer = fastrms.RMSProp(w, backend=backend)
    info = optimizer.step([np.array([np.nan, 1.0, 1.0]), np.ones(2)], clip_norm=float("inf"))
    assert np.isnan(info.grad_norm) and np.isnan(w[0]).tolist() == [True, False, False] and (w[1] < 1).all()


def test_every_name_of_the_package_can_be_looked_at():
    """hasattr() and help() do not raise, whatever is installed."""
    assert all(isinstance(hasattr(fastrms, name), bool) for name in ("cuda", "numba", "schedules", "nothing"))
    assert inspect.getmembers(fastrms)
