"""What each profile measures, and the search for the highest rate that holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from launch.bench.results import Load, Step, Unit
from launch.bench.sample import Slo
from launch.bench.shapes import Workload

# A verdict over fewer requests would be chance; a slow rate takes longer than the step's duration for that.
_REQUESTS_FOR_A_VERDICT = 20

_LOWEST_RATE = 0.1  # a request in 10 s: if that does not hold, the SLO asks for too much
_CLOSE_ENOUGH = 1.1  # as a ratio, between the highest rate that held and the lowest that failed


class Bench(Protocol):
    """Measures one step after the other on one endpoint, and keeps what it found."""

    sustained: dict[str, float]  # the highest rate that held, by workload

    async def step(self, workload: Workload, load: Load, duration_s: float) -> Step: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What the user asked for, defaults filled in."""

    workloads: Sequence[Workload]
    rate: float  # of a workload whose share is 1
    duration_s: float
    concurrency: Sequence[int]
    slo: Slo

    def load(self, workload: Workload, factor: float = 1.0) -> Load:
        return Load(self.rate * workload.rate_share * factor, Unit.RATE)


async def quick(bench: Bench, plan: Plan) -> None:
    """Each workload at one rate."""
    for workload in plan.workloads:
        await bench.step(workload, plan.load(workload), plan.duration_s)


async def full(bench: Bench, plan: Plan) -> None:
    """Each workload below, at and above the rate, so that it shows how latency grows with load."""
    for workload in plan.workloads:
        for factor in (0.5, 1.0, 2.0):
            await bench.step(workload, plan.load(workload, factor), plan.duration_s)


async def matrix(bench: Bench, plan: Plan) -> None:
    """Each workload with each number of clients."""
    for workload in plan.workloads:
        for clients in plan.concurrency:
            await bench.step(workload, Load(clients, Unit.CONCURRENT), plan.duration_s)


async def sustained(bench: Bench, plan: Plan) -> None:
    """The highest rate of each workload at which enough requests keep to the SLO."""
    for workload in plan.workloads:
        search = RateSearch(plan.load(workload).value)
        while (rate := search.next_rate()) is not None:
            duration_s = max(plan.duration_s, _REQUESTS_FOR_A_VERDICT / rate)
            step = await bench.step(workload, Load(rate, Unit.RATE), duration_s)
            search.note(rate, holds=step.holds(plan.slo))
        bench.sustained[workload.name] = search.held


PROFILES: dict[str, Callable[[Bench, Plan], Coroutine[Any, Any, None]]] = {
    "quick": quick,
    "full": full,
    "sustained": sustained,
    "matrix": matrix,
}


@dataclass(slots=True)
class RateSearch:
    """Doubles until a rate fails, or halves until one holds, then closes in on the border between."""

    start: float
    held: float = 0.0  # the highest that did
    failed: float = math.inf  # the lowest that did

    def next_rate(self) -> float | None:
        """None when the answer is `held`."""
        if self.failed == math.inf:
            return self.held * 2 or self.start
        if not self.held:
            return self.failed / 2 if self.failed / 2 >= _LOWEST_RATE else None
        if self.failed / self.held <= _CLOSE_ENOUGH:
            return None
        return math.sqrt(self.held * self.failed)

    def note(self, rate: float, *, holds: bool) -> None:
        if holds:
            self.held = max(self.held, rate)
        else:
            self.failed = min(self.failed, rate)
