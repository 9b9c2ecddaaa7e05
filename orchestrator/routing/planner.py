"""Picks who serves a request: a prefill and a decode worker, or one worker for all of it."""

from __future__ import annotations

import msgspec

from orchestrator.config import RoutingConfig
from orchestrator.errors import Unavailable
from orchestrator.routing import POLICIES
from orchestrator.workers import Pools, Worker


class Plan(msgspec.Struct):
    """Who does what, and why. `prefill` is None if `decode` does everything."""

    prefill: Worker | None
    decode: Worker
    reason: str


class Planner:
    """Plans for one model. Synchronous: nothing may happen between its look at the workers and the leases."""

    def __init__(self, routing: RoutingConfig) -> None:
        self._disaggregates = routing.disaggregate == "always"
        self._prefill = POLICIES[routing.prefill]()
        self._decode = POLICIES[routing.decode]()
        self._whole = POLICIES[routing.decode]()

    def plan(self, pools: Pools, whole_reason: str | None) -> Plan:
        """`whole_reason` says why the request cannot go in two legs. Raises `Unavailable`."""
        if whole_reason is None and not self._disaggregates:
            whole_reason = "disaggregation is off"
        if whole_reason is not None:
            return Plan(None, self._one_worker(pools), whole_reason)
        if pools.prefill and pools.decode:
            decode = self._decode.choose(pools.decode)
            return Plan(self._prefill.choose(pools.prefill), decode, self._decode.reason)
        if pools.both:
            return Plan(None, self._whole.choose(pools.both), "no separate pools are ready")
        raise Unavailable(f"{pools.problem()} for the model '{pools.model}'")

    def _one_worker(self, pools: Pools) -> Worker:
        """A worker that does both; else a decode worker, which can prefill for itself."""
        if candidates := pools.both or pools.decode:
            return self._whole.choose(candidates)
        raise Unavailable(f"no decode worker is ready for the model '{pools.model}'")
