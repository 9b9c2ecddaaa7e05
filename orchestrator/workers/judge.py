"""A judge decides, by what is seen of workers, which state each of them is in."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.workers import lifecycle
from orchestrator.workers.compatibility import Misfit, misfits
from orchestrator.workers.lifecycle import Situation
from orchestrator.workers.news import News
from orchestrator.workers.roster import Roster
from orchestrator.workers.states import NEVER, SERVING, Event, WorkerState
from orchestrator.workers.troubles import CUT, DENIES, REFUSES, SILENT, STALLS
from orchestrator.workers.worker import Worker

MAX_WHY = 300  # characters of `Worker.last_error`: a worker can have a part in it
WITHDRAWN = "drains itself: it wants no new requests"
CLEARED_S = 5.0  # how long a worker is left alone that a probe has cleared of having denied a leg


class Judge:
    """A judge hears what is seen of the workers of a registry, and moves them from state to state by it. Only
    a registry that follows another one does so, too.
    """

    def __init__(
        self,
        roster: Roster,
        news: News,
        refresh: Callable[[str], None],
        health: HealthConfig,
        routing: RoutingConfig,
        *,
        time: Callable[[], float],
        random: Random,
    ) -> None:
        """`refresh` sorts the workers of a model into its pools anew. `health` and `routing` are the config's
        sections, `random` makes jitter.
        """
        self._roster = roster
        self._news = news
        self._refresh = refresh
        self._time = time
        self._random = random
        self._refused: set[Worker] = set()  # for not fitting the others
        self._cleared: dict[Worker, float] = {}  # when a probe did that (`note_cleared`)
        self.reconfigure(health, routing)

    def reconfigure(self, health: HealthConfig, routing: RoutingConfig) -> None:
        """Judge workers by these sections from now on; what was decided stays."""
        self._health = health
        self._routing = routing

    def forget(self, worker: Worker) -> None:
        """Forget a worker that has been dropped; others of its pool may have to serve again now."""
        self._cleared.pop(worker, None)
        self._refused.discard(worker)
        self._keep_half(worker)

    # --- what probes see --------------------------------------------------------------------------

    def misfit(self, worker: Worker) -> Misfit | None:
        """Return why a worker, which is well and has announced itself, cannot join the others of its model;
        None if it can.

        Those that have to go in its favour are sent away here.
        """
        if not _refuses_misfits(self._routing):
            return None
        refused = [other for other in self._refused if other.state is WorkerState.UNFIT]
        others, within = self._roster.of_model(worker.address.model), self._routing.keeps_revisions
        for found in misfits(worker, others, refused, within_revision=within):
            self._refused.add(found.worker)
            if found.worker is worker:
                return found
            self.note_unfit(found.worker, found.why, found.reason)
        return None

    def mark_ready(self, worker: Worker) -> None:
        """Note that a probe found a worker well: it is ready, or on trial if it was ejected."""
        worker.answered = now = self._time()
        if lifecycle.is_standing_still(worker, now):
            return
        worker.last_error = None
        worker.reason = WITHDRAWN if worker.reported.drains_itself else None
        self._refused.discard(worker)
        self.note(worker, Event.ANSWERED)

    def note_wish(self, worker: Worker, *, wants_legs: bool) -> None:
        """Note whether a worker says that it wants new legs. One that does not gets none until it does again;
        those under way go on, and so does what was begun with others for it.
        """
        if wants_legs is not worker.reported.drains_itself:
            return
        worker.reported.drains_itself = not wants_legs
        if not wants_legs:
            worker.reason = WITHDRAWN
            self.note(worker, Event.WITHDRAWN)
        elif not worker.is_drained:
            self.note(worker, Event.UNDRAIN)

    def note_cleared(self, worker: Worker) -> None:
        """Note that a probe has shown that a worker, which had denied a leg, serves requests."""
        worker.is_denied = False
        self._cleared[worker] = self._time()

    def note_failed(self, worker: Worker, why: str, reason: str = "fails its probes") -> None:
        """Note that a probe found a worker ill, or was cut off. `reason` is for everybody, `why` is not."""
        _blame(worker, why, reason)
        self.note(worker, Event.FAILED)

    def note_unfit(self, worker: Worker, why: str, reason: str) -> None:
        """Note that a probe found somebody there who does not serve us, or not this model."""
        _blame(worker, why, reason)
        self.note(worker, Event.UNFIT)

    def note_missed(self, worker: Worker, asked: float) -> None:
        """Note that a probe begun at `asked` got no answer in its time. That may mean nothing."""
        event = lifecycle.missed(worker, asked, self._health, self._time())
        if event is not None:
            _blame(worker, "no answer to a probe", SILENT.what)
            self.note(worker, event)

    # --- what legs see ----------------------------------------------------------------------------

    def mark_gone(self, worker: Worker, why: str, reason: str = REFUSES.what) -> None:
        """Note that a connection was refused, or that the process has ended.

        A probe brings the worker back.
        """
        _blame(worker, why, reason)
        self.note(worker, Event.REFUSED)

    def note_lost(self, worker: Worker, epoch: int, why: str) -> None:
        """Note that a leg begun in `epoch` was reset or cut short; no news if the worker came back since."""
        if epoch == worker.epoch:
            if worker.state in SERVING:  # else there is a reason, of which this is but what follows
                _blame(worker, why, CUT.what)
            self.note(worker, Event.LOST)

    def note_stalled(self, worker: Worker, epoch: int, why: str) -> None:
        """Note that a hand-off begun in `epoch` did not get on: the engine may stand still."""
        self.note_seen(worker, epoch, Event.STALLED, why, STALLS.what)

    def note_denied(self, worker: Worker, epoch: int, status: int) -> None:
        """Note that a leg begun in `epoch` was answered as no worker of ours answers: a probe looks why.

        A client may have caused it, so one that a probe has just cleared of it is left alone for a while.
        """
        if epoch == worker.epoch and self._time() >= self._cleared.get(worker, NEVER) + CLEARED_S:
            worker.is_denied = True
            _blame(worker, f"answered a leg with {status}", DENIES.what)
            self.note(worker, Event.DENIED)

    def note_error(self, worker: Worker, how: str = "with a 5xx") -> None:
        """Note that a leg was answered with a 5xx, or `how`. Who sees a leg succeed sets `failures` to 0."""
        worker.failures += 1
        if lifecycle.is_erring(worker, self._health):
            _blame(worker, f"answered {worker.failures} legs in a row {how}", "answers requests with errors")
            self.note(worker, Event.ERRED)

    def note_slow(self, worker: Worker, why: str) -> bool:
        """Eject a worker that is far slower than its peers; return False if that would be beyond half of the
        pool, and it stays.
        """
        if not lifecycle.may_be_out(worker, self._roster.pool_of(worker)):
            return False
        if worker.state is WorkerState.READY:
            _blame(worker, f"far slower than its peers: {why}", "is far slower than its peers")
            self.note(worker, Event.SLOW)
        return True

    def note_seen(
        self, worker: Worker, epoch: int, event: Event, why: str | None, reason: str | None = None
    ) -> None:
        """Note what another process has seen of a worker in `epoch`."""
        if epoch == worker.epoch:
            _blame(worker, why, reason)
            worker.is_denied = worker.is_denied or event is Event.DENIED
            self.note(worker, event)

    # --- moves ------------------------------------------------------------------------------------

    def note(self, worker: Worker, event: Event) -> None:
        """Move a worker as `workers/lifecycle.py` decides, and do all that follows from it."""
        pool = self._roster.pool_of(worker)
        if event is Event.STALLED:
            worker.handoffs.stalled = self._time()
        situation = Situation(pool, self._health, self._time(), self._random)
        move = lifecycle.decide(worker, event, situation)
        worker.become(move.life)
        if move.is_change:
            self._refresh(worker.address.model)
            self._news.tell_move(worker, move)
            if worker.state is WorkerState.READY and (worker.is_drained or worker.reported.drains_itself):
                self.note(worker, Event.DRAIN if worker.is_drained else Event.WITHDRAWN)
            self._keep_half(worker)
        self._news.changed.tell()

    def _keep_half(self, worker: Worker) -> None:
        """Call a worker of the same pool back if too many are ejected now."""
        needed = lifecycle.called_back(self._roster.pool_of(worker))
        if needed is not None:
            self.note(needed, Event.NEEDED)


def _refuses_misfits(routing: RoutingConfig) -> bool:
    return routing.misfits == "refuse" and routing.disaggregate != "never"  # which hands nothing over


def _blame(worker: Worker, why: str | None, reason: str | None) -> None:
    """Note why a worker is not as it should be."""
    worker.last_error = why if why is None or len(why) <= MAX_WHY else f"{why[: MAX_WHY - 3]}..."
    worker.reason = reason
