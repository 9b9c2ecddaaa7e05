"""A comparison as a picture: a chart per workload, a bar per router, the spread of its rounds as whiskers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS = "#0b6e4f", "#9aa5b1"
COLUMNS = 2


def save_plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """Draw what `report.workload_document` made; the suffix of the path chooses the format."""
    drawn = [workload for workload in workloads if any("figures" in row for row in workload["rows"])]
    if not drawn:
        return
    lines = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for axes, workload in zip(grid, drawn, strict=False):
        _draw(axes, workload)
    for axes in list(grid)[len(drawn) :]:
        axes.set_visible(False)
    figure.savefig(path)


def _draw(axes: Axes, workload: dict[str, Any]) -> None:
    """The figure that the workload is about. Logarithmic: the slowest is hundreds of times the fastest."""
    key, title = next(iter(workload["columns"].items()))
    rows = [row for row in reversed(workload["rows"]) if "figures" in row]
    names = [row["router"] for row in rows]
    figures = [row["figures"][key] for row in rows]
    bars = axes.barh(names, figures, xerr=_whiskers(rows, key), color=list(map(_color, names)), capsize=2)
    axes.bar_label(bars, [f"{figure:,.1f}" for figure in figures], padding=6, fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_title(workload["title"], fontsize=9)
    axes.set_xlabel(f"{title} (logarithmic)", fontsize=8)
    axes.tick_params(labelsize=8)


def _whiskers(rows: list[dict[str, Any]], key: str) -> list[list[float]]:
    """Lengths to the left and to the right of each bar's end."""
    figures = [(row["figures"][key], [sample[key] for sample in row["samples"]]) for row in rows]
    return [
        [middle - min(samples) for middle, samples in figures],
        [max(samples) - middle for middle, samples in figures],
    ]


def _color(router: str) -> str:
    return OURS if router.startswith("baton") else OTHERS
