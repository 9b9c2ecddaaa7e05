"""CPU per request of the orchestrator's own code, without the kernel: the whole path from the client's bytes
to the answer's, on transports that cost nothing.

    python -m bench.micro.hot_path [--requests N] [--rounds N] [--profile]

The smallest of all rounds counts. `--profile` prints calls per request by function instead.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvloop
from uvicorn.server import ServerState

from bench.compare.routers import BATON_CONFIG
from bench.shared.bodies import small_chat
from bench.shared.mock_worker import DECODE, PREFILL
from orchestrator.app import Orchestrator
from orchestrator.config.file import load_config
from orchestrator.config.options import Config
from orchestrator.loop.garbage import tune
from orchestrator.telemetry.logs import LineWriter
from orchestrator.transport.pool import PooledUpstream

CLIENTS = 32
PREFILL_PORT = 2
BODY = small_chat()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\ncontent-type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
) + BODY


class WorkerTransport(asyncio.Transport):
    """A connection to a worker that answers in the next turn of the loop."""

    def __init__(self, protocol: Any, loop: asyncio.AbstractEventLoop, answer: bytes) -> None:
        super().__init__()
        self._protocol = protocol
        self._loop = loop
        self._answer = answer

    def write(self, data: Any) -> None:
        self._loop.call_soon(self._protocol.data_received, self._answer)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def abort(self) -> None:
        self._loop.call_soon(self._protocol.connection_lost, None)


class ClientTransport(asyncio.Transport):
    """A client's connection; the next request follows as soon as an answer was written."""

    def __init__(self, protocol: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._protocol = protocol
        self._loop = loop
        self._left = 0

    def drive(self, requests: int) -> asyncio.Future[None]:
        self._left = requests
        self._done = self._loop.create_future()
        self._loop.call_soon(self._protocol.data_received, REQUEST)
        return self._done

    def write(self, data: Any) -> None:
        if b" 200 " not in data[:16]:
            raise RuntimeError(bytes(data[:300]).decode())
        self._left -= 1
        if self._left > 0:
            self._loop.call_soon(self._protocol.data_received, REQUEST)
        else:
            self._done.set_result(None)

    def is_closing(self) -> bool:
        return False


async def connect(protocol_factory: Callable[[], Any], host: str, port: int, **_: Any) -> tuple[Any, Any]:
    """In place of the event loop's `create_connection`: a transport without a socket."""
    protocol = protocol_factory()
    answer = PREFILL if port == PREFILL_PORT else DECODE
    transport = WorkerTransport(protocol, asyncio.get_running_loop(), answer)
    protocol.connection_made(transport)
    return transport, protocol


def config() -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.yaml")
        urls = {"prefill": f"http://127.0.0.1:{PREFILL_PORT}", "decode": "http://127.0.0.1:3"}
        path.write_text(BATON_CONFIG.format(port=1, processes=1, **urls))
        return load_config(str(path))


@contextlib.asynccontextmanager
async def orchestrator() -> AsyncIterator[Orchestrator]:
    """With all that it does beside requests, its lines written to nowhere."""
    made = Orchestrator(config(), PooledUpstream(connect=connect), transport="json", credential=None)
    for worker in made.registry.workers:
        made.registry.mark_ready(worker)
    writer = LineWriter(os.open(os.devnull, os.O_WRONLY))
    writer.start()
    made.start(writer.write)
    try:
        yield made
    finally:
        await made.aclose()
        writer.close()


def clients(of: Orchestrator) -> list[ClientTransport]:
    served = of.server_config()
    served.load()
    made = []
    for _ in range(CLIENTS):
        protocol: Any = served.http_protocol_class(config=served, server_state=ServerState(), app_state={})
        transport = ClientTransport(protocol, asyncio.get_running_loop())
        protocol.connection_made(transport)
        made.append(transport)
    return made


async def measure(requests: int, rounds: int, profiler: cProfile.Profile | None = None) -> float:
    """Microseconds per request in the best of the rounds; one more comes first and does not count."""
    async with orchestrator() as made:
        transports = clients(made)
        spent = [await one_round(transports, requests)]
        tune()
        if profiler is not None:
            profiler.enable()
        spent = [await one_round(transports, requests) for _ in range(rounds)]
        if profiler is not None:
            profiler.disable()
        return min(spent)


async def one_round(transports: list[ClientTransport], requests: int) -> float:
    each = requests // len(transports)
    before = time.process_time()
    await asyncio.gather(*(transport.drive(each) for transport in transports))
    return (time.process_time() - before) / (each * len(transports)) * 1e6


def show(profiler: cProfile.Profile, requests: int) -> None:
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    print(f"{sum(row[1] for row in stats.values()) / requests:.0f} calls per request")
    for (file, line, name), row in sorted(stats.items(), key=lambda item: -item[1][2])[:70]:
        calls, own_us = row[1] / requests, row[2] / requests * 1e6
        print(f"{calls:7.2f} calls {own_us:7.2f} us  {Path(file).name}:{line} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=8000, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profiler = cProfile.Profile() if options.profile else None
    spent = uvloop.run(measure(options.requests, options.rounds, profiler))
    if profiler is None:
        print(f"{spent:.1f} us per request")
    else:
        show(profiler, options.rounds * (options.requests // CLIENTS * CLIENTS))


if __name__ == "__main__":
    main()
