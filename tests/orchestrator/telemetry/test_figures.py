from __future__ import annotations

from array import array
from typing import Any

import pytest

from orchestrator.telemetry.figures import (
    BOUNDS,
    CELLS,
    ERRORS,
    FIRST_BYTE,
    GAP,
    RETRIES,
    SERVED,
    TRANSFERS,
    FigureWriter,
    buckets,
    quantile,
    total_s,
)
from orchestrator.telemetry.record import Attempts, FailedAttempt, RequestRecord
from orchestrator.wire.shapes import AnswerUsage
from tests.orchestrator.records import ANSWERED, request_record

SLOTS = {"m/prefill/0": 0, "m/decode/0": 1, "m/decode/1": 2}


def counted(*records: RequestRecord) -> dict[str, list[int]]:
    cells = array("q", bytes(8 * CELLS * len(SLOTS)))
    FigureWriter(cells, lambda: SLOTS).note(records)
    return {name: list(cells[slot * CELLS : (slot + 1) * CELLS]) for name, slot in SLOTS.items()}


def answered(**changes: Any) -> RequestRecord:
    """Admitted after 0.5 s, prefilled in 1 s, the first byte after 0.25 s more, ended 3.25 s later."""
    own = {"prefill_worker": "m/prefill/0", "decode_worker": "m/decode/0"}
    return request_record(**(ANSWERED | own | changes))


def test_each_worker_has_its_own_part() -> None:
    found = counted(
        answered(is_stream=True, usage=14), answered(decode_worker="m/decode/1", usage=AnswerUsage(21, 14))
    )
    assert [found[name][SERVED] for name in SLOTS] == [2, 1, 1]
    assert [found[name][TRANSFERS] for name in SLOTS] == [2, 1, 1]
    assert total_s(found["m/prefill/0"], FIRST_BYTE) == pytest.approx(2.0)
    assert total_s(found["m/decode/0"], FIRST_BYTE) == pytest.approx(0.25)
    assert total_s(found["m/decode/0"], GAP) == pytest.approx(0.25)
    assert total_s(found["m/decode/1"], GAP) == 0.0


@pytest.mark.parametrize(
    ("usage", "first_bytes", "gaps"),
    [
        (0, 1, 0),  # an embedding
        (AnswerUsage(5), 1, 0),
        (AnswerUsage(5, 2), 1, 0),
        (AnswerUsage(5, 3), 0, 0),
        (AnswerUsage(5, 15), 0, 0),
        (AnswerUsage(5, 16), 0, 1),
    ],
)
def test_the_first_byte_of_an_answer_that_is_not_streamed_is_not_taken_for_that_of_a_stream(
    usage: AnswerUsage | int, first_bytes: int, gaps: int
) -> None:
    found = counted(answered(usage=usage))["m/decode/0"]
    assert found[SERVED] == 1
    assert sum(buckets(found, FIRST_BYTE)) == first_bytes
    assert sum(buckets(found, GAP)) == gaps
    assert total_s(found, GAP) == pytest.approx(gaps * 0.25 / 16, abs=1e-6)


def test_who_gets_the_answers_that_are_not_streamed_does_not_look_slower() -> None:
    whole = {"decode_worker": "m/decode/1", "first_byte": 105.0, "usage": AnswerUsage(5, 14 + 2)}
    streamed = {"is_stream": True, "usage": 14}
    found = counted(*(answered(**fields) for fields in (streamed, whole) for _ in range(20)))
    fast, other = (quantile(buckets(found[f"m/decode/{index}"], GAP), 0.5) for index in range(2))
    assert fast is not None
    assert other is not None
    assert other < 1.5 * fast
    assert sum(buckets(found["m/decode/1"], FIRST_BYTE)) == 0


@pytest.mark.parametrize(
    ("usage", "gaps"),
    [(14, 1), (AnswerUsage(21, 14), 1), (2, 0), (AnswerUsage(21), 0), (AnswerUsage(21, 2), 0)],
)
def test_tokens_are_counted_by_the_usage_or_else_by_pieces(usage: AnswerUsage | int, gaps: int) -> None:
    found = counted(answered(is_stream=True, usage=usage))["m/decode/0"]
    assert sum(buckets(found, GAP)) == gaps
    assert total_s(found, GAP) == pytest.approx(0.25 * gaps)


def test_a_failure_is_the_failed_workers_and_its_time_is_nobodys() -> None:
    failed = [FailedAttempt("m/decode/1", "cut_short", 3.0)]
    found = counted(answered(attempts=Attempts(failed, 2)))
    assert (found["m/decode/1"][ERRORS], found["m/decode/1"][RETRIES]) == (1, 1)
    assert (found["m/decode/0"][ERRORS], found["m/decode/0"][SERVED]) == (0, 1)
    assert sum(buckets(found["m/decode/0"], FIRST_BYTE)) == 0


def test_the_last_failure_is_no_retry() -> None:
    failed = [FailedAttempt("m/decode/1", "cut_short", 3.0)]
    found = counted(answered(attempts=Attempts(failed), status=502, error_code="worker_cut_short"))
    assert (found["m/decode/1"][ERRORS], found["m/decode/1"][RETRIES]) == (1, 0)
    assert [found[name][SERVED] for name in SLOTS] == [0, 0, 0]


def test_workers_that_are_not_there_any_more_are_left_out() -> None:
    found = counted(answered(decode_worker="m/decode/9"))
    assert [found[name][SERVED] for name in SLOTS] == [1, 0, 0]


@pytest.mark.parametrize("seconds", [0.0007, 0.004, 0.02, 0.3, 5.0, 60.0])
def test_quantiles_are_right_within_a_fifth(seconds: float) -> None:
    counts = [0] * (len(BOUNDS) + 1)
    counts[next(index for index, bound in enumerate(BOUNDS) if seconds <= bound)] = 10
    median = quantile(counts, 0.5)
    assert median is not None
    assert 0.75 * seconds <= median <= 1.35 * seconds


def test_quantiles_of_nothing_and_of_what_is_above_all_bounds() -> None:
    assert quantile([0] * (len(BOUNDS) + 1), 0.5) is None
    assert quantile([0] * len(BOUNDS) + [3], 0.5) == BOUNDS[-1]
