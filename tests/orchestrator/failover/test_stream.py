from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.failover.stream import ContinuedStream, Envelope
from orchestrator.failover.transcript import Usage
from orchestrator.wire.judge import InvalidStream, WorkerFailed
from orchestrator.wire.sse import DONE
from orchestrator.wire.usage import Kv
from tests.orchestrator.wire.cut_streams import events_in, sent_of

Json = dict[str, Any]

HEAD: Json = {"id": "cmpl-2", "object": "text_completion", "created": 9, "model": "other"}


def event(*choices: Json, **more: Any) -> bytes:
    return b"data: " + json.dumps({**HEAD, "choices": list(choices), **more}).encode() + b"\n\n"


def said(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    return event({**choice, "prompt_token_ids": [1, 2, 3], "token_ids": [4], **more})


LAST = said("a", finish_reason="stop", system_fingerprint="f")


def usage_event(cached: int | None = 9) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return event(usage={"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, **details})


def stream(
    *, hides_usage: bool = False, cached_tokens: int | None = 5, again: str = "", **fields: Any
) -> ContinuedStream:
    """Of a prompt of six tokens that was answered with three."""
    return ContinuedStream(
        Envelope(sent_of(**fields)),
        Usage(6, 3),
        hides_usage=hides_usage,
        cached_tokens=cached_tokens,
        again=again,
    )


def test_a_chat_gets_chat_events() -> None:
    events = events_in(stream().feed(said("a") + said("b", finish_reason="stop", stop_reason="!") + DONE))
    head = {"id": "one", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}
    first = {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "token_ids": [4]}
    last = first | {"delta": {"content": "b"}, "finish_reason": "stop", "stop_reason": "!"}
    assert events == [{**head, "choices": [first]}, {**head, "choices": [last]}]


def test_a_completion_keeps_its_events_but_for_its_name_and_the_prompt() -> None:
    (continued,) = events_in(stream(is_chat=False).feed(LAST + DONE))
    (worker,) = events_in(LAST + DONE)
    worker["choices"][0]["prompt_token_ids"] = None
    assert continued == worker | {"id": "one", "created": 7, "model": "tiny"}


def test_a_chat_without_its_role_gets_it_once() -> None:
    continued = stream(has_role=False)
    events = events_in(continued.feed(said("a")) + continued.feed(said("b", finish_reason="stop") + DONE))
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]


@pytest.mark.parametrize(("known", "told"), [(5, 5), (0, 0), (None, 6)])
def test_usage_is_that_of_one_stream(known: int | None, told: int) -> None:
    continued = stream(cached_tokens=known)
    _, event = events_in(continued.feed(LAST + usage_event() + DONE))
    counts = {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert event["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": told}}
    assert continued.kv is Kv.TRANSFERRED  # all nine of the new prompt


def test_a_worker_that_tells_no_details() -> None:
    continued = stream()
    _, event = events_in(continued.feed(LAST + usage_event(None) + DONE))
    assert "prompt_tokens_details" not in event["usage"]
    assert continued.kv is Kv.UNKNOWN


def test_usage_that_nobody_asked_for_is_withheld() -> None:
    continued = stream(hides_usage=True)
    assert continued.feed(said("a") + LAST + usage_event(0) + DONE).count(b"data:") == 3
    assert continued.kv is Kv.RECOMPUTED


@pytest.mark.parametrize("texts", [["thr", "ee", " four"], ["th", "ree four"], ["", "three four"]])
def test_what_the_client_has_is_left_out(texts: list[str]) -> None:
    events = events_in(
        stream(again="thr").feed(b"".join(map(said, texts)) + said("", finish_reason="stop") + DONE)
    )
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "ee four"


@pytest.mark.parametrize("texts", [["tho"], ["t", "a"], ["x"]])
def test_a_worker_that_says_something_else(texts: list[str]) -> None:
    with pytest.raises(InvalidStream, match="something else"):
        stream(again="thr").feed(b"".join(map(said, texts)))


def test_a_worker_that_ends_too_early() -> None:
    with pytest.raises(InvalidStream, match="left out"):
        stream(again="thr").feed(said("th", finish_reason="stop"))


def test_an_error_stays_one() -> None:
    failed = b'data: {"error": {"message": "KV load failed", "code": 500}}\n\n'
    with pytest.raises(WorkerFailed):
        stream().feed(failed + DONE)


def test_comments_stay() -> None:
    assert stream().feed(b": ping\n\n") == b": ping\n\n"


@pytest.mark.parametrize("payload", [b"{", b"3", b'{"choices": [], "usage": \xff}'])
def test_an_event_that_cannot_be_read(payload: bytes) -> None:
    with pytest.raises(InvalidStream, match="cannot be read"):
        stream().feed(b"data: %b\n\n" % payload)


def test_a_stream_that_is_cut_again_is_not_taken_for_a_whole_one() -> None:
    continued = stream()
    whole = LAST + DONE
    sent = continued.feed(whole[:-3])
    with pytest.raises(InvalidStream):
        continued.finish()
    assert sent + continued.feed(whole[-3:]) == stream().feed(whole)
    continued.finish()
