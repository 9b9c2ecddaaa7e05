"""Results as a picture. matplotlib comes with the extra `bench` and is imported here only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.bench.compare import name_of
from launch.bench.errors import BenchError, WrongUsage
from launch.bench.results import NAMES, QUANTILES, AbResult, Result, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: str) -> None:
    """Before anything is measured: that `path` can be drawn to. Raises `WrongUsage`."""
    if Path(path).suffix not in SUFFIXES:
        raise WrongUsage(f"{path}: a plot ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise WrongUsage("--plot needs matplotlib: pip install matplotlib") from error


def plot(result: Result | AbResult, path: str) -> None:
    """Draw to a file. Raises `BenchError`."""
    figure = _ab_figure(result) if isinstance(result, AbResult) else _figure(result)
    try:
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from error


def _figure(result: Result) -> Figure:
    by_workload: dict[str, list[Step]] = {}
    for step in result.steps:
        by_workload.setdefault(step.workload, []).append(step)
    has_loads = any(len(steps) > 1 for steps in by_workload.values())
    figure = _new_figure(3, f"{result.setup.model} at {result.url}")
    axes = figure.subplots(1, 3)
    draw = _draw_loads if has_loads else _draw_quantiles
    for number, steps in enumerate(by_workload.values()):
        draw(axes, sorted(steps, key=lambda step: step.load.value), f"C{number}")
    for each in axes:
        each.grid(alpha=0.3)
        each.set_ylim(bottom=0)
        if each.lines:
            each.legend(fontsize="small")
    return figure


def _draw_quantiles(axes: Sequence[Axes], steps: Sequence[Step], color: str) -> None:
    """How each latency is distributed."""
    for each, name in zip(axes, ("ttft", "itl", "e2e"), strict=True):
        each.set(xlabel="percentile", ylabel=f"{NAMES[name]}, ms")
        for step in steps:
            if spread := step.times.get(name):
                values = [getattr(spread, quantile) for quantile in QUANTILES]
                percents = [share * 100 for share in QUANTILES.values()]
                each.plot(percents, values, marker=".", color=color, label=name_of(step))


def _draw_loads(axes: Sequence[Axes], steps: Sequence[Step], color: str) -> None:
    """How latency and goodput change with load."""
    loads, workload = [step.load.value for step in steps], steps[0].workload
    panels = {
        "TTFT, ms": {quantile: _times(steps, "ttft", quantile) for quantile in ("p50", "p99")},
        "ITL, ms": {quantile: _times(steps, "itl", quantile) for quantile in ("p50", "p99")},
        "requests per second": {
            "answered": [step.rate for step in steps],
            "good": [step.goodput for step in steps],
        },
    }
    for each, (label, lines) in zip(axes, panels.items(), strict=True):
        each.set(xlabel=steps[0].load.unit, ylabel=label)
        for style, (name, values) in zip(("-", "--"), lines.items(), strict=True):
            each.plot(loads, values, style, color=color, marker=".", label=f"{workload} {name}")


def _times(steps: Sequence[Step], name: str, quantile: str) -> list[float]:
    """NaN, which leaves a hole in the line, where nothing was measured."""
    return [float(getattr(step.times.get(name), quantile, "nan")) for step in steps]


def _ab_figure(result: AbResult) -> Figure:
    """One panel per workload; the grey bars are the noise."""
    workloads = list(dict.fromkeys(ratio.workload for ratio in result.ratios))
    number = max(1, len(workloads))
    figure = _new_figure(number, f"{result.study}, ratios to {next(iter(result.arms))}")
    panels = figure.subplots(1, number, squeeze=False)[0]
    for panel, workload in zip(panels, workloads, strict=False):
        panel.set_title(workload)
        panel.axvline(1.0, color="black", linewidth=0.5)
        _draw_ratios(panel, result, workload)
    return figure


def _draw_ratios(panel: Axes, result: AbResult, workload: str) -> None:
    found = [ratio for ratio in result.ratios if ratio.workload == workload]
    labels = [f"{ratio.arm}: {ratio.metric}" for ratio in found]
    places = range(len(found))
    noise = [ratio.noise_high - ratio.noise_low for ratio in found]
    panel.barh(places, noise, left=[ratio.noise_low for ratio in found], color="lightgrey")
    below = [ratio.median - ratio.low for ratio in found]
    above = [ratio.high - ratio.median for ratio in found]
    panel.errorbar([ratio.median for ratio in found], places, xerr=[below, above], fmt=".")
    panel.set_yticks(places, labels, fontsize="small")
    panel.invert_yaxis()


def _new_figure(panels: int, title: str) -> Figure:
    """Without pyplot, which would look for a screen and keep every figure."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(5 * panels, 4.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure  # type: ignore[no-any-return]
