from __future__ import annotations

import re

import pytest
import yaml

from launch.monitoring.alerts import ALERTS, Alert, rules
from orchestrator.compiled import ROOT
from orchestrator.telemetry.catalog import METRICS
from tests.launch.monitoring.expressions import declared_series, named_in

DURATION = re.compile(r"\d+[smhd]")
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


@each_alert
def test_an_alert_looks_at_metrics_that_there_are(alert: Alert) -> None:
    named = named_in(alert.expression)
    assert named
    assert named <= declared_series()
    assert {metric.name for metric in alert.metrics()} <= {metric.name for metric in METRICS}
    assert list(alert.metrics())


@each_alert
def test_an_alert_says_what_to_do(alert: Alert) -> None:
    assert DURATION.fullmatch(alert.wait)
    assert alert.severity in ("warning", "critical")
    assert "{{ $labels." in alert.summary
    assert not alert.summary.endswith(".")
    assert alert.meaning.endswith(".")
    assert alert.action.endswith(".")


@each_alert
def test_what_to_do_is_in_the_docs_under_its_name(alert: Alert) -> None:
    path, _, anchor = alert.anchor.partition("#")
    headings = re.findall(r"^### (.+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_no_two_alerts_have_one_name() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def test_the_rules_have_all_that_an_alert_says() -> None:
    [group] = yaml.safe_load(rules())["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [alert.name for alert in ALERTS]
    first, alert = group["rules"][0], ALERTS[0]
    assert (first["expr"], first["for"]) == (alert.expression, alert.wait)
    assert first["labels"] == {"severity": alert.severity}
    assert first["annotations"]["runbook"] == f"docs/metrics.md#{alert.name.lower()}"
