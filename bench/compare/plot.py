"""A comparison as a picture: a chart per workload, a point per router with the spread of its rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS = "#0b6e4f", "#6b7785"
COLUMNS = 2


def save_plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """Draw what `report.workload_document` made; the suffix of the path chooses the format."""
    drawn = [workload for workload in workloads if any("figures" in row for row in workload["rows"])]
    if not drawn:
        return
    lines = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(7 * COLUMNS, 3.2 * lines), layout="constrained")
    for number, workload in enumerate(drawn, start=1):
        _draw(figure.add_subplot(lines, COLUMNS, number), workload)
    figure.savefig(path)


def _draw(axes: Axes, workload: dict[str, Any]) -> None:
    """The figure that the workload is about. Points: a logarithmic axis has no zero for bars to start at."""
    key, title = next(iter(workload["columns"].items()))
    rows = [row for row in reversed(workload["rows"]) if "figures" in row]
    for place, row in enumerate(rows):
        _draw_router(axes, place, row, key)
    axes.set_yticks(range(len(rows)), [row["router"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.grid(axis="x", color="#e3e6ea")
    axes.set_axisbelow(True)
    axes.set_title(workload["title"], fontsize=9)
    axes.set_xlabel(f"{title} (logarithmic)", fontsize=8)
    axes.tick_params(which="both", labelsize=8)


def _draw_router(axes: Axes, place: int, row: dict[str, Any], key: str) -> None:
    figure, samples = row["figures"][key], [sample[key] for sample in row["samples"]]
    spread = [[figure - min(samples)], [max(samples) - figure]]
    color = OURS if row["router"].startswith("baton") else OTHERS
    axes.errorbar([figure], [place], xerr=spread, fmt="o", color=color, capsize=3)
    text = f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
    axes.annotate(text, (figure, place), (0, 5), textcoords="offset points", ha="center", fontsize=8)
