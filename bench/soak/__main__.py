"""This tells whether the orchestrator gives everything back: memory stays level, nothing is held at the end.

    make soak                                       # or: .venv/bin/python -m bench.soak [--requests N]
    make soak ARGS="--quick"                        # under a minute, for CI
    make soak ARGS="--processes 2 --seed 7"
    make soak ARGS="--streams mux"                  # many requests on one connection to each worker

A simulated prefill and a simulated decode worker, an orchestrator between them, and clients that send chats,
streams, bodies of 64 KB and requests that are errors, on kept and on fresh connections. One in ten is given
up: while it is sent, while it waits, or in the middle of its answer. Resident memory of the orchestrator's
process tree is read as the load goes on. Afterwards descriptors, tasks, gauges and the workers' KV blocks
must be back where they were before. The exit code is 1 if one goal is missed.

`--quick` goes by what is given back; of the memory's slope it sees only a gross leak.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import uvloop

from bench.shared import record
from bench.shared.baton import baton, config, get, metrics, sim_pair, urls
from bench.shared.command import add_streams, parser, run, use_streams
from bench.shared.processes import START_LIMIT_S, Failed, free_port, open_files, rss_bytes, wait_for
from bench.shared.verdict import Verdict
from bench.soak.load import Tally, run_load, schedule
from bench.soak.measures import MB, Held, Sample, judge, of_answers

REQUESTS, SLOPE_MB = 200_000, 1.0
QUICK_REQUESTS, QUICK_SLOPE_MB = 10_000, 20.0  # the first requests fill caches and pools
CANCELS = 0.1
CLIENTS = 48
SAMPLES = 100
LINES = 20  # of progress
LOOKS = 1000  # for one at each process
PACKAGES = ("baton-serve", "uvicorn", "uvloop", "httptools")
SETTLE_LIMIT_S = 90.0  # idle connections to workers are kept for some seconds, a lease of KV blocks for 30
LOOK_EVERY_S = 0.5
# Long enough for clients to leave in every phase, short enough to answer thousands.
LATENCY = ("--prefill-us-per-token", "1", "--decode-ms-per-token", "1")


@dataclass(frozen=True)
class Site:
    """The orchestrator's first process and all ports are known."""

    pid: int
    port: int
    admin: int
    workers: tuple[int, ...]
    processes: int

    def held(self) -> Held:
        """Look at what is held. Raises `Failed` if somebody does not answer."""
        descriptors = open_files(self.pid)  # before this adds connections of its own
        gauges = metrics(get(self.admin, "/metrics").text)
        ledgers = [get(port, "/sim/ledger").json() for port in self.workers]
        return Held(
            descriptors=descriptors,
            tasks=sum(self._tasks().values()),
            requests=int(gauges["baton_requests_in_flight"]),
            legs=int(gauges["baton_worker_in_flight"]),
            busy_connections=int(gauges["baton_upstream_connections"]),
            kv_blocks=sum(ledger["blocks_used"] for ledger in ledgers),
            kv_pins=sum(len(ledger["pins"]) for ledger in ledgers),
        )

    def expired_leases(self) -> int:
        return sum(get(port, "/sim/ledger").json()["expired"] for port in self.workers)

    def is_ready(self) -> bool:
        """Say whether all processes serve, with all workers there."""
        states = [process["state"] for process in get(self.admin, "/admin/processes").json()]
        return states == ["serving"] * self.processes and get(self.port, "/ready").is_success

    def _tasks(self) -> Mapping[int, int]:
        """Return the tasks by process. The kernel chooses which one answers."""
        found: dict[int, int] = {}
        for _ in range(LOOKS):
            figures = get(self.port, "/health?verbose").json()
            found[figures["process"]] = figures["tasks"]
            if len(found) == self.processes:
                return found
        raise Failed(f"{LOOKS} times only {len(found)} of {self.processes} processes answered")


@contextmanager
def at_work(processes: int) -> Iterator[Site]:
    """Run two workers and an orchestrator, and yield them once all are ready. Raises `Failed`."""
    port, admin = free_port(), free_port()
    with sim_pair(*LATENCY) as (prefill, decode):
        pools = {"prefill": urls(prefill.port), "decode": urls(decode.port)}
        document = config(port, pools, admin=f"127.0.0.1:{admin}", processes=processes)
        with baton("orchestrator", document, port) as first:
            site = Site(first.pid, port, admin, (prefill.port, decode.port), processes)
            wait_for(site.is_ready, "all processes and workers", START_LIMIT_S)
            yield site


def steady(site: Site) -> Held:
    """Return what is held once two looks see the same: processes that have just started still open files."""
    before = site.held()
    for _ in range(LOOKS):
        time.sleep(LOOK_EVERY_S)
        now = site.held()
        if now == before:
            break
        before = now
    return before


def settled(site: Site, start: Held) -> tuple[Held, float]:
    """Return what is held once that is no more than at the start, or too late; and the seconds it took."""
    began = time.monotonic()
    while (held := site.held()).beyond(start):
        if time.monotonic() - began > SETTLE_LIMIT_S:
            break
        time.sleep(LOOK_EVERY_S)
    return held, time.monotonic() - began


class Progress:
    """The memory is sampled as requests end, and every few samples are shown."""

    def __init__(self, pid: int, requests: int) -> None:
        self._pid = pid
        self._step = max(1, requests // SAMPLES)
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    def note(self, tally: Tally) -> None:
        if tally.requests % self._step:
            return
        sample = Sample(tally.requests, rss_bytes(self._pid))
        self.samples.append(sample)
        if len(self.samples) % (SAMPLES // LINES) == 0:
            rate = tally.requests / (time.monotonic() - self._began)
            print(f"{tally.requests:>9,} requests{sample.rss / MB:>9.1f} MB{rate:>8.0f}/s", flush=True)


def soak(site: Site, options: argparse.Namespace) -> list[Verdict]:
    """Apply the load, and judge. Raises `Failed` if it cannot go on, or nobody answers after it."""
    start = steady(site)
    requests = schedule(Random(options.seed), CANCELS)
    progress = Progress(site.pid, options.requests)
    load = run_load(
        site.port, requests, count=options.requests, clients=options.clients, on_end=progress.note
    )
    tally = uvloop.run(load)
    end, seconds = settled(site, start)
    _show(tally)
    print(f"looked at {seconds:.0f} s after the load; leases that have expired: {site.expired_leases()}")
    return [of_answers(tally.problems), *judge(progress.samples, options.slope, start, end)]


def _show(tally: Tally) -> None:
    answered = ", ".join(f"{count:,} {kind}" for kind, count in tally.answered.most_common())
    cancelled = ", ".join(f"{count:,} {phase}" for phase, count in tally.cancelled.most_common())
    print(f"\nanswered: {answered}\ngiven up: {cancelled}\nconnections: {tally.connections:,}")


def report(verdicts: Sequence[Verdict]) -> bool:
    """Print the table; return whether all goals are met."""
    print()
    for verdict in verdicts:
        mark = "met" if verdict.holds else "MISSED"
        print(f"{verdict.goal:<72}{verdict.found:>16}  {mark}")
    return all(verdict.holds for verdict in verdicts)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    given = _options().parse_args(argv)
    requests, slope = (QUICK_REQUESTS, QUICK_SLOPE_MB) if given.quick else (REQUESTS, SLOPE_MB)
    given.requests = given.requests or requests
    given.slope = slope if given.slope is None else given.slope
    return given


def _options() -> argparse.ArgumentParser:
    options = parser(__doc__)
    add = options.add_argument
    add("--quick", action="store_true", help=f"{QUICK_REQUESTS:,} requests, loose on memory")
    add("--requests", type=int, help=f"{REQUESTS:,} if not given")
    add("--slope", type=float, metavar="MB", help="limit per 10,000 requests")
    add("--processes", type=int, default=1, help="of the orchestrator")
    add("--clients", type=int, default=CLIENTS, help="each with one request at a time")
    add_streams(options)
    add("--seed", type=int, default=Random().randrange(1_000_000), help="drawn if not given")
    return options


def main() -> int:
    options = arguments()
    streams = use_streams(options)
    print(record.listed(record.machine() | record.versions(PACKAGES)))
    what = f"{options.requests:,} requests, processes: {options.processes}, streams: {streams}"
    print(f"{what}, seed: {options.seed}\n", flush=True)
    with at_work(options.processes) as site:
        verdicts = soak(site, options)
    return 0 if report(verdicts) else 1


if __name__ == "__main__":
    run("soak", main)
