"""With `disaggregate: auto` it is decided per request whether one worker serves it or two (`marginal.py`).

What a prefill costs is reckoned as the policy `prefix` does it, whatever the policies are that choose the
workers: of prefill workers, and of decode workers with what was sent there so far, for a decode worker that
has fetched a prompt's KV cache has it in its prefix cache, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

from orchestrator.routing.links import Links
from orchestrator.routing.local import LocalPrefill, Site
from orchestrator.routing.marginal import Local, Remote, Verdict, stretch
from orchestrator.routing.plan import Plan
from orchestrator.routing.policies import POLICIES
from orchestrator.routing.policies.base import (
    Appraisal,
    Choice,
    Context,
    End,
    Outcome,
    Policy,
    Reasoned,
    Request,
)
from orchestrator.routing.policies.prefix import Prefix, PrefixAppraisal
from orchestrator.routing.policies.prefix_legs import PrefixChoice, seconds
from orchestrator.workers.worker import Worker

MEMORY_MB: Final = 64  # of each index that is kept beside those of the policies
NEWEST: Final = 0.02  # weight of a request in the mean length of prompts
SPARE: Final = 64  # workers that are not there any more and may stay in memory
WANING: Final = 0.999  # of how many workers there were at most, with each request that has fewer
_CANCELLED: Final = End.CANCELLED


def shadow(model: str, role: str, random: Random, time: Callable[[], float]) -> Prefix:
    """Return a policy that reckons, and need not be the one that chooses."""
    arguments: dict[str, Any] = {argument.name: argument.default for argument in POLICIES["prefix"].arguments}
    arguments["memory_mb"] = MEMORY_MB
    made = POLICIES["prefix"].make(Context(model, role, random, time), **arguments)
    if not isinstance(made, Prefix):
        raise TypeError("the table of policies has something else by that name")
    return made


class Watched(Choice[Worker]):
    """A choice whose end others than its policy want to hear of as well."""

    __slots__ = ("_inner", "_verdict")

    def __init__(self, inner: Choice[Worker], policy: Policy, verdict: Verdict | None) -> None:
        super().__init__(inner.worker, "", policy)
        self._inner = inner
        self._verdict = verdict

    def __str__(self) -> str:
        verdict = self._verdict
        return str(self._inner) if verdict is None else f"{self._inner} Of one worker or two, {verdict}."

    def prompt_tokens(self) -> float:
        return self._inner.prompt_tokens()

    def terms(self) -> dict[str, float]:
        return self._inner.terms()

    def own_s(self) -> float:
        return self._inner.own_s()

    def ended(self, outcome: Outcome) -> None:
        if self.policy is not None:
            self.policy = None
            if self._inner.policy is not None:
                self._inner.ended(outcome)
            self.note_end(outcome)

    def note_end(self, outcome: Outcome) -> None:
        """Hear of the end."""


class PrefillWatched(Watched):
    """Once its leg has ended, the decode worker's own one is no longer pending."""

    __slots__ = ("_reckoned", "_site")

    def __init__(
        self, inner: Choice[Worker], reckoned: Choice[Worker], policy: Policy, site: Site, verdict: Verdict
    ) -> None:
        """`reckoned` is what the time of the leg is learned from; it may be `inner` itself."""
        super().__init__(inner, policy, verdict)
        self._reckoned = reckoned
        self._site = site
        site.pending += 1

    def prompt_tokens(self) -> float:
        return self._reckoned.prompt_tokens()

    def own_s(self) -> float:
        return self._reckoned.own_s()

    def note_end(self, outcome: Outcome) -> None:
        self._site.pending -= 1
        if self._reckoned.policy is not None:
            self._reckoned.ended(outcome)


class DecodeWatched(Watched):
    """It counts as a leg until it has ended."""

    __slots__ = ("_prefill", "_site")

    def __init__(
        self, inner: Choice[Worker], policy: Policy, site: Site, prefill: LocalPrefill | None
    ) -> None:
        """`prefill` is given if the worker prefills by itself."""
        super().__init__(inner, policy, None)
        self._site = site
        self._prefill = prefill
        site.legs += 1

    def note_begun(self, now: float) -> None:
        if self._prefill is not None:
            self._site.note_begun(self._prefill, now)

    def note_end(self, outcome: Outcome) -> None:
        self._site.legs -= 1
        if self._prefill is not None:
            self._site.drop(self._prefill)


class WholePlan(Plan):
    """A plan of one worker wants to know when its prefill has ended."""

    __slots__ = ()

    def begun(self, written: float, moment: float) -> None:
        choice = self.decode_choice
        if isinstance(choice, DecodeWatched):
            choice.note_begun(moment)


class Question:
    """A request is asked about: who could prefill it, who could do all of it, and what each has of it."""

    __slots__ = ("alone", "caches", "prices")

    def __init__(self, alone: Sequence[Worker], prices: PrefixAppraisal, caches: PrefixAppraisal) -> None:
        """`prices` are of prefill workers, `caches` of those who can do all of it, which are `alone`."""
        self.alone = alone
        self.prices = prices
        self.caches = caches

    def cheapest(self) -> int:
        """Return the index of the cheapest prefill worker."""
        costs = self.prices.costs
        return self.prices.indexes[costs.index(min(costs))]


class Auto:
    """It decides for one model, and keeps what it needs for that."""

    def __init__(
        self,
        model: str,
        prefill: Policy,
        links: Links,
        *,
        random: Random,
        time: Callable[[], float],
    ) -> None:
        """`prefill` is the policy that chooses prefill workers."""
        self._time = time
        self._links = links
        self._view = prefill if isinstance(prefill, Prefix) else shadow(model, "prefill", random, time)
        self.is_apart = self._view is not prefill  # what it reckons with is not what chooses
        self._caches = shadow(model, "decode", random, time)
        self._sites: dict[str, Site] = {}
        self._mean_tokens = 0.0  # of prompts
        self._most = 0.0  # workers that could serve a request alone, of late

    # --- deciding -------------------------------------------------------------------------------

    def ask(
        self,
        request: Request,
        prefill: Sequence[Worker],
        alone: Sequence[Worker],
        prices: Appraisal | None = None,
    ) -> Question:
        """Look at what a request would find; nothing is changed. `prices` are given if the policy of prefill
        workers has just appraised them.
        """
        if not isinstance(prices, PrefixAppraisal) or self.is_apart:
            prices = self._view.appraise(request, prefill)
        return Question(alone, prices, self._caches.appraise(request, alone))

    def verdict(self, asked: Question, index: int, transfer_s: float | None) -> Verdict:
        """Decide who serves a request; nothing is changed.

        `index` is that of the prefill worker that would serve it. `transfer_s` is None if it is not known who
        would decode.
        """
        look = asked.prices.look(index)
        queued = self._view.queued
        if transfer_s is None:
            transfer_s = self._links.mean_s(look.tokens)
        return Verdict(self._best_local(asked), Remote(look.wait_s, look.prefill_s(), queued, transfer_s))

    def locals_of(self, asked: Question) -> list[Local]:
        """Return what each worker that was looked at would cost alone."""
        now = self._time()
        return [self._local(asked, entry, now) for entry in range(len(asked.caches.indexes))]

    def _best_local(self, asked: Question) -> Local:
        now = self._time()
        best = self._local(asked, 0, now)
        least, trial = best.cost, Local()
        for entry in range(1, len(asked.caches.indexes)):
            self._fill(trial, asked, entry, now)
            cost = trial.cost
            if cost < least:
                best, trial, least = trial, best, cost
        return best

    def _local(self, asked: Question, entry: int, now: float) -> Local:
        made = Local()
        self._fill(made, asked, entry, now)
        return made

    def _fill(self, local: Local, asked: Question, entry: int, now: float) -> None:
        """Have `local` be what an entry of the appraisal would cost alone."""
        index, cached = asked.caches.indexes[entry], asked.caches.cached[entry]
        worker = asked.alone[index]
        site = self._site(worker)
        own_s = seconds(asked.caches.asked.tokens, cached)
        active = site.active(worker.in_flight, now)
        stretched = stretch(own_s, active, active * self._mean_tokens)
        local.index, local.cached = index, cached
        local.queue_s, local.own_s = site.left_s(now) / stretched, own_s * self._rate(site)
        local.stretched, local.active = stretched, active

    def _rate(self, site: Site) -> float:
        """Return how fast a worker prefills; as the prefill workers do, as long as it has not shown it."""
        return site.rate if site.seen else self._view.scale

    def _site(self, worker: Worker) -> Site:
        found = self._sites.get(worker.name)
        if found is None:
            found = self._sites[worker.name] = Site()
        return found

    # --- what was decided -----------------------------------------------------------------------

    def pair(
        self,
        asked: Question,
        index: int,
        prefill: Choice[Worker] | None,
        decode: Choice[Worker],
        verdict: Verdict,
        why: object | None,
    ) -> Plan:
        """Have two workers serve a request. `index` is that of the prefill worker; `prefill` is its choice,
        None if it is still to be made, for the reason `why`.
        """
        reckoned = asked.prices.take(index, why)
        site = self._site(decode.worker)
        self._note_cached(asked.caches, decode.worker)
        return Plan(
            PrefillWatched(prefill or reckoned, reckoned, self._view, site, verdict),
            DecodeWatched(decode, self._view, site, None),
            None,
            self._links,
        )

    def appraise_alone(self, request: Request, alone: Sequence[Worker]) -> PrefixAppraisal:
        """Look at what a request that one worker has to serve would find."""
        return self._caches.appraise(request, alone)

    def whole(self, caches: PrefixAppraisal, choice: Choice[Worker], reason: str) -> Plan:
        """Have one worker serve a request; it is one of those that `caches` are of."""
        now = self._time()
        site = self._site(choice.worker)
        active = site.active(choice.worker.in_flight, now)
        look = self._note_cached(caches, choice.worker)
        own_s = seconds(look.tokens, look.matched)
        stretched = stretch(own_s, active, active * self._mean_tokens)
        prefill = site.begin(own_s * stretched, self._rate(site), now)
        return WholePlan(None, DecodeWatched(choice, self._view, site, prefill), reason, self._links)

    def _note_cached(self, caches: PrefixAppraisal, worker: Worker) -> PrefixChoice:
        """Note that the KV cache of a prompt will be with a worker; return what was there of it."""
        candidates = caches.asked.candidates
        choice = caches.take(index_of(candidates, worker))
        choice.ended(Outcome(_CANCELLED, self._time()))  # how long it takes is not reckoned there
        tokens = choice.tokens
        self._mean_tokens += (tokens - self._mean_tokens) * (NEWEST if self._mean_tokens else 1.0)
        self._most = max(
            self._most * WANING, float(len(candidates))
        )  # a request may have few, where many are there
        if len(self._sites) > 2 * self._most + SPARE:
            self._sites = {name: site for name, site in self._sites.items() if site.legs}
        return choice


def index_of(workers: Sequence[Worker], worker: Worker) -> int:
    """Return at which place of `workers` a worker is; it is there."""
    index = 0
    while workers[index] is not worker:
        index += 1
    return index


def chosen_alone(
    policy: Policy, request: Request, alone: Sequence[Worker], index: int, why: object
) -> Choice[Worker]:
    """Choose the worker with this index, and have the policy of decode workers know of it."""
    appraisal = policy.appraise(request, alone)
    return Reasoned(alone[index], why) if appraisal is None else appraisal.take(index, why)
