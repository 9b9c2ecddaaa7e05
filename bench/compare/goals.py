"""The CPU budget limits ratios of figures that one run has measured side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.compare.comparison import Row

Rows = Mapping[str, Mapping[str, Row]]  # by workload, by router


@dataclass(frozen=True)
class Goal:
    """Baton's figure is to be at most `limit` times the other's, or at most `limit` if there is no other."""

    what: str
    workload: str
    figure: str
    limit: float
    other: str | None = None
    ours: str = "baton"
    is_strict: bool = False  # below the limit, not at it

    @property
    def text(self) -> str:
        bound = "below" if self.is_strict else "at most"
        return f"{self.ours}, {self.what}: {bound} {self.limit:g}{f' x {self.other}' if self.other else ''}"


@dataclass(frozen=True)
class Outcome:
    """`measured` is the median of the rounds' ratios, and `low` to `high` their spread; NaN with a reason."""

    goal: Goal
    measured: float = math.nan
    low: float = math.nan
    high: float = math.nan
    reason: str | None = None

    @property
    def is_met(self) -> bool:
        limit = self.goal.limit
        return self.measured < limit if self.goal.is_strict else self.measured <= limit


_OF_REQUESTS = [
    Goal("small chat, CPU", "small", "cpu_us", 0.33, "vllm-router"),
    Goal("small chat, CPU, one hop of nginx", "small", "cpu_us", 2.5, "nginx"),
    Goal("chat 233 KB, CPU", "chat", "cpu_us", 0.27, "vllm-router"),
    Goal("40,000 token ids, CPU", "ids", "cpu_us", 0.11, "vllm-router"),
    Goal("RSS per open stream, KB", "held", "rss_kb_per_stream", 14),
    Goal("RSS per open stream", "held", "rss_kb_per_stream", 1, "vllm-router", is_strict=True),
    Goal("p50 at the same rate", "latency", "p50_ms", 1, "vllm-router"),
    Goal("p99 at the same rate", "latency", "p99_ms", 1, "vllm-router"),
]
# Both ways to a worker are measured beside the peers, whose way is plain HTTP.
_OF_EITHER_WAY = [
    Goal("SSE, CPU per event", "sse", "cpu_us", 0.9, "vllm-router"),
    *_OF_REQUESTS,
    Goal("SSE, CPU per event", "sse", "cpu_us", 0.5, "vllm-router", ours="baton-mux"),
    Goal("SSE, CPU per event, one hop of nginx", "sse", "cpu_us", 0.8, "nginx", ours="baton-mux"),
    *(replace(goal, ours="baton-mux") for goal in _OF_REQUESTS),
]
GOALS = [
    *_OF_EITHER_WAY,
    Goal("CPU beside one process", "scale", "cpu_us", 1.11, "baton", ours="baton-2-processes"),
    *(replace(goal, ours=f"{goal.ours}-compiled") for goal in _OF_EITHER_WAY),
]


def outcome(goal: Goal, rows: Rows) -> Outcome:
    """Compare round by round: in a round the routers are measured shortly after each other."""
    names = [goal.ours, *([goal.other] if goal.other else [])]
    for name in names:
        row = rows.get(goal.workload, {}).get(name)
        if row is None:
            return Outcome(goal, reason=f"{name} did not run on {goal.workload}")
        if row.reason:
            return Outcome(goal, reason=f"{name}: {row.reason}")
    figures = [[sample[goal.figure] for sample in rows[goal.workload][name].samples] for name in names]
    ratios = [pair[0] / (pair[1] if goal.other else 1) for pair in zip(*figures, strict=True)]
    return Outcome(goal, statistics.median(ratios), min(ratios), max(ratios))
