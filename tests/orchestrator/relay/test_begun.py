"""What the planner hears of hand-offs and of prompts that one worker prefills."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.auto import Auto
from orchestrator.routing.planner import Planner
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import JSON, FakeCluster

CHAT = {"model": "m", "messages": [{"role": "user", "content": "What is prefill? " * 200}]}
STREAM = {**CHAT, "stream": True}
TOGETHER = {"prefill": "prefix", "decode": "least_tokens"}


def run(test: Callable[[FakeCluster, Planner], Awaitable[None]], roles: Any, **routing: Any) -> None:
    async def main() -> None:
        cluster = FakeCluster(roles=roles, routing=RoutingConfig.model_validate(routing))
        await test(cluster, cluster.flow._routes["m"].planner)
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_a_stream_shows_how_long_its_hand_off_took() -> None:
    async def test(cluster: FakeCluster, planner: Planner) -> None:
        await cluster.ask(CHAT)
        assert planner.links.all.seen == 0  # a whole answer does not show when it began
        for count in (1, 2):
            await cluster.ask(STREAM)
            assert planner.links.all.seen == count

    run(test, ("prefill", "decode"), **TOGETHER)


def test_a_hand_off_that_failed_shows_nothing() -> None:
    async def test(cluster: FakeCluster, planner: Planner) -> None:
        async def fail(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()  # it was pulled
            reply.answer(500, b"{}", JSON)

        cluster.upstream.serve(cluster.origin("decode/0"), fail)
        exchange = await cluster.ask(STREAM)
        assert exchange.status >= 500
        assert planner.links.all.seen == 0

    run(test, ("prefill", "decode"), **TOGETHER)


def test_policies_that_choose_apart_measure_nothing() -> None:
    async def test(cluster: FakeCluster, planner: Planner) -> None:
        await cluster.ask(STREAM)
        assert planner.links.all.seen == 0

    run(test, ("prefill", "decode"), prefill="round_robin")


def sites(auto: Auto | None) -> list[Any]:
    assert auto is not None
    return [*auto._sites.values()]


def test_a_stream_of_one_worker_shows_how_fast_it_prefills() -> None:
    async def test(cluster: FakeCluster, planner: Planner) -> None:
        await cluster.ask(CHAT)
        (site,) = sites(planner.auto)
        assert (site.seen, site.legs) == (0, 0)
        for _ in range(2):
            await cluster.ask(STREAM)
        assert (site.seen, site.legs) == (2, 0)

    run(test, ("decode",), disaggregate="auto")


def test_with_auto_all_that_is_counted_ends() -> None:
    async def test(cluster: FakeCluster, planner: Planner) -> None:
        await asyncio.gather(*(cluster.ask(document) for document in (CHAT, STREAM) * 10))
        found = sites(planner.auto)
        assert {(site.legs, site.pending) for site in found} == {(0, 0)}
        assert {record.status for record in cluster.telemetry.records} == {200}

    run(test, ("prefill", "decode", "decode"), disaggregate="auto")
