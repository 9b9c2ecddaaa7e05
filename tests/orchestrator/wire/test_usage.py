from __future__ import annotations

import json

import pytest
from msgspec import Raw

from orchestrator.wire.shapes import AnswerUsage, MessageUsage, ResponseUsage
from orchestrator.wire.usage import InvalidAnswer, Kv, Usage, mended, tokens_in

ANSWER = (
    b'{"id":"c","choices":[{"message":{"content":"caf\\u00e9","tool_calls":[]},"logprobs":null}],'
    b'"usage":{"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens":21,"created_cache_tokens":0}},"x":1.50}'
)


def test_only_the_count_changes() -> None:
    assert mended(ANSWER, 16)[1] == ANSWER.replace(b'"cached_tokens":21', b'"cached_tokens":16')


def test_nothing_changes_without_a_count_or_a_place_for_it() -> None:
    assert mended(ANSWER, None) == (Kv.TRANSFERRED, ANSWER)
    plain = json.dumps({"usage": {"prompt_tokens": 3}}, separators=(",", ":")).encode()
    assert mended(plain, 16) == (Kv.UNKNOWN, plain)


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens" : 5}}',
        b'{"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens": 5, "x":1}}',
        b'{"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens":5},"cached_tokens":5}',
        b'{"cached_tokens":5,"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens":5}}',
    ],
)
def test_the_right_count_changes_however_it_is_written(usage: bytes) -> None:
    text = b'{"choices":["a \\"cached_tokens\\":5, quoted"],"usage":%b}' % usage
    outcome, content = mended(text, 16)
    expected = json.loads(text)
    expected["usage"]["prompt_tokens_details"]["cached_tokens"] = 16
    assert outcome is Kv.RECOMPUTED
    assert json.loads(content) == expected


@pytest.mark.parametrize("content", [b"[]", b"1", b"{", b"", b'{"usage":}'])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidAnswer):
        mended(content, 16)


@pytest.mark.parametrize("usage", ["1", '{"prompt_tokens":"many"}', '{"prompt_tokens_details":[]}', "null"])
def test_a_usage_of_another_shape_is_no_evidence(usage: str) -> None:
    content = f'{{"usage":{usage}}}'.encode()
    assert mended(content, 16) == (Kv.UNKNOWN, content)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (0, (None, 0)),
        (14, (None, 14)),
        (AnswerUsage(21, 5), (21, 5)),
        (AnswerUsage(21, "many"), (21, None)),
        (AnswerUsage(None, True), (None, None)),
        (AnswerUsage(-1, 10**12), (None, None)),
        (MessageUsage(5, 3, 6, 10), (21, 3)),
        (ResponseUsage(21, 3), (21, 3)),
        ({"prompt_tokens": Raw(b"21"), "completion_tokens": Raw(b"5")}, (21, 5)),
        ({"prompt_tokens": Raw(b"null"), "completion_tokens": Raw(b"1e3")}, (None, None)),
        ({"prompt_tokens": Raw(b"9" * 400)}, (None, None)),
    ],
)
def test_tokens_are_what_the_usage_tells(usage: Usage | int, tokens: tuple[int | None, int | None]) -> None:
    assert tokens_in(usage) == tokens
