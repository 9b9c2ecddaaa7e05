from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.counters import (
    ANSWER_CELLS,
    ERROR_CODES,
    LAG_BOUNDS,
    QUEUE_UNITS,
    STAGE_BOUNDS,
    STAGES,
    STATUSES,
    TOTAL,
    FallbackReason,
    HandoffTrouble,
    Layout,
    LeaseState,
    RejectReason,
    RetryReason,
    Telemetry,
    histogram_cells,
    sum_rows,
)
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.usage import Kv
from tests.orchestrator.records import ANSWERED, request_record

CHAT = "/v1/chat/completions"
LAYOUT = Layout(["small", "large"], [CHAT, "/v1/completions"])


def answered(**changes: Any) -> RequestRecord:
    return request_record(**(ANSWERED | {"model_index": 1} | changes))


def requests_cell(model: int, endpoint: int, status: int) -> int:
    return LAYOUT.request_cell(model, endpoint) + status


def histogram(telemetry: Telemetry, cell: int, bounds: tuple[float, ...]) -> tuple[list[int], int]:
    cells = list(telemetry.row[cell : cell + histogram_cells(bounds)])
    return cells[:-1], cells[-1]


def test_blocks_of_the_layout_fill_the_row_without_overlap() -> None:
    blocks = [
        range(LAYOUT.in_flight, LAYOUT.in_flight + 3),
        *(range(cell, cell + len(QUEUE_UNITS)) for cell in map(LAYOUT.queue_cell, range(2))),
        range(LAYOUT.held_bytes, LAYOUT.held_bytes + 1),
        range(LAYOUT.leases, LAYOUT.leases + len(LeaseState)),
        range(LAYOUT.leases_leaked, LAYOUT.leases_leaked + 1),
        *(
            range(cell, cell + len(LAYOUT.statuses))
            for cell in (LAYOUT.request_cell(model, endpoint) for model in range(3) for endpoint in range(3))
        ),
        *(
            range(cell, cell + histogram_cells(STAGE_BOUNDS))
            for cell in (LAYOUT.stage_cell(model, stage) for model in range(3) for stage in range(4))
        ),
        range(LAYOUT.errors, LAYOUT.errors + len(LAYOUT.error_codes)),
        range(LAYOUT.kv, LAYOUT.kv + len(Kv)),
        range(LAYOUT.fallbacks, LAYOUT.fallbacks + len(FallbackReason)),
        range(LAYOUT.retries, LAYOUT.retries + len(RetryReason)),
        range(LAYOUT.rejections, LAYOUT.rejections + len(RejectReason)),
        range(LAYOUT.poison, LAYOUT.poison + 1),
        range(LAYOUT.handoffs, LAYOUT.handoffs + len(HandoffTrouble)),
        range(LAYOUT.lag, LAYOUT.lag + histogram_cells(LAG_BOUNDS)),
        range(LAYOUT.log_lost, LAYOUT.log_lost + 1),
        *(range(cell, cell + ANSWER_CELLS) for cell in map(LAYOUT.answer_cell, range(3))),
    ]
    assert [cell for block in blocks for cell in block] == list(range(LAYOUT.size))


def test_a_request_is_in_flight_between_begin_and_finish() -> None:
    telemetry = Telemetry(LAYOUT)
    record = answered()
    telemetry.begin(record)
    assert telemetry.in_flight == telemetry.row[LAYOUT.in_flight + 1] == 1
    telemetry.finish(record)
    assert telemetry.in_flight == telemetry.row[LAYOUT.in_flight + 1] == 0


def test_in_flight_falls_where_it_rose_when_the_model_becomes_known_later() -> None:
    telemetry = Telemetry(LAYOUT)
    record = answered(model_index=-1)
    telemetry.begin(record)
    assert telemetry.row[LAYOUT.in_flight + 2] == 1
    record.model_index = 0
    telemetry.finish(record)
    assert list(telemetry.row[: LAYOUT.queues]) == [0, 0, 0]


def test_a_request_that_was_refused_before_begin_leaves_in_flight_alone() -> None:
    telemetry = Telemetry(LAYOUT)
    telemetry.finish(answered(model_index=-1, status=401, error_code="invalid_api_key"))
    assert telemetry.in_flight == 0


def test_finish_counts_request_error_transfer_and_stages() -> None:
    telemetry = Telemetry(LAYOUT)
    record = answered(error_code="worker_cut_short")
    telemetry.finish(record)
    row = telemetry.row
    assert row[requests_cell(1, 0, STATUSES.index(200))] == 1
    assert row[LAYOUT.errors + ERROR_CODES.index("worker_cut_short")] == 1
    assert row[LAYOUT.kv + Kv.TRANSFERRED] == 1
    for stage, seconds in zip(range(len(STAGES)), (0.5, 1.0, 0.25, 5.0), strict=True):
        counts, total_us = histogram(telemetry, LAYOUT.stage_cell(1, stage), STAGE_BOUNDS)
        assert counts.index(1) == STAGE_BOUNDS.index(seconds)  # bounds are inclusive
        assert (sum(counts), total_us) == (1, seconds * 1e6)
    assert list(telemetry.records) == [record]


def test_what_is_in_no_list_is_counted_as_other() -> None:
    telemetry = Telemetry(LAYOUT)
    telemetry.finish(answered(endpoint="/v2/new", status=418, error_code="no such code", model_index=-1))
    assert telemetry.row[requests_cell(2, 2, len(STATUSES))] == 1
    assert telemetry.row[LAYOUT.errors + len(ERROR_CODES)] == 1


def test_every_error_of_the_tree_has_its_own_cell() -> None:
    assert {"internal_error", "model_not_found", "client_closed_request", "worker_cut_short"} < set(
        ERROR_CODES
    )
    assert len(set(ERROR_CODES)) == len(ERROR_CODES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0.5, 1.0, 0.25, 5.0)),
        ({"prefill_done": 0.0}, (0.5, -1.0, 1.25, 5.0)),
        ({"first_byte": 0.0}, (0.5, 1.0, -1.0, 5.0)),
        ({"status": 502}, (0.5, 1.0, -1.0, 5.0)),
        ({"admitted": 0.0, "prefill_done": 0.0}, (-1.0, -1.0, -1.0, 5.0)),
    ],
    ids=["two legs", "one leg", "no answer", "the first byte was an error's", "never admitted"],
)
def test_stages(changes: dict[str, float], expected: tuple[float, ...]) -> None:
    assert answered(**changes).stages() == expected


def test_a_time_above_all_bounds_has_a_bucket() -> None:
    telemetry = Telemetry(LAYOUT)
    telemetry.finish(answered(finished=100_000.0))
    counts, total_us = histogram(telemetry, LAYOUT.stage_cell(1, 3), STAGE_BOUNDS)
    assert counts == [0] * len(STAGE_BOUNDS) + [1]
    assert total_us == 99_900 * 10**6


TIMES = st.one_of(st.floats(0, 1e4), st.floats(0, 1.1), st.sampled_from([0.0, *STAGE_BOUNDS]))


@given(st.lists(TIMES, max_size=50))
def test_histograms_of_stages_count_everything_once(times: list[float]) -> None:
    telemetry = Telemetry(LAYOUT)
    for seconds in times:
        telemetry.finish(answered(received=0.0, admitted=0.0, prefill_done=0.0, finished=seconds))
    counts, total_us = histogram(telemetry, LAYOUT.stage_cell(1, TOTAL), STAGE_BOUNDS)
    assert total_us == sum(int(seconds * 1e6) for seconds in times)
    for index, bound in enumerate(STAGE_BOUNDS):
        assert sum(counts[: index + 1]) == sum(seconds <= bound for seconds in times)
    assert sum(counts) == len(times)


def test_other_processes_see_times_once_they_are_folded() -> None:
    row = array("q", bytes(8 * LAYOUT.size))
    telemetry = Telemetry(LAYOUT, row)
    telemetry.finish(answered())
    times = range(LAYOUT.stages, LAYOUT.errors)
    assert row[requests_cell(1, 0, STATUSES.index(200))] == 1
    assert not any(row[cell] for cell in times)
    telemetry.fold()
    telemetry.fold()
    assert sum(row[LAYOUT.stage_cell(1, TOTAL) :][: len(STAGE_BOUNDS) + 1]) == 1
    assert telemetry.row is row


@given(st.lists(st.floats(0, 1e4), max_size=50))
def test_histograms_count_everything_once(lags: list[float]) -> None:
    telemetry = Telemetry(LAYOUT)
    for lag in lags:
        telemetry.loop_lag(lag)
    counts, total_us = histogram(telemetry, LAYOUT.lag, LAG_BOUNDS)
    assert sum(counts) == len(lags)
    assert total_us == sum(int(lag * 1e6) for lag in lags)
    for bound, cumulative in zip(
        LAG_BOUNDS, (sum(counts[: i + 1]) for i in range(len(counts))), strict=False
    ):
        assert cumulative == sum(lag <= bound for lag in lags)


def test_fallbacks_and_retries_count_by_reason() -> None:
    telemetry = Telemetry(LAYOUT)
    telemetry.transport_fallback(FallbackReason.TOO_LARGE)
    telemetry.retry(RetryReason.DECODE)
    telemetry.retry(RetryReason.DECODE)
    assert list(telemetry.row[LAYOUT.fallbacks : LAYOUT.rejections]) == [0, 1, 0, 0, 2, 0, 0]


def test_rows_may_lie_in_shared_memory_and_add_up() -> None:
    shared = memoryview(bytearray(2 * 8 * LAYOUT.size)).cast("q")
    rows = [shared[: LAYOUT.size], shared[LAYOUT.size :]]
    first, second = (Telemetry(LAYOUT, row) for row in rows)
    first.begin(answered())
    second.finish(answered())
    second.finish(answered())
    total = sum_rows(rows)
    assert total[LAYOUT.in_flight + 1] == 1
    assert total[requests_cell(1, 0, 0)] == 2


def test_a_row_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{LAYOUT.size} cells"):
        Telemetry(LAYOUT, memoryview(bytearray(8)).cast("q"))


def test_records_that_nobody_takes_do_not_pile_up() -> None:
    telemetry = Telemetry(LAYOUT)
    for _ in range(Telemetry.KEPT_RECORDS + 10):
        telemetry.records.append(answered())
    assert len(telemetry.records) == Telemetry.KEPT_RECORDS
