"""Our own server, which serves exchanges, can serve plain ASGI applications: the control plane is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

from orchestrator.errors import BatonError
from orchestrator.http.asgi import Message
from orchestrator.http.exchange import Exchange, Headers
from orchestrator.http.http_exchange import HttpExchange, refuse

ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


class AsgiApp:
    """This makes an ASGI 3 application a `Handler` of our own server."""

    def __init__(self, app: Any, state: dict[str, Any]) -> None:
        """The lifespan's `state` is copied into each scope."""
        self._app = app
        self._state = state

    async def serve(self, exchange: Exchange) -> None:
        """Have the application answer a request that nobody else reads or answers."""
        call = AsgiCall(cast("HttpExchange", exchange))
        await self._app(call.scope(self._state.copy()), call.receive, call.send)


class AsgiCall:
    """An ASGI application sees one request as this.

    If the body fails (too slow, too large, malformed), `receive()` answers that and reports a disconnect.
    """

    _is_end_given = False  # receive() has returned the end of the body
    _is_taken_over = False  # receive() has answered

    def __init__(self, exchange: HttpExchange) -> None:
        self._exchange = exchange

    def scope(self, state: dict[str, Any]) -> dict[str, Any]:
        exchange = self._exchange
        target, addresses = exchange.head.target, exchange.connection.addresses
        return {
            "type": "http",
            "asgi": ASGI,
            "http_version": exchange.head.http_version,
            "method": exchange.method,
            "scheme": addresses.scheme,
            "path": target.path,
            "raw_path": target.raw_path,
            "query_string": target.query,
            "root_path": "",
            "headers": exchange.headers,
            "client": addresses.client,
            "server": addresses.server,
            "state": state,
        }

    async def receive(self) -> Message:
        exchange, body = self._exchange, self._exchange.body
        if not (body.is_received or self._is_over()):
            body.want(exchange.is_started)
        while not (body.pieces or self._is_over()):
            if body.is_received and not self._is_end_given:
                break
            await body.wait()
        if body.failure is not None:
            self._take_over(body.failure)
        if self._is_over():
            return {"type": "http.disconnect"}
        self._is_end_given = body.is_received
        return {"type": "http.request", "body": body.read_piece(), "more_body": not body.is_received}

    def _is_over(self) -> bool:
        exchange = self._exchange
        return exchange.is_gone or exchange.is_complete or exchange.body.failure is not None

    def _take_over(self, failure: BatonError) -> None:
        if not self._exchange.is_started and not self._exchange.is_gone:
            self._is_taken_over = True
            refuse(self._exchange, failure)

    async def send(self, message: Message) -> None:
        exchange, kind = self._exchange, message["type"]
        if exchange.connection.is_write_paused:
            await exchange.wait_writable()
        if exchange.is_gone or self._is_taken_over:
            return
        if kind == "http.response.body":
            body = bytes(message.get("body", b""))  # some applications send a memoryview
            if message.get("more_body", False):
                exchange.feed(body)
            else:
                exchange.finish(body)
        elif kind == "http.response.start":
            exchange.start(message["status"], self._adopt(message.get("headers", ())))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def _adopt(self, headers: Iterable[Sequence[bytes]]) -> Headers:
        """Return an application's headers without those that are the server's."""
        exchange = self._exchange
        adopted: list[tuple[bytes, bytes]] = []
        for name, value in headers:
            lower = name.lower()
            if lower == b"x-request-id":
                exchange.rename(value.decode("latin-1"))
            elif lower == b"connection":
                exchange.keep_alive = exchange.keep_alive and b"close" not in value.lower()
            elif lower != b"transfer-encoding":
                adopted.append((lower, value))
        return adopted
