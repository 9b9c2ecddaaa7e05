"""A worker is lost for good while it has a part in a request: its source lists another start in its place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from orchestrator.config.options import LimitsConfig
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import FakeCluster, read
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
FOUR = ("prefill", "prefill", "decode", "decode")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_hand_off_of_the_old_start_is_not_sent(is_stream: bool) -> None:
    """Its answer was on the way while the source told: who has its address now has none of these blocks."""

    async def main() -> None:
        cluster = FakeCluster(roles=FOUR)
        lost = cluster.worker("prefill/0")

        async def ends_meanwhile(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.registry.lose(lost, "its pod has ended")
            await cluster.workers.prefill(request, reply)

        cluster.upstream.serve(lost.origin, ends_meanwhile)
        assert (await cluster.ask({**CHAT, "stream": is_stream})).status == 200
        assert lost not in cluster.registry.workers
        (sent,) = cluster.legs("decode")
        assert read(sent)["kv_transfer_params"]["remote_request_id"] == "r1"  # of the other one
        await cluster.aclose()

    run_virtually(main())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_leg_that_is_silent_on_a_lost_worker_goes_elsewhere_soon(role: str) -> None:
    """Nobody resets its connection: the machine of a pod may be gone, and its address another one's."""

    async def main() -> float:
        cluster = FakeCluster(roles=FOUR, limits=LimitsConfig(leg_silence_s=3.0))
        cluster.core.start()
        worker = cluster.worker(f"{role}/0")

        async def is_silent(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.registry.lose(worker, "its pod has ended")
            await asyncio.sleep(10_000)

        cluster.upstream.serve(worker.origin, is_silent)
        began = asyncio.get_running_loop().time()
        assert (await cluster.ask(CHAT)).status == 200
        took_s = asyncio.get_running_loop().time() - began
        await cluster.aclose()
        return took_s

    assert run_virtually(main()) < 4.0
