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
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from orchestrator.errors import (
    BatonError,
    BodyTooLarge,
    ClientError,
    Overloaded,
    RequestTimeout,
)
from orchestrator.http.exchange import Exchange, Handler
from orchestrator.http.head import Head, Judge, max_head_bytes, unfinished_error
from orchestrator.http.http_exchange import HttpExchange
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits

logger: Final = logging.getLogger("baton.server")

NO_HANDLERS: Final[Mapping[str, Handler]] = {}
NEVER: Final = float("inf")
ANY_SIZE: Final = sys.maxsize
MAX_STEP = 32 * 1024  # bytes parsed in one turn: at worst (6 bytes per chunk) some 5 ms
# Unparsed bytes; above, reading stops, and with it the notice of a client that leaves.
MAX_HELD: Final = 64 * 1024
MANY_HELD: Final = 64  # reads, before they are joined
MAX_PIPELINED: Final = 64  # requests in one read; the connection closes after the last one taken
LINGER_S = 5.0  # how long to read on after the last answer, so that a reset does not overtake it
# Bytes: over a minute that is a tenth of what a stream of 20 tokens a second needs.
MIN_TAKEN: Final = 16 * 1024
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER


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
        self._judge = Judge(shared.limits)
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
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0  # of the present head, without the read in which it began
        self._feed_bytes = 0  # in the present read
        self._quiet_bytes = 0  # since the last piece of a body: chunk extensions, trailers
        self._began = 0.0  # when the present head or body began; 0.0 until it is known to need a deadline
        self._incoming: HttpExchange | None = None  # whose body is being read
        self._is_upgrade = False  # the parser will stop behind the present head
        self._is_resuming = False  # the parser is being shown a head that we have had
        self._is_deaf = False  # what else comes is thrown away
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
        head = self._head()
        exchange = HttpExchange(self, head, self._refusal(head))
        if head.ends_reading:
            self._is_deaf = True
        self._began = 0.0
        self._quiet_bytes = 0
        self._incoming = exchange
        self._accept(exchange)

    def _head(self) -> Head:
        parser = self._parser
        version = parser.get_http_version()
        keep_alive = version == "1.1" and parser.should_keep_alive()
        if self._max_requests is not None and self._is_last():
            keep_alive = False
        self._is_upgrade = is_upgrade = parser.should_upgrade()
        method = parser.get_method().decode("ascii")
        return Head(method, self._url, version, self._headers, keep_alive, is_upgrade)

    def _refusal(self, head: Head) -> BatonError | None:
        # A head within one small read needs no counting.
        is_small = self._head_bytes == 0 and self._feed_bytes <= self._limits.max_header_bytes
        error = self._judge.refusal(head, is_small)
        if error is None and self._limits.limit_concurrency is not None:
            return self._overload(head, self._limits.limit_concurrency)
        return error

    def _overload(self, head: Head, limit: int) -> BatonError | None:
        if len(self.tasks) < limit or head.target.path in self._limits.unlimited_paths:
            return None
        return Overloaded("too many requests in progress")

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
        if exchange is None or (self._is_upgrade and exchange.head.has_body):
            return
        self._incoming = None
        if self._is_body_unwanted:
            self.resume_reading()  # a client that leaves can only be noticed by reading
        exchange.receive_end()
        if exchange.is_complete:
            self._advance()

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
        return HttpExchange(self, Head(method, self._url, "1.1", headers, keep_alive=False), error)

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
        if self._head_bytes > max_head_bytes(self._limits):
            self._break(self._head_error())
        elif self._active is None and not self._began:
            self._began = self.loop.time()
            self.deadline = self._began + self._limits.header_timeout_s

    def _head_error(self) -> BatonError:
        """Why a head that is not complete is refused."""
        return unfinished_error(self._url, self._head_bytes, self._limits)

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
        handler: Handler | None = self._handlers.get(exchange.head.target.path)
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


def _framing_field(exchange: HttpExchange) -> bytes:
    if exchange.content_length is None:
        return b"transfer-encoding: chunked"
    return b"content-length: %d" % exchange.content_length


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
