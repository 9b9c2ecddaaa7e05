"""Figures are taken in rounds, become one over all rounds, and are shown in tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Sample = Mapping[str, float]  # by column key
T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A figure of a sample. `over_rounds` says how the rounds become one."""

    key: str
    title: str
    digits: int
    over_rounds: Literal["median", "max"] = "median"

    def show(self, figure: float) -> str:
        """Write the figure with the column's digits; NaN, where there is none, becomes a dash."""
        return "-" if math.isnan(figure) else f"{figure:,.{self.digits}f}"


def in_rounds(names: Sequence[str], rounds: int, sample: Callable[[str], T]) -> dict[str, list[T]]:
    """Sample each once per round, each round beginning with another: what disturbs one disturbs all."""
    rows: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            rows[name].append(sample(name))
    return rows


def spread(figures: Sequence[float], digits: int) -> str:
    return f"{min(figures):.{digits}f}-{max(figures):.{digits}f}"


def percentile(figures: Sequence[float], share: float) -> float:
    """Return the figure that this share of all does not exceed; NaN of none."""
    ordered = sorted(figures)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else math.nan


def aligned(lines: Sequence[Sequence[str]], remarks: Mapping[str, str] | None = None) -> list[str]:
    """Put names to the left and figures to the right; `remarks` follow, with text in place of figures."""
    remarks = remarks or {}
    first = max(map(len, [*remarks, *(line[0] for line in lines)]))
    widths = [max(map(len, cells)) for cells in zip(*(line[1:] for line in lines), strict=True)]
    return [
        *("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]).rstrip() for line in lines),
        *(f"{name.ljust(first)}  {remark}" for name, remark in remarks.items()),
    ]


def without_nan(sample: Sample) -> dict[str, float | None]:
    """JSON has no NaN, which stands for a figure that there is none of."""
    return {key: None if math.isnan(figure) else figure for key, figure in sample.items()}
