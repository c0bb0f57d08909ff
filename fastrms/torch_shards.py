"""Parameters of torch that are spread over ranks (DTensor, as FSDP2 makes them): the part of each that this rank holds, and
the exchange by which the norm of the gradients is that of the whole tensors.

An update needs nothing from other ranks, so that a Core updates the parts, which are plain tensors.  The states that users
see are DTensors around the states of the parts.
"""

import hashlib
import sys
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import increment_version

from . import shards
from .words import kind_of


def is_spread(tensor):
    """Whether a tensor is a DTensor; torch.distributed.tensor is not imported for that."""
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def part_of(tensor):
    """What this rank holds of a tensor: the local tensor of a DTensor, else the tensor itself."""
    return tensor._local_tensor if is_spread(tensor) else tensor


def spread_like(param, part):
    """A part as a tensor that is spread as a parameter is."""
    if not is_spread(param):
        return part
    like = {"device_mesh": param.device_mesh, "placements": param.placements}
    return type(param).from_local(part, **like, run_check=False, shape=param.shape, stride=param.stride())


def refuse_sums(param, name):
    """ValueError for a DTensor of which each rank has a summand."""
    if is_spread(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(f"{name} has placements {param.placements}: each rank has a summand of it, which no step can use; "
                         f"call redistribute() on it")  # fmt: skip


def refuse_zero(frame):
    """ValueError where this is the frame of a ZeroRedundancyOptimizer.  It gives the optimizers that it makes some of the
    parameters as if they were all, and nothing else tells that there are more."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if isinstance(frame.f_locals.get("self"), getattr(module, "ZeroRedundancyOptimizer", ())):
        raise ValueError("clip_norm and nonfinite would look at the parameters of one rank of a ZeroRedundancyOptimizer: "
                         "call torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm) before its step()")  # fmt: skip


def refuse_other_spread(value, param, name):
    """ValueError where a loaded state is not spread over ranks as its parameter is."""
    specs = [x._spec if is_spread(x) else None for x in (value, param)]
    if not alike(*specs):
        said = [f"placements {spec.placements}" if spec else "no placements: it is a plain tensor" for spec in specs]
        raise ValueError(f"{name} in the state_dict has {said[0]}; the parameter has {said[1]}; load it with "
                         f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict")  # fmt: skip


def alike(spec, other):
    """Whether two DTensorSpecs, or Nones, say that their tensors are spread in the same way."""
    if spec is None or other is None:
        return spec is other
    return spec.placements == other.placements and spec.mesh == other.mesh


class Parts:
    """The parts of the parameters of a Core, and of their gradients.

    names: what error sentences call the parameters.  ``parts`` lists the parts of the parameters, and ``spread`` says
    whether a parameter is a DTensor; without one the parts are the parameters, and the methods do nothing.
    """

    def __init__(self, params, names):
        self._params, self._names = params, names
        self.parts = [*map(part_of, params)]
        specs = [param._spec if is_spread(param) else None for param in params]
        self._rows = [*zip(params, self.parts, specs, strict=True)]
        self.spread, self._joined = any(map(is_spread, params)), False

    def present(self):
        """Whether the parameters have the parts that they had."""
        return all(param._local_tensor is part for param, part, spec in self._rows if spec is not None)

    def of_grads(self, grads):
        """The parts of gradients; None where a parameter has another part, or its gradient is spread otherwise."""
        found = []
        for (param, part, spec), grad in zip(self._rows, grads, strict=True):
            if spec is not None:
                if param._local_tensor is not part:
                    return None
                if grad is not None:
                    other = getattr(grad, "_spec", None)
                    if other is not spec and not alike(other, spec):
                        return None
                    grad = grad._local_tensor
            found.append(grad)
        return found

    def brought(self, grads):
        """The parts of gradients that may be spread otherwise than their parameters, over which they are then spread."""
        return [self.brought_one(k, grad) for k, grad in enumerate(grads)]

    def brought_one(self, k, grad):
        """The part of the gradient of parameter k."""
        _, _, spec = self._rows[k]
        if grad is None or spec is None:
            return grad
        if not is_spread(grad):
            raise TypeError(f"the gradient of {self._names[k]} is {kind_of(grad)}, the parameter is a DTensor: it "
                            f"must be one, too")  # fmt: skip
        if not alike(grad._spec, spec):
            grad = grad.redistribute(spec.mesh, spec.placements)
        part = grad._local_tensor
        return part.wait() if hasattr(part, "wait") else part

    def wrote(self, grads):
        """Tell torch that a step has written the parameters with a gradient: a DTensor counts writes beside its part."""
        rows = zip(self._rows, grads, strict=True)
        increment_version([param for (param, _, spec), grad in rows if spec is not None and grad is not None])

    def wrote_one(self, k):
        """Tell torch that a step has written parameter k."""
        param, _, spec = self._rows[k]
        increment_version([] if spec is None else [param])

    def start(self, k):
        """The position of the first element of part k in the whole parameter."""
        place = place_of(self._params[k], self._names[k], "random rounding needs")
        return place.run(k, place.group.rank() if place.group else 0).start

    def join(self, optimizer):
        """Let the optimizer of the parts find norms together with the other ranks, from the first step on that needs one."""
        if self._joined or optimizer.backend == "cuda":
            return
        group, runs, rank = self._runs()
        if group is not None:
            gather = Gather(group, runs, f"{type(optimizer).__name__} {optimizer.nonfinite}", optimizer._groups)
            optimizer._plan.join(shards.Exchange(gather, runs, rank))
        self._joined = True

    def _runs(self):
        """(group of the ranks over which parameters are cut or None, runs of each of them, number of this rank)."""
        places = [place_of(param, name) for param, name in zip(self._params, self._names, strict=True)]
        group = only_group(places, self._names)
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        runs = [[place.run(k, other) for k, place in enumerate(places)] for other in range(ranks)]
        for part, mine, name in zip(self.parts, runs[rank], self._names, strict=True):
            if group is not None and part.numel() != mine.stop - mine.start:
                raise ValueError(f"{name} has {part.numel()} elements on this rank; by its placements it must have "
                                 f"{mine.stop - mine.start}, elements {mine.start} to {mine.stop} of the whole")  # fmt: skip
        return group, runs, rank


class Place(NamedTuple):
    """How a parameter is cut: into pieces of `piece` elements, of which the rank with number r of the group holds the one
    with number order[r]; the last pieces may be smaller, or empty.  group: None where every rank has the whole."""

    size: int
    stored: int
    piece: int
    group: Any
    order: list

    def run(self, number, rank):
        """The Run of this parameter, which has this number, on a rank."""
        start, stop = (min(self.size, (self.order[rank] + k) * self.piece) for k in (0, 1)) if self.group else (0, self.size)
        return shards.Run(number, start, stop, self.size, self.stored)


def place_of(param, name, what="clip_norm and nonfinite need"):
    """The Place of a parameter; ValueError, which has `what` in it, for placements by which a rank has more than one run of
    the whole tensor."""
    size, stored = param.numel(), max(param.element_size(), 4)  # bytes in which a gradient is added up
    cut = []
    if is_spread(param):
        mesh, placements = param.device_mesh, param.placements
        cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(axis) > 1]
    if not cut:
        return Place(size, stored, size, None, [])
    (axis, *others), length = cut, param.shape[0]
    if others or not placements[axis].is_shard(0) or not (param.is_contiguous() and param._local_tensor.is_contiguous()):
        raise ValueError(f"{name} has placements {placements} and strides {param.stride()}; {what} "
                         f"Shard(0) along one axis of the mesh, Replicate along all others, and contiguous memory, so that "
                         f"each rank has a run of the whole tensor")  # fmt: skip
    group, here = mesh.get_group(axis), list(mesh.get_coordinate())
    here[axis] = slice(None)
    along = mesh.mesh[tuple(here)].tolist()
    order = [along.index(rank) for rank in torch.distributed.get_process_group_ranks(group)]
    return Place(size, stored, -(-length // len(order)) * (size // max(length, 1)), group, order)


def only_group(places, names):
    """The group of ranks over which parameters are cut, None where none is; ValueError where there are several groups."""
    cut = [(name, place.group) for name, place in zip(names, places, strict=True) if place.group is not None]
    ranks = [torch.distributed.get_process_group_ranks(group) for _, group in cut]
    for (name, _), mine in zip(cut, ranks, strict=True):
        if mine != ranks[0]:
            raise ValueError(f"{cut[0][0]} is spread over the ranks {ranks[0]} and {name} over {mine}; clip_norm and "
                             f"nonfinite need one group of ranks: make an optimizer for each")  # fmt: skip
    return cut[0][1] if cut else None


def digest(x):
    """Eight bytes that are equal on two ranks where x prints alike there."""
    return hashlib.blake2b(repr(x).encode(), digest_size=8).digest()


class Gather:
    """Gives each rank of a group the messages of all ranks, which have the lengths that follow from the runs of each.

    rule: what the ranks must have in common and keep; groups: the Groups of the optimizer, whose values the ranks must have
    in common at each step.
    """

    def __init__(self, group, runs, rule, groups):
        self._group, self._rule, self._groups = group, rule, groups
        self._lengths = [shards.message(mine, 0)[1] for mine in shards.counted_once(runs)]
        self._runs = digest(runs)

    def __call__(self, message):
        mine = self._runs + digest((self._rule, self._groups.values))
        known = self._all(mine, len(mine))
        if any(other[:8] != self._runs for other in known):
            raise ValueError("the ranks step different parameters; with clip_norm or nonfinite all ranks must make their "
                             "steps together, and have gradients for the same parameters")  # fmt: skip
        if any(other != mine for other in known):
            raise ValueError(f"the ranks step with different hyper-parameters; those of this rank are {self._rule} "
                             f"{self._groups.values}: set the same in param_groups, and the same nonfinite, on all "
                             f"ranks")  # fmt: skip
        found = self._all(message, max(self._lengths))
        return [part[:length] for part, length in zip(found, self._lengths, strict=True)]

    def _all(self, message, most):
        """The messages of all ranks, with zeros behind them up to a length of `most`."""
        sent = torch.frombuffer(bytearray(message.ljust(most, b"\0")), dtype=torch.uint8)
        found = [torch.empty(most, dtype=torch.uint8) for _ in self._lengths]
        torch.distributed.all_gather(found, sent, group=self._group)
        return [part.numpy().tobytes() for part in found]
