"""Many requests share a connection to a worker, or each has one: this measures what either way costs.

One worker serves both, and an orchestrator for each arm is in front of it: one with a connection for each
request that is under way, the same again for the noise, and one that sends all requests on one connection.
Clients of the orchestrators are the same. The simulated worker has another one for prefill legs; vLLM's does
both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final

import uvloop

from bench.shared.baton import urls
from bench.shared.bodies import QUESTION, encoded
from bench.shared.cores import Cores
from bench.shared.figures import Column, Sample, in_rounds
from bench.shared.load import JSON_HEADER, Result, run_load
from bench.shared.processes import Failed, wait_idle
from bench.transport.costs import FEWEST, Extent
from bench.transport.legs import AGAIN, MODEL, PATHS, Prompt, Request
from bench.transport.rounds import Panel
from bench.transport.streams import PER_SECOND, STREAMS, Load, Meters, latencies, watch
from bench.transport.workers import Engine, Server, orchestrator, worker
from orchestrator.wire.info import STREAMS_ENV, Streams

BASE: Final[Streams] = "http"
ARMS: Mapping[str, Streams] = {BASE: BASE, BASE + AGAIN: BASE, "mux": "mux"}
COUNTS = (16, 32, 64, 256)  # of streams
EVENTS = 250  # of a stream: what its beginning costs counts little beside them
SEATS = 320
CONNECTIONS = 32
WARM_UP = 200  # requests
MOST = 5000  # requests in a sample
IDLE_S = 3.0

_CPU = [
    Column("worker_us", "worker's event loop us/event", 1),
    Column("orchestrator_us", "orchestrator us/event", 1),
    Column("worker_all_us", "worker's process us/event", 1),
]
_TIMES = [
    Column("gap_p50_ms", "gap p50 ms", 1),
    Column("gap_p99_ms", "p99", 1),
    Column("first_p50_ms", "first event p50 ms", 1),
    Column("first_p99_ms", "p99", 1),
]
_EVENTS = [*_CPU, *_TIMES, Column("per_second", "events/s", 0)]
_BESIDE = [
    Column("gap_p99_ms", "gap p99 ms", 1),
    Column("gap_p50_ms", "p50", 1),
    *_TIMES[2:],
    Column("large_p50_ms", "large request p50 ms", 1),
    *_CPU,
]
_REQUESTS = [
    Column("orchestrator_us", "orchestrator us/request", 1),
    Column("worker_us", "worker's event loop us/request", 1),
    Column("p50_ms", "p50 ms", 2),
    Column("p99_ms", "p99 ms", 2),
    Column("per_second", "requests/s", 0),
]


class Site:
    """A worker, which decodes, and the arms' orchestrators are at work."""

    def __init__(self, worker: Server, orchestrators: Mapping[str, Server]) -> None:
        self._worker = worker
        self._orchestrators = orchestrators
        self._idle: dict[str, dict[str, float]] = {}  # shares of a core that are used without load, by arm

    def streams(self, load: Load, large: Request | None, arm: str) -> Sample:
        """Sample streams; beside them come large requests, if there is one."""
        seen = uvloop.run(watch(self._orchestrators[arm], large, load, self._meters(arm)))
        self._wait_idle(arm)
        used = self._each(arm, seen.used_s, load.seconds, seen.events)
        return {**used, **latencies(seen), "per_second": seen.events / load.seconds}

    def requests(self, count: int, arm: str) -> Sample:
        """Sample small requests, each answered with one token."""
        before = self._read(arm)
        result = ask(self._orchestrators[arm], count)
        used = self._each(arm, _less(self._read(arm), before), result.seconds, count)
        self._wait_idle(arm)
        times = {"p50_ms": result.percentile_ms(0.5), "p99_ms": result.percentile_ms(0.99)}
        return {**used, **times, "per_second": count / result.seconds}

    def warmed(self, seconds: float) -> int:
        """Warm all of them up, and look what they use without load; return how many small requests fill a
        sample.
        """
        each = max(ask(server, WARM_UP).seconds / WARM_UP for server in self._orchestrators.values())
        before = {arm: self._read(arm) for arm in self._orchestrators}
        time.sleep(IDLE_S)
        for arm, used in before.items():
            shares = {meter: used_s / IDLE_S for meter, used_s in _less(self._read(arm), used).items()}
            self._idle[arm] = shares
        return max(FEWEST, min(MOST, round(seconds / each)))

    def _each(self, arm: str, used_s: Mapping[str, float], seconds: float, count: int) -> dict[str, float]:
        """Return microseconds per event or request, without what is used in any case: probes above all."""
        idle = self._idle[arm]
        return {
            f"{meter}_us": max(0.0, used - seconds * idle[meter]) / count * 1e6
            for meter, used in used_s.items()
        }

    def _read(self, arm: str) -> dict[str, float]:
        return {meter: read() for meter, read in self._meters(arm).items()}

    def _meters(self, arm: str) -> Meters:
        return {
            "worker": self._worker.loop_seconds,
            "worker_all": self._worker.cpu_seconds,
            "orchestrator": self._orchestrators[arm].cpu_seconds,
        }

    def _wait_idle(self, arm: str) -> None:
        """What is still at work would take the next arm's core, and count as its own."""
        wait_idle(self._orchestrators[arm].pid)
        wait_idle(self._worker.pid)


def _less(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {meter: used - before[meter] for meter, used in now.items()}


def ask(server: Server, count: int) -> Result:
    """Send small requests. Raises `Failed` if one is not answered with 200."""
    load = run_load(server.port, _SMALL, requests=count, connections=CONNECTIONS, path=PATHS["chat"])
    result: Result = uvloop.run(load)
    if result.failed:
        raise Failed(f"{result.failed} of {count} small requests failed")
    return result


_SMALL = encoded({"model": MODEL, "messages": [QUESTION], "max_tokens": 1, "temperature": 0})


def beside_http(engine: Engine, counts: Sequence[int], tokens: int, extent: Extent) -> Iterator[Panel]:
    """Measure small requests, then streams, so many at a time as `counts` says, then streams beside large
    requests of so many tokens.
    """
    with _site(engine, extent.cores) as site:
        requests = site.warmed(extent.seconds)
        rows = _in_rounds(extent, partial(site.requests, requests))
        yield _panel(engine, "small requests", CONNECTIONS, "connections", _REQUESTS, rows)
        for count in counts:
            load = Load(count, 1, extent.seconds, EVENTS)
            rows = _in_rounds(extent, partial(site.streams, load, None))
            yield _panel(engine, "events", count, "streams", _EVENTS, rows)
        load = Load(STREAMS, PER_SECOND[engine], extent.seconds)
        prompt = Prompt("chat", tokens)
        large = Request(PATHS["chat"], JSON_HEADER, prompt.from_client())
        rows = _in_rounds(extent, partial(site.streams, load, large))
        series = f"{load.streams} streams, {load.per_second} large requests a second"
        yield _panel(engine, series, tokens, "tokens", _BESIDE, rows)


def _in_rounds(extent: Extent, sample: Callable[[str], Sample]) -> dict[str, list[Sample]]:
    return in_rounds(list(ARMS), extent.rounds, sample)


def _panel(
    engine: Engine, series: str, size: int, unit: str, columns: list[Column], rows: dict[str, list[Sample]]
) -> Panel:
    compared = tuple(column.key for column in columns if column.key.endswith("_us"))
    section = f"connections to a {engine} worker"
    return Panel(section, series, size, columns, rows, unit, BASE, compared)


@contextmanager
def _site(engine: Engine, cores: Cores) -> Iterator[Site]:
    """Start everything. The worker that is measured has a core alone, but for the orchestrator beside vLLM's,
    whose engine needs the other core.
    """
    env = {STREAMS_ENV: "mux"}
    with ExitStack() as stack:
        decode = stack.enter_context(worker(engine, cores, env, SEATS))
        pools: dict[str, Any] = {"both": urls(decode.port)}
        beside = cores.router
        if engine == "sim":
            beside = cores.other
            prefill = stack.enter_context(worker(engine, Cores(beside, beside), env, SEATS))
            pools = {"prefill": urls(prefill.port), "decode": urls(decode.port)}
        yield Site(
            decode,
            {
                arm: stack.enter_context(orchestrator(pools, beside, {STREAMS_ENV: streams}))
                for arm, streams in ARMS.items()
            },
        )
