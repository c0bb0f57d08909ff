"""Tensors that are spread over several ranks: where each part lies, and the exchange by which all ranks find the norm of all
gradients, with the bits that one process computes from the whole tensors.

The norm is a sum of squares in one order: blocks in sequence within a segment, segments in sequence, tensors in sequence
(backends/norm.py).  A rank sums the segments that it holds whole, and the blocks that it holds whole in other segments.  Of
a block that is cut it sends the elements themselves.  All ranks gather these pieces and add them up in the same order.
"""

import operator
import os
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np

from .backends.norm import BLOCK, SEGMENT

HEADER, SQUARES, TOKEN = 16, 24, 16  # bytes: grad_scale and clip_norm; a sum of squares; what a rank knows itself by


class Shards:
    """Where the tensors of an optimizer lie in tensors that are spread over several ranks.

    ``fastrms.Adam(params, shards=Shards(gather, table))`` makes clip_norm, nonfinite and StepInfo those of the whole
    tensors, with the same bits for every number of ranks.  Each rank makes an optimizer of its parts, and all step together.

    Parameters
    ----------
    gather : callable(bytes) -> sequence of bytes
        Sends a message to all ranks, and gives the messages of all ranks, this one included, in the order of ranks.  The
        constructor of the optimizer calls it once, and so does each step with clip_norm, or with a nonfinite other than
        "propagate"; the message of a rank has the same length in all steps.  What it raises, the step raises, and
        nothing was updated then.  It need not copy, but the message is only good until it returns.
    table : sequence of (tensor, start, size)
        One row for each tensor of the optimizer, in its order.  tensor: the number of the whole tensor, the same on all
        ranks; the norm is summed in the order of these numbers.  start: the first element, in the memory order of the whole
        tensor, that this rank holds; it holds as many as its parameter has, which may be 0.  size: all elements of the whole
        tensor.  Together the ranks must hold each element; a row that several ranks have alike counts once.

    Notes
    -----
    Stochastic rounding (state_format, master) has the bits of one process with the whole tensors in the order of their
    numbers, too.  The blocks of state_format="q8" are counted from the first element of each part: they are those of the
    whole tensor only where start is a multiple of 256.

    Raises
    ------
    TypeError
        Where gather is not callable, or a row is no triple of int.
    ValueError
        Where a row is out of range; and, from the optimizer, where the ranks do not hold each element of a tensor once.
    """

    __slots__ = ("gather", "table")

    def __init__(self, gather, table):
        if not callable(gather):
            raise TypeError(f"gather={gather!r} is not callable; it takes a message and gives those of all ranks")
        self.gather, self.table = gather, [_row(k, row) for k, row in enumerate(table)]


def _row(k, row):
    """A row of the table as three numbers of Python."""
    try:
        tensor, start, size = map(operator.index, row)
    except (TypeError, ValueError):
        raise TypeError(f"table[{k}]={row!r} must be three int: (tensor, start, size)") from None
    if tensor < 0 or not 0 <= start <= size:
        raise ValueError(f"table[{k}]={row!r} must be (tensor, start, size) with 0 <= tensor and 0 <= start <= size")
    return tensor, start, size


class Piece(NamedTuple):
    """What fastrms_piece is in csrc/fastrms_decl.h."""

    tensor: int
    begin: int
    length: int
    squares: int
    values: int
    stored: int
    ends_block: bool
    ends_segment: bool
    unused: int = 0


class Run(NamedTuple):
    """Elements [start, stop) of a whole tensor of `size` elements, each stored in `stored` bytes, which one rank holds."""

    tensor: int
    start: int
    stop: int
    size: int
    stored: int


class Exchange:
    """The pieces of all ranks, as one rank sees them.

    own : list of Piece
        The pieces of this rank, in the order of its message of `length` bytes.
    pieces : list of Piece
        Those of all ranks, in the order of the sum.
    """

    def __init__(self, gather, runs, rank):
        self._gather, self._rank = gather, rank
        local = {run.tensor: k for k, run in reversed([*enumerate(runs[rank])])}
        runs = counted_once(runs)
        self.own, self.length = message(runs[rank], 0)
        self._lengths, found = [], []
        for mine in runs:
            made, length = message(mine, sum(self._lengths))
            self._lengths.append(length)
            starts = [(mine[piece.tensor].tensor, mine[piece.tensor].start + piece.begin) for piece in made]
            found += zip(starts, made, strict=True)
        pieces = [(tensor, piece) for (tensor, _), piece in sorted(found, key=operator.itemgetter(0))]
        self.pieces = [piece._replace(tensor=local.get(tensor, -1)) for tensor, piece in pieces]

    def __call__(self, sent):
        """The messages of all ranks, one after the other, from that of this rank."""
        messages = gathered(self._gather, sent)
        lengths = [len(message) for message in messages]
        if lengths != self._lengths or messages[self._rank] != sent:
            raise ValueError(f"gather gave messages of {lengths} bytes, or not that of this rank at its place; the ranks "
                             f"have sent {self._lengths}")  # fmt: skip
        asked = [tuple(np.frombuffer(message, np.float64, 2)) for message in messages]
        if any(other != asked[0] for other in asked):
            said = "; ".join(f"{scale:g} and {norm:g} on rank {k}" for k, (scale, norm) in enumerate(asked))
            raise ValueError(f"all ranks must step with the same grad_scale and clip_norm, which are {said} (-1: None)")
        return b"".join(messages)


def gathered(gather, message):
    """The messages of all ranks, as bytes; TypeError where gather gives something else."""
    found = gather(message)
    try:
        return [bytes(other) for other in found]
    except TypeError:
        raise TypeError(f"gather gave {found!r:.80}; it must give every rank the messages of all ranks, a sequence of bytes"
                        f", as comm.allgather of mpi4py does") from None  # fmt: skip


def join(optimizer, shards):
    """Let the plan of an optimizer find norms together with those of the other ranks.  All ranks call this at once."""
    if not isinstance(shards, Shards):
        raise TypeError(f"shards={shards!r} must be a fastrms.Shards")
    tensors = optimizer._tensors
    if optimizer.backend == "cuda":
        raise ValueError("shards= needs a host backend, this optimizer runs on 'cuda', whose norm is that of one device")
    if len(shards.table) != len(tensors):
        raise ValueError(f"the table of shards has {len(shards.table)} rows, the optimizer has {len(tensors)} tensor(s)")
    runs = [_run(tensor, row) for tensor, row in zip(tensors, shards.table, strict=True)]
    found, rank = everyone(shards.gather, runs)
    optimizer._plan.join(Exchange(shards.gather, found, rank))
    take_positions(optimizer, runs, {run.tensor: run.size for mine in found for run in mine})


def take_positions(optimizer, runs, sizes):
    """Let random numbers depend on the positions of elements among all elements of all whole tensors, so that they do not
    depend on how these are divided.  sizes: of the whole tensors, by number."""
    numbers, lengths = np.unique(list(sizes), return_index=True)
    lengths = [list(sizes.values())[k] for k in lengths]
    firsts = dict(zip(numbers.tolist(), accumulate(lengths, initial=0), strict=False))
    for tensor, run in zip(optimizer._tensors, runs, strict=True):
        if tensor.storage is not None:
            tensor.storage = tensor.storage._replace(origin=firsts[run.tensor] + run.start)
    storages = [tensor.storage for tensor in optimizer._tensors]
    if any(storages):
        optimizer._plan.copy(optimizer._plan.pairs_of_storages(storages))


def _run(tensor, row):
    number, start, size = row
    stop = start + tensor.param.size
    if stop > size:
        raise ValueError(f"{tensor.name} has {tensor.param.size} elements from {start} on, which is more than the {size} of "
                         f"the whole tensor {number}")  # fmt: skip
    return Run(number, start, stop, size, tensor.dtype.itemsize)


def everyone(gather, runs):
    """(runs of all ranks, number of this rank): all ranks tell each other what they hold."""
    token = os.urandom(TOKEN)
    sent = gathered(gather, token + np.array(runs, np.int64).tobytes())
    tokens = [message[:TOKEN] for message in sent]
    if token not in tokens:
        raise ValueError(f"gather gave {len(sent)} message(s), and that of this rank is not among them")
    table = [[Run(*row) for row in np.frombuffer(message[TOKEN:], np.int64).reshape(-1, 5).tolist()] for message in sent]
    refuse_gaps([run for runs in counted_once(table) for run in runs])
    return table, tokens.index(token)


def counted_once(runs):
    """The runs of all ranks, where those that an earlier rank has too are empty."""
    seen, made = set(), []
    for mine in runs:
        made.append([run._replace(stop=run.start) if run in seen else run for run in mine])
        seen.update(mine)
    return made


def refuse_gaps(runs):
    """ValueError unless these runs together are whole tensors, each element once."""
    for tensor, group in groupby(sorted(runs), operator.attrgetter("tensor")):
        parts = list(group)
        if len({(run.size, run.stored) for run in parts}) > 1:
            said = ", ".join(sorted({f"{run.size} elements of {run.stored} bytes" for run in parts}))
            raise ValueError(f"the ranks disagree on tensor {tensor} of shards: {said}")
        edges = [0, *(edge for run in parts if run.start < run.stop for edge in (run.start, run.stop)), parts[0].size]
        for end, start in zip(edges[::2], edges[1::2], strict=True):
            if end != start:
                found = "are on no rank" if end < start else "are held twice"
                raise ValueError(f"elements {min(end, start)} to {max(end, start)} of tensor {tensor} of shards {found}")


def message(runs, offset):
    """(pieces, length) of the message of a rank that holds these runs.  offset: where it begins among all messages."""
    cuts = [(k, *piece) for k, run in enumerate(runs) for piece in cut(run)]
    squares, values = offset + HEADER, offset + HEADER + SQUARES * len(cuts)
    pieces = []
    for k, start, stop, whole in cuts:
        run, length = runs[k], stop - start
        ends = [stop == run.size or stop % unit == 0 for unit in (BLOCK, SEGMENT)]
        pieces.append(Piece(k, start - run.start, length, squares, 0 if whole else values, run.stored, *ends))
        squares += SQUARES
        values += 0 if whole else length * run.stored
    return pieces, values - offset


def cut(run):
    """(start, stop, whole) of the pieces of a run: whole segments, else whole blocks, else parts of blocks."""
    start = run.start
    while start < run.stop:
        for unit in (SEGMENT, BLOCK):
            end = min(start - start % unit + unit, run.size)
            whole = start % unit == 0 and end <= run.stop
            if whole:
                break
        stop = min(end, run.stop)
        yield start, stop, whole
        start = stop
