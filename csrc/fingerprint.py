"""The hash of all that the C extension is built from.  build_ffi.py compiles it in; fastrms/self_check.py compares it."""

import hashlib
from pathlib import Path

KINDS = ("*.c", "*.h", "*.inc", "*.py", "flags")


def fingerprint(folder):
    """A hash of the names and contents of the sources in a folder."""
    sources = sorted(path for kind in KINDS for path in Path(folder).glob(kind))
    hashes = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sources]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
