"""A model that is spread over several processes by FSDP2, with a norm that is that of all of them, and a checkpoint.

    torchrun --nproc_per_node 2 examples/fsdp2.py

Every number of processes prints the same norms: all have the same batch here, so that the gradients are the same, too, but
for the rounding of matrix products.
"""

import sys
import tempfile

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "torch":
        raise
    sys.exit("torch is missing, which this example needs: pip install -e '.[torch]'")

import fastrms
import fastrms.torch


def network(mesh):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 301), nn.Tanh(), nn.Linear(301, 4))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, fastrms.torch.AdamW(model.parameters(), lr=0.01, clip_norm=1.0)


def train(model, optimizer, steps):
    """Returns the norms.  Give each process its own part of the data where you train."""
    inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :4].sin()).square().sum().backward()
        optimizer.step()
        norms.append(f"{optimizer.step_info.grad_norm:.4g}")
    return norms


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, optimizer = network(mesh)
    norms = train(model, optimizer, steps=5)

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder[0])
    unbroken = train(model, optimizer, steps=3)

    model, optimizer = network(mesh)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder[0])
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert train(model, optimizer, steps=3) == unbroken

    if dist.get_rank() == 0:
        print("norms", *norms, *unbroken)
        print("threads of each process:", fastrms.get_num_threads())
    dist.barrier()  # a thread of gloo that lets go of its last tensor when Python has ended aborts: this makes it unlikely
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
