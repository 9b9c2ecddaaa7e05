"""One kind of worker for the contract suite, served by both transports: a `memory.LegHandler`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from orchestrator.transport.base import Origin, Upstream
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest, MemoryUpstream
from tests.orchestrator.transport.harness import PeerConnection, peer, pool


@dataclass(frozen=True, slots=True)
class Setting:
    """An upstream and one worker behind it."""

    upstream: Upstream
    origin: Origin
    requests: list[MemoryRequest]
    is_shared: bool = False  # a connection carries other legs beside one that was left


Serve = Callable[[LegHandler], contextlib.AbstractAsyncContextManager[Setting]]


@contextlib.asynccontextmanager
async def in_memory(handler: LegHandler) -> AsyncIterator[Setting]:
    upstream = MemoryUpstream()
    origin = Origin("worker", 1)
    upstream.serve(origin, handler)
    try:
        yield Setting(upstream, origin, upstream.requests)
    finally:
        await upstream.aclose()


@contextlib.asynccontextmanager
async def on_sockets(handler: LegHandler) -> AsyncIterator[Setting]:
    requests: list[MemoryRequest] = []

    async def script(connection: PeerConnection) -> None:
        await serve_http(connection, handler, requests)

    async with peer(script) as worker, pool() as upstream:
        yield Setting(upstream, worker.origin, requests)


async def serve_http(connection: PeerConnection, handler: LegHandler, requests: list[MemoryRequest]) -> None:
    while (request := await read_request(connection)) is not None:
        requests.append(request)
        reply = SocketReply(connection, is_head=request.method == "HEAD")
        await until_dropped(connection, serve(handler, request, reply))


async def read_request(connection: PeerConnection) -> MemoryRequest | None:
    try:
        head, body = await connection.request()
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    line, *fields = head.decode().split("\r\n")[:-2]
    method, target, _ = line.split(" ")
    ours = (b"host", b"content-length")
    pairs = (tuple(field.encode().split(b": ", 1)) for field in fields)
    headers = tuple((name, value) for name, value in pairs if name not in ours)
    return MemoryRequest(Origin("", 0), method, target, headers, body)


async def serve(handler: LegHandler, request: MemoryRequest, reply: SocketReply) -> None:
    await handler(request, reply)
    reply.end()


async def until_dropped(connection: PeerConnection, work: object) -> None:
    """Cancels `work` when the client closes the connection first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(connection.reader.read(1))
    await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
    watch.cancel()
    await asyncio.wait((task, watch))
    if not task.cancelled():
        task.result()
    if watch.done() and not watch.cancelled():
        watch.exception()  # a reset is as good as an end


class SocketReply(MemoryReply):
    """`MemoryReply` that writes HTTP/1.1 to a socket."""

    def __init__(self, connection: PeerConnection, *, is_head: bool) -> None:
        self._connection = connection
        self._is_bodiless = is_head
        self._has_begun = False
        self._is_done = False

    def head(self, status: int, headers: Mapping[bytes, bytes] | None = None) -> None:
        self._write_head(status, {**(headers or {}), b"transfer-encoding": b"chunked"})

    async def chunk(self, data: bytes) -> None:
        self.chunk_nowait(data)
        await asyncio.sleep(0)
        await self._connection.writer.drain()

    def chunk_nowait(self, data: bytes) -> None:
        self._write_body(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        if not self._has_begun:
            self.cut_short()
        elif not self._is_done:
            self._write_body(b"0\r\n\r\n")
            self._is_done = True

    def answer(self, status: int, body: bytes, headers: Mapping[bytes, bytes] | None = None) -> None:
        self._write_head(status, {**(headers or {}), b"content-length": b"%d" % len(body)})
        self._write_body(body)
        self._is_done = True

    def cut_short(self) -> None:
        self._is_done = True
        self._connection.close()

    def garbage(self) -> None:
        self._is_done = True
        self._connection.writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")

    def _write_head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self._has_begun = True
        fields = b"".join(b"%b: %b\r\n" % field for field in headers.items())
        self._connection.writer.write(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, fields))

    def _write_body(self, data: bytes) -> None:
        if not self._is_bodiless:
            self._connection.writer.write(data)
