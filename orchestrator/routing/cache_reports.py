"""What routing policies know of caches is noted with the workers from time to time, for all pages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from orchestrator.routing.planner import Planner
from orchestrator.routing.policies.prediction import Prediction
from orchestrator.workers.figures import NO_FIGURES, CacheFigures
from orchestrator.workers.kv_events import KvEventFeeds
from orchestrator.workers.registry import Registry

PERIOD_S: Final = 1.0


class CacheReports:
    """Each data-plane process has one."""

    def __init__(self, registry: Registry, planners: Mapping[str, Planner], feeds: KvEventFeeds) -> None:
        self._registry = registry
        self._planners = planners
        self._feeds = feeds

    async def run(self) -> None:
        """Note what is known, until cancelled."""
        while True:
            self.note()
            await asyncio.sleep(PERIOD_S)

    def note(self) -> None:
        for worker in self._registry.workers:
            address = worker.address
            prediction = self._planners[address.model].prediction(address.role, worker.name)
            figures = self._feeds.figures(worker.name).plus(_figures(prediction))
            worker.note_cache_figures(figures)


def _figures(prediction: Prediction | None) -> CacheFigures:
    if prediction is None:
        return NO_FIGURES
    return CacheFigures(
        prompt_tokens=round(prediction.prompts),
        wrong_tokens=round(prediction.error),
        expected_tokens=round(prediction.expected),
        missed_tokens=round(prediction.missed),
        distrusting=int(not prediction.is_trusted),
    )
