"""With this policy chance chooses the worker."""

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

REASON: Final = "It was drawn at random."


class RandomChoice(Policy):
    def __init__(self, context: Context) -> None:
        self._random = context.random

    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        return Choice(candidates[int(self._random.random() * len(candidates))], REASON)

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation:
        count = len(candidates)
        index = int(self._random.random() * count)
        return Explanation(index, REASON, [{} for _ in range(count)])


SPEC: Final = PolicySpec("random", RandomChoice, "A worker is drawn at random, whatever it has to do.")
