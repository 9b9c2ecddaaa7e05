from __future__ import annotations

from dataclasses import dataclass

from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.least_loaded import LeastLoaded
from orchestrator.routing.policies.round_robin import RoundRobin


@dataclass(frozen=True)
class Seen:
    name: str
    in_flight: int = 0


def test_round_robin_takes_workers_in_turn() -> None:
    policy, workers = RoundRobin(), [Seen("a"), Seen("b"), Seen("c")]
    assert [policy.choose(workers).name for _ in range(6)] == list("abcabc")


def test_round_robin_goes_on_when_the_pool_shrinks() -> None:
    policy, workers = RoundRobin(), [Seen("a"), Seen("b"), Seen("c")]
    for _ in range(3):
        policy.choose(workers)
    assert {policy.choose(workers[:1]).name for _ in range(3)} == {"a"}


def test_least_loaded_takes_the_quietest() -> None:
    workers = [Seen("a", 3), Seen("b", 1), Seen("c", 2)]
    policy = LeastLoaded()
    assert [policy.choose(workers).name for _ in range(3)] == ["b", "b", "b"]


def test_least_loaded_spreads_over_equals() -> None:
    policy, workers = LeastLoaded(), [Seen("a", 1), Seen("b", 1), Seen("c", 5)]
    assert {policy.choose(workers).name for _ in range(6)} == {"a", "b"}


def test_every_policy_copes_with_one_worker() -> None:
    for make in POLICIES.values():
        assert make().choose([Seen("only", 9)]).name == "only"
