from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Conflict
from orchestrator.processes.rows import Rows
from orchestrator.routing.policies.base import Context
from orchestrator.routing.policies.least_loaded import LeastLoaded
from orchestrator.telemetry.counters import Layout
from orchestrator.wire.codec import CODECS
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.judge import CLEARED_S, MAX_WHY
from orchestrator.workers.registry import Registry
from orchestrator.workers.snapshot import WorkerSnapshot
from orchestrator.workers.states import ON_SUSPICION, REACHABLE, Event, WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, address, announcement, names, processes_of, registry_of, seat
from tests.orchestrator.routing.requests import FakeRequest


def test_only_ready_workers_are_in_the_pools() -> None:
    registry = registry_of({"prefill": 2, "decode": 1, "both": 1}, ready=False)
    pools = registry.pools["m"]
    assert (pools.prefill, pools.decode, pools.both) == ((), (), ())
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    assert names(pools.prefill) == ["prefill/0", "prefill/1"]
    assert names(pools.decode) == ["decode/0"]
    assert names(pools.both) == ["both/0"]
    registry.judge.mark_gone(registry.workers[0], "refused")
    assert names(pools.prefill) == ["prefill/1"]


def test_a_worker_that_goes_is_told_of_once_and_may_come_back() -> None:
    registry = registry_of({"prefill": 1})
    gone: list[Worker] = []
    registry.news.gone.add(gone.append)
    worker = registry.workers[0]
    for why in ("refused", "still refused"):
        registry.judge.mark_gone(worker, why)
    assert gone == [worker]
    assert worker.status().last_error == "still refused"
    registry.judge.mark_ready(worker)
    assert (worker.status().state, worker.status().last_error) == ("ready", None)


def test_a_worker_that_never_answered_stays_starting() -> None:
    registry = registry_of({"prefill": 1}, ready=False)
    registry.judge.mark_gone(registry.workers[0], "refused")
    assert registry.workers[0].state == "starting"


# --- several processes --------------------------------------------------------------------------


ASKED = FakeRequest()


def least_loaded() -> LeastLoaded:
    return LeastLoaded(Context("m", "decode", Random(1), Clock()))


def test_least_loaded_goes_around_what_other_processes_load() -> None:
    busy, *others = processes_of(3)
    with seat(busy.workers[0]):
        chosen = [least_loaded().choose(ASKED, registry.pools["m"].decode).worker for registry in others]
    assert names(chosen) == ["decode/1", "decode/1"]


def test_what_another_process_knows_is_taken_over() -> None:
    source = registry_of({"prefill": 1, "decode": 1}, transport="msgpack", ready=False)
    copy = registry_of({"prefill": 1, "decode": 1}, transport="msgpack", ready=False)
    source.announce(source.workers[0], Introduction(announcement("json", "msgpack"), 4096))
    source.judge.mark_ready(source.workers[0])
    source.judge.mark_gone(source.workers[1], "silent")
    copy.follow(source.snapshots())
    assert copy.snapshots() == source.snapshots()
    assert names(copy.pools["m"].prefill) == ["prefill/0"]
    assert copy.workers[0].abilities.codec is CODECS["msgpack"]


def test_a_snapshot_from_before_a_refusal_does_not_bring_the_worker_back() -> None:
    source, copy = registry_of({"decode": 1}), registry_of({"decode": 1}, ready=False)
    copy.follow(source.snapshots())
    copy.judge.mark_gone(copy.workers[0], "refused")
    copy.follow(source.snapshots())
    assert copy.workers[0].state is WorkerState.GONE
    source.judge.mark_gone(source.workers[0], "refused elsewhere")
    source.judge.mark_ready(source.workers[0])
    copy.follow(source.snapshots())
    assert copy.workers[0].state is WorkerState.READY


@pytest.mark.parametrize("stale", ["probing", "draining", "suspect"])
def test_no_older_snapshot_brings_a_worker_back_that_refused(stale: str) -> None:
    copy = registry_of({"decode": 2})
    before = copy.workers[0].snapshot()
    copy.judge.mark_gone(copy.workers[0], "refused")
    copy.follow([msgspec.structs.replace(before, state=WorkerState(stale)), copy.workers[1].snapshot()])
    assert copy.workers[0].state is WorkerState.GONE


def test_taking_over_ends_legs_and_is_no_report() -> None:
    source, copy = registry_of({"decode": 1}), registry_of({"decode": 1})
    gone: list[Worker] = []
    seen: list[Event] = []
    copy.news.gone.add(gone.append)
    copy.news.moved.add(lambda worker, event: seen.append(event))
    source.judge.mark_gone(source.workers[0], "refused")
    copy.follow(source.snapshots())
    assert names(copy.pools["m"].decode) == []
    assert gone == [copy.workers[0]]
    assert seen == []


def test_pools_are_sorted_once_for_all_workers_before_anybody_hears_of_one() -> None:
    source, copy = registry_of({"prefill": 3, "decode": 3}), registry_of({"prefill": 3, "decode": 3})
    pools, sorts, left = copy.pools["m"], [], []
    pools.on_update(lambda: sorts.append(len(pools.decode)))
    copy.news.gone.add(lambda worker: left.append(len(pools.decode)))
    for worker in source.workers[3:5]:
        source.judge.mark_gone(worker, "refused")
    copy.follow(source.snapshots())
    assert sorts == [1]
    assert left == [1, 1]


def test_every_change_is_told() -> None:
    registry = registry_of({"decode": 1}, ready=False)
    worker = registry.workers[0]
    seen: list[tuple[WorkerSnapshot, ...]] = []
    registry.news.changed.add(lambda: seen.append(registry.snapshots()))
    registry.announce(worker, Introduction(None, 4096))
    registry.judge.mark_ready(worker)
    registry.judge.mark_gone(worker, "refused")
    registry.judge.mark_gone(worker, "still refused")
    told = [(snapshot.state, snapshot.max_model_len, snapshot.last_error) for [snapshot] in seen]
    assert told == [
        ("starting", 4096, None),
        ("ready", 4096, None),
        ("gone", 4096, "refused"),
        ("gone", 4096, "still refused"),
    ]


# --- suspicion ----------------------------------------------------------------------------------


def states(registry: Registry) -> list[str]:
    return [worker.state.value for worker in registry.workers]


def eject(registry: Registry, worker: Worker) -> None:
    registry.judge.note_failed(worker, "500")
    registry.judge.note_failed(worker, "500")


def test_a_lost_leg_makes_a_worker_suspect_and_a_probe_is_due() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    doubted: list[Worker] = []
    registry.news.doubted.add(doubted.append)
    registry.judge.note_lost(worker, worker.epoch, "reset")
    registry.judge.note_lost(worker, worker.epoch, "reset, too")
    assert (worker.state, worker.last_error, doubted) == ("suspect", "reset, too", [worker])
    registry.judge.mark_ready(worker)
    assert (worker.state, worker.epoch) == ("ready", 1)
    assert registry.pools["m"].is_steady


def test_a_leg_from_before_a_return_tells_nothing() -> None:
    registry = registry_of({"decode": 1})
    worker = registry.workers[0]
    registry.judge.mark_gone(worker, "refused")
    registry.judge.mark_ready(worker)
    registry.judge.note_lost(worker, 1, "reset")
    assert worker.state is WorkerState.READY


def test_five_errors_in_a_row_eject() -> None:
    registry = registry_of({"decode": 2}, consecutive_errors=5)
    worker = registry.workers[0]
    gone: list[Worker] = []
    registry.news.gone.add(gone.append)
    for _ in range(4):
        registry.judge.note_error(worker)
    worker.failures = 0  # a leg has succeeded
    for _ in range(4):
        registry.judge.note_error(worker)
    assert worker.state is WorkerState.READY
    registry.judge.note_error(worker)
    assert worker.state is WorkerState.EJECTED
    assert gone == [worker]


def test_an_error_on_trial_ejects_at_once() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    eject(registry, worker)
    registry.judge.mark_ready(worker)
    assert (worker.state, worker.epoch) == ("probing", 2)
    registry.judge.note_error(worker)
    assert worker.state is WorkerState.EJECTED


def test_silence_ejects_and_missing_one_probe_does_not() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, silence_s=3)
    worker = registry.workers[0]
    for after, state in ((1.0, "suspect"), (1.9, "suspect"), (0.1, "ejected")):
        clock.now += after
        registry.judge.note_missed(worker, clock.now - 1)
        assert worker.state == state


def test_a_worker_whose_streams_flow_may_miss_probes() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, silence_s=3)
    worker = registry.workers[0]
    for _ in range(20):
        clock.now += 1
        worker.note_heard(clock.now - 0.25)
        registry.judge.note_missed(worker, clock.now - 1)
    assert worker.state is WorkerState.READY
    clock.now += 2.75  # the streams have ended 3 s ago
    registry.judge.note_missed(worker, clock.now - 1)
    assert worker.state is WorkerState.EJECTED


def test_a_suspect_has_less_time_after_a_lost_leg_unless_it_is_heard() -> None:
    clock = Clock()
    registry = registry_of({"decode": 4}, clock=clock, silence_s=3, suspect_s=0.4)
    silent, heard = registry.workers[:2]
    for worker in (silent, heard):
        registry.judge.note_lost(worker, worker.epoch, "reset")
    clock.now += 0.2
    heard.note_heard(clock.now)
    clock.now += 0.2
    for worker in (silent, heard):
        registry.judge.note_missed(worker, clock.now - 0.1)
    assert states(registry)[:2] == ["ejected", "suspect"]
    clock.now += 2.8
    registry.judge.note_missed(heard, clock.now - 1)
    assert heard.state is WorkerState.EJECTED


def test_an_ejected_worker_is_asked_later_each_time() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, eject_s=1, eject_max_s=8)
    worker = registry.workers[0]
    eject(registry, worker)
    waits = [worker.suspicion.retry_at - clock.now]
    for _ in range(5):
        registry.judge.note_failed(worker, "500")
        waits.append(worker.suspicion.retry_at - clock.now)
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, (1, 2, 4, 8, 8, 8), strict=True))
    worker.suspicion = replace(worker.suspicion, ejections=100_000)  # a month of failures
    registry.judge.note_failed(worker, "500")
    assert worker.suspicion.retry_at - clock.now <= 8
    retry_at = worker.suspicion.retry_at
    registry.judge.note_lost(worker, worker.epoch, "a leg from before")
    registry.judge.note_error(worker)
    assert worker.suspicion.retry_at == retry_at


def test_a_long_time_without_trouble_makes_up_for_ejections() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, eject_s=1, eject_max_s=8)
    worker = registry.workers[0]
    for between, bound in ((0.0, 1), (0.0, 2), (9.0, 1)):
        registry.judge.mark_ready(worker)
        worker.failures = 0
        registry.settle()
        assert worker.state is WorkerState.READY
        clock.now += between
        eject(registry, worker)
        assert bound / 2 <= worker.suspicion.retry_at - clock.now <= bound


# --- never more than half of a pool -------------------------------------------------------------


@pytest.mark.parametrize(("size", "ejected"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_of_a_pool_is_ejected(size: int, ejected: int) -> None:
    registry = registry_of({"prefill": 1, "decode": size})
    for worker in registry.workers:
        eject(registry, worker)
    assert states(registry) == ["suspect"] + ["ejected"] * ejected + ["suspect"] * (size - ejected)
    assert len(registry.pools["m"].decode) == size - ejected


def test_who_is_gone_is_not_suspected_and_not_counted() -> None:
    registry = registry_of({"decode": 4})
    for worker in registry.workers:
        registry.judge.mark_gone(worker, "refused")
    assert states(registry) == ["gone"] * 4


def test_an_ejected_worker_serves_again_when_too_few_others_are_left() -> None:
    registry = registry_of({"decode": 4})
    first, second, third, fourth = registry.workers
    doubted: list[Worker] = []
    registry.news.doubted.add(doubted.append)
    eject(registry, first)
    registry.judge.note_failed(first, "500")  # twice in a row
    eject(registry, second)
    registry.judge.mark_gone(third, "refused")
    assert states(registry) == ["ejected", "suspect", "gone", "ready"]
    assert (doubted, second.epoch) == ([second], 2)
    registry.judge.mark_gone(fourth, "refused")
    assert states(registry) == ["ejected", "suspect", "gone", "gone"]
    assert names(registry.pools["m"].decode) == ["decode/1"]
    registry.judge.mark_gone(second, "refused")
    assert states(registry) == ["suspect", "gone", "gone", "gone"]


# --- what the operator wants --------------------------------------------------------------------


def test_a_drained_worker_takes_no_legs_and_is_asked_before_it_does_again() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    doubted: list[Worker] = []
    registry.news.doubted.add(doubted.append)
    with seat(worker):
        registry.drain(worker)
        assert names(registry.pools["m"].decode) == ["decode/1"]
        assert (worker.status().state, worker.status().in_flight) == ("draining", 1)
    registry.judge.mark_ready(worker)
    assert worker.state is WorkerState.DRAINING
    registry.undrain(worker)
    assert (worker.state, doubted) == ("suspect", [worker])
    registry.judge.mark_ready(worker)
    assert (worker.state, worker.epoch) == ("ready", 1)
    assert registry.pools["m"].share(worker) < 1


def test_draining_outlasts_a_restart() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    gone: list[Worker] = []
    registry.news.gone.add(gone.append)
    registry.drain(worker)
    registry.judge.mark_gone(worker, "refused")
    assert gone == [worker]
    registry.judge.mark_ready(worker)
    assert (worker.state, worker.epoch) == ("draining", 2)
    registry.judge.mark_gone(worker, "refused")
    registry.undrain(worker)
    assert worker.state is WorkerState.GONE
    registry.judge.mark_ready(worker)
    assert worker.state is WorkerState.READY


def test_a_silent_worker_that_drains_is_gone() -> None:
    clock = Clock()
    registry = registry_of({"decode": 1}, clock=clock, silence_s=3)
    registry.drain(registry.workers[0])
    clock.now += 3
    registry.judge.note_missed(registry.workers[0], clock.now - 1)
    assert states(registry) == ["gone"]


def test_an_added_worker_serves_once_it_has_answered() -> None:
    registry = registry_of({"decode": 1})
    added: list[Worker] = []
    registry.news.added.add(added.append)
    worker = registry.add(address("decode", 1, port=2))
    assert (added, names(registry.pools["m"].decode)) == ([worker], ["decode/0"])
    registry.judge.mark_ready(worker)
    assert names(registry.pools["m"].decode) == ["decode/0", "decode/1"]


def test_a_worker_leaves_when_its_legs_have_ended() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    removed: list[Worker] = []
    registry.news.removed.add(removed.append)
    with seat(worker):
        registry.remove(worker)
        registry.settle()
        assert (worker.state, removed) == ("draining", [])
        with pytest.raises(Conflict, match="m/decode/0 is being removed"):
            registry.undrain(worker)
    registry.settle()
    assert removed == [worker]
    assert names(registry.workers) == names(registry.pools["m"].decode) == ["decode/1"]


def test_a_leaving_worker_makes_an_ejected_one_needed() -> None:
    registry = registry_of({"decode": 2})
    eject(registry, registry.workers[0])
    registry.remove(registry.workers[1])
    assert states(registry) == ["suspect", "draining"]


# --- whatever happens ---------------------------------------------------------------------------

ACTIONS: dict[str, Callable[[Registry, Worker], None]] = {
    "answered": lambda registry, worker: registry.judge.mark_ready(worker),
    "refused": lambda registry, worker: registry.judge.mark_gone(worker, "refused"),
    "failed": lambda registry, worker: registry.judge.note_failed(worker, "500"),
    "missed": lambda registry, worker: registry.judge.note_missed(worker, asked=float("inf")),
    "lost": lambda registry, worker: registry.judge.note_lost(worker, worker.epoch, "reset"),
    "error": lambda registry, worker: registry.judge.note_error(worker),
    "success": lambda registry, worker: setattr(worker, "failures", 0),
    "drain": lambda registry, worker: registry.drain(worker),
    "undrain": lambda registry, worker: registry.undrain(worker),
    "settle": lambda registry, worker: registry.settle(),
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(ACTIONS)), st.integers(0, 4), st.floats(0, 2)), max_size=60)


@given(STEPS)
def test_no_more_than_half_is_out_and_no_worker_that_could_serve_is_idle(
    steps: list[tuple[str, int, float]],
) -> None:
    clock = Clock()
    registry = registry_of({"decode": 5}, clock=clock, consecutive_errors=2)
    pools = registry.pools["m"]
    for action, index, seconds in steps:
        epochs = [worker.epoch for worker in registry.workers]
        clock.now += seconds
        ACTIONS[action](registry, registry.workers[index])
        found = states(registry)
        reachable = [state for state in found if state in REACHABLE]
        assert sum(state in ON_SUSPICION for state in reachable) <= len(reachable) // 2
        best = "ready" if "ready" in found else "suspect"
        assert [worker.state for worker in pools.decode] == [best] * found.count(best)
        assert bool(pools.candidates("decode")) == bool(pools.decode)
        assert all(new.epoch >= old for new, old in zip(registry.workers, epochs, strict=True))
        assert all(worker.is_drained or worker.state != "draining" for worker in registry.workers)


# --- workers that answer as none of ours does ---------------------------------------------------


def test_a_denied_leg_has_the_worker_looked_at_once() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock)
    worker, doubted = registry.workers[0], list[Worker]()
    registry.news.doubted.add(doubted.append)
    registry.judge.note_denied(worker, worker.epoch, 403)
    assert (worker.state, worker.is_denied, doubted) == (WorkerState.SUSPECT, True, [worker])
    assert (worker.reason, worker.last_error) == ("denies requests", "answered a leg with 403")
    registry.judge.note_cleared(worker)
    registry.judge.mark_ready(worker)
    registry.judge.note_denied(
        worker, worker.epoch, 403
    )  # the same client again: a probe has just seen that it is well
    assert (worker.state, worker.is_denied) == (WorkerState.READY, False)
    clock.now += CLEARED_S
    registry.judge.note_denied(worker, worker.epoch, 403)
    assert (worker.state, worker.is_denied) == (WorkerState.SUSPECT, True)


def test_what_an_earlier_worker_denied_is_no_news() -> None:
    registry = registry_of({"decode": 1})
    registry.judge.note_denied(registry.workers[0], registry.workers[0].epoch - 1, 401)
    assert registry.workers[0].state is WorkerState.READY


def test_all_workers_of_a_pool_may_be_unfit_and_come_back() -> None:
    registry = registry_of({"decode": 3})
    for worker in registry.workers:
        registry.judge.note_unfit(
            worker, "it answers 401 to /v1/models", "refuses the orchestrator's key (401)"
        )
    assert registry.pools["m"].decode == ()
    epoch = registry.workers[0].epoch
    registry.judge.mark_ready(registry.workers[0])
    assert names(registry.pools["m"].decode) == ["decode/0"]
    assert (registry.workers[0].epoch, registry.workers[0].reason) == (epoch + 1, None)


def test_what_a_worker_can_write_into_an_error_is_bounded() -> None:
    registry = registry_of({"decode": 1})
    registry.judge.note_failed(registry.workers[0], "x" * 10_000)
    assert len(str(registry.workers[0].last_error)) == MAX_WHY


# --- workers that end for good ------------------------------------------------------------------


def test_a_worker_that_is_lost_is_forgotten_at_once_and_its_legs_are_out_of_service() -> None:
    registry = registry_of({"decode": 2})
    gone: list[Worker] = []
    registry.news.gone.add(gone.append)
    worker = registry.workers[0]
    epoch = worker.epoch
    with seat(worker):
        registry.lose(worker, "its pod has ended")
        assert worker.state is WorkerState.GONE
        assert worker.epoch > epoch
        assert gone == [worker]
    assert names(registry.workers) == ["decode/1"]
    assert names(registry.pools["m"].decode) == ["decode/1"]


def test_a_worker_that_stays_after_all_serves_again() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    with seat(worker):
        registry.remove(worker)
        registry.keep(worker)
        registry.judge.mark_ready(worker)
        registry.settle()
    assert names(registry.pools["m"].decode) == ["decode/0", "decode/1"]


def followed() -> tuple[Registry, Registry]:
    """The registry that decides, of two prefill workers, and one that follows it; there is room for two."""
    addresses = [address("prefill", index, port=1 + index) for index in range(2)]
    rows = Rows.create(Layout(["m"], []), len(addresses) + 2, 2)
    source, copy = (Registry(addresses, ["m"], "json", rows.loads(row)) for row in range(2))
    rows.close()
    for worker in source.workers:
        source.judge.mark_ready(worker)
    copy.follow(source.snapshots())
    return source, copy


@pytest.mark.parametrize("is_slot_the_same", [False, True])
def test_processes_take_another_start_of_a_worker_for_another_one(is_slot_the_same: bool) -> None:
    """Whatever was published in between: only the last snapshot may be seen."""
    source, copy = followed()
    old, epoch = copy.workers[0], copy.workers[0].epoch
    lost = source.workers[0]
    taken = contextlib.nullcontext() if is_slot_the_same else seat(lost)
    with taken:
        source.lose(lost, "its pod has ended")
        new = source.add(lost.address, lost.epoch)
        assert (new.slot == lost.slot) is is_slot_the_same
        source.judge.mark_ready(new)
        copy.follow(source.snapshots())
    assert old.epoch > epoch  # hand-offs of the old start are void
    found = copy.find(old.name)
    assert found is not None
    assert (found.state, found.epoch) == (WorkerState.READY, new.epoch)
    assert len(copy.workers) == 2


def test_an_address_that_another_worker_has_now_ends_the_one_that_had_it() -> None:
    source, copy = followed()
    old, epoch = copy.workers[0], copy.workers[0].epoch
    source.lose(source.workers[0], "its pod has ended")
    source.add(replace(old.address, name="m/prefill/pod"))
    copy.follow(source.snapshots())
    assert (old.state, old.epoch) == (WorkerState.GONE, epoch + 1)


def test_slots_of_those_that_have_left_are_used_again() -> None:
    registry = registry_of({"decode": 1})
    for index in range(1, 100):
        added = registry.add(address("decode", index, port=1 + index))
        registry.remove(added)
        registry.settle()
        assert added.slot == 1


def test_names_of_their_own_do_not_count_as_indexes() -> None:
    registry = registry_of({"decode": 1})
    for name in ("pod-7", "x", "²", "3"):
        registry.add(replace(address("decode", 0, port=ord(name[0])), name=f"m/decode/{name}"))
    assert registry.next_index("m", "decode") == 4
