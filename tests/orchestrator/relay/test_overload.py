"""Requests that wait for a seat, and those for which there is none: what clients and workers see of it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, NamedTuple

import pytest

from orchestrator.config.options import HealthConfig, LimitsConfig, QueueConfig, RoutingConfig
from orchestrator.relay.scope import RequestScope
from orchestrator.telemetry.counters import RejectReason
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.fakes import JSON, LAST, SSE, FakeCluster, FakeExchange, token
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
BOTH_KINDS = pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])

Test = Callable[[FakeCluster], Awaitable[None]]


def run(test: Test, **options: Any) -> FakeCluster:
    """Run a test over a cluster with one seat; at its end nothing may be held."""

    async def main() -> FakeCluster:
        cluster = FakeCluster(**{"seats": 1, **options})
        await test(cluster)
        await cluster.aclose()
        cluster.assert_at_rest()
        return cluster

    return asyncio.run(main())


class Held:
    """A decode worker that says one word, and the rest when it is told to."""

    def __init__(self, cluster: FakeCluster, name: str = "decode/0") -> None:
        self._cluster = cluster
        self.may_go_on = asyncio.Event()
        cluster.upstream.serve(cluster.origin(name), self.serve)

    async def serve(self, request: MemoryRequest, reply: MemoryReply) -> None:
        self._cluster.workers.pinned.clear()  # it has pulled the only blocks that there are
        reply.head(200, SSE)
        await reply.chunk(token("a"))
        await self.may_go_on.wait()
        await reply.chunk(LAST)


def ask(
    cluster: FakeCluster, document: Any = STREAM, **options: Any
) -> tuple[FakeExchange, asyncio.Task[Any]]:
    exchange = FakeExchange(json.dumps(document).encode(), **options)
    return exchange, asyncio.create_task(cluster.serve(exchange))


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@BOTH_KINDS
def test_nothing_of_a_request_is_sent_before_it_has_a_seat(document: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        _, first = ask(cluster)
        _, second = ask(cluster, document)
        await settle()
        assert len(cluster.legs("prefill")) == 1
        cluster.upstream.serve(cluster.origin("decode/0"), cluster.workers.decode)
        held.may_go_on.set()
        await asyncio.gather(first, second)
        assert len(cluster.legs("prefill")) == len(cluster.legs("decode")) == 2

    cluster = run(test)
    before, after = cluster.telemetry.records
    assert [record.status for record in (before, after)] == [200, 200]
    assert after.admitted >= before.first_byte


def test_who_waits_is_served_in_the_order_of_arrival() -> None:
    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        asked = [ask(cluster, headers=[(b"x-request-id", str(number).encode())]) for number in range(4)]
        await settle()
        held.may_go_on.set()
        await asyncio.gather(*(serving for _, serving in asked))

    cluster = run(test)
    assert [record.request_id for record in cluster.telemetry.records] == ["0", "1", "2", "3"]


async def names_in_order(cluster: FakeCluster, asked: dict[str, tuple[Any, dict[bytes, bytes]]]) -> list[str]:
    """In which these are served that come while one holds the only seat; each is a document and headers."""
    held = Held(cluster)
    _, first = ask(cluster)
    await settle()
    fields = {
        name: [*headers.items(), (b"x-request-id", name.encode())] for name, (_, headers) in asked.items()
    }
    tasks = [ask(cluster, document, headers=fields[name])[1] for name, (document, _) in asked.items()]
    await settle()
    held.may_go_on.set()
    await asyncio.gather(first, *tasks)
    return [name for record in cluster.telemetry.records if (name := record.request_id) in asked]


def test_short_ones_go_first_by_their_prompts_and_their_limits() -> None:
    long = {**STREAM, "messages": [{"role": "user", "content": "hi " * 200_000}]}

    async def test(cluster: FakeCluster) -> None:
        equals: dict[str, Any] = {str(number): (STREAM, {}) for number in range(4)}
        assert await names_in_order(cluster, equals) == ["0", "1", "2", "3"]  # from which the gate learns
        varied: dict[str, Any] = {
            "long": (long, {}),
            "no-limit": ({**STREAM, "max_tokens": None}, {}),
            "four-choices": ({**STREAM, "n": 4, "max_tokens": 100}, {}),
            "limit": ({**STREAM, "max_tokens": 100}, {}),
        }
        assert await names_in_order(cluster, varied) == [
            "limit",
            "no-limit",
            "four-choices",
            "long",
        ]

    run(test, queue=QueueConfig(order="shortest"))


def test_a_prompt_that_a_worker_has_in_its_cache_counts_as_short() -> None:
    def chat(text: str) -> Any:
        return {**STREAM, "messages": [{"role": "user", "content": text * 20_000}]}

    async def test(cluster: FakeCluster) -> None:
        asked: dict[str, Any] = {"known": (chat("a "), {}), "also": (STREAM, {}), "once-more": (STREAM, {})}
        await names_in_order(cluster, asked)
        cluster.telemetry.records.clear()
        again: dict[str, Any] = {"new": (chat("b "), {}), "known": (chat("a "), {})}
        assert await names_in_order(cluster, again) == ["known", "new"]

    routing = RoutingConfig.model_validate({"prefill": "prefix"})
    run(test, queue=QueueConfig(order="shortest"), routing=routing)


def test_priorities_are_read_as_vllm_reads_them() -> None:
    header = b"x-vllm-priority"
    asked: dict[str, Any] = {
        "none": (STREAM, {}),
        "field": ({**STREAM, "priority": -2}, {}),
        "text": ({**STREAM, "priority": "-3"}, {}),
        "header": ({**STREAM, "priority": 7}, {header: b"-4"}),
        "no-number": ({**STREAM, "priority": -1}, {header: b"soon"}),
        "nonsense": ({**STREAM, "priority": [9]}, {header: b""}),
    }

    async def with_worth(cluster: FakeCluster) -> None:
        assert await names_in_order(cluster, asked) == [
            "header",
            "text",
            "field",
            "no-number",
            "none",
            "nonsense",
        ]

    async def without(cluster: FakeCluster) -> None:
        assert await names_in_order(cluster, asked) == list(asked)

    run(with_worth, queue=QueueConfig(priority_s=5.0))
    run(without)


def test_a_full_queue_is_a_429_at_once() -> None:
    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        _, first = ask(cluster)
        _, second = ask(cluster)
        await settle()
        answer = await cluster.ask(CHAT)
        assert answer.status == 429
        assert json.loads(answer.sent)["error"]["code"] == "too_busy"
        assert int(answer.answer_headers[b"retry-after"]) >= 1
        held.may_go_on.set()
        await asyncio.gather(first, second)
        assert (await cluster.ask(STREAM)).status == 200

    run(test, queue=QueueConfig(requests=1))


def test_a_deadline_that_passes_in_the_queue_is_a_504_and_nothing_is_sent() -> None:
    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        _, first = ask(cluster)
        exchange, second = ask(cluster, CHAT)
        await settle()
        now = asyncio.get_running_loop().time()
        for scope in tuple(cluster.plane.open):
            scope.sweep(now + 601.0 if scope.exchange is exchange else now)
        await second
        assert exchange.status == 504
        held.may_go_on.set()
        await first
        assert len(cluster.legs("prefill")) == 1

    run(test)


@BOTH_KINDS
def test_a_client_may_leave_the_queue_at_any_moment(document: Any) -> None:
    """Before its turn, in its turn, and after: the one behind it is served, and nothing stays taken."""

    async def leave_after(cluster: FakeCluster, turns: int) -> bool:
        _, first = ask(cluster, document)
        exchange, second = ask(cluster, document)
        last, third = ask(cluster, document)
        for _ in range(turns):
            await asyncio.sleep(0)
        exchange.leave()
        await asyncio.gather(first, second, third)
        assert last.status == 200
        await cluster.flow.aclose()
        return exchange.is_complete

    turns, is_complete = 0, False
    while not is_complete:
        seen: list[bool] = []

        async def test(cluster: FakeCluster, turns: int = turns, seen: list[bool] = seen) -> None:
            seen.append(await leave_after(cluster, turns))

        run(test)
        (is_complete,) = seen
        turns += 1
    assert turns > 12  # the queue and both legs


def test_a_replacement_keeps_the_seat() -> None:
    async def test(cluster: FakeCluster) -> None:
        admitted = []

        async def cuts_short(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()
            admitted.append(cluster.admission.admitted)
            reply.cut_short()

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            admitted.append(cluster.admission.admitted)
            await cluster.workers.decode(request, reply)

        cluster.upstream.serve(cluster.origin("decode/0"), cuts_short)
        cluster.upstream.serve(cluster.origin("decode/1"), decode)
        assert (await cluster.ask(CHAT)).status == 200
        assert admitted == [1, 1]

    run(test, roles=("prefill", "decode", "decode"))


def test_those_who_wait_hear_at_once_that_the_last_worker_has_gone() -> None:
    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        _, first = ask(cluster)
        waiting, second = ask(cluster)
        await settle()
        cluster.registry.drain(cluster.worker("decode/0"))
        await second
        assert waiting.status == 503
        assert json.loads(waiting.sent)["error"]["code"] == "no_worker"
        held.may_go_on.set()
        await first

    run(test)


def test_a_second_worker_takes_over_the_queue() -> None:
    async def test(cluster: FakeCluster) -> None:
        spare = cluster.worker("decode/1")
        cluster.registry.drain(spare)
        held = Held(cluster)
        _, first = ask(cluster)
        _, second = ask(cluster)
        await settle()
        cluster.registry.undrain(spare)
        cluster.registry.judge.mark_ready(spare)
        await second
        held.may_go_on.set()
        await first

    cluster = run(test, roles=("prefill", "decode", "decode"), health=HealthConfig(slow_start_s=0))
    assert [record.decode_worker for record in cluster.telemetry.records] == ["m/decode/1", "m/decode/0"]


# --- memory -------------------------------------------------------------------------------------


def test_requests_that_hold_too_much_send_others_away() -> None:
    size = len(json.dumps(CHAT))

    async def test(cluster: FakeCluster) -> None:
        held = Held(cluster)
        asked = [ask(cluster) for _ in range(2)]
        await settle()
        refused, _ = await asyncio.gather(*(cluster.serve(FakeExchange(b" " * 2000)) for _ in range(2)))
        assert refused.status == 503
        assert json.loads(refused.sent)["error"]["code"] == "overloaded"
        assert b"retry-after" in refused.answer_headers
        held.may_go_on.set()
        await asyncio.gather(*(serving for _, serving in asked))
        assert (await cluster.ask(STREAM)).status == 200
        assert cluster.telemetry.row[cluster.telemetry.layout.rejections + RejectReason.MEMORY] == 2

    run(test, limits=LimitsConfig(max_held_bytes=1024 + size))


def test_what_is_on_its_way_counts_at_the_next_sweep() -> None:
    async def test(cluster: FakeCluster) -> None:
        is_full, may_go_on = asyncio.Event(), asyncio.Event()

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()
            reply.head(200, JSON)
            await reply.chunk(b"[" + b" " * 4000)
            is_full.set()
            await may_go_on.wait()
            await reply.chunk(b"]")

        cluster.upstream.serve(cluster.origin("decode/0"), decode)
        uploading = FakeExchange(b"")
        uploading.body_size = 3000
        _, serving = ask(cluster, CHAT)
        await is_full.wait()
        assert sum(scope.bytes_under_way() for scope in cluster.plane.open) == 4001
        cluster.plane.note_under_way(4001)
        assert (await cluster.ask(CHAT)).status == 503
        assert RequestScope(cluster.plane, uploading).bytes_under_way() == 3000
        cluster.plane.note_under_way(0)
        may_go_on.set()
        await serving

    run(test, limits=LimitsConfig(max_held_bytes=2048))


# --- goodput, in virtual time -------------------------------------------------------------------

SEATS, SERVICE_S = 16, 0.3
CAPACITY = SEATS / SERVICE_S  # requests per second


class Crowd:
    """Clients that come at a rate, whatever becomes of those before, and have their deadline."""

    def __init__(self, cluster: FakeCluster, deadline_s: float, spread: float) -> None:
        """`spread` of the times that answers take, as the sigma of their logarithm."""
        self._cluster = cluster
        self._random = Random(1)
        self._deadline_s = deadline_s
        self._spread = spread
        self._answered: list[float] = []  # when, of those in time
        self.sent_away_s: list[float] = []  # until they knew
        cluster.upstream.serve(cluster.origin("both/0"), self._answer)

    async def _answer(self, request: MemoryRequest, reply: MemoryReply) -> None:
        mean = SERVICE_S / math.exp(self._spread**2 / 2)
        await asyncio.sleep(mean * math.exp(self._random.gauss(0.0, self._spread)))
        reply.answer(200, b"{}", JSON)

    async def come(self, rate: float, seconds: float) -> float:
        """Requests answered in time, per second; what comes after the last one was sent does not count."""
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(int(rate * seconds)):
                group.create_task(self._ask())
                await asyncio.sleep(self._random.expovariate(rate))
        return sum(moment <= end for moment in self._answered) / seconds

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        exchange = FakeExchange(
            json.dumps(CHAT).encode(), headers=[(b"x-request-timeout", b"%g" % self._deadline_s)]
        )
        await self._cluster.serve(exchange)
        if exchange.status == 200 and loop.time() - begun <= self._deadline_s:
            self._answered.append(loop.time())
        elif exchange.status == 429:
            self.sent_away_s.append(loop.time() - begun)


class Outcome(NamedTuple):
    goodput: float
    sent_away: int
    sent_away_late: int  # not before they had waited for a while


def outcome(load: float, deadline_s: float, spread: float, seconds: float = 20.0) -> Outcome:
    """Of so many times the capacity."""

    async def main() -> Outcome:
        cluster = FakeCluster(roles=("both",), seats=SEATS)
        sweeps = [
            asyncio.create_task(cluster.plane.sweep_forever()),
            asyncio.create_task(cluster.admission.sweep_forever()),
        ]
        crowd = Crowd(cluster, deadline_s, spread)
        goodput = await crowd.come(load * CAPACITY, seconds)
        for sweep in sweeps:
            sweep.cancel()
        await cluster.aclose()
        cluster.assert_at_rest()
        return Outcome(goodput, len(crowd.sent_away_s), sum(took > 0.05 for took in crowd.sent_away_s))

    return run_virtually(main())


@pytest.mark.parametrize(("deadline_s", "spread"), [(0.6, 0.2), (2.0, 0.5), (2.0, 1.0)])
def test_goodput_under_overload_is_that_of_the_peak(deadline_s: float, spread: float) -> None:
    found = {load: outcome(load, deadline_s, spread) for load in (0.8, 1.0, 2.0, 5.0)}
    peak = max(each.goodput for each in found.values())
    for load in (2.0, 5.0):
        assert found[load].goodput >= 0.95 * peak, found
        assert found[load].sent_away_late <= 0.02 * found[load].sent_away, found
