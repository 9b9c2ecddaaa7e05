from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.options import LimitsConfig, OrchestratorConfig
from orchestrator.errors import (
    BatonError,
    BodyTooLarge,
    ClientError,
    HeadersTooLarge,
    MethodNotAllowed,
    RequestTimeout,
    UnsupportedEncoding,
    UriTooLong,
)
from orchestrator.http.head import Head, Judge, Target, max_head_bytes, unfinished_error
from orchestrator.http.limits import ServerLimits

LIMITS = ServerLimits(max_request_line=100, max_header_bytes=200, max_headers=5, max_body_bytes=1000)
HOST = (b"host", b"a")
CHUNKED = (b"transfer-encoding", b"chunked")
GZIP = (b"content-encoding", b"gzip")


def length(size: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % size


def head(*fields: tuple[bytes, bytes], url: bytes = b"/", **given: Any) -> Head:
    facts = {"method": "POST", "http_version": "1.1", "keep_alive": True, **given}
    return Head(url=url, headers=list(fields), **facts)


def judged(made: Head, limits: ServerLimits = LIMITS) -> BatonError | None:
    return Judge(limits).refusal(made, is_small=False)


def outcome(judge: Judge, made: Head, *, is_small: bool = False) -> Any:
    """All that a head says, and the refusal."""
    error = judge.refusal(made, is_small)
    said = (made.target, made.content_length, made.has_body, made.awaits_continue, made.ends_reading)
    return *said, made.keep_alive, type(error), str(error)


# --- what a head says -----------------------------------------------------------------------------


def test_a_head_without_a_body() -> None:
    made = head(HOST, url=b"/a?b")
    assert judged(made) is None
    assert made.target == Target(b"/a?b", b"/a", "/a", b"b")
    assert (made.content_length, made.has_body, made.awaits_continue) == (None, False, False)
    assert made.keep_alive
    assert not made.ends_reading


@pytest.mark.parametrize(
    ("field", "content_length", "has_body"),
    [(length(3), 3, True), (length(0), 0, False), (CHUNKED, None, True)],
)
def test_the_framing_of_a_body(field: Any, content_length: int | None, has_body: bool) -> None:
    made = head(HOST, field)
    assert judged(made) is None
    assert (made.content_length, made.has_body) == (content_length, has_body)


@pytest.mark.parametrize(
    ("fields", "version", "awaits"),
    [
        ([length(3)], "1.1", True),
        ([CHUNKED], "1.1", True),
        ([], "1.1", False),
        ([length(0)], "1.1", False),
        ([length(3)], "1.0", False),
    ],
)
def test_who_waits_for_100_continue(fields: Any, version: str, awaits: bool) -> None:
    made = head(HOST, (b"expect", b" 100-Continue "), *fields, http_version=version)
    assert judged(made) is None
    assert made.awaits_continue is awaits
    other = head(HOST, (b"expect", b"something"), length(3))
    assert judged(other) is None
    assert not other.awaits_continue


# --- what is refused ------------------------------------------------------------------------------

# What leaves in doubt where the request ends, or where it ends too far away.
ENDING: dict[str, tuple[type[BatonError], Head]] = {
    "HTTP/1.2": (ClientError, head(HOST, http_version="1.2")),
    "gzip, chunked": (ClientError, head(HOST, (b"transfer-encoding", b"gzip, chunked"))),
    "chunked with HTTP/1.0": (ClientError, head(HOST, CHUNKED, http_version="1.0")),
    "chunked and content-length": (ClientError, head(HOST, CHUNKED, length(3))),
    "CONNECT": (MethodNotAllowed, head(HOST, method="CONNECT", is_upgrade=True)),
    "an endless URL": (UriTooLong, head(HOST, url=b"/" + b"a" * 800)),
    "endless fields": (HeadersTooLarge, head(HOST, (b"x", b"a" * 800))),
    "an endless body": (BodyTooLarge, head(HOST, length(2**20 + 1))),
}
REFUSED: dict[str, tuple[type[BatonError], Head]] = {
    "a long URL": (UriTooLong, head(HOST, url=b"/" + b"a" * 86)),
    "large fields": (HeadersTooLarge, head(HOST, (b"x", b"a" * 200))),
    "many fields": (HeadersTooLarge, head(*[HOST] * 6)),
    "no Host": (ClientError, head()),
    "two Hosts": (ClientError, head(HOST, HOST)),
    "a bad Host": (ClientError, head((b"host", b"a/b"))),
    "a bad target": (ClientError, head(HOST, url=b"*")),
    "a large body": (BodyTooLarge, head(HOST, length(1001))),
    "gzip": (UnsupportedEncoding, head(HOST, length(3), GZIP)),
    "gzip, then identity": (
        UnsupportedEncoding,
        head(HOST, length(3), GZIP, (b"content-encoding", b"identity")),
    ),
}
FINE = {
    "as long a request line as may be": head(HOST, url=b"/" + b"a" * 85),
    "as large fields as may be": head(HOST, (b"x", b"a" * 186)),
    "as many fields as may be": head(HOST, *[(b"x", b"a")] * 4),
    "as large a body as may be": head(HOST, length(1000)),
    "no Host with HTTP/1.0": head(http_version="1.0"),
    "spaces behind the Host": head((b"host", b"a \t")),
    "OPTIONS *": head(HOST, method="OPTIONS", url=b"*"),
    "the form for proxies": head(HOST, url=b"http://b/c"),
    "gzip without a body": head(HOST, GZIP),
    "identity": head(HOST, length(3), (b"content-encoding", b" Identity ")),
    "another protocol offered": head(HOST, is_upgrade=True),
}


@pytest.mark.parametrize("name", ENDING)
def test_nothing_is_read_behind_a_request_without_a_known_end(name: str) -> None:
    kind, made = ENDING[name]
    assert type(judged(made)) is kind
    assert made.ends_reading
    assert not made.keep_alive


@pytest.mark.parametrize("name", REFUSED)
def test_other_refusals_leave_the_connection_usable(name: str) -> None:
    kind, made = REFUSED[name]
    assert type(judged(made)) is kind
    assert not made.ends_reading
    assert made.keep_alive


@pytest.mark.parametrize("name", FINE)
def test_heads_that_are_fine(name: str) -> None:
    assert judged(FINE[name]) is None


def test_a_large_body_may_be_drained_or_not() -> None:
    for drain, ends in ((1001, False), (1000, True)):
        made = head(HOST, length(1001))
        assert isinstance(judged(made, replace(LIMITS, drain_bytes=drain)), BodyTooLarge)
        assert made.ends_reading is ends


@pytest.mark.parametrize(
    ("url", "size", "kind"),
    [
        (b"/", 50, RequestTimeout),
        (b"/", 200, RequestTimeout),
        (b"/", 201, HeadersTooLarge),
        (b"/" + b"a" * 100, 50, UriTooLong),
    ],
)
def test_why_a_head_without_an_end_is_refused(url: bytes, size: int, kind: type[BatonError]) -> None:
    assert type(unfinished_error(url, size, LIMITS)) is kind
    assert max_head_bytes(LIMITS) == 800


# --- shortcuts change nothing ---------------------------------------------------------------------

FIELDS = st.sampled_from(
    [
        HOST,
        (b"host", b"b"),
        (b"host", b"a/b"),
        length(0),
        length(3),
        length(5000),
        CHUNKED,
        GZIP,
        (b"expect", b"100-continue"),
        (b"x", b"a" * 30),
    ]
)
HEADS = st.builds(
    lambda fields, url, method, version: lambda: head(*fields, url=url, method=method, http_version=version),
    st.lists(FIELDS, max_size=7),
    st.sampled_from([b"/", b"/a?b", b"*", b"/" + b"a" * 90, b"http://b/c", b"nonsense"]),
    st.sampled_from(["GET", "POST", "OPTIONS"]),
    st.sampled_from(["1.1", "1.0", "1.2"]),
)


@given(st.lists(HEADS, max_size=5))
def test_what_is_remembered_of_earlier_heads_changes_no_verdict(makers: list[Any]) -> None:
    judge = Judge(LIMITS)
    for make in makers:
        assert outcome(judge, make()) == outcome(Judge(LIMITS), make())


@given(HEADS)
def test_not_counting_a_small_head_changes_no_verdict(make: Any) -> None:
    made = make()
    size = len(made.method) + len(made.url) + sum(len(name) + len(value) + 4 for name, value in made.headers)
    judge = Judge(LIMITS)
    if size + len("  HTTP/1.1\r\n\r\n") <= judge.small:
        assert outcome(judge, made, is_small=True) == outcome(judge, make(), is_small=False)


def test_what_one_method_may_ask_for_is_not_remembered_for_others() -> None:
    judge = Judge(LIMITS)
    assert judge.refusal(head(HOST, url=b"*", method="OPTIONS"), is_small=False) is None
    assert isinstance(judge.refusal(head(HOST, url=b"*"), is_small=False), ClientError)


def test_a_repeated_target_is_taken_apart_once() -> None:
    judge = Judge(LIMITS)
    first, second = head(HOST, url=b"/a%20b"), head(HOST, url=b"/a%20b")
    assert judge.refusal(first, is_small=False) is judge.refusal(second, is_small=False) is None
    assert first.target is second.target


@given(st.text(max_size=50), st.text(alphabet="abc&=%?", max_size=8))
def test_any_path_is_decoded(path: str, query: str) -> None:
    raw = b"/" + quote(path).encode()
    made = head(HOST, url=b"%b?%b#d" % (raw, query.encode()))
    assert judged(made, ServerLimits()) is None
    assert made.target == Target(made.url, raw, f"/{path}", query.encode())


def test_the_bounds_are_those_of_the_config() -> None:
    limits = LimitsConfig(
        header_timeout_s=1, body_idle_timeout_s=2, body_timeout_s=3, client_write_timeout_s=4
    )
    made = ServerLimits.of(OrchestratorConfig(limits=limits))
    assert (made.header_timeout_s, made.body_idle_timeout_s, made.body_timeout_s) == (1, 2, 3)
    assert (made.write_timeout_s, made.limit_concurrency) == (4, None)
    assert made.max_body_bytes == limits.max_body_bytes
