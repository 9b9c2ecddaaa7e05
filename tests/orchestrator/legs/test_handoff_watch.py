"""Hand-offs whose answers begin too late, or that do not get on, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from orchestrator.config.options import LEASE_S, LimitsConfig, RoutingConfig
from orchestrator.legs.handoff_watch import LEAST_STALL_S, UNKNOWN_STALL_S
from orchestrator.legs.ledger import MARGIN
from orchestrator.legs.retry import BUDGET_LEAST
from orchestrator.telemetry.counters import HandoffTrouble, LeaseState
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.wire.info import BEGUN_PATH, Begun, WorkerInfo
from orchestrator.workers.introduction import Introduction
from tests.orchestrator.fakes import DONE, FINISH, JSON, SSE, FakeCluster, event, read, token, usage
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
BOTH_KINDS = pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])
TWO_DECODE = ("prefill", "decode", "decode")
GOOD_S = LEASE_S * (1 - MARGIN)
# No other limit ends a leg here, and the watch for stalls is off unless a test is about it.
LIMITS = LimitsConfig(request_timeout_s=600, first_byte_timeout_s=500, stream_idle_timeout_s=500)
NO_STALLS = RoutingConfig(handoff_stall_s=10_000)

Test = Callable[[FakeCluster], Awaitable[None]]
Worker = Callable[[MemoryRequest, MemoryReply], Awaitable[None]]


def run(test: Test, **options: Any) -> FakeCluster:
    """Run a test over a cluster of its own; at its end nothing may be held."""
    found: list[FakeCluster] = []

    async def main() -> None:
        cluster = FakeCluster(**{"roles": TWO_DECODE, "limits": LIMITS, "routing": NO_STALLS, **options})
        cluster.core.start()
        await test(cluster)
        await cluster.aclose()
        cluster.workers.pinned.clear()  # leases run out here
        cluster.assert_at_rest()
        found.append(cluster)

    run_virtually(main())
    return found[0]


def text_of(sent: bytes) -> str:
    if not sent.startswith(b"data:"):
        content: str = msgspec.json.decode(sent)["choices"][0]["message"]["content"]
        return content
    events = [part[6:] for part in sent.split(b"\n\n") if part and part != b"data: [DONE]"]
    return "".join(c["delta"]["content"] for e in events for c in msgspec.json.decode(e)["choices"])


async def answer_with(words: str, request: MemoryRequest, reply: MemoryReply) -> None:
    if read(request).get("stream"):
        if not reply.is_over:
            reply.head(200, SSE)
        await reply.chunk(token(words) + FINISH + event({"choices": [], "usage": usage()}) + DONE)
    else:
        choice = {"message": {"content": words}, "finish_reason": "stop"}
        document = {"choices": [choice], "usage": usage()}
        reply.answer(200, msgspec.json.encode(document), JSON)


def slow(seconds: float, words: str = "of another prompt", *, has_begun: bool | None = None) -> Worker:
    """A worker whose answers begin after `seconds`; a whole one may be under way before."""

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target == BEGUN_PATH and has_begun is not None:
            reply.answer(200, msgspec.json.encode(Begun(has_begun)), JSON)
        elif request.target == BEGUN_PATH:
            reply.answer(404, b"{}", JSON)
        else:
            await asyncio.sleep(seconds)
            await answer_with(words, request, reply)

    return worker


def serve(cluster: FakeCluster, name: str, worker: Worker) -> None:
    cluster.upstream.serve(cluster.origin(name), worker)


def prefills(cluster: FakeCluster) -> int:
    return sum(leg.target != "/metrics" for leg in cluster.legs("prefill"))


def given_up(cluster: FakeCluster, trouble: HandoffTrouble) -> int:
    return cluster.telemetry.row[cluster.telemetry.layout.handoffs + trouble]


def leases(cluster: FakeCluster, state: LeaseState) -> int:
    cluster.flow.ledger.sweep()
    return cluster.telemetry.row[cluster.telemetry.layout.leases + state]


# --- late ---------------------------------------------------------------------------------------


@BOTH_KINDS
@pytest.mark.parametrize("seconds", [GOOD_S + 0.1, LEASE_S + 5], ids=["in the margin", "after the lease"])
@pytest.mark.parametrize("has_begun", [False, None], ids=["plugin", "plain"])
def test_an_answer_that_begins_late_starts_again_from_prefill(
    document: dict[str, Any], seconds: float, has_begun: bool | None
) -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(seconds, has_begun=has_begun))
        answer = await cluster.ask(document)
        assert (answer.status, text_of(answer.sent)) == (200, "abc")
        assert prefills(cluster) == 2
        assert cluster.worker("decode/0").state == "suspect"
        tried = cluster.telemetry.records[-1].attempts
        assert tried is not None
        assert tried.handoff_given_up == "late"
        assert leases(cluster, LeaseState.CONSUMED) == 1
        await asyncio.sleep(LEASE_S)
        assert leases(cluster, LeaseState.EXPIRED) == 1

    assert given_up(run(test), HandoffTrouble.LATE) == 1


@BOTH_KINDS
def test_a_leg_that_stands_still_is_ended_when_its_lease_ends(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        began = asyncio.get_running_loop().time()
        serve(cluster, "decode/0", slow(400, has_begun=False))
        assert text_of((await cluster.ask(document)).sent) == "abc"
        assert GOOD_S - 0.3 <= asyncio.get_running_loop().time() - began <= LEASE_S

    run(test)


@BOTH_KINDS
def test_an_answer_that_begins_just_in_time_is_relayed(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(GOOD_S - 0.4, "abc", has_begun=True))
        assert text_of((await cluster.ask(document)).sent) == "abc"
        assert prefills(cluster) == 1

    assert given_up(run(test), HandoffTrouble.LATE) == 0


def test_a_whole_answer_that_has_begun_may_take_longer_than_the_lease() -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(5 * LEASE_S, "long", has_begun=True))
        assert text_of((await cluster.ask(CHAT)).sent) == "long"
        assert prefills(cluster) == 1
        assert leases(cluster, LeaseState.CONSUMED) == 1
        assert leases(cluster, LeaseState.EXPIRED) == 0

    run(test)


@pytest.mark.parametrize("expired", [0, 1])
def test_of_plain_workers_a_long_answer_is_believed_if_no_lease_has_run_out(expired: int) -> None:
    async def test(cluster: FakeCluster) -> None:
        counts = iter((3, 3 + expired))

        async def prefill(request: MemoryRequest, reply: MemoryReply) -> None:
            if request.target == "/metrics":
                name = "vllm:nixl_num_kv_expired_reqs_total"
                page = f'# TYPE {name} counter\n{name}{{engine="0",model_name="m"}} {next(counts)}.0\n'
                reply.answer(200, page.encode())
            else:
                await cluster.workers.prefill(request, reply)

        serve(cluster, "prefill/0", prefill)
        serve(cluster, "decode/0", slow(2 * LEASE_S, "long"))
        answer = await cluster.ask(CHAT)
        assert (answer.status, text_of(answer.sent)) == (200, "abc" if expired else "long")
        await asyncio.sleep(LEASE_S)
        assert leases(cluster, LeaseState.CONSUMED) == 1
        assert leases(cluster, LeaseState.EXPIRED) == expired

    run(test)


def test_the_lease_is_as_long_as_the_prefill_worker_says() -> None:
    async def test(cluster: FakeCluster) -> None:
        info = WorkerInfo(
            role="prefill", model="m", decodes=["json"], engine="sim", engine_version="0", kv_lease_s=6.0
        )
        cluster.worker("prefill/0").announce(Introduction(info, None))
        began = asyncio.get_running_loop().time()
        serve(cluster, "decode/0", slow(20))
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"
        assert 6 * (1 - MARGIN) <= asyncio.get_running_loop().time() - began <= 6

    run(test)


@BOTH_KINDS
def test_retries_of_late_answers_have_a_limit(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            serve(cluster, name, slow(400, has_begun=False))
        answer = await cluster.ask(document)
        assert answer.status == 502
        assert msgspec.json.decode(answer.sent)["error"]["code"] == "handoff_late"
        assert answer.answer_headers[b"x-should-retry"] == b"false"
        assert prefills(cluster) == 3

    run(test)


def test_the_deadline_of_the_request_holds_all_the_same() -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(400))
        serve(cluster, "decode/1", slow(400))
        answer = await cluster.ask(STREAM, headers=[(b"x-request-timeout", b"40")])
        assert answer.status == 504

    run(test)


# --- stalled ------------------------------------------------------------------------------------


async def warm(cluster: FakeCluster, name: str, seconds: float = 0.1) -> None:
    """Have a worker begin some answers, so that its pace is known."""
    serve(cluster, name, slow(seconds, "abc"))
    for _ in range(8):
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"
    assert cluster.worker(name).handoffs.first_byte_s == pytest.approx(seconds, rel=0.5)


@BOTH_KINDS
def test_a_leg_is_tried_elsewhere_when_its_worker_says_nothing(document: dict[str, Any]) -> None:
    async def test(cluster: FakeCluster) -> None:
        await warm(cluster, "decode/0")
        before = prefills(cluster)
        serve(cluster, "decode/0", slow(400))
        began = asyncio.get_running_loop().time()
        for _ in range(2):  # whichever gets it
            assert text_of((await cluster.ask(document)).sent) == "abc"
        assert asyncio.get_running_loop().time() - began < LEAST_STALL_S + 1
        assert prefills(cluster) == before + 3
        assert cluster.worker("decode/0").state == "suspect"
        assert "handoff" not in (cluster.worker("decode/1").last_error or "")
        tried = [record.attempts for record in cluster.telemetry.records if record.attempts is not None]
        assert [attempts.handoff_given_up for attempts in tried].count("stalled") == 1

    assert given_up(run(test, routing=RoutingConfig()), HandoffTrouble.STALLED) == 1


def test_a_worker_of_unknown_pace_has_more_time() -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(400))
        began = asyncio.get_running_loop().time()
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"
        assert asyncio.get_running_loop().time() - began >= UNKNOWN_STALL_S

    run(test, routing=RoutingConfig())


def test_a_slow_worker_is_not_taken_for_one_that_stands_still() -> None:
    async def test(cluster: FakeCluster) -> None:
        await warm(cluster, "decode/0", 4.0)
        await warm(cluster, "decode/1", 4.0)
        serve(cluster, "decode/0", slow(9, "abc"))
        serve(cluster, "decode/1", slow(9, "abc"))
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"

    assert given_up(run(test, routing=RoutingConfig()), HandoffTrouble.STALLED) == 0


def one_at_a_time(cluster: FakeCluster, seconds: float) -> Worker:
    """A worker with one seat: streams take `seconds`, and bring something all the while."""
    seat = asyncio.Lock()

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, SSE)
        async with seat:
            for _ in range(10):
                await asyncio.sleep(seconds / 10)
                await reply.chunk(token("a"))
            await reply.chunk(event({"choices": [], "usage": usage()}) + DONE)

    return worker


def test_a_long_queue_is_no_stall() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            await warm(cluster, name)
        for name in ("decode/0", "decode/1"):
            serve(cluster, name, one_at_a_time(cluster, 3.0))
        answers = await asyncio.gather(*(cluster.ask(STREAM) for _ in range(12)))
        assert {answer.status for answer in answers} == {200}

    assert given_up(run(test, routing=RoutingConfig()), HandoffTrouble.STALLED) == 0


def test_a_leg_that_is_overtaken_is_tried_elsewhere() -> None:
    """Its worker's other legs flow, and later ones have begun: it is not the queue that it waits in."""

    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            await warm(cluster, name)
        flowing, first_came = one_at_a_time(cluster, 30.0), asyncio.Event()

        async def skips_the_first(request: MemoryRequest, reply: MemoryReply) -> None:
            worker = flowing if first_came.is_set() else slow(400)
            first_came.set()
            await worker(request, reply)

        serve(cluster, "decode/0", skips_the_first)
        serve(cluster, "decode/1", slow(0.1, "abc"))
        began = asyncio.get_running_loop().time()
        stuck = asyncio.create_task(cluster.ask(STREAM))
        await first_came.wait()
        others = [asyncio.create_task(cluster.ask(STREAM)) for _ in range(4)]
        assert text_of((await stuck).sent) == "abc"
        assert asyncio.get_running_loop().time() - began < LEAST_STALL_S + 2
        await asyncio.gather(*others)

    assert given_up(run(test, routing=RoutingConfig()), HandoffTrouble.STALLED) == 1


def test_no_more_is_moved_than_the_budget_has_room_for() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            await warm(cluster, name)
        serve(cluster, "decode/0", slow(25, "slow"))
        serve(cluster, "decode/1", slow(25, "slow"))
        answers = await asyncio.gather(*(cluster.ask(STREAM) for _ in range(12)))
        assert {answer.status for answer in answers} == {200}

    cluster = run(test, routing=RoutingConfig())
    assert 1 <= given_up(cluster, HandoffTrouble.STALLED) <= BUDGET_LEAST
    assert given_up(cluster, HandoffTrouble.LATE) == 0


def test_a_leg_is_moved_once_and_only_if_there_is_somewhere_else() -> None:
    async def test(cluster: FakeCluster) -> None:
        await warm(cluster, "decode/0")
        serve(cluster, "decode/0", slow(20, "abc"))
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"

    cluster = run(test, roles=("prefill", "decode"), routing=RoutingConfig())
    assert given_up(cluster, HandoffTrouble.STALLED) == 0


def test_the_limit_can_be_set() -> None:
    async def test(cluster: FakeCluster) -> None:
        serve(cluster, "decode/0", slow(400))
        began = asyncio.get_running_loop().time()
        assert text_of((await cluster.ask(STREAM)).sent) == "abc"
        assert 0.5 <= asyncio.get_running_loop().time() - began < 1.5

    run(test, routing=RoutingConfig(handoff_stall_s=0.5))
