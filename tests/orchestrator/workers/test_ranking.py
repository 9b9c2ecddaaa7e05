"""Who is least loaded in a large pool is who a look at each of its workers finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from orchestrator.processes.rows import Rows
from orchestrator.routing.policies.base import RANKED
from orchestrator.telemetry.counters import Layout
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.ranking import MOST_PARTS, LoadRanking
from orchestrator.workers.registry import Registry
from orchestrator.workers.worker import OwnWorker, Worker
from tests.orchestrator.cluster import Clock, address, registry_of

LARGE = RANKED + 40


def ranking_of(worker: Worker) -> LoadRanking | None:
    assert isinstance(worker, OwnWorker)
    return worker.ranking


def looked_at(workers: Sequence[Worker], first: int) -> Worker:
    """Return the least loaded: of equals the next one in turn."""
    return min([*workers[first:], *workers[:first]], key=lambda worker: worker.in_flight)


def change(worker: Worker, random: Random) -> None:
    """Have one leg more there, or one less, or others say how many they have."""
    if random.random() < 0.2:
        worker.note_others(random.randint(0, 3))
    else:
        worker.count_leg(1 if random.random() < 0.6 or not worker.legs else -1)


@pytest.mark.parametrize("seed", range(5))
def test_the_least_loaded_is_found_whatever_changes(seed: int) -> None:
    random, workers = Random(seed), registry_of({"decode": LARGE}).pools["m"].decode
    ranking = ranking_of(workers[0])
    assert ranking is not None
    for _ in range(2000):
        change(random.choice(workers), random)
        first = random.randrange(LARGE)
        assert ranking.least(workers, first) is looked_at(workers, first)
        assert ranking.legs(workers) == sum(worker.in_flight for worker in workers)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_is_so_of_a_part(seed: int) -> None:
    random, workers = Random(seed), registry_of({"decode": LARGE}).pools["m"].decode
    ranking = ranking_of(workers[0])
    assert ranking is not None
    for _ in range(3 * MOST_PARTS):
        out = {random.choice(workers) for _ in range(random.randint(1, 60))}
        part = tuple(worker for worker in workers if worker not in out)
        ranking.know(part)
        for _ in range(20):
            change(random.choice(workers), random)
            first = random.randrange(len(part))
            assert ranking.least(part, first) is looked_at(part, first)
            assert ranking.legs(part) == sum(worker.in_flight for worker in part)


def test_others_than_those_it_knows_are_not_answered_for() -> None:
    workers = registry_of({"decode": LARGE}).pools["m"].decode
    ranking = LoadRanking(workers)
    parts = [workers[count:] for count in range(1, MOST_PARTS + 2)]
    for part in parts:
        ranking.know(part)
    assert ranking.least(workers[:3], 0) is None
    assert ranking.legs(workers[:3]) == -1
    assert [ranking.least(part, 0) is None for part in parts] == [True] + [False] * MOST_PARTS


def test_small_pools_are_not_ranked() -> None:
    assert {ranking_of(worker) for worker in registry_of({"decode": RANKED}).workers} == {None}


def test_a_worker_that_is_not_in_use_is_in_no_ranking() -> None:
    registry = registry_of({"decode": LARGE})
    gone, *others = registry.workers
    before = ranking_of(gone)
    registry.judge.mark_gone(gone, "refused")
    after = ranking_of(others[0])
    assert before is not after
    assert ranking_of(gone) is None
    assert after is not None
    gone.count_leg(5)
    assert after.least(registry.pools["m"].decode, 0) is others[0]


def test_an_orchestrator_with_several_processes_ranks_nobody() -> None:
    rows = Rows.create(Layout(["m"], []), LARGE, 2)
    rows.close()
    addresses = [address("decode", index) for index in range(LARGE)]
    registry = Registry(addresses, ["m"], "json", rows.loads(1))
    for worker in registry.workers:
        registry.judge.mark_ready(worker)
    assert {getattr(worker, "ranking", None) for worker in registry.pools["m"].decode} == {None}


def test_the_pools_of_one_request_leave_the_ranking_as_it_is() -> None:
    registry = registry_of({"decode": LARGE})
    pools = registry.pools["m"]
    ranking = ranking_of(pools.decode[0])
    registry.part(pools, registry.workers[: RANKED + 2])
    assert ranking_of(pools.decode[0]) is ranking
    places = [worker.place for worker in pools.decode if isinstance(worker, OwnWorker)]
    assert places == [*range(LARGE)]


# --- who may take the next request ----------------------------------------------------------------


def reference(pools: Pools, role: Role, now: float, slow_start_s: float) -> tuple[Worker, ...]:
    """Say who the candidates are, with a look at each worker; turns are taken by this."""
    workers: tuple[Worker, ...] = getattr(pools, role)
    others = [worker for worker in workers if not pools.rests_s(worker)] or list(workers)
    has_warm = any(now - worker.warm_from >= slow_start_s for worker in others)
    found = [worker for worker in others if not has_warm or _has_turn(worker, now, slow_start_s)]
    if not any(pools.has_room(worker) for worker in found):
        found = [worker for worker in others if pools.has_room(worker)] or found
    found += [w for w in pools.others if w.address.role == role and w.state == "probing" and not w.legs]
    return tuple(found)


def _has_turn(worker: Worker, now: float, slow_start_s: float) -> bool:
    share = min(1.0, max((now - worker.warm_from) / slow_start_s, 0.125))
    if share == 1.0:
        return True
    worker.credit += share
    worker.credit -= worker.credit >= 1.0
    return worker.credit < share


class Story:
    """Workers come and go, rest, are on trial, and get and lose legs, as chance has it."""

    def __init__(self, count: int, seed: int) -> None:
        self.clock = Clock()
        self.random = Random(seed)
        self.registry = registry_of({"prefill": count, "decode": count}, clock=self.clock, slow_start_s=10)
        self.pools = self.registry.pools["m"]
        self.pools.allot({"decode": 3})
        judge, pools = self.registry.judge, self.pools
        self.events: Sequence[Callable[[Worker], object]] = (
            lambda worker: judge.mark_gone(worker, "refused"),
            lambda worker: judge.note_lost(worker, worker.epoch, "reset"),
            lambda worker: judge.note_failed(worker, "500"),
            lambda worker: pools.rest(worker, self.random.random() * 5),
            lambda worker: change(worker, self.random),
            lambda worker: judge.mark_ready(worker),
        )

    def go_on(self) -> None:
        self.clock.now += self.random.expovariate(1.0)
        for _ in range(self.random.randint(0, 3)):
            self.random.choice(self.events)(self.random.choice(self.registry.workers))

    def is_the_same(self, role: Role) -> bool:
        """Tell whether the pools say what a look at each worker does, and leave the same turns."""
        credits = [worker.credit for worker in self.registry.workers]
        expected = reference(self.pools, role, self.clock.now, 10)
        turns = [worker.credit for worker in self.registry.workers]
        for worker, credit in zip(self.registry.workers, credits, strict=True):
            worker.credit = credit
        found = self.pools.candidates(role)
        return found == expected and turns == [worker.credit for worker in self.registry.workers]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 5, LARGE])
def test_candidates_are_those_that_a_look_at_each_worker_finds(count: int, seed: int) -> None:
    story = Story(count, seed)
    for _ in range(400):
        story.go_on()
        assert story.is_the_same("prefill")
        assert story.is_the_same("decode")


def test_the_same_candidates_are_the_same_tuple_while_some_rest_and_some_start() -> None:
    registry = registry_of({"decode": LARGE}, slow_start_s=10)
    pools = registry.pools["m"]
    registry.judge.mark_gone(registry.workers[3], "refused")
    registry.judge.mark_ready(registry.workers[3])
    pools.rest(registry.workers[5], 60)
    found = [pools.candidates("decode") for _ in range(32)]
    assert len({id(candidates) for candidates in found}) == 2
    ranking = ranking_of(registry.workers[0])
    assert ranking is not None
    assert all(ranking.least(candidates, 1) is candidates[1] for candidates in found)
