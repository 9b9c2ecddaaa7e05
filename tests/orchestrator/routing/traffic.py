"""Workers in virtual time, for a planner that is asked for one request after another."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from orchestrator.config.options import RoutingConfig
from orchestrator.routing.links import expected_s
from orchestrator.routing.plan import Plan
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies.base import End, Outcome
from orchestrator.routing.policies.prefix_legs import seconds
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker
from tests.orchestrator.cluster import Clock, registry_of
from tests.orchestrator.routing.requests import FakeRequest

Rate = Callable[[Worker, Worker], float]


class Traffic:
    """Prefill workers take one prompt after another, links and decoding are never full."""

    def __init__(
        self,
        counts: Any,
        *,
        zones: int = 0,
        link: Rate = lambda prefill, decode: 1.0,
        decode_s: float = 1.0,
        **routing: Any,
    ) -> None:
        """With `zones`, workers of each role are in so many, in turn. `link` is the rate of a hand-off."""
        self.clock = Clock()
        self.pools: Pools = registry_of(counts).pools["m"]
        for pool in (self.pools.prefill, self.pools.decode, self.pools.both):
            for index, worker in enumerate(pool):
                worker.zone = f"zone {index % zones}" if zones else None
        self.planner = Planner("m", RoutingConfig(**routing), random=Random(1), time=self.clock)
        self.plans: list[Plan] = []
        self.first_s: list[float] = []  # until each first token
        self._link = link
        self._decode_s = decode_s
        self._free_at: dict[Worker, float] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._random = Random(2)

    def ask(self, size: int, *, prompt: bytes | None = None) -> Plan:
        """Have a request planned now."""
        request = FakeRequest(prompt if prompt is not None else self._random.randbytes(size))
        plan = self.planner.plan(request, self.pools, None)
        self.plans.append(plan)
        plan.decode.count_leg(1)
        if plan.prefill is None:
            self._alone(plan, request.prompt_tokens())
        else:
            self._prefill(plan, plan.prefill, request.prompt_tokens())
        return plan

    def wait(self, duration_s: float) -> None:
        """Let time pass."""
        end = self.clock.now + duration_s
        while self._due and self._due[0][0] <= end:
            self.clock.now, _, what = heapq.heappop(self._due)
            what()
        self.clock.now = end

    def _at(self, moment: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (moment, len(self._due) + id(what), what))

    def _served(self, worker: Worker, tokens: float) -> float:
        free_at = max(self._free_at.get(worker, 0.0), self.clock.now) + seconds(tokens, 0)
        self._free_at[worker] = free_at
        return free_at

    def _prefill(self, plan: Plan, worker: Worker, tokens: float) -> None:
        asked = self.clock.now
        worker.count_leg(1)

        def prefilled() -> None:
            worker.count_leg(-1)
            choice = plan.choice_of(worker)
            if choice.policy is not None:
                choice.ended(Outcome(End.ANSWERED, self.clock.now, 0))
            written = self.clock.now
            self._at(
                written + self._link(worker, plan.decode) * expected_s(tokens),
                lambda: self._begun(plan, asked, written),
            )

        self._at(self._served(worker, tokens), prefilled)

    def _alone(self, plan: Plan, tokens: float) -> None:
        asked = self.clock.now
        self._at(self._served(plan.decode, tokens), lambda: self._begun(plan, asked, asked))

    def _begun(self, plan: Plan, asked: float, written: float) -> None:
        self.first_s.append(self.clock.now - asked)
        if plan.links is not None:
            plan.begun(written, self.clock.now)
        self._at(self.clock.now + self._decode_s, lambda: self._ended(plan))

    def _ended(self, plan: Plan) -> None:
        plan.decode.count_leg(-1)
        if plan.owes():
            plan.close(self.clock.now, End.ANSWERED)
