from __future__ import annotations

import json

import pytest

from launch.bench.client import stages_of
from launch.bench.sample import Sample
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream
from tests.launch.bench.fakes import DONE, SSE, client_of, run, serving, text

BODY = [b'{"stream":', memoryview(b"true}")]


def ask(handler: object, timeout_s: float = 60.0) -> Sample:
    async def main() -> Sample:
        upstream = serving(handler) if handler else MemoryUpstream()
        made = await client_of(upstream, timeout_s).ask(BODY)
        assert upstream.stats().busy == 0  # whatever happened, nothing is held
        await upstream.aclose()
        return made

    return run(main())


async def answer_well(request: MemoryRequest, reply: MemoryReply) -> None:
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert (b"authorization", b"Bearer k") in request.headers
    assert json.loads(request.body) == {"stream": True}
    timing = b"queue;dur=0.5, prefill;dur=12.25, decode;dur=3"
    reply.head(200, SSE | {b"x-baton-path": b"disaggregated", b"server-timing": timing})
    await reply.chunk(text("a"))
    await reply.chunk(text("b") + DONE)


def test_a_whole_answer() -> None:
    sample = ask(answer_well)
    assert sample.is_ok
    assert len(sample.arrivals) == 2
    assert sample.due == sample.sent <= sample.arrivals[0] <= sample.arrivals[1] <= sample.ended
    assert sample.path == "disaggregated"
    assert sample.stages == {"queue": 0.5, "prefill": 12.25, "decode": 3.0}


async def _refuse(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(429, b'{"error": {"message": "slow down"}}')


async def _no_stream(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, {b"content-type": b"application/json"})
    await reply.hang()


async def _cut(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(text("a"))
    reply.cut_short()


async def _short(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(text("a"))


async def _garbage(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.garbage()


async def _nonsense(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.head(200, SSE)
    await reply.chunk(b"data: nonsense\n\n")
    await reply.hang()


@pytest.mark.parametrize(
    ("handler", "kind", "detail"),
    [
        (None, "no connection", "no connection"),
        (_refuse, "http 429", "slow down"),
        (_no_stream, "not a stream", "the answer to a streaming request is not a stream of events"),
        (_cut, "cut short", "the connection ended before the answer did"),
        (_short, "broken stream", "the stream ended without [DONE]"),
        (_garbage, "not HTTP", "the answer is not HTTP"),
    ],
)
def test_every_failure_has_a_kind(handler: object, kind: str, detail: str) -> None:
    sample = ask(handler)
    assert (sample.error, sample.detail) == (kind, detail)
    assert sample.ended >= sample.sent


def test_nonsense_is_dropped() -> None:
    assert ask(_nonsense).error == "broken stream"


@pytest.mark.parametrize("has_head", [False, True])
def test_an_answer_that_takes_too_long(has_head: bool) -> None:
    async def hang(request: MemoryRequest, reply: MemoryReply) -> None:
        if has_head:
            reply.head(200, SSE)
        await reply.hang()

    sample = ask(hang, timeout_s=0.05)
    assert (sample.error, sample.detail) == ("timeout", "no complete answer within 0.05 s")


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("", {}),
        ("queue;dur=1.5", {"queue": 1.5}),
        ('cache;desc="hit", db ; dur=2 ;desc=x,miss', {"db": 2.0}),
        ("a;dur=,b;dur=x,;dur=1", {"": 1.0}),
    ],
)
def test_server_timing(header: str, stages: dict[str, float]) -> None:
    assert stages_of(header) == stages
