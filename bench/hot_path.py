"""CPU per request of the orchestrator's own code, without the kernel: the whole path from the client's bytes
to the answer's, on transports that cost nothing.

    python bench/hot_path.py [--requests N] [--rounds N] [--profile]

The smallest of all rounds counts. `--profile` prints calls per request by function instead.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from mock_worker import DECODE, PREFILL
from relay import BODY
from routers import BATON_CONFIG
from uvicorn.server import ServerState

from orchestrator.app import Orchestrator
from orchestrator.config import Config
from orchestrator.config_file import load_config
from orchestrator.endpoints import ENDPOINTS
from orchestrator.logs import AccessLog, LineWriter
from orchestrator.server import uvicorn_config
from orchestrator.transport.pool import PooledUpstream

PREFILL_PORT = 2
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
        """There is no socket."""


class ClientTransport(asyncio.Transport):
    """A client's connection; the next request follows as soon as an answer was written."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self.left = 0

    def drive(self, protocol: Any, requests: int) -> asyncio.Future[None]:
        self._protocol, self.left = protocol, requests
        self.done = self._loop.create_future()
        self._loop.call_soon(protocol.data_received, REQUEST)
        return self.done

    def write(self, data: Any) -> None:
        if b" 200 " not in data[:16]:
            raise RuntimeError(bytes(data[:300]).decode())
        self.left -= 1
        if self.left > 0:
            self._loop.call_soon(self._protocol.data_received, REQUEST)
        else:
            self.done.set_result(None)

    def is_closing(self) -> bool:
        return False


class InProcessUpstream(PooledUpstream):
    """The real pool, on transports without sockets."""

    async def _open(self, site: Any) -> Any:
        loop = asyncio.get_running_loop()
        connection = self._connection(site, loop)
        answer = PREFILL if site.origin.port == PREFILL_PORT else DECODE
        connection.connection_made(WorkerTransport(connection, loop, answer))
        return connection


def config() -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.yaml")
        urls = {"prefill": f"http://127.0.0.1:{PREFILL_PORT}", "decode": "http://127.0.0.1:3"}
        path.write_text(BATON_CONFIG.format(port=1, processes=1, **urls))
        return load_config(path)


async def measure(requests: int, rounds: int, profile: bool = False) -> float:
    upstream = InProcessUpstream()
    options = config()
    orchestrator = Orchestrator(options, upstream, transport="json", credential=None)
    for worker in orchestrator.registry.workers:
        orchestrator.registry.mark_ready(worker)
    writer = LineWriter(os.open(os.devnull, os.O_WRONLY))
    writer.start()
    log = AccessLog(orchestrator.telemetry.records, ["mock"], options.orchestrator.log, writer.write)
    tasks = [asyncio.create_task(log.run()), asyncio.create_task(orchestrator.data_plane.sweep_forever())]
    served = uvicorn_config(
        orchestrator,
        options.orchestrator,
        random=orchestrator.random,
        handlers=dict.fromkeys(ENDPOINTS, orchestrator.data_plane.handle),
    )
    served.load()
    protocols: list[tuple[Any, ClientTransport]] = []
    for _ in range(32):
        protocol: Any = served.http_protocol_class(config=served, server_state=ServerState(), app_state={})
        transport = ClientTransport(asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocols.append((protocol, transport))
    spent = []
    profiler = cProfile.Profile()
    for number in range(rounds + 1):
        if profile and number:
            profiler.enable()
        before = time.process_time()
        await asyncio.gather(*(transport.drive(p, requests // 32) for p, transport in protocols))
        spent.append((time.process_time() - before) / (requests // 32 * 32) * 1e6)
    profiler.disable()
    if profile:
        show(profiler, rounds * (requests // 32 * 32))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    writer.close()
    return min(spent[1:])


def show(profiler: cProfile.Profile, requests: int) -> None:
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    print(f"{sum(row[1] for row in stats.values()) / requests:.0f} calls per request")
    for (file, line, name), row in sorted(stats.items(), key=lambda item: -item[1][2])[:70]:
        calls, own_us = row[1] / requests, row[2] / requests * 1e6
        print(f"{calls:7.2f} calls {own_us:7.2f} us  {Path(file).name}:{line} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=8000, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    spent = uvloop.run(measure(options.requests, options.rounds, options.profile))
    if not options.profile:
        print(f"{spent:.1f} us per request")


if __name__ == "__main__":
    main()
