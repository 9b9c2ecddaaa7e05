from __future__ import annotations

import json

from orchestrator.wire.usage import decode_document, usage_of, with_cached_tokens

ANSWER = (
    b'{"id":"c","choices":[{"message":{"content":"caf\\u00e9","tool_calls":[]},"logprobs":null}],'
    b'"usage":{"prompt_tokens":21,"prompt_tokens_details":{"cached_tokens":21,"created_cache_tokens":0}},"x":1.50}'
)


def mended(content: bytes, cached: int | None) -> bytes:
    document = decode_document(content)
    assert document is not None
    usage = usage_of(document)
    assert usage is not None
    return with_cached_tokens(document, usage, cached)


def test_only_the_count_changes() -> None:
    assert mended(ANSWER, 16) == ANSWER.replace(b'"cached_tokens":21', b'"cached_tokens":16')


def test_nothing_changes_without_a_count_or_a_place_for_it() -> None:
    assert mended(ANSWER, None) == ANSWER
    plain = json.dumps({"usage": {"prompt_tokens": 3}}, separators=(",", ":")).encode()
    assert mended(plain, 16) == plain
