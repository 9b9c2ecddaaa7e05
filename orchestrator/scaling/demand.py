"""Demand says how many workers a load needs, as a number that is not whole, and why.

No profile of the engine is needed: what a prompt costs follows from how long workers were busy with how many,
and how slow answers get from how slow they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.config.options import ScalingConfig
from orchestrator.scaling.window import Look, Window, less, quantile, share_above
from orchestrator.telemetry.counters import GAP_BOUNDS, STAGE_BOUNDS

MEAN_S: Final = 120.0  # means are of so long
SOON_S: Final = 30.0  # what may be too much is noticed in so long
SEATS_S: Final = 60.0  # seats are looked at for so long
DRAIN: Final = 3.0  # times `up_after_s`: what waits is to be computed within that
UNSEEN: Final = 0.75  # of the time per token that is, at most, is that of a worker with few answers
MOST_SPREAD: Final = 1.3  # times the mean is the slowest of 20 answers
MOST_LAG_S: Final = 60.0  # answers that take longer tell of what was so long ago
SETTLED_S: Final = 60.0  # so long after a change of workers most answers are of the time after it
LEAST_S: Final = 10.0  # a window that is shorter says nothing
LEAST_PROMPTS: Final = 5  # in it: fewer do not say what one costs
LEAST_ANSWERS: Final = 20  # fewer say nothing of the slowest
PART: Final = 0.95  # of the answers keep to a bound
BORNE: Final = 1.15  # times what is to be used of workers is used before there are more
ERROR: Final = 1.0  # of what one prompt costs, by its mean: that of many is known better by their root
HELPED: Final = 0.2  # of the bound is waited for other prompts: with less no further worker helps


@dataclass(frozen=True, slots=True)
class Need:
    """So many workers are needed, at the shares of time or seats that the config wants; `least` will do while
    these are there.
    """

    workers: float
    least: float
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """A prompt keeps a worker busy for so long, and has so many tokens that no cache has."""

    busy_s: float
    tokens: float


NOTHING: Final = Need(0.0, 0.0, "nothing is asked")


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
        soon = self._soon(window, cost, DRAIN * options.up_after_s)
        usual = self.work / busy
        why = _prefill_why(rate, cost, max(usual, soon), busy, is_soon=soon > usual)
        return Need(max(usual, soon), max(usual / BORNE, soon), why)

    def _soon(self, window: Window, mean: Cost, drain_s: float) -> float:
        """Return how many workers it takes that what comes now, and what waits, is computed in time."""
        cost, rate = _cost(window, SOON_S) or mean, _rate(window, SOON_S)
        waiting = 0 if window.last is None else window.last.waiting
        # What waits asks for no more than what comes: it grows without end where no worker gets ready.
        return (rate + min(waiting / drain_s, rate)) * cost.busy_s


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
    busy_s = (now.busy_s - then.busy_s) * _own_share(then, now) / done
    return Cost(busy_s / (1 + ERROR / math.sqrt(done)), tokens)


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


def busy_share(window: Window, seconds: float, workers: int) -> float:
    """Return for which part of the time prefill workers were busy."""
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    return (now.busy_s - then.busy_s) / (now.moment - then.moment) / workers if now is not then else 0.0


def crowded_share(window: Window, seconds: float, workers: int) -> float:
    """Return at which part of the prefill workers prompts waited for others."""
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    return (now.crowded_s - then.crowded_s) / (now.moment - then.moment) / workers if now is not then else 0.0


def waited_s(window: Window, seconds: float) -> float:
    """Return how long a prompt waited on average for those before it, by Little's law."""
    then, now = window.since(seconds), window.last
    assert now is not None  # noqa: S101  # for the type checker
    done = now.prefilled - then.prefilled
    queued_s = (now.prompts_s - now.busy_s) - (then.prompts_s - then.busy_s)
    return max(0.0, queued_s) * _own_share(then, now) / done if done > 0 else 0.0


class SeatDemand:
    """It remembers how many answers a worker may make at once that tokens come fast enough, and how fast they
    came where little ran: what is slower is so by what runs.
    """

    def __init__(self) -> None:
        self._fastest_s = math.inf
        self._most = math.inf
        self.running = 0.0  # answers on all workers, if tokens came as slowly as they may

    def need(self, window: Window, options: ScalingConfig, seats: int, running: float) -> Need | None:
        """Return what answers need if a worker has so many seats, and is to make at most `running` answers at
        once; None if nobody can tell.
        """
        if window.span_s < LEAST_S:
            return None
        taken = window.quantile(lambda look: look.seats, PART, SEATS_S)
        by_seats = taken / (seats * options.decode_seats)
        by_pace, why = self._by_pace(window, options, running)
        if by_seats >= by_pace:
            why = f"{taken:.0f} seats taken, {options.decode_seats:.0%} of {seats} each"
        needed, least = max(by_seats, by_pace), max(by_seats / min(BORNE, 1 / options.decode_seats), by_pace)
        return Need(needed, least, f"{why}: {needed:.2f} workers")

    def _by_pace(self, window: Window, options: ScalingConfig, most: float) -> tuple[float, str]:
        """Return how many workers it takes that tokens come fast enough, and why."""
        then, now = window.since(SEATS_S), window.last
        assert now is not None  # noqa: S101  # for the type checker
        self.running = (now.running_s - then.running_s) / (now.moment - then.moment)
        gaps, told = less(now.report.gaps, then.report.gaps), ""
        if sum(gaps) >= LEAST_ANSWERS:
            gap_s = (now.report.gaps_s - then.report.gaps_s) / sum(gaps)
            bound_s = options.itl_p95_ms / 1e3 / _spread(gaps, gap_s)
            told = f" with {gap_s * 1e3:.3g} ms per token"
            self._learn(window, gap_s, bound_s)
            # Answers that are slower are made for longer, so that more are made at once.
            self.running *= bound_s / gap_s
        most = min(most, self._most)
        return self.running / most, f"{self.running:.0f} answers at once{told}, at most {most:.3g} each"

    def _learn(self, window: Window, gap_s: float, bound_s: float) -> None:
        """Learn how many answers a worker may make at once, by the line through what is and the pace of a
        worker that makes few. That may not have been seen: it is taken to be well below what is now.
        """
        self._fastest_s = min(self._fastest_s, gap_s)
        each = _running_each(window)
        if each is not None and gap_s > 0:
            least_s = min(self._fastest_s, UNSEEN * gap_s)
            self._most = max(1.0, each * max(0.0, bound_s - least_s) / (gap_s - least_s))


def _spread(gaps: Sequence[int], mean_s: float) -> float:
    """Return how many times the mean the slowest are that count; buckets do not tell it well."""
    slowest_s = quantile(gaps, GAP_BOUNDS, PART)
    return min(max(1.0, slowest_s / mean_s), MOST_SPREAD) if mean_s > 0 else 1.0


def _running_each(window: Window) -> float | None:
    """Return how many answers a worker made at once while those were made that have ended now: they began
    before, by half of what an answer takes on average. None if there were other workers then.
    """
    then, now = window.since(SEATS_S), window.last
    assert now is not None  # noqa: S101  # for the type checker
    answered = now.report.answered - then.report.answered
    lag_s = min((now.running_s - then.running_s) / answered / 2, MOST_LAG_S) if answered else MOST_LAG_S
    then, now = window.since(SEATS_S + lag_s), window.since(lag_s)
    seconds = window.last.moment - then.moment if window.last else 0.0
    if not window.is_settled(seconds) or now.moment - then.moment < LEAST_S:
        return None
    return (now.running_s - then.running_s) / (now.ready_s - then.ready_s)


def late_share(then: Look, now: Look, bound_s: float) -> float | None:
    """Return which part of the answers began too late; None if there were too few."""
    counts = less(now.report.first_tokens, then.report.first_tokens)
    return share_above(counts, STAGE_BOUNDS, bound_s) if sum(counts) >= LEAST_ANSWERS else None


def slow_share(then: Look, now: Look, bound_s: float) -> float | None:
    """Return which part of the answers had too long between their tokens; None if there were too few."""
    counts = less(now.report.gaps, then.report.gaps)
    return share_above(counts, GAP_BOUNDS, bound_s) if sum(counts) >= LEAST_ANSWERS else None
