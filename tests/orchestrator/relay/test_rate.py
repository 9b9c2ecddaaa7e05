from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.relay.rate import Bucket, duration
from orchestrator.telemetry.tenants import CELLS, CHARGED_TOKENS, USED_TOKENS, KeyCells


def rows_of(count: int) -> list[array[int]]:
    return [array("q", bytes(8 * CELLS)) for _ in range(count)]


def bucket(limit: int, rows: list[array[int]], own: int = 0, now: float = 0.0) -> Bucket:
    return Bucket(limit, KeyCells(rows[own], rows, 0), CHARGED_TOKENS, USED_TOKENS, now)


def take(one: Bucket, amount: int, now: float) -> bool:
    has = one.has(amount, now)
    if has:
        one.take(amount)
    return has


def test_it_is_full_at_first_and_fills_within_a_minute() -> None:
    one = bucket(60, rows_of(1))
    assert [take(one, 1, 0.0) for _ in range(61)] == [True] * 60 + [False]
    assert one.wait_s(1) == pytest.approx(1.0)
    assert not take(one, 1, 0.9)
    assert take(one, 1, 1.0)
    assert one.look(1000.0) == 60


def test_what_is_more_than_fits_in_is_taken_from_a_full_one_and_paid_for_later() -> None:
    one = bucket(100, rows_of(1))
    assert take(one, 250, 0.0)
    assert one.look(0.0) == -150
    assert not take(one, 1, 60.0)
    assert one.wait_s(250) == pytest.approx(90.0)
    assert take(one, 250, 150.0)


def test_what_goes_back_is_there_again() -> None:
    one = bucket(100, rows_of(1))
    assert take(one, 100, 0.0)
    one.take(-40)
    assert one.look(0.0) == 40
    one.take(-100)
    assert one.look(0.0) == 100


def test_another_limit_leaves_what_was_used() -> None:
    one = bucket(100, rows_of(1))
    one.take(30)
    one.change(200, 0.0)
    assert one.look(0.0) == 170
    one.change(20, 0.0)
    assert one.look(0.0) == -10


def test_processes_take_from_one_bucket() -> None:
    rows = rows_of(3)
    one, other = bucket(60, rows, 1), bucket(60, rows, 2)
    assert [take(each, 1, 0.0) for each in [one, other] * 31] == [True] * 60 + [False] * 2
    for step in range(1, 241):
        for each in (one, other):
            each.share(step / 4)
    assert one.look(60.0) == other.look(60.0) == 60
    assert take(other, 50, 60.0)
    late = bucket(60, rows, 0, 60.1)  # of a process that starts
    assert late.look(60.1) == 60  # nobody has looked since
    other.share(60.2)
    assert bucket(60, rows, 0, 60.2).look(60.2) == pytest.approx(10, abs=1)


def test_what_an_ended_process_has_taken_stays_taken() -> None:
    rows = rows_of(3)
    one, other = bucket(60, rows, 1), bucket(60, rows, 2)
    other.take(50)
    one.share(0.0)
    rows[0][CHARGED_TOKENS] += rows[2][CHARGED_TOKENS]
    rows[2][:] = rows_of(1)[0]
    assert one.look(0.0) == 10


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500), st.integers(0, 2)), max_size=60),
)
def test_never_more_is_taken_than_the_limit_and_what_flows_in(
    limit: int, steps: list[tuple[float, int, int]]
) -> None:
    """In any span of time, and by several processes, but for the last that was let in."""
    rows = rows_of(3)
    each = [bucket(limit, rows, own) for own in range(3)]
    now, looked, taken = 0.0, 0.0, [(0.0, 0)]
    for pause, amount, who in steps:
        while looked < now + pause:
            looked = min(looked + 0.25, now + pause)
            for one in each:
                one.share(looked)
        now += pause
        amount = min(amount, limit)
        if take(each[who], amount, now):
            taken.append((now, amount))
    for index, (began, _) in enumerate(taken):
        for end, upto in ((taken[last][0], last) for last in range(index, len(taken))):
            total = sum(amount for _, amount in taken[index : upto + 1])
            assert total <= limit + (end - began) * limit / 60 + 1e-6 * limit + 1e-6


def test_headers_are_as_openai_has_them() -> None:
    one = bucket(60, rows_of(1))
    one.take(59)
    assert one.headers("requests", 0.5).splitlines() == [
        "x-ratelimit-limit-requests: 60",
        "x-ratelimit-remaining-requests: 1",
        "x-ratelimit-reset-requests: 58.5s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (-1.0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.9991, "1m0s"),
        (60.0, "1m0s"),
        (72.5, "1m12.5s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (3725.004, "1h2m5.004s"),
    ],
)
def test_a_time_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
