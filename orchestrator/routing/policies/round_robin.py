"""Workers in turn."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.routing.policies.base import C


class RoundRobin:
    reason = "next in turn"

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, candidates: Sequence[C]) -> C:
        self._turn += 1
        return candidates[self._turn % len(candidates)]
