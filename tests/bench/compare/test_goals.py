from __future__ import annotations

import pytest

from bench.compare.comparison import Row
from bench.compare.goals import GOALS, Goal, Outcome, outcome
from bench.compare.routers import ROUTERS
from bench.compare.workloads import WORKLOADS

GOAL = Goal("small chat, CPU", "small", "cpu_us", 0.5, "vllm-router")


def row(router: str, *figures: float, reason: str | None = None) -> Row:
    return Row(router, [{"cpu_us": figure} for figure in figures], reason)


def judged(goal: Goal, *rows: Row) -> Outcome:
    return outcome(goal, {"small": {row.router: row for row in rows}})


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The medians' ratio would be 50 / 200: rounds are compared with their neighbours.
    result = judged(GOAL, row("baton", 40, 50, 90), row("vllm-router", 100, 200, 300))
    assert (result.measured, result.low, result.high) == (0.3, 0.25, 0.4)
    assert result.is_met


def test_goal_is_missed_above_its_limit() -> None:
    assert not judged(GOAL, row("baton", 51), row("vllm-router", 100)).is_met


@pytest.mark.parametrize(("is_strict", "is_met"), [(False, True), (True, False)])
def test_limit_itself_is_met_unless_below_is_asked_for(is_strict: bool, is_met: bool) -> None:
    goal = Goal("RSS", "small", "cpu_us", 1, "vllm-router", is_strict=is_strict)
    assert judged(goal, row("baton", 7), row("vllm-router", 7)).is_met is is_met


def test_goal_without_another_router_is_the_figure_itself() -> None:
    result = judged(Goal("RSS per open stream, KB", "small", "cpu_us", 20), row("baton", 18, 19, 21))
    assert (result.measured, result.is_met) == (19, True)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("baton", 1)], "vllm-router did not run on small"),
        ([row("vllm-router", 1)], "baton did not run on small"),
        ([row("baton", 1), row("vllm-router", reason="HTTP 500")], "vllm-router: HTTP 500"),
    ],
)
def test_goal_without_figures_has_a_reason_and_is_not_met(rows: list[Row], reason: str) -> None:
    result = judged(GOAL, *rows)
    assert result.reason == reason
    assert not result.is_met


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_goals_speak_of_what_is_measured(goal: Goal) -> None:
    workload = next(workload for workload in WORKLOADS if workload.name == goal.workload)
    assert goal.figure in [column.key for column in workload.measure.columns]
    assert {goal.ours, goal.other or goal.ours} <= {router.name for router in ROUTERS}


def test_every_goal_but_that_of_processes_is_one_of_both_forms() -> None:
    assert {goal.ours for goal in GOALS} == {
        "baton",
        "baton-mux",
        "baton-compiled",
        "baton-mux-compiled",
        "baton-2-processes",
    }
