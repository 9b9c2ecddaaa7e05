"""Files that the config names are read without ever waiting for them."""

from __future__ import annotations

import os
import stat

MAX_BYTES = 1024 * 1024  # of keys, a certificate chain: a larger file is another one by mistake

_KINDS = {
    stat.S_IFIFO: "Is a FIFO, not a file",
    stat.S_IFSOCK: "Is a socket, not a file",
    stat.S_IFDIR: "Is a directory",
    stat.S_IFCHR: "Is a device, not a file",
    stat.S_IFBLK: "Is a device, not a file",
}


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return what is in a file. Raises `OSError` if it cannot be read, is none, or has over `MAX_BYTES`.

    A FIFO or a device, whose content may never come or never end, is not opened for good.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind in _KINDS:
            raise _refused(path, _KINDS[kind])
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise _refused(path, f"Has more than {MAX_BYTES} bytes")
    return content


def is_world_writable(path: str | os.PathLike[str]) -> bool:
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def _refused(path: str | os.PathLike[str], why: str) -> OSError:
    error = OSError(f"{os.fspath(path)}: {why}")
    error.strerror = why
    return error
