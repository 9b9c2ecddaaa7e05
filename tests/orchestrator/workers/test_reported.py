"""What workers report of the legs of others, and that they drain themselves."""

from __future__ import annotations

import pytest

from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.wire.load import LoadReport
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, address


def registry_of(workers: int = 2, **routing: str) -> Registry:
    """A registry in which all have been found well."""
    addresses = [address("decode", index, port=index + 1) for index in range(workers)]
    made = Registry(addresses, ["m"], "json", routing=RoutingConfig.model_validate(routing), time=Clock())
    for worker in made.workers:
        made.judge.mark_ready(worker)
    return made


def report(others: int | None = 0, **fields: object) -> LoadReport:
    return LoadReport(  # type: ignore[arg-type]
        **{"state": "serving", "running": 1, "waiting": 0, "prompt_tokens": 0, "others": others} | fields
    )


def told(registry: Registry, worker: Worker, said: LoadReport | None) -> None:
    """What a probe does that has found the worker well."""
    registry.reports.note(worker, said)
    registry.judge.mark_ready(worker)


DRAINING = report(state="draining")


def test_legs_of_others_count_beside_ours() -> None:
    registry = registry_of()
    worker = registry.workers[0]
    worker.count_leg(2)
    told(registry, worker, report(3))
    assert (worker.in_flight, worker.legs, worker.own_legs, worker.others) == (5, 2, 2, 3)
    assert worker.status().in_flight == 2
    told(registry, worker, None)
    assert worker.in_flight == 2


def test_our_own_count_goes_on_between_reports() -> None:
    registry = registry_of()
    worker = registry.workers[0]
    told(registry, worker, report(3))
    worker.count_leg(1)
    assert worker.in_flight == 4
    worker.count_leg(-1)
    worker.note_load(b"1,9,9,9,9,9,9")
    assert worker.in_flight == 1


@pytest.mark.parametrize(
    "garbage",
    [b"", b",", b",1,2", b"-1,1", b"x,1", b"1.5,0", b"9" * 8 + b",0", "٣,1".encode(), b"\x00,1", b" 4,1"],
)
def test_a_header_that_is_none_changes_nothing(garbage: bytes) -> None:
    worker = registry_of().workers[0]
    worker.note_others(7)
    worker.note_load(garbage)
    assert worker.others == 7


def test_only_our_own_count_where_the_config_says_so() -> None:
    registry = registry_of(load="own")
    worker = registry.workers[0]
    told(registry, worker, report(3))
    worker.note_load(b"3,1")
    assert worker.in_flight == 0
    registry.reconfigure(HealthConfig(), RoutingConfig(load="reported"))
    told(registry, worker, report(3))
    assert worker.in_flight == 3
    registry.reconfigure(HealthConfig(), RoutingConfig(load="own"))
    assert worker.in_flight == 0


def test_a_worker_that_leaves_is_dropped_although_others_use_it() -> None:
    registry = registry_of()
    worker = registry.workers[0]
    told(registry, worker, report(3))
    registry.remove(worker)
    registry.settle()
    assert worker not in registry.workers


# --- a worker that drains itself --------------------------------------------------------------------


def test_one_that_drains_itself_gets_no_legs_until_it_says_that_it_serves() -> None:
    registry = registry_of()
    worker, other = registry.workers
    told(registry, worker, DRAINING)
    told(registry, worker, DRAINING)
    assert worker.state is WorkerState.DRAINING
    assert registry.pools["m"].decode == (other,)
    status = worker.status()
    assert (status.is_drained, status.drains_itself) == (False, True)
    assert status.reason == "drains itself: it wants no new requests"
    told(registry, worker, report())
    assert worker.state is WorkerState.READY
    assert worker.status().reason is None


def test_the_last_of_its_pool_is_not_used_either() -> None:
    registry = registry_of(1)
    told(registry, registry.workers[0], DRAINING)
    assert registry.pools["m"].decode == ()


def test_a_worker_that_comes_while_it_drains_is_not_used() -> None:
    registry = Registry([address("decode", 0)], ["m"], "json", time=Clock())
    worker = registry.workers[0]
    told(registry, worker, DRAINING)
    assert worker.state is WorkerState.DRAINING
    told(registry, worker, None)  # another start of it, without our plugin
    assert worker.state is WorkerState.READY


def test_what_the_operator_wants_and_what_it_says_itself_are_two_things() -> None:
    registry = registry_of()
    worker = registry.workers[0]
    registry.drain(worker)
    told(registry, worker, DRAINING)
    registry.undrain(worker)
    assert worker.state is WorkerState.DRAINING
    told(registry, worker, report())
    assert worker.state is WorkerState.READY
    told(registry, worker, DRAINING)
    registry.drain(worker)
    told(registry, worker, report())
    assert worker.state is WorkerState.DRAINING
    registry.undrain(worker)
    registry.judge.mark_ready(worker)
    assert worker.state is WorkerState.READY


def test_it_is_asked_for_again_after_a_restart() -> None:
    registry = registry_of()
    worker = registry.workers[0]
    told(registry, worker, DRAINING)
    registry.judge.mark_gone(worker, "refused")
    assert worker.state is WorkerState.GONE
    told(registry, worker, report())
    assert worker.state is WorkerState.READY


def test_processes_that_follow_know_of_it() -> None:
    registry, follower = registry_of(), registry_of()
    worker = registry.workers[0]
    told(registry, worker, DRAINING)
    follower.follow(registry.snapshots())
    assert follower.workers[0].state is WorkerState.DRAINING
    assert follower.workers[0].status().drains_itself
    told(registry, worker, report())
    follower.follow(registry.snapshots())
    assert follower.workers[0].state is WorkerState.READY
