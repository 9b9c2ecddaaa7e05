"""The planner picks who serves a request: a prefill and a decode worker, or one worker for all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from random import Random
from typing import Final

from orchestrator.config.options import RoutingConfig
from orchestrator.config.policies import PolicyConfig
from orchestrator.errors import Unavailable
from orchestrator.routing.auto import Auto, chosen_alone, index_of
from orchestrator.routing.links import Links
from orchestrator.routing.pairs import Joint, cheapest_joint
from orchestrator.routing.plan import Plan
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import CacheEvent, Choice, Context, End, Outcome, Policy, Request
from orchestrator.routing.policies.prediction import Prediction
from orchestrator.routing.revisions import Group, Revisions
from orchestrator.wire.info import Role
from orchestrator.workers.pools import Pools
from orchestrator.workers.worker import Worker

TURNED_OFF: Final = "disaggregation is off"
NO_POOLS: Final = "no separate pools are ready"
NO_PREFILL: Final = "no prefill worker is ready: the decode worker prefills"
PAIR_FAILED: Final = "the worker that would prefill or decode has just failed"
NO_PARTNERS: Final = "no prefill worker has the revision of a decode worker"

_CANCELLED: Final = End.CANCELLED  # a look-up by member is a call in Python

Ready = Sequence[Worker]


class Planner:
    """It plans for one model. It is synchronous: nothing may happen between its look at the workers and the
    legs' places.

    `routing/dry_run.py` tells what it would do, and reads what is public here.
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
        self.random = random
        self.time = time
        self._share = share
        self.routing: RoutingConfig | None = None
        self.links = Links()
        self.revisions = Revisions()
        self.auto: Auto | None = None
        self._decode_and_both: tuple[Ready, Ready, Ready] = ((), (), ())
        self.reconfigure(routing)

    def reconfigure(self, routing: RoutingConfig) -> None:
        """Go by this section from now on. A policy of which nothing changes keeps what it has learned."""
        before, self.routing = self.routing, routing
        self.disaggregates = routing.disaggregate != "never"
        self.is_strict = routing.disaggregate == "strict"
        self.keeps_revisions = routing.keeps_revisions
        self.revisions.pair_unknown(routing.pairs_unknown)
        has_new_prefill = before is None or routing.prefill != before.prefill
        if has_new_prefill:
            self.prefill = self._made(routing.prefill, "prefill")
        if before is None or routing.decode != before.decode:
            self.decode = self._made(routing.decode, "decode")
            self.whole = self._made(routing.decode, "both")
        if routing.disaggregate != "auto":
            self.auto = None
        elif self.auto is None or has_new_prefill:
            self.auto = Auto(self._model, self.prefill, self.links, random=self.random, time=self.time)
        self._reckons = self.prefill.reckons_seconds() and self.decode.reckons_seconds()
        # Both policies choose by themselves, as long as no link is known to differ.
        self._is_plain = self.auto is None
        self._measured = self.links if self._reckons else None

    def _made(self, policy: PolicyConfig, role: Role) -> Policy:
        share = None if self._share is None else partial(self._share, self._model, role)
        context = Context(self._model, role, self.random, self.time, share)
        return POLICIES[policy.policy].make(context, **policy.arguments)

    def hear(self, role: Role, note: bytes) -> None:
        """Let the policy for a role hear what the same one of another process has shared."""
        policies = {"prefill": self.prefill, "decode": self.decode, "both": self.whole}
        policies[role].hear(note)

    def hearer(self, role: Role) -> Callable[[str, CacheEvent], None] | None:
        """Return what is to be told of the caches of workers of a role; None if the policy goes by none."""
        if self.routing is None or not self.routing.hears_caches(role):
            return None
        return self.prefill.note_cache if role == "prefill" else self.whole.note_cache

    def prediction(self, role: Role, worker: str) -> Prediction | None:
        """Return how right the policies were of late about the cache of a worker of a role."""
        if role == "prefill":
            return self.prefill.prediction(worker)
        return self.whole.prediction(worker)

    def varied(self, routing: RoutingConfig) -> Planner:
        """Return a planner that goes by another section; it shares what is the same in both."""
        other = Planner(self._model, self.routing or routing, random=self.random, time=self.time)
        other.prefill, other.decode, other.whole = self.prefill, self.decode, self.whole
        other.links, other.revisions, other.auto = self.links, self.revisions, self.auto
        other.reconfigure(routing)
        return other

    def new_tokens(self, request: Request) -> float:
        """Estimate how many tokens of the prompt are in no prefill worker's cache."""
        return self.prefill.new_tokens(request)

    def plan(
        self, request: Request, pools: Pools, whole_reason: str | None, avoid: Collection[Worker] = ()
    ) -> Plan:
        """Choose the workers; `whole_reason` says why the request cannot go in two legs. Workers in `avoid`
        are chosen only if there is no other. Raises `Unavailable`.
        """
        if whole_reason is None and not self.disaggregates:
            whole_reason = TURNED_OFF
        prefill, decode, both = pools.prefill, pools.decode, pools.both
        if avoid or not pools.is_steady:
            prefill = pools.candidates("prefill", avoid)
            decode = pools.candidates("decode", avoid)
            both = pools.candidates("both", avoid)
        if whole_reason is None and prefill and decode:
            if avoid and self.is_better_whole(prefill, decode, both, avoid):
                whole_reason = PAIR_FAILED
            elif (
                self._is_plain
                and (self.links.are_equal or not self._reckons)
                and (not self.keeps_revisions or self.revisions.are_one(prefill, decode))
            ):
                chosen = self.decode.choose(request, decode)
                made = Plan(self.prefill.choose(request, prefill), chosen, None, self._measured)
                made.prefills, made.decodes = prefill, decode
                return made
            else:
                groups = self.groups(prefill, decode)
                if groups:
                    alone = self.alone(decode, both)
                    made = self._paired(request, groups, alone)
                    made.prefills, made.decodes = prefill, decode if made.prefill is not None else alone
                    return made
                whole_reason = self.without_partners(pools)
        if both:
            return self._alone_on(request, both, whole_reason or NO_POOLS)
        if decode and (whole_reason is not None or not self.is_strict):
            return self._alone_on(request, decode, whole_reason or NO_PREFILL)
        missing = pools.missing() if whole_reason is None else "no decode worker is ready"
        raise Unavailable(f"{missing} for the model '{pools.model}'")

    def is_better_whole(self, prefill: Ready, decode: Ready, both: Ready, avoid: Collection[Worker]) -> bool:
        """Tell whether one worker that has not failed the request can serve it, but no two such can.

        Of a role's candidates all have failed it, or none.
        """
        if prefill[0] not in avoid and decode[0] not in avoid:
            return False
        if both:
            return both[0] not in avoid
        return not self.is_strict and decode[0] not in avoid

    def _alone_on(self, request: Request, workers: Ready, whole_reason: str) -> Plan:
        choice = self.whole.choose(request, workers)
        if self.auto is None:
            made = Plan(None, choice, whole_reason)
        else:
            made = self.auto.whole(self.auto.appraise_alone(request, workers), choice, whole_reason)
        made.decodes = workers
        return made

    # --- who can go together --------------------------------------------------------------------

    def groups(self, prefill: Ready, decode: Ready) -> list[Group]:
        """Return who can go together; no group, if nobody can."""
        if self.keeps_revisions:
            return self.revisions.groups(prefill, decode)
        return [Group(None, prefill, decode)]

    def go_together(self, prefill: Worker, decode: Worker) -> bool:
        """Tell whether a hand-off of the one may go to the other, whoever was planned first."""
        return not self.keeps_revisions or self.revisions.go_together(prefill, decode)

    def strangers(self, revision: str | None, pools: Pools, failed: Collection[Worker]) -> tuple[Worker, ...]:
        """Return the workers that do not go with a revision; none if nobody else is left to serve a request
        that `failed` have failed, or if revisions do not matter.
        """
        if not self.keeps_revisions:
            return ()
        return self.revisions.strangers(revision, pools, failed, needs_pair=self.is_strict)

    def without_partners(self, pools: Pools) -> str:
        """Return why one worker serves where no two can go together. Raises `Unavailable`."""
        if self.is_strict and not pools.both:
            raise Unavailable(f"{NO_PARTNERS} of the model '{pools.model}'")
        return NO_PARTNERS

    def alone(self, decode: Ready, both: Ready) -> Ready:
        """Return who can do all of a request; the decode workers come first."""
        if not both:
            return decode
        known = self._decode_and_both
        if known[0] is not decode or known[1] is not both:
            known = self._decode_and_both = (decode, both, (*decode, *both))
        return known[2]

    # --- pairs ----------------------------------------------------------------------------------

    def joint(self, request: Request, groups: list[Group]) -> Joint | None:
        """Return the pair at the least cost; None if each policy can choose by itself, for no link differs
        from others, or not both reckon in seconds. Nothing is changed.
        """
        if not self._reckons or self.links.are_equal:
            return None
        return cheapest_joint(request, groups, self.prefill, self.decode, self.links, self.time())

    def _paired(self, request: Request, groups: list[Group], alone: Ready) -> Plan:
        """Choose two workers, or one if that costs less."""
        joint = self.joint(request, groups)
        if self.auto is not None:
            return self._by_auto(self.auto, request, groups, joint, alone)
        if joint is not None:
            chosen = joint.take_decode(self.links, self.time())
            return Plan(joint.take_prefill(), chosen, None, self.links)
        chosen = self._decode_of(request, groups)
        choice = self.prefill.choose(request, group_of(groups, chosen.worker).prefill)
        return Plan(choice, chosen, None, self._measured)

    def _decode_of(self, request: Request, groups: list[Group]) -> Choice[Worker]:
        """Choose the decode worker, of all groups."""
        decodes = groups[0].decode if len(groups) == 1 else self.revisions.decodes()
        return self.decode.choose(request, decodes)

    def _by_auto(
        self, auto: Auto, request: Request, groups: list[Group], joint: Joint | None, alone: Ready
    ) -> Plan:
        """Have one worker serve the request, or two, whatever costs less."""
        chosen: Choice[Worker] | None = None
        choice: Choice[Worker] | None = None
        group = groups[0]
        if joint is not None:
            group = joint.group
        elif len(groups) > 1:
            chosen = self._decode_of(request, groups)
            group = group_of(groups, chosen.worker)
        asked = auto.ask(request, group.prefill, alone, None if joint is None else joint.prices)
        if joint is not None:
            index = joint.pair.prefill_index
        elif auto.is_apart:
            choice = self.prefill.choose(request, group.prefill)
            index = index_of(group.prefill, choice.worker)
        else:
            index = asked.cheapest()
        verdict = auto.verdict(asked, index, None if joint is None else joint.pair.transfer_s)
        if verdict.is_local:
            self._take_back(choice, chosen)
            only = chosen_alone(self.decode, request, alone, verdict.local.index, verdict)
            return auto.whole(asked.caches, only, str(verdict))
        if joint is not None:
            chosen = joint.take_decode(self.links, self.time())
            choice = joint.take_prefill() if auto.is_apart else None
        elif chosen is None:
            chosen = self.decode.choose(request, group.decode)
        return auto.pair(asked, index, choice, chosen, verdict, None if joint is None else joint.pair)

    def _take_back(self, *choices: Choice[Worker] | None) -> None:
        """Tell the policies that nothing comes of these."""
        for choice in choices:
            if choice is not None and choice.policy is not None:
                choice.ended(Outcome(_CANCELLED, self.time()))


def group_of(groups: list[Group], decode: Worker) -> Group:
    """Return the group of a decode worker."""
    if len(groups) == 1:
        return groups[0]
    return next(group for group in groups if group.revision == decode.revision)
