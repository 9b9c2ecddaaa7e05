"""This measures goodput under overload: of several times what can be served, how much comes in time.

    .venv/bin/python -m bench.overload [--loads 1,2,5] [--seconds 8] [--deadline 2]

A simulated prefill and a simulated decode worker, which serves so many requests at once and takes a stated
time for each, behind the orchestrator. The capacity is measured with as many clients as there are seats, each
waiting for its answer. Then requests come at multiples of it, in an open loop: clients that are sent away do
not come again, and nobody waits for anybody. A request is good if its first token comes within the deadline,
which it names in `x-request-timeout`, and its stream ends well. The exit code is 1 if goodput under any load
above the capacity is less than 95 % of its peak.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import uvloop

from bench.shared import command
from bench.shared.baton import baton, config, sim_pair, urls, wait_ready
from bench.shared.command import parser
from bench.shared.processes import free_port
from launch.bench.client import Client
from launch.bench.endpoint import Endpoint
from launch.bench.measure import Run, Tally, measure
from launch.bench.probe import Target, probe
from launch.bench.prompts import Corpus, Prompts
from launch.bench.results import Load, Step, Unit, quantile
from launch.bench.sample import Sample, Slo
from launch.bench.shapes import Shape, Workload
from orchestrator.transport.pool import PooledUpstream

SHARE = 0.95  # of the peak
SEATS = 16
TOKENS = 16  # of each answer
LATENCY = ("--prefill-us-per-token", "50", "--decode-ms-per-token", "20")
WORKLOAD = Workload("short", "few tokens in, few out", (Shape(message=64, answer=TOKENS),))
GIVE_UP_S = 30.0  # of a stream that has begun
ANY_PACE_MS = 1e6  # between tokens: they come as the worker's model says
REFUSALS = ("http 429", "http 503")


@dataclass(frozen=True)
class Row:
    """A load came to this."""

    step: Step
    ended: Counter[str]  # requests by how they ended
    refused_ms: float  # until a client knew, 99 of 100

    @property
    def goodput(self) -> float:
        return self.step.good / self.step.seconds


def row_of(step: Step, samples: Sequence[Sample]) -> Row:
    refused = sorted(s.ended - s.sent for s in samples if s.error in REFUSALS)
    return Row(
        step=step,
        ended=Counter(sample.error or "answered" for sample in samples),
        refused_ms=quantile(refused, 0.99) * 1e3 if refused else 0.0,
    )


@contextmanager
def at_work() -> Iterator[Endpoint]:
    """Run two workers and an orchestrator. Raises `Failed`."""
    port = free_port()
    with sim_pair(*LATENCY) as (prefill, decode):
        pools = {"prefill": urls(prefill.port), "decode": {**urls(decode.port), "seats": SEATS}}
        with baton("orchestrator", config(port, pools), port) as process:
            wait_ready(port)
            yield Endpoint.parse(process.url)


class Bench:
    """Loads come to one endpoint; their prompts are all different."""

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        timeout = str(deadline_s).encode()
        self._client = Client(PooledUpstream(), endpoint, [(b"x-request-timeout", timeout)], GIVE_UP_S)
        self._corpus = Corpus(Random(0))
        self._slo = Slo(ttft_ms=deadline_s * 1e3, itl_ms=ANY_PACE_MS, share=SHARE)

    async def run(self, seconds: float, loads: Sequence[float]) -> list[Row]:
        """Measure the capacity, then each load as a multiple of it."""
        target = await probe(self._client, None, self._corpus)
        capacity = await self._load(target, Load(SEATS, Unit.CONCURRENT), seconds)
        rates = [load * capacity.goodput for load in loads]
        return [capacity, *[await self._load(target, Load(rate, Unit.RATE), seconds) for rate in rates]]

    async def _load(self, target: Target, load: Load, seconds: float) -> Row:
        prompts = Prompts(
            self._corpus, target.model, target.options, target.tokens_per_word, seed="0", salt=str(load)
        )
        tallies: list[Tally] = []
        run = Run(WORKLOAD, load, seconds, seed="0")
        step = await measure(self._client, prompts, run, self._slo, tallies.append)
        row = row_of(step, tallies[0].samples)
        print(line(row), flush=True)
        return row

    async def aclose(self) -> None:
        await self._client.upstream.aclose()


def line(row: Row) -> str:
    ended = ", ".join(f"{count} {kind}" for kind, count in row.ended.most_common())
    ttft = row.step.times.get("ttft")
    return (
        f"{row.step.load!s:>12}  good {row.goodput:6.1f}/s  first token p99 {ttft.p99 if ttft else 0:5.0f} ms"
        f"  sent away p99 {row.refused_ms:5.0f} ms  {ended}"
    )


def worst_share(rows: Sequence[Row]) -> float:
    """Return the least goodput of any load above the capacity, as a share of the peak."""
    capacity, *loads = rows
    peak = max(row.goodput for row in rows)
    over = [row.goodput for row in loads if row.step.load.value > capacity.goodput * 1.01]
    return min(over, default=peak) / peak


async def bench(options: argparse.Namespace) -> list[Row]:
    with at_work() as endpoint:
        loads = Bench(endpoint, options.deadline)
        try:
            return await loads.run(options.seconds, options.loads)
        finally:
            await loads.aclose()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--loads", type=_numbers, default=[1.0, 2.0, 5.0], help="times the capacity")
    options.add_argument("--seconds", type=float, default=8.0, help="of each load")
    options.add_argument("--deadline", type=float, default=2.0, help="of each request, in seconds")
    return options.parse_args(argv)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> int:
    share = worst_share(uvloop.run(bench(arguments())))
    print(f"goodput under overload: {share:.1%} of the peak; the goal is {SHARE:.0%}")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    command.run("overload", main)
