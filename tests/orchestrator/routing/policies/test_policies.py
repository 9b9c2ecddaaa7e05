from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from orchestrator.compiled import MODULES
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome, Policy
from tests.orchestrator.cluster import Clock
from tests.orchestrator.routing.requests import FakeRequest


@dataclass(frozen=True)
class Seen:
    name: str
    in_flight: int = 0
    epoch: int = 1


ASKED = FakeRequest()


def made(name: str, **arguments: Any) -> Policy:
    return POLICIES[name].make(Context("m", "prefill", Random(1), Clock()), **arguments)


def chosen(policy: Policy, workers: Sequence[Seen], count: int) -> list[str]:
    return [policy.choose(ASKED, workers).worker.name for _ in range(count)]


def test_round_robin_takes_workers_in_turn() -> None:
    workers = [Seen("a"), Seen("b"), Seen("c")]
    assert chosen(made("round_robin"), workers, 6) == list("abcabc")


def test_round_robin_goes_on_when_the_pool_shrinks() -> None:
    policy, workers = made("round_robin"), [Seen("a"), Seen("b"), Seen("c")]
    chosen(policy, workers, 3)
    assert set(chosen(policy, workers[:1], 3)) == {"a"}


def test_least_loaded_takes_the_quietest() -> None:
    workers = [Seen("a", 3), Seen("b", 1), Seen("c", 2)]
    assert chosen(made("least_loaded"), workers, 3) == ["b", "b", "b"]


def test_least_loaded_spreads_over_equals() -> None:
    workers = [Seen("a", 1), Seen("b", 1), Seen("c", 5)]
    assert set(chosen(made("least_loaded"), workers, 6)) == {"a", "b"}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_copes_with_one_worker(name: str) -> None:
    choice = made(name).choose(ASKED, [Seen("only", 9)])
    assert choice.worker.name == "only"
    choice.ended(Outcome(End.ANSWERED, 0.0))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_why_in_a_sentence(name: str) -> None:
    reason = str(made(name).choose(ASKED, [Seen("only")]))
    assert reason[0].isupper()
    assert reason.endswith(".")


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_takes_the_arguments_that_it_declares(name: str) -> None:
    spec = POLICIES[name]
    assert spec.name == name
    assert made(name, **{argument.name: argument.default for argument in spec.arguments})


def test_every_policy_has_a_compiled_form() -> None:
    assert {f"orchestrator.routing.policies.{name}" for name in ("base", *POLICIES)} <= set(MODULES)


class Listening(Policy):
    """Chooses the first one, and notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, End]] = []

    def choose(self, request: Any, candidates: Any) -> Any:
        return Choice(candidates[0], "It is the first.", self)

    def ended(self, choice: Any, outcome: Outcome) -> None:
        self.heard.append((choice.worker.name, outcome.end))


def test_the_end_of_a_leg_is_told_once() -> None:
    policy = Listening()
    choice = policy.choose(ASKED, [Seen("a")])
    assert choice.policy is policy
    choice.ended(Outcome(End.FAILED, 1.0))
    choice.ended(Outcome(End.ANSWERED, 2.0))
    assert policy.heard == [("a", End.FAILED)]
    assert choice.policy is None


def test_nobody_waits_for_the_end_of_a_leg_whose_policy_does_not_care() -> None:
    choice = made("round_robin").choose(ASKED, [Seen("a")])
    assert choice.policy is None
    choice.ended(Outcome(End.ANSWERED, 1.0))
