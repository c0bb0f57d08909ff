"""An optimizer in a safetensors file, which is written whole or not at all, and checked before anything of it is used.

The tensors are the state arrays, named "<tensor>/<state>".  The metadata has one entry, "fastrms": the rest of
state_dict() as JSON, whose numbers are those of repr() and so exact.  A state that is stored in a format is there as in
state_dict(): U16 or U8, and the JSON says in which format.  Its "sha256" is that of the tensors and of the JSON itself with
"" in place of it; files of version 1 have none.
"""

import hashlib
import json
import os

import numpy as np

from . import files, saved_formats

VERSION = 2
VERSIONS = (1, VERSION)  # those that can be read


def _library():
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError("save() and load() need safetensors: pip install safetensors") from None
    return safetensors


def save(optimizer, path):
    """See Optimizer.save."""
    _library()
    write(optimizer.state_dict(), path)


def write(d, path):
    """Write a state_dict to a file."""
    library = _library()
    tensors, header = _packed(d)
    text = json.dumps(header)
    text = text.replace('"sha256": ""', f'"sha256": "{_sha256(text, tensors)}"', 1)
    files.save(os.fsdecode(path), library.numpy.save(tensors, {"fastrms": text}))


def _packed(d):
    """(tensors, header): the state arrays in C order by their names in the file, and all else of a state_dict."""
    tensors = {
        f"{tensor['name']}/{name}": np.asarray(array, order="C")
        for tensor in d["tensors"]
        for name, array in tensor["state"].items()
    }
    listed = [{**tensor, "state": list(tensor["state"])} for tensor in d["tensors"]]
    return tensors, {"version": VERSION, "sha256": "", **d, "tensors": listed}


def _sha256(text, tensors):
    """The checksum of a file: of its JSON without the checksum, and of the bytes of its tensors in the order of the JSON."""
    found = hashlib.sha256(text.encode())
    for name, array in tensors.items():
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def load(optimizer, path, convert=None):
    """See Optimizer.load."""
    d = read(path)
    try:
        optimizer.load_state_dict(d, convert)
    except ValueError as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from None


def read(path):
    """The state_dict in a file."""
    library, path = _library(), os.fsdecode(path)
    with open(path, "rb"):  # open() words what the filesystem refuses more clearly than safetensors
        pass
    try:
        with library.safe_open(path, "np") as file:
            return _unpacked(file, path)
    except library.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _dtypes(format):
    """What safetensors calls the dtypes that a state of a format may have; None: of no format."""
    dtype = saved_formats.DTYPES.get(format)
    return ("F32", "F64") if dtype is None or dtype.kind == "f" else (f"U{8 * dtype.itemsize}",)


def _unpacked(file, path):
    """The state_dict out of an open file."""
    try:
        text = (file.metadata() or {})["fastrms"]
        header = json.loads(text)
        version, listed = header.pop("version"), header["tensors"]
        entries = [(tensor, name) for tensor in listed for name in tensor["state"]] if version in VERSIONS else []
        checksum = header.pop("sha256") if version == VERSION else ""
        unchecked = text.replace(checksum, "", 1)
        dtypes = {f"{tensor['name']}/{name}": _dtypes(tensor.get("formats", {}).get(name)) for tensor, name in entries}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"{path} was not written by fastrms: it lacks its metadata") from None
    if version not in VERSIONS:
        raise ValueError(f"{path} has format version {version!r}; this fastrms reads versions 1 and {VERSION}")
    if len(dtypes) < len(entries) or sorted(dtypes) != sorted(file.keys()):
        raise ValueError(f"{path} does not hold the tensors that its metadata lists")
    for name, allowed in dtypes.items():
        if (dtype := file.get_slice(name).get_dtype()) not in allowed:
            raise ValueError(f"{path}: {name} has dtype {dtype}; this state is {' or '.join(allowed)}")
    arrays = {name: file.get_tensor(name) for name in dtypes}
    if version == VERSION and _sha256(unchecked, arrays) != checksum:
        raise ValueError(f"{path} is damaged: its content has not the checksum that was saved with it; load another copy")
    tensors = [
        {**tensor, "state": {name: arrays[f"{tensor['name']}/{name}"] for name in tensor["state"]}} for tensor in listed
    ]
    return {**header, "tensors": tensors}
