"""Faults strike what carries a request: a connection, or a stream of one that carries many."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

from worker.streams import Connection, Streams

TRANSPORT_KEY = "baton.transport"  # of a scope's state: a `Link`


class StreamLink:
    """Faults do to a stream by this what they do to a connection by its transport."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number
        self._is_garbled = False

    @property
    def transport(self) -> asyncio.Transport:
        """Return the connection's."""
        return self._connection.transport

    def get_extra_info(self, name: str) -> None:
        """Return nothing: what is set for the socket would be for all streams."""

    def write(self, data: bytes) -> None:
        """Send bytes that are not frames. They break the connection, so that it must be closed."""
        self._is_garbled = True
        self._connection.output.put(data)

    def close(self) -> None:
        """End the stream, after what was written; its connection too if that is no frame."""
        self._connection.output.flush()
        if self._is_garbled:
            self.transport.close()
        else:
            self.abort()

    def abort(self) -> None:
        self._connection.break_off(self._number)


Link = asyncio.Transport | StreamLink


def whole(link: Link) -> asyncio.Transport:
    """Return the transport of the connection."""
    return link.transport if isinstance(link, StreamLink) else link


def reset(link: Link) -> None:
    """Close the connection with RST; a stream is reset."""
    if (sock := link.get_extra_info("socket")) is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.abort()


class SimConnection(Connection):
    def state(self, number: int) -> dict[str, Any]:
        return super().state(number) | {TRANSPORT_KEY: StreamLink(self, number)}


class SimStreams(Streams):
    connection = SimConnection
