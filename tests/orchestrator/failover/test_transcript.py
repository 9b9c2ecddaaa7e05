from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.failover import transcript
from orchestrator.failover.transcript import REDUCE_BYTES, CannotContinue, Sent, TranscriptMemory, Usage
from orchestrator.wire.sse import DONE
from tests.orchestrator.wire.cut_streams import Forwarded

Json = dict[str, Any]

HEAD: Json = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "tiny"}
PLENTY = 1 << 30


def event(*choices: Json, **more: Any) -> bytes:
    """As the engines write them: compact, and characters as they are."""
    document = {**HEAD, "choices": list(choices), **more}
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def chat(content: str, **more: Any) -> bytes:
    return event({"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": None} | more)


def completion(said: str, **more: Any) -> bytes:
    return event({"index": 0, "text": said, "logprobs": None, "finish_reason": None} | more)


ROLE = event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})


def sent_after(*chunks: bytes, memory: TranscriptMemory | None = None) -> Sent:
    kept = Forwarded(memory or TranscriptMemory(PLENTY))
    for chunk in chunks:
        kept.keep(chunk)
    return kept.sent()


# --- what is read -------------------------------------------------------------------------------

texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"', "\\", '\\"},', "\u2028"])
)


@given(texts, st.sampled_from([chat, completion]), st.integers(1, 5))
def test_the_text_is_what_was_said_however_often_it_is_reduced(
    said: list[str], make: Any, every: int
) -> None:
    kept = Forwarded(TranscriptMemory(PLENTY))
    kept.keep(ROLE if make is chat else completion(""))
    for number, part in enumerate(said):
        kept.keep(make(part))
        if number % every == 0:
            kept.reduce()
    sent = kept.sent()
    assert sent.text == "".join(said)
    assert sent.is_chat is sent.has_role is (make is chat)
    assert (sent.id, sent.created, sent.model) == ("chatcmpl-1", 7, "tiny")


@given(texts, st.data())
def test_events_that_are_not_all_alike_are_read_one_by_one(said: list[str], data: st.DataObject) -> None:
    places = data.draw(
        st.lists(st.sampled_from([chat, completion, odd]), min_size=len(said), max_size=len(said))
    )
    events = [make(part) for make, part in zip(places, said, strict=True)]
    assert sent_after(ROLE, b"".join(events)).text == "".join(said)


def odd(said: str) -> bytes:
    """An event that is spelt in another way, with a comment before it."""
    return b": ping\n\n" + chat(said).replace(b'{"id"', b'{"x": "\\"content\\":\\"", "id"')


def test_events_that_end_in_crlf_are_read_too() -> None:
    events = (ROLE + chat("a") + chat("b")).replace(b"\n", b"\r\n")
    assert sent_after(b": ping\r\n\r\n" + events).text == "ab"


def test_a_character_may_be_spread_over_two_events() -> None:
    halves = [chat("x").replace(b'"x"', half) for half in (rb'"\ud83d"', rb'"\ude00"')]
    assert sent_after(ROLE, chat("a") + halves[0] + halves[1] + chat("b")).text == "a\U0001f600b"


def test_token_ids_are_kept_if_every_text_has_them() -> None:
    events = [event({"index": 0, "delta": {"role": "assistant"}}, prompt_token_ids=[1, 2])]
    events += [chat("a", token_ids=[3, 4]), chat("", token_ids=[5])]
    sent = sent_after(*events)
    assert (sent.ids, sent.prompt_ids) == ([3, 4, 5], b"[1,2]")
    assert sent_after(*events, chat("b")).ids is None
    assert sent_after(ROLE).ids == []


def test_a_completion_tells_the_prompts_ids_with_its_first_choice() -> None:
    assert sent_after(completion("a", prompt_token_ids=[1, 2], token_ids=[3])).prompt_ids == b"[1,2]"


def test_the_end_is_seen() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    sent = sent_after(ROLE, chat("a"), chat("", finish_reason="stop", stop_reason=None))
    assert (sent.finish_reason, sent.has_final_usage, sent.is_done) == ("stop", False, False)
    sent = sent_after(ROLE, chat("", finish_reason="stop"), event(usage=usage), DONE)
    assert (sent.usage, sent.has_final_usage, sent.is_done) == (Usage(3, 2), True, True)


def test_usage_that_comes_with_every_event_is_not_the_final_one() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    sent = sent_after(ROLE, event({"index": 0, "delta": {"content": "a"}}, usage=usage))
    assert (sent.usage, sent.has_final_usage) == (Usage(3, 1), False)


# --- what nobody can go on with -----------------------------------------------------------------

NOT_UNDERSTOOD = [
    chat("a", logprobs={"content": []}),
    chat("a", index=1),
    chat("a", citations=[]),
    event({"index": 0, "delta": {"reasoning": "hm"}}),
    event({"index": 0, "delta": {"tool_calls": [{"index": 0}]}}),
    event({"index": 0, "delta": {"content": ["a"]}}),
    b'data: {"error": {"message": "no"}}\n\n',
    b"data: {\n\n",
    b'data: {"id": "chatcmpl-1"}\n\n',
]


@pytest.mark.parametrize("strange", NOT_UNDERSTOOD)
def test_what_is_not_understood_cannot_be_gone_on_with(strange: bytes) -> None:
    with pytest.raises(CannotContinue, match="other than text"):
        sent_after(ROLE, chat("a"), strange, chat("b"))
    with pytest.raises(CannotContinue, match="other than text"):
        sent_after(strange)


def test_a_stream_without_a_name_cannot_be_gone_on_with() -> None:
    with pytest.raises(CannotContinue, match="names the stream"):
        sent_after()
    with pytest.raises(CannotContinue, match="names the stream"):
        sent_after(b": ping\n\n")


# --- bounds -------------------------------------------------------------------------------------


def test_a_long_stream_is_kept_as_its_text() -> None:
    kept, event = Forwarded(memory := TranscriptMemory(PLENTY)), chat("word")
    kept.keep(ROLE)
    for _ in range(10 * REDUCE_BYTES // len(event)):
        kept.keep(event)
        assert sum(map(len, kept.chunks)) < REDUCE_BYTES
    assert memory.used < 2 * REDUCE_BYTES
    assert kept.sent().text == "word" * (10 * REDUCE_BYTES // len(event))


def test_a_stream_that_is_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_KEPT_BYTES", REDUCE_BYTES + 1000)
    kept = Forwarded(memory := TranscriptMemory(PLENTY))
    kept.keep(ROLE)
    kept.keep(chat("x" * 2000))
    with pytest.raises(CannotContinue, match="too long"):
        kept.sent()
    kept.keep(chat("y"))
    assert (kept.chunks, memory.used) == ([], 0)


def test_all_streams_together_have_a_bound() -> None:
    memory = TranscriptMemory(REDUCE_BYTES + 100)
    first, second = Forwarded(memory), Forwarded(memory)
    second.keep(ROLE)
    with pytest.raises(CannotContinue, match="of other streams"):
        second.sent()
    first.close()
    first.close()
    second.close()
    assert memory.used == 0
    assert sent_after(ROLE, memory=memory).has_role
