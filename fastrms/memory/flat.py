"""FlatBuffer: named arrays in one flat buffer, and their gradients in a second one that lies well apart from it."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from numbers import Number
from operator import index
from types import GenericAlias

import numpy as np

from ..words import kind_of, shown
from . import device, flat_device, host, placement

COPY_ONTO_ITSELF = "{} and {} overlap in memory; FlatBuffer(shapes, data=...) lies over what is there without copying"


class ReadOnly:
    """A collection of arrays in use.  Write into the arrays: an entry cannot be exchanged, as nothing would use the new one.
    It is copied and pickled as the plain dict or list that it shows."""

    entry = "is in use by the optimizer"
    plain: type

    def __init__(self, entries):
        self._entries = self.plain(entries)

    def __getitem__(self, name):
        return self._entries[name]

    def __setitem__(self, name, value):
        if value is not self[name]:  # the same comes back from collection[name] += x
            bits = ".bits" if hasattr(self[name], "bits") else ""  # of what is stored in a format
            how = "its arrays" if isinstance(self[name], ReadOnly) else f"it: [{name!r}]{bits}[...] = x"
            raise TypeError(f"[{name!r}] {self.entry} and stays; write into {how}")

    def __delitem__(self, name):
        raise TypeError(f"[{name!r}] {self.entry} and stays")

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def __reduce__(self):
        return self.plain, (self._entries,)


class ReadOnlyDict(ReadOnly, Mapping):
    """A read-only mapping name -> array in use."""

    plain = dict

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{name!r}: {_shape_of(x)}' for name, x in self.items())})"


class ReadOnlyList(ReadOnly, Sequence):
    """A read-only sequence of arrays in use."""

    plain = list

    def __eq__(self, other):
        return self._entries == (other._entries if isinstance(other, ReadOnlyList) else other)

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(map(str, map(_shape_of, self)))})"


class Views(ReadOnlyDict):
    """Read-only mapping name -> view into a flat array; each entry stays a view of this array."""

    entry = "is a view into a flat buffer"

    def __init__(self, flat, shapes):
        spans = one_after_another(map(math.prod, shapes.values()))
        super().__init__({name: flat[span].reshape(shapes[name]) for name, span in zip(shapes, spans, strict=True)})


class Joined:
    """Buffers that lie one after the other in memory, as one 1-D array that keeps all of them alive."""

    def __init__(self, buffers):
        first = next((buffer for buffer in buffers if buffer.size), buffers[0])
        size = sum(buffer.size for buffer in buffers)
        data = (first.address, False)
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": first.dtype.str, "data": data}
        self._buffers = buffers


def joined(buffers):
    """Buffers that lie one after the other in memory, as one 1-D array."""
    if not isinstance(buffers[0], device.DeviceBuffer):
        return Joined(buffers)
    first, size = next((buffer for buffer in buffers if buffer.size), buffers[0]), sum(buffer.size for buffer in buffers)
    return device.DeviceArray(buffers, first.address, (size,), (int(size > 1),), first.dtype, first.device)


def _shape_of(x):
    return getattr(x, "shape", x)


def key_text(key):
    """A key of a mapping as text, in which equal keys are alike whatever their types print: np.str_('w') is 'w' and
    np.int64(1) is 1, as in a dict.  By this text a tensor is found again in a state_dict."""
    if isinstance(key, str):
        return str.__repr__(key)
    if isinstance(key, bytes):
        return bytes.__repr__(key)
    if isinstance(key, tuple):
        return f"({', '.join(map(key_text, key))}{',' * (len(key) == 1)})"
    if isinstance(key, frozenset):
        return f"frozenset({{{', '.join(sorted(map(key_text, key)))}}})"
    return repr(_plain_number(key)) if isinstance(key, (Number, np.bool_)) else repr(key)


def _plain_number(key):
    """The int, float or complex number that equals a number of any type; the number itself where none does."""
    real = getattr(key, "real", key)
    for kind, value in ((int, real), (float, real), (complex, key)):
        try:
            if kind(value) == key:
                return kind(value) + 0  # + 0 makes a negative zero positive: the two are equal
        except (TypeError, ValueError, OverflowError):  # not real, not finite, or too large for a float
            pass
    return key


class FlatBuffer:
    """Named arrays of one dtype, in C order and without gaps in one buffer, and their gradients in a second one.

    fastrms.RMSProp(flat) updates data as one tensor, whatever the number of names.  A copy or pickle is a new FlatBuffer,
    and is refused where this one lies over memory of the caller.

    Parameters
    ----------
    shapes : mapping or sequence
        name -> shape, or shapes, whose names are then 0, 1, ...
    dtype : dtype, default float32
        float32, float64, or bfloat16 of ml_dtypes, which an optimizer takes where master or rounding is given.
    data, grad : buffer or device array, optional
        Memory of the caller for the two arrays, such as the buf of a multiprocessing.shared_memory.SharedMemory, an mmap, a
        RawArray, a torch tensor after share_memory_(), or an ndarray: writable bytes, at least as many as are needed, of
        which the first are used; or exactly as many numbers of this dtype, in one dimension.  They begin at a multiple of
        the size of a number.  What stands in it stays.  An array without memory of the caller starts at 0.
        A CUDA array of CuPy or torch, of exactly as many float32 or float64 numbers in one dimension, makes a FlatBuffer
        in device memory; its library allocates the other one of the two.

    Attributes
    ----------
    data, grad : ndarray, or CuPy array or torch tensor in device memory
        The two flat arrays, 1-D; on the host they start where they do not evict each other from cache.  Type checkers take
        them for ndarrays; where they are others, write FlatBuffer[torch.Tensor](...) or FlatBuffer[torch.Tensor].like(...).
    params, grads : mapping
        name -> view of data and of grad, in the shape of that name.  The mappings cannot be changed.

    Raises
    ------
    TypeError
        For another dtype, something that is not a shape, memory of which one part is on the host and one on a GPU, or a
        device array of another library.
    ValueError
        For a negative length, where there are no names, or for memory that is too short, misaligned or read-only.
    """

    __class_getitem__ = classmethod(GenericAlias)

    def __init__(self, shapes, dtype=np.float32, *, data=None, grad=None):
        shapes = {name: _shape(f"shapes[{key_text(name)}]", shape) for name, shape in _named(shapes, "shapes").items()}
        size, dtype = sum(map(math.prod, shapes.values())), _held_dtype(dtype)
        given = {name: x for name, x in (("data", data), ("grad", grad)) if x is not None}
        on_device = flat_device.are_there(given)
        flats = (_on_device if on_device else _on_host)(given, size, dtype)
        views = {"params": Views(flats["data"], shapes), "grads": Views(flats["grad"], shapes)}
        vars(self).update(**flats, **views, _given=given, _size=size, _dtype=dtype, _on_device=on_device)

    @classmethod
    def like(cls, params, *, data=None, grad=None):
        """A FlatBuffer with copies of these arrays, and gradients of 0 unless grad is given.

        Parameters
        ----------
        params : mapping or sequence
            name -> array, or arrays: NumPy arrays, torch tensors and whatever else an optimizer takes, all of one dtype;
            bf16 needs ml_dtypes, whose bfloat16 the FlatBuffer has then.  Arrays of CuPy or torch on a GPU, float32 or
            float64, make a FlatBuffer there, which their library allocates.
        data, grad : buffer, optional
            Memory of the caller for the two arrays, as FlatBuffer takes it: the copies are written into data, and grad stays
            as it is.

        Returns
        -------
        FlatBuffer

        Raises
        ------
        TypeError, ValueError
            For params that are not such arrays, or memory that does not fit; before anything is written.
        """
        params = _named(params, "params")
        text = {name: f"params[{key_text(name)}]" for name in params}
        if flat_device.are_there({**{text[name]: x for name, x in params.items()}, "data": data, "grad": grad}):
            return cls._like_on_device(params, text, data, grad)
        given = {name: _array(x, text[name]) for name, x in params.items()}
        first, dtype = next((name, x.dtype) for name, x in given.items())
        for name, x in given.items():
            if not _is_held(x.dtype):
                raise TypeError(f"{text[name]} has dtype {x.dtype.str}; a FlatBuffer holds float32 or float64, or "
                                f"bfloat16")  # fmt: skip
            if x.dtype != dtype:
                raise TypeError(f"{text[name]} has dtype {x.dtype}, {text[first]} has {dtype}; a FlatBuffer has one")
        made = cls({name: x.shape for name, x in given.items()}, dtype, data=data, grad=grad)
        _refuse_copy_onto_itself(made, given, text)
        for name, x in given.items():
            made.params[name][...] = x
        return made

    @classmethod
    def _like_on_device(cls, params, text, data, grad):
        """like() of device arrays."""
        buffers = [device.acquire(x, text[name], writable=False) for name, x in params.items()]
        names = [*text.values()]
        device.same_device(buffers, names)
        for x, name, buffer in zip(params.values(), names, buffers, strict=True):
            flat_device.refuse_others(x, name)
            if buffer.dtype != buffers[0].dtype:
                raise TypeError(f"{name} has dtype {buffer.dtype}, {names[0]} has {buffers[0].dtype}; a FlatBuffer has one")
        if data is None:
            data = flat_device.zeros(next(iter(params.values())), sum(buffer.size for buffer in buffers))
        made = cls(dict(zip(params, (b.shape for b in buffers), strict=True)), buffers[0].dtype, data=data, grad=grad)
        for x, label in zip(params.values(), names, strict=True):
            for what in ("data", "grad"):
                if flat_device.overlap(x, getattr(made, what), what):
                    raise ValueError(COPY_ONTO_ITSELF.format(label, what))
        for name, x in params.items():
            made.params[name][...] = flat_device.detached(x)
        return made

    def __setattr__(self, name, value):
        if name not in vars(self):
            raise AttributeError(f"a FlatBuffer has no attribute {name!r}")
        if value is not getattr(self, name):  # the same comes back from flat.grad += x
            index = "[name][...]" if isinstance(getattr(self, name), Mapping) else "[...]"
            raise AttributeError(f"{name} of a FlatBuffer cannot be replaced; write into it: flat.{name}{index} = x")

    def __delattr__(self, name):
        raise AttributeError(f"{name} of a FlatBuffer cannot be deleted")

    @property
    def _owner(self):
        """What an optimizer updates: data, or the torch tensor that it lies over, which counts the writes to it."""
        data = self._given.get("data")
        return data.detach() if host.is_torch(data) else self.data

    @property
    def _memory(self):
        """The module for its arrays: memory.host or memory.device."""
        return device if self._on_device else host

    def refuse_moved(self):
        """ValueError where torch has given a tensor that this FlatBuffer lies over other memory."""
        for name, x in self._given.items():
            flat = getattr(self, name)
            if host.is_torch(x) and self._size and x.data_ptr() != flat_device.address(flat):
                raise ValueError(f"the torch tensor under {name} of the FlatBuffer was given other memory (tensor.data = "
                                 f"...) after the FlatBuffer had been made; make a new FlatBuffer over it")  # fmt: skip

    def __reduce__(self):
        if self._on_device:
            raise TypeError("a FlatBuffer in device memory cannot be copied or pickled: a copy is "
                            "FlatBuffer.like(flat.params), NumPy arrays of its params can be pickled")  # fmt: skip
        if self._given:
            raise TypeError("a FlatBuffer over your own memory cannot be copied or pickled, as the copy would not share it: "
                            "send what names the memory, and make a FlatBuffer(shapes, data=...) over it there; a copy with "
                            "memory of its own is FlatBuffer.like(flat.params)")  # fmt: skip
        shapes = {name: view.shape for name, view in self.params.items()}
        return _rebuilt, (shapes, self.data, self.grad)

    def __repr__(self):
        return f"<FlatBuffer of {len(self.params)} array(s), {self._size} {self._dtype}>"


def _on_host(given, size, dtype):
    """Name -> 1-D array in host memory, over what the caller has given, and new ones of zeros."""
    flats = {name: _over(x, name, size, dtype) for name, x in given.items()}
    if len(flats) > 1:
        host.refuse_overlap((name, host.ours(flat)) for name, flat in flats.items())
    for name in ("data", "grad"):
        if name not in flats:
            flats[name] = placement.place(size, dtype, [host.address(flat) for flat in flats.values()])
            flats[name].fill(0)
    return flats


def _on_device(given, size, dtype):
    """The same in device memory, where the library of the array that is given makes the other one."""
    flats = {name: flat_device.over(x, name, size, dtype) for name, x in given.items()}
    buffers = {name: device.acquire(flat, name, writable=True) for name, flat in flats.items()}
    device.same_device([*buffers.values()], [*buffers])
    host.refuse_overlap(buffers.items())
    (some, *_) = flats.values()
    return {name: flats[name] if name in flats else flat_device.zeros(some, size) for name in ("data", "grad")}


def _is_held(dtype):
    """Whether a FlatBuffer may have this dtype."""
    return dtype in host.DTYPES or str(dtype) == "bfloat16"


def _held_dtype(dtype):
    """dtype as a numpy.dtype; TypeError where a FlatBuffer cannot have it."""
    try:
        made = np.dtype(dtype)
    except TypeError:
        made = None
    if made is None or not _is_held(made):
        said = repr(dtype) if made is None else made
        raise TypeError(f"dtype={said} must be np.float32, np.float64 or ml_dtypes.bfloat16")
    return made


def _array(x, name):
    """x as an array of a dtype that says which numbers it has."""
    array = host.half_array(x, name)
    if array is None:
        return host.as_array(x, name)
    if array.dtype == host.FP16:
        return array
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(f"{name} is bf16, for which a FlatBuffer needs ml_dtypes: pip install ml_dtypes") from None
    return array.view(ml_dtypes.bfloat16)


def _rebuilt(shapes, data, grad):
    """A FlatBuffer with these contents."""
    made = FlatBuffer(shapes, data.dtype)
    made.data[...], made.grad[...] = data, grad
    return made


def _over(x, name, size, dtype):
    """A 1-D array of this size and dtype over memory of the caller; TypeError or ValueError that calls it `name`."""
    array = host.as_array(x, name)
    if host.is_torch(x) and not x.is_shared():
        raise ValueError(f"{name} is a torch tensor in memory of one process: call {name}.share_memory_() before, as that "
                         f"gives it other memory")  # fmt: skip
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name} has shape {array.shape} and strides {array.strides} bytes; it must be contiguous and have "
                         f"one dimension: pass {name}.reshape(-1)")  # fmt: skip
    if array.dtype.kind in "iuS" and array.itemsize == 1:
        return _numbers(array, name, size, dtype)
    if array.dtype != dtype:
        remedy = f"pass dtype=np.{array.dtype}" if array.dtype in host.DTYPES else f"pass {name}.astype(np.{dtype}), a copy"
        raise TypeError(f"{name} has dtype {array.dtype}; a FlatBuffer of {dtype} lies over bytes or over numbers of {dtype}"
                        f": {remedy}")  # fmt: skip
    if array.size != size:
        remedy = f": pass {name}[:{size}]" if array.size > size else ""
        raise ValueError(f"{name} has {array.size} numbers, the shapes have {size} in all{remedy}")
    return _numbers(array.view(np.uint8), name, size, dtype)


def _numbers(array, name, size, dtype):
    """The first bytes of an array of bytes as numbers; ValueError where they are too few, misaligned or read-only."""
    needed, start = size * dtype.itemsize, host.address(array)
    if array.size < needed:
        raise ValueError(f"{name} has {array.size} bytes, {size} numbers of {dtype} need {needed}")
    if start % dtype.itemsize:
        raise ValueError(f"{name} starts at address {start:#x}, which is not aligned to {dtype.itemsize} bytes: begin at a "
                         f"multiple of {dtype.itemsize}")  # fmt: skip
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only; a FlatBuffer is written in place: open the memory for writing")
    return array[:needed].view(dtype)


def _refuse_copy_onto_itself(flat, arrays, text):
    """ValueError where an array that is to be copied into a FlatBuffer lies in its memory."""
    for name, x in arrays.items():
        for what in ("data", "grad"):
            if np.may_share_memory(x, getattr(flat, what)):
                raise ValueError(COPY_ONTO_ITSELF.format(text[name], what))


def _named(values, what):
    """values as a dict; the names of a sequence are its indices."""
    if not isinstance(values, (Mapping, list, tuple)):
        raise TypeError(f"{what} is {kind_of(values)}; it must be a mapping by name, or a sequence")
    if not values:
        raise ValueError(f"{what} is empty; a FlatBuffer needs at least one array")
    return dict(values if isinstance(values, Mapping) else enumerate(values))


def _shape(name, shape):
    """shape as a tuple of int; one int is a length."""
    try:
        lengths = tuple(map(index, shape if isinstance(shape, (tuple, list)) else (shape,)))
    except TypeError:
        like = "; FlatBuffer.like({...}) takes arrays" if hasattr(shape, "__array__") else ""
        raise TypeError(f"{name}={shown(shape)} is not a shape: it must be an int or a tuple of int{like}") from None
    if any(length < 0 for length in lengths):
        raise ValueError(f"{name}={shown(shape)} has a negative length")
    return lengths


def one_after_another(sizes):
    """Slices of these sizes, without gaps."""
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
