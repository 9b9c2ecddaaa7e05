from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fastapi import FastAPI

from bench.shared.processes import free_port
from orchestrator.config.options import LimitsConfig, OrchestratorConfig
from orchestrator.errors import StartError
from orchestrator.http.exchange import Exchange
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import PublicServer, Server, admin_served, bound, uvicorn_config
from tests.orchestrator.raw_http import (
    GET,
    Site,
    app_of,
    check_error,
    echo,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

# --- listeners ------------------------------------------------------------------------------------


def test_a_bound_socket_listens_until_it_is_left() -> None:
    with bound("127.0.0.1:0", backlog=5) as listener:
        address = listener.getsockname()
        socket.create_connection(address).close()
    assert listener.fileno() == -1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_port_that_is_taken_is_named() -> None:
    with bound("127.0.0.1:0", backlog=5) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(StartError) as raised, bound(address, backlog=5):
            pytest.fail("two cannot listen there")
    assert str(raised.value).startswith(f"cannot listen on {address}: Address already in use")


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]"])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    """These are for documentation; the second needs a socket of another family."""
    with pytest.raises(StartError) as raised, bound(f"{host}:80", backlog=5):
        pytest.fail("nobody can listen there")
    assert str(raised.value).startswith(f"cannot listen on {host}:80: ")


# --- what uvicorn is told -------------------------------------------------------------------------


def test_what_uvicorn_is_told(tmp_path: Path) -> None:
    limits = LimitsConfig(header_timeout_s=1, body_idle_timeout_s=2, body_timeout_s=3, max_body_bytes=4096)
    options = OrchestratorConfig(
        listen="[::1]:8000",
        limits=limits,
        backlog=5,
        limit_concurrency=6,
        limit_max_requests=7,
        limit_max_requests_jitter=8,
        timeout_keep_alive=9,
        timeout_graceful_shutdown=10,
    )
    config = uvicorn_config(app_of(echo), options, random=Random(1), listen="127.0.0.1:1")
    assert (config.host, config.port) == ("127.0.0.1", 1)
    assert 7 <= (config.limit_max_requests or 0) <= 15
    assert config.backlog == 5
    assert config.timeout_keep_alive == 9
    assert config.timeout_graceful_shutdown == 10
    bounds = ServerLimits.of(options)
    assert (bounds.header_timeout_s, bounds.body_idle_timeout_s, bounds.body_timeout_s) == (1, 2, 3)
    assert (bounds.max_body_bytes, bounds.limit_concurrency) == (4096, 6)


def test_there_is_no_limit_to_draw_a_jitter_for() -> None:
    options = OrchestratorConfig(limit_max_requests_jitter=8)
    config = uvicorn_config(app_of(echo), options, random=Random(1))
    assert config.limit_max_requests is None
    assert f"{config.host}:{config.port}" == options.listen


# --- connections of one server --------------------------------------------------------------------


def test_connections_close_after_their_answers_also_those_to_come(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as idle, site.client() as other:
            assert not (await idle.ask(GET)).closes
            assert not (await other.ask(GET)).closes
            site.protocol.close_after_answers()
            assert len(site.state.connections) == 2
            for client in (idle, other):
                assert (await client.ask(GET)).closes
                assert await client.is_closed()
            assert (await site.ask(GET)).closes

    run(main)


def test_new_limits_are_for_new_connections(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site, site.client() as before:
            await before.ask(GET)
            site.protocol.limit(ServerLimits(max_body_bytes=10))
            assert (await before.ask(post(b"a" * 20))).status == 200
            check_error(await site.ask(post(b"a" * 20)), 413)

    run(main)


def test_nothing_is_left_of_a_connection_that_is_lost(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site:
            async with site.client() as client:
                await client.ask(GET)
                assert len(site.protocol.shared.open) == 1
            await until(lambda: site.is_empty)
            assert not site.protocol.shared.open

    run(main)


# --- servers --------------------------------------------------------------------------------------


def server(kind: Any = Server, *more: Any) -> Any:
    return kind(
        uvicorn_config(app_of(echo), OrchestratorConfig(allowed_hosts=["a"]), random=Random(1)), *more
    )


def test_a_server_stops_and_then_cuts() -> None:
    made = server()
    for _ in range(2):
        made.stop()
        assert (made.should_exit, made.force_exit) == (True, False)
    made.stop_or_cut()
    assert (made.should_exit, made.force_exit) == (True, True)


def test_the_first_signal_stops_a_server_and_the_second_cuts_it() -> None:
    made = server()
    made.stop_or_cut()
    assert (made.should_exit, made.force_exit) == (True, False)
    made.stop_or_cut()
    assert (made.should_exit, made.force_exit) == (True, True)
    other = server()
    other.cut()
    assert (other.should_exit, other.force_exit) == (True, True)


class Requests:
    """Notes what it is told of the end (`Draining`)."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def announce_drain(self) -> None:
        self.told.append("announce")

    def refuse_requests(self) -> None:
        self.told.append("refuse")

    def end_requests(self) -> None:
        self.told.append("end")


@contextlib.asynccontextmanager
async def draining(handler: Any, **config: Any) -> AsyncIterator[tuple[PublicServer, Site, Requests]]:
    """A public server that has not been asked to stop yet; it has stopped when the block has."""
    options = OrchestratorConfig(listen="127.0.0.1:1", allowed_hosts=["a"], **config)
    requests = Requests()
    made = PublicServer(uvicorn_config(app_of(handler), options, random=Random(1)), requests, options)
    with bound("127.0.0.1:0", backlog=5) as listener:
        task = asyncio.create_task(made.serve(sockets=[listener]))
        await until(lambda: made.started)
        try:
            yield (
                made,
                Site(listener.getsockname()[1], made.server_state, made.config.http_protocol_class),
                requests,
            )
        finally:
            made.stop()
            await task
    assert not made.server_state.connections


def test_a_server_that_drains_says_so_step_by_step(run: Any) -> None:
    gate = asyncio.Event()

    async def gated(exchange: Exchange) -> None:
        await gate.wait()
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with draining(gated) as (made, site, requests), site.client() as client:
            client.send(GET)
            await until(lambda: bool(site.state.tasks))
            made.stop()
            await until(lambda: requests.told == ["announce", "refuse"])
            async with site.client() as other:  # which the listener still takes
                other.send(GET)
                await until(lambda: len(site.state.tasks) == 2)
                gate.set()
                for each in (client, other):
                    assert (await each.answer()).closes
            await until(lambda: requests.told == ["announce", "refuse", "end"])

    run(main)


def test_notice_comes_before_refusals_unless_somebody_is_in_a_hurry(run: Any) -> None:
    async def main() -> None:
        async with draining(echo, drain_notice_s=600, timeout_graceful_shutdown=600) as (
            made,
            site,
            requests,
        ):
            made.stop()
            await until(lambda: requests.told == ["announce"])
            assert (await site.ask(GET)).closes
            assert requests.told == ["announce"]
            made.cut()
            await until(lambda: requests.told == ["announce", "refuse", "end"])

    run(main)


# --- the admin listener ---------------------------------------------------------------------------


def admin() -> FastAPI:
    app = FastAPI()

    @app.get("/echo")
    async def answer() -> str:
        return "fine"

    return app


def test_there_need_be_no_admin_listener(run: Any) -> None:
    async def main() -> None:
        async with admin_served(admin(), OrchestratorConfig(admin=None), Random(1)):
            pass

    run(main)


def test_the_admin_listener_has_none_of_the_clients_limits(run: Any) -> None:
    async def main() -> None:
        port = free_port()
        options = OrchestratorConfig(
            admin=f"127.0.0.1:{port}", allowed_hosts=["a"], limit_concurrency=1, limit_max_requests=1
        )
        async with admin_served(admin(), options, Random(1)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(GET)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                assert b"connection: close" not in head
                assert await reader.readexactly(6) == b'"fine"'
            writer.close()
            await writer.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    run(main)


def test_an_admin_port_that_is_taken_is_named(run: Any) -> None:
    async def main() -> None:
        with bound("127.0.0.1:0", backlog=5) as listener:
            options = OrchestratorConfig(admin=f"127.0.0.1:{listener.getsockname()[1]}")
            with pytest.raises(StartError, match=f"cannot listen on {options.admin}"):
                async with admin_served(admin(), options, Random(1)):
                    pytest.fail("two cannot listen there")

    run(main)
