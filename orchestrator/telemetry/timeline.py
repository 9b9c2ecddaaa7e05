"""What became of a request is told from its record: when what was done, by whom, and why by these.

All of it is made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from orchestrator.routing.policies.base import Candidate, Choice
from orchestrator.telemetry.counters import LeaseState
from orchestrator.telemetry.history import CLIENT_GONE, History, failures_of
from orchestrator.telemetry.record import ONE_ATTEMPT, Path, RequestRecord, Trail
from orchestrator.wire.usage import Kv

Document = dict[str, Any]

MOST_SHOWN: Final = 64  # candidates, and as many of those that were none
_LEASES: Final = {
    LeaseState.HELD: "held: nobody had pulled the blocks when the request ended, so they were given back",
    LeaseState.USED: "used: a decode worker was told of the blocks, and nobody knows whether it pulled them",
    LeaseState.CONSUMED: "consumed: the decode worker pulled the blocks",
    LeaseState.RELEASED: "released: the blocks were given back",
    LeaseState.EXPIRED: "expired: the blocks stayed pinned until the lease ended",
}


class Timelines:
    """It words the records of one process."""

    def __init__(
        self,
        history: History,
        process: int,
        others: Callable[[str | None, str], Iterable[tuple[str, str]]],
        wall_clock: Callable[[], float],
        time: Callable[[], float],
    ) -> None:
        """`others` names all workers that a leg of a model could have by its role, with their states now."""
        self._history = history
        self._process = process
        self._others = others
        self._wall_clock = wall_clock
        self._time = time

    def summary(self, record: RequestRecord) -> Document:
        """Return what a list shows of a request."""
        is_open = not record.finished
        return {
            "id": record.request_id,
            "received": round(record.received - self._time() + self._wall_clock(), 6),
            "state": _state(record) if is_open else "ended",
            "key": record.client,
            "api": record.endpoint,
            "model": self._history.model_of(record),
            "stream": record.is_stream,
            "status": record.status or None,
            "error": record.error_code,
            "path": None if record.path is Path.NONE else record.path.name.lower(),
            "prefill_worker": record.prefill_worker,
            "decode_worker": record.decode_worker,
            "attempts": (record.attempts or ONE_ATTEMPT).count if record.admitted else 0,
            "total_ms": _ms(self._history.seconds(record)),
            "bytes_in": record.bytes_in,
            "bytes_out": record.bytes_out,
            "process": self._process,
        }

    def timeline(self, record: RequestRecord) -> Document:
        """Return all that is known of a request."""
        return {
            **self.summary(record),
            "answer_id": record.trail.answer_id or None if record.trail is not None else None,
            "client_gone": record.error_code == CLIENT_GONE,
            "stages": _stages(record),
            "timeline": [
                {"ms": _ms(moment - record.received), "what": what, "worker": worker}
                for moment, what, worker in sorted(_moments(record), key=_moment)
            ],
            "failed_attempts": _failed(record),
            "handoff": _handoff(record),
            "tokens": _tokens(record),
            "plan": self._plan(record),
        }

    # --- who was chosen, and why ----------------------------------------------------------------

    def _plan(self, record: RequestRecord) -> Document | None:
        """Return the last plan: who was chosen, and why."""
        reasons = record.reasons
        if reasons is None:
            return None
        made: Document = {"whole_reason": reasons.whole_reason}
        if reasons.prefill_choice is not None:
            made["prefill"] = self._choice(record, "prefill", reasons.prefill_choice, reasons.prefills)
        made["decode"] = self._choice(record, "decode", reasons.decode_choice, reasons.decodes)
        return made

    def _choice(
        self, record: RequestRecord, role: str, choice: Choice[Any], candidates: Sequence[Candidate] | None
    ) -> Document:
        chosen, terms = choice.worker.name, choice.terms()
        names = [candidate.name for candidate in candidates or ()] or [chosen]
        return {
            "worker": chosen,
            "reason": str(choice),
            "terms": terms,
            "candidates": [
                {"worker": name, "chosen": name == chosen, "terms": terms if name == chosen else {}}
                for name in names[:MOST_SHOWN]
            ],
            "candidates_in_all": len(names),
            "rejected": list(self._rejected(record, role, names)),
        }

    def _rejected(self, record: RequestRecord, role: str, names: Sequence[str]) -> Iterator[Document]:
        """Yield who was no candidate. Of an earlier time only what the request itself has seen is known."""
        failed = {attempt.worker: attempt.outcome for attempt in failures_of(record)}
        known = set(names)
        for name, state in list(self._others(self._history.model_of(record), role))[: 10 * MOST_SHOWN]:
            if name not in known:
                why = f"it had failed the request: {failed[name]}" if name in failed else "it took none then"
                yield {"worker": name, "why": why, "state_now": state}


def _state(record: RequestRecord) -> str:
    """Return where a request is that is under way."""
    trail = record.trail
    if trail is None:
        return "waits" if record.bytes_in else "comes in"
    if record.first_byte and record.status:
        return "is answered"
    if record.prefill_worker is not None and not record.prefill_done:
        return "prefills"
    return "decodes"


def _stages(record: RequestRecord) -> dict[str, float | None]:
    """Return how long each stage took, in milliseconds; None for one that was not completed."""
    if not record.finished:
        return {}
    queue_s, prefill_s, first_byte_s, total_s = record.stages()
    return {
        "queue_ms": _ms_or_none(queue_s),
        "prefill_ms": _ms_or_none(prefill_s),
        "decode_first_byte_ms": _ms_or_none(first_byte_s),
        "total_ms": _ms_or_none(total_s),
    }


def _moments(record: RequestRecord) -> Iterator[tuple[float, str, str | None]]:
    """Yield what has happened: when, what, and at which worker."""
    yield record.received, "arrived", None
    if record.admitted:
        yield record.admitted, "left the queue", None
    for attempt in failures_of(record):
        yield attempt.began, "was given to a worker that failed it", attempt.worker
        yield attempt.began + attempt.seconds, f"had failed there: {attempt.outcome}", attempt.worker
    trail = record.trail
    if trail is not None:
        yield from _leg_moments(record, trail)
    if record.first_byte and record.status:
        yield record.first_byte, "first byte to the client", None
    if record.finished:
        yield record.finished, _end(record), None


def _leg_moments(record: RequestRecord, trail: Trail) -> Iterator[tuple[float, str, str | None]]:
    if trail.prefill_sent:
        yield trail.prefill_sent, "prefill sent", record.prefill_worker
    if record.prefill_done:
        yield record.prefill_done, "prefill answered, handed over", record.prefill_worker
    if trail.decode_sent:
        what = "decode sent" if record.prefill_worker is not None else "sent"
        yield trail.decode_sent, what, record.decode_worker


def _end(record: RequestRecord) -> str:
    if record.error_code == CLIENT_GONE:
        return "the client had gone"
    if record.error_code is not None:
        return f"ended with {record.error_code}"
    return "last byte to the client"


def _failed(record: RequestRecord) -> list[Document]:
    return [
        {
            "worker": attempt.worker,
            "outcome": attempt.outcome,
            "at_ms": _ms(attempt.began - record.received),
            "took_ms": _ms(attempt.seconds),
            "then": "resumed" if attempt.had_begun else "resent",
        }
        for attempt in failures_of(record)
    ]


def _handoff(record: RequestRecord) -> Document | None:
    """Return what is known of the KV cache that went from worker to worker."""
    trail = record.trail
    if trail is None or record.prefill_worker is None:
        return None
    return {
        "kv": None if record.kv is Kv.NONE else record.kv.name.lower(),
        "given_up": None if record.attempts is None else record.attempts.handoff_given_up,
        "lease": None if trail.lease < 0 else _LEASES[LeaseState(trail.lease)],
    }


def _tokens(record: RequestRecord) -> Document:
    """Return what is known of the prompt's tokens."""
    trail, reasons = record.trail, record.reasons
    choices = () if reasons is None else (reasons.prefill_choice, reasons.decode_choice)
    reckoned = [choice.prompt_tokens() for choice in choices if choice is not None]
    return {
        "prompt_estimated": next((int(tokens) for tokens in reckoned if tokens >= 0), None),
        "prompt_cached": None if trail is None else trail.cached_tokens,
    }


def _moment(told: tuple[float, str, str | None]) -> float:
    return told[0]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _ms_or_none(seconds: float) -> float | None:
    return _ms(seconds) if seconds >= 0.0 else None
