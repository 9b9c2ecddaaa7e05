"""This policy draws two workers and chooses the less loaded one."""

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
    explained,
)

REASON: Final = "It has the fewer legs under way of two that were drawn at random."
ALONE: Final = "There is no other worker."


class PowerOfTwo(Policy):
    def __init__(self, context: Context) -> None:
        self._random = context.random

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose the one with fewer legs of two different ones; of equals the one that was drawn first."""
        count = len(candidates)
        if count == 1:
            return Choice(candidates[0], ALONE)
        first = int(self._random.random() * count)
        second = int(self._random.random() * (count - 1))
        if second >= first:
            second += 1
        one, other = candidates[first], candidates[second]
        return Choice(one if one.in_flight <= other.in_flight else other, REASON)

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        choice = self.choose(request, candidates)
        return explained(choice, candidates, [{"legs": candidate.in_flight} for candidate in candidates])


SPEC: Final = PolicySpec(
    "power_of_two",
    PowerOfTwo,
    "Two workers are drawn at random, and that with fewer legs under way is chosen.",
)
