"""CPU of our upstream client per small exchange and per streamed event, against a mock worker on loopback.

    python bench/transport_micro.py [--requests N] [--clients N] [--events N] [--loop uvloop|asyncio]

User time is what our code and the interpreter take, system time is the kernel's sockets. `floor` is the same
traffic with a bare protocol that neither parses nor waits: what no client can go below on this loop.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import uvloop
from httptools import HttpRequestParser

from orchestrator.transport.base import Origin
from orchestrator.transport.pool import PooledUpstream

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 200 + b'"}],"stream":false}'
ANSWER = b'{"id":"cmpl-1","choices":[{"text":"' + b"y" * 200 + b'"}]}'
EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" token"}}]}\n\n' * 2
HEADERS = [(b"content-type", b"application/json"), (b"x-request-id", b"0123456789abcdef")]
HEAD = b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
FIXED = HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
CHUNKED = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)

Job = Callable[[PooledUpstream, Origin], Coroutine[Any, Any, object]]


class MockWorker(asyncio.Protocol):
    """Answers /fixed at once, and /stream/N with N events, one per turn of its loop."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.parser = HttpRequestParser(self)
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_message_complete(self) -> None:
        if self.url == b"/fixed":
            self.transport.write(FIXED)
        else:
            self.transport.write(CHUNKED)
            self.loop.call_soon(self.stream, int(self.url.rpartition(b"/")[2]))

    def stream(self, left: int) -> None:
        self.transport.write(CHUNK if left else b"0\r\n\r\n")
        if left:
            self.loop.call_later(0.001, self.stream, left - 1)


def serve(ready: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(MockWorker, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


class Floor(asyncio.Protocol):
    """Sends a request when the answer to the last one is there."""

    def __init__(self, message: bytes, left: int, done: asyncio.Future[None]) -> None:
        self.message, self.left, self.done = message, left, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(self.message)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


def floor(requests: int) -> Job:
    async def run(_: PooledUpstream, origin: Origin) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        head = b"POST /fixed HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        message = head + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
        await loop.create_connection(lambda: Floor(message, requests, done), origin.host, origin.port)
        await done

    return run


def exchanges(requests: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        for _ in range(requests):
            answer = await upstream.request(origin, "POST", "/fixed", HEADERS, (BODY,))
            assert await answer.read(1 << 20) == ANSWER

    return run


def by_chunk(events: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        answer = await upstream.request(origin, "POST", f"/stream/{events}", HEADERS, (BODY,))
        size = 0
        while piece := await answer.chunk():
            size += len(piece)
        assert size == events * len(EVENT)

    return run


def by_pump(events: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        size = 0

        def sink(piece: bytes) -> bool:
            nonlocal size
            size += len(piece)
            return True

        answer = await upstream.request(origin, "POST", f"/stream/{events}", HEADERS, (BODY,))
        await answer.pump(sink)
        assert size == events * len(EVENT)

    return run


async def measure(name: str, origin: Origin, job: Job, clients: int, per_client: int) -> None:
    upstream = PooledUpstream()
    await job_round(upstream, origin, job, clients)  # connections and caches are warm after this
    before = resource.getrusage(resource.RUSAGE_SELF)
    await job_round(upstream, origin, job, clients)
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    each = 1e6 / (clients * per_client)
    print(f"{name:28} {user * each:7.2f} user {system * each:7.2f} system {(user + system) * each:7.2f} us")
    await upstream.aclose()


async def job_round(upstream: PooledUpstream, origin: Origin, job: Job, clients: int) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(job(upstream, origin))


async def run_all(options: argparse.Namespace, origin: Origin) -> None:
    requests, clients, events = options.requests // options.clients, options.clients, options.events
    await measure("floor, per exchange", origin, floor(requests), clients, requests)
    await measure("exchange", origin, exchanges(requests), clients, requests)
    await measure("event through chunk()", origin, by_chunk(events), clients, events)
    await measure("event through pump()", origin, by_pump(events), clients, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    options = parser.parse_args()
    ready, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    worker.start()
    try:
        origin = Origin("127.0.0.1", ready.recv())
        run = uvloop.run if options.loop == "uvloop" else asyncio.run
        run(run_all(options, origin))
    finally:
        worker.terminate()
        worker.join()


if __name__ == "__main__":
    main()
