from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from fastapi import FastAPI

from orchestrator.config.base import Model
from orchestrator.control.admin import admin_app
from orchestrator.control.pages import guarded
from orchestrator.control.public import control_app
from tests.orchestrator.control.fakes import FakeState, ask, error_code

Build = Callable[["FakeState"], FastAPI]


@pytest.mark.parametrize("path", ["/", "/nothing", "/health//", "/v1//models", "/redoc", "/metrics", "/v1"])
def test_what_does_not_exist_is_an_openai_error(path: str) -> None:
    response = ask(control_app(FakeState()), path)
    assert response.status_code == 404
    assert error_code(response) in ("not_found", "model_not_found")


def test_below_messages_it_is_one_of_anthropics() -> None:
    path = "/v1/messages/batches"
    response = ask(control_app(FakeState()), path, "POST")
    assert response.status_code == 404
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "not_found_error")
    assert path in error["error"]["message"]


def test_a_method_that_is_not_served_is_405_with_those_that_are() -> None:
    response = ask(control_app(FakeState()), "/v1/models", "POST")
    assert (response.status_code, error_code(response)) == (405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_a_bug_of_ours_is_a_500_with_an_id_and_a_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeState):
        def model_problems(self) -> Mapping[str, str | None]:
            raise RuntimeError("details that a client must not see")

    response = ask(control_app(Broken()), "/ready", headers={"x-request-id": "mine"})
    assert (response.status_code, error_code(response)) == (500, "internal_error")
    assert "details" not in response.text
    assert response.headers["x-request-id"] == "mine"
    [record] = caplog.records
    assert "mine" in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize("build", [control_app, admin_app])
@pytest.mark.parametrize("path", ["/health", "/nothing", "/metrics"])
def test_every_answer_has_an_id(build: Build, path: str) -> None:
    app = build(FakeState())
    assert ask(app, path, headers={"x-request-id": "a.B-1"}).headers["x-request-id"] == "a.B-1"
    fresh = [ask(app, path, headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b")]
    assert all(one.startswith("req-") for one in fresh)
    assert len(set(fresh)) == 2


class _Wanted(Model):
    count: int


@pytest.mark.parametrize(
    ("query", "body", "said", "param"),
    [
        ("after=x", {"count": 1}, "query.after: Input should be a valid integer", "query.after"),
        ("", {"count": 1}, "query.after: Field required", "query.after"),
        ("after=1", {"count": "x"}, "body.count: Input should be a valid integer", "body.count"),
        ("after=1", {"count": 1, "x": 1}, "body.x: Extra inputs are not permitted", "body.x"),
    ],
)
def test_what_fastapi_finds_wrong_is_an_error_of_ours(
    query: str, body: object, said: str, param: str
) -> None:
    app, state = FastAPI(), FakeState()

    async def page(after: int, wanted: _Wanted) -> None: ...

    app.add_api_route("/page", page, methods=["POST"])
    response = ask(guarded(app, state, is_open=lambda scope: True), f"/page?{query}", "POST", body=body)
    assert (response.status_code, error_code(response)) == (400, "invalid_request")
    error = response.json()["error"]
    assert error["message"].startswith(said)
    assert error["param"] == param


@pytest.mark.parametrize(
    "path",
    ["/admin/events?after=x", "/admin/events?after=-1", "/admin/requests?limit=x", "/admin/requests/a?x=1"],
)
def test_a_query_of_the_admin_api_that_makes_no_sense_is_an_error_of_ours(path: str) -> None:
    response = ask(admin_app(FakeState()), path)
    assert (response.status_code, error_code(response)) == (400, "invalid_request")
