"""The log says once when routing stops to go by a worker's cache or its KV events, and once when it is back.

It goes by what all processes have noted (`workers/figures.py`), in the process that has the admin pages.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from orchestrator.workers.figures import CacheFigures
from orchestrator.workers.registry import Registry

PERIOD_S: Final = 1.0

_log = logging.getLogger("baton.caches")


class CacheAlarm:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._distrusted: set[str] = set()  # workers that were told of
        self._approximate: set[str] = set()

    async def run(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        workers = self._registry.workers
        for worker in workers:
            figures = worker.cache_figures()
            self._tell_of_trust(worker.name, figures)
            self._tell_of_events(worker.name, figures)
        names = {worker.name for worker in workers}
        self._distrusted &= names
        self._approximate &= names

    def _tell_of_trust(self, name: str, figures: CacheFigures) -> None:
        if bool(figures.distrusting) is (name in self._distrusted):
            return
        self._distrusted ^= {name}
        if name not in self._distrusted:
            _log.info("%s: what should be in its cache counts again, as predictions are right again", name)
            return
        share = figures.missed_tokens / max(figures.expected_tokens, 1)
        _log.warning(
            "%s: %.0f %% of the tokens that should have been in its cache were not there of late; routing "
            "does without its cache until predictions are right again: is its prefix cache on, is its size "
            "as announced (kv_tokens), does somebody else use it?",
            name,
            100 * share,
        )

    def _tell_of_events(self, name: str, figures: CacheFigures) -> None:
        if bool(figures.approximate) is (name in self._approximate):
            return
        self._approximate ^= {name}
        if name in self._approximate:
            _log.warning(
                "%s: KV events are missing, so routing goes by what was sent to it (%s)",
                name,
                _counts(figures),
            )
        elif figures.following:
            _log.info("%s: all KV events are known again", name)


def _counts(figures: CacheFigures) -> str:
    return (
        f"batches {figures.batches}, late {figures.late}, gaps {figures.gaps}, not filled "
        f"{figures.unfilled}, restarts {figures.restarts}, garbage {figures.garbage}"
    )
