"""A track turns what a load needs, from moment to moment, into a number of workers that does not flutter."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from orchestrator.config.options import ScalingConfig
from orchestrator.scaling.demand import Need

ROOM: Final = 0.1  # a worker goes only if the others would have so much room
GROWTH: Final = 4  # times as many workers as are ready are wanted at most
LEAST_GROWTH: Final = 8
MOST_DOUBLED: Final = 3  # so often the time is doubled for which fewer must be enough
FORGIVEN: Final = 24  # times that time: after it nobody minds that one was missed
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
        self._needs: deque[tuple[float, Need]] = deque()
        self._went_at: float | None = None  # when the last one went
        self._missed: deque[float] = deque(maxlen=MOST_DOUBLED)  # when one that had gone was missed

    def begin(self, pool: Pool) -> int:
        """Take what is there for wanted, if nothing is yet; return what is wanted within the bounds."""
        if self.wanted is None:
            self.wanted = pool.ready + pool.starting
        self.wanted = max(pool.least, min(self.wanted, pool.most))
        return self.wanted

    def decide(self, moment: float, need: Need, pool: Pool, options: ScalingConfig) -> int:
        """Return how many workers are wanted if this is needed now."""
        wanted = self.begin(pool)
        hold_s = self._hold_s(moment, options)
        self._note(moment, need, hold_s)
        if _whole(self._least(moment, options.up_after_s)) > wanted < pool.most:
            self.wanted = max(wanted, min(self._highest(moment, options.up_after_s), _most(pool)))
            self._note_missed(moment, hold_s)
        elif self._may_go(moment, wanted, pool, hold_s, options.up_after_s):
            self._went_at = moment
            self.wanted = wanted - 1
        return self.wanted or wanted

    def forget(self) -> None:
        """Begin anew after a time of which nothing is known; what is wanted stays."""
        self._needs.clear()

    def _hold_s(self, moment: float, options: ScalingConfig) -> float:
        """Return for how long fewer must have been enough: the longer, the more often one was missed."""
        while self._missed and moment - self._missed[0] > FORGIVEN * options.down_after_s:
            self._missed.popleft()
        return options.down_after_s * float(1 << len(self._missed))

    def _note(self, moment: float, need: Need, kept_s: float) -> None:
        self._needs.append((moment, need))
        while len(self._needs) > 1 and self._needs[1][0] <= moment - kept_s:
            self._needs.popleft()

    def _highest(self, moment: float, seconds: float) -> int:
        return _whole(max(need.workers for when, need in self._needs if when >= moment - seconds))

    def _least(self, moment: float, seconds: float) -> float:
        return max(need.least for when, need in self._needs if when >= moment - seconds)

    def _may_go(self, moment: float, wanted: int, pool: Pool, hold_s: float, pause_s: float) -> bool:
        if wanted <= pool.least or pool.draining or self._needs[0][0] > moment - hold_s:
            return False
        if self._went_at is not None and moment - self._went_at < pause_s:
            return False
        return self._least(moment, hold_s) <= (wanted - 1) * (1 - ROOM)

    def _note_missed(self, moment: float, hold_s: float) -> None:
        """Note that a worker is wanted again soon after one has gone."""
        if self._went_at is not None and moment - self._went_at <= 2 * hold_s:
            self._missed.append(moment)
        self._went_at = None


def _most(pool: Pool) -> int:
    """Return how many there may be next: what is known by few workers is known badly."""
    return min(pool.most, max(LEAST_GROWTH, GROWTH * pool.ready))


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
        """Look anew from `moment` on: there are other workers."""
        self._broken, self._since = 0, moment

    def learn(self, load: float, workers: int, least: float) -> None:
        """Note that this load wants one worker more than these; they are used for `least` at any rate."""
        self._most, self._load = max(least, load / (workers + 0.9)), load
        self._broken = 0
