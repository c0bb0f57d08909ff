"""Files that are written whole or not at all, and the cache folder for what is compiled."""

import contextlib
import os
import secrets
import stat
from pathlib import Path


@contextlib.contextmanager
def whole(path, mode=0o666):
    """A new file beside path, open for bytes, which replaces path when the block ends without an error.

    Parameters
    ----------
    path : str or Path
        The file to replace or to make; it is no symbolic link.
    mode : int
        The permissions with which the new file is made, before the umask.
    """
    folder, name = os.path.split(path)
    start = os.fsdecode(os.fsencode(name)[:200])  # the name of the temporary file may not be too long where path is not
    temporary = os.path.join(folder, f"{start}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def save(path, data):
    """Replace a file of the user's by data, which are on the disk before they get its name.

    An existing file keeps its owner, group and permissions as far as this user may give them.  What is no regular file,
    such as a FIFO or a device, and what is open already, such as /dev/stdout, is not replaced but written to, as open()
    does.

    Parameters
    ----------
    path : str
        Symbolic links are followed.
    data : bytes

    Raises
    ------
    OSError
        Where open(path, "wb") or a write fails; the old file is whole then.  The error names path.
    """
    try:
        _save(path, data)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from None


def _save(path, data):
    there = _followed(path)
    found = there and _status(path)
    if there is None or (found is not None and not _replaceable(path, there, found)):
        with open(path, "wb") as file:
            file.write(data)
        return
    with whole(there, 0o666 if found is None else 0o600) as file:
        file.write(data)
        if found is not None:
            _resemble(file.fileno(), there, found)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(os.path.dirname(there) or ".")


def _followed(path):
    """The path to which the symbolic links at the end of path lead, or None where only open() can tell.

    Folders are left to the system: where there is no ``a``, it refuses ``a/../b``, which os.path.realpath() takes for ``b``.
    """
    for _ in range(40):  # so many links does Linux follow
        if os.path.basename(path) in ("", ".", ".."):
            return None
        if not os.path.islink(path):
            return path
        if _is_of_an_open_file(path):
            return None
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    return None


def _is_of_an_open_file(link):
    """Whether a link stands in /proc, as that to which /dev/stdout leads: it is no path, but the open file itself."""
    processes = _status("/proc/self/fd")
    return processes is not None and os.lstat(link).st_dev == processes.st_dev


def _status(path):
    """What the filesystem knows about a file, or None where there is none."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _replaceable(path, there, found):
    """Whether a new file may replace this one: a regular file that has a name and that this user may write."""
    if not stat.S_ISREG(found.st_mode):
        return False
    os.close(os.open(path, os.O_WRONLY))  # a write-protected file is refused as open() refuses it
    named = _status(there)
    return named is not None and os.path.samestat(named, found)


def _resemble(descriptor, path, found):
    """Give a new file the access list, owner, group and permissions of the file at path."""
    with contextlib.suppress(OSError, AttributeError):  # not every filesystem and system has access lists
        name = "system.posix_acl_access"
        os.setxattr(descriptor, name, os.getxattr(path, name))
    for owner, group in ((-1, found.st_gid), (found.st_uid, -1)):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, owner, group)
    permissions = stat.S_IMODE(found.st_mode)
    if os.fstat(descriptor).st_gid != found.st_gid:
        permissions &= ~stat.S_IRWXG  # they were meant for another group
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, permissions)


def _sync_directory(path):
    """Wait until the new name is on the disk, too, where this user may read the directory."""
    with contextlib.suppress(OSError):  # the file has been replaced
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_folder():
    """The folder for compiled kernels: in NUMBA_CACHE_DIR, else in the user's folder for caches."""
    from numba import config

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(config.CACHE_DIR or home, "fastrms")


def keep(path, data):
    """Write a file of the cache, readable for its owner only.

    Processes that write the same file at once do no harm: its time is 0 whoever writes it, and Numba knows a source file
    by its size and time.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with whole(path, 0o600) as file:
        file.write(data)
        file.flush()
        os.utime(file.fileno(), (0, 0))
