"""Figures say how far the caches of a worker can be predicted, and what its KV events tell; they add up over
processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


class CacheFigures(NamedTuple):
    """These are one process's figures of one worker, or the sums of several."""

    # Tokens of the last legs, by the weights of `routing/policies/prediction.py`.
    prompt_tokens: int = 0
    wrong_tokens: int = 0  # that predictions of what is cached were off by
    expected_tokens: int = 0  # that should have been in the cache
    missed_tokens: int = 0  # of these, not there
    distrusting: int = 0  # processes for which its cache does not count
    # KV events: processes that know of all of them; that want them and have missed some, or get none.
    following: int = 0
    approximate: int = 0
    # Counted since the start.
    batches: int = 0
    late: int = 0  # batches that came so late that what they told was missing for long
    gaps: int = 0  # times that batches were missing
    unfilled: int = 0  # gaps that the worker could not fill
    restarts: int = 0  # times that the publisher began anew
    garbage: int = 0  # messages that could not be read

    def plus(self, other: CacheFigures) -> CacheFigures:
        return CacheFigures(*map(sum, zip(self, other, strict=True)))


COUNTERS: Final = range(CacheFigures._fields.index("batches"), len(CacheFigures._fields))
NO_FIGURES: Final = CacheFigures()


@dataclass(frozen=True, slots=True)
class KvEventStatus:
    """This has become of a worker's KV events; where several processes listen, of all of them."""

    state: str  # "followed", "approximate": some are missing, so routing goes by what was sent
    batches: int
    late: int
    gaps: int
    unfilled: int
    restarts: int
    garbage: int


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """This is how far the cache of a worker is as routing expects it."""

    prediction_error: float  # mean absolute error, by the prompts' tokens
    missed_ratio: float  # share of the tokens that were expected in the cache and were not there
    is_trusted: bool  # False while routing does without what it expects there
    kv_events: KvEventStatus | None  # None if nobody listens to them


def cache_status(figures: CacheFigures) -> CacheStatus | None:
    """Return None if nothing is known."""
    if not any(figures):
        return None
    return CacheStatus(
        _ratio(figures.wrong_tokens, figures.prompt_tokens),
        _ratio(figures.missed_tokens, figures.expected_tokens),
        not figures.distrusting,
        _kv_events(figures),
    )


def _kv_events(figures: CacheFigures) -> KvEventStatus | None:
    if not (figures.following or figures.approximate):
        return None
    state = "approximate" if figures.approximate else "followed"
    return KvEventStatus(state, *(figures[place] for place in COUNTERS))


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
