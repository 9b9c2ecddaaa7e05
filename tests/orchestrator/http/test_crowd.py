"""More connections than there may be: who has to leave, and who is turned away."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from orchestrator.errors import BatonError, ClientError
from orchestrator.http.exchange import ErrorAnswer, Exchange, form_error
from tests.orchestrator.raw_http import (
    GET,
    app_of,
    check_error,
    echo,
    echo_after,
    lax,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures


def test_silent_connections_make_room_for_others_the_oldest_first(run: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo), lax(max_connections=4)))
            known = await stack.enter_async_context(site.client())
            assert (await known.ask(GET)).status == 200
            silent = [await stack.enter_async_context(site.client()) for _ in range(3)]
            silent[1].send(b"POST / HT")  # the beginning of a request is no request
            await until(lambda: len(site.state.connections) == 4)
            for client in silent:
                other = await stack.enter_async_context(site.client())
                assert await client.is_closed()
                assert (await other.ask(GET)).status == 200
            assert (await known.ask(GET)).status == 200
            assert len(site.state.connections) == 4

    run(main)


def test_a_flood_of_silent_connections_costs_one_idle_client_its_connection(run: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo), lax(max_connections=8)))
            known = [await stack.enter_async_context(site.client()) for _ in range(8)]
            for client in known:
                assert (await client.ask(GET)).status == 200
            for _ in range(100):
                await stack.enter_async_context(site.client())
            assert await known[0].is_closed()
            for client in known[1:]:
                assert (await client.ask(GET)).status == 200

    run(main)


def test_when_all_are_in_use_others_are_told_so(run: Any) -> None:
    gate = asyncio.Event()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo_after(gate)), lax(max_connections=2)))
            busy = [await stack.enter_async_context(site.client()) for _ in range(2)]
            for client in busy:
                client.send(post(b"abc"))
            await until(lambda: len(site.state.tasks) == 2)
            for _ in range(3):
                async with site.client() as other:
                    answer = await other.ask(post(b"abc") + GET)
                    check_error(answer, 503)
                    assert answer.closes
                    assert answer.headers["retry-after"] == "1"
                    assert answer.error["code"] == "too_many_connections"
                    assert await other.is_closed()
            assert [error.code for error in site.refused] == ["too_many_connections"] * 3
            await until(lambda: len(site.state.connections) == 2)
            gate.set()
            for client in busy:
                assert (await client.answer()).status == 200
            while (await site.ask(GET)).status == 503:  # it is not looked for idle ones all the time
                pass

    run(main)


def test_more_than_can_be_told_are_cut_off(run: Any) -> None:
    gate = asyncio.Event()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo_after(gate)), lax(max_connections=1)))
            busy = await stack.enter_async_context(site.client())
            busy.send(GET)
            await until(lambda: len(site.state.tasks) == 1)
            others = [await stack.enter_async_context(site.client()) for _ in range(50)]
            assert {(await client.rest())[0] for client in others[:-8]} == {b""}
            for client in others[-8:]:
                check_error(await client.ask(GET), 503)
            gate.set()
            assert (await busy.answer()).status == 200

    run(main)


def test_an_unread_answer_is_not_at_rest(run: Any) -> None:
    async def large(exchange: Exchange) -> None:
        exchange.respond(200, [], b"a" * 20_000_000)

    async def main() -> None:
        async with (
            serving(app_of(large), lax(max_connections=1)) as site,
            site.client(receive_buffer=4096) as slow,
        ):
            slow.send(GET)
            await until(lambda: any(connection.is_write_paused for connection in site.protocol.shared.open))
            assert site.protocol.shared.held.unsent() > 1_000_000
            check_error(await site.ask(GET), 503)
            answer = await slow.answer()
            assert len(answer.body) == 20_000_000

    run(main)


@pytest.mark.parametrize("path", [b"/health", b"/ready", b"/ping"])
def test_probes_are_answered_when_all_are_in_use(path: bytes, run: Any) -> None:
    gate = asyncio.Event()
    app = app_of(echo_after(gate, method="POST"))

    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app, lax(max_connections=2)))
            busy = [await stack.enter_async_context(site.client()) for _ in range(2)]
            for client in busy:
                client.send(post(b"abc"))
            await until(lambda: len(site.state.tasks) == 2)
            silent = [await stack.enter_async_context(site.client()) for _ in range(50)]
            for _ in range(20):
                async with site.client() as probe:
                    answer = await probe.ask(GET.replace(b" /echo ", b" %b?a=b " % path))
                    assert answer.status == 200
                    assert answer.closes
                    assert await probe.is_closed()
                check_error(await site.ask(GET.replace(b" /echo ", b" %b/more " % path)), 503)
            assert all([await client.is_closed() for client in silent[:-8]])
            gate.set()
            for client in busy:
                assert (await client.answer()).status == 200
            assert len(site.protocol.shared.crowd.parting) <= 8

    run(main)


def test_who_is_turned_away_is_told_so_in_the_form_of_what_it_asked_for(run: Any) -> None:
    def form(path: str, error: BatonError) -> ErrorAnswer:
        return form_error(path, ClientError(f"{path}: {error.message}"))

    async def main() -> None:
        async with serving(app_of(echo), lax(max_connections=1)) as site, site.client() as busy:
            site.protocol.shared.form_error = form
            busy.send(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\n")
            await until(lambda: len(site.state.tasks) == 1)
            answer = await site.ask(GET.replace(b" /echo ", b" /v1/messages "))
            assert answer.error["message"] == "/v1/messages: all connections to this server are in use"

    run(main)
