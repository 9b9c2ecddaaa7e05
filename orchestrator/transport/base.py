"""The seam between the orchestrator and its workers: how one leg is sent and its answer read.

`pool.py` is the real one (sockets, httptools); `memory.py` its in-memory twin for tests. Everything
above this file is the same on both.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# What a leg's body may be made of. Parts are written one after the other, without joining.
Part = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a worker listens. Hashable: idle connections are kept per origin."""

    host: str  # name or address; an IPv6 address without brackets
    port: int
    tls: ssl.SSLContext | None = None


class Answer(Protocol):
    """A worker's response, from its head on. Whoever holds it must read it to the end or `abort()` it."""

    status: int
    headers: dict[bytes, bytes]  # lower-case names; a repeated field keeps its last value

    @property
    def is_complete(self) -> bool:
        """The whole body has arrived (it may still be unread)."""
        ...

    async def chunk(self) -> bytes:
        """The next piece of the body as it arrived, without framing; b"" at the end, and after it.

        Raises `WorkerCutShort` if the connection ends before the body does, `WorkerGarbage` if the framing
        is broken. What arrived before the failure is delivered first. One reader at a time.
        """
        ...

    async def read(self, limit: int) -> bytes:
        """The whole rest of the body. Raises as `chunk()` does, and `WorkerGarbage` past `limit` bytes."""
        ...

    def abort(self) -> None:
        """Give the answer up: closes the connection unless the answer is complete. Repeatable."""
        ...


class Upstream(Protocol):
    """Sends legs. One per process; `aclose()` when the process ends."""

    async def request(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Sequence[tuple[bytes, bytes]],
        body: Sequence[Part],
    ) -> Answer:
        """Write one request and wait for the head of its answer.

        `headers` are sent as given; `host` and `content-length` are added. Raises `WorkerUnreachable` if no
        connection could be made (nothing was written), `WorkerCutShort` if it broke after the first byte
        was written, `WorkerGarbage` if what came back is not HTTP/1. A reused connection that is found
        closed before any response byte is replaced once by a fresh one to the same origin. Cancelling
        closes the connection.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections, idle and busy."""
        ...
