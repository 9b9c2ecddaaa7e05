from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.routing.marginal import (
    CHUNK_S,
    STEP_S,
    WEIGHT,
    Local,
    Remote,
    Verdict,
    local_cost,
    remote_cost,
    stretch,
)

SECONDS = st.floats(0, 1e4)
COUNTS = st.floats(0, 1e4)
WEIGHTS = st.floats(0, 10)


def test_the_formula() -> None:
    assert local_cost(1.0, 2.0, 1.5, 4.0, 0.5) == (1.0 + 2.0) * 1.5 + 0.5 * 2.0 * 4.0
    assert remote_cost(1.0, 2.0, 3.0, 0.25, 0.5) == 1.0 + 2.0 * (1 + 0.5 * 3.0) + 0.25


def test_nothing_is_stretched_where_nobody_decodes() -> None:
    assert stretch(1.0, 0.0, 0.0) == 1.0
    assert stretch(0.0, 9.0, 9.0) == 1.0
    assert stretch(CHUNK_S, 1e-9, 0.0) > 1.0 + 0.9 * STEP_S / CHUNK_S


@given(SECONDS, st.floats(1e-3, 1e3), COUNTS, COUNTS, WEIGHTS)
def test_one_worker_costs_more_the_more_it_has_to_do(
    queue_s: float, own_s: float, active: float, more: float, weight: float
) -> None:
    before = local_cost(queue_s, own_s, stretch(own_s, active, 0.0), active, weight)
    busier = active + more
    assert local_cost(queue_s, own_s, stretch(own_s, busier, 0.0), busier, weight) >= before
    assert local_cost(queue_s + more, own_s, stretch(own_s, active, 0.0), active, weight) >= before
    assert stretch(own_s, active, more) >= stretch(own_s, active, 0.0) >= 1.0
    assert stretch(own_s + more, active, 0.0) <= stretch(own_s, active, 0.0) or not active


@given(SECONDS, SECONDS, COUNTS, SECONDS, SECONDS, WEIGHTS)
def test_two_workers_cost_more_the_more_they_have_to_do(
    wait_s: float, own_s: float, queued: float, transfer_s: float, more: float, weight: float
) -> None:
    before = remote_cost(wait_s, own_s, queued, transfer_s, weight)
    assert before >= wait_s + own_s
    assert remote_cost(wait_s + more, own_s, queued, transfer_s, weight) >= before
    assert remote_cost(wait_s, own_s + more, queued, transfer_s, weight) >= before
    assert remote_cost(wait_s, own_s, queued + more, transfer_s, weight) >= before
    assert remote_cost(wait_s, own_s, queued, transfer_s + more, weight) >= before


@given(st.floats(0.1, 10), SECONDS, st.floats(1e-3, 1e3), COUNTS, SECONDS, COUNTS, SECONDS)
def test_what_is_decided_does_not_depend_on_how_fast_all_is(
    scale: float, queue_s: float, own_s: float, active: float, wait_s: float, queued: float, transfer_s: float
) -> None:
    stretched = stretch(own_s, active, 0.0)

    def difference(by: float) -> float:
        local = local_cost(by * queue_s, by * own_s, stretched, active, WEIGHT)
        return local - remote_cost(by * wait_s, by * own_s, queued, by * transfer_s, WEIGHT)

    assert abs(difference(scale) - scale * difference(1.0)) <= 1e-6 * (1.0 + abs(difference(scale)))


def test_the_sentence_has_all_terms() -> None:
    verdict = Verdict(Local(0, 1.25, 2.5, 1.5, 3.0, 0.0), Remote(7.5, 2.25, 4.0, 0.125))
    assert verdict.is_local == (verdict.local.cost < verdict.remote.cost)
    assert str(verdict) == (
        "one worker costs less: 9.375 user-seconds with one (1.250 s queue, 2.500 s prefill, 1.50 times as "
        "long beside 3.0 that decode), 14.375 with two (7.500 s wait, 2.250 s prefill, 4.0 behind it, "
        "0.125 s transfer)"
    )
    other = Verdict(Local(0, 1.25, 2.5, 1.5, 30.0, 0.0), Remote(7.5, 2.25, 4.0, 0.125))
    assert str(other).startswith("two workers cost no more: 43.125 user-seconds with one")


def test_equals_go_to_two() -> None:
    assert not Verdict(Local(0, 1.0, 0.0, 1.0, 0.0, 0.0), Remote(1.0, 0.0, 0.0, 0.0)).is_local
