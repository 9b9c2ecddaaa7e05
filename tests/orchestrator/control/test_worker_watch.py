"""Who is far slower than its peers is told, and ejected if that is wanted: never more than half of a pool."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import defaultdict
from typing import Any

import pytest

from orchestrator.control.admin import admin_app
from orchestrator.control.worker_watch import LEAST, LOOK_S, WINDOW_S, WorkerWatch
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.figures import BOUNDS, CELLS, ERRORS, FIRST_BYTE, GAP, SERVED
from orchestrator.wire.info import Role
from orchestrator.workers.states import Event as EngineEvent
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.control.fakes import FakeState, ask


class Watched:
    """A pool, what was counted of its workers, and the watch over them."""

    def __init__(self, role: Role = "decode", count: int = 3, **health: Any) -> None:
        self.clock = Clock()
        self.registry = registry_of({role: count}, clock=self.clock, slow_start_s=0, **health)
        self.cells: dict[int, list[int]] = defaultdict(lambda: [0] * CELLS)
        self.events = Events()
        self.state = FakeState(registry=self.registry, events=self.events)
        self.watch = WorkerWatch(
            self.state.config, self.registry, self.cells.__getitem__, self.events, clock=self.clock
        )
        self.state.watch = self.watch

    def serve(self, *seconds: float, measure: int = FIRST_BYTE, times: int = LEAST) -> None:
        """Each worker serves some requests in so many seconds, and the watch looks."""
        for slot, each in enumerate(seconds):
            self.cells[slot][measure + bisect_left(BOUNDS, each)] += times
            self.cells[slot][SERVED] += times
        self.clock.now += LOOK_S
        self.watch.look()

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events.after()]

    def states(self) -> list[str]:
        return [worker.state.value for worker in self.registry.workers]


@pytest.mark.parametrize("measure", [FIRST_BYTE, GAP], ids=["first byte", "inter-token"])
@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_a_worker_that_is_far_slower_is_told_once(
    role: Role, measure: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "baton.workers")
    watched = Watched(role)
    watched.watch.look()
    for _ in range(5):
        watched.serve(0.005, 0.1, 0.006, measure=measure)
    assert watched.kinds() == ["worker.slow"]
    [line] = caplog.messages
    assert line.startswith(f"m/{role}/1 is far slower than its peers: ")
    assert [watched.watch.figures(worker).is_slow for worker in watched.registry.workers] == [
        False,
        True,
        False,
    ]
    assert watched.states() == ["ready"] * 3


def test_in_a_pool_of_two_the_other_one_is_the_measure() -> None:
    watched = Watched(count=2)
    watched.watch.look()
    for _ in range(3):
        watched.serve(0.1, 0.005)
    assert [event.subject for event in watched.events.after()] == ["m/decode/0"]


def test_when_it_is_as_fast_as_the_others_again_that_is_told_too() -> None:
    watched = Watched()
    watched.watch.look()
    for _ in range(3):
        watched.serve(0.005, 0.1, 0.005)
    for _ in range(int(WINDOW_S / LOOK_S) + 2):
        watched.serve(0.005, 0.005, 0.005)
    assert watched.kinds() == ["worker.slow", "worker.slow_over"]
    assert not watched.watch.figures(watched.registry.workers[1]).is_slow


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        ((0.005, 0.012, 0.005), LEAST),  # not by so much
        ((0.0005, 0.002, 0.0005), LEAST),  # it harms nobody
        ((0.005, 0.1, 0.005), 1),  # seen too seldom, within two looks
        ((0.1, 0.1, 0.1), LEAST),  # all alike
    ],
)
def test_who_is_no_outlier(seconds: tuple[float, ...], times: int) -> None:
    watched = Watched()
    watched.watch.look()
    for _ in range(2):
        watched.serve(*seconds, times=times)
    assert watched.kinds() == []


def test_a_worker_alone_has_nobody_to_be_compared_with() -> None:
    watched = Watched(count=1)
    watched.watch.look()
    for _ in range(3):
        watched.serve(5.0)
    assert watched.kinds() == []


def test_it_can_be_off() -> None:
    watched = Watched(slow_outlier="off")
    watched.watch.look()
    for _ in range(5):
        watched.serve(0.005, 0.1, 0.006)
    assert watched.kinds() == []


# --- ejecting -----------------------------------------------------------------------------------


def test_it_is_ejected_if_that_is_wanted() -> None:
    watched = Watched(slow_outlier="eject")
    watched.watch.look()
    for _ in range(2):
        watched.serve(0.005, 0.1, 0.005)
    worker = watched.registry.workers[1]
    assert watched.states() == ["ready", "ejected", "ready"]
    assert worker.reason == "is far slower than its peers"
    assert (worker.last_error or "").startswith("far slower than its peers: first byte p50 ")


def test_one_that_is_back_is_judged_by_what_it_does_then() -> None:
    watched = Watched(slow_outlier="eject")
    watched.watch.look()
    for _ in range(2):
        watched.serve(0.005, 0.1, 0.005)
    worker = watched.registry.workers[1]
    watched.registry.judge.mark_ready(worker)
    worker.failures = 0  # a leg has succeeded
    watched.registry.settle()
    assert worker.state is WorkerState.READY
    for _ in range(3):
        watched.serve(0.005, 0.005, 0.005)
    assert worker.state is WorkerState.READY
    for _ in range(int(WINDOW_S / LOOK_S)):
        watched.serve(0.005, 0.1, 0.005)
    assert worker.state is WorkerState.EJECTED


@pytest.mark.parametrize(("count", "slow", "ejected"), [(2, 1, 1), (3, 1, 1), (4, 2, 2), (5, 2, 2)])
def test_never_more_than_half_of_a_pool(count: int, slow: int, ejected: int) -> None:
    watched = Watched(count=count, slow_outlier="eject")
    watched.watch.look()
    for _ in range(30):
        watched.serve(*[0.005] * (count - slow), *[0.5] * slow)
    assert watched.states().count("ejected") == ejected


def test_where_half_is_out_already_it_stays_and_that_is_told() -> None:
    watched = Watched(count=3, slow_outlier="eject")
    registry = watched.registry
    registry.judge.note_lost(registry.workers[2], registry.workers[2].epoch, "reset")
    registry.judge.note_failed(registry.workers[2], "ill")
    assert watched.states() == ["ready", "ready", "ejected"]
    watched.watch.look()
    for _ in range(3):
        watched.serve(0.005, 0.1, 0.005)
    assert watched.states() == ["ready", "ready", "ejected"]
    assert watched.kinds() == ["worker.slow", "worker.slow_kept"]


# --- what is shown ------------------------------------------------------------------------------


def test_the_admin_page_and_the_metrics_show_the_same() -> None:
    watched = Watched()
    watched.watch.look()
    for _ in range(3):
        watched.serve(0.005, 0.1, 0.006)
    watched.cells[1][ERRORS] += 2
    app = admin_app(watched.state)
    rows = {row["address"]["name"]: row for row in ask(app, "/admin/workers").json()}
    slow = rows["m/decode/1"]
    assert (slow["served"], slow["errors"], slow["is_slow"]) == (3 * LEAST, 2, True)
    assert slow["rate"] == pytest.approx(3 * LEAST / (3 * LOOK_S))
    assert 0.07 < slow["first_byte_p50"] < 0.14
    assert (slow["seats"], slow["share"], slow["inter_token_p50"]) == (1024, 1.0, None)
    assert slow["state"] == "ready"
    text = ask(app, "/metrics").text
    labels = '{model="m",role="decode",worker="m/decode/1"}'
    for line in (
        f"baton_worker_requests_total{labels} {3.0 * LEAST}",
        f"baton_worker_errors_total{labels} 2.0",
        f"baton_worker_slow{labels} 1.0",
        f"baton_worker_seats{labels} 1024.0",
        f"baton_worker_first_byte_seconds_count{labels} {3.0 * LEAST}",
        f"baton_worker_first_byte_p50_seconds{labels} {slow['first_byte_p50']}",
    ):
        assert f"{line}\n" in text


def test_a_worker_that_takes_anothers_slot_begins_with_nothing() -> None:
    watched = Watched()
    watched.serve(0.005, 0.005, 0.005)
    registry = watched.registry
    registry.remove(registry.workers[2])
    registry.settle()
    assert len(registry.workers) == 2
    address = registry.workers[1].address
    from dataclasses import replace

    worker = registry.add(replace(address, name="m/decode/9", url="http://127.0.0.1:9"))
    assert worker.slot == 2
    assert watched.watch.figures(worker).served == 0


def test_since_when_a_worker_is_as_it_is() -> None:
    watched = Watched()
    worker = watched.registry.workers[0]
    before = watched.watch.figures(worker).since
    watched.registry.drain(worker)
    assert watched.watch.figures(worker).since > before


def test_restarts_and_ejections_are_counted() -> None:
    watched = Watched()
    worker, *_ = watched.registry.workers
    for _ in range(2):
        watched.registry.judge.note_seen(worker, worker.epoch, EngineEvent.REFUSED, "refused")
        watched.registry.judge.mark_ready(worker)
    watched.registry.judge.note_seen(worker, worker.epoch, EngineEvent.SILENT, "silent")
    found = watched.watch.figures(worker)
    assert (found.restarts, found.ejections) == (2, 1)
    text = ask(admin_app(watched.state), "/metrics").text
    labels = '{model="m",role="decode",worker="m/decode/0"}'
    assert f"baton_worker_restarts_total{labels} 2.0\nbaton_worker_restarts_total" in text
    assert f"baton_worker_ejections_total{labels} 1.0\n" in text
