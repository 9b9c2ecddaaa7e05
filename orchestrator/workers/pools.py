"""A model's pools hold, by role, the workers that requests can be sent to now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.routing.policies.base import RANKED
from orchestrator.wire.info import Role
from orchestrator.workers.ranking import LoadRanking
from orchestrator.workers.states import NEVER, WorkerState
from orchestrator.workers.worker import OwnWorker, Worker

ROLES: Final[tuple[Role, ...]] = ("prefill", "decode", "both")
MAX_REST_S: Final = 60.0  # a worker may ask for more, but its probes say more of it than that
MIN_SHARE: Final = 0.125  # of a worker that has just come back: one turn in eight
MOST_KNOWN: Final = 16  # tuples of candidates that are kept: the same ones are mostly asked for again


class Usual:
    """These are the candidates of a role while nobody comes or goes, or begins to rest: all, or all but some
    of those in slow start, with some of those on trial.
    """

    __slots__ = ("_known", "_ranking", "all", "cold")

    def __init__(self, workers: tuple[Worker, ...], cold: list[Worker], ranking: LoadRanking | None) -> None:
        """`cold` are those in slow start, some of which may not be so any more when they are looked at.
        `ranking` has all workers of the pool.
        """
        self.all = workers
        self.cold = cold
        self._ranking = ranking
        self._known: dict[tuple[tuple[Worker, ...], tuple[Worker, ...]], tuple[Worker, ...]] = {}
        self._let_rank(workers)

    def without(self, out: list[Worker], trials: list[Worker]) -> tuple[Worker, ...]:
        """Return all but those that are out, and then those on trial; the same ones are the same tuple."""
        if not out and not trials:
            return self.all
        key = (tuple(out), tuple(trials))
        found = self._known.get(key)
        if found is None:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            found = self._known[key] = self._made(set(out), trials)
        return found

    def _made(self, out: set[Worker], trials: list[Worker]) -> tuple[Worker, ...]:
        found = tuple([worker for worker in self.all if worker not in out] + trials)
        if not trials:  # they are not in the ranking
            self._let_rank(found)
        return found

    def _let_rank(self, part: tuple[Worker, ...]) -> None:
        if self._ranking is not None:
            self._ranking.know(part)


class Pools:
    """The registry updates the pools of a model whenever a state changes: tuples are replaced, never changed.

    While `is_steady`, every worker in the tuples takes its full share, and there is no other. Otherwise
    `candidates` says who may take the next request.
    """

    __slots__ = (
        "_is_prefill_lost",
        "_on_update",
        "_prefills_locally",
        "_ranks",
        "_resting",
        "_seats",
        "_slow_start_s",
        "_time",
        "_trials",
        "_usual",
        "_warm_at",
        "both",
        "decode",
        "is_steady",
        "max_model_len",
        "model",
        "others",
        "prefill",
    )

    def __init__(
        self,
        model: str,
        health: HealthConfig,
        routing: RoutingConfig,
        *,
        time: Callable[[], float],
        ranks: bool = False,
    ) -> None:
        """`health` and `routing` are the config's sections. With `ranks` large pools are kept in order of
        load; a worker is in one such `Pools` only.
        """
        self._ranks = ranks
        self._usual: dict[Role, Usual] = {}
        self.model = model
        self.prefill: tuple[Worker, ...] = ()
        self.decode: tuple[Worker, ...] = ()
        self.both: tuple[Worker, ...] = ()
        self.others: tuple[Worker, ...] = ()  # all that are in none of these
        self.max_model_len = sys.maxsize  # what all who decode take, in tokens of prompt and answer
        self.is_steady = True
        self._is_prefill_lost = False  # workers have served as prefill, and none does now
        self._on_update: list[Callable[[], None]] = []
        self._trials: dict[Role, list[Worker]] = {}
        self._seats: Mapping[Role, int] = {}  # of each worker; see `has_room`
        self._resting: dict[Worker, float] = {}  # until when they asked not to be sent more
        self._warm_at = NEVER  # when the last slow start is over
        self._time = time
        self.reconfigure(health, routing)

    def on_update(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever other workers may be in use."""
        self._on_update.append(callback)

    def reconfigure(self, health: HealthConfig, routing: RoutingConfig) -> None:
        """Go by these sections from the next `update` on."""
        self._slow_start_s = health.slow_start_s
        # Whether decode workers prefill while no prefill worker is left.
        self._prefills_locally = routing.disaggregate != "strict"
        self._usual = {}

    def update(self, members: Iterable[Worker]) -> None:
        """Sort all workers of the model into the pools. Only the registry calls this."""
        by_role: dict[Role, list[Worker]] = {role: [] for role in ROLES}
        for worker in members:
            by_role[worker.address.role].append(worker)
        self.prefill, self.decode, self.both = (_in_use(by_role[role]) for role in ROLES)
        lengths = [worker.introduction.max_model_len or sys.maxsize for worker in (*self.decode, *self.both)]
        self.max_model_len = min(lengths, default=sys.maxsize)
        in_use = {*self.prefill, *self.decode, *self.both}
        self.others = tuple(w for found in by_role.values() for w in found if w not in in_use)
        self._is_prefill_lost = not self.prefill and any(worker.epoch for worker in by_role["prefill"])
        self._trials = {role: _on_trial(found) for role, found in by_role.items() if _on_trial(found)}
        warm_from = max((worker.warm_from for worker in in_use), default=NEVER)
        self._warm_at = warm_from + self._slow_start_s
        self._usual = {}
        if self._ranks:
            for workers in (self.prefill, self.decode, self.both):
                _rank(workers)
            _enter(None, self.others)
        self._settle(self._time())
        for callback in self._on_update:
            callback()

    def rest(self, worker: Worker, seconds: float) -> None:
        """Let a worker rest that said for how long it is too busy: it is not chosen if there is any other."""
        if worker not in self._resting:
            self._usual = {}
        self._resting[worker] = self._time() + min(seconds, MAX_REST_S)
        self.is_steady = False

    def _settle(self, now: float) -> None:
        if self._resting:
            resting = {worker: until for worker, until in self._resting.items() if until > now}
            if len(resting) < len(self._resting):
                self._resting = resting
                self._usual = {}
        self.is_steady = not self._trials and not self._resting and now >= self._warm_at

    def problem(self) -> str | None:
        """Return why no request for this model can be served as it should be; None if there is a whole path.

        Decode workers alone are one only if there have been prefill workers: a start waits for these.
        """
        if self.both or (self.prefill and self.decode):
            return None
        if self.decode and self._is_prefill_lost and self._prefills_locally:
            return None
        return self.missing()

    def missing(self) -> str:
        """Return in words which of the two legs nobody serves."""
        missing = [role for role in ("prefill", "decode") if not getattr(self, role)]
        return f"no {' and no '.join(missing)} worker is ready"

    def candidates(self, role: Role, avoid: Collection[Worker] = ()) -> tuple[Worker, ...]:
        """Return who may take the next request: not those in `avoid`, nor those at rest, if there is any
        other.

        A worker in slow start is among them as often as its share says, and whenever all others are full;
        one on trial while it has no leg.
        """
        now = self._time()
        self._settle(now)
        if not avoid:
            return self._usually(role, now)
        workers = self._of(role)
        others = [worker for worker in workers if worker not in avoid]
        others = [worker for worker in others if worker not in self._resting] or others
        has_warm = self._has_warm(others, now)
        found = [worker for worker in others if not has_warm or self._has_turn(worker, now)]
        if not any(self.has_room(worker) for worker in found):
            found = [worker for worker in others if self.has_room(worker)] or found
        found += [w for w in self._trials.get(role, ()) if w not in avoid and not w.legs]
        return tuple(found or others) or workers

    def _usually(self, role: Role, now: float) -> tuple[Worker, ...]:
        """Return the same where nobody is avoided, without a look at each of them."""
        usual = self._usual.get(role)
        if usual is None:
            usual = self._usual[role] = self._made_usual(role, now)
        cold = [worker for worker in usual.cold if now - worker.warm_from < self._slow_start_s]
        out: list[Worker] = []
        if len(cold) < len(usual.all):
            out = [worker for worker in cold if not self._has_turn(worker, now)]
        free = [worker for worker in out if self.has_room(worker)]
        if free and not self._is_any_free(usual.without(out, [])):
            return (*free, *self._free_trials(role))
        return usual.without(out, self._free_trials(role))

    def _made_usual(self, role: Role, now: float) -> Usual:
        workers = self._of(role)
        others = tuple([worker for worker in workers if worker not in self._resting])
        if not others or len(others) == len(workers):
            others = workers
        cold = [worker for worker in others if now - worker.warm_from < self._slow_start_s]
        return Usual(others, cold, _ranking_of(workers) if self._ranks else None)

    def _free_trials(self, role: Role) -> list[Worker]:
        trials = self._trials.get(role)
        return [worker for worker in trials if not worker.legs] if trials else []

    def _is_any_free(self, workers: tuple[Worker, ...]) -> bool:
        ranking = _ranking_of(workers)
        least: Worker | None = None if ranking is None else ranking.least(workers, 0)
        if least is not None:
            return self.has_room(least)
        return any(self.has_room(worker) for worker in workers)

    def preview(self, role: Role, avoid: Collection[Worker] = ()) -> tuple[Worker, ...]:
        """Return the `candidates` that a request would have now; nobody's turn comes nearer by that."""
        workers = self._of(role)
        if not avoid and self.is_steady:
            return workers
        credits = [worker.credit for worker in workers]
        found = self.candidates(role, avoid)
        for worker, credit in zip(workers, credits, strict=True):
            worker.credit = credit
        return found

    def rests_s(self, worker: Worker) -> float:
        """Return for how many seconds a worker has asked not to be sent more."""
        return max(self._resting.get(worker, NEVER) - self._time(), 0.0)

    def allot(self, seats: Mapping[Role, int]) -> None:
        """Let each worker have so many seats, by role."""
        self._seats = seats

    def has_room(self, worker: Worker) -> bool:
        """Tell whether a worker could begin with one more at once. One that prefills takes one prompt after
        another.
        """
        role = worker.address.role
        return worker.in_flight < (1 if role == "prefill" else self._seats.get(role, sys.maxsize))

    def share(self, worker: Worker) -> float:
        """Return how much of its usual part a worker takes now, from `MIN_SHARE` to 1.

        Slow start shifts load to warm peers: without any it takes all of its part.
        """
        now = self._time()
        peers = self._of(worker.address.role)
        return self._ramp(worker, now) if self._has_warm(peers, now) else 1.0

    def _has_warm(self, workers: Sequence[Worker], now: float) -> bool:
        return any(now - worker.warm_from >= self._slow_start_s for worker in workers)

    def _ramp(self, worker: Worker, now: float) -> float:
        warm_s = now - worker.warm_from
        if warm_s >= self._slow_start_s:
            return 1.0
        return max(warm_s / self._slow_start_s, MIN_SHARE)

    def _has_turn(self, worker: Worker, now: float) -> bool:
        share = self._ramp(worker, now)
        if share == 1.0:
            return True
        worker.credit += share
        if worker.credit < 1.0:
            return False
        worker.credit -= 1.0
        return True

    def _of(self, role: Role) -> tuple[Worker, ...]:
        workers: tuple[Worker, ...] = getattr(self, role)
        return workers


def _in_use(members: list[Worker]) -> tuple[Worker, ...]:
    """Return those that are ready; if there is none, those that are only suspected."""
    for state in (WorkerState.READY, WorkerState.SUSPECT):
        if found := tuple(worker for worker in members if worker.state is state):
            return found
    return ()


def _rank(workers: tuple[Worker, ...]) -> None:
    """Have large pools kept in order of load. Where several processes serve nobody hears of all changes."""
    _enter(LoadRanking(workers) if len(workers) > RANKED else None, workers)


def _enter(ranking: LoadRanking | None, workers: tuple[Worker, ...]) -> None:
    for place, worker in enumerate(workers):
        if isinstance(worker, OwnWorker):
            worker.ranking, worker.place = ranking, place


def _ranking_of(workers: tuple[Worker, ...]) -> LoadRanking | None:
    first = workers[0] if workers else None
    return first.ranking if isinstance(first, OwnWorker) else None


def _on_trial(members: list[Worker]) -> list[Worker]:
    return [worker for worker in members if worker.state is WorkerState.PROBING]
