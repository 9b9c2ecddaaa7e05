from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.continuation import REFUSED, Continuation, ending_without_count, replaceable
from orchestrator.wire.sse import DONE
from orchestrator.wire.tokenize import ids_of
from orchestrator.wire.transcript import CannotContinue, Sent, Usage
from tests.orchestrator.wire.cut_streams import (
    CACHED_TOKENS,
    Client,
    content_of,
    events_in,
    names_in,
    view_of,
)
from worker.sim import text

Json = dict[str, Any]

CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
COMPLETION: Json = {"model": "tiny", "prompt": "Once upon\n", "stream": True}


# --- a stream that is cut anywhere --------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> Json:
    """Streams of the simulated engine that can be gone on with."""
    options = {"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}
    optional: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0, 1]),
        "seed": st.integers(0, 3),
        "min_tokens": st.integers(0, 9),
        "ignore_eos": st.booleans(),
        "return_token_ids": st.booleans(),
        "stop": st.sampled_from(["é", ["w", "k"]]),
        "stream_options": st.fixed_dictionaries({}, optional=options),
        "top_p": st.just(0.5),
        "n": st.just(1),
    }
    fields = draw(st.fixed_dictionaries({}, optional=optional))
    said = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)) + "\n"
    limit = {draw(st.sampled_from(["max_tokens", "max_completion_tokens"])): draw(st.integers(9, 60))}
    if draw(st.booleans()):
        unlimited = {} if not fields.get("ignore_eos") else limit
        messages = [{"role": "user", "content": said}]
        return CHAT | {"messages": messages} | fields | draw(st.sampled_from([limit, unlimited]))
    prompt = draw(st.sampled_from([said, text.encode(said)]))
    return COMPLETION | {"prompt": prompt, "max_tokens": draw(st.integers(9, 60))} | fields


places = st.lists(st.integers(0, 20_000), max_size=4)


@given(requests(), places, st.lists(st.integers(0, 20_000), min_size=1, max_size=3))
def test_a_cut_stream_says_what_an_uncut_one_does(document: Json, ends: list[int], cuts: list[int]) -> None:
    view = view_of(document)
    assert replaceable(view) is None
    whole, mended = Client(view).read(), Client(view, ends).read(cuts)
    assert content_of(mended) == content_of(whole)
    assert len(names_in(mended)) == 1
    if view.wants_usage:
        check_usage(events_in(mended), events_in(whole))


def check_usage(mended: list[Json], whole: list[Json]) -> None:
    usage, real = mended[-1]["usage"], whole[-1]["usage"]
    if usage["completion_tokens"] != real["completion_tokens"]:  # counted by the text, which has no end token
        usage = {**usage, "completion_tokens": usage["completion_tokens"] + 1}
        usage["total_tokens"] += 1
    assert usage["prompt_tokens_details"]["cached_tokens"] == CACHED_TOKENS
    assert {**usage, "prompt_tokens_details": None} == {**real, "prompt_tokens_details": None}
    told = [event["usage"]["completion_tokens"] for event in mended if event.get("usage")]
    assert told == sorted(told)
