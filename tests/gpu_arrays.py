"""Arrays on a GPU for test_gpu.py: those of fastrms itself, which are always there, and those of CuPy and torch."""

import importlib.util

import numpy as np

from fastrms.memory import device


class Ours:
    """Arrays of fastrms.memory.device, the kind of optimizer states."""

    name = "ours"

    @staticmethod
    def to_device(array):
        there = device.allocate(array.size, array.dtype, 0)
        device.copy(there, np.ascontiguousarray(array).reshape(-1))
        return there

    @staticmethod
    def to_host(array):
        return array.to_host()

    @staticmethod
    def part(array, start, size):
        address = array.address + start * array.dtype.itemsize
        return device.DeviceArray(array.owner, address, (size,), (1 if size > 1 else 0,), array.dtype, array.device)


class OfCuPy:
    name = "cupy"

    @staticmethod
    def to_device(array):
        import cupy

        return cupy.asarray(array)

    @staticmethod
    def to_host(array):
        return array.get()

    @staticmethod
    def part(array, start, size):
        return array[start : start + size]


class OfTorch(OfCuPy):
    name = "torch"

    @staticmethod
    def to_device(array):
        import torch

        return torch.as_tensor(array).cuda()

    @staticmethod
    def to_host(array):
        return array.detach().cpu().numpy()


def has(name):
    """Whether a library is installed and can use a GPU."""
    if importlib.util.find_spec(name) is None:
        return False
    if name == "torch":
        import torch

        return torch.cuda.is_available()
    return True


LIBRARIES = [Ours, *(kind for kind in (OfCuPy, OfTorch) if has(kind.name))]
