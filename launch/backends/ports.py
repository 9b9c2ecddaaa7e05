"""A worker that a cluster has found a place for is given ports there: on its node, when it starts.

Ports of the config are of no use on a node where other jobs run. What is given out here is free, and no other
worker of Baton's on the node is given it, also if that has not begun to listen yet.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Final, Self

from launch.engines.base import KV_EVENTS_OFFSET, KV_REPLAY_OFFSET

# Above what services have for themselves, and, with the offsets, below what kernels give to connections.
PORTS: Final = range(10_000, 29_000)
_TRIES: Final = 2_000


class NoPort(OSError):
    """No port of the node is free."""


@dataclass
class WorkerPorts:
    """A worker listens at these. They are its own until `close`, or until the process ends that took them."""

    port: int
    side_channel_port: int  # and the following ones, one for each data-parallel engine
    _held: list[socket.socket] = field(repr=False)

    def close(self) -> None:
        """Let others have the ports. This can be repeated."""
        while self._held:
            self._held.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def take_ports(host: str, engines: int, random: Random, *, has_kv_events: bool) -> WorkerPorts:
    """Take ports for a worker with so many data-parallel engines that listens at `host`. Raises `NoPort`."""
    offsets = (0, KV_EVENTS_OFFSET, KV_REPLAY_OFFSET) if has_kv_events else (0,)
    port, held = _take(host, offsets, random)
    try:
        side_channel, more = _take(host, range(engines), random)
    except NoPort:
        _close(held)
        raise
    return WorkerPorts(port, side_channel, [*held, *more])


def _take(host: str, offsets: Sequence[int], random: Random) -> tuple[int, list[socket.socket]]:
    """Return a port, which is free at all these offsets, and what reserves them."""
    for port in _tries(random):
        held = _reserved(host, [port + offset for offset in offsets])
        if held is not None:
            return port, held
    raise NoPort(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on {host}")


def _tries(random: Random) -> Iterator[int]:
    return iter(random.sample(PORTS, _TRIES))


def _reserved(host: str, ports: Sequence[int]) -> list[socket.socket] | None:
    """Reserve all these ports; return None if one of them is somebody's."""
    held: list[socket.socket] = []
    for port in ports:
        holder = _holder(port) if _is_free(host, port) else None
        if holder is None:
            _close(held)
            return None
        held.append(holder)
    return held


def _holder(port: int) -> socket.socket | None:
    """Return a socket whose name says that a port is taken; None if another process has it.

    The kernel frees the name, however the process ends.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(f"\0baton-port-{port}")
    except OSError:
        holder.close()
        return None
    return holder


def _close(held: Sequence[socket.socket]) -> None:
    for holder in held:
        holder.close()


def _is_free(host: str, port: int) -> bool:
    """Return whether one can listen there: at the host's address, and at all addresses of the node."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    anywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    return _can_listen(family, anywhere, port) and _can_listen(family, host, port)


def _can_listen(family: int, host: str, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError:
        return False
    return True
