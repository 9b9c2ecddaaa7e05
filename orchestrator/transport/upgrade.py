"""An HTTP upgrade turns a fresh connection into one of another protocol, if the other side agrees."""

from __future__ import annotations

import asyncio
import re
from typing import Final, cast

SWITCHED: Final = 101
# In place of a status:
CLOSED: Final = 0  # the connection has ended without one
SILENT: Final = 1  # whoever waited for it has given up
_UNREADABLE: Final = 500  # in place of the status of an answer that is none

_MAX_ANSWER: Final = 16 * 1024
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])[ \r]")


class Upgrade:
    """An upgrade is an `asyncio.Protocol` that asks for another protocol, and waits for the answer.

    `status` is done with the answer's status: `SWITCHED` if that names the protocol, `CLOSED` if none came.
    `rest` is what came behind it until the transport is given to another protocol.
    """

    __slots__ = ("_protocol", "_request", "rest", "status", "transport")

    transport: asyncio.Transport

    def __init__(self, request: bytes, protocol: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """`protocol` is what `request` asks for, in lower case."""
        self.status: asyncio.Future[int] = loop.create_future()
        self.rest = b""
        self._request = request
        self._protocol = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        if self.status.done():
            return
        head, end, rest = self.rest.partition(b"\r\n\r\n")
        if end:
            self.rest = rest
            self._settle(_status_of(head, self._protocol))
        elif len(self.rest) > _MAX_ANSWER:
            self._settle(_UNREADABLE)

    def eof_received(self) -> None:
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle(CLOSED)

    def pause_writing(self) -> None:
        return

    def resume_writing(self) -> None:
        return

    def _settle(self, status: int) -> None:
        if not self.status.done():
            self.status.set_result(status)


def _status_of(head: bytes, protocol: bytes) -> int:
    found = _STATUS_LINE.match(head + b"\r")
    status = int(found[1]) if found else _UNREADABLE
    return _UNREADABLE if status == SWITCHED and not _names(head, protocol) else status


def _names(head: bytes, protocol: bytes) -> bool:
    """Tell whether the head of an answer names the protocol as the one that it goes on with."""
    fields = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    return any(name == b"upgrade" and value.strip() == protocol for name, _, value in fields)
