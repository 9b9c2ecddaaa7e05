from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.dry_run import UNTOLD, explain
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Argument, C, Choice, Context, Policy, PolicySpec, Request
from orchestrator.workers.registry import Registry
from orchestrator.workers.states import WorkerState
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest
from tests.orchestrator.routing.traffic import Traffic

NAMES = st.sampled_from([*POLICIES])
ROUTINGS = st.fixed_dictionaries(
    {
        "prefill": NAMES,
        "decode": NAMES,
        "disaggregate": st.sampled_from(["always", "auto", "strict", "never"]),
        "pair": st.sampled_from(["any", "same_revision"]),
    }
)
# Of a request: its prompt, by number; whether it needs one worker; and what happens before it.
STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from(["", "", "drain", "suspect", "rest", "end"])),
    min_size=1,
    max_size=15,
)


USABLE = {WorkerState.READY, WorkerState.SUSPECT, WorkerState.PROBING}


class Site:
    """A planner with workers that change, and requests that end."""

    def __init__(self, routing: dict[str, Any], seed: int) -> None:
        self.clock = Clock()
        self.registry: Registry = registry_of(
            {"prefill": 3, "decode": 3, "both": 1}, clock=self.clock, slow_start_s=30
        )
        self.pools = self.registry.pools["m"]
        for index, worker in enumerate(self.registry.workers):
            worker.revision = str(index % 2)
            worker.zone = "ab"[index // 2 % 2]
        self.planner = Planner("m", RoutingConfig(**routing), random=Random(seed), time=self.clock)
        self.random = Random(seed)
        self.plans: list[Any] = []

    def live(self, what: str) -> None:
        """Have something happen; what, the seed decides together with what happened before."""
        self.clock.now += self.random.random() * 3
        worker = self.random.choice(self.registry.workers)
        if what == "drain":
            (self.registry.undrain if worker.is_drained else self.registry.drain)(worker)
        elif what == "suspect":
            self.registry.judge.note_lost(worker, worker.epoch, "reset")
        elif what == "rest":
            self.pools.rest(worker, 2.0)
        elif self.plans and what == "end":
            plan = self.plans.pop(self.random.randrange(len(self.plans)))
            if plan.prefill is not None:
                plan.begun(self.clock.now - self.random.random(), self.clock.now)
            plan.close(self.clock.now)


def asked(number: int) -> FakeRequest:
    return FakeRequest(Random(number).randbytes(400 + 6000 * number), {b"x-session-id": b"%d" % number})


def lived(
    routing: dict[str, Any], seed: int, steps: Any, before: Callable[[Site, Any, Any], None]
) -> list[Any]:
    site, seen = Site(routing, seed), []
    for number, is_whole, what in steps:
        site.live(what)
        request, whole_reason = asked(number), "echo" if is_whole else None
        before(site, request, whole_reason)
        try:
            plan = site.planner.plan(request, site.pools, whole_reason)
        except Exception as error:
            seen.append(str(error))
            continue
        site.plans.append(plan)
        assert not any(worker is not None and worker.is_drained for worker in (plan.prefill, plan.decode))
        assert plan.decode.state in USABLE
        assert plan.prefill is None or plan.prefill.state in USABLE
        names = [worker and worker.name for worker in (plan.prefill, plan.decode)]
        seen.append((*names, plan.whole_reason, str(plan.prefill_choice), str(plan.decode_choice)))
    return [seen, site.random.random(), site.planner.random.random()]


@settings(max_examples=150, deadline=None)
@given(ROUTINGS, st.integers(0, 2**32), STEPS)
def test_a_dry_run_changes_nothing_and_tells_what_follows(routing: Any, seed: int, steps: Any) -> None:
    told: list[Any] = []

    def ask(site: Site, request: Any, whole_reason: Any) -> None:
        first = explain(site.planner, request, site.pools, whole_reason, ())
        assert explain(site.planner, request, site.pools, whole_reason, ()) == first
        told.append(first)

    with_it, *chance = lived(routing, seed, steps, ask)
    without, *same = lived(routing, seed, steps, lambda site, request, whole_reason: None)
    assert with_it == without
    assert chance == same
    for document, made in zip(told, with_it, strict=True):
        plan = document["plan"]
        if plan is None:
            assert document["refused"] == made
        else:
            assert (plan["prefill"], plan["decode"], plan["whole_reason"]) == made[:3]


# --- what is told -------------------------------------------------------------------------------


def planner_of(**routing: Any) -> Planner:
    return Planner("m", RoutingConfig(**routing), random=Random(1), time=Clock())


@pytest.mark.parametrize("prefill", [*POLICIES])
@pytest.mark.parametrize("decode", [*POLICIES])
def test_all_candidates_are_told_with_their_terms(prefill: str, decode: str) -> None:
    pools = registry_of({"prefill": 3, "decode": 2}).pools["m"]
    told = explain(planner_of(prefill=prefill, decode=decode), FakeRequest(bytes(1000)), pools, None, ())
    assert told["plan"]["path"] == "disaggregated"
    assert told["rejected"] == []
    for role, policy, count in (("prefill", prefill, 3), ("decode", decode, 2)):
        leg = told[role]
        assert (leg["policy"], len(leg["candidates"])) == (policy, count)
        assert [found["worker"] for found in leg["candidates"] if found["chosen"]] == [leg["chosen"]]
        assert leg["reason"].endswith(".")
        assert policy == "random" or all(found["terms"] for found in leg["candidates"])


def test_the_terms_of_a_prompt_that_is_known() -> None:
    pools, planner = registry_of({"prefill": 2, "decode": 1}).pools["m"], planner_of(prefill="prefix")
    plan = planner.plan(asked(3), pools, None)
    told = explain(planner, asked(3), pools, None, ())["prefill"]
    here, there = sorted(told["candidates"], key=lambda found: found["worker"] != plan.prefill.name)  # type: ignore[union-attr]
    assert here["terms"]["cached_tokens"] > 4000
    assert there["terms"]["cached_tokens"] == 0
    assert here["terms"]["wait_s"] > there["terms"]["wait_s"] == 0
    for found in (here, there):
        terms = found["terms"]
        assert terms["cost_s"] == pytest.approx(terms["wait_s"] + terms["own_s"] + terms["evict_s"])
    assert told["chosen"] == min((here, there), key=lambda found: found["terms"]["cost_s"])["worker"]
    assert plan.prefill_choice is not None
    assert plan.prefill_choice.terms()["tokens"] == here["terms"]["tokens"]


def test_a_pair_is_told_with_its_transfer() -> None:
    traffic = Traffic(
        {"prefill": 4, "decode": 4},
        zones=2,
        link=lambda prefill, decode: 1.0 if prefill.zone == decode.zone else 20.0,
        prefill="prefix",
        decode="least_tokens",
    )
    for _ in range(60):
        traffic.ask(20_000)
        traffic.wait(0.3)
    told = explain(traffic.planner, FakeRequest(bytes(20_000)), traffic.pools, None, ())
    assert told["pair"]["terms"]["cost_s"] == pytest.approx(
        sum(told["pair"]["terms"][name] for name in ("prefill_s", "transfer_s", "decode_s"))
    )
    transfers = {found["zone"]: found["terms"]["transfer_s"] for found in told["decode"]["candidates"]}
    assert max(transfers.values()) > 5 * min(transfers.values())


def test_one_worker_or_two_is_told_with_both_costs() -> None:
    traffic = Traffic({"prefill": 1, "decode": 2}, prefill="prefix", disaggregate="auto")
    told = explain(traffic.planner, FakeRequest(bytes(40_000)), traffic.pools, None, ())
    while told["auto"]["workers"] == 2:
        assert told["auto"]["one"]["cost_user_s"] >= told["auto"]["two"]["cost_user_s"]
        traffic.ask(40_000)
        told = explain(traffic.planner, FakeRequest(bytes(40_000)), traffic.pools, None, ())
    assert told["plan"]["path"] == "aggregated"
    assert told["plan"]["whole_reason"] == told["auto"]["reason"]
    assert told["prefill"]["chosen"] is None
    assert [found["terms"]["wait_s"] > 0.0 for found in told["prefill"]["candidates"]] == [True]
    costs = {found["worker"]: found["terms"]["cost_user_s"] for found in told["decode"]["candidates"]}
    assert costs[told["plan"]["decode"]] == min(costs.values()) < told["auto"]["two"]["cost_user_s"]


def test_why_others_are_not_considered() -> None:
    clock = Clock()
    registry = registry_of({"prefill": 6, "decode": 1, "both": 1}, clock=clock)
    one, drained, gone, resting, lost, leaving, _, both = registry.workers
    registry.drain(drained)
    registry.judge.mark_gone(gone, "refused")
    registry.pools["m"].rest(resting, 5.0)
    registry.judge.note_lost(lost, lost.epoch, "reset")
    leaving.count_leg(1)
    registry.remove(leaving)
    told = explain(planner_of(), FakeRequest(), registry.pools["m"], None, ())
    assert {found["worker"]: found["why"] for found in told["rejected"]} == {
        drained.name: "it is drained",
        gone.name: f"it is {gone.state}: refused",
        resting.name: "it has asked not to be sent more for 5.0 s",
        lost.name: "it is suspected to be lost, and others are not",
        leaving.name: "it is being removed",
        both.name: "two workers serve the request",
    }
    assert told["plan"]["prefill"] == one.name
    told = explain(planner_of(), FakeRequest(), registry.pools["m"], "echo", [one])
    assert told["plan"]["decode"] == both.name
    rejected = {found["worker"]: found["why"] for found in told["rejected"]}
    assert rejected[one.name] == "it is to be avoided"
    assert rejected["m/decode/0"] == "one worker serves the request, and it is not of those that could"


def test_who_has_another_revision_is_not_considered() -> None:
    pools = registry_of({"prefill": 2, "decode": 1}).pools["m"]
    pools.prefill[0].revision = "1"
    told = explain(planner_of(pair="same_revision"), FakeRequest(), pools, None, ())
    assert told["rejected"] == [{"worker": "m/prefill/0", "why": "no pair has its revision, 1"}]


def test_nobody_can_serve_it() -> None:
    pools = registry_of({"prefill": 1}).pools["m"]
    told = explain(planner_of(), FakeRequest(), pools, None, ())
    assert told["plan"] is None
    assert told["refused"] == "no decode worker is ready for the model 'm'"


class Silent(Policy):
    """A policy that tells nothing."""

    def __init__(self, context: Context, *, first: bool) -> None:
        self._first = first

    def choose(self, request: Request, candidates: Any) -> Choice[C]:
        return Choice(candidates[0], "It is the first.")


def test_a_policy_need_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PolicySpec("silent", Silent, "It is silent.", [Argument("first", True, "Nothing.")])
    monkeypatch.setitem(POLICIES, "silent", spec)
    pools = registry_of({"prefill": 2, "decode": 1}).pools["m"]
    for disaggregate in ("always", "auto", "never"):
        planner = planner_of(prefill="silent", decode="silent", disaggregate=disaggregate)
        told = explain(planner, FakeRequest(), pools, None, ())
        assert told["decode"]["reason"] == UNTOLD
        assert len(told["decode"]["candidates"]) == 1
        assert planner.plan(FakeRequest(), pools, None).decode is pools.decode[0]
