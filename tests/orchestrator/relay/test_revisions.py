"""In a rollout a request that is sent again may go to workers of another revision; its hand-off may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.workers.worker import Worker
from tests.orchestrator.fakes import JSON, FakeCluster, params_of, read
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
FOUR = ("prefill", "prefill", "decode", "decode")


class Rollout:
    """A cluster has a prefill and a decode worker of each of two revisions; the first decode leg fails."""

    def __init__(self, pair: str, fails: str) -> None:
        self.cluster = FakeCluster(roles=FOUR, routing=RoutingConfig.model_validate({"pair": pair}))
        self.handed: list[tuple[str, str]] = []  # revisions of who has prefilled, and who got the hand-off
        self.prefills = 0
        self._fails = fails
        for worker in self.cluster.registry.workers:
            worker.revision = worker.name[-1]
            self._serve(worker)

    def _serve(self, worker: Worker) -> None:
        role, revision, upstream = worker.address.role, str(worker.revision), self.cluster.upstream

        async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
            self.prefills += 1
            if self.prefills == 1 and self._fails == "unreachable":
                upstream.refuse(self.cluster.origin(f"decode/{revision}"))
            params = params_of(f"{revision}{self.prefills}") | {"remote_engine_id": revision}
            reply.answer(200, json.dumps({"choices": [], "kv_transfer_params": params}).encode(), JSON)

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            self.handed.append((read(request)["kv_transfer_params"]["remote_engine_id"], revision))
            if len(self.handed) == 1 and self._fails == "refused":
                reply.answer(503, b'{"error": {"message": "no room"}}', JSON)
            else:
                await self.cluster.workers.decode(request, reply)

        upstream.serve(worker.origin, prefill if role == "prefill" else decode)


@pytest.mark.parametrize("fails", ["refused", "unreachable"])
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("pair", ["same_revision", "same_if_known"])
def test_a_hand_off_goes_to_no_other_revision(pair: str, fails: str, is_stream: bool) -> None:
    """Neither with the request that is sent again, nor to have its blocks freed."""

    async def main() -> None:
        rollout = Rollout(pair, fails)
        assert (await rollout.cluster.ask({**CHAT, "stream": is_stream})).status == 200
        await rollout.cluster.flow.aclose()
        assert rollout.prefills == 2
        assert all(one == other for one, other in rollout.handed), rollout.handed
        await rollout.cluster.aclose()

    run_virtually(main())


def test_it_may_where_pairs_are_of_any() -> None:
    async def main() -> None:
        rollout = Rollout("any", "unreachable")
        assert (await rollout.cluster.ask(CHAT)).status == 200
        await rollout.cluster.flow.aclose()
        assert rollout.prefills == 1
        ((one, other),) = rollout.handed
        assert one != other
        await rollout.cluster.aclose()

    run_virtually(main())
