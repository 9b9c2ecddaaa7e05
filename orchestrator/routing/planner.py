"""Picks who serves a request: a prefill and a decode worker, or one worker for all of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from orchestrator.config.options import RoutingConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.policies import POLICIES
from orchestrator.workers.registry import Pools, Worker

NO_PREFILL: Final = "no prefill worker is ready: the decode worker prefills"
PAIR_FAILED: Final = "who would prefill or decode has just failed"


Ready = Sequence[Worker]


class Plan:
    """Who does what, and why. `prefill` is None if `decode` does everything."""

    __slots__ = ("decode", "prefill", "reason")

    def __init__(self, prefill: Worker | None, decode: Worker, reason: str) -> None:
        self.prefill = prefill
        self.decode = decode
        self.reason = reason


class Planner:
    """Plans for one model. Synchronous: nothing may happen between its look at the workers and the leases."""

    def __init__(self, routing: RoutingConfig) -> None:
        self._disaggregates = routing.disaggregate != "never"
        self._is_strict = routing.disaggregate == "strict"
        self._prefill = POLICIES[routing.prefill]()
        self._decode = POLICIES[routing.decode]()
        self._whole = POLICIES[routing.decode]()

    def plan(self, pools: Pools, whole_reason: str | None, avoid: Collection[Worker] = ()) -> Plan:
        """`whole_reason` says why the request cannot go in two legs. Workers in `avoid` are chosen only if
        there is no other. Raises `Unavailable`.
        """
        if whole_reason is None and not self._disaggregates:
            whole_reason = "disaggregation is off"
        prefill, decode, both = pools.prefill, pools.decode, pools.both
        if avoid or not pools.is_steady:
            prefill = pools.candidates("prefill", avoid)
            decode = pools.candidates("decode", avoid)
            both = pools.candidates("both", avoid)
        if whole_reason is None and prefill and decode:
            if not (avoid and self._is_better_whole(prefill, decode, both, avoid)):
                chosen = self._decode.choose(decode)
                return Plan(self._prefill.choose(prefill), chosen, self._decode.reason)
            whole_reason = PAIR_FAILED
        if both:
            return Plan(None, self._whole.choose(both), whole_reason or "no separate pools are ready")
        if decode and (whole_reason is not None or not self._is_strict):
            return Plan(None, self._whole.choose(decode), whole_reason or NO_PREFILL)
        missing = pools.missing() if whole_reason is None else "no decode worker is ready"
        raise Unavailable(f"{missing} for the model '{pools.model}'")

    def _is_better_whole(self, prefill: Ready, decode: Ready, both: Ready, avoid: Collection[Worker]) -> bool:
        """Whether one worker that has not failed the request can serve it, but no two such can.

        Of a role's candidates all have failed it, or none.
        """
        if prefill[0] not in avoid and decode[0] not in avoid:
            return False
        if both:
            return both[0] not in avoid
        return not self._is_strict and decode[0] not in avoid
