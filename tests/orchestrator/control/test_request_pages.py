"""/admin/requests as a page: what it is asked, what it answers, and who may ask."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.control.admin import admin_app
from orchestrator.control.state import FoundRequests
from orchestrator.telemetry.query import RequestQuery
from tests.orchestrator.control.fakes import RING, FakeState, ask, error_code


class Requests(FakeState):
    """It has these requests, whatever is asked for, and notes what is."""

    found = FoundRequests([], [])
    asked: RequestQuery | None = None

    async def requests(self, query: RequestQuery) -> FoundRequests:
        self.asked = query
        return self.found


def test_what_is_looked_for_is_asked_of_the_processes() -> None:
    state = Requests()
    app = admin_app(state)
    assert ask(app, "/admin/requests").json() == {"requests": [], "unanswered": []}
    assert state.asked == RequestQuery(limit=50)
    query = "key=alice&model=m&worker=m/decode/0&failed=1&slowest=1&slower_than=2.5&limit=7"
    assert ask(app, f"/admin/requests?{query}").status_code == 200
    assert state.asked == RequestQuery(
        key="alice", model="m", worker="m/decode/0", failed=True, slowest=True, slower_s=2.5, limit=7
    )


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=x", "'limit' is a whole number from 0 to 1000"),
        ("limit=1001", "'limit' is a whole number from 0 to 1000"),
        ("slower_than=nan", "'slower_than' is a number of seconds, 0 or more"),
        ("slower_than=-1", "'slower_than' is a number of seconds, 0 or more"),
        ("slower_than=" + "9" * 900, "'slower_than' is a number of seconds, 0 or more"),
        ("failed=perhaps", "'failed' is 1 or 0"),
        ("faild=1", "unknown parameter 'faild'; there is: key, model, worker, failed, slowest, slower_than"),
        ("key=a&key=b", "'key' is given more than once"),
        ("key=" + "x" * 1001, "'key' has more than 1000 characters"),
    ],
)
def test_a_query_that_makes_no_sense_is_named(query: str, says: str) -> None:
    answer = ask(admin_app(Requests()), f"/admin/requests?{query}")
    assert (answer.status_code, error_code(answer)) == (400, "invalid_request")
    assert answer.json()["error"]["message"].startswith(says)


def test_the_newest_of_those_with_one_id_is_told() -> None:
    state = Requests()
    state.found = FoundRequests([{"id": "a", "n": 2}, {"id": "a", "n": 1}], [])
    answer = ask(admin_app(state), "/admin/requests/a/b%20c")
    assert answer.json() == {"id": "a", "n": 2, "others_with_this_id": 1}
    assert state.asked is not None
    assert state.asked.name == "a/b c"


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "%0d%0aset-cookie:x",
        "%1b%5b31m",
        "%3Cscript%3E",
        "%C3%A9%F0%9F%98%80",
        "%ff",
        "x" * 50_000,
        "a%0ab",
        "%0a",
        "a%0a",
    ],
)
def test_a_request_that_nobody_knows(name: str) -> None:
    answer = ask(admin_app(Requests()), f"/admin/requests/{name}")
    assert (answer.status_code, error_code(answer)) == (404, "not_found")
    assert answer.json()["error"]["message"].startswith("no request ")
    assert len(answer.content) < 2000
    assert "set-cookie" not in answer.headers


def test_a_process_that_does_not_answer_is_named() -> None:
    state = Requests()
    state.found = FoundRequests([], [1])
    app = admin_app(state)
    assert ask(app, "/admin/requests").json()["unanswered"] == [1]
    answer = ask(app, "/admin/requests/x")
    assert (answer.status_code, error_code(answer)) == (503, "no_worker")


@pytest.mark.parametrize("path", ["/admin/requests", "/admin/requests/x", "/admin/events?follow=1"])
def test_it_needs_a_key_for_admin(path: str) -> None:
    state: Any = Requests(keys=RING)
    assert ask(admin_app(state), path).status_code == 401
