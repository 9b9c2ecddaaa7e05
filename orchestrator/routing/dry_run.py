"""A dry run tells what the planner would do with a request, and why, in numbers; nothing is changed by it.

It goes the planner's way (`Planner.plan`), and asks the policies to explain where that has them choose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orchestrator.errors import Unavailable
from orchestrator.routing.marginal import Verdict
from orchestrator.routing.pairs import Joint
from orchestrator.routing.planner import NO_POOLS, NO_PREFILL, PAIR_FAILED, TURNED_OFF, Planner, group_of
from orchestrator.routing.policies.base import Explanation, Request
from orchestrator.routing.revisions import Group
from orchestrator.wire.info import Role
from orchestrator.workers.pools import ROLES, Pools
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker

Document = dict[str, Any]
Ready = Sequence[Worker]
Terms = Mapping[str, Mapping[str, float]]  # of workers, by name

UNTOLD = "The policy does not tell what it would choose."


def explain(
    planner: Planner, request: Request, pools: Pools, whole_reason: str | None, avoid: Collection[Worker]
) -> Document:
    """Return what would become of a request; the arguments are those of `Planner.plan`. If nobody can serve
    it, `plan` is null and `refused` says why.
    """
    state = planner.random.getstate()
    try:
        return _DryRun(planner, request, pools, avoid).document(whole_reason)
    finally:
        planner.random.setstate(state)


class _DryRun:
    def __init__(self, planner: Planner, request: Request, pools: Pools, avoid: Collection[Worker]) -> None:
        self._planner = planner
        self._request = request
        self._pools = pools
        self._avoid = avoid
        self._ready: dict[Role, Ready] = {role: pools.preview(role, avoid) for role in ROLES}
        self._made: Document = {"plan": None}

    def document(self, whole_reason: str | None) -> Document:
        try:
            self._plan(whole_reason)
        except Unavailable as error:
            self._made["refused"] = error.message
        self._made["rejected"] = [
            {"worker": worker.name, "why": why} for worker, why in self._rejected().items()
        ]
        return self._made

    # --- the planner's way ----------------------------------------------------------------------

    def _plan(self, whole_reason: str | None) -> None:
        planner, ready = self._planner, self._ready
        prefill, decode, both = ready["prefill"], ready["decode"], ready["both"]
        if whole_reason is None and not planner.disaggregates:
            whole_reason = TURNED_OFF
        if whole_reason is None and prefill and decode:
            if self._avoid and planner.is_better_whole(prefill, decode, both, self._avoid):
                whole_reason = PAIR_FAILED
            elif groups := planner.groups(prefill, decode):
                self._pair(groups, planner.alone(decode, both))
                return
            else:
                whole_reason = planner.without_partners(self._pools)
        self._whole(whole_reason, decode, both)

    def _whole(self, whole_reason: str | None, decode: Ready, both: Ready) -> None:
        if both:
            self._alone(both, whole_reason or NO_POOLS)
        elif decode and (whole_reason is not None or not self._planner.is_strict):
            self._alone(decode, whole_reason or NO_PREFILL)
        else:
            missing = self._pools.missing() if whole_reason is None else "no decode worker is ready"
            raise Unavailable(f"{missing} for the model '{self._pools.model}'")

    def _alone(self, workers: Ready, whole_reason: str) -> None:
        told = self._planner.whole.explain(self._request, workers)
        chosen = _chosen(told, workers)
        self._note_plan(None, chosen, whole_reason)
        self._note_leg("decode", workers, chosen, _reason(told), _terms(told, workers))

    def _pair(self, groups: list[Group], alone: Ready) -> None:
        joint = self._planner.joint(self._request, groups)
        if self._planner.auto is not None:
            self._by_auto(groups, joint, alone)
        elif joint is not None:
            self._jointly(joint)
        else:
            told, decodes = self._explained_decode(groups)
            decode = _chosen(told, decodes)
            group = groups[0] if decode is None else group_of(groups, decode)
            self._apart(group, decodes, decode, told, self._explained_prefill(group))

    def _jointly(self, joint: Joint) -> None:
        pair, group = joint.pair, joint.group
        self._note_plan(pair.prefill, pair.decode, None)
        self._made["pair"] = {"reason": str(pair), "terms": pair.terms()}
        for role, policy, workers, chosen in (
            ("prefill", self._planner.prefill, group.prefill, pair.prefill),
            ("decode", self._planner.decode, group.decode, pair.decode),
        ):
            told = policy.explain(self._request, workers)
            self._note_leg(
                role, workers, chosen, str(pair), self._with_links(role, joint, _terms(told, workers))
            )

    def _apart(
        self,
        group: Group,
        decodes: Ready,
        decode: Worker | None,
        told: Explanation | None,
        prefill: Explanation | None,
    ) -> None:
        chosen = _chosen(prefill, group.prefill)
        self._note_plan(chosen, decode, None)
        self._note_leg("prefill", group.prefill, chosen, _reason(prefill), _terms(prefill, group.prefill))
        self._note_leg("decode", decodes, decode, _reason(told), _terms(told, decodes))

    def _by_auto(self, groups: list[Group], joint: Joint | None, alone: Ready) -> None:
        """Decide as `Planner` does whether one worker serves the request, or two."""
        auto, told, decodes = self._planner.auto, None, groups[0].decode
        if auto is None:
            return
        group = groups[0] if joint is None else joint.group
        if joint is None and len(groups) > 1:
            told, decodes = self._explained_decode(groups)
            decode = _chosen(told, decodes)
            group = groups[0] if decode is None else group_of(groups, decode)
        prices = None if joint is None else joint.prices
        asked = auto.ask(self._request, group.prefill, alone, prices)
        prefill = self._explained_prefill(group) if joint is None and auto.is_apart else None
        if joint is not None:
            index = joint.pair.prefill_index
        else:
            index = asked.cheapest() if prefill is None else prefill.index
        verdict = auto.verdict(asked, index, None if joint is None else joint.pair.transfer_s)
        own = {alone[local.index].name: local.terms() for local in auto.locals_of(asked)}
        self._note_verdict(verdict)
        if verdict.is_local:
            chosen = alone[verdict.local.index]
            self._note_plan(None, chosen, str(verdict))
            others = {worker.name: asked.prices.look(at).terms() for at, worker in enumerate(group.prefill)}
            self._note_leg("prefill", group.prefill, None, str(verdict), others)
            self._note_leg("decode", alone, chosen, str(verdict), own)
        elif joint is not None:
            self._jointly(joint)
        else:
            if told is None:
                told = self._planner.decode.explain(self._request, decodes)
            if prefill is None:
                prefill = self._cheapest(group, index, str(asked.prices.look(index)))
            self._apart(group, decodes, _chosen(told, decodes), told, prefill)

    def _cheapest(self, group: Group, index: int, reason: str) -> Explanation | None:
        """Return the terms of all prefill workers, of which not the policy has chosen this one."""
        told = self._explained_prefill(group)
        return None if told is None else Explanation(index, reason, told.terms)

    # --- asking the policies --------------------------------------------------------------------

    def _explained_decode(self, groups: list[Group]) -> tuple[Explanation | None, Ready]:
        decodes = groups[0].decode if len(groups) == 1 else self._planner.revisions.decodes()
        return self._planner.decode.explain(self._request, decodes), decodes

    def _explained_prefill(self, group: Group) -> Explanation | None:
        return self._planner.prefill.explain(self._request, group.prefill)

    def _with_links(self, role: str, joint: Joint, terms: Terms) -> Terms:
        """Add to the terms of a role how long hand-offs take from there, or to there, in the pair."""
        pair, links, now = joint.pair, self._planner.links, self._planner.time()
        workers = joint.group.prefill if role == "prefill" else joint.group.decode
        made: dict[str, Mapping[str, float]] = {}
        for worker in workers:
            ends = (worker, pair.decode) if role == "prefill" else (pair.prefill, worker)
            transfer_s = links.seconds(*ends, joint.tokens, now)
            made[worker.name] = {**terms.get(worker.name, {}), "transfer_s": transfer_s}
        return made

    # --- the document ---------------------------------------------------------------------------

    def _note_plan(self, prefill: Worker | None, decode: Worker | None, whole_reason: str | None) -> None:
        self._made["plan"] = {
            "path": "disaggregated" if whole_reason is None else "aggregated",
            "prefill": None if prefill is None else prefill.name,
            "decode": None if decode is None else decode.name,
            "whole_reason": whole_reason,
        }

    def _note_verdict(self, verdict: Verdict) -> None:
        self._made["auto"] = {
            "workers": 1 if verdict.is_local else 2,
            "reason": str(verdict),
            "one": verdict.local.terms(),
            "two": verdict.remote.terms(),
        }

    def _note_leg(self, role: str, workers: Ready, chosen: Worker | None, reason: str, terms: Terms) -> None:
        routing = self._planner.routing
        policy = "" if routing is None else (routing.prefill if role == "prefill" else routing.decode).policy
        self._made[role] = {
            "policy": policy,
            "chosen": None if chosen is None else chosen.name,
            "reason": reason,
            "candidates": [_candidate(worker, chosen, terms.get(worker.name, {})) for worker in workers],
        }

    # --- who is none ----------------------------------------------------------------------------

    def _rejected(self) -> dict[Worker, str]:
        """Return who cannot be chosen, or was not looked at, and why."""
        pools = self._pools
        known = [*pools.prefill, *pools.decode, *pools.both, *pools.others]
        listed = [self._made[role]["candidates"] for role in ("prefill", "decode") if role in self._made]
        names = {candidate["worker"] for candidates in listed for candidate in candidates}
        return {worker: self._why_not(worker) for worker in known if worker.name not in names}

    def _why_not(self, worker: Worker) -> str:
        if worker in self._ready[worker.address.role]:
            return self._why_not_needed(worker)
        if worker.is_leaving:
            return "it is being removed"
        if worker.is_drained:
            return "it is drained"
        if worker.reported.drains_itself:
            return "it drains itself"
        if worker.state is not WorkerState.READY:
            return _state(worker)
        if worker in self._avoid:
            return "it is to be avoided"
        if rests_s := self._pools.rests_s(worker):
            return f"it has asked not to be sent more for {rests_s:.1f} s"
        return "it has come back a short time ago, and it is not its turn"

    def _why_not_needed(self, worker: Worker) -> str:
        plan = self._made["plan"]
        if plan is None:
            return "it cannot serve the request by itself"
        if plan["path"] == "aggregated":
            return "one worker serves the request, and it is not of those that could"
        if worker.address.role == "both":
            return "two workers serve the request"
        return f"no pair has its revision, {worker.revision}"


def _state(worker: Worker) -> str:
    if worker.state is WorkerState.SUSPECT:
        return "it is suspected to be lost, and others are not"
    return f"it is {worker.state}" + (f": {worker.last_error}" if worker.last_error else "")


def _candidate(worker: Worker, chosen: Worker | None, terms: Mapping[str, float]) -> Document:
    return {
        "worker": worker.name,
        "chosen": worker is chosen,
        "in_flight": worker.in_flight,
        "zone": worker.zone,
        "revision": worker.revision,
        "terms": dict(terms),
    }


def _chosen(told: Explanation | None, workers: Ready) -> Worker | None:
    return None if told is None else workers[told.index]


def _reason(told: Explanation | None) -> str:
    return UNTOLD if told is None else told.reason


def _terms(told: Explanation | None, workers: Ready) -> Terms:
    if told is None:
        return {}
    return {worker.name: terms for worker, terms in zip(workers, told.terms, strict=True)}
