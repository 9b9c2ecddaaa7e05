"""Each attempt that came to nothing is in the request's record and line: which worker, how, for how long."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator.config.options import LogConfig
from orchestrator.telemetry.access_log import AccessLog
from orchestrator.telemetry.record import FailedAttempt, RequestRecord
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from orchestrator.workers.states import Event
from tests.orchestrator.fakes import JSON, SSE, FakeCluster, token
from tests.simulation.loop import run_virtually

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
STREAM = {**CHAT, "stream": True}
EMBEDDINGS = {"model": "m", "input": "hi"}
FOUR = ("prefill", "prefill", "decode", "decode")

Worker = Callable[[MemoryRequest, MemoryReply], Awaitable[None]]
Test = Callable[[FakeCluster], Awaitable[None]]


def run(test: Test, **options: Any) -> RequestRecord:
    """The record of the last request of a test."""

    async def main() -> RequestRecord:
        cluster = FakeCluster(**{"roles": FOUR, **options})
        cluster.core.start()
        await asyncio.sleep(1.0)  # a moment of 0.0 stands for none
        await test(cluster)
        await cluster.aclose()
        return cluster.telemetry.records[-1]

    return run_virtually(main())


async def cuts_short(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.cut_short()


async def says_garbage(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.garbage()


async def begins_a_stream(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(token("a"))
    reply.cut_short()


def answers(status: int, after_s: float = 0.0) -> Worker:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        await asyncio.sleep(after_s)
        reply.answer(status, b'{"error":{"message":"no","type":"x","param":null,"code":null}}', JSON)

    return worker


def spoil(cluster: FakeCluster, name: str, worker: Worker) -> None:
    cluster.upstream.serve(cluster.origin(name), worker)


def failed(record: RequestRecord) -> list[tuple[str, str]]:
    return [(attempt.worker, attempt.outcome) for attempt in attempts(record)]


def attempts(record: RequestRecord) -> list[FailedAttempt]:
    """The attempts of a request that have failed."""
    return [] if record.attempts is None else record.attempts.failed


def count(record: RequestRecord) -> int:
    """How often workers were chosen for a request."""
    return 1 if record.attempts is None else record.attempts.count


@pytest.mark.parametrize("document", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("worker", "outcome"),
    [
        (cuts_short, "cut_short"),
        (says_garbage, "garbage"),
        (answers(500), "answered_500"),
        (answers(503), "busy"),
        (answers(401), "unfit"),
    ],
    ids=["cut short", "garbage", "500", "503", "401"],
)
def test_the_worker_that_failed_is_named_not_the_one_that_served(
    worker: Worker, outcome: str, role: str, document: dict[str, Any]
) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, f"{role}/0", worker)
        assert (await cluster.ask(document)).status == 200

    record = run(test)
    assert (count(record), failed(record)) == (2, [(f"m/{role}/0", outcome)])
    served = {"prefill": record.prefill_worker, "decode": record.decode_worker}
    assert served[role] == f"m/{role}/1"


def test_nothing_is_noted_of_a_request_that_needed_one_attempt() -> None:
    async def test(cluster: FakeCluster) -> None:
        assert (await cluster.ask(CHAT)).status == 200

    record = run(test)
    assert record.attempts is None


def test_a_request_that_a_worker_refuses_has_failed_nobody() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(400))
        assert (await cluster.ask(CHAT)).status == 400

    assert run(test).attempts is None


def test_how_long_each_had_it_is_told() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(500, after_s=3.0))
        for name in ("decode/0", "decode/1"):
            spoil(cluster, name, answers(500, after_s=1.0))
        await cluster.ask(CHAT)

    record = run(test)
    assert [round(attempt.seconds, 1) for attempt in attempts(record)] == [3.0, 1.0]


def test_the_last_failure_is_named_too() -> None:
    async def test(cluster: FakeCluster) -> None:
        for name in ("decode/0", "decode/1"):
            spoil(cluster, name, answers(500))
        assert (await cluster.ask(CHAT)).status == 500

    record = run(test)
    assert (count(record), failed(record)) == (
        2,
        [("m/decode/0", "answered_500"), ("m/decode/1", "answered_500")],
    )


def test_a_worker_that_says_nothing_and_is_given_up_was_silent() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", stands_still)
        asked = asyncio.create_task(cluster.ask(CHAT))
        await asyncio.sleep(1.0)
        worker = cluster.worker("prefill/0")
        cluster.registry.judge.note_seen(worker, worker.epoch, Event.SILENT, "no answer to a probe")
        assert (await asked).status == 200

    record = run(test)
    [attempt] = attempts(record)
    assert (attempt.worker, attempt.outcome) == ("m/prefill/0", "silent")
    assert attempt.seconds > 1.0
    assert record.prefill_worker == "m/prefill/1"


async def stands_still(request: MemoryRequest, reply: MemoryReply) -> None:
    await asyncio.sleep(1e6)


def test_nobody_listens_there() -> None:
    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("decode/0"))
        assert (await cluster.ask(CHAT)).status == 200

    assert failed(run(test)) == [("m/decode/0", "unreachable")]


def test_a_stream_that_another_worker_resumed() -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "decode/0", begins_a_stream)
        await cluster.ask(STREAM)

    assert failed(run(test))[0] == ("m/decode/0", "cut_short")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
def test_endpoints_with_one_leg(path: str) -> None:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "both/0", answers(500))
        spoil(cluster, "both/1", answers(500))
        document = EMBEDDINGS if path == "/v1/embeddings" else {"model": "m", "prompt": "hi"}
        await cluster.ask(document, path=path)

    assert failed(run(test, roles=("both", "both")))[0] == ("m/both/0", "answered_500")


def test_a_prefill_worker_of_an_earlier_attempt_is_not_named_for_one_that_had_none() -> None:
    """The only prefill worker is gone: the decode worker prefills."""

    async def test(cluster: FakeCluster) -> None:
        cluster.upstream.refuse(cluster.origin("prefill/0"))
        assert (await cluster.ask(CHAT)).status == 200

    record = run(test, roles=("prefill", "decode"))
    assert (record.prefill_worker, record.decode_worker) == (None, "m/decode/0")
    assert failed(record) == [("m/prefill/0", "unreachable")]


# --- lines --------------------------------------------------------------------------------------


def lines_of(record: RequestRecord, **options: Any) -> str:
    written: list[bytes] = []

    async def flush() -> None:
        config = LogConfig.model_validate({"format": "console"} | options)
        AccessLog(deque([record]), ["m"], config, written.append).flush(1)

    asyncio.run(flush())
    return b"".join(written).decode()


def slow_and_failed() -> RequestRecord:
    async def test(cluster: FakeCluster) -> None:
        spoil(cluster, "prefill/0", answers(500, after_s=3.125))
        await cluster.ask(CHAT)

    return run(test)


def test_the_console_line_has_them() -> None:
    assert " attempts=2 failed=m/prefill/0:answered_500:3.1s " in lines_of(slow_and_failed())


def test_the_json_line_has_them() -> None:
    line = lines_of(slow_and_failed(), format="json")
    assert '"attempts":2,"failed":[{"worker":"m/prefill/0","outcome":"answered_500","ms":3125.0}]' in line


def test_the_warning_of_a_slow_request_has_them(caplog: pytest.LogCaptureFixture) -> None:
    lines_of(slow_and_failed(), slow_request_s=1.0)
    [warning] = caplog.messages
    assert "workers m/prefill/1 -> m/decode/1 attempts=2 failed=m/prefill/0:answered_500:3.1s" in warning
