"""Files that the config names are read without ever waiting for them."""

from __future__ import annotations

import os
import select
import stat

from orchestrator.wire.regular import read_regular

MAX_BYTES = 1024 * 1024  # of keys, a certificate chain: a larger file is another one by mistake

PIPE_S = 2.0  # how long the writer of a pipe may take for its next bytes


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return what is in a file. Raises `OSError` if it cannot be read, is none, or has over `MAX_BYTES`.

    A FIFO or a device, whose content may never come or never end, is not opened for good.
    """
    content = read_regular(path, MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise _refused(path, f"Has more than {MAX_BYTES} bytes")
    return content


def read_config(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return at most `limit` bytes of a config, and one more if there are more. Raises `OSError`.

    It may come through a pipe, as of `<(command)`; one that nobody writes into is refused, not waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return _read_pipe(path, descriptor, limit)
        os.set_blocking(descriptor, True)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)
    finally:
        os.close(descriptor)


def _read_pipe(path: str | os.PathLike[str], descriptor: int, limit: int) -> bytes:
    content = b""
    while len(content) <= limit:
        if not select.select([descriptor], [], [], PIPE_S)[0]:
            raise _refused(path, f"Is a FIFO into which nobody has written for {PIPE_S:g} s")
        try:
            piece = os.read(descriptor, limit + 1 - len(content))
        except BlockingIOError:
            continue
        if not piece:
            break
        content += piece
    if not content:
        raise _refused(path, "Is a FIFO into which nobody writes")
    return content


def is_world_writable(path: str | os.PathLike[str]) -> bool:
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def _refused(path: str | os.PathLike[str], why: str) -> OSError:
    error = OSError(f"{os.fspath(path)}: {why}")
    error.strerror = why
    return error
