"""A comparison is shown to people as text, and to programs as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.compare.comparison import Row
from bench.compare.goals import Outcome
from bench.compare.workloads import Workload
from bench.shared.figures import Column, aligned, spread, without_nan


def over_rounds(column: Column, row: Row) -> float:
    """Return the figure that stands for all rounds; NaN if a round has none."""
    figures = [sample[column.key] for sample in row.samples]
    if any(map(math.isnan, figures)):
        return math.nan
    return max(figures) if column.over_rounds == "max" else statistics.median(figures)


def table(workload: Workload, rows: Sequence[Row]) -> str:
    """Show the workload's title and a line per router: its figures, or its reason.

    The spread, smallest to largest of the rounds, is that of the first column.
    """
    columns = workload.measure.columns
    head = ["router", columns[0].title, "min-max", *(column.title for column in columns[1:])]
    lines = [_cells(columns, row) for row in rows if row.reason is None]
    left_out = {row.router: f"left out: {row.reason}" for row in rows if row.reason}
    return "\n".join([workload.title, "", *aligned([head, *lines], left_out)])


def _cells(columns: list[Column], row: Row) -> list[str]:
    first, *others = (column.show(over_rounds(column, row)) for column in columns)
    figures = [sample[columns[0].key] for sample in row.samples]
    return [row.router, first, spread(figures, columns[0].digits), *others]


def goals_table(outcomes: Sequence[Outcome]) -> str:
    lines = [_goal_cells(one) for one in outcomes if one.reason is None]
    remarks = {one.goal.text: f"not measured: {one.reason}" for one in outcomes if one.reason}
    return "\n".join(aligned([["goal", "measured", "min-max", "verdict"], *lines], remarks))


def _goal_cells(outcome: Outcome) -> list[str]:
    between = spread([outcome.low, outcome.high], 3)
    return [outcome.goal.text, f"{outcome.measured:.3f}", between, "ok" if outcome.is_met else "missed"]


def workload_document(workload: Workload, rows: Sequence[Row]) -> dict[str, Any]:
    columns = workload.measure.columns
    return {
        "name": workload.name,
        "title": workload.title,
        "columns": {column.key: column.title for column in columns},
        "rows": [_row_document(columns, row) for row in rows],
    }


def _row_document(columns: list[Column], row: Row) -> dict[str, Any]:
    if row.reason:
        return {"router": row.router, "reason": row.reason}
    figures = {column.key: over_rounds(column, row) for column in columns}
    samples = [without_nan(sample) for sample in row.samples]
    return {"router": row.router, "figures": without_nan(figures), "samples": samples}


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    document = {"goal": outcome.goal.text, "limit": outcome.goal.limit}
    if outcome.reason:
        return {**document, "reason": outcome.reason}
    measured = {"measured": outcome.measured, "low": outcome.low, "high": outcome.high}
    return {**document, **measured, "met": outcome.is_met}
