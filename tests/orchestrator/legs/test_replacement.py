"""Legs that fail and are replaced: what the client gets, what workers get, and that nothing stays taken."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from orchestrator.config.options import LEASE_S, RoutingConfig
from orchestrator.legs.retry import BUDGET_LEAST
from orchestrator.telemetry.counters import LeaseState, RetryReason
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import Worker as RegisteredWorker
from tests.orchestrator.fakes import DONE, JSON, SSE, FakeCluster, FakeExchange, event, read

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
BOTH_KINDS = pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])
FOUR = ("prefill", "prefill", "decode", "decode")

Test = Callable[[FakeCluster], Awaitable[None]]
Worker = Callable[[MemoryRequest, MemoryReply], Awaitable[None]]


def run(test: Test, **options: Any) -> FakeCluster:
    """Run a test over a cluster of its own; at its end nothing may be held."""

    async def main() -> FakeCluster:
        cluster = FakeCluster(**{"roles": FOUR, **options})
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


async def cuts_short(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.cut_short()


async def says_garbage(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.garbage()


def answers(status: int, headers: dict[bytes, bytes] = JSON) -> Worker:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(status, b'{"error":{"message":"no","type":"x","param":null,"code":null}}', headers)

    return worker


async def streams_an_error(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(event({"error": {"message": "the blocks are gone", "type": "x", "code": 500}}))


ROLE = {"role": "assistant", "content": ""}


async def is_stopped(request: MemoryRequest, reply: MemoryReply) -> None:
    """As vLLM may end what has no token yet when SIGTERM stops it: without an error."""
    if read(request).get("stream"):
        reply.head(200, SSE)
        await reply.chunk(event({"choices": [{"index": 0, "delta": ROLE, "finish_reason": None}]}) + DONE)
    else:
        choice = {"index": 0, "message": ROLE, "finish_reason": "abort"}
        reply.answer(200, msgspec.json.encode({"choices": [choice], "usage": None}), JSON)


def spoil(cluster: FakeCluster, name: str, worker: Worker) -> None:
    cluster.upstream.serve(cluster.origin(name), worker)


def text_of(answer: FakeExchange) -> str:
    if answer.sent.startswith(b"data:"):
        events = [line[6:] for line in answer.sent.split(b"\n\n") if line and line != b"data: [DONE]"]
        return "".join(c["delta"]["content"] for e in events for c in json.loads(e)["choices"])
    content: str = json.loads(answer.sent)["choices"][0]["message"]["content"]
    return content


def retries_of(cluster: FakeCluster, reason: RetryReason) -> int:
    return cluster.telemetry.row[cluster.telemetry.layout.retries + reason]


def leases_of(cluster: FakeCluster, state: LeaseState) -> int:
    cluster.flow.ledger.sweep()
    return cluster.telemetry.row[cluster.telemetry.layout.leases + state]


FAILURES = {
    "cut short": cuts_short,
    "garbage": says_garbage,
    "500": answers(500),
    "503": answers(503),
    "429": answers(429),
}


# --- prefill ------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("failure", [*FAILURES.values(), is_stopped], ids=[*FAILURES, "stopped"])
def test_a_failed_prefill_goes_to_another_worker(failure: Worker, document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", failure)
        answer = await cluster.ask(document)
        assert (answer.status, text_of(answer)) == (200, "abc")
        assert [leg.origin for leg in cluster.legs("prefill")] == [
            cluster.origin("prefill/0"),
            cluster.origin("prefill/1"),
        ]
        assert len(cluster.legs("decode")) == 1

    assert retries_of(run(test), RetryReason.PREFILL) == 1


def test_all_prefills_of_a_worker_that_is_stopped_are_replaced() -> None:
    """More of them at once than the budget for replacements after answers has room for."""

    async def test(cluster: FakeCluster) -> None:
        elsewhere = asyncio.Semaphore(0)
        are_all_there = asyncio.Event()

        async def waits(request: MemoryRequest, reply: MemoryReply) -> None:
            elsewhere.release()
            await are_all_there.wait()
            await cluster.workers.prefill(request, reply)

        spoil(cluster, "prefill/0", is_stopped)
        spoil(cluster, "prefill/1", waits)
        asked = [asyncio.create_task(cluster.ask(CHAT)) for _ in range(requests)]
        for _ in asked:
            await asyncio.wait_for(elsewhere.acquire(), 60)
        are_all_there.set()
        assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * requests

    requests = 4 * BUDGET_LEAST
    run(test)


def test_decode_is_never_sent_after_a_prefill_without_a_hand_off() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(200))
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert len(cluster.legs("decode")) == 1

    run(test)


@BOTH_KINDS
def test_a_prefill_worker_that_is_gone_is_replaced(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("prefill/0"))
        answer = await cluster.ask(document)
        assert (answer.status, text_of(answer)) == (200, "abc")
        assert cluster.worker("prefill/0").state == "gone"

    run(test)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_request_that_a_worker_refuses_is_not_tried_elsewhere(status: int) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(status))
        answer = await cluster.ask(CHAT)
        assert answer.status == status
        assert b"x-should-retry" not in answer.answer_headers
        assert len(cluster.upstream.requests) == 1

    run(test)


# --- decode -------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("failure", [*FAILURES.values(), is_stopped], ids=[*FAILURES, "stopped"])
def test_a_failed_decode_leg_starts_again_from_prefill(failure: Worker, document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", failure)
        answer = await cluster.ask(document)
        assert (answer.status, text_of(answer)) == (200, "abc")
        await cluster.flow.aclose()
        hand_offs = [
            read(leg)["kv_transfer_params"]["remote_request_id"]
            for leg in cluster.legs("decode")
            if read(leg)["max_tokens"] == 5
        ]
        assert len(hand_offs) == len(set(hand_offs)) == 2  # none was sent twice
        cluster.workers.pinned.discard("r0")  # of a worker that may have died of it: the lease runs out

    assert retries_of(run(test), RetryReason.DECODE) == 1


def test_the_first_event_of_a_stream_may_be_an_error_and_is_tried_again() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", streams_an_error)
        answer = await cluster.ask(STREAM)
        assert (answer.status, text_of(answer)) == (200, "abc")
        cluster.workers.pinned.discard("r0")

    run(test)


@pytest.mark.parametrize(("failure", "is_released"), [("503", True), ("429", True), ("500", False)])
def test_only_a_leg_that_was_refused_unread_gives_its_blocks_back(failure: str, is_released: bool) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", FAILURES[failure])
        await cluster.ask(CHAT)
        await cluster.flow.aclose()
        assert ("r0" not in cluster.workers.pinned) == is_released
        assert leases_of(cluster, LeaseState.RELEASED) == is_released
        assert leases_of(cluster, LeaseState.USED) == (not is_released)
        assert leases_of(cluster, LeaseState.CONSUMED) == 1
        cluster.workers.pinned.clear()

    run(test)


def test_the_lease_of_a_lost_decode_leg_runs_out() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", cuts_short)
        await cluster.ask(CHAT)
        (lease,) = cluster.flow.ledger.open
        lease.expires -= LEASE_S
        assert leases_of(cluster, LeaseState.EXPIRED) == 1
        cluster.workers.pinned.clear()

    run(test)


def test_the_only_decode_worker_is_asked_again_when_the_hand_off_may_have_been_the_fault() -> None:
    async def test(cluster: FakeCluster) -> None:
        count = iter(range(10))

        async def fails_once(request: MemoryRequest, reply: MemoryReply) -> None:
            if next(count) == 0:
                await answers(500)(request, reply)
            else:
                await cluster.workers.decode(request, reply)

        spoil(cluster, "decode/0", fails_once)
        assert (await cluster.ask(CHAT)).status == 200
        cluster.workers.pinned.clear()

    run(test, roles=("prefill", "decode"))


# --- one leg ------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_worker_that_does_both_is_replaced(failure: str, document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "both/0", FAILURES[failure])
        spoil(cluster, "both/1", cluster.workers.decode)
        for _ in range(2):  # whoever is asked first
            answer = await cluster.ask(document)
            assert (answer.status, text_of(answer)) == (200, "abc")

    assert retries_of(run(test, roles=("both", "both")), RetryReason.WHOLE) >= 1


# --- when it is enough --------------------------------------------------------------------------


def test_when_all_are_busy_the_client_is_told_so_as_the_worker_said_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("prefill/0", "prefill/1"):
            spoil(cluster, name, answers(429, {**JSON, b"retry-after": b"7"}))
        answer = await cluster.ask(CHAT)
        assert answer.status == 429
        assert answer.answer_headers[b"retry-after"] == b"7"
        assert len(cluster.legs("prefill")) == 2

    run(test)


def test_a_client_is_told_not_to_retry_what_was_retried_here() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            spoil(cluster, name, answers(500))
        answer = await cluster.ask(CHAT)
        assert answer.status == 500
        assert answer.answer_headers[b"x-should-retry"] == b"false"
        assert len(cluster.legs("decode")) == 2
        cluster.workers.pinned.clear()

    run(test)


def test_replacements_stop_where_the_budget_ends() -> None:
    async def test(cluster: FakeCluster) -> None:
        gate = asyncio.Event()

        async def waits(request: MemoryRequest, reply: MemoryReply) -> None:
            await gate.wait()
            await cluster.workers.prefill(request, reply)

        spoil(cluster, "prefill/0", answers(500))
        spoil(cluster, "prefill/1", waits)
        cluster.registry.judge.note_error = lambda worker: None  # type: ignore[method-assign]  # it stays in
        asked = [asyncio.create_task(cluster.ask(CHAT)) for _ in range(12)]
        done, _ = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 3:
            done, _ = await asyncio.wait(asked, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)
        gate.set()
        statuses = sorted([answer.status for answer in await asyncio.gather(*asked)])
        assert statuses == [200] * (6 + BUDGET_LEAST) + [500] * 3

    run(test, roles=("prefill", "prefill", "decode"))


def test_a_pool_that_is_gone_is_a_503() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            cluster.upstream.refuse(cluster.origin(name))
        answer = await cluster.ask(CHAT)
        assert answer.status == 503
        assert int(answer.answer_headers[b"retry-after"]) >= 1
        cluster.workers.pinned.clear()  # nobody is left who could pull

    run(test)


def test_a_worker_that_does_both_takes_over_but_pulls_nothing() -> None:
    """The ledger would take what it had answered for the end of the blocks."""

    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("decode/0"))
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"
        await cluster.flow.aclose()
        assert leases_of(cluster, LeaseState.RELEASED) == 0
        assert leases_of(cluster, LeaseState.HELD) == 1
        cluster.workers.pinned.clear()

    run(test, roles=("prefill", "decode", "both"))


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("prefill/0"))
        answer = await cluster.ask(CHAT)
        assert answer.status == 200
        assert answer.answer_headers[b"x-baton-path"] == b"aggregated"

    run(test, roles=("prefill", "decode"))


def test_with_strict_disaggregation_nobody_prefills_for_others() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("prefill/0"))
        assert (await cluster.ask(CHAT)).status == 503

    run(test, roles=("prefill", "decode"), routing=RoutingConfig(disaggregate="strict"))


@pytest.mark.parametrize(
    "more", [{b"retry-after": b"7"}, {}], ids=["for as long as it asked", "for a moment"]
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_worker_is_left_alone(status: int, more: dict[bytes, bytes]) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(status, JSON | more))
        for _ in range(6):
            assert (await cluster.ask(CHAT)).status == 200
        legs = [leg.origin for leg in cluster.legs("prefill")]
        assert legs.count(cluster.origin("prefill/0")) == 1

    run(test)


def test_a_busy_worker_is_asked_all_the_same_if_there_is_no_other() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(503, {**JSON, b"retry-after": b"7"}))
        for _ in range(2):
            assert (await cluster.ask(CHAT)).status == 503
        assert len(cluster.legs("prefill")) == 2

    run(test, roles=("prefill", "decode"))


# --- requests that may be what ends workers -----------------------------------------------------

SIX = ("prefill",) * 3 + ("decode",) * 3
ENGINE_ENDED = b'{"error":{"message":"EngineCore encountered an issue. See stack trace.","code":500}}'


async def says_that_its_engine_ended(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(500, ENGINE_ENDED, JSON)


def asked(cluster: FakeCluster, role: str) -> list[str]:
    """The workers of that role that got a leg, in order."""
    names = {worker.origin: worker.name.removeprefix("m/") for worker in cluster.registry.workers}
    return [names[leg.origin] for leg in cluster.legs(role)]


def poisoned(cluster: FakeCluster) -> int:
    return cluster.telemetry.row[cluster.telemetry.layout.poison]


def assert_poison(answer: FakeExchange) -> None:
    assert answer.status == 502
    assert json.loads(answer.sent)["error"]["code"] == "poison"
    assert answer.answer_headers[b"x-should-retry"] == b"false"


LOSSES = pytest.mark.parametrize("loss", [cuts_short, says_that_its_engine_ended, is_stopped])


@BOTH_KINDS
@LOSSES
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_that_has_lost_two_workers_is_not_sent_to_a_third(
    role: str, loss: Worker, document: dict[str, Any]
) -> None:
    async def test(cluster: FakeCluster) -> None:
        for number in range(3):
            spoil(cluster, f"{role}/{number}", loss)
        assert_poison(await cluster.ask(document))
        assert len(set(asked(cluster, role))) == len(asked(cluster, role)) == 2
        cluster.workers.pinned.clear()  # until their leases run out

    assert poisoned(run(test, roles=SIX)) == 1


def test_a_prefill_and_a_decode_worker_are_two() -> None:
    async def test(cluster: FakeCluster) -> None:
        for number in range(3):
            spoil(cluster, f"decode/{number}", cuts_short)
        spoil(cluster, "prefill/0", cuts_short)
        assert_poison(await cluster.ask(CHAT))
        assert (len(asked(cluster, "prefill")), len(asked(cluster, "decode"))) == (2, 1)
        cluster.workers.pinned.clear()

    assert poisoned(run(test, roles=SIX)) == 1


@BOTH_KINDS
def test_a_request_that_is_served_whole_is_counted_alike(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        for number in range(3):
            spoil(cluster, f"both/{number}", cuts_short)
        assert_poison(await cluster.ask(document))
        assert len(asked(cluster, "both")) == 2

    assert poisoned(run(test, roles=("both",) * 3)) == 1


def test_the_log_tells_it_once_without_the_clients_text(caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "a secret"}]}).encode()

    async def test(cluster: FakeCluster) -> None:
        for number in range(3):
            spoil(cluster, f"prefill/{number}", cuts_short)
        assert_poison(await cluster.ask(body, headers=[(b"x-request-id", b"mine")]))

    run(test, roles=SIX)
    (message,) = (record.getMessage() for record in caplog.records if "lost" in record.getMessage())
    assert hashlib.sha256(body).hexdigest()[:16] in message
    assert "mine" in message
    assert message.count("m/prefill/") == 2
    assert "secret" not in caplog.text


def test_workers_that_cannot_be_reached_have_not_seen_the_request() -> None:
    async def test(cluster: FakeCluster) -> None:
        for number in range(2):
            cluster.upstream.refuse(cluster.origin(f"decode/{number}"))
        spoil(cluster, "prefill/0", cuts_short)
        assert (await cluster.ask(CHAT)).status == 200

    assert poisoned(run(test, roles=SIX)) == 0


def is_gone(registry: Registry, worker: RegisteredWorker) -> None:
    registry.judge.mark_gone(worker, "its process has ended")


@pytest.mark.parametrize(("happens", "asks"), [(is_gone, 2), (Registry.drain, 3)], ids=["gone", "draining"])
def test_who_was_taken_out_already_is_ended_by_something_else(
    happens: Callable[[Registry, RegisteredWorker], None], asks: int
) -> None:
    """That a worker is gone may be seen by another leg first, or by a probe: this one may have ended it."""

    async def test(cluster: FakeCluster) -> None:
        async def goes_out(request: MemoryRequest, reply: MemoryReply) -> None:
            legs = asked(cluster, "decode")
            if len(legs) > 2:
                await cluster.workers.decode(request, reply)
            else:
                happens(cluster.registry, cluster.worker(legs[-1]))
                reply.cut_short()

        for number in range(3):
            spoil(cluster, f"decode/{number}", goes_out)
        assert (await cluster.ask(CHAT)).status == (200 if asks == 3 else 502)
        assert len(set(asked(cluster, "decode"))) == asks
        cluster.workers.pinned.clear()

    assert poisoned(run(test, roles=SIX)) == (asks == 2)


def test_one_worker_that_is_lost_again_and_again_is_one() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", cuts_short)
        answer = await cluster.ask(CHAT)
        assert json.loads(answer.sent)["error"]["code"] == "worker_cut_short"
        assert asked(cluster, "prefill") == ["prefill/0"] * 4

    assert poisoned(run(test, roles=("prefill", "decode"), routing=RoutingConfig(disaggregate="strict"))) == 0
