"""Charts of one picture stand in two columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMNS = 2
T = TypeVar("T")


def save_charts(charts: Sequence[T], draw: Callable[[Axes, T], None], path: Path) -> None:
    """Draw each chart into its axes; the path's suffix is the format. Without charts there is no file."""
    if not charts:
        return
    lines = -(-len(charts) // COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 3.4 * lines), layout="constrained")
    for number, chart in enumerate(charts, start=1):
        axes = figure.add_subplot(lines, COLUMNS, number)
        draw(axes, chart)
        axes.tick_params(which="both", labelsize=8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def draw_point(axes: Axes, place: int, figure: float, samples: Sequence[float], color: str) -> None:
    """Draw a figure with the spread of its samples, on the line `place`."""
    spread = [[figure - min(samples)], [max(samples) - figure]]
    axes.errorbar([figure], [place], xerr=spread, fmt="o", color=color, capsize=3)
