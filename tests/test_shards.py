"""The norm over tensors that are spread over ranks has the bits of the norm of the whole, and so have the parameters.

Ranks are threads here: a barrier is their communicator.
"""

import threading

import numpy as np
import pytest
from conftest import DTYPES, bits, c, wild_values
from test_readme import example

import fastrms
from fastrms import shards
from fastrms.backends import norm

BLOCK, SEGMENT = norm.BLOCK, norm.SEGMENT
SIZES = [5, 3 * BLOCK + 17, SEGMENT + BLOCK + 3, 0, 1]  # of the whole tensors
UGLY = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1]
TIMEOUT = 60  # seconds; a broken barrier raises in all ranks


class Communicator:
    """gather() of ranks that are threads."""

    def __init__(self, count):
        self.barrier, self.sent = threading.Barrier(count), [None] * count
        self.calls = []

    def gather_of(self, rank):
        def gather(message):
            self.sent[rank] = message
            self.barrier.wait(TIMEOUT)
            found = list(self.sent)
            self.barrier.wait(TIMEOUT)
            self.calls.append((rank, len(message)))
            return found

        return gather


def at_once(count, work):
    """[work(rank) of each rank], all at the same time; an exception takes the place of a result."""
    found = [None] * count

    def run(rank):
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive()
    return found


def no_error(found):
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def edges_of(kind, size, count):
    """Where the ranks begin and end in a tensor: count + 1 numbers."""
    rng = np.random.default_rng(count)
    if kind == "even":
        inner = [size * k // count for k in range(1, count)]
    elif kind == "first takes all":
        inner = [size] * (count - 1)
    elif kind == "last takes all":
        inner = [0] * (count - 1)
    else:
        inner = sorted(min(size, int(k)) for k in rng.choice([*UGLY, size // 2, size - 1], count - 1) if k >= 0)
        inner = [0] * (count - 1 - len(inner)) + inner
    return [0, *inner, size]


KINDS = ["even", "first takes all", "last takes all", "ugly"]


def cut_up(arrays, kind, count):
    """For each rank (its parts of these arrays, its table)."""
    edges = [edges_of(kind, array.size, count) for array in arrays]
    return [
        (
            [array[e[rank] : e[rank + 1]] for array, e in zip(arrays, edges, strict=True)],
            [(k, e[rank], array.size) for k, (array, e) in enumerate(zip(arrays, edges, strict=True))],
        )
        for rank in range(count)
    ]


def gradients(kind, dtype, seed):
    """Arrays of SIZES; "wild" has magnitudes near the ends of the range, "nonfinite" infinities and NaN as well."""
    rng = np.random.default_rng(seed)
    made = []
    for size in SIZES:
        values = rng.standard_normal(size)
        if kind == "wild":
            most = 300 if dtype == np.float64 else 30
            values *= 10.0 ** rng.integers(-most, most, size)
        made.append(wild_values(size, dtype, seed) if kind == "nonfinite" and size else values.astype(dtype))
    return made


def whole(make, params, grads, steps, **options):
    """(StepInfos, parameters) of one process over the whole."""
    params = [param.copy() for param in params]
    optimizer = make(params, **options)
    return [optimizer.step(grads, **said) for said in steps], params


def sharded(make, params, grads, steps, kind, count, **options):
    """(StepInfos of each rank, parameters) of `count` ranks."""
    params, comm = [param.copy() for param in params], Communicator(count)
    parts, of_grads = cut_up(params, kind, count), cut_up(grads, kind, count)

    def work(rank):
        mine, table = parts[rank]
        optimizer = make(mine, shards=fastrms.Shards(comm.gather_of(rank), table), **options)
        return [optimizer.step(of_grads[rank][0], **said) for said in steps]

    return no_error(at_once(count, work)), params


def equal(found, wanted):
    assert (found.applied, found.nonfinite) == (wanted.applied, wanted.nonfinite)
    assert (found.grad_norm is None) == (wanted.grad_norm is None)
    assert found.grad_norm is None or np.array_equal(bits(found.grad_norm), bits(wanted.grad_norm))


STEPS = [
    {"clip_norm": 1.0},
    {"clip_norm": 1e-3, "grad_scale": 1 / 3},
    {},
    {"clip_norm": float("inf")},
    {"clip_norm": 1e300, "grad_scale": 0.7},
]


@pytest.mark.parametrize(
    ("values", "nonfinite"),
    [("plain", "propagate"), ("wild", "propagate"), ("nonfinite", "propagate"), ("nonfinite", "skip"), ("wild", "skip")],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_have_the_bits_of_one_process(backend, dtype, kind, values, nonfinite):
    grads = gradients(values, dtype, 1)
    params = gradients("plain", dtype, 2)
    options = {"backend": backend, "nonfinite": nonfinite, "groups": None}
    wanted, after = whole(fastrms.Adam, params, grads, STEPS, **options)
    for count in (1, 2, 3, 4):
        found, together = sharded(fastrms.Adam, params, grads, STEPS, kind, count, **options)
        for infos in found:
            for one, other in zip(infos, wanted, strict=True):
                equal(one, other)
        assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(together, after, strict=True))


@pytest.mark.parametrize("cut", UGLY)
def test_a_cut_at_an_ugly_place(backend, cut):
    (grad,) = grads = [np.random.default_rng(3).standard_normal(SEGMENT + 2 * BLOCK + 5).astype(np.float32)]
    want = fastrms.RMSProp(np.zeros_like(grad), backend=backend).step(grad, clip_norm=1.0).grad_norm
    comm = Communicator(2)

    def work(rank):
        mine = (grads[0][:cut], grads[0][cut:])[rank]
        table = [(0, (0, cut)[rank], grad.size)]
        optimizer = fastrms.RMSProp(
            [np.zeros_like(mine)], backend=backend, shards=fastrms.Shards(comm.gather_of(rank), table)
        )
        return optimizer.step([mine], clip_norm=1.0).grad_norm

    assert no_error(at_once(2, work)) == [want, want]


def test_another_order_of_sums_has_other_bits(monkeypatch):
    """The tests above are able to fail: with pieces in the order of ranks the norm differs."""
    grads = gradients("wild", DTYPES[0], 5)
    wanted, _ = whole(fastrms.Adam, grads, grads, STEPS[:1], backend="numpy")
    monkeypatch.setattr(shards, "sorted", lambda found, key: found, raising=False)
    monkeypatch.setattr(shards, "refuse_gaps", lambda runs: None)
    found, _ = sharded(fastrms.Adam, grads, grads, STEPS[:1], "even", 3, backend="numpy")
    assert found[0][0].grad_norm == pytest.approx(wanted[0].grad_norm)
    assert found[0][0].grad_norm != wanted[0].grad_norm


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_are_shared_by_threads(backend, threads):
    before = fastrms.get_num_threads()
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(3 * SEGMENT + 100).astype(np.float32), rng.standard_normal(SEGMENT).astype(np.float32)]
    fastrms.set_num_threads(threads)
    try:
        wanted, after = whole(fastrms.RMSProp, grads, grads, STEPS, backend=backend)
        found, together = sharded(fastrms.RMSProp, grads, grads, STEPS, "even", 2, backend=backend)
    finally:
        fastrms.set_num_threads(before)
    for infos in found:
        assert infos == wanted
    assert all(np.array_equal(a, b) for a, b in zip(together, after, strict=True))


def pair(backend, values, cut=None, make=fastrms.RMSProp, **options):
    """(step(rank, **said), parameters, Communicator) of two ranks that hold one tensor of these values as gradient."""
    values = np.array(values, np.float32)
    cut, comm = values.size // 2 if cut is None else cut, Communicator(2)
    params, grads = np.ones_like(values), [values[:cut], values[cut:]]
    parts = [params[:cut], params[cut:]]

    def join(rank):
        held = fastrms.Shards(comm.gather_of(rank), [(0, (0, cut)[rank], values.size)])
        return make([parts[rank]], backend=backend, shards=held, **options)

    optimizers = no_error(at_once(2, join))
    return lambda rank, **said: optimizers[rank].step([grads[rank]], **said), params, comm, optimizers, grads


def test_all_ranks_skip_or_raise_together(backend):
    values = [1.0, 2.0, np.nan, np.inf]
    step, params, *_ = pair(backend, values, nonfinite="skip")
    assert at_once(2, step) == [fastrms.StepInfo(False, None, 2)] * 2
    step, params, *_ = pair(backend, values, nonfinite="raise")
    found = at_once(2, step)
    assert all(isinstance(error, FloatingPointError) and "2 element(s)" in str(error) for error in found)
    assert all("first of them in grads[0]" in str(error) for error in found) and (params == 1).all()


def test_a_tensor_of_another_rank_is_said_to_be_one(backend):
    comm, grads = Communicator(2), [np.ones(3), np.array([np.inf])]

    def work(rank):
        held = fastrms.Shards(comm.gather_of(rank), [(rank, 0, grads[rank].size)])
        fastrms.Adam([np.zeros_like(grads[rank])], backend=backend, nonfinite="raise", shards=held).step([grads[rank]])

    errors = at_once(2, work)
    assert "a tensor of another rank" in str(errors[0]) and "grads[0]" in str(errors[1])


def test_whole_tensors_of_several_ranks_are_summed_by_number(backend):
    """As ZeRO has them: rank 0 holds tensors 0 and 2, in another order, rank 1 holds tensor 1."""
    rng = np.random.default_rng(7)
    grads = [rng.standard_normal(size) * 10.0**k for k, size in enumerate((100, BLOCK + 1, SEGMENT + 7))]
    wanted, after = whole(fastrms.Adam, grads, grads, STEPS, backend=backend)
    params, comm = [grad.copy() for grad in grads], Communicator(2)

    def work(rank):
        mine = ([2, 0], [1])[rank]
        held = fastrms.Shards(comm.gather_of(rank), [(k, 0, grads[k].size) for k in mine])
        optimizer = fastrms.Adam([params[k] for k in mine], backend=backend, shards=held)
        return [optimizer.step([grads[k] for k in mine], **said) for said in STEPS]

    assert no_error(at_once(2, work)) == [wanted, wanted]
    assert all(np.array_equal(a, b) for a, b in zip(params, after, strict=True))


def test_several_parts_of_one_tensor_on_one_rank(backend):
    """Three parts of a block on one rank, and tensors of both dtypes."""
    rng = np.random.default_rng(8)
    grads = [rng.standard_normal(BLOCK + 9).astype(dtype) for dtype in DTYPES]
    wanted = fastrms.Adam([np.ones_like(grad) for grad in grads], backend=backend).step(grads, clip_norm=1.0)
    rows = [(k, start, stop) for k in (1, 0) for start, stop in ((0, 3), (3, 10), (10, BLOCK + 9))]
    parts = [grads[k][start:stop] for k, start, stop in rows]
    held = fastrms.Shards(lambda message: [message], [(k, start, BLOCK + 9) for k, start, _ in rows])
    optimizer = fastrms.Adam([np.ones_like(part) for part in parts], backend=backend, shards=held)
    assert optimizer.step(parts, clip_norm=1.0) == wanted


def test_a_part_that_several_ranks_hold_counts_once(backend):
    """A tensor that each of two ranks holds whole, and one that four ranks hold in two equal pairs."""
    grad = np.random.default_rng(9).standard_normal(BLOCK * 2 + 11)
    wanted = fastrms.Adam(np.ones_like(grad), backend=backend).step(grad, clip_norm=1.0)
    for count, edges in ((2, [(0, grad.size)] * 2), (4, [(0, 5000), (5000, grad.size)] * 2)):
        comm = Communicator(count)

        def work(rank, comm=comm, edges=edges):
            mine = grad[slice(*edges[rank])]
            held = fastrms.Shards(comm.gather_of(rank), [(0, edges[rank][0], grad.size)])
            return fastrms.Adam(np.ones_like(mine), backend=backend, shards=held).step(mine, clip_norm=1.0)

        assert no_error(at_once(count, work)) == [wanted] * count


@pytest.mark.parametrize("none", ["one rank has none", "no rank has any"])
def test_a_rank_without_gradients_takes_part(backend, none):
    """Its part counts as zeros; the counts of its tensors stand still."""
    grad = np.random.default_rng(10).standard_normal(BLOCK + 5)
    with_zeros = np.concatenate([grad[:100] if none == "one rank has none" else np.zeros(100), np.zeros(BLOCK - 95)])
    wanted = fastrms.Adam(np.ones_like(grad), backend=backend).step(with_zeros, clip_norm=1.0).grad_norm
    comm = Communicator(2)

    def work(rank):
        mine = (grad[:100], grad[100:])[rank]
        held = fastrms.Shards(comm.gather_of(rank), [(0, (0, 100)[rank], grad.size)])
        optimizer = fastrms.Adam([np.ones_like(mine)], backend=backend, shards=held)
        given = [mine if rank == 0 and none == "one rank has none" else None]
        return [optimizer.step(given, clip_norm=1.0).grad_norm for _ in range(2)], optimizer.tensor_steps

    steps = 2 if none == "one rank has none" else 0
    assert no_error(at_once(2, work)) == [([wanted] * 2, [steps]), ([wanted] * 2, [0])]


def test_bound_gradients_and_the_exchange(backend):
    """The short ways of a step exchange too, and a plain step does not."""
    *_, comm, optimizers, grads = pair(backend, np.arange(10.0))
    for rank in (0, 1):
        optimizers[rank].bind([grads[rank]])
    wanted = float(np.linalg.norm(np.arange(10.0)))
    for _ in range(3):
        comm.calls.clear()
        found = no_error(at_once(2, lambda rank: optimizers[rank].step(clip_norm=1.0)))
        assert [info.grad_norm for info in found] == [wanted] * 2 and len(comm.calls) == 2
    comm.calls.clear()
    no_error(at_once(2, lambda rank: optimizers[rank].step()))
    assert not comm.calls


def test_a_message_has_the_same_length_in_all_steps(backend):
    step, _, comm, *_ = pair(backend, np.arange(10_000.0), nonfinite="skip")
    comm.calls.clear()
    for said in ({}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "grad_scale": 2.0}):
        no_error(at_once(2, lambda rank, said=said: step(rank, **said)))
    # the cut, at 5000, leaves a whole block before and after it: 904 elements of float32 here and 3192 there
    assert set(comm.calls) == {(0, 16 + 2 * 24 + 904 * 4), (1, 16 + 2 * 24 + 3192 * 4)}


@pytest.mark.parametrize("bound", [False, True])
def test_what_gather_raises_the_step_raises(backend, bound):
    fail = []

    def gather(message):
        if fail:
            raise ConnectionResetError("rank 3 has gone")
        return [message]

    param, grad = np.ones(5), np.ones(5)
    optimizer = fastrms.Adam(param, backend=backend, shards=fastrms.Shards(gather, [(0, 0, 5)]))
    optimizer.bind(grad)
    fail.append(True)
    with pytest.raises(ConnectionResetError, match="rank 3 has gone"):
        optimizer.step(None if bound else grad.copy(), clip_norm=1.0)
    assert (param == 1).all() and optimizer.steps == 0
    fail.clear()
    assert optimizer.step(None if bound else grad, clip_norm=1.0).grad_norm == 5**0.5
    assert optimizer.steps == 1


def test_ranks_that_ask_for_different_norms_are_refused_together(backend):
    step, params, *_ = pair(backend, np.ones(4))
    errors = at_once(2, lambda rank: step(rank, clip_norm=(1.0, 2.0)[rank]))
    for error in errors:
        assert isinstance(error, ValueError) and "1 and 1 on rank 0; 1 and 2 on rank 1" in str(error)
    assert (params == 1).all()


def test_what_gather_gives_is_checked():
    def broken(*replies):
        replies = iter(replies)
        return lambda message: next(replies)(message)

    def make(*replies):
        shards = fastrms.Shards(broken(*replies), [(0, 0, 4)])
        return fastrms.Adam(np.ones(4), shards=shards)

    with pytest.raises(ValueError, match=r"1 message.s., and that of this rank is not among them"):
        make(lambda message: [b"x" * len(message)])
    for wrong in (lambda message: [message] * 2, lambda message: [message[:-1]], lambda message: [bytes(len(message))]):
        optimizer = make(lambda message: [message], wrong)
        with pytest.raises(ValueError, match="not that of this rank at its place"):
            optimizer.step(np.ones(4), clip_norm=1.0)


@pytest.mark.parametrize("reply", [None, 7, [None], "text"])
def test_a_gather_that_gives_no_messages_is_told_what_to_give(backend, reply):
    """comm.gather of mpi4py, for one, gives None on all ranks but one."""
    answers, params = [], np.ones(4)

    def gather(message):
        return answers.pop(0) if answers else [message]

    optimizer = fastrms.Adam(params, backend=backend, shards=fastrms.Shards(gather, [(0, 0, 4)]))
    for step in (lambda: optimizer.step(np.ones(4), clip_norm=1.0),
                 lambda: fastrms.Adam(np.ones(4), backend=backend, shards=fastrms.Shards(gather, [(0, 0, 4)]))):  # fmt: skip
        answers.append(reply)
        with pytest.raises(TypeError, match=r"gather gave .*messages of all ranks, a sequence of bytes.*allgather"):
            step()
    assert (params == 1).all() and optimizer.step(np.ones(4), clip_norm=1.0).applied


def alone(params, table, **options):
    return fastrms.Adam(params, shards=fastrms.Shards(lambda message: [message], table), **options)


def test_wrong_shards_are_refused_by_name():
    ones = np.ones(4)
    for table, sentence in (
        ([(0, 0, 5)], "elements 4 to 5 of tensor 0 of shards are on no rank"),
        ([(0, 1, 5)], "elements 0 to 1 of tensor 0 of shards are on no rank"),
        ([(0, 2, 5)], "has 4 elements from 2 on, which is more than the 5"),
        ([(0, 0, 4), (1, 0, 4)], "has 2 rows, the optimizer has 1 tensor"),
        ([(0, 5, 4)], r"table\[0\]=\(0, 5, 4\) must be"),
        ([(-1, 0, 4)], r"table\[0\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            alone(ones, table)
    with pytest.raises(ValueError, match="elements 2 to 4 of tensor 0 of shards are held twice"):
        alone([np.ones(4), np.ones(4)], [(0, 0, 6), (0, 2, 6)])
    with pytest.raises(ValueError, match="the ranks disagree on tensor 0 of shards: 6 elements of 4 bytes, 6 elements of 8"):
        alone([np.ones(3), np.ones(3, np.float32)], [(0, 0, 6), (0, 3, 6)])
    for row in ((0, 0.0, 4), (0, 4), 7):
        with pytest.raises(TypeError, match=r"table\[0\]"):
            alone(ones, [row])
    with pytest.raises(TypeError, match="gather=None is not callable"):
        fastrms.Shards(None, [(0, 0, 4)])
    with pytest.raises(TypeError, match=r"must be a fastrms\.Shards"):
        fastrms.Adam(ones, shards=[(0, 0, 4)])


def test_pieces_are_the_largest_that_fit():
    run = shards.Run(0, BLOCK - 1, 3 * SEGMENT + 5, 3 * SEGMENT + 10, 4)
    found = list(shards.cut(run))
    assert [piece[1] for piece in found[:-1]] == [piece[0] for piece in found[1:]]
    assert found[0] == (BLOCK - 1, BLOCK, False) and found[-1] == (3 * SEGMENT, 3 * SEGMENT + 5, False)
    assert [stop - start for start, stop, _ in found[1:-1]] == [BLOCK] * 63 + [SEGMENT] * 2
    assert list(shards.cut(shards.Run(0, 0, 0, 7, 4))) == []


@pytest.mark.skipif(c.lib is None, reason="the C extension is absent")
def test_an_optimizer_with_shards_is_freed_at_once():
    import gc
    import weakref

    gc.disable()
    try:
        optimizer = alone(np.ones(4), [(0, 0, 4)], backend="c")
        optimizer.step(np.ones(4), clip_norm=1.0)
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_the_example_runs():
    class Alone:
        @staticmethod
        def allgather(message):
            return [message]

    part = {"w_part": np.ones(10), "gw_part": np.ones(10), "start": 0, "size": 10}
    names = {"fastrms": fastrms, "comm": Alone, **part}
    exec(example("Shards(gather, [(0, start"), names)
    assert names["info"].grad_norm == 10**0.5 and (names["w_part"] < 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cut_costs_what_the_page_says(dtype):
    """A block that is cut puts all its elements into the messages; a cut on a block costs nothing."""
    for cut, blocks in ((5 * BLOCK + 1, 1), (5 * BLOCK, 0)):
        runs = [shards.Run(0, 0, cut, SEGMENT, dtype.itemsize), shards.Run(0, cut, SEGMENT, SEGMENT, dtype.itemsize)]
        lengths = [shards.message([run], 0)[1] for run in runs]
        assert sum(lengths) == 2 * 16 + (SEGMENT // BLOCK + blocks) * 24 + blocks * BLOCK * dtype.itemsize


@pytest.mark.skipif(c.lib is None, reason="the C extension is absent")
def test_a_step_from_c_exchanges_too():
    asked = []

    def gather(message):
        asked.append(len(message))
        if len(asked) == 3:
            raise ConnectionResetError("rank 3 has gone")
        return [message]

    param, grad = np.ones(5), np.ones(5)
    optimizer = fastrms.Adam(param, backend="c", nonfinite="skip", shards=fastrms.Shards(gather, [(0, 0, 5)]))
    optimizer.bind(grad)
    function, plan = optimizer.c_step
    step, argument = c.ffi.cast("int(*)(void *)", function), c.ffi.cast("void *", plan)
    assert step(argument) == c.lib.FASTRMS_OK and len(asked) == 2 and (param < 1).all()
    before = param.copy()
    assert step(argument) == c.lib.FASTRMS_NOT_GATHERED and (param == before).all()
    assert step(argument) == c.lib.FASTRMS_OK and optimizer.steps == 2


@pytest.mark.skipif(c.lib is None, reason="the C extension is absent")
def test_the_process_may_fork_while_messages_are_gathered(backend):
    """The child has the optimizer as it was before the step."""
    import os

    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    param, forks = np.ones(5), []

    def gather(message):
        if forks:
            child = os.fork()
            if child == 0:
                os._exit(0 if (param == 1).all() and optimizer.steps == 0 else 1)
            forks.append(os.waitpid(child, 0)[1])
        return [message]

    optimizer = fastrms.Adam(param, backend=backend, shards=fastrms.Shards(gather, [(0, 0, 5)]))
    forks.append(None)
    optimizer.step(np.ones(5), clip_norm=1.0)
    assert forks == [None, 0]
