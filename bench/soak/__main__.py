"""Whether the orchestrator gives everything back: memory stays level, and nothing is held after the load.

    make soak                                       # or: .venv/bin/python -m bench.soak [--requests N]
    make soak ARGS="--quick"                        # under a minute, for CI
    make soak ARGS="--processes 2 --seed 7"

A simulated prefill and a simulated decode worker, an orchestrator between them, and clients that send chats,
streams, bodies of 64 KB and requests that are errors, on kept and on fresh connections. One in ten is given
up: while it is sent, while it waits, or in the middle of its answer. Resident memory of the orchestrator's
process tree is read as the load goes on. Afterwards descriptors, tasks, gauges and the workers' KV blocks
must be back where they were before. The exit code is 1 if one goal is missed.

`--quick` goes by what is given back; of the memory's slope it sees only a gross leak.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random

import httpx
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from bench.shared.bodies import MODEL
from bench.shared.machine import machine
from bench.shared.processes import Failed, free_port, open_files, python, rss_bytes, running
from bench.soak.load import Tally, run_load, schedule
from bench.soak.measures import MB, Held, Sample, Verdict, judge, of_answers

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
CONFIG = """\
orchestrator: {{listen: "127.0.0.1:{port}", admin: "127.0.0.1:{admin}", processes: {processes}}}
models:
  - name: {model}
    prefill: {{urls: ["http://127.0.0.1:{prefill}"]}}
    decode: {{urls: ["http://127.0.0.1:{decode}"]}}
"""


@dataclass(frozen=True)
class Site:
    """Ports, and the orchestrator's first process."""

    pid: int
    port: int
    admin: int
    workers: tuple[int, ...]
    processes: int

    def held(self) -> Held:
        """Raises `Failed` if somebody does not answer."""
        descriptors = open_files(self.pid)  # before this adds connections of its own
        gauges = self._gauges()
        ledgers = [_get(port, "/sim/ledger").json() for port in self.workers]
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
        return sum(_get(port, "/sim/ledger").json()["expired"] for port in self.workers)

    def is_ready(self) -> bool:
        """All processes serve, with all workers there."""
        states = [process["state"] for process in _get(self.admin, "/admin/processes").json()]
        return states == ["serving"] * self.processes and _get(self.port, "/ready").is_success

    def _gauges(self) -> Mapping[str, float]:
        """Sums over all labels; of the connections to workers only the busy ones."""
        families = text_string_to_metric_families(_get(self.admin, "/metrics").text)
        return {
            family.name: sum(s.value for s in family.samples if s.labels.get("state") != "idle")
            for family in families
            if family.type == "gauge"
        }

    def _tasks(self) -> Mapping[int, int]:
        """By process. The kernel chooses which one answers."""
        found: dict[int, int] = {}
        for _ in range(LOOKS):
            figures = _get(self.port, "/health?verbose").json()
            found[figures["process"]] = figures["tasks"]
            if len(found) == self.processes:
                return found
        raise Failed(f"{LOOKS} times only {len(found)} of {self.processes} processes answered")


def _get(port: int, path: str) -> httpx.Response:
    """On a connection of its own, closed before this returns."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30, trust_env=False)
    except httpx.HTTPError as error:
        raise Failed(f"{path} on port {port}: {error!r}") from error


@contextmanager
def at_work(processes: int) -> Iterator[Site]:
    """Two workers and an orchestrator that is ready. Raises `Failed`."""
    port, admin, prefill, decode = (free_port() for _ in range(4))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for worker, role in ((prefill, "prefill"), (decode, "decode")):
            options = ("--model-name", MODEL, "--role", role, "--port", str(worker), *LATENCY)
            stack.enter_context(running(python("-m", "worker.sim", *options), worker))
        config = Path(folder, "soak.yaml")
        ports = {"port": port, "admin": admin, "prefill": prefill, "decode": decode}
        config.write_text(CONFIG.format(model=MODEL, processes=processes, **ports))
        command = python("-m", "launch.cli", "orchestrator", str(config))
        pid = stack.enter_context(running(command, port))
        site = Site(pid, port, admin, (prefill, decode), processes)
        _wait_ready(site)
        yield site


def _wait_ready(site: Site, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not site.is_ready():
        if time.monotonic() > end:
            raise Failed(f"not ready after {limit_s:.0f} s")
        time.sleep(0.1)


def steady(site: Site) -> Held:
    """What is held once two looks see the same: processes that have just started still open files."""
    before = site.held()
    for _ in range(LOOKS):
        time.sleep(LOOK_EVERY_S)
        now = site.held()
        if now == before:
            break
        before = now
    return before


def settled(site: Site, start: Held) -> tuple[Held, float]:
    """What is held once that is no more than at the start, or too late; and how many seconds it took."""
    began = time.monotonic()
    while (held := site.held()).beyond(start):
        if time.monotonic() - began > SETTLE_LIMIT_S:
            break
        time.sleep(LOOK_EVERY_S)
    return held, time.monotonic() - began


class Progress:
    """Samples the memory as requests end, and shows every few samples."""

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
    """Raises `Failed` if the load cannot go on, or nobody answers after it."""
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
    """Prints the table; returns whether all goals are met."""
    print()
    for verdict in verdicts:
        mark = "met" if verdict.is_met else "MISSED"
        print(f"{verdict.goal:<72}{verdict.found:>16}  {mark}")
    return all(verdict.is_met for verdict in verdicts)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS:,} requests, loose on memory")
    parser.add_argument("--requests", type=int, help=f"{REQUESTS:,} if not given")
    parser.add_argument("--slope", type=float, metavar="MB", help="limit per 10,000 requests")
    parser.add_argument("--processes", type=int, default=1, help="of the orchestrator")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="each with one request at a time")
    parser.add_argument("--seed", type=int, default=Random().randrange(1_000_000), help="drawn if not given")
    options = parser.parse_args(argv)
    requests, slope = (QUICK_REQUESTS, QUICK_SLOPE_MB) if options.quick else (REQUESTS, SLOPE_MB)
    options.requests = options.requests or requests
    options.slope = slope if options.slope is None else options.slope
    return options


def main() -> None:
    options = arguments()
    about = {**machine(), **{name: version(name) for name in PACKAGES}}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{options.requests:,} requests, processes: {options.processes}, seed: {options.seed}\n", flush=True
    )
    try:
        with at_work(options.processes) as site:
            verdicts = soak(site, options)
    except Failed as failed:
        sys.exit(f"soak: {failed}")
    if not report(verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
