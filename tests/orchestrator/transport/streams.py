"""A worker that speaks frames (`wire/streams.py`), by a script of its own or around a `memory.LegHandler`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

from orchestrator.transport.base import Answer, Origin, request
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from orchestrator.transport.mux import MuxUpstream
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.headers import fields_of, header_block
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    LEAVE,
    MAX_PAYLOAD,
    OPEN,
    PING,
    RESET,
    RESET_BROKEN,
    U16,
    U32,
    VERSION,
    WINDOW,
    FrameReader,
    credit,
    frame,
    reset,
)
from tests.orchestrator.transport.harness import PeerConnection, peer
from tests.orchestrator.transport.workers import Setting, serve_http

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: %b\r\n\r\n" % VERSION


class Frame(NamedTuple):
    kind: int
    is_end: bool
    stream: int
    payload: bytes


class Framed:
    """One connection after its upgrade, seen from the worker's side."""

    def __init__(self, connection: PeerConnection) -> None:
        self.connection = connection
        self._frames: deque[Frame] = deque()
        self._reader = FrameReader(lambda *parts: self._frames.append(Frame(*parts)))

    async def upgrade(self) -> bytes:
        """Take the upgrade; returns its head."""
        head = await self.connection.head()
        await self.connection.send(SWITCHED)
        return head

    async def next(self) -> Frame:
        """The next frame. Raises `IncompleteReadError` when the connection has ended."""
        while not self._frames:
            data = await self.connection.reader.read(1 << 18)
            if not data:
                raise asyncio.IncompleteReadError(b"", None)
            self._reader.feed(data)
        return self._frames.popleft()

    async def until(self, *kinds: int) -> Frame:
        """The next frame of one of these kinds; others before it are thrown away."""
        while (found := await self.next()).kind not in kinds:
            pass
        return found

    async def request(self) -> tuple[int, bytes, bytes]:
        """The next request's stream, head and body. It must be alone on the connection."""
        opened = await self.until(OPEN)
        body, is_end = b"", opened.is_end
        while not is_end:
            piece = await self.until(BODY)
            body += piece.payload
            is_end = piece.is_end
        return opened.stream, opened.payload, body

    async def send(self, *frames: bytes) -> None:
        """Each in a write, and a read, of its own."""
        await self.connection.send(*frames)

    def write(self, data: bytes) -> None:
        if not self.connection.writer.is_closing():
            self.connection.writer.write(data)


def head_frame(stream: int, status: int = 200, fields: bytes = b"", *, is_end: bool = False) -> bytes:
    return frame(HEAD | END if is_end else HEAD, stream, U16.pack(status) + fields)


def answer_frames(stream: int, body: bytes, status: int = 200) -> bytes:
    """A whole small answer."""
    return head_frame(stream, status) + frame(DATA | END, stream, body)


FramedScript = Callable[[Framed], Awaitable[None]]


@contextlib.asynccontextmanager
async def streams(script: FramedScript, **options: float) -> AsyncIterator[tuple[MuxUpstream, Origin]]:
    """An upstream, and the origin of a worker whose every connection is upgraded and goes by `script`."""

    async def upgraded(connection: PeerConnection) -> None:
        framed = Framed(connection)
        await framed.upgrade()
        await script(framed)

    async with peer(upgraded) as worker, mux(**options) as upstream:
        upstream.offer(worker.origin, True)
        yield upstream, worker.origin


@contextlib.asynccontextmanager
async def mux(**options: float) -> AsyncIterator[MuxUpstream]:
    upstream = MuxUpstream(PooledUpstream(), **options)
    try:
        yield upstream
    finally:
        await upstream.aclose()
        stats = upstream.stats()
        assert (stats.idle, stats.busy) == (0, 0)


async def post(upstream: MuxUpstream, origin: Origin, body: bytes = b"{}") -> Answer:
    return await request(upstream, origin, "POST", "/v1/x", b"content-type: application/json\r\n", [body])


async def get(upstream: MuxUpstream, origin: Origin, body: bytes = b"{}") -> tuple[int, bytes]:
    answer = await post(upstream, origin, body)
    return answer.status, await answer.read(1 << 30)


# --- around a handler -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def on_streams(handler: LegHandler) -> AsyncIterator[Setting]:
    """Serve the contract suite."""
    requests: list[MemoryRequest] = []

    async def script(connection: PeerConnection) -> None:
        if not (await connection.peek_head()).startswith(b"GET /v1/baton/streams "):
            await serve_http(connection, handler, requests)
            return
        framed = Framed(connection)
        await framed.upgrade()
        await Worker(framed, handler, requests).run()

    async with peer(script) as worker, mux() as upstream:
        upstream.offer(worker.origin, True)
        yield Setting(upstream, worker.origin, requests, is_shared=True)


class Worker:
    """It serves the streams of one connection, each in a task."""

    def __init__(self, framed: Framed, handler: LegHandler, requests: list[MemoryRequest]) -> None:
        self._framed = framed
        self._handler = handler
        self._requests = requests
        self._bodies: dict[int, tuple[bytes, list[bytes]]] = {}  # that are not whole
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._replies: dict[int, StreamReply] = {}

    async def run(self) -> None:
        try:
            while True:
                self._take(await self._framed.next())
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, taken: Frame) -> None:
        stream = taken.stream
        if taken.kind == OPEN:
            self._bodies[stream] = (taken.payload, [])
        elif taken.kind == BODY and stream in self._bodies:
            self._bodies[stream][1].append(taken.payload)
            if len(taken.payload) > WINDOW // 4:
                self._framed.write(credit(stream, len(taken.payload)))
        elif taken.kind == CREDIT and stream in self._replies:
            self._replies[stream].add_credit(U32.unpack(taken.payload)[0])
        elif taken.kind in (RESET, LEAVE) and stream in self._tasks:
            # After its first step, if that is due.
            asyncio.get_running_loop().call_soon(self._tasks[stream].cancel)
        elif taken.kind == PING:
            self._framed.write(frame(PING | END, 0, taken.payload))
        if taken.kind in (OPEN, BODY) and taken.is_end:
            self._start(stream)

    def _start(self, stream: int) -> None:
        head, body = self._bodies.pop(stream)
        line, _, block = head.partition(b"\r\n")
        method, target = line.decode().split(" ")
        ours = (b"host", b"content-length")
        headers = tuple((name, value) for name, value in fields_of(block) if name not in ours)
        taken = MemoryRequest(Origin("", 0), method, target, headers, b"".join(body))
        self._requests.append(taken)
        reply = self._replies[stream] = StreamReply(self._framed, stream)
        self._tasks[stream] = asyncio.ensure_future(self._serve(stream, taken, reply))

    async def _serve(self, stream: int, taken: MemoryRequest, reply: StreamReply) -> None:
        try:
            await self._handler(taken, reply)
            reply.end()
        except asyncio.CancelledError:
            reply.cut_short()
            raise
        finally:
            del self._replies[stream], self._tasks[stream]


class StreamReply(MemoryReply):
    """`MemoryReply` that writes frames."""

    def __init__(self, framed: Framed, stream: int) -> None:
        self._framed = framed
        self._stream = stream
        self._has_begun = False
        self._is_done = False
        self._unsent = b""
        self._credit = WINDOW
        self._may_send = asyncio.Event()

    def head(self, status: int, headers: Mapping[bytes, bytes] | None = None) -> None:
        self._has_begun = True
        self._framed.write(head_frame(self._stream, status, header_block((headers or {}).items())))

    async def chunk(self, data: bytes) -> None:
        self.chunk_nowait(data)
        await asyncio.sleep(0)
        await self._framed.connection.writer.drain()
        while self._unsent:
            self._may_send.clear()
            await self._may_send.wait()

    def chunk_nowait(self, data: bytes) -> None:
        self._unsent += data
        self._write()

    def end(self) -> None:
        if not self._has_begun:
            self.cut_short()
        elif not self._is_done:
            self._is_done = True
            self._write()

    def answer(self, status: int, body: bytes, headers: Mapping[bytes, bytes] | None = None) -> None:
        self.head(status, headers)
        self._is_done = True
        self.chunk_nowait(body)

    def cut_short(self) -> None:
        if not self._is_done:
            self._is_done = True
            self._framed.write(reset(self._stream, RESET_BROKEN))

    def garbage(self) -> None:
        self._is_done = True
        self._framed.write(head_frame(self._stream, 0))

    def add_credit(self, size: int) -> None:
        self._credit += size
        self._write()

    def _write(self) -> None:
        while self._unsent and self._credit:
            size = min(self._credit, MAX_PAYLOAD)
            piece, self._unsent = self._unsent[:size], self._unsent[size:]
            self._credit -= len(piece)
            self._framed.write(frame(DATA, self._stream, piece))
        if not self._unsent:
            self._may_send.set()
            if self._is_done:
                self._framed.write(frame(DATA | END, self._stream))
