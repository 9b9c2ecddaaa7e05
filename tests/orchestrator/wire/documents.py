"""Strategies for request documents, and the reader that judges what a worker would see."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# Integers within 64 bits and finite floats: what every JSON and msgpack decoder reads the same.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)

ROUTED_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "stream": st.none() | st.booleans(),
    "stream_options": st.none()
    | st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "continuous_usage_stats": st.none() | st.booleans()}
    ),
    "max_tokens": st.none() | st.integers(1, 10**6),
    "max_completion_tokens": st.none() | st.integers(1, 10**6),
    "echo": st.none() | st.just(False),
    "use_beam_search": st.none() | st.just(False),
    "prompt_logprobs": st.none(),
    "n": st.integers(1, 8),
    "best_of": st.integers(1, 8),
    "stop": st.none() | st.text() | st.lists(st.text(), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 100), max_size=3),
    "min_tokens": st.integers(0, 5),
    "ignore_eos": st.booleans(),
    "kv_transfer_params": values,
    "ec_transfer_params": values,
    "messages": values,
    "prompt": st.text() | st.lists(st.integers(0, 10**5), min_size=1),
}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """An OpenAI request that can go in two legs, with fields that nobody knows among those that we know."""
    document = draw(st.dictionaries(keys, values, max_size=5))
    for name in draw(st.sets(st.sampled_from(sorted(ROUTED_VALUES)))):
        document[name] = draw(ROUTED_VALUES[name])
    for name in ROUTED_VALUES:  # a random key must not be a routed one of the wrong type
        if name in document and name not in ("messages",):
            document[name] = draw(ROUTED_VALUES[name])
    for name in ("prompt_embeds",):
        document.pop(name, None)
    document["model"] = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    order = draw(st.permutations(sorted(document)))
    return {key: document[key] for key in order}


@st.composite
def spellings(draw: st.DrawFn, document: Any) -> bytes:
    """The document as some client might write it: spacing, indentation and escapes of its own."""
    text = json.dumps(
        document,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n ")])),
        indent=draw(st.sampled_from([None, None, 1])),
    )
    return (draw(st.sampled_from(["", " ", "\n\t"])) + text + draw(st.sampled_from(["", "\n"]))).encode()


def joined(parts: Any) -> bytes:
    return b"".join(map(bytes, parts))
