"""A metric of the catalog becomes the queries (PromQL) that draw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orchestrator.telemetry.catalog import Kind, Metric, Panel

INTERVAL: Final = "$__rate_interval"  # Grafana knows how often Prometheus scrapes
QUANTILES: Final = (0.5, 0.99)
# The dashboard's variables, by the label that each chooses values of.
VARIABLES: Final = {"instance": "$instance", "model": "$model", "worker": "$worker"}


@dataclass(frozen=True, slots=True)
class Query:
    """A query is one or more lines on a panel; `legend` names each by its labels."""

    expression: str
    legend: str


def selected(metric: Metric, suffix: str = "", only: str = "") -> str:
    """Return the series that the dashboard's variables choose; `only` are more matchers of labels."""
    labels = [label for label in VARIABLES if label == "instance" or label in metric.labels]
    matchers = [f'{label}=~"{VARIABLES[label]}"' for label in labels]
    return f"{metric.name}{suffix}{{{', '.join([*matchers, only] if only else matchers)}}}"


def rate(metric: Metric, suffix: str = "", only: str = "") -> str:
    return f"rate({selected(metric, suffix, only)}[{INTERVAL}])"


def quantile(part: float, metric: Metric, by: tuple[str, ...] = ()) -> str:
    """Return what `part` of a histogram's observations are below."""
    labels = ", ".join(("le", *by))
    return f"histogram_quantile({part:g}, sum by ({labels}) ({rate(metric, '_bucket')}))"


def queries(metric: Metric, panel: Panel, name: str = "") -> list[Query]:
    """Return those of a metric's panel; `name` tells it from others there."""
    if metric.kind is Kind.HISTOGRAM:
        return [
            Query(quantile(part, metric, panel.by), _legend(name, panel, f"p{100 * part:g}"))
            for part in QUANTILES
        ]
    is_counter = metric.kind is Kind.COUNTER
    series = rate(metric, only=panel.only) if is_counter else selected(metric, only=panel.only)
    labels = f" by ({', '.join(panel.by)})" if panel.by else ""
    return [Query(f"{panel.combine}{labels} ({series})", _legend(name, panel))]


def _legend(name: str, panel: Panel, quantile: str = "") -> str:
    words = (name, *(f"{{{{{label}}}}}" for label in panel.by), quantile)
    return " ".join(filter(None, words)) or panel.title
