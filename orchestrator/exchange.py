"""One request and its answer, as the data plane sees them: the seam between HTTP servers and `relay.py`.

`server.py` implements `Exchange` on its own connections, without ASGI's messages in between, and puts it into
`scope["extensions"]["baton.exchange"]`. `AsgiExchange` does the same over plain ASGI, for other servers and for
tests in one process. `serve()` picks whichever is there:

    async def app(scope, receive, send):
        await serve(relay, scope, receive, send)    # async def relay(exchange: Exchange) -> None
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Protocol

from orchestrator.errors import BatonError, BodyTooLarge, ClientGone, WorkerAnswered
from orchestrator.ids import IdSource, request_id_from

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

EXTENSION = "baton.exchange"


class Exchange(Protocol):
    """One HTTP request and the answer to it. Everything happens on the event loop's thread.

    The answer is either one `respond()`, or `start()`, any number of `feed()` and one `finish()`; calling out of
    that order raises RuntimeError. The synchronous methods never wait and never raise because the client left:
    what they write is then dropped, `feed()` returns False and `drain()` raises `ClientGone`.

    Header names and values are bytes, names in lower case. `x-request-id`, `connection` and
    `transfer-encoding` are the server's: never give them. Without `content-length`, `start()` makes a chunked
    answer (HTTP/1.0: one that ends with the connection). Line breaks and NUL in a header are a ValueError.

    Who leaves without having finished the answer, by returning or raising, gets this from the server: a
    `BatonError` becomes its own answer, anything else a 500, and once `start()` was called the connection is
    cut without a clean end.
    """

    method: str
    path: str  # percent-decoded
    query: bytes  # without "?"
    headers: list[tuple[bytes, bytes]]  # names in lower case, in the order of arrival
    client: tuple[str, int] | None
    content_length: int | None  # None: chunked, or no body

    @property
    def request_id(self) -> str:
        """The client's own `x-request-id` if it is one that may be repeated, else ours; always the same."""
        ...

    @property
    def is_gone(self) -> bool:
        """The client's connection was lost before the answer was complete."""
        ...

    @property
    def is_started(self) -> bool:
        """`start()` or `respond()` was called: the status can no longer be changed."""
        ...

    @property
    def is_complete(self) -> bool:
        """`finish()` or `respond()` was called: nothing more may be written."""
        ...

    def header(self, name: bytes) -> bytes | None:
        """The value of a request header (name in lower case); of several with that name, the last."""
        ...

    def on_leave(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` once, synchronously, when the client leaves before the answer is complete.

        At once if it has left already. One callback at a time: a new one replaces the old, None removes it.
        A client that closes only its sending half counts as gone. Not called for `abort()`.
        """
        ...

    async def read_body(self) -> bytes:
        """The whole body; to be called at most once (RuntimeError). Does not suspend if the body is there.

        Raises `ClientGone`, `RequestTimeout` (too slow), `BodyTooLarge` (a chunked body over the limit) or
        `ClientError` (broken framing). The caller answers the last three like any other error; the server
        then closes the connection where it must.
        """
        ...

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer in one write. `content-length` is added; HEAD gets no body."""
        ...

    def start(self, status: int, headers: Headers) -> None:
        """Begin an answer. The head leaves with the first `feed()`, or with `drain()` or `finish()`."""
        ...

    def feed(self, chunk: bytes) -> bool:
        """Write a piece of the body; b"" writes nothing. False: wait (`drain`, `on_writable`) before the next.

        The piece is taken in any case; nothing is lost when the caller goes on, memory only grows.
        """
        ...

    async def drain(self) -> None:
        """Return when `feed()` may go on: at once unless it returned False. Raises `ClientGone`."""
        ...

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Call `callback`, synchronously, whenever `feed()` may go on after it returned False.

        The same as `drain()` for a push of chunks (`transport.base.Answer.pump`). Not called once the client
        has left. One callback at a time; None removes it.
        """
        ...

    def finish(self, chunk: bytes = b"") -> None:
        """The last piece and the clean end of the answer, in one write."""
        ...

    def abort(self) -> None:
        """Cut the connection: the client sees that the answer is not whole. No effect once complete."""
        ...


def error_answer(error: BatonError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body that tell a client of `error`."""
    if isinstance(error, WorkerAnswered):
        headers = [(b"content-type", error.content_type)]
        if error.retry_after is not None:
            headers.append((b"retry-after", error.retry_after))
        return error.answered_status, headers, error.content
    headers = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    return error.status, headers, error.body()


async def serve(
    handler: Callable[[Exchange], Awaitable[None]], scope: Scope, receive: Receive, send: Send
) -> None:
    """Run `handler` on the server's own exchange if it offers one, else on an `AsgiExchange`."""
    exchange = scope.get("extensions", {}).get(EXTENSION)
    if exchange is not None:
        await handler(exchange)
        return
    async with AsgiExchange(scope, receive, send) as adapter:
        await handler(adapter)


class AsgiExchange:
    """`Exchange` over plain ASGI, as a context manager: leaving it sends what is still to be sent.

    Slower than the server's own. What was fed leaves with `drain()`, so `feed()` always returns False.
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
        raise NotImplementedError
