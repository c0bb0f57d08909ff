"""What to do with an object that cannot be updated in place: the second halves of the sentences of host, device and tree.

A library is recognised by the module of a type, so that none has to be imported.
"""

from collections.abc import Mapping

import numpy as np

from ..words import kind_of

NUMBERS = (int, float, complex, np.generic)
SEPARATE = "every buffer of a step must be separate: pass arrays that share no memory, such as a copy"
_COPIES = {  # how an object of a library gives its numbers as a NumPy array
    "pandas": ".to_numpy(copy=True)",
    "polars": ".to_numpy(writable=True)",
    "xarray": ".values",
    "scipy": ".toarray()",
    "h5py": "[...]",
    "zarr": "[...]",
    "dask": ".compute()",
}


def library(x):
    """The name of the library that the type of x comes from."""
    return type(x).__module__.partition(".")[0]


def is_jax(x):
    """Whether x is an array of JAX."""
    return library(x) in ("jax", "jaxlib")


def is_module(x):
    """Whether x is a torch module or the like, which has its parameters in parameters()."""
    return callable(getattr(x, "parameters", None))


def holds_arrays(x):
    """Whether x is a list or tuple of something else than numbers."""
    return isinstance(x, (list, tuple)) and len(x) > 0 and not isinstance(x[0], (list, tuple, *NUMBERS))


def refuse_collection(grads, name):
    """TypeError where gradients are a collection of arrays, and params is one array."""
    if isinstance(grads, dict) or holds_arrays(grads):
        first = next(iter(grads), None) if isinstance(grads, dict) else 0
        remedy = f": pass {name}[{first!r}]" if len(grads) == 1 else ""
        raise TypeError(f"{name} is {kind_of(grads)}; it must be one array, as params is{remedy}")


def of_non_array(x, name, wanted="float32"):
    """The remedy for a container or a number where an array should be."""
    if isinstance(x, Mapping):
        return (
            "; nested mappings are not flattened: pass one mapping with a key for each array, such as 'layer.weight' (in a "
            'list of groups, each of them has its arrays under the key "params")'
        )
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
        return ", a (name, array) pair: pass dict(params), for a torch module dict(model.named_parameters())"
    if holds_arrays(x):
        return "; nested sequences are not flattened: pass one list of arrays, such as [*layer1, *layer2]"
    if isinstance(x, (list, tuple, *NUMBERS)):
        return f", which has no buffer to use in place: pass np.array({name}, np.{wanted}), and keep that array"
    return "; it must be an array of float32 or float64"


def of_object(x, name, wanted):
    """The remedy for an object whose memory cannot be reached."""
    if is_module(x):
        return f"it has parameters: pass {name}.parameters()"
    if library(x) == "multiprocessing" and hasattr(x, "buf"):
        return f"pass np.frombuffer({name}.buf, np.{wanted})"
    if library(x) == "multiprocessing" and hasattr(x, "get_obj"):
        return f"pass {name}.get_obj()"
    if library(x) in _COPIES:
        return f"pass {name}{_COPIES[library(x)]}, and keep that array"
    if str(getattr(x, "dtype", "float32")) not in ("float32", "float64"):
        return f"pass {name}.astype(np.{wanted}), and keep that array"
    return f"pass np.array({name}), and keep that array" if hasattr(x, "__array__") else "pass a NumPy array"


def of_dtype(dtype, name, wanted):
    """The remedy for a NumPy array of another dtype than float32 and float64."""
    if not dtype.isnative:
        return f"pass {name}.astype({dtype.newbyteorder('=').name!r}), a copy in native byte order"
    if dtype.kind == "c":
        return f"pass its real and imaginary parts as one array, {name}.view(np.{np.empty(0, dtype).real.dtype.name})"
    if dtype.kind in "fiub" or "float" in dtype.name:
        kind = "float64" if dtype.kind == "f" and dtype.itemsize > 8 else wanted
        return f"pass {name}.astype(np.{kind}), a copy, and keep that array"
    return "pass an array of one of these"


def of_torch_device(kind, name):
    """The remedy for a torch tensor on a device that is not the CPU; kind: "cuda", "meta", ..."""
    if kind == "meta":
        return " and has no numbers: give its module memory first, model.to_empty(device='cpu')"
    return f"; this backend updates host memory: pass {name}.cpu()"


def of_torch_dtype(dtype, name, wanted):
    """The remedy for a torch tensor of another dtype; dtype: its name."""
    if dtype.startswith("complex"):
        return f"pass torch.view_as_real({name})"
    if not dtype.startswith(("float", "bfloat")):
        copy = "double()" if wanted == "float64" else "float()"
        return f"{name}.{copy} is a copy, for gradients; as parameters pass what is trained, list(model.parameters())"
    return f"a module is converted in place by model.float(); {name}.float() is a copy, which is right for gradients only"


def of_shape(buffer, name, reference, reference_name, is_torch):
    """The remedy for a Buffer of another shape than a reference; "" for a reference that is the array itself, earlier."""
    shape, wanted = buffer.shape, reference.shape
    if reference_name.endswith("when it was bound"):
        return ""
    if len(wanted) == 2 and shape == wanted[::-1] and 1 not in wanted:
        return f": pass {name}.T.contiguous()" if is_torch else f": pass np.ascontiguousarray({name}.T)"
    lengths, wanted_lengths = ([length for length in of if length != 1] for of in (shape, wanted))
    if buffer.size == reference.size and (lengths == wanted_lengths or 1 in (len(shape), len(wanted))):
        return f": pass {name}.reshape({wanted[0] if len(wanted) == 1 else wanted})"
    return "; give both the same shape"


def of_read_only(x, name):
    """The remedy for an array that cannot be written."""
    if is_jax(x):
        return f", as every JAX array: they are immutable; pass np.array({name}), a copy (as gradients JAX arrays are fine)"
    if _is_memory_map(x):
        return ": it is a memory map of a file; open it for writing: np.memmap(..., mode='r+'), np.load(..., mmap_mode='r+')"
    return f"; it is written in place and must be writable: pass np.array({name}), a copy, and keep that array"


def _is_memory_map(x):
    while x is not None and not isinstance(x, np.memmap):
        x = getattr(x, "base", None)
    return x is not None
