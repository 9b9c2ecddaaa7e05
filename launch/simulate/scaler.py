"""A scaler adds and drains the workers of a simulated site as the orchestrator's planner wants it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from launch.simulate.site import Site
from launch.simulate.tally import Tally
from orchestrator.config.options import Config, ModelConfig, ScalingConfig
from orchestrator.scaling.planner import ScalingPlanner
from orchestrator.scaling.reports import Report, WorkerReport, stage_of
from orchestrator.scaling.roles import Wish
from orchestrator.wire.info import Role
from orchestrator.workers.states import WorkerState
from orchestrator.workers.worker import Worker

LOOK_S: Final = 1.0  # between two reports


class Change:
    """So many workers of a role were wanted from a moment on, in seconds from the start."""

    __slots__ = ("at_s", "role", "wanted", "why")

    def __init__(self, at_s: float, wish: Wish) -> None:
        self.at_s = at_s
        self.role = wish.role
        self.wanted = wish.wanted
        self.why = wish.why


class Scaler:
    """It looks at a site from its first request to its last one."""

    def __init__(
        self,
        site: Site,
        config: Config,
        model: ModelConfig,
        options: ScalingConfig,
        start_s: float,
        counted_s: float = 0.0,
    ) -> None:
        """A worker takes requests `start_s` after it was wanted. Looks are counted from `counted_s` on."""
        self.changes: list[Change] = []
        self.looks: Counter[Role] = Counter()  # at a worker each, also before it was ready
        self._site = site
        self._model = model.name
        self._planner = ScalingPlanner(config.model_copy(update={"models": [model]}), options)
        self._start_s = start_s
        self._counted_s = counted_s
        self._began = site.clock.now
        self._wanted: dict[Role, int] = {}
        site.tally = Tally()
        site.clock.at(site.clock.now, self._look, None)

    def _look(self, _: object) -> None:
        site = self._site
        site.registry.settle()
        for front in site.fronts:
            front.admission.sweep()
        if site.clock.is_over:
            return
        is_counted = site.clock.now - self._began >= self._counted_s
        for worker in site.registry.workers:
            self.looks[worker.address.role] += is_counted
        if self._planner.note(self._model, self._report()):
            for wish in self._planner.wishes():
                self._follow(wish)
        site.clock.at(site.clock.now + LOOK_S, self._look, None)

    def _report(self) -> Report:
        site, tally = self._site, self._site.tally
        assert tally is not None  # noqa: S101  # for the type checker
        return Report(
            moment=site.clock.now,
            workers=list(_reports(site)),
            queued=sum(front.gate.waiting for front in site.fronts),
            entered=tally.entered,
            answered=tally.answered,
            new_tokens=tally.new_tokens,
            first_tokens=tally.first_tokens(),
            gaps=tally.gaps(),
            gaps_s=tally.gaps_s,
        )

    def _follow(self, wish: Wish) -> None:
        if self._wanted.get(wish.role) != wish.wanted:
            self._wanted[wish.role] = wish.wanted
            self.changes.append(Change(self._site.clock.now - self._began, wish))
        there = [
            worker
            for worker in self._site.registry.workers
            if worker.address.role == wish.role and not worker.is_leaving
        ]
        for _ in range(wish.wanted - len(there)):
            self._start(wish.role)
        there.sort(key=lambda worker: (worker.state is WorkerState.READY, -worker.slot))
        for worker in there[: max(0, len(there) - wish.wanted)]:
            self._site.registry.remove(worker)

    def _start(self, role: Role) -> None:
        clock = self._site.clock
        clock.at(clock.now + self._start_s, self._ready, self._site.add(role))

    def _ready(self, worker: Worker) -> None:
        if worker in self._site.registry.workers and not worker.is_leaving:
            self._site.registry.judge.mark_ready(worker)


def _reports(site: Site) -> Iterator[WorkerReport]:
    for worker in site.registry.workers:
        stage = stage_of(worker.state, worker.in_flight)
        if stage is not None:
            yield WorkerReport(worker.address.role, stage, worker.in_flight, worker.in_flight)
