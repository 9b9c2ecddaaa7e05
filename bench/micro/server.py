"""This measures the CPU of the HTTP server alone per request: stock uvicorn (httptools) beside ours.

    python -m bench.micro.server [--requests N] [--body BYTES]

`sockets`: each server runs in a process of its own, one after the other, several rounds, and is driven over
16 raw sockets; compared is the CPU time of the server's process, most of it the kernel's. `protocol`: the
protocol class alone on a transport that drops everything. The smallest of all rounds counts.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import uvicorn
import uvloop

from bench.micro.transports import ClientTransport
from bench.shared.command import parser
from bench.shared.figures import in_rounds
from bench.shared.load import post
from bench.shared.processes import threads_seconds
from orchestrator.config.options import LimitsConfig, OrchestratorConfig
from orchestrator.http.connection import Shared
from orchestrator.http.exchange import Exchange
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols, uvicorn_config

HEADERS = [(b"content-type", b"application/json"), (b"x-process-time", b"1.25")]
SSE_HEADERS = [(b"content-type", b"text/event-stream"), (b"x-process-time", b"1.25")]
EVENT = b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
EVENTS = 32
CLIENTS = 16
CLIENTS_HEADERS = (
    b"Accept: application/json\r\nAccept-Encoding: identity\r\nUser-Agent: micro/1.0\r\n"
    b"Content-Type: application/json\r\nAuthorization: Bearer sk-0123456789\r\n"
)


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
    """Do the same on the server's exchange."""
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
    options, random = OrchestratorConfig(limits=LIMITS), Random(1)
    handlers = {"/v1/chat/completions": handler}
    protocols = Protocols(Shared(ServerLimits.of(options), IdSource(random), handlers=handlers))
    return uvicorn_config(None, options, protocols, random=random)


Case = tuple[Callable[[Any], uvicorn.Config], Callable[..., Awaitable[None]]]
WHOLE: dict[str, Case] = {
    "stock uvicorn, ASGI": (stock, asgi_whole),
    "ours, ASGI": (ours, asgi_whole),
    "ours, exchange": (ours_direct, exchange_whole),
}
STREAM: dict[str, Case] = {
    "stock uvicorn, ASGI": (stock, asgi_stream),
    "ours, ASGI": (ours, asgi_stream),
    "ours, exchange": (ours_direct, exchange_stream),
}


def serve(case: Case, pipe: Connection) -> None:
    """Serve in a process of its own: send the port, and end when something comes back."""
    configure, app = case

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(configure(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        pipe.send(listener.getsockname()[1])
        await asyncio.to_thread(pipe.recv)
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
    """Return microseconds of the server's CPU per request."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(case, there))
    process.start()
    address, pid = ("127.0.0.1", here.recv()), process.pid or 0
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(CLIENTS)]
        drive(clients, request, 20, end)
        before = threads_seconds(pid)
        drive(clients, request, requests // CLIENTS, end)
        spent = threads_seconds(pid) - before
    here.send(None)
    process.join()
    return spent / requests * 1e6


def protocol_alone(case: Case, request: bytes, requests: int, end: bytes) -> float:
    """Return the same without the kernel's part."""
    configure, app = case

    async def main() -> float:
        config = configure(app)
        config.load()
        client = ClientTransport(config, request, end)
        before = time.thread_time()
        await client.drive(requests)
        spent = time.thread_time() - before
        client.protocol.connection_lost(ConnectionResetError())
        return spent

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main()) / requests * 1e6


Measure = Callable[[Case, bytes, int, bytes], float]


def compare(
    title: str,
    measure: Measure,
    cases: dict[str, Case],
    request: bytes,
    requests: int,
    rounds: int,
    end: bytes,
) -> None:
    times = in_rounds(list(cases), rounds, lambda name: measure(cases[name], request, requests, end))
    base = min(next(iter(times.values())))
    print(title)
    for name, spent in times.items():
        print(f"  {name:22} {min(spent):8.2f} us/request   {min(spent) / base:5.2f} x")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=20000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--body", type=int, default=400)
    given = options.parse_args()
    request = post("/v1/chat/completions", b"x" * given.body, CLIENTS_HEADERS)
    whole_end, stream_end = b"%d" % given.body, b"0\r\n\r\n"
    few = given.requests // 10
    for how, measure in (("protocol", protocol_alone), ("sockets", through_sockets)):
        compare(f"{how}, one answer", measure, WHOLE, request, given.requests, given.rounds, whole_end)
        compare(f"{how}, {EVENTS} events", measure, STREAM, request, few, given.rounds, stream_end)


if __name__ == "__main__":
    main()
