from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.options import HealthConfig
from orchestrator.workers.lifecycle import (
    MAX_DOUBLINGS,
    Move,
    Situation,
    called_back,
    decide,
    followed,
    is_erring,
    is_proven,
    may_be_out,
    missed,
    pause_s,
    verdict_at,
)
from orchestrator.workers.states import (
    FULL_SERVICE,
    IN_SERVICE,
    NEVER,
    ON_SUSPICION,
    REACHABLE,
    Event,
    Suspicion,
    WorkerState,
    next_state,
)
from orchestrator.workers.worker import OwnWorker, Worker
from tests.orchestrator.cluster import address

NOW = 1000.0
HEALTH = HealthConfig(
    suspect_s=0.5, silence_s=3.0, consecutive_errors=2, eject_s=1.0, eject_max_s=8.0, slow_start_s=10.0
)
STATES, EVENTS = st.sampled_from(WorkerState), st.sampled_from(Event)


def worker_in(state: str, **changes: Any) -> Worker:
    """A worker in that state, with some of its life changed."""
    made = OwnWorker(address("decode", 0), "json", None, 0)
    made.become(replace(made.life(), state=WorkerState(state), **changes))
    return made


def decided(worker: Worker, event: str, others: Sequence[Worker] = (), seed: int = 1) -> Move:
    return decide(worker, Event(event), Situation([worker, *others], HEALTH, NOW, Random(seed)))


def ready(count: int) -> list[Worker]:
    return [worker_in("ready", epoch=1) for _ in range(count)]


# --- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "event"), list(product(WorkerState, Event)))
def test_among_many_others_the_table_decides(state: WorkerState, event: Event) -> None:
    move = decided(worker_in(state), event, ready(4))
    after = next_state(state, event)
    assert (move.event, move.before, move.life.state) == (event, state, after)
    assert move.is_change == (after is not state)
    assert move.ends_service == (state in IN_SERVICE and after not in IN_SERVICE)


@given(STATES, EVENTS, st.lists(STATES, max_size=6))
def test_deciding_changes_nothing_and_is_the_same_again(
    state: WorkerState, event: Event, others: list[WorkerState]
) -> None:
    worker, pool = worker_in(state), [worker_in(other) for other in others]
    before = [one.life() for one in (worker, *pool)]
    assert decided(worker, event, pool) == decided(worker, event, pool)
    assert [one.life() for one in (worker, *pool)] == before


@given(STATES, EVENTS, st.lists(STATES, max_size=6))
def test_what_changes_by_which_move(state: WorkerState, event: Event, others: list[WorkerState]) -> None:
    worker = worker_in(state, epoch=7, warm_from=1.0, credit=0.5, suspicion=Suspicion(serves_since=2.0))
    move = decided(worker, event, [worker_in(other) for other in others])
    after = move.life.state
    assert move.life.epoch == 7 + (state not in IN_SERVICE and after in IN_SERVICE)
    starts = state not in FULL_SERVICE and after in FULL_SERVICE
    assert (move.life.suspicion.serves_since, move.life.credit) == ((NOW, 0.0) if starts else (2.0, 0.5))
    assert (move.life.warm_from == 1.0) == (not starts)
    assert (move.life.suspicion.doubted == NOW) == (move.is_change and after is WorkerState.SUSPECT)


@pytest.mark.parametrize(
    ("state", "event", "wanted"),
    [
        ("ready", "lost", True),
        ("ready", "failed", False),  # a probe has just seen it
        ("ready", "missed", False),
        ("ready", "erred", True),  # nobody else is there, so it stays
        ("ready", "silent", False),
        ("ejected", "needed", True),
        ("draining", "undrain", True),
        ("gone", "answered", False),
    ],
)
def test_a_suspect_is_probed_at_once_unless_a_probe_suspects_it(state: str, event: str, wanted: bool) -> None:
    assert decided(worker_in(state), event).wants_probe == wanted


@pytest.mark.parametrize(
    ("state", "event", "failures"),
    [
        ("ready", "lost", 3),
        ("ready", "erred", 3),
        ("suspect", "answered", 0),
        ("ejected", "answered", 1),  # on trial: a leg has to succeed
        ("probing", "proven", 0),
        ("ready", "drain", 0),
        ("ready", "refused", 0),
    ],
)
def test_failures_in_a_row_begin_anew_with_a_state_that_forgives(
    state: str, event: str, failures: int
) -> None:
    assert decided(worker_in(state, failures=3), event, ready(1)).life.failures == failures


# --- half of a pool -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "may"),
    [
        ("", False),
        ("ready", True),
        ("ejected", False),
        ("ready ejected", False),
        ("ready ready ejected", True),
        ("ready ready probing", True),
        ("gone gone", False),  # who is gone is not counted
        ("ready starting draining", True),
    ],
)
def test_who_may_be_out(others: str, may: bool) -> None:
    worker = worker_in("suspect")
    pool = [worker, *map(worker_in, others.split())]
    assert may_be_out(worker, pool) == may
    assert decided(worker, "failed", pool[1:]).life.state == ("ejected" if may else "suspect")


@given(st.lists(STATES, max_size=8))
def test_calling_back_ends_with_half_of_the_pool_at_most(states: list[WorkerState]) -> None:
    pool = [worker_in(state) for state in states]
    reachable = sum(worker.state in REACHABLE for worker in pool)
    calls = 0
    while (needed := called_back(pool)) is not None:
        assert needed.state in ON_SUSPICION
        needed.become(decided(needed, "needed", [one for one in pool if one is not needed]).life)
        calls += 1
    out = sum(state in ON_SUSPICION for state in states)
    assert calls == max(0, out - reachable // 2)


def test_who_has_failed_least_is_called_back() -> None:
    pool = [worker_in("ejected", suspicion=Suspicion(ejections=count)) for count in (3, 1, 2)]
    assert called_back(pool) is pool[1]
    assert called_back([*pool, *ready(3)]) is None


# --- ejected ------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_pauses_double_up_to_a_bound(ejections: int, random: Random) -> None:
    longest = min(HEALTH.eject_s * 2 ** min(ejections, MAX_DOUBLINGS), HEALTH.eject_max_s)
    assert longest / 2 <= pause_s(ejections, HEALTH, random) <= longest


@pytest.mark.parametrize(
    ("state", "event", "is_put_off"),
    [
        ("suspect", "failed", True),
        ("probing", "lost", True),
        ("ejected", "failed", True),  # a probe has found it ill once more
        ("ejected", "missed", True),
        ("ejected", "lost", False),  # a leg from before
        ("ejected", "erred", False),
    ],
)
def test_an_ejected_worker_is_asked_later_each_time(state: str, event: str, is_put_off: bool) -> None:
    worker = worker_in(state, suspicion=Suspicion(ejections=2, retry_at=5.0, serves_since=NOW - 1))
    found = decided(worker, event, ready(1)).life.suspicion
    expected = (3, NOW + pause_s(2, HEALTH, Random(1))) if is_put_off else (2, 5.0)
    assert (found.ejections, found.retry_at) == expected


@pytest.mark.parametrize(("served_s", "ejections"), [(8.0, 4), (8.5, 1)])
def test_a_long_time_in_service_makes_up_for_ejections(served_s: float, ejections: int) -> None:
    worker = worker_in("suspect", suspicion=Suspicion(ejections=3, serves_since=NOW - served_s))
    assert decided(worker, "failed", ready(1)).life.suspicion.ejections == ejections


# --- slow start ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "event", "elder_s", "is_cold"),
    [
        ("starting", "answered", None, False),
        ("starting", "answered", 9.0, False),
        ("starting", "answered", 10.0, True),
        ("gone", "answered", None, True),
        ("probing", "proven", 0.0, True),
        ("draining", "undrain", None, True),
    ],
)
def test_who_comes_to_warm_workers_starts_slowly(
    state: str, event: str, elder_s: float | None, is_cold: bool
) -> None:
    others = [] if elder_s is None else [worker_in("ready", suspicion=Suspicion(serves_since=NOW - elder_s))]
    assert decided(worker_in(state), event, others).life.warm_from == (NOW if is_cold else NEVER)


def test_an_elder_that_is_out_of_service_is_not_warm() -> None:
    elder = worker_in("ejected", suspicion=Suspicion(serves_since=NOW - 100))
    assert decided(worker_in("starting"), "answered", [elder]).life.warm_from == NEVER


# --- signs of life ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "left_s"),
    [("lost", 0.5), ("failed", 0.5), ("missed", 2.0), ("erred", 3.0), ("silent", 3.0)],
)
def test_how_long_a_suspect_has_to_give_a_sign(event: str, left_s: float) -> None:
    worker = worker_in("ready")
    worker.answered, heard = NOW - 2.0, NOW - 1.0
    worker.note_heard(heard)
    worker.become(decided(worker, event).life)
    assert worker.state is WorkerState.SUSPECT
    assert verdict_at(worker, HEALTH) == NOW + left_s


def test_a_suspect_that_is_heard_has_its_time_anew() -> None:
    worker = worker_in("suspect", suspicion=Suspicion(doubted=NOW, verdict_at=NOW + 0.5))
    assert verdict_at(worker, HEALTH) == NOW + 0.5
    worker.note_heard(NOW + 0.25)
    assert verdict_at(worker, HEALTH) == NOW + 3.25


@pytest.mark.parametrize(
    ("state", "heard_s", "answered_s", "event"),
    [
        ("ready", 0.5, 2.0, None),  # bytes came while the probe waited
        ("ready", 1.5, 2.0, "missed"),
        ("ready", 3.0, 2.0, "missed"),
        ("ready", 3.0, 3.0, "silent"),
        ("ready", 3.0, 2.995, "silent"),  # the loop's clock is no better
        ("probing", 0.5, 9.0, None),
        ("draining", 4.0, 4.0, "silent"),
        ("ejected", 0.5, 9.0, "missed"),  # no leg should run there
        ("gone", 9.0, 9.0, "silent"),
    ],
)
def test_what_a_missed_probe_is(state: str, heard_s: float, answered_s: float, event: str | None) -> None:
    worker = worker_in(state)
    worker.answered = NOW - answered_s
    worker.note_heard(NOW - heard_s)
    assert missed(worker, NOW - 1.0, HEALTH, NOW) == event


@pytest.mark.parametrize(
    ("state", "failures", "erring", "proven"),
    [
        ("ready", 0, False, False),
        ("ready", 1, False, False),
        ("ready", 2, True, False),
        ("suspect", 2, True, False),
        ("probing", 1, True, False),
        ("probing", 0, True, True),
    ],
)
def test_errors_in_a_row_and_trials(state: str, failures: int, erring: bool, proven: bool) -> None:
    worker = worker_in(state, failures=failures)
    assert (is_erring(worker, HEALTH), is_proven(worker)) == (erring, proven)


# --- what another process knows -----------------------------------------------------------------


@given(STATES, STATES, st.integers(0, 3), st.integers(0, 3))
def test_the_process_that_probes_is_followed_but_for_what_is_older_than_a_refusal(
    here: WorkerState, there: WorkerState, epoch_here: int, epoch_there: int
) -> None:
    worker = worker_in(here, epoch=epoch_here, failures=3, suspicion=Suspicion(ejections=2))
    snapshot = msgspec.structs.replace(
        worker.snapshot(), state=there, epoch=epoch_there, warm_from=NOW, last_error="elsewhere"
    )
    life = followed(worker, snapshot)
    if here is WorkerState.GONE and there in IN_SERVICE and epoch_there <= epoch_here:
        assert life is None
        return
    assert life is not None
    assert (life.state, life.epoch, life.warm_from) == (there, epoch_there, NOW)
    is_same = (here, epoch_here) == (there, epoch_there)
    assert life.failures == (3 if is_same else int(there is WorkerState.PROBING))
    assert life.suspicion == worker.suspicion  # the other process's own
