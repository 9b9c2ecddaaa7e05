"""The transport study becomes a picture: costs as curves over the size of the prompt, streams as points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes

from bench.shared.charts import draw_point, save_charts
from bench.transport.rounds import Panel

# By arm, so that one has the same colour in every chart; the A/A pair is drawn with one colour.
COLORS = {
    "json": "#6b7785",
    "json again": "#6b7785",
    "orjson": "#c7762b",
    "msgpack": "#0b6e4f",
    "json, ids as list": "#a3adb8",
    "orjson, ids as base64": "#e5b98a",
    "msgpack, ids as bin": "#4fb892",
    "http": "#6b7785",
    "http again": "#6b7785",
    "mux": "#0b6e4f",
}
OTHER = "#b03a48"


def save_plot(panels: Sequence[Panel], path: Path) -> None:
    """Draw all panels; the suffix of the path chooses the format."""
    save_charts([list(group) for _, group in groupby(sorted(panels, key=_place), _place)], _draw, path)


def _draw(axes: Axes, panels: list[Panel]) -> None:
    _draw_curves(axes, panels) if len(panels) > 1 else _draw_points(axes, panels[0])
    axes.grid(color="#e3e6ea")


def _place(panel: Panel) -> tuple[str, str]:
    return panel.section, panel.series


def _draw_curves(axes: Axes, panels: Sequence[Panel]) -> None:
    """Draw panels that differ in the size only."""
    first = panels[0]
    column = first.columns[0]
    for arm in first.rows:
        sizes = [panel.size for panel in panels]
        figures = [panel.median(arm, column.key) for panel in panels]
        style = "--" if "ids as" in arm else "-"
        axes.plot(sizes, figures, style, marker=".", color=COLORS.get(arm, OTHER), label=arm)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(f"{first.section}: {first.series}", fontsize=9)
    axes.set_xlabel(first.unit, fontsize=8)
    axes.set_ylabel(column.title, fontsize=8)
    axes.legend(fontsize=7)


def _draw_points(axes: Axes, panel: Panel) -> None:
    """Draw medians with the spread of the rounds."""
    column = panel.columns[0]
    arms = list(reversed(panel.rows))
    for place, arm in enumerate(arms):
        color = COLORS.get(arm, OTHER)
        draw_point(axes, place, panel.median(arm, column.key), panel.spread(arm, column.key), color)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xlim(left=0)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(column.title, fontsize=8)
