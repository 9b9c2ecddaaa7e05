"""With this policy workers take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from orchestrator.routing.policies.base import (
    C,
    Choice,
    Context,
    Explanation,
    Policy,
    PolicySpec,
    Request,
)

REASON: Final = "It is the next in turn."


class RoundRobin(Policy):
    def __init__(self, context: Context) -> None:
        self._turn = -1

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        self._turn += 1
        return Choice(candidates[self._turn % len(candidates)], REASON)

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        count = len(candidates)
        turns: list[dict[str, float]] = [{"turn": (index - self._turn - 1) % count} for index in range(count)]
        return Explanation((self._turn + 1) % count, REASON, turns)


SPEC: Final = PolicySpec("round_robin", RoundRobin, "Workers take turns, whatever they have to do.")
