"""Turns say who of those that wait is next, where that is not simply who came first.

    turn = came + min(3 * own, timeout_s / 2) + priority * priority_s        seconds

The lowest turn is next. `own` is how long the request is expected to hold its seat, so short ones go first;
`came` is the ageing: nobody overtakes for ever. A request is overtaken only by those that come within its
`min(3 * own, timeout_s / 2)` seconds, and each step of priority moves that by `priority_s`. Equals are first
come, first served.
"""

from __future__ import annotations

import heapq
from typing import Final, Generic, TypeVar

# A simulated prefill queue had its median halved by 3 (docs/routing.md, "The order of those that wait").
OWN: Final = 3.0

# Seconds of a 70B-class model on eight H100, as those of the policy `prefix`: per token of a prompt that is
# computed; per token of an answer, and per token that is in the KV cache at that time. Only how they stand to
# each other matters: the gate learns how long requests really hold their seats.
TOKEN_S: Final = 90e-6
STEP_S: Final = 0.02
KV_S: Final = 40e-9

MOST_BEHIND_S: Final = 15.0  # of a prefill, which has no timeout in its engine's queue

MOST_PRIORITY: Final = 1_000_000  # more says nothing more, and is no number that a float can have

_SPARE: Final = 64  # turns of those that have left and may stay in memory


def work_s(new: float, prompt: float, answer: float) -> float:
    """Return what a request takes: its new tokens are computed, and for each token of its answer a decode
    step reads the KV cache that it has in use.
    """
    return TOKEN_S * new + answer * (STEP_S + KV_S * (prompt + answer))


def behind_s(own_s: float, most_s: float) -> float:
    """Return how long after its arrival the turn of a request comes that takes `own_s`."""
    return min(OWN * own_s, most_s)


class Turn:
    """Somebody waits for a turn; who left is `is_over`."""

    __slots__ = ("at", "is_over")

    def __init__(self, at: float) -> None:
        """`at` is where it stands: a moment that was moved."""
        self.at = at
        self.is_over = False


T = TypeVar("T", bound=Turn)


class Turns(Generic[T]):
    """All that wait, by their turns. Who leaves from the middle is marked, and dropped when met."""

    __slots__ = ("_count", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0  # of all that ever came: equals are served in that order

    def add(self, turn: T) -> None:
        self._count += 1
        heapq.heappush(self._heap, (turn.at, self._count, turn))

    def first(self) -> T | None:
        """Return whose turn it is."""
        heap = self._heap
        while heap:
            turn = heap[0][2]
            if not turn.is_over:
                return turn
            heapq.heappop(heap)
        return None

    def ahead_of(self, at: float) -> int:
        """Count those who have their turns before somebody that comes now."""
        return sum([1 for before, _, turn in self._heap if before <= at and not turn.is_over])

    def tidy(self, waiting: int) -> None:
        """Forget those who have left, if they are more than the `waiting`."""
        if len(self._heap) > 2 * waiting + _SPARE:
            self._heap = [entry for entry in self._heap if not entry[2].is_over]
            heapq.heapify(self._heap)
