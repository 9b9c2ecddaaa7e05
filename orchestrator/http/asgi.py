"""Here a request is served over plain ASGI: for other servers, and for tests in one process.

async with AsgiExchange(scope, receive, send) as exchange:
    await relay(exchange)    # a Handler
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from random import SystemRandom
from typing import Any

from orchestrator.errors import BatonError, BodyTooLarge, ClientGone
from orchestrator.http.exchange import BodySource, Exchange, Headers, error_answer
from orchestrator.http.ids import IdSource, request_id_from
from orchestrator.wire.headers import fields_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AsgiExchange(Exchange):
    """This is an `Exchange` over plain ASGI, as a context manager: leaving it sends what is pending.

    Slower than the server's own: two tasks per request, and what is fed always waits for one of them, so
    `feed()` always returns False. `abort()` makes the context manager raise, which cuts the connection.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        ids: IdSource | None = None,
        max_body_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self.method = scope["method"]
        self._path: str = scope["path"]
        self._query: bytes = scope["query_string"]
        self.headers = list(scope["headers"])
        self._client: tuple[str, int] | None = scope.get("client")
        length = self.header(b"content-length")
        self.content_length = int(length) if length is not None else None
        self._request_id = request_id_from(self.headers, ids or IdSource(SystemRandom()))
        self.body_size = 0
        self.is_counted = False
        self.is_gone = False
        self.is_started = False
        self.is_complete = False
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._body = AsgiBody()
        self._is_body_taken = False
        self._is_aborted = False
        self._unsent: list[Message] = []
        self._wakes = asyncio.Event()  # there is something to send, or nobody to send it to
        self._is_flushed = asyncio.Event()  # all is sent, or the client is gone
        self._is_flushed.set()
        self._on_leave: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None

    async def __aenter__(self) -> AsgiExchange:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        try:
            return await self._end(error)
        finally:
            await self._stop()

    async def _end(self, error: BaseException | None) -> bool:
        if isinstance(error, BatonError) and not self.is_started:
            self.respond(*error_answer(error))
        elif error is not None:
            return False
        if self._is_aborted or not (self.is_gone or self.is_complete):
            raise RuntimeError("the answer was cut short")
        await self._is_flushed.wait()
        return error is not None

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        if self._body.whole.done():
            self._body.whole.exception()  # a failure that nobody asked for is no news
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    # --- the request

    @property
    def path(self) -> str:
        return self._path

    @property
    def query(self) -> bytes:
        return self._query

    @property
    def client(self) -> tuple[str, int] | None:
        return self._client

    @property
    def request_id(self) -> str:
        return self._request_id

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in reversed(self.headers) if key == name), None)

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        self._on_leave = callback
        if callback is not None and self.is_gone:
            self._leave()

    async def read_body(self) -> bytes:
        if self._is_body_taken:
            raise RuntimeError("the body was read before")
        self._is_body_taken = True
        return await self._body.whole

    @property
    def source(self) -> BodySource:
        return self._body

    async def _read(self) -> None:
        """Collect the body, then watch for the client to leave."""
        while (message := await self._receive())["type"] != "http.disconnect":
            self._add(message.get("body", b""), is_last=not message.get("more_body", False))
        if not self.is_complete:
            self._leave()

    def _add(self, chunk: bytes, *, is_last: bool) -> None:
        body = self._body
        if body.whole.done():
            return
        body.chunks.append(chunk)
        self.body_size += len(chunk)
        if self.body_size > self._max_body_bytes:
            body.whole.set_exception(BodyTooLarge(f"the body is over {self._max_body_bytes} bytes"))
        elif is_last:
            body.whole.set_result(b"".join(body.chunks))
        body.note()

    def _leave(self) -> None:
        self.is_gone = True
        callback, self._on_leave = self._on_leave, None
        if not self._body.whole.done():
            self._body.whole.set_exception(ClientGone("the client left"))
            self._body.note()
        self._unsent.clear()
        self._is_flushed.set()
        if callback is not None:
            callback()

    # --- the answer

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.start(status, [*_pairs(headers), (b"content-length", b"%d" % len(body))])
        self.finish(b"" if self.method == "HEAD" else body)

    def start(self, status: int, headers: Headers) -> None:
        if self.is_started:
            raise RuntimeError("the answer was started before")
        self.is_started = True
        named = [*_pairs(headers), (b"x-request-id", self.request_id.encode())]
        self._queue({"type": "http.response.start", "status": status, "headers": named})

    def feed(self, chunk: bytes) -> bool:
        self._check_open()
        if chunk:
            self._queue({"type": "http.response.body", "body": chunk, "more_body": True})
        return False

    async def drain(self) -> None:
        await self._is_flushed.wait()
        if self.is_gone:
            raise ClientGone("the client left")

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._on_writable = callback

    def finish(self, chunk: bytes = b"") -> None:
        self._check_open()
        self._queue({"type": "http.response.body", "body": chunk, "more_body": False})
        self.is_complete = True
        self._on_leave = None

    def abort(self) -> None:
        if not self.is_complete:
            self._is_aborted = True
            self._on_leave = None
            self._leave()

    def _check_open(self) -> None:
        if not self.is_started or self.is_complete:
            raise RuntimeError("the answer is not open")

    def _queue(self, message: Message) -> None:
        if not self.is_gone:
            self._unsent.append(message)
            self._is_flushed.clear()
            self._wakes.set()

    async def _write(self) -> None:
        while True:
            await self._wakes.wait()
            self._wakes.clear()
            try:
                await self._flush()
            except OSError:  # how ASGI 2.4 servers say that the client is gone
                self._leave()
            except BaseException:
                self._leave()  # nobody may wait for what cannot be sent; `_stop()` raises the reason
                raise

    async def _flush(self) -> None:
        while self._unsent:
            await self._send(self._unsent.pop(0))
        self._is_flushed.set()
        if self._on_writable is not None and not (self.is_complete or self.is_gone):
            self._on_writable()


class AsgiBody(BodySource):
    """This is the body of a request, which its server sends without being asked."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []  # that nobody has taken
        self.whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._on_more: Callable[[], None] | None = None

    @property
    def is_taken(self) -> bool:
        return self.whole.done() and not self.chunks

    def take_some(self) -> bytes:
        if self.whole.done():
            self.whole.result()  # which raises what has failed
        chunks, self.chunks = self.chunks, []
        return b"".join(chunks)

    def on_more(self, callback: Callable[[], None] | None) -> None:
        self._on_more = callback

    def note(self) -> None:
        """Tell who waits that something has happened."""
        if self._on_more is not None:
            self._on_more()


def _pairs(headers: Headers) -> Sequence[tuple[bytes, bytes]]:
    return fields_of(headers) if isinstance(headers, bytes) else headers
