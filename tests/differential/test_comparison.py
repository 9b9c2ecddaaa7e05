"""What makes two answers differ, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.differential.answers import differences, events_of, merged
from tests.differential.case import chat
from tests.differential.compare import missing, unexplained


def event(text: str, index: int = 0, end: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": end}]}


def test_tokens_may_come_together() -> None:
    apart = [event("a"), event("b"), event("c", end="stop"), "data: [DONE]"]
    assert merged(apart) == merged([event("ab"), event("c", end="stop"), "data: [DONE]"])


def test_choices_may_take_turns() -> None:
    one = [event("a"), event("x", 1), event("b", end="stop"), event("y", 1, "stop")]
    other = [event("a"), event("b", end="stop"), event("x", 1), event("y", 1, "stop")]
    assert merged(one) == merged(other)


@pytest.mark.parametrize(
    "other",
    [
        [event("b"), event("a", end="stop")],
        [event("a"), event("b", end="length")],
        [event("a", end="stop"), event("b")],
        [event("a"), event("b", end="stop"), event("")],
    ],
    ids=["order", "reason", "early end", "one more"],
)
def test_all_else_differs(other: list[Any]) -> None:
    assert merged([event("a"), event("b", end="stop")]) != merged(other)


def test_a_stream_that_breaks_off_is_none() -> None:
    with pytest.raises(AssertionError):
        events_of('data: {"a": 1}\n\ndata: {"b"')


def test_a_true_is_no_1_and_nothing_is_no_null() -> None:
    found = differences({"a": True, "b": 1, "c": 0.5}, {"a": 1, "b": 1, "c": 0.501, "d": None})
    assert found == {"a": (True, 1), "d": (..., None)}


def test_a_difference_needs_a_reason_and_a_reason_a_difference() -> None:
    case = chat("x", differs=("own words",))
    found = {"$.error.message": ("a", "b"), "status": (400, 200), "header x-baton-path": ("x", ...)}
    assert unexplained(case, found) == ["status: 400, a worker's is 200"]
    assert missing(case, found) == []
    assert missing(case, {"status": (400, 200)}) == ["own words"]
