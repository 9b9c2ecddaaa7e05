"""A scope holds one request from arrival to last byte: its deadline, the watch for a client that leaves, the
forwarding, and the one place where errors become answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from orchestrator.api.base import JSON, Endpoint
from orchestrator.api.upload import Upload
from orchestrator.config.keys import KeyRing
from orchestrator.config.options import LimitsConfig
from orchestrator.errors import (
    BatonError,
    ClientError,
    ClientGone,
    DeadlineExceeded,
    MethodNotAllowed,
    ShuttingDown,
)
from orchestrator.failover.transcript import Transcript
from orchestrator.http.asgi import AsgiExchange
from orchestrator.http.exchange import ErrorAnswer, Exchange, error_answer
from orchestrator.http.held import HeldBytes
from orchestrator.legs.leg import Leg
from orchestrator.relay.tenants import Account, Tenants
from orchestrator.telemetry.counters import RejectReason, Telemetry
from orchestrator.telemetry.lines import milliseconds
from orchestrator.telemetry.record import Path, RequestRecord
from orchestrator.transport.base import Answer
from orchestrator.wire.headers import header_block
from orchestrator.wire.sse import Events
from orchestrator.wire.trace import TRACEPARENT, TRACESTATE, TraceContext, without_broken_trace, without_trace

# How late a deadline may be noticed. One sweep looks at all open requests; a timer each would cost more
# than the rest of a small request.
SWEEP_S: Final = 0.25

# Proxies in between must neither store a stream nor collect it before passing it on.
_STREAM_HEADERS: Final = header_block([(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])
_EVENT_STREAM: Final = header_block([(b"content-type", b"text/event-stream; charset=utf-8")])
_KEEP_ALIVE: Final = b": keep-alive\n\n"  # as vLLM writes it
_PATHS: Final = tuple(path.name.lower() for path in Path)  # a look-up by member is a call in Python
_log: Final = logging.getLogger("baton.relay")


class RequestScope:
    """A scope is one request. It is made by the data plane, driven by `run`, and over when that returns."""

    __slots__ = (
        "_events",
        "_is_full",
        "_leg",
        "_plane",
        "_seen_bytes",
        "_sent",
        "_stop",
        "_task",
        "account",
        "deadline",
        "endpoint",
        "exchange",
        "has_begun",
        "record",
        "transcript",
    )

    def __init__(self, plane: DataPlane, exchange: Exchange) -> None:
        self._plane = plane
        self._task = exchange.task or asyncio.current_task(plane.loop)
        self._stop: BatonError | None = None
        self._seen_bytes = 0  # of the answer, at the last sweep
        received = plane.time()
        self._sent = received  # when more of the answer was last seen to go out
        self._leg: Leg | None = None  # that is waited for
        self._events: Events | None = None  # of a stream that is forwarded
        self.transcript: Transcript | None = None  # of a stream that another worker could go on with
        self.has_begun = False  # of a stream: more than comments has been sent, or is about to be
        self._is_full = False  # the client takes no comment now
        self.deadline = received + plane.request_timeout_s
        path = exchange.path
        endpoint = plane.endpoints.get(path)
        if endpoint is None:  # it has an id in it, or a slash behind it
            path = plane.entry_of(path) or path
            endpoint = plane.endpoints[path]
        self.endpoint = endpoint
        self.exchange = exchange
        self.record = RequestRecord(exchange.request_id, path, received)
        self.account: Account | None = None  # of who asks, where there are API keys

    # --- life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the request; every error has become an answer when this returns."""
        self._plane.open[self] = None
        self.exchange.on_leave(self._client_left)
        try:
            self._admit()
            if self.endpoint.takes_uploads:
                return await self._serve_upload()
            body = await self.exchange.read_body()
            self.record.bytes_in = len(body)
            self._plane.held.bodies += len(body)
            self._plane.held.check()
            await self._plane.serve(self, body)
        except BatonError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(self._take_stop())
        except Exception:  # a bug of ours: the client gets an error, the log the trace
            _log.exception("request %s failed", self.record.request_id)
            self._fail(BatonError("internal error"))
        finally:
            self._close()

    async def _serve_upload(self) -> None:
        plane = self._plane
        upload = self.endpoint.upload(self.exchange, plane.held)
        try:
            await plane.serve_upload(self, upload)
        finally:
            upload.release()
            self.record.bytes_in = upload.received
            plane.held.bodies += upload.received  # for `_close`, which takes that back

    def _admit(self) -> None:
        """Judge the request by its head."""
        exchange, plane = self.exchange, self._plane
        if plane.is_refusing:
            raise ShuttingDown("this server is shutting down: ask again")
        if plane.begin_trace is not None:
            self.record.trace = plane.begin_trace(exchange.headers)
        plane.held.check()
        wanted = exchange.header(b"x-request-timeout")
        if wanted is not None:
            self.deadline = self.record.received + _timeout(wanted, plane.request_timeout_s)
        if plane.keys is not None:
            self.record.client = client = plane.keys.check(
                self.endpoint.credential(exchange), self.endpoint.wanted_key
            )
            if plane.tenants is not None:
                self.account = plane.tenants.open(client)
        method = self.endpoint.method
        if exchange.method != method:
            raise MethodNotAllowed(f"use {method} for {exchange.path}", allow=method)
        content_type = exchange.header(b"content-type")
        if content_type != self.endpoint.media_type:
            self.endpoint.check_content_type(content_type)
        if self.account is not None:
            self.account.check(self.record.received)

    def _close(self) -> None:
        self._task = None
        if self.transcript is not None:
            self.transcript.close()
        self._plane.open.pop(self, None)
        self._plane.held.bodies -= self.record.bytes_in
        self.record.finished = self._plane.time()
        self._plane.telemetry.finish(self.record)
        if self.account is not None:
            self.account.close(self.record)

    # --- being stopped from outside -------------------------------------------------------------

    def stop(self, error: BatonError) -> None:
        """End the request with this error, wherever it is. The first call counts."""
        if self._stop is None and self._task is not None:
            self._stop = error
            self._task.cancel()

    @property
    def is_stopped(self) -> bool:
        """It ends with what `stop` was given, not with an answer."""
        return self._stop is not None

    def _client_left(self) -> None:
        self.stop(ClientGone("the client closed its connection"))

    def _take_stop(self) -> BatonError:
        """Return why this task was cancelled; if it was not by `stop`, the process is ending."""
        if self._stop is None:
            raise asyncio.CancelledError
        if self._task is not None:
            self._task.uncancel()
        return self._stop

    def sweep(self, now: float) -> None:
        """Enforce the deadline of the request and the limits of silence."""
        leg = self._leg
        if self.record.bytes_out != self._seen_bytes:  # cheaper than a look at the clock per event
            self._note_progress(now)
        elif self._is_due(now):
            self._keep_alive(now)
        if not self.has_begun and not self.exchange.is_complete and now > self.deadline:
            seconds = self.deadline - self.record.received
            self.stop(DeadlineExceeded(f"not answered within {seconds:g} s"))
        elif leg is not None and leg.answer is not None:
            if leg.answer.arrivals != leg.seen_arrivals:  # of whatever: a worker that sends comments is well
                leg.seen_arrivals = leg.answer.arrivals
                leg.note_heard(now)
            leg.sweep(now)
            self._sweep_leg(leg, now - leg.heard)

    def _note_progress(self, now: float) -> None:
        """Note that more of a stream has gone out since the last sweep."""
        self._seen_bytes = self.record.bytes_out
        self._sent = now
        if self.transcript is not None:
            self.transcript.reduce_if_due(self.record.bytes_out)

    def _is_due(self, now: float) -> bool:
        """Tell whether the client of a stream has had nothing for so long that it gets a comment."""
        every = self._plane.limits.keepalive_s
        is_open = self.record.is_stream and not (self.is_stopped or self.exchange.is_complete)
        return is_open and 0 < every <= now - self._sent

    def _keep_alive(self, now: float) -> None:
        """Send a comment between two events. All that was sent before are whole events."""
        self._sent = now
        if not self.exchange.is_started:
            self._start_early(_EVENT_STREAM)
        self.exchange.feed(_KEEP_ALIVE)

    def _sweep_leg(self, leg: Leg, silence_s: float) -> None:
        limits = self._plane.limits
        if silence_s > limits.leg_silence_s and not leg.is_in_service:
            leg.lose()
        elif self.has_begun:
            if silence_s > limits.stream_idle_timeout_s:
                self.stop(DeadlineExceeded(f"no progress for {limits.stream_idle_timeout_s:g} s"))
        elif silence_s > limits.first_byte_timeout_s and _answers_piecemeal(self.record, leg):
            self.stop(DeadlineExceeded(f"no answer from a worker for {limits.first_byte_timeout_s:g} s"))

    def bytes_under_way(self) -> int:
        """Count what nobody has read yet of a worker's answer, and what comes in if its server does not."""
        exchange = self.exchange
        incoming = 0 if exchange.is_counted or self.record.bytes_in else exchange.body_size
        answer = self._leg.answer if self._leg is not None else None
        return incoming + (answer.unread if answer is not None else 0)

    def recorded(self) -> RequestRecord:
        """Return the record of the request as far as it has come."""
        trail, leg = self.record.trail, self._leg
        if trail is not None and leg is not None:
            if leg.is_for_client:
                trail.answer_id, trail.decode_sent = leg.id, leg.sent
            else:
                trail.prefill_sent = leg.sent
        return self.record

    # --- what the flow needs --------------------------------------------------------------------

    def now(self) -> float:
        return self._plane.time()

    def watch(self, leg: Leg) -> None:
        """Measure the silence of a leg, once it is sent."""
        self._leg = leg
        self._is_full = False

    def relayed_headers(self) -> bytes:
        """Return those of the client's headers that go to workers (`relay/relayed.py`)."""
        plane = self._plane
        names = plane.relayed
        relayed = [field for field in self.exchange.headers if field[0] in names]
        if self.endpoint.media_type != JSON:  # it says where the parts of a form begin
            relayed += [field for field in self.exchange.headers if field[0] == b"content-type"]
        if plane.begin_trace is not None and self.record.trace is not None:
            return header_block([*without_trace(relayed), *self.record.trace.fields()])
        if not relayed:
            return b""
        if (self.exchange.header(TRACEPARENT) or self.exchange.header(TRACESTATE)) is not None:
            relayed = without_broken_trace(relayed)
        return header_block(relayed)

    def response_headers(self) -> bytes:
        """Return what we say of a worker's answer, as a header block. Times are in milliseconds."""
        record = self.record
        record.first_byte = self._plane.time()
        took = milliseconds(record.first_byte - record.received)
        path, timing = _PATHS[record.path], _server_timing(record)
        block = f"x-process-time: {took}\r\nx-baton-path: {path}\r\nserver-timing: {timing}\r\n".encode()
        return block if self.account is None else block + self._limit_headers()

    def _limit_headers(self) -> bytes:
        """Return what the tenant is told of its limits, as a header block."""
        return b"" if self.account is None else self.account.headers(self._plane.time())

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer."""
        self.record.status = status
        self.record.bytes_out = len(body)
        self.exchange.respond(status, headers, body)

    def begin_stream(self, content_type: bytes) -> None:
        """Note that the answer begins, and send its head unless comments have gone out.

        `content_type` is a header block.
        """
        self.has_begun = True
        if self._leg is not None:
            self._leg.heard = self._plane.time()
        if self.exchange.is_started:
            self.record.first_byte = self._plane.time()
        else:
            self.record.status = 200
            self.exchange.start(200, content_type + self.response_headers() + _STREAM_HEADERS)

    def _start_early(self, content_type: bytes) -> None:
        """Send the head of a stream that has only comments yet: it may still fail, or begin elsewhere."""
        self.record.status = 200
        how = self.response_headers() if self.record.path else self._limit_headers()
        self.record.first_byte = 0.0
        self.exchange.start(200, content_type + how + _STREAM_HEADERS)

    def comment(self, content_type: bytes, comments: bytes) -> None:
        """Send comments of a stream that has not begun, so that nobody takes it for dead. They are dropped
        while the client takes nothing.
        """
        exchange = self.exchange
        if not exchange.is_started:
            self._start_early(content_type)
        if not self._is_full:
            self._is_full = not exchange.feed(comments)
            exchange.on_writable(self._note_writable)
            self._sent = self._plane.time()

    def _note_writable(self) -> None:
        self._is_full = False

    async def forward(self, answer: Answer, opening: bytes, events: Events) -> None:
        """Send the first events, then the rest of a worker's stream as it comes, through `events`.

        The client's pace becomes the worker's: while its connection is full, the worker's is not read. Raises
        what the answer raises.
        """
        self._events = events
        exchange, record, transcript = self.exchange, self.record, self.transcript
        keep = _keep_nothing if transcript is None else transcript.chunks.append

        def sink(chunk: bytes) -> bool:
            data = events.feed(chunk)
            if not data:
                return True
            record.bytes_out += len(data)
            keep(data)
            return exchange.feed(data)

        record.bytes_out += len(opening)
        keep(opening)
        exchange.feed(opening)
        exchange.on_writable(answer.resume)
        await answer.pump(sink)

    def end_stream(self, events: bytes) -> None:
        """Send the last events of a stream, and its end."""
        self.record.bytes_out += len(events)
        self.exchange.finish(events)

    # --- errors ---------------------------------------------------------------------------------

    def _fail(self, error: BatonError) -> None:
        record, exchange = self.record, self.exchange
        if isinstance(error, ClientGone):
            record.error_code = error.code
            record.status = record.status or error.status
            exchange.abort()
        elif exchange.is_started and self._events is not None and self._events.is_done:  # nothing is missing
            if not exchange.is_complete:  # what is wrong behind the last word is no news to the client
                exchange.finish()
        else:
            record.error_code = error.code
            self._tell(error)

    def _tell(self, error: BatonError) -> None:
        exchange = self.exchange
        if not exchange.is_started:
            fields, body = self.endpoint.error(error)
            headers = header_block(fields)
            if self.record.path:
                headers += self.response_headers()
            else:
                headers += self._limit_headers()
            self.respond(error.status, headers, body)
        elif not exchange.is_complete:
            own = None if self._events is None else self._events.failure(error.message)
            exchange.finish(self.endpoint.error_event(error) if own is None else own)


def _answers_piecemeal(record: RequestRecord, leg: Leg) -> bool:
    """Tell whether the first byte comes before the work is done, or the work is a prefill, and short."""
    return record.is_stream or leg.worker.address.role == "prefill"


def _keep_nothing(data: bytes) -> None:
    """Keep nothing of a stream that no other worker could go on with."""


def _timeout(wanted: bytes, most: float) -> float:
    """Read the seconds of a client's header. Raises `ClientError`."""
    try:
        seconds = float(wanted)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ClientError("x-request-timeout must be a positive number of seconds")
    return min(seconds, most)


def _server_timing(record: RequestRecord) -> str:
    """Return the times of queue, prefill and decode to first byte; a prefill that did not end is left out."""
    admitted, prefill_done, trail = record.admitted, record.prefill_done, record.trail
    queue = milliseconds(admitted - record.received)
    decode = milliseconds(record.first_byte - (prefill_done or admitted))
    if not prefill_done:
        if trail is not None:
            trail.told_ms = (queue, "", decode)
        return f"queue;dur={queue}, decode;dur={decode}"
    prefill = milliseconds(prefill_done - admitted)
    if trail is not None:
        trail.told_ms = (queue, prefill, decode)
    return f"queue;dur={queue}, prefill;dur={prefill}, decode;dur={decode}"


def _without_slash(path: str) -> str | None:
    return path.removesuffix("/")


Serve = Callable[[RequestScope, bytes], Awaitable[None]]
ServeUpload = Callable[[RequestScope, Upload], Awaitable[None]]
BeginTrace = Callable[[Sequence[tuple[bytes, bytes]]], TraceContext]


class DataPlane:
    """The data plane answers its requests, and knows which are open."""

    def __init__(
        self,
        serve: Serve,
        serve_upload: ServeUpload,
        endpoints: Mapping[str, Endpoint],
        *,
        limits: LimitsConfig,
        telemetry: Telemetry,
        keys: KeyRing | None,
        time: Callable[[], float],
        relayed: frozenset[bytes],
        entry_of: Callable[[str], str | None] = _without_slash,
        tenants: Tenants | None = None,
    ) -> None:
        """It is to be made inside the running event loop, whose clock `time` is.

        `endpoints` are all paths that requests come to; `entry_of` names the one of a path that has an id in
        it, or a slash behind it. `serve` answers a request through its scope, or raises a `BatonError`;
        `serve_upload` does where the endpoint `takes_uploads`.
        `relayed` are names of header fields: workers get those of the client's. `tenants` have the `keys`.
        """
        self.serve = serve
        self.serve_upload = serve_upload
        self.endpoints = endpoints
        self.entry_of = entry_of
        self.telemetry = telemetry
        self.keys = keys
        self.tenants = tenants
        self.time = time
        self.relayed = relayed
        self.loop = asyncio.get_running_loop()  # kept: before Python 3.12 each look-up is a system call
        self.open: dict[RequestScope, None] = {}  # a set in the order of arrival
        self.held = HeldBytes(limits.max_held_bytes, lambda: telemetry.rejected(RejectReason.MEMORY))
        self.begin_trace: BeginTrace | None = None  # by header fields; None: nothing is traced
        self.is_refusing = False  # new requests: the process is about to end
        self.reconfigure(limits)

    def reconfigure(self, limits: LimitsConfig) -> None:
        """Go by this section from now on. Open requests keep their deadlines, not their limits of silence."""
        self.limits = limits
        self.request_timeout_s = limits.request_timeout_s  # a look at the section for each request costs more
        self.held.most = limits.max_held_bytes

    def handle(self, exchange: Exchange) -> Awaitable[None]:
        """Answer one request (`exchange.Handler`); to be called by the task that awaits it."""
        return RequestScope(self, exchange).run()

    def form_error(self, path: str, error: BatonError) -> ErrorAnswer:
        """Return what tells a client of an error that keeps its request from coming here."""
        name = self.endpoint_of(path)
        if name is None:
            return error_answer(error)
        headers, body = self.endpoints[name].error(error)
        return error.status, headers, body

    def endpoint_of(self, path: str) -> str | None:
        """Return the path in `endpoints` that this one is a spelling of."""
        name = self.entry_of(path) or path
        return name if name in self.endpoints else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve as an ASGI application, for servers that are not ours."""
        async with AsgiExchange(scope, receive, send) as exchange:
            await self.handle(exchange)

    def under_way(self) -> list[RequestRecord]:
        """Return the records of the open requests, as far as these have come."""
        return [scope.recorded() for scope in self.open]

    def end_all(self) -> None:
        """End every open request with an error: its client knows that the answer is not whole."""
        for request in tuple(self.open):
            request.stop(ShuttingDown("this server is shutting down"))

    async def sweep_forever(self) -> None:
        """Enforce deadlines until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.time()
            for request in tuple(self.open):
                request.sweep(now)
            self.note_under_way(sum(request.bytes_under_way() for request in self.open))

    def note_under_way(self, size: int) -> None:
        """Note how many bytes are under way that nobody counts as they come."""
        self.held.answers = size + self.held.unsent()
        self.telemetry.cells[self.telemetry.layout.held_bytes] = self.held.size
