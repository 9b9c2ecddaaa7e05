"""Goodput under overload: of several times what the workers can serve, how much is still answered in time.

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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import uvloop

from bench.shared.processes import Failed, free_port, python, running
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
READY_LIMIT_S = 30.0
GIVE_UP_S = 30.0  # of a stream that has begun
ANY_PACE_MS = 1e6  # between tokens: they come as the worker's model says
REFUSALS = ("http 429", "http 503")
CONFIG = """\
orchestrator: {{listen: "127.0.0.1:{port}"}}
models:
  - name: sim
    prefill: {{urls: ["http://127.0.0.1:{prefill}"]}}
    decode: {{urls: ["http://127.0.0.1:{decode}"], seats: {seats}}}
"""


@dataclass(frozen=True)
class Row:
    """One load."""

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
    """Two workers and an orchestrator. Raises `Failed`."""
    port, prefill, decode = (free_port() for _ in range(3))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for worker, role in ((prefill, "prefill"), (decode, "decode")):
            options = ("--model-name", "sim", "--role", role, "--port", str(worker), *LATENCY)
            stack.enter_context(running(python("-m", "worker.sim", *options), worker))
        config = Path(folder, "overload.yaml")
        config.write_text(CONFIG.format(port=port, prefill=prefill, decode=decode, seats=SEATS))
        stack.enter_context(running(python("-m", "launch.cli", "orchestrator", str(config)), port))
        _wait_ready(port)
        yield Endpoint.parse(f"http://127.0.0.1:{port}")


def _wait_ready(port: int) -> None:
    end = time.monotonic() + READY_LIMIT_S
    while not httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False, timeout=READY_LIMIT_S).is_success:
        if time.monotonic() > end:
            raise Failed(f"not ready after {READY_LIMIT_S:.0f} s")
        time.sleep(0.1)


class Bench:
    """Loads on one endpoint, whose prompts are all different."""

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        timeout = str(deadline_s).encode()
        self._client = Client(PooledUpstream(), endpoint, [(b"x-request-timeout", timeout)], GIVE_UP_S)
        self._corpus = Corpus(Random(0))
        self._slo = Slo(ttft_ms=deadline_s * 1e3, itl_ms=ANY_PACE_MS, share=SHARE)

    async def run(self, seconds: float, loads: Sequence[float]) -> list[Row]:
        """The capacity, then each load as a multiple of it."""
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
    """Of the peak, the least goodput of any load above the capacity."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", type=_numbers, default=[1.0, 2.0, 5.0], help="times the capacity")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--deadline", type=float, default=2.0, help="of each request, in seconds")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def main() -> None:
    try:
        rows = uvloop.run(bench(arguments()))
    except Failed as failed:
        sys.exit(f"overload: {failed}")
    share = worst_share(rows)
    print(f"goodput under overload: {share:.1%} of the peak; the goal is {SHARE:.0%}")
    if share < SHARE:
        sys.exit(1)


if __name__ == "__main__":
    main()
