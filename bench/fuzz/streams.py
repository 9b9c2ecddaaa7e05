"""Hostile frames go to either end of a multiplexed connection, beside right requests on another one.

The worker's end is a simulated worker; the orchestrator's end is a process that has the transport alone
(`bench.fuzz.legs`), so that no registry takes the hostile worker out of service.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, cast

from bench.chaos.site import wait_for
from bench.fuzz.frames import UPGRADES, Burst, ToOrchestrator, ToWorker
from bench.fuzz.legs import Honest
from bench.shared.baton import Process, sim_worker
from bench.shared.processes import Failed, free_port, open_files, peak_rss_bytes, python, rss_bytes, running
from bench.shared.verdict import Verdict
from orchestrator.transport.base import Origin
from orchestrator.transport.mux import MuxUpstream
from orchestrator.transport.pool import PooledUpstream
from orchestrator.wire.info import STREAMS_ENV
from orchestrator.wire.streams import OPEN, UPGRADE_PATH, VERSION, FrameReader

FRAMES, QUICK_FRAMES = 1_000_000, 40_000
MOST_GROWTH = 64 * 1024 * 1024
CLIENTS = 8
HOSTILE = 8  # workers
CLOSED_WITHIN_S = 10.0  # of a fatal frame, on a machine that has other work
CONVERSATION_S = 5.0
MUX = {STREAMS_ENV: "mux"}
ASK = (
    f"GET {UPGRADE_PATH} HTTP/1.1\r\nhost: worker\r\nconnection: Upgrade\r\nupgrade: ".encode()
    + VERSION
    + b"\r\n\r\n"
)


class Tally:
    """What was sent, and what came of it."""

    def __init__(self, frames: int) -> None:
        self.left = frames
        self.is_done = asyncio.Event()
        self.sent = 0
        self.connections = 0
        self.fatal = 0
        self.wrong: list[str] = []
        self.open: set[HostileWorker] = set()

    def count(self, burst: Burst) -> None:
        self.sent += burst.frames
        self.left -= burst.frames
        if self.left <= 0:
            self.is_done.set()
        self.fatal += burst.is_fatal


class Memory:
    """How much a process has grown at its most, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before = rss_bytes(pid)

    def verdict(self, end: str) -> Verdict:
        grown = peak_rss_bytes(self._pid) - self._before
        found = f"{grown / 1024 / 1024:.1f} MiB"
        return Verdict(f"the {end} grows by 64 MiB at most", found, grown <= MOST_GROWTH)


def _verdicts(
    end: str, tally: Tally, honest: dict[str, Any], memory: Memory, kept: dict[str, int]
) -> list[Verdict]:
    wrong, count = cast("list[str]", honest["wrong"]), honest["answered"]
    connects = honest["connects"]
    held = {name: number for name, number in kept.items() if number > 0}
    return [
        Verdict(f"frames towards the {end}", f"{tally.sent} on {tally.connections} connections", None),
        Verdict(
            "what breaks the format closes its connection",
            "; ".join(tally.wrong[:3]) or f"all {tally.fatal}",
            not tally.wrong,
        ),
        Verdict(
            "right requests are answered throughout, on one connection",
            "; ".join(wrong[:3]) or f"all {count}, on {connects}",
            not wrong and connects == 1,
        ),
        memory.verdict(end),
        Verdict("then nothing is held", f"{held or 'nothing'}", not held),
    ]


# --- the worker's end ---------------------------------------------------------------------------


async def fuzz_worker(seed: int, frames: int) -> list[Verdict]:
    """Send so many frames to a simulated worker. Raises `Failed` if it does not start."""
    with sim_worker(env=MUX) as worker:
        upstream = MuxUpstream(PooledUpstream())
        honest = Honest(upstream, Origin("127.0.0.1", worker.port))
        task = asyncio.create_task(honest.run())
        await honest.is_warm.wait()
        before, memory, tally = open_files(worker.pid), Memory(worker.pid), Tally(frames)
        await asyncio.gather(*(_attack(worker, Random(f"{seed}/{n}"), tally) for n in range(CLIENTS)))
        await honest.stop(task)
        kept: dict[str, int] = {}

        async def is_all_given_back() -> bool:
            kept["descriptors"] = open_files(worker.pid) - before
            return kept["descriptors"] <= 0

        with suppress(Failed):
            await wait_for(is_all_given_back, "everything to be given back")
        found = honest.report()
        await upstream.aclose()
        return _verdicts("worker", tally, found, memory, kept)


async def _attack(worker: Process, random: Random, tally: Tally) -> None:
    while tally.left > 0:
        tally.connections += 1
        with suppress(ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(CONVERSATION_S):
                await _converse(worker, random, tally)


async def _converse(worker: Process, random: Random, tally: Tally) -> None:
    """Send one connection's frames; a fatal one must end it, if what comes back is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    reads = random.random() < 0.8
    last: Burst | None = None
    try:
        writer.write(ASK)
        await reader.readuntil(b"\r\n\r\n")
        reading = asyncio.create_task(_read_all(reader)) if reads else None
        for last in ToWorker(random).bursts():
            writer.write(last.data)
            tally.count(last)
            await writer.drain()
        if reading is not None and last is not None and last.is_fatal:
            await _expect_end(reading, last, tally)
    finally:
        writer.transport.abort()


async def _read_all(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionError):
        while await reader.read(1 << 20):
            pass


async def _expect_end(reading: asyncio.Task[None], last: Burst, tally: Tally) -> None:
    done, _ = await asyncio.wait([reading], timeout=CLOSED_WITHIN_S)
    if not done:
        tally.wrong.append(f"still open after {last.data[:20]!r}")


# --- the orchestrator's end ---------------------------------------------------------------------


class HostileWorker(asyncio.Protocol):
    """It accepts an upgrade, as a rule, and answers streams with frames of all kinds."""

    transport: asyncio.Transport

    def __init__(self, random: Random, tally: Tally) -> None:
        self._random = random
        self._tally = tally
        self._frames = ToOrchestrator(random)
        self._reader = FrameReader(self._on_frame)
        self._head = b""
        self._is_framed = self._is_lost = self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._tally.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._tally.open.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._is_framed:
            self._reader.feed(data)
            self._send()
            return
        self._head += data
        if b"\r\n\r\n" in self._head and not self._is_over:
            self._answer_head()

    def _answer_head(self) -> None:
        if not self._head.startswith(f"GET {UPGRADE_PATH} ".encode()):
            self.transport.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
            self._is_over = True
            self.transport.close()
            return
        self._tally.connections += 1
        is_right = self._random.random() < 0.9
        self.transport.write(UPGRADES[0] if is_right else self._random.choice(UPGRADES[1:]))
        self._is_framed, self._is_over = is_right, not is_right
        if is_right and self._random.random() < 0.05:
            self.transport.pause_reading()  # and never again

    def _on_frame(self, kind: int, is_last: bool, stream: int, payload: bytes) -> None:
        if kind == OPEN:
            self._frames.opened.append(stream)

    def _send(self) -> None:
        for _ in range(self._random.choice((1, 5, 20))):
            if self._is_over or self._is_lost or not self._frames.opened or self._tally.left <= 0:
                return
            burst = self._frames.burst()
            self.transport.write(burst.data)
            self._tally.count(burst)
            if burst.is_fatal:
                self._is_over = True
                asyncio.get_running_loop().call_later(CLOSED_WITHIN_S, self._expect_end, burst)

    def _expect_end(self, burst: Burst) -> None:
        if not self._is_lost:
            self._tally.wrong.append(f"still open after {burst.data[:20]!r}")


@contextmanager
def _legs(honest: int, hostile: list[int]) -> Iterator[Process]:
    port = free_port()
    command = python("-m", "bench.fuzz.legs", *map(str, (port, honest, *hostile)))
    with running(command, port) as pid:
        yield Process(pid, port)


async def fuzz_orchestrator(seed: int, frames: int) -> list[Verdict]:
    """Send so many frames to an orchestrator's transport. Raises `Failed` if something does not start."""
    tally = Tally(frames)
    numbers = Random(seed)
    loop, ports = asyncio.get_running_loop(), [free_port() for _ in range(HOSTILE)]
    servers = [
        await loop.create_server(lambda: HostileWorker(Random(numbers.random()), tally), "127.0.0.1", port)
        for port in ports
    ]
    with sim_worker(env=MUX) as worker, _legs(worker.port, ports) as process:
        await _ask(process, "wait")
        before, memory = open_files(process.pid), Memory(process.pid)
        await _ask(process, "go")
        await tally.is_done.wait()
        await asyncio.sleep(CLOSED_WITHIN_S)
        found = await _ask(process, "stop")
        kept = found.pop("held") | {"descriptors": open_files(process.pid) - before}
        await _close(servers, tally)
        return _verdicts("orchestrator", tally, found, memory, kept)


async def _close(servers: list[asyncio.Server], tally: Tally) -> None:
    """Close the ports of hostile workers, and the connections on which they do not read."""
    for server in servers:
        server.close()
    for connection in list(tally.open):
        connection.transport.abort()
    while tally.open:  # noqa: ASYNC110  # a moment later they know
        await asyncio.sleep(0)


async def _ask(process: Process, word: str) -> dict[str, Any]:
    """Tell the process a word; return what it answers. Raises `Failed` if it is gone."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(f"{word}\n".encode())
        answer = await reader.readline()
        writer.close()
        found: dict[str, Any] = json.loads(answer)
    except (OSError, ValueError) as error:
        raise Failed(f"the process with the orchestrator's end does not answer: {error!r}") from error
    return found
