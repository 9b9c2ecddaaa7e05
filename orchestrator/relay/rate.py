"""A rate limit is a bucket that fills up again within a minute. Its clock is given to it."""

from __future__ import annotations

import math
from typing import Final

from orchestrator.telemetry.tenants import KeyCells

MINUTE_S: Final = 60.0


class Bucket:
    """A bucket has what may still be used of `limit` per minute; it is full at first, and after a minute in
    which nothing was used. More may be taken from it than there is: nothing is left then until that has
    flowed in.

    With several processes all take from one: each adds up what all have taken. What others take counts at
    once, what has flowed in meanwhile as of the last look; so someone has to look several times a second.
    """

    __slots__ = ("_cells", "_charged", "_level", "_moment", "_seen", "_used", "limit")

    def __init__(self, limit: int, cells: KeyCells, charged: int, used: int, now: float) -> None:
        """What is taken is added up in the cell `charged`. In `used` each process notes how much was used, so
        that one which begins knows it.
        """
        self.limit = limit
        self._cells = cells
        self._charged = charged
        self._used = used
        self._level = float(limit - cells.most(used))
        self._moment = now
        self._seen = cells.sum(charged)

    def look(self, now: float) -> float:
        """Return what there is now; below 0 if too much was taken."""
        seen = self._cells.sum(self._charged)
        filled = self._level + (now - self._moment) * self.limit / MINUTE_S
        if filled > self.limit:
            filled = float(self.limit)
        self._level = filled - (seen - self._seen)
        self._moment, self._seen = now, seen
        return self._level

    def share(self, now: float) -> None:
        """Look, and let other processes know."""
        level = self.look(now)
        self._cells.note(self._used, max(0, math.ceil(self.limit - level)))

    def has(self, amount: int, now: float) -> bool:
        """Tell whether so much may be taken. More than fits in may be if the bucket is full."""
        return self.look(now) >= min(amount, self.limit)

    def take(self, amount: int) -> None:
        """Take so much, whether or not it is there; a negative amount goes back."""
        self._cells.add(self._charged, amount)
        self._seen += amount
        self._level -= amount

    def wait_s(self, amount: int) -> float:
        """Return after how long so much may be taken, as of the last look."""
        return max(0.0, min(amount, self.limit) - self._level) * MINUTE_S / self.limit

    def change(self, limit: int, now: float) -> None:
        """Have another limit from now on; what was used stays used."""
        self._level = self.look(now) + limit - self.limit
        self.limit = limit

    def headers(self, kind: str, now: float) -> str:
        """Return the header lines by which OpenAI tells of a limit; `kind` is requests or tokens."""
        level = self.look(now)
        remaining = max(0, math.floor(level))
        reset = duration((self.limit - level) * MINUTE_S / self.limit)
        return (
            f"x-ratelimit-limit-{kind}: {self.limit}\r\n"
            f"x-ratelimit-remaining-{kind}: {remaining}\r\n"
            f"x-ratelimit-reset-{kind}: {reset}\r\n"
        )


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: `0s`, `120ms`, `8.64s`, `6m0s`; rounded up to milliseconds."""
    ms = max(0, math.ceil(round(seconds * 1000, 3)))
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    whole, part = divmod(rest, 1000)
    text = f"{whole}.{part:03d}".rstrip("0") if part else f"{whole}"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"
