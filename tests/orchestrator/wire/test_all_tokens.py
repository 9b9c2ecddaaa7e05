"""How many tokens an answer has used, as its usage tells."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.usage import tokens_told

DETAILS = {"prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"a": {"b": 1}}}


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, 10),
        ({"prompt_tokens": 7, **DETAILS, "completion_tokens": 3}, 10),
        ({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 20}, 27),
        ({"prompt_tokens": 7, "total_tokens": 7}, 7),
        ({"input_tokens": None, "output_tokens": 2}, 2),
        ({}, -1),
        ({"total_tokens": -5}, -1),
        ({"total_tokens": "many"}, -1),
        ({"total_tokens": 10**30}, -1),
        (None, -1),
        ([1, 2], -1),
        (7, -1),
    ],
)
@pytest.mark.parametrize("after", [{}, {"kv_transfer_params": None}, {"x": {"y": {}}}], ids=str)
def test_the_usage_of_a_whole_answer(usage: Any, tokens: int, after: dict[str, Any]) -> None:
    said = {"content": 'he said "usage":{"total_tokens":99}'}
    for separators in ((",", ":"), (", ", ": ")):
        content = json.dumps({"choices": [said], "usage": usage, **after}, separators=separators).encode()
        assert tokens_told(content) == tokens


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'"usage":', b'{"usage":' + b"}" * 10_000, b'"usage":{' * 9999]
)
def test_what_has_none(content: bytes) -> None:
    assert tokens_told(content) == -1


@given(st.binary(max_size=200))
def test_no_bytes_are_an_error(content: bytes) -> None:
    tokens_told(content)
    tokens_told(b'{"usage":' + content)
