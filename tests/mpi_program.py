"""What the ranks of tests/test_mpi.py do: `mpiexec -n 3 python tests/mpi_program.py <function> <folder>`.

Each function runs on all ranks; a rank that fails prints its traceback and ends all of them.
"""

import gc
import os
import pickle
import signal
import sys
import time
import traceback
import weakref
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

import fastrms
import fastrms.mpi
from fastrms.backends.norm import BLOCK, SEGMENT

COMM = MPI.COMM_WORLD
RANK, RANKS = COMM.rank, COMM.size
SIZES = {"w0": 7, "w1": (3, BLOCK), "empty": 0, "w2": SEGMENT + 5, "b": 1, "w3": 2 * BLOCK + 11, "scalar": ()}
BACKENDS = [name for name in fastrms.available_backends() if name != "cuda"]


def arrays(seed, dtype=np.float32, exact=False):
    """Named arrays; exact: integers times powers of two, whose sums over a few ranks are exact."""
    rng = np.random.default_rng(seed)
    made = {}
    for k, (name, shape) in enumerate(SIZES.items()):
        values = rng.integers(-1000, 1000, shape) * 2.0 ** (k - 12) if exact else rng.standard_normal(shape)
        made[name] = np.array(
            values, np.float64 if dtype == "mixed" and k % 2 else np.float32 if dtype == "mixed" else dtype
        )
    return made


def gradients(step, dtype, exact):
    """(the gradients of this rank, the sum over all ranks)."""
    every = [arrays(1000 * step + rank, dtype, exact) for rank in range(RANKS)]
    summed = {name: np.array(sum(grads[name].astype(float) for grads in every), every[0][name].dtype) for name in SIZES}
    return every[RANK], summed


def same(found, wanted):
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def raised(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


CASES = [
    (fastrms.Adam, {"weight_decay": 0.01, "decoupled": True}, {}),
    (fastrms.RMSProp, {"momentum": 0.9, "centered": True}, {"clip_norm": 1.0}),
    (fastrms.RProp, {}, {"grad_scale": 0.25}),
    (fastrms.AdaGrad, {"groups": {"w*": {"lr": 0.5}}, "nonfinite": "skip"}, {"clip_norm": 100.0, "grad_scale": 0.5}),
    (fastrms.Adam, {"lr": fastrms.schedules.Cosine(0.01, 5)}, {}),
    (fastrms.Adam, {"lr": fastrms.schedules.Cosine(0.01, 5), "nonfinite": "raise"}, {}),
]


def equal_to_one_process(folder):
    """Bit for bit, where the sum over ranks is exact: all backends, dtypes, kinds of steps and sizes of buckets."""
    for backend in BACKENDS:
        for k, (make, options, said) in enumerate(CASES):
            dtype = (np.float32, np.float64, "mixed")[k % 3]
            bucket = (1 << 22, 3 * BLOCK, 40_000)[k % 3]
            one, mine = arrays(5, dtype), arrays(5, dtype)
            reference = make(one, backend=backend, **options)
            sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, make, backend=backend, bucket=bucket, **options)
            for step in range(3):
                part, summed = gradients(step, dtype, exact=True)
                before = {name: grad.copy() for name, grad in part.items()}
                wanted = reference.step(summed, **said)
                assert sharded.step(part, **said) == wanted, (backend, k, wanted)
                same(mine, one)
                same(part, before)
            assert sharded.steps == reference.steps == 3
            assert repr(sharded).endswith(f"{make.__name__} on {RANKS} rank(s), 3 steps made>")


def near_one_process(folder):
    """Where the sum is rounded, within its rounding."""
    one, mine = arrays(5), arrays(5)
    reference = fastrms.RMSProp(one, lr=1e-3)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.RMSProp, lr=1e-3)
    for step in range(5):
        part, summed = gradients(step, np.float32, exact=False)
        wanted = reference.step(summed, clip_norm=1.0, grad_scale=1 / RANKS).grad_norm
        found = sharded.step(part, clip_norm=1.0, grad_scale=1 / RANKS).grad_norm
        assert abs(found - wanted) < 1e-6 * wanted
    for name in one:
        np.testing.assert_allclose(mine[name], one[name], rtol=1e-5, atol=1e-5)


def other_structures(folder):
    """One array, a list, groups, a FlatBuffer; arrays in Fortran order; None for some gradients and for all."""
    part, summed = ([np.array(grad, order="F") for grad in grads.values()] for grads in gradients(0, np.float32, exact=True))
    for how in ("one", "list", "groups", "flat"):
        pair = []
        for grads, make in ((summed, fastrms.Adam), (part, None)):
            values = [np.array(array, order="F") for array in arrays(5).values()]
            if how == "one":
                params, given = values[3], grads[3]
            elif how == "groups":
                params = [{"params": values[:2], "lr": 0.5}, {"params": values[2:]}]
                given = [grads[:2], grads[2:]]
            elif how == "flat":
                params = fastrms.FlatBuffer.like(dict(zip(SIZES, values, strict=True)))
                params.grad[:] = np.concatenate([grad.reshape(-1) for grad in grads])
                given = params.grads
            else:
                params = values
                given = [*grads[:1], None, *grads[2:]]
            mine = make(params) if make else fastrms.mpi.ShardedOptimizer(COMM, params, fastrms.Adam, bucket=BLOCK)
            mine.step(given, clip_norm=1.0)
            mine.step(given)
            if how == "list":
                mine.step([None] * len(given))
            pair.append((params.params if how == "flat" else dict(enumerate(values)), mine))
        same(pair[1][0], pair[0][0])
        assert pair[1][1].steps == pair[0][1].steps
        state = pair[1][1].state_dict()
        assert (state is None) == (RANK > 0)
        if state is not None:
            alike(state, pair[0][1].state_dict())


def some_have_no_gradient(folder):
    """A None of one rank counts as zeros; a tensor that is None on all ranks is left alone."""
    part, _ = gradients(0, np.float32, exact=True)
    first = arrays(0, np.float32, exact=True)  # of rank 0
    one, mine = arrays(5), arrays(5)
    reference = fastrms.Adam(one)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.Adam)
    wanted = {**dict.fromkeys(SIZES), "w3": first["w3"]}
    for _ in range(2):
        reference.step(wanted)
        sharded.step({**dict.fromkeys(SIZES), "w3": part["w3"] if RANK == 0 else None})
        same(mine, one)
    state = sharded.state_dict()
    if RANK == 0:
        alike(state, reference.state_dict())


def alike(found, wanted):
    """Two state_dicts."""
    assert found.keys() == wanted.keys()
    assert {**found, "tensors": 0} == {**wanted, "tensors": 0}, (found, wanted)
    for mine, other in zip(found["tensors"], wanted["tensors"], strict=True):
        assert (mine["name"], mine["steps"]) == (other["name"], other["steps"])
        same(mine["state"], other["state"])
        assert all(mine["state"][name].shape == other["state"][name].shape for name in other["state"])


OPTIONS = {"groups": {"w*": {"lr": 0.5}}, "amsgrad": True}


def write_checkpoint(folder):
    """And what one process does further, from the parameters of now, is written beside it."""
    one, mine = arrays(5), arrays(5)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.Adam, bucket=2 * BLOCK, **OPTIONS)
    reference = fastrms.Adam(one, **OPTIONS)
    for step in range(2):
        grads = arrays(step, exact=True)
        sharded.step(grads if RANK == 0 else dict.fromkeys(SIZES))
        reference.step(grads)
    sharded.save(folder / "run.safetensors")
    reference.load(folder / "run.safetensors")
    before = {name: array.copy() for name, array in one.items()}
    reference.step(arrays(7, exact=True), clip_norm=1.0)
    if RANK == 0:
        (folder / "params.pickle").write_bytes(pickle.dumps((before, one)))
    COMM.Barrier()


def read_checkpoint(folder):
    before, after = pickle.loads((folder / "params.pickle").read_bytes())
    sharded = fastrms.mpi.ShardedOptimizer(COMM, before, fastrms.Adam, **OPTIONS)
    sharded.load(folder / "run.safetensors")
    assert sharded.steps == 2 and sharded.groups[1]["lr"] == 0.5
    sharded.step(arrays(7, exact=True) if RANK == 0 else dict.fromkeys(SIZES), clip_norm=1.0)
    same(before, after)
    said = raised((FileNotFoundError, RuntimeError), sharded.load, folder / ("none" if RANK == 0 else "run.safetensors"))
    assert "none" in said
    broken = {**fastrms.RMSProp(arrays(5)).state_dict()}
    assert "of RMSProp, this is Adam" in raised(ValueError, sharded.load_state_dict, broken)
    assert "not those of a state_dict" in raised(ValueError, sharded.load_state_dict, {})


def errors(folder):
    """One rank raises, and so do all; nothing was changed, and the next step is made."""
    last = RANKS - 1
    one, mine = arrays(5), arrays(5)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.Adam, nonfinite="raise")
    part, summed = gradients(0, np.float32, exact=True)
    wrong = {**part, "w3": part["w3"].astype(np.float64)} if last == RANK else part
    said = raised((TypeError, ValueError) if last == RANK else RuntimeError, sharded.step, wrong)
    assert "grads['w3'] has dtype float64" in said, said
    if last != RANK:
        assert said.startswith(f"rank {last} raised ")
    if RANKS > 1:
        said = raised(ValueError, sharded.step, part, grad_scale=1.0 + RANK)
        assert said == f"grad_scale must be the same on all ranks, it goes from 1 to {RANKS} (-1: None)", said
        assert "clip_norm must be the same" in raised(ValueError, sharded.step, part, clip_norm=None if RANK else 1.0)
        different = {**arrays(5), "b": np.full(1, RANK, np.float32)}
        said = raised(ValueError, fastrms.mpi.ShardedOptimizer, COMM, different, fastrms.Adam)
        assert said.startswith("params of rank(s) 1") and "Bcast" in said, said
        said = raised(ValueError, fastrms.mpi.ShardedOptimizer, COMM, arrays(5), fastrms.Adam, lr=0.1 * (1 + RANK))
        assert said.startswith("the hyper-parameters of rank(s) 1"), said
    bad = {**part, "w2": np.where(np.arange(part["w2"].size) == 9, np.nan, part["w2"]).astype(np.float32)}
    said = raised(FloatingPointError, sharded.step, bad if last == RANK else part)
    assert said.startswith("1 element(s)") and "grads['w2']" in said, said
    same(mine, one)
    assert sharded.steps == 0
    fastrms.Adam(one).step(summed)
    sharded.step(part)
    same(mine, one)
    gone = weakref.ref(sharded)
    gc.disable()
    del sharded
    assert gone() is None
    gc.enable()
    for options, words in (
        ({"zero_grad": True}, "zero the gradients after"), ({"shards": 1}, "makes them itself"),
        ({"backend": "cuda"}, "host memory"), ({"bucket": 0}, "bucket=0"), ({"timeout": 0}, "timeout=0"),
    ):  # fmt: skip
        assert words in raised(ValueError, fastrms.mpi.ShardedOptimizer, COMM, mine, fastrms.Adam, **options)
    assert "'bets1'" in raised(TypeError, fastrms.mpi.ShardedOptimizer, COMM, mine, fastrms.Adam, bets1=1)
    assert "empty" in raised(ValueError, fastrms.mpi.ShardedOptimizer, COMM, [], fastrms.Adam)


def differences(folder):
    """All ranks raise where one of them differs in what decides the exchanges, or what becomes of a step."""
    first = RANK == 0
    made = partial(fastrms.mpi.ShardedOptimizer, COMM, timeout=20.0)
    for kind, options in (
        (fastrms.Adam, {"nonfinite": "skip" if first else "propagate"}),
        (fastrms.Adam if first else fastrms.AdamW, {"weight_decay": 0.1, "decoupled": True}),
        (fastrms.Adam, {"bucket": BLOCK if first else 1 << 20}),
    ):  # fmt: skip
        said = raised(ValueError, made, {"w": np.ones(BLOCK, np.float32)}, kind, **options)
        assert said.startswith("the optimizer class, bucket or nonfinite of rank(s) 1"), said
    said = raised(ValueError if RANK == 1 else RuntimeError, made, arrays(5), fastrms.Adam, lr=-1.0 if RANK == 1 else 0.1)
    assert "lr=-1.0 must be finite" in said, said
    asked, mine, grads = [], arrays(5), arrays(6)
    sharded = made(mine, fastrms.Adam, lr=lambda step: asked.append(step) or (0.1 if first or step != 2 else 0.5))
    for how in ({}, {"clip_norm": 1.0}):
        sharded.step(grads, **how)
    assert asked == [0, 1], asked
    before = {name: array.copy() for name, array in mine.items()}
    assert (
        raised(ValueError, sharded.step, grads)
        == "lr of group 0 must be the same on all ranks, it goes from 0.1 to 0.5 (-1: None)"
    )
    sharded.lr = lambda step: 0.1 if first else step / 0
    assert (
        "ZeroDivisionError" in raised(RuntimeError, sharded.step, grads)
        if first
        else raised(ZeroDivisionError, sharded.step, grads)
    )
    sharded.lr = 0.1 * (1 + RANK)
    assert raised(ValueError, sharded.step, grads).startswith("lr of group 0 must be the same")
    sharded.lr = 0.1
    sharded.groups[0]["beta1"] = 0.9 if first else 0.8
    assert raised(ValueError, sharded.step, grads).startswith("the hash of all hyper-parameters but lr must be the same")
    sharded.groups[0]["beta1"] = 0.9
    whole = COMM.bcast(sharded.state_dict())
    for change in ({"steps": 51}, {"groups": [{**whole["groups"][0], "lr": 0.7}]},
                   {"tensors": [{**tensor, "steps": 9} for tensor in whole["tensors"]]}):  # fmt: skip
        said = raised(ValueError, sharded.load_state_dict, whole if first else {**whole, **change})
        assert said.startswith("the state_dict of rank(s) 1") and sharded.steps == 2 and sharded.lr == 0.1, said
    same(mine, before)
    sharded.load_state_dict(whole)
    sharded.step(grads)
    zero_on_one_rank()


def zero_on_one_rank():
    """A state that only some ranks cannot load is loaded on none."""
    w = np.ones(2 * BLOCK, np.float32)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, [w], fastrms.AdaGrad, eps=0.0, initial_value=1.0)
    saved = COMM.bcast(sharded.state_dict())
    saved["tensors"][0]["state"]["sum"][0] = 0.0
    saved["steps"] = 7
    assert "holds a 0" in raised((ValueError, RuntimeError), sharded.load_state_dict, saved)
    assert sharded.steps == 0


def counted(folder):
    """The bytes that are counted, and the memory, are those of the model."""
    w = np.zeros(4 * SEGMENT, np.float32)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, [w], fastrms.Adam, bucket=SEGMENT)
    for step in range(1, 3):
        sharded.step([np.ones_like(w)])
        assert abs(sharded.sent / step - fastrms.mpi.cost(w.size, RANKS).sent) <= 4 * 2 * 4 * BLOCK
    flat, local = sharded._flats[0], sharded._local
    states = sum(array.nbytes for tensor in local._tensors for array in tensor.state.values())
    memory = flat.work.nbytes + flat.param.nbytes + flat.grad.nbytes + states
    assert abs(memory - fastrms.mpi.cost(w.size, RANKS).memory) <= 4 * 4 * 4 * BLOCK
    shares = COMM.allgather(flat.param.size)
    assert sum(shares) == w.size and max(shares) - min(shares) <= 4 * 2 * BLOCK


def killed(folder):
    """The last rank is killed before its third step, or in it: when it has sent nothing, or some of the new parameters."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # by which MPICH tells the others that a rank has died
    mine = arrays(5)
    how = (folder / "how").read_text()
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.Adam, timeout=2.0, bucket=BLOCK)
    for step in range(3):
        before = {name: array.copy() for name, array in mine.items()}
        if step == 2 and RANK == RANKS - 1:
            if how == "inside":
                sharded._pack = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
            elif how == "halfway":
                sharded._send = sends_some(sharded)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        part, _ = gradients(step, np.float32, exact=True)
        if step < 2:
            sharded.step(part)
    start = time.monotonic()
    said = raised(TimeoutError, sharded.step, part, clip_norm=1.0 if how == "clipped" else None)
    assert time.monotonic() - start < 20 and "waited 2 s for the other ranks" in said, said
    same(mine, before)
    assert "cannot be used" in raised(RuntimeError, sharded.step, part)
    assert "cannot be used" in raised(RuntimeError, sharded.save, folder / "x")
    (folder / f"survivor{RANK}").write_text("whole")
    os._exit(0)


def loopback():
    """How many bytes this machine has sent to itself over TCP."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def over_tcp(folder):
    """Writes how many bytes all ranks have sent in some steps, by their own count and by that of the network."""
    w = np.zeros(8 * SEGMENT, np.float32)
    sharded = fastrms.mpi.ShardedOptimizer(COMM, [w], fastrms.Adam, bucket=SEGMENT)
    sharded.step([np.ones_like(w)])
    COMM.Barrier()
    before, sent = loopback(), sharded.sent
    for _ in range(4):
        sharded.step([np.ones_like(w)])
    COMM.Barrier()
    counted = COMM.allreduce(sharded.sent - sent)
    if RANK == 0:
        (folder / "bytes").write_text(f"{counted} {loopback() - before}")


def sends_some(sharded):
    """A _send() that kills its process after half of the buckets, when the others have had the time to take these."""
    send, left = sharded._send, [len(sharded._steps) // 2]

    def sends(step):
        left[0] -= 1
        if left[0] < 0:
            for request in sharded._ranks.under_way[-len(sharded._steps) // 2 :]:
                sharded._ranks.wait(request, "test")
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return send(step)

    return sends


def raises_outside(folder):
    """A rank that raises elsewhere never comes to the step of the others, which raise within their time."""
    mine = arrays(5)
    before = {name: array.copy() for name, array in mine.items()}
    sharded = fastrms.mpi.ShardedOptimizer(COMM, mine, fastrms.Adam, timeout=1.0)
    if RANK == 0:
        time.sleep(4)
    else:
        raised(TimeoutError, sharded.step, arrays(1))
        same(mine, before)
    (folder / f"survivor{RANK}").write_text("whole")
    os._exit(0)


if __name__ == "__main__":
    try:
        for name in sys.argv[2:]:
            globals()[name](Path(sys.argv[1]))
    except BaseException:
        Path(sys.argv[1], f"error{RANK}").write_text(traceback.format_exc())
        COMM.Abort(1)
