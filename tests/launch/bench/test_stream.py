from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.sample import Sample
from launch.bench.stream import TokenClock, error_text
from orchestrator.wire.judge import InvalidStream
from tests.launch.bench.fakes import DONE, event, text


def read(*chunks: bytes, finish: bool = True) -> Sample:
    """Chunk number n comes at n seconds."""
    sample = Sample(due=0.0, sent=0.0)
    seconds = itertools.count()
    clock = TokenClock(sample, now=lambda: float(next(seconds)))
    for chunk in chunks:
        assert clock(chunk)
    if finish:
        clock.finish()
    return sample


def test_a_token_counts_when_it_comes() -> None:
    sample = read(text("a"), text("b"), text("c"), DONE)
    assert list(sample.arrivals) == [0, 1, 2]
    assert sample.is_ok


def test_events_of_one_read_come_together() -> None:
    assert list(read(text("a") + text("b"), text("c") + DONE).arrivals) == [0, 0, 1]


def test_an_event_counts_when_it_is_whole() -> None:
    token = text("a")
    assert list(read(token[:9], token[9:-1], token[-1:], DONE).arrivals) == [2]


@given(st.data())
def test_however_the_stream_is_cut(data: st.DataObject) -> None:
    whole = text(None, role="assistant") + text("a") + text("é") + event(choices=[]) + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    chunks = [whole[start:end] for start, end in itertools.pairwise([0, *cuts, len(whole)])]
    sample = read(*chunks)
    assert len(sample.arrivals) == 2
    assert list(sample.arrivals) == sorted(sample.arrivals)


@pytest.mark.parametrize(
    "silent",
    [
        text(None, role="assistant"),
        text("", role="assistant"),
        text(None, tool_calls=[]),
        event(choices=[{"delta": {}, "finish_reason": "stop"}]),
        event(choices=[{"index": 0, "finish_reason": "stop"}]),
        event(choices=[], usage={"prompt_tokens": 1}),
        b": a comment\n\n",
    ],
)
def test_what_opens_or_closes_is_no_token(silent: bytes) -> None:
    assert list(read(silent, text("a"), silent, DONE).arrivals) == [1]


@pytest.mark.parametrize("field", ["content", "reasoning", "reasoning_content"])
def test_thoughts_are_tokens(field: str) -> None:
    assert list(read(event(choices=[{"delta": {field: "hm"}}]), DONE).arrivals) == [0]


def test_a_token_without_a_text_of_its_own_counts() -> None:
    """Half a character, or what ends the answer: vLLM sends an event for it."""
    last = event(choices=[{"delta": {"content": ""}, "finish_reason": "length"}])
    assert list(read(text(""), text("é"), last, DONE).arrivals) == [0, 1, 2]


def test_some_endpoints_repeat_the_role() -> None:
    assert len(read(text("a", role="assistant"), text("b", role="assistant"), DONE).arrivals) == 2


def test_tool_calls_are_tokens() -> None:
    assert list(read(text(None, tool_calls=[{"index": 0}]), DONE).arrivals) == [0]


def test_usage_is_taken_whenever_it_comes() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    sample = read(text("a") + event(choices=[], usage=usage) + DONE)
    assert sample.usage is not None
    assert (sample.usage.prompt_tokens, sample.output_tokens, sample.usage.cached_tokens) == (9, 2, 4)


def test_crlf() -> None:
    assert list(read(text("a").replace(b"\n", b"\r\n"), DONE.replace(b"\n", b"\r\n")).arrivals) == [0]


@pytest.mark.parametrize("end", [(DONE,), (), (b"",)], ids=["done", "cut", "empty"])
def test_an_error_in_the_stream(end: tuple[bytes, ...]) -> None:
    sample = read(text("a"), event(error={"message": "out of\nmemory", "code": 500}), *end)
    assert (sample.error, sample.detail) == ("error in stream", "out of memory")
    assert list(sample.arrivals) == [0]


def test_a_stream_that_says_nothing_is_no_answer() -> None:
    assert read(text(None, role="assistant"), DONE).error == "no token"


@pytest.mark.parametrize("end", [b"", text("b"), b"data: [DO"])
def test_a_stream_that_ends_short_is_broken(end: bytes) -> None:
    with pytest.raises(InvalidStream):
        read(text("a"), end)


@pytest.mark.parametrize(
    "payload", [b"hello", b"{", b"[]", b'{"choices": 3}', b'{"choices": [{"delta": 1}]}', b"\xff"]
)
def test_what_openai_never_sends(payload: bytes) -> None:
    with pytest.raises(InvalidStream):
        read(b"data: " + payload + b"\n\n", finish=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', "{'detail': 'Not Found'}"),
        (b'{"message": "too long"}', "too long"),
        (b"<html>\n<b>502</b>\n", "<html> <b>502</b>"),
        (b"\x1b[2Jhi\xff", "[2Jhi\ufffd"),
        (b"", ""),
        (b"x" * 1000, "x" * 200),
    ],
)
def test_what_an_error_says_is_one_short_line(content: bytes, said: str) -> None:
    assert error_text(content) == said
