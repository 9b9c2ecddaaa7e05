from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import End, Outcome
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest
from tests.orchestrator.routing.traffic import Traffic

ALL = [*POLICIES]
PREFILL = pytest.mark.parametrize("prefill", ALL)


@PREFILL
def test_one_worker_serves_while_prefill_is_backed_up(prefill: str) -> None:
    traffic = Traffic({"prefill": 1, "decode": 4}, prefill=prefill, disaggregate="auto")
    plans = [traffic.ask(40_000) for _ in range(12)]
    assert plans[-1].prefill is None
    assert plans[-1].whole_reason is not None
    assert plans[-1].whole_reason.startswith("one worker costs less: ")
    alone = [plan.decode for plan in plans if plan.prefill is None]
    assert {*alone} == {*traffic.pools.decode}
    assert len(alone) < 12


@PREFILL
def test_two_workers_serve_while_decode_is_loaded(prefill: str) -> None:
    traffic = Traffic({"prefill": 4, "decode": 2}, decode_s=1e4, prefill=prefill, disaggregate="auto")
    for _ in range(100):  # they decode for long
        traffic.ask(2000)
        traffic.wait(1.0)
    plan = traffic.ask(40_000)
    assert plan.prefill is not None
    assert "Of one worker or two, two workers cost no more: " in str(plan.prefill_choice)


def test_what_waits_for_its_prefill_delays_nobody_who_decodes() -> None:
    """A decode worker has a seat for each of them, and nothing to do."""
    traffic = Traffic({"prefill": 1, "decode": 1}, prefill="prefix", disaggregate="auto")
    first = traffic.ask(400_000)
    while (plan := traffic.ask(400_000)).prefill is not None:
        assert len(traffic.plans) < 10
    assert first.prefill is not None
    assert "beside 0.0 that decode" in str(plan.whole_reason)


def test_a_prompt_that_a_decode_worker_has_is_prefilled_there() -> None:
    traffic = Traffic({"prefill": 1, "decode": 2}, prefill="prefix", disaggregate="auto")
    prompt = Random(3).randbytes(40_000)
    here = traffic.ask(0, prompt=prompt).decode
    traffic.wait(60.0)
    for worker in traffic.pools.prefill:
        traffic.planner.prefill.choose(FakeRequest(Random(4).randbytes(400_000)), traffic.pools.prefill)
        worker.count_leg(1)
    plan = traffic.ask(0, prompt=prompt + Random(5).randbytes(400))
    assert (plan.prefill, plan.decode) == (None, here)


def test_how_fast_workers_prefill_alone_is_learned() -> None:
    traffic = Traffic({"decode": 1}, disaggregate="auto")
    for _ in range(20):
        traffic.ask(40_000)
        traffic.wait(10.0)
    auto = traffic.planner.auto
    assert auto is not None
    (site,) = auto._sites.values()
    assert site.seen == 20
    assert site.rate == pytest.approx(1.0, rel=0.05)
    assert site.legs == 0


def test_whole_answers_teach_nothing_and_block_nothing() -> None:
    clock = Clock()
    pools = registry_of({"decode": 1}).pools["m"]
    planner = Planner("m", RoutingConfig(disaggregate="auto"), random=Random(1), time=clock)
    plan = planner.plan(FakeRequest(bytes(40_000)), pools, None)
    assert planner.auto is not None
    (site,) = planner.auto._sites.values()
    assert site.left_s(clock.now) > 0.5
    clock.now += 10.0
    assert site.left_s(clock.now) == 0.0
    assert site.active(1, clock.now) == 1.0
    plan.close(clock.now, End.ANSWERED)
    assert (site.legs, site.seen) == (0, 0)


@pytest.mark.parametrize("disaggregate", ["always", "strict", "never"])
def test_it_is_asked_for(disaggregate: str) -> None:
    assert Traffic({"prefill": 1, "decode": 1}, disaggregate=disaggregate).planner.auto is None


def test_what_was_learned_stays_when_something_else_changes() -> None:
    traffic = Traffic({"prefill": 1, "decode": 1}, prefill="prefix", disaggregate="auto")
    auto = traffic.planner.auto
    traffic.planner.reconfigure(RoutingConfig(prefill="prefix", disaggregate="auto", tokenize_once=False))
    assert traffic.planner.auto is auto
    traffic.planner.reconfigure(RoutingConfig(prefill="round_robin", disaggregate="auto"))
    assert traffic.planner.auto not in (auto, None)
    traffic.planner.reconfigure(RoutingConfig())
    assert traffic.planner.auto is None


@settings(max_examples=60)
@given(st.sampled_from(ALL), st.sampled_from(ALL), st.integers(0, 2**32), st.integers(0, 2))
def test_at_the_end_nothing_is_under_way(prefill: str, decode: str, seed: int, both: int) -> None:
    """Whatever becomes of the legs, in whatever order."""
    clock, random = Clock(), Random(seed)
    pools = registry_of({"prefill": 2, "decode": 2, "both": both}).pools["m"]
    routing = RoutingConfig(prefill=prefill, decode=decode, disaggregate="auto")
    planner = Planner("m", routing, random=random, time=clock)
    open_plans: list[Any] = []
    for _ in range(60):
        clock.now += random.random()
        if random.random() < 0.6:
            whole_reason = "echo" if random.random() < 0.2 else None
            asked = FakeRequest(random.randbytes(random.choice((10, 4000, 100_000))))
            open_plans.append(planner.plan(asked, pools, whole_reason))
        elif open_plans:
            plan = random.choice(open_plans)
            if random.random() < 0.5:
                plan.begun(clock.now - 0.1, clock.now)
            elif plan.prefill_choice is not None and plan.prefill_choice.policy is not None:
                plan.prefill_choice.ended(Outcome(random.choice([*End]), clock.now))
            else:
                open_plans.remove(plan)
                plan.close(clock.now, random.choice([*End]))
    for plan in open_plans:
        plan.close(clock.now)
        plan.close(clock.now)
    assert planner.auto is not None
    assert all((site.legs, site.pending) == (0, 0) for site in planner.auto._sites.values())
    assert not any(load.legs for load in planner.auto._view._loads.values())


def test_a_request_with_few_workers_makes_no_other_worker_unknown() -> None:
    traffic = Traffic({"prefill": 2, "decode": 150}, disaggregate="auto")
    for _ in range(6):
        traffic.ask(4000)
    auto = traffic.planner.auto
    assert auto is not None
    known = len(auto._sites)
    assert known > 100
    avoided = traffic.pools.decode[1:]
    plan = traffic.planner.plan(FakeRequest(bytes(4000)), traffic.pools, "it wants so", avoided)
    assert plan.decode is traffic.pools.decode[0]
    assert len(auto._sites) >= known
