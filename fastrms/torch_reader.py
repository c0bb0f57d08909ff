"""Where torch tensors lie at each step, read in one call of C, and only as long as each of them is what it was.

torch may give a tensor other memory at any time.  acquire() of fastrms.memory, which checks all there is, takes microseconds
for a tensor; here a tensor is only compared with what acquire() once accepted.  Where the comparison fails, for whatever
reason, acquire() is asked again, and its sentence says what is wrong.
"""

import ctypes
import sys
from copy import copy
from functools import cache
from itertools import accumulate
from operator import is_
from pathlib import Path
from typing import Any, NamedTuple

from .backends import c
from .memory import host

READ = ("device_type", "device_index", "layout", "dtype", "dim", "numel", "sizes", "strides", "data_ptr", "storage_offset",
        "storage_size")  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16", "int16", "int8", "uint8")  # of what a step reads and writes
FILES = ("libtorch_cpu.so", "libtorch_cpu.dylib")


@cache
def library():
    """The Library of the torch that is loaded; None where it, or this build of fastrms, lacks what that needs."""
    try:
        return Library(sys.modules["torch"]) if c.lib else None
    except (AttributeError, LookupError, OSError, StopIteration, TypeError):
        return None


class Library:
    """What is used of torch: two of its functions, and a struct with which C reads its tensors.  Making it raises where this
    torch is another than is expected here."""

    def __init__(self, torch):
        self.increment_version = torch.autograd.graph.increment_version
        folder = Path(torch.__file__).parent / "lib"
        functions = ctypes.CDLL(next(str(folder / name) for name in FILES if (folder / name).exists()))
        self.devices = {name: functions[f"aoti_torch_device_type_{name}"]() for name in ("cpu", "cuda")}
        self.dtypes = {name: getattr(functions, f"aoti_torch_dtype_{name}")() for name in DTYPES}
        self.struct = c.ffi.new("fastrms_torch *")
        fields = dict(c.ffi.typeof(self.struct).item.fields)
        for name in READ:
            address = ctypes.cast(functions[f"aoti_torch_get_{name}"], ctypes.c_void_p).value
            setattr(self.struct, f"get_{name}", c.ffi.cast(fields[f"get_{name}"].type, address))
        self.struct.strided, self.struct.none = functions.aoti_torch_layout_strided(), c.pointer(id(None))
        self.struct.bf16, self.struct.fp16 = self.dtypes["bfloat16"], self.dtypes["float16"]
        samples = torch.ones(2, 3)[1:], torch.nn.Parameter(torch.ones(2, 3)[1:])
        self.increment_version(samples)
        self.struct.kinds = [c.pointer(id(type(sample))) for sample in samples]
        self.struct.kind_at = place([(sample, id(type(sample))) for sample in samples])
        self.struct.tensor_at = place([(sample, sample._cdata) for sample in samples])
        self.struct.items_at = place_of_items([*samples])
        pairs = [(sample._cdata, torch._neg_view(sample)) for sample in samples]
        self.struct.flags_at, self.struct.negative = flag_between([(plain, other._cdata) for plain, other in pairs])


def place(pairs):
    """How many bytes after the start of an object a pointer stands, from (object, pointer) pairs; LookupError where it does
    not stand at one place in all of them."""
    for offset in range(8, type(pairs[0][0]).__basicsize__, 8):
        if all(ctypes.c_void_p.from_address(id(x) + offset).value == wanted for x, wanted in pairs):
            return offset
    raise LookupError("torch has another layout of its objects")


def place_of_items(items):
    """How many bytes after the start of a list the pointer to its items stands: it is the last but one of its fields, behind
    their number.  LookupError where this list shows another layout."""
    offset = list.__basicsize__ - 16
    size, pointer = (ctypes.c_void_p.from_address(id(items) + offset - back).value for back in (8, 0))
    if size != len(items) or [ctypes.c_void_p.from_address(pointer + 8 * k).value for k in range(size)] != [*map(id, items)]:
        raise LookupError("this Python has another layout of its lists")
    return offset


def flag_between(pairs):
    """(how many bytes after the address of a tensor a word stands, a bit of it): in this word, the tensors of each pair of
    addresses differ only in that the second has the bit.  LookupError where there is no such word."""
    for offset in range(16, 192, 8):  # behind the pointer to its functions and the number of references to it
        words = {tuple(ctypes.c_uint64.from_address(address + offset).value for address in pair) for pair in pairs}
        (plain, other), *more = words
        if not more and plain < other and (plain ^ other).bit_count() == 1:
            return offset, plain ^ other
    raise LookupError("torch has another layout of its tensors")


def reader_of(tensors, plan):
    """A Reader for these Tensors; None where one of them is no tensor of torch, where torch cannot be read in C, and where
    the Plan needs arrays, as those of the host do that take no pointers."""
    if not plan.takes_pointers and tensors.memory is host:
        return None
    owners = [buffer.owner for tensor in tensors for buffer in (tensor.param, *tensor.lent.values())]
    known = library() if all(map(host.is_torch, owners)) else None
    return known and Reader(known, tensors, plan.takes_pointers)


def same_items(some, others):
    """Whether two lists, which no other thread changes, have the same objects in them."""
    if len(some) != len(others):
        return False
    known = library()
    if known is None:
        return all(map(is_, some, others))
    return bool(c.lib.fastrms_same_items(known.struct, id(some), id(others), len(some)))


class Gradient(NamedTuple):
    """A gradient as the plan takes one."""

    address: int
    size: int
    dtype: Any


class Reader:
    """Reads where the gradients of a step lie, and sees whether the parameters and the caller's states lie where they did.

    ``pointers`` is a C array with the address of each gradient, NULL where there is none, ``formats`` one with the format of
    each, ``leaves`` lists the gradients themselves, and ``absent`` says whether there is a None among them.  They are good
    from read() to done().
    """

    def __init__(self, known, tensors, gives_pointers):
        self._known, self._tensors, self._gives_pointers = known, tensors, gives_pointers
        buffers = [buffer for tensor in tensors for buffer in (tensor.param, *tensor.lent.values())]
        self._rows = [1 + len(tensor.lent) for tensor in tensors]
        self._firsts = [*accumulate([0, *self._rows])]
        told = [(t.param, *(t.lent.values() if tensors.tells_of_state else ())) for t in tensors]
        self._counted = [[b.owner for b in row if not b.owner.is_inference()] for row in told]
        self._all_counted = [owner for owners in self._counted for owner in owners]
        wanted = [(buffer, buffer.address, type_of(buffer)) for buffer in buffers]
        wanted += [(tensor.param, 0, str(tensor.dtype)) for tensor in tensors]
        self._kept = []
        self._layouts = c.ffi.new("fastrms_layout[]", [self._layout(*each) for each in wanted])
        for first, row in zip(self._firsts, self._rows, strict=False):
            for k in range(first + 1, first + row):
                if buffers[k].size:  # a state may become a part of itself, but nobody permutes its axes
                    self._layouts[k].axes = -1
        self._addresses = c.ffi.new("void *[]", len(wanted))
        self.formats = c.ffi.new("int32_t[]", len(tensors)) if gives_pointers else c.ffi.NULL
        self._objects = [buffer.owner for buffer in buffers]
        layouts, fixed = self._layouts, len(buffers)
        self.pointers = self._addresses + fixed
        self._stay = known.struct, id(self._objects), 0, fixed, layouts, self._addresses, c.ffi.NULL
        self._given = 0, len(tensors), layouts + fixed, self.pointers, self.formats

    def _layout(self, buffer, address, dtype):
        """What C shall compare a tensor with."""
        self._kept += c.ffi.new("int64_t[]", buffer.shape), c.ffi.new("int64_t[]", buffer.strides)
        shape, strides = self._kept[-2:]
        device, size = buffer.owner.device, itemsize(dtype)
        kind, index, number = self._known.devices[device.type], device.index, self._known.dtypes[dtype]
        index = -1 if index is None else index
        return {"device_type": kind, "device_index": index, "dtype": number, "itemsize": size, "axes": len(buffer.shape),
                "size": buffer.size, "address": c.pointer(address), "shape": shape, "strides": strides}  # fmt: skip

    def read(self, leaves):
        """Whether every tensor is what it was, and every gradient like its parameter, so that a step may use pointers."""
        leaves = [*leaves]  # which no other thread can change: C reads it without Python's lock
        if len(leaves) != len(self._tensors):  # another thread has changed it since it was looked at
            return False
        read = c.lib.fastrms_read_tensors
        absent = read(self._known.struct, id(leaves), *self._given)
        if absent < 0 or read(*self._stay):
            return False
        self.leaves, self.absent = leaves, absent
        return True

    def read_one(self, k, grad):
        """The Gradient of tensor k, read as read() does all of them; None where a tensor is not as it should be."""
        grads, read, (_, _, layouts, pointers, formats) = [grad], c.lib.fastrms_read_tensors, self._given
        if read(self._known.struct, id(grads), 0, 1, layouts + k, pointers + k, formats + k):
            return None
        known, stay, _, _, layouts, addresses, none = self._stay
        first, count = self._firsts[k], self._rows[k]
        if read(known, stay, first, count, layouts + first, addresses + first, none):
            return None
        tensor, format = self._tensors[k], self.formats[k]
        dtype = c.DTYPE_OF[format] if format else tensor.dtype
        return Gradient(int(c.ffi.cast("uintptr_t", self.pointers[k])), tensor.param.size, dtype)

    def wrote_one(self, k):
        """Tell torch that a step has written parameter k and its states."""
        self._known.increment_version(self._counted[k])

    def given(self):
        """The gradients as the plan takes them: as pointers, or as Buffers."""
        if self._gives_pointers:
            return self
        pointers = (int(c.ffi.cast("uintptr_t", self.pointers[k])) for k in range(len(self.leaves)))
        rows = zip(self._tensors, self.leaves, pointers, strict=True)
        return [None if leaf is None else at(tensor.param, leaf, pointer) for tensor, leaf, pointer in rows]

    def wrote(self, params, grads):
        """Tell torch what a step has written.  params: whether it is the parameters that have a gradient, with their states;
        grads: whether it is the gradients."""
        if not params:
            written = []
        elif self.absent:
            written = [x for row, leaf in zip(self._counted, self.leaves, strict=True) if leaf is not None for x in row]
        else:
            written = self._all_counted
        if grads:
            written = written + [leaf for leaf in self.leaves if leaf is not None and not leaf.is_inference()]
        self._known.increment_version(written)

    def done(self):
        """Let go of the gradients."""
        self.leaves = None


def type_of(buffer):
    """The name of the dtype of the tensor to which a Buffer belongs."""
    return str(buffer.owner.dtype).removeprefix("torch.")


def itemsize(dtype):
    """The bytes of an element of the dtype of this name."""
    return int("".join(filter(str.isdigit, dtype))) // 8


def at(buffer, owner, address):
    """A Buffer of the device like this one, of another owner and at another address."""
    made = copy(buffer)
    made.owner, made.address, made.end = owner, address, address + buffer.nbytes
    return made
