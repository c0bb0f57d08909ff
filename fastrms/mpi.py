"""One optimizer on all ranks of an MPI communicator (extra `mpi`): each rank sums and updates its share of all tensors.

A step goes bucket by bucket through the flat gradient: the gradients of all ranks are summed, and each rank gets the sum of
its own part (reduce-scatter); it updates this part while later buckets are still on their way; all ranks get the new
parameters of all parts (all-gather).  The caller's parameters are written when everything has arrived.
"""

import hashlib
import itertools
import json
import math
import time
import zlib
from typing import NamedTuple

import numpy as np

from . import backends, checkpoint, hyper, shards, storage
from . import state as states
from .backends.norm import BLOCK
from .memory import host, tree
from .optimizer import APPLIED
from .tensors import Tensors

__all__ = ["Cost", "ShardedOptimizer", "cost"]

BUCKET = 1 << 22  # elements
SPINNING, PAUSE = 2e-3, 1e-5  # seconds: how long a wait stays awake, and how long it sleeps then between two looks
_abandoned = []  # buffers that MPI may still write into, after a rank has gone
DIFFERENT_PARAMS = (
    "params of rank(s) {others} are not those of rank 0, in names, shapes, dtypes, groups or values: "
    "send the values of rank 0 to all, comm.Bcast(param)"
)
DIFFERENT_OPTIONS = (
    "the optimizer class, bucket or nonfinite of rank(s) {others} is not that of rank 0: give all ranks the same"
)
DIFFERENT_SAVED = (
    "the state_dict of rank(s) {others} has other hyper-parameters or step counts than that of rank 0; nothing was loaded: "
    "give all ranks the same"
)
DIFFERENT_HYPER = "the hyper-parameters of rank(s) {others} are not those of rank 0: give all ranks the same"
WITHOUT = {  # options that a ShardedOptimizer does not take: the values that it does take, and what to do in place of others
    "zero_grad": ((False,), "zero the gradients after step(), which only reads them"),
    "shards": ((None,), "it makes them itself"),
    "backend": (("auto", *backends.HOST), "its arrays are in host memory"),
    "state_format": ((None,), "its states are in the dtype of the parameters"),
    "master": ((None,), "its parameters are float32 or float64"),
    "param_copy": ((None,), "copy the parameters after step()"),
}


def is_one_of(value, taken):
    """Whether an option, which may be an array, is one of these values."""
    return any(value is other or (isinstance(other, (bool, str)) and value == other) for other in taken)


def refuse_options(options):
    """ValueError for options of an optimizer, or of a group, that a ShardedOptimizer does not take."""
    for name, (taken, instead) in WITHOUT.items():
        if name in options and not is_one_of(options[name], taken):
            raise ValueError(f"{name}={options[name]!r} is not for a ShardedOptimizer: {instead}")


class Piece(NamedTuple):
    """Elements [start, stop) of a tensor that one rank updates; own: where they lie in its arrays."""

    tensor: int
    start: int
    stop: int
    own: slice


class Bucket(NamedTuple):
    """A part of the flat gradient, of which rank r sums and updates elements [edges[r], edges[r + 1])."""

    edges: list
    tensors: list  # (tensor, first element, where it begins in the flat gradient, number of elements) of what lies in it

    @property
    def span(self):
        return slice(self.edges[0], self.edges[-1])

    @property
    def counts(self):
        return np.diff(self.edges)

    def pieces(self, rank, own):
        """The Pieces of a rank, one for each tensor, which may be empty; own: where those of this bucket begin."""
        begin, end = self.edges[rank], self.edges[rank + 1]
        for tensor, first, at, size in self.tensors:
            start, stop = (min(max(edge, at), at + size) for edge in (begin, end))
            yield Piece(tensor, first + start - at, first + stop - at, slice(own + start - begin, own + stop - begin))


def cut(sizes, ranks, bucket):
    """The Buckets of tensors, (number, size) each, that lie one after the other.  Wherever they cut a tensor, they do so
    between two blocks of it: a cut within a block would make the exchange of the norm longer."""
    starts = [0, *itertools.accumulate(size for _, size in sizes)]
    total, buckets = starts[-1], []
    places = sorted({nearest(starts, k * bucket) for k in range(total // bucket + 1)} | {total})
    for begin, end in itertools.pairwise(places if total else [0, 0]):
        inner = [nearest(starts, begin + (end - begin) * rank // ranks) for rank in range(1, ranks)]
        inside = []
        for (tensor, size), at in zip(sizes, starts, strict=False):
            start, stop = max(begin, at), min(end, at + size)
            if start < stop or (size == 0 and (begin <= at < end or at == end == total)):
                inside.append((tensor, start - at, start, stop - start))
        buckets.append(Bucket([begin, *(min(max(edge, begin), end) for edge in inner), end], inside))
    return buckets


def nearest(starts, place):
    """The place where a tensor, or a block of one, begins that is nearest to this place."""
    k = np.searchsorted(starts, place, side="right") - 1
    if k >= len(starts) - 1:
        return starts[-1]
    before = starts[k] + (place - starts[k]) // BLOCK * BLOCK
    after = min(before + BLOCK, starts[k + 1])
    return int(before if place - before <= after - place else after)


class Flat:
    """All tensors of one dtype, one after the other.

    ``work`` holds the gradients that are sent and then the parameters that arrive; ``param`` and ``grad`` are the parts of
    this rank, those of all buckets one after the other.
    """

    def __init__(self, dtype, sizes, ranks, rank, bucket):
        self.buckets = cut(sizes, ranks, bucket)
        self.work = np.empty(sum(size for _, size in sizes), dtype)
        lengths = [int(bucket.counts[rank]) for bucket in self.buckets]
        self.own = [slice(end - length, end) for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)]
        self.param, self.grad = (np.empty(sum(lengths), dtype) for _ in range(2))


class Cost(NamedTuple):
    """What a step over MPI costs each rank; see cost()."""

    sent: int
    memory: int
    seconds: float


def cost(elements, ranks, *, itemsize=4, states=2, bucket=BUCKET, latency=2e-6, bandwidth=1e10, rate=1e9):
    """A model of a step of ShardedOptimizer without clip_norm, where the tensors are large.

    Each of the two collectives sends, from each rank, all of the flat buffer but a share of 1/ranks, in ceil(log2(ranks))
    messages for each bucket.  The update of the last bucket is what no collective hides.

    Parameters
    ----------
    elements : int
        Of all tensors.
    ranks : int
    itemsize : int, default 4
        Bytes of an element.
    states : int, default 2
        Of the rule; Adam has 2.
    bucket : int, default 2**22
        Elements that are summed in one call.
    latency : float, default 2e-6
        Seconds for a message.
    bandwidth : float, default 1e10
        Bytes per second that a rank sends.
    rate : float, default 1e9
        Elements per second that a rank updates.

    Returns
    -------
    Cost
        sent: the bytes that each rank sends in a step; memory: the bytes of its buffers beside the parameters and gradients
        of the caller; seconds: the time of a step.
    """
    sent = 2 * elements * itemsize * (ranks - 1) // ranks
    memory = elements * itemsize + elements * itemsize * (2 + states) // ranks
    buckets = max(1, -(-elements // bucket))
    messages = 2 * buckets * math.ceil(math.log2(ranks)) if ranks > 1 else 0
    exchange, update = messages * latency + sent / bandwidth, elements / ranks / rate
    return Cost(sent, memory, max(exchange, update) + min(exchange, update) / buckets)


def parted(received, lengths):
    """The messages of these lengths that stand one after the other in an array of bytes."""
    return [
        received[end - length : end].tobytes() for end, length in zip(itertools.accumulate(lengths), lengths, strict=True)
    ]


def present_of(most, names):
    """For each tensor, whether a rank has its gradient; ValueError where the ranks ask for different steps.  names: of the
    numbers that must be the same."""
    count = len(names)
    for name, high, low in zip(names, most[:count], -most[count : 2 * count], strict=True):
        if high != low:
            raise ValueError(f"{name} must be the same on all ranks, it goes from {low:.9g} to {high:.9g} (-1: None)")
    return most[2 * count :].astype(bool)


def text_of(error):
    return f"{type(error).__name__}: {error}"


def _mpi():
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(f"fastrms.mpi needs mpi4py and an MPI: pip install mpi4py mpich ({error})") from None
    return MPI


class Ranks:
    """All ranks of a communicator, and how this one speaks with them: within a time limit, and all raise where one does.

    ``broken`` says why they cannot speak any more; it is None while they can.
    """

    def __init__(self, comm, timeout):
        self._mpi, self._timeout = _mpi(), hyper.above_zero("timeout", timeout)
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.broken, self.under_way = None, []  # requests of MPI, which hold their buffers

    def start(self, request):
        """Keep a request, and the buffers in it, until MPI is done with it."""
        self.under_way.append(request)
        return request

    def wait(self, request, what):
        """Wait until a request of MPI is done."""
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > self._timeout:
                self.lose()
                raise TimeoutError(
                    f"rank {self.rank} waited {self._timeout:g} s for the other ranks, in the {what}; one of them is gone, "
                    f"or slower than timeout allows.  The parameters of this rank are as before; end by comm.Abort(1)"
                )
            time.sleep(0 if waited < SPINNING else PAUSE)

    def lose(self):
        """Refuse all further use.  MPI may still write into the buffers of what is under way."""
        self.broken = "a step or another call was cut short; load a checkpoint in a new run"
        _abandoned.append(self.under_way)

    def refuse_broken(self):
        if self.broken:
            raise RuntimeError(f"this ShardedOptimizer cannot be used: {self.broken}")

    def gather(self, message):
        """The messages of all ranks."""
        lengths, mine = np.empty(self.size, np.int64), np.array([len(message)], np.int64)
        self.wait(self.start(self.comm.Iallgather(mine, lengths)), "exchange of lengths")
        received, sent = np.empty(lengths.sum(), np.uint8), np.frombuffer(message, np.uint8)
        self.wait(self.start(self.comm.Iallgatherv(sent, [received, lengths])), "exchange of messages")
        return parted(received, lengths)

    def to_root(self, message):
        """The messages of all ranks on rank 0, None on the others."""
        lengths = [int.from_bytes(length, "little") for length in self.gather(len(message).to_bytes(8, "little"))]
        received = np.empty(sum(lengths) if self.rank == 0 else 0, np.uint8)
        sent, to = np.frombuffer(message, np.uint8), [received, lengths] if self.rank == 0 else None
        self.wait(self.start(self.comm.Igatherv(sent, to)), "gathering of the state")
        return parted(received, lengths) if self.rank == 0 else None

    def agree(self, said, numbers=()):
        """The largest of each number over all ranks; RuntimeError where another rank has raised.  said: what this rank has
        raised, as a text, or None."""
        mine = np.array([0 if said is None else 1 + self.rank, *numbers], np.float64)
        most = np.empty_like(mine)
        self.wait(self.start(self.comm.Iallreduce(mine, most, self._mpi.MAX)), "agreement of all ranks")
        if most[0]:
            texts, rank = self.gather((said or "").encode()), int(most[0]) - 1
            if said is None:
                raise RuntimeError(f"rank {rank} raised {texts[rank].decode()} (nothing was changed on any rank)")
        self.under_way.clear()
        return most[1:]

    def together(self, function, *arguments, **options):
        """function(...) on each rank; where it raises on one rank, all ranks raise."""
        self.refuse_broken()
        try:
            result = function(*arguments, **options)
        except Exception as error:
            self.agree(text_of(error))
            raise
        self.agree(None)
        return result

    def refuse_different(self, digest, sentence):
        """ValueError on all ranks unless they have the same digest."""
        digests = self.gather(digest)
        others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise ValueError(sentence.format(others=", ".join(others)))


class ShardedOptimizer:
    """An optimizer whose gradients are summed over all ranks, and whose state is spread over them.

    All ranks make it from equal parameters and call each method together, unless it says otherwise.  A step sums the
    gradients of all ranks, which ``grad_scale=1 / comm.size`` makes a mean; the parameters are equal on all ranks again
    afterwards.  The state, step counts and StepInfo are those of one process with the summed gradient: the same bits where
    the sum is exact, and within the rounding of the sum elsewhere.

    Where a rank raises in a method, all ranks raise, and nothing was updated.  Where a rank never comes, the others raise
    TimeoutError; their parameters are as before the step, the optimizer refuses to be used from then on, and the process
    should end by ``comm.Abort(1)``, since MPI waits for the lost rank at exit.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        It is used in methods only.
    params : array, sequence, mapping, FlatBuffer or list of groups
        As in fastrms.RMSProp: host arrays of float32 or float64, of the same values on all ranks.
    optimizer : class
        fastrms.Adam, any other optimizer of fastrms or a rule of your own.
    groups : mapping of pattern to hyper-parameters, optional
        As in fastrms.RMSProp.
    bucket : int, default 2**22
        Elements that are summed in one call of MPI, at least 4096.
    timeout : float, default 600
        Seconds to wait for the other ranks, above 0.
    **options
        The hyper-parameters and options of the optimizer, the same on all ranks, but for zero_grad and shards.

    Attributes
    ----------
    sent : int
        How many bytes this rank has sent in all steps, by the least that reduce-scatter and all-gather take.

    Raises
    ------
    ImportError
        Without mpi4py.
    TypeError, ValueError
        As the optimizer has it, and where the parameters, the class, bucket, nonfinite or hyper-parameters differ between
        ranks.
    TimeoutError
        Where a rank does not come.
    """

    def __init__(self, comm, params, optimizer, *, groups=None, bucket=BUCKET, timeout=600.0, **options):
        self._ranks, self.sent = Ranks(comm, timeout), 0
        self._ranks.together(self._arrange, params, optimizer, groups, bucket, options)
        self._ranks.refuse_different(self._digest(), DIFFERENT_PARAMS)
        self._local = self._ranks.together(optimizer, self._local_params, **options)
        decides = self._kind.__name__, bucket, self._local.nonfinite
        self._ranks.refuse_different(repr(decides).encode(), DIFFERENT_OPTIONS)
        self._ranks.refuse_different(repr(states.described(self._local._groups.values)).encode(), DIFFERENT_HYPER)
        table = [(piece.tensor, piece.start, self._tensors[piece.tensor].param.size) for piece in self._pieces]
        self._ranks.together(shards.join, self._local, shards.Shards(self._ranks.gather, table))
        self._hashed = None, 0
        self._names = "grad_scale", "clip_norm", "the number of steps made", "the hash of all hyper-parameters but lr"
        self._names += tuple(f"lr of group {key.group}" for key in self._local._tensors.keys)
        for piece, tensor in zip(self._pieces, self._local._tensors, strict=True):
            tensor.name, tensor.grad_name = self._tensors[piece.tensor].name, self._tensors[piece.tensor].grad_name

    # where everything lies

    def _arrange(self, params, optimizer, groups, bucket, options):
        """Note the tensors, their buckets and the pieces of this rank."""
        refuse_options(options)
        bucket = hyper.step_count("bucket", bucket, least=BLOCK)
        structure, leaves, group_of, overrides = tree.arrange(params, groups)
        for extra in overrides:
            refuse_options(extra)
        if not leaves:
            raise ValueError("params is empty: there is nothing to optimize")
        self._tensors, self._patterns = Tensors(structure, leaves, group_of, host), list(groups or ())
        self._kind, ranks = optimizer, self._ranks
        dtypes = {str(param.dtype): [] for param in self._tensors.params}
        for k, param in enumerate(self._tensors.params):
            dtypes[str(param.dtype)].append((k, param.size))
        self._flats = [Flat(dtype, sizes, ranks.size, ranks.rank, bucket) for dtype, sizes in dtypes.items()]
        self._place(group_of, overrides)

    def _place(self, group_of, overrides):
        """Give each piece of this rank its place in the groups of the local optimizer: ``_pieces`` lists them in its order,
        ``_steps`` has for each bucket its Flat, the Bucket, what of it belongs to this rank, and (label, Piece) pairs."""
        self._group_of, self._steps = group_of, []
        self._local_params = [{"params": [], **extra} for extra in overrides]
        for flat in self._flats:
            for bucket, own in zip(flat.buckets, flat.own, strict=True):
                labelled = []
                for piece in bucket.pieces(self._ranks.rank, own.start):
                    group = group_of[piece.tensor]
                    parts = self._local_params[group]["params"]
                    labelled.append(((group, len(parts)), piece))
                    parts.append(flat.param[piece.own])
                self._steps.append((flat, bucket, own, labelled))
        self._pieces = self._pieces_of(self._ranks.rank)
        self._grads = [[None] * len(group["params"]) for group in self._local_params]

    def _pieces_of(self, rank):
        """The Pieces of a rank in the order of its local optimizer, which is group by group."""
        pieces = [piece for _, bucket, own, _ in self._steps for piece in bucket.pieces(rank, own.start)]
        return sorted(pieces, key=lambda piece: self._group_of[piece.tensor])

    def _digest(self):
        """What all ranks must have equal: the tensors, their groups and their values."""
        values = hashlib.blake2b(digest_size=16)
        for tensor in self._tensors:
            values.update(repr((tensor.name, tensor.param.shape, tensor.param.dtype, tensor.recipe)).encode())
            values.update(tensor.param.flat)
        return values.digest()

    # steps

    def step(self, grads, grad_scale=1.0, clip_norm=None):
        """Sum the gradients of all ranks and update the parameters on all of them.

        Parameters
        ----------
        grads : array, sequence, mapping or FlatBuffer gradients
            As in Optimizer.step().  A None counts as zeros; a tensor for which all ranks have None is left alone.
        grad_scale : float, default 1.0
            As in Optimizer.step(), of the sum, and the same on all ranks.
        clip_norm : float, optional
            As in Optimizer.step(), of the sum, and the same on all ranks.  All buckets must have arrived before the first
            update then, as with a nonfinite other than "propagate".

        Returns
        -------
        StepInfo
            The same on all ranks.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Before anything is written: ValueError where grad_scale, clip_norm, a hyper-parameter, the learning rate that a
            schedule gives, or the number of steps made differs between ranks; RuntimeError where another rank raised.
        FloatingPointError
            With ``nonfinite="raise"``, on all ranks; nothing was updated.
        TimeoutError
            Where a rank does not come; the parameters of this rank are as before then.
        """
        ranks = self._ranks
        ranks.refuse_broken()
        count = 2 * len(self._names) + len(self._tensors)
        try:
            grads, asked = self._checked(grads, grad_scale, clip_norm)
            asked += self._local_numbers()
        except Exception as error:
            ranks.agree(text_of(error), [0] * count)
            raise
        said = [*asked, *(-x for x in asked), *(grad is not None for grad in grads)]
        present = present_of(ranks.agree(None, said), self._names)
        try:
            return self._exchange_and_update(grads, present, asked[0], clip_norm)
        except FloatingPointError:
            raise
        except BaseException:
            ranks.lose()
            raise

    def _checked(self, grads, grad_scale, clip_norm):
        """(Buffer or None of each gradient, [grad_scale, clip_norm]), all checked."""
        scale = hyper.scale("grad_scale", grad_scale)
        norm = -1.0 if clip_norm is None else hyper.above_zero("clip_norm", clip_norm)
        tensors = self._tensors
        moved = tensors.moved(tensors.of_torch) if tensors.of_torch else None
        if moved is not None:
            tensors.take(moved)
        leaves = tensors.structure.leaves(grads, "grads")
        return [tensors.acquire_grad(k, grad, False) for k, grad in enumerate(leaves)], [scale, norm]

    def _local_numbers(self):
        """What else must be the same on all ranks before a step: steps made, hyper-parameters, and the learning rates."""
        steps, groups = self._local.steps, self._local._groups
        if self._hashed[0] is not groups.values:  # what changes another hyper-parameter than lr makes a new list
            others = [{**values, "lr": None} for values in groups.values]
            self._hashed = groups.values, zlib.crc32(repr(others).encode())
        return [steps, self._hashed[1], *groups.ask(steps)]

    def _exchange_and_update(self, grads, present, grad_scale, clip_norm):
        summed, ranks = [], self._ranks
        for flat, bucket, own, labelled in self._steps:
            self._pack(flat, bucket, labelled, grads)
            summed.append(ranks.start(ranks.comm.Ireduce_scatter(flat.work[bucket.span], flat.grad[own], bucket.counts)))
            self._count(flat, bucket)
        looks = clip_norm is not None or self._local.nonfinite != "propagate" or not present.any()
        update = self._update_at_once if looks else self._update_by_bucket
        info, arriving = update(summed, present, grad_scale, clip_norm)
        for request in arriving:
            ranks.wait(request, "gathering of parameters")
        ranks.under_way.clear()
        if info.applied:
            self._unpack(present)
        return info

    def _pack(self, flat, bucket, labelled, grads):
        """Copy the gradients of a bucket to where they are sent from, and the parameters of this rank to where they are
        updated."""
        for tensor, first, at, size in bucket.tensors:
            to, grad = flat.work[at : at + size], grads[tensor]
            to[...] = 0 if grad is None else storage.decoded(grad.flat[first : first + size])
        for _, piece in labelled:
            flat.param[piece.own] = self._tensors[piece.tensor].param.flat[piece.start : piece.stop]

    def _count(self, flat, bucket):
        """Count the bytes of both collectives for a bucket: what the sums of others need of this rank's gradients, and as
        much for the parameters, of which each rank hands on all but a share of its own."""
        self.sent += 2 * flat.work.itemsize * int(sum(bucket.counts) - bucket.counts[self._ranks.rank])

    def _update_by_bucket(self, summed, present, grad_scale, clip_norm):
        """Update each bucket as soon as its sum is there.  Returns (StepInfo, the requests of the parameters)."""
        arriving = []
        with self._local.streaming(grad_scale) as stream:
            for request, step in zip(summed, self._steps, strict=True):
                self._ranks.wait(request, "sum of gradients")
                flat, _, _, labelled = step
                for label, piece in labelled:
                    if present[piece.tensor]:
                        stream.step(label, flat.grad[piece.own])
                arriving.append(self._send(step))
        return APPLIED, arriving

    def _update_at_once(self, summed, present, grad_scale, clip_norm):
        """Update all buckets when all sums are there."""
        for request, (flat, _, _, labelled) in zip(summed, self._steps, strict=True):
            self._ranks.wait(request, "sum of gradients")
            for (group, k), piece in labelled:
                self._grads[group][k] = flat.grad[piece.own] if present[piece.tensor] else None
        info = self._local.step(self._grads, grad_scale=grad_scale, clip_norm=clip_norm)
        return info, [self._send(step) for step in self._steps] if info.applied else []

    def _send(self, step):
        """Start to gather the new parameters of a bucket, in the buffer from which its gradients were sent."""
        (flat, bucket, own, _), ranks = step, self._ranks
        return ranks.start(ranks.comm.Iallgatherv(flat.param[own], [flat.work[bucket.span], bucket.counts]))

    def _unpack(self, present):
        """Copy all new parameters to the caller's arrays; on the C backend no interrupt can cut this in two."""
        pairs = []
        for flat in self._flats:
            for bucket in flat.buckets:
                for tensor, first, at, size in bucket.tensors:
                    if present[tensor] and size:
                        pairs.append((self._tensors[tensor].param.flat[first : first + size], flat.work[at : at + size]))
        self._local._plan.copy(pairs)
        host.wrote([tensor.param for tensor, there in zip(self._tensors, present, strict=True) if there])

    # hyper-parameters and state

    @property
    def lr(self):
        """As Optimizer.lr; set it to the same on all ranks, which the next step compares."""
        return self._local.lr

    @lr.setter
    def lr(self, value):
        self._local.lr = value

    @property
    def groups(self):
        """As Optimizer.groups; set a hyper-parameter to the same on all ranks."""
        return self._local.groups

    @property
    def steps(self):
        """Number of steps made."""
        return self._local.steps

    def __repr__(self):
        tensors, kind, ranks = len(self._tensors), self._kind.__name__, self._ranks.size
        return f"<ShardedOptimizer of {tensors} tensor(s), {kind} on {ranks} rank(s), {self.steps} steps made>"

    def state_dict(self):
        """What state_dict() of the optimizer in one process over the whole parameters is.

        Returns
        -------
        dict or None
            On rank 0 the dict, and None on the others.

        Raises
        ------
        TimeoutError
            Where a rank does not come.
        """
        mine = self._ranks.together(self._local.state_dict)
        names = [[*tensor.state] for tensor in self._local._tensors]
        flats = [tensor["state"][name] for tensor, n in zip(mine["tensors"], names, strict=True) for name in n]
        sent = self._ranks.to_root(b"".join(flat.tobytes() for flat in flats))
        if sent is None:
            return None
        steps = {piece.tensor: tensor["steps"] for piece, tensor in zip(self._pieces, mine["tensors"], strict=True)}
        counts = [steps[k] for k in range(len(self._tensors))]
        tensors = states.saved(self._tensors, self._whole(sent, names), counts)
        return {**mine, "patterns": self._patterns, "tensors": tensors}

    def _whole(self, sent, names):
        """For each tensor state name -> flat array, from what all ranks have sent.  names: of the states of each piece."""
        whole = [{} for _ in self._tensors]
        for rank, message in enumerate(sent):
            at = 0
            for piece, of_piece in zip(self._pieces_of(rank), names, strict=True):
                param = self._tensors[piece.tensor].param
                for name in of_piece:
                    flat = whole[piece.tensor].setdefault(name, np.empty(param.size, param.dtype))
                    part = flat[piece.start : piece.stop]
                    part.view(np.uint8)[...] = np.frombuffer(message[at : at + part.nbytes], np.uint8)
                    at += part.nbytes
        return whole

    def load_state_dict(self, d):
        """Take over what state_dict() gave, of any number of ranks, or what that of the optimizer in one process gave.

        Parameters
        ----------
        d : dict
            The whole dict, the same on all ranks; its arrays are not compared.

        Raises
        ------
        ValueError, RuntimeError
            As Optimizer.load_state_dict(), and ValueError where the hyper-parameters or step counts in it differ between
            ranks; RuntimeError where another rank raised.
        """
        part, digest = self._ranks.together(self._own_part, d)
        self._ranks.refuse_different(digest, DIFFERENT_SAVED)
        self._local.load_state_dict(part)

    def _own_part(self, d):
        """(what the local optimizer must load, what all ranks must have equal), from a state_dict of the whole that is
        checked."""
        local = self._local._tensors
        for piece, tensor in zip(self._pieces, local, strict=True):
            self._tensors[piece.tensor].state = dict.fromkeys(tensor.state)
        try:
            loaded = states.checked(d, self._kind, self._tensors, self._local._groups.values, self._patterns)
        except states.MALFORMED as error:
            raise ValueError(f"this is not a state_dict of fastrms: {error!r}") from None
        tensors = [
            {
                "name": tensor.parts[0][0],
                "steps": loaded.steps[1 + piece.tensor],
                "state": {name: flat[piece.start : piece.stop] for name, flat in loaded.flats[piece.tensor].items()},
            }
            for piece, tensor in zip(self._pieces, local, strict=True)
        ]
        self._local._groups.recipes_for(loaded.values, [tensor["state"] for tensor in tensors], "this state_dict")
        equal = json.dumps([d["groups"], loaded.steps, loaded.dialect], sort_keys=True, default=repr)
        return {**d, "patterns": [], "tensors": tensors}, equal.encode()

    def save(self, path):
        """Write state_dict() to a safetensors file, as Optimizer.save() does; rank 0 writes it.

        Any number of ranks can load it, and so can the optimizer in one process.

        Parameters
        ----------
        path : str, bytes or os.PathLike

        Raises
        ------
        OSError, ImportError, RuntimeError
            As Optimizer.save(); RuntimeError where another rank raised.
        """
        d = self.state_dict()
        self._ranks.together(lambda: d is None or checkpoint.write(d, path))

    def load(self, path):
        """Take over what save() wrote, as Optimizer.load() does; every rank reads the file.

        Parameters
        ----------
        path : str, bytes or os.PathLike

        Raises
        ------
        OSError, ValueError, ImportError, RuntimeError
            As Optimizer.load(); RuntimeError where another rank raised.
        """
        self.load_state_dict(self._ranks.together(checkpoint.read, path))
