from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from launch.monitoring.dashboard import OVERVIEW, dashboard, document
from launch.monitoring.queries import queries
from orchestrator.telemetry import catalog
from orchestrator.telemetry.catalog import METRICS, PROCESS_METRICS, Kind, Panel
from tests.launch.monitoring.expressions import declared_series, named_in

PANELS: list[dict[str, Any]] = document()["panels"]
DRAWN = [panel for panel in PANELS if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in DRAWN for target in panel["targets"]]


def test_it_names_metrics_that_there_are() -> None:
    for expression in EXPRESSIONS:
        assert named_in(expression), expression
        assert named_in(expression) <= declared_series(), expression


def test_each_metric_with_a_panel_is_on_it() -> None:
    for metric in (*METRICS, *PROCESS_METRICS):
        if metric.panel is not None:
            [panel] = [panel for panel in DRAWN if panel["title"] == metric.panel.title]
            suffix = "_bucket" if metric.kind is Kind.HISTOGRAM else ""
            named = [named_in(target["expr"]) for target in panel["targets"]]
            found = [names for names in named if metric.name + suffix in names]
            assert len(found) == (2 if suffix else 1), metric.name
            assert metric.help in panel["description"]


def test_panels_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] + place["w"] <= 24
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_each_panel_and_query_has_a_name_of_its_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    titles = [panel["title"] for panel in DRAWN]
    assert len(set(titles)) == len(titles) > len(OVERVIEW)
    for panel in DRAWN:
        refs = [target["refId"] for target in panel["targets"]]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert refs == sorted(set(refs))
        assert len(set(legends)) == len(legends), panel["title"]
        assert all(legends), panel["title"]


def test_variables_choose_series_that_have_their_label() -> None:
    variables = [variable["name"] for variable in document()["templating"]["list"]]
    assert variables == ["datasource", "instance", "model", "worker"]
    for expression in EXPRESSIONS:
        assert 'instance=~"$instance"' in expression
        assert "$" not in expression.replace("$__rate_interval", "").replace("$instance", "").replace(
            "$model", ""
        ).replace("$worker", ""), expression


@pytest.mark.parametrize(
    ("metric", "panel", "expected"),
    [
        (
            catalog.HELD_BYTES,
            Panel("t"),
            ('sum (baton_held_bytes{instance=~"$instance"})', "t"),
        ),
        (
            catalog.KV_TRANSFERS,
            Panel("t", ("outcome",)),
            (
                'sum by (outcome) (rate(baton_kv_transfers_total{instance=~"$instance"}[$__rate_interval]))',
                "{{outcome}}",
            ),
        ),
        (
            catalog.WORKER_STATE,
            Panel("t", ("worker",), "max", 'state="gone"'),
            (
                'max by (worker) (baton_worker_state{instance=~"$instance", model=~"$model", '
                'worker=~"$worker", state="gone"})',
                "{{worker}}",
            ),
        ),
    ],
    ids=["gauge", "counter", "chosen"],
)
def test_a_metric_becomes_a_query(metric: catalog.Metric, panel: Panel, expected: tuple[str, str]) -> None:
    [query] = queries(metric, panel)
    assert (query.expression, query.legend) == expected


def test_a_histogram_becomes_two_lines() -> None:
    middle, high = queries(catalog.DURATION, Panel("t", ("model",)))
    assert middle.expression == (
        "histogram_quantile(0.5, sum by (le, model) (rate(baton_request_duration_seconds_bucket"
        '{instance=~"$instance", model=~"$model"}[$__rate_interval])))'
    )
    assert (middle.legend, high.legend) == ("{{model}} p50", "{{model}} p99")


def test_it_is_json() -> None:
    assert json.loads(dashboard()) == document()
