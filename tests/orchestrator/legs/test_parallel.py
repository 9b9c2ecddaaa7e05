"""A prefill leg beside its decode leg: who is ended, who is blamed and what is raised, without sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from orchestrator.errors import BatonError, WorkerAnswered, WorkerCutShort, WorkerGarbage
from orchestrator.legs.connectors.base import Connector, Handoff
from orchestrator.legs.leg import AnswerLeg, PrefillLeg
from orchestrator.legs.parallel import ParallelPrefill
from orchestrator.telemetry.counters import LeaseState
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from orchestrator.wire.info import END_PATH
from orchestrator.workers.states import WorkerState
from tests.orchestrator.fakes import JSON, read
from tests.orchestrator.legs.one_request import (
    LIMIT,
    TRUSTED,
    OneRequest,
    answers,
    cuts_short,
    hangs,
    says_garbage,
)
from tests.orchestrator.legs.one_request import run as run_one


class Push(Connector):
    """Both legs are sent at once, and meet by the name of the transfer."""

    def __init__(self) -> None:
        super().__init__("push", sends_both_at_once=True)

    def prefill_params(self, transfer: str) -> bytes:
        return json.dumps({"transfer_id": transfer}).encode()

    def read(self, answer: bytes, *, is_packed: bool, has_ids: bool) -> Handoff:
        raise AssertionError("nobody reads a hand-off out of an answer")

    def pair(self, transfer: str, host: str, port: int | None) -> Handoff:
        return Handoff(json.dumps({"transfer_id": transfer, "remote_host": host}).encode())


class Pair:
    """The two legs of one request, and whether the KV cache has gone over."""

    def __init__(self, one: OneRequest) -> None:
        self.one = one
        self.has_gone_over = False
        self.decode = AnswerLeg(one.legs, one.decode)
        self.decode.handoff = one.legs.bodies.connector.pair("t-1", "127.0.0.1", 5600)
        self.prefill = PrefillLeg(one.legs, one.prefill, one.decode, None, "t-1")

    def beside(self) -> ParallelPrefill:
        return ParallelPrefill(self.prefill, self.decode, self.one.cluster.flow._releases, self._answered)

    async def serve(self) -> bytes:
        """Send both legs as the flow does."""
        with self.decode, self.beside():
            try:
                content = await self.decode.read(LIMIT)
                self.decode.succeed()
                return content
            finally:
                self.decode.abort()

    def _answered(self) -> None:
        self.has_gone_over = True


def run(test: Any) -> None:
    async def with_pair(one: OneRequest) -> None:
        await test(one, Pair(one))
        await one.cluster.flow.aclose()
        assert one.cluster.upstream.stats().busy == 0
        row, first = one.cluster.telemetry.row, one.cluster.telemetry.layout.leases
        one.cluster.flow.ledger.sweep()
        assert [row[first + state] for state in LeaseState] == [0] * len(LeaseState)

    run_one(with_pair, connector=Push())


def after(moment: asyncio.Event, handler: LegHandler) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        await moment.wait()
        await handler(request, reply)

    return worker


def after_a_second(handler: LegHandler) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        await asyncio.sleep(1)
        await handler(request, reply)

    return worker


def test_both_legs_are_under_way_at_once() -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        may_answer, has_gone_over = asyncio.Event(), asyncio.Event()
        one.serve(one.prefill, after(may_answer, answers(200)))
        one.serve(one.decode, after(has_gone_over, answers(200, b"[1]")))
        serving = asyncio.create_task(pair.serve())
        await asyncio.sleep(1)
        assert (one.prefill.in_flight, one.decode.in_flight) == (1, 1)
        assert not pair.has_gone_over
        assert [read(leg)["kv_transfer_params"] for leg in one.cluster.upstream.requests] == [
            {"transfer_id": "t-1", "remote_host": "127.0.0.1"},
            {"transfer_id": "t-1"},
        ]
        may_answer.set()
        await asyncio.sleep(1)
        assert pair.has_gone_over
        has_gone_over.set()
        assert await serving == b"[1]"

    run(test)


def test_a_prefill_that_answers_gives_its_place_back_while_decode_goes_on() -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        may_answer = asyncio.Event()
        one.prefill.failures = 1
        one.serve(one.prefill, answers(200))
        one.serve(one.decode, after(may_answer, answers(200)))
        serving = asyncio.create_task(pair.serve())
        await asyncio.sleep(1)
        assert (one.prefill.in_flight, one.decode.in_flight) == (0, 1)
        assert pair.has_gone_over
        assert one.prefill.failures == 0
        may_answer.set()
        await serving

    run(test)


@pytest.mark.parametrize(
    ("handler", "error", "state", "failures"),
    [
        (cuts_short, WorkerCutShort, WorkerState.SUSPECT, 0),
        (says_garbage, WorkerGarbage, WorkerState.READY, 1),
        (answers(500), WorkerAnswered, WorkerState.READY, 1),
        (answers(400), WorkerAnswered, WorkerState.READY, 0),
    ],
)
def test_a_prefill_that_fails_ends_the_decode_leg_which_is_not_blamed(
    handler: LegHandler, error: type[BatonError], state: WorkerState, failures: int
) -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        one.serve(one.prefill, handler)
        one.serve(one.decode, hangs)
        with pytest.raises(error):
            await pair.serve()
        assert (one.prefill.state, one.prefill.failures) == (state, failures)
        assert (one.decode.state, one.decode.failures) == (WorkerState.READY, 0)
        assert one.legs.last is one.prefill
        assert not pair.has_gone_over

    run(test)


def test_a_decode_leg_that_fails_by_itself_is_blamed_and_ends_the_prefill() -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        ended: list[str] = []
        is_ended = asyncio.Event()

        async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
            if request.target == END_PATH:
                ended.append(json.loads(request.body)["request_id"])
                reply.answer(202, b"", {})
                is_ended.set()
            else:
                await is_ended.wait()
                reply.answer(200, b"{}", JSON)

        one.cluster.upstream.serve(one.prefill.origin, prefill, ends_legs=True)
        one.serve(one.decode, after_a_second(answers(500)))
        with pytest.raises(WorkerAnswered):
            await pair.serve()
        assert one.legs.last is one.decode
        assert one.decode.failures == 1
        assert one.told_of(one.prefill) == TRUSTED
        await asyncio.sleep(0)  # its task ends in the next turn of the loop
        assert one.prefill.in_flight == 0
        await one.cluster.flow.aclose()
        assert ended == [pair.prefill.id]

    run(test)


def test_a_request_that_is_cancelled_ends_both_and_blames_nobody() -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        one.serve(one.prefill, hangs)
        one.serve(one.decode, hangs)
        serving = asyncio.create_task(pair.serve())
        await asyncio.sleep(1)
        serving.cancel()
        await asyncio.wait([serving])
        assert serving.cancelled()
        assert (one.prefill.in_flight, one.decode.in_flight) == (0, 0)
        assert one.told_of(one.prefill) == TRUSTED
        assert one.told_of(one.decode) == TRUSTED

    run(test)


def test_a_block_that_ends_before_its_prefill_ends_that() -> None:
    """A decode worker that knows the prompt may answer before the KV cache has gone over."""

    async def test(one: OneRequest, pair: Pair) -> None:
        one.serve(one.prefill, hangs)
        one.serve(one.decode, after_a_second(answers(200, b"[1]")))
        assert await pair.serve() == b"[1]"
        await asyncio.sleep(0)  # its task ends in the next turn of the loop
        assert one.prefill.in_flight == 0
        assert not pair.has_gone_over
        assert one.told_of(one.prefill) == TRUSTED

    run(test)


def test_an_error_that_is_no_workers_is_raised_as_it_is() -> None:
    async def test(one: OneRequest, pair: Pair) -> None:
        one.serve(one.prefill, cuts_short)
        one.serve(one.decode, hangs)

        async def main() -> None:
            with pair.beside():
                await asyncio.sleep(1)
                raise ValueError("ours")

        with pytest.raises(ValueError, match="ours"):
            await main()
        assert one.legs.last is None

    run(test)
