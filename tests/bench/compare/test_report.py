from __future__ import annotations

import json
import math

from bench.compare.comparison import Row
from bench.compare.goals import Goal, Outcome
from bench.compare.measures import ClosedLoop
from bench.compare.report import goals_table, outcome_document, table, workload_document
from bench.compare.workloads import Workload
from bench.shared.bodies import small_chat

WORKLOAD = Workload("small", "small chat", ClosedLoop(small_chat()))
GOAL = Goal("small chat, CPU", "small", "cpu_us", 0.5, "vllm-router")


def sample(cpu_us: float, peak_rss_mb: float = 50.0, p99_ms: float = 9.0) -> dict[str, float]:
    return {
        "cpu_us": cpu_us,
        "per_second": 12345.6,
        "p50_ms": 1.25,
        "p99_ms": p99_ms,
        "peak_rss_mb": peak_rss_mb,
    }


ROWS = [
    Row("baton", [sample(50), sample(70), sample(60, peak_rss_mb=80)]),
    Row("nginx", reason="nginx is not installed"),
    Row("vllm-router", [sample(100.04), sample(1300), sample(120, p99_ms=math.nan)]),
]


def test_table_shows_medians_spread_highest_memory_and_reasons() -> None:
    assert table(WORKLOAD, ROWS).splitlines() == [
        "small chat",
        "",
        "router       CPU us/request       min-max  requests/s  p50 ms  p99 ms  peak RSS MB",
        "baton                  60.0     50.0-70.0      12,346    1.25    9.00         80.0",
        "vllm-router           120.0  100.0-1300.0      12,346    1.25       -         50.0",
        "nginx        left out: nginx is not installed",
    ]


def test_table_of_nothing_but_reasons() -> None:
    lines = table(WORKLOAD, [Row("baton", reason="wrk is not installed")]).splitlines()
    assert lines[-1] == "baton   left out: wrk is not installed"


def test_goals_are_ok_missed_or_not_measured() -> None:
    outcomes = [
        Outcome(GOAL, 0.4, 0.3, 0.45),
        Outcome(GOAL, 0.51, 0.5, 0.52),
        Outcome(Goal("RSS, KB", "held", "rss", 20), reason="baton did not run on held"),
    ]
    assert goals_table(outcomes).splitlines() == [
        "goal                                               measured      min-max  verdict",
        "baton, small chat, CPU: at most 0.5 x vllm-router     0.400  0.300-0.450       ok",
        "baton, small chat, CPU: at most 0.5 x vllm-router     0.510  0.500-0.520   missed",
        "baton, RSS, KB: at most 20                         not measured: baton did not run on held",
    ]


def test_document_holds_every_round_and_is_strict_json() -> None:
    document = workload_document(WORKLOAD, ROWS)
    json.dumps(document, allow_nan=False)
    baton, nginx, vllm_router = document["rows"]
    assert baton["figures"]["cpu_us"] == 60
    assert [one["cpu_us"] for one in baton["samples"]] == [50, 70, 60]
    assert nginx == {"router": "nginx", "reason": "nginx is not installed"}
    assert vllm_router["figures"]["p99_ms"] is None


def test_document_of_a_goal_has_its_verdict_or_its_reason() -> None:
    assert outcome_document(Outcome(GOAL, 0.4, 0.3, 0.45))["met"] is True
    assert "met" not in outcome_document(Outcome(GOAL, reason="nothing ran"))
