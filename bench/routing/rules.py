"""Fixed rules by which other routers have one worker serve a request: so few of its tokens are new there.

The worker would be that decode worker which has the most of the prompt. It is known at once, and of each
worker's true size, what it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from launch.simulate.cache import PrefixCache
from launch.simulate.site import Plans
from launch.simulate.view import SimulatedRequest
from orchestrator.routing.plan import Plan
from orchestrator.routing.planner import Planner
from orchestrator.routing.policies.base import Choice
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker

BY_LOAD: Final = 1e-3  # a leg counts as so many tokens, to choose among equals

# By name: how many new tokens at most, and how large a part of the prompt.
RULES: Final[dict[str, tuple[int, float]]] = {
    "new<512": (512, math.inf),
    "new<2048": (2048, math.inf),
    "new<8192": (8192, math.inf),
    "dynamo": (2048, 0.7),  # its conditional disaggregation, by default
}


class Ruled:
    """A rule decides first; the planner plans what is left to two workers."""

    def __init__(self, planner: Planner, most_tokens: int, most_share: float) -> None:
        self._planner = planner
        self._most_tokens = most_tokens
        self._most_share = most_share
        self._sent: dict[str, PrefixCache] = {}  # by decode worker

    def plan(self, request: SimulatedRequest, pools: Pools, whole_reason: str | None) -> Plan:
        tokens = request.prompt_tokens()
        cached, worker = self._fullest(request, pools)
        new = tokens - cached
        if new < self._most_tokens and new < self._most_share * tokens:
            plan = Plan(None, Choice(worker, "The rule says so."), "few of its tokens are new there")
        else:
            plan = self._planner.plan(request, pools, whole_reason)
        self._cache(plan.decode, request).put(request.arrival.blocks)
        return plan

    def hear(self, role: Role, note: bytes) -> None:
        self._planner.hear(role, note)

    def _fullest(self, request: SimulatedRequest, pools: Pools) -> tuple[int, Worker]:
        """Return the decode worker that has the most of a prompt, and how many tokens those are."""
        block = request.block_tokens
        found = [
            (self._cache(worker, request).matched(request.arrival.blocks) * block, worker)
            for worker in pools.decode
        ]
        cached, worker = max(found, key=lambda entry: entry[0] - BY_LOAD * entry[1].in_flight)
        return min(cached, request.prompt_tokens() - 1), worker

    def _cache(self, worker: Worker, request: SimulatedRequest) -> PrefixCache:
        found = self._sent.get(worker.name)
        if found is None:
            capacity = max(1, (worker.kv_tokens or 0) // request.block_tokens)
            found = self._sent[worker.name] = PrefixCache(capacity)
        return found


class Apart:
    """Each policy chooses by itself, whatever hand-offs take."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def plan(self, request: SimulatedRequest, pools: Pools, whole_reason: str | None) -> Plan:
        decode = self._planner.decode.choose(request, pools.decode)
        return Plan(self._planner.prefill.choose(request, pools.prefill), decode, whole_reason)

    def hear(self, role: Role, note: bytes) -> None:
        self._planner.hear(role, note)


APART: Final = "apart"


def before(rule: str) -> Callable[[Planner], Plans]:
    """Return what makes a rule stand before a planner, or in its place."""
    if rule == APART:
        return Apart
    most_tokens, most_share = RULES[rule]
    return lambda planner: Ruled(planner, most_tokens, most_share)
