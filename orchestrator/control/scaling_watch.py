"""A watch reports to the planner of workers how they and their queues are, and tells what it wants."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from orchestrator.config.options import Config
from orchestrator.scaling.planner import ScalingPlanner
from orchestrator.scaling.reports import Report, WorkerReport, stage_of
from orchestrator.scaling.roles import Wish
from orchestrator.telemetry import counters
from orchestrator.telemetry.counters import Layout, histogram_cells
from orchestrator.telemetry.events import Events
from orchestrator.wire.info import Role
from orchestrator.workers.registry import Registry

LOOK_S: Final = 0.5  # between two reports: of shorter prompts some are not seen
# Requests with these ends were let in; what was refused never was.
LET_IN: Final = ("200", "499", "500", "502", "504")

_log = logging.getLogger("baton.scaling")
_FIRST_BUCKETS: Final = histogram_cells(counters.STAGE_BOUNDS) - 1  # what follows is the sum
_GAP_BUCKETS: Final = histogram_cells(counters.GAP_BOUNDS) - 1


class ScalingWatch:
    """It belongs to the process that probes workers. Without a section `scaling` it does nothing."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        layout: Layout,
        counts: Callable[[], Sequence[int]],
        events: Events,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts` gives the row of `layout`, of all processes."""
        self._registry = registry
        self._layout = layout
        self._counts = counts
        self._events = events
        self._clock = clock
        self._models = [model.name for model in config.models]
        self._planner = None if config.scaling is None else ScalingPlanner(config, config.scaling)
        self._told: dict[tuple[str, Role], int] = {}
        self._let_in = [_cells(layout, model, LET_IN) for model in range(len(self._models))]
        self._answered = [_cells(layout, model, LET_IN[:1]) for model in range(len(self._models))]

    async def run(self) -> None:
        """Report until cancelled."""
        while self._planner is not None:
            self.look()
            await asyncio.sleep(LOOK_S)
        await asyncio.Event().wait()  # whoever runs it takes its end for a reason to end as well

    def look(self) -> None:
        """Report of all models, and tell what is wanted now if that is news."""
        if self._planner is None:
            return
        row, moment = self._counts(), self._clock()
        decided = [
            self._planner.note(model, self._report(index, model, row, moment))
            for index, model in enumerate(self._models)
        ]
        if any(decided):
            for wish in self.wishes():
                self._tell(wish)

    def wishes(self) -> Sequence[Wish]:
        """Return what is wanted of each role, and why; nothing without a section `scaling`."""
        return [] if self._planner is None else self._planner.wishes()

    def reconfigure(self, config: Config) -> None:
        """Go by this config's section from now on."""
        if self._planner is not None and config.scaling is not None:
            self._planner.reconfigure(config.scaling)

    def _tell(self, wish: Wish) -> None:
        before = self._told.get((wish.model, wish.role))
        self._told[wish.model, wish.role] = wish.wanted
        if before is None or before == wish.wanted:
            return
        pool = f"{wish.model}/{wish.role}"
        text = f"{pool}: {wish.wanted} workers are wanted, {before} before: {wish.why}"
        _log.info("%s", text)
        self._events.note("scaling.wanted", text, subject=pool)

    def _report(self, index: int, model: str, row: Sequence[int], moment: float) -> Report:
        layout, answers = self._layout, self._layout.answer_cell(index)
        queued, let_in = row[layout.queue_cell(index)], sum(row[cell] for cell in self._let_in[index])
        first, gaps = answers + counters.FIRST_TOKEN, answers + counters.INTER_TOKEN
        tokens, cached = row[answers + counters.PROMPT_TOKENS], row[answers + counters.CACHED_TOKENS]
        return Report(
            moment=moment,
            workers=list(self._workers(model)),
            queued=queued,
            entered=max(0, let_in + row[layout.in_flight + index] - queued),
            answered=sum(row[cell] for cell in self._answered[index]),
            new_tokens=max(0, tokens - cached),
            first_tokens=row[first : first + _FIRST_BUCKETS],
            gaps=row[gaps : gaps + _GAP_BUCKETS],
            gaps_s=row[gaps + _GAP_BUCKETS] / 1e6,
        )

    def _workers(self, model: str) -> Iterator[WorkerReport]:
        for worker in self._registry.workers:
            legs, address = worker.in_flight, worker.address
            stage = stage_of(worker.state, legs) if address.model == model else None
            if stage is not None:
                yield WorkerReport(address.role, stage, legs, worker.legs)


def _cells(layout: Layout, model: int, statuses: Sequence[str]) -> Sequence[int]:
    """Return the cells of a model's requests that ended with one of these statuses."""
    places = [layout.statuses.index(status) for status in statuses]
    return [
        layout.request_cell(model, endpoint) + place
        for endpoint in range(len(layout.endpoints))
        for place in places
    ]
