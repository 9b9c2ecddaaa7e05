"""A report says how a model's workers and its queue are at one moment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orchestrator.wire.info import Role
from orchestrator.workers.states import WorkerState

MOST: Final = 2**53  # of anything that is counted: a report with more is no report
MOST_LEGS: Final = 10**7  # on one worker


class Stage(StrEnum):
    """A worker is in one of these; of one that is drained and serves nobody nothing is reported."""

    READY = "ready"
    STARTING = "starting"  # also one that is gone or kept out: it is wanted, and is no capacity
    DRAINING = "draining"


def stage_of(state: WorkerState, legs: int) -> Stage | None:
    """Return the stage of a worker in this state with so many legs; None if nothing is to be reported."""
    if state is WorkerState.DRAINING:
        return Stage.DRAINING if legs else None
    return Stage.READY if state in _SERVES else Stage.STARTING


_SERVES: Final = (WorkerState.READY, WorkerState.SUSPECT, WorkerState.PROBING)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker has so many legs under way: prompts, or answers."""

    role: Role
    stage: Stage
    legs: int  # of all orchestrators that send to it
    own_legs: int  # of the one that reports


@dataclass(frozen=True, slots=True)
class Report:
    """This is known of a model at a moment of a clock that only goes on. What is counted is counted since the
    start.
    """

    moment: float  # seconds
    workers: Sequence[WorkerReport]
    queued: int  # requests that wait for a seat
    entered: int  # requests that were let in, counted
    answered: int  # requests, counted
    new_tokens: int  # of the prompts of those, what was in no cache, counted
    first_tokens: Sequence[int]  # answers by the time to their first token, counted in `STAGE_BOUNDS`
    gaps: Sequence[int]  # answers by the time between two tokens, counted in `GAP_BOUNDS`
    gaps_s: float  # the sum of these times

    def is_sound(self) -> bool:
        """Tell whether the numbers are such as can be."""
        legs = [count for worker in self.workers for count in (worker.legs, worker.own_legs)]
        return (
            math.isfinite(self.moment)
            and all(_is_count(count, MOST_LEGS) for count in legs)
            and all(_is_count(count, MOST) for count in self._counts())
        )

    def is_later(self, other: Report) -> bool:
        """Tell whether this may have come of the other: time goes on, and what is counted only grows."""
        grown = (self.entered, self.answered, self.new_tokens, self.gaps_s)
        before = (other.entered, other.answered, other.new_tokens, other.gaps_s)
        histograms = ((self.first_tokens, other.first_tokens), (self.gaps, other.gaps))
        return (
            self.moment > other.moment
            and all(now >= then for now, then in zip(grown, before, strict=True))
            and all(_has_grown(now, then) for now, then in histograms)
        )

    def _counts(self) -> Iterator[float]:
        yield from (self.queued, self.entered, self.answered, self.new_tokens, self.gaps_s)
        yield from self.first_tokens
        yield from self.gaps


def _is_count(value: float, most: int) -> bool:
    return 0 <= value <= most  # not so for NaN


def _has_grown(now: Sequence[int], then: Sequence[int]) -> bool:
    return len(now) == len(then) and all(map(int.__ge__, now, then))
