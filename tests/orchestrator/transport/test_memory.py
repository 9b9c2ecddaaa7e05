"""What only the in-memory twin promises: control over when things happen, and no hidden failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from orchestrator.errors import WorkerCutShort, WorkerUnreachable
from orchestrator.transport.base import Answer, Origin, request
from orchestrator.transport.memory import MemoryReply, MemoryRequest, MemoryUpstream

WORKER = Origin("worker", 1)


async def post(upstream: MemoryUpstream) -> Answer:
    return await request(upstream, WORKER, "POST", "/", b"", [b"{}"])


async def echo(request: MemoryRequest, reply: MemoryReply) -> None:
    reply.answer(200, request.body)


def test_an_exchange_takes_no_time_and_few_turns() -> None:
    async def scenario() -> None:
        upstream = MemoryUpstream()
        upstream.serve(WORKER, echo)
        leg = asyncio.ensure_future(post(upstream))
        for _ in range(3):
            await asyncio.sleep(0)
        assert leg.result().body_nowait() == b"{}"

    asyncio.run(scenario())


def test_what_a_handler_raises_cuts_the_answer_and_comes_out_at_the_end() -> None:
    async def broken(request: MemoryRequest, reply: MemoryReply) -> None:
        raise LookupError("a mistake in the test")

    async def bodiless(request: MemoryRequest, reply: MemoryReply) -> None:
        await reply.chunk(b"no head yet")

    async def scenario() -> None:
        upstream = MemoryUpstream()
        for handler in (broken, bodiless):
            upstream.serve(WORKER, handler)
            with pytest.raises(WorkerCutShort):
                await post(upstream)
        with pytest.raises(ExceptionGroup) as caught:
            await upstream.aclose()
        assert [type(error) for error in caught.value.exceptions] == [LookupError, RuntimeError]
        await upstream.aclose()

    asyncio.run(scenario())


def test_a_handler_that_returns_early_ends_or_cuts() -> None:
    async def headless(request: MemoryRequest, reply: MemoryReply) -> None: ...

    async def begun(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)

    async def scenario() -> None:
        upstream = MemoryUpstream()
        upstream.serve(WORKER, headless)
        with pytest.raises(WorkerCutShort):
            await post(upstream)
        upstream.serve(WORKER, begun)
        assert await (await post(upstream)).read(0) == b""

    asyncio.run(scenario())


def test_a_worker_that_stops_listening() -> None:
    async def scenario() -> None:
        upstream = MemoryUpstream()
        upstream.serve(WORKER, echo)
        await post(upstream)
        upstream.refuse(WORKER)
        with pytest.raises(WorkerUnreachable):
            await post(upstream)
        assert upstream.stats().connects == len(upstream.requests) == 1

    asyncio.run(scenario())


def test_connecting_takes_as_long_as_the_test_says() -> None:
    async def elapsed(upstream: MemoryUpstream, work: Callable[[], Awaitable[object]]) -> float:
        start = asyncio.get_running_loop().time()
        await work()
        return asyncio.get_running_loop().time() - start

    async def times_out(upstream: MemoryUpstream) -> None:
        with pytest.raises(WorkerUnreachable):
            await post(upstream)

    async def scenario() -> None:
        upstream = MemoryUpstream(connect_timeout_s=0.03)
        upstream.serve(WORKER, echo, connect_s=0.02)
        assert await elapsed(upstream, lambda: post(upstream)) >= 0.019
        upstream.serve(WORKER, echo, connect_s=3600)
        assert await elapsed(upstream, lambda: times_out(upstream)) >= 0.029
        assert len(upstream.requests) == 1

    asyncio.run(scenario())


def test_a_dropped_handler_is_cancelled_but_has_started() -> None:
    story: list[str] = []

    async def handler(request: MemoryRequest, reply: MemoryReply) -> None:
        story.append("started")
        try:
            await reply.hang()
        finally:
            story.append("over" if reply.is_over else "open")
            reply.chunk_nowait(b"to nobody")
            reply.answer(200, b"to nobody")

    async def scenario() -> None:
        upstream = MemoryUpstream()
        upstream.serve(WORKER, handler)
        answer = await upstream.send(WORKER, "POST", "/", b"", [])
        answer.abort()
        assert upstream.stats().busy == 0
        await upstream.aclose()
        assert story == ["started", "over"]
        assert answer.status == 0

    asyncio.run(scenario())
