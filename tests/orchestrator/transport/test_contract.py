"""What every upstream promises (base.py), on the pool, on streams, and on the in-memory twin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
import uvloop

from orchestrator.errors import WorkerCutShort, WorkerGarbage, WorkerUnreachable
from orchestrator.transport.base import Answer, Origin, request
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.transport.harness import run_on, turns, until
from tests.orchestrator.transport.streams import on_streams
from tests.orchestrator.transport.workers import Serve, Setting, in_memory, on_sockets

KINDS = [
    pytest.param(in_memory, asyncio.new_event_loop, id="memory"),
    pytest.param(on_sockets, uvloop.new_event_loop, id="pool-uvloop"),
    pytest.param(on_sockets, asyncio.new_event_loop, id="pool-asyncio"),
    pytest.param(on_streams, uvloop.new_event_loop, id="mux-uvloop"),
    pytest.param(on_streams, asyncio.new_event_loop, id="mux-asyncio"),
]


def contract(test: Callable[[Serve], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @pytest.mark.parametrize(("kind", "new_loop"), KINDS)
    @wraps(test)
    def run(kind: Serve, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        run_on(new_loop, test(kind))

    del run.__wrapped__  # pytest would ask it for the parameters
    return run


async def post(at: Setting, body: bytes = b"{}") -> Answer:
    return await request(at.upstream, at.origin, "POST", "/v1/x", b"", [body])


async def send(at: Setting, body: bytes = b"{}") -> Answer:
    return await at.upstream.send(at.origin, "POST", "/v1/x", b"", [body])


class Streaming:
    """A worker that sends a head, then pieces as the test says, and knows when it was dropped."""

    def __init__(self) -> None:
        self.reply: MemoryReply
        self.is_dropped = False
        self.has_begun = asyncio.Event()

    async def __call__(self, request: MemoryRequest, reply: MemoryReply) -> None:
        self.reply = reply
        self.has_begun.set()
        try:
            await reply.hang()
        finally:
            self.is_dropped = True

    async def begin(self, at: Setting) -> Answer:
        answer = await send(at)
        await self.has_begun.wait()
        self.reply.head(200)
        await answer.head()
        return answer

    async def wait_dropped(self, at: Setting) -> None:
        await until(lambda: self.is_dropped)
        assert at.upstream.stats().busy == 0


@contract
async def test_a_whole_answer(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(201, b"body", {b"content-type": b"text/plain"})

    async with serve(worker) as at:
        parts = [b"one ", bytearray(b"two "), memoryview(b"three")]
        answer = await request(at.upstream, at.origin, "PUT", "/t?q=1", b"x-a: b\r\n", parts)
        assert answer.status == 201
        assert answer.headers[b"content-type"] == b"text/plain"
        assert await answer.read(4) == b"body"
        assert answer.is_complete
        [received] = at.requests
        assert (received.method, received.target) == ("PUT", "/t?q=1")
        assert received.headers == ((b"x-a", b"b"),)
        assert received.body == b"one two three"
        assert at.upstream.stats().busy == 0


@contract
async def test_chunks_come_as_they_arrive_and_then_the_end(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        for piece in (b"a", b"bb", b"ccc"):
            worker.reply.chunk_nowait(piece)
            assert await answer.chunk() == piece
        assert not answer.is_complete
        assert answer.body_nowait() is None
        worker.reply.end()
        assert [await answer.chunk() for _ in range(3)] == [b"", b"", b""]
        assert answer.is_complete
        assert at.upstream.stats().busy == 0


@contract
async def test_what_has_arrived_comes_as_one_and_without_waiting(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        for piece in (b"a", b"bb", b"ccc"):
            worker.reply.chunk_nowait(piece)
            await turns()
        ready = answer.chunk()
        with pytest.raises(StopIteration, match=r"b'abbccc'"):
            ready.send(None)
        answer.abort()


@contract
async def test_an_empty_body(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"")

    async with serve(worker) as at:
        answer = await post(at)
        assert await answer.read(0) == b""
        assert await answer.chunk() == b""


@contract
async def test_an_answer_to_head_has_no_body(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"not for you")

    async with serve(worker) as at:
        answer = await request(at.upstream, at.origin, "HEAD", "/", b"", [])
        assert await answer.read(100) == b""
        assert answer.is_complete


@contract
async def test_one_worker_serves_many_legs_in_turn_and_at_once(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)
        await reply.chunk(request.body)

    async def leg(at: Setting, number: int) -> None:
        body = b"%d" % number
        assert await (await post(at, body)).read(100) == body

    async with serve(worker) as at:
        for number in range(5):
            await leg(at, number)
        await asyncio.gather(*(leg(at, number) for number in range(20)))
        assert len(at.requests) == 25
        assert at.upstream.stats().busy == 0


@contract
async def test_send_returns_before_the_answer(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await send(at)
        assert (answer.status, answer.is_complete) == (0, False)
        await worker.has_begun.wait()
        worker.reply.answer(200, b"late")
        await answer.head()
        await answer.head()
        assert answer.status == 200
        assert answer.body_nowait() == b"late"


@contract
async def test_a_reader_may_skip_waiting_for_the_head(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"body")

    async with serve(worker) as at:
        assert await (await send(at)).chunk() == b"body"
        assert await (await send(at)).read(4) == b"body"


@contract
async def test_nobody_listens(serve: Serve) -> None:
    async with serve(Streaming()) as at:
        nowhere = Origin("127.0.0.1", 1)
        with pytest.raises(WorkerUnreachable) as caught:
            await at.upstream.send(nowhere, "POST", "/", b"", [])
        assert "127.0.0.1" not in caught.value.message
        assert at.requests == []


@contract
async def test_the_worker_closes_before_its_answer(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.cut_short()

    async with serve(worker) as at:
        with pytest.raises(WorkerCutShort):
            await post(at)
        answer = await send(at)
        for _ in range(2):
            with pytest.raises(WorkerCutShort):
                await answer.head()
        assert at.upstream.stats().busy == 0


@contract
async def test_an_answer_that_is_not_http(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.garbage()

    async with serve(worker) as at:
        with pytest.raises(WorkerGarbage):
            await post(at)
        assert at.upstream.stats().busy == 0


@contract
async def test_a_body_cut_short_gives_what_arrived_then_fails(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)
        await reply.chunk(b"half")
        reply.cut_short()

    async with serve(worker) as at:
        answer = await post(at)
        await until(lambda: at.upstream.stats().busy == 0)
        assert await answer.chunk() == b"half"
        for _ in range(2):
            with pytest.raises(WorkerCutShort):
                await answer.chunk()
        assert not answer.is_complete
        assert answer.body_nowait() is None
        answer = await post(at)
        with pytest.raises(WorkerCutShort):
            await answer.read(100)


@contract
async def test_read_refuses_more_than_its_limit_and_loses_nothing(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"12345")

    async with serve(worker) as at:
        answer = await post(at)
        with pytest.raises(WorkerGarbage):
            await answer.read(4)
        assert await answer.read(5) == b"12345"


@contract
async def test_read_stops_at_its_limit_in_an_endless_body(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)
        while True:
            await reply.chunk(bytes(10_000))

    async with serve(worker) as at:
        answer = await post(at)
        with pytest.raises(WorkerGarbage):
            await answer.read(500_000)
        answer.abort()
        assert at.upstream.stats().busy == 0


@contract
async def test_read_goes_on_past_the_high_water_mark(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)
        for _ in range(40):
            await reply.chunk(bytes(50_000))

    async with serve(worker) as at:
        assert len(await (await post(at)).read(2_000_000)) == 2_000_000


@contract
async def test_a_slow_reader_holds_the_worker_back(serve: Serve) -> None:
    total, sent = 64, 0

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        nonlocal sent
        reply.head(200)
        for _ in range(total):
            await reply.chunk(bytes(1_000_000))
            sent += 1

    async with serve(worker) as at:
        answer = await post(at)
        await until_still(lambda: sent)
        assert sent < total / 2
        size = 0
        while piece := await answer.chunk():
            size += len(piece)
        assert size == total * 1_000_000


async def until_still(value: Callable[[], int]) -> None:
    """Until it no longer grows. (Too early on a slow machine: then the test proves less, but holds.)"""
    before = -1
    while value() != before:
        before = value()
        await asyncio.sleep(0.05)


@contract
async def test_pump_delivers_each_piece_as_it_arrives(serve: Serve) -> None:
    worker, taken = Streaming(), []
    async with serve(worker) as at:
        answer = await worker.begin(at)
        worker.reply.chunk_nowait(b"before")
        await turns()
        pumping = asyncio.ensure_future(answer.pump(collector(taken)))
        await turns()
        assert taken == [b"before"]
        for piece in (b"a", b"bb"):
            worker.reply.chunk_nowait(piece)
            await until(lambda piece=piece: taken[-1] == piece)
        worker.reply.end()
        await pumping
        assert taken == [b"before", b"a", b"bb"]
        assert answer.is_complete
        assert await answer.chunk() == b""


def collector(into: list[bytes]) -> Callable[[bytes], bool]:
    def sink(piece: bytes) -> bool:
        into.append(piece)
        return True

    return sink


@contract
async def test_pump_of_an_answer_that_is_there_already(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"body")

    async with serve(worker) as at:
        taken: list[bytes] = []
        answer = await post(at)
        await until(lambda: answer.is_complete)
        await answer.pump(lambda piece: bool(taken.append(piece)))  # a pause at the end is ignored
        assert taken == [b"body"]


@contract
async def test_pump_pauses_and_resumes(serve: Serve) -> None:
    total, sent, taken = 40, 0, 0

    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        nonlocal sent
        reply.head(200)
        for _ in range(total):
            await reply.chunk(bytes(1_000_000))
            sent += 1

    def sink(piece: bytes) -> bool:
        nonlocal taken, pauses
        taken += len(piece)
        pauses += 1
        return False

    async with serve(worker) as at:
        pauses = 0
        answer = await post(at)
        pumping = asyncio.ensure_future(answer.pump(sink))
        await until(lambda: bool(pauses))
        await until_still(lambda: sent)
        assert pauses == 1
        assert sent < total / 2
        while not pumping.done():
            answer.resume()
            answer.resume()
            await asyncio.sleep(0)
        await pumping
        assert taken == total * 1_000_000
        answer.resume()


@contract
async def test_a_failure_during_a_pause_comes_after_what_arrived(serve: Serve) -> None:
    worker, taken = Streaming(), []

    def sink(piece: bytes) -> bool:
        taken.append(piece)
        return False

    async with serve(worker) as at:
        answer = await worker.begin(at)
        pumping = asyncio.ensure_future(answer.pump(sink))
        worker.reply.chunk_nowait(b"one")
        await until(lambda: bool(taken))
        worker.reply.chunk_nowait(b"two")
        worker.reply.cut_short()
        await turns(10)
        while not pumping.done():
            answer.resume()
            await asyncio.sleep(0)
        with pytest.raises(WorkerCutShort):
            await pumping
        assert taken == [b"one", b"two"]


@contract
async def test_abort_ends_a_pump_that_is_paused(serve: Serve) -> None:
    worker, taken = Streaming(), []

    def sink(piece: bytes) -> bool:
        taken.append(piece)
        return False

    async with serve(worker) as at:
        answer = await worker.begin(at)
        pumping = asyncio.ensure_future(answer.pump(sink))
        worker.reply.chunk_nowait(b"one")
        await until(lambda: bool(taken))
        worker.reply.chunk_nowait(b"two")
        worker.reply.end()
        await turns()
        answer.abort()
        with pytest.raises(WorkerCutShort):
            await pumping
        assert taken == [b"one"]


@contract
async def test_pump_raises_when_the_body_is_cut_short(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.head(200)
        await reply.chunk(b"half")
        reply.cut_short()

    async with serve(worker) as at:
        taken: list[bytes] = []
        answer = await post(at)
        with pytest.raises(WorkerCutShort):
            await answer.pump(collector(taken))
        assert taken == [b"half"]


@contract
async def test_what_a_sink_raises_aborts_the_answer(serve: Serve) -> None:
    worker = Streaming()

    def sink(piece: bytes) -> bool:
        raise LookupError(piece)

    async with serve(worker) as at:
        answer = await worker.begin(at)
        pumping = asyncio.ensure_future(answer.pump(sink))
        worker.reply.chunk_nowait(b"x")
        with pytest.raises(LookupError):
            await pumping
        await worker.wait_dropped(at)


@contract
async def test_a_sink_may_abort(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)

        def sink(piece: bytes) -> bool:
            answer.abort()
            return True

        pumping = asyncio.ensure_future(answer.pump(sink))
        worker.reply.chunk_nowait(b"x")
        with pytest.raises(WorkerCutShort):
            await pumping
        await worker.wait_dropped(at)


@contract
async def test_cancelling_a_pump_aborts(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        await cancelled(answer.pump(collector([])))
        await worker.wait_dropped(at)
        with pytest.raises(WorkerCutShort):
            await answer.chunk()


async def cancelled(work: Coroutine[Any, Any, object]) -> None:
    """Start, let it wait, cancel."""
    task = asyncio.ensure_future(work)
    await turns()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@contract
async def test_cancelling_a_request_closes_its_connection(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        task = asyncio.ensure_future(post(at))
        await worker.has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await worker.wait_dropped(at)


@contract
async def test_cancelled_waits_lose_nothing(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await send(at)
        await cancelled(answer.head())
        worker.reply.head(200)
        await answer.head()
        await cancelled(answer.chunk())
        worker.reply.chunk_nowait(b"one")
        await until(lambda: at.upstream.stats().busy == 1)
        await cancelled(answer.read(100))
        worker.reply.end()
        await until(lambda: answer.is_complete)
        assert answer.body_nowait() == b"one"
        assert answer.body_nowait() == b""


@contract
async def test_an_answer_that_completes_while_its_reader_is_cancelled(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await send(at)
        reading = asyncio.ensure_future(answer.head())
        await worker.has_begun.wait()
        worker.reply.answer(200, b"whole")
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: answer.is_complete)
        answer.abort()
        assert answer.status == 200
        assert answer.body_nowait() == b"whole"


@contract
async def test_leaving_tells_the_worker(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await send(at)
        await worker.has_begun.wait()
        answer.leave()
        with pytest.raises(WorkerCutShort):
            await answer.read(100)
        await worker.wait_dropped(at)


@contract
async def test_an_answer_that_is_on_its_way_arrives_after_leaving(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await send(at)
        await worker.has_begun.wait()
        worker.reply.answer(200, b"whole")
        answer.leave()
        answer.leave()
        assert await answer.read(100) == b"whole"
        answer.leave()
        await until(lambda: at.upstream.stats().busy == 0)
        # Half closed, a connection of its own carries no other leg.
        assert at.upstream.stats().idle == (1 if at.is_shared else 0)


@contract
async def test_abort_wakes_the_reader_and_tells_the_worker(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        reading = asyncio.ensure_future(answer.read(100))
        await turns()
        answer.abort()
        answer.abort()
        with pytest.raises(WorkerCutShort):
            await reading
        with pytest.raises(WorkerCutShort):
            await answer.chunk()
        await worker.wait_dropped(at)


@contract
async def test_a_leg_that_is_dropped_at_once_was_sent_all_the_same(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        (await send(at, b"all of it")).abort()
        assert at.upstream.stats().busy == 0
        await worker.has_begun.wait()
        await worker.wait_dropped(at)
        assert [request.body for request in at.requests] == [b"all of it"]


@contract
async def test_an_answer_has_one_reader_at_a_time(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        reading = asyncio.ensure_future(answer.chunk())
        await turns()
        with pytest.raises(RuntimeError):
            await answer.chunk()
        worker.reply.chunk_nowait(b"x")
        assert await reading == b"x"
        answer.abort()


@contract
async def test_closing_ends_the_legs_under_way(serve: Serve) -> None:
    worker = Streaming()
    async with serve(worker) as at:
        answer = await worker.begin(at)
        reading = asyncio.ensure_future(answer.chunk())
        await turns()
        await at.upstream.aclose()
        with pytest.raises(WorkerCutShort):
            await reading
        with pytest.raises(WorkerUnreachable):
            await send(at)
        await at.upstream.aclose()
