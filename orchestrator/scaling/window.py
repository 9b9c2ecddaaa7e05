"""A window has what the last minutes' reports of a model say, as sums of which any two give a mean."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from orchestrator.scaling.reports import Report, Stage

LONGEST_PAUSE_S: Final = 30.0  # between two reports: after a longer one nothing is known of what was between
KEPT_S: Final = 180.0
SEATED: Final = ("decode", "both")


@dataclass(frozen=True, slots=True)
class Look:
    """A look is a report with the sums of all before it. Sums are in seconds times what they are of."""

    report: Report
    busy_s: float  # sum of prefill workers that had a prompt
    prompts_s: float  # sum of prompts at prefill workers, of all orchestrators
    own_prompts_s: float  # the same of this one
    crowded_s: float  # sum of prefill workers where prompts waited for others
    running_s: float  # sum of answers under way
    ready_s: float  # sum of workers with seats that were ready
    ready: int  # workers with seats that serve
    waiting: int  # prompts that wait for others at their prefill worker
    running: int  # answers that are being made
    seats: int  # that are taken or asked for, but for those whose prompts wait for others

    @property
    def moment(self) -> float:
        return self.report.moment

    @property
    def prefilled(self) -> int:
        """Return how many prompts were computed since the start, by what has come and is not there."""
        return self.report.entered - sum(w.own_legs for w in self.report.workers if w.role == "prefill")

    @property
    def asked(self) -> int:
        """Return how many requests have come since the start, but for those that were refused."""
        return self.report.entered + self.report.queued


class Window:
    """Looks are added in the order of time; what does not follow from what was before begins a new window."""

    def __init__(self) -> None:
        self._looks: list[Look] = []

    @property
    def last(self) -> Look | None:
        return self._looks[-1] if self._looks else None

    @property
    def span_s(self) -> float:
        """Return how long the window is."""
        return self._looks[-1].moment - self._looks[0].moment if self._looks else 0.0

    @property
    def is_new(self) -> bool:
        """Say whether there is one look alone, or none."""
        return len(self._looks) < 2

    def note(self, report: Report) -> bool:
        """Add a report; tell whether it was one to be believed."""
        if not report.is_sound():
            return False
        last = self.last
        if last is not None and report.moment == last.moment:
            return False
        if last is not None and not _follows(report, last.report):
            self._looks.clear()
            last = None
        self._looks.append(_look(report, last))
        while self._looks[1:] and self._looks[1].moment <= report.moment - KEPT_S:
            del self._looks[0]
        return True

    def since(self, seconds: float) -> Look:
        """Return the look of so long ago, or the first one. There must be one."""
        return self._looks[min(self._place(seconds), len(self._looks) - 1)]

    def is_settled(self, seconds: float) -> bool:
        """Tell whether there were as many workers with seats all the time, and any."""
        counts = {look.ready for look in self._looks[self._place(seconds) :]}
        return self.span_s >= seconds and len(counts) == 1 and 0 not in counts

    def quantile(self, value: Callable[[Look], float], part: float, seconds: float) -> float:
        """Return the value that a `part` of the looks of the last seconds are not above."""
        found = sorted(map(value, self._looks[self._place(seconds) :]))
        return found[max(0, math.ceil(part * len(found)) - 1)]

    def _place(self, seconds: float) -> int:
        moment = self._looks[-1].moment - seconds
        return bisect_left(self._looks, moment, key=lambda look: look.moment)


def _follows(report: Report, last: Report) -> bool:
    return report.is_later(last) and report.moment - last.moment <= LONGEST_PAUSE_S


def _look(report: Report, before: Look | None) -> Look:
    prompts = [worker for worker in report.workers if worker.role == "prefill"]
    seated = [worker for worker in report.workers if worker.role in SEATED]
    elapsed = 0.0 if before is None else report.moment - before.moment
    legs = sum(worker.legs for worker in prompts)
    waiting = sum(max(0, worker.legs - 1) for worker in prompts)
    taken = sum(worker.legs for worker in seated)
    ready = sum(worker.stage is Stage.READY for worker in seated)
    running, seats = max(0, taken - legs), max(0, taken - waiting) + report.queued
    return Look(
        report,
        busy_s=elapsed * sum(worker.legs > 0 for worker in prompts) + (before.busy_s if before else 0.0),
        prompts_s=elapsed * legs + (before.prompts_s if before else 0.0),
        own_prompts_s=elapsed * sum(w.own_legs for w in prompts) + (before.own_prompts_s if before else 0.0),
        crowded_s=elapsed * sum(worker.legs > 1 for worker in prompts)
        + (before.crowded_s if before else 0.0),
        running_s=elapsed * running + (before.running_s if before else 0.0),
        ready_s=elapsed * ready + (before.ready_s if before else 0.0),
        ready=ready,
        waiting=waiting,
        running=running,
        seats=seats,
    )


# --- of histograms ------------------------------------------------------------------------------


def less(now: Sequence[int], then: Sequence[int]) -> list[int]:
    """Return what was counted between two looks."""
    return [after - before for after, before in zip(now, then, strict=True)]


def share_above(counts: Sequence[int], bounds: Sequence[float], limit: float) -> float:
    """Return which part of what was counted is above a limit; within a bucket it is taken to lie evenly."""
    total = sum(counts)
    parts = (_part_above(low, high, limit) for low, high in _buckets(bounds))
    above = sum(count * part for count, part in zip(counts, parts, strict=True))
    return above / total if total else 0.0


def quantile(counts: Sequence[int], bounds: Sequence[float], part: float) -> float:
    """Return the value that a `part` of what was counted is not above; there must be some."""
    wanted = part * sum(counts)
    for count, reached, (low, high) in zip(counts, accumulate(counts), _buckets(bounds), strict=True):
        if count and reached >= wanted:
            return low if math.isinf(high) else high - (high - low) * (reached - wanted) / count
    return bounds[-1]


def _buckets(bounds: Sequence[float]) -> Iterator[tuple[float, float]]:
    yield from zip((0.0, *bounds), (*bounds, math.inf), strict=True)


def _part_above(low: float, high: float, limit: float) -> float:
    if limit <= low:
        return 1.0
    return 0.0 if limit >= high or math.isinf(high) else (high - limit) / (high - low)
