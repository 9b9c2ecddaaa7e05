"""Who is refused, and why, is told in the log and as an event: at once, and then once in a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from orchestrator.telemetry.counters import Layout, RejectReason
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.tenants import REJECTED, KeyCounts

LOOK_S: Final = 1.0
INTERVAL_S: Final = 10.0  # from one line to the next
MOST_KEYS: Final = 5  # in a line: those with the most refusals

_log = logging.getLogger("baton.rejections")
_REASONS: Final = tuple(reason.name.lower() for reason in RejectReason)
_NOTHING: Final = (0,) * len(_REASONS)


class RejectionWatch:
    """It looks from time to time at what all processes have counted, and tells what is new."""

    def __init__(
        self,
        layout: Layout,
        counts: Callable[[], Sequence[int]],
        keys_counted: Callable[[], Sequence[KeyCounts]],
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts` gives the row of `layout`, `keys_counted` the cells of each key."""
        self._first = layout.rejections
        self._counts = counts
        self._keys_counted = keys_counted
        self._events = events
        self._clock = clock
        self._told: Sequence[int] = _NOTHING
        self._told_of: dict[str, Sequence[int]] = {}  # the same, by key
        self._told_at = -INTERVAL_S
        self._quiet_at = clock()  # there was nothing new then

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        now = self._clock()
        refused = self._counts()[self._first : self._first + len(_REASONS)]
        new = _less(refused, self._told)
        if not any(new):
            self._quiet_at = now
        elif now - self._told_at >= INTERVAL_S:
            self._tell(new, now - self._quiet_at)
            self._told, self._told_at, self._quiet_at = list(refused), now, now

    def _tell(self, new: Sequence[int], seconds: float) -> None:
        found = self._new_of_keys()
        of_keys = [sum(column) for column in zip(*found.values(), strict=True)] or _NOTHING
        parts = [f"{sum(counts)} of key {name} ({_reasons(counts)})" for name, counts in found.items()]
        if len(parts) > MOST_KEYS:
            parts[MOST_KEYS:] = [f"and {len(parts) - MOST_KEYS} keys more"]
        if any(rest := _less(new, of_keys)):
            parts.append(f"{sum(rest)} of nobody known ({_reasons(rest)})" if found else _reasons(rest))
        message = f"{sum(new)} requests were refused in the last {max(seconds, LOOK_S):.0f} s: "
        _log.warning("%s", message + ", ".join(parts))
        who = ", ".join(f"key {name}" for name in list(found)[:MOST_KEYS])
        self._events.note("request.rejected", message + ", ".join(parts), who=who)

    def _new_of_keys(self) -> dict[str, Sequence[int]]:
        """Return what was refused to each key since the last time: the key with the most comes first."""
        found: dict[str, Sequence[int]] = {}
        for name, cells in self._keys_counted():
            refused = cells[REJECTED:]
            new = _less(refused, self._told_of.get(name, _NOTHING))
            if any(new):
                found[name] = new
                self._told_of[name] = list(refused)
        return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def _less(counts: Sequence[int], told: Sequence[int]) -> Sequence[int]:
    """Return what has come to each count."""
    return [max(0, count - before) for count, before in zip(counts, told, strict=True)]


def _reasons(counts: Sequence[int]) -> str:
    told = sorted(zip(counts, _REASONS, strict=True), reverse=True)
    return ", ".join(f"{count} {reason}" for count, reason in told if count)
