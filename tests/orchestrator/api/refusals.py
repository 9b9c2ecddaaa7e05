"""What a worker that decodes makes of fields that a prefill leg leaves out: vLLM's own classes are asked in
`tests/real/test_refusals.py`.
"""

from __future__ import annotations

from typing import Any

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"prompt": "hi"}
MAX_MODEL_LEN = 4096

REFUSED: list[dict[str, Any]] = [
    CHAT | {"n": 0},
    CHAT | {"n": -1},
    CHAT | {"n": 20_000},
    CHAT | {"n": "many"},
    CHAT | {"n": [2]},
    CHAT | {"n": 2, "temperature": 0},
    PROMPT | {"n": 0},
    PROMPT | {"n": 3, "temperature": 0.0},
    CHAT | {"stop": 5},
    CHAT | {"stop": [""]},
    CHAT | {"stop": ["a", ""]},
    CHAT | {"stop": ["a", 5]},
    CHAT | {"stop": ["a", "b", "c", "d", "e"]},
    PROMPT | {"stop": {"a": "b"}},
    CHAT | {"stop_token_ids": "x"},
    CHAT | {"stop_token_ids": ["x"]},
    CHAT | {"min_tokens": -1},
    CHAT | {"min_tokens": "few"},
    CHAT | {"min_tokens": 8, "max_tokens": 4},
    CHAT | {"min_tokens": 8, "max_completion_tokens": 4},
    PROMPT | {"min_tokens": 17},
    PROMPT | {"min_tokens": 8, "max_tokens": 4},
    CHAT | {"min_tokens": None},
    CHAT | {"max_tokens": -1},
    CHAT | {"max_completion_tokens": -5},
    PROMPT | {"max_tokens": -1},
    CHAT | {"max_tokens": MAX_MODEL_LEN + 1},
    PROMPT | {"max_tokens": MAX_MODEL_LEN + 1},
    CHAT | {"stream_options": {"include_usage": True}},
    CHAT | {"stream_options": {"include_usage": False}, "stream": False},
    PROMPT | {"stream_options": {"include_usage": True}, "stream": None},
    CHAT | {"ignore_eos": "perhaps"},
    CHAT | {"return_token_ids": "perhaps"},
]
TAKEN: list[dict[str, Any]] = [
    CHAT,
    PROMPT,
    CHAT | {"n": 1},
    CHAT | {"n": None},
    CHAT | {"n": 3, "temperature": 0.7},
    CHAT | {"n": 2},
    CHAT | {"n": 1, "temperature": 0},
    CHAT | {"stop": "x"},
    CHAT | {"stop": None},
    CHAT | {"stop": []},
    CHAT | {"stop": ["a", "b", "c", "d"]},
    CHAT | {"stop_token_ids": [1, 2]},
    CHAT | {"stop_token_ids": None},
    CHAT | {"min_tokens": 0},
    CHAT | {"min_tokens": 4, "max_tokens": 4},
    CHAT | {"min_tokens": 100},
    PROMPT | {"min_tokens": 16},
    PROMPT | {"min_tokens": 20, "max_tokens": 30},
    CHAT | {"max_tokens": 1},
    CHAT | {"max_tokens": None},
    CHAT | {"max_tokens": 4, "max_completion_tokens": 30, "min_tokens": 8},
    CHAT | {"max_tokens": MAX_MODEL_LEN},
    CHAT | {"stream": True, "stream_options": {"include_usage": True}},
    CHAT | {"stream": False, "stream_options": {}},
    CHAT | {"stream": False, "stream_options": None},
    CHAT | {"ignore_eos": True},
    CHAT | {"return_token_ids": True},
    CHAT | {"return_token_ids": None},
    CHAT | {"best_of": 5},
]
