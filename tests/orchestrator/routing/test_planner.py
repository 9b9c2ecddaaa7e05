from __future__ import annotations

from random import Random
from typing import Any

import pytest

from orchestrator.config.options import RoutingConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.plan import Plan
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies.base import Choice, End, Outcome, Policy, Request
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest

ASKED = FakeRequest()


def planner_of(**routing: Any) -> Planner:
    return Planner("m", RoutingConfig(**routing), random=Random(1), time=Clock())


def plan(counts: Any, *, disaggregate: Any = "always", whole_reason: str | None = None) -> Plan:
    return planner_of(disaggregate=disaggregate).plan(ASKED, registry_of(counts).pools["m"], whole_reason)


def chosen(made: Plan) -> tuple[str | None, str]:
    return made.prefill and made.prefill.address.role, made.decode.address.role


ALL = {"prefill": 1, "decode": 1, "both": 1}
PAIR = {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(
    ("counts", "options", "roles"),
    [
        (PAIR, {}, ("prefill", "decode")),
        (ALL, {}, ("prefill", "decode")),
        ({"both": 1}, {}, (None, "both")),
        ({"both": 1, "decode": 1}, {}, (None, "both")),
        (PAIR, {"whole_reason": "echo"}, (None, "decode")),
        (ALL, {"whole_reason": "echo"}, (None, "both")),
        (PAIR, {"disaggregate": "never"}, (None, "decode")),
        ({"decode": 1}, {"disaggregate": "never"}, (None, "decode")),
        ({"decode": 1}, {"whole_reason": "echo"}, (None, "decode")),
        ({"decode": 1}, {}, (None, "decode")),
        ({"decode": 1}, {"disaggregate": "strict", "whole_reason": "echo"}, (None, "decode")),
        (PAIR, {"disaggregate": "strict"}, ("prefill", "decode")),
    ],
)
def test_who_serves(counts: Any, options: Any, roles: tuple[str | None, str]) -> None:
    assert chosen(plan(counts, **options)) == roles


@pytest.mark.parametrize(
    ("counts", "avoided", "disaggregate", "roles"),
    [
        (ALL, [], "always", ("prefill", "decode")),
        (ALL, ["decode"], "always", (None, "both")),
        (ALL, ["prefill"], "always", (None, "both")),
        (ALL, ["both"], "always", ("prefill", "decode")),
        (ALL, ["prefill", "decode", "both"], "always", ("prefill", "decode")),
        (PAIR, ["prefill"], "always", (None, "decode")),
        (PAIR, ["prefill"], "strict", ("prefill", "decode")),
        (PAIR, ["decode"], "always", ("prefill", "decode")),
        ({"prefill": 2, "decode": 2, "both": 1}, ["prefill", "decode"], "always", ("prefill", "decode")),
    ],
)
def test_who_serves_what_has_failed(
    counts: Any, avoided: list[str], disaggregate: Any, roles: tuple[str | None, str]
) -> None:
    """One worker that has not failed the request is better than a pair of which one has."""
    pools = registry_of(counts).pools["m"]
    avoid = [getattr(pools, role)[0] for role in avoided]
    made = planner_of(disaggregate=disaggregate).plan(ASKED, pools, None, avoid)
    assert chosen(made) == roles


@pytest.mark.parametrize(
    ("counts", "options", "says"),
    [
        ({}, {}, "no prefill and no decode worker is ready"),
        ({"prefill": 1}, {}, "no decode worker is ready"),
        ({"decode": 1}, {"disaggregate": "strict"}, "no prefill worker is ready"),
        ({"prefill": 1}, {"whole_reason": "echo"}, "no decode worker is ready"),
        ({"prefill": 1}, {"disaggregate": "never"}, "no decode worker is ready"),
    ],
)
def test_nobody_can_serve(counts: Any, options: Any, says: str) -> None:
    with pytest.raises(Unavailable, match=says) as caught:
        plan(counts, **options)
    assert caught.value.status == 503
    assert caught.value.retry_after_s


def test_why_one_worker_serves_is_told() -> None:
    assert plan(PAIR, whole_reason="beam search").whole_reason == "beam search"
    assert plan(PAIR, disaggregate="never").whole_reason == "disaggregation is off"
    assert plan(PAIR).whole_reason is None
    assert plan({"decode": 1}).whole_reason == "no prefill worker is ready: the decode worker prefills"


def test_why_it_is_these_workers_is_told() -> None:
    made = plan(PAIR)
    assert str(made.decode_choice) == "It has the fewest legs under way."
    assert str(made.prefill_choice) == "It is the next in turn."
    alone = plan(PAIR, whole_reason="beam search")
    assert str(alone.decode_choice) == "It has the fewest legs under way."
    assert alone.prefill_choice is None


def test_who_is_avoided_serves_only_if_there_is_no_other() -> None:
    pools = registry_of({"prefill": 2, "decode": 2}).pools["m"]
    planner = planner_of()
    for index in (0, 1):
        avoided = [pools.prefill[index], pools.decode[index]]
        made = [planner.plan(ASKED, pools, None, avoided) for _ in range(4)]
        assert {(one.prefill, one.decode) for one in made} == {
            (pools.prefill[1 - index], pools.decode[1 - index])
        }
    made = [planner.plan(ASKED, pools, None, (*pools.prefill, *pools.decode)) for _ in range(4)]
    assert {one.decode for one in made} == set(pools.decode)


def test_who_is_avoided_is_avoided_also_for_a_whole_request() -> None:
    pools = registry_of({"both": 2}).pools["m"]
    assert planner_of().plan(ASKED, pools, "echo", [pools.both[0]]).decode is pools.both[1]


def test_a_suspect_serves_only_if_its_pool_has_no_other() -> None:
    registry = registry_of({"prefill": 2, "decode": 1})
    pools, (first, second, decode) = registry.pools["m"], registry.workers
    planner = planner_of()
    registry.judge.note_lost(first, first.epoch, "reset")
    assert {planner.plan(ASKED, pools, None).prefill for _ in range(4)} == {second}
    registry.judge.mark_gone(second, "refused")
    registry.judge.note_lost(decode, decode.epoch, "reset")
    made = planner.plan(ASKED, pools, None)
    assert (made.prefill, made.decode) == (first, decode)


# --- another config -----------------------------------------------------------------------------


def test_a_policy_that_stays_the_same_keeps_its_turn() -> None:
    pools = registry_of({"prefill": 3, "decode": 3}).pools["m"]
    planner = planner_of(decode="round_robin")
    before = planner.plan(ASKED, pools, None)
    planner.reconfigure(RoutingConfig(decode="least_loaded", tokenize_once=False))
    after = planner.plan(ASKED, pools, None)
    assert [made.prefill for made in (before, after)] == [*pools.prefill[:2]]
    assert str(before.decode_choice) == "It is the next in turn."
    assert str(after.decode_choice) == "It has the fewest legs under way."


def test_whether_there_are_two_legs_can_change() -> None:
    pools = registry_of(PAIR).pools["m"]
    planner = planner_of()
    planner.reconfigure(RoutingConfig(disaggregate="never"))
    assert chosen(planner.plan(ASKED, pools, None)) == (None, "decode")
    planner.reconfigure(RoutingConfig(disaggregate="strict"))
    assert chosen(planner.plan(ASKED, pools, None)) == ("prefill", "decode")


# --- the ends of legs ---------------------------------------------------------------------------


class Heard(Policy):
    """Only hears."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, End, float]] = []

    def choose(self, request: Request, candidates: Any) -> Any:
        raise NotImplementedError

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:
        self.ends.append((choice.worker.address.role, outcome.end, outcome.moment))


def heard_plan() -> tuple[Plan, Heard]:
    pools, policy = registry_of(PAIR).pools["m"], Heard()
    return Plan(Choice(pools.prefill[0], "", policy), Choice(pools.decode[0], "", policy)), policy


def test_a_plan_that_is_closed_owes_nothing() -> None:
    made, policy = heard_plan()
    assert made.wants_ends
    made.close(7.0)
    made.close(8.0, End.FAILED)
    assert made.decode_choice.policy is None
    assert policy.ends == [("prefill", End.CANCELLED, 7.0), ("decode", End.CANCELLED, 7.0)]


def test_what_has_ended_already_is_not_told_again() -> None:
    made, policy = heard_plan()
    assert made.prefill is not None
    made.choice_of(made.prefill).ended(Outcome(End.ANSWERED, 1.0))
    assert made.decode_choice.policy is policy
    made.close(2.0, End.ANSWERED)
    assert policy.ends == [("prefill", End.ANSWERED, 1.0), ("decode", End.ANSWERED, 2.0)]


def test_a_plan_whose_policies_do_not_care_wants_no_ends() -> None:
    assert not plan(PAIR).wants_ends
    assert not plan(PAIR, whole_reason="echo").wants_ends


def test_policies_of_two_processes_tell_each_other() -> None:
    told: list[tuple[str, str, bytes]] = []
    routing = RoutingConfig.model_validate({"prefill": "prefix", "decode": "prefix"})
    one = Planner("m", routing, random=Random(1), time=Clock(), share=lambda *note: told.append(note))
    other = Planner("m", routing, random=Random(2), time=Clock())
    pools = registry_of({"prefill": 4, "decode": 4}).pools["m"]
    other.plan(FakeRequest(b"another prompt"), pools, None)
    plan = one.plan(FakeRequest(bytes(range(256)) * 100), pools, None)
    assert [(model, role) for model, role, _ in told] == [("m", "decode"), ("m", "prefill")]
    for _, role, note in told:
        other.hear(role, note)  # type: ignore[arg-type]
    again = other.plan(FakeRequest(bytes(range(256)) * 100), pools, None)
    assert (again.prefill, again.decode) == (plan.prefill, plan.decode)
