"""Regular files are read without ever waiting for a writer; what is no regular file is refused.

Somebody may have put a FIFO, a socket or a device where a file is expected. To open one of those may block
for good, or do something to a device.
"""

from __future__ import annotations

import os
import stat

_KINDS = {
    stat.S_IFIFO: "Is a FIFO, not a file",
    stat.S_IFSOCK: "Is a socket, not a file",
    stat.S_IFDIR: "Is a directory",
    stat.S_IFCHR: "Is a device, not a file",
    stat.S_IFBLK: "Is a device, not a file",
}


class NoFile(OSError):
    """There is something else than a regular file; `strerror` says what."""


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the first `most` bytes of a file. Raises `NoFile`, and `OSError` if it cannot be read."""
    _check(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check(path, os.fstat(descriptor))  # it may have been replaced in between
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _check(path: str | os.PathLike[str], status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind in _KINDS:
        error = NoFile(f"{os.fspath(path)}: {_KINDS[kind]}")
        error.strerror = _KINDS[kind]
        raise error
