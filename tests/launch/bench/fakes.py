"""An OpenAI endpoint in memory, and samples and steps with chosen figures."""

from __future__ import annotations

import asyncio
import io
import json
from array import array
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

from launch.bench.client import Client
from launch.bench.endpoint import Endpoint
from launch.bench.probe import Target
from launch.bench.progress import ProgressLine
from launch.bench.prompts import Corpus
from launch.bench.results import FORMAT, ClientLoad, Load, Result, Setup, Step, Unit, summarize
from launch.bench.sample import Sample, Slo, Usage
from launch.bench.session import Session
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream

SLO = Slo(ttft_ms=100, itl_ms=10, share=0.9)
CORPUS = Corpus(Random(0))
ENDPOINT = Endpoint.parse("http://endpoint:1")
SSE = {b"content-type": b"text/event-stream; charset=utf-8"}
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str | None, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": content} | more}])


@dataclass
class FakeEndpoint:
    """Answers at once: a token per asked token, and a prompt of two tokens per word and five more."""

    models: Sequence[str] = ("tiny",)
    refused: Collection[str] = ()  # fields that are a 400
    counts_tokens: bool = True
    max_model_len: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, request: MemoryRequest, reply: MemoryReply) -> None:
        if request.target == "/v1/models":
            cards = [{"id": name, "max_model_len": self.max_model_len} for name in self.models]
            reply.answer(200, json.dumps({"object": "list", "data": cards}).encode())
            return
        asked = json.loads(request.body)
        self.seen.append(asked)
        if unknown := [name for name in self.refused if name in asked]:
            reply.answer(400, json.dumps({"error": {"message": f"unknown: {unknown}"}}).encode())
            return
        reply.head(200, SSE | self.headers)
        await reply.chunk(text(None, role="assistant"))
        for _ in range(asked["max_tokens"]):
            await reply.chunk(text("word "))
        await reply.chunk(self._ending(asked))

    def _ending(self, asked: dict[str, Any]) -> bytes:
        if not self.counts_tokens or "stream_options" not in asked:
            return DONE
        words = sum(len(message["content"].split()) for message in asked["messages"])
        usage = {"prompt_tokens": 2 * words + 5, "completion_tokens": asked["max_tokens"]}
        return event(choices=[], usage=usage | {"prompt_tokens_details": {"cached_tokens": 1}}) + DONE


def client_of(upstream: MemoryUpstream, timeout_s: float = 60.0) -> Client:
    return Client(upstream, ENDPOINT, [(b"authorization", b"Bearer k")], timeout_s)


def serving(handler: Any) -> MemoryUpstream:
    upstream = MemoryUpstream()
    upstream.serve(ENDPOINT.origin, handler)
    return upstream


def session_on(endpoint: FakeEndpoint, salt: str = "s") -> Session:
    target = Target("tiny", None, {}, 2.0)
    progress = ProgressLine(io.StringIO())
    return Session(client_of(serving(endpoint)), target, CORPUS, SLO, progress, seed="0", salt=salt)


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 60))


def sample(
    ttft_ms: float = 50.0,
    itl_ms: float = 5.0,
    tokens: int = 3,
    *,
    error: str | None = None,
    late_ms: float = 0.0,
    **fields: Any,
) -> Sample:
    """Due at 10 s, with one event per token."""
    arrivals = array("d", (10 + (ttft_ms + number * itl_ms) / 1e3 for number in range(tokens)))
    usage = Usage(prompt_tokens=7, completion_tokens=tokens)
    made = Sample(
        due=10.0, sent=10 + late_ms / 1e3, ended=arrivals[-1], arrivals=arrivals, usage=usage, **fields
    )
    if error is not None:
        made.fail(error, f"why {error}")
    return made


def step(
    samples: Sequence[Sample] = (),
    *,
    workload: str = "chat",
    rate: float = 4.0,
    seconds: float = 1.0,
    cpu: float = 0.1,
) -> Step:
    load = Load(rate, Unit.RATE)
    return summarize(workload, load, samples or [sample()], seconds, SLO, ClientLoad(cpu, 1, 0))


def result(*steps: Step, **changes: Any) -> Result:
    setup = {
        "model": "tiny",
        "profile": "quick",
        "seed": 0,
        "slo": SLO,
        "tokens_per_word": 2.0,
        "fixed_length": True,
    }
    return Result(
        format=FORMAT,
        created="2026-01-01T00:00:00+00:00",
        url="http://endpoint:1/v1",
        salt="s",
        setup=Setup(**setup | changes),
        steps=list(steps) or [step()],
    )
