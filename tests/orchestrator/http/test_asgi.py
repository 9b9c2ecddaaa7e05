"""What only the adapter for plain ASGI does; the contract that it shares is in test_exchange.py."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from orchestrator.errors import BodyTooLarge
from orchestrator.http.asgi import AsgiExchange
from tests.orchestrator.raw_http import SMALL, no_errors_logged, run

__all__ = ["no_errors_logged", "run"]  # fixtures


def test_the_adapter_bounds_the_body(run: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with AsgiExchange(scope, receive, send, max_body_bytes=SMALL.max_body_bytes) as exchange:
            with pytest.raises(BodyTooLarge):
                await exchange.read_body()
            raise BodyTooLarge("as it says")

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
            assert (await client.post("/", content=b"a" * 2000)).status_code == 413

    run(main)


def test_the_adapter_passes_failures_of_the_server_on(run: Any) -> None:
    async def send(message: Any) -> None:
        raise ValueError("as it should")

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        scope = {"method": "GET", "path": "/", "query_string": b"", "headers": []}
        with pytest.raises(ValueError, match="as it should"):
            async with AsgiExchange(scope, receive, send) as exchange:
                exchange.respond(200, [], b"")
        assert exchange.is_complete

    run(main)
