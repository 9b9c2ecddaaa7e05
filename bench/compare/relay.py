"""What the relay costs: CPU of the router's process tree per small chat request, beside a plain proxy.

    python -m bench.compare.relay [--requests N] [--rounds N] [--limit RATIO]

Two mock workers; Baton and a FastAPI + aiohttp two-leg proxy in turn, on one core, the load and the workers
on the other. Rounds are interleaved; the figure is the median of the ratios of neighbouring rounds. With
`--limit` the exit code is 1 if it is above: a check that needs no figures of another machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack

import uvloop

from bench.compare.cluster import Target, at_work, mock_workers, share_cores
from bench.compare.routers import ROUTERS
from bench.shared.bodies import small_chat
from bench.shared.load import Result, run_load
from bench.shared.processes import cpu_seconds

GOAL = 0.35  # Baton's CPU per request over the proxy's
NAMES = ("baton", "aiohttp-proxy")
BODY = small_chat()


def measure(target: Target, requests: int, connections: int) -> tuple[float, Result]:
    """CPU microseconds per request, and what the load saw."""
    before = cpu_seconds(target.pid)
    result = uvloop.run(run_load(target.port, BODY, requests=requests, connections=connections))
    if result.failed:
        raise RuntimeError(f"{result.failed} of {result.requests} requests failed")
    return (cpu_seconds(target.pid) - before) / result.requests * 1e6, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--limit", type=float, help="of the ratio; above it the exit code is 1")
    arguments = parser.parse_args()
    cores = share_cores()
    with ExitStack() as stack:
        workers = stack.enter_context(mock_workers(cores.other))
        targets = {
            router.name: stack.enter_context(at_work(router, workers, cores.router))
            for router in ROUTERS
            if router.name in NAMES
        }
        figures = rounds_of(targets, arguments.rounds, arguments.requests, arguments.connections)
    ratio = report(figures)
    if arguments.limit is not None and ratio > arguments.limit:
        sys.exit(f"the relay costs more than {arguments.limit} x the proxy")


def rounds_of(
    targets: dict[str, Target], rounds: int, requests: int, connections: int
) -> dict[str, list[tuple[float, Result]]]:
    figures: dict[str, list[tuple[float, Result]]] = {name: [] for name in targets}
    for target in targets.values():
        measure(target, requests // 10, connections)  # warm-up
    for _ in range(rounds):
        for name, target in targets.items():
            figures[name].append(measure(target, requests, connections))
    return figures


def report(figures: dict[str, list[tuple[float, Result]]]) -> float:
    """Prints the table; returns the ratio."""
    print(f"{'router':<16}{'CPU us/request':>16}{'min-max':>16}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for name, rounds in figures.items():
        cpu = [microseconds for microseconds, _ in rounds]
        last = rounds[-1][1]
        spread = f"{min(cpu):.0f}-{max(cpu):.0f}"
        print(
            f"{name:<16}{statistics.median(cpu):>16.1f}{spread:>16}{last.requests / last.seconds:>12.0f}"
            f"{last.percentile_ms(0.5):>9.2f}{last.percentile_ms(0.99):>9.2f}"
        )
    ours, theirs = figures.values()
    ratio = statistics.median(our[0] / their[0] for our, their in zip(ours, theirs, strict=True))
    print(f"\nratio baton / aiohttp proxy: {ratio:.3f} (goal: at most {GOAL})")
    return ratio


if __name__ == "__main__":
    main()
