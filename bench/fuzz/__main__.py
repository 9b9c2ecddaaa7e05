"""This sends the orchestrator what no client should, and asks it beside that how it is; then hostile frames.

    make fuzz                                       # or: .venv/bin/python -m bench.fuzz [--seed N]
    make fuzz ARGS="--quick"                        # a minute, for CI

A simulated prefill and a simulated decode worker, an orchestrator between them, and connections that send
requests with mistakes: broken framing, fields, chunks and documents, halves, answers that nobody reads. On
other connections `/health` and a right request must be answered all the time. At the end descriptors,
requests, legs and leases must be back where they were.

Then a million frames go to either end of connections that carry many requests: most of them are right, some
break the format in one way or another. The connection must be closed, right requests on another one must be
answered all the time, and neither process may grow by more than 64 MiB (`bench/fuzz/streams.py`).

The exit code is 1 if something of this does not hold; the seed is printed, and makes the same requests again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from random import Random

import uvloop

from bench.chaos.client import fetch
from bench.chaos.site import Orchestrator, wait_for
from bench.fuzz.bytes import conversation
from bench.fuzz.streams import FRAMES, QUICK_FRAMES, fuzz_orchestrator, fuzz_worker
from bench.shared.baton import baton, config, sim_pair, urls
from bench.shared.bodies import MODEL
from bench.shared.command import parser, positive, run
from bench.shared.processes import Failed, free_port, open_files, raise_file_limit
from bench.shared.verdict import Verdict

SECONDS, QUICK_SECONDS = 120.0, 30.0
CLIENTS = 16
PATIENCE_S = 0.5  # with an answer that may never come
SLOWEST_S = 5.0  # for /health, on a machine that has other work
KNOWN = json.dumps({"model": MODEL, "prompt": "Are you well?", "max_tokens": 3}).encode()


class Tally:
    """What came of the connections, and what went wrong beside them."""

    def __init__(self) -> None:
        self.connections = 0
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.slowest_s = 0.0


async def fuzz(orchestrator: Orchestrator, seed: int, seconds: float) -> list[Verdict]:
    """Send for `seconds`, then look at what is left."""
    tally = Tally()
    await fetch(orchestrator.port, "/v1/completions", KNOWN)
    before = open_files(orchestrator.pid)
    watch = asyncio.create_task(_watch(orchestrator.port, tally))
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(
                *(_client(orchestrator.port, Random(f"{seed}/{n}"), tally) for n in range(CLIENTS))
            )
    watch.cancel()
    left: dict[str, int] = {}

    async def is_all_given_back() -> bool:
        left.clear()
        left.update(await orchestrator.held(), descriptors=open_files(orchestrator.pid) - before)
        return not any(count > 0 for count in left.values())

    with suppress(Failed):
        await wait_for(is_all_given_back, "everything to be given back")
    kept = {name: count for name, count in left.items() if count > 0}
    return [
        Verdict(
            "connections",
            f"{tally.connections}; answers by status: {dict(sorted(tally.statuses.items()))}",
            None,
        ),
        Verdict("no answer is 500", f"{tally.statuses[500]}", not tally.statuses[500]),
        Verdict(
            "/health and a right request are answered throughout",
            "; ".join(tally.wrong[:3]) or "all",
            not tally.wrong,
        ),
        Verdict(f"/health: within {SLOWEST_S:g} s", f"{tally.slowest_s:.2f} s", tally.slowest_s <= SLOWEST_S),
        Verdict("then nothing is held", f"{kept or 'nothing'}", not kept),
    ]


async def _client(port: int, random: Random, tally: Tally) -> None:
    while True:
        await _converse(port, random, tally)
        tally.connections += 1


async def _converse(port: int, random: Random, tally: Tally) -> None:
    """Send one conversation on a connection of its own, and read what comes for a while, or not."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        tally.wrong.append(repr(error))
        return
    try:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                for piece in conversation(random):
                    writer.write(piece)
                    await writer.drain()
                if random.random() < 0.9:
                    tally.statuses.update(_statuses(await reader.read()))
    finally:
        writer.transport.abort()


def _statuses(data: bytes) -> list[int]:
    lines = [part for part in data.split(b"\r\n") if part.startswith(b"HTTP/1.1 ")]
    return [int(line[9:12]) for line in lines if line[9:12].isdigit()]


async def _watch(port: int, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        for path, body in (("/health", b""), ("/v1/completions", KNOWN)):
            try:
                answer = await fetch(port, path, body)
            except Failed as failed:
                tally.wrong.append(str(failed))
                continue
            if answer.status != 200:
                tally.wrong.append(f"{path}: HTTP {answer.status}")
            if path == "/health":
                tally.slowest_s = max(tally.slowest_s, loop.time() - began)
        await asyncio.sleep(0.05)


async def fuzzed(seed: int, seconds: float) -> list[Verdict]:
    """Raises `Failed` if something does not start."""
    with sim_pair() as workers:
        prefill, decode = (worker.port for worker in workers)
        port, admin = free_port(), free_port()
        pools = {"prefill": urls(prefill), "decode": urls(decode)}
        document = config(port, pools, admin=f"127.0.0.1:{admin}")
        with baton("orchestrator", document, port) as process:
            orchestrator = Orchestrator(port, admin, process.pid)
            await orchestrator.wait_ready(1, 2)
            return await fuzz(orchestrator, seed, seconds)


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    quick = f"{QUICK_SECONDS:g} seconds, {QUICK_FRAMES} frames"
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--seconds", type=float, help=f"{SECONDS:g} if not given")
    options.add_argument("--frames", type=positive, help=f"to either end; {FRAMES} if not given")
    options.add_argument("--seed", type=int, default=Random().randrange(1_000_000), help="drawn if not given")
    return options.parse_args(argv)


def main() -> int:
    arguments = arguments_of()
    raise_file_limit()
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    frames = arguments.frames or (QUICK_FRAMES if arguments.quick else FRAMES)
    print(f"seed {arguments.seed}, {seconds:g} s, {frames} frames to either end", flush=True)
    parts = (
        fuzzed(arguments.seed, seconds),
        fuzz_worker(arguments.seed, frames),
        fuzz_orchestrator(arguments.seed, frames),
    )
    held = [_holds(uvloop.run(part)) for part in parts]  # all of them
    return 0 if all(held) else 1


def _holds(verdicts: Sequence[Verdict]) -> bool:
    """Print what was found; return whether all of it holds."""
    for verdict in verdicts:
        print(f"  {verdict.mark:<14} {verdict.goal}: {verdict.found}", flush=True)
    return all(verdict.holds is not False for verdict in verdicts)


if __name__ == "__main__":
    run("fuzz", main)
