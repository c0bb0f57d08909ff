"""What the ranks of tests/test_torch_shards.py do: `python torch_shards_program.py <rank> <ranks> <folder> [function ...]`.

Each function of a folder runs on all ranks and leaves a file: empty, or the traceback of what it raised.
"""

import datetime
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastrms
import fastrms.torch as ft
from fastrms.backends.norm import BLOCK, SEGMENT

RANK, RANKS = int(sys.argv[1]), int(sys.argv[2])
LIMIT = datetime.timedelta(seconds=30)
CUT = [Shard(0)]
SHAPES = {"w0": (7, 1111), "b0": (1,), "w1": (3, 2 * BLOCK), "w2": (SEGMENT + 5,), "b1": (5,), "w3": (2, 1, 3)}
CASES = [
    (ft.Adam, {"weight_decay": 0.01, "amsgrad": True, "clip_norm": 1.0}),
    (ft.AdamW, {}),
    (ft.RMSprop, {"momentum": 0.9, "centered": True, "clip_norm": 0.01, "nonfinite": "raise"}),
    (ft.Adagrad, {"lr_decay": 0.5, "clip_norm": float("inf")}),
    (ft.Rprop, {"clip_norm": 1.0, "nonfinite": "skip"}),
]


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Net(nn.Module):
    """Named parameters, with numbers that follow from their names."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for k, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(random(shape, k, dtype)))


def mesh_of(*sizes, names=None):
    return init_device_mesh("cpu", sizes or (RANKS,), mesh_dim_names=names)


def whole_and_spread(dtype=torch.float32, **options):
    """A model that is whole on this rank, and an equal one over all ranks."""
    whole, spread = Net(dtype), Net(dtype)
    fully_shard(spread, mesh=mesh_of(), **options)
    return whole, spread


def spread_like(param, values):
    return distribute_tensor(values, param.device_mesh, param.placements, src_data_rank=None)


def give_grads(whole, spread, seed, absent=(), nan=False):
    """The same gradients for both models, which are new tensors; nan: with a NaN in the first part of the last of them."""
    pairs = zip(whole.parameters(), spread.parameters(), strict=True)
    for k, (one, mine) in enumerate(pairs):
        grad = random(one.shape, 100 * seed + k, one.dtype)
        grad[0] = float("nan") if nan and k == len(SHAPES) - 1 else grad[0]
        one.grad = None if k in absent else grad
        mine.grad = None if k in absent else spread_like(mine, grad.clone()) if isinstance(mine, DTensor) else grad.clone()


def part(values, like):
    """What this rank holds of a whole tensor that is spread like another."""
    return spread_like(like, values.detach()).to_local() if isinstance(like, DTensor) else values


def assert_same(whole, spread, optimizer, sharded):
    """Parameters, states and counts have the same bits."""
    for (name, one), mine in zip(whole.named_parameters(), spread.parameters(), strict=True):
        pairs = [
            (one, mine, "param"),
            *((optimizer.state[one][key], sharded.state[mine][key], key) for key in optimizer.state[one]),
        ]
        for wanted, found, what in pairs:
            local = found.to_local() if isinstance(found, DTensor) else found
            assert torch.equal(part(wanted, found), local), (name, what)


def step_both(whole, spread, optimizer, sharded, seed, absent=()):
    give_grads(whole, spread, seed, absent)
    optimizer.step()
    sharded.step()
    assert sharded.step_info == optimizer.step_info, (sharded.step_info, optimizer.step_info)
    assert_same(whole, spread, optimizer, sharded)


def raised(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def equal_to_one_process(folder: Path):
    """Bit for bit: every class, float32 and float64, uneven and empty parts, gradients that are absent for some steps."""
    for k, (kind, options) in enumerate(CASES):
        whole, spread = whole_and_spread((torch.float32, torch.float64)[k % 2])
        optimizer, sharded = kind(whole.parameters(), **options), kind(spread.parameters(), **options)
        for seed, absent in enumerate([(1,), (), (0, 5), ()]):
            step_both(whole, spread, optimizer, sharded, seed, absent)
        assert optimizer.step_info.grad_norm or "clip_norm" not in options


def states_are_spread(folder: Path):
    """The states are DTensors like their parameter, and counts are plain tensors, as torch.optim has them."""
    _, spread = whole_and_spread()
    made = []
    for optimizer in (ft.Adam(spread.parameters()), torch.optim.Adam(spread.parameters())):
        for param in spread.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        made.append(optimizer.state)
    for mine, theirs in zip(made[0].items(), made[1].items(), strict=True):
        (param, state), (_, wanted) = mine, theirs
        assert list(state) == list(wanted) == ["step", "exp_avg", "exp_avg_sq"]
        assert type(state["step"]) is torch.Tensor
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(state[name], DTensor) and state[name].placements == param.placements
            assert state[name].device_mesh == param.device_mesh
            assert (state[name].shape, state[name].stride()) == (wanted[name].shape, wanted[name].stride())
            assert not state[name].requires_grad


def nonfinite_on_one_rank(folder: Path):
    """What one rank finds, all ranks know."""
    for nonfinite, clip_norm in (("skip", None), ("raise", 1.0)):
        whole, spread = whole_and_spread()
        options = {"clip_norm": clip_norm, "nonfinite": nonfinite}
        optimizer, sharded = ft.RMSprop(whole.parameters(), **options), ft.RMSprop(spread.parameters(), **options)
        step_both(whole, spread, optimizer, sharded, 0)
        give_grads(whole, spread, 1, nan=True)
        if nonfinite == "skip":
            optimizer.step()
            sharded.step()
            assert (sharded.step_info.applied, sharded.step_info.nonfinite) == (False, 3) == optimizer.step_info[::2]
        else:
            said = raised(FloatingPointError, sharded.step)
            assert said.startswith("3 element(s)") and "grads[0][5]" in said, said
        assert_same(whole, spread, optimizer, sharded)
        step_both(whole, spread, optimizer, sharded, 2)


def distributed(values, placements, mesh=None):
    return nn.Parameter(distribute_tensor(values, mesh or mesh_of(), placements, src_data_rank=None))


class Listed(nn.Module):
    def __init__(self, *params):
        super().__init__()
        self.params = nn.ParameterList(params)


def other_placements(folder: Path):
    """Whole tensors beside cut ones, replicas of cut ones; others only without a norm, and then they are updated."""
    values = [random((6, 10), 1), random((5,), 2), random((2 * BLOCK + 9,), 3)]
    meshes = [mesh_of(), DeviceMesh("cpu", [*range(RANKS)][::-1])]
    meshes += [mesh_of(2, 2, names=("replicate", "shard"))] if RANKS == 4 else []
    for mesh in meshes:
        cut = CUT if mesh.ndim == 1 else [Replicate(), Shard(0)]
        kinds = [distributed(values[0], cut, mesh), distributed(values[1], [Replicate()] * mesh.ndim, mesh)]
        spread = Listed(*kinds, nn.Parameter(values[2].clone()), distributed(values[2], cut, mesh))
        whole = Listed(*(nn.Parameter(x.clone()) for x in (*values, values[2])))
        optimizer, sharded = (ft.Adam(model.parameters(), clip_norm=0.1) for model in (whole, spread))
        for seed in range(3):
            step_both(whole, spread, optimizer, sharded, seed)
    columns, one = Listed(distributed(values[0], [Shard(1)])), Listed(nn.Parameter(values[0].clone()))
    optimizer, sharded = ft.Adam(one.parameters()), ft.Adam(columns.parameters())
    step_both(one, columns, optimizer, sharded, 0)
    sharded.clip_norm = optimizer.clip_norm = 0.1
    if RANKS == 1:
        return step_both(one, columns, optimizer, sharded, 1)
    said = raised(ValueError, sharded.step)
    assert "placements (Shard(dim=1),)" in said and "need Shard(0)" in said, said
    assert_same(one, columns, optimizer, sharded)
    summand = nn.Parameter(DTensor.from_local(values[0].clone(), mesh_of(), [Partial()]))
    assert "has a summand" in raised(ValueError, ft.Adam, [summand])
    assert "has a summand" in raised(ValueError, sharded.add_param_group, {"params": [summand]})


def other_gradients(folder: Path):
    """A gradient that is spread otherwise is brought to its parameter, as torch.optim does."""
    whole, spread = whole_and_spread()
    optimizer, sharded = ft.Adam(whole.parameters(), clip_norm=1.0), ft.Adam(spread.parameters(), clip_norm=1.0)
    step_both(whole, spread, optimizer, sharded, 0)
    give_grads(whole, spread, 1)
    for model in (whole, spread):
        model.w0.grad = None
    full = random(SHAPES["w0"], 77)
    whole.w0.grad, spread.w0.grad = full, distribute_tensor(full.clone(), mesh_of(), [Replicate()], src_data_rank=None)
    optimizer.step()
    sharded.step()
    assert sharded.step_info == optimizer.step_info
    assert_same(whole, spread, optimizer, sharded)
    step_both(whole, spread, optimizer, sharded, 2)
    one, copies = Listed(nn.Parameter(full.clone())), Listed(distributed(full.clone(), [Replicate()]))
    optimizer, sharded = ft.Adam(one.parameters()), ft.Adam(copies.parameters())
    step_both(one, copies, optimizer, sharded, 0)
    (param,), (copy,) = one.parameters(), copies.parameters()
    param.grad = full
    copy.grad = DTensor.from_local(full if RANK == 0 else torch.zeros_like(full), mesh_of(), [Partial()])
    optimizer.step()
    sharded.step()
    assert_same(one, copies, optimizer, sharded)


def gradients_that_are_spread_otherwise_are_zeroed(folder: Path):
    """A step with zero_grad uses such a gradient as a copy that is spread as its parameter is; it zeroes both."""
    param = nn.Parameter(distributed(random(SHAPES["w0"], 7), [Shard(0)]))
    param.grad = distributed(random(SHAPES["w0"], 77), [Replicate()])
    optimizer = ft.Adam([param], zero_grad=True)
    for _ in range(2):
        optimizer.step()
        assert not param.grad.to_local().any()
        param.grad = distributed(random(SHAPES["w0"], 78), [Replicate()])


def example_of_the_docs(folder: Path):
    from test_readme import example

    model = network()
    names = {"fastrms": fastrms, "fully_shard": fully_shard, "model": model, "mesh": mesh_of(), "x": random((6, 10), 1)}
    exec(example("fully_shard(layer, mesh=mesh)"), names)
    norms = [None] * RANKS
    dist.all_gather_object(norms, names["optimizer"].step_info.grad_norm)
    assert norms[0] > 0 and set(norms) == {norms[0]}


def parts_that_are_exchanged(folder: Path):
    """FSDP2 gives a parameter another local tensor when a module is moved or loaded."""
    whole, spread = whole_and_spread()
    optimizer, sharded = ft.Adam(whole.parameters()), ft.Adam(spread.parameters())
    step_both(whole, spread, optimizer, sharded, 0)
    spread.w0._local_tensor = spread.w0._local_tensor.clone()
    spread.w1._local_tensor = spread.w1._local_tensor.clone()
    step_both(whole, spread, optimizer, sharded, 1)
    sharded.state[spread.w0]["exp_avg"] = sharded.state[spread.w0]["exp_avg"].clone()
    step_both(whole, spread, optimizer, sharded, 2)


def writes_are_seen(folder: Path):
    """A backward pass raises where a step has written a DTensor that it saved."""
    for optimizer_of in (ft.Adam, torch.optim.Adam):
        weight = distributed(random((8, 4), 1), CUT)
        optimizer = optimizer_of([weight])
        weight.grad = torch.ones_like(weight)
        loss = (weight * weight).sum()
        optimizer.step()
        assert "modified by an inplace operation" in raised(RuntimeError, loss.backward)


def other_parameters(folder: Path):
    """Ranks whose steps do not go together are told so, and nothing is written."""
    if RANKS == 1:
        return
    _, spread = whole_and_spread()
    sharded = ft.Adam(spread.parameters(), clip_norm=1.0)
    before = [param.to_local().clone() for param in spread.parameters()]
    for k, param in enumerate(spread.parameters()):
        param.grad = None if k == RANK else torch.ones_like(param)
    assert "the ranks step different parameters" in raised(ValueError, sharded.step)
    for param, old in zip(spread.parameters(), before, strict=True):
        assert torch.equal(param.to_local(), old)


def other_hyper_parameters(folder: Path):
    """They may differ without a norm; with one, all ranks are told so, and nothing is written."""
    if RANKS == 1:
        return
    last = RANKS - 1
    for change in ({"lr": 0.5}, {"betas": (0.9, 0.5)}, {"weight_decay": 0.1}, {"maximize": True}):
        whole, spread = whole_and_spread()
        optimizer, sharded = (ft.Adam(model.parameters(), clip_norm=1.0) for model in (whole, spread))
        step_both(whole, spread, optimizer, sharded, 0)
        give_grads(whole, spread, 1)
        before = {name: sharded.param_groups[0][name] for name in change}
        if last == RANK:
            sharded.param_groups[0].update(change)
        assert "different hyper-parameters" in raised(ValueError, sharded.step)
        assert_same(whole, spread, optimizer, sharded)
        sharded.param_groups[0].update(before)
        step_both(whole, spread, optimizer, sharded, 1)
    _, spread = whole_and_spread()
    nonfinite = "skip" if last == RANK else "raise"
    sharded = ft.Adam(spread.parameters(), nonfinite=nonfinite)
    for param in spread.parameters():
        param.grad = torch.ones_like(param)
    assert f"Adam {nonfinite}" in (said := raised(ValueError, sharded.step)), said


def several_groups_of_ranks(folder: Path):
    """Parameters that are cut over different ranks have no norm together; each of them alone has one."""
    if RANKS < 4:
        return
    mesh, values = mesh_of(2, 2, names=("rows", "columns")), random((6, 10), 1)
    spread = [distributed(values, placements, mesh) for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)])]
    whole = [nn.Parameter(values.clone()) for _ in spread]
    together = ft.Adam(spread, clip_norm=1.0)
    for param in spread:
        param.grad = spread_like(param, torch.ones_like(values))
    said = raised(ValueError, together.step)
    assert "params[0][0] is spread over the ranks [" in said and "make an optimizer for each" in said, said
    together.clip_norm = None
    for optimizers in ([together], [ft.Adam([param], clip_norm=1.0) for param in spread]):
        others = [ft.Adam(whole)] if len(optimizers) == 1 else [ft.Adam([param], clip_norm=1.0) for param in whole]
        for one, mine in zip(whole, spread, strict=True):
            one.grad, mine.grad = values.clone(), spread_like(mine, values.clone())
        for optimizer in (*optimizers, *others):
            optimizer.step()
        for one, mine in zip(whole, spread, strict=True):
            assert torch.equal(part(one, mine), mine.to_local())


def network(dtype=torch.float32):
    torch.manual_seed(3)
    layers = nn.Linear(10, 33), nn.Tanh(), nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 3)
    return nn.Sequential(*layers).to(dtype)


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def train(whole, model, optimizer, sharded, gradient_of=lambda param: param.grad, steps=4):
    """Backward passes of a model over all ranks, each with data of its own, and steps from its gradients in this process
    alone, too: the parameters have the same bits."""
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        sharded.zero_grad()
        seed = 100 * RANK + step
        (model(random((6, 10), seed, dtype)) - random((6, 3), 50 + seed, dtype)).square().sum().backward()
        for one, mine in zip(whole.parameters(), model.parameters(), strict=True):
            one.grad = whole_of(gradient_of(mine)).clone()
        optimizer.step()
        sharded.step()
        for one, mine in zip(whole.parameters(), model.parameters(), strict=True):
            assert torch.equal(one.detach(), whole_of(mine))


def fully_sharded(dtype=torch.float32, **options):
    spread = network(dtype)
    for layer in (*spread[::2], spread):
        fully_shard(layer, mesh=mesh_of(), **options)
    return spread


def fsdp2_trains(folder: Path):
    """Forward and backward passes of FSDP2, with CPUOffloadPolicy too."""
    for options in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        whole, spread = network(), fully_sharded(**options)
        optimizer, sharded = (ft.AdamW(model.parameters(), lr=0.01, clip_norm=0.5) for model in (whole, spread))
        train(whole, spread, optimizer, sharded)
        assert sharded.step_info == optimizer.step_info


def fsdp2_steps_in_backward(folder: Path):
    whole, spread, grads = network(), fully_sharded(), {}
    optimizer, sharded = (ft.RMSprop(model.parameters(), lr=0.01) for model in (whole, spread))
    for param in spread.parameters():
        param.register_post_accumulate_grad_hook(lambda param: grads.__setitem__(param, param.grad))
    ft.step_in_backward(sharded)
    train(whole, spread, optimizer, sharded, grads.__getitem__)
    assert all(param.grad is None for param in spread.parameters())


FORMATS = [
    (ft.Adam, torch.float32, {"state_format": "bf16", "clip_norm": 1.0}),
    (ft.Adagrad, torch.float32, {"state_format": "fp16"}),
    (ft.RMSprop, torch.bfloat16, {"state_format": "bf16", "master": "float32", "momentum": 0.9}),
    (ft.AdamW, torch.bfloat16, {"state_format": "fp16", "master": "split16", "clip_norm": 0.1, "nonfinite": "skip"}),
    (ft.Rprop, torch.bfloat16, {"master": "split8", "seed": 5}),
    (ft.Adam, torch.float16, {"rounding": "stochastic", "clip_norm": 1.0}),
]


def formats_are_equal_to_one_process(folder: Path):
    """Random rounding depends on where an element is in the whole parameters, and on nothing else."""
    for kind, dtype, options in FORMATS:
        whole, spread = whole_and_spread(dtype)
        optimizer, sharded = (kind(model.parameters(), **options) for model in (whole, spread))
        for seed, absent in enumerate([(1,), (), (0, 5), ()]):
            step_both(whole, spread, optimizer, sharded, seed, absent)
        for param in spread.parameters():
            for name, value in sharded.state[param].items():
                if name != "step":
                    assert isinstance(value, DTensor) and value.placements == param.placements
                    assert (value.shape, value.device_mesh) == (param.shape, param.device_mesh)


def formats_under_fsdp2(folder: Path):
    """float32 parameters that compute in bf16, and parameters in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases = [
        (torch.float32, {"mp_policy": policy}, {}),
        (torch.float32, {"mp_policy": policy}, {"state_format": "bf16", "clip_norm": 0.5}),
        (torch.bfloat16, {}, {"state_format": "bf16", "master": "float32"}),
        (torch.bfloat16, {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}, {"rounding": "stochastic"}),
    ]
    for dtype, of_model, options in cases:
        whole, spread = network(dtype), fully_sharded(dtype, **of_model)
        optimizer, sharded = (ft.AdamW(model.parameters(), lr=0.01, **options) for model in (whole, spread))
        train(whole, spread, optimizer, sharded)
        assert sharded.step_info == optimizer.step_info
        assert {x.dtype for x in spread.parameters()} == {dtype}
        states = {x.dtype for state in sharded.state.values() for name, x in state.items() if name.startswith("exp")}
        assert states == {torch.bfloat16 if "state_format" in options else torch.float32}


def formats_step_in_backward(folder: Path):
    whole, spread, grads = network(torch.bfloat16), fully_sharded(torch.bfloat16), {}
    options = {"lr": 0.01, "master": "split8", "state_format": "bf16"}
    optimizer, sharded = (ft.RMSprop(model.parameters(), **options) for model in (whole, spread))
    for param in spread.parameters():
        param.register_post_accumulate_grad_hook(lambda param: grads.__setitem__(param, param.grad))
    ft.step_in_backward(sharded)
    train(whole, spread, optimizer, sharded, grads.__getitem__)


def formats_that_cannot_be_cut(folder: Path):
    """Blocks of q8, and columns, whose elements lie apart in the whole tensor, with random rounding."""
    spread = whole_and_spread()[1]
    said = raised(ValueError, ft.Adam, spread.parameters(), state_format="q8")
    assert "blocks of 256 elements" in said and "params[0][0] is a DTensor: pass state_format='bf16'" in said, said
    values = random((6, 10), 1)
    for rounding in ("nearest", "stochastic"):
        columns, one = Listed(distributed(values.clone(), [Shard(1)])), Listed(nn.Parameter(values.clone()))
        options = {"state_format": "bf16", "rounding": rounding}
        optimizer, sharded = (ft.Adam(model.parameters(), **options) for model in (one, columns))
        if RANKS == 1 or rounding == "nearest":
            step_both(one, columns, optimizer, sharded, 0)
            continue
        give_grads(one, columns, 0)
        said = raised(ValueError, sharded.step)
        assert "placements (Shard(dim=1),)" in said and "random rounding needs Shard(0)" in said, said
        assert_same(one, columns, optimizer, sharded)


SAVED = {  # name of a checkpoint -> dtype of the parameters, options of Adam
    "float32": (torch.float32, {"amsgrad": True, "clip_norm": 1.0}),
    "formats": (torch.bfloat16, {"master": "split8", "state_format": "bf16"}),
}


def trained_for_checkpoint(name, steps=3):
    """(whole, spread, their optimizers) after some steps with gradients that follow from their number."""
    dtype, options = SAVED[name]
    whole, spread = whole_and_spread(dtype)
    optimizer, sharded = (ft.Adam(model.parameters(), lr=0.02, **options) for model in (whole, spread))
    for seed in range(steps):
        step_both(whole, spread, optimizer, sharded, seed, (1,) if seed == 1 else ())
    return whole, spread, optimizer, sharded


def write_checkpoints(folder: Path):
    for name in SAVED:
        _, spread, _, sharded = trained_for_checkpoint(name)
        state = {"model": spread.state_dict(), "optimizer": get_optimizer_state_dict(spread, sharded)}
        dcp.save(state, checkpoint_id=str(folder / f"{name} of {RANKS}"))


def read_checkpoints(folder: Path):
    """Of any number of ranks, into a new optimizer: it then goes on with the bits of an unbroken run."""
    for name, (dtype, options) in SAVED.items():
        for path in sorted(folder.glob(f"{name} of ?")):
            whole, _, optimizer, _ = trained_for_checkpoint(name)
            _, spread = whole_and_spread(dtype)
            sharded = ft.Adam(spread.parameters(), **options)
            state = {"model": spread.state_dict(), "optimizer": get_optimizer_state_dict(spread, sharded)}
            for values in state["model"].values():
                values.to_local().zero_()
            dcp.load(state, checkpoint_id=str(path))
            spread.load_state_dict(state["model"])
            set_optimizer_state_dict(spread, sharded, state["optimizer"])
            assert sharded.param_groups[0]["lr"] == 0.02
            assert_same(whole, spread, optimizer, sharded)
            for seed in (3, 4):
                step_both(whole, spread, optimizer, sharded, seed)


def state_of_torch(folder: Path):
    """The state_dict of torch.optim on the same DTensors is taken over; one of plain tensors is refused."""
    whole, spread = whole_and_spread()
    theirs = torch.optim.Adam(spread.parameters())
    give_grads(whole, spread, 0)
    theirs.step()
    mine = ft.Adam(spread.parameters())
    mine.load_state_dict(theirs.state_dict())
    for param in spread.parameters():
        for name, value in theirs.state[param].items():
            found = mine.state[param][name]
            assert torch.equal(part_of(found), part_of(value)) and type(found) is type(value)
    give_grads(whole, spread, 1)
    mine.step()
    plain = mine.state_dict()
    plain["state"] = {k: {n: whole_of(x) if n != "step" else x for n, x in s.items()} for k, s in plain["state"].items()}
    before = dict(mine.state[spread.w0])
    assert "plain tensor" in raised(ValueError, mine.load_state_dict, plain)
    assert all(mine.state[spread.w0][name] is value for name, value in before.items())


def part_of(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zero_and_ddp(folder: Path):
    """ZeroRedundancyOptimizer, which gives each rank some of the parameters, and DistributedDataParallel."""
    for options in ({"clip_norm": 1.0}, {"nonfinite": "skip"}):
        said = raised(ValueError, ZeroRedundancyOptimizer, network().parameters(), optimizer_class=ft.Adam, **options)
        assert "ZeroRedundancyOptimizer" in said and "clip_grad_norm_" in said, said
    for is_zero in (True, False):
        whole, model = network(), DistributedDataParallel(network())
        zero = {"optimizer_class": ft.Adam} if is_zero else {}
        sharded = (ZeroRedundancyOptimizer if is_zero else ft.Adam)(model.parameters(), lr=0.01, **zero)
        train(whole, model, ft.Adam(whole.parameters(), lr=0.01), sharded)


def main():
    folder, wanted = Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store of {RANKS}"), RANKS)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS, timeout=LIMIT)
    functions = [x for x in globals().values() if getattr(x, "__annotations__", None) == {"folder": Path}]
    for function in functions:
        if not wanted or function.__name__ in wanted:
            said = ""
            try:
                function(folder)
            except Exception:
                said = traceback.format_exc()
            (folder / f"{function.__name__} {RANK} of {RANKS}").write_text(said)
            if said:
                sys.exit(1)  # the others may wait for this rank
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
