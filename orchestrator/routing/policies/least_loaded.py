"""This policy chooses the worker with the fewest legs under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.routing.policies.base import C, Choice, Context, Policy, PolicySpec, Request

REASON: Final = "It has the fewest legs under way."


class LeastLoaded(Policy):
    def __init__(self, context: Context) -> None:
        self._turn = -1

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the least loaded; equals take turns, else a quiet site's traffic would all go to the first
        worker.
        """
        self._turn += 1
        count = len(candidates)
        first = self._turn % count
        best = candidates[first]
        least = best.in_flight  # asked for once each: where several processes serve it is a sum
        for index in range(first + 1 - count, first):  # all others, in turn: negative ones are the last
            candidate = candidates[index]
            load = candidate.in_flight
            if load < least:
                best, least = candidate, load
        return Choice(best, REASON)


SPEC: Final = PolicySpec(
    "least_loaded", LeastLoaded, "The worker that has the fewest legs under way is chosen; equals take turns."
)
