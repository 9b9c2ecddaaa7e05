from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.wire import sse
from orchestrator.wire.judge import InvalidStream, WorkerFailed
from orchestrator.wire.sse import DONE, EventStream, WholeEvents, has_begun
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


FINISH = event({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
STREAM = b"".join(
    [
        token("a"),
        b": comment\n\n",
        token('say "usage":{'),
        token("é\u2028x"),
        FINISH,
        usage_event(21, 21),
        DONE,
    ]
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
    relayed(stream, [FINISH + usage_event(21, cached) + DONE])
    assert stream.kv is outcome


def test_continuous_usage_is_left_alone() -> None:
    chunk = event({"choices": [{"delta": {}}], "usage": usage(21, 3)})
    stream = EventStream(hides_usage=True, cached_tokens=9)
    assert relayed(stream, [chunk, FINISH, DONE]) == chunk + FINISH + DONE
    assert stream.kv is Kv.UNKNOWN


@pytest.mark.parametrize(
    "document", [{"choices": [], "usage": None}, {"choices": [], "usage": 3}, {"usage": {}}]
)
def test_what_is_no_usage_event_is_left_alone(document: Any) -> None:
    stream = event(document) + FINISH + DONE
    assert relayed(EventStream(hides_usage=True), [stream]) == stream


def test_events_that_end_in_crlf_are_whole_events_too() -> None:
    stream = EventStream()
    assert stream.feed(b"data: 1\r\n\r\ndata: 2\r\n\r") == b"data: 1\r\n\r\n"
    assert stream.feed(b"\n" + FINISH + DONE) == b"data: 2\r\n\r\n" + FINISH + DONE
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
    assert json.loads(failure.value.content) == document


def test_a_request_that_the_worker_has_ended_is_no_whole_one() -> None:
    ended = event({"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "abort"}]})
    with pytest.raises(InvalidStream):
        EventStream().feed(token("a") + ended + DONE)


def test_text_that_looks_like_such_an_end_is_text() -> None:
    stream = token('"finish_reason":"abort"') + token("abort") + FINISH + DONE
    assert EventStream().feed(stream) == stream


@pytest.mark.parametrize("text", ['{"error":1}', '{"error"', '\\{"error"', '"}{"error":{}}'])
def test_text_that_looks_like_an_error_is_text(text: str) -> None:
    stream = token(text) + event({"choices": [], "x": {"error": 1}}) + FINISH + DONE
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


# --- what a stream is judged by -----------------------------------------------------------------


def choice(text: str = "", reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}


def said(text: str, **more: Any) -> bytes:
    return event({"id": "c", "choices": [choice(text)], **more})


@pytest.mark.parametrize("places", [[], [3], [40, 41, 90], list(range(0, 600, 7))])
def test_a_stream_without_an_end_for_its_choice_is_not_whole(places: list[int]) -> None:
    stream = EventStream()
    whole = ROLE + said("a") + said("b")
    sent = b"".join(stream.feed(chunk) for chunk in cut(whole, places))
    assert sent == whole
    with pytest.raises(InvalidStream, match="finish_reason"):
        stream.feed(DONE)
    assert not stream.is_done


def test_the_end_need_not_be_the_last_event() -> None:
    stream = said("a") + event({"choices": [choice("b", "length")]}) + said("") + b": bye\n\n" + DONE
    for hides in (False, True):
        assert relayed(EventStream(hides_usage=hides), [stream]).count(b"data:") == 4


@pytest.mark.parametrize(("choices", "ended"), [(2, [0, 1]), (3, [2, 0, 1]), (0, [0]), (0, [0, 1])])
def test_each_choice_has_its_end(choices: int, ended: list[int]) -> None:
    events = [event({"choices": [choice("x", "stop", index)]}) for index in ended]
    whole = EventStream(choices=choices)
    assert relayed(whole, [*events, DONE]) == b"".join([*events, DONE])
    short = EventStream(choices=choices)
    for each in events[1:]:
        short.feed(each)
    with pytest.raises(InvalidStream):
        short.feed(DONE)


def test_choices_of_one_event_end_together() -> None:
    events = event({"choices": [choice("x", "stop", 0), choice("x", None, 1)]})
    rest = event({"choices": [choice("x", "stop", 1)]})
    assert relayed(EventStream(choices=2), [events, rest, DONE]) == events + rest + DONE


ERRORS = [
    b'data: {"error": {"message": "boom", "code": 500}}\n\n',
    b'data: { "error" : {"message":"boom","code":500}}\n\n',
    b'data:{"error":{"message":"boom"}}\n\n',
    b'data: {"message":"failed","error":{"message":"boom"}}\n\n',
    b'data: {"\\u0065rror":{"message":"boom"}}\n\n',
    b'data: {"error":{"message":"boom"},"choices":[{"index":0,"delta":{},"finish_reason":"error"}]}\n\n',
    b'event: error\ndata: {"type":"error","message":"boom"}\n\n',
    b'event:error\r\ndata: {"message":"boom"}\r\n\r\n',
    b'data: {"error":{"message":"boom"}}\nevent: error\n\n',
    b'error: {"message":"boom","code":500}\n\n',
    b'data: {"object":"error","message":"boom","code":500}\n\n',
    b'data: { "object": "error", "message": "boom", "type": "X", "param": null, "code": 500 }\n\n',
    b"event: error\ndata: boom\n\n",
]


@pytest.mark.parametrize("failed", ERRORS)
@pytest.mark.parametrize("before", [b"", ROLE, ROLE + said("a") + said("b")], ids=["", "role", "tokens"])
def test_an_error_is_one_however_it_is_spelt(failed: bytes, before: bytes) -> None:
    stream = EventStream()
    stream.feed(before)
    with pytest.raises(WorkerFailed) as failure:
        stream.feed(failed + DONE)
    assert failure.value.status == 500
    assert json.loads(failure.value.content)["error"]["message"] == "boom"


@pytest.mark.parametrize("spelling", ['"finish_reason" : "%s"', '"finish\\u005freason":"%s"'])
@pytest.mark.parametrize(("reason", "kind"), [("abort", InvalidStream), ("error", WorkerFailed)])
@pytest.mark.parametrize("before", [b"", said("a") + said("b")], ids=["first", "later"])
def test_an_end_that_is_none(spelling: str, reason: str, kind: type[Exception], before: bytes) -> None:
    stream = EventStream()
    stream.feed(before)
    ended = 'data: {"id":"c","choices":[{"index":0,"delta":{"content":""},"logprobs":null,%s}]}\n\n'
    with pytest.raises(kind):
        stream.feed((ended % (spelling % reason)).encode() + DONE)


def test_nothing_behind_the_end_is_sent() -> None:
    stream = EventStream()
    assert stream.feed(said("a") + FINISH + DONE + said("b")) == said("a") + FINISH + DONE
    assert stream.feed(said("c")) == b""
    stream.finish()


# --- what comes before the first word -----------------------------------------------------------


def test_comments_pass_at_once_and_roles_wait() -> None:
    stream = EventStream()
    assert stream.feed(b": ping\n\n" + ROLE) == b": ping\n\n"
    assert not stream.has_begun
    assert stream.feed(b": p") == b""
    assert stream.feed(b"ing\n\n") == b": ping\n\n"
    assert stream.feed(said("a") + b": ping\n\n") == ROLE + said("a") + b": ping\n\n"
    assert stream.has_begun


def test_an_opening_that_says_nothing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.sse.MAX_OPENING_BYTES", 1000)
    stream = EventStream()
    for _ in range(1000 // len(ROLE)):
        assert stream.feed(ROLE) == b""
    with pytest.raises(InvalidStream, match="says nothing"):
        stream.feed(ROLE)


# --- what concerns engines, and the last event --------------------------------------------------

PARAMS = {"remote_host": "10.0.0.1", "remote_port": 5600, "remote_block_ids": [[1]]}


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("place", range(5))
def test_transfer_parameters_never_reach_the_client(name: str, place: int) -> None:
    documents: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [choice("a")]},
        {"choices": [choice("b")]},
        {"choices": [choice("", "stop")]},
        {"choices": [], "usage": usage(21, 21)},
    ]
    documents[place] |= {name: PARAMS}
    sent = relayed(EventStream(), [*map(event, documents), DONE])
    assert b"10.0.0.1" not in sent
    assert sent.count(b"data:") == 6


@pytest.mark.parametrize("together", [True, False])
def test_the_fingerprint_moves_into_the_last_event(together: bool) -> None:
    ended = event({"id": "c", "choices": [choice("", "stop")]})
    told = event({"id": "c", "choices": [], "usage": usage(21, 21), "system_fingerprint": "vllm-1"})
    chunks = [said("a"), ended, told, DONE]
    stream = EventStream(hides_usage=True)
    sent = relayed(stream, [b"".join(chunks)] if together else chunks)
    first, last, done = sent.split(b"\n\n")[:3]
    assert first + b"\n\n" == said("a")
    assert json.loads(last[6:]) == {
        "id": "c",
        "choices": [choice("", "stop")],
        "system_fingerprint": "vllm-1",
    }
    assert done == b"data: [DONE]"
    assert relayed(EventStream(), chunks) == b"".join(chunks)


@pytest.mark.parametrize("together", [True, False])
def test_the_fingerprint_moves_into_the_last_event_of_each_choice(together: bool) -> None:
    documents: list[Any] = [
        {"id": "c", "choices": [choice("a") | {"index": 0}]},
        {"id": "c", "choices": [choice("b", "stop") | {"index": 1}]},
        {"id": "c", "choices": [choice("c") | {"index": 0}]},
        {"id": "c", "choices": [choice("d", "length") | {"index": 0}]},
    ]
    told = {"id": "c", "choices": [], "usage": usage(21, 21), "system_fingerprint": "vllm-1"}
    chunks = [*map(event, documents), event(told), DONE]
    sent = relayed(EventStream(hides_usage=True, choices=2), [b"".join(chunks)] if together else chunks)
    for each in (documents[1], documents[3]):
        each["system_fingerprint"] = "vllm-1"
    assert [json.loads(each[6:]) for each in sent.split(b"\n\n")[:-2]] == [
        documents[0],
        documents[2],
        documents[1],
        documents[3],
    ]
    assert relayed(EventStream(choices=2), chunks) == b"".join(chunks)


def test_ends_without_end_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_OPENING_BYTES", 10_000)
    stream = EventStream(hides_usage=True, choices=2)
    ends = event({"choices": [choice("b", "stop") | {"index": 1}]}) * 1000
    with pytest.raises(InvalidStream, match="does not come to its end"):
        stream.feed(ends)


def test_a_stream_of_one_token_begins_with_its_last_event() -> None:
    stream = EventStream(hides_usage=True)
    assert stream.feed(ROLE + event({"choices": [choice("a", "length")]})) == b""
    assert stream.has_begun
    assert stream.feed(usage_event(3, 3) + DONE).count(b"data:") == 3
    assert stream.has_begun
    assert stream.is_done


def test_both_counts_of_the_prefix_cache_are_the_prefill_workers() -> None:
    told = usage(430, 430)
    told["prompt_tokens_details"]["created_cache_tokens"] = 0
    stream = EventStream(cached_tokens=16, created_tokens=384)
    sent = stream.feed(FINISH + event({"choices": [], "usage": told}))
    details = json.loads(sent.split(b"\n\n")[1][6:])["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 16, "created_cache_tokens": 384}


# --- work ---------------------------------------------------------------------------------------


class Counter:
    """It counts the bytes that a function of `wire.sse` is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.bytes = 0
        for name in names:
            function = getattr(sse, name)
            monkeypatch.setattr(sse, name, lambda data, function=function: self._count(function, data))

    def _count(self, function: Any, data: bytes) -> Any:
        self.bytes += len(data)
        return function(data)


@pytest.mark.pure  # it replaces functions
@pytest.mark.parametrize("piece", [b": ping\n\n", b": ping\n\n" * 100, ROLE, ROLE * 20])
def test_an_opening_is_looked_at_once(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch, "split_events", "payload_of", "completion_of")
    stream = EventStream()
    for _ in range(200):
        stream.feed(piece)
    assert not stream.has_begun
    assert counter.bytes <= 4 * 200 * len(piece)  # each byte by each, payloads twice


@pytest.mark.pure
@pytest.mark.parametrize("size", [1, 100, 1024])
def test_a_large_event_in_small_pieces_is_looked_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seams = 0
    joined = WholeEvents._joined

    def counting(events: WholeEvents, pending: bytearray, chunk: bytes) -> bytes:
        nonlocal seams
        before = len(pending)
        whole = joined(events, pending, chunk)
        assert len(pending) - before == len(chunk)  # what was there is left where it is
        seams += 1
        return whole

    monkeypatch.setattr(WholeEvents, "_joined", counting)
    large = said("x" * 64 * 1024)
    counter = Counter(monkeypatch, "split_events", "completion_of")
    stream = EventStream()
    sent = [stream.feed(large[at : at + size]) for at in range(0, len(large), size)]
    assert b"".join(sent) == large
    assert seams == len(sent) - 1
    assert counter.bytes < 2 * len(large) + 100


@pytest.mark.pure
def test_events_that_differ_in_their_text_alone_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(monkeypatch, "completion_of")
    stream = EventStream(hides_usage=True)
    stream.feed(ROLE + said("a"))
    counter.bytes = 0
    for number in range(50):
        assert stream.feed(said(f"word {number}")) == said(f"word {number}")
    assert stream.feed(said("b") + said("c") * 5) == said("b") + said("c") * 5
    assert counter.bytes == 0
