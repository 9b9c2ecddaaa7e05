"""The HTTP/1.1 server side: a protocol class for uvicorn with the deadlines and limits that uvicorn lacks.

uvicorn keeps what it does well: sockets, TLS, signals, lifespan, graceful shutdown. The protocol is our own
rather than a subclass of uvicorn's, because nearly every method would differ and none of uvicorn's plain-text
answers may be left reachable; it relies only on what `uvicorn.Server` does with a protocol class.

Time: every connection carries one moment, `deadline`, and one timer per server looks at all of them every
`ServerLimits.sweep_s`. No request and no chunk arms a timer, so deadlines are met with that resolution.

Order: one request of a connection is answered at a time. What a client sends behind a complete request waits,
unparsed, until that one is answered; only what came in the same small read is parsed ahead.

Fairness: a large read is parsed over several turns of the event loop, but for bodies of known length, which
cost next to nothing: thousands of tiny chunks, fields or requests in one read would hold up everybody else.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from orchestrator.config.options import OrchestratorConfig
from orchestrator.errors import (
    BatonError,
    BodyTooLarge,
    ClientError,
    HeadersTooLarge,
    MethodNotAllowed,
    Overloaded,
    RequestTimeout,
    UnsupportedEncoding,
    UriTooLong,
)
from orchestrator.http.exchange import Exchange, Handler
from orchestrator.http.http_exchange import HttpExchange, Target
from orchestrator.http.ids import IdSource
from orchestrator.wire.headers import Fields

logger: Final = logging.getLogger("baton.server")

NO_HANDLERS: Final[Mapping[str, Handler]] = {}
NEVER: Final = float("inf")
ANY_SIZE: Final = sys.maxsize
HTTP_VERSIONS: Final[tuple[str, ...]] = ("1.1", "1.0")
MAX_STEP = 32 * 1024  # bytes parsed in one turn: at worst (6 bytes per chunk) some 5 ms
# Unparsed bytes; above, reading stops, and with it the notice of a client that leaves.
MAX_HELD: Final = 64 * 1024
MANY_HELD: Final = 64  # reads, before they are joined
MAX_PIPELINED: Final = 64  # requests in one read; the connection closes after the last one taken
# Times max_header_bytes: larger heads are not read to their end, so 414 and 431 close then.
HEAD_DRAIN: Final = 4
LINGER_S = 5.0  # how long to read on after the last answer, so that a reset does not overtake it
# Bytes: over a minute that is a tenth of what a stream of 20 tokens a second needs.
MIN_TAKEN: Final = 16 * 1024
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one server. Seconds are met with a resolution of `sweep_s`."""

    header_timeout_s: float = 10.0  # from the first byte to the end of the head; also for a silent new client
    body_idle_timeout_s: float = 10.0  # between two pieces of a body
    body_timeout_s: float = 60.0  # for the body as a whole
    write_timeout_s: float = (
        60.0  # a client that takes less than MIN_TAKEN of what waits in so long is cut off
    )
    max_request_line: int = 16 * 1024  # bytes; more is 414
    max_header_bytes: int = 32 * 1024  # all header fields as sent; more is 431
    max_headers: int = 100  # fields; more is 431
    max_body_bytes: int = 16 * 1024 * 1024  # more is 413
    drain_bytes: int = (
        1024 * 1024
    )  # what is left of a refused body is read up to here, else the connection closes
    limit_concurrency: int | None = None  # requests in progress; more are 503
    unlimited_paths: frozenset[str] = frozenset({"/health"})  # answered above limit_concurrency too
    sweep_s: float = 0.25

    @classmethod
    def of(cls, config: OrchestratorConfig) -> ServerLimits:
        limits = config.limits
        return cls(
            header_timeout_s=limits.header_timeout_s,
            body_idle_timeout_s=limits.body_idle_timeout_s,
            body_timeout_s=limits.body_timeout_s,
            write_timeout_s=limits.client_write_timeout_s,
            max_body_bytes=limits.max_body_bytes,
            limit_concurrency=config.limit_concurrency,
        )


class Protocols:
    """Makes the connections of one server (`uvicorn.Config.http`), and has what they have in common."""

    def __init__(
        self,
        limits: ServerLimits,
        ids: IdSource,
        on_refused: Callable[[BatonError], None] | None = None,
        handlers: Mapping[str, Handler] = NO_HANDLERS,
    ) -> None:
        self.limits = limits
        self.ids = ids
        self.on_refused = on_refused
        self.handlers = handlers
        self.sweep = Sweep(limits.sweep_s)
        self.is_ending = False

    def __call__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpProtocol:
        return HttpProtocol(self, config, server_state, app_state, _loop)

    def close_after_answers(self) -> None:
        """Let every connection, also those to come, end with its next answer; idle ones stay until then."""
        self.is_ending = True
        for connection in self.sweep.open:
            connection.is_ending = True

    def limit(self, limits: ServerLimits) -> None:
        """Bound the connections that are made from now on."""
        self.limits = limits


class Sweep:
    """The one timer of a server. It runs while connections are open."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.open: set[HttpProtocol] = set()
        self._is_armed = False

    def add(self, connection: HttpProtocol) -> None:
        self.open.add(connection)
        if not self._is_armed:
            self._arm(connection.loop)

    def discard(self, connection: HttpProtocol) -> None:
        self.open.discard(connection)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = True
        loop.call_later(self._interval_s, self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = False
        if self.open:
            self._arm(loop)
        now = loop.time()
        for connection in [c for c in self.open if c.deadline <= now]:
            connection.expire(now)


class HttpProtocol:
    """One client connection, an `asyncio.Protocol`. `Protocols` makes it, `uvicorn.Server` shuts it down.

    It reads requests with llhttp in its strict mode, which itself refuses bare LF, obs-fold, NUL, both
    `content-length` and `transfer-encoding`, and malformed lengths and chunks. A client that closes only its
    sending half counts as gone: HTTP clients do not do that, and a closed connection looks the same.
    """

    write: Callable[[bytes], None]  # the transport's, without a call in between
    writelines: Callable[[Iterable[bytes]], None]  # in one system call, without copies

    def __init__(
        self,
        shared: Protocols,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self.loop = _loop or asyncio.get_running_loop()
        self.app_state = app_state  # the lifespan's, copied into each scope
        self.tasks = server_state.tasks  # uvicorn's, of the requests in progress
        self._app = config.loaded_app
        self._server_state = server_state
        self._keep_alive_s: float = cast("Any", config).timeout_keep_alive  # uvicorn asks for whole seconds
        self._max_requests = config.limit_max_requests
        self._sweep = shared.sweep
        self._limits = shared.limits
        self.ids = shared.ids
        self.on_refused = shared.on_refused
        self._handlers = shared.handlers
        self.is_ending = shared.is_ending  # the connection closes behind its next answer

        self.client: tuple[str, int] | None = None
        self.server: tuple[str, int] | None = None
        self.scheme = "http"
        self.deadline = NEVER  # read by the sweep; `expire()` finds out what it was for
        self.is_write_paused = False

        # What is being read
        self._parser = self._new_parser()
        self._in_head = False
        self._url = b""
        self._target = Target.of(b"", b"/", b"")  # the last one, which the next is likely to equal
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0  # of the present head, without the read in which it began
        self._feed_bytes = 0  # in the present read
        self._quiet_bytes = 0  # since the last piece of a body: chunk extensions, trailers
        self._began = 0.0  # when the present head or body began; 0.0 until it is known to need a deadline
        self._incoming: HttpExchange | None = None  # whose body is being read
        self._is_upgrade = False  # the parser will stop behind the present head
        self._is_resuming = False  # the parser is being shown a head that we have had
        self._is_deaf = False  # what else comes is thrown away
        self._host: bytes | None = None  # the last one found to be valid
        self._is_body_unwanted = False  # for the time being
        self._is_read_paused = False
        self._paused_at = 0.0

        # What is being answered
        self._active: HttpExchange | None = None
        self._queue: deque[HttpExchange] = deque()
        self._held: deque[bytes | memoryview] = deque()  # unparsed
        self._held_bytes = 0
        self._is_next_due = False
        self._is_closing = False
        self._is_lost = False
        self._unsent_before = ANY_SIZE  # bytes, when the sweep last looked

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # Data behind a request that ends the connection is ignored, not an error in the middle of the answer.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.write = self._transport.write
        self.writelines = self._transport.writelines
        self.client = _address(transport.get_extra_info("peername"))
        self.server = _address(transport.get_extra_info("sockname"))
        if transport.get_extra_info("sslcontext"):
            self.scheme = "https"
        # uvicorn types the set by its own protocols; it calls nothing but shutdown().
        self._server_state.connections.add(cast("Any", self))
        self.deadline = self.loop.time() + self._limits.header_timeout_s
        self._sweep.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._server_state.connections.discard(cast("Any", self))
        self._sweep.discard(self)
        self._leave()
        self._parser = None

    def eof_received(self) -> None:
        self._is_deaf = True
        self._is_closing = True
        self._watch_writes()
        self._leave()  # the transport closes by itself, once what was written is sent

    def _leave(self) -> None:
        active, self._active = self._active, None
        self._forget_pending()
        self._incoming = None
        if active is not None:
            active.leave()

    def _forget_pending(self) -> None:
        """What was sent behind the active request will not be served."""
        self._queue.clear()
        self._held.clear()
        self._held_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        active = self._active
        if self._held or (active is not None and active.is_received):
            self._hold(data)
            self._set_reading()
        elif len(data) > MAX_STEP:
            self._hold(data)
            self._feed_held()
        else:
            self._feed(data)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def pause_writing(self) -> None:
        self.is_write_paused = True
        self._watch_writes()

    def resume_writing(self) -> None:
        self.is_write_paused = False
        if self._active is not None:
            self._active.writable()
        elif not self._is_closing:
            self._rest()

    # --- the server's side

    @property
    def is_busy(self) -> bool:
        """A request is in progress, or a part of its answer is still to be sent."""
        return self._active is not None or self._transport.get_write_buffer_size() > 0

    def shutdown(self) -> None:
        """Close as soon as the request in progress is answered."""
        self.is_ending = True
        active = self._active
        if self._is_closing:
            self._transport.abort()
        elif active is None or active.is_complete:
            self._close()

    # --- the parser's side

    def _feed(self, data: bytes | memoryview) -> None:
        self._feed_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._on_parser_error(error)
        if self._in_head or self._incoming is not None:
            self._await_more()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._url = b""
        self._headers = []
        self._head_bytes = 0
        self._began = 0.0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer: ignored
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._is_deaf or self._is_resuming:
            return
        parser = self._parser
        exchange = HttpExchange(self, parser.get_method().decode("ascii"), self._headers)
        exchange.http_version = version = parser.get_http_version()
        exchange.keep_alive = version == "1.1" and parser.should_keep_alive()
        if self._max_requests is not None and self._is_last():
            exchange.keep_alive = False
        self._is_upgrade = parser.should_upgrade()
        exchange.refusal = self._refusal(exchange)
        self._began = 0.0
        self._quiet_bytes = 0
        self._incoming = exchange
        self._accept(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self._incoming
        if exchange is None:
            return
        self._quiet_bytes = 0
        exchange.body_size += len(body)
        if exchange.body_size > self._limits.max_body_bytes:
            self._on_large_body(exchange)
        exchange.take(body)

    def on_message_complete(self) -> None:
        exchange = self._incoming
        if exchange is None or (self._is_upgrade and exchange.has_body):
            return
        self._incoming = None
        if self._is_body_unwanted:
            self.resume_reading()  # a client that leaves can only be noticed by reading
        exchange.receive_end()
        if exchange.is_complete:
            self._advance()

    # --- judging a request

    def _refusal(self, exchange: HttpExchange) -> BatonError | None:
        """Why a request is refused by its head alone. Sets what else the head says."""
        error = self._size_error(exchange) or self._framing_error(exchange) or self._content_error(exchange)
        if error is None and self._limits.limit_concurrency is not None:
            return self._overload(exchange, self._limits.limit_concurrency)
        return error

    def _size_error(self, exchange: HttpExchange) -> BatonError | None:
        limits = self._limits
        # A head within one small read needs no counting.
        is_small = self._head_bytes == 0 and self._feed_bytes <= limits.max_header_bytes
        size = 0 if is_small else _size_of(exchange.headers)
        error: BatonError | None = None
        if len(exchange.method) + len(self._url) + len("  HTTP/1.1") > limits.max_request_line:
            error = self._uri_too_long()
        elif size > limits.max_header_bytes or len(exchange.headers) > limits.max_headers:
            error = self._headers_too_large()
        if error is not None and size + len(self._url) > self._max_head_bytes():
            return self._end_with(exchange, error)
        return error

    def _max_head_bytes(self) -> int:
        return HEAD_DRAIN * self._limits.max_header_bytes

    def _uri_too_long(self) -> BatonError:
        return UriTooLong(f"the request line is over {self._limits.max_request_line} bytes")

    def _headers_too_large(self) -> BatonError:
        limits = self._limits
        return HeadersTooLarge(
            f"the headers are over {limits.max_header_bytes} bytes or {limits.max_headers} fields"
        )

    def _framing_error(self, exchange: HttpExchange) -> BatonError | None:
        """What leaves in doubt where the request ends: nothing behind it can be understood."""
        fields = exchange.fields
        if exchange.http_version not in HTTP_VERSIONS:
            return self._end_with(exchange, ClientError("only HTTP/1.1 and HTTP/1.0 are served"))
        coding = fields.get(b"transfer-encoding")
        length = fields.get(b"content-length")
        if coding is not None:
            if coding.strip().lower() != b"chunked" or exchange.http_version == "1.0" or length is not None:
                return self._end_with(exchange, ClientError("unacceptable transfer-encoding"))
            exchange.has_body = True
        elif length is not None:
            exchange.content_length = int(length)  # digits only: the parser has seen to that
            exchange.has_body = exchange.content_length > 0
        if b"expect" in fields and exchange.has_body and exchange.http_version == "1.1":
            exchange.awaits_continue = fields[b"expect"].strip().lower() == b"100-continue"
        if self._is_upgrade and exchange.method == "CONNECT":
            return self._end_with(exchange, MethodNotAllowed("this is not a proxy"))
        return None

    def _end_with(self, exchange: HttpExchange, error: BatonError) -> BatonError:
        """Nothing behind this request is read."""
        exchange.keep_alive = False
        self._is_deaf = True
        return error

    def _content_error(self, exchange: HttpExchange) -> BatonError | None:
        fields = exchange.fields
        host = fields.get(b"host")
        if host is None or host != self._host or len(fields) != len(exchange.headers):
            error = self._host_error(exchange, host)
            if error is not None:
                return error
        if self._url != self._target.url:
            target = _parse_target(exchange.method, self._url)
            if target is None:
                return ClientError("invalid request target")
            self._target = target
        exchange.target = self._target
        return self._body_error(exchange) if exchange.has_body else None

    def _body_error(self, exchange: HttpExchange) -> BatonError | None:
        limits, size = self._limits, exchange.content_length or 0
        if size > limits.max_body_bytes:
            error = BodyTooLarge(f"the body is over {limits.max_body_bytes} bytes")
            return self._end_with(exchange, error) if size > limits.drain_bytes else error
        if b"content-encoding" in exchange.fields and _is_encoded(exchange.headers):
            return UnsupportedEncoding("send the body without content-encoding")
        return None

    def _host_error(self, exchange: HttpExchange, host: bytes | None) -> BatonError | None:
        if host is None:
            # HTTP/1.0 knows no Host, and some load balancers probe with it.
            return None if exchange.http_version == "1.0" else ClientError("the Host header is missing")
        if sum(name == b"host" for name, _ in exchange.headers) > 1:
            return ClientError("there is more than one Host header")
        if not _is_valid_host(host.rstrip(b" \t")):
            return ClientError("the Host header is invalid")
        self._host = host
        return None

    def _overload(self, exchange: HttpExchange, limit: int) -> BatonError | None:
        if len(self.tasks) < limit or exchange.path in self._limits.unlimited_paths:
            return None
        return Overloaded("too many requests in progress")

    # --- reading

    def _decline_upgrade(self, rest: bytes | memoryview) -> None:
        """The parser stopped behind a head that offers another protocol; go on with HTTP/1.1.

        Java's client offers h2c with every first request. llhttp takes such a request to have no body, so
        one that has gets a new parser, which is shown only how the body is framed.
        """
        if self._is_deaf:
            return
        self._is_upgrade = False
        if self._incoming is not None:
            self._parser = self._new_parser()
            self._is_resuming = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % _framing_field(self._incoming))
            self._is_resuming = False
        if rest:
            self._feed(rest)

    def _on_parser_error(self, error: httptools.HttpParserError) -> None:
        if self._is_deaf:
            return
        if isinstance(error, httptools.HttpParserCallbackError):
            logger.error("a parser callback failed", exc_info=error)
            self._break(BatonError("internal error"))
        else:
            self._break(ClientError(f"malformed HTTP request: {error}"))

    def _break(self, error: BatonError) -> None:
        """Nothing more of what comes can be read: answer with `error` in its turn, and close."""
        incoming, headers = self._incoming, self._headers if self._in_head else []
        self._is_deaf = True
        self._in_head = False
        self._incoming = None
        if incoming is None:
            self._accept(self._unread_exchange(error, headers))
            return
        incoming.keep_alive = False
        incoming.fail(error)
        if incoming.is_complete:
            self._linger()

    def _unread_exchange(self, error: BatonError, headers: list[tuple[bytes, bytes]]) -> HttpExchange:
        method = self._parser.get_method().decode("ascii") if self._url else ""
        exchange = HttpExchange(self, method, headers)
        exchange.refusal = error
        exchange.keep_alive = False
        return exchange

    def _on_large_body(self, exchange: HttpExchange) -> None:
        """A chunked body is over the limit: refuse it, and read it to its end if that is near."""
        limits = self._limits
        if not (exchange.is_complete or exchange.is_discarding):
            exchange.fail(BodyTooLarge(f"the body is over {limits.max_body_bytes} bytes"))
        if exchange.body_size > limits.max_body_bytes + limits.drain_bytes:
            self._break(BodyTooLarge("the body has no end"))

    def _await_more(self) -> None:
        """A read ended within a request: see to its deadline and to what is not counted elsewhere."""
        if self._in_head:
            self._await_head()
        elif self._incoming is self._active:
            self._await_body()

    def _await_head(self) -> None:
        if self._head_bytes > self._max_head_bytes():
            self._break(self._head_error())
        elif self._active is None and not self._began:
            self._began = self.loop.time()
            self.deadline = self._began + self._limits.header_timeout_s

    def _head_error(self) -> BatonError:
        """Why a head that is not complete is refused."""
        limits = self._limits
        if len(self._url) > limits.max_request_line:
            return self._uri_too_long()
        if self._head_bytes > limits.max_header_bytes:
            return self._headers_too_large()
        return RequestTimeout(f"the request's head took over {limits.header_timeout_s:g} s")

    def _await_body(self) -> None:
        if self._quiet_bytes > self._limits.max_header_bytes:
            self._break(ClientError("chunk extensions or trailers are too long"))
            return
        now = self.loop.time()
        self._began = self._began or now
        self.deadline = min(now + self._limits.body_idle_timeout_s, self._began + self._limits.body_timeout_s)

    def restart_body_clock(self) -> None:
        """Only now does the client know that it may send the body."""
        self._began = 0.0
        self._await_body()

    def pause_reading(self) -> None:
        self._is_body_unwanted = True
        self._set_reading()

    def resume_reading(self) -> None:
        self._is_body_unwanted = False
        self._set_reading()

    def _set_reading(self) -> None:
        """Read on, or not, as the application and what is held say."""
        pause = self._is_body_unwanted or self._held_bytes > MAX_HELD
        if pause == self._is_read_paused or self._transport.is_closing():
            return
        self._is_read_paused = pause
        if pause:
            self._paused_at = self.loop.time()
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
            self._forgive_pause()

    def _forgive_pause(self) -> None:
        """The time that passed while we did not read was not the client's."""
        if self._incoming is not None and self._incoming is self._active:
            self._began += self.loop.time() - self._paused_at
            self._await_body()

    def _feed_held(self) -> None:
        """Parse what is held, as far as it may be in this turn of the loop."""
        if len(self._held) > MANY_HELD:
            self._held = deque([b"".join(self._held)])
        may_step = True
        while self._held and not self._is_answering() and not self._is_deaf:
            size = self._known_size()
            if size is None:
                if not may_step:
                    break
                may_step = False
                size = self._step(self._held[0])
            self._feed(self._take_held(size))
        self._set_reading()
        if self._held and not self._is_answering():
            self._schedule()

    def _take_held(self, size: int) -> bytes | memoryview:
        """At most `size` bytes of what is held."""
        data = self._held.popleft()
        if len(data) > size:
            self._held.appendleft(memoryview(data)[size:])
            data = memoryview(data)[:size]
        self._held_bytes -= len(data)
        return data

    def _is_answering(self) -> bool:
        """Nothing more is read before the active request is answered."""
        return self._active is not None and self._active.is_received

    def _known_size(self) -> int | None:
        """How much is missing of a body whose length is known."""
        exchange = self._incoming
        if exchange is None or exchange.content_length is None:
            return None
        return exchange.content_length - exchange.body_size

    def _step(self, data: bytes | memoryview) -> int:
        """Up to the end of a head, so that a body behind it can be parsed as what it is."""
        if self._in_head or self._incoming is not None:
            return MAX_STEP
        end = bytes(data[:MAX_STEP]).find(b"\r\n\r\n")
        return end + 4 if end >= 0 else MAX_STEP

    # --- answering

    def _accept(self, exchange: HttpExchange) -> None:
        if self._active is None:
            self._start(exchange)
        elif len(self._queue) < MAX_PIPELINED:
            self._queue.append(exchange)
        else:
            self._queue[-1].keep_alive = False
            self._is_deaf = True
            self._incoming = None

    def _start(self, exchange: HttpExchange) -> None:
        self._active = exchange
        if exchange.refusal is not None:
            exchange.discard_body()
            exchange.refuse(exchange.refusal)
            return
        handler: Handler | None = self._handlers.get(exchange.target.path)
        # Not by `create_task`: it makes up a name for each, which nobody reads.
        exchange.task = task = asyncio.Task(
            exchange.run(handler or self._serve_asgi), loop=self.loop, name="request"
        )
        self.tasks.add(task)

    async def _serve_asgi(self, exchange: Exchange) -> None:
        own = cast("HttpExchange", exchange)
        await self._app(own.scope(), own.receive, own.send)

    def _is_last(self) -> bool:
        """uvicorn is about to stop at `limit_max_requests`.

        Early enough for every open connection to be told so with an answer before uvicorn closes them.
        """
        state = self._server_state
        return state.total_requests + len(state.connections) >= cast("int", self._max_requests)

    def answered(self, exchange: HttpExchange) -> None:
        """The active exchange has its whole answer."""
        self._server_state.total_requests += 1
        if not exchange.keep_alive or self.is_ending:
            self._end(exchange)
        elif exchange.is_received:
            self._advance()
        else:
            exchange.discard_body()
            self.resume_reading()

    def _advance(self) -> None:
        """The active exchange is over on both sides."""
        if self._queue or self._held:
            self._schedule()
        else:
            self._rest()

    def _schedule(self) -> None:
        if not self._is_next_due:
            self._is_next_due = True
            self.loop.call_soon(self._next)

    def _next(self) -> None:
        """Go on with what has arrived already: the next request, or more of the present one."""
        self._is_next_due = False
        if self._is_lost or self._is_closing:
            return
        active = self._active
        if active is not None and active.is_complete and active.is_received:
            self._start_next()
        if self._held:
            self._feed_held()

    def _start_next(self) -> None:
        if not self._queue:
            self._rest()
            return
        self._start(self._queue.popleft())
        if self._incoming is not None and self._incoming is self._active:
            self._await_body()

    def _rest(self) -> None:
        """No request is in progress."""
        self._active = None
        if self.is_write_paused:
            self._watch_writes()
            return
        now = self.loop.time()
        if self._in_head:
            self._began = now
            self.deadline = now + self._limits.header_timeout_s
        else:
            self.deadline = now + self._keep_alive_s

    # --- ending

    def _end(self, exchange: HttpExchange) -> None:
        self._forget_pending()
        if exchange.is_received and not self._is_deaf:
            self._close()
        else:
            self._linger()

    def _close(self) -> None:
        self._is_deaf = True
        self._is_closing = True
        self._watch_writes()
        self._transport.close()

    def _linger(self) -> None:
        """Close behind the answer, but read on for a while.

        Closing a socket with unread data sends a reset, and that may destroy the answer on its way.
        """
        self._is_deaf = True
        self._is_closing = True
        self._incoming = None
        self.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._unsent_before = ANY_SIZE
        self.deadline = self.loop.time() + LINGER_S

    def cut(self, *, resets: bool) -> None:
        """Close at once; with a reset if a plain end of the connection would look like that of the answer."""
        self._is_deaf = True
        self._is_closing = True
        if resets:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._transport.abort()

    # --- the sweep's side

    def expire(self, now: float) -> None:
        """`deadline` has passed. It may be left over from an earlier phase."""
        active = self._active
        if self._is_closing or (self.is_write_paused and (active is None or active is not self._incoming)):
            self._check_progress(now)
        elif active is None:
            self._expire_idle()
        elif active is self._incoming and not (self._is_read_paused or active.awaits_continue):
            self._break(RequestTimeout("the request's body came too slowly"))
        else:
            self.deadline = NEVER

    def _expire_idle(self) -> None:
        if self._in_head:
            self._break(self._head_error())
        else:
            self._close()

    def _watch_writes(self) -> None:
        self._unsent_before = self._unsent()
        self.deadline = self.loop.time() + self._limits.write_timeout_s

    def _check_progress(self, now: float) -> None:
        """Cut a client off that takes too little of what is written to it; nothing is written meanwhile."""
        unsent = self._unsent()
        taken = self._unsent_before - unsent
        if self._is_closing and not self._transport.get_write_buffer_size():
            self._transport.abort()  # the kernel goes on sending
        elif taken < MIN_TAKEN:
            logger.info("%s is cut off: it took %d bytes, and %d wait", self.client, max(0, taken), unsent)
            self.cut(resets=True)  # or the kernel would keep what it has, for as long as the client likes
        else:
            self._unsent_before = unsent
            self.deadline = now + self._limits.write_timeout_s

    def _unsent(self) -> int:
        """Bytes that the client has not taken: here and in the kernel, which takes them from here in large
        steps, however evenly they leave."""
        return self._transport.get_write_buffer_size() + _unacknowledged(self._transport)


# --- helpers --------------------------------------------------------------------------------------

# RFC 3986: an IP literal in brackets, or a name or IPv4 address; then perhaps a port.
_match_host: Final = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"
).fullmatch


def _is_valid_host(host: bytes) -> bool:
    return _match_host(host) is not None


def _size_of(headers: Fields) -> int:
    """As sent, with one space behind the colon."""
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers)


def _is_encoded(headers: Fields) -> bool:
    return any(value.strip().lower() != b"identity" for name, value in headers if name == b"content-encoding")


def _framing_field(exchange: HttpExchange) -> bytes:
    if exchange.content_length is None:
        return b"transfer-encoding: chunked"
    return b"content-length: %d" % exchange.content_length


def _parse_target(method: str, url: bytes) -> Target | None:
    """None if there is no path to be had from `url`."""
    if url.startswith(b"/"):
        path, _, query = url.partition(b"#")[0].partition(b"?")
        return Target.of(url, path, query)
    if url == b"*":
        return Target.of(url, url, b"") if method == "OPTIONS" else None
    try:
        parsed = httptools.parse_url(url)  # the absolute form that is sent to proxies
    except httptools.HttpParserInvalidURLError:
        return None
    return Target.of(url, parsed.path or b"/", parsed.query or b"")


def _unacknowledged(transport: asyncio.BaseTransport) -> int:
    """Bytes in the kernel's send buffer; 0 where it does not tell."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)


def _address(name: object) -> tuple[str, int] | None:
    """Host and port of a socket's name; None for Unix sockets."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
