"""A network namespace has a loopback of its own: its ports and addresses are nobody else's."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
UP_AND_RUNNING = 0x1 | 0x40


@contextmanager
def own_network() -> Iterator[None]:
    """Have this thread, and what it starts, in a namespace of its own until the block ends.

    Skips where that is not allowed: it takes root.
    """
    outer = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(ctypes.CDLL(None, use_errno=True).unshare, CLONE_NEWNET)
        try:
            _raise_loopback()
            yield
        finally:
            _enter(ctypes.CDLL(None, use_errno=True).setns, outer, CLONE_NEWNET)
    finally:
        os.close(outer)


def _enter(call: ctypes._NamedFuncPointer, *arguments: int) -> None:
    if call(*arguments):
        pytest.skip(f"no network namespace can be made here: {os.strerror(ctypes.get_errno())}")


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP_AND_RUNNING))
