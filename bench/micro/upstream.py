"""This measures the CPU of our upstream client per small exchange and per event, against a mock worker.

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
import resource
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import uvloop

from bench.micro.transports import connector
from bench.shared.bodies import small_chat
from bench.shared.command import parser
from bench.shared.load import post
from bench.shared.mock_answers import DECODE, EVENT, STREAM_END, STREAM_HEAD
from bench.shared.processes import free_port, python, running
from orchestrator.transport.base import Answer, Origin
from orchestrator.transport.pool import PooledUpstream

PATH = "/v1/chat/completions"
BODY, STREAM = small_chat(), small_chat(stream=True)
HEADERS = b"content-type: application/json\r\nx-request-id: 0123456789abcdef\r\n"
ANSWER = DECODE.partition(b"\r\n\r\n")[2]
EVENT_SIZE = len(EVENT.partition(b"\r\n")[2]) - 2
END = b"0\r\n\r\n"  # of a stream on the wire
NO_SOCKETS = 1000  # exchanges or events of a round

Job = Callable[[PooledUpstream, Origin], Coroutine[Any, Any, object]]


class Floor(asyncio.Protocol):
    """A bare client sends `message` `left` times, each after the answer to the last; `end` ends an answer."""

    def __init__(self, message: bytes, left: int, end: bytes, done: asyncio.Future[None]) -> None:
        self._message, self._left, self._end, self._done = message, left, end, done

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        if not data.endswith(self._end):
            return
        self._left -= 1
        if self._left:
            self._transport.write(self._message)
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.set_result(None)


def floor(body: bytes, requests: int, end: bytes) -> Job:
    async def run(_: PooledUpstream, origin: Origin) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        message = post(PATH, body)
        await loop.create_connection(lambda: Floor(message, requests, end, done), origin.host, origin.port)
        await done

    return run


def exchanges(requests: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        for _ in range(requests):
            answer = await send(upstream, origin, BODY)
            assert await answer.read(1 << 20) == ANSWER

    return run


def by_chunk(events: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        answer = await send(upstream, origin, STREAM)
        size = 0
        while piece := await answer.chunk():
            size += len(piece)
        assert size > events * EVENT_SIZE

    return run


def by_pump(events: int) -> Job:
    async def run(upstream: PooledUpstream, origin: Origin) -> None:
        size = 0

        def sink(piece: bytes) -> bool:
            nonlocal size
            size += len(piece)
            return True

        await (await send(upstream, origin, STREAM)).pump(sink)
        assert size > events * EVENT_SIZE

    return run


async def send(upstream: PooledUpstream, origin: Origin, body: bytes) -> Answer:
    return await upstream.send(origin, "POST", PATH, HEADERS, (body,))


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
    """Return user and system seconds of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    await job_round(upstream, origin, job, clients)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime


async def job_round(upstream: PooledUpstream, origin: Origin, job: Job, clients: int) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(job(upstream, origin))


async def measure_without_sockets(name: str, job: Job, pieces: Sequence[bytes], rounds: int) -> None:
    upstream = PooledUpstream(connect=connector(lambda port: pieces))
    best = min([await timed(job(upstream, Origin("", 0))) for _ in range(rounds)])
    print(f"{name:24} {best * 1e6 / NO_SOCKETS:7.2f} us, no sockets", flush=True)
    await upstream.aclose()


async def timed(job: Coroutine[Any, Any, object]) -> float:
    start = time.process_time()
    await job
    return time.process_time() - start


async def run_all(options: argparse.Namespace, origin: Origin) -> None:
    stream, rounds = [STREAM_HEAD, *[EVENT] * NO_SOCKETS, STREAM_END], 10 * options.rounds
    await measure_without_sockets("exchange", exchanges(NO_SOCKETS), [DECODE], rounds)
    await measure_without_sockets("event through chunk()", by_chunk(NO_SOCKETS), stream, rounds)
    await measure_without_sockets("event through pump()", by_pump(NO_SOCKETS), stream, rounds)
    requests, events = options.requests // options.clients, options.events
    await measure("exchange, floor", origin, floor(BODY, requests, ANSWER), options, requests)
    await measure("exchange", origin, exchanges(requests), options, requests)
    await measure("event, floor", origin, floor(STREAM, 1, END), options, events)
    await measure("event through chunk()", origin, by_chunk(events), options, events)
    await measure("event through pump()", origin, by_pump(events), options, events)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=10000)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--events", type=int, default=500, help="per client, 1 ms apart")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    given = options.parse_args()
    port = free_port()
    worker = ("--port", str(port), "--events", str(given.events), "--gap-ms", "1")
    with running(python("-m", "bench.shared.mock_worker", *worker), port):
        run = uvloop.run if given.loop == "uvloop" else asyncio.run
        run(run_all(given, Origin("127.0.0.1", port)))


if __name__ == "__main__":
    main()
