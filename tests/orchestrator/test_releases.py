"""A prefill whose client leaves: its worker is asked to end it; an answer that still comes is released."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from orchestrator.telemetry import LeaseState
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.aborts import PATH as ABORT
from tests.orchestrator.fakes import JSON, FakeCluster, FakeExchange
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi", "max_tokens": 5}


class Prefill:
    """A worker whose prefills last until the test or an abort ends them."""

    def __init__(self, cluster: FakeCluster, *, can_abort: bool = True) -> None:
        self._cluster = cluster
        self._can_abort = can_abort
        self.aborted: list[str] = []
        self.names: list[str] = []
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.closed = 0  # connections that the orchestrator closed, wholly or by half
        self.answers_aborted = False  # as one that had ended already when it heard of it
        cluster.upstream.serve(cluster.origin("prefill/0"), self.serve)

    async def serve(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target == ABORT:
            await self._abort(json.loads(request.body)["request_ids"], reply)
            return
        self.names.append(dict(request.headers)[b"x-request-id"].decode())
        self.has_begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.closed += 1
            raise
        if self.aborted and not self.answers_aborted:
            reply.answer(200, b'{"choices":[{"finish_reason":"abort"}],"kv_transfer_params":null}', JSON)
        else:
            await self._cluster.workers.prefill(request, reply)

    async def _abort(self, names: list[str], reply: MemoryReply) -> None:
        if not self._can_abort:
            reply.answer(404, b'{"detail":"Not Found"}', JSON)
            return
        self.aborted += names
        reply.answer(200, b"", {})
        self.may_end.set()


async def leave(cluster: FakeCluster, prefill: Prefill, document: dict[str, Any]) -> None:
    path = "/v1/completions" if "prompt" in document else "/v1/chat/completions"
    exchange = FakeExchange(json.dumps(document).encode(), path=path)
    serving = asyncio.create_task(cluster.serve(exchange))
    await prefill.has_begun.wait()
    exchange.leave()
    await serving


def leases(cluster: FakeCluster) -> dict[str, int]:
    cluster.flow.ledger.sweep()
    row, first = cluster.telemetry.row, cluster.telemetry.layout.leases
    return {state.name: row[first + state] for state in LeaseState if row[first + state]}


@pytest.mark.parametrize(("document", "name"), [(CHAT, "chatcmpl-{}"), (COMPLETION, "cmpl-{}-0")])
def test_a_worker_is_asked_to_end_a_prefill_by_the_name_that_it_gave_it(
    document: dict[str, Any], name: str
) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Prefill(cluster)
        await leave(cluster, prefill, document)
        await cluster.aclose()
        assert prefill.aborted == [name.format(prefill.names[0])]
        assert prefill.closed == 0
        assert leases(cluster) == {}
        cluster.assert_at_rest()

    run_virtually(main())


def test_blocks_of_a_prefill_that_had_ended_when_it_was_to_be_aborted_are_released() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Prefill(cluster)
        prefill.answers_aborted = True
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert leases(cluster) == {"RELEASED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_prefill_that_ends_soon_is_not_aborted() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Prefill(cluster)
        prefill.may_end.set()
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert prefill.aborted == []
        assert leases(cluster) == {"RELEASED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_the_connection_of_a_worker_that_cannot_be_asked_is_closed() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Prefill(cluster, can_abort=False)
        for _ in range(2):
            prefill.has_begun.clear()
            await leave(cluster, prefill, CHAT)
            await asyncio.sleep(2)
        assert prefill.closed == 2
        assert sum(leg.target == ABORT for leg in cluster.upstream.requests) == 1  # it is asked only once
        await cluster.aclose()
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_worker_that_goes_on_all_the_same_is_dropped() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Prefill(cluster)
        prefill.may_end.set = lambda: None  # type: ignore[method-assign]
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert prefill.closed == 1
        cluster.assert_at_rest()

    run_virtually(main())
