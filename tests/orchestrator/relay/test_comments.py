"""Comments keep a stream alive that has nothing to say yet: a worker's own pass at once, and we have some."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from orchestrator.config.options import LimitsConfig
from orchestrator.relay.scope import RequestScope
from orchestrator.telemetry.counters import RetryReason
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from tests.orchestrator.fakes import JSON, LAST, SSE, FakeCluster, FakeExchange, event, run_scripted, token

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
BODY = json.dumps(CHAT).encode()
PING = b": ping\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
TWO = ("prefill", "decode", "decode")
WHOLE = token("a") + token("b") + token("c") + LAST
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})


def start(cluster: FakeCluster) -> tuple[FakeExchange, asyncio.Task[FakeExchange]]:
    exchange = FakeExchange(BODY)
    return exchange, asyncio.create_task(cluster.serve(exchange))


def scope_of(cluster: FakeCluster) -> RequestScope:
    (scope,) = cluster.plane.open
    return scope


def pinging(*then: bytes, cut: bool = False, gate: asyncio.Event | None = None) -> LegHandler:
    """A comment first, then the rest, once the gate is open."""

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200, SSE)
        await reply.chunk(PING)
        if gate is not None:
            await gate.wait()
        for chunk in then:
            await reply.chunk(chunk)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        if cut:
            reply.cut_short()

    return worker


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_workers_comment_passes_before_its_first_word() -> None:
    async def test(cluster: FakeCluster) -> None:
        gate = asyncio.Event()
        cluster.upstream.serve(cluster.origin("decode/0"), pinging(ROLE, token("a"), LAST, gate=gate))
        exchange, serving = start(cluster)
        await settle()
        assert (exchange.status, exchange.sent) == (200, PING)
        assert exchange.answer_headers[b"content-type"] == SSE[b"content-type"]
        assert not serving.done()
        gate.set()
        await serving
        assert exchange.sent == PING + ROLE + token("a") + LAST

    record = run_scripted(test).telemetry.records[0]
    assert (record.status, record.error_code) == (200, None)


def test_comments_are_dropped_while_the_client_takes_nothing() -> None:
    async def test(cluster: FakeCluster) -> None:
        gate = asyncio.Event()

        async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            for _ in range(100):
                await reply.chunk(PING)
                await settle()
            await gate.wait()
            await reply.chunk(token("a") + LAST)

        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        exchange = FakeExchange(BODY)
        exchange.is_writable = False
        serving = asyncio.create_task(cluster.serve(exchange))
        for _ in range(120):
            await settle()
        assert exchange.sent == PING
        exchange.read_again()
        gate.set()
        await serving
        assert exchange.sent == PING + token("a") + LAST

    run_scripted(test)


FAILURES = {
    "cut": pinging(cut=True),
    "ends": pinging(),
    "role": pinging(ROLE, cut=True),
    "error": pinging(event({"error": {"message": "boom", "code": 500}})),
    "nothing": pinging(ROLE, b"data: [DONE]\n\n"),
    "aborted": pinging(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_after_comments_alone_another_worker_begins_anew(failure: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), FAILURES[failure])
        exchange = await cluster.ask(CHAT)
        assert exchange.sent == PING + WHOLE
        assert exchange.is_complete
        assert len(cluster.legs("prefill")) == 2
        row, layout = cluster.telemetry.row, cluster.telemetry.layout
        assert row[layout.retries + RetryReason.DECODE] == 1

    run_scripted(test, roles=TWO)


@pytest.mark.parametrize("failure", FAILURES)
def test_after_comments_a_failure_is_an_error_event(failure: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), FAILURES[failure])
        exchange = await cluster.ask(CHAT)
        assert exchange.status == 200
        *pings, failed, done, end = exchange.sent.split(b"\n\n")
        assert set(pings) == {b": ping"}
        assert "error" in json.loads(failed.removeprefix(b"data: "))
        assert (done, end) == (b"data: [DONE]", b"")

    assert run_scripted(test).telemetry.records[0].error_code


def test_a_deadline_holds_until_more_than_comments_has_come() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.serve(cluster.origin("decode/0"), pinging(gate=asyncio.Event()))
        exchange, serving = start(cluster)
        await settle()
        scope = scope_of(cluster)
        scope.sweep(scope.deadline + 1)
        await serving
        assert b'"deadline_exceeded"' in exchange.sent

    run_scripted(test)


@pytest.mark.parametrize("said", [[PING], [b": p"], [b'data: {"id":']])
def test_a_worker_that_sends_anything_is_not_silent(said: list[bytes]) -> None:
    """Comments, and pieces of events, of which nothing goes out."""

    async def test(cluster: FakeCluster) -> None:
        more, is_over = asyncio.Event(), asyncio.Event()

        async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            await more.wait()
            await reply.chunk(said[0])
            await is_over.wait()
            reply.cut_short()

        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        exchange, serving = start(cluster)
        await settle()
        scope, now = scope_of(cluster), asyncio.get_running_loop().time()
        scope.sweep(now + 6)
        more.set()
        await settle()
        scope.sweep(now + 10)
        await settle()
        scope.sweep(now + 16)
        await settle()
        assert not serving.done()
        scope.sweep(now + 20)
        await serving
        assert b'"deadline_exceeded"' in exchange.sent
        is_over.set()

    run_scripted(test, limits=LimitsConfig(first_byte_timeout_s=8))


def test_a_stream_whose_worker_sends_comments_is_not_idle() -> None:
    async def test(cluster: FakeCluster) -> None:
        steps = [asyncio.Event() for _ in range(3)]

        async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            await reply.chunk(token("a"))
            for step in steps:
                await step.wait()
                await reply.chunk(PING)
            await reply.chunk(LAST)

        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        exchange, serving = start(cluster)
        await settle()
        scope, now = scope_of(cluster), asyncio.get_running_loop().time()
        for at, step in enumerate(steps):
            scope.sweep(now + 15 * at)
            step.set()
            await settle()
        await serving
        assert exchange.sent == token("a") + PING * 3 + LAST

    run_scripted(test, limits=LimitsConfig(stream_idle_timeout_s=20))


# --- Baton's own comments -----------------------------------------------------------------------


def test_by_default_there_are_none() -> None:
    assert LimitsConfig().keepalive_s == 0


def hanging(asked: asyncio.Event, gate: asyncio.Event, worker: LegHandler) -> LegHandler:
    async def slow(request: MemoryRequest, reply: MemoryReply) -> None:
        asked.set()
        await gate.wait()
        await worker(request, reply)

    return slow


@pytest.mark.parametrize("silent", ["prefill/0", "decode/0"])
def test_while_a_worker_says_nothing_the_client_hears_of_it(silent: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        asked, gate = asyncio.Event(), asyncio.Event()
        worker = cluster.workers.prefill if silent == "prefill/0" else cluster.workers.decode
        cluster.upstream.serve(cluster.origin(silent), hanging(asked, gate, worker))
        exchange, serving = start(cluster)
        await asked.wait()
        scope, now = scope_of(cluster), scope_of(cluster).record.received
        scope.sweep(now + 4.9)
        assert not exchange.is_started
        for at in (5.1, 5.2, 9.9, 10.2):
            scope.sweep(now + at)
        assert exchange.sent == KEEP_ALIVE * 2
        assert exchange.answer_headers[b"content-type"].startswith(b"text/event-stream")
        gate.set()
        await serving
        assert exchange.sent == KEEP_ALIVE * 2 + WHOLE

    record = run_scripted(test, limits=LimitsConfig(keepalive_s=5)).telemetry.records[0]
    assert (record.status, record.error_code) == (200, None)
    assert record.first_byte > record.prefill_done > 0


def test_a_client_that_waits_for_a_seat_hears_of_it_too() -> None:
    async def test(cluster: FakeCluster) -> None:
        asked, gate = asyncio.Event(), asyncio.Event()
        cluster.upstream.serve(cluster.origin("prefill/0"), hanging(asked, gate, cluster.workers.prefill))
        _, first = start(cluster)
        await asked.wait()
        exchange, second = start(cluster)
        await settle()
        _, waiting = cluster.plane.open
        waiting.sweep(waiting.record.received + 6)
        assert exchange.sent == KEEP_ALIVE
        assert b"server-timing" not in exchange.answer_headers
        gate.set()
        await asyncio.gather(first, second)
        assert exchange.sent == KEEP_ALIVE + WHOLE

    run_scripted(test, limits=LimitsConfig(keepalive_s=5), seats=1)


def test_between_two_tokens_too_but_not_while_they_flow() -> None:
    async def test(cluster: FakeCluster) -> None:
        more = asyncio.Event()

        async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            await reply.chunk(token("a") + b'data: {"cho')
            await more.wait()
            await reply.chunk(b'ices":[{"index":0,"delta":{"content":"b"}}]}\n\n' + LAST)

        cluster.upstream.serve(cluster.origin("decode/0"), worker)
        exchange, serving = start(cluster)
        await settle()
        scope, now = scope_of(cluster), scope_of(cluster).record.received
        scope.sweep(now + 6)  # it sees the token now
        assert exchange.sent == token("a")
        scope.sweep(now + 10)
        assert exchange.sent == token("a")
        scope.sweep(now + 12)
        more.set()
        await serving
        assert exchange.sent == token("a") + KEEP_ALIVE + token("b") + LAST

    run_scripted(test, limits=LimitsConfig(keepalive_s=5))


def test_whole_answers_get_none() -> None:
    async def test(cluster: FakeCluster) -> None:
        asked, gate = asyncio.Event(), asyncio.Event()
        cluster.upstream.serve(cluster.origin("prefill/0"), hanging(asked, gate, cluster.workers.prefill))
        exchange = FakeExchange(json.dumps(CHAT | {"stream": False}).encode())
        serving = asyncio.create_task(cluster.serve(exchange))
        await asked.wait()
        scope = scope_of(cluster)
        scope.sweep(scope.record.received + 60)
        assert not exchange.is_started
        gate.set()
        await serving
        assert json.loads(exchange.sent)["choices"][0]["message"]["content"] == "abc"

    run_scripted(test, limits=LimitsConfig(keepalive_s=5))


def test_an_error_behind_it_is_an_event() -> None:
    async def test(cluster: FakeCluster) -> None:
        asked, gate = asyncio.Event(), asyncio.Event()

        async def refuses(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.answer(400, b'{"error":{"message":"too long","code":400}}', JSON)

        cluster.upstream.serve(cluster.origin("prefill/0"), hanging(asked, gate, refuses))
        exchange, serving = start(cluster)
        await asked.wait()
        scope_of(cluster).sweep(scope_of(cluster).record.received + 6)
        gate.set()
        await serving
        assert exchange.sent == KEEP_ALIVE + event({"error": {"message": "too long", "code": 400}}) + (
            b"data: [DONE]\n\n"
        )

    run_scripted(test, limits=LimitsConfig(keepalive_s=5))
