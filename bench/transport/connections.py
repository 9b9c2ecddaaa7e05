"""Many requests share a connection to a worker, or each has one: this measures what either way costs.

One worker serves both, and an orchestrator for each arm is in front of it: one with a connection for each
request that is under way, the same again for the noise, and one that sends all requests on one connection.
Clients of the orchestrators are the same. The simulated worker has another one for prefill legs; vLLM's does
both.
"""

from __future__ import annotations

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
_BESIDE = [*_TIMES[1:], _TIMES[0], Column("large_p50_ms", "large request p50 ms", 1), *_CPU]
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

    def streams(self, load: Load, large: Request | None, arm: str) -> Sample:
        """Sample streams; beside them come large requests, if there is one."""
        through = self._orchestrators[arm]
        seen = uvloop.run(watch(through, large, load, self._meters(through)))
        self._wait_idle(through)
        return {
            **{f"{meter}_us": used / seen.events * 1e6 for meter, used in seen.used_s.items()},
            **latencies(seen),
            "per_second": seen.events / load.seconds,
        }

    def requests(self, count: int, arm: str) -> Sample:
        """Sample small requests, each answered with one token."""
        through = self._orchestrators[arm]
        meters = self._meters(through)
        before = {meter: read() for meter, read in meters.items()}
        result = ask(through, count)
        used = {f"{meter}_us": (read() - before[meter]) / count * 1e6 for meter, read in meters.items()}
        self._wait_idle(through)
        times = {"p50_ms": result.percentile_ms(0.5), "p99_ms": result.percentile_ms(0.99)}
        return {**used, **times, "per_second": count / result.seconds}

    def warmed(self, seconds: float) -> int:
        """Warm all of them up; return how many small requests fill a sample."""
        each = max(ask(server, WARM_UP).seconds / WARM_UP for server in self._orchestrators.values())
        return max(FEWEST, min(MOST, round(seconds / each)))

    def _meters(self, through: Server) -> Meters:
        return {
            "worker": self._worker.loop_seconds,
            "worker_all": self._worker.cpu_seconds,
            "orchestrator": through.cpu_seconds,
        }

    def _wait_idle(self, through: Server) -> None:
        """What is still at work would take the next arm's core, and count as its own."""
        wait_idle(through.pid)
        wait_idle(self._worker.pid)


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
