"""CPU per request of the HTTP server alone: stock uvicorn (httptools) beside ours, for a trivial application.

    python bench/server_micro.py [--requests N] [--body BYTES]

`sockets`: each server runs in a process of its own, one after the other, several rounds, and is driven over
16 raw sockets; compared is the CPU time of the server's process, most of it the kernel's. `protocol`: the
protocol class alone on a transport that drops everything. The smallest of all rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from orchestrator.config.options import LimitsConfig, OrchestratorConfig
from orchestrator.http.exchange import Exchange
from orchestrator.http.listeners import uvicorn_config

HEADERS = [(b"content-type", b"application/json"), (b"x-process-time", b"1.25")]
SSE_HEADERS = [(b"content-type", b"text/event-stream"), (b"x-process-time", b"1.25")]
EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
EVENTS = 32
CLIENTS = 16


async def asgi_whole(scope: Any, receive: Any, send: Any) -> None:
    """Read the body and answer it, in ASGI's messages."""
    pieces = []
    is_more = True
    while is_more:
        message = await receive()
        pieces.append(message["body"])
        is_more = message["more_body"]
    body = b"%d" % len(b"".join(pieces))
    length = (b"content-length", b"%d" % len(body))
    request_id = (b"x-request-id", b"req-0123456789abcdef")
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length, request_id]})
    await send({"type": "http.response.body", "body": body})


async def asgi_stream(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    request_id = (b"x-request-id", b"req-0123456789abcdef")
    await send({"type": "http.response.start", "status": 200, "headers": [*SSE_HEADERS, request_id]})
    for _ in range(EVENTS):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def exchange_whole(exchange: Exchange) -> None:
    """The same on the server's exchange."""
    body = await exchange.read_body()
    exchange.respond(200, HEADERS, b"%d" % len(body))


async def exchange_stream(exchange: Exchange) -> None:
    await exchange.read_body()
    exchange.start(200, SSE_HEADERS)
    for _ in range(EVENTS):
        if not exchange.feed(EVENT):
            await exchange.drain()
    exchange.finish()


def stock(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
    )


LIMITS = LimitsConfig(max_body_bytes=64 * 1024 * 1024)


def ours(app: Any) -> uvicorn.Config:
    return uvicorn_config(app, OrchestratorConfig(limits=LIMITS), random=Random(1))


def ours_direct(handler: Any) -> uvicorn.Config:
    handlers = {"/v1/chat/completions": handler}
    return uvicorn_config(None, OrchestratorConfig(limits=LIMITS), random=Random(1), handlers=handlers)


Case = tuple[str, Callable[[Any], uvicorn.Config], Callable[..., Awaitable[None]]]
WHOLE: list[Case] = [
    ("stock uvicorn, ASGI", stock, asgi_whole),
    ("ours, ASGI", ours, asgi_whole),
    ("ours, exchange", ours_direct, exchange_whole),
]
STREAM: list[Case] = [
    ("stock uvicorn, ASGI", stock, asgi_stream),
    ("ours, ASGI", ours, asgi_stream),
    ("ours, exchange", ours_direct, exchange_stream),
]


def serve(case: Case, pipe: Connection) -> None:
    """The server's process: says its port, answers each question with its CPU seconds so far."""
    _, configure, app = case

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(configure(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        pipe.send(listener.getsockname()[1])
        while await asyncio.to_thread(pipe.recv):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send(usage.ru_utime + usage.ru_stime)
        server.should_exit = True
        await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def drive(clients: list[socket.socket], request: bytes, rounds: int, end: bytes) -> None:
    for _ in range(rounds):
        for client in clients:
            client.sendall(request)
        for client in clients:
            answer = client.recv(65536)
            while not answer.endswith(end):
                answer = answer[-8:] + client.recv(65536)


def through_sockets(case: Case, request: bytes, requests: int, end: bytes) -> float:
    """Microseconds of the server's CPU per request."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(case, there))
    process.start()
    port = here.recv()
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(CLIENTS)]
        drive(clients, request, 20, end)
        here.send(True)
        before = here.recv()
        drive(clients, request, requests // CLIENTS, end)
        here.send(True)
        spent = here.recv() - before
    here.send(False)
    process.join()
    return float(spent) / requests * 1e6


class Sink(asyncio.Transport):
    """Takes everything; `done` is set when an answer was whole."""

    done: asyncio.Future[None]

    def __init__(self, end: bytes) -> None:
        super().__init__()
        self._end = end

    def write(self, data: bytes) -> None:  # type: ignore[override]
        if data.endswith(self._end) and not self.done.done():
            self.done.set_result(None)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Stock uvicorn's keep-alive timer calls it."""


def protocol_alone(case: Case, request: bytes, requests: int, end: bytes) -> float:
    """The same, without the kernel's part."""
    _, configure, app = case

    async def main() -> float:
        config = configure(app)
        config.load()
        protocol: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
        transport = Sink(end)
        loop = asyncio.get_running_loop()
        protocol.connection_made(transport)
        before = time.thread_time()
        for _ in range(requests):
            transport.done = loop.create_future()
            protocol.data_received(request)
            await transport.done
        spent = time.thread_time() - before
        protocol.connection_lost(ConnectionResetError())
        return spent

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main()) / requests * 1e6


Measure = Callable[[Case, bytes, int, bytes], float]


def compare(
    title: str, measure: Measure, cases: list[Case], request: bytes, requests: int, rounds: int, end: bytes
) -> None:
    times: dict[str, list[float]] = {case[0]: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            times[case[0]].append(measure(case, request, requests, end))
    base = min(times[cases[0][0]])
    print(title)
    for name, spent in times.items():
        print(f"  {name:22} {min(spent):8.2f} us/request   {min(spent) / base:5.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--body", type=int, default=400)
    options = parser.parse_args()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nAccept: application/json\r\n"
        b"Accept-Encoding: identity\r\nUser-Agent: micro/1.0\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer sk-0123456789\r\nContent-Length: %d\r\n\r\n" % options.body
    ) + b"x" * options.body
    whole_end, stream_end = b"%d" % options.body, b"0\r\n\r\n"
    few = options.requests // 10
    for how, measure in (("protocol", protocol_alone), ("sockets", through_sockets)):
        compare(f"{how}, one answer", measure, WHOLE, request, options.requests, options.rounds, whole_end)
        compare(f"{how}, {EVENTS} events", measure, STREAM, request, few, options.rounds, stream_end)


if __name__ == "__main__":
    main()
