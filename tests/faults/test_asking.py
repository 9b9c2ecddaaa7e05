"""The judge of answers, in front of a worker that goes wrong in known ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.asking import ask
from tests.orchestrator.running import MODEL, PATIENCE_S
from tests.worker.sim.workers import Worker, running
from worker.sim.questions import Outcome, Question, WrongAnswer, chat, completion

WHOLE = [make("What is prefill?", 10, is_stream=False) for make in (completion, chat)]
STREAMS = [make("What is prefill?", 10, is_stream=True) for make in (completion, chat)]
IN_THE_MIDDLE = 3  # tokens


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with running(model_name=MODEL) as made:
        yield made


def ask_once(
    worker: Worker, question: Question, kind: str, at_token: int | None, patience_s: float = PATIENCE_S
) -> Outcome:
    worker.add_fault(kind, at_token=at_token, count=1)
    return ask(worker.url, question, patience_s)


@pytest.mark.parametrize("question", [*WHOLE, *STREAMS])
def test_a_worker_that_is_well_is_right(worker: Worker, question: Question) -> None:
    assert ask(worker.url, question, PATIENCE_S) is Outcome.RIGHT


@pytest.mark.parametrize("question", [*WHOLE, *STREAMS])
@pytest.mark.parametrize(("kind", "outcome"), [("error", Outcome.ERROR), ("reset", Outcome.CUT)])
def test_tells_an_error_from_a_cut(worker: Worker, question: Question, kind: str, outcome: Outcome) -> None:
    assert ask_once(worker, question, kind, None) is outcome
    if question.is_stream:
        assert ask_once(worker, question, kind, IN_THE_MIDDLE) is outcome


@pytest.mark.parametrize("question", STREAMS)
def test_gives_up_when_nothing_comes_any_more(worker: Worker, question: Question) -> None:
    assert ask_once(worker, question, "stall", IN_THE_MIDDLE, patience_s=0.2) is Outcome.GIVEN_UP


@pytest.mark.parametrize("question", STREAMS)
def test_a_stream_that_ends_short_and_clean_is_wrong(worker: Worker, question: Question) -> None:
    with pytest.raises(WrongAnswer):
        ask_once(worker, question, "truncate", IN_THE_MIDDLE)


@pytest.mark.parametrize("question", [*WHOLE, *STREAMS])
def test_the_words_of_another_prompt_are_wrong(worker: Worker, question: Question) -> None:
    other = Question(question.path, "What is decode?", question.body, question.tokens)
    with pytest.raises(WrongAnswer):
        ask(worker.url, other, PATIENCE_S)
