from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire.sse import DONE, EventStream, InvalidStream, WorkerFailed, has_begun
from orchestrator.wire.usage import Kv


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event({"id": "c", "choices": [{"index": 0, "delta": {"content": text}}]})


ROLE = event({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})


def usage(prompt: int, cached: int | None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "total_tokens": prompt + 2, "prompt_tokens_details": details}


def usage_event(prompt: int, cached: int | None) -> bytes:
    return event({"id": "c", "choices": [], "usage": usage(prompt, cached)})


STREAM = (
    token("a") + b": comment\n\n" + token('say "usage":{') + token("é\u2028x") + usage_event(21, 21) + DONE
)


def relayed(stream: EventStream, chunks: list[bytes]) -> bytes:
    sent = [stream.feed(chunk) for chunk in chunks]
    assert all(data == b"" or data.endswith(b"\n\n") for data in sent)
    stream.finish()
    return b"".join(sent)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % len(data) for place in places} | {len(data)})
    starts = [0, *ends]
    return [data[start:end] for start, end in zip(starts, ends, strict=False) if start < end]


@given(st.lists(st.integers(0, 10_000)))
def test_events_come_back_byte_for_byte_however_they_are_cut(places: list[int]) -> None:
    assert relayed(EventStream(), cut(STREAM, places)) == STREAM


@given(st.lists(st.integers(0, 10_000)))
def test_a_usage_event_that_nobody_asked_for_is_withheld(places: list[int]) -> None:
    stream = EventStream(hides_usage=True)
    assert relayed(stream, cut(STREAM, places)) == STREAM.replace(usage_event(21, 21), b"")
    assert stream.kv is Kv.TRANSFERRED


@given(st.lists(st.integers(0, 10_000)))
def test_the_usage_event_gets_the_prefill_workers_count(places: list[int]) -> None:
    stream = EventStream(cached_tokens=16)
    assert relayed(stream, cut(STREAM, places)) == STREAM.replace(usage_event(21, 21), usage_event(21, 16))


@pytest.mark.parametrize(
    ("cached", "outcome"),
    [
        (21, Kv.TRANSFERRED),
        (0, Kv.RECOMPUTED),
        (16, Kv.RECOMPUTED),
        (None, Kv.UNKNOWN),
    ],
)
def test_the_usage_event_is_the_evidence(cached: int | None, outcome: Kv) -> None:
    stream = EventStream()
    relayed(stream, [usage_event(21, cached) + DONE])
    assert stream.kv is outcome


def test_continuous_usage_is_left_alone() -> None:
    chunk = event({"choices": [{"delta": {}}], "usage": usage(21, 3)})
    stream = EventStream(hides_usage=True, cached_tokens=9)
    assert relayed(stream, [chunk, DONE]) == chunk + DONE
    assert stream.kv is Kv.UNKNOWN


@pytest.mark.parametrize(
    "document", [{"choices": [], "usage": None}, {"choices": [], "usage": 3}, {"usage": {}}]
)
def test_what_is_no_usage_event_is_left_alone(document: Any) -> None:
    assert relayed(EventStream(hides_usage=True), [event(document), DONE]) == event(document) + DONE


def test_events_that_end_in_crlf_are_whole_events_too() -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\r\n\r\ndata: 2\r\n\r") == b"data: 1\r\n\r\n"
    assert stream.feed(b"\n" + DONE) == b"data: 2\r\n\r\n" + DONE
    stream.finish()


@pytest.mark.parametrize("end", range(len(STREAM) - 1))
def test_a_stream_cut_anywhere_is_not_taken_for_a_whole_one(end: int) -> None:
    stream = EventStream()
    stream.feed(STREAM[:end])
    with pytest.raises(InvalidStream):
        stream.finish()


def test_an_event_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.sse.MAX_EVENT_BYTES", 100)
    with pytest.raises(InvalidStream):
        EventStream().feed(b"data: " + b"x" * 200)


@pytest.mark.parametrize(
    "before", [b"", b": ping\n\n", ROLE + ROLE, token("a")], ids=["", "ping", "roles", "token"]
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_an_error_among_the_events_is_raised(before: bytes, separators: tuple[str, str]) -> None:
    document = {"error": {"message": "KV load failed", "code": 500}}
    failed = b"data: " + json.dumps(document, separators=separators).encode() + b"\n\n"
    with pytest.raises(WorkerFailed) as failure:
        EventStream().feed(before + failed + DONE)
    assert failure.value.status == 500
    assert json.loads(bytes(failure.value.document["error"])) == document["error"]


def test_a_request_that_the_worker_has_ended_is_no_whole_one() -> None:
    ended = event({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "abort"}]})
    with pytest.raises(InvalidStream):
        EventStream().feed(token("a") + ended + DONE)


def test_text_that_looks_like_such_an_end_is_text() -> None:
    stream = token('"finish_reason":"abort"') + token("abort") + DONE
    assert EventStream().feed(stream) == stream


@pytest.mark.parametrize("text", ['{"error":1}', '{"error"', '\\{"error"', '"}{"error":{}}'])
def test_text_that_looks_like_an_error_is_text(text: str) -> None:
    stream = token(text) + event({"choices": [], "x": {"error": 1}}) + DONE
    assert EventStream().feed(stream) == stream


@pytest.mark.parametrize(
    ("error", "status"),
    [({"code": 404}, 404), ({"code": "x"}, 500), ({}, 500), ("text", 500), ({"code": 7}, 500)],
)
def test_the_status_of_an_error_event(error: Any, status: int) -> None:
    with pytest.raises(WorkerFailed) as failure:
        EventStream().feed(event({"error": error}))
    assert failure.value.status == status


def test_comments_and_roles_say_nothing() -> None:
    assert not has_begun(b": data: x\n\n" + ROLE)
    assert not has_begun(ROLE + DONE)
    assert has_begun(b": ping\n\n" + ROLE + token("a"))


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"role": "assistant", "content": "a"}},
        {"delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"},
        {"delta": {"content": '"role"'}},
        {"text": '"role"'},
    ],
)
def test_a_role_with_more_says_something(choice: Any) -> None:
    assert has_begun(event({"choices": [choice]}))
