"""This is the seam between the orchestrator and its workers: how one leg is sent and its answer read.

`pool.py` is the real one (sockets, httptools); `memory.py` its in-memory twin for tests. Everything
above this file is the same on both.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.compiled import mypyc_attr
from orchestrator.transport.answer import Answer, Sink
from orchestrator.wire.info import Streams

__all__ = [
    "Answer",
    "Origin",
    "Part",
    "Sending",
    "Sink",
    "Upstream",
    "UpstreamStats",
    "host_header",
    "request",
]

# What a leg's body may be made of (memoryviews: of bytes). Parts are written one after the other, without
# joining large ones, and must not change until the answer's head is there: a retry sends them again.
Part = bytes | bytearray | memoryview


class Origin(NamedTuple):
    """A worker listens at its origin. It is hashed once per leg: a tuple does that without Python code."""

    host: str  # name or address; an IPv6 address without brackets
    port: int
    tls: ssl.SSLContext | None = None


def host_header(origin: Origin) -> str:
    """Return the `host` of a request there: the port is left out where it is the scheme's own."""
    host = f"[{origin.host.partition('%')[0]}]" if ":" in origin.host else origin.host
    return host if origin.port == (443 if origin.tls else 80) else f"{host}:{origin.port}"


@mypyc_attr(allow_interpreted_subclasses=True)
class Sending(ABC):
    """A sending is a request whose body is written bit by bit, as it comes from somewhere else. It is sent
    once: nothing of it is kept.

    `answer` may begin, or fail, before the body is whole; whoever holds it ends it as any other.
    """

    answer: Answer

    @property
    @abstractmethod
    def is_full(self) -> bool:
        """Return whether the worker has yet to take what was written: `wait()` before the next piece."""
        ...

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Return whether more of the body is of no use: the worker has refused it, or is lost, or has
        answered.
        """
        ...

    @abstractmethod
    def write(self, piece: Part) -> None:
        """Write a piece of the body, which is not empty and must not change any more. It is dropped once the
        sending is over.
        """
        ...

    @abstractmethod
    def end(self) -> None:
        """Note that the body is whole."""
        ...

    @abstractmethod
    async def wait(self) -> None:
        """Wait for the worker: until it has taken what was written, or its answer, or the connection, has
        come on; or for `wake()`. Only the sender waits, until it reads the answer.
        """
        ...

    @abstractmethod
    def wake(self) -> None:
        """Have `wait()` return, as there may be more to write."""
        ...


class UpstreamStats(NamedTuple):
    """These are the connections at one moment, and totals since the start."""

    idle: int  # connections that wait in the pool
    busy: int  # connections that carry a leg
    connects: int  # connections made
    reuses: int  # legs that started on an idle connection
    retries: int  # legs sent again because a reused connection turned out to be closed


@mypyc_attr(allow_interpreted_subclasses=True)
class Upstream(ABC):
    """An upstream sends legs. There is one per process and event loop, closed when the process ends."""

    @abstractmethod
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
        `WorkerUnreachable` if no connection could be made: not one byte was written; `OutOfResources` if that
        is this machine's fault. Once it returns the leg counts as written, and everything that goes wrong
        later is raised by the answer's methods.
        Cancelling closes the connection; how much was written is then unknown.
        """
        ...

    @abstractmethod
    async def open(
        self, origin: Origin, method: str, target: str, headers: bytes, size: int | None
    ) -> Sending:
        """Write the head of a request, on a fresh connection: nothing is there to be sent again.

        The body has `size` bytes, or goes in chunks if that is None. The rest is as in `send()`.
        """
        ...

    @property
    def streams(self) -> Streams:
        """Return whether it makes use of offers: "mux" if so."""
        return "http"

    def offer(self, origin: Origin, is_mux: bool, headers: bytes = b"") -> None:
        """Note whether the worker there takes many requests on one connection (`wire/streams.py`), which an
        upstream may make use of.

        `headers` is what the worker wants in the head with which that connection is opened, as a
        `headers.header_block()`. One that was offered before, and has refused, is asked once more.
        """
        return

    @abstractmethod
    def stats(self) -> UpstreamStats:
        """Return counts of connections, for tests and the admin API."""
        ...

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections, idle and busy; legs under way end with `WorkerCutShort`. It may be called
        again.
        """
        ...


async def request(
    upstream: Upstream, origin: Origin, method: str, target: str, headers: bytes, body: Sequence[Part]
) -> Answer:
    """Await `send()` and the answer's `head()`. Raises as both do; cancelling closes the connection."""
    answer = await upstream.send(origin, method, target, headers, body)
    try:
        await answer.head()
    except BaseException:
        answer.abort()
        raise
    return answer
