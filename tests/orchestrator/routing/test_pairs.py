from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.options import RoutingConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.links import FEW, Links, expected_s
from orchestrator.routing.pairs import SHORT, cheapest_pair, short_list
from orchestrator.routing.planner import NO_PARTNERS, Planner
from orchestrator.routing.policies.base import Appraisal, Choice
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest
from tests.orchestrator.routing.traffic import Traffic

TOGETHER = {"prefill": "prefix", "decode": "least_tokens"}


class Prices(Appraisal):
    """Costs that a test gives."""

    def __init__(self, costs: Sequence[float]) -> None:
        super().__init__(1000.0)
        self.costs = [*costs]
        self.indexes = [*range(len(costs))]

    def take(self, index: int, why: object | None = None) -> Choice[Any]:
        raise NotImplementedError


def pools_of(prefill: int, decode: int, zones: int = 1) -> tuple[tuple[Worker, ...], tuple[Worker, ...]]:
    pools = registry_of({"prefill": prefill, "decode": decode}).pools["m"]
    for pool in (pools.prefill, pools.decode):
        for index, worker in enumerate(pool):
            worker.zone = str(index % zones)
    return pools.prefill, pools.decode


def measured(
    prefill: Sequence[Worker], decode: Sequence[Worker], rates: dict[tuple[str, str], float]
) -> Links:
    known = Links()
    for _ in range(10):
        for one in prefill:
            for other in decode:
                rate = rates[str(one.zone), str(other.zone)]
                known.note(one, other, 1000.0, rate * expected_s(1000.0), 0.0)
    return known


# --- the search ---------------------------------------------------------------------------------

COSTS = st.lists(st.floats(0, 100), min_size=1, max_size=12)


@given(COSTS, COSTS, st.lists(st.floats(0.1, 50), min_size=9, max_size=9))
def test_of_a_small_pool_no_pair_costs_less(
    prefill_s: list[float], decode_s: list[float], rates: list[float]
) -> None:
    prefill, decode = pools_of(len(prefill_s), len(decode_s), zones=3)
    zones = [(one, other) for one in "012" for other in "012"]
    links = measured(prefill, decode, dict(zip(zones, rates, strict=True)))
    pair = cheapest_pair(Prices(prefill_s), prefill, Prices(decode_s), decode, links, 1000.0, 0.0)
    least = min(
        cost + load + links.seconds(one, other, 1000.0, 0.0)
        for one, cost in zip(prefill, prefill_s, strict=True)
        for other, load in zip(decode, decode_s, strict=True)
    )
    assert pair.cost_s == pytest.approx(least)
    assert (pair.prefill, pair.decode) == (prefill[pair.prefill_index], decode[pair.decode_index])
    assert pair.transfer_s == links.seconds(pair.prefill, pair.decode, 1000.0, 0.0)


@given(COSTS, COSTS)
def test_with_equal_links_it_is_the_cheapest_of_each(prefill_s: list[float], decode_s: list[float]) -> None:
    prefill, decode = pools_of(len(prefill_s), len(decode_s))
    links = measured(prefill, decode, {("0", "0"): 2.0})
    pair = cheapest_pair(Prices(prefill_s), prefill, Prices(decode_s), decode, links, 1000.0, 0.0)
    assert (pair.prefill_s, pair.decode_s) == (min(prefill_s), min(decode_s))


@given(st.lists(st.floats(0, 100), min_size=SHORT + 1, max_size=200), st.integers(1, 40))
def test_the_cheapest_of_each_zone_is_looked_at(costs: list[float], zones: int) -> None:
    workers, _ = pools_of(len(costs), 1, zones)
    listed = short_list(Prices(costs), workers)
    assert len(listed) == len(set(listed)) == SHORT
    assert min(costs) in [costs[entry] for entry in listed]
    if zones <= SHORT:
        for zone in {worker.zone for worker in workers}:
            cheapest = min(cost for cost, worker in zip(costs, workers, strict=True) if worker.zone == zone)
            assert cheapest in [costs[entry] for entry in listed if workers[entry].zone == zone]


# --- at work ------------------------------------------------------------------------------------


def near(prefill: Worker, decode: Worker) -> float:
    return 1.0 if prefill.zone == decode.zone else 20.0


def test_requests_keep_to_the_near_pairs() -> None:
    traffic = Traffic({"prefill": 4, "decode": 4}, zones=2, link=near, **TOGETHER)
    for _ in range(150):
        traffic.ask(20_000)
        traffic.wait(0.3)
    pairs = [plan for plan in traffic.plans[30:] if plan.prefill is not None]
    far = sum(plan.prefill.zone != plan.decode.zone for plan in pairs if plan.prefill is not None)
    assert far <= 2
    assert {plan.prefill for plan in pairs} == {*traffic.pools.prefill}
    assert {plan.decode for plan in pairs} == {*traffic.pools.decode}
    assert str(pairs[-1].prefill_choice) == str(pairs[-1].decode_choice)
    assert "for the transfer" in str(pairs[-1].decode_choice)


def test_of_requests_that_come_at_once_a_few_try_a_link_that_was_never_measured() -> None:
    traffic = Traffic({"prefill": 4, "decode": 4}, zones=2, link=near, **TOGETHER)
    for one, other in ((0, 0), (1, 1)):
        prefill, decode = traffic.pools.prefill[one], traffic.pools.decode[other]
        traffic.planner.links.note(prefill, decode, 1000.0, expected_s(1000.0), 0.0)
    plans = [traffic.ask(20_000) for _ in range(40)]
    far = [(p.prefill.zone, p.decode.zone) for p in plans if p.prefill and p.prefill.zone != p.decode.zone]
    assert Counter(far) == {("zone 0", "zone 1"): FEW, ("zone 1", "zone 0"): FEW}


def test_choosing_apart_they_would_not() -> None:
    traffic = Traffic({"prefill": 4, "decode": 4}, zones=2, link=near, prefill="random")
    for _ in range(150):
        traffic.ask(20_000)
        traffic.wait(0.3)
    assert (
        sum(plan.prefill.zone != plan.decode.zone for plan in traffic.plans if plan.prefill is not None) > 10
    )


def test_a_far_pair_is_better_than_a_long_queue() -> None:
    traffic = Traffic({"prefill": 2, "decode": 2}, zones=2, link=near, **TOGETHER)
    for _ in range(60):
        traffic.ask(20_000)
        traffic.wait(1.0)
    here, there = traffic.pools.prefill
    for _ in range(20):  # one zone's decode workers are full, the other one's prefill workers are
        traffic.pools.decode[1].count_leg(1)
    traffic.wait(10.0)
    assert traffic.ask(20_000).decode is traffic.pools.decode[0]
    traffic.wait(10.0)
    for _ in range(400):
        traffic.pools.decode[1].count_leg(1)
        here.count_leg(1)
    plan = traffic.ask(20_000)
    assert (plan.prefill, plan.decode) == (there, traffic.pools.decode[0])


@pytest.mark.parametrize(("prefill", "decode"), [("round_robin", "least_tokens"), ("prefix", "session")])
def test_policies_that_reckon_in_something_else_choose_apart(prefill: str, decode: str) -> None:
    traffic = Traffic({"prefill": 4, "decode": 4}, zones=2, link=near, prefill=prefill, decode=decode)
    for _ in range(20):
        traffic.ask(20_000)
        traffic.wait(1.0)
    assert traffic.planner.links.are_equal
    assert all(type(plan).__name__ == "Plan" for plan in traffic.plans)


# --- the same revision --------------------------------------------------------------------------


def planner_of(**routing: Any) -> Planner:
    return Planner("m", RoutingConfig(**routing), random=Random(1), time=Clock())


POLICIES = st.sampled_from(["round_robin", "random", "least_loaded", "prefix", "session", "power_of_two"])
REVISIONS = st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=1, max_size=6)


@given(REVISIONS, REVISIONS, POLICIES, st.sampled_from(["least_tokens", "least_loaded", "round_robin"]))
def test_a_pair_has_one_revision(prefills: Any, decodes: Any, prefill: str, decode: str) -> None:
    pools = registry_of({"prefill": len(prefills), "decode": len(decodes)}).pools["m"]
    for worker, revision in zip((*pools.prefill, *pools.decode), (*prefills, *decodes), strict=True):
        worker.revision = revision
    planner = planner_of(prefill=prefill, decode=decode, pair="same_revision")
    common = {*prefills} & {*decodes}
    for index in range(8):
        plan = planner.plan(FakeRequest(bytes([index]) * 1000), pools, None)
        if common:
            assert plan.prefill is not None
            assert plan.prefill.revision == plan.decode.revision
            assert plan.decode.revision in common
        else:
            assert (plan.prefill, plan.whole_reason) == (None, NO_PARTNERS)


def test_links_and_revisions_together() -> None:
    traffic = Traffic({"prefill": 4, "decode": 4}, zones=2, link=near, pair="same_revision", **TOGETHER)
    for pool in (traffic.pools.prefill, traffic.pools.decode):
        for index, worker in enumerate(pool):
            worker.revision = str(index // 2)
    for _ in range(100):
        traffic.ask(20_000)
        traffic.wait(0.3)
    pairs = [(plan.prefill, plan.decode) for plan in traffic.plans[30:]]
    assert all(prefill is not None and prefill.revision == decode.revision for prefill, decode in pairs)
    assert sum(prefill is not None and prefill.zone != decode.zone for prefill, decode in pairs) <= 2
    assert {decode for _, decode in pairs} == {*traffic.pools.decode}


def test_without_partners_strict_refuses() -> None:
    pools = registry_of({"prefill": 1, "decode": 1}).pools["m"]
    pools.prefill[0].revision = "1"
    with pytest.raises(Unavailable, match=NO_PARTNERS):
        planner_of(disaggregate="strict", pair="same_revision").plan(FakeRequest(), pools, None)


def test_without_partners_one_worker_that_serves_both_is_better() -> None:
    pools = registry_of({"prefill": 1, "decode": 1, "both": 1}).pools["m"]
    pools.prefill[0].revision = "1"
    plan = planner_of(disaggregate="strict", pair="same_revision").plan(FakeRequest(), pools, None)
    assert plan.decode is pools.both[0]


@given(REVISIONS, REVISIONS)
def test_by_default_no_two_go_together_that_are_known_to_differ(prefills: Any, decodes: Any) -> None:
    pools = registry_of({"prefill": len(prefills), "decode": len(decodes)}).pools["m"]
    for worker, revision in zip((*pools.prefill, *pools.decode), (*prefills, *decodes), strict=True):
        worker.revision = revision
    planner = planner_of()
    can = None in prefills or None in decodes or bool({*prefills} & {*decodes})
    for index in range(6):
        plan = planner.plan(FakeRequest(bytes([index]) * 1000), pools, None)
        assert (plan.prefill is not None) is can
        if plan.prefill is not None:
            assert plan.prefill.revision == plan.decode.revision or None in (
                plan.prefill.revision,
                plan.decode.revision,
            )


def test_pairs_are_of_one_revision_by_default_while_a_new_one_comes() -> None:
    registry = registry_of({"prefill": 3, "decode": 3})
    pools = registry.pools["m"]
    planner = planner_of()
    for worker in registry.workers:
        worker.revision = "old"
    for rolled in range(4):  # workers of both roles, one after the other
        for pool in (pools.prefill, pools.decode):
            for index, worker in enumerate(pool):
                worker.revision = "new" if index < rolled else "old"
            pools.update(registry.workers)
            plans = [planner.plan(FakeRequest(bytes([number]) * 1000), pools, None) for number in range(24)]
            assert all(plan.prefill and plan.prefill.revision == plan.decode.revision for plan in plans)


def test_a_pair_that_has_failed_is_avoided_within_its_revision() -> None:
    pools = registry_of({"prefill": 2, "decode": 2}).pools["m"]
    for pool in (pools.prefill, pools.decode):
        pool[1].revision = "1"
    planner = planner_of(pair="same_revision")
    plan = planner.plan(FakeRequest(), pools, None, [pools.prefill[0]])
    assert (plan.prefill, plan.decode) == (pools.prefill[1], pools.decode[1])
