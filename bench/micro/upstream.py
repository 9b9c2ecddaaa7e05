"""CPU of our upstream client per small exchange and per streamed event, against a mock worker on loopback.

    python -m bench.micro.upstream [--requests N] [--clients N] [--events N] [--rounds N] [--loop LOOP]

User time is what our code and the interpreter take, system time is the kernel's sockets. `floor` is the
same traffic with a bare protocol that neither parses nor waits: what no client can go below on this loop.
Of several rounds the one with the least CPU counts: other load on the machine only ever adds.

`no sockets` is Python alone, with a transport that answers at the loop's next turn: one event per read,
which a busy machine does not give on sockets, and steady figures to compare changes by.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import uvloop
from httptools import HttpRequestParser

from orchestrator.transport.base import Origin
from orchestrator.transport.pool import Connect, PooledUpstream

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 200 + b'"}],"stream":false}'
ANSWER = b'{"id":"cmpl-1","choices":[{"text":"' + b"y" * 200 + b'"}]}'
EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" token"}}]}\n\n' * 2
HEADERS = b"content-type: application/json\r\nx-request-id: 0123456789abcdef\r\n"
HEAD = b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
FIXED = HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
CHUNKED = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)

Job = Callable[[PooledUpstream, Origin], Coroutine[Any, Any, object]]


class MockWorker(asyncio.Protocol):
    """Answers /fixed at once, and /stream/N with N events, 1 ms apart."""

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
            self.stream(int(self.url.rpartition(b"/")[2]))

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
    """Sends `message` `left` times, each after the answer to the last; `end` ends an answer."""

    def __init__(self, message: bytes, left: int, end: bytes, done: asyncio.Future[None]) -> None:
        self.message, self.left, self.end, self.done = message, left, end, done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        if not data.endswith(self.end):
            return
        self.left -= 1
        if self.left:
            self.transport.write(self.message)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(None)


def floor(target: str, requests: int, end: bytes) -> Job:
    async def run(_: PooledUpstream, origin: Origin) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        fields = b"host: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(BODY)
        message = b"POST %b HTTP/1.1\r\n%b\r\n%b" % (target.encode(), fields, BODY)
        await loop.create_connection(lambda: Floor(message, requests, end, done), origin.host, origin.port)
        await done

    return run


def exchanges(requests: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        for _ in range(requests):
            answer = await upstream.send(origin, "POST", "/fixed", HEADERS, (BODY,))
            assert await answer.read(1 << 20) == ANSWER

    return run


def by_chunk(events: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        answer = await upstream.send(origin, "POST", f"/stream/{events}", HEADERS, (BODY,))
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

        answer = await upstream.send(origin, "POST", f"/stream/{events}", HEADERS, (BODY,))
        await answer.pump(sink)
        assert size == events * len(EVENT)

    return run


async def measure(name: str, origin: Origin, job: Job, options: argparse.Namespace, per_client: int) -> None:
    upstream = PooledUpstream()
    await job_round(upstream, origin, job, options.clients)  # connections and caches are warm after this
    rounds = [await cpu_of(upstream, origin, job, options.clients) for _ in range(options.rounds)]
    user, system = min(rounds, key=sum)
    each = 1e6 / (options.clients * per_client)
    figures = f"{user * each:7.2f} user {system * each:7.2f} system {(user + system) * each:7.2f} us"
    print(f"{name:24} {figures}", flush=True)
    await upstream.aclose()


async def cpu_of(upstream: PooledUpstream, origin: Origin, job: Job, clients: int) -> tuple[float, float]:
    """User and system seconds of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    await job_round(upstream, origin, job, clients)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


async def job_round(upstream: PooledUpstream, origin: Origin, job: Job, clients: int) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(job(upstream, origin))


class Loopless(asyncio.Transport):
    """Answers what is written at the next turn of the loop, as MockWorker does, one event a turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, events: int) -> None:
        super().__init__()
        self.loop, self.events = loop, events
        self.protocol: asyncio.Protocol

    def write(self, data: Any) -> None:
        if data.startswith(b"POST /fixed"):
            self.loop.call_soon(self.protocol.data_received, FIXED)
        else:
            self.protocol.data_received(CHUNKED)
            self.loop.call_soon(self.stream, self.events)

    def stream(self, left: int) -> None:
        self.protocol.data_received(CHUNK if left else b"0\r\n\r\n")
        if left:
            self.loop.call_soon(self.stream, left - 1)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def abort(self) -> None:
        self.loop.call_soon(self.protocol.connection_lost, None)


def connector(events: int) -> Connect:
    """In place of the event loop's `create_connection`."""

    async def connect(protocol_factory: Callable[[], Any], *_: Any, **options: Any) -> tuple[Any, Any]:
        transport = Loopless(asyncio.get_running_loop(), events)
        transport.protocol = protocol = protocol_factory()
        protocol.connection_made(transport)
        return transport, protocol

    return connect


async def measure_without_sockets(name: str, job: Job, options: argparse.Namespace, per_round: int) -> None:
    upstream = PooledUpstream(connect=connector(per_round))
    best = min([await timed(job(upstream, Origin("", 0))) for _ in range(10 * options.rounds)])
    print(f"{name:24} {best * 1e6 / per_round:7.2f} us, no sockets", flush=True)
    await upstream.aclose()


async def timed(job: Coroutine[Any, Any, object]) -> float:
    start = time.process_time()
    await job
    return time.process_time() - start


async def run_all(options: argparse.Namespace, origin: Origin) -> None:
    await measure_without_sockets("exchange", exchanges(1000), options, 1000)
    await measure_without_sockets("event through chunk()", by_chunk(1000), options, 1000)
    await measure_without_sockets("event through pump()", by_pump(1000), options, 1000)
    requests, events = options.requests // options.clients, options.events
    await measure("exchange, floor", origin, floor("/fixed", requests, ANSWER), options, requests)
    await measure("exchange", origin, exchanges(requests), options, requests)
    await measure("event, floor", origin, floor(f"/stream/{events}", 1, b"0\r\n\r\n"), options, events)
    await measure("event through chunk()", origin, by_chunk(events), options, events)
    await measure("event through pump()", origin, by_pump(events), options, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--events", type=int, default=500, help="per client, 1 ms apart")
    parser.add_argument("--rounds", type=int, default=7)
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
