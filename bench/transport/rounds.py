"""A panel holds the rounds of one question of the transport study, and tells what is noise in them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from bench.shared.figures import Column, Sample, aligned, without_nan
from bench.transport.legs import AGAIN, BASE

FEWEST_ROUNDS = 4  # that say what is noise


@dataclass(frozen=True)
class Panel:
    """One question has a row of samples for each arm, all taken in the same rounds.

    It is about the first column. Panels that differ in the size only, such as that of the prompt, are one
    curve. The arm `base` is what the others are compared with; `compared` are the columns whose ratios are
    shown.
    """

    section: str
    series: str
    size: int
    columns: list[Column]
    rows: dict[str, list[Sample]]  # by the arm's name
    unit: str = "tokens"
    base: str = BASE.name
    compared: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.section}: {self.series}, {self.size:,} {self.unit}"

    def median(self, arm: str, key: str) -> float:
        return statistics.median(self._present(arm, key))

    def spread(self, arm: str, key: str) -> tuple[float, float]:
        figures = self._present(arm, key)
        return min(figures), max(figures)

    def is_beyond_noise(self, arm: str, key: str) -> bool:
        """Say whether the ratios to the base, round by round, all lie outside those of the base to itself.

        With five rounds, chance alone does that once in about 126 figures.
        """
        again = self.base + AGAIN
        if arm in (self.base, again) or len(self.rows.get(again, [])) < FEWEST_ROUNDS:
            return False
        noise, found = [*self.ratios(again, key), 1.0], self.ratios(arm, key)
        return min(found) > max(noise) or max(found) < min(noise)

    def document(self) -> dict[str, Any]:
        return {
            "section": self.section,
            "series": self.series,
            "size": self.size,
            "unit": self.unit,
            "columns": {column.key: column.title for column in self.columns},
            "ratios": {
                key: {arm: self.ratios(arm, key) for arm in self.rows if arm != self.base}
                for key in self.compared
            },
            "rows": {arm: [without_nan(sample) for sample in rows] for arm, rows in self.rows.items()},
            "beyond_noise": {
                arm: [column.key for column in self.columns if self.is_beyond_noise(arm, column.key)]
                for arm in self.rows
            },
        }

    def _present(self, arm: str, key: str) -> list[float]:
        """Return the figures of those rounds that have one; NaN if none has."""
        return [figure for figure in self._figures(arm, key) if not math.isnan(figure)] or [math.nan]

    def _figures(self, arm: str, key: str) -> list[float]:
        return [sample[key] for sample in self.rows[arm]]

    def ratios(self, arm: str, key: str) -> list[float]:
        """Return the ratios to the base, round by round."""
        pairs = zip(self._figures(arm, key), self._figures(self.base, key), strict=True)
        return [mine / base if base else 1.0 for mine, base in pairs]


def table(panel: Panel) -> str:
    """Show a line per arm, medians of the rounds; * marks what lies beyond the noise, the A/A pair.

    The spread, smallest to largest of the rounds, is that of the first column.
    """
    has_rounds = any(len(samples) > 1 for samples in panel.rows.values())
    head = ["", *(column.title for column in panel.columns)]
    lines = [head, *([arm, *(_marked(panel, arm, column) for column in panel.columns)] for arm in panel.rows)]
    if has_rounds:
        spreads = ["min-max", *(_spread(panel, arm) for arm in panel.rows)]
        lines = [[*line[:2], between, *line[2:]] for line, between in zip(lines, spreads, strict=True)]
    return "\n".join([panel.title, "", *aligned(lines), *_ratio_lines(panel)])


def _ratio_lines(panel: Panel) -> list[str]:
    """Tell the ratios that the panel shows: median, smallest and largest of the rounds' ratios."""
    titles = {column.key: column.title for column in panel.columns}
    return [
        f"{arm}: {titles[key]}: {_ratio(panel.ratios(arm, key))} x {panel.base}"
        for key in panel.compared
        for arm in panel.rows
        if arm != panel.base
    ]


def _ratio(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def _marked(panel: Panel, arm: str, column: Column) -> str:
    mark = "*" if panel.is_beyond_noise(arm, column.key) else " "
    return column.show(panel.median(arm, column.key)) + mark


def _spread(panel: Panel, arm: str) -> str:
    first = panel.columns[0]
    return "-".join(map(first.show, panel.spread(arm, first.key)))
