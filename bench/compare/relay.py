"""This measures the relay: CPU of the router's process tree per small chat request, beside a plain proxy.

    python -m bench.compare.relay [--requests N] [--rounds N] [--limit RATIO]

Two mock workers; Baton and a FastAPI + aiohttp two-leg proxy in turn, on one core, the load and the workers
on the other. Rounds are interleaved; the figure is the median of the ratios of neighbouring rounds. With
`--limit` the exit code is 1 if it is above: a check that needs no figures of another machine.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import ExitStack

import uvloop

from bench.compare.cluster import Target, at_work, mock_workers
from bench.compare.routers import ROUTERS
from bench.shared.bodies import small_chat
from bench.shared.command import parser
from bench.shared.cores import share_cores
from bench.shared.figures import aligned, in_rounds, spread
from bench.shared.load import Result, run_load
from bench.shared.processes import cpu_seconds

GOAL = 0.35  # Baton's CPU per request over the proxy's
NAMES = ("baton", "aiohttp-proxy")
BODY = small_chat()


def measure(target: Target, requests: int, connections: int) -> tuple[float, Result]:
    """Return CPU microseconds per request, and what the load saw."""
    before = cpu_seconds(target.pid)
    result = uvloop.run(run_load(target.port, BODY, requests=requests, connections=connections))
    if result.failed:
        raise RuntimeError(f"{result.failed} of {result.requests} requests failed")
    return (cpu_seconds(target.pid) - before) / result.requests * 1e6, result


def report(figures: dict[str, list[tuple[float, Result]]]) -> float:
    """Print the table; return the ratio."""
    lines = [["router", "CPU us/request", "min-max", "requests/s", "p50 ms", "p99 ms"]]
    for name, rounds in figures.items():
        cpu = [microseconds for microseconds, _ in rounds]
        last = rounds[-1][1]
        load = [f"{last.requests / last.seconds:.0f}", *(f"{last.percentile_ms(p):.2f}" for p in (0.5, 0.99))]
        lines.append([name, f"{statistics.median(cpu):.1f}", spread(cpu, 0), *load])
    print("\n".join(aligned(lines)))
    ours, theirs = figures.values()
    ratio = statistics.median(our[0] / their[0] for our, their in zip(ours, theirs, strict=True))
    print(f"\nratio baton / aiohttp proxy: {ratio:.3f} (goal: at most {GOAL})")
    return ratio


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=10_000, help="per round")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--limit", type=float, help="of the ratio; above it the exit code is 1")
    given = options.parse_args()
    cores = share_cores()
    with ExitStack() as stack:
        workers = stack.enter_context(mock_workers(cores.other))
        targets = {
            router.name: stack.enter_context(at_work(router, workers, cores.router))
            for router in ROUTERS
            if router.name in NAMES
        }
        for target in targets.values():
            measure(target, given.requests // 10, given.connections)  # warm-up
        figures = in_rounds(
            NAMES, given.rounds, lambda name: measure(targets[name], given.requests, given.connections)
        )
    ratio = report(figures)
    if given.limit is not None and ratio > given.limit:
        sys.exit(f"the relay costs more than {given.limit} x the proxy")


if __name__ == "__main__":
    main()
