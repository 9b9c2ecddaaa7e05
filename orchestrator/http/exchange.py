"""An exchange is one request and its answer, as the data plane sees them.

It is the seam between HTTP servers and `relay/scope.py`.

`http/http_exchange.py` implements `Exchange` on the connections of our own server, without ASGI's messages in
between. `http/asgi.py` does the same over plain ASGI, for other servers and for tests in one process.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence

from orchestrator.compiled import mypyc_attr
from orchestrator.errors import BatonError

Headers = Sequence[tuple[bytes, bytes]] | bytes


@mypyc_attr(allow_interpreted_subclasses=True)
class BodySource(ABC):
    """A source gives the body of a request as it comes in, before its answer begins. While nobody takes of
    it, the client is not read on past a small bound.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def is_taken(self) -> bool:
        """Return whether `take_some()` has returned the whole body."""
        ...

    @abstractmethod
    def take_some(self) -> bytes:
        """Return what has come since the last call, and ask the client for more. It never waits: b"" if there
        is nothing now. Raises as `Exchange.read_body()` does.
        """
        ...

    @abstractmethod
    def on_more(self, callback: Callable[[], None] | None) -> None:
        """Call `callback`, synchronously, whenever `take_some()` may have something, or raises.

        There is one callback at a time; None removes it.
        """
        ...


@mypyc_attr(allow_interpreted_subclasses=True)
class Exchange(ABC):
    """An exchange is one HTTP request and the answer to it. All of it happens on the event loop's thread.

    The answer is either one `respond()`, or `start()`, any number of `feed()` and one `finish()`; calling out
    of that order raises RuntimeError. The synchronous methods never wait and never raise because the client
    left: what they write is then dropped, `feed()` returns False and `drain()` raises `ClientGone`.

    Header names and values are bytes, names in lower case. `x-request-id`, `connection` and
    `transfer-encoding` are the server's: never give them. Without `content-length`, `start()` makes a chunked
    answer (HTTP/1.0: one that ends with the connection). Headers of an answer are pairs, or a
    `headers.header_block()`. Line breaks and NUL in a header are a ValueError.

    Who leaves without having finished the answer, by returning or raising, gets this from the server: a
    `BatonError` becomes its own answer, anything else a 500, and once `start()` was called the connection is
    cut without a clean end.
    """

    method: str
    headers: list[tuple[bytes, bytes]]  # names in lower case, in the order of arrival
    content_length: int | None  # None: chunked, or no body
    body_size: int  # bytes of the body that have arrived
    is_counted: bool  # its server counts the body as held while it comes in (`held.py`)
    is_gone: bool  # the client's connection was lost before the answer was complete
    is_started: bool  # `start()` or `respond()` was called: the status can no longer be changed
    is_complete: bool  # `finish()` or `respond()` was called: nothing more may be written
    task: asyncio.Task[None] | None = None  # that answers it, if its server says so

    @property
    @abstractmethod
    def path(self) -> str:
        """Return the path, percent-decoded and without the query."""
        ...

    @property
    @abstractmethod
    def query(self) -> bytes:
        """Return what follows the "?"."""
        ...

    @property
    @abstractmethod
    def client(self) -> tuple[str, int] | None:
        """Return address and port of the client; None on Unix sockets."""
        ...

    @property
    @abstractmethod
    def request_id(self) -> str:
        """Return the client's `x-request-id` if that may be repeated, else ours; always the same."""
        ...

    @abstractmethod
    def header(self, name: bytes) -> bytes | None:
        """Return the value of a request header (name in lower case); of several with that name, the last."""
        ...

    @abstractmethod
    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` once, synchronously, when the client leaves before the answer is complete.

        It is called at once if the client has left already. There is one callback at a time: a new one
        replaces the old, None removes it. A client that closes only its sending half counts as gone. It is
        not called for `abort()`.
        """
        ...

    @abstractmethod
    async def read_body(self) -> bytes:
        """Return the whole body, at most once (else RuntimeError).

        This does not suspend if the body is there.

        Raises `ClientGone`, `RequestTimeout` (too slow), `BodyTooLarge` (a chunked body over the limit) or
        `ClientError` (broken framing). The caller answers the last three like any other error; the server
        then closes the connection where it must.
        """
        ...

    @property
    @abstractmethod
    def source(self) -> BodySource:
        """Return what gives the body piece by piece, where `read_body()` would keep too much."""
        ...

    @abstractmethod
    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Write the whole answer at once. `content-length` is added; HEAD gets no body."""
        ...

    @abstractmethod
    def start(self, status: int, headers: Headers) -> None:
        """Begin an answer. The head leaves with the first `feed()`, or with `drain()` or `finish()`."""
        ...

    @abstractmethod
    def feed(self, chunk: bytes) -> bool:
        """Write a piece of the body; b"" writes nothing. False: `drain()` before the next.

        The piece is taken in any case; nothing is lost when the caller goes on, memory only grows.
        """
        ...

    @abstractmethod
    async def drain(self) -> None:
        """Return when `feed()` may go on: at once unless it returned False. Raises `ClientGone`."""
        ...

    @abstractmethod
    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback`, synchronously, whenever `feed()` may go on after it returned False.

        This is `drain()` for a push of chunks (`transport.base.Answer.pump`). It is not called once the
        client has left. There is one callback at a time; None removes it.
        """
        ...

    @abstractmethod
    def finish(self, chunk: bytes = b"") -> None:
        """Write the last piece and the clean end of the answer at once."""
        ...

    @abstractmethod
    def abort(self) -> None:
        """Cut the connection, so that the client sees that the answer is not whole.

        No effect once complete.
        """
        ...


ErrorAnswer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers and body
FormError = Callable[[str, BatonError], ErrorAnswer]  # the form may depend on the path


def error_answer(error: BatonError) -> ErrorAnswer:
    """Return what tells a client of `error`."""
    return error.status, error.headers(), error.body()


def form_error(path: str, error: BatonError) -> ErrorAnswer:
    """Tell of errors in one form, whatever the path."""
    return error_answer(error)


Handler = Callable[[Exchange], Awaitable[None]]
