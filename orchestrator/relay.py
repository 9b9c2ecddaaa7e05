"""One request from arrival to last byte: its deadline, the watch for a client that leaves, the forwarding,
and the one place where errors become answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from orchestrator.auth import KeyRing
from orchestrator.config import LimitsConfig
from orchestrator.errors import BatonError, ClientGone, DeadlineExceeded, MethodNotAllowed
from orchestrator.exchange import Exchange, serve
from orchestrator.telemetry import Path, RequestRecord, Telemetry
from orchestrator.transport.base import Answer
from orchestrator.wire.sse import error_event

Headers = list[tuple[bytes, bytes]]

# How late a deadline may be noticed. One sweep looks at all open requests; a timer each would cost more
# than the rest of a small request.
SWEEP_S = 0.25

# The client's headers that workers get too; nothing else of a client's head reaches them.
_RELAYED = frozenset({b"accept", b"traceparent", b"tracestate"})
_PATHS = {Path.DISAGGREGATED: b"disaggregated", Path.AGGREGATED: b"aggregated"}
_log = logging.getLogger("baton.relay")


class RequestScope:
    """One request. Made by the data plane, driven by `run`, over when that returns."""

    __slots__ = ("_plane", "_progress", "_stop", "_task", "deadline", "exchange", "record")

    def __init__(self, plane: DataPlane, exchange: Exchange) -> None:
        self._plane = plane
        self._task = asyncio.current_task(plane.loop)
        self._stop: BatonError | None = None
        self._progress = received = plane.time()
        self.deadline = received + plane.limits.request_timeout_s
        self.exchange = exchange
        self.record = RequestRecord(request_id=exchange.request_id, endpoint=exchange.path, received=received)

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the request; every error has become an answer when this returns."""
        self._plane.open.add(self)
        self.exchange.on_leave(self._client_left)
        try:
            await self._serve()
        except BatonError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(self._take_stop())
        except Exception:  # a bug of ours: the client gets an error, the log the trace
            _log.exception("request %s failed", self.record.request_id)
            self._fail(BatonError("internal error"))
        finally:
            self._close()

    async def _serve(self) -> None:
        exchange, plane = self.exchange, self._plane
        if plane.keys is not None:
            self.record.client = plane.keys.check(exchange.header(b"authorization"))
        if exchange.method != "POST":
            raise MethodNotAllowed(f"use POST for {exchange.path}", allow="POST")
        body = await exchange.read_body()
        self.record.bytes_in = len(body)
        await plane.serve(self, body)

    def _close(self) -> None:
        self._task = None
        self._plane.open.discard(self)
        self.record.finished = self._plane.time()
        self._plane.telemetry.finish(self.record)

    # --- being stopped from outside -------------------------------------------------------------

    def stop(self, error: BatonError) -> None:
        """End the request with this error, wherever it is. The first call counts."""
        if self._stop is None and self._task is not None:
            self._stop = error
            self._task.cancel()

    def _client_left(self) -> None:
        self.stop(ClientGone("the client closed its connection"))

    def _take_stop(self) -> BatonError:
        """Why this task was cancelled; if it was not by `stop`, the process is ending."""
        if self._stop is None:
            raise asyncio.CancelledError
        if self._task is not None:
            self._task.uncancel()
        return self._stop

    def sweep(self, now: float) -> None:
        """Stop the request if it has outlived its deadline, or a stream if it has been silent too long."""
        limits = self._plane.limits
        if not self.exchange.is_started:
            if now > self.deadline:
                self.stop(DeadlineExceeded(f"not answered within {limits.request_timeout_s:g} s"))
        elif now > self._progress + limits.stream_idle_timeout_s:
            self.stop(DeadlineExceeded(f"no progress for {limits.stream_idle_timeout_s:g} s"))

    # --- what the flow needs --------------------------------------------------------------------

    def now(self) -> float:
        return self._plane.time()

    def relayed_headers(self) -> Headers:
        """Those of the client's headers that go to workers."""
        return [field for field in self.exchange.headers if field[0] in _RELAYED]

    def response_headers(self) -> Headers:
        """What we say of a worker's answer. Times are in milliseconds."""
        record = self.record
        now = record.first_byte = self._plane.time()
        return [
            (b"x-process-time", b"%.3f" % ((now - record.received) * 1e3)),
            (b"x-baton-path", _PATHS[record.path]),
            (b"server-timing", _server_timing(record)),
        ]

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        self.record.status = status
        self.record.bytes_out = len(body)
        self.exchange.respond(status, headers, body)

    def start_stream(self, headers: Headers, opening: bytes) -> None:
        """Send the head of a stream and its first events."""
        self.record.status = 200
        self.record.bytes_out = len(opening)
        self._progress = self._plane.time()
        self.exchange.start(200, headers)
        self.exchange.feed(opening)

    async def forward(self, answer: Answer, feed: Callable[[bytes], bytes]) -> None:
        """Send the rest of a worker's stream as it comes, through `feed`. Raises what the answer raises.

        The client's pace becomes the worker's: while its connection is full, the worker's is not read.
        """
        record, time, send = self.record, self._plane.time, self.exchange.feed

        def sink(chunk: bytes) -> bool:
            self._progress = time()
            data = feed(chunk)
            record.bytes_out += len(data)
            return not data or send(data)

        self.exchange.on_writable(answer.resume)
        await answer.pump(sink)

    # --- errors ---------------------------------------------------------------------------------

    def _fail(self, error: BatonError) -> None:
        record, exchange = self.record, self.exchange
        record.error_code = error.code
        if isinstance(error, ClientGone):
            record.status = record.status or error.status
            exchange.abort()
        elif not exchange.is_started:
            headers = error.headers()
            if record.path:
                headers += self.response_headers()
            self.respond(error.status, headers, error.body())
        elif not exchange.is_complete:
            exchange.finish(error_event(error.body()))


def _server_timing(record: RequestRecord) -> bytes:
    """queue, prefill and decode to first byte; a prefill that did not end is left out."""
    timing = b"queue;dur=%.3f" % ((record.admitted - record.received) * 1e3)
    if record.prefill_done:
        timing += b", prefill;dur=%.3f" % ((record.prefill_done - record.admitted) * 1e3)
    decode_start = record.prefill_done or record.admitted
    return timing + b", decode;dur=%.3f" % ((record.first_byte - decode_start) * 1e3)


Serve = Callable[[RequestScope, bytes], Awaitable[None]]


class DataPlane:
    """The ASGI application of the data plane, and the set of its open requests."""

    def __init__(
        self,
        serve: Serve,
        *,
        limits: LimitsConfig,
        telemetry: Telemetry,
        keys: KeyRing | None,
        time: Callable[[], float],
    ) -> None:
        """To be made inside the running event loop, whose clock `time` is.

        `serve` answers a request through its scope, or raises a `BatonError`.
        """
        self.serve = serve
        self.limits = limits
        self.telemetry = telemetry
        self.keys = keys
        self.time = time
        self.loop = asyncio.get_running_loop()  # kept: before Python 3.12 each look-up is a system call
        self.open: set[RequestScope] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await serve(self._handle, scope, receive, send)

    async def _handle(self, exchange: Exchange) -> None:
        await RequestScope(self, exchange).run()

    async def sweep_forever(self) -> None:
        """Enforce deadlines until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.time()
            for request in tuple(self.open):
                request.sweep(now)
