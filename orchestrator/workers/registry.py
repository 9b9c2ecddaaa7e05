"""The registry knows all workers, what happens to them, and for each model those that take requests.

Their states change as `workers/states.py` has them: by what probes say (`workers/health.py`) and legs see,
both of which the judge hears (`workers/judge.py`), and by the operator. Where several processes serve, the
supervisor's registry decides, and those of the processes follow (`processes/membership.py`); what their legs
see they act upon at once, and report.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from random import Random

from orchestrator.config.addresses import WorkerAddress
from orchestrator.config.options import HealthConfig, RoutingConfig
from orchestrator.errors import Conflict
from orchestrator.wire.info import Role
from orchestrator.workers import lifecycle
from orchestrator.workers.adapters import Adapters
from orchestrator.workers.introduction import Introduction
from orchestrator.workers.judge import Judge
from orchestrator.workers.news import News
from orchestrator.workers.pools import Pools
from orchestrator.workers.reports import Reports
from orchestrator.workers.roster import Roster
from orchestrator.workers.snapshot import WorkerSnapshot, WorkerStatus
from orchestrator.workers.sources import SourceStatus
from orchestrator.workers.states import Event, WorkerState
from orchestrator.workers.troubles import ENDED
from orchestrator.workers.worker import SharedLoad, Worker

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
        self.health = health or HealthConfig()
        self._routing = routing or RoutingConfig()
        self.pools = {model: self._made_pools(model) for model in models}
        self.adapters = Adapters(dict.fromkeys(self.pools, ()) | dict(adapters or {}), self._made_pools)
        self.news = News()
        self.sources: Sequence[SourceStatus] = ()  # that find workers; `orchestrator/discovery` keeps them
        self.judge = Judge(
            self._roster,
            self.news,
            self._refresh,
            self.health,
            self._routing,
            time=time,
            random=random or Random(),  # noqa: S311  # no secret
        )
        self.reports = Reports(self.judge, self.news, self._routing)
        self.reports.hear(self.workers)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Return all workers; the tuple is replaced when one comes or goes, never changed."""
        return self._roster.workers

    def reconfigure(self, health: HealthConfig, routing: RoutingConfig) -> None:
        """Judge workers by these sections from now on; what was decided stays."""
        self.health = health
        self._routing = routing
        self.judge.reconfigure(health, routing)
        self.reports.reconfigure(routing, self.workers)
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

    def announce(self, worker: Worker, introduction: Introduction) -> None:
        """Note what a worker says of itself, and tell of it."""
        before, revision = worker.introduction.adapters, worker.revision
        worker.announce(introduction)
        if introduction.adapters != before or worker.revision != revision:  # pools are made anew
            self._refresh(worker.address.model)
        self.news.announced.tell(worker)
        self.news.changed.tell()

    def rest(self, worker: Worker, seconds: float) -> None:
        """Let a worker rest that said for how long it is too busy; see `Pools.rest`."""
        self.pools[worker.address.model].rest(worker, seconds)
        self.adapters.rest(worker, seconds)

    # --- what no call tells of ------------------------------------------------------------------

    async def settle_forever(self) -> None:
        """Notice what no call tells of, until cancelled; see `settle`."""
        while True:
            await asyncio.sleep(SETTLE_S)
            self.settle()

    def settle(self) -> None:
        """End trials that succeeded, and let workers go that were to leave and are free."""
        for worker in self.workers:
            if lifecycle.is_proven(worker):
                self.judge.note(worker, Event.PROVEN)
            if worker.is_leaving and not worker.legs:
                self._drop(worker)

    # --- what the operator wants ----------------------------------------------------------------

    def drain(self, worker: Worker) -> None:
        """Send a worker no new legs until `undrain`, also if it is restarted; legs under way go on."""
        worker.is_drained = True
        self.judge.note(worker, Event.DRAIN)

    def undrain(self, worker: Worker) -> None:
        """Let a worker serve again: at once as the last of its pool, else when a probe has found it well. One
        that drains itself goes on with that.

        Raises `Conflict` if it is being removed.
        """
        if worker.is_leaving:
            raise Conflict(f"{worker.name} is being removed")
        worker.is_drained = False
        if not worker.reported.drains_itself:
            self.judge.note(worker, Event.UNDRAIN)

    def at(self, model: str, role: Role, url: str) -> Worker | None:
        """Return the worker that serves `model` in this role at `url`, also one that is being removed."""
        return self._roster.at(model, role, url)

    def all_at(self, model: str, role: Role, url: str) -> list[Worker]:
        """Return the same, all data-parallel engines of it."""
        return self._roster.all_at(model, role, url)

    def of_pool(self, model: str, role: Role) -> list[Worker]:
        """Return all workers of a model and role, also those that are being removed."""
        return self._roster.of_pool(model, role)

    def next_index(self, model: str, role: Role) -> int:
        """Return the index that goes into the name of the next worker to be added."""
        return self._roster.next_index(model, role)

    def has_room(self, count: int) -> bool:
        """Return whether so many workers can be added; only shared memory has bounds."""
        return self._roster.has_room(count)

    def add(self, address: WorkerAddress, epoch: int = 0) -> Worker:
        """Add a worker; it serves once a probe has found it well. `epoch` is that of an earlier one of the
        same name, so that nothing that was seen of that one is taken for news of this one.

        Raises `Conflict` if it is there already, or if shared memory has no room for it.
        """
        worker = self._roster.add(address)
        worker.epoch = epoch
        self.reports.hear([worker])
        self.news.added.tell(worker)
        self.news.changed.tell()
        return worker

    def remove(self, worker: Worker) -> None:
        """Drain a worker, and forget it once its legs have ended; `settle` sees to that."""
        worker.is_leaving = True
        self.drain(worker)

    def keep(self, worker: Worker) -> None:
        """Let a worker stay and serve that was being removed, and whose legs have not all ended yet."""
        worker.is_leaving = False
        self.undrain(worker)

    def lose(self, worker: Worker, why: str) -> None:
        """Forget a worker at once whose process has ended, or whose address is that of another one now.

        Its legs are given up as soon as they are silent for `limits.leg_silence_s`, and no hand-off from it
        is sent any more.
        """
        self.judge.mark_gone(worker, why, ENDED.what)
        lifecycle.end(worker)
        self._drop(worker)

    # --- what another registry decides ----------------------------------------------------------

    def follow(self, snapshots: Sequence[WorkerSnapshot]) -> None:
        """Take over what the process that probes knows: who is there, and how each is."""
        known = {(worker.slot, worker.address): worker for worker in self.workers}
        taken = {value for snapshot in snapshots for value in (snapshot.address.name, snapshot.address.url)}
        # First, so that nobody hears of two workers of one name.
        for key in known.keys() - {(snapshot.slot, snapshot.address) for snapshot in snapshots}:
            self._let_go(known.pop(key), taken)
        before: dict[Worker, WorkerState] = {}
        for snapshot in snapshots:
            worker = known.get((snapshot.slot, snapshot.address))
            if worker is None:
                worker = self._roster.enter(snapshot.address, snapshot.slot)
                self.reports.hear([worker])
            before[worker] = worker.state
            self._adopt(worker, snapshot)
        for model in {worker.address.model for worker in before}:  # once: there may be thousands of workers
            self._refresh(model)
        for worker, state in before.items():
            if lifecycle.is_out(state, worker.state):
                self.news.gone.tell(worker)

    def _let_go(self, worker: Worker, taken: AbstractSet[str]) -> None:
        """Drop a worker that is not there any more: it has ended if another one has its name or its URL."""
        if not taken.isdisjoint((worker.name, worker.address.url)):
            lifecycle.end(worker)
        self._drop(worker)

    def _adopt(self, worker: Worker, snapshot: WorkerSnapshot) -> None:
        life = lifecycle.followed(worker, snapshot)
        if life is None:
            return
        worker.become(life)
        self.announce(worker, Introduction(snapshot.info, snapshot.max_model_len, snapshot.adapters))
        worker.last_error, worker.reason = snapshot.last_error, snapshot.reason
        worker.is_drained, worker.reported.drains_itself = snapshot.is_drained, snapshot.drains_itself
        worker.reported.senders = snapshot.senders
        if worker.is_denied and worker.state is WorkerState.READY:
            self.judge.note_cleared(worker)

    def _drop(self, worker: Worker) -> None:
        self._roster.drop(worker)
        self._refresh(worker.address.model)
        self.news.removed.tell(worker)
        self.judge.forget(worker)
        self.news.changed.tell()

    def _refresh(self, model: str) -> None:
        members = tuple(self._roster.of_model(model))
        self.pools[model].update(members)
        self.adapters.update(model, members)
