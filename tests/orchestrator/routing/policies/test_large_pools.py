"""What saves a policy the look at each worker of a large pool changes nothing of what it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import RANKED, Choice, Context, End, Outcome, Policy
from orchestrator.routing.policies.least_tokens import LOOKED_AT as LOOKED_AT_FOR_TOKENS
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest

COUNTS = [1, 2, 8, RANKED + 1, 150]
STEPS = 300


class Busy:
    """A policy has decode workers, some of which may rest, and whose legs begin and end."""

    def __init__(self, name: str, count: int, seed: int, role: str = "decode") -> None:
        self.random = Random(seed)
        self.clock = Clock()
        self.pools: Pools = registry_of({"decode": count}, clock=self.clock).pools["m"]
        spec = POLICIES[name]
        arguments = {argument.name: argument.default for argument in spec.arguments}
        self.policy: Policy = spec.make(Context("m", role, Random(seed), self.clock), **arguments)
        self._open: list[Choice[Any]] = []
        self._prompts = [self.random.randbytes(9000) for _ in range(8)]

    def go_on(self) -> Sequence[Worker]:
        """Return who may take the next request."""
        self.clock.now += self.random.expovariate(10)
        if self.random.random() < 0.05:
            self.pools.rest(self.random.choice(self.pools.decode), self.random.random() * 3)
        if self.random.random() < 0.1:
            self.random.choice(self.pools.decode).note_others(self.random.randint(0, 2))
        for _ in range(self.random.choice([0, 0, 1, 1, 2])):
            if self._open:
                self._end(self._open.pop(self.random.randrange(len(self._open))))
        return self.pools.candidates("decode")

    def _end(self, choice: Choice[Any]) -> None:
        choice.worker.count_leg(-1)
        choice.ended(Outcome(End.ANSWERED, self.clock.now))

    def serve(self, choice: Choice[Any]) -> None:
        choice.worker.count_leg(1)
        self._open.append(choice)

    def request(self) -> FakeRequest:
        prompt = self.random.choice(self._prompts)[: self.random.choice([300, 3000, 9000])]
        is_new = self.random.random() < 0.5
        return FakeRequest(self.random.randbytes(4000) if is_new else prompt)


def in_turn(candidates: Sequence[Worker], first: int, loads: Sequence[float]) -> Worker:
    """Return the least loaded, of equals the first one in turn."""
    order = [*range(first, len(candidates)), *range(first)]
    return candidates[min(order, key=lambda index: loads[index])]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["least_loaded", "session"])
def test_the_least_loaded_is_chosen_in_turn(name: str, count: int, seed: int) -> None:
    site = Busy(name, count, seed)
    for turn in range(STEPS):
        candidates = site.go_on()
        loads = [worker.in_flight for worker in candidates]
        choice = site.policy.choose(FakeRequest(), candidates)
        assert choice.worker is in_turn(candidates, turn % len(candidates), loads)
        site.serve(choice)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [count for count in COUNTS if count <= LOOKED_AT_FOR_TOKENS])
def test_the_one_with_the_fewest_tokens_is_chosen_in_turn(count: int, seed: int) -> None:
    site = Busy("least_tokens", count, seed)
    first = -1
    for _ in range(STEPS):
        candidates, request = site.go_on(), site.request()
        told = site.policy.explain(request, candidates)
        assert told is not None
        first = (first + 1) % len(candidates)
        choice = site.policy.choose(request, candidates)
        assert choice.worker is in_turn(candidates, first, [terms["tokens"] for terms in told.terms])
        site.serve(choice)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["prefix", "kv_events"])
def test_the_cheapest_of_all_that_are_looked_at_is_chosen(name: str, count: int, seed: int) -> None:
    site = Busy(name, count, seed, "prefill")
    chosen_among_equals = 0
    for _ in range(STEPS):
        candidates, request = site.go_on(), site.request()
        prices = site.policy.appraise(request, candidates)
        assert prices is not None
        cached: list[float] = prices.cached  # type: ignore[attr-defined]
        cheapest = [entry for entry, cost in enumerate(prices.costs) if cost == min(prices.costs)]
        choice = site.policy.choose(request, candidates)
        equals = [candidates[prices.indexes[entry]] for entry in cheapest]
        assert choice.worker in equals
        if not any(cached):  # then nobody is drawn: the first one in turn
            assert choice.worker is equals[0]
            chosen_among_equals += len(equals) > 1
        site.serve(choice)
    assert chosen_among_equals or count == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", COUNTS)
def test_a_session_is_at_home_or_at_the_next_one_in_weight(count: int, seed: int) -> None:
    site = Busy("session", count, seed)
    passed_over = 0
    for _ in range(STEPS):
        candidates = site.go_on()
        session = b"s%d" % site.random.randrange(5)
        expected = by_weight(session, candidates)
        choice = site.policy.choose(FakeRequest(headers={b"x-session-id": session}), candidates)
        assert (choice.worker, "at home" in str(choice)) == expected
        passed_over += not expected[1]
        site.serve(choice)
    assert passed_over or count == 1


def by_weight(session: bytes, candidates: Sequence[Worker]) -> tuple[Worker, bool]:
    """Return who gets a session, and whether that is its home, with a look at each of them."""
    seed = xxh3_64_intdigest(session)
    order = sorted(candidates, key=lambda worker: -xxh3_64_intdigest(worker.name.encode(), seed))
    legs = sum(worker.in_flight for worker in candidates)
    limit = max(1.25 * (legs + 1) / len(candidates), 1.0) + 1
    found = next(worker for worker in order if worker.in_flight + 1 <= limit)
    return found, found is order[0]


def test_a_request_with_few_candidates_makes_no_prefix_unknown() -> None:
    site = Busy("prefix", 150, 1, "prefill")
    workers, prompt = site.pools.decode, FakeRequest(site.random.randbytes(8000))
    first = site.policy.choose(prompt, workers)
    first.ended(Outcome(End.ANSWERED, site.clock.now))
    for count in range(200):
        alone = site.policy.choose(FakeRequest(site.random.randbytes(8000)), (workers[1 + count % 149],))
        alone.ended(Outcome(End.CANCELLED, site.clock.now))
    assert site.policy.new_tokens(prompt) < 500
    assert site.policy.choose(prompt, workers).terms()["cached_tokens"] > 1000


def test_workers_that_are_gone_for_good_are_forgotten_in_the_end() -> None:
    site = Busy("prefix", 200, 1, "prefill")
    workers = site.pools.decode
    prompt = FakeRequest(site.random.randbytes(8000))
    site.policy.choose(prompt, (*workers[100:], workers[0])).ended(Outcome(End.CANCELLED, 0.0))
    assert site.policy.prediction(workers[199].name) is not None
    for _ in range(3000):
        site.policy.choose(FakeRequest(site.random.randbytes(100)), (*workers[:20],))
    assert site.policy.prediction(workers[199].name) is None
    assert site.policy.prediction(workers[0].name) is not None
