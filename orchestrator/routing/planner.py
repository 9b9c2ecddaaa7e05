"""The planner picks who serves a request: a prefill and a decode worker, or one worker for all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from random import Random
from typing import Final

from orchestrator.config.options import RoutingConfig
from orchestrator.config.policies import PolicyConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import Choice, Context, End, Outcome, Policy, Request
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker

TURNED_OFF: Final = "disaggregation is off"
NO_POOLS: Final = "no separate pools are ready"
NO_PREFILL: Final = "no prefill worker is ready: the decode worker prefills"
PAIR_FAILED: Final = "the worker that would prefill or decode has just failed"

_CANCELLED: Final = End.CANCELLED  # a look-up by member is a call in Python


Ready = Sequence[Worker]


class Plan:
    """A plan says who does what, and why. `prefill` is None if `decode` does everything.

    Each choice is owed one `ended`, as soon as its leg has ended; `close` pays for all that were not.
    """

    __slots__ = ("decode", "decode_choice", "prefill", "prefill_choice", "wants_ends", "whole_reason")

    def __init__(
        self,
        prefill_choice: Choice[Worker] | None,
        decode_choice: Choice[Worker],
        whole_reason: str | None = None,
    ) -> None:
        """`whole_reason` is why one worker does everything; None if there are two. The choices tell why it is
        these workers.
        """
        self.prefill_choice = prefill_choice
        self.decode_choice = decode_choice
        self.prefill = None if prefill_choice is None else prefill_choice.worker
        self.decode = decode_choice.worker
        self.whole_reason = whole_reason
        # Whether a policy wants to hear of ends; read per request, so it is no property.
        self.wants_ends = decode_choice.policy is not None or (
            prefill_choice is not None and prefill_choice.policy is not None
        )

    def choice_of(self, worker: Worker) -> Choice[Worker]:
        """Return the choice that this worker of the plan comes from."""
        if worker is self.prefill and self.prefill_choice is not None:
            return self.prefill_choice
        return self.decode_choice

    def owes(self) -> bool:
        """Tell whether a choice still is to be told how its leg ended."""
        prefill = self.prefill_choice
        return self.decode_choice.policy is not None or (prefill is not None and prefill.policy is not None)

    def close(self, now: float, end: End = _CANCELLED) -> None:
        """Tell the policies that nothing more comes of the plan: `end` is that of the decode leg, a prefill
        leg was not sent.
        """
        prefill = self.prefill_choice
        if prefill is not None and prefill.policy is not None:
            prefill.ended(Outcome(_CANCELLED, now))
        if self.decode_choice.policy is not None:
            self.decode_choice.ended(Outcome(end, now))


class Planner:
    """It plans for one model. It is synchronous: nothing may happen between its look at the workers and the
    legs' places.
    """

    def __init__(
        self,
        model: str,
        routing: RoutingConfig,
        *,
        random: Random,
        time: Callable[[], float],
        share: Callable[[str, Role, bytes], None] | None = None,
    ) -> None:
        """`random` and `time` are for policies. `share` tells the policy for a role of a model something, in
        all other processes; None if there are none.
        """
        self._model = model
        self._random = random
        self._time = time
        self._share = share
        self._routing: RoutingConfig | None = None
        self.reconfigure(routing)

    def reconfigure(self, routing: RoutingConfig) -> None:
        """Go by this section from now on. A policy of which nothing changes keeps what it has learned."""
        before, self._routing = self._routing, routing
        self._disaggregates = routing.disaggregate != "never"
        self._is_strict = routing.disaggregate == "strict"
        if before is None or routing.prefill != before.prefill:
            self._prefill = self._made(routing.prefill, "prefill")
        if before is None or routing.decode != before.decode:
            self._decode = self._made(routing.decode, "decode")
            self._whole = self._made(routing.decode, "both")

    def _made(self, policy: PolicyConfig, role: Role) -> Policy:
        share = None if self._share is None else partial(self._share, self._model, role)
        context = Context(self._model, role, self._random, self._time, share)
        return POLICIES[policy.policy].make(context, **policy.arguments)

    def hear(self, role: Role, note: bytes) -> None:
        """Let the policy for a role hear what the same one of another process has shared."""
        policies = {"prefill": self._prefill, "decode": self._decode, "both": self._whole}
        policies[role].hear(note)

    def varied(self, routing: RoutingConfig) -> Planner:
        """Return a planner that goes by another section; it shares the policies that are in both."""
        other = Planner(self._model, routing, random=self._random, time=self._time)
        if self._routing is not None and routing.prefill == self._routing.prefill:
            other._prefill = self._prefill
        if self._routing is not None and routing.decode == self._routing.decode:
            other._decode, other._whole = self._decode, self._whole
        return other

    def new_tokens(self, request: Request) -> float:
        """Estimate how many tokens of the prompt are in no prefill worker's cache."""
        return self._prefill.new_tokens(request)

    def plan(
        self, request: Request, pools: Pools, whole_reason: str | None, avoid: Collection[Worker] = ()
    ) -> Plan:
        """Choose the workers; `whole_reason` says why the request cannot go in two legs. Workers in `avoid`
        are chosen only if there is no other. Raises `Unavailable`.
        """
        if whole_reason is None and not self._disaggregates:
            whole_reason = TURNED_OFF
        prefill, decode, both = pools.prefill, pools.decode, pools.both
        if avoid or not pools.is_steady:
            prefill = pools.candidates("prefill", avoid)
            decode = pools.candidates("decode", avoid)
            both = pools.candidates("both", avoid)
        if whole_reason is None and prefill and decode:
            if not (avoid and self._is_better_whole(prefill, decode, both, avoid)):
                chosen = self._decode.choose(request, decode)
                return Plan(self._prefill.choose(request, prefill), chosen)
            whole_reason = PAIR_FAILED
        if both:
            return Plan(None, self._whole.choose(request, both), whole_reason or NO_POOLS)
        if decode and (whole_reason is not None or not self._is_strict):
            return Plan(None, self._whole.choose(request, decode), whole_reason or NO_PREFILL)
        missing = pools.missing() if whole_reason is None else "no decode worker is ready"
        raise Unavailable(f"{missing} for the model '{pools.model}'")

    def _is_better_whole(self, prefill: Ready, decode: Ready, both: Ready, avoid: Collection[Worker]) -> bool:
        """Tell whether one worker that has not failed the request can serve it, but no two such can.

        Of a role's candidates all have failed it, or none.
        """
        if prefill[0] not in avoid and decode[0] not in avoid:
            return False
        if both:
            return both[0] not in avoid
        return not self._is_strict and decode[0] not in avoid
