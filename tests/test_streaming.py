"""opt.streaming(): one step, tensor by tensor, with the bits and the counts of a whole one."""

import ctypes
import threading

import numpy as np
import pytest
from conftest import BACKENDS, Guarded, backends, bits
from test_own_rules import Limited, Lion
from test_same_bits import OPTIMIZERS
from test_step import everything, shared_out  # noqa: F401 (a fixture)

import fastrms
from fastrms.memory import host

DTYPES = [np.float32, np.float64, np.float32, np.float32, np.float64]
SHAPES = [(7, 11), (1003,), (0,), (), (4099,)]
OWN = [pytest.param(Lion, {}, id="lion"), pytest.param(Limited, {"lr": 0.5}, id="limited")]


def tensors(seed):
    rng = np.random.default_rng(seed)
    return [np.array(rng.standard_normal(s), d) for s, d in zip(SHAPES, DTYPES, strict=True)]


def grouped(leaves):
    return [{"params": leaves[:2], "lr": 0.3}, {"params": dict(zip("abc", leaves[2:], strict=True))}]


LABELS = [(0, 0), (0, 1), (1, "a"), (1, "b"), (1, "c")]


@pytest.mark.parametrize("make, options", [*OPTIMIZERS, *OWN])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_same_bits_and_counts_as_a_whole_step(backend, shared_out, make, options, zero_grad):  # noqa: F811
    """Backwards, from one scratch array with guard zones; now and then a tensor is left out, or a block is empty."""
    if make in (Lion, Limited) and backend not in backends.FOR_OWN_RULES:
        pytest.skip("own rules are Python")
    wholes, parts = tensors(0), tensors(0)
    whole = make(grouped(wholes), backend=backend, **options)
    streamed = make(grouped(parts), backend=backend, zero_grad=zero_grad, **options)
    for step in range(6):
        grads = tensors(step + 1)
        given = [k for k in range(5) if (k + step) % 4]
        passed = [g if k in given else None for k, g in enumerate(grads)]
        whole.step([passed[:2], dict(zip("abc", passed[2:], strict=True))], grad_scale=0.25)
        with streamed.streaming(grad_scale=0.25) as s:
            for k in reversed(given):
                scratch = Guarded(grads[k].reshape(-1), offset=step)
                s.step(LABELS[k], scratch.array.reshape(SHAPES[k]))
                left = bits(np.zeros_like(grads[k]) if zero_grad else grads[k])
                assert scratch.intact() and np.array_equal(bits(scratch.array), left)
        assert s.updated == [LABELS[k] for k in reversed(given)]
        with streamed.streaming() as s:
            assert s.updated == []
        assert everything(wholes, whole) == everything(parts, streamed)


def test_names_follow_the_structure(backend):
    w, b = np.ones(3), np.ones(2)
    for params, labels in (
        (w, [0]), ([w, b], [0, 1]), ({"w": w, ("x", 2): b}, ["w", ("x", 2)]),
        ([{"params": w}, {"params": {"b": b}}], [(0, 0), (1, "b")]),
    ):  # fmt: skip
        optimizer = fastrms.RMSProp(params, backend=backend)
        with optimizer.streaming() as s:
            for label, grad in zip(labels, (w + 1, b + 1), strict=False):
                s.step(label, grad)
            for wrong in ("other", 7, None, [], (0, 5)):
                with pytest.raises(ValueError, match=r"is no tensor of this optimizer; there are "):
                    s.step(wrong, w + 1)
            with pytest.raises(ValueError, match="was updated already in this streaming block"):
                s.step(labels[0], w + 1)
        assert s.updated == labels and optimizer.steps == 1


def test_the_plan_refuses_a_streamed_overlap(backend):
    """Of the gradient, and of a parameter that has moved, with any parameter, state or each other; then nothing is taken."""
    memory = np.ones(80)
    params = [memory[:10], memory[10:20], np.ones(0)]
    optimizer = fastrms.Adam(params, backend=backend)
    state = optimizer.state["exp_avg"][1]
    plan = optimizer._plan

    def step(k, param, grad):
        buffers = (x if x is None else host.acquire(x, "x", writable=True) for x in (param, grad))
        return plan.stream_step(k, *buffers, None, 1.0)

    free = memory[40:50]
    plan.stream_open()
    before = everything([memory], optimizer)
    for param, grad in [
        (None, memory[:10]), (None, memory[19:29]), (None, memory[9:19]), (None, state), (memory[20:30], memory[29:39]),
        (memory[5:15], free), (memory[11:21], free), (state, free), (memory[20:30], memory[10:20]), (free, free),
    ]:  # fmt: skip
        assert step(0, param, grad) == backends.OVERLAP
        assert everything([memory], optimizer) == before and plan.tensor_steps == [0, 0, 0]
    assert step(2, None, memory[:0]) == step(0, memory[20:30], memory[30:40]) == backends.OK
    assert (memory[:20] == 1).all() and (memory[20:30] < 1).all() and (memory[30:] == 1).all()
    assert step(1, None, memory[29:39]) == backends.OVERLAP and step(1, None, memory[:10]) == backends.OK
    plan.stream_close()
    assert plan.tensor_steps == [1, 1, 1]


def test_the_plan_refuses_to_move_a_parameter_onto_another_buffer(backend):
    """A change() that brings no gradients is checked against those that are held, too; then nothing is taken."""
    memory, far = np.ones(90), np.ones(10)
    first, second, grads = memory[:10], memory[10:20], [memory[20:30], memory[30:40]]
    optimizer = fastrms.Adam([first, second], backend=backend)
    optimizer.bind(grads)
    plan, state = optimizer._plan, optimizer.state["exp_avg"][1]
    before = everything([memory], optimizer)

    def move(*params):
        return plan.change(params=[host.acquire(x, "x", writable=True) for x in params], run=True)[0]

    for onto in (second, memory[5:15], state, memory[20:30], memory[35:45]):
        assert move(onto, second) == backends.OVERLAP
        assert everything([memory], optimizer) == before and optimizer.steps == 0
    assert move(far, second) == backends.OK and optimizer.steps == 1
    assert (first == 1).all() and (far < 1).all() and (second < 1).all()


def test_a_plan_that_holds_nothing_makes_no_step(backend):
    """Under no number, 0 included."""
    w = np.ones(5)
    optimizer = fastrms.RMSProp(w, backend=backend)
    step, step_held, plan = optimizer._plan.bound_step()
    for _ in range(2):
        assert [step(plan), step_held(plan, 0), step_held(plan, 1)] == [backends.NOT_HELD] * 3
        assert optimizer.steps == 0 and (w == 1).all()
        optimizer.bind(np.ones(5))
        optimizer._plan.change(grads=[None], hold=0, run=False)


def test_a_gradient_that_does_not_fit_changes_nothing(backend):
    memory = np.ones(40)
    params = {"a": memory[:10], "b": memory[10:20], "c": np.ones((2, 5))}
    optimizer = fastrms.Adam(params, backend=backend)
    state = optimizer.state["exp_avg"]
    with optimizer.streaming() as s:
        s.step("c", np.ones((2, 5)))
        before = everything(params.values(), optimizer)
        for name, grad, error, words in [
            ("a", None, TypeError, r"grads\['a'\] is None; a tensor without a gradient is left out"),
            ("a", np.ones(10, np.float32), TypeError, r"grads\['a'\] has dtype float32"),
            ("a", np.ones(9), ValueError, "has shape"),
            ("a", [1.0] * 10, TypeError, "is a list"),
            ("a", memory[:10], ValueError, r"grads\['a'\] and params\['a'\] overlap"),
            ("a", memory[15:25], ValueError, r"params\['b'\] and grads\['a'\] overlap"),
            ("b", memory[1:11], ValueError, "overlap"),
            ("a", state["b"], ValueError, r"exp_avg of params\['b'\] "),
        ]:
            with pytest.raises(error, match=words):
                s.step(name, grad)
            assert everything(params.values(), optimizer) == before and s.updated == ["c"]
        s.step("b", memory[20:30])  # it only touches what lies before
        s.step("a", memory[20:30])
    assert s.updated == ["c", "b", "a"] and optimizer.steps == 1


def test_everything_else_is_refused_while_a_block_is_open(backend):
    w, g = np.ones(5), np.ones(5)
    optimizer = fastrms.RMSProp(w, backend=backend)
    optimizer.bind(g)
    optimizer.step()
    saved = optimizer.state_dict()
    function, address = optimizer.c_step if backend == "c" else (None, None)
    step, step_held, plan = optimizer._plan.bound_step()
    with optimizer.streaming() as s:
        before = everything([w], optimizer)
        for call in (
            optimizer.step, lambda: optimizer.step(g + 1), lambda: optimizer.step(g, clip_norm=1.0),
            lambda: optimizer.bind(g), lambda: optimizer.load_state_dict(saved), optimizer.state_dict,
            lambda: setattr(optimizer, "lr", 0.5), lambda: optimizer.groups[0].update(rho=0.5),
            optimizer.streaming().__enter__, s.__enter__,
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="a streaming block of this RMSProp is open; leave it first"):
                call()
            assert everything([w], optimizer) == before and optimizer.lr == 0.01
        numbers = optimizer._gradients.number, 0, 99
        assert [step(plan), *(step_held(plan, number) for number in numbers)] == [backends.STREAMING] * 4
        s.step(0, g)
        if backend == "c":
            assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)(function)(address) == 7
    optimizer.step()  # still bound
    want = np.ones(5)
    reference = fastrms.RMSProp(want, backend=backend)
    for _ in range(3):
        reference.step(g)
    assert np.array_equal(w, want) and optimizer.steps == 3
    for call in (lambda: s.step(0, g), lambda: optimizer.streaming().step(0, g)):
        with pytest.raises(RuntimeError, match="this streaming block is not open"):
            call()


def test_bound_steps_go_on_around_a_block(backend):
    """Coefficients that the plan keeps from step to step are those of each tensor still, whichever was streamed."""
    results = []
    for streamed in (False, True):
        params, grads = [np.ones(3), np.ones(4)], [np.ones(3), np.ones(4)]
        groups = [{"params": params[0], "lr": 0.1}, {"params": params[1], "lr": 0.3}]
        optimizer = fastrms.RMSProp(groups, backend=backend)
        for _ in range(2):
            optimizer.bind(grads)
            optimizer.step()
            if streamed:
                with optimizer.streaming() as s:
                    s.step((1, 0), grads[1])
            else:
                optimizer.step([None, grads[1]])
                optimizer.bind(grads)
            optimizer.step()
        results.append(everything(params, optimizer))
    assert results[0] == results[1]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_leaving_early_takes_nothing_back_and_says_what_was_done(backend, error):
    params, want = [np.ones(3) for _ in range(4)], [np.ones(3) for _ in range(4)]
    optimizer, reference = (fastrms.Adam(p, backend=backend) for p in (params, want))
    with pytest.raises(error), optimizer.streaming() as s:
        s.step(2, np.full(3, 5.0))
        s.step(0, np.ones(3))
        raise error
    assert s.updated == [2, 0]
    reference.step([np.ones(3), None, np.full(3, 5.0), None])
    assert everything(params, optimizer) == everything(want, reference)
    for each in (optimizer, reference):
        each.step([np.full(3, k) for k in (1.0, 2.0, 3.0, 4.0)])
    assert everything(params, optimizer) == everything(want, reference)


def test_ctrl_c_during_an_update_is_told(backend, monkeypatch):
    """KeyboardInterrupt arrives when the call returns: the tensor is updated and is named."""
    w = np.ones(3)
    optimizer = fastrms.Adam(w, backend=backend)
    real = optimizer._plan.stream_step

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer._plan, "stream_step", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.streaming() as s:
        s.step(0, np.ones(3))
    assert s.updated == [0] and optimizer.steps == 1 and w[0] < 1


def test_a_schedule_is_asked_once_per_block_that_updates(backend):
    asked, params = [], [np.ones(3), np.ones(4)]
    optimizer = fastrms.RMSProp(params, lr=lambda step: asked.append(step) or 0.1, backend=backend)
    for _ in range(3):
        with optimizer.streaming():
            pass
        with optimizer.streaming() as s:
            s.step(1, np.ones(4))
            s.step(0, np.ones(3))
    assert asked == [0, 1, 2] and optimizer.steps == 3


def test_what_a_streamed_step_cannot_do(backend):
    w = np.ones(3)
    for nonfinite in ("skip", "raise"):
        with pytest.raises(ValueError, match=f"nonfinite='{nonfinite}' looks at all gradients before the first update"):
            fastrms.RMSProp(w, nonfinite=nonfinite, backend=backend).streaming()
    with pytest.raises(ValueError, match=r"grad_scale=0\.0 must be from"):
        fastrms.RMSProp(w, backend=backend).streaming(grad_scale=0)
    g = np.ones(3)
    g.flags.writeable = False
    with (
        fastrms.RMSProp(w, zero_grad=True, backend=backend).streaming() as s,
        pytest.raises(ValueError, match="grads is read-only"),
    ):
        s.step(0, g)


def test_a_flat_buffer_streams_through_its_mapping(backend):
    flat = fastrms.FlatBuffer({"w": (2, 3), "b": (3,)})
    with pytest.raises(TypeError, match=r"flat\.params"):
        fastrms.RMSProp(flat, backend=backend).streaming()
    optimizer = fastrms.RMSProp(flat.params, lr=1.0, rho=0.0, backend=backend)
    with optimizer.streaming() as s:
        s.step("b", np.ones(3, np.float32))
    assert np.allclose(flat.params["b"], -1) and not flat.params["w"].any()


@pytest.mark.skipif("c" not in BACKENDS, reason="without the C extension")
def test_a_second_thread_is_refused():
    """A whole step and a part of the block itself, while another thread is in a long part of the block."""
    big, small = np.ones(1 << 24, np.float32), np.ones(3)
    optimizer = fastrms.Adam([big, small], backend="c")
    grad, caught = np.ones_like(big), []
    with optimizer.streaming() as s:
        worker = threading.Thread(target=s.step, args=(0, grad))
        worker.start()
        while worker.is_alive() and not optimizer._plan._plan.busy:
            pass
        for call in (lambda: s.step(1, np.ones(3)), lambda: optimizer.step([grad, np.ones(3)])):
            try:
                call()
            except RuntimeError as error:
                caught.append(str(error))
        busy = optimizer._plan._plan.busy  # the long part has lasted until now
        worker.join()
    if busy:
        assert "in use by another thread" in caught[0] and len(caught) == 2 and s.updated == [0]
    assert optimizer.steps == 1


def test_torch_parameters_that_move_are_followed(backend):
    torch = pytest.importorskip("torch", reason="not installed: torch")
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = fastrms.RMSProp({"p": p, "q": np.ones(3)}, lr=1.0, rho=0.0, backend=backend)
    with optimizer.streaming() as s:
        p.data = torch.full((100,), 5.0)
        s.step("p", torch.ones(100))
    assert torch.allclose(p.detach(), torch.full((100,), 4.0))
    with optimizer.streaming() as s, pytest.raises(ValueError, match="overlap"):
        p.data = torch.full((100,), 5.0)
        s.step("p", p.data)
