"""What is right, what is an error, and what is neither."""

from __future__ import annotations

import json
from typing import Any

import pytest

from worker.sim.questions import Outcome, Question, WrongAnswer, chat, completion, judge, judge_part

WHOLE = completion("What is prefill?", 3, is_stream=False)
STREAM = completion("What is prefill?", 3, is_stream=True)
ERROR = {"error": {"message": "no", "type": "Unavailable", "code": 503}}
DONE = "data: [DONE]\n\n"


def event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def piece(text: str, finish: str | None = None, *, id: str = "a") -> str:
    return event({"id": id, "choices": [{"text": text, "finish_reason": finish}]})


def words(question: Question) -> list[str]:
    return [f" {word}" for word in question.answer.split()]


def whole(text: str, finish: str = "length") -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": finish}]})


FIRST, SECOND, THIRD = words(STREAM)
RIGHT = piece(FIRST) + piece(SECOND) + piece(THIRD, "length") + DONE


def test_chats_and_completions_have_answers_of_their_own() -> None:
    assert chat("What is prefill?", 3, is_stream=False).answer != WHOLE.answer
    assert len(words(WHOLE)) == 3


@pytest.mark.parametrize(("question", "content"), [(WHOLE, whole(WHOLE.answer)), (STREAM, RIGHT)])
def test_the_answer_is_right(question: Question, content: str) -> None:
    assert judge(question, 200, content) is Outcome.RIGHT


def test_an_error_that_says_so() -> None:
    assert judge(WHOLE, 503, json.dumps(ERROR)) is Outcome.ERROR
    assert judge(STREAM, 200, piece(FIRST) + event(ERROR) + DONE) is Outcome.ERROR


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(RIGHT.removesuffix(DONE), id="no end"),
        pytest.param(piece(FIRST) + piece(SECOND) + DONE, id="short and clean"),
        pytest.param(RIGHT.replace(SECOND, SECOND + SECOND), id="a word twice"),
        pytest.param(piece(FIRST) + RIGHT, id="an event twice"),
        pytest.param(piece("".join(words(STREAM)[:2])) + piece(THIRD) + DONE, id="no finish_reason"),
        pytest.param(piece(FIRST + SECOND, "length") + piece(THIRD, "length") + DONE, id="two of them"),
        pytest.param(piece(FIRST + SECOND) + piece(THIRD, "length", id="b") + DONE, id="two ids"),
        pytest.param(piece(SECOND) + event(ERROR) + DONE, id="an error after something wrong"),
        pytest.param(event(ERROR) + piece(FIRST) + DONE, id="more after an error"),
        pytest.param(event({"error": {"message": "no"}}) + DONE, id="an error without a code"),
        pytest.param("data: {\n\n" + DONE, id="garbage"),
    ],
)
def test_streams_that_are_wrong(content: str) -> None:
    with pytest.raises(WrongAnswer):
        judge(STREAM, 200, content)


@pytest.mark.parametrize("content", [whole(WHOLE.answer[:-1]), whole(WHOLE.answer, "stop"), "{}", "not JSON"])
def test_whole_answers_that_are_wrong(content: str) -> None:
    with pytest.raises(WrongAnswer):
        judge(WHOLE, 200, content)


@pytest.mark.parametrize("content", ["", "data: {", piece(FIRST), piece(FIRST) + "data: ", RIGHT])
def test_a_part_of_the_answer(content: str) -> None:
    judge_part(STREAM, content)


def test_a_part_of_something_else_is_wrong() -> None:
    with pytest.raises(WrongAnswer):
        judge_part(STREAM, piece(SECOND))
