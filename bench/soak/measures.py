"""A soak measures how memory grows and what is held, and judges both by their goals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from bench.shared.verdict import Verdict

MB = 1e6
PER = 10_000  # requests
SHOWN = 5  # wrong answers


@dataclass(frozen=True)
class Sample:
    """The orchestrator's process tree had so much resident memory when so many requests had ended."""

    requests: int
    rss: int  # bytes


def slope(samples: Sequence[Sample]) -> float:
    """Return MB per 10,000 requests, by least squares. Raises `StatisticsError` below two samples."""
    line = statistics.linear_regression([s.requests for s in samples], [s.rss for s in samples])
    return line.slope * PER / MB


def after(samples: Sequence[Sample], share: float) -> list[Sample]:
    """Return those that were taken when this share of all requests had ended, and later."""
    return [sample for sample in samples if sample.requests >= share * samples[-1].requests]


@dataclass(frozen=True)
class Held:
    """The orchestrator and the simulated engines hold this at one moment."""

    descriptors: int
    tasks: int
    requests: int
    legs: int
    busy_connections: int  # to workers
    kv_blocks: int
    kv_pins: int

    def beyond(self, start: Held) -> dict[str, int]:
        """Return what is more than it was at the start, and how many."""
        before = asdict(start)
        return {name: value for name, value in asdict(self).items() if value > before[name]}


def judge(samples: Sequence[Sample], limit_mb: float, start: Held, end: Held) -> list[Verdict]:
    """Judge memory, and each thing that is held. `limit_mb` is per 10,000 requests."""
    return [
        _of_slope("slope, all but the first tenth", slope(after(samples, 0.1)), limit_mb),
        _of_slope("slope, second half", slope(after(samples, 0.5)), limit_mb),
        *_of_held(asdict(start), asdict(end)),
    ]


def _of_slope(name: str, found: float, limit_mb: float) -> Verdict:
    goal = f"{name}: at most {limit_mb:g} MB per 10,000 requests"
    return Verdict(goal, f"{found:+.2f}", found <= limit_mb)


def _of_held(start: Mapping[str, int], end: Mapping[str, int]) -> list[Verdict]:
    return [
        Verdict(f"{name.replace('_', ' ')}: as at the start", f"{before} -> {end[name]}", end[name] <= before)
        for name, before in start.items()
    ]


def of_answers(problems: Mapping[str, int]) -> Verdict:
    """Every request that was not given up must be answered as its kind is."""
    shown = [f"{count} x {problem}" for problem, count in islice(problems.items(), SHOWN)]
    return Verdict("wrong answers: none", "; ".join(shown) or "none", not problems)
