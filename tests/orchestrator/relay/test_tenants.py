"""What the limits of a key do to requests, over workers in memory and in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any

import pytest

from orchestrator.config.keys import Key, KeyLimits, KeyRing
from orchestrator.config.options import QueueConfig, TenantsConfig
from orchestrator.relay.tenants import Tenants
from orchestrator.telemetry.counters import Layout, RejectReason, Telemetry
from orchestrator.telemetry.tenants import (
    CELLS,
    MAX_KEYS,
    OPEN,
    REJECTED,
    REQUESTS,
    SLOTS,
    TOKENS,
    WAITING,
    KeyTable,
)
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.cluster import Clock
from tests.orchestrator.fakes import JSON, SSE, FakeCluster, FakeExchange, event, token
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}

Test = Callable[[FakeCluster], Awaitable[None]]


def key(name: str, **limits: Any) -> Key:
    return Key(name, sha256(name.encode()).digest(), limits=KeyLimits(**limits))


def run(test: Test, *keys: Key, **options: Any) -> FakeCluster:
    async def main() -> FakeCluster:
        cluster = FakeCluster(keys=KeyRing(keys), **options)
        cluster.upstream.serve(cluster.origin("decode/0"), decode(cluster))
        await test(cluster)
        await cluster.aclose()
        cluster.workers.pinned.clear()
        cluster.assert_at_rest()
        assert all(counted(cluster, one.name)[cell] == 0 for one in keys for cell in (OPEN, WAITING))
        return cluster

    result: list[FakeCluster] = []

    async def virtually() -> None:
        result.append(await main())

    run_virtually(virtually())
    return result[0]


def decode(cluster: FakeCluster) -> Callable[[MemoryRequest, MemoryReply], Awaitable[None]]:
    """A worker that tells its usage."""

    async def serve(request: MemoryRequest, reply: MemoryReply) -> None:
        document = json.loads(request.body)
        cluster.workers.pinned.clear()
        if not document.get("stream"):
            choice = {"index": 0, "message": {"content": "ab"}, "finish_reason": "stop"}
            reply.answer(200, json.dumps({"choices": [choice], "usage": USAGE}).encode(), JSON)
            return
        reply.head(200, SSE)
        await reply.chunk(token("a"))
        await reply.chunk(
            event({"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]})
        )
        await reply.chunk(event({"choices": [], "usage": USAGE}))
        await reply.chunk(b"data: [DONE]\n\n")

    return serve


def counted(cluster: FakeCluster, name: str) -> Sequence[int]:
    return dict(table_of(cluster).counted())[name]


def table_of(cluster: FakeCluster) -> KeyTable:
    assert cluster.core.tenants is not None
    return cluster.core.tenants.table


def rejections(cluster: FakeCluster, name: str) -> dict[RejectReason, int]:
    cells = counted(cluster, name)
    return {reason: cells[REJECTED + reason] for reason in RejectReason if cells[REJECTED + reason]}


async def ask(cluster: FakeCluster, name: str, document: Any = CHAT, **options: Any) -> FakeExchange:
    headers = [(b"authorization", f"Bearer {name}".encode())]
    return await cluster.ask(document, headers=headers, **options)


def limit_headers(exchange: FakeExchange) -> dict[str, str]:
    return {
        name.decode().removeprefix("x-ratelimit-"): value.decode()
        for name, value in exchange.answer_headers.items()
        if name.startswith(b"x-ratelimit-")
    }


def error(exchange: FakeExchange) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(exchange.sent)["error"]
    return found


# --- requests per minute ------------------------------------------------------------------------


def test_requests_over_the_limit_are_429_until_there_is_room() -> None:
    async def test(cluster: FakeCluster) -> None:
        answers = [await ask(cluster, "a") for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert [limit_headers(answer)["remaining-requests"] for answer in answers] == ["1", "0", "0"]
        refused = answers[2]
        assert error(refused) == {
            "message": "this API key may send 2 requests per minute: ask again in 30 s",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert refused.answer_headers[b"retry-after"] == b"30"
        assert limit_headers(refused)["reset-requests"].startswith("1m0s") or limit_headers(refused)[
            "reset-requests"
        ].startswith("59.")
        assert (await ask(cluster, "b")).status == 200
        await asyncio.sleep(30.1)
        assert (await ask(cluster, "a")).status == 200
        assert (await ask(cluster, "a")).status == 429

    cluster = run(test, key("a", rpm=2), key("b"))
    assert rejections(cluster, "a") == {RejectReason.KEY_REQUESTS: 2}
    assert counted(cluster, "a")[REQUESTS] == 5
    row, layout = cluster.telemetry.row, cluster.telemetry.layout
    assert row[layout.rejections + RejectReason.KEY_REQUESTS] == 2


def test_a_key_without_limits_is_told_of_none() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert limit_headers(await ask(cluster, "a")) == {}
        assert limit_headers(await ask(cluster, "a", STREAM)) == {}

    run(test, key("a", weight=2.0))


def test_the_limits_of_the_config_hold_for_keys_that_have_none() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert [(await ask(cluster, "a")).status for _ in range(2)] == [200, 429]
        assert [(await ask(cluster, "b")).status for _ in range(2)] == [200, 200]

    run(test, key("a"), key("b", rpm=0), tenants=TenantsConfig(rpm=1))


def test_errors_have_the_form_of_their_api() -> None:
    async def test(cluster: FakeCluster) -> None:
        await ask(cluster, "a")
        message = await ask(cluster, "a", path="/v1/messages")
        assert json.loads(message.sent)["type"] == "error"
        assert error(message)["type"] == "rate_limit_error"
        assert message.answer_headers[b"retry-after"] == b"60"
        response = await ask(cluster, "a", path="/v1/responses")
        assert error(response)["code"] == "rate_limit_exceeded"

    run(test, key("a", rpm=1))


def test_a_wrong_request_is_refused_for_what_is_wrong_with_it() -> None:
    async def test(cluster: FakeCluster) -> None:
        wrong = await ask(cluster, "a", method="PUT")
        assert wrong.status == 405
        assert (await ask(cluster, "a")).status == 200
        assert (await ask(cluster, "a", {"messages": 1, "model": "no"})).status == 429
        assert (await ask(cluster, "nobody")).status == 401

    run(test, key("a", rpm=1))


# --- concurrency --------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])
def test_so_many_may_be_open_at_a_time(document: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        go_on = asyncio.Event()
        serve = decode(cluster)

        async def slowly(request: MemoryRequest, reply: MemoryReply) -> None:
            await go_on.wait()
            await serve(request, reply)

        cluster.upstream.serve(cluster.origin("decode/0"), slowly)
        open_ = [asyncio.create_task(ask(cluster, "a", document)) for _ in range(2)]
        await asyncio.sleep(0.01)
        refused = await ask(cluster, "a", document)
        assert (refused.status, error(refused)["type"]) == (429, "requests")
        assert error(refused)["message"] == "this API key may have 2 requests open at a time"
        assert refused.answer_headers[b"retry-after"] == b"1"
        open_[0].cancel()
        go_on.set()
        assert [
            answer.status
            for answer in (
                await asyncio.gather(
                    open_[1],
                )
            )
        ] == [200]
        with pytest.raises(asyncio.CancelledError):
            await open_[0]
        assert (await ask(cluster, "a", document)).status == 200

    cluster = run(test, key("a", concurrency=2))
    assert rejections(cluster, "a") == {RejectReason.KEY_CONCURRENCY: 1}


def test_who_leaves_is_no_longer_open() -> None:
    async def test(cluster: FakeCluster) -> None:
        exchange = FakeExchange(json.dumps(STREAM).encode(), headers=[(b"authorization", b"Bearer a")])
        task = asyncio.create_task(cluster.serve(exchange))
        await asyncio.sleep(0)
        exchange.leave()
        await task
        assert (await ask(cluster, "a")).status == 200

    run(test, key("a", concurrency=1))


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])
def test_tokens_are_charged_beforehand_and_set_right_by_the_usage(document: Any) -> None:
    async def test(cluster: FakeCluster) -> None:
        first = await ask(cluster, "a", {**document, "max_tokens": 900})
        told = limit_headers(first)
        assert told["limit-tokens"] == "1000"
        assert int(told["remaining-tokens"]) < 100
        second = await ask(cluster, "a", {**document, "max_tokens": 900})
        assert second.status == 200
        assert counted(cluster, "a")[TOKENS] == 20
        third = await ask(cluster, "a", {**document, "max_tokens": 2})
        assert 940 < int(limit_headers(third)["remaining-tokens"]) < 1000

    run(test, key("a", tpm=1000))


def test_a_request_that_may_use_too_much_is_refused_until_there_is_room() -> None:
    async def test(cluster: FakeCluster) -> None:
        waiting = asyncio.Event()

        async def never(request: MemoryRequest, reply: MemoryReply) -> None:
            await waiting.wait()

        cluster.upstream.serve(cluster.origin("decode/0"), never)
        held = asyncio.create_task(ask(cluster, "a", {**CHAT, "max_tokens": 900}))
        await asyncio.sleep(0.01)
        refused = await ask(cluster, "a", {**CHAT, "max_tokens": 200})
        assert (refused.status, error(refused)["type"], error(refused)["code"]) == (
            429,
            "tokens",
            "rate_limit_exceeded",
        )
        assert "may use 1000 tokens per minute" in error(refused)["message"]
        assert 1 <= int(refused.answer_headers[b"retry-after"]) <= 60
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held

    cluster = run(test, key("a", tpm=1000))
    assert rejections(cluster, "a") == {RejectReason.KEY_TOKENS: 1}


def test_what_was_refused_for_another_reason_has_used_nothing() -> None:
    async def test(cluster: FakeCluster) -> None:
        for _ in range(5):
            assert (await ask(cluster, "a", {**CHAT, "model": "no"})).status == 404

        async def fail(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.answer(400, b'{"error":{"message":"no"}}', JSON)

        cluster.upstream.serve(cluster.origin("decode/0"), fail)
        for _ in range(5):
            assert (await ask(cluster, "a", {**CHAT, "max_tokens": 900})).status == 400

    cluster = run(test, key("a", tpm=1000))
    assert counted(cluster, "a")[TOKENS] == 0


def test_one_that_asks_for_more_than_a_minute_has_is_served_alone() -> None:
    """An estimate must not keep it out for ever."""

    async def test(cluster: FakeCluster) -> None:
        assert (await ask(cluster, "a", {**CHAT, "max_tokens": 10_000})).status == 200

    run(test, key("a", tpm=1000))


def test_the_tokens_of_a_stream_that_was_left_are_counted_by_its_pieces() -> None:
    async def test(cluster: FakeCluster) -> None:
        async def serve(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()
            reply.head(200, SSE)
            while not reply.is_over:
                await reply.chunk(token("a"))
                await asyncio.sleep(0.1)

        cluster.upstream.serve(cluster.origin("decode/0"), serve)
        exchange = FakeExchange(json.dumps(STREAM).encode(), headers=[(b"authorization", b"Bearer a")])
        task = asyncio.create_task(cluster.serve(exchange))
        await asyncio.sleep(2.05)
        exchange.leave()
        await task

    cluster = run(test, key("a"))
    assert 25 <= counted(cluster, "a")[TOKENS] <= 45  # about 20, and those of the prompt


def test_messages_and_responses_are_counted_by_their_own_usage() -> None:
    async def test(cluster: FakeCluster) -> None:
        async def serve(request: MemoryRequest, reply: MemoryReply) -> None:
            cluster.workers.pinned.clear()
            usage = {"input_tokens": 8, "output_tokens": 4}
            if request.target == "/v1/messages":
                answer: dict[str, Any] = {"type": "message", "stop_reason": "end_turn", "usage": usage}
            else:
                echo = [{"type": "function", "name": "f", "parameters": {"usage": {"total_tokens": 9000}}}]
                answer = {
                    "object": "response",
                    "status": "completed",
                    "usage": {**usage, "total_tokens": 12},
                    "tools": echo,
                }
            reply.answer(200, json.dumps(answer).encode(), JSON)

        cluster.upstream.serve(cluster.origin("decode/0"), serve)
        assert (await ask(cluster, "a", path="/v1/messages")).status == 200
        assert counted(cluster, "a")[TOKENS] == 12
        assert (await ask(cluster, "a", {"model": "m", "input": "x"}, path="/v1/responses")).status == 200
        assert counted(cluster, "a")[TOKENS] == 24

    run(test, key("a"))


# --- seats --------------------------------------------------------------------------------------


def test_a_flood_waits_in_its_own_line() -> None:
    async def test(cluster: FakeCluster) -> None:
        serve = decode(cluster)

        async def slowly(request: MemoryRequest, reply: MemoryReply) -> None:
            await asyncio.sleep(1.0)
            await serve(request, reply)

        cluster.upstream.serve(cluster.origin("decode/0"), slowly)
        flood = [asyncio.create_task(ask(cluster, "a")) for _ in range(12)]
        await asyncio.sleep(0.5)
        quiet = asyncio.create_task(ask(cluster, "b"))
        assert (await quiet).status == 200
        assert sum(task.done() and task.result().status == 200 for task in flood) <= 2
        assert {(await task).status for task in flood} == {200, 429}

    cluster = run(test, key("a"), key("b"), seats=1, queue=QueueConfig(requests=8))
    assert rejections(cluster, "a") == {RejectReason.QUEUE_FULL: 3, RejectReason.OVER_SHARE: 1}
    assert rejections(cluster, "b") == {}


# --- keys come and go ---------------------------------------------------------------------------


def test_a_reload_keeps_what_a_name_has_used() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await ask(cluster, "a")).status == 200
        keys = cluster.plane.keys
        assert keys is not None
        keys.exchange([key("a", rpm=2), key("c")])
        cluster.core.reconfigure(cluster.config)
        assert [(await ask(cluster, "a")).status for _ in range(2)] == [200, 429]
        assert (await ask(cluster, "b")).status == 401
        assert (await ask(cluster, "c")).status == 200
        keys.exchange([key("a"), key("b")])
        cluster.core.reconfigure(cluster.config)
        assert [(await ask(cluster, "a")).status for _ in range(3)] == [200] * 3

    cluster = run(test, key("a", rpm=1), key("b"))
    assert counted(cluster, "a")[REQUESTS] == 6
    assert [name for name, _ in table_of(cluster).counted()] == ["a", "b", "c", "other"]


def test_names_without_end_have_a_bounded_number_of_series_and_limits_all_the_same() -> None:
    clock, table = Clock(), KeyTable.alone()
    telemetry = Telemetry(Layout(["m"], []))
    ring = KeyRing(key(f"k{number}", rpm=1) for number in range(MAX_KEYS + 3))
    tenants = Tenants(ring, TenantsConfig(), table, telemetry, clock)
    for name in ("k0", f"k{MAX_KEYS}", f"k{MAX_KEYS + 1}"):
        tenant = tenants.of(name)
        assert tenant is not None
        tenant.enter()
        tenant.check(clock.now)
        tenant.leave(0, 5)
        tenant.enter()
        with pytest.raises(Exception, match="1 request per minute"):
            tenant.check(clock.now)
        tenant.leave(0, 0)
    counts = table.counted()
    assert len(counts) == SLOTS
    assert counts[0][1][REQUESTS] == 2
    name, cells = counts[-1]
    assert name == "other"
    assert (cells[REQUESTS], cells[TOKENS], cells[REJECTED + RejectReason.KEY_REQUESTS]) == (4, 10, 2)
    assert len(cells) == CELLS


def test_without_keys_nothing_is_kept() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        assert cluster.core.tenants is None
        assert cluster.plane.tenants is None
        assert (await cluster.ask(CHAT)).status == 200
        await cluster.aclose()

    asyncio.run(main())
