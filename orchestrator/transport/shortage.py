"""A connection may fail because this machine lacks something: that says nothing about the worker.

Descriptors, local ports and buffers are ours, and so is a resolver that does not answer. Whoever counts
failures of workers asks here first.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from typing import Final

_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
_OF_NAMES: Final = frozenset({socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM})
# Event loops join the errors of a host's several addresses to one text, without a number of its own.
_NUMBERS: Final = re.compile(r"\[Errno (-?\d+)\]")


def is_shortage(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it was raised from, is a lack of this machine."""
    return any(_is_one(found) for found in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, those that it groups, and those that it was raised from."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _chain(inner)
        error = error.__cause__ or error.__context__


def _is_one(error: BaseException) -> bool:
    if isinstance(error, socket.gaierror):
        # Without a descriptor for its files the resolver says that there is no such name.
        return error.errno in _OF_NAMES or not _can_open()
    if not isinstance(error, OSError):
        return False
    if error.errno is not None:
        return error.errno in _ERRNOS
    return any(int(number) in _ERRNOS for number in _NUMBERS.findall(str(error)))


def _can_open() -> bool:
    """Tell whether this process can open a file now."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
