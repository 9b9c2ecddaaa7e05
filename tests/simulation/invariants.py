"""What must hold after every run, whatever went wrong in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from orchestrator.legs.releases import END_LEG_S, GRACE_S, LAST_WORDS_S, LEAVE_S
from orchestrator.legs.retry import BUDGET_LEAST, MOST_LOST
from orchestrator.relay.scope import SWEEP_S
from orchestrator.telemetry.counters import LeaseState
from orchestrator.wire.usage import Kv
from tests.simulation.client import Received, received
from tests.simulation.cluster import LIMITS, STALL_S, Dispatch
from tests.simulation.engine import Engine, Handoff, Leg
from tests.simulation.language import answer_text, tokens_of
from tests.simulation.schedule import LegFault, Trouble
from tests.simulation.simulate import Request, Result

# Between a cause and what the orchestrator does about it at once, nothing is waited for.
AT_ONCE_S = 0.001

# What a leg may wait at a worker without being late for it: a request's limit is six times as much.
QUEUED_S = 0.5

# A deadline is noticed by the next sweep.
LATE_S = SWEEP_S + AT_ONCE_S


def check(result: Result) -> list[str]:
    """Everything that is wrong with a run, in words; empty if nothing is."""
    return [
        *_rest(result),
        *(problem for request in result.requests for problem in _request(result, request)),
        *_legs(result),
        *(problem for request in result.requests for problem in _losses(result, request)),
        *_handoffs(result),
        *_stalls(result),
        *_dispatches(result),
    ]


def _rest(result: Result) -> Iterator[str]:
    """At the end nothing is held, running or unexplained."""
    yield from (f"{count} {what} are left" for what, count in result.held.items() if count)
    yield from (f"a task is left: {task}" for task in result.tasks_left)
    yield from (f"an error was logged: {error}" for error in result.errors_logged)


# --- what clients got ---------------------------------------------------------------------------


def _request(result: Result, request: Request) -> Iterator[str]:
    client = request.client
    problems = _ending(request) if request.ended is None else _life(result, request)
    yield from (f"{client.name}: {problem}" for problem in problems)


def _ending(request: Request) -> Iterator[str]:
    yield "its request never ended"


def _life(result: Result, request: Request) -> Iterator[str]:
    yield from _times(result, request)
    yield from _record(request)
    if request.client.left is None and not request.client.is_complete:
        yield "its answer has no end"
    elif request.client.status:
        yield from _answer(result, request)


def _times(result: Result, request: Request) -> Iterator[str]:
    client, ended = request.client, request.ended
    assert ended is not None
    if client.left is not None:
        if ended > client.left + AT_ONCE_S:
            yield "its request went on after it had left"
        return
    if not client.spec.is_stream or not client.progress:
        if ended > client.began + LIMITS.request_timeout_s + LATE_S:
            yield "its request ended after its deadline"
        return
    sent = [dispatch.time for dispatch in result.dispatches if dispatch.number == client.spec.number]
    said = [time for leg in _legs_of(result, request) for time in leg.said]  # also what is no whole event yet
    begun = [time for time in (*sent, *said) if client.progress[0] < time < ended]
    signs = sorted([*client.progress, *begun, ended])
    silences = [later - earlier for earlier, later in pairwise(signs)]
    if max(silences) > LIMITS.stream_idle_timeout_s + SWEEP_S + LATE_S:
        yield "its stream was silent beyond the limit"


def _record(request: Request) -> Iterator[str]:
    record, client = request.record, request.client
    if record is None:
        yield "there is no record of its request"
        return
    expected = client.status or 499
    if record.status != expected:
        yield f"it got {expected}, and the record says {record.status}"
    got = received(client)
    if not client.status:
        return
    has_failed = client.left is not None or got.error is not None
    if has_failed != (record.error_code is not None):
        yield f"the record says {record.error_code}"


def _legs_of(result: Result, request: Request) -> list[Leg]:
    return [leg for leg in result.legs if leg.number == request.client.spec.number]


def _answer(result: Result, request: Request) -> Iterator[str]:
    client, got = request.client, received(request.client)
    whole = answer_text(client.spec.number, client.spec.answer_tokens)
    if client.left is not None:
        if client.spec.is_stream and client.status == 200 and not whole.startswith(got.text):
            yield f"until it left it got {got.text!r}"
    elif got.error is not None:
        yield from _failure(result, request, got, whole)
    else:
        yield from _success(result, request, got, whole)


def _failure(result: Result, request: Request, got: Received, whole: str) -> Iterator[str]:
    if got.is_malformed or (request.client.is_streaming and not got.is_done):
        yield f"its error has no end: {request.client.sent!r}"
    if not whole.startswith(got.text):
        yield f"before the error it got {got.text!r}"
    if not _is_excused(result, request):
        yield f"it got an error although nothing went wrong: {got.error}"
    elif _is_survivable(result, request, got):
        yield f"one lost leg was not replaced: {got.error}"


def _success(result: Result, request: Request, got: Received, whole: str) -> Iterator[str]:
    spec = request.client.spec
    if got.is_malformed or (spec.is_stream and not got.is_done) or got.has_postscript:
        yield f"its answer is no whole answer: {request.client.sent!r}"
    if got.text != whole:
        yield f"it got {got.text!r}, not {whole!r}"
    if got.finish_reasons != [spec.finish_reason]:
        yield f"its finish_reasons are {got.finish_reasons}"
    if len(got.ids) != 1:
        yield f"its answer has the ids {sorted(got.ids)}"
    if spec.wants_ids and spec.is_stream and got.token_ids != tokens_of(whole):
        yield f"it got the token ids {got.token_ids}"
    if len(got.usages) != (not spec.is_stream or spec.wants_usage):
        yield f"it got the usage {got.usages}"
    yield from _kv(result, request)
    yield from _in_time(result, request)


def _in_time(result: Result, request: Request) -> Iterator[str]:
    """No answer is relayed that began when the lease of its blocks was over."""
    legs = [leg for leg in _legs_of(result, request) if leg.is_stale]
    for leg in legs:
        if leg is _legs_of(result, request)[-1] or leg.spoke in request.client.progress:
            yield f"{leg.name} on {leg.engine.name} began after its lease, and was relayed"


def _kv(result: Result, request: Request) -> Iterator[str]:
    """A recompute is never silent."""
    answering = _legs_of(result, request)[-1]
    said = request.record.kv if request.record is not None else None
    if answering.kind != "decode" or not answering.is_served:
        return
    if said is not (Kv.TRANSFERRED if answering.is_pulled else Kv.RECOMPUTED):
        yield f"its KV is said to be {said!r}"


def _is_excused(result: Result, request: Request) -> bool:
    """Something went wrong on the way of this request that may have ended it."""
    legs = _legs_of(result, request)
    met = {dispatch.worker for dispatch in result.dispatches if dispatch.number == request.client.spec.number}
    if not met:  # no worker for it
        met = {engine.name for engine in result.engines}
    return (
        any(leg.fault is not None or _has_queued(leg) for leg in legs)
        or any(_was_troubled(engine, request) for engine in result.engines if engine.name in met)
        or request.client.is_stalled
    )


def _has_queued(leg: Leg) -> bool:
    """It waited for a seat at the worker, and may be late for that."""
    return leg.seated is None or leg.seated > leg.began + QUEUED_S


def _was_troubled(engine: Engine, request: Request) -> bool:
    """Trouble lasts until the next probe has seen its end."""
    assert request.ended is not None
    return any(
        since <= request.ended and request.client.began < until + 2 for since, until in engine.troubled
    )


# What a request survives if it meets it once.
_SURVIVABLE = frozenset(
    {
        LegFault.BUSY_429,
        LegFault.FAIL_500,
        LegFault.BUSY_503,
        LegFault.RESET,
        LegFault.NOT_HTTP,
        LegFault.NOT_JSON,
        LegFault.RESET_MIDWAY,
        LegFault.END_MIDWAY,
        LegFault.ERROR_MIDWAY,
        LegFault.LOSE_BLOCKS,
    }
)


def _is_survivable(result: Result, request: Request, got: Received) -> bool:
    """It met one fault or one crash, all else is well, and there is another worker of every role."""
    is_spare = all(count > 1 for count in Counter(engine.spec.role for engine in result.engines).values())
    is_replaceable = not (request.client.is_streaming and request.client.spec.is_whole)
    is_late = got.error is not None and got.error.get("code") == "deadline_exceeded"
    return (
        is_spare
        and is_replaceable
        and not is_late
        and (_met_one_fault(result, request) or _is_one_crash(result))
    )


def _met_one_fault(result: Result, request: Request) -> bool:
    """On its way; and the others are so few that the budget is enough for all."""
    met = [leg.fault in _SURVIVABLE for leg in _legs_of(result, request) if leg.fault is not None]
    return met == [True] and not result.schedule.troubles and len(result.schedule.faults) <= 3


def _is_one_crash(result: Result) -> bool:
    troubles = [trouble.trouble for trouble in result.schedule.troubles]
    return troubles == [Trouble.CRASH] and not result.schedule.faults


# --- engines that stand still -----------------------------------------------------------------------------


def _stalls(result: Result) -> Iterator[str]:
    """A leg does not stay with an engine that stands still, if that is all that goes wrong and others get on.

    More of them than the budget always has room for may.
    """
    frozen = {trouble.worker for trouble in result.schedule.troubles}
    others = [e for e in result.engines if e.spec.role == "decode" and e.name not in frozen]
    is_all = [trouble.trouble for trouble in result.schedule.troubles] == [Trouble.FREEZE]
    if not (is_all and others) or result.schedule.faults:
        return
    left = {request.client.spec.number for request in result.requests if request.client.left is not None}
    legs = [leg for leg in result.legs if leg.kind == "decode" and leg.engine.name in frozen]
    legs = [leg for leg in legs if leg.number not in left]
    for leg in legs if len(legs) <= BUDGET_LEAST else ():
        if _stayed(leg):
            yield f"{leg.name} stayed with {leg.engine.name}, whose engine stood still"


def _stayed(leg: Leg) -> bool:
    """Its engine stood still while it was there, for longer than that may last, and began before it came."""
    assert leg.ended is not None
    limit = leg.began + STALL_S + 2 * LATE_S
    return any(
        since <= leg.began and limit < until and leg.ended > limit for since, until in leg.engine.troubled
    )


# --- what workers saw ---------------------------------------------------------------------------


def _legs(result: Result) -> Iterator[str]:
    """No leg outlives its request by more than its worker may take to end it."""
    ends = {request.client.spec.number: request.ended for request in result.requests}
    for leg in result.legs:
        end = ends[leg.number]
        if leg.ended is None and not leg.reply.is_over:
            yield f"{leg.name} still runs on {leg.engine.name}"
        elif leg.kind != "release" and end is not None and (leg.ended or 0.0) > end + _grace_s(leg, end):
            yield f"{leg.name} went on on {leg.engine.name} after its request"


def _grace_s(leg: Leg, end: float) -> float:
    """A leg that has blocks, and whose answer has not begun, is asked to end and listened to for a while.

    If all is well it takes no more than a few times of asking: its engine may not have it at first.
    """
    is_well = leg.fault is None and not leg.engine.troubled
    waits = LAST_WORDS_S[:3] if is_well else LAST_WORDS_S
    asking_s = END_LEG_S * len(waits) + sum(waits)
    if leg.kind == "prefill":
        return AT_ONCE_S + GRACE_S + asking_s + LEAVE_S
    if leg.handoff is not None and (leg.spoke is None or leg.spoke > end - AT_ONCE_S):
        return AT_ONCE_S + asking_s
    return AT_ONCE_S


# After which the orchestrator takes the worker for lost.
_LOSSES = frozenset({LegFault.RESET, LegFault.RESET_MIDWAY, LegFault.END_MIDWAY})


def _losses(result: Result, request: Request) -> Iterator[str]:
    """A request that has lost as many workers as it may is sent to no other. Trouble is not its fault.

    A question for token ids is none of its legs: no engine gets it.
    """
    lost: set[str] = set()
    legs = [leg for leg in _legs_of(result, request) if leg.kind in ("prefill", "decode", "whole")]
    for leg in legs if not result.schedule.troubles else ():
        if len(lost) >= MOST_LOST:
            yield f"{leg.name} was sent to {leg.engine.name}, after {sorted(lost)} were lost with it"
        if leg.fault in _LOSSES:
            lost.add(leg.engine.name)


def _handoffs(result: Result) -> Iterator[str]:
    """Blocks that somebody knows of are pulled once, or somebody tried to have them pulled.

    The ledger is not held to what it says of blocks whose worker was in trouble, or was to pull them then.
    """
    attempts: dict[str | None, list[Dispatch]] = defaultdict(list)
    for dispatch in result.dispatches:
        attempts[dispatch.handoff].append(dispatch)
    unread = Counter(leg.handoff for leg in result.legs if leg.is_refused_unread)
    odd = {leg.handoff for leg in result.legs if leg.fault is not None or leg.engine.troubled}
    for handoff in result.handoffs:
        yield from _handoff(handoff, attempts[handoff.name], unread[handoff])
        if not (handoff in odd or handoff.engine.troubled):
            yield from _book(handoff, result.books.get(handoff.name))


def _handoff(handoff: Handoff, attempts: list[Dispatch], unread: int) -> Iterator[str]:
    used = sum(not attempt.is_refused for attempt in attempts) - unread
    if used > 1:
        yield f"{handoff.name} was sent {used} times to workers that read it"
    if not (handoff.is_told or handoff.is_odd or handoff.engine.troubled) and handoff.engine.spec.ends_legs:
        yield f"nobody was told of {handoff.name}, which {handoff.engine.name} pins"
    if handoff.is_told and not (handoff.is_lost or used or _was_tried(attempts)):
        yield f"nobody released {handoff.name}, which {handoff.engine.name} pins"


def _book(handoff: Handoff, book: LeaseState | None) -> Iterator[str]:
    """The ledger tells the truth: what it takes for free is free."""
    if handoff.is_told and book is None:
        yield f"the ledger does not know {handoff.name}"
    is_pinned = handoff.name in handoff.engine.pinned and not handoff.is_lost
    if is_pinned and book in (LeaseState.CONSUMED, LeaseState.RELEASED):
        yield f"{handoff.engine.name} pins {handoff.name}, which the ledger has as {book.name.lower()}"


def _was_tried(attempts: list[Dispatch]) -> bool:
    """The last attempt was a release leg: it failed, and there is no more to be done."""
    return bool(attempts) and attempts[-1].kind == "release"


def _dispatches(result: Result) -> Iterator[str]:
    """No leg goes to a worker that is gone or ejected, but a release leg if there is no other.

    One that is draining gets those of requests that had their seat there before.
    """
    first: dict[int, float] = {}
    for dispatch in result.dispatches:
        planned = first.setdefault(dispatch.number, dispatch.time)
        limit = planned if dispatch.is_draining else dispatch.time
        if dispatch.kind != "release" and dispatch.out_since is not None and dispatch.out_since < limit:
            leg = f"{dispatch.kind} of {dispatch.number}"
            yield f"{leg} was sent to {dispatch.worker}, which was out of service"
