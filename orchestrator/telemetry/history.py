"""The last requests can be looked up by whoever wonders what became of one; the slowest and the failed ones
for longer.

What is kept are the records that the access log has written, so the hot path does nothing for it. Nothing of
the text of a request or an answer is in them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Final

import msgspec

from orchestrator.errors import ClientGone, TooManyConnections
from orchestrator.telemetry.query import RequestQuery
from orchestrator.telemetry.record import FailedAttempt, RequestRecord, Trail

KEPT: Final = 1000  # that have ended last, and as many that were refused: these may come in floods
KEPT_LONG: Final = 100  # of the slowest, and of those that failed last
LONG_S: Final = 3600.0  # slow ones are compared with others of so many seconds
CLIENT_GONE: Final = ClientGone.code
_TURNED_AWAY: Final = TooManyConnections.code  # a status of 503, but unread as those that are refused


class History:
    """It belongs to one process, and to its event loop."""

    def __init__(
        self,
        models: Sequence[str],
        under_way: Callable[[], Iterable[RequestRecord]],
        pending: Iterable[RequestRecord],
        *,
        time: Callable[[], float],
    ) -> None:
        """`time` is the clock of records. `under_way` returns what is known of open requests. `pending` have
        ended, and are not noted yet.
        """
        self._models = models
        self._under_way = under_way
        self._pending = pending
        self._time = time
        self._ended: deque[RequestRecord] = deque(maxlen=KEPT)
        self._refused: deque[RequestRecord] = deque(maxlen=KEPT)
        self._failed: deque[RequestRecord] = deque(maxlen=KEPT_LONG)
        self._slow: list[tuple[float, int, RequestRecord]] = []  # a heap: the fastest comes first
        self._fastest = 0.0  # seconds: who takes no longer is not among the slowest
        self._count = count()
        self._swept = 0.0

    def note(self, records: Sequence[RequestRecord], _offset: float = 0.0) -> None:
        """Keep requests that have ended; they must not change any more. To be called when all others have
        noted what they want of them.
        """
        ended = self._ended
        for record in records:
            record.usage = 0  # it may hold all of an answer
            if record.error_code is not None and not self._note_error(record):
                continue
            if record.attempts is not None:
                self._failed.append(record)
            if record.finished - record.received > self._fastest:
                self._note_slow(record)
            ended.append(record)

    def _note_error(self, record: RequestRecord) -> bool:
        """Keep a request that ended with an error; False if it was refused unserved."""
        if not record.admitted and (record.status < 500 or record.error_code == _TURNED_AWAY):
            if record.request_id:
                self._refused.append(record)
            return False
        is_clients = 400 <= record.status < 500 or record.error_code == CLIENT_GONE
        if not is_clients and record.attempts is None:
            self._failed.append(record)
        return True

    def _note_slow(self, record: RequestRecord) -> None:
        slow = self._slow
        if record.finished > self._swept + LONG_S / 10:
            self._swept = record.finished
            slow[:] = [one for one in slow if one[2].finished > record.finished - LONG_S]
            heapq.heapify(slow)
        entry = (record.finished - record.received, next(self._count), record)
        if len(slow) < KEPT_LONG:
            heapq.heappush(slow, entry)
        else:
            heapq.heapreplace(slow, entry)
        self._fastest = slow[0][0] if len(slow) == KEPT_LONG else 0.0

    # --- looking up -----------------------------------------------------------------------------

    def find(self, query: RequestQuery) -> list[RequestRecord]:
        """Return the requests that are looked for, the newest first, or the slowest."""
        found = [record for record in self._all() if self._is_wanted(record, query)]
        found.sort(key=self.seconds if query.slowest else _received, reverse=True)
        return found[: query.limit]

    def _all(self) -> Iterator[RequestRecord]:
        """Yield each request that is known once; not what has no name to be asked for by."""
        seen: set[int] = set()
        kept = (self._ended, self._refused, self._failed, (one[2] for one in self._slow))
        for records in (self._under_way(), self._pending, *kept):
            for record in records:
                if record.request_id and id(record) not in seen:
                    seen.add(id(record))
                    yield record

    def _is_wanted(self, record: RequestRecord, query: RequestQuery) -> bool:
        if query.name is not None:
            return is_called(record, query.name)
        if query.failed and record.error_code is None and not failures_of(record):
            return False
        if query.key is not None and record.client != query.key:
            return False
        if query.model is not None and self.model_of(record) != query.model:
            return False
        if query.worker is not None and query.worker not in workers_of(record):
            return False
        return not query.slower_s or self.seconds(record) > query.slower_s

    def seconds(self, record: RequestRecord) -> float:
        """Return how long a request took, or has taken so far."""
        return (record.finished or self._time()) - record.received

    def model_of(self, record: RequestRecord) -> str | None:
        """Return the model of the config that a request is for; None if it names none."""
        return self._models[record.model_index] if record.model_index >= 0 else None


def is_called(record: RequestRecord, name: str) -> bool:
    """Tell whether a client knows a request by this name: its request id, or the id of its answer, which has
    a prefix (`chatcmpl-`, `resp_`) that may be left out.
    """
    trail = record.trail
    known = {record.request_id}
    if trail is not None:
        known |= {trail.legs_id, trail.answer_id, named_in_answer(record, trail)}
    known.discard("")
    return not known.isdisjoint((name, name.partition("-")[2], name.partition("_")[2]))


def named_in_answer(record: RequestRecord, trail: Trail) -> str:
    """Return of what workers make the id of its answer: the name that the client has given, or that of the
    leg that began to answer, also where another worker went on with the stream. "" if it is not known.
    """
    if trail.client_id is not None:
        return _named_by_client(trail.client_id)
    begun = (attempt.answer_id for attempt in failures_of(record) if attempt.had_begun)
    return next(begun, trail.answer_id)


def _named_by_client(block: bytes) -> str:
    """Return the name in a header line, or in a JSON string; "" for what is none."""
    if not block.startswith(b'"'):
        return block.decode("latin-1").partition(":")[2].strip()
    try:
        return msgspec.json.decode(block, type=str)
    except ValueError:
        return ""


def failures_of(record: RequestRecord) -> Sequence[FailedAttempt]:
    """Return the attempts that came to nothing, in their order."""
    return () if record.attempts is None else record.attempts.failed


def workers_of(record: RequestRecord) -> list[str]:
    """Return the names of all workers that had a request."""
    failed = [attempt.worker for attempt in failures_of(record)]
    return [name for name in (record.prefill_worker, record.decode_worker, *failed) if name]


def _received(record: RequestRecord) -> float:
    return record.received
