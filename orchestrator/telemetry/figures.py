"""Each worker has figures of its own: what it has served and failed, and how fast.

They are made of finished records, in the batches that become lines of the log: a request that is under way
pays nothing for them. A worker has `CELLS` cells of int64 in a row; rows of several processes add up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

from orchestrator.telemetry.counters import Row, histogram_cells
from orchestrator.telemetry.record import FailedAttempt, RequestRecord
from orchestrator.wire.usage import Kv

# Inclusive upper bounds in seconds, half again as much each: two workers of which one is three times as slow
# are in different buckets, and what is between two bounds is guessed right within a fifth.
BOUNDS: Final[tuple[float, ...]] = tuple(round(0.0005 * 1.5**step, 7) for step in range(33))
_HISTOGRAM: Final = histogram_cells(BOUNDS)

SERVED: Final = 0  # requests in which it had its part to the end
ERRORS: Final = 1  # requests that it failed
RETRIES: Final = 2  # of these, how many another attempt followed
TRANSFERS: Final = 3  # hand-offs that it has given, or taken over
FIRST_BYTE: Final = 4  # of a prefill worker its whole answer
GAP: Final = FIRST_BYTE + _HISTOGRAM  # between two pieces of a stream, as the mean of one stream
CELLS: Final = GAP + _HISTOGRAM
_FIRST_BYTE_SUM: Final = GAP - 1

_LEAST_PIECES: Final = 3  # of a stream: fewer have no rhythm


# Looking a member up in its enumeration costs as much as a call.
_TRANSFERRED: Final = Kv.TRANSFERRED


class FigureWriter:
    """It counts finished records into the cells of the workers that served them."""

    def __init__(self, cells: Row, slots: Callable[[], Mapping[str, int]]) -> None:
        """`slots` tells where the cells of the workers are that are there now."""
        self._cells = cells
        self._slots = slots
        self._most = len(cells) // CELLS

    def note(self, records: Sequence[RequestRecord]) -> None:
        """Count some records."""
        slots = self._slots()
        for record in records:
            if record.failed is not None:
                self._note_failed(slots, record.failed, record.attempts)
            if record.status == 200 and record.error_code is None:
                self._note_served(slots, record)

    def _note_served(self, slots: Mapping[str, int], record: RequestRecord) -> None:
        is_timed = record.failed is None  # else nobody knows whose the time was
        moved = record.kv is _TRANSFERRED
        began, done = record.admitted, record.prefill_done
        if record.prefill_worker is not None:
            slot = slots.get(record.prefill_worker, -1)
            if 0 <= slot < self._most:
                self._count(slot * CELLS, moved, done - began if is_timed else -1.0)
            began = done or began
        if record.decode_worker is None:
            return
        slot = slots.get(record.decode_worker, -1)
        if 0 <= slot < self._most:
            self._count(slot * CELLS, moved, record.first_byte - began if is_timed else -1.0)
            pieces = record.pieces
            if is_timed and pieces >= _LEAST_PIECES:
                gap_s = (record.finished - record.first_byte) / (pieces - 1)
                _observe(self._cells, slot * CELLS + GAP, gap_s)

    def _count(self, start: int, moved: bool, first_byte_s: float) -> None:
        cells = self._cells
        cells[start] += 1  # SERVED
        if moved:
            cells[start + TRANSFERS] += 1
        if first_byte_s >= 0.0:  # as `_observe` does, without a call
            cells[start + FIRST_BYTE + bisect_left(BOUNDS, first_byte_s)] += 1
            cells[start + _FIRST_BYTE_SUM] += int(first_byte_s * 1e6)

    def _note_failed(self, slots: Mapping[str, int], failed: Sequence[FailedAttempt], attempts: int) -> None:
        for number, attempt in enumerate(failed, 1):
            slot = slots.get(attempt.worker, -1)
            if 0 <= slot < self._most:
                self._cells[slot * CELLS + ERRORS] += 1
                self._cells[slot * CELLS + RETRIES] += number < attempts


def _observe(cells: Row, histogram: int, seconds: float) -> None:
    cells[histogram + bisect_left(BOUNDS, seconds)] += 1
    cells[histogram + _HISTOGRAM - 1] += int(seconds * 1e6)


def buckets(cells: Sequence[int], histogram: int) -> Sequence[int]:
    """Return how many of a worker's observations are in each bucket, the last one above all bounds."""
    return cells[histogram : histogram + _HISTOGRAM - 1]


def total_s(cells: Sequence[int], histogram: int) -> float:
    return cells[histogram + _HISTOGRAM - 1] / 1e6


def quantile(counts: Sequence[int], part: float) -> float | None:
    """Return the value, in seconds, below which `part` of the observations are; None if there are none.

    Within a bucket they are taken to lie evenly.
    """
    all_of_them = sum(counts)
    if not all_of_them:
        return None
    wanted = part * all_of_them
    for index, reached in enumerate(accumulate(counts)):
        if reached >= wanted and counts[index]:
            if index == len(BOUNDS):
                return BOUNDS[-1]
            low = BOUNDS[index - 1] if index else 0.0
            return low + (BOUNDS[index] - low) * (wanted - (reached - counts[index])) / counts[index]
    return BOUNDS[-1]
