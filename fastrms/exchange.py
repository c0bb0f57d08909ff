"""Where torch tensors lie at each step, read in one call of C, and only as long as each of them is what it was.

torch may give a tensor other memory at any time.  acquire() of fastrms.memory, which checks all there is, takes microseconds
for a tensor; here a tensor is only compared with what acquire() once accepted.  Where the comparison fails, for whatever
reason, acquire() is asked again, and its sentence says what is wrong.  torch offers the C functions from version 2.10 on.
"""

import ctypes
import sys
from copy import copy
from functools import cache

import numpy as np

from .backends import c
from .memory import host

FLOAT = 2  # the code of its type in DLPack
HOST, CUDA = 1, 2  # devices in DLPack
_OFFSET = 5  # of dltensor_from_py_object_no_sync in a DLPackExchangeAPI, in pointers


@cache
def library():
    """The Library of the torch that is loaded, or None where it or this build lacks the functions in C."""
    torch = sys.modules.get("torch")
    capsule = getattr(getattr(torch, "Tensor", None), "__dlpack_c_exchange_api__", None)
    if capsule is None or c.lib is None or not hasattr(torch.autograd.graph, "increment_version"):
        return None
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    table = pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(table).value
    return Library(torch, (ctypes.c_void_p * (_OFFSET + 1)).from_address(table)[_OFFSET]) if major == 1 else None


class Library:
    """What is used of torch: methods of its tensors as functions, and the C function that describes a tensor."""

    def __init__(self, torch, describe):
        tensor = torch.Tensor
        self.describe = describe
        self.kinds = {tensor, torch.nn.Parameter, type(None)}
        self.untyped_storage, self.storage_offset, self.is_neg = tensor.untyped_storage, tensor.storage_offset, tensor.is_neg
        self.nbytes = torch.UntypedStorage.nbytes
        self.increment_version = torch.autograd.graph.increment_version
        at = int(c.ffi.cast("uintptr_t", c.ffi.addressof(c.lib, "fastrms_read_tensors")))
        kinds = ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 4
        self.read = ctypes.PYFUNCTYPE(ctypes.c_int64, *kinds)(at)  # it keeps the GIL, which the function of torch needs


def reader_of(tensors):
    """A Reader for these Tensors; None where one of them is not a plain tensor of torch, or torch cannot be asked in C."""
    known = library()
    owners = [buffer.owner for tensor in tensors for buffer in (tensor.param, *tensor.lent.values())]
    if known is None:
        return None
    return Reader(known, tensors) if known.kinds.issuperset(map(type, owners)) else None


class Reader:
    """Reads where the gradients of a step lie, and sees whether the parameters and the caller's states lie where they did.

    ``pointers`` is a C array with the address of each gradient, NULL where there is none, ``leaves`` lists the gradients
    themselves, and ``absent`` says whether there is a None among them.  They are good from read() to done().
    """

    def __init__(self, known, tensors):
        self._torch, self._tensors = known, tensors
        self._fixed = [buffer for tensor in tensors for buffer in (tensor.param, *tensor.lent.values())]
        self._stay = [tensor.param.owner for tensor in tensors]
        self._storages = list(map(known.untyped_storage, self._stay))  # held, so that no other can lie in their place
        self._stored = list(map(known.nbytes, self._storages))
        self._bytes = [tensor.param.size * tensor.param.dtype.itemsize for tensor in tensors]
        self._counted = [[b.owner for b in (t.param, *t.lent.values()) if not b.owner.is_inference()] for t in tensors]
        self._all_counted = [owner for owners in self._counted for owner in owners]
        self._layouts(tensors)

    def _layouts(self, tensors):
        """Say in C what each tensor must be."""
        ffi, fixed, self._kept = c.ffi, len(self._fixed), []
        wanted = ffi.new("fastrms_layout[]", fixed + len(tensors))
        for k, buffer in enumerate([*self._fixed, *(tensor.param for tensor in tensors)]):
            self._kept += ffi.new("int64_t[]", list(buffer.shape)), ffi.new("int64_t[]", list(buffer.strides))
            device = (HOST, 0) if isinstance(buffer, host.Buffer) else (CUDA, buffer.device)
            wanted[k].device_type, wanted[k].device_id, wanted[k].axes = *device, len(buffer.shape)
            wanted[k].code, wanted[k].itemsize, wanted[k].size = FLOAT, buffer.dtype.itemsize, buffer.size
            wanted[k].address = c.pointer(buffer.address if k < fixed else 0)
            wanted[k].shape, wanted[k].strides = self._kept[-2:]
        self._objects = np.array([*(id(b.owner) for b in self._fixed), *[0] * len(tensors)], np.uintp)
        addresses = ffi.new("void *[]", len(wanted))
        self.pointers = addresses + fixed
        self._kept += wanted, addresses
        at = (int(ffi.cast("uintptr_t", x)) for x in (wanted, addresses))
        self._call = self._torch.describe, len(wanted), self._objects.ctypes.data, id(None), *at
        self._of_grads = self._objects[fixed:]

    def read(self, leaves):
        """Whether every tensor is what it was, and every gradient like its parameter, so that a step may use pointers."""
        known = self._torch
        kinds = {*map(type, leaves)}
        if not known.kinds.issuperset(kinds):
            return False
        self._of_grads[:] = list(map(id, leaves))
        try:
            if known.read(*self._call) != self._call[1]:
                return False
        except Exception:  # it is torch's, for a tensor that has no memory; acquire() says so in its own words
            return False
        self.leaves, self.absent, sizes = leaves, type(None) in kinds, self._bytes
        if self.absent:
            sizes = [size for size, leaf in zip(sizes, leaves, strict=True) if leaf is not None]
            leaves = [leaf for leaf in leaves if leaf is not None]
        return list(map(known.nbytes, self._storages)) == self._stored and self._are_whole(leaves, sizes)

    def given(self, plan):
        """The gradients as this plan takes them: as pointers, or as Buffers."""
        if plan.takes_pointers:
            return self
        pointers = (int(c.ffi.cast("uintptr_t", self.pointers[k])) for k in range(len(self.leaves)))
        rows = zip(self._tensors, self.leaves, pointers, strict=True)
        return [None if leaf is None else at(tensor.param, leaf, pointer) for tensor, leaf, pointer in rows]

    def _are_whole(self, grads, sizes):
        """Whether the storage of each gradient has all its bytes, and none is the negative of what is stored."""
        known = self._torch
        if any(map(known.is_neg, grads)):
            return False
        stored, offsets = list(map(known.nbytes, map(known.untyped_storage, grads))), list(map(known.storage_offset, grads))
        if stored == sizes and not any(offsets):
            return True
        rows = zip(grads, stored, offsets, sizes, strict=True)
        return all(offset * grad.element_size() + size <= have for grad, have, offset, size in rows)

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
        self._torch.increment_version(written)

    def done(self):
        """Let go of the gradients."""
        self.leaves = None


def at(buffer, owner, address):
    """A Buffer of the device like this one, of another owner and at another address."""
    made = copy(buffer)
    made.owner, made.address, made.end = owner, address, address + buffer.nbytes
    return made
