"""A comparison becomes a picture: a chart per workload, a point per router with the spread of its rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from bench.shared.charts import draw_point, save_charts

OURS, OTHERS = "#0b6e4f", "#6b7785"


def save_plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """Draw what `report.workload_document` made; the suffix of the path chooses the format."""
    drawn = [workload for workload in workloads if any("figures" in row for row in workload["rows"])]
    save_charts(drawn, _draw, path)


def _draw(axes: Axes, workload: dict[str, Any]) -> None:
    """Show the figure that the workload is about, as points: a logarithmic axis has no zero for bars."""
    key, title = next(iter(workload["columns"].items()))
    rows = [row for row in reversed(workload["rows"]) if "figures" in row]
    for place, row in enumerate(rows):
        _draw_router(axes, place, row, key)
    axes.set_yticks(range(len(rows)), [row["router"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.grid(axis="x", color="#e3e6ea")
    axes.set_title(workload["title"], fontsize=9)
    axes.set_xlabel(f"{title} (logarithmic)", fontsize=8)


def _draw_router(axes: Axes, place: int, row: dict[str, Any], key: str) -> None:
    figure, samples = row["figures"][key], [sample[key] for sample in row["samples"]]
    draw_point(axes, place, figure, samples, OURS if row["router"].startswith("baton") else OTHERS)
    text = f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
    axes.annotate(text, (figure, place), (0, 5), textcoords="offset points", ha="center", fontsize=8)
