"""Each worker has figures of its own: what it has served and failed, and how fast.

They are made of finished records, in the batches that become lines of the log: a request that is under way
pays nothing for them. A worker has `CELLS` cells of int64 in a row; rows of several processes add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Final

from orchestrator.telemetry.answers import LEAST_TOKENS
from orchestrator.telemetry.counters import Row, histogram_cells, observe_all
from orchestrator.telemetry.record import Attempts, RequestRecord
from orchestrator.wire.usage import Kv, tokens_in

# Inclusive upper bounds in seconds, half again as much each: two workers of which one is three times as slow
# are in different buckets, and what is between two bounds is guessed right within a fifth. The last one,
# 1640 s, is above what a request may take by default.
BOUNDS: Final[tuple[float, ...]] = tuple(round(0.0005 * 1.5**step, 7) for step in range(38))
_HISTOGRAM: Final = histogram_cells(BOUNDS)

SERVED: Final = 0  # requests in which it had its part to the end
ERRORS: Final = 1  # requests that it failed
RETRIES: Final = 2  # of these, how many another attempt followed
TRANSFERS: Final = 3  # hand-offs that it has given, or taken over
FIRST_BYTE: Final = 4  # of a prefill worker its whole answer
GAP: Final = FIRST_BYTE + _HISTOGRAM  # between two tokens, as the mean of one answer
CELLS: Final = GAP + _HISTOGRAM

# The first byte of an answer that is not streamed comes with its last token. A worker that happens to get
# more of these than its peers must not look slower: those of up to two tokens count as first bytes, those of
# at least so many by the time per token, in which the first one has little weight, the others as neither.
_LEAST_WHOLE: Final = 16


# Looking a member up in its enumeration costs as much as a call.
_TRANSFERRED: Final = Kv.TRANSFERRED


class Served:
    """A worker has served this of a batch of records."""

    __slots__ = ("first_bytes", "gaps", "requests", "transfers")

    def __init__(self) -> None:
        self.requests = 0
        self.transfers = 0
        self.first_bytes: list[float] = []  # seconds
        self.gaps: list[float] = []

    def count(self, record: RequestRecord) -> None:
        self.requests += 1
        if record.kv is _TRANSFERRED:
            self.transfers += 1

    def add_answer(self, record: RequestRecord, began: float) -> None:
        """Note the times of an answer that began to be made at this moment."""
        tokens = _tokens(record)
        if record.is_stream:
            self.first_bytes.append(record.first_byte - began)
            if tokens is not None and tokens >= LEAST_TOKENS:
                self.gaps.append((record.finished - record.first_byte) / (tokens - 1))
        elif tokens is None or tokens < LEAST_TOKENS:  # without tokens it is an embedding or the like
            self.first_bytes.append(record.first_byte - began)
        elif tokens >= _LEAST_WHOLE:
            self.gaps.append((record.first_byte - began) / tokens)


class Batch:
    """Workers have served this in a batch of records."""

    __slots__ = ("workers",)

    def __init__(self) -> None:
        self.workers: dict[str, Served] = {}

    def of(self, worker: str) -> Served:
        found = self.workers.get(worker)
        if found is None:
            self.workers[worker] = found = Served()
        return found

    def add(self, record: RequestRecord) -> None:
        """Note a request that was served at the first attempt."""
        began, done = record.admitted, record.prefill_done
        prefill, decode = record.prefill_worker, record.decode_worker
        if prefill is not None:
            served = self.of(prefill)
            served.count(record)
            served.first_bytes.append(done - began)
            began = done or began
        if decode is not None:
            served = self.of(decode)
            served.count(record)
            served.add_answer(record, began)


def _tokens(record: RequestRecord) -> int | None:
    """Return how many tokens an answer has; `telemetry/answers.py` has read it from the usage already."""
    trail = record.trail
    return tokens_in(record.usage)[1] if trail is None else trail.output_tokens


class FigureWriter:
    """It counts finished records into the cells of the workers that served them."""

    def __init__(self, cells: Row, slots: Callable[[], Mapping[str, int]]) -> None:
        """`slots` tells where the cells of the workers are that are there now."""
        self._cells = cells
        self._slots = slots

    def note(self, records: Sequence[RequestRecord]) -> None:
        """Count some records. Most are alike, so they are counted together: a worker at a time."""
        batch = Batch()
        for record in records:
            if record.attempts is not None:
                self._note_failures(record.attempts)
            if record.status == 200 and record.error_code is None:
                if record.attempts is None:
                    batch.add(record)
                else:
                    self._note_untimed(record)
        self._count(batch)

    def _count(self, batch: Batch) -> None:
        cells = self._cells
        for worker, served in batch.workers.items():
            start = self._start(worker)
            if start >= 0:
                cells[start + SERVED] += served.requests
                cells[start + TRANSFERS] += served.transfers
                observe_all(cells, start + FIRST_BYTE, BOUNDS, served.first_bytes)
                observe_all(cells, start + GAP, BOUNDS, served.gaps)

    def _note_untimed(self, record: RequestRecord) -> None:
        """Count a request that was served at a later attempt: nobody knows whose its time was."""
        for worker in (record.prefill_worker, record.decode_worker):
            start = -1 if worker is None else self._start(worker)
            if start >= 0:
                self._cells[start + SERVED] += 1
                self._cells[start + TRANSFERS] += record.kv is _TRANSFERRED

    def _note_failures(self, attempts: Attempts) -> None:
        for number, attempt in enumerate(attempts.failed, 1):
            start = self._start(attempt.worker)
            if start >= 0:
                self._cells[start + ERRORS] += 1
                self._cells[start + RETRIES] += number < attempts.count

    def _start(self, worker: str) -> int:
        """Return where the worker's cells begin; -1 if it has none."""
        slot = self._slots().get(worker)
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
