"""The figures of fastrms.torch on DTensors, as FSDP2 makes them: whole steps in several processes, beside torch.optim.

Each process is a rank with the environment that torchrun gives it.  All ranks make each step at the same time, and the time
is that of the slowest rank.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

try:
    import torch
    import torch.distributed as dist
except ImportError:
    sys.exit("torch is missing, to which these figures compare: pip install -e '.[torch]'")

import fastrms
import fastrms.torch
from fastrms import threads

from .check import WrongContender
from .figures import Figure

ROUNDS, LIMIT = 40, 600  # seconds for all ranks of a measurement
TENSORS, SIZE, LARGE = 100, 1000, 2**22  # elements on each rank
PLACED = "parameters and gradients where torch allocates them"
NORM = 1.0
ALL_CPUS = "fastrms.torch.Adam on all CPUs"
CONTENDERS = {
    "torch RMSprop": lambda params: torch.optim.RMSprop(params).step,
    "torch Adam": lambda params: torch.optim.Adam(params).step,
    "torch Adam, fused": lambda params: torch.optim.Adam(params, fused=True).step,
    "torch clip_grad_norm_ and Adam": lambda params: clipped(torch.optim.Adam(params), params),
    "fastrms.torch.RMSprop": lambda params: fastrms.torch.RMSprop(params).step,
    "fastrms.torch.Adam": lambda params: fastrms.torch.Adam(params).step,
    "fastrms.torch.Adam, clip_norm": lambda params: fastrms.torch.Adam(params, clip_norm=NORM).step,
    ALL_CPUS: lambda params: on_all_cpus(fastrms.torch.Adam(params).step),
}
RIVALS = {
    "fastrms.torch.RMSprop": "torch RMSprop",
    "fastrms.torch.Adam": "torch Adam",
    "fastrms.torch.Adam, clip_norm": "torch clip_grad_norm_ and Adam",
}


def prepare():
    return {"threads": fastrms.get_num_threads(), "peers": {"torch": torch.__version__}}


def clipped(optimizer, params):
    def step():
        torch.nn.utils.clip_grad_norm_(params, NORM)
        optimizer.step()

    return step


def on_all_cpus(call):
    """The call with as many threads as there are CPUs, as if this rank were alone."""
    budget = fastrms.get_num_threads()

    def step():
        fastrms.set_num_threads(threads.usable_cpus())
        call()
        fastrms.set_num_threads(budget)

    return step


# what a rank does


def rank_main(rank, ranks, folder, count, size, names):
    """Time steps of `count` parameters with parts of `size` elements, and leave the times and the threads in a file."""
    torch.set_num_threads(1)  # as OMP_NUM_THREADS of torchrun has it
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    steps = checked(count, size, names)
    taken = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            taken[name].append(1e6 * (time.perf_counter() - start))
    said = {"taken": taken, "threads": fastrms.get_num_threads(), "said": threads.said_of_ranks()}
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def checked(count, size, names):
    """name -> step; WrongContender where two of one kind do not move the parameters alike."""
    made, moved = {}, {}
    for name in names:
        params = spread(count, size)
        made[name] = CONTENDERS[name](params)
        made[name]()
        kind = "RMSprop" if "RMS" in name else "clipped" if "clip" in name else "Adam"
        moved.setdefault(kind, []).append([param.to_local().clone() for param in params])
    for expected, *others in moved.values():
        for params in others:
            if not all(torch.allclose(p, q, atol=1e-6) for p, q in zip(params, expected, strict=True)):
                raise WrongContender("two contenders move the parameters differently")
    return made


def spread(count, size):
    """DTensors with gradients, each with `size` elements on this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.manual_seed(dist.get_rank())
    mesh, params = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for _ in range(count):
        param, grad = (DTensor.from_local(scale * torch.randn(size), mesh, [Shard(0)]) for scale in (1, 1e-3))
        params.append(torch.nn.Parameter(param))
        params[-1].grad = grad
    return params


# what the launcher does


def measured(ranks, count, size, names):
    """(name -> (minimum, median) in microseconds, what a rank says of its threads)."""
    environment = {**os.environ, "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        rows = [[str(rank), str(ranks), folder, str(count), str(size), *names] for rank in range(ranks)]
        command = [sys.executable, "-W", "ignore", "-m", "bench.figures_shards"]
        processes = [subprocess.Popen([*command, *row], env=environment) for row in rows]
        try:
            if any([process.wait(LIMIT) for process in processes]):
                raise WrongContender("a rank has failed, and says above why")
        finally:
            for process in processes:
                process.kill()
        said = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    slowest = {name: [max(row) for row in zip(*(each["taken"][name] for each in said), strict=True)] for name in names}
    return {name: (min(row), median(row)) for name, row in slowest.items()}, said[0]


def rows(what, found, target):
    for name, rival in RIVALS.items():
        if name in found:
            (mine, my_median), (theirs, median_of_theirs) = found[name], found[rival]
            said = f"{theirs / mine:.1f}x: {in_words(mine, my_median)} against {in_words(theirs, median_of_theirs)}"
            yield Figure(f"{what}: {name} over {rival}", f">= {target}x", said, theirs / mine >= target)


def in_words(minimum, middle):
    return f"{minimum:.0f} us ({middle:.0f})" if minimum < 1e4 else f"{minimum / 1e3:.1f} ms ({middle / 1e3:.1f})"


def hundred():
    """Steps without and with the norm, which is that of all ranks."""
    found, _ = measured(2, TENSORS, SIZE, [name for name in CONTENDERS if name != ALL_CPUS])
    yield from rows(f"2 ranks, {TENSORS} parts of {SIZE}", found, 5)


def four_ranks():
    """Four ranks on the CPUs of this machine, with the threads that fastrms gives each, and with all CPUs for each."""
    cpus, names = threads.usable_cpus(), ["torch Adam", "fastrms.torch.Adam", ALL_CPUS]
    found, said = measured(4, 1, LARGE, names)
    (figure,) = rows(f"{cpus} CPUs, 4 ranks, one part of 2^22", found, 2)
    beside = f"; with {cpus} threads each {in_words(*found[ALL_CPUS])}; {said['said']}"
    yield figure._replace(measured=figure.measured + beside)


MEASUREMENTS = (hundred, four_ranks)

if __name__ == "__main__":
    rank_main(*map(int, sys.argv[1:3]), Path(sys.argv[3]), *map(int, sys.argv[4:6]), sys.argv[6:])
