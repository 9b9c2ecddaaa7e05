"""Requests on connections of our own server have this hot implementation of `exchange.Exchange`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, Final

from orchestrator.errors import BatonError, ClientGone, Unavailable
from orchestrator.http.body import Body
from orchestrator.http.carrier import Carrier
from orchestrator.http.exchange import BodySource, Exchange, Handler, Headers
from orchestrator.http.head import NO_TARGET, Head
from orchestrator.http.ids import valid_request_id
from orchestrator.http.waiters import Waiters
from orchestrator.wire.headers import fields_of, header_block

logger: Final = logging.getLogger("baton.server")

JOIN_LIMIT: Final = 16 * 1024  # copying a smaller body behind its head is cheaper than a second buffer
# Of what is left of a body that nobody wants, to keep the connection: as much as a body has without a file.
WORTH_READING: Final = 16 * 1024 * 1024
NO_BODY: Final[tuple[int, ...]] = (204, 304)  # statuses whose answers have no body


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())


STATUS_LINES: Final = {status.value: _status_line(status) for status in HTTPStatus}


class HttpExchange(Exchange):
    """This is an `orchestrator.http.exchange.Exchange` on a connection of our own server.

    `connection` is told when the answer is whole; `head`, with the reason for which the server refuses the
    request by it, if there is one, is the reader's, and `body` is filled by it.
    """

    # Class attributes are defaults of what is seldom looked at: to find one costs as much as to set three.
    is_counted = True

    _on_leave: Callable[[], None] | None = None
    _on_writable: Callable[[], None] | None = None
    _drains: Waiters | None = None
    _head = b""  # of an answer that was started, until it is written
    _is_chunked = False
    _is_flowing = False  # a chunked answer is under way: its head is written, it is neither complete nor cut
    _length_left: int | None = None  # bytes that `content-length` still promises
    _has_no_body = False  # of the answer: HEAD, 204, 304

    def __init__(self, connection: Carrier, head: Head, refusal: BatonError | None) -> None:
        self.connection = connection
        self.head = head
        self.body = Body(connection, head.awaits_continue)
        self.refusal = refusal
        self.method = head.method
        self.headers = head.headers
        self.content_length = head.content_length
        self.keep_alive = head.keep_alive  # what is left of the connection can be used for another request
        self.is_gone = self.is_started = self.is_complete = False
        self.body_size = 0  # bytes received
        self.added = b""  # a header block that goes out with the answer, whoever answers
        self._request_id: str | None = None

    def __repr__(self) -> str:
        return f"<HttpExchange {self.method} {self.path!r} of {self.client}>"

    # --- the request

    @property
    def path(self) -> str:
        return self.head.target.path

    @property
    def query(self) -> bytes:
        return self.head.target.query

    @property
    def client(self) -> tuple[str, int] | None:
        return self.connection.addresses.client

    @property
    def request_id(self) -> str:
        if self._request_id is None:
            given = self.head.fields.get(b"x-request-id")
            valid = valid_request_id(given) if given is not None else None
            self._request_id = valid or self.connection.ids.fresh()
        return self._request_id

    def rename(self, request_id: str) -> None:
        """Take the id that the handler has for the request."""
        self._request_id = request_id

    def header(self, name: bytes) -> bytes | None:
        return self.head.fields.get(name)

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        if self.is_gone and callback is not None:
            callback()
        else:
            self._on_leave = callback

    def read_body(self) -> Coroutine[Any, Any, bytes]:
        return self.body.read(self.is_started)

    @property
    def source(self) -> BodySource:
        return self.body

    # --- what the connection reports

    def leave(self) -> None:
        """Note that the client is gone."""
        if not self.is_complete:
            self._set_gone()
        callback, self._on_leave = self._on_leave, None
        self._wake_drains()
        if callback is not None and self.is_gone:
            callback()

    def _set_gone(self) -> None:
        self.is_gone = True
        self._is_flowing = False
        self.body.leave()

    def writable(self) -> None:
        """Note that the client has taken enough of the answer."""
        self._wake_drains()
        if self._on_writable is not None and not self.is_complete:
            self._on_writable()

    # --- the answer

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if self.is_started:
            raise RuntimeError("the answer was started before")
        if status in NO_BODY:
            head, body = self._compose(status, headers, b""), b""
        else:
            head = self._compose(status, headers, b"content-length: %d\r\n" % len(body))
        self.is_started = True
        if self.method == "HEAD":
            body = b""
        if not self.is_gone:
            if len(body) < JOIN_LIMIT:
                self.connection.write(head + body)
            else:
                self.connection.writelines((head, body))
        self._complete()

    def start(self, status: int, headers: Headers) -> None:
        if self.is_started:
            raise RuntimeError("the answer was started before")
        self._has_no_body = self.method == "HEAD" or status in NO_BODY
        self._length_left = _content_length(headers)
        framing = b""
        if self._length_left is None and not self._has_no_body:
            framing = self._unbounded_framing()
        self._head = self._compose(status, headers, framing)
        self.is_started = True

    def _unbounded_framing(self) -> bytes:
        if self.head.http_version == "1.0":
            self.keep_alive = False
            return b""
        self._is_chunked = True
        return b"transfer-encoding: chunked\r\n"

    def _compose(self, status: int, headers: Headers, framing: bytes) -> bytes:
        """Return the head of the answer. Raises `ValueError` if a name or value would break it."""
        # Who waits for 100 may or may not send the body behind another answer: what comes next is unknown.
        # And where a body ends that is too large already, nobody knows.
        connection = self.connection
        if connection.is_ending or not (self.body.is_received or self._is_end_near()):
            self.keep_alive = False
        return b"%b%b%bx-request-id: %b\r\n%b%b" % (
            STATUS_LINES.get(status) or _status_line(status),
            headers if isinstance(headers, bytes) else header_block(headers),
            self.added,
            (self._request_id or self.request_id).encode(),
            framing,
            connection.date.end if self.keep_alive else connection.date.last_end,
        )

    def _is_end_near(self) -> bool:
        """Return whether the rest of the body comes, and is worth to be read."""
        rest = (self.content_length or 0) - self.body_size
        return rest <= WORTH_READING and not self.body.awaits_continue and self.body.failure is None

    def feed(self, chunk: bytes) -> bool:
        connection = self.connection
        if self._is_flowing and chunk:
            connection.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        else:
            self._feed_otherwise(chunk)
        return not (connection.is_write_paused or self.is_gone)

    def _feed_otherwise(self, chunk: bytes) -> None:
        """Write what is not a further piece of a chunked answer."""
        self._check_open()
        if chunk and not self.is_gone:
            data = self._framed(chunk)
            self._is_flowing = self._is_chunked
            if data:
                self.connection.write(data)

    def _framed(self, chunk: bytes) -> bytes:
        """Return the piece as it goes on the wire, behind the head if that is pending."""
        head, self._head = self._head, b""
        if self._is_chunked:
            return b"%b%x\r\n%b\r\n" % (head, len(chunk), chunk)
        if self._has_no_body:
            return head
        if self._length_left is not None:
            self._length_left -= len(chunk)
            if self._length_left < 0:
                raise RuntimeError("the answer is longer than its content-length")
        return head + chunk if head else chunk

    async def drain(self) -> None:
        if self._head and not self.is_gone:
            head, self._head = self._head, b""
            self.connection.write(head)
        if self.connection.is_write_paused:
            await self.wait_writable()
        if self.is_gone:
            raise ClientGone("the client left")

    async def wait_writable(self) -> None:
        """Return when the client has taken enough of the answer, or is gone."""
        self._drains = self._drains or Waiters()
        while self.connection.is_write_paused and not self.is_gone:
            await self._drains.wait()

    def _wake_drains(self) -> None:
        if self._drains is not None:
            self._drains.wake()

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._on_writable = callback

    def finish(self, chunk: bytes = b"") -> None:
        self._check_open()
        if not self.is_gone:
            data = self._framed(chunk) if chunk else self._head
            if self._is_chunked:
                data += b"0\r\n\r\n"
            if self._length_left and not self._has_no_body:
                raise RuntimeError("the answer is shorter than its content-length")
            if data:
                self.connection.write(data)
        self._complete()

    def abort(self) -> None:
        if self.is_complete or self.is_gone:
            return
        self._on_leave = None
        self._set_gone()
        is_ended_by_close = self.is_started and not self._is_chunked and self._length_left is None
        self.connection.cut(resets=is_ended_by_close)
        self._wake_drains()

    def _check_open(self) -> None:
        if not self.is_started or self.is_complete:
            raise RuntimeError("the answer is not open")

    def _complete(self) -> None:
        self.is_complete = True
        self._is_flowing = False
        self._on_leave = None
        if self.body.waiters is not None:
            self.body.waiters.wake()  # for the rest of a body that is no longer of use
        if not self.is_gone:
            self.connection.answered()


def _content_length(headers: Headers) -> int | None:
    """Return the content length that the headers of an answer promise."""
    if isinstance(headers, bytes) and headers.find(b"content-length: ") < 0:
        return None
    fields = fields_of(headers) if isinstance(headers, bytes) else headers
    return next((int(value) for name, value in fields if name == b"content-length"), None)


# --- who answers ----------------------------------------------------------------------------------


async def run(exchange: HttpExchange, handler: Handler) -> None:
    """Let `handler` answer, and see that there is an answer whatever it does."""
    try:
        await handler(exchange)
    except BatonError as error:
        _settle(exchange, error)
    except Exception:  # of whatever kind: the client gets an answer, the log the reason
        level = logging.DEBUG if exchange.is_gone else logging.ERROR
        logger.log(level, "%r failed", exchange, exc_info=True)
        _settle(exchange, BatonError("internal error"))
    except BaseException:
        _settle(exchange, Unavailable("the server is shutting down"))
        raise
    else:
        if not exchange.is_complete and not exchange.is_gone:
            logger.error("%r was left without a whole answer", exchange)
            _settle(exchange, BatonError("internal error"))
    finally:
        exchange.connection.tasks.discard(exchange.task)


def refuse(exchange: HttpExchange, error: BatonError) -> None:
    """Answer with `error`, in place of a handler."""
    on_refused, path = exchange.connection.on_refused, _path_of(exchange.head)
    if on_refused is not None:
        on_refused(error, exchange.request_id, path)
    exchange.respond(*exchange.connection.form_error(path, error))


def _path_of(head: Head) -> str:
    """Return the path, also of a head that was refused before it was parsed."""
    if head.target is not NO_TARGET:
        return head.target.path
    return head.url.partition(b"?")[0].decode("ascii", "replace")


def _settle(exchange: HttpExchange, error: BatonError) -> None:
    """Answer in place of a handler that has given up with `error`."""
    if exchange.is_complete or exchange.is_gone:
        return
    if exchange.is_started:
        exchange.abort()
    else:
        exchange.respond(*exchange.connection.form_error(exchange.path, error))
