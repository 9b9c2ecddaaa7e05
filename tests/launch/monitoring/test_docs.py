from __future__ import annotations

import pytest

from launch.cli import main
from launch.monitoring.command import PRINTED
from orchestrator.compiled import ROOT
from orchestrator.telemetry.catalog import METRICS

COPIES = {
    "docs": "docs/metrics.md",
    "alerts": "docs/monitoring/baton-alerts.yaml",
    "dashboard": "docs/monitoring/baton-dashboard.json",
}


@pytest.mark.parametrize("what", PRINTED)
def test_the_files_are_what_the_command_prints(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", what]) == 0
    assert capsys.readouterr().out == (ROOT / COPIES[what]).read_text(), "run `make metrics`"


def test_the_page_tells_of_each_metric() -> None:
    page = (ROOT / COPIES["docs"]).read_text()
    for metric in METRICS:
        assert page.count(f"| `{metric.name}` |") == 1


@pytest.mark.parametrize("argv", [["metrics"], ["metrics", "graph"]])
def test_what_else_is_asked_for_is_a_usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "docs" in capsys.readouterr().err or argv == ["metrics"]
