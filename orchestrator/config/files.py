"""Files that the config names are read without ever waiting for them."""

from __future__ import annotations

import os
import stat

MAX_BYTES = 1024 * 1024  # of keys, a certificate chain: a larger file is another one by mistake

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return what is in a file. Raises `OSError` if it cannot be read, is none, or has over `MAX_BYTES`.

    A FIFO or a device, whose content may never come or never end, is not opened for good.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb") as file:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind in _KINDS:
            raise _refused(path, f"it is {_KINDS[kind]}, not a file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _refused(path, f"it has more than {MAX_BYTES} bytes")
    return content


def is_world_writable(path: str | os.PathLike[str]) -> bool:
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def _refused(path: str | os.PathLike[str], why: str) -> OSError:
    error = OSError(f"{os.fspath(path)}: {why}")
    error.strerror = why
    return error
