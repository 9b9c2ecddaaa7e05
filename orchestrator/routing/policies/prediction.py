"""A policy that expects tokens in a worker's cache learns from its answers how much of that was true.

Errors are told as shares of the prompts' tokens. What counts for trust is one kind of error only: tokens that
should have been in the cache and were not, by all that should have been. So it makes no difference how much
of its traffic repeats itself, and a worker that has more than was expected is no worse for it.
"""

from __future__ import annotations

from typing import Final

# A leg has this weight among all that came before it: what is known is of the last 32 legs, about.
NEWEST: Final = 1.0 / 32.0
JUDGED: Final = 32  # legs of which tokens were expected, before trust ends
CLEARED: Final = 16  # of these, before trust returns: who is not trusted gets few of them
RIGHT: Final = 0.4  # of the share of missed tokens at which trust ends; at so much of it trust returns
CALM: Final = 4.0  # times as long as it must be wrong for trust to end, it must be right for trust to return
BACKOFF: Final = 4  # times as long as before, each time that trust has ended
MOST_BACKOFF: Final = 256
FORGIVING: Final = 32  # times the legs and the time that it took trust to return make that shorter again


class Prediction:
    """This is about one worker. Whoever predicts goes on doing so while it is not trusted."""

    __slots__ = (
        "_backoff",
        "_drift",
        "_drift_s",
        "_legs",
        "_since",
        "_switched",
        "error",
        "expected",
        "is_trusted",
        "missed",
        "prompts",
    )

    def __init__(self, drift: float, drift_s: float) -> None:
        """Trust ends when more than `drift` of the expected tokens were missed for `drift_s` seconds."""
        self._drift = drift
        self._drift_s = drift_s
        self.is_trusted = True
        # Tokens, of late: of the prompts; that the prediction was off by; that were expected; that of these
        # were not there.
        self.prompts = 0.0
        self.error = 0.0
        self.expected = 0.0
        self.missed = 0.0
        self._legs = 0  # of which tokens were expected, since it was last switched
        self._since = -1.0  # since when it is as it has to be for the next switch; -1 if it is not
        self._switched = -1.0
        self._backoff = 1

    def note(self, tokens: float, expected: float, cached: float, now: float) -> None:
        """Note a leg: of so many tokens so many were expected in the cache, and so many were there."""
        kept = 1.0 - NEWEST
        wrong = expected - cached
        self.prompts = self.prompts * kept + tokens
        self.error = self.error * kept + (wrong if wrong > 0.0 else -wrong)
        if expected > 0.0:
            self.expected = self.expected * kept + expected
            self.missed = self.missed * kept + (wrong if wrong > 0.0 else 0.0)
            self._legs += 1
            self._judge(now)

    def error_ratio(self) -> float:
        """Return how far off predictions are, by the prompts' tokens: the mean of the absolute errors."""
        return self.error / self.prompts if self.prompts > 0.0 else 0.0

    def missed_ratio(self) -> float:
        """Return the share of the tokens that were expected in the cache and were not there."""
        return self.missed / self.expected if self.expected > 0.0 else 0.0

    def _judge(self, now: float) -> None:
        missed = self.missed_ratio()
        is_due = missed > self._drift if self.is_trusted else missed < RIGHT * self._drift
        if not is_due:
            self._since = -1.0
            self._forgive(now)
            return
        if self._since < 0.0:
            self._since = now
        times = 1.0 if self.is_trusted else CALM * self._backoff
        legs = JUDGED if self.is_trusted else CLEARED * self._backoff
        if self._legs >= legs and now - self._since >= times * self._drift_s:
            self._switch(now)

    def _switch(self, now: float) -> None:
        """End trust, or let it return. Each time that it ends it takes longer to return, so that a worker
        that is right only as long as nobody relies on it does not go back and forth.
        """
        self.is_trusted = not self.is_trusted
        if self.is_trusted and self._backoff < MOST_BACKOFF:
            self._backoff *= BACKOFF
        self._legs = 0
        self._since = -1.0
        self._switched = now

    def _forgive(self, now: float) -> None:
        """Shorten the time that trust takes to return, if it has not ended for long."""
        if self._backoff == 1 or not self.is_trusted or self._legs < FORGIVING * JUDGED:
            return
        if now - self._switched >= FORGIVING * CALM * self._drift_s * self._backoff:
            self._backoff //= BACKOFF
            self._legs = 0
            self._switched = now
