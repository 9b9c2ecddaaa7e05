"""A comparison as text for people and as JSON for programs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.compare.comparison import Row
from bench.compare.goals import Outcome
from bench.compare.measures import Column
from bench.compare.workloads import Workload


def over_rounds(column: Column, row: Row) -> float:
    """The figure that stands for all rounds; NaN if a round has none."""
    figures = [sample[column.key] for sample in row.samples]
    if any(map(math.isnan, figures)):
        return math.nan
    return max(figures) if column.over_rounds == "max" else statistics.median(figures)


def table(workload: Workload, rows: Sequence[Row]) -> str:
    """The workload's title and a line per router: its figures, or its reason.

    The spread, smallest to largest of the rounds, is that of the first column.
    """
    columns = workload.measure.columns
    head = ["router", columns[0].title, "min-max", *(column.title for column in columns[1:])]
    lines = [_cells(columns, row) for row in rows if row.reason is None]
    left_out = {row.router: f"left out: {row.reason}" for row in rows if row.reason}
    return "\n".join([workload.title, "", *_aligned([head, *lines], left_out)])


def _cells(columns: list[Column], row: Row) -> list[str]:
    first, *others = columns
    figures = [sample[first.key] for sample in row.samples]
    spread = f"{min(figures):.{first.digits}f}-{max(figures):.{first.digits}f}"
    return [row.router, _figure(first, row), spread, *(_figure(column, row) for column in others)]


def _figure(column: Column, row: Row) -> str:
    figure = over_rounds(column, row)
    return "-" if math.isnan(figure) else f"{figure:,.{column.digits}f}"


def _aligned(lines: list[list[str]], remarks: Mapping[str, str]) -> list[str]:
    """Names to the left, figures to the right; then names that have a remark instead of figures."""
    first = max(map(len, [*remarks, *(line[0] for line in lines)]))
    widths = [max(map(len, cells)) for cells in zip(*(line[1:] for line in lines), strict=True)]
    return [
        *("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]) for line in lines),
        *(f"{name.ljust(first)}  {remark}" for name, remark in remarks.items()),
    ]


def goals_table(outcomes: Sequence[Outcome]) -> str:
    lines = [_goal_cells(one) for one in outcomes if one.reason is None]
    remarks = {one.goal.text: f"not measured: {one.reason}" for one in outcomes if one.reason}
    return "\n".join(_aligned([["goal", "measured", "min-max", "verdict"], *lines], remarks))


def _goal_cells(outcome: Outcome) -> list[str]:
    spread = f"{outcome.low:.3f}-{outcome.high:.3f}"
    return [outcome.goal.text, f"{outcome.measured:.3f}", spread, "ok" if outcome.is_met else "missed"]


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
    figures = {column.key: _number(over_rounds(column, row)) for column in columns}
    samples = [{key: _number(figure) for key, figure in sample.items()} for sample in row.samples]
    return {"router": row.router, "figures": figures, "samples": samples}


def outcome_document(outcome: Outcome) -> dict[str, Any]:
    document = {"goal": outcome.goal.text, "limit": outcome.goal.limit}
    if outcome.reason:
        return {**document, "reason": outcome.reason}
    measured = {"measured": outcome.measured, "low": outcome.low, "high": outcome.high}
    return {**document, **measured, "met": outcome.is_met}


def _number(figure: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(figure) else figure
