"""A track turns what a load needs, from moment to moment, into a number of workers that does not flutter."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from orchestrator.config.options import ScalingConfig

ROOM: Final = 0.05  # a worker goes only if the others would have so much room
REGRETTED_ROOM: Final = 0.2  # the same where the last one that went was missed soon
CLOSE: Final = 1e-6  # what is so little above a whole number is rounding
CHANGED: Final = 2.0  # a load that is so many times another one, or so small a part, is another load


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool has so many workers, and may have from `least` to `most`."""

    ready: int
    starting: int
    draining: int
    least: int
    most: int


class Track:
    """It belongs to one role of a model. Moments are those of the reports."""

    def __init__(self) -> None:
        self.wanted: int | None = None  # None until the first pool is seen
        self._needs: deque[tuple[float, float]] = deque()
        self._went_at: tuple[float, int] | None = None  # when the last one went, and how many there were
        self._missed: set[int] = set()  # numbers of workers of which the last one was missed when it went

    def begin(self, pool: Pool) -> int:
        """Take what is there for wanted, if nothing is yet; return what is wanted within the bounds."""
        if self.wanted is None:
            self.wanted = pool.ready + pool.starting
        self.wanted = max(pool.least, min(self.wanted, pool.most))
        return self.wanted

    def decide(self, moment: float, need: float, pool: Pool, options: ScalingConfig) -> int:
        """Return how many workers are wanted if the load needs so many now."""
        wanted = self.begin(pool)
        self._note(moment, need, options.down_after_s)
        up = _whole(self._highest(moment, options.up_after_s))
        if up > wanted:
            self.wanted = min(up, pool.most)
            self._note_missed(moment, self.wanted, options)
        elif self._may_go(moment, wanted, pool, options):
            self._went_at = moment, wanted
            self._missed.discard(wanted)
            self.wanted = wanted - 1
        return self.wanted or wanted

    def forget(self) -> None:
        """Begin anew after a time of which nothing is known; what is wanted stays."""
        self._needs.clear()

    def _note(self, moment: float, need: float, kept_s: float) -> None:
        self._needs.append((moment, need))
        while len(self._needs) > 1 and self._needs[1][0] <= moment - kept_s:
            self._needs.popleft()

    def _highest(self, moment: float, seconds: float) -> float:
        return max(need for when, need in self._needs if when >= moment - seconds)

    def _may_go(self, moment: float, wanted: int, pool: Pool, options: ScalingConfig) -> bool:
        if wanted <= pool.least or pool.draining or self._needs[0][0] > moment - options.down_after_s:
            return False
        if self._went_at is not None and moment - self._went_at[0] < options.up_after_s:
            return False
        room = REGRETTED_ROOM if wanted in self._missed else ROOM
        return self._highest(moment, options.down_after_s) <= (wanted - 1) * (1 - room)

    def _note_missed(self, moment: float, wanted: int, options: ScalingConfig) -> None:
        """Note that a worker was missed soon after it had gone."""
        if self._went_at is None:
            return
        when, before = self._went_at
        if moment - when <= 2 * options.down_after_s and wanted >= before:
            self._missed.add(before)


def _whole(need: float) -> int:
    return math.ceil(need - CLOSE)


class Limit:
    """A bound that was broken twice in a row says that workers can be used less than was thought: so much
    was too much. That holds until the load is another one.
    """

    def __init__(self) -> None:
        self._most: float | None = None
        self._load = 0.0  # when that was learned
        self._broken = 0
        self._since: float | None = None

    def value(self, usual: float, load: float) -> float:
        """Return how much a worker may have, `usual` as a rule."""
        if self._most is not None and not self._load / CHANGED <= load <= self._load * CHANGED:
            self._most = None
        return usual if self._most is None else min(usual, self._most)

    def judge(self, moment: float, is_broken: bool | None, period_s: float) -> bool:
        """Tell whether a bound is broken for the second time in a row; it is looked at once in a period.
        None: nobody can tell.
        """
        if self._since is None:
            self._since = moment
        if moment - self._since < period_s or is_broken is None:
            return False
        self._since = moment
        self._broken = self._broken + 1 if is_broken else 0
        return self._broken >= 2

    def restart(self, moment: float) -> None:
        """Look anew from now on: there are other workers."""
        self._broken, self._since = 0, moment

    def learn(self, load: float, workers: int) -> None:
        """Note that this load wants one worker more than these."""
        self._most, self._load = load / (workers + 0.9), load
        self._broken = 0
