"""Two steps side by side: the metrics that say how good an endpoint is, and their ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from launch.bench.results import Result, Step

_LATENCIES = tuple((time, quantile) for time in ("ttft", "itl", "tpot", "e2e") for quantile in ("p50", "p99"))


@dataclass(frozen=True, slots=True)
class Row:
    """One metric of one pair of steps; `ratio` is b to a, None where a is 0."""

    step: str
    metric: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a else None


def metrics_of(step: Step) -> dict[str, float]:
    """By name with unit. What was not measured is left out."""
    metrics = {
        f"{time} {quantile} ms": float(getattr(step.times[time], quantile))
        for time, quantile in _LATENCIES
        if time in step.times
    }
    return metrics | {"answers/s": step.rate, "goodput/s": step.goodput, "tokens/s": step.token_rate}


def compare(a: Result, b: Result) -> Iterator[Row]:
    """Of all steps that both have, the metrics that both have; and the rates that each sustained."""
    others = {name_of(step): step for step in b.steps}
    for step in a.steps:
        other = others.get(name_of(step))
        if other is not None:
            yield from _rows(step, other)
    for workload, rate in a.sustained.items():
        if workload in b.sustained:
            yield Row(workload, "sustained req/s", rate, b.sustained[workload])


def differences(a: Result, b: Result) -> list[str]:
    """What makes the comparison less than fair, one line each."""
    setups = (msgspec.structs.asdict(result.setup) for result in (a, b))
    pairs = zip(*(setup.items() for setup in setups), strict=True)
    lines = [f"{name}: {mine} and {yours}" for (name, mine), (_, yours) in pairs if mine != yours]
    names_a, names_b = ({name_of(step) for step in result.steps} for result in (a, b))
    return lines + [f"only in one of them: {name}" for name in sorted(names_a ^ names_b)]


def name_of(step: Step) -> str:
    return f"{step.workload}, {step.load}"


def _rows(a: Step, b: Step) -> Iterator[Row]:
    mine, yours = metrics_of(a), metrics_of(b)
    for metric, value in mine.items():
        if metric in yours:
            yield Row(name_of(a), metric, value, yours[metric])
