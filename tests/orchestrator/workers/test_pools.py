from __future__ import annotations

import contextlib
from collections import Counter

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.wire.info import Role
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, names, registry_of, seat


def turns(registry: Registry, requests: int = 100) -> Counter[str]:
    """How often each decode worker is a candidate."""
    pools = registry.pools["m"]
    return Counter(name for _ in range(requests) for name in names(pools.candidates("decode")))


def back_from_gone(registry: Registry, worker: Worker) -> None:
    registry.judge.mark_gone(worker, "refused")
    registry.judge.mark_ready(worker)


def on_trial(registry: Registry, worker: Worker) -> None:
    registry.judge.note_lost(worker, worker.epoch, "reset")
    registry.judge.note_failed(worker, "500")
    registry.judge.mark_ready(worker)
    assert worker.state is WorkerState.PROBING


def test_pools_are_steady_when_all_workers_start_together() -> None:
    assert registry_of({"prefill": 2, "decode": 2}).pools["m"].is_steady


def test_a_worker_that_comes_back_starts_slowly() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, slow_start_s=10)
    pools, (first, second) = registry.pools["m"], registry.workers
    back_from_gone(registry, second)
    assert not pools.is_steady
    seen = []
    for _ in range(4):
        seen.append(turns(registry)[second.name.removeprefix("m/")])
        clock.now += 2.5
    assert seen == [12, 25, 50, 75]
    assert turns(registry) == {"decode/0": 100, "decode/1": 100}
    assert pools.share(first) == pools.share(second) == 1.0
    assert pools.is_steady


def test_slow_start_can_be_off() -> None:
    registry = registry_of({"decode": 2}, slow_start_s=0)
    back_from_gone(registry, registry.workers[1])
    assert registry.pools["m"].is_steady


def test_who_is_alone_serves_all_from_the_start() -> None:
    registry = registry_of({"decode": 1})
    back_from_gone(registry, registry.workers[0])
    assert turns(registry) == {"decode/0": 100}


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_slow_start_is_no_reason_where_nobody_is_warm(role: Role, count: int) -> None:
    registry = registry_of({role: count}, slow_start_s=10)
    pools = registry.pools["m"]
    for worker in registry.workers:
        registry.judge.mark_gone(worker, "refused")
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    assert [pools.share(worker) for worker in registry.workers] == [1.0] * count
    for _ in range(10):
        assert len(pools.candidates(role)) == count


def test_the_last_warm_worker_leaves_those_that_are_not_warm_everything() -> None:
    registry = registry_of({"decode": 3}, slow_start_s=10)
    pools, (warm, *cold) = registry.pools["m"], registry.workers
    for worker in cold:
        back_from_gone(registry, worker)
    assert [pools.share(worker) for worker in cold] == [0.125, 0.125]
    registry.drain(warm)
    assert [pools.share(worker) for worker in cold] == [1.0, 1.0]
    assert len(pools.candidates("decode")) == 2


@pytest.mark.parametrize(("role", "seats"), [("decode", 2), ("both", 2), ("prefill", 1)])
def test_who_is_cold_takes_what_the_warm_ones_have_no_room_for(role: Role, seats: int) -> None:
    registry = registry_of({role: 2}, slow_start_s=10)
    pools, (warm, cold) = registry.pools["m"], registry.workers
    pools.allot({"decode": 2, "both": 2})
    back_from_gone(registry, cold)
    assert sum(pools.candidates(role) == (warm,) for _ in range(16)) == 14
    with contextlib.ExitStack() as held:
        for _ in range(seats):
            held.enter_context(seat(warm))
        for _ in range(16):
            assert cold in pools.candidates(role)
        for _ in range(seats):
            held.enter_context(seat(cold))
        assert warm in pools.candidates(role)  # nobody has room: slow start holds again


def test_who_is_avoided_is_no_warm_peer() -> None:
    registry = registry_of({"decode": 3}, slow_start_s=10)
    pools, (warm, *cold) = registry.pools["m"], registry.workers
    for worker in cold:
        back_from_gone(registry, worker)
    assert pools.candidates("decode", [warm]) == tuple(cold)


def test_a_worker_that_starts_long_after_the_others_starts_slowly() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock, ready=False, slow_start_s=10)
    first, second = registry.workers
    registry.judge.mark_ready(first)
    clock.now += 9
    registry.judge.mark_ready(second)
    assert registry.pools["m"].is_steady
    late = registry_of({"decode": 2}, clock=clock, ready=False, slow_start_s=10)
    late.judge.mark_ready(late.workers[0])
    clock.now += 10
    late.judge.mark_ready(late.workers[1])
    assert turns(late) == {"decode/0": 100, "decode/1": 12}


def test_a_worker_on_trial_takes_one_leg_at_a_time() -> None:
    registry = registry_of({"decode": 2})
    worker = registry.workers[0]
    on_trial(registry, worker)
    pools = registry.pools["m"]
    assert names(pools.decode) == ["decode/1"]
    assert names(pools.candidates("decode")) == ["decode/1", "decode/0"]
    with seat(worker):
        assert names(pools.candidates("decode")) == ["decode/1"]
    assert names(pools.candidates("decode")) == ["decode/1", "decode/0"]
    assert not pools.is_steady


def test_a_trial_is_over_when_a_leg_has_succeeded() -> None:
    clock = Clock()
    registry = registry_of({"decode": 2}, clock=clock)
    worker = registry.workers[0]
    on_trial(registry, worker)
    epoch = worker.epoch
    registry.settle()
    assert worker.state is WorkerState.PROBING
    worker.failures = 0  # the flow
    registry.settle()
    assert (worker.state, worker.epoch) == (WorkerState.READY, epoch)
    assert registry.pools["m"].share(worker) == 0.125


@pytest.mark.parametrize("avoided", [0, 1])
def test_who_is_avoided_is_no_candidate(avoided: int) -> None:
    registry = registry_of({"decode": 2})
    on_trial(registry, registry.workers[0])
    pools = registry.pools["m"]
    others = names([registry.workers[1 - avoided]])
    assert names(pools.candidates("decode", [registry.workers[avoided]])) == others


# --- a whole path -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({"prefill": 1, "decode": 1}, None),
        ({"both": 1}, None),
        ({"prefill": 1}, "no decode worker is ready"),
        ({"decode": 1}, "no prefill worker is ready"),
        ({}, "no prefill and no decode worker is ready"),
    ],
)
def test_a_model_is_whole_with_a_pair_or_a_worker_that_does_both(
    counts: dict[str, int], problem: str | None
) -> None:
    assert registry_of(counts).pools["m"].problem() == problem  # type: ignore[arg-type]


def test_a_start_waits_for_prefill_workers_and_their_loss_is_made_up_for() -> None:
    registry = registry_of({"prefill": 1, "decode": 1}, ready=False)
    pools, (prefill, decode) = registry.pools["m"], registry.workers
    registry.judge.mark_ready(decode)
    assert pools.problem() == "no prefill worker is ready"
    registry.judge.mark_ready(prefill)
    assert pools.problem() is None
    registry.judge.mark_gone(prefill, "refused")
    assert pools.problem() is None
    registry.judge.mark_gone(decode, "refused")
    assert pools.problem() == "no prefill and no decode worker is ready"


def test_a_strict_path_needs_a_prefill_worker() -> None:
    registry = Registry(
        [worker.address for worker in registry_of({"prefill": 1, "decode": 1}).workers],
        ["m"],
        "json",
        routing=RoutingConfig(disaggregate="strict"),
    )
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    registry.judge.mark_gone(registry.workers[0], "refused")
    assert registry.pools["m"].problem() == "no prefill worker is ready"


# --- workers that asked to be left alone --------------------------------------------------------


def test_a_worker_rests_for_as_long_as_it_asked() -> None:
    now = [0.0]
    registry = Registry(
        [worker.address for worker in registry_of({"decode": 2}).workers], ["m"], "json", time=lambda: now[0]
    )
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    now[0] = 1000.0
    pools, (first, second) = registry.pools["m"], registry.workers
    pools.rest(first, 7)
    assert not pools.is_steady
    assert pools.candidates("decode") == (second,)
    assert pools.candidates("decode", [second]) == (first,)
    now[0] += 7
    assert pools.candidates("decode") == (first, second)
    assert pools.is_steady


def test_a_pool_whose_workers_all_rest_is_used() -> None:
    registry = registry_of({"decode": 2})
    for worker in registry.workers:
        registry.pools["m"].rest(worker, 7)
    assert set(registry.pools["m"].candidates("decode")) == set(registry.workers)
