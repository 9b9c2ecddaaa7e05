"""The registry knows all workers, what happens to them, and for each model those that take requests.

States change here only, as `workers/states.py` has them: by what probes say (`workers/health.py`), by what
legs see, and by the operator. Where several processes serve, the supervisor's registry decides, and those
of the processes follow (`processes/membership.py`); what their legs see they act upon at once, and report.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.errors import Conflict
from orchestrator.wire.info import Role, WorkerInfo
from orchestrator.workers import lifecycle
from orchestrator.workers.adapters import Adapters
from orchestrator.workers.compatibility import Misfit, misfits
from orchestrator.workers.lifecycle import Situation
from orchestrator.workers.news import News
from orchestrator.workers.pools import Pools
from orchestrator.workers.roster import Roster
from orchestrator.workers.snapshot import WorkerSnapshot, WorkerStatus
from orchestrator.workers.states import NEVER, SERVING, Event, WorkerState
from orchestrator.workers.troubles import CUT, DENIES, REFUSES, SILENT, STALLS
from orchestrator.workers.worker import SharedLoad, Worker

MAX_WHY = 300  # characters of `Worker.last_error`: a worker can have a part in it
CLEARED_S = 5.0  # how long a worker is left alone that a probe has cleared of having denied a leg
SETTLE_S = 0.25  # how soon a leg that succeeded on trial, or the last leg of a leaving worker, is noticed


class Registry:
    """A registry holds all workers, and for each model those that take requests."""

    def __init__(
        self,
        addresses: Sequence[WorkerAddress],
        models: Iterable[str],
        transport: str,
        loads: Sequence[SharedLoad] | None = None,
        *,
        health: HealthConfig | None = None,
        routing: RoutingConfig | None = None,
        adapters: Mapping[str, Sequence[str]] | None = None,
        time: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        """`transport` is what the orchestrator may send: json, orjson or msgpack.

        `loads` is given where other processes send to the same workers: one load per address, and as many
        more as workers can be added. `health` and `routing` are the config's sections. `adapters` are those
        of each model in the config. `random` makes jitter.
        """
        self._roster = Roster(addresses, transport, loads)
        self._time = time
        self._random = random or Random()  # noqa: S311  # no secret
        self.health = health or HealthConfig()
        self._routing = routing or RoutingConfig()
        self._refused: set[Worker] = set()  # for not fitting the others
        self.pools = {model: self._made_pools(model) for model in models}
        self.adapters = Adapters(dict.fromkeys(self.pools, ()) | dict(adapters or {}), self._made_pools)
        self.news = News()
        self._cleared: dict[Worker, float] = {}  # when a probe did that (`note_cleared`)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Return all workers; the tuple is replaced when one comes or goes, never changed."""
        return self._roster.workers

    def reconfigure(self, health: HealthConfig, routing: RoutingConfig) -> None:
        """Judge workers by these sections from now on; what was decided stays."""
        self.health = health
        self._routing = routing
        self.adapters.reconfigure(health, routing)
        for model, pools in self.pools.items():
            pools.reconfigure(health, routing)
            self._refresh(model)

    def _made_pools(self, model: str) -> Pools:
        return Pools(model, self.health, self._routing, time=self._time)

    def part(self, pools: Pools, members: Iterable[Worker]) -> Pools:
        """Return pools of the same model for one request, with only these workers; nobody updates them."""
        made = self._made_pools(pools.model)
        made.update(members)
        return made

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(worker.status() for worker in self.workers)

    def snapshots(self) -> tuple[WorkerSnapshot, ...]:
        return tuple(worker.snapshot() for worker in self.workers)

    def find(self, name: str) -> Worker | None:
        return self._roster.find(name)

    # --- what a worker announces ----------------------------------------------------------------

    def announce(
        self,
        worker: Worker,
        info: WorkerInfo | None,
        max_model_len: int | None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """Note what a worker says of itself, and tell of it; see `Worker.announce`."""
        has_others = adapters != worker.adapters
        worker.announce(info, max_model_len, adapters)
        if has_others:
            self._refresh(worker.address.model)
        self.news.changed.tell()

    def rest(self, worker: Worker, seconds: float) -> None:
        """Let a worker rest that said for how long it is too busy; see `Pools.rest`."""
        self.pools[worker.address.model].rest(worker, seconds)
        self.adapters.rest(worker, seconds)

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

    # --- what probes see ------------------------------------------------------------------------

    def mark_ready(self, worker: Worker) -> None:
        """Note that a probe found a worker well: it is ready, or on trial if it was ejected."""
        worker.answered = now = self._time()
        if lifecycle.is_standing_still(worker, now):
            return
        worker.last_error = worker.reason = None
        self._refused.discard(worker)
        self._note(worker, Event.ANSWERED)

    def note_cleared(self, worker: Worker) -> None:
        """Note that a probe has shown that a worker, which had denied a leg, serves requests."""
        worker.is_denied = False
        self._cleared[worker] = self._time()

    def note_failed(self, worker: Worker, why: str, reason: str = "fails its probes") -> None:
        """Note that a probe found a worker ill, or was cut off. `reason` is for everybody, `why` is not."""
        _blame(worker, why, reason)
        self._note(worker, Event.FAILED)

    def note_unfit(self, worker: Worker, why: str, reason: str) -> None:
        """Note that a probe found somebody there who does not serve us, or not this model."""
        _blame(worker, why, reason)
        self._note(worker, Event.UNFIT)

    def note_missed(self, worker: Worker, asked: float) -> None:
        """Note that a probe begun at `asked` got no answer in its time. That may mean nothing."""
        event = lifecycle.missed(worker, asked, self.health, self._time())
        if event is not None:
            _blame(worker, "no answer to a probe", SILENT.what)
            self._note(worker, event)

    # --- what legs see --------------------------------------------------------------------------

    def mark_gone(self, worker: Worker, why: str, reason: str = REFUSES.what) -> None:
        """Note that a connection was refused, or that the process has ended.

        A probe brings the worker back.
        """
        _blame(worker, why, reason)
        self._note(worker, Event.REFUSED)

    def note_lost(self, worker: Worker, epoch: int, why: str) -> None:
        """Note that a leg begun in `epoch` was reset or cut short; no news if the worker came back since."""
        if epoch == worker.epoch:
            if worker.state in SERVING:  # else there is a reason, of which this is but what follows
                _blame(worker, why, CUT.what)
            self._note(worker, Event.LOST)

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
            self._note(worker, Event.DENIED)

    def note_error(self, worker: Worker, how: str = "with a 5xx") -> None:
        """Note that a leg was answered with a 5xx, or `how`. Who sees a leg succeed sets `failures` to 0."""
        worker.failures += 1
        if lifecycle.is_erring(worker, self.health):
            _blame(worker, f"answered {worker.failures} legs in a row {how}", "answers requests with errors")
            self._note(worker, Event.ERRED)

    def note_slow(self, worker: Worker, why: str) -> bool:
        """Eject a worker that is far slower than its peers; return False if that would be beyond half of the
        pool, and it stays.
        """
        if not lifecycle.may_be_out(worker, self._roster.pool_of(worker)):
            return False
        if worker.state is WorkerState.READY:
            _blame(worker, f"far slower than its peers: {why}", "is far slower than its peers")
            self._note(worker, Event.SLOW)
        return True

    def note_seen(
        self, worker: Worker, epoch: int, event: Event, why: str | None, reason: str | None = None
    ) -> None:
        """Note what another process has seen of a worker in `epoch`."""
        if epoch == worker.epoch:
            _blame(worker, why, reason)
            worker.is_denied = worker.is_denied or event is Event.DENIED
            self._note(worker, event)

    async def settle_forever(self) -> None:
        """Notice what no call tells of, until cancelled; see `settle`."""
        while True:
            await asyncio.sleep(SETTLE_S)
            self.settle()

    def settle(self) -> None:
        """End trials that succeeded, and let workers go that were to leave and are free."""
        for worker in self.workers:
            if lifecycle.is_proven(worker):
                self._note(worker, Event.PROVEN)
            if worker.is_leaving and not worker.in_flight:
                self._drop(worker)

    # --- what the operator wants ----------------------------------------------------------------

    def drain(self, worker: Worker) -> None:
        """Send a worker no new legs until `undrain`, also if it is restarted; legs under way go on."""
        worker.is_drained = True
        self._note(worker, Event.DRAIN)

    def undrain(self, worker: Worker) -> None:
        """Let a worker serve again: at once as the last of its pool, else when a probe has found it well.

        Raises `Conflict` if it is being removed.
        """
        if worker.is_leaving:
            raise Conflict(f"{worker.name} is being removed")
        worker.is_drained = False
        self._note(worker, Event.UNDRAIN)

    def at(self, model: str, role: Role, url: str) -> Worker | None:
        """Return the worker that serves `model` in this role at `url`, also one that is being removed."""
        return self._roster.at(model, role, url)

    def all_at(self, model: str, role: Role, url: str) -> list[Worker]:
        """Return the same, all data-parallel engines of it."""
        return self._roster.all_at(model, role, url)

    def next_index(self, model: str, role: Role) -> int:
        """Return the index that goes into the name of the next worker to be added."""
        return self._roster.next_index(model, role)

    def has_room(self, count: int) -> bool:
        """Return whether so many workers can be added; only shared memory has bounds."""
        return self._roster.has_room(count)

    def add(self, address: WorkerAddress) -> Worker:
        """Add a worker; it serves once a probe has found it well.

        Raises `Conflict` if it is there already, or if shared memory has no room for it.
        """
        worker = self._roster.add(address)
        self.news.added.tell(worker)
        self.news.changed.tell()
        return worker

    def remove(self, worker: Worker) -> None:
        """Drain a worker, and forget it once its legs have ended; `settle` sees to that."""
        worker.is_leaving = True
        self.drain(worker)

    # --- what another registry decides ----------------------------------------------------------

    def follow(self, snapshots: Sequence[WorkerSnapshot]) -> None:
        """Take over what the process that probes knows: who is there, and how each is."""
        known = {(worker.slot, worker.address): worker for worker in self.workers}
        before: dict[Worker, WorkerState] = {}
        for snapshot in snapshots:
            worker = known.pop((snapshot.slot, snapshot.address), None)
            if worker is None:
                worker = self._roster.enter(snapshot.address, snapshot.slot)
            before[worker] = worker.state
            self._adopt(worker, snapshot)
        for model in {worker.address.model for worker in before}:  # once: there may be thousands of workers
            self._refresh(model)
        for worker, state in before.items():
            if lifecycle.is_out(state, worker.state):
                self.news.gone.tell(worker)
        for worker in known.values():
            self._drop(worker)

    def _adopt(self, worker: Worker, snapshot: WorkerSnapshot) -> None:
        life = lifecycle.followed(worker, snapshot)
        if life is None:
            return
        worker.become(life)
        self.announce(worker, snapshot.info, snapshot.max_model_len, snapshot.adapters)
        worker.last_error, worker.reason = snapshot.last_error, snapshot.reason
        worker.is_drained = snapshot.is_drained
        if worker.is_denied and worker.state is WorkerState.READY:
            self.note_cleared(worker)

    # --- moves ----------------------------------------------------------------------------------

    def _note(self, worker: Worker, event: Event) -> None:
        """Move a worker as `workers/lifecycle.py` decides, and do all that follows from it."""
        pool = self._roster.pool_of(worker)
        if event is Event.STALLED:
            worker.stalled = self._time()
        situation = Situation(pool, self.health, self._time(), self._random)
        move = lifecycle.decide(worker, event, situation)
        worker.become(move.life)
        if move.is_change:
            self._refresh(worker.address.model)
            self.news.tell_move(worker, move)
            if worker.state is WorkerState.READY and worker.is_drained:
                self._note(worker, Event.DRAIN)
            self._keep_half(worker)
        self.news.changed.tell()

    def _keep_half(self, worker: Worker) -> None:
        """Call a worker of the same pool back if too many are ejected now."""
        needed = lifecycle.called_back(self._roster.pool_of(worker))
        if needed is not None:
            self._note(needed, Event.NEEDED)

    def _drop(self, worker: Worker) -> None:
        self._roster.drop(worker)
        self._cleared.pop(worker, None)
        self._refused.discard(worker)
        self._refresh(worker.address.model)
        self.news.removed.tell(worker)
        self._keep_half(worker)
        self.news.changed.tell()

    def _refresh(self, model: str) -> None:
        members = tuple(self._roster.of_model(model))
        self.pools[model].update(members)
        self.adapters.update(model, members)


def _refuses_misfits(routing: RoutingConfig) -> bool:
    return routing.misfits == "refuse" and routing.disaggregate != "never"  # which hands nothing over


def _blame(worker: Worker, why: str | None, reason: str | None) -> None:
    """Note why a worker is not as it should be."""
    worker.last_error = why if why is None or len(why) <= MAX_WHY else f"{why[: MAX_WHY - 3]}..."
    worker.reason = reason
