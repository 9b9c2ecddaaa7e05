"""What comes in is counted while it comes in, and bounded."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from orchestrator.errors import BatonError
from orchestrator.http.exchange import Exchange
from orchestrator.http.held import HeldBytes, Holder
from tests.orchestrator.raw_http import (
    CHUNKED_HEAD,
    GET,
    Site,
    app_of,
    check_error,
    echo,
    echo_after,
    logs_errors,
    no_errors_logged,
    post,
    run,
    serving,
    until,
)

__all__ = ["logs_errors", "no_errors_logged", "run"]  # fixtures

MIB = 1024 * 1024


class Fake(Holder):
    def __init__(self, held: HeldBytes, size: int) -> None:
        self.held, self.size = held, size
        self.errors: list[BatonError] = []

    def give_way(self, error: BatonError) -> None:
        self.errors.append(error)
        self.held.forget(self, self.size)


def test_the_newest_give_way_until_the_rest_fits() -> None:
    refused: list[int] = []
    held = HeldBytes(100, lambda: refused.append(held.size))
    fakes = [Fake(held, 30) for _ in range(3)]
    for fake in fakes:
        held.note(fake, 30)
    held.bodies = 50  # of requests that were read meanwhile
    held.note(fakes[0], 0)
    assert [len(fake.errors) for fake in fakes] == [0, 1, 1]
    assert (held.incoming, held.size) == (30, 80)
    assert refused == [140, 110]
    held.check()


def held_of(site: Site) -> HeldBytes:
    made: HeldBytes = site.protocol.shared.held
    return made


HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
BEGINNINGS = {
    "bodies": HEAD % MIB + b"a" * (MIB - 1),
    "chunked bodies": CHUNKED_HEAD + b"80000\r\n" + b"a" * 524_288 + b"\r\n",
    "heads": b"GET / HTTP/1.1\r\n" + b"X-Field: 0123456789\r\n" * 1000,
    "bodies behind another request": GET + HEAD % MIB + b"a" * (MIB - 1),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_nothing_under_way_exceeds_the_bound(name: str, run: Any) -> None:
    beginning = BEGINNINGS[name]

    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo)))
            held = held_of(site)
            held.most = 8 * len(beginning)
            clients = [await stack.enter_async_context(site.client()) for _ in range(30)]
            for client in clients:
                client.send(beginning)
            await until(lambda: len(site.refused) + sum_of_failures(clients) >= 20 or held.size > held.most)
            assert held.size <= held.most
        await until(lambda: held.size == 0)

    def sum_of_failures(clients: list[Any]) -> int:
        return sum(b" 503 " in bytes(client.reader._buffer) for client in clients)

    run(main)


def test_the_first_go_on_and_the_last_are_answered_503(run: Any) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo)))
            held = held_of(site)
            held.most = 4 * MIB
            clients = [await stack.enter_async_context(site.client()) for _ in range(10)]
            for client in clients:
                await client.send_all(HEAD % MIB + b"a" * (MIB - 1))
            for client in clients[4:]:
                answer = await client.answer()
                check_error(answer, 503)
                assert answer.closes
                assert answer.headers["retry-after"] == "1"
            for client in clients[:4]:
                client.send(b"b")
                assert (await client.answer()).status == 200
            await until(lambda: held.size == 0)
            assert (await clients[0].ask(GET)).status == 200

    run(main)


def test_requests_that_wait_behind_another_are_bounded(run: Any) -> None:
    gate = asyncio.Event()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(app_of(echo_after(gate))))
            held = held_of(site)
            held.most = 100_000
            clients = [await stack.enter_async_context(site.client()) for _ in range(10)]
            for client in clients:
                await client.send_all(GET)
            await until(lambda: len(site.state.tasks) == 10)
            for client in clients:
                await client.send_all(GET * 1000)
            await until(lambda: 0 < held.size <= held.most)
            gate.set()
            answered = [await client.answer() for client in clients]
            assert [answer.status for answer in answered] == [200] * 10
            assert sum(answer.closes for answer in answered) > 5
            for client in clients:
                client.reset()
        await until(lambda: held.size == 0)

    run(main)


ENDS = {
    "whole": lambda client: client.send(b"b"),
    "left": lambda client: client.reset(),
    "half closed": lambda client: client.half_close(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("reads", [True, False])
def test_nothing_stays_counted(end: str, reads: bool, run: Any) -> None:
    async def handler(exchange: Exchange) -> None:
        if reads:
            await exchange.read_body()
        exchange.respond(200, [], b"")

    async def main() -> None:
        async with serving(app_of(handler)) as site:
            held = held_of(site)
            for _ in range(3):
                async with site.client() as client:
                    await client.send_all(HEAD % MIB + b"a" * (MIB - 1))
                    await until(lambda: held.size > 0 or not reads)
                    ENDS[end](client)
                    await client.rest() if end != "whole" else await client.answer()
                await until(lambda: site.is_empty)
                assert (held.incoming, held._holders) == (0, {})

    run(main)


def test_a_small_request_is_never_counted(run: Any) -> None:
    async def main() -> None:
        async with serving(app_of(echo)) as site:
            held_of(site).most = 0
            assert (await site.ask(post(b"abc"))).status == 200

    run(main)
