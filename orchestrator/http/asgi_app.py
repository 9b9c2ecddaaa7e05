"""Plain ASGI applications on our own server, which serves exchanges: the control plane is one."""

from __future__ import annotations

from typing import Any, Final, cast

from orchestrator.http.exchange import Exchange
from orchestrator.http.http_exchange import HttpExchange

ASGI: Final = {"version": "3.0", "spec_version": "2.3"}


class AsgiApp:
    """An ASGI 3 application as the `Handler` of requests of our own server."""

    def __init__(self, app: Any, state: dict[str, Any]) -> None:
        """`state` is the lifespan's, copied into each scope."""
        self._app = app
        self._state = state

    async def serve(self, exchange: Exchange) -> None:
        own = cast("HttpExchange", exchange)
        await self._app(_scope(own, self._state.copy()), own.receive, own.send)


def _scope(exchange: HttpExchange, state: dict[str, Any]) -> dict[str, Any]:
    head, addresses = exchange.head, exchange.connection.addresses
    return {
        "type": "http",
        "asgi": ASGI,
        "http_version": head.http_version,
        "method": head.method,
        "scheme": addresses.scheme,
        "path": head.target.path,
        "raw_path": head.target.raw_path,
        "query_string": head.target.query,
        "root_path": "",
        "headers": head.headers,
        "client": addresses.client,
        "server": addresses.server,
        "state": state,
    }
