"""Workers with several data-parallel engines: each is chosen like a worker, and its legs name it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from orchestrator.config.addresses import ranks_of
from orchestrator.config.options import RoutingConfig
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import FakeCluster, read

RANK = b"x-data-parallel-rank"
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi " * 500}]}
Test = Callable[[FakeCluster], Awaitable[None]]


def run(test: Test, **routing: Any) -> FakeCluster:
    async def main() -> FakeCluster:
        section = RoutingConfig.model_validate(routing)
        cluster = FakeCluster(routing=section, ranks=3)
        await asyncio.wait_for(test(cluster), 60)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


def ranks(requests: list[MemoryRequest]) -> list[bytes]:
    return [value for request in requests for name, value in request.headers if name == RANK]


def test_each_engine_is_a_candidate_and_its_legs_name_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(6):
            assert (await cluster.ask(CHAT, headers=[(RANK, b"7")])).status == 200
        assert len(ranks(cluster.upstream.requests)) == len(cluster.upstream.requests) == 12
        for role in ("prefill", "decode"):
            assert sorted(ranks(cluster.legs(role))) == [b"0", b"0", b"1", b"1", b"2", b"2"]
            assert len({request.origin for request in cluster.legs(role)}) == 1

    run(test, prefill="round_robin", decode="round_robin")


def test_a_prompt_goes_back_to_the_engine_that_has_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(5):
            await cluster.ask(CHAT)
        assert len(set(ranks(cluster.legs("prefill")))) == 1
        assert len(set(ranks(cluster.legs("decode")))) == 3

    run(test, prefill="prefix", decode="round_robin")


def test_a_release_names_an_engine_too() -> None:
    async def test(cluster: FakeCluster) -> None:
        async def refuse(request: MemoryRequest, reply: MemoryReply) -> None:
            if "cache_salt" in read(request):
                await cluster.workers.decode(request, reply)
            else:
                reply.answer(400, b"{}", {b"content-type": b"application/json"})

        cluster.upstream.serve(cluster.origin("decode/0.dp0"), refuse)
        assert (await cluster.ask(CHAT)).status == 400
        await cluster.flow.aclose()
        decode, release = ranks(cluster.legs("decode"))
        assert decode != release  # not the one that has just refused

    run(test)


def test_an_engine_that_is_drained_leaves_the_others() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.registry.drain(cluster.worker("prefill/0.dp1"))
        for _ in range(4):
            await cluster.ask(CHAT)
        assert set(ranks(cluster.legs("prefill"))) == {b"0", b"2"}

    run(test, prefill="round_robin")


def test_names_of_workers_that_are_added_count_on() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert cluster.registry.next_index("m", "decode") == 1
        there = cluster.worker("decode/0.dp0").address
        assert len(cluster.registry.all_at("m", "decode", there.url)) == 3
        assert [address.name for address in ranks_of(there, 1)] == [there.name]

    run(test)
