from __future__ import annotations

import asyncio
import gc
import os
import ssl
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import httpx
import pytest
import uvicorn

from orchestrator.config.options import OrchestratorConfig, TlsConfig
from orchestrator.http import deadlines
from orchestrator.http.exchange import Exchange
from orchestrator.http.listeners import uvicorn_config
from tests.orchestrator.certificate import CERT, KEY
from tests.orchestrator.raw_http import (
    GET,
    PATIENCE_S,
    Site,
    app_of,
    check_error,
    echo,
    lax,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

# --- too many -------------------------------------------------------------------------------------


def test_requests_above_the_limit_are_503_and_idle_connections_do_not_count(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        if exchange.path == "/echo":
            await gate.wait()
        await echo(exchange)

    async def main() -> None:
        limits = lax(limit_concurrency=1)
        async with (
            serving(app_of(gated), limits) as site,
            site.client() as idle,
            site.client() as first,
            site.client() as second,
        ):
            assert (await idle.ask(GET.replace(b"/echo", b"/other"))).status == 200
            first.send(GET)
            await until(lambda: len(site.state.tasks) == 1)
            answer = await second.ask(post(b"abc"))
            check_error(answer, 503)
            assert answer.headers["retry-after"] == "1"
            assert not answer.closes
            assert (await second.ask(GET.replace(b"/echo", b"/health"))).status == 200
            gate.set()
            assert (await first.answer()).status == 200
            assert (await second.ask(GET)).status == 200

    run(main)


# --- the end of a connection ----------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.pure  # nothing can refer weakly to objects of compiled classes
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_lost_connection_is_freed_without_the_collector(end: str, run: Any, no_collector: None) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site:
            async with site.client() as client:
                assert (await client.ask(post(b"abc"))).status == 200
                client.send(post(b"abc")[:-1])
                await until(lambda: bool(site.state.tasks))
                connection = weakref.ref(next(iter(site.state.connections)))
                if end == "reset":
                    client.reset()
            await until(lambda: connection() is None)

    run(main)


# --- under uvicorn --------------------------------------------------------------------------------


@asynccontextmanager
async def under_uvicorn(app: Any, **config: Any) -> AsyncIterator[tuple[uvicorn.Server, Site]]:
    options = OrchestratorConfig(listen="127.0.0.1:0", allowed_hosts=["a"], **config)
    server = uvicorn.Server(uvicorn_config(app, options, random=Random(1)))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield server, Site(port, server.server_state, server.config.http_protocol_class)
    finally:
        server.should_exit = True
        await serving
        assert not server.server_state.connections
        assert not server.server_state.tasks


def test_shutdown_closes_idle_connections_and_lets_busy_ones_finish(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        if exchange.path == "/stream":
            exchange.start(200, [])
            exchange.feed(b"a")
        if exchange.path != "/echo":
            await gate.wait()
        if exchange.path == "/stream":
            exchange.finish(b"b")
        else:
            await echo(exchange)

    async def main() -> None:
        async with (
            under_uvicorn(app_of(gated)) as (server, site),
            site.client() as idle,
            site.client() as busy,
            site.client() as stream,
        ):
            assert (await idle.ask(GET)).status == 200
            busy.send(GET.replace(b"/echo", b"/busy") + GET)
            stream.send(GET.replace(b"/echo", b"/stream"))
            await until(lambda: len(site.state.tasks) == 2)
            server.should_exit = True
            assert await idle.is_closed()
            gate.set()
            answer = await busy.answer()
            assert answer.status == 200
            assert answer.closes
            assert await busy.is_closed()
            assert (await stream.answer()).body == b"ab"
            assert await stream.is_closed()

    run(main)


def test_a_request_that_outlasts_the_shutdown_is_answered_503(run: Any, logs_errors: None) -> None:
    async def wait(exchange: Exchange) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with (
            under_uvicorn(app_of(wait), timeout_graceful_shutdown=0) as (server, site),
            site.client() as client,
        ):
            client.send(GET)
            await until(lambda: bool(site.state.tasks))
            server.should_exit = True
            answer = await client.answer()
            check_error(answer, 503)
            assert answer.closes
            await until(lambda: not site.state.tasks and not site.state.connections)

    run(main)


def test_the_last_requests_before_the_limit_say_close(run: Any) -> None:
    async def main() -> None:
        async with (
            under_uvicorn(app_of(echo), limit_max_requests=3) as (_, site),
            site.client() as client,
        ):
            closes = [(await client.ask(GET)).closes for _ in range(3)]
            assert closes == [False, False, True]
            assert await client.is_closed()

    run(main)


def test_tls(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "LINGER_S", PATIENCE_S)

    async def main() -> None:
        tls = TlsConfig(cert=os.fspath(CERT), key=os.fspath(KEY))
        async with under_uvicorn(app_of(echo), tls=tls) as (_, site):
            context = ssl.create_default_context(cafile=CERT)
            url = f"https://localhost:{site.port}/echo"
            async with httpx.AsyncClient(verify=context, timeout=PATIENCE_S) as client:
                assert (await client.post(url, content=b"abc")).json()["body"] == "abc"
                answer = await client.post(url, content=b"a" * 17 * 2**20)
                assert answer.status_code == 413

    run(main)
