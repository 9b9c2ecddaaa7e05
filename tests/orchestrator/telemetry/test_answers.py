from __future__ import annotations

from array import array
from typing import Any

import pytest

from orchestrator.telemetry.answers import AnswerWriter
from orchestrator.telemetry.counters import (
    ANSWER_CELLS,
    FIRST_TOKEN,
    GAP_BOUNDS,
    GENERATION_TOKENS,
    INTER_TOKEN,
    PROMPT_TOKENS,
    STAGE_BOUNDS,
    Layout,
    histogram_cells,
)
from orchestrator.telemetry.record import Attempts, FailedAttempt, RequestRecord
from orchestrator.wire.shapes import AnswerUsage
from tests.orchestrator.records import ANSWERED, request_record

LAYOUT = Layout(["small", "large"], [])


class Counted:
    """What was counted for a model."""

    def __init__(self, *records: RequestRecord, model: int = 1) -> None:
        row = array("q", bytes(8 * LAYOUT.size))
        AnswerWriter(LAYOUT, row).note(records)
        cells = list(row[LAYOUT.answer_cell(model) :][:ANSWER_CELLS])
        self.is_all = sum(cells) == sum(row)
        self.tokens = cells[PROMPT_TOKENS], cells[GENERATION_TOKENS]
        self.first_tokens = _observed(cells, FIRST_TOKEN, STAGE_BOUNDS)
        self.gaps = _observed(cells, INTER_TOKEN, GAP_BOUNDS)


def _observed(cells: list[int], start: int, bounds: tuple[float, ...]) -> tuple[int, float]:
    """How many there were, and their sum in seconds."""
    found = cells[start : start + histogram_cells(bounds)]
    return sum(found[:-1]), found[-1] / 1e6


def answered(**changes: Any) -> RequestRecord:
    """The first token after 1.75 s, the last one 3.25 s later."""
    return request_record(**(ANSWERED | {"model_index": 1, "is_stream": True} | changes))


def test_a_stream_has_tokens_and_a_rhythm() -> None:
    found = Counted(answered(usage=AnswerUsage(21, 14)), answered(usage=AnswerUsage(3, 2)))
    assert found.tokens == (24, 16)
    assert found.first_tokens == (2, pytest.approx(3.5))
    assert found.gaps == (1, pytest.approx(0.25))  # two tokens have no rhythm
    assert found.is_all


def test_without_a_usage_pieces_are_tokens() -> None:
    found = Counted(answered(usage=14))
    assert (found.tokens, found.gaps) == ((0, 14), (1, pytest.approx(0.25)))


def test_a_whole_answer_has_tokens_alone() -> None:
    found = Counted(answered(is_stream=False, usage=AnswerUsage(21, 14)))
    assert (found.tokens, found.first_tokens, found.gaps) == ((21, 14), (0, 0.0), (0, 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"error_code": "worker_cut_short"},
        {"attempts": Attempts([FailedAttempt("m/decode/0", "silent", 3.0)], 2)},
    ],
)
def test_a_stream_that_failed_has_no_rhythm(changes: dict[str, Any]) -> None:
    found = Counted(answered(usage=14, **changes))
    assert (found.first_tokens[0], found.gaps[0]) == (1, 0)


def test_comments_are_no_first_token() -> None:
    assert Counted(answered(first_byte=0.0, error_code="client_gone")).first_tokens[0] == 0


def test_what_was_refused_counts_nothing() -> None:
    assert Counted(answered(status=503, usage=AnswerUsage(21, 14))).tokens == (0, 0)


def test_a_model_that_is_not_known_has_cells_too() -> None:
    found = Counted(answered(model_index=-1, usage=AnswerUsage(21, 14)), model=2)
    assert (found.tokens, found.is_all) == ((21, 14), True)
