"""What was found is printed as a table for people, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from launch.simulate.figures import SPREAD, Figures

# Heading, figure, digits behind the point, times so much.
COLUMNS: Final[tuple[tuple[str, str, int, float], ...]] = (
    ("TTFT p50 s", "ttft_p50_s", 3, 1.0),
    ("p90", "ttft_p90_s", 2, 1.0),
    ("p99", "ttft_p99_s", 2, 1.0),
    ("TPOT p99 ms", "tpot_p99_s", 1, 1e3),
    ("cached", "cached_ratio", 3, 1.0),
    ("whole", "whole", 2, 1.0),
    ("refused", "refused", 0, 1.0),
    ("imbalance", "imbalance", 2, 1.0),
    ("good", "good", 3, 1.0),
)


def as_json(value: Any) -> str:
    """JSON has no NaN: what is unknown is null."""
    return json.dumps(_known(value), indent=2)


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _known(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def as_table(found: Mapping[str, Figures]) -> str:
    """Return a row for each variant; the spread stands behind the value."""
    rows = [["", *(heading for heading, *_ in COLUMNS)]]
    rows += [[name, *(_cell(figures, *column[1:]) for column in COLUMNS)] for name, figures in found.items()]
    return aligned(rows)


def _cell(figures: Figures, name: str, digits: int, factor: float) -> str:
    value = figures[name]
    if math.isnan(value):
        return "-"
    spread = figures.get(name + SPREAD)
    text = f"{value * factor:.{digits}f}"
    return text if spread is None else f"{text} ±{spread * factor:.{digits}f}"


def aligned(rows: list[list[str]]) -> str:
    """Return the rows with their columns under each other, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
