from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.routing.links import (
    FEW,
    FORGET_S,
    LOOK_S,
    MOST_PAIRS,
    ON_TRIAL,
    TRIAL_S,
    UNTRIED,
    Links,
    expected_s,
)
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import registry_of


def workers(prefill: int = 2, decode: int = 2, *, zones: bool = False) -> tuple[list[Worker], list[Worker]]:
    """With `zones` even ones are in the zone a, odd ones in b."""
    pools = registry_of({"prefill": prefill, "decode": decode}).pools["m"]
    for pool in (pools.prefill, pools.decode):
        for index, worker in enumerate(pool):
            worker.zone = "ab"[index % 2] if zones else None
    return [*pools.prefill], [*pools.decode]


def learn(
    known: Links, prefill: Worker, decode: Worker, rate: float, *, count: int = 10, at: float = 0.0
) -> None:
    for _ in range(count):
        known.note(prefill, decode, 1000.0, rate * expected_s(1000.0), at)


def test_what_nobody_has_measured_takes_no_time_and_differs_from_nothing() -> None:
    (one, _), (other, _) = workers()
    assert Links().are_equal
    assert Links().seconds(one, other, 1000.0, 0.0) == 0.0


def test_a_link_is_learned() -> None:
    (one, _), (other, _) = workers()
    known = Links()
    learn(known, one, other, 3.0)
    assert known.are_equal
    assert known.seconds(one, other, 5000.0, 0.0) == pytest.approx(3.0 * expected_s(5000.0))


def test_a_slow_zone_is_slow_for_pairs_that_were_never_measured() -> None:
    prefill, decode = workers(4, 4, zones=True)
    known = Links()
    learn(known, prefill[0], decode[0], 1.0)
    learn(known, prefill[0], decode[1], 20.0)
    learn(known, prefill[0], decode[0], 1.0)
    assert not known.are_equal
    near, far = (known.seconds(prefill[2], decode[index], 1000.0, 0.0) for index in (2, 3))
    assert far > 10 * near
    untried = known.seconds(prefill[1], decode[1], 1000.0, 0.0)  # between zones of which nothing is known
    assert untried == pytest.approx(UNTRIED * known.mean_s(1000.0))


def test_what_was_never_measured_is_tried_by_a_few_requests() -> None:
    """If these tell nothing, as whole answers do, others follow after a while."""
    prefill, decode = workers(zones=True)
    known = Links()
    learn(known, prefill[0], decode[0], 1.0)
    learn(known, prefill[1], decode[1], 1.0)
    parts: list[float] = []
    for now in (0.0, 1.0, 2.0, 3.0, 4.0, TRIAL_S + 0.5, TRIAL_S + 0.6, TRIAL_S + 1.5):
        parts.append(known.seconds(prefill[0], decode[1], 1000.0, now) / known.mean_s(1000.0))
        known.note_tried(prefill[0], decode[1], now)
    assert parts == pytest.approx([*[UNTRIED] * FEW, ON_TRIAL, ON_TRIAL, UNTRIED, ON_TRIAL, UNTRIED])
    assert known.seconds(prefill[1], decode[0], 1000.0, 1.0) < known.mean_s(1000.0)  # the other way round
    learn(known, prefill[0], decode[1], 1.0, count=1, at=TRIAL_S + 3.0)
    later = known.seconds(prefill[0], decode[1], 1000.0, TRIAL_S + 3.0)
    assert later == pytest.approx(known.mean_s(1000.0))


def test_zones_between_which_nothing_was_measured_are_tried() -> None:
    prefill, decode = workers(zones=True)
    known = Links()
    learn(known, prefill[0], decode[1], 1.0)
    assert known.are_equal
    learn(known, prefill[1], decode[0], 1.0)
    assert not known.are_equal
    learn(known, prefill[0], decode[0], 1.0)
    learn(known, prefill[1], decode[1], 1.0)
    learn(known, prefill[1], decode[1], 1.0, at=LOOK_S + 1.0)
    assert known.are_equal


def test_zones_of_one_role_alone_leave_nothing_to_try() -> None:
    prefill, decode = workers(zones=True)
    known = Links()
    for one in prefill:
        learn(known, one, decode[0], 1.0)
    assert known.are_equal


def test_a_slow_pair_is_slow_without_zones() -> None:
    prefill, decode = workers()
    known = Links()
    for _ in range(20):
        for one in prefill:
            for other in decode:
                is_slow = one is prefill[0] and other is decode[0]
                learn(known, one, other, 8.0 if is_slow else 1.0, count=1)
    assert not known.are_equal
    slow = known.seconds(prefill[0], decode[0], 1000.0, 0.0)
    assert slow > 4 * known.seconds(prefill[1], decode[0], 1000.0, 0.0)


@given(st.lists(st.floats(0.9, 1.1), min_size=40, max_size=80), st.integers(0, 2**32))
def test_noise_makes_no_difference(rates: list[float], seed: int) -> None:
    prefill, decode = workers(3, 3, zones=True)
    known, random = Links(), Random(seed)
    for one in prefill:
        for other in decode:
            learn(known, one, other, 1.0, count=1)
    for rate in rates:
        learn(known, random.choice(prefill), random.choice(decode), rate, count=1)
    learn(known, prefill[0], decode[0], 1.0, at=LOOK_S + 1.0)
    assert known.are_equal


def test_waits_in_the_queue_of_a_worker_count_little() -> None:
    (one, _), (other, _) = workers()
    known, random = Links(), Random(1)
    for _ in range(200):
        learn(known, one, other, 1.0 if random.random() < 0.7 else 10.0, count=1)
    assert known.seconds(one, other, 1000.0, 0.0) < 3 * expected_s(1000.0)


def test_what_was_slow_is_tried_again_by_one_request() -> None:
    prefill, decode = workers(zones=True)
    known = Links()
    learn(known, prefill[0], decode[0], 1.0)
    learn(known, prefill[0], decode[1], 20.0)
    learn(known, prefill[0], decode[0], 1.0)
    later = FORGET_S + 1.0
    learn(known, prefill[0], decode[0], 1.0, at=later)
    assert known.seconds(prefill[0], decode[1], 1000.0, later) == pytest.approx(known.mean_s(1000.0))
    known.note_tried(
        prefill[0], decode[1], later
    )  # a request is on its way: all others wait for what it tells
    assert known.seconds(prefill[0], decode[1], 1000.0, later) > 5 * known.mean_s(1000.0)
    learn(known, prefill[0], decode[1], 1.0, count=1, at=later)
    assert known.seconds(prefill[0], decode[1], 1000.0, later) == pytest.approx(known.mean_s(1000.0), rel=0.3)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 2),
            st.floats(0, 1e9),
            st.floats(0, 1e9),
            st.floats(0, 1e6),
        ),
        max_size=40,
    )
)
def test_a_hand_off_takes_a_time_whatever_was_measured(
    notes: list[tuple[int, int, float, float, float]],
) -> None:
    prefill, decode = workers(3, 3, zones=True)
    known = Links()
    for one, other, tokens, seconds, moment in notes:
        known.note(prefill[one], decode[other], tokens, seconds, moment)
        found = [known.seconds(p, d, tokens, moment) for p in prefill for d in decode]
        assert all(0.0 <= second < math.inf for second in found)


def test_of_large_pools_pairs_are_not_kept() -> None:
    assert MOST_PAIRS > 64 * 63
    prefill, decode = workers(3, 3, zones=True)
    known = Links(most_pairs=3)
    for moment in (0.0, 10.0 * FORGET_S):  # the second time all of the first are forgotten
        for one in prefill:
            for other in decode:
                learn(known, one, other, 1.0, count=3, at=moment)
    assert sum(map(len, known._pairs.values())) == 3
    assert known.seconds(prefill[2], decode[2], 1000.0, 0.0) == pytest.approx(expected_s(1000.0))
