"""A leg that has failed is followed by what this table says for the class of its failure, within a budget.

| failure | what happened | another worker? |
|---|---|---|
| UNREACHABLE | no connection: nothing was written | yes; the first is free |
| LOST | reset, cut short, silent while its probe fails too, or its engine ended | yes; the first is free |
| LATE | had not begun when the lease of its hand-off ended | yes; the first is free |
| STALLED | no first byte where there should be one (`legs/handoff_watch.py`) | once, within the budget |
| BUSY | answered 429 or 503 | yes, within the budget |
| FAILED | answered another 5xx (also as the first event of a stream), or garbage | once, within the budget |
| UNFIT | answered as no worker of ours does: wrong key, a redirect ... | yes; the first is free |
| REFUSED | answered another 4xx: any worker would | never |

A request that has lost two workers is not sent to a third, for it may be what ends them: its error is
`Poison`. Only LOST counts, and only of a worker that nobody had taken out: what is not reached has not seen
the request, and what is drained, or ejected because probes got no answer, is ended by something else. One
that is gone counts: another leg, or a probe, may have noticed first that it has ended.

The first replacement of a lost leg costs no budget: a worker that loses legs is soon ejected, which bounds
them, a lease takes long to end, and a worker that is unfit is out of service as soon as a probe has seen it
too. All others are bounded by the budget, so that an outage is not answered by a flood of retries.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

import msgspec

from orchestrator.errors import (
    BUSY,
    BatonError,
    HandoffLate,
    HandoffStalled,
    WorkerAnswered,
    WorkerCutShort,
    WorkerOut,
    WorkerUnfit,
    WorkerUnreachable,
)
from orchestrator.wire.shapes import Refusal

# One request may lose so many workers.
MOST_LOST = 2

# Replacements under way at once, as a share of the requests that are open, and the least that is allowed.
# Envoy's retry budgets have the same shape and the same numbers.
BUDGET_SHARE = 0.2
BUDGET_LEAST = 3


class Failure(Enum):
    UNREACHABLE = auto()
    LOST = auto()
    LATE = auto()
    STALLED = auto()
    BUSY = auto()
    FAILED = auto()
    UNFIT = auto()
    REFUSED = auto()


class Rule(NamedTuple):
    most: int  # replacements of this kind per request
    first_is_free: bool


RULES: dict[Failure, Rule] = {
    Failure.UNREACHABLE: Rule(most=3, first_is_free=True),
    Failure.LOST: Rule(most=3, first_is_free=True),
    Failure.LATE: Rule(most=2, first_is_free=True),
    Failure.STALLED: Rule(most=1, first_is_free=False),
    Failure.BUSY: Rule(most=2, first_is_free=False),
    Failure.FAILED: Rule(most=1, first_is_free=False),
    Failure.UNFIT: Rule(most=3, first_is_free=True),
    Failure.REFUSED: Rule(most=0, first_is_free=False),
}


# What vLLM (0.32) answers to all its requests at once when its engine dies or SIGTERM stops it; streams get
# it as an event. The server ends a moment later.
_refusal = msgspec.json.Decoder(Refusal)
_ENGINE_ENDED = b"EngineCore encountered an issue"


def failure_of(error: BatonError) -> Failure:
    """Return the class of what a leg raised."""
    if isinstance(error, WorkerUnreachable):
        return Failure.UNREACHABLE
    if isinstance(error, WorkerCutShort):
        return Failure.LOST
    if isinstance(error, WorkerUnfit):
        return Failure.UNFIT
    if isinstance(error, HandoffLate):
        return Failure.LATE
    if isinstance(error, HandoffStalled):
        return Failure.STALLED
    if isinstance(error, WorkerAnswered):
        return _failure_answered(error)
    return Failure.FAILED


# How the log calls what happened; an error of the worker's own is called by its status.
_OUTCOMES: dict[Failure, str] = {
    Failure.UNREACHABLE: "unreachable",
    Failure.LOST: "cut_short",
    Failure.LATE: "late",
    Failure.STALLED: "stalled",
    Failure.BUSY: "busy",
    Failure.FAILED: "garbage",
    Failure.UNFIT: "unfit",
    Failure.REFUSED: "refused",
}


def outcome_of(error: BatonError) -> str:
    """Return a word for what a leg raised, for the log."""
    failure = failure_of(error)
    if isinstance(error, WorkerOut):
        return "out_of_service"
    if failure is Failure.LOST and isinstance(error, WorkerAnswered):
        return "engine_ended"
    if failure is Failure.FAILED and isinstance(error, WorkerAnswered):
        return f"answered_{error.status}"
    return _OUTCOMES[failure]


def _failure_answered(error: WorkerAnswered) -> Failure:
    if error.status in BUSY:
        return Failure.BUSY
    if error.status < 500:
        return Failure.REFUSED
    return Failure.LOST if _ENGINE_ENDED in error.content else Failure.FAILED


def is_unread(status: int) -> bool:
    """Tell whether a worker that answers so has not looked at the hand-off: it judged the request, or its
    load.
    """
    return 400 <= status < 500 or status == 503


def has_freed(content: bytes) -> bool:
    """Tell whether the refusal of a decode leg says that its blocks are free: the engine has had them freed.

    vLLM (0.32) does so for a request that its serving layer refuses, whose error is then a class of its own
    ("BadRequestError"). What is refused before that, by the type of a field, or by something in front of it,
    has another kind of error ("Bad Request") or another shape, and leaves the blocks as they are.
    """
    try:
        kind = _refusal.decode(content).error.type
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return kind.endswith("Error")


class RetryBudget:
    """The budget bounds how many replacements are under way at once, over all requests of a process."""

    def __init__(self, open_requests: Callable[[], int]) -> None:
        self._open_requests = open_requests
        self.in_use = 0

    @property
    def room(self) -> float:
        """So many more may start."""
        return max(BUDGET_LEAST, BUDGET_SHARE * self._open_requests()) - self.in_use

    def take(self) -> bool:
        """Tell whether one more may start; it is owed back when its request ends."""
        if self.room <= 0:
            return False
        self.in_use += 1
        return True

    def give_back(self, count: int) -> None:
        self.in_use -= count


class Retries:
    """It counts what one request has had replaced. It is made at the first failure; `close()` it when the
    request ends.
    """

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget
        self._failures: list[Failure] = []
        self._taken = 0
        self.lost: list[str] = []  # names of the workers that were lost with it

    def allows(self, failure: Failure) -> bool:
        """Tell whether a leg that failed so is to be replaced; it is counted if it is."""
        rule = RULES[failure]
        if self._failures.count(failure) >= rule.most:
            return False
        if not (rule.first_is_free and not self._failures):
            if not self._budget.take():
                return False
            self._taken += 1
        self._failures.append(failure)
        return True

    def is_poison(self, failure: Failure, worker: str, *, was_in_service: bool) -> bool:
        """Tell whether the request has now lost as many workers as it may. The same one again is one."""
        if failure is not Failure.LOST or not was_in_service or worker in self.lost:
            return False
        self.lost.append(worker)
        return len(self.lost) >= MOST_LOST

    def close(self) -> None:
        self._budget.give_back(self._taken)
        self._taken = 0
