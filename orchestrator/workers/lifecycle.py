"""This module decides from plain data what an event does to a worker; the judge applies and tells it.

The table of states (`workers/states.py`) says where an event leads. Three things go beyond it: at most half
of a pool is out on suspicion, an ejected worker is asked again later each time, and a suspect has until its
verdict to give a sign of life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from orchestrator.config.options import HealthConfig
from orchestrator.workers.snapshot import WorkerSnapshot
from orchestrator.workers.states import (
    FULL_SERVICE,
    IN_SERVICE,
    NEVER,
    ON_SUSPICION,
    REACHABLE,
    Event,
    Life,
    WorkerState,
    next_state,
)
from orchestrator.workers.worker import Worker

CLOCK_ERROR_S = 0.01  # timeouts of the event loop may come early by as much as its clock's grain
STALLED_S = 10.0  # a worker whose hand-off has stalled is suspect for so long, unless something comes from it
MAX_DOUBLINGS = 30  # far beyond any useful pause; keeps the number small

# With these a probe shows that an ejected worker is still ill; what late legs tell of it is no news.
_PROBED_ILL = frozenset({Event.FAILED, Event.MISSED, Event.SILENT})


@dataclass(frozen=True, slots=True)
class Situation:
    """What becomes of a worker depends on these, beside the worker itself."""

    pool: Sequence[Worker]  # all of its model and role, the worker among them
    health: HealthConfig
    now: float
    random: Random  # for the jitter of pauses


@dataclass(frozen=True, slots=True)
class Move:
    """A move says what an event does to a worker."""

    event: Event
    before: WorkerState
    life: Life  # from now on

    @property
    def is_change(self) -> bool:
        """Say whether the worker comes to another state; moments may have changed even if it does not."""
        return self.life.state is not self.before

    @property
    def ends_service(self) -> bool:
        """Say whether the legs on the worker are lost."""
        return is_out(self.before, self.life.state)

    @property
    def wants_probe(self) -> bool:
        """Say whether the worker is suspected by something other than a probe, so that one is due at once."""
        return self.life.state is WorkerState.SUSPECT and self.event not in _PROBED_ILL


def decide(worker: Worker, event: Event, situation: Situation) -> Move:
    """Return what `event` does to `worker`. This changes nothing but the state of `situation.random`."""
    before = worker.life()
    state = next_state(before.state, event)
    if state is WorkerState.EJECTED and not may_be_out(worker, situation.pool):
        state = WorkerState.SUSPECT
    life = replace(before, state=state)
    if state is WorkerState.EJECTED and (state is not before.state or event in _PROBED_ILL):
        life = _put_off(life, before.state, situation)
    if state is not before.state:
        life = _begin(life, worker, event, situation)
    return Move(event, before.state, life)


def followed(worker: Worker, snapshot: WorkerSnapshot) -> Life | None:
    """Return the life of a worker as the process that probes has it; states that lay in between are not seen.

    It is None if the snapshot is older than what is known here: a worker that refused us stays gone until it
    comes back.
    """
    is_outdated = worker.state is WorkerState.GONE and snapshot.epoch <= worker.epoch
    if is_outdated and snapshot.state in IN_SERVICE:
        return None
    is_same = snapshot.epoch == worker.epoch and snapshot.state is worker.state
    return replace(
        worker.life(),
        state=snapshot.state,
        epoch=snapshot.epoch,
        warm_from=snapshot.warm_from,
        failures=worker.failures if is_same else _first_failures(snapshot.state),
    )


def end(worker: Worker) -> None:
    """Note that the process of a worker has ended for good: it is out of service, and what was seen of it so
    far, hand-offs included, is of an earlier epoch.
    """
    worker.become(replace(worker.life(), state=WorkerState.GONE, epoch=worker.epoch + 1))


def is_out(before: WorkerState, after: WorkerState) -> bool:
    """Return whether a worker that goes from one state to the other falls out of service."""
    return before in IN_SERVICE and after not in IN_SERVICE


# --- what an observation is ---------------------------------------------------------------------


def missed(worker: Worker, asked: float, health: HealthConfig, now: float) -> Event | None:
    """Return what a probe means that was begun at `asked` and got no answer in its time.

    It means nothing (None) while a leg brings bytes: an API server can be too busy for probes.
    """
    if worker.heard > asked and worker.state in IN_SERVICE:
        return None
    return Event.SILENT if now >= verdict_at(worker, health) - CLOCK_ERROR_S else Event.MISSED


def is_erring(worker: Worker, health: HealthConfig) -> bool:
    """Return whether a worker answered too many legs in a row with a 5xx; on trial one is too many."""
    return worker.failures >= health.consecutive_errors or worker.state is WorkerState.PROBING


def is_standing_still(worker: Worker, now: float) -> bool:
    """Return whether a worker that answers probes is still suspect, for its engine may stand still: a
    hand-off has stalled there, and nothing has come on any leg since.
    """
    is_stalled = worker.state is WorkerState.SUSPECT and worker.heard <= worker.handoffs.stalled
    return is_stalled and now < worker.handoffs.stalled + STALLED_S


def is_proven(worker: Worker) -> bool:
    """Return whether a leg has succeeded on a worker that is on trial."""
    return worker.state is WorkerState.PROBING and not worker.failures


def verdict_at(worker: Worker, health: HealthConfig) -> float:
    """Return when a worker that gives no sign of life from now on is ejected for its silence."""
    if worker.state is not WorkerState.SUSPECT:
        return max(worker.answered, worker.heard) + health.silence_s
    suspicion = worker.suspicion
    if worker.heard > suspicion.doubted:
        return max(suspicion.verdict_at, worker.heard + health.silence_s)
    return suspicion.verdict_at


# --- half of a pool -----------------------------------------------------------------------------


def may_be_out(worker: Worker, pool: Sequence[Worker]) -> bool:
    """Return whether at most half of what is left of the pool is out, with this worker among it.

    When most workers look ill, it is more likely that the one who looks is.
    """
    others_out = sum(other.state in ON_SUSPICION for other in pool if other is not worker)
    return others_out + 1 <= _reachable(pool) // 2


def called_back(pool: Sequence[Worker]) -> Worker | None:
    """Return the worker that has to serve again, as too few others are left: the one that has failed least.

    It is None if enough are left.
    """
    out = [worker for worker in pool if worker.state in ON_SUSPICION]
    if len(out) <= _reachable(pool) // 2:
        return None
    return min(out, key=lambda worker: worker.suspicion.ejections)


def _reachable(pool: Sequence[Worker]) -> int:
    return sum(worker.state in REACHABLE for worker in pool)


# --- what belongs to a state --------------------------------------------------------------------


def pause_s(ejections: int, health: HealthConfig, random: Random) -> float:
    """Return for how many seconds a worker is left alone that was ejected so many times in a row before."""
    longest_s = min(health.eject_s * 2.0 ** min(ejections, MAX_DOUBLINGS), health.eject_max_s)
    return longest_s * random.uniform(0.5, 1.0)


def _put_off(life: Life, before: WorkerState, situation: Situation) -> Life:
    """Put the next probe of an ejected worker off: the longer, the more often it has failed in a row."""
    health, now, suspicion = situation.health, situation.now, life.suspicion
    is_forgiven = before in FULL_SERVICE and now - suspicion.serves_since > health.eject_max_s
    ejections = 0 if is_forgiven else suspicion.ejections
    retry_at = now + pause_s(ejections, health, situation.random)
    return replace(life, suspicion=replace(suspicion, ejections=ejections + 1, retry_at=retry_at))


def _begin(life: Life, worker: Worker, event: Event, situation: Situation) -> Life:
    """Set what belongs to the state that `worker`, as it still is, comes to."""
    if worker.state not in IN_SERVICE and life.state in IN_SERVICE:
        life = replace(life, epoch=life.epoch + 1)
    if worker.state not in FULL_SERVICE and life.state in FULL_SERVICE:
        life = _begin_service(life, worker, situation)
    if life.state is WorkerState.SUSPECT:
        return _doubt(life, _first_verdict(worker, event, situation), situation.now)
    if life.state is WorkerState.EJECTED:
        return life
    return replace(life, failures=_first_failures(life.state))


def _begin_service(life: Life, worker: Worker, situation: Situation) -> Life:
    now = situation.now
    is_cold = worker.state is not WorkerState.STARTING or _has_elder(worker, situation)
    suspicion = replace(life.suspicion, serves_since=now)
    return replace(life, warm_from=now if is_cold else NEVER, credit=0.0, suspicion=suspicion)


def _doubt(life: Life, verdict_at: float, now: float) -> Life:
    return replace(life, suspicion=replace(life.suspicion, doubted=now, verdict_at=verdict_at))


def _has_elder(worker: Worker, situation: Situation) -> bool:
    """Return whether another one of the pool has served for so long that a new one would be far emptier."""
    now, slow_start_s = situation.now, situation.health.slow_start_s
    return any(
        other.state in FULL_SERVICE and now - other.suspicion.serves_since >= slow_start_s
        for other in situation.pool
        if other is not worker
    )


def _first_verdict(worker: Worker, event: Event, situation: Situation) -> float:
    health = situation.health
    if event is Event.MISSED:
        return max(worker.answered, worker.heard) + health.silence_s
    is_seen_ill = event in (Event.LOST, Event.DENIED, Event.FAILED)
    return situation.now + (health.suspect_s if is_seen_ill else health.silence_s)


def _first_failures(state: WorkerState) -> int:
    """Return a worker's failures as it comes to `state`: on trial, only a success sets them to 0."""
    return int(state is WorkerState.PROBING)
