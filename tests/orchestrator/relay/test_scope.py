from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.config.keys import KeyRing
from orchestrator.config.options import LimitsConfig
from orchestrator.relay.scope import RequestScope
from orchestrator.transport.memory import LegHandler, MemoryReply, MemoryRequest
from tests.orchestrator.fakes import DONE, LAST, SSE, FakeCluster, FakeExchange, token

CHAT: dict[str, Any] = {"model": "m", "messages": [], "stream": True}
BODY = json.dumps(CHAT).encode()


async def hang(request: MemoryRequest, reply: MemoryReply) -> None:
    await reply.hang()


def hang_after(asked: asyncio.Event) -> LegHandler:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        asked.set()
        await reply.hang()

    return worker


def test_a_request_that_outlives_its_deadline_is_a_504() -> None:
    async def main() -> None:
        cluster = FakeCluster(limits=LimitsConfig(request_timeout_s=10))
        cluster.upstream.serve(cluster.origin("prefill/0"), hang)
        exchange = FakeExchange(BODY)
        serving = asyncio.create_task(cluster.serve(exchange))
        await asyncio.sleep(0)
        (scope,) = cluster.plane.open
        scope.sweep(scope.deadline - 1)
        await asyncio.sleep(0)
        assert not serving.done()
        scope.sweep(scope.deadline + 1)
        await serving
        assert exchange.status == 504
        assert exchange.answer_headers[b"x-should-retry"] == b"false"
        assert json.loads(exchange.sent)["error"]["code"] == "deadline_exceeded"
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_a_stream_is_limited_by_its_silence() -> None:
    async def main() -> None:
        cluster = FakeCluster(limits=LimitsConfig(request_timeout_s=10, stream_idle_timeout_s=20))

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            reply.head(200, SSE)
            await reply.chunk(token("a"))
            await reply.hang()

        cluster.upstream.serve(cluster.origin("decode/0"), decode)
        exchange = FakeExchange(BODY)
        serving = asyncio.create_task(cluster.serve(exchange))
        await exchange.fed.wait()
        (scope,) = cluster.plane.open
        scope.sweep(scope.deadline + 5)  # past the deadline, but it has begun and is not silent
        await asyncio.sleep(0)
        assert not serving.done()
        scope.sweep(scope.deadline + 100)
        await serving
        first, failed, done = exchange.sent.removesuffix(b"\n\n").split(b"\n\n")
        assert first + b"\n\n" == token("a")
        assert json.loads(failed.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
        assert done == b"data: [DONE]"
        cluster.workers.pinned.clear()
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


@pytest.mark.parametrize(("wanted", "seconds"), [(b"2", 2), (b"0.5", 0.5), (b"100", 10)])
def test_a_client_may_ask_for_an_earlier_deadline(wanted: bytes, seconds: float) -> None:
    async def main() -> None:
        cluster = FakeCluster(limits=LimitsConfig(request_timeout_s=10))
        cluster.upstream.serve(cluster.origin("prefill/0"), hang)
        exchange = FakeExchange(BODY, headers=[(b"x-request-timeout", wanted)])
        serving = asyncio.create_task(cluster.serve(exchange))
        await asyncio.sleep(0)
        (scope,) = cluster.plane.open
        assert scope.deadline == pytest.approx(scope.record.received + seconds)
        scope.sweep(scope.deadline + 0.1)
        await serving
        assert exchange.status == 504
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


@pytest.mark.parametrize("wanted", [b"soon", b"", b"0", b"-1", b"nan", b"inf", b"1e999"])
def test_a_deadline_that_is_none_is_refused(wanted: bytes) -> None:
    async def main() -> None:
        cluster = FakeCluster()
        answer = await cluster.serve(FakeExchange(BODY, headers=[(b"x-request-timeout", wanted)]))
        assert answer.status == 400
        assert b"x-request-timeout" in answer.sent
        assert cluster.upstream.requests == []
        await cluster.aclose()

    asyncio.run(main())


async def ask_silent(
    cluster: FakeCluster, silent: str
) -> tuple[FakeExchange, asyncio.Task[FakeExchange], RequestScope]:
    """A request whose leg to a worker that says nothing was sent."""
    asked = asyncio.Event()
    cluster.upstream.serve(cluster.origin(silent), hang_after(asked))
    exchange = FakeExchange(BODY)
    serving = asyncio.create_task(cluster.serve(exchange))
    await asked.wait()
    (scope,) = cluster.plane.open
    return exchange, serving, scope


@pytest.mark.parametrize("silent", ["prefill/0", "decode/0"])
def test_a_leg_without_a_first_byte_is_a_504(silent: str) -> None:
    async def main() -> None:
        cluster = FakeCluster(limits=LimitsConfig(first_byte_timeout_s=20))
        exchange, serving, scope = await ask_silent(cluster, silent)
        now = asyncio.get_running_loop().time()
        scope.sweep(now + 19)
        await asyncio.sleep(0)
        assert not serving.done()
        scope.sweep(now + 21)
        await serving
        assert (exchange.status, exchange.is_complete) == (504, True)
        cluster.workers.pinned.clear()
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


@pytest.mark.parametrize("silent", ["prefill/0", "decode/0"])
def test_a_silent_leg_is_lost_only_if_its_workers_probes_fail_too(silent: str) -> None:
    async def main() -> None:
        cluster = FakeCluster(roles=("prefill", "prefill", "decode", "decode"))
        exchange, serving, scope = await ask_silent(cluster, silent)
        now = asyncio.get_running_loop().time()
        scope.sweep(now + 60)
        await asyncio.sleep(0)
        assert not serving.done()
        cluster.registry.judge.mark_gone(cluster.worker(silent), "no answer")
        scope.sweep(now + 61)
        await serving
        assert (exchange.status, exchange.is_complete) == (200, True)
        cluster.workers.pinned.clear()
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_the_clients_pace_becomes_the_workers() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        sent = 0

        async def decode(request: MemoryRequest, reply: MemoryReply) -> None:
            nonlocal sent
            reply.head(200, SSE)
            for index in range(2000):
                await reply.chunk(token(f"{index} " + "x" * 1000))
                sent = index
            await reply.chunk(LAST)

        cluster.upstream.serve(cluster.origin("decode/0"), decode)
        exchange = FakeExchange(BODY)
        exchange.is_writable = False
        serving = asyncio.create_task(cluster.serve(exchange))
        await exchange.fed.wait()
        for _ in range(10_000):
            await asyncio.sleep(0)
        assert sent < 1000, "the worker was read on although the client does not read"
        exchange.read_again()
        await serving
        assert exchange.sent.count(b"\n\n") == 2002
        assert exchange.sent.endswith(DONE)
        cluster.workers.pinned.clear()
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


def test_a_bug_of_ours_is_a_500_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> FakeExchange:
        cluster = FakeCluster()

        async def broken(scope: object, body: bytes) -> None:
            raise ZeroDivisionError("secret")

        cluster.plane.serve = broken
        return await cluster.ask(CHAT)

    exchange = asyncio.run(main())
    assert exchange.status == 500
    assert b"secret" not in exchange.sent
    assert "ZeroDivisionError" in caplog.text


def test_a_process_that_ends_cancels_its_requests() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        cluster.upstream.serve(cluster.origin("prefill/0"), hang)
        serving = asyncio.create_task(cluster.serve(FakeExchange(BODY)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys"
    file.write_text(f"alice {hashlib.sha256(b'sesame').hexdigest()}\n")
    return KeyRing.load(file)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"authorization", b"Bearer sesame")], 200),
        ([(b"authorization", b"Bearer wrong")], 401),
        ([], 401),
    ],
)
def test_keys_are_asked_for(keys: KeyRing, headers: list[tuple[bytes, bytes]], status: int) -> None:
    async def main() -> tuple[FakeExchange, str | None]:
        cluster = FakeCluster(keys=keys)
        exchange = await cluster.ask(CHAT, headers=headers)
        await cluster.aclose()
        return exchange, cluster.telemetry.records[0].client

    exchange, client = asyncio.run(main())
    assert exchange.status == status
    assert client == ("alice" if status == 200 else None)
    if status == 401:
        assert exchange.answer_headers[b"www-authenticate"] == b"Bearer"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/v1/chat/completions", "send Authorization: Bearer KEY"),
        ("/v1/messages", "send x-api-key: KEY, or Authorization: Bearer KEY"),
        ("/v1/messages/count_tokens", "send x-api-key: KEY, or Authorization: Bearer KEY"),
    ],
)
def test_a_client_without_a_key_is_told_how_to_send_it(keys: KeyRing, path: str, wanted: str) -> None:
    async def main() -> None:
        cluster = FakeCluster(keys=keys)
        answer = await cluster.ask(CHAT, path=path)
        assert json.loads(answer.sent)["error"]["message"] == f"an API key is needed: {wanted}"
        await cluster.aclose()

    asyncio.run(main())


def test_other_limits_hold_from_the_next_request_on() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        cluster.upstream.serve(cluster.origin("prefill/0"), hang)
        serving = asyncio.create_task(cluster.serve(first := FakeExchange(BODY)))
        await asyncio.sleep(0)
        (scope,) = cluster.plane.open
        deadline = scope.deadline
        cluster.plane.reconfigure(LimitsConfig(max_held_bytes=1024, request_timeout_s=5))
        assert scope.deadline == deadline
        assert (await cluster.ask({**CHAT, "user": "x" * 1024})).status == 503
        later = RequestScope(cluster.plane, FakeExchange(BODY))
        assert later.deadline - later.record.received == pytest.approx(5)
        first.leave()
        await serving
        await cluster.aclose()

    asyncio.run(main())


def test_it_is_an_asgi_application_for_any_server() -> None:
    async def main() -> None:
        cluster = FakeCluster()
        transport = httpx.ASGITransport(cluster.plane)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 200
        assert answer.content == token("a") + token("b") + token("c") + LAST
        assert answer.headers["x-baton-path"] == "disaggregated"
        assert answer.headers["x-request-id"]
        await cluster.aclose()
        cluster.assert_at_rest()

    asyncio.run(main())
