"""What happens is kept as numbers: one record per request, and counters in a flat row of int64.

The hot path makes two calls per request, `Telemetry.begin` and `Telemetry.finish`; both only add to
integers. A row holds sums alone, so the rows of several processes, side by side in shared memory, add up
cell by cell. Cells get names and labels when somebody asks (`control/metrics.py`); finished records become
lines later, in batches (`telemetry/access_log.py`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import ClassVar, Final, TypeAlias

from orchestrator import errors
from orchestrator.telemetry.events import Events
from orchestrator.telemetry.record import RequestRecord
from orchestrator.wire.usage import Kv

Row: TypeAlias = "array[int] | memoryview"  # of int64, format "q"

# --- what is counted ----------------------------------------------------------------------------


class FallbackReason(IntEnum):
    """This is why a body went to a worker as JSON although msgpack was asked for."""

    NOT_ENCODABLE = 0  # msgpack cannot carry it, e.g. an integer over 64 bits
    TOO_LARGE = 1  # what is left of it between the legs is too large to transcode in place
    REFUSED = 2  # the worker refused what it had announced


class RetryReason(IntEnum):
    """This leg failed, so that (a part of) a request was sent again."""

    PREFILL = 0  # the prefill leg
    DECODE = 1  # the decode leg, before anything of it had reached the client
    WHOLE = 2  # that of a request served by one worker
    STREAM = 3  # one whose stream had begun: the rest came from another worker


class RejectReason(IntEnum):
    """This is why a request was refused before anything was done for it."""

    QUEUE_FULL = 0
    TOO_LATE = 1  # it would not have been answered before its deadline, or would have waited for too long
    WAITED = 2  # it has waited for too long
    MEMORY = 3  # requests hold too many bytes
    OVER_SHARE = 4  # the queue was full, and its API key had the most in it beyond its share
    KEY_REQUESTS = 5  # its API key has sent too many per minute
    KEY_TOKENS = 6  # its API key has used too many tokens per minute
    KEY_CONCURRENCY = 7  # its API key has too many open


class HandoffTrouble(IntEnum):
    """This is why a hand-off that a decode worker had was given up (`legs/handoff_watch.py`)."""

    LATE = 0  # its answer had not begun when the lease ended
    STALLED = 1  # it did not get on


class LeaseState(IntEnum):
    """A finished prefill's KV blocks are in one of these states (`legs/ledger.py`). Two are open: gauges."""

    HELD = 0  # the prefill worker pins the blocks for us
    USED = 1  # bytes of a decode leg with this hand-off were written
    CONSUMED = 2
    RELEASED = 3
    EXPIRED = 4


OPEN_LEASES: Final = tuple(state for state in LeaseState if state < LeaseState.CONSUMED)
ENDED_LEASES: Final = tuple(state for state in LeaseState if state >= LeaseState.CONSUMED)

# A queue is measured in these (`relay/admission.py`).
QUEUE_UNITS: Final[tuple[str, ...]] = ("requests", "tokens", "bytes")
OTHER: Final = "other"  # the label for what is in no fixed list
NO_MODEL: Final = ""  # no configured name can be empty
STAGES: Final[tuple[str, ...]] = ("queue", "prefill", "decode_first_byte", "total")
TOTAL: Final = STAGES.index("total")  # not a stage beside the others: their sum
STATUSES: Final[tuple[int, ...]] = (200, 400, 401, 404, 405, 408, 413, 415, 422, 429, 499, 500, 502, 503, 504)
ERROR_CODES: Final = tuple(
    dict.fromkeys(
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.BatonError)
    )
)
# Inclusive upper bounds in seconds; one more bucket takes what is above the last. They reach above what a
# request may take by default, 600 s, so that a deadline that is missed looks unlike one that is met.
STAGE_BOUNDS: Final[tuple[float, ...]] = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1200.0,
    3600.0,
)
# Of the time between two tokens: finer where engines are, and above the silence that a stream may keep.
GAP_BOUNDS: Final[tuple[float, ...]] = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1.0,
    2.5,
    10.0,
    60.0,
    600.0,
    1200.0,
)
LAG_BOUNDS: Final[tuple[float, ...]] = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0),  # above `hang_timeout_s`, when the process is ended
)


def histogram_cells(bounds: Sequence[float]) -> int:
    """Return how many cells a histogram has: a count per bucket, one above the last bound, the sum in us."""
    return len(bounds) + 2


# Of each model there are these cells for what was answered (`telemetry/answers.py`).
PROMPT_TOKENS: Final = 0
GENERATION_TOKENS: Final = 1
FIRST_TOKEN: Final = 2  # a histogram with STAGE_BOUNDS
INTER_TOKEN: Final = FIRST_TOKEN + histogram_cells(STAGE_BOUNDS)  # one with GAP_BOUNDS
CACHED_TOKENS: Final = INTER_TOKEN + histogram_cells(GAP_BOUNDS)  # of the prompts, where these were computed
ANSWER_CELLS: Final = CACHED_TOKENS + 1


class Layout:
    """A layout says which cell of a row counts what; it follows from names alone, the same in every process.

    Cells before `lease_ends` are gauges (they fall again), all others only grow.
    """

    def __init__(self, models: Iterable[str], endpoints: Iterable[str]) -> None:
        self.models = (*models, NO_MODEL)
        self.endpoints = (*endpoints, OTHER)
        self.statuses = (*map(str, STATUSES), OTHER)
        self.error_codes = (*ERROR_CODES, OTHER)
        self.in_flight = 0
        self.queues = self.in_flight + len(self.models)  # of each model that has a name, one per QUEUE_UNITS
        self.held_bytes = self.queue_cell(len(self.models) - 1)
        self.leases = self.held_bytes + 1  # one cell per LeaseState
        self.lease_ends = self.leases + LeaseState.CONSUMED
        self.leases_leaked = self.leases + len(LeaseState)
        self.requests = self.leases_leaked + 1
        self.stages = self.requests + len(self.models) * len(self.endpoints) * len(self.statuses)
        self.errors = self.stages + len(self.models) * len(STAGES) * histogram_cells(STAGE_BOUNDS)
        self.kv = self.errors + len(self.error_codes)
        self.fallbacks = self.kv + len(Kv)
        self.retries = self.fallbacks + len(FallbackReason)
        self.rejections = self.retries + len(RetryReason)
        self.poison = self.rejections + len(RejectReason)
        self.handoffs = self.poison + 1
        self.lag = self.handoffs + len(HandoffTrouble)
        self.log_lost = self.lag + histogram_cells(LAG_BOUNDS)
        self.answers = self.log_lost + 1
        self.size = self.answers + len(self.models) * ANSWER_CELLS

    @property
    def counters(self) -> range:
        """Return the cells that only grow."""
        return range(self.lease_ends, self.size)

    def queue_cell(self, model: int) -> int:
        """Return the cell of the first unit of a queue; the others follow."""
        return self.queues + model * len(QUEUE_UNITS)

    def request_cell(self, model: int, endpoint: int) -> int:
        """Return the cell of the first status; the others follow in the order of `statuses`."""
        return self.requests + (model * len(self.endpoints) + endpoint) * len(self.statuses)

    def stage_cell(self, model: int, stage: int) -> int:
        """Return the first cell of a stage's histogram."""
        return self.stages + (model * len(STAGES) + stage) * histogram_cells(STAGE_BOUNDS)

    def answer_cell(self, model: int) -> int:
        """Return the first cell of a model's answers; -1 is the last model, that of unknown ones."""
        return self.answers + model % len(self.models) * ANSWER_CELLS


def sum_rows(rows: Iterable[Row]) -> list[int]:
    """Return the sum of rows: what all processes counted together."""
    return [sum(cells) for cells in zip(*rows, strict=True)]


class Telemetry:
    """A telemetry is the only writer of its row. Finished records wait in `records` for the log.

    `row` may be given: format "q", `layout.size` cells, for instance over shared memory. To add to one of
    these cells costs thirty times what it costs in a list, so the times of requests are counted in a list
    first: whoever reads the row of another process has them a batch of the log later.
    """

    # About a second of requests at full speed. The log takes them several times a second; if it cannot,
    # the oldest are lost, not the memory.
    KEPT_RECORDS: ClassVar[int] = 16384

    def __init__(self, layout: Layout, row: Row | None = None, events: Events | None = None) -> None:
        """`events` hear of what the person on call wants to know of."""
        self.layout = layout
        self.events = events
        # As others see it; who writes here does not wait for `fold`.
        self.cells: Row = array("q", bytes(8 * layout.size)) if row is None else row
        if len(self.cells) != layout.size:
            raise ValueError(f"a row of {layout.size} cells is needed, not {len(self.cells)}")
        self._times = [0] * layout.size  # counted since the last `fold`
        self._has_times = False
        self.records: deque[RequestRecord] = deque(maxlen=self.KEPT_RECORDS)
        self.keeps_requests = False  # in their records: the log of decisions looks at them
        # Indexed with model_index: -1 finds the last entry, which is the one of unknown models.
        self._requests = [
            {name: layout.request_cell(model, index) for index, name in enumerate(layout.endpoints)}
            for model in range(len(layout.models))
        ]
        self._in_flight = [layout.in_flight + model for model in range(len(layout.models))]
        self._stages = [layout.stage_cell(model, 0) for model in range(len(layout.models))]
        self._statuses = {status: index for index, status in enumerate(STATUSES)}
        self._errors = {code: layout.errors + index for index, code in enumerate(layout.error_codes)}

    @property
    def row(self) -> Row:
        """These are all cells, with all that was counted."""
        self.fold()
        return self.cells

    def fold(self) -> None:
        """Add the times of requests to the row, where other processes see them."""
        if not self._has_times:
            return
        self._has_times = False
        times, cells = self._times, self.cells
        for cell in range(self.layout.stages, self.layout.errors):
            if times[cell]:
                cells[cell] += times[cell]
                times[cell] = 0

    def begin(self, record: RequestRecord) -> None:
        """Count a request as in flight, for the model known by now. One `finish` must follow."""
        record.in_flight_cell = cell = self._in_flight[record.model_index]
        self.cells[cell] += 1

    def finish(self, record: RequestRecord) -> None:
        """Count a request that ended, with or without `begin`. The record must not change any more."""
        row = self.cells
        if record.in_flight_cell >= 0:
            row[record.in_flight_cell] -= 1
        endpoints = self._requests[record.model_index]
        cell = endpoints.get(record.endpoint) or endpoints[OTHER]
        row[cell + self._statuses.get(record.status, len(STATUSES))] += 1
        if record.error_code is not None:
            row[self._errors.get(record.error_code) or self._errors[OTHER]] += 1
        if record.kv:
            row[self.layout.kv + record.kv] += 1
        self._observe_stages(record)
        self.records.append(record)

    def _observe_stages(self, record: RequestRecord) -> None:
        times, cell = self._times, self._stages[record.model_index]
        self._has_times = True
        for seconds in record.stages():
            if seconds >= 0.0:
                us = int(seconds * 1e6)
                if us < _FINE_US:
                    bucket = _FINE[us // 1000]
                    if seconds > STAGE_BOUNDS[bucket]:
                        bucket += 1
                else:
                    bucket = bisect_left(STAGE_BOUNDS, seconds)
                times[cell + bucket] += 1
                times[cell + _STAGE_SUM] += us
            cell += _STAGE_CELLS

    def transport_fallback(self, reason: FallbackReason) -> None:
        self.cells[self.layout.fallbacks + reason] += 1

    def retry(self, reason: RetryReason) -> None:
        self.cells[self.layout.retries + reason] += 1

    def rejected(self, reason: RejectReason) -> None:
        self.cells[self.layout.rejections + reason] += 1

    def poison(self) -> None:
        self.cells[self.layout.poison] += 1

    def handoff_given_up(self, trouble: HandoffTrouble) -> None:
        self.cells[self.layout.handoffs + trouble] += 1

    def log_lost(self, lines: int) -> None:
        """Note how many lines of the log were lost so far."""
        self.cells[self.layout.log_lost] = lines

    def loop_lag(self, seconds: float) -> None:
        _observe(self.cells, self.layout.lag, LAG_BOUNDS, seconds)

    def tell(self, kind: str, message: str, subject: str = "") -> None:
        """Note an event (`telemetry/events.py`) that may come often; `subject` is the worker it is about."""
        if self.events is not None:
            self.events.note_often(kind, message, subject=subject)

    @property
    def in_flight(self) -> int:
        """Return how many requests are between `begin` and `finish` in this process."""
        return sum(self.cells[self.layout.in_flight : self.layout.queues])


_STAGE_CELLS: Final = histogram_cells(STAGE_BOUNDS)
_STAGE_SUM: Final = _STAGE_CELLS - 1
# Of times below a second, by whole milliseconds: the bucket of the shortest. Bounds are farther apart than
# these, so the bucket of any is this or the next one. `bisect_left` costs six times as much, compiled.
_FINE_US: Final = 1_000_000
_FINE: Final[list[int]] = [bisect_left(STAGE_BOUNDS, ms / 1000) for ms in range(_FINE_US // 1000)]


def _observe(row: Row, cell: int, bounds: Sequence[float], seconds: float) -> None:
    row[cell + bisect_left(bounds, seconds)] += 1
    # Microseconds: as nanoseconds the sum over a thousand open requests would overflow within months.
    row[cell + len(bounds) + 1] += int(seconds * 1e6)


def observe_all(row: Row, cell: int, bounds: Sequence[float], seconds: list[float]) -> None:
    """Count observations, which are sorted here: most of them fall into few buckets. What is negative was
    none.
    """
    seconds.sort()
    first = at = bisect_left(seconds, 0.0)
    while at < len(seconds):
        bucket = bisect_left(bounds, seconds[at])
        end = bisect_right(seconds, bounds[bucket], at) if bucket < len(bounds) else len(seconds)
        row[cell + bucket] += end - at
        at = end
    row[cell + len(bounds) + 1] += int(sum(seconds[first:]) * 1e6)
