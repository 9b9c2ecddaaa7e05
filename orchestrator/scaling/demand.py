"""Demand says how many workers a load needs, as a number that is not whole, and why.

No profile of the engine is needed: what a prompt costs follows from how long workers were busy with how many,
and how slow answers get from how slow they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orchestrator.config.options import ScalingConfig
from orchestrator.scaling.window import Look, Window, less, quantile, share_above
from orchestrator.telemetry.counters import GAP_BOUNDS, STAGE_BOUNDS

MEAN_S: Final = 60.0  # means are of so long
SOON_S: Final = 15.0  # what may be too much is noticed in so long
LEAST_S: Final = 10.0  # a window that is shorter says nothing
LEAST_PROMPTS: Final = 5  # in it: fewer do not say what one costs
LEAST_ANSWERS: Final = 20  # fewer say nothing of the slowest
PART: Final = 0.95  # of the answers keep to a bound
HELPED: Final = 0.1  # of the bound is waited for prompts: with less no further worker helps


@dataclass(frozen=True, slots=True)
class Need:
    """So many workers are needed, at the shares of time or seats that the config wants."""

    workers: float
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """A prompt keeps a worker busy for so long, and has so many tokens that no cache has."""

    busy_s: float
    tokens: float


NOTHING: Final = Need(0.0, "nothing is asked")


class PrefillDemand:
    """It remembers what a prompt cost, for moments in which too few are computed to tell."""

    def __init__(self) -> None:
        self._cost: Cost | None = None
        self.work = 0.0  # of the last minute, in workers that are never idle

    def need(self, window: Window, options: ScalingConfig, busy: float) -> Need | None:
        """Return what prompts need if workers are to be busy for this share of the time; None if nobody can
        tell.
        """
        if window.span_s < LEAST_S:
            return None
        cost = self._cost = _cost(window, MEAN_S) or self._cost
        rate = _rate(window, MEAN_S)
        self.work = 0.0 if cost is None else rate * cost.busy_s
        if cost is None:
            return None if rate else NOTHING
        soon = self._soon(window, cost, options.up_after_s)
        needed = max(self.work / busy, soon)
        return Need(needed, _prefill_why(rate, cost, needed, busy, is_soon=soon > self.work / busy))

    def _soon(self, window: Window, mean: Cost, drain_s: float) -> float:
        """Return how many workers it takes that what comes now, and what waits, is computed in time."""
        cost = _cost(window, SOON_S) or mean
        look = window.last
        waiting = 0 if look is None else look.waiting
        return (_rate(window, SOON_S) + waiting / drain_s) * max(cost.busy_s, mean.busy_s)


def _rate(window: Window, seconds: float) -> float:
    """Return how many requests came per second, of all orchestrators."""
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    return max(0, now.asked - then.asked) / (now.moment - then.moment) / _own_share(then, now)


def _cost(window: Window, seconds: float) -> Cost | None:
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    done = now.prefilled - then.prefilled
    if done < LEAST_PROMPTS:
        return None
    answered = now.report.answered - then.report.answered
    tokens = (now.report.new_tokens - then.report.new_tokens) / answered if answered else 0.0
    return Cost((now.busy_s - then.busy_s) * _own_share(then, now) / done, tokens)


def _own_share(then: Look, now: Look) -> float:
    """Return which part of the prompts at workers is of this orchestrator; others' are taken to be alike."""
    all_s, own_s = now.prompts_s - then.prompts_s, now.own_prompts_s - then.own_prompts_s
    return min(1.0, own_s / all_s) if own_s > 0 and all_s > 0 else 1.0


def _prefill_why(rate: float, cost: Cost, needed: float, busy: float, *, is_soon: bool) -> str:
    tokens = f" ({rate * cost.tokens:,.0f} new tokens/s)" if cost.tokens else ""
    each = f"{rate:.3g} prompts/s{tokens} of {cost.busy_s:.3g} busy seconds each"
    if is_soon:
        return f"{each}, more of late or waiting: {needed:.2f} workers"
    return f"{each}, at {busy:.0%} busy: {needed:.2f} workers"


def waited_s(window: Window, seconds: float) -> float:
    """Return how long a prompt waited on average for those before it, by Little's law."""
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    done = now.prefilled - then.prefilled
    queued_s = (now.prompts_s - now.busy_s) - (then.prompts_s - then.busy_s)
    return max(0.0, queued_s) * _own_share(then, now) / done if done > 0 else 0.0


class SeatDemand:
    """It remembers how fast tokens come where little runs: slower ones are slower by what runs."""

    def __init__(self) -> None:
        self._fastest_s = float("inf")
        self.running = 0.0  # mean of the last minute, of answers on all workers

    def need(self, window: Window, options: ScalingConfig, seats: int, running: float) -> Need | None:
        """Return what answers need if a worker has so many seats, and is to make at most `running` answers at
        once; None if nobody can tell.
        """
        if window.span_s < LEAST_S:
            return None
        taken = window.quantile(lambda look: look.seats, PART, MEAN_S)
        by_seats = taken / (seats * options.decode_seats)
        need = Need(by_seats, f"{taken:.0f} seats taken, {options.decode_seats:.0%} of {seats} each")
        by_pace = self._by_pace(window, options, running)
        need = need if by_pace is None or by_pace.workers < by_seats else by_pace
        return Need(need.workers, f"{need.why}: {need.workers:.2f} workers")

    def _by_pace(self, window: Window, options: ScalingConfig, most: float) -> Need | None:
        """Return how many workers it takes that tokens come fast enough."""
        then, now = window.since(MEAN_S), window.last
        assert now is not None  # noqa: S101  # for the type checker
        ready_s = now.ready_s - then.ready_s
        if ready_s <= 0:
            return None
        self.running = (now.running_s - then.running_s) / (now.moment - then.moment)
        each = (now.running_s - then.running_s) / ready_s
        gaps = less(now.report.gaps, then.report.gaps)
        told = ""
        if sum(gaps) >= LEAST_ANSWERS:
            gap_s = quantile(gaps, GAP_BOUNDS, PART)
            most = min(most, self._most(each, gap_s, options.itl_p95_ms / 1e3))
            told = f", with {gap_s * 1e3:.3g} ms per token"
        running = window.quantile(lambda look: look.running, PART, MEAN_S)
        return Need(running / most, f"{running:.0f} answers at once{told}, at most {most:.3g} on a worker")

    def _most(self, each: float, gap_s: float, bound_s: float) -> float:
        """Return how many answers a worker may make at once, by the line through what is and the pace of a
        worker that makes one. That is not known: it is at most the fastest that was seen, and half of what
        is now, so that the line is rather too steep.
        """
        self._fastest_s = min(self._fastest_s, gap_s)
        least_s = min(self._fastest_s, gap_s / 2)
        return max(1.0, each * (bound_s - least_s) / (gap_s - least_s)) if bound_s > least_s else 1.0


def late_share(then: Look, now: Look, bound_s: float) -> float | None:
    """Return which part of the answers began too late; None if there were too few."""
    counts = less(now.report.first_tokens, then.report.first_tokens)
    return share_above(counts, STAGE_BOUNDS, bound_s) if sum(counts) >= LEAST_ANSWERS else None


def slow_share(then: Look, now: Look, bound_s: float) -> float | None:
    """Return which part of the answers had too long between their tokens; None if there were too few."""
    counts = less(now.report.gaps, then.report.gaps)
    return share_above(counts, GAP_BOUNDS, bound_s) if sum(counts) >= LEAST_ANSWERS else None
