from __future__ import annotations

import httpx
import pytest
from starlette.datastructures import Headers

from orchestrator.control.admin import admin_app
from orchestrator.control.other_sites import refuse_other_sites
from orchestrator.errors import Forbidden, UnsupportedMediaType
from tests.orchestrator.control.fakes import FakeState, ask

HOST = ("host", "localhost:8001")
JSON = ("content-type", "application/json")
SIZE = ("content-length", "7")


def judge(method: str, *fields: tuple[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in (HOST, *fields)]
    refuse_other_sites(method, Headers(raw=raw))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("GET", []),
        ("POST", []),
        ("POST", [("content-length", "0")]),
        ("DELETE", []),
        ("POST", [JSON, SIZE]),
        ("POST", [("content-type", "Application/JSON; charset=utf-8"), SIZE]),
        ("POST", [("origin", "http://localhost:8001"), ("sec-fetch-site", "same-origin")]),
        ("POST", [("origin", "http://LocalHost:8001")]),
        ("GET", [("sec-fetch-site", "none")]),
        (
            "GET",
            [
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
            ],
        ),
    ],
)
def test_own_pages_tools_and_links_are_served(method: str, fields: list[tuple[str, str]]) -> None:
    judge(method, *fields)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("POST", [("origin", "http://evil.example")]),
        ("POST", [("origin", "null")]),
        ("POST", [("origin", "http://localhost:3000")]),
        ("POST", [("origin", "http://localhost:8001"), ("origin", "http://evil.example")]),
        ("POST", [("sec-fetch-site", "cross-site")]),
        ("POST", [("sec-fetch-site", "same-site")]),
        ("POST", [("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")]),
        (
            "POST",
            [
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
            ],
        ),
        (
            "GET",
            [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")],
        ),
        (
            "GET",
            [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")],
        ),
        ("GET", [("origin", "http://evil.example")]),
        ("POST", [("origin", "http://evil.example"), ("x-forwarded-host", "evil.example")]),
    ],
)
def test_pages_of_other_sites_are_not(method: str, fields: list[tuple[str, str]]) -> None:
    with pytest.raises(Forbidden, match="use this listener|read this" if method == "GET" else "use|change"):
        judge(method, *fields)


@pytest.mark.parametrize(
    "fields",
    [
        [("content-type", "text/plain"), SIZE],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=a"), SIZE],
        [SIZE],
        [("transfer-encoding", "chunked")],
        [JSON, ("content-type", "text/plain"), SIZE],
    ],
)
def test_a_change_is_sent_as_json(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(UnsupportedMediaType):
        judge("POST", *fields)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/admin/workers"),
        ("POST", "/admin/reload"),
        ("POST", "/admin/workers/x/drain"),
    ],
)
def test_it_holds_for_every_page_before_keys_and_paths(method: str, path: str) -> None:
    app = admin_app(FakeState())
    answer: httpx.Response = ask(app, path, method, {"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403
