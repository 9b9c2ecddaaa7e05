"""What became of a request is told from its record: when what was done, by whom, and why by these.

All of it is made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from orchestrator.routing.policies.base import Candidate, Choice
from orchestrator.telemetry.counters import LeaseState
from orchestrator.telemetry.history import CLIENT_GONE, History, failures_of, named_in_answer
from orchestrator.telemetry.record import ONE_ATTEMPT, FailedAttempt, Path, RequestRecord, Trail
from orchestrator.wire.usage import Kv

Document = dict[str, Any]

# Workers make the `id` of an answer of this and the name of its leg, or that of the client.
_PREFIXES: Final = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/embeddings": "embd-",
}
_RESPONSE: Final = "resp_"  # legs of which the name is the whole id begin with it

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
            "answer_id": _answer_id(record),
            "worker_id": _worker_id(record),
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
        reasons, trail = record.reasons, record.trail
        if reasons is None:
            return None
        told: Document = msgspec.json.decode(trail.explained) if trail is not None and trail.explained else {}
        made: Document = {"whole_reason": reasons.whole_reason}
        made |= {name: told[name] for name in ("auto", "pair") if name in told}
        for role, choice, candidates in (
            ("prefill", reasons.prefill_choice, reasons.prefills),
            ("decode", reasons.decode_choice, reasons.decodes),
        ):
            if choice is not None:
                made[role] = self._choice(record, role, choice, candidates, told)
        return made

    def _choice(
        self,
        record: RequestRecord,
        role: str,
        choice: Choice[Any],
        candidates: Sequence[Candidate] | None,
        told: Document,
    ) -> Document:
        """`told` is what was noted of all workers before the choice; nothing of most requests."""
        chosen, terms = choice.worker.name, choice.terms()
        names = [candidate.name for candidate in candidates or ()] or [chosen]
        leg = told.get(role, {})
        is_told = leg.get("chosen") == chosen
        if is_told:  # as it was then: what has been learned since is in the choice's own
            terms = next((one["terms"] for one in leg["candidates"] if one["chosen"]), terms)
        return {
            "worker": chosen,
            "reason": str(choice),
            "terms": terms,
            "candidates": leg["candidates"] if is_told else _candidates(names, chosen, terms),
            "candidates_in_all": len(leg["candidates"]) if is_told else len(names),
            "rejected": list(self._rejected(record, role, names, told)),
        }

    def _rejected(
        self, record: RequestRecord, role: str, names: Sequence[str], told: Document
    ) -> Iterator[Document]:
        """Yield who was no candidate. Of most requests only what they have seen themselves is known."""
        reasons = {one["worker"]: one["why"] for one in told.get("rejected", ())}
        for attempt in failures_of(record):
            reasons[attempt.worker] = f"it had failed the request: {attempt.outcome}"
        known = set(names)
        for name, state in list(self._others(self._history.model_of(record), role))[: 10 * MOST_SHOWN]:
            if name not in known:
                yield {"worker": name, "why": reasons.get(name, "it took none then"), "state_now": state}


def _candidates(names: Sequence[str], chosen: str, terms: Mapping[str, float]) -> list[Document]:
    """Return candidates of which only the numbers of the chosen one are known."""
    return [
        {"worker": name, "chosen": name == chosen, "terms": terms if name == chosen else {}}
        for name in names[:MOST_SHOWN]
    ]


def _answer_id(record: RequestRecord) -> str | None:
    """Return the `id` in the body of the answer; None if there is none, or it is not known."""
    trail, is_error = record.trail, record.status >= 400 and record.error_code != CLIENT_GONE
    if trail is None or not trail.answer_id or is_error:
        return None
    if trail.answer_id.startswith(_RESPONSE):
        return trail.answer_id
    prefix, name = _PREFIXES.get(record.endpoint), named_in_answer(record, trail)
    return prefix + name if prefix is not None and name else None


def _worker_id(record: RequestRecord) -> str | None:
    """Return what the worker that was to answer last was told to call the request."""
    trail = record.trail
    if trail is None or not trail.answer_id:
        return None
    is_named = trail.client_id is not None and not trail.answer_id.startswith(_RESPONSE)
    return (named_in_answer(record, trail) if is_named else "") or trail.answer_id


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
    handed_over = {0.0}
    for attempt in failures_of(record):
        yield from _attempt_moments(attempt, handed_over)
        handed_over.add(attempt.prefill_done)
    trail = record.trail
    if trail is not None:
        yield from _leg_moments(record, trail, handed_over)
    if record.first_byte and record.status:
        yield record.first_byte, "first byte to the client", None
    if record.finished:
        yield record.finished, _end(record), None


def _attempt_moments(
    attempt: FailedAttempt, handed_over: Collection[float]
) -> Iterator[tuple[float, str, str | None]]:
    """`handed_over` are the moments of the hand-offs of earlier attempts, one of which this one may share."""
    if attempt.prefill_sent:
        yield attempt.prefill_sent, "prefill sent", attempt.prefill_worker
    if _has_own(attempt.prefill_sent, attempt.prefill_done, handed_over):
        yield attempt.prefill_done, "prefill answered, handed over", attempt.prefill_worker
    if attempt.decode_sent:
        yield attempt.decode_sent, "sent" if attempt.prefill_worker is None else "decode sent", attempt.worker
    else:
        yield attempt.began, "was given to a worker that failed it", attempt.worker
    yield attempt.began + attempt.seconds, f"had failed there: {attempt.outcome}", attempt.worker


def _has_own(sent: float, done: float, handed_over: Collection[float]) -> bool:
    """Tell whether an attempt had a hand-off, and none that is told of an earlier one."""
    return 0.0 < sent <= done or done not in handed_over


def _leg_moments(
    record: RequestRecord, trail: Trail, handed_over: Collection[float]
) -> Iterator[tuple[float, str, str | None]]:
    """Yield those of the last attempt."""
    if trail.prefill_sent:
        yield trail.prefill_sent, "prefill sent", record.prefill_worker
    done = (record.attempts or ONE_ATTEMPT).prefill_done or record.prefill_done
    if _has_own(trail.prefill_sent, done, handed_over):
        worker = record.prefill_worker if trail.prefill_sent <= done else None
        yield done, "prefill answered, handed over", worker
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
    chosen = (record.attempts or ONE_ATTEMPT).count
    return [
        {
            "worker": attempt.worker,
            "outcome": attempt.outcome,
            "at_ms": _ms(attempt.began - record.received),
            "took_ms": _ms(attempt.seconds),
            "then": "ended" if number >= chosen else "resumed" if attempt.had_begun else "resent",
        }
        for number, attempt in enumerate(failures_of(record), start=1)
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
    """Return what is known of the tokens of prompt and answer."""
    trail, reasons = record.trail, record.reasons
    choices = () if reasons is None else (reasons.prefill_choice, reasons.decode_choice)
    reckoned = [choice.prompt_tokens() for choice in choices if choice is not None]
    return {
        "prompt_estimated": next((int(tokens) for tokens in reckoned if tokens >= 0), None),
        "prompt": None if trail is None else trail.prompt_tokens,
        "prompt_cached": None if trail is None else trail.cached_tokens,
        "output": None if trail is None else trail.output_tokens,
    }


def _moment(told: tuple[float, str, str | None]) -> float:
    return told[0]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _ms_or_none(seconds: float) -> float | None:
    return _ms(seconds) if seconds >= 0.0 else None
