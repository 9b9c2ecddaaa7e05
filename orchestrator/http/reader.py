"""The reader makes requests of the bytes that a client sends, within the limits of the server.

Order: one request of a connection is answered at a time. What a client sends behind a complete request waits,
unparsed, until that one is answered; only what came in the same small read is parsed ahead.

Fairness: a large read is parsed over several turns of the event loop, but for bodies of known length, which
cost next to nothing: thousands of tiny chunks, fields or requests in one read would hold up everybody else.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, Final, cast

import httptools

from orchestrator.errors import BatonError, BodyTooLarge, ClientError, Overloaded
from orchestrator.http.backlog import Backlog
from orchestrator.http.deadlines import Deadlines
from orchestrator.http.head import OTHER_PROTOCOL, Head, Judge, max_head_bytes, unfinished_error
from orchestrator.http.http_exchange import HttpExchange
from orchestrator.http.intake import Intake, Receiver
from orchestrator.http.limits import ServerLimits

logger: Final = logging.getLogger("baton.server")


# What a trailer must not say (RFC 9110, 6.5.1), for the parser would go by it; other trailers are ignored.
NO_TRAILERS: Final = frozenset(
    {b"connection", b"content-length", b"proxy-connection", b"transfer-encoding", b"upgrade"}
)
# The parser also takes requests of RTSP and ICE, and tells of their version only.
_REQUEST_LINE: Final = re.compile(rb"(?:^|\n)([A-Z_-]+) +([^ \r\n]+) +([A-Z]+/)")
_PROTOCOL: Final = b"HTTP/"
_HTTP_1_1: Final = b"HTTP/1.1\r"


class Reader(Intake):
    """A reader reads the requests of one connection.

    It does so with llhttp in its strict mode, which itself refuses bare LF, obs-fold, NUL, both
    `content-length` and `transfer-encoding`, and malformed lengths and chunks.
    """

    def __init__(self, connection: Receiver, limits: ServerLimits, deadlines: Deadlines) -> None:
        """`close()` must follow, else reader and connection are left to the garbage collector."""
        self.backlog = Backlog()
        self.in_head = False
        self.incoming: HttpExchange | None = None  # whose body is being read
        self.is_deaf = False  # what else comes is thrown away
        self.is_paused = False  # nothing comes for now
        self._url = b""
        self._head_bytes = 0  # of the present head, without the read in which it began
        self._feed_bytes = 0  # in the present read
        self._quiet_bytes = 0  # since the last piece of a body: chunk extensions, trailers
        self._is_upgrade = False  # the parser will stop behind the present head
        self._is_resuming = False  # the parser is being shown a head that we have had
        self._data: bytes | memoryview = b""  # of the present read
        self._is_at_start = False  # the present head, or that of a request to come, begins with a read
        self._start = b""  # of the present head, as far as it came in earlier reads
        self._counted = 0  # bytes of a head and of the backlog that are counted as held
        self._seen = 0  # bytes of the incoming body that were counted
        self._is_counted = False  # something of what is coming in is
        self._connection = connection
        self._limits = limits
        self._deadlines = deadlines
        self._judge = Judge(limits)
        self._headers: list[tuple[bytes, bytes]] = []
        self._parser = _parser_for(self)

    def connected(self, transport: asyncio.Transport) -> None:
        """Read from `transport`."""
        self._transport = transport

    def close(self) -> None:
        """Read nothing any more."""
        self._parser = None
        if self._is_counted:
            self._uncount()
        del self._connection

    # --- bytes

    def feed(self, data: bytes | memoryview) -> None:
        """Parse `data`, of which there may be `backlog.max_step`, or the rest of a body of known length."""
        self._data = data
        self._feed_bytes = size = len(data)
        if self.in_head:
            self._head_bytes += size
        else:
            self._is_at_start = self.incoming is None
        self._quiet_bytes += size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._on_parser_error(error)
        if self.in_head or self.incoming is not None:
            self._await_more()
        elif self._is_counted:
            self._count()
        self._data = b""  # or it would be kept for as long as the connection

    def hold(self, data: bytes) -> None:
        """Keep `data` until the request in progress is answered."""
        self.backlog.hold(data)
        self._count()
        self._set_reading()

    def feed_much(self, data: bytes) -> None:
        """Parse `data`, however much it is, as far as it may be in this turn of the loop."""
        self.backlog.hold(data)
        self.read_on()

    def read_on(self) -> None:
        """Parse what is held, as far as it may be in this turn of the loop."""
        backlog = self.backlog
        backlog.join()
        may_step = True
        while backlog.size and not self._is_answering() and not self.is_deaf:
            size = _missing_of(self.incoming)
            if size is None:
                if not may_step:
                    break
                may_step = False
                size = backlog.step(is_head_next=not self.in_head and self.incoming is None)
            self.feed(backlog.take(size))
        if backlog.size or self._is_counted:
            self._count()
        self._set_reading()
        if backlog.size and not self._is_answering():
            self._connection.schedule()

    def _is_answering(self) -> bool:
        """Return whether nothing more is read before the active request is answered."""
        active = self._connection.active
        return active is not None and active.body.is_received

    # --- the parser's side

    def on_message_begin(self) -> None:
        self.in_head = True
        self._url = b""
        self._headers = []
        self._start = b""
        self._head_bytes = 0
        self._deadlines.began = 0.0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self._headers.append((name.lower(), value))
        elif name.lower() in NO_TRAILERS and not self.is_deaf:
            self.break_off(ClientError(f"a trailer must not have the field {name.decode('latin-1')}"))

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.is_deaf or self._is_resuming:
            return
        head = self._head()
        exchange = HttpExchange(self._connection, head, self._refusal(head))
        self._seen = 0
        if head.ends_reading:
            self.is_deaf = True
        self._deadlines.began = 0.0
        self._quiet_bytes = 0
        self.incoming = exchange
        self._connection.accept(exchange)

    def _head(self) -> Head:
        parser = self._parser
        version, name, url = "1.1", parser.get_method(), self._url
        # Where the head begins with the read and has single blanks, as nearly all have, its version is here.
        at = len(name) + len(url) + 2
        if not self._is_at_start or self._data[at : at + 9] != _HTTP_1_1:
            version = self._version(name, at)
        self._is_at_start = False
        keep_alive = version == "1.1" and parser.should_keep_alive()
        if self._connection.max_requests is not None and self._connection.is_last():
            keep_alive = False
        self._is_upgrade = is_upgrade = parser.should_upgrade()
        return Head(name.decode("ascii"), url, version, self._headers, keep_alive, is_upgrade)

    def _version(self, method: bytes, at: int) -> str:
        """Return the version of the present head; `at` is where it would be in the read."""
        is_here = self._is_at_start and self._data[at : at + 5] == _PROTOCOL
        if not is_here and not self._is_http(method):
            return OTHER_PROTOCOL
        return cast("str", self._parser.get_http_version())

    def _is_http(self, method: bytes) -> bool:
        """Return whether the present head is one of HTTP. Its request line is in the last reads; if others
        like it may be of other requests, or of bodies, all of them must be.
        """
        lines = _REQUEST_LINE.finditer(self._start + bytes(self._data))
        found = [line[3] for line in lines if line[1] == method and line[2] == self._url]
        return all(protocol == _PROTOCOL for protocol in (found[:1] if self._is_at_start else found))

    def _refusal(self, head: Head) -> BatonError | None:
        is_small = self._head_bytes == 0 and self._feed_bytes <= self._judge.small
        error = self._judge.refusal(head, is_small)
        if error is None and self._limits.limit_concurrency is not None:
            return self._overload(head, self._limits.limit_concurrency)
        return error

    def _overload(self, head: Head, limit: int) -> BatonError | None:
        if len(self._connection.tasks) < limit or head.target.path in self._limits.probes:
            return None
        return Overloaded("too many requests in progress")

    def on_body(self, body: bytes) -> None:
        exchange = self.incoming
        if exchange is None:
            return
        self._quiet_bytes = 0
        exchange.body_size += len(body)
        if exchange.body_size > self._limits.max_body_bytes:
            self._on_large_body(exchange)
        exchange.body.take(body)

    def on_message_complete(self) -> None:
        exchange = self.incoming
        if exchange is None or (self._is_upgrade and exchange.head.has_body):
            return
        self.incoming = None
        if self.backlog.is_body_unwanted:
            self.resume()  # a client that leaves can only be noticed by reading
        exchange.body.end()
        if exchange.is_complete:
            self._connection.advance()

    # --- what cannot be read

    def _decline_upgrade(self, rest: bytes | memoryview) -> None:
        """Go on with HTTP/1.1 behind a head that offers another protocol, at which the parser stopped.

        Java's client offers h2c with every first request. llhttp takes such a request to have no body, so
        one that has gets a new parser, which is shown only how the body is framed.
        """
        if self.is_deaf:
            return
        self._is_upgrade = False
        if self.incoming is not None:
            self._parser = _parser_for(self)
            self._is_resuming = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % _framing_field(self.incoming))
            self._is_resuming = False
        if rest:
            self.feed(rest)

    def _on_parser_error(self, error: httptools.HttpParserError) -> None:
        if self.is_deaf:
            return
        if isinstance(error, httptools.HttpParserCallbackError):
            logger.error("a parser callback failed", exc_info=error)
            self.break_off(BatonError("internal error"))
        else:
            self.break_off(ClientError(f"malformed HTTP request: {error}"))

    def break_off(self, error: BatonError) -> None:
        """Answer with `error` in its turn and close, as nothing more of what comes can be read."""
        incoming, headers = self.incoming, self._headers if self.in_head else []
        self.is_deaf = True
        self.in_head = False
        self.incoming = None
        if incoming is None:
            self._connection.accept(self._unread_exchange(error, headers))
            return
        incoming.keep_alive = False
        incoming.body.fail(error)
        if incoming.is_complete:
            self._connection.linger()

    def break_off_head(self) -> None:
        """Break off a head whose rest is not waited for any more."""
        self.break_off(unfinished_error(self._url, self._head_bytes, self._limits))

    def _unread_exchange(self, error: BatonError, headers: list[tuple[bytes, bytes]]) -> HttpExchange:
        method = self._parser.get_method().decode("ascii") if self._url else ""
        head = Head(method, self._url, "1.1", headers, keep_alive=False)
        return HttpExchange(self._connection, head, error)

    def _on_large_body(self, exchange: HttpExchange) -> None:
        """Refuse a chunked body that is over the limit, and read it to its end if that is near."""
        limits, body = self._limits, exchange.body
        most = limits.most_of(exchange.head.target.path)
        if exchange.body_size <= most and not body.is_discarding:
            return
        if not (exchange.is_complete or body.is_discarding):
            body.fail(BodyTooLarge(f"the body is over {most} bytes"))
        if exchange.body_size > max(most, limits.max_body_bytes) + limits.drain_bytes:
            self.break_off(BodyTooLarge("the body has no end"))

    # --- time

    def _await_more(self) -> None:
        """See to the deadline of a request that a read ended in, and to what is not counted elsewhere."""
        self._count()
        active, incoming = self._connection.active, self.incoming
        if not self.in_head:
            if incoming is not None and incoming is active:
                self.await_body()
        elif self._head_bytes > max_head_bytes(self._limits):
            self.break_off_head()
        else:
            self._keep_start()
            if active is None:
                self._deadlines.await_head()

    def _keep_start(self) -> None:
        """Keep what has come of a head, as its request line is looked at when the head is complete."""
        if len(self._start) <= 2 * self._limits.max_request_line:
            self._start += bytes(self._data)

    def await_body(self) -> None:
        """Wait for more of the active exchange's body."""
        if self._quiet_bytes > self._limits.max_header_bytes:
            self.break_off(ClientError("chunk extensions or trailers are too long"))
        elif not self.is_paused:
            self._deadlines.await_body()


def _parser_for(reader: Reader) -> Any:
    parser = httptools.HttpRequestParser(reader)
    # Data behind a request that ends the connection is ignored, not an error in the middle of the answer.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _missing_of(exchange: HttpExchange | None) -> int | None:
    """Return how many bytes are missing of a body whose length is known."""
    if exchange is None or exchange.content_length is None:
        return None
    return exchange.content_length - exchange.body_size


def _framing_field(exchange: HttpExchange) -> bytes:
    if exchange.content_length is None:
        return b"transfer-encoding: chunked"
    return b"content-length: %d" % exchange.content_length
