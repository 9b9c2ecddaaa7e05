"""The real transport is a pool of HTTP/1.1 connections on httptools and the event loop's transports.

A leg takes an idle connection or opens one, writes the request in one go, and is then driven by the
connection's read callback alone. A finished answer puts its connection back before the reader sees the end.
"""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401  # for host names; it cannot be read any more when descriptors are used up
import functools
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, cast

from httptools import HttpParserError, HttpResponseParser

from orchestrator.errors import (
    BatonError,
    OutOfResources,
    WorkerCutShort,
    WorkerError,
    WorkerGarbage,
    WorkerUnreachable,
)
from orchestrator.transport.base import Answer, Origin, Part, Sending, Upstream, UpstreamStats, host_header
from orchestrator.transport.shortage import is_shortage

# So many bytes in a row may be no body: a head, informational heads, trailers, chunk extensions.
MAX_OVERHEAD: Final = 64 * 1024

# Measured on uvloop: joining and writing once costs less than a vectored write up to 32 KiB (10 us and 12 us
# there), and more from 64 KiB on (75 us and 50 us at 256 KiB).
_JOIN_LIMIT: Final = 32 * 1024

# Request lines kept per origin. There are few; a caller that puts values into targets must not fill memory.
_MAX_REQUEST_LINES: Final = 64

_FIRST_BYTE: Final = ord("H")  # of an answer

_REFUSED: Final = 300  # statuses from here on: the worker does not want the request

_NOTHING: Final[list[Part]] = []  # what is kept of a request that was answered

_TLS_SHUTDOWN_S: Final = 1.0  # for a worker that does not answer TLS's goodbye


Connect = Callable[..., Coroutine[Any, Any, tuple[asyncio.BaseTransport, Any]]]


class PooledUpstream(Upstream):
    """It is `base.Upstream` on sockets.

    Connections are kept alive between legs, without a limit to their number, the last used first.

    `connect_timeout_s` covers name resolution, TCP and TLS. `idle_limit_s` must be below the worker's own
    keep-alive time (5 s in uvicorn and vLLM): an idle connection older than that is never used.
    """

    def __init__(
        self, *, connect_timeout_s: float = 5.0, idle_limit_s: float = 4.0, connect: Connect | None = None
    ) -> None:
        """`connect` does what the event loop's `create_connection` does, which it replaces."""
        self._connect = connect
        self.connect_timeout_s: Final = connect_timeout_s
        self._idle_limit_s = idle_limit_s
        self._pools: dict[Origin, _OriginPool] = {}  # one per worker ever seen
        self._connections: set[_Connection] = set()  # every open one
        self._sweeper: asyncio.TimerHandle | None = None  # runs while anything is idle
        self._is_closed = False
        self._all_closed: asyncio.Future[None] | None = None
        self._connects = 0
        self._reuses = 0
        self._retries = 0

    def __repr__(self) -> str:
        return f"<PooledUpstream {self.stats()}>"

    # --- base.Upstream --------------------------------------------------------------------------

    async def send(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: bytes,
        body: Sequence[Part],
    ) -> Answer:
        pool = self._pools.get(origin) or self._add_pool(origin)
        message = pool.message(method, target, headers, body)
        answer = _PooledAnswer(self, pool, message, method == "HEAD")
        connection = self._take_idle(pool) or await self.connect(pool)
        connection.carry(answer, message)
        if connection.is_write_held:
            await self._drain(answer)
        return answer

    async def open(
        self, origin: Origin, method: str, target: str, headers: bytes, size: int | None
    ) -> Sending:
        pool = self._pools.get(origin) or self._add_pool(origin)
        opening = pool.opening(method, target, headers, size)
        answer = _PooledAnswer(self, pool, _NOTHING, method == "HEAD")
        connection = await self.connect(pool)
        connection.carry(answer, [opening])
        connection.is_reusable = False  # before the body is whole
        return _PooledSending(answer, is_chunked=size is None)

    def stats(self) -> UpstreamStats:
        busy = sum(connection.is_busy for connection in self._connections)
        idle = sum(connection.is_idle for connection in self._connections)
        return UpstreamStats(idle, busy, self._connects, self._reuses, self._retries)

    async def aclose(self) -> None:
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._connections and self._all_closed is None:
            self._all_closed = asyncio.get_running_loop().create_future()
        for connection in list(self._connections):
            connection.end(WorkerCutShort("the orchestrator is stopping"))
        if self._all_closed is not None:
            await asyncio.shield(self._all_closed)

    # --- for connections and answers ------------------------------------------------------------

    async def connect(self, pool: _OriginPool) -> _Connection:
        """Open a fresh connection. Raises as `dial()` does."""
        dialled = await self.dial(pool.origin, functools.partial(_Connection, self, pool, pool.loop))
        connection = cast(_Connection, dialled)
        if self._is_closed:
            connection.close()
        if not connection.is_reusable:
            raise WorkerUnreachable("the worker closed a fresh connection")
        # Not in connection_made(): uvloop calls that without connection_lost() if cancelled late.
        self._connections.add(connection)
        self._connects += 1
        return connection

    async def dial(self, origin: Origin, make: Callable[[], Any]) -> Any:
        """Connect to an origin; return what `make` makes, an `asyncio.Protocol`, which is the caller's.

        Raises `WorkerUnreachable`, or `OutOfResources` if the fault is ours; the cause says where to and why.
        """
        if self._is_closed:
            raise WorkerUnreachable("the orchestrator is stopping")
        failure: OSError | UnicodeError | None = None
        try:
            return await self._open(origin, make)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be a host name
            failure = error
        return await self._open_again(origin, make, failure)

    def removed(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._all_closed is not None and not self._all_closed.done():
            self._all_closed.set_result(None)

    def put_back(self, connection: _Connection, loop: asyncio.AbstractEventLoop) -> None:
        connection.idle_since = loop.time()
        connection.pool.idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_limit_s / 2, self._sweep, loop)

    def count_retry(self) -> None:
        self._retries += 1

    # --- inside ---------------------------------------------------------------------------------

    def _add_pool(self, origin: Origin) -> _OriginPool:
        return self._pools.setdefault(origin, _OriginPool(origin))

    def _take_idle(self, pool: _OriginPool) -> _Connection | None:
        """Take the connection that became idle last, unless even that one is too old or closed."""
        if not pool.idle:
            return None
        oldest = pool.loop.time() - self._idle_limit_s
        while pool.idle:
            connection = pool.idle.pop()
            if connection.is_reusable and connection.idle_since > oldest:
                self._reuses += 1
                return connection
            connection.close()
        return None

    async def _drain(self, answer: _PooledAnswer) -> None:
        try:
            await answer.wait_written()
        except BaseException:
            answer.abort()
            raise

    async def _open(self, origin: Origin, make: Callable[[], Any]) -> Any:
        tls = origin.tls
        async with asyncio.timeout(self.connect_timeout_s):
            create_connection: Connect = self._connect or asyncio.get_running_loop().create_connection
            _, connection = await create_connection(
                make,
                origin.host,
                origin.port,
                ssl=tls,
                server_hostname=origin.host if tls else None,
                ssl_shutdown_timeout=_TLS_SHUTDOWN_S if tls else None,
            )
        return connection

    async def _open_again(
        self, origin: Origin, make: Callable[[], Any], failure: OSError | UnicodeError
    ) -> Any:
        """Open a connection after all, if idle ones had what was lacking. Raises as `dial` does."""
        if not (is_shortage(failure) and self._close_idle()):
            raise _no_connection(origin, failure)
        await asyncio.sleep(0)  # for the descriptors to be closed
        try:
            return await self._open(origin, make)
        except (OSError, UnicodeError) as error:
            raise _no_connection(origin, error) from error

    def _close_idle(self) -> bool:
        """Close all idle connections; return whether there was one."""
        idle = [connection for pool in self._pools.values() for connection in pool.idle]
        for pool in self._pools.values():
            pool.idle.clear()
        for connection in idle:
            connection.close()
        return bool(idle)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long; once for all connections."""
        for pool in self._pools.values():
            pool.sweep(self._idle_limit_s)
        is_any_idle = any(pool.idle for pool in self._pools.values())
        self._sweeper = loop.call_later(self._idle_limit_s / 2, self._sweep, loop) if is_any_idle else None


class _OriginPool:
    """One origin has its idle connections here, oldest first, and how requests to it begin."""

    __slots__ = ("_host", "_request_lines", "idle", "loop", "origin")

    def __init__(self, origin: Origin) -> None:
        self.loop = asyncio.get_running_loop()  # kept: before Python 3.12 each look-up is a system call
        self.origin = origin
        self.idle: list[_Connection] = []
        self._host = host_header(origin)
        self._request_lines: dict[tuple[str, str], bytes] = {}

    def sweep(self, idle_limit_s: float) -> None:
        idle, self.idle = self.idle, []
        for connection in idle:
            if connection.is_fresh(idle_limit_s):
                self.idle.append(connection)
            else:
                connection.close()

    def message(self, method: str, target: str, headers: bytes, body: Sequence[Part]) -> list[Part]:
        """Return the request in parts, one if it is small."""
        line = self._request_lines.get((method, target)) or self._add_request_line(method, target)
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        length = f"content-length: {size}\r\n\r\n".encode()
        if size <= _JOIN_LIMIT:
            content = body[0] if len(body) == 1 else b"".join(body)
            return [b"".join((line, headers, length, content))]
        return [b"".join((line, headers, length)), *body]

    def opening(self, method: str, target: str, headers: bytes, size: int | None) -> bytes:
        """Return the head of a request whose body follows."""
        line = self._request_lines.get((method, target)) or self._add_request_line(method, target)
        framing = "transfer-encoding: chunked" if size is None else f"content-length: {size}"
        return b"".join((line, headers, framing.encode(), b"\r\n\r\n"))

    def _add_request_line(self, method: str, target: str) -> bytes:
        """Make and keep a request line. Raises `ValueError` if there is a line break in it."""
        if len(self._request_lines) >= _MAX_REQUEST_LINES:
            self._request_lines.clear()
        line = f"{method} {target} HTTP/1.1\r\nhost: {self._host}\r\n".encode("ascii")
        if line.count(b"\n") != 2 or line.count(b"\r") != 2:
            raise ValueError("a line break in a method or target")
        self._request_lines[method, target] = line
        return line


class _PooledAnswer(Answer):
    """It is an answer and the connection that it comes on, until it is complete.

    It keeps the request until the first byte of the answer, for the one retry that a reused connection may
    need.
    """

    __slots__ = ("_has_left", "_message", "_pool", "_upstream", "connection", "is_head")

    def __init__(
        self, upstream: PooledUpstream, pool: _OriginPool, message: list[Part], is_head: bool
    ) -> None:
        super().__init__(pool.loop)
        self.is_head = is_head  # an answer to HEAD: no body, whatever its headers say
        self.connection: _Connection | None = None  # set and cleared by the connection
        self._upstream = upstream
        self._pool = pool
        self._message = message
        self._has_left = False  # the worker was told that nobody wants the answer: it is not asked again

    async def wait_written(self) -> None:
        """Wait until the request is written, or something else happened that `head()` will tell."""
        while self.connection is not None and self.connection.is_write_held and not self.status:
            await self._news(0)

    def news(self) -> asyncio.Future[None]:
        """Return a future that is done when something has happened: more is written, or has come."""
        return self._news(0)

    # --- for the connection ---------------------------------------------------------------------

    def begin(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._message = _NOTHING
        self.status = status
        self.headers = headers

    def written(self) -> None:
        self._wake()

    def lost(self, error: Exception | None, *, may_retry: bool) -> None:
        self.connection = None
        if may_retry and not self._has_left:
            self._is_stale = True
            self._wake()
        else:
            self.fail(cut_short(error, has_head=bool(self.status)))

    # --- inside ---------------------------------------------------------------------------------

    async def _ask_again(self) -> None:
        try:
            connection = await self._upstream.connect(self._pool)
        except WorkerUnreachable as error:
            # The first connection has carried the request: the worker may have seen it.
            self.fail(cut_short(error, has_head=False))
            return
        except OutOfResources as shortage:
            self.fail(shortage)
            return
        if self._error is not None:  # given up meanwhile
            connection.close()
            return
        self._is_stale = False
        self._upstream.count_retry()
        connection.carry(self, self._message)

    def _pause_reading(self) -> None:
        if self.connection is not None:
            self.connection.pause_reading()

    def _resume_reading(self) -> None:
        if self.connection is not None:
            self.connection.resume_reading()

    def _close_sending(self) -> None:
        self._has_left = True
        if self.connection is not None:
            self.connection.close_sending()
        elif self._is_stale:
            self._is_stale = False
            self.fail(cut_short(None, has_head=False))

    def _drop(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


class _PooledSending(Sending):
    """It writes to the connection of an answer for as long as that has one."""

    __slots__ = ("_is_chunked", "_pooled", "answer")

    def __init__(self, answer: _PooledAnswer, *, is_chunked: bool) -> None:
        self.answer = answer
        self._pooled = answer
        self._is_chunked = is_chunked

    @property
    def is_full(self) -> bool:
        connection = self._pooled.connection
        return connection is not None and connection.is_write_held

    @property
    def is_over(self) -> bool:
        return self._pooled.connection is None or self._pooled.status >= _REFUSED

    def write(self, piece: Part) -> None:
        connection = self._pooled.connection
        if connection is None:
            return
        if self._is_chunked:
            connection.write([b"%x\r\n" % len(piece), piece, b"\r\n"])
        else:
            connection.write([piece])

    def end(self) -> None:
        connection = self._pooled.connection
        if connection is None:
            return
        if self._is_chunked:
            connection.write([b"0\r\n\r\n"])
        if not self._pooled.status:
            connection.is_reusable = True

    async def wait(self) -> None:
        if self._pooled.connection is not None:
            await self._pooled.news()

    def wake(self) -> None:
        self._pooled.written()


class _Connection:
    """A connection is one socket, an `asyncio.Protocol`: idle, or busy with one answer."""

    __slots__ = (
        "_answer",
        "_fields",
        "_has_received",
        "_is_done",
        "_is_read_held",
        "_is_until_close",
        "_legs",
        "_loop",
        "_overhead",
        "_parser",
        "_pieces",
        "_transport",
        "_upstream",
        "idle_since",
        "is_reusable",
        "is_write_held",
        "on_body",
        "on_header",
        "pool",
    )

    _transport: asyncio.Transport

    def __init__(self, upstream: PooledUpstream, pool: _OriginPool, loop: asyncio.AbstractEventLoop) -> None:
        self.pool = pool
        self.idle_since = 0.0
        self.is_reusable = False
        self.is_write_held = False  # bytes of the request still wait for the socket
        self._upstream = upstream
        self._loop = loop
        self._answer: _PooledAnswer | None = None
        self._legs = 0  # carried so far, this one included
        self._has_received = False  # any byte of this answer
        self._is_done = False  # this answer is complete
        self._is_until_close = False  # its body ends with the connection
        self._is_read_held = False
        self._overhead = 0  # bytes since the last body byte
        # The parser calls these two once per header and body piece: straight into C, without a frame of ours.
        self._fields: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self.on_header = self._fields.__setitem__
        self.on_body = self._pieces.append
        self._parser: Any = HttpResponseParser(self)

    def __repr__(self) -> str:
        state = "busy" if self.is_busy else "idle" if self.is_idle else "closed"
        return f"<_Connection {self.pool.origin.host}:{self.pool.origin.port} {state}, {self._legs} legs>"

    @property
    def is_busy(self) -> bool:
        return self._answer is not None

    @property
    def is_idle(self) -> bool:
        return self._answer is None and self.is_reusable and self._legs > 0

    def is_fresh(self, idle_limit_s: float) -> bool:
        """Tell whether an idle connection may be used: the worker has not closed it and is not about to."""
        return self.is_reusable and self._loop.time() - self.idle_since < idle_limit_s

    def carry(self, answer: _PooledAnswer, message: list[Part]) -> None:
        """Write a request, and give what comes back to `answer`."""
        self._answer = answer
        self._legs += 1
        self._has_received = self._is_done = self._is_until_close = False
        self._overhead = 0
        answer.connection = self
        if len(message) == 1:
            self._transport.write(message[0])
        else:
            self._transport.writelines(message)

    def write(self, parts: list[Part]) -> None:
        """Write more of a request."""
        self._transport.writelines(parts)

    def pause_reading(self) -> None:
        if not self._is_read_held:
            self._is_read_held = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_read_held:
            self._is_read_held = False
            self._transport.resume_reading()

    def close_sending(self) -> None:
        """Close the sending half: the last answer may still come; what is unsent of the request is sent
        first.
        """
        self.is_reusable = False
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def end(self, error: WorkerError) -> None:
        """Close; the answer that is under way, if any, fails with `error`."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.connection = None
            answer.fail(error)
        self.close()

    def close(self) -> None:
        """Close at once, telling nobody; what counts as written still goes out. It may be called again."""
        self._answer = None
        self.is_reusable = False
        if self.pool.origin.tls is None or self.is_write_held:
            self._transport.abort()
        else:
            self._transport.close()  # TLS keeps a buffer that it does not show

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_reusable = True
        # Any byte that the socket does not take at once counts, so that "written" is exact. (TLS transports
        # would take 0 for "always full".)
        self._transport.set_write_buffer_limits(high=0 if self.pool.origin.tls is None else 1)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked
            self.close()
            return
        if not self._has_received:
            self._has_received = True
            if data[0] != _FIRST_BYTE:  # the parser also takes answers of RTSP and ICE
                self._refuse(None)
                return
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            if not self._is_done:  # what is wrong behind the end is not this answer's
                self._refuse(error)
                return
            self.is_reusable = False
        pieces = self._pieces
        if self._is_done:
            self._finish(answer)
        elif pieces:
            self._overhead = 0
            answer.receive(pieces.pop() if len(pieces) == 1 else self._take_pieces(), False)
        else:
            self._count_overhead(answer, len(data))

    def eof_received(self) -> None:
        answer = self._answer
        if answer is not None and self._is_until_close and _is_told(self._transport):
            self.is_reusable = False
            self._finish(answer)
        elif not self._transport.is_closing():
            self._transport.abort()  # now, even if the rest of a request could still be written

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        self._upstream.removed(self)
        self._parser = None  # it holds our methods: a cycle
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.lost(exc, may_retry=self._legs > 1 and not self._has_received)

    def pause_writing(self) -> None:
        self.is_write_held = True

    def resume_writing(self) -> None:
        self.is_write_held = False
        if self._answer is not None:
            self._answer.written()

    # --- HttpResponseParser ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_done:
            raise _ExtraBytes
        self._fields.clear()

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = parser.get_status_code()
        answer = self._answer
        if (status < 200 and status != 101) or answer is None:
            return
        fields = {name.lower(): value for name, value in self._fields.items()}
        self._fields.clear()
        if b"content-length" not in fields or b"transfer-encoding" in fields:
            self._is_until_close = _ends_with_connection(fields)
        if status == 101 or not parser.should_keep_alive():
            _check_version(parser, status)
        answer.begin(status, fields)
        if answer.is_head:
            # The parser cannot be told that no body follows, so it cannot go on: the connection is closed.
            self._is_done, self.is_reusable = True, False

    def on_message_complete(self) -> None:
        if self._answer is not None and self._answer.status:
            self._is_done = True
            if not self._parser.should_keep_alive():
                self.is_reusable = False

    # --- inside ---------------------------------------------------------------------------------

    def _finish(self, answer: _PooledAnswer) -> None:
        """Complete the answer: the connection goes back before its reader can ask for another."""
        data = b"" if answer.is_head else self._take_pieces()
        answer.connection = None
        self._answer = None
        if self.is_reusable and not self.is_write_held:
            if self._is_read_held:
                self.resume_reading()
            self._upstream.put_back(self, self._loop)
        else:
            self.close()
        answer.receive(data, True)

    def _take_pieces(self) -> bytes:
        """Return the body part of one read, as one: a join costs less than handing on piece by piece."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return data

    def _count_overhead(self, answer: _PooledAnswer, size: int) -> None:
        self._overhead += size
        if self._overhead > MAX_OVERHEAD:
            self._refuse(None)
        elif answer.status:
            answer.receive(b"", False)

    def _refuse(self, error: HttpParserError | None) -> None:
        garbage = WorkerGarbage("the worker's answer is not valid HTTP")
        garbage.__cause__ = error
        self.end(garbage)


class _ExtraBytes(Exception):
    """Something followed the end of an answer in the same read."""


def _ends_with_connection(fields: dict[bytes, bytes]) -> bool:
    """Tell whether only the end of the connection tells the end of the body (if the status allows one)."""
    coding = fields.get(b"transfer-encoding")
    if coding is None:
        return b"content-length" not in fields
    if coding.lower() != b"chunked":
        raise ValueError("a transfer coding that nobody asked for")
    return False


def _check_version(parser: HttpResponseParser, status: int) -> None:
    """Refuse what the parser knows but we do not speak."""
    if status == 101:
        raise ValueError("an upgrade that nobody asked for")
    if parser.get_http_version() not in ("1.0", "1.1"):
        raise ValueError("another version of HTTP")


def _is_told(transport: asyncio.Transport) -> bool:
    """Tell whether an end of the stream came from the worker: TLS's goodbye, where there is TLS.

    The event loops report a TCP end beneath TLS in the same way, and anybody on the way can send that.
    """
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return True
    try:
        return bool(tls.read(1) == b"")
    except ssl.SSLError:  # "want read": the other side has not finished
        return False


def _no_connection(origin: Origin, error: OSError | UnicodeError) -> BatonError:
    error.add_note(f"connecting to {origin.host}:{origin.port}")
    if not is_shortage(error):
        return _unreachable(error)
    shortage = OutOfResources("this server cannot open another connection now: ask again")
    shortage.__cause__ = error  # by hand: the compiled form forgets it
    return shortage


def _unreachable(error: OSError | UnicodeError) -> WorkerUnreachable:
    message = "no connection to the worker"
    if isinstance(error, TimeoutError):
        message = "the worker did not accept a connection in time"
    elif isinstance(error, ssl.SSLError):
        message = "no TLS connection to the worker"
    unreachable = WorkerUnreachable(message)
    unreachable.__cause__ = error  # by hand: the compiled form forgets it
    return unreachable


def cut_short(cause: Exception | None, *, has_head: bool) -> WorkerCutShort:
    what = "before the end of its answer" if has_head else "before its answer"
    error = WorkerCutShort(f"the worker closed the connection {what}")
    error.__cause__ = cause
    return error
