from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api.view import view_request
from orchestrator.failover.continuation import (
    REFUSED,
    Continuation,
    ending_without_count,
    replaceable,
    text_to_go_on_from,
)
from orchestrator.failover.tokenize import ids_of
from orchestrator.failover.transcript import CannotContinue, Usage
from tests.orchestrator.wire.cut_streams import (
    CACHED_TOKENS,
    Client,
    content_of,
    events_in,
    names_in,
    sent_of,
    view_of,
)
from tests.orchestrator.wire.documents import joined
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
        check_usage(events_in(mended), events_in(whole), document)


stops = st.sampled_from(["é", "er s", " mountain", "ab"])


@given(stops, st.sampled_from([CHAT, COMPLETION]), st.integers(0, 20_000))
def test_text_that_was_held_back_comes_after_the_cut(stop: str, document: Json, place: int) -> None:
    view = view_of(document | {"temperature": 0, "stop": ["xyz", stop], "max_tokens": 60})
    assert content_of(Client(view).read([place, place])) == content_of(Client(view).read())


def check_usage(mended: list[Json], whole: list[Json], document: Json) -> None:
    usage, real = mended[-1]["usage"], whole[-1]["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] == CACHED_TOKENS
    del real["prompt_tokens_details"]
    if usage != real:  # its text was counted, after its end: that leaves the end token out, and cuts a word
        assert not document.get("return_token_ids")
        assert "stop" in document or usage["completion_tokens"] == real["completion_tokens"] - 1
        assert usage["total_tokens"] == real["prompt_tokens"] + usage["completion_tokens"]
    told = [event["usage"]["completion_tokens"] for event in mended if event.get("usage")]
    assert told == sorted(told)


# --- the request for the rest -------------------------------------------------------------------


def continuation(document: Json, *, model_len: int | None = 100, **fields: Any) -> Continuation:
    """A prompt of four tokens, of which three were answered."""
    return Continuation(
        view=view_of(document),
        sent=sent_of(**{"is_chat": "messages" in document, **fields}),
        prompt=ids_of([1, 2, 3, 4]),
        said=ids_of([5, 6, 7]),
        model_len=model_len,
    )


def rest_of(document: Json, **fields: Any) -> Json | None:
    rest = continuation(document, **fields).rest()
    return None if rest is None else json.loads(joined(rest.common)) | json.loads(rest.own_json)


def test_the_rest_of_a_chat_is_a_completion() -> None:
    sampling = {"temperature": 0.5, "seed": 3, "stop": ["\n"], "cache_salt": "s", "logit_bias": {"5": 1}}
    chat_only = {"chat_template_kwargs": {}, "user": "me", "n": 1, "tools": None, "parallel_tool_calls": True}
    limits = {"max_tokens": 90, "max_completion_tokens": 20, "min_tokens": 5}
    assert rest_of(CHAT | sampling | chat_only | limits) == {
        "model": "tiny",
        "stream": True,
        "user": "me",
        "prompt": [1, 2, 3, 4, 5, 6, 7],
        "max_tokens": 17,
        "min_tokens": 2,
        **sampling,
    }


def test_the_rest_of_a_completion_keeps_fields_that_nobody_knows() -> None:
    rest = rest_of(COMPLETION | {"max_tokens": 10, "min_tokens": 1, "of_another_engine": [1]})
    ids = {"prompt": [1, 2, 3, 4, 5, 6, 7], "max_tokens": 7, "min_tokens": 0}
    assert rest == COMPLETION | {"of_another_engine": [1]} | ids


@pytest.mark.parametrize(
    ("document", "model_len", "limit"),
    [
        (CHAT, 100, 93),
        (CHAT | {"max_tokens": 50}, None, 47),
        (CHAT | {"max_tokens": 50, "max_completion_tokens": None}, 20, 13),
        (COMPLETION, None, 13),
        (COMPLETION | {"max_tokens": None, "max_completion_tokens": 3}, 100, 13),
    ],
)
def test_what_was_sent_counts(document: Json, model_len: int | None, limit: int) -> None:
    rest = rest_of(document, model_len=model_len)
    assert rest is not None
    assert rest["max_tokens"] == limit


@pytest.mark.parametrize("limit", [9, 9.0, "9", " 9.0 ", "+9"])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_counts_however_it_is_spelt(name: str, limit: object) -> None:
    rest = rest_of({**CHAT, name: limit, "min_tokens": "5"})
    assert rest is not None
    assert (rest["max_tokens"], rest["min_tokens"]) == (6, 2)


def test_a_chat_without_limit_needs_the_length_of_the_context() -> None:
    with pytest.raises(CannotContinue, match="context"):
        rest_of(CHAT, model_len=None)


def test_a_field_that_the_worker_reads_otherwise() -> None:
    with pytest.raises(CannotContinue, match="'min_tokens' cannot be read"):
        rest_of(CHAT | {"min_tokens": "five"})


# --- stop strings -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["x", ["x", "y"], None, []])
def test_stop_strings_of_one_character_hold_nothing_back(stop: Any) -> None:
    assert rest_of(CHAT | {"stop": stop}, ids=[5, 6, 7]) is not None


def test_a_greedy_answer_begins_again_with_the_word_that_may_be_cut() -> None:
    held = {"stop": ["END"], "temperature": 0}
    said = sent_of(text="one two thr")
    assert text_to_go_on_from(view_of(CHAT | held), said) == "one two"
    assert text_to_go_on_from(view_of(CHAT | held | {"include_stop_str_in_output": True}), said) == said.text
    assert text_to_go_on_from(view_of(CHAT | held | {"temperature": 1}), said) == said.text
    assert text_to_go_on_from(view_of(CHAT | held | {"stop": "\n"}), said) == said.text
    assert text_to_go_on_from(view_of(CHAT | held), sent_of(text="thr")) == ""
    assert text_to_go_on_from(view_of(CHAT | held), sent_of(text="\u4e00" * 300)) == "\u4e00" * 300


def test_ids_that_were_sent_before_their_text_cannot_be_gone_on_with() -> None:
    assert rest_of(CHAT | {"stop": "END"}) is not None
    with pytest.raises(CannotContinue, match="hold text back"):
        rest_of(CHAT | {"stop": "END"}, ids=[5, 6, 7])


@pytest.mark.parametrize(
    ("text", "is_open"), [("abE", True), ("abEN", True), ("abEND", False), ("ab", False)]
)
def test_a_stop_string_that_is_part_of_the_answer_may_have_begun(text: str, is_open: bool) -> None:
    document = CHAT | {"stop": ["END"], "include_stop_str_in_output": True}
    if is_open:
        with pytest.raises(CannotContinue, match="may have begun"):
            rest_of(document, text=text)
    else:
        assert rest_of(document, text=text) is not None


# --- nothing but the ending ---------------------------------------------------------------------

USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(("document", "model_len"), [(CHAT | {"max_tokens": 3}, 100), (CHAT, 7)])
def test_a_stream_that_has_had_its_tokens_gets_its_ending(document: Json, model_len: int) -> None:
    cut = continuation(document | USAGE, model_len=model_len)
    assert cut.rest() is None
    finish, usage = events_in(cut.ending())
    assert finish["choices"] == [
        {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "length"}
        | {"stop_reason": None}
    ]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert {event["id"] for event in (finish, usage)} == {"one"}


def test_no_usage_for_who_did_not_ask() -> None:
    assert len(events_in(continuation(CHAT, model_len=7).ending())) == 1


@pytest.mark.parametrize(
    ("document", "fields", "usages"),
    [
        (CHAT, {}, 0),
        (CHAT, {"usage": Usage(4, 9)}, 0),
        (CHAT | USAGE, {"usage": Usage(4, 9)}, 1),
        (CHAT | USAGE, {"usage": Usage(4, 9), "has_final_usage": True}, 0),
    ],
)
def test_an_ending_that_needs_no_count(document: Json, fields: Json, usages: int) -> None:
    ended = sent_of(finish_reason="stop", **fields)
    assert continuation(document, finish_reason="stop", **fields).rest() is None
    ending = ending_without_count(view_of(document), ended, 2)
    assert ending is not None
    assert [event["usage"]["completion_tokens"] for event in events_in(ending)] == [9] * usages


def test_an_ending_that_needs_a_count() -> None:
    assert ending_without_count(view_of(CHAT), sent_of(), None) is None
    assert ending_without_count(view_of(CHAT | USAGE), sent_of(finish_reason="stop"), None) is None


def test_a_stream_that_has_ended_gets_nothing() -> None:
    assert ending_without_count(view_of(CHAT), sent_of(finish_reason="stop", is_done=True), None) == b""


# --- which requests -----------------------------------------------------------------------------

HARMLESS = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": None,
    "vllm_xargs": {},
    "response_format": {"type": "text"},
    "include_reasoning": True,
    "temperature": 1,
    "stop": ["a"],
    "echo": False,
}


@pytest.mark.parametrize(
    "document", [CHAT | HARMLESS, COMPLETION | HARMLESS, COMPLETION | {"prompt": [[1, 2]]}]
)
def test_requests_that_can_be_gone_on_with(document: Json) -> None:
    assert replaceable(view_of(document | HARMLESS)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"best_of": 2},
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 2},
        {"prompt_logprobs": 0},
        {"response_format": {"type": "json_object"}},
        {"response_format": 3},
        {"guided_json": {}},
        {"structured_outputs": {"regex": "a"}},
        {"echo": True},
        {"use_beam_search": True},
        {"prompt_embeds": "x"},
        {"include_reasoning": False},
        {"repetition_detection": {"max_pattern_size": 3}},
        {"thinking_token_budget": 10},
        {"truncate_prompt_tokens": 9},
        {"vllm_xargs": {"a": 1}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": [{"image_url": {}}]}]},
        {"messages": "none"},
        {"prompt": ["a", "b"]},
    ],
)
def test_requests_that_cannot_be_gone_on_with(fields: Json) -> None:
    assert replaceable(view_of(CHAT | fields))


def test_messages_of_text_parts_and_past_tool_calls_can_be_gone_on_with() -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert replaceable(view_of(CHAT | {"messages": [said, parts]})) is None


@pytest.mark.parametrize(
    ("fields", "is_replaceable"),
    [
        ('"tools": [ ]', True),
        ('"vllm_xargs": {\n}', True),
        ('"n": 1.0', True),
        ('"n": "1"', True),
        ('"best_of": true', True),
        ('"n": 2.0', False),
        ('"logprobs": 0', False),
        ('"tools": [ NaN ]', False),
    ],
)
def test_what_a_field_says_does_not_depend_on_its_spelling(fields: str, is_replaceable: bool) -> None:
    body = f'{{"model":"tiny","messages":[{{"role":"user","content":"Hi"}}],"stream":true,{fields}}}'
    assert (replaceable(view_request(body.encode())) is None) is is_replaceable


def test_each_reason_names_its_field() -> None:
    for name in REFUSED:
        assert replaceable(view_of(CHAT | {name: ["x"]})) == f"'{name}' was asked for"
