"""Prompts that decode workers prefill by themselves are kept account of here, for `disaggregate: auto`."""

from __future__ import annotations

from typing import Final

# Rates: the newest prefill has this weight, the first ones more.
NEWEST: Final = 0.1
SURE: Final = 10
LEAST_RATE: Final = 1e-4
MOST_RATE: Final = 1e4


class LocalPrefill:
    """A worker was sent a prompt that it prefills by itself."""

    __slots__ = ("begins", "expected_s", "is_first", "until")

    def __init__(self, begins: float, expected_s: float, took_s: float, *, is_first: bool) -> None:
        """`begins` is when nothing is before it any more, `took_s` what it should take then, and `expected_s`
        the same at a rate of 1.
        """
        self.begins = begins
        self.expected_s = expected_s
        self.is_first = is_first  # nothing was before it: it shows how fast the worker is
        # A whole answer does not show when its prefill has ended; twice its time is believed.
        self.until = begins + 2.0 * took_s


class Site:
    """A site is a worker that decodes, with what this process has sent there."""

    __slots__ = ("_free_at", "_prefills", "legs", "pending", "rate", "seen")

    def __init__(self) -> None:
        self.legs = 0
        self.pending = 0  # of these, legs whose prompt another worker prefills
        self.rate = 0.0  # of prefills, measured by expected
        self.seen = 0  # prefills that it was learned from
        self._prefills: list[LocalPrefill] = []  # in the order in which they were sent
        self._free_at = 0.0  # when all of them should have ended

    def active(self, in_flight: int, now: float) -> float:
        """Return how many of the legs there decode; of other processes' legs the same part as of ours."""
        self._drop_ended(now)
        if self.legs <= 0:
            return float(in_flight)
        waiting = self.pending + len(self._prefills)
        return in_flight * max(self.legs - waiting, 0) / self.legs

    def left_s(self, now: float) -> float:
        """Return after how many seconds the prefills that were sent there should have ended."""
        self._drop_ended(now)
        return max(self._free_at - now, 0.0) if self._prefills else 0.0

    def begin(self, expected_s: float, rate: float, now: float) -> LocalPrefill:
        """Note that a prompt is sent there; `rate` is what is reckoned with, `expected_s` what it should take
        at a rate of 1.
        """
        begins = now + self.left_s(now)
        made = LocalPrefill(begins, expected_s, expected_s * rate, is_first=not self._prefills)
        self._prefills.append(made)
        self._free_at = begins + expected_s * rate
        return made

    def note_begun(self, prefill: LocalPrefill, now: float) -> None:
        """Note that the answer to a prompt has begun, so that its prefill has ended."""
        if prefill.is_first and now > prefill.begins:
            self._learn((now - prefill.begins) / prefill.expected_s)
        self.drop(prefill)
        if not self._prefills:
            self._free_at = now

    def drop(self, prefill: LocalPrefill) -> None:
        """Forget a prefill: it has ended, or its leg has. It may be called again."""
        if prefill in self._prefills:
            self._prefills.remove(prefill)

    def _learn(self, ratio: float) -> None:
        ratio = min(max(ratio, LEAST_RATE), MOST_RATE)
        self.seen += 1
        self.rate += (ratio - self.rate) * (NEWEST if self.seen > SURE else 1.0 / self.seen)

    def _drop_ended(self, now: float) -> None:
        """Forget prefills that must have ended."""
        while self._prefills and self._prefills[0].until <= now:
            del self._prefills[0]
