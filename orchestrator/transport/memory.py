"""This is the in-memory twin of the pool, for tests: workers are coroutines.

Nothing but the event loop's queue and clock decides what happens when: a virtual-time loop makes it
deterministic.

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, {b"content-type": b"text/event-stream"})
        await asyncio.sleep(0.1)
        await reply.chunk(b"data: ...")

    upstream.serve(origin, worker)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import (
    OutOfResources,
    WorkerCutShort,
    WorkerError,
    WorkerGarbage,
    WorkerUnreachable,
)
from orchestrator.transport.base import Answer, Origin, Part, Sending, Upstream, UpstreamStats
from orchestrator.transport.memory_answer import MemoryAnswer, Writer
from orchestrator.wire.headers import fields_of


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """A worker gets a leg as this, all of it."""

    origin: Origin
    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]  # as given: without host and content-length
    body: bytes


# Answers one leg. Returning ends the body; returning before the head, or raising, cuts the answer short. It
# is cancelled one turn of the loop after the leg was dropped, never before it started.
LegHandler = Callable[[MemoryRequest, "MemoryReply"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Worker:
    handler: LegHandler
    connect_s: float


class MemoryUpstream(Upstream):
    """It is `base.Upstream` without sockets. An origin that nobody serves refuses connections.

    `requests` has every leg that a worker got, in order. `aclose()` raises an ExceptionGroup of what handlers
    raised.
    """

    def __init__(self, *, connect_timeout_s: float = 5.0) -> None:
        self.requests: list[MemoryRequest] = []
        self.is_short = False  # of descriptors: no connection can be made
        self._connect_timeout_s = connect_timeout_s
        self._workers: dict[Origin, _Worker] = {}
        self._replies: set[MemoryReply] = set()  # neither complete nor dropped
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[Exception] = []
        self._is_closed = False
        self._connects = 0

    def serve(self, origin: Origin, handler: LegHandler, *, connect_s: float = 0.0) -> None:
        """Have `handler` get the legs to `origin` from now on, after `connect_s` seconds of connecting."""
        self._workers[origin] = _Worker(handler, connect_s)

    def refuse(self, origin: Origin) -> None:
        """Have `origin` refuse connections from now on. Legs under way go on."""
        self._workers.pop(origin, None)

    async def send(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: bytes,
        body: Sequence[Part],
    ) -> Answer:
        worker = await self._connect(origin)
        request = MemoryRequest(origin, method, target, tuple(fields_of(headers)), b"".join(body))
        self.requests.append(request)
        reply = MemoryReply(self._replies, is_head=method == "HEAD")
        task = asyncio.create_task(self._serve(worker.handler, request, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return reply.start(task)

    async def open(
        self, origin: Origin, method: str, target: str, headers: bytes, size: int | None
    ) -> Sending:
        """Send a body bit by bit; the worker gets it when it is whole."""
        worker = await self._connect(origin)
        body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def serve(reply: MemoryReply) -> None:
            content = await body
            if size is not None and len(content) != size:
                raise ValueError(f"{len(content)} bytes of a body were sent in place of {size}")
            request = MemoryRequest(origin, method, target, tuple(fields_of(headers)), content)
            self.requests.append(request)
            await worker.handler(request, reply)

        reply = MemoryReply(self._replies, is_head=method == "HEAD")
        task = asyncio.create_task(self._served(serve(reply), reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return MemorySending(reply.start(task), body)

    def stats(self) -> UpstreamStats:
        return UpstreamStats(0, len(self._replies), self._connects, 0, 0)

    async def aclose(self) -> None:
        self._is_closed = True
        for reply in list(self._replies):
            reply.fail(WorkerCutShort("the orchestrator is stopping"))
        await asyncio.sleep(0)  # what was sent has at least started, as everywhere
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        failures, self._failures = self._failures, []
        if failures:
            raise ExceptionGroup("workers of the in-memory transport failed", failures)

    async def _connect(self, origin: Origin) -> _Worker:
        if self.is_short:
            raise OutOfResources("this server cannot open another connection now: ask again")
        worker = self._workers.get(origin)
        if worker is not None and worker.connect_s:
            await asyncio.sleep(min(worker.connect_s, self._connect_timeout_s))
        if worker is None or self._is_closed:
            raise WorkerUnreachable("no connection to the worker")
        if worker.connect_s > self._connect_timeout_s:
            raise WorkerUnreachable("the worker did not accept a connection in time")
        self._connects += 1
        return worker

    async def _serve(self, handler: LegHandler, request: MemoryRequest, reply: MemoryReply) -> None:
        await self._served(handler(request, reply), reply)

    async def _served(self, work: Awaitable[None], reply: MemoryReply) -> None:
        try:
            await work
        except Exception as error:  # a worker's mistake must not pass for an answer: aclose() raises it
            self._failures.append(error)
            reply.cut_short()
        except asyncio.CancelledError:
            reply.cut_short()
            raise
        else:
            reply.end()


class MemorySending(Sending):
    """The worker takes all of it, at once."""

    def __init__(self, answer: Answer, body: asyncio.Future[bytes]) -> None:
        """`body` is given when it is whole."""
        self.answer = answer
        self._body = body
        self._pieces: list[Part] = []
        self._more: asyncio.Future[None] | None = None

    @property
    def is_full(self) -> bool:
        return False

    @property
    def is_over(self) -> bool:
        return self._body.done()

    def write(self, piece: Part) -> None:
        self._pieces.append(piece)

    def end(self) -> None:
        if not self._body.done():
            self._body.set_result(b"".join(self._pieces))

    async def wait(self) -> None:
        self._more = asyncio.get_running_loop().create_future()
        await self._more

    def wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)


class MemoryReply(Writer):
    """A reply is the worker's end of one leg. Once the leg is over, or dropped, its methods do nothing."""

    def __init__(self, open_replies: set[MemoryReply], *, is_head: bool) -> None:
        self._open_replies = open_replies
        self._is_head = is_head
        self._answer = MemoryAnswer(self)
        self._task: asyncio.Task[None] | None = None
        self._reader_takes: asyncio.Future[None] | None = None  # set while the reader does not

    @property
    def is_over(self) -> bool:
        """The answer is complete or has failed, or the orchestrator dropped the leg."""
        return self not in self._open_replies

    def head(self, status: int, headers: Mapping[bytes, bytes] | None = None) -> None:
        """Send the head; `headers` have lower-case names."""
        if not self.is_over:
            self._answer.begin(status, dict(headers or {}))
            self._receive(b"", self._is_head)

    async def chunk(self, data: bytes) -> None:
        """Send one piece of the body, as one read; then wait until the reader takes more."""
        self.chunk_nowait(data)
        await asyncio.sleep(0)  # the next piece comes in another turn, as from a socket
        while self._reader_takes is not None:
            await asyncio.shield(self._reader_takes)

    def chunk_nowait(self, data: bytes) -> None:
        """Send one piece of the body without regard to the reader."""
        if not self.is_over:
            self._require_head()
            self._receive(data, False)

    def end(self) -> None:
        """End the body, which is complete; without a head, the connection closes instead."""
        if not self._answer.status:
            self.cut_short()
        elif not self.is_over:
            self._receive(b"", True)

    def answer(self, status: int, body: bytes, headers: Mapping[bytes, bytes] | None = None) -> None:
        """Send head and whole body in one read."""
        if not self.is_over:
            self._answer.begin(status, dict(headers or {}))
            self._receive(b"" if self._is_head else body, True)

    def cut_short(self) -> None:
        """Close the connection before the end."""
        self.fail(WorkerCutShort("the worker closed the connection"))

    def garbage(self) -> None:
        """Send something that is not HTTP."""
        self.fail(WorkerGarbage("the worker's answer is not valid HTTP"))

    async def hang(self) -> None:
        """Say nothing more until the leg is dropped."""
        await asyncio.Event().wait()

    # --- for MemoryUpstream and the answer ------------------------------------------------------

    def start(self, task: asyncio.Task[None]) -> Answer:
        self._task = task
        self._open_replies.add(self)
        return self._answer

    def fail(self, error: WorkerError) -> None:
        if not self.is_over:
            self._close()
            self._answer.fail(error)

    def drop(self) -> None:
        if not self.is_over and self._task is not None:
            self._close()
            asyncio.get_running_loop().call_soon(self._task.cancel)  # after its first step, if that is due

    def leave(self) -> None:
        if not self.is_over and self._task is not None:
            asyncio.get_running_loop().call_soon(self._task.cancel)

    def hold(self) -> None:
        if not self.is_over and self._reader_takes is None:
            self._reader_takes = asyncio.get_running_loop().create_future()

    def let_go(self) -> None:
        waiter, self._reader_takes = self._reader_takes, None
        if waiter is not None:
            waiter.set_result(None)

    # --- inside ---------------------------------------------------------------------------------

    def _receive(self, data: bytes, is_complete: bool) -> None:
        if is_complete:
            self._close()
        self._answer.receive(data, is_complete)

    def _close(self) -> None:
        self._open_replies.discard(self)
        self.let_go()

    def _require_head(self) -> None:
        if not self._answer.status:
            raise RuntimeError("a body needs a head first")
