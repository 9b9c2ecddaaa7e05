"""A role of a model has a demand, a track, and a bound that its answers are to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Final

from orchestrator.config.options import PoolConfig, ScalingConfig
from orchestrator.scaling.demand import (
    HELPED,
    PART,
    SETTLED_S,
    Need,
    PrefillDemand,
    SeatDemand,
    busy_share,
    crowded_share,
    late_share,
    slow_share,
    waited_s,
)
from orchestrator.scaling.track import Limit, Pool, Track
from orchestrator.scaling.window import Look, Window
from orchestrator.wire.info import Role

NO_LIMIT: Final = float("inf")
JUDGED: Final = 2.0  # times `up_after_s`: whether a bound is kept is looked at once in so long
LEAST_USED: Final = 0.7  # of what prefill workers may be busy for they are in any case
CROWDED: Final = 0.3  # of the prefill workers have prompts that wait, if there are too few workers
IDLE: Final = 0.7  # prefill workers that are busy for less than this part of what they may be have no lack


@dataclass(frozen=True, slots=True)
class Wish:
    """So many workers of a role are wanted, and why."""

    model: str
    role: Role
    wanted: int
    ready: int
    starting: int
    draining: int
    why: str


class RolePlanner(ABC):
    """It says how many workers of one role a model wants."""

    def __init__(self) -> None:
        self._track = Track()
        self._limit = Limit()
        self._pool: Pool | None = None
        self._why = "nothing is known yet"

    def look(self, pool: Pool, moment: float) -> None:
        """Note how many workers there are."""
        if self._pool is None or pool.ready != self._pool.ready:
            self._limit.restart(moment + SETTLED_S)
        self._pool = pool

    def forget(self, moment: float) -> None:
        """Begin anew after a time of which nothing is known; what is wanted stays."""
        self._track.forget()
        self._limit.restart(moment)

    def wish(self, model: str, role: Role) -> Wish | None:
        """Return what is wanted; None if nothing was heard yet."""
        pool = self._pool
        if pool is None:
            return None
        wanted = self._track.begin(pool)
        return Wish(model, role, wanted, pool.ready, pool.starting, pool.draining, self._why)

    def decide(self, window: Window, options: ScalingConfig) -> None:
        """Work out what is wanted now."""
        pool, look = self._pool, window.last
        assert pool is not None and look is not None  # noqa: S101, PT018  # for the type checker
        need = self._need(window, options) if pool.ready else None
        if need is None:
            self._why = "it stays so: " + ("too little is known" if pool.ready else "no worker is ready")
            return
        need = self._corrected(window, look, need, pool, options)
        before = self._track.begin(pool)
        wanted = self._track.decide(look.moment, need, pool, options)
        self._why = need.why + _held(before, wanted, need.workers, pool)

    def _corrected(self, window: Window, look: Look, need: Need, pool: Pool, options: ScalingConfig) -> Need:
        """Want one worker more if the bound is broken again, and all that are wanted are there."""
        period_s, wanted = JUDGED * options.up_after_s, self._track.begin(pool)
        share = self._broken_share(window.since(period_s), look, options)
        is_broken = None if share is None else share > 1 - PART
        if is_broken and not self._helps(window, options):
            need = replace(
                need, why=f"{need.why}; {self._broken(share, options)}, which no worker more mends"
            )
            is_broken = False
        if not self._limit.judge(look.moment, is_broken, period_s) or share is None:
            return need
        if pool.ready < wanted or need.least > wanted:
            return need
        self._limit.learn(self._load(), pool.ready, self._least(options))
        more = pool.ready + 0.9
        return Need(more, more, f"{self._broken(share, options)}, again: one more")

    def _broken(self, share: float | None, options: ScalingConfig) -> str:
        return f"{self._bound(options)} for {share or 0.0:.0%} of the answers"

    # --- what differs between roles ---------------------------------------------------------------

    @abstractmethod
    def _need(self, window: Window, options: ScalingConfig) -> Need | None:
        """Return what the load needs; None if nobody can tell."""

    @abstractmethod
    def _load(self) -> float:
        """Return the load of which a limit is learned."""

    @abstractmethod
    def _least(self, options: ScalingConfig) -> float:
        """Return how much of it a worker gets at any rate."""

    @abstractmethod
    def _broken_share(self, then: Look, now: Look, options: ScalingConfig) -> float | None:
        """Return which part of the answers does not keep the bound; None if there are too few."""

    @abstractmethod
    def _bound(self, options: ScalingConfig) -> str:
        """Say what is so of an answer that does not keep the bound."""

    @abstractmethod
    def _helps(self, window: Window, options: ScalingConfig) -> bool:
        """Tell whether one worker more would help."""


class _Prefill(RolePlanner):
    def __init__(self) -> None:
        super().__init__()
        self._demand = PrefillDemand()

    def _need(self, window: Window, options: ScalingConfig) -> Need | None:
        busy = self._limit.value(options.prefill_busy, self._demand.work)
        return self._demand.need(window, options, busy)

    def _load(self) -> float:
        return self._demand.work

    def _least(self, options: ScalingConfig) -> float:
        return options.prefill_busy * LEAST_USED

    def _broken_share(self, then: Look, now: Look, options: ScalingConfig) -> float | None:
        return late_share(then, now, options.ttft_p95_s)

    def _bound(self, options: ScalingConfig) -> str:
        return f"the first token takes over {options.ttft_p95_s:g} s"

    def _helps(self, window: Window, options: ScalingConfig) -> bool:
        pool, look, period_s = self._pool, window.last, JUDGED * options.up_after_s
        if pool is None or look is None or look.report.queued:  # those that wait for seats are late anyway
            return False
        if busy_share(window, period_s, pool.ready) < IDLE * options.prefill_busy:
            return False
        # What waits at a few workers was sent there before there were others, and ends with that.
        is_everywhere = crowded_share(window, period_s, pool.ready) >= CROWDED
        return is_everywhere and waited_s(window, period_s) > HELPED * options.ttft_p95_s


class _Seats(RolePlanner):
    """Workers with seats decode, or do everything."""

    def __init__(self, seats: int) -> None:
        super().__init__()
        self._seats = seats
        self._demand = SeatDemand()

    def _need(self, window: Window, options: ScalingConfig) -> Need | None:
        running = self._limit.value(NO_LIMIT, self._demand.running)
        return self._demand.need(window, options, self._seats, running)

    def _load(self) -> float:
        return self._demand.running

    def _least(self, options: ScalingConfig) -> float:
        return 1.0

    def _broken_share(self, then: Look, now: Look, options: ScalingConfig) -> float | None:
        return slow_share(then, now, options.itl_p95_ms / 1e3)

    def _bound(self, options: ScalingConfig) -> str:
        return f"a token takes over {options.itl_p95_ms:g} ms"

    def _helps(self, window: Window, options: ScalingConfig) -> bool:
        return self._pool is not None and self._demand.running > self._pool.ready


def role_planner(role: Role, pool: PoolConfig) -> RolePlanner:
    return _Prefill() if role == "prefill" else _Seats(pool.seats)


def _held(before: int, wanted: int, need: float, pool: Pool) -> str:
    """Say why it is not simply as many as the load needs now."""
    if wanted < before:
        return "; fewer were enough for long: one goes"
    if need > pool.most:
        return f"; there may be {pool.most}"
    if wanted >= need + 1 and wanted > pool.least:
        return "; one goes when " + ("no other is being drained" if pool.draining else "that lasts")
    return ""
