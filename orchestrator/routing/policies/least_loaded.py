"""The worker with the fewest legs under way."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.routing.policies.base import C


class LeastLoaded:
    reason = "fewest legs under way"

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, candidates: Sequence[C]) -> C:
        """Equals take turns; else a quiet site's traffic would all go to the first worker."""
        self._turn += 1
        first = self._turn % len(candidates)
        best = candidates[first]
        least = best.in_flight  # asked for once each: where several processes serve it is a sum
        for index in range(first + 1, first + len(candidates)):
            candidate = candidates[index % len(candidates)]
            load = candidate.in_flight
            if load < least:
                best, least = candidate, load
        return best
