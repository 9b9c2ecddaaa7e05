from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.errors import RequestTimeout
from orchestrator.http import listeners
from orchestrator.http.exchange import Exchange
from orchestrator.http.limits import ServerLimits
from tests.orchestrator.raw_http import (
    GET,
    SOON,
    RawClient,
    app_of,
    check_error,
    chunked,
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

# --- deadlines ------------------------------------------------------------------------------------


def test_a_client_that_never_sends_is_cut_off(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
            assert await client.is_closed()

    run(main)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\n", GET[:-2], b"\r\nGET", post(b"")[:-2]])
def test_a_slow_head_is_408(start: bytes, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(start)
            check_error(answer, 408)
            assert answer.closes
            assert await client.is_closed()
            assert [type(error) for error in site.refused] == [RequestTimeout]

    run(main)


def test_a_dripping_head_is_408(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(header_timeout_s=0.3)) as site, site.client() as client:
            dripping = asyncio.create_task(drip(client, GET[:-2] + b"X: " + b"a" * 10_000))
            check_error(await client.answer(), 408)
            dripping.cancel()

    run(main)


async def drip(client: RawClient, data: bytes) -> None:
    for byte in data:
        client.send(bytes([byte]))
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "start", [post(b"abc")[:-1], chunked(b"abc")[:-1], chunked(b"abc")[:-6], post(b"abc")[:-3]]
)
def test_a_body_that_stops_is_408(start: bytes, run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_idle_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(start)
            check_error(answer, 408)
            assert answer.closes
            assert await client.is_closed()

    run(main)


def test_a_body_that_drips_is_408_in_the_end(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_timeout_s=0.3)) as site, site.client() as client:
            dripping = asyncio.create_task(drip(client, post(b"a" * 10_000)))
            check_error(await client.answer(), 408)
            dripping.cancel()

    run(main)


def test_a_refused_body_that_stops_is_cut_off(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(body_idle_timeout_s=SOON)) as site, site.client() as client:
            answer = await client.ask(post(b"abc", b"Content-Encoding: gzip")[:-1])
            check_error(answer, 415)
            assert not answer.closes
            assert await client.is_closed()

    run(main)


def test_an_idle_connection_is_closed_without_a_word(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(), timeout_keep_alive=SOON) as site, site.client() as client:
            assert (await client.ask(GET)).status == 200
            assert await client.is_closed()

    run(main)


def test_empty_lines_do_not_keep_a_connection(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax(), timeout_keep_alive=0.3) as site, site.client() as client:
            assert (await client.ask(GET)).status == 200
            dripping = asyncio.create_task(drip(client, b"\r\n" * 10_000))
            assert await client.is_closed()
            dripping.cancel()

    run(main)


def test_the_application_may_take_its_time(run: Any) -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.read_body()
        await asyncio.sleep(0.8)  # longer than all deadlines
        exchange.start(200, [])
        exchange.feed(b"a")
        await asyncio.sleep(0.8)
        exchange.finish(b"b")

    async def main() -> None:
        limits = ServerLimits(0.5, 0.5, 0.5, 0.5, sweep_s=0.01)
        async with (
            serving(app_of(slow), limits, timeout_keep_alive=SOON) as site,
            site.client() as client,
        ):
            assert (await client.ask(post(b"abc"))).body == b"ab"

    run(main)


@pytest.mark.pure  # extends HttpProtocol
def test_the_sweep_survives_a_fault(run: Any, logs_errors: None) -> None:
    class Faulty(listeners.HttpProtocol):
        is_first = True

        def expire(self, now: float) -> None:
            if self.is_first:
                self.is_first = False
                raise ValueError("as it should")
            super().expire(now)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listeners, "HttpProtocol", Faulty)
            async with serving(app_of(echo), lax(header_timeout_s=SOON)) as site, site.client() as client:
                assert await client.is_closed()

    run(main)


def test_the_sweep_rests_while_no_connection_is_open(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo), lax()) as site:
            sweep = site.protocol.shared.sweep
            for _ in range(2):
                async with site.client() as client:
                    await client.ask(GET)
                    assert sweep._is_armed
                await until(lambda: not sweep._is_armed)

    run(main)
