"""Prometheus' own tool tries what we make for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.monitoring.alerts import ALERTS, Alert, rules
from orchestrator.control.admin import admin_app
from orchestrator.telemetry.catalog import METRICS
from tests.monitoring.alert_cases import CASES, Case
from tests.monitoring.programs import promtool
from tests.orchestrator.control.fakes import FakeState, ask

pytestmark = [pytest.mark.prometheus, pytest.mark.processes]
RULES = "alerts.yaml"


def test_the_page_of_metrics_has_no_fault() -> None:
    page = ask(admin_app(FakeState()), "/metrics").text
    assert promtool("check", "metrics", stdin=page) == ""


def test_the_rules_have_no_fault(tmp_path: Path) -> None:
    (tmp_path / RULES).write_text(rules())
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool(
        "check", "rules", "--lint-fatal", RULES, cwd=tmp_path
    )


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_series_as_we_have_them(name: str) -> None:
    for written in (*CASES[name].firing, *CASES[name].quiet):
        series, _, labels = written.partition("{")
        found = [metric for metric in METRICS if series.startswith(metric.name)]
        metric = max(found, key=lambda metric: len(metric.name))
        ours = {*metric.labels, "instance", "job"} | ({"le"} if series.endswith("_bucket") else set())
        assert set(re.findall(r'(\w+)="', labels)) == ours, written


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    assert set(CASES) == {alert.name for alert in ALERTS}
    tests = [test for alert in ALERTS for test in asked_of(alert, CASES[alert.name])]
    asked = {"rule_files": [RULES], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / RULES).write_text(rules())
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(asked))
    assert "SUCCESS" in promtool("test", "rules", "tests.yaml", cwd=tmp_path)


def asked_of(alert: Alert, case: Case) -> Iterator[dict[str, Any]]:
    fired = {"exp_labels": {**case.labels, "severity": alert.severity}, "exp_annotations": told(alert, case)}
    yield one_test(alert, case.firing, case.at, [fired])
    yield one_test(alert, case.quiet, case.at, [])
    if case.before:
        yield one_test(alert, case.firing, case.before, [])


def one_test(
    alert: Alert, samples: dict[str, str], at: str, expected: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": f"{alert.name} at {at}",
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in samples.items()],
        "alert_rule_test": [{"eval_time": at, "alertname": alert.name, "exp_alerts": expected}],
    }


def told(alert: Alert, case: Case) -> dict[str, str]:
    """The annotations, with the labels of the case in them."""
    summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: case.labels[match[1]], alert.summary)
    return {
        "summary": summary,
        "description": f"{alert.meaning} {alert.action}",
        "runbook": alert.anchor,
    }
