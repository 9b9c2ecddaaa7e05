from __future__ import annotations

import json

import pytest

from orchestrator.wire.refusals import (
    Whose,
    counts_fields,
    error_body,
    is_denial,
    is_encoded,
    recounted,
    retry_after,
    whose,
)

CHAT = "/v1/chat/completions"
OPENAI = b'{ "error": {"message": "no", "type": "BadRequestError", "param": "n", "code": 400}, "more": 1 }'


@pytest.mark.parametrize(
    "value", [b"0", b"7", b"120", b"Wed, 21 Oct 2026 07:28:00 GMT", None], ids=lambda value: str(value)
)
def test_a_number_or_a_date_may_be_passed_on(value: bytes | None) -> None:
    assert retry_after(value) == value


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"-1",
        b"1.5",
        b"1e3",
        b" 7",
        b"9" * 10,
        b"soon",
        b"<script>",
        b"7, 8",
        b"\xd9\xa3",
        b"2026-10-21T07:28:00Z",
        b"Wed, 21 Oct 2026 07:28:00 UTC",
        b"Wednesday, 21-Oct-26 07:28:00 GMT",
        b"Wed, 21 Oct 2026 07:28:00 GMT\x00",
    ],
)
def test_anything_else_is_dropped(value: bytes) -> None:
    assert retry_after(value) is None


def test_an_openai_error_is_passed_on_byte_by_byte() -> None:
    assert error_body(400, OPENAI) == OPENAI


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (400, b"", ("the worker answered 400", "invalid_request_error", None, None)),
        (500, b"<html>", ("the worker answered 500", "upstream_error", None, None)),
        (
            400,
            b'{"object":"error","message":"no","type":"BadRequestError","param":"n","code":400}',
            ("no", "BadRequestError", "n", 400),
        ),
        (400, b'{"object":"error","message":"no","code":400}', ("no", "invalid_request_error", None, 400)),
        (422, b'{"detail":"why"}', ("the worker answered 422: why", "invalid_request_error", None, None)),
        (
            422,
            b'{"detail":[{"msg":"a","loc":["x"]},{"msg":"b"},7]}',
            ("the worker answered 422: a; b", "invalid_request_error", None, None),
        ),
        (
            400,
            b'{"error":"too long"}',
            ("the worker answered 400: too long", "invalid_request_error", None, None),
        ),
        (400, b'{"detail":{"a":1}}', ("the worker answered 400", "invalid_request_error", None, None)),
        (400, b"[" * 50_000, ("the worker answered 400", "invalid_request_error", None, None)),
        (
            503,
            b'{"error":{"message":"\xff","code":1}}',
            ("the worker answered 503", "upstream_error", None, None),
        ),
    ],
)
def test_what_is_none_becomes_one(status: int, content: bytes, error: tuple[object, ...]) -> None:
    said = json.loads(error_body(status, content))["error"]
    assert tuple(said[name] for name in ("message", "type", "param", "code")) == error


def test_what_a_worker_explains_is_bounded() -> None:
    assert len(error_body(400, json.dumps({"detail": "x" * 60_000}).encode())) < 1000
    assert len(error_body(400, json.dumps({"error": {"message": "x" * 70_000, "code": 1}}).encode())) < 1000


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/tokenize", "/v1/baton/end"])
def test_a_missing_path_is_about_the_worker_where_every_worker_has_it(path: str) -> None:
    generative = path in (CHAT, "/v1/completions")
    for content in (b'{"detail":"Not Found"}', b'{"error":{"message":"Not Found","code":404}}'):
        assert whose(404, content, path) is (Whose.WORKER if generative else Whose.PATH)
        assert is_denial(404, content)
    assert whose(404, b"<html>", path) is Whose.WORKER


def test_what_a_worker_of_ours_says_to_an_empty_document_is_no_denial() -> None:
    for status in (200, 400, 422, 429, 500, 503):
        assert not is_denial(status, b"")
    assert not is_denial(415, OPENAI)
    assert is_denial(401, OPENAI)


@pytest.mark.parametrize(
    ("coding", "expected"),
    [
        (None, False),
        (b"", False),
        (b"identity", False),
        (b" Identity ", False),
        (b"gzip", True),
        (b"x", True),
    ],
)
def test_only_identity_is_no_encoding(coding: bytes | None, expected: bool) -> None:
    assert is_encoded(coding) is expected


LACKS = "{'type': 'missing', 'loc': 'body.messages', 'msg': 'Field required', 'input': '<dict of 5 items>'}"
AS_A_WHOLE = LACKS.replace("missing", "value_error").replace("body.messages", "body")
QUOTING = AS_A_WHOLE.replace("'Field required'", '"It\'s wrong"')
WITHIN = LACKS.replace("body.messages", "body.messages.0.role")
A_VALUE = LACKS.replace("missing", "list_type")


@pytest.mark.parametrize(
    ("text", "is_counted"),
    [(LACKS, True), (AS_A_WHOLE, True), (QUOTING, True), (WITHIN, False), (A_VALUE, False)],
)
def test_a_worker_that_counts_the_legs_fields_is_read_as_counting_the_clients(
    text: str, is_counted: bool
) -> None:
    error = json.dumps(
        {"error": {"message": f"2 validation errors:\n  {text}\n  {text}", "code": 400}}
    ).encode()
    assert counts_fields(error)
    assert recounted(error, -2) == (error.replace(b"of 5 items", b"of 3 items") if is_counted else error)
