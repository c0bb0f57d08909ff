"""The norm over tensors that are spread over ranks has the bits of the norm of the whole, and so have the parameters.

Ranks are threads here: a barrier is their communicator.
"""

import threading

import numpy as np
import pytest
from conftest import BACKENDS, DTYPES, bits, c, wild_values

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


@pytest.mark.parametrize("values", ["plain", "wild", "nonfinite"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
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
        optimizer = fastrms.RMSProp([np.zeros_like(mine)], backend=backend, shards=fastrms.Shards(comm.gather_of(rank), table))
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
