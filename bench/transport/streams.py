"""Large requests hold up the streams of the worker that takes them in: the effect that started it all.

Streams of small chats run on one worker, each starting anew when it ends, while decode legs of large prompts
arrive at fixed times. All of them share the worker's event loop: while it decodes and validates a large body,
no stream gets its next event, and no new one gets its first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvloop

from bench.shared.bodies import encoded
from bench.shared.figures import Column, Sample, in_rounds, percentile
from bench.shared.load import JSON_HEADER, Connection
from bench.shared.processes import Failed
from bench.transport.costs import Extent, send
from bench.transport.legs import ARMS, BASE, MODEL, PATHS, Prompt, Request
from bench.transport.rounds import Panel
from bench.transport.workers import Engine, Server, workers

STREAMS = 64
EVENTS = 100  # tokens of a stream
# Large requests. What is left of their last block is computed by vLLM's engine, and on a CPU that takes far
# longer than the event loop does with them: at 5 a second it is the engine that is measured.
PER_SECOND: dict[Engine, int] = {"sim": 5, "vllm": 2}
WARM_UP_S = 1.0
WAIT_LIMIT_S = 180.0  # before a sample and after it
QUIET = "no large requests"

_COLUMNS = [
    Column("gap_p99_ms", "gap p99 ms", 1),
    Column("gap_p50_ms", "p50", 1),
    Column("gap_max_ms", "max", 0),
    Column("first_p50_ms", "first event p50 ms", 1),
    Column("first_p99_ms", "p99", 1),
    Column("large_p50_ms", "large request p50 ms", 1),
    Column("loop_share", "event loop %", 0),
]


@dataclass(frozen=True)
class Load:
    """A sample of that many seconds has streams all along, and large requests at fixed times."""

    streams: int
    per_second: int  # large requests
    seconds: float
    events: int = EVENTS  # of a stream


def beside_streams(engine: Engine, tokens: int, streams: int, extent: Extent) -> Iterator[Panel]:
    """Measure beside large prompts of `tokens` that the prefix cache holds, each answered with one token."""
    load = Load(streams, PER_SECOND[engine], extent.seconds)
    section = f"{engine} worker, {streams} streams, {load.per_second} large requests a second"
    with workers(engine, ARMS["chat"], extent.cores) as servers:
        for kind, arms in ARMS.items():
            prompt = Prompt(kind, tokens)
            larges = {arm.name: (servers[arm.server], prompt.decode_leg(arm)) for arm in arms}
            for server, large in larges.values():
                send(server, large, 200, 2)
            given = {**larges, QUIET: (servers[BASE.server], None)}
            rows = in_rounds(list(given), extent.rounds, partial(_sample, given, load))
            yield Panel(section, kind, tokens, _COLUMNS, rows)


def _sample(given: Mapping[str, tuple[Server, Request | None]], load: Load, arm: str) -> Sample:
    server, large = given[arm]
    seen = uvloop.run(watch(server, large, load, {"loop": server.loop_seconds}))
    return {**latencies(seen), "loop_share": 100 * seen.used_s["loop"] / load.seconds}


def latencies(seen: Seen) -> dict[str, float]:
    return {
        "gap_p99_ms": _percentile_ms(seen.gaps, 0.99),
        "gap_p50_ms": _percentile_ms(seen.gaps, 0.5),
        "gap_max_ms": _percentile_ms(seen.gaps, 1.0),
        "first_p50_ms": _percentile_ms(seen.firsts, 0.5),
        "first_p99_ms": _percentile_ms(seen.firsts, 0.99),
        "large_p50_ms": _percentile_ms(seen.larges, 0.5),
    }


def _percentile_ms(times: list[float], share: float) -> float:
    return percentile(times, share) * 1e3


# --- one sample -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """These times are in seconds; those of the streams are noted while `is_on`."""

    is_on: bool = False
    events: int = 0
    gaps: list[float] = field(default_factory=list)  # between reads with events, of one stream
    firsts: list[float] = field(default_factory=list)  # from a stream's request to its first event
    larges: list[float] = field(default_factory=list)
    used_s: dict[str, float] = field(default_factory=dict)  # of CPU, by meter
    failure: str | None = None


Meters = Mapping[str, Callable[[], float]]  # CPU seconds of something, so far


async def watch(server: Server, large: Request | None, load: Load, meters: Meters) -> Seen:
    """Take one sample at `server`, a worker or an orchestrator, and read the meters. Raises `Failed` if a
    request failed, or no stream got on.
    """
    seen = Seen()
    streams = [_Stream(seen, load, number) for number in range(load.streams)]
    larges: list[_Large] = []
    try:
        for stream in streams:
            await _open(server, stream)
        await _wait_until(lambda: all(stream.has_begun for stream in streams), seen, "a stream has no event")
        await asyncio.sleep(WARM_UP_S)
        before = {name: read() for name, read in meters.items()}
        seen.is_on = True
        await _send_at_fixed_times(server, large, load, seen, larges)
        seen.is_on = False
        seen.used_s = {name: read() - before[name] for name, read in meters.items()}
        await _wait_until(
            lambda: not any(one.is_busy for one in larges), seen, "a large request has no answer"
        )
    finally:
        for connection in (*streams, *larges):
            connection.close()
    if seen.failure or not seen.gaps:
        raise Failed(seen.failure or f"no stream had two events within {load.seconds:g} s")
    return seen


async def _send_at_fixed_times(
    server: Server, large: Request | None, load: Load, seen: Seen, larges: list[_Large]
) -> None:
    """Return when the seconds of the load are over. Who is late does not wait for an answer."""
    start = time.perf_counter()
    for number in range(round(load.seconds * load.per_second)):
        await _sleep_until(start + (number + 0.5) / load.per_second)
        if large is not None:
            connection = next((one for one in larges if not one.is_busy), None)
            if connection is None:
                larges.append(_Large(seen, large))
                await _open(server, larges[-1])
            else:
                connection.ask()
    await _sleep_until(start + load.seconds)


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))


async def _wait_until(is_so: Callable[[], bool], seen: Seen, complaint: str) -> None:
    """Wait, or raise `Failed` with what went wrong meanwhile, or with the complaint after the limit."""
    end = time.perf_counter() + WAIT_LIMIT_S
    while not is_so():
        if seen.failure or time.perf_counter() > end:
            raise Failed(seen.failure or f"{complaint} after {WAIT_LIMIT_S:.0f} s")
        await asyncio.sleep(0.01)


# --- connections ----------------------------------------------------------------------------------------


async def _open(server: Server, connection: _Connection) -> None:
    await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", server.port)


class _Connection(Connection):
    """A connection leaves in `seen` what goes wrong."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._transport: Any = None
        self._is_closed = False

    def close(self) -> None:
        """Close it; it may not have been opened."""
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_closed:
            self._seen.failure = "a connection was closed"

    def on_message_complete(self) -> None:
        if (status := self._parser.get_status_code()) != 200:
            self._seen.failure = f"a request was answered HTTP {status}"


class _Stream(_Connection):
    """A stream starts again when it ends. The first one is shorter, so that not all end at once."""

    def __init__(self, seen: Seen, load: Load, number: int) -> None:
        super().__init__(seen)
        self._load = load
        self._events = max(1, load.events * (number + 1) // load.streams)
        self.has_begun = False

    def ask(self) -> None:
        self._last: float | None = None
        self._send(_small_stream(self._events).as_http())
        self._events = self._load.events

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        super().data_received(data)

    def on_body(self, body: bytes) -> None:
        """Of one read only the first event has a gap: they came at one time."""
        self.has_begun = True
        self._seen.events += body.count(b"\n\n") * self._seen.is_on
        if self._last == self._now:
            return
        if self._seen.is_on:
            if self._last is None:
                self._seen.firsts.append(self._now - self._asked)
            else:
                self._seen.gaps.append(self._now - self._last)
        self._last = self._now

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._seen.failure is None:
            self.ask()


class _Large(_Connection):
    """A large request is sent again whenever it is asked for."""

    def __init__(self, seen: Seen, request: Request) -> None:
        super().__init__(seen)
        self._request = request
        self.is_busy = True

    def ask(self) -> None:
        self.is_busy = True
        self._send(self._request.as_http())

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._seen.larges.append(time.perf_counter() - self._asked)
        self.is_busy = False


def _small_stream(tokens: int) -> Request:
    message = {"role": "user", "content": "What is the difference between prefill and decode?"}
    document = {
        "model": MODEL,
        "messages": [message],
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,  # drawing from 128,000 words costs vLLM's engine on a CPU 1 ms per token
    }
    return Request(PATHS["chat"], JSON_HEADER, encoded(document))
