"""A multiplexed connection carries all legs to a worker that takes them so (`wire/streams.py` is the format).

There is one per worker, opened by an HTTP upgrade with the first leg, and closed after a minute without any.
What one read brings of all streams is cut into frames in the read callback, and each frame goes to its
answer. A worker that refuses the upgrade, and one that does not announce it, gets its legs by the pool.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final, cast

from orchestrator.errors import BatonError, OutOfResources, WorkerCutShort, WorkerGarbage, WorkerUnreachable
from orchestrator.transport.base import Answer, Origin, Part, Sending, Upstream, UpstreamStats, host_header
from orchestrator.transport.pool import PooledUpstream, cut_short
from orchestrator.transport.upgrade import CLOSED, SILENT, SWITCHED, Upgrade
from orchestrator.wire.info import Streams
from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    END,
    HEAD,
    HEADER,
    HEADER_SIZE,
    LAST,
    LEAVE,
    MAX_CREDIT,
    MAX_FIELDS,
    MAX_PAYLOAD,
    MAX_STREAMS,
    OPEN,
    PING,
    RESET,
    RESET_BROKEN,
    RESET_CANCELLED,
    RESET_REFUSED,
    UPGRADE_PATH,
    VERSION,
    WINDOW,
    FrameError,
    check_header,
    credit,
    frame,
    reset,
)

# A body up to this size is joined with its head to one write, as in `pool.py`.
_JOIN_LIMIT: Final = 32 * 1024
# Bytes that may wait for the socket before large bodies stop to be written: the last frame goes beyond it, so
# that what is small and comes next, a request or a reset, is behind 256 KiB of them at most.
_AHEAD: Final = 192 * 1024
# Answers to pings that wait for the end of a turn of the event loop.
_MOST_UNWRITTEN: Final = 1000
# Credit is given when so much of the window is used up: nothing for most answers.
_GIVE_AT: Final = WINDOW // 2

_MAX_TARGETS: Final = 64  # kept per worker, as in `pool.py`
_BODILESS: Final = frozenset({204, 304})
_LAST_STREAM: Final = 2**32 - 1
# Until a worker that refused the upgrade is asked again; twice as long after each further time, as something
# on the way may let the upgrade hang, and those who wait for it with it.
_REFUSED_S: Final = 60.0
_MOST_REFUSED_S: Final = 3600.0
_NO_STATUS: Final = {CLOSED: "closed the connection on", SILENT: "did not answer in time to"}

# In ticks of a connection, which are half of `ping_s`.
_PING_AFTER: Final = 2
_DEAD_AFTER: Final = 6

_KIND: Final = 0x7F
_PING_BYTES: Final = b"baton?!\n"
_NOTHING: Final[list[Part]] = []  # what is kept of a request that was answered

_log: Final = logging.getLogger("baton.transport")


def upstream(streams: Streams, *, connect_timeout_s: float) -> Upstream:
    """Return the upstream that goes by what `BATON_STREAMS` says."""
    pool = PooledUpstream(connect_timeout_s=connect_timeout_s)
    return MuxUpstream(pool) if streams == "mux" else pool


class MuxUpstream(Upstream):
    """It is `base.Upstream` on multiplexed connections where workers take them, and on a pool where not.

    `ping_s` is how long a worker may say nothing on its connection until it is pinged; three times that, and
    the connection is given up. One without a stream is closed after `idle_limit_s`.
    """

    def __init__(self, pool: PooledUpstream, *, ping_s: float = 5.0, idle_limit_s: float = 60.0) -> None:
        """`pool` is closed with this; its time limit for connecting holds here, and for the upgrade too."""
        self.tick_s: Final = ping_s / 2
        self.idle_ticks: Final = max(1, int(idle_limit_s / self.tick_s))
        self._pool = pool
        self._peers: dict[Origin, _Peer] = {}  # the workers that were offered
        self._connections: set[_MuxConnection] = set()  # every open one
        self._is_closed = False
        self._all_closed: asyncio.Future[None] | None = None
        self._connects = 0
        self._reuses = 0
        self._retries = 0

    def __repr__(self) -> str:
        return f"<MuxUpstream {self.stats()}>"

    # --- base.Upstream --------------------------------------------------------------------------

    @property
    def streams(self) -> Streams:
        return "mux"

    def offer(self, origin: Origin, is_mux: bool, headers: bytes = b"") -> None:
        peer = self._peers.get(origin)
        if peer is not None:
            peer.offer(is_mux, headers)
        elif is_mux:
            self._peers[origin] = _Peer(origin, headers)
        if peer is not None and not is_mux:
            del self._peers[origin]

    async def send(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: bytes,
        body: Sequence[Part],
    ) -> Answer:
        peer = self._peers.get(origin)
        if peer is None:
            return await self._pool.send(origin, method, target, headers, body)
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        head = peer.head(method, target, headers, size)
        connection = peer.connection
        if connection is None or connection.is_closing:
            connection = await self.connection(peer)
        else:
            self._reuses += 1
        if connection is None or connection.is_full or len(head) > MAX_PAYLOAD:
            return await self._pool.send(origin, method, target, headers, body)
        answer = _MuxAnswer(self, peer, head, body, size, method == "HEAD")
        connection.carry(answer)
        if connection.is_write_held or not answer.is_sent:
            await self._drain(answer)
        return answer

    async def open(
        self, origin: Origin, method: str, target: str, headers: bytes, size: int | None
    ) -> Sending:
        return await self._pool.open(origin, method, target, headers, size)

    def stats(self) -> UpstreamStats:
        """Return counts of connections, those of the pool among them; legs that came to an open connection
        are reuses.
        """
        busy = sum(connection.is_busy for connection in self._connections)
        idle = len(self._connections) - busy
        pool = self._pool.stats()
        return UpstreamStats(
            pool.idle + idle,
            pool.busy + busy,
            pool.connects + self._connects,
            pool.reuses + self._reuses,
            pool.retries + self._retries,
        )

    async def aclose(self) -> None:
        self._is_closed = True
        openings = [peer.opening for peer in self._peers.values() if peer.opening is not None]
        for opening in openings:
            opening.cancel()
        await asyncio.gather(*openings, return_exceptions=True)
        if self._connections and self._all_closed is None:
            self._all_closed = asyncio.get_running_loop().create_future()
        for connection in list(self._connections):
            connection.end(WorkerCutShort("the orchestrator is stopping"))
        await self._pool.aclose()
        if self._all_closed is not None:
            await asyncio.shield(self._all_closed)

    # --- for connections and answers ------------------------------------------------------------

    async def connection(self, peer: _Peer) -> _MuxConnection | None:
        """Return an open connection, or None if the worker takes none. Raises `WorkerUnreachable`, or
        `OutOfResources` if the fault is ours.

        All who come while it is opened share it, and it is opened even if they are cancelled. Nobody waits
        for a worker that has refused before: that may be by saying nothing.
        """
        if peer.connection is not None and not peer.connection.is_closing:
            return peer.connection
        if peer.is_refusing():
            return None
        if peer.opening is None:
            peer.opening = asyncio.ensure_future(self._open(peer))
            peer.opening.add_done_callback(peer.note_opened)
        if peer.has_refused:
            return None
        connection = await asyncio.shield(peer.opening)
        if connection is not None and connection.is_closing:
            raise WorkerUnreachable("the worker closed a fresh connection")
        return connection

    def removed(self, connection: _MuxConnection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._all_closed is not None and not self._all_closed.done():
            self._all_closed.set_result(None)

    def count_retry(self) -> None:
        self._retries += 1

    # --- inside ---------------------------------------------------------------------------------

    async def _open(self, peer: _Peer) -> _MuxConnection | None:
        try:
            return await self._upgraded(peer)
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
        raise WorkerUnreachable("the orchestrator is stopping")  # for those who wait, and are not cancelled

    async def _upgraded(self, peer: _Peer) -> _MuxConnection | None:
        make = functools.partial(Upgrade, peer.upgrade(), VERSION, peer.loop)
        upgrade = cast(Upgrade, await self._pool.dial(peer.origin, make))
        status = await self._status_of(upgrade)
        if status == SWITCHED and not (self._is_closed or upgrade.transport.is_closing()):
            return self._made(peer, upgrade)
        upgrade.transport.abort()
        peer.note_refused(status)
        return None

    async def _status_of(self, upgrade: Upgrade) -> int:
        """Return the status of the answer. Something on the way may close the connection, or say nothing,
        because it does not know upgrades: that is a refusal, too.
        """
        try:
            return await asyncio.wait_for(upgrade.status, self._pool.connect_timeout_s)
        except TimeoutError:
            return SILENT
        except asyncio.CancelledError:
            upgrade.transport.abort()
            raise

    def _made(self, peer: _Peer, upgrade: Upgrade) -> _MuxConnection:
        connection = _MuxConnection(self, peer, upgrade.transport)
        peer.note_accepted(connection)
        self._connections.add(connection)
        self._connects += 1
        upgrade.transport.set_protocol(cast(asyncio.BaseProtocol, connection))
        if upgrade.rest:
            connection.data_received(upgrade.rest)
        return connection

    async def _drain(self, answer: _MuxAnswer) -> None:
        try:
            await answer.wait_written()
        except BaseException:
            answer.abort()
            raise


class _Peer:
    """A peer is a worker that was offered: its connection, or what was seen when one was to be opened."""

    __slots__ = (
        "_ask_at",
        "_host",
        "_pause_s",
        "_targets",
        "connection",
        "headers",
        "loop",
        "opening",
        "origin",
    )

    def __init__(self, origin: Origin, headers: bytes) -> None:
        self.loop = asyncio.get_running_loop()
        self.origin = origin
        self.headers = headers  # of the upgrade, as a header block
        self.connection: _MuxConnection | None = None  # that takes more streams
        self.opening: asyncio.Future[_MuxConnection | None] | None = None
        self._ask_at = 0.0  # not before; it has refused
        self._pause_s = _REFUSED_S  # for so long after the next refusal
        self._host = host_header(origin)
        self._targets: dict[tuple[str, str], bytes] = {}

    def offer(self, is_mux: bool, headers: bytes) -> None:
        """Ask it anew if it has refused before; or take it out of use."""
        self.headers = headers
        self._ask_at = 0.0
        self._pause_s = _REFUSED_S
        if not is_mux and self.connection is not None:
            self.connection.retire()

    def is_refusing(self) -> bool:
        """Tell whether it has refused of late."""
        return self.loop.time() < self._ask_at

    @property
    def has_refused(self) -> bool:
        """Return whether it has refused the last time that it was asked."""
        return self._ask_at != 0.0

    def note_accepted(self, connection: _MuxConnection) -> None:
        self.connection = connection
        self._ask_at = 0.0
        self._pause_s = _REFUSED_S

    def note_refused(self, status: int) -> None:
        self._ask_at = self.loop.time() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MOST_REFUSED_S)
        _log.warning(
            "%s:%d %s the upgrade to %s: its legs go by HTTP",
            self.origin.host,
            self.origin.port,
            _NO_STATUS.get(status) or f"answered {status} to",
            VERSION.decode(),
        )

    def note_opened(self, opening: asyncio.Future[_MuxConnection | None]) -> None:
        self.opening = None
        if not opening.cancelled():
            opening.exception()  # those who waited have it, if any is left

    def upgrade(self) -> bytes:
        """Return the request that opens a connection."""
        line = f"GET {UPGRADE_PATH} HTTP/1.1\r\nhost: {self._host}\r\n".encode()
        fields = b"connection: Upgrade\r\nupgrade: %b\r\ncontent-length: 0\r\n\r\n" % VERSION
        return b"".join((line, self.headers, fields))

    def head(self, method: str, target: str, headers: bytes, size: int) -> bytes:
        """Return the payload of OPEN."""
        start = self._targets.get((method, target)) or self._add_target(method, target)
        return b"".join((start, headers, f"content-length: {size}\r\n".encode()))

    def _add_target(self, method: str, target: str) -> bytes:
        """Make and keep how a payload begins. Raises `ValueError` if there is a line break in it."""
        if len(self._targets) >= _MAX_TARGETS:
            self._targets.clear()
        start = f"{method} {target}\r\nhost: {self._host}\r\n".encode("ascii")
        if start.count(b"\n") != 2 or start.count(b"\r") != 2:
            raise ValueError("a line break in a method or target")
        self._targets[method, target] = start
        return start


class _MuxAnswer(Answer):
    """It is an answer and the stream that it comes on, until it is complete.

    It keeps the request until the head of the answer is there and all is written, for the one retry that a
    request may need which the worker has not begun.
    """

    __slots__ = (
        "_arrived",
        "_body",
        "_body_size",
        "_credit",
        "_head",
        "_is_ended",
        "_is_paused",
        "_is_whole",
        "_left",
        "_may_retry",
        "_offset",
        "_part",
        "_peer",
        "_upstream",
        "_window",
        "connection",
        "has_news",
        "is_head",
        "is_sent",
        "opened_at",
        "stream",
    )

    def __init__(
        self, upstream: MuxUpstream, peer: _Peer, head: bytes, body: Sequence[Part], size: int, is_head: bool
    ) -> None:
        super().__init__(peer.loop)
        self.is_head = is_head  # an answer to HEAD: no body, whatever comes
        self.is_sent = False  # all of the request is with the event loop
        self.connection: _MuxConnection | None = None
        self.stream = 0
        self.opened_at = 0  # how much the connection had read by then
        self._upstream = upstream
        self._peer = peer
        self._head = head
        self._body = body
        self._body_size = size
        self._left = 0  # bytes of the body that are still to be written
        self._part = 0  # the one that is next, from `_offset` on
        self._offset = 0
        self._credit = 0  # bytes of the body that the worker takes
        self._window = 0  # bytes that the worker may send
        self._is_paused = False
        self._is_ended = False  # the worker has said so
        self._is_whole = False  # nothing more is wanted of it
        self._may_retry = True
        self.has_news = False  # of a read that is not over: `deliver()` is due
        self._arrived: list[bytes] = []  # by it

    async def wait_written(self) -> None:
        """Wait until the request is written, or something else happened that `head()` will tell."""
        connection = self.connection
        while connection is not None and not self.status and (connection.is_write_held or not self.is_sent):
            news = self._news(0)
            if connection.is_write_held:
                connection.wait_writable(self)
            await news
            connection = self.connection

    # --- for the connection ---------------------------------------------------------------------

    def start(self, connection: _MuxConnection, stream: int, opened_at: int) -> bytes:
        """Come by this stream; return what is to be written now: all of it, or all but a large body."""
        self.connection = connection
        self.stream = stream
        self.opened_at = opened_at
        self._window = self._credit = WINDOW
        self._left = size = self._body_size
        self._part = self._offset = 0
        head, body = self._head, self._body
        self.is_sent = size <= _JOIN_LIMIT and size <= WINDOW
        if not size:
            return HEADER.pack(len(head), OPEN | END, stream) + head
        opening = HEADER.pack(len(head), OPEN, stream)
        if not self.is_sent:
            return opening + head
        content = body[0] if len(body) == 1 else b"".join(body)
        return b"".join((opening, head, HEADER.pack(size, BODY | END, stream), content))

    def write_piece(self, connection: _MuxConnection) -> bool:
        """Write one frame of a large body; return whether another one may follow."""
        part = self._body[self._part]
        start = self._offset
        size = min(len(part) - start, self._credit, MAX_PAYLOAD)
        self._left -= size
        self._credit -= size
        self._offset += size
        if self._offset == len(part):
            self._part += 1
            self._offset = 0
        kind = BODY if self._left else BODY | END
        connection.write_parts([HEADER.pack(size, kind, self.stream), memoryview(part)[start : start + size]])
        if not self._left:
            self._note_sent()
        return self._left > 0 and self._credit > 0

    def add_credit(self, size: int) -> bool:
        """Note that the worker takes so many more bytes; return whether the body waits for it. Raises
        `FrameError`.
        """
        was_waiting = self._credit == 0 and not self.is_sent
        self._credit += size
        if self._credit > MAX_CREDIT:
            raise self.broken("more credit than a stream may have")
        return was_waiting and size > 0

    def take_head(self, payload: bytes, is_end: bool) -> bool:
        """Take HEAD; return whether nothing follows. Raises `FrameError`."""
        if self.status:
            raise self.broken("a second head on a stream")
        status = payload[0] << 8 | payload[1] if len(payload) > 1 else 0
        if not 200 <= status <= 999:
            raise self.broken(f"a head of status {status}")
        fields = _fields_of(payload[2:])
        if fields is None:
            raise self.broken("a head that is no header block")
        self.begin(status, fields)
        if self.is_sent:
            self._body = _NOTHING
        self._is_whole = is_end or self.is_head or status in _BODILESS
        self._is_ended = is_end
        return self._is_whole

    def take(self, data: bytes, is_end: bool) -> None:
        """Take DATA. Raises `FrameError`."""
        self._window -= len(data)
        if self._window < 0 or not self.status:
            raise self.broken("data beyond the credit" if self.status else "data before the head")
        self._arrived.append(data)
        self._is_whole = self._is_ended = is_end

    def deliver(self) -> None:
        """Hand on what a read has brought, as one piece, unless the answer was given up meanwhile."""
        self.has_news = False
        arrived = self._arrived
        data = arrived[0] if len(arrived) == 1 else b"".join(arrived)
        arrived.clear()
        if self.connection is None:
            return
        if self._is_whole:
            self._finish()
        self.receive(data, self._is_whole)
        if self._window < _GIVE_AT and not self._is_paused:
            self._give_credit()

    def lost(self, error: Exception | None, *, may_retry: bool) -> None:
        """Note that the stream is over before its answer; with `may_retry` the worker has not begun it."""
        self.connection = None
        if may_retry and self._may_retry:
            self._may_retry = False
            self._is_stale = True
            self._wake()
        else:
            self.fail(cut_short(error, has_head=bool(self.status)))

    def broken(self, what: str) -> FrameError:
        """Fail, as it is this stream on which the worker broke the format; return the error for the others,
        which did nothing wrong and are only cut short.
        """
        error = FrameError(what)
        garbage = WorkerGarbage(f"the worker has broken the format of its connection: {what}")
        garbage.__cause__ = error
        self.fail(garbage)
        return error

    def written(self) -> None:
        self._wake()

    # --- inside ---------------------------------------------------------------------------------

    def _note_sent(self) -> None:
        self.is_sent = True
        if self.status:
            self._body = _NOTHING
        self._wake()

    def _finish(self) -> None:
        """Leave the connection, as nothing more is to come. The worker is told if it does not know, or still
        waits for the body.
        """
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.forget(self.stream)
            if not (self._is_ended and self.is_sent):
                connection.write(reset(self.stream, RESET_CANCELLED))

    def _give_credit(self) -> None:
        if self.connection is not None:
            self.connection.write(credit(self.stream, WINDOW - self._window))
            self._window = WINDOW

    async def _ask_again(self) -> None:
        try:
            connection = await self._upstream.connection(self._peer)
        except WorkerUnreachable as error:
            # The first connection has carried the request: the worker may have seen it.
            self.fail(cut_short(error, has_head=False))
            return
        except OutOfResources as shortage:
            self.fail(shortage)
            return
        if self._error is not None:  # given up meanwhile
            return
        self._is_stale = False
        if connection is None or connection.is_full:  # the next attempt goes by HTTP
            self.fail(cut_short(None, has_head=False))
            return
        self._upstream.count_retry()
        connection.carry(self)

    def _pause_reading(self) -> None:
        self._is_paused = True

    def _resume_reading(self) -> None:
        self._is_paused = False
        if self._window < _GIVE_AT:
            self._give_credit()

    def _close_sending(self) -> None:
        self._may_retry = False
        if self.connection is not None:
            self.connection.write(frame(LEAVE, self.stream))
        elif self._is_stale:  # to be sent again, which nobody wants any more
            self._is_stale = False
            self.fail(cut_short(None, has_head=False))

    def _drop(self) -> None:
        self._finish()


class _MuxConnection:
    """A connection is one socket, an `asyncio.Protocol`, after its upgrade."""

    __slots__ = (
        "_bodies",
        "_has_pinged",
        "_idle",
        "_is_lost",
        "_last",
        "_loop",
        "_news",
        "_owed",
        "_parts",
        "_peer",
        "_reads",
        "_silent",
        "_streams",
        "_stuck",
        "_timer",
        "_transport",
        "_unwritten",
        "_upstream",
        "_waiting",
        "_wanted",
        "is_retired",
        "is_write_held",
    )

    def __init__(self, upstream: MuxUpstream, peer: _Peer, transport: asyncio.Transport) -> None:
        self.is_retired = False  # no more streams are opened
        self.is_write_held = False  # so many bytes wait for the socket that large bodies wait, too
        self._upstream = upstream
        self._peer = peer
        self._loop = peer.loop
        self._transport = transport
        self._is_lost = False
        self._last = 0  # stream that was opened
        self._streams: dict[int, _MuxAnswer] = {}  # under way
        self._parts: list[bytes] = []  # of a frame that has not wholly come
        self._wanted = 0  # bytes of it that are missing
        self._news: list[_MuxAnswer] = []  # to which the present read has brought something
        self._reads = 0
        self._bodies: deque[_MuxAnswer] = deque()  # large ones, each in its turn
        self._waiting: list[_MuxAnswer] = []  # whose senders wait for the socket
        self._idle = self._silent = self._stuck = 0  # for so many ticks
        self._has_pinged = False
        self._unwritten: list[bytes] = []  # small frames of this turn of the event loop
        self._owed = b""  # the answer to a ping, which waits for the socket
        self._timer = self._loop.call_later(upstream.tick_s, self._tick)
        transport.set_write_buffer_limits(high=_AHEAD, low=0)

    def __repr__(self) -> str:
        state = "lost" if self._is_lost else "retired" if self.is_retired else "open"
        origin = self._peer.origin
        return f"<_MuxConnection {origin.host}:{origin.port} {state}, {len(self._streams)} streams>"

    @property
    def is_busy(self) -> bool:
        return bool(self._streams)

    @property
    def is_closing(self) -> bool:
        """Return whether no stream can be opened any more."""
        return self.is_retired or self._transport.is_closing()

    @property
    def is_full(self) -> bool:
        return len(self._streams) >= MAX_STREAMS

    def carry(self, answer: _MuxAnswer) -> None:
        """Open a stream, and give what comes back to `answer`. It must be neither closing nor full."""
        stream = self._last = self._last + 1
        self._streams[stream] = answer
        if stream == _LAST_STREAM:
            self.retire()
        self.write(answer.start(self, stream, self._reads))
        if not answer.is_sent:
            self._bodies.append(answer)
            self._write_bodies()

    def write(self, data: bytes) -> None:
        """Write a small frame, or a small request, with all that comes in this turn of the event loop: uvloop
        writes at once, and a system call costs more than all else that is done for a frame.
        """
        if not self._unwritten:
            self._loop.call_soon(self._flush)
        self._unwritten.append(data)

    def write_parts(self, parts: list[Part]) -> None:
        """Write a large frame now, behind all small ones."""
        self._flush()
        if not self._transport.is_closing():
            self._transport.writelines(parts)

    def wait_writable(self, answer: _MuxAnswer) -> None:
        """Call `written()` when the socket has taken what waits for it."""
        self._waiting.append(answer)

    def forget(self, stream: int) -> None:
        """Note that a stream is over."""
        self._streams.pop(stream, None)
        if not self._streams:
            self._idle = 0
            if self.is_retired:
                self._loop.call_soon(self.close)  # after what is still to be written of the stream

    def retire(self) -> None:
        """Open no more streams; it is closed when the last one is over."""
        self.is_retired = True
        if self._peer.connection is self:
            self._peer.connection = None
        if not self._streams:
            self.close()

    def end(self, error: BatonError) -> None:
        """Close at once; the answers that are under way fail with an error like this one."""
        answers = list(self._streams.values())
        self._streams.clear()
        self.retire()
        self._transport.abort()
        for answer in answers:
            answer.connection = None
            answer.fail(_same(error))

    def close(self) -> None:
        """Close once what was written is with the operating system. It may be called again."""
        self.is_retired = True
        if not (self._streams or self._is_lost):
            self._flush()
            self._transport.close()

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._silent = 0
        self._reads += 1
        try:
            start = self._complete(data) if self._wanted else 0
            if start < len(data):
                self._read_frames(data, start)
        except FrameError as error:
            self._deliver()
            self._refuse(error)
        else:
            self._deliver()

    def eof_received(self) -> None:
        self._transport.abort()  # now, even if something could still be written

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._timer.cancel()
        answers = list(self._streams.values())
        self._streams.clear()
        self.retire()
        self._bodies.clear()
        self._waiting.clear()
        self._upstream.removed(self)
        for answer in answers:
            # As in a pool: one that was idle may have been closed just when the request was written.
            answer.lost(exc, may_retry=self._reads > 0 and self._reads == answer.opened_at)

    def pause_writing(self) -> None:
        self.is_write_held = True

    def resume_writing(self) -> None:
        self.is_write_held = False
        self._stuck = 0
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer.written()
        if self._owed:
            owed, self._owed = self._owed, b""
            self.write(owed)
        self._write_bodies()

    # --- inside: reading ------------------------------------------------------------------------

    def _read_frames(self, data: bytes, start: int) -> None:
        """Take every frame from `start` on, and keep what follows the last whole one. Raises `FrameError`.

        This is `streams.FrameReader`, unrolled: it goes round for every event of every stream. What several
        frames bring of one stream is handed on as one, so that a busy process does less for each.
        """
        streams = self._streams
        size = len(data)
        while size - start >= HEADER_SIZE:
            length = _u32(data, start)
            kind = data[start + 4]
            body = start + HEADER_SIZE
            if length > MAX_PAYLOAD or kind & _KIND != DATA:
                check_header(kind & _KIND, length)
            if body + length > size:
                break
            stream = _u32(data, start + 5)
            start = body + length
            answer = streams.get(stream)
            if answer is None:
                self._take_unowned(kind, stream, data[body:start])
            elif kind & _KIND == DATA:
                answer.take(data[body:start], kind >= END)
                if not answer.has_news:
                    answer.has_news = True
                    self._news.append(answer)
                if kind >= END:
                    del streams[stream]
            else:
                self._take(answer, kind, data[body:start])
        if start < size:
            self._keep(data[start:])

    def _deliver(self) -> None:
        for answer in self._news:
            if answer.has_news:
                answer.deliver()
        self._news.clear()

    def _complete(self, data: bytes) -> int:
        """Complete the frame that has begun with bytes of `data`, and take it; return how many those were.
        Raises `FrameError`.
        """
        start = 0
        while self._wanted and start < len(data):
            piece = data[start : start + self._wanted]
            start += len(piece)
            self._wanted -= len(piece)
            self._parts.append(piece)
            if not self._wanted:
                begun = b"".join(self._parts)
                self._parts.clear()
                self._read_frames(begun, 0)  # which keeps it, if that was only its header
        return start

    def _keep(self, rest: bytes) -> None:
        """Keep an unfinished frame. It is put together once, however small the reads are that bring it."""
        self._parts.append(rest)
        whole = HEADER_SIZE if len(rest) < HEADER_SIZE else HEADER_SIZE + _u32(rest, 0)
        self._wanted = whole - len(rest)

    def _take(self, answer: _MuxAnswer, kind: int, payload: bytes) -> None:
        """Take a frame of a stream that is under way, other than DATA. Raises `FrameError`."""
        what = kind & _KIND
        if what == HEAD:
            if answer.take_head(payload, kind >= END):
                del self._streams[answer.stream]
            answer.has_news = True
            self._news.append(answer)
        elif what == CREDIT:
            if answer.add_credit(_u32(payload, 0)):
                self._bodies.append(answer)
                self._write_bodies()
        elif what == RESET:
            self._take_reset(answer, payload[0])
        else:
            raise answer.broken(f"a frame of kind {what} from a worker")

    def _take_reset(self, answer: _MuxAnswer, code: int) -> None:
        is_refused = code == RESET_REFUSED and not answer.status
        if not (is_refused or code == RESET_BROKEN):
            raise answer.broken(f"a reset with code {code}")
        if answer.has_news:
            answer.deliver()
        self.forget(answer.stream)
        if is_refused:
            self.retire()  # it will refuse others as well
        answer.lost(None, may_retry=is_refused)

    def _take_unowned(self, kind: int, stream: int, payload: bytes) -> None:
        """Take a frame of the connection, or drop one that has crossed the end of its stream. Raises
        `FrameError`.
        """
        what = kind & _KIND
        if stream == 0 and what == PING:
            self._take_ping(kind >= END, payload)
        elif stream == 0 and what == LAST:
            self.retire()
        elif not 0 < stream <= self._last or what not in _OF_STREAMS:
            raise FrameError(f"a frame of kind {what} that stream {stream} cannot have")

    def _take_ping(self, is_answer: bool, payload: bytes) -> None:
        if is_answer:
            if not self._has_pinged or payload != _PING_BYTES:
                raise FrameError("an answer to no ping")
            self._has_pinged = False
            return
        if len(self._unwritten) >= _MOST_UNWRITTEN:
            self._flush()
        if self.is_write_held:  # a worker may ping and read nothing
            self._owed = frame(PING | END, 0, payload)
        else:
            self.write(frame(PING | END, 0, payload))

    def _refuse(self, error: FrameError) -> None:
        origin = self._peer.origin
        _log.warning("%s:%d sent %s: its connection is closed", origin.host, origin.port, error)
        given_up = WorkerCutShort(
            "the worker has broken the format of a connection that several requests share"
        )
        given_up.__cause__ = error
        self.end(given_up)

    # --- inside: writing ------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write what waits for the end of the turn."""
        unwritten = self._unwritten
        if unwritten and not self._transport.is_closing():  # uvloop would raise a RuntimeError
            self._transport.write(unwritten[0] if len(unwritten) == 1 else b"".join(unwritten))
        unwritten.clear()

    def _write_bodies(self) -> None:
        """Write large bodies, a frame of each in turn, until enough waits for the socket."""
        while self._bodies and not self.is_write_held:
            answer = self._bodies.popleft()
            if answer.connection is self and answer.write_piece(self):
                self._bodies.append(answer)

    def _tick(self) -> None:
        """Look whether the worker is there: it answers pings, and takes what is written."""
        self._silent += 1
        self._stuck = self._stuck + 1 if self.is_write_held else 0
        self._idle = 0 if self._streams else self._idle + 1
        if self._silent >= _DEAD_AFTER or self._stuck >= _DEAD_AFTER:
            self.end(WorkerCutShort("the worker has not answered on its connection for too long"))
            return
        if self._silent == _PING_AFTER and not self._has_pinged:
            self._has_pinged = True
            self.write(frame(PING, 0, _PING_BYTES))
        if self._idle >= self._upstream.idle_ticks:
            self.retire()
        self._timer = self._loop.call_later(self._upstream.tick_s, self._tick)


# What a worker may send on a stream.
_OF_STREAMS: Final = frozenset({HEAD, DATA, RESET, CREDIT})


def _u32(data: bytes, at: int) -> int:
    return data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]


def _fields_of(block: bytes) -> dict[bytes, bytes] | None:
    """Return the fields of an answer's head; None if it is no header block, or has too many fields."""
    lines = block.split(b"\r\n")
    if lines.pop() or block.count(b"\n") != len(lines) or block.count(b"\r") != len(lines) or 0 in block:
        return None
    if len(lines) > MAX_FIELDS:
        return None
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b": ")
        if not colon:
            return None
        fields[name.lower()] = value
    return fields


def _same(error: BatonError) -> BatonError:
    """Return an error like this one: each answer raises one of its own."""
    copy = type(error)(error.message)
    copy.__cause__ = error.__cause__
    return copy
