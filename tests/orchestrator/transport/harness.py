"""What the transport's tests share: a loop runner and a peer on a real socket that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from orchestrator.transport.base import Answer, Origin, request
from orchestrator.transport.pool import PooledUpstream
from tests.orchestrator.certificate import CERT, KEY

LIMIT_S = 60  # for everything that must happen; never waited out


def scenario(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on uvloop and on asyncio's own loop."""
    signature = inspect.signature(test)
    new_loop = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)

    @pytest.mark.parametrize(
        "new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
    )
    @functools.wraps(test)
    def run(*, new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        run_on(new_loop, test(**fixtures))

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), new_loop])
    return run


def run_on(new_loop: Callable[[], asyncio.AbstractEventLoop], work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await work

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(limited())


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - what is waited for has no event, on purpose
        await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """Let the loop read what was just sent on loopback."""
    for _ in range(count):
        await asyncio.sleep(0)


class PeerConnection:
    """One accepted connection, seen from the worker's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.over = asyncio.Event()  # the script has ended: by itself, or because the client closed
        self._peeked = b""

    async def head(self) -> bytes:
        peeked, self._peeked = self._peeked, b""
        return peeked or await self.reader.readuntil(b"\r\n\r\n")

    async def peek_head(self) -> bytes:
        """The next request's head, which `head()` returns once more."""
        self._peeked = await self.head()
        return self._peeked

    async def request(self) -> tuple[bytes, bytes]:
        """The next request's head and body."""
        head = await self.head()
        size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head, await self.reader.readexactly(size)

    async def send(self, *segments: bytes) -> None:
        """Each in a write, and a read, of its own (as far as a socket lets one say so)."""
        for segment in segments:
            if self.writer.is_closing():  # uvloop would raise a RuntimeError
                raise ConnectionResetError
            self.writer.write(segment)
            await turns()

    async def wait_closed(self) -> None:
        """The client has closed; what it still sent before is thrown away."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while await self.reader.read(1 << 20):
                pass

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with RST: what was not delivered is lost."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()

    def cut(self) -> None:
        """Close TCP, and say no goodbye if there is TLS on top."""
        self.writer.transport.abort()


Script = Callable[[PeerConnection], Awaitable[None]]


class Peer:
    """A worker on loopback. `script` handles one connection; when it returns, the connection closes.

    It may wait for a request that never comes: the client's closing ends it.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self._server: asyncio.Server
        self._tasks: list[asyncio.Task[None]] = []
        self.connections: list[PeerConnection] = []
        self.origin = Origin("", 0)

    async def start(self, host: str, tls: ssl.SSLContext | None, client_tls: ssl.SSLContext | None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        self._server = await asyncio.start_server(self._accept, sock=listener, ssl=tls)
        self.origin = Origin(host, listener.getsockname()[1], client_tls)

    async def stop_listening(self) -> None:
        self._server.close()
        await turns()

    async def aclose(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self.connections:
            if not connection.writer.transport.is_closing():  # twice fails on asyncio TLS before 3.11.3
                connection.writer.transport.abort()
        await turns()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def wait_all_closed(self) -> None:
        """Until the script of every connection is over; most wait for the client to close."""
        for connection in self.connections:
            await connection.over.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = PeerConnection(reader, writer)
        self.connections.append(connection)
        self._tasks.append(asyncio.ensure_future(self._run(connection)))

    async def _run(self, connection: PeerConnection) -> None:
        try:
            await self._script(connection)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            connection.close()
            connection.over.set()


@contextlib.asynccontextmanager
async def peer(
    script: Script,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Peer]:
    worker = Peer(script)
    await worker.start(host, tls, client_tls)
    try:
        yield worker
    finally:
        await worker.aclose()


@contextlib.asynccontextmanager
async def pool(**options: float) -> AsyncIterator[PooledUpstream]:
    upstream = PooledUpstream(**options)
    try:
        yield upstream
    finally:
        await upstream.aclose()
        stats = upstream.stats()
        assert (stats.idle, stats.busy) == (0, 0)


def replies(*answers: bytes) -> Script:
    """Answers the requests of one connection with these, then waits for the client to close."""

    async def script(connection: PeerConnection) -> None:
        for answer in answers:
            await connection.request()
            await connection.send(answer)
        await connection.wait_closed()

    return script


async def get(upstream: PooledUpstream, origin: Origin, body: bytes = b"{}") -> tuple[int, bytes]:
    answer = await post(upstream, origin, body)
    return answer.status, await answer.read(1 << 30)


async def post(upstream: PooledUpstream, origin: Origin, body: bytes = b"{}") -> Answer:
    return await request(upstream, origin, "POST", "/v1/x", b"content-type: application/json\r\n", [body])


def fixed(body: bytes, status: bytes = b"200 OK", fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, fields, len(body), body)


def chunked(*pieces: bytes, fields: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\n%btransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % (fields, body)


def client_context() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERT)


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERT, KEY)
    return context
