"""In a rollout a request that is sent again may go to workers of another revision; its hand-off may not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.plan import KEPT
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import Role
from orchestrator.workers.worker import Worker
from tests.orchestrator.fakes import JSON, FakeCluster, FakeExchange, params_of, read
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
SIX: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode", "decode", "decode")
FOUR: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode")


class Rollout:
    """A cluster has a prefill and a decode worker of each of two revisions; the first decode leg fails,
    or its worker is started anew as the other revision while others prefill.
    """

    def __init__(self, pair: str, fails: str, roles: Sequence[Role] = FOUR) -> None:
        self.cluster = FakeCluster(roles=roles, routing=RoutingConfig.model_validate({"pair": pair}))
        self.handed: list[tuple[str, str]] = []  # revisions of who has prefilled, and who got the hand-off
        self.prefills = 0
        self.on_prefill: Callable[[], None] = lambda: None
        self._fails = fails
        for worker in self.cluster.registry.workers:
            worker.revision = str(int(worker.name[-1]) % 2)
            self._serve(worker)

    def _serve(self, worker: Worker) -> None:
        role, revision, upstream = worker.address.role, str(worker.revision), self.cluster.upstream

        async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
            self.prefills += 1
            if self.prefills == 1 and self._fails == "restarted":
                self.restart("1" if revision == "0" else "0", self.planned())
            if self.prefills == 1 and self._fails == "unreachable":
                upstream.refuse(self.planned().origin)
            params = params_of(f"{revision}{self.prefills}") | {"remote_engine_id": revision}
            self.on_prefill()
            reply.answer(200, json.dumps({"choices": [], "kv_transfer_params": params}).encode(), JSON)

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            found = read(request).get("kv_transfer_params", {}).get("remote_engine_id")
            self.handed.append((found, str(worker.revision)))
            if len(self.handed) == 1 and self._fails == "refused":
                reply.answer(503, b'{"error": {"message": "no room"}}', JSON)
            else:
                await self.cluster.workers.decode(request, reply)

        upstream.serve(worker.origin, prefill if role == "prefill" else decode)

    def planned(self) -> Worker:
        """Return the decode worker of the only request: its seat is taken before others prefill."""
        workers = self.cluster.registry.workers
        return next(worker for worker in workers if worker.address.role == "decode" and worker.in_flight)

    def restart(self, revision: str, worker: Worker) -> None:
        """It is there again, at the same URL, with another revision; a probe has found it well."""
        self.cluster.registry.judge.mark_gone(worker, "refused")
        self.cluster.registry.judge.mark_ready(worker)
        worker.revision = revision


@pytest.mark.parametrize("fails", ["refused", "unreachable", "restarted"])
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("pair", ["same_revision", "same_if_known"])
def test_a_hand_off_goes_to_no_other_revision(pair: str, fails: str, is_stream: bool) -> None:
    """Neither with the request that is sent again, nor to have its blocks freed."""

    async def main() -> None:
        rollout = Rollout(pair, fails, SIX if fails == "restarted" else FOUR)
        assert (await rollout.cluster.ask({**CHAT, "stream": is_stream})).status == 200
        await rollout.cluster.flow.aclose()
        assert rollout.prefills == 2
        assert all(one == other for one, other in rollout.handed), rollout.handed
        await rollout.cluster.aclose()

    run_virtually(main())


def test_blocks_are_freed_by_another_one_if_the_planned_worker_has_come_back_as_another_revision() -> None:
    async def main() -> None:
        rollout = Rollout("same_if_known", "restarted", SIX)
        exchange = FakeExchange(json.dumps(CHAT).encode())
        rollout.on_prefill = exchange.leave
        await rollout.cluster.serve(exchange)
        await rollout.cluster.flow.aclose()
        ((one, other),) = rollout.handed
        assert one == other
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
        (record,) = rollout.cluster.telemetry.records
        assert record.prefill_worker == f"m/prefill/{one}"  # not who was planned for the next attempt
        assert record.reasons is not None
        assert str(record.reasons.prefill_choice) == KEPT
        await rollout.cluster.aclose()

    run_virtually(main())


def test_one_that_has_come_back_as_another_revision_serves_alone_if_nobody_else_can_prefill() -> None:
    async def main() -> None:
        rollout = Rollout("same_if_known", "restarted", ("prefill", "decode"))
        assert (await rollout.cluster.ask(CHAT)).status == 200
        assert rollout.handed[0] == (None, "1")
        await rollout.cluster.aclose()

    run_virtually(main())


def test_it_gets_the_hand_off_where_pairs_are_of_any() -> None:
    async def main() -> None:
        rollout = Rollout("any", "restarted", ("prefill", "decode"))
        assert (await rollout.cluster.ask(CHAT)).status == 200
        assert rollout.handed == [("0", "1")]
        await rollout.cluster.aclose()

    run_virtually(main())
