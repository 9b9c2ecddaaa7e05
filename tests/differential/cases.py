"""The cases. Each is sent once to Baton, in two legs where it can be, and once straight to a worker."""

from __future__ import annotations

from tests.differential.case import CHAT, Case, both, chat, completion, document_case, raw

OWN_WORDS = ("own words",)

BASIC: list[Case] = [
    *both("whole"),
    *both("stream", stream=True),
    *both("usage", stream=True, stream_options={"include_usage": True}),
    *both(
        "continuous usage",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ),
    *both("seed", temperature=0.8, seed=7),
    *both("n", temperature=0.8, seed=7, n=2),
    *both("stop", stop=["a"]),
    *both("ends by itself", max_tokens=200),
    chat("logprobs", logprobs=True, top_logprobs=2),
    completion("logprobs", logprobs=2),
    document_case("tokenize", "/tokenize", {"model": "@model@", "prompt": "a b"}),
    raw("empty body", CHAT, b"", status=400, differs=OWN_WORDS),
]

CASES: list[Case] = [*BASIC]
