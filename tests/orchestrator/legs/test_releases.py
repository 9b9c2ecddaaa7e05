"""Legs whose client leaves: their workers are asked to end them, and what is owed to a worker is paid."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from orchestrator.api.view import view_request
from orchestrator.errors import WorkerCutShort, WorkerGarbage
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.leg import Legs, PrefillLeg
from orchestrator.legs.releases import RELEASE_TIMEOUT_S
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import END_PATH as END
from tests.orchestrator.fakes import JSON, FakeCluster, FakeExchange, leg_name
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi", "max_tokens": 5}
STREAM = CHAT | {"stream": True}


class Slow:
    """A worker whose legs last until the test ends them, or the orchestrator asks for it."""

    def __init__(self, cluster: FakeCluster, role: str = "prefill", *, can_end: bool = True) -> None:
        self._workers = cluster.workers
        self._answer = getattr(cluster.workers, role)
        self._can_end = can_end
        self.ended: list[str] = []
        self.names: list[str] = []
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.is_deaf = 0  # so many times it does not know the leg yet that it is to end
        self.closed = 0  # connections that the orchestrator closed, wholly or by half
        self.has_answer = False  # already, when it hears that nobody wants it
        self.refusals = 0  # legs that it refuses when they end
        cluster.upstream.serve(cluster.origin(f"{role}/0"), self.serve, ends_legs=True)

    async def serve(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target == END:
            self._end(json.loads(request.body)["request_id"], reply)
            return
        name = leg_name(request)
        self.names.append(name)
        self.has_begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.closed += 1
            raise
        if self.refusals:
            self.refusals -= 1
            reply.answer(503, b"{}", JSON)
        elif name in self.ended and not self.has_answer:
            self._workers.pinned.clear()  # freed for a decode leg that ends in its engine
            reply.answer(200, b'{"choices":[{"finish_reason":"abort"}],"kv_transfer_params":null}', JSON)
        else:
            await self._answer(request, reply)

    def _end(self, name: str, reply: MemoryReply) -> None:
        if not self._can_end:
            reply.answer(404, b'{"detail":"Not Found"}', JSON)
            return
        reply.answer(202, b"", {})
        self.ended.append(name)
        if self.is_deaf:
            self.is_deaf -= 1
        else:
            self.may_end.set()


async def leave(cluster: FakeCluster, slow: Slow, document: dict[str, Any], client_id: bytes = b"") -> None:
    path = "/v1/completions" if "prompt" in document else "/v1/chat/completions"
    headers = [(b"x-request-id", client_id)] if client_id else []
    exchange = FakeExchange(json.dumps(document).encode(), path=path, headers=headers)
    serving = asyncio.create_task(cluster.serve(exchange))
    await slow.has_begun.wait()
    exchange.leave()
    await serving


def leases(cluster: FakeCluster) -> dict[str, int]:
    cluster.flow.ledger.sweep()
    row, first = cluster.telemetry.row, cluster.telemetry.layout.leases
    return {state.name: row[first + state] for state in LeaseState if row[first + state]}


# --- prefill ------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [CHAT, COMPLETION])
def test_a_worker_is_asked_to_end_a_prefill_by_the_name_that_it_had(document: dict[str, Any]) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        await leave(cluster, prefill, document)
        await cluster.aclose()
        assert prefill.ended == prefill.names
        assert prefill.closed == 0
        assert leases(cluster) == {}
        cluster.assert_at_rest()

    run_virtually(main())


def test_blocks_of_a_prefill_that_had_ended_when_it_was_to_be_ended_are_released() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        prefill.has_answer = True
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert leases(cluster) == {"RELEASED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_prefill_that_ends_soon_is_left_alone() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        prefill.may_end.set()
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert prefill.ended == []
        assert leases(cluster) == {"RELEASED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_worker_is_asked_again_while_its_engine_may_not_have_had_the_leg() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        prefill.is_deaf = 1
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert prefill.ended == 2 * prefill.names
        assert prefill.closed == 0
        cluster.assert_at_rest()

    run_virtually(main())


def test_the_connection_of_a_worker_that_cannot_be_asked_is_closed() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster, can_end=False)
        for _ in range(2):
            prefill.has_begun.clear()
            await leave(cluster, prefill, CHAT)
            await asyncio.sleep(2)
        assert prefill.closed == 2
        assert sum(leg.target == END for leg in cluster.upstream.requests) == 1  # it is asked only once
        await cluster.aclose()
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_worker_that_goes_on_all_the_same_is_dropped() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        prefill.is_deaf = 100
        await leave(cluster, prefill, CHAT)
        await cluster.aclose()
        assert prefill.closed == 1
        cluster.assert_at_rest()

    run_virtually(main())


# --- decode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [CHAT, STREAM])
@pytest.mark.parametrize("is_deaf", [0, 1])
def test_a_decode_leg_that_has_not_answered_is_ended_and_not_closed(
    document: dict[str, Any], is_deaf: int
) -> None:
    """A worker whose engine does not have it yet would forget it, and the blocks with it."""

    async def main() -> None:
        cluster = FakeCluster()
        decode = Slow(cluster, "decode")
        decode.is_deaf = is_deaf
        await leave(cluster, decode, document)
        assert leases(cluster) == {"USED": 1}
        await cluster.aclose()
        assert decode.ended == [decode.names[0]] * (is_deaf + 1)
        assert decode.closed == 0
        assert leases(cluster) == {"CONSUMED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_of_two_legs_whose_clients_call_them_alike_the_one_is_ended_whose_client_leaves() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        decode = Slow(cluster, "decode")
        named = [(b"x-request-id", b"same")]
        stays = asyncio.create_task(cluster.ask(CHAT, headers=named))
        await decode.has_begun.wait()
        decode.has_begun.clear()
        decode.is_deaf = 1
        await leave(cluster, decode, CHAT, b"same")
        await cluster.aclose()
        assert len(set(decode.names)) == 2
        assert set(decode.ended) == {decode.names[1]}
        assert (await stays).status == 200

    run_virtually(main())


def test_a_leg_that_was_refused_when_its_client_had_left_is_released() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        decode = Slow(cluster, "decode")
        decode.refusals = 1
        await leave(cluster, decode, CHAT)
        await cluster.aclose()
        assert leases(cluster) == {"RELEASED": 1}
        cluster.assert_at_rest()

    run_virtually(main())


def test_a_decode_leg_that_nobody_can_end_runs_out() -> None:
    """It is closed in the end; whether its blocks were pulled is not known."""

    async def main() -> None:
        cluster = FakeCluster()
        decode = Slow(cluster, "decode")
        decode.is_deaf = 100
        await leave(cluster, decode, CHAT)
        await cluster.aclose()
        assert decode.closed == 1
        assert leases(cluster) == {"USED": 1}

    run_virtually(main())


def test_the_decode_leg_of_a_worker_that_cannot_be_asked_is_closed_at_once() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        decode = Slow(cluster, "decode", can_end=False)
        await leave(cluster, decode, CHAT)
        await asyncio.sleep(0.01)
        assert decode.closed == 1
        assert leases(cluster) == {"CONSUMED": 1}
        await cluster.aclose()

    run_virtually(main())


def test_an_end_does_not_wait_for_a_worker_that_answers_nobody() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        prefill = Slow(cluster)
        prefill.is_deaf = 100
        await leave(cluster, prefill, CHAT)
        began = asyncio.get_running_loop().time()
        await cluster.flow.aclose()
        assert asyncio.get_running_loop().time() - began <= RELEASE_TIMEOUT_S
        assert prefill.closed == 1
        assert len(asyncio.all_tasks()) == 1
        await cluster.aclose()

    run_virtually(main())


# --- what a prefill worker answered -------------------------------------------------------------


@pytest.mark.parametrize("form", [msgspec.json, msgspec.msgpack], ids=["json", "msgpack"])
@pytest.mark.parametrize(
    ("reason", "text", "error"),
    [
        ("abort", "", WorkerCutShort),
        ("length", "", WorkerGarbage),
        ("length", '"finish_reason":"abort"', WorkerGarbage),
    ],
)
def test_a_prefill_that_its_worker_has_ended_by_itself_is_lost(
    form: Any, reason: str, text: str, error: type[Exception]
) -> None:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": reason}
    content = form.encode({"choices": [choice], "kv_transfer_params": None})
    content_type = {msgspec.json: b"application/json", msgspec.msgpack: b"application/msgpack"}[form]

    async def worker(_: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, content, {b"content-type": content_type})

    async def main() -> None:
        cluster = FakeCluster()
        prefill, decode = cluster.worker("prefill/0"), cluster.worker("decode/0")
        cluster.upstream.serve(prefill.origin, worker)
        view = view_request(json.dumps(CHAT).encode())
        legs = Legs(cluster.core.dispatcher, "m", LegBodies(view, "/v1/chat/completions"), b"")
        leg = PrefillLeg(legs, prefill, decode, None)
        answer = await leg.read(10_000)
        with pytest.raises(error):
            leg.handoff(answer)
        await cluster.aclose()

    asyncio.run(main())
