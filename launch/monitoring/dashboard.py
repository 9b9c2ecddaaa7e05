"""A dashboard of Grafana is made of the catalog: a row per group, a panel per title."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from launch.monitoring.queries import VARIABLES, Query, quantile, queries, rate, selected
from orchestrator.telemetry import catalog
from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, Group, Kind, Metric

Json = dict[str, Any]

_WIDTH: Final = 24  # of Grafana's grid
_ACROSS: Final = 3  # panels beside each other
_HEIGHT: Final = 8
_SMALL: Final = 4  # the height of a number by itself
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_UNITS: Final = {"seconds": "s", "bytes": "bytes"}  # Grafana's names; others are plain numbers
_ALL: Final = {"selected": True, "text": "All", "value": "$__all"}


@dataclass(frozen=True, slots=True)
class Number:
    """A number by itself, at the top: what it all comes to."""

    title: str
    expression: str
    unit: str = "short"


def _share(part: str, whole: str) -> str:
    """Return a ratio that is 0 where there is nothing."""
    return f"sum({part}) / clamp_min(sum({whole}), 1e-9)"


_NOT_READY: Final = selected(catalog.WORKERS, only='state!="ready"')
OVERVIEW: Final = (
    Number("All requests per second", f"sum({rate(catalog.REQUESTS)})"),
    Number(
        "Share of 5xx",
        _share(rate(catalog.REQUESTS, only='code=~"5.."'), rate(catalog.REQUESTS)),
        "percentunit",
    ),
    Number("Time to first token, p99", quantile(0.99, catalog.FIRST_TOKEN), "s"),
    Number("Time between tokens, p50", quantile(0.5, catalog.INTER_TOKEN), "s"),
    Number("All generated tokens per second", f"sum({rate(catalog.GENERATION_TOKENS)})"),
    Number(
        "Decode seats in use",
        _share(selected(catalog.WORKER_IN_FLIGHT, only='role!="prefill"'), selected(catalog.WORKER_SEATS)),
        "percentunit",
    ),
    Number("All workers that are not ready", f"sum({_NOT_READY})"),
    Number(
        "KV caches computed again",
        _share(rate(catalog.KV_TRANSFERS, only='outcome="recomputed"'), rate(catalog.KV_TRANSFERS)),
        "percentunit",
    ),
    Number("TLS certificate expires in", f"min({selected(catalog.CERTIFICATE)}) - time()", "s"),
)


def dashboard() -> str:
    """Return the dashboard as JSON, to be imported."""
    return json.dumps(document(), indent=2) + "\n"


def document() -> Json:
    return {
        "uid": "baton",
        "title": "Baton",
        "tags": ["baton", "llm"],
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "10s",
        "schemaVersion": 38,
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_variable(), *map(_variable, VARIABLES)]},
        "panels": _numbered(list(_panels())),
    }


# --- variables ----------------------------------------------------------------------------------


def _source_variable() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str) -> Json:
    """Let whoever looks choose values of a label."""
    metric = catalog.REQUESTS_IN_FLIGHT if label != "worker" else catalog.WORKER_IN_FLIGHT
    query = f"label_values({metric.name}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "includeAll": True,
        "multi": True,
        "current": _ALL,
        "refresh": 2,  # whenever the range of time changes
        "sort": 1,
    }


# --- panels -------------------------------------------------------------------------------------


def _panels() -> Iterator[Json]:
    """Yield all panels from the top down, each at its place."""
    top = 0
    for title, panels, height, across in _rows():
        yield {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, top)}
        top += 1
        for index, panel in enumerate(panels):
            width = _WIDTH // across
            line, column = divmod(index, across)
            place = {"x": column * width, "y": top + line * height, "w": width, "h": height}
            yield panel | {"gridPos": place}
        top += -(-len(panels) // across) * height


def _rows() -> Iterator[tuple[str, list[Json], int, int]]:
    """Yield title, panels, their height and how many are beside each other."""
    yield "Overview", [_number(number) for number in OVERVIEW], _SMALL, _ACROSS
    for group in Group:
        titled: dict[str, list[Metric]] = {}
        for metric in (*METRICS, *PROCESS_METRICS):
            if metric.group is group and metric.panel is not None:
                titled.setdefault(metric.panel.title, []).append(metric)
        yield group.value, [_graph(title, metrics) for title, metrics in titled.items()], _HEIGHT, _ACROSS


def _at(x: int, y: int) -> Json:
    return {"x": x, "y": y, "w": _WIDTH, "h": 1}


def _number(number: Number) -> Json:
    target = _target(0, Query(number.expression, number.title))
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {"type": "stat", "options": options, **_common(number.title, number.unit, [target])}


def _graph(title: str, metrics: Sequence[Metric]) -> Json:
    found: list[Query] = []
    for metric in metrics:
        if metric.panel is not None:
            found += queries(metric, metric.panel, _short(metric) if len(metrics) > 1 else "")
    targets = [_target(index, query) for index, query in enumerate(found)]
    options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    common = _common(title, _unit(metrics[0]), targets)
    return {"type": "timeseries", "description": _description(metrics), "options": options, **common}


def _common(title: str, unit: str, targets: list[Json]) -> Json:
    defaults = {"unit": unit, "min": 0}
    return {
        "title": title,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _target(index: int, query: Query) -> Json:
    return {
        "refId": chr(ord("A") + index),
        "datasource": _SOURCE,
        "editorMode": "code",
        "expr": query.expression,
        "legendFormat": query.legend,
        "range": True,
    }


def _short(metric: Metric) -> str:
    """Return a metric's name without what all have."""
    name = metric.name.removeprefix("baton_").removesuffix("_total")
    return name.replace("_", " ")


def _unit(metric: Metric) -> str:
    return "short" if metric.kind is Kind.COUNTER else _UNITS.get(metric.unit, "short")


def _description(metrics: Sequence[Metric]) -> str:
    return "\n\n".join(f"{metric.name}: {metric.help}" for metric in metrics)


def _numbered(panels: Sequence[Json]) -> list[Json]:
    return [{"id": number, **panel} for number, panel in enumerate(panels, 1)]
