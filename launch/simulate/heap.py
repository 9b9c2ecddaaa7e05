"""Virtual time is a heap of what is to happen; nothing waits for it to pass."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

# Moments are counted from here: for the orchestrator's records 0.0 is "never".
START_S: Final = 1.0

Call = Callable[[Any], None]


class VirtualClock:
    """What is due at the same moment happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = START_S
        self._events: list[tuple[float, int, Call, Any]] = []
        self._count = 0

    def time(self) -> float:
        return self.now

    @property
    def is_over(self) -> bool:
        """Say whether nothing is due any more."""
        return not self._events

    def at(self, moment: float, call: Call, argument: Any) -> None:
        """Have `call(argument)` made at `moment`, or now if that is over."""
        self._count += 1
        heapq.heappush(self._events, (max(moment, self.now), self._count, call, argument))

    def run(self) -> None:
        """Let time pass until nothing is due any more."""
        events = self._events
        while events:
            self.now, _, call, argument = heapq.heappop(events)
            call(argument)
