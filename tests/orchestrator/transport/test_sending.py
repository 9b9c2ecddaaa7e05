"""A body that is written bit by bit: what both transports promise, and what becomes of connections."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.errors import WorkerCutShort, WorkerUnreachable
from orchestrator.transport.base import Origin, Sending
from orchestrator.transport.memory import MemoryReply, MemoryRequest
from tests.orchestrator.transport.harness import PeerConnection, fixed, get, peer, pool, scenario, until
from tests.orchestrator.transport.test_contract import contract
from tests.orchestrator.transport.workers import Serve, Setting

PIECE = bytes(256 * 1024)
LARGE = 64 * 1024 * 1024


async def opened(at: Setting, size: int | None) -> Sending:
    return await at.upstream.open(at.origin, "POST", "/v1/x", b"x-a: b\r\n", size)


async def send_all(sending: Sending, total: int) -> None:
    for _ in range(total // len(PIECE)):
        while sending.is_full and not sending.is_over:
            await sending.wait()
        sending.write(PIECE)
    sending.end()


@contract
async def test_a_body_arrives_in_the_order_in_which_it_was_written(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"body")

    async with serve(worker) as at:
        sending = await opened(at, 8)
        for piece in (b"one ", bytearray(b"two"), memoryview(b"!")):
            assert not sending.is_over
            sending.write(piece)
        sending.end()
        await sending.answer.head()
        assert await sending.answer.read(4) == b"body"
        assert sending.is_over
        [received] = at.requests
        assert (received.method, received.target, received.body) == ("POST", "/v1/x", b"one two!")
        assert received.headers == ((b"x-a", b"b"),)
        assert at.upstream.stats().busy == 0


@contract
async def test_who_waits_can_be_woken(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"")

    async with serve(worker) as at:
        sending = await opened(at, 1)
        waiting = asyncio.create_task(sending.wait())
        await asyncio.sleep(0)
        sending.wake()
        await waiting
        sending.answer.abort()
        await until(lambda: sending.is_over)
        sending.write(b"a")
        sending.end()
        with pytest.raises(WorkerCutShort):
            await sending.answer.head()
        assert at.upstream.stats().busy == 0


@contract
async def test_what_cannot_be_reached_gets_nothing(serve: Serve) -> None:
    async def worker(request: MemoryRequest, reply: MemoryReply) -> None:
        reply.answer(200, b"")

    async with serve(worker) as at:
        with pytest.raises(WorkerUnreachable):
            await at.upstream.open(Origin("127.0.0.1", 1), "POST", "/", b"", 0)


async def chunks(connection: PeerConnection) -> bytes:
    body = b""
    while size := int(await connection.reader.readline(), 16):
        body += (await connection.reader.readexactly(size + 2))[:-2]
    assert await connection.reader.readexactly(2) == b"\r\n"
    return body


@scenario
async def test_without_a_size_it_goes_in_chunks_and_the_connection_is_used_again() -> None:
    seen = []

    async def script(connection: PeerConnection) -> None:
        seen.append(await connection.head())
        seen.append(await chunks(connection))
        await connection.send(fixed(b"heard"))
        await connection.head()
        await connection.send(fixed(b"again"))
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        sending = await upstream.open(worker.origin, "POST", "/x", b"", None)
        for piece in (b"a" * 20, b"b"):
            sending.write(piece)
        assert upstream.stats().idle == 0
        sending.end()
        assert await sending.answer.read(5) == b"heard"
        assert b"transfer-encoding: chunked\r\n" in seen[0]
        assert b"content-length" not in seen[0]
        assert seen[1] == b"a" * 20 + b"b"
        assert await get(upstream, worker.origin) == (200, b"again")
        assert len(worker.connections) == 1


@scenario
async def test_a_worker_that_takes_nothing_is_waited_for() -> None:
    goes_on = asyncio.Event()

    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await goes_on.wait()
        await connection.reader.readexactly(LARGE)
        await connection.send(fixed(b"ok"))

    async with peer(script) as worker, pool() as upstream:
        sending = await upstream.open(worker.origin, "POST", "/x", b"", LARGE)
        writing = asyncio.create_task(send_all(sending, LARGE))
        await until(lambda: sending.is_full)
        goes_on.set()
        await writing
        assert await sending.answer.read(2) == b"ok"


@scenario
@pytest.mark.parametrize("status", [b"413 Content Too Large", b"200 OK"])
async def test_a_connection_on_which_a_body_was_not_whole_is_not_used_again(status: bytes) -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await connection.reader.readexactly(len(PIECE))
        await connection.send(fixed(b"no").replace(b"200 OK", status))
        await connection.wait_closed()

    async with peer(script) as worker, pool() as upstream:
        sending = await upstream.open(worker.origin, "POST", "/x", b"", LARGE)
        sending.write(PIECE)
        while not sending.is_over:
            await sending.wait()
        assert await sending.answer.read(2) == b"no"
        sending.write(PIECE)
        sending.end()
        assert (upstream.stats().idle, upstream.stats().busy) == (0, 0)


@scenario
async def test_a_worker_that_is_lost_wakes_the_sender_and_nothing_is_sent_again() -> None:
    async def script(connection: PeerConnection) -> None:
        await connection.head()
        await connection.reader.readexactly(1000)
        connection.reset()

    async with peer(script) as worker, pool() as upstream:
        sending = await upstream.open(worker.origin, "POST", "/x", b"", LARGE)
        await send_all(sending, LARGE)
        with pytest.raises(WorkerCutShort):
            await sending.answer.head()
        assert upstream.stats().retries == 0
        assert len(worker.connections) == 1
