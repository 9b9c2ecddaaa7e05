"""The access log has a line per request, and one more per slow request, made in batches from records."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from orchestrator.config.options import LogConfig
from orchestrator.config.printing import one_line
from orchestrator.routing.policies.base import Reasons
from orchestrator.telemetry.counters import NO_MODEL, STAGES
from orchestrator.telemetry.lines import json_line, milliseconds, timestamp
from orchestrator.telemetry.logs import Write
from orchestrator.telemetry.record import ONE_ATTEMPT, Attempts, FailedAttempt, Path, RequestRecord
from orchestrator.wire.usage import Kv

# Takes records, and what makes their moments seconds since 1970.
Note = Callable[[Sequence[RequestRecord], float], None]

_log: Final = logging.getLogger("baton.requests")


class AccessLog:
    """The access log takes the finished records of a `Telemetry` several times a second and makes lines of
    them.
    """

    PERIOD_S: Final = 0.1
    # Records per turn of the event loop: about 2 ms of work.
    SLICE: Final = 256

    def __init__(
        self,
        records: deque[RequestRecord],
        models: Sequence[str],
        config: LogConfig,
        write: Write,
        *,
        wall_clock: Callable[[], float] = time.time,
        notes: Sequence[Note] = (),
    ) -> None:
        """Each of `notes` is told of all records, whatever is written of them."""
        self._records = records
        self._notes = notes
        self._models = (*models, NO_MODEL)  # model_index -1 is the last
        self._model_words = (*(f" model={one_line(model)}" for model in models), "")
        self._slow_s = config.slow_request_s
        self._line = self._json_line if config.format == "json" else self._console_line
        self._is_on = config.access
        self._tells_reasons = config.level == "debug"
        self._write = write
        self._wall_clock = wall_clock

    async def run(self) -> None:
        """Write lines until cancelled, then write the last ones."""
        try:
            while True:
                await asyncio.sleep(self.PERIOD_S)
                if len(self._records) == self._records.maxlen:
                    _log.warning("requests end faster than their lines are written: some lines are lost")
                while self._records:
                    self.flush(self.SLICE)
                    await asyncio.sleep(0)
        finally:
            self.flush(len(self._records))

    def flush(self, count: int) -> None:
        """Make lines of the oldest `count` records."""
        records = [self._records.popleft() for _ in range(min(count, len(self._records)))]
        offset = self._wall_clock() - asyncio.get_running_loop().time()
        if self._is_on and records:
            lines = bytearray()  # each line is freed at once: a list of them costs as much again
            for record in records:
                lines += self._line(record, offset)
            self._write(bytes(lines))
        for note in self._notes:
            note(records, offset)
        for record in records:
            if record.finished - record.received >= self._slow_s:
                self._warn(record)

    def _console_line(self, record: RequestRecord, offset: float) -> bytes:
        """Return a line for people: what every request has, then NAME=VALUE for what this one has too."""
        error = f" error={record.error_code}" if record.error_code else ""
        client = f" client={one_line(record.client)}" if record.client else ""
        reasons = _reason_words(record) if self._tells_reasons else ""
        ended = timestamp(record.finished + offset)
        workers = _worker_words(record.prefill_worker, record.decode_worker)
        if record.attempts is not None:
            workers += _handoff_words(record.attempts) + _attempt_words(record.attempts)
        line = (
            f"{ended} ACCESS {record.request_id} {record.status} {record.endpoint}"
            f"{self._model_words[record.model_index]}{_PATH_WORDS[record.path]}{error}"
            f" stream={record.is_stream}{_stage_words(record)}{_KV_WORDS[record.kv]}{workers}"
            f" bytes_in={record.bytes_in} bytes_out={record.bytes_out}{client}{reasons}\n"
        )
        return line.encode()

    def _json_line(self, record: RequestRecord, offset: float) -> bytes:
        return json_line(self._fields(record, offset))

    def _fields(self, record: RequestRecord, offset: float) -> dict[str, Any]:
        queue_s, prefill_s, first_byte_s, total_s = record.stages()
        whole_reason, prefill_reason, decode_reason = _reasons(record.reasons)
        attempts = record.attempts or ONE_ATTEMPT
        return {
            "time": timestamp(record.finished + offset),
            "level": "info",
            "logger": "baton.access",
            "id": record.request_id,
            "endpoint": record.endpoint,
            "model": self._models[record.model_index] or None,
            "path": _PATHS[record.path],
            "status": record.status,
            "error": record.error_code,
            "stream": record.is_stream,
            "queue_ms": _ms(queue_s),
            "prefill_ms": _ms(prefill_s),
            "decode_first_byte_ms": _ms(first_byte_s),
            "total_ms": _ms(total_s),
            "kv": _KV[record.kv],
            "prefill_worker": record.prefill_worker,
            "decode_worker": record.decode_worker,
            "whole_reason": whole_reason,
            "prefill_reason": prefill_reason,
            "decode_reason": decode_reason,
            "handoff_given_up": attempts.handoff_given_up,
            "attempts": attempts.count if record.admitted else 0,
            "failed": [_attempt_fields(attempt) for attempt in attempts.failed] or None,
            "bytes_in": record.bytes_in,
            "bytes_out": record.bytes_out,
            "client": record.client,
        }

    def _warn(self, record: RequestRecord) -> None:
        stages = dict(zip(STAGES, record.stages(), strict=True))
        _log.warning(
            "slow request %s: %s; model %s, workers %s%s%s",
            record.request_id,
            ", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items() if seconds >= 0.0),
            self._models[record.model_index] or "unknown",
            " -> ".join(filter(None, (record.prefill_worker, record.decode_worker))) or "none",
            _attempt_words(record.attempts) if record.attempts is not None else "",
            _reason_words(record),
        )


_PATHS: Final = tuple(None if path is Path.NONE else path.name.lower() for path in Path)
_KV: Final = tuple(None if kv is Kv.NONE else kv.name.lower() for kv in Kv)
_NOTHING_TOLD: Final[tuple[str, str, str]] = ("", "", "")
_REASONS: Final[tuple[str, ...]] = ("whole_reason", "prefill_reason", "decode_reason")
_PATH_WORDS: Final = tuple(f" path={name}" if name else "" for name in _PATHS)
_KV_WORDS: Final = tuple(f" kv={name}" if name else "" for name in _KV)


def _stage_words(record: RequestRecord) -> str:
    told = None if record.trail is None else record.trail.told_ms
    queue, prefill, decode = _NOTHING_TOLD if told is None else told
    if prefill and record.first_byte and record.status == 200:  # then all stages were told
        total = milliseconds(record.finished - record.received)
        return f" queue_ms={queue} prefill_ms={prefill} decode_first_byte_ms={decode} total_ms={total}"
    queue_s, prefill_s, first_byte_s, total_s = record.stages()
    words = f" total_ms={milliseconds(total_s)}"
    if first_byte_s >= 0.0:
        words = f" decode_first_byte_ms={decode or milliseconds(first_byte_s)}{words}"
    if prefill_s >= 0.0:
        words = f" prefill_ms={prefill or milliseconds(prefill_s)}{words}"
    if queue_s >= 0.0:
        words = f" queue_ms={queue or milliseconds(queue_s)}{words}"
    return words


def _handoff_words(attempts: Attempts) -> str:
    return f" handoff_given_up={attempts.handoff_given_up}" if attempts.handoff_given_up else ""


def _attempt_words(attempts: Attempts) -> str:
    failed = ",".join(one_line(str(attempt)) for attempt in attempts.failed)
    return f" attempts={attempts.count} failed={failed}" if failed else ""


def _attempt_fields(attempt: FailedAttempt) -> dict[str, Any]:
    ms = _ms(attempt.seconds)
    return {"worker": attempt.worker, "outcome": attempt.outcome, "ms": ms}


def _ms(seconds: float) -> float | None:
    return int(seconds * 1e6) / 1e3 if seconds >= 0.0 else None


def _reasons(reasons: Reasons[Any] | None) -> tuple[str | None, str | None, str | None]:
    """Return why one worker serves a request as a whole, and why it is this prefill and decode worker."""
    if reasons is None:
        return None, None, None
    prefill = reasons.prefill_choice
    return reasons.whole_reason, None if prefill is None else str(prefill), str(reasons.decode_choice)


def _reason_words(record: RequestRecord) -> str:
    """Return the reasons of a record in quotes, as they are sentences."""
    told = zip(_REASONS, _reasons(record.reasons), strict=True)
    return "".join(f' {name}="{one_line(reason)}"' for name, reason in told if reason)


@functools.lru_cache(maxsize=256)  # pairs of workers come again and again
def _worker_words(prefill: str | None, decode: str | None) -> str:
    words = f" prefill_worker={one_line(prefill)}" if prefill else ""
    return f"{words} decode_worker={one_line(decode)}" if decode else words
