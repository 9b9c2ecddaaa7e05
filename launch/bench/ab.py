"""An A/B test of endpoints: rounds in which each serves the same schedule, and the first serves it twice.

The ratio of the first to itself is the noise; another arm differs where its ratios lie beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from launch.bench.compare import metrics_of
from launch.bench.profiles import Plan
from launch.bench.results import Ratio, Step
from launch.bench.session import Session
from launch.bench.shapes import Workload

AGAIN = " again"  # behind the first arm's label, for its second run


async def run_rounds(
    arms: Mapping[str, Session], plan: Plan, rounds: int, seed: str
) -> dict[str, list[Step]]:
    """Steps by label, in the order of rounds and workloads; each round starts with another arm."""
    first = next(iter(arms))
    order = [*arms, first + AGAIN]
    steps: dict[str, list[Step]] = {label: [] for label in order}
    for number in range(rounds):
        for workload in plan.workloads:
            for label in _rotated(order, number):
                session = arms[label.removesuffix(AGAIN)]
                step = await _step(session, workload, plan, f"{seed}/{number}")
                steps[label].append(step)
    return steps


async def _step(session: Session, workload: Workload, plan: Plan, seed: str) -> Step:
    return await session.step(workload, plan.load(workload), plan.duration_s, seed)


def ratios(steps: Mapping[str, Sequence[Step]]) -> list[Ratio]:
    """Of every arm but the first, to the first, per workload and metric."""
    first, *others, again = steps
    return [
        ratio
        for label in others
        for workload in dict.fromkeys(step.workload for step in steps[first])
        for ratio in _of_arm(
            label, workload, *(_rounds(steps[name], workload) for name in (first, label, again))
        )
    ]


def _rounds(steps: Sequence[Step], workload: str) -> list[dict[str, float]]:
    """The metrics of each round of one workload."""
    return [metrics_of(step) for step in steps if step.workload == workload]


def _of_arm(
    label: str,
    workload: str,
    first: Sequence[Mapping[str, float]],
    arm: Sequence[Mapping[str, float]],
    again: Sequence[Mapping[str, float]],
) -> Iterator[Ratio]:
    for metric in {metric: None for figures in first for metric in figures}:
        noise = _per_round(metric, again, first)
        found = _per_round(metric, arm, first)
        if noise and found:
            yield Ratio(
                workload=workload,
                metric=metric,
                arm=label,
                median=median(found),
                low=min(found),
                high=max(found),
                noise_low=min(noise),
                noise_high=max(noise),
            )


def _per_round(
    metric: str, rounds: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]
) -> list[float]:
    """Ratios to the base; rounds in which one of both has no figure are left out."""
    pairs = zip(rounds, base, strict=True)
    return [mine[metric] / its[metric] for mine, its in pairs if metric in mine and its.get(metric)]


def _rotated(order: Sequence[str], by: int) -> list[str]:
    by %= len(order)
    return [*order[by:], *order[:by]]
