"""Each worker has figures of its own: what it has served and failed, and how fast.

They are made of finished records, in the batches that become lines of the log: a request that is under way
pays nothing for them. A worker has `CELLS` cells of int64 in a row; rows of several processes add up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
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

_LEAST_PIECES: Final = 3  # of a stream: fewer have no rhythm


# Looking a member up in its enumeration costs as much as a call.
_TRANSFERRED: Final = Kv.TRANSFERRED


class FigureWriter:
    """It counts finished records into the cells of the workers that served them."""

    def __init__(self, cells: Row, slot_of: Callable[[str], int | None]) -> None:
        """`slot_of` tells where a worker's cells are; None for one that is not there any more."""
        self._cells = cells
        self._slot_of = slot_of

    def note(self, record: RequestRecord) -> None:
        """Count one record."""
        failed = record.failed
        if failed is not None:
            self._note_failed(failed, record.attempts)
        if record.status != 200 or record.error_code is not None:
            return
        is_timed = failed is None  # else nobody knows whose the time was
        began, prefill_done = record.admitted, record.prefill_done
        moved = 1 if record.kv is _TRANSFERRED else 0
        if record.prefill_worker is not None:
            self._note_served(record.prefill_worker, moved, prefill_done - began if is_timed else -1.0)
            began = prefill_done or began
        if record.decode_worker is not None:
            start = self._note_served(
                record.decode_worker, moved, record.first_byte - began if is_timed else -1.0
            )
            pieces = record.pieces
            if is_timed and pieces >= _LEAST_PIECES and start >= 0:
                self._observe(start + GAP, (record.finished - record.first_byte) / (pieces - 1))

    def _note_served(self, worker: str, moved: int, first_byte_s: float) -> int:
        """Return where the worker's cells begin; -1 if it has none."""
        start = self._start(worker)
        if start >= 0:
            cells = self._cells
            cells[start + SERVED] += 1
            cells[start + TRANSFERS] += moved
            if first_byte_s >= 0.0:
                self._observe(start + FIRST_BYTE, first_byte_s)
        return start

    def _note_failed(self, failed: Sequence[FailedAttempt], attempts: int) -> None:
        for number, attempt in enumerate(failed, 1):
            start = self._start(attempt.worker)
            if start >= 0:
                self._cells[start + ERRORS] += 1
                self._cells[start + RETRIES] += number < attempts

    def _observe(self, histogram: int, seconds: float) -> None:
        cells = self._cells
        cells[histogram + bisect_left(BOUNDS, seconds)] += 1
        cells[histogram + _HISTOGRAM - 1] += int(seconds * 1e6)

    def _start(self, worker: str) -> int:
        slot = self._slot_of(worker)
        if slot is None or (slot + 1) * CELLS > len(self._cells):
            return -1
        return slot * CELLS


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
