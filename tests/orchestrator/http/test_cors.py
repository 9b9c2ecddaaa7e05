"""Pages of other sites may ask what the config lets them, and can read every answer that they get."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.options import CorsConfig
from orchestrator.errors import ClientError
from orchestrator.http.cors import EXPOSED, Cors
from orchestrator.http.exchange import Exchange
from orchestrator.routing.overrides import NAMES as OVERRIDES  # which clients send
from tests.orchestrator.raw_http import Answer, Everywhere, Main, echo, lax, run, serving

__all__ = ["run"]

PAGE = "https://app.example"
Run = Callable[[Main], None]


def fields(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def ask(
    run: Run, cors: CorsConfig | None, *requests: bytes, handler: Any = echo, **limits: Any
) -> list[Answer]:
    answers = []

    async def main() -> None:
        made = None if cors is None else Cors(cors)
        async with serving(Everywhere(handler), lax(**limits), made) as site:
            for request in requests:
                answers.append(await site.ask(request))

    run(main)
    return answers


def request(method: str, origin: str | None = PAGE, *, body: bytes = b"", **headers: str) -> bytes:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named |= {} if origin is None else {"origin": origin}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    head = f"{method} /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    return head.encode() + body


def preflight(origin: str = PAGE, method: str = "POST", **headers: str) -> bytes:
    return request("OPTIONS", origin, access_control_request_method=method, **headers)


def test_off_nothing_is_said_and_nothing_answered(run: Run) -> None:
    asked, plain = ask(run, None, preflight(), request("POST"))
    assert asked.json()["method"] == "OPTIONS"  # it went to the handler, as every request does
    assert fields(asked) == fields(plain) == {}
    assert "vary" not in plain.headers


def test_a_page_that_is_allowed_can_read(run: Run) -> None:
    (answer,) = ask(run, CorsConfig(allowed_origins=[PAGE, "http://b"]), request("POST"))
    assert answer.status == 200
    assert fields(answer) == {
        "access-control-allow-origin": PAGE,
        "access-control-expose-headers": ", ".join(EXPOSED),
    }
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", [None, "https://evil.example", "null", "https://app.example.evil.example"])
def test_others_are_served_and_told_nothing(run: Run, origin: str | None) -> None:
    (answer,) = ask(run, CorsConfig(allowed_origins=[PAGE]), request("POST", origin))
    assert (answer.status, fields(answer), answer.headers["vary"]) == (200, {}, "Origin")


def test_all_pages_may_be_allowed(run: Run) -> None:
    first, bare, asked = ask(
        run, CorsConfig(allowed_origins=["*"]), request("GET"), request("GET", None), preflight()
    )
    assert first.headers["access-control-allow-origin"] == "*"
    assert "vary" not in first.headers
    assert fields(bare) == {}
    assert asked.headers["access-control-allow-origin"] == "*"


def test_a_preflight_is_answered_at_once(run: Run) -> None:
    async def never(exchange: Exchange) -> None:
        raise AssertionError

    asked = preflight(access_control_request_headers="authorization, content-type, x-a")
    cors = CorsConfig(allowed_origins=[PAGE], allow_credentials=True, max_age_s=7)
    (answer,) = ask(run, cors, asked, handler=never)
    assert (answer.status, answer.body) == (200, b"OK")
    assert fields(answer) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
        "access-control-allow-headers": "authorization, content-type, x-a",
        "access-control-allow-credentials": "true",
        "access-control-max-age": "7",
    }
    assert answer.headers["vary"].startswith("Origin, ")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (preflight("https://evil.example"), "Disallowed CORS origin"),
        (preflight(method="PUT"), "Disallowed CORS method"),
        (preflight(method="post"), "Disallowed CORS method"),
        (preflight(access_control_request_headers="x-a, x-b"), "Disallowed CORS headers"),
        (preflight(access_control_request_headers="x-a, {"), "Disallowed CORS headers"),
        (
            preflight("null", "PUT", access_control_request_headers="x"),
            "Disallowed CORS origin, method, headers",
        ),
    ],
)
def test_a_preflight_for_more_is_refused(run: Run, asked: bytes, says: str) -> None:
    cors = CorsConfig(allowed_origins=[PAGE], allowed_methods=["POST"], allowed_headers=["X-A"])
    answer, right = ask(run, cors, asked, preflight(access_control_request_headers="x-a,content-type"))
    assert (answer.status, answer.body.decode(), fields(answer)) == (400, says, {})
    assert right.status == 200
    assert right.headers["access-control-allow-headers"] == (
        "accept, accept-language, content-language, content-type, x-a"
    )


def test_other_options_requests_are_not_preflights(run: Run) -> None:
    (answer,) = ask(run, CorsConfig(allowed_origins=[PAGE]), request("OPTIONS"))
    assert answer.json()["method"] == "OPTIONS"


def test_errors_can_be_read_wherever_they_come_from(run: Run) -> None:
    async def refuse(exchange: Exchange) -> None:
        raise ClientError("no")

    cors = CorsConfig(allowed_origins=[PAGE])
    answers = ask(
        run,
        cors,
        request("POST"),
        request("POST", body=b"a" * 2000),
        request("POST", content_encoding="gzip", body=b"a"),
        request("POST", x="a" * 40_000),
        handler=refuse,
        max_body_bytes=1000,
    )
    assert [answer.status for answer in answers] == [400, 413, 415, 431]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_streams_can_be_read(run: Run) -> None:
    async def stream(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.feed(b"data: 1\n\n")
        exchange.finish()

    (answer,) = ask(run, CorsConfig(allowed_origins=[PAGE]), request("POST"), handler=stream)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.body == b"data: 1\n\n"


def test_a_preflight_is_answered_while_there_are_too_many_requests(run: Run) -> None:
    cors = CorsConfig(allowed_origins=[PAGE])
    asked, refused = ask(run, cors, preflight(), request("POST"), limit_concurrency=0)
    assert (asked.status, refused.status) == (200, 503)


def test_a_connection_goes_on_behind_a_preflight(run: Run) -> None:
    async def main() -> None:
        cors = Cors(CorsConfig(allowed_origins=[PAGE]))
        async with serving(Everywhere(echo), cors=cors) as site, site.client() as client:
            client.send(preflight() + request("OPTIONS", body=b"ab", access_control_request_method="POST"))
            assert (await client.answer()).body == b"OK"
            assert (await client.answer()).body == b"OK"
            assert (await client.ask(request("POST"))).json()["method"] == "POST"

    run(main)


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("HTTPS://App.example:443", PAGE),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80", "http://[::1]"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_origins_are_taken_as_browsers_send_them(given: str, origin: str) -> None:
    assert CorsConfig(allowed_origins=[given]).allowed_origins == [origin]


@pytest.mark.parametrize(
    "given", ["app.example", "https://app.example/", "https://a@b", "null", "", "https://"]
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="expected SCHEME://HOST"):
        CorsConfig(allowed_origins=[given])


def test_all_headers_of_ours_are_exposed() -> None:
    sources = (path.read_text("utf-8") for path in Path(__file__).parents[3].glob("orchestrator/**/*.py"))
    own = {
        name
        for source in sources
        for name in re.findall(r"x-(?:baton|ratelimit|process)-[a-z-]*[a-z](?![a-z-])", source)
    }
    own |= {
        f"x-ratelimit-{what}-{kind}"
        for what in ("limit", "remaining", "reset")
        for kind in ("requests", "tokens")
    }
    assert own - {*OVERRIDES} <= {*EXPOSED, "x-baton-"}
