"""This measures the CPU of the orchestrator's own code per request, without the kernel: the whole path from
the client's bytes to the answer's, on transports that cost nothing.

    python -m bench.micro.hot_path [--requests N] [--rounds N] [--profile]

The smallest of all rounds counts. `--profile` prints calls per request by function instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import os
import pstats
import time
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from bench.compare.routers import baton_config
from bench.micro.transports import ClientTransport, connector
from bench.shared.bodies import small_chat
from bench.shared.command import parser
from bench.shared.load import post
from bench.shared.mock_answers import DECODE, PREFILL
from orchestrator.app import Orchestrator
from orchestrator.config.options import Config
from orchestrator.loop.garbage import tune
from orchestrator.telemetry.logs import LineWriter
from orchestrator.transport.pool import PooledUpstream

CLIENTS = 32
PREFILL_PORT, DECODE_PORT = 2, 3
ANSWERS = {PREFILL_PORT: [PREFILL], DECODE_PORT: [DECODE]}
REQUEST = post("/v1/chat/completions", small_chat())


@contextlib.asynccontextmanager
async def orchestrator() -> AsyncIterator[Orchestrator]:
    """Make it with all that it does beside requests, its lines written to nowhere."""
    config = Config.model_validate(baton_config(1, PREFILL_PORT, DECODE_PORT))
    upstream = PooledUpstream(connect=connector(ANSWERS.__getitem__))
    made = Orchestrator(config, upstream, transport="json", credential=None)
    for worker in made.registry.workers:
        made.registry.judge.mark_ready(worker)
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
    return [ClientTransport(served, REQUEST) for _ in range(CLIENTS)]


async def measure(requests: int, rounds: int, profiler: cProfile.Profile | None = None) -> float:
    """Return microseconds per request in the best of the rounds; one more comes first and does not count."""
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
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=8000, help="per round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--profile", action="store_true")
    given = options.parse_args()
    profiler = cProfile.Profile() if given.profile else None
    spent = uvloop.run(measure(given.requests, given.rounds, profiler))
    if profiler is None:
        print(f"{spent:.1f} us per request")
    else:
        show(profiler, given.rounds * (given.requests // CLIENTS * CLIENTS))


if __name__ == "__main__":
    main()
