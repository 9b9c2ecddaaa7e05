"""The times of a worker's hand-offs tell whether one stalls, and how long its KV leases are."""

from __future__ import annotations

from typing import Final

from orchestrator.workers.states import NEVER

# How fast the slowest of a worker's recent first bytes is forgotten: by half after 14 answers.
_FORGETS: Final = 0.05


class HandoffTimes:
    """The legs of a worker that take a hand-off over note their times here; each process knows its own.

    Moments are `time.monotonic()`.
    """

    __slots__ = ("first_byte_s", "lease_s", "newest_begun", "stalled")

    def __init__(self) -> None:
        self.lease_s: float | None = None  # it pins blocks that nobody pulls for so long, if it says so
        self.first_byte_s = 0.0  # the slowest first byte of late; see `note_begun`
        self.newest_begun = NEVER  # when that leg was written which was written last of all that have begun
        self.stalled = NEVER  # when a hand-off last stalled here; the judge's

    def note_begun(self, written: float, now: float) -> None:
        """Note that a leg with a hand-off, written at `written`, has begun its answer."""
        if written > self.newest_begun:
            self.newest_begun = written
        more_s = now - written - self.first_byte_s
        self.first_byte_s += more_s if more_s > 0.0 else more_s * _FORGETS
