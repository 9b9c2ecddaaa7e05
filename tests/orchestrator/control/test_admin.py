from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.control.admin import admin_app
from tests.orchestrator.control.fakes import KEY, RING, FakeState, ask


def test_metrics_are_prometheus_text() -> None:
    response = ask(admin_app(FakeState()), "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    [info] = families["baton_info"].samples
    assert info.labels["event_loop"] == "asyncio"
    assert "process_resident_memory_bytes" in families
    assert len(families["baton_worker_in_flight"].samples) == 2


def test_processes_are_listed() -> None:
    answer = ask(admin_app(FakeState()), "/admin/processes").json()
    assert answer == [{"index": 0, "pid": 71, "state": "serving", "in_flight": 5}]


def test_the_index_names_the_pages() -> None:
    text = ask(admin_app(FakeState()), "/").text
    assert "/metrics" in text
    assert "/admin/workers" in text
    assert "/admin/processes" in text


def test_admin_has_no_docs() -> None:
    assert ask(admin_app(FakeState()), "/openapi.json").status_code == 404


@pytest.mark.parametrize("path", ["/", "/metrics", "/admin/workers", "/health"])
def test_nothing_of_the_admin_api_is_open_when_there_are_keys(path: str) -> None:
    app = admin_app(FakeState(keys=RING))
    assert ask(app, path).status_code == 401
    assert ask(app, path, headers=KEY).status_code == (404 if path == "/health" else 200)
