"""The seam between the orchestrator and its workers: how one leg is sent and its answer read.

`pool.py` is the real one (sockets, httptools); `memory.py` its in-memory twin for tests. Everything
above this file is the same on both.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# What a leg's body may be made of (memoryviews: of bytes). Parts are written one after the other, without
# joining large ones, and must not change until the answer's head is there: a retry sends them again.
Part = bytes | bytearray | memoryview

# Takes one piece of a body; False asks for a pause until `Answer.resume()`.
Sink = Callable[[bytes], bool]


class Origin(NamedTuple):
    """Where a worker listens. Hashed once per leg: a tuple does that without Python code."""

    host: str  # name or address; an IPv6 address without brackets
    port: int
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class UpstreamStats:
    """The connections at one moment, and totals since the start."""

    idle: int  # connections that wait in the pool
    busy: int  # connections that carry a leg
    connects: int  # connections made
    reuses: int  # legs that started on an idle connection
    retries: int  # legs sent again because a reused connection turned out to be closed


class Answer(Protocol):
    """A worker's response to one leg, from the moment the leg is sent.

    Whoever holds it must read it to the end or `abort()` it; a cancelled `head()`, `chunk()` or `read()` does
    not abort, so that the holder can still see what has arrived. One reader at a time.
    """

    status: int  # 0 until the head has arrived
    headers: dict[bytes, bytes]  # lower-case names; a repeated field keeps its last value

    @property
    def is_complete(self) -> bool:
        """The whole body has arrived (it may still be unread)."""
        ...

    @property
    def unread(self) -> int:
        """Bytes of the body that have arrived and that nobody has taken."""
        ...

    async def head(self) -> None:
        """Wait for `status` and `headers`. Repeatable, also after it was cancelled.

        Informational (1xx) heads are skipped. Raises `WorkerCutShort` if the connection ends first,
        `WorkerGarbage` if what came is not HTTP/1. A reused connection found closed before any response byte
        is replaced here, once, by a fresh one to the same origin.
        """
        ...

    async def chunk(self) -> bytes:
        """The next piece of the body as it arrived, without framing; b"" at the end, and after it.

        Does not suspend when something is there; what arrived in several pieces meanwhile comes as one.
        Waits for the head first if need be. Raises `WorkerCutShort` if the connection ends before the body
        does, `WorkerGarbage` if the framing is broken. What arrived before the failure is delivered first.
        """
        ...

    async def read(self, limit: int) -> bytes:
        """The whole rest of the body. Raises as `chunk()` does, and `WorkerGarbage` past `limit` bytes.

        Nothing is lost when it is cancelled or raises: what had arrived stays unread.
        """
        ...

    def body_nowait(self) -> bytes | None:
        """All that is unread, if the body is complete; else None, and nothing is taken."""
        ...

    async def pump(self, sink: Sink) -> None:
        """Hand every further piece to `sink` the moment it arrives; returns at the end of the body.

        `sink` is called synchronously from the event loop's read callback (first, from here, with what is
        already there), never with b"", never twice at once. After it returned False it is not called
        again, and the worker's connection is not read, until `resume()`; a pause at the last piece is
        ignored. Raises as `chunk()` does. An exception out of `sink` aborts the answer and is raised from
        here; cancelling aborts too.
        """
        ...

    def resume(self) -> None:
        """`sink` can take more. It may be called from inside this call. No effect unless paused."""
        ...

    def leave(self) -> None:
        """Tell the worker that the answer is not wanted any more, and still take one that is on its way.

        Closes the sending half of the connection, which a server takes for the client's leaving. Read on, or
        `abort()`, as before. TLS has no such half: there it does nothing.
        """
        ...

    def abort(self) -> None:
        """Give the answer up: closes the connection unless the answer is complete. Repeatable.

        A reader that waits, or comes later, gets `WorkerCutShort`.
        """
        ...


class Upstream(Protocol):
    """Sends legs. One per process and event loop; `aclose()` when the process ends."""

    async def send(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: bytes,
        body: Sequence[Part],
    ) -> Answer:
        """Write one request; returns when the operating system has all of it, or an answer comes first.

        `headers` is a `headers.header_block()`; `host` and `content-length` are added. Raises
        `WorkerUnreachable` if no connection could be made: not one byte was written. Once it returns the leg
        counts as written, and everything that goes wrong later is raised by the answer's methods.
        Cancelling closes the connection; how much was written is then unknown.
        """
        ...

    def stats(self) -> UpstreamStats:
        """Counts of connections, for tests and the admin API."""
        ...

    async def aclose(self) -> None:
        """Close all connections, idle and busy; legs under way end with `WorkerCutShort`. Repeatable."""
        ...


async def request(
    upstream: Upstream, origin: Origin, method: str, target: str, headers: bytes, body: Sequence[Part]
) -> Answer:
    """`send()` and the answer's `head()`. Raises as both do; cancelling closes the connection."""
    answer = await upstream.send(origin, method, target, headers, body)
    try:
        await answer.head()
    except BaseException:
        answer.abort()
        raise
    return answer
