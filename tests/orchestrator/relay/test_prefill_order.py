"""Prefill legs say when it is their turn, for engines that go by priorities."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import FakeCluster, FakeExchange

PRIORITY = b"x-vllm-priority"
Fields = Sequence[tuple[bytes, bytes]]


def chat(words: int) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi " * words}]}


async def cluster_with(**routing: Any) -> FakeCluster:
    return FakeCluster(routing=RoutingConfig.model_validate(routing))


def priorities(request: MemoryRequest) -> list[bytes]:
    return [value for name, value in request.headers if name == PRIORITY]


def turns(cluster: FakeCluster) -> list[int]:
    return [int(priorities(request)[0]) for request in cluster.legs("prefill")]


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded"])
def test_a_turn_is_the_arrival_and_three_times_what_the_prompt_takes(policy: str) -> None:
    async def test() -> None:
        cluster = await cluster_with(prefill_order="shortest", prefill=policy)
        before_ms = time.time() * 1000
        await cluster.ask(chat(10))
        await cluster.ask(chat(20_000))
        await cluster.ask(chat(10_000_000 // 3))
        short, long, longest = (turn - before_ms for turn in turns(cluster))
        assert -2000 < short < 8000  # as it came, on a slow machine
        assert 3000 < long - short < 13_000  # 15,000 tokens take 1.35 s
        assert longest - short < 15_000 + 8000  # it is not overtaken for longer
        for request in cluster.legs("decode"):
            assert priorities(request) == []
        await cluster.aclose()

    asyncio.run(test())


def test_a_prompt_in_the_workers_cache_is_short() -> None:
    async def test() -> None:
        cluster = await cluster_with(prefill_order="shortest", prefill="prefix")
        await cluster.ask(chat(20_000))
        await cluster.ask(chat(20_000))
        first, second = turns(cluster)
        assert first - second > 1000
        await cluster.aclose()

    asyncio.run(test())


def test_clients_have_no_say_where_priorities_are_ours() -> None:
    async def test(order: str) -> list[list[bytes]]:
        cluster = await cluster_with(prefill_order=order)
        fields: Fields = [(PRIORITY, b"-5")]
        await cluster.serve(FakeExchange(json.dumps(chat(1)).encode(), headers=list(fields)))
        await cluster.aclose()
        return [priorities(request) for request in cluster.upstream.requests]

    assert asyncio.run(test("fifo")) == [[b"-5"], [b"-5"]]
    prefill, decode = asyncio.run(test("shortest"))
    assert len(prefill) == 1
    assert prefill != [b"-5"]
    assert decode == []


def test_a_leg_that_goes_again_as_plain_json_keeps_its_turn() -> None:
    async def test() -> None:
        cluster = await cluster_with(prefill_order="shortest")
        worker = cluster.worker("prefill/0")
        worker.abilities.token_ids = ("base64",)
        cluster.worker("decode/0").abilities.token_ids = ("base64",)
        refused: list[MemoryRequest] = []

        async def refuse_once(request: MemoryRequest, reply: MemoryReply) -> None:
            if refused:
                await cluster.workers.prefill(request, reply)
            else:
                refused.append(request)
                reply.answer(400, b"{}", {b"content-type": b"application/json"})

        cluster.upstream.serve(worker.origin, refuse_once)
        assert (await cluster.ask(chat(1))).status == 200
        first, second = turns(cluster)
        assert first == second
        await cluster.aclose()

    asyncio.run(test())
