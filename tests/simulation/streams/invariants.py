"""What must hold after every run, whatever went wrong in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from orchestrator.errors import BatonError, WorkerCutShort, WorkerUnreachable
from tests.simulation.streams.asking import LAST_WORD_S, Outcome
from tests.simulation.streams.content import answer_body, request_body
from tests.simulation.streams.schedule import App, Leaving, Schedule
from tests.simulation.streams.server import Call
from tests.simulation.streams.simulate import Result

BROKEN = (App.RAISE_MIDWAY, App.RETURN_MIDWAY)
BEFORE = (App.RAISE_BEFORE, App.RETURN_BEFORE)

# What nobody waits for: scheduling, and a connection that is opened.
SLACK_S = 0.5

# Of the answers of a calm run: whatever needs more round trips than these is held up by somebody else.
TRIPS = 40


def check(result: Result) -> list[str]:
    """Return everything that is wrong with a run, in words; empty if nothing is."""
    return [
        *result.wrong,
        *_rest(result),
        *_rules(result),
        *(problem for outcome in result.outcomes for problem in _request(result, outcome)),
        *_calls(result),
    ]


def _rest(result: Result) -> Iterator[str]:
    yield from (f"{count} left: {what}" for what, count in result.held.items() if count)
    yield from (f"a task is left: {task}" for task in result.tasks_left)


def _rules(result: Result) -> Iterator[str]:
    for link, rules in zip(result.links, result.rules, strict=True):
        yield from rules.problems
        is_broken = link.is_cut or link.spec.silent_after != (None, None)
        if rules.not_over and not is_broken and result.schedule.is_calm:
            yield f"streams {rules.not_over} have no end on the link"


# --- what was answered --------------------------------------------------------------------------


def _request(result: Result, outcome: Outcome) -> Iterator[str]:
    name = f"request {outcome.spec.number}"
    if outcome.ended is None:
        yield f"{name} never ended"
        return
    problems = (*_bytes(outcome), *_end(result.schedule, outcome), *_time(result, outcome))
    yield from (f"{name}: {problem}" for problem in problems)


def _expected(outcome: Outcome) -> tuple[int, bytes]:
    """Return the status and the body that its application answers, if it is let."""
    spec = outcome.spec
    if spec.app in BEFORE:
        status, body = 500, b"Internal Server Error"
    elif spec.app is App.NO_BODY:
        status, body = 204, b""
    else:
        pieces = spec.answer[: len(spec.answer) // 2] if spec.app in BROKEN else spec.answer
        status, body = 200, answer_body(spec.number, sum(pieces))
    return status, b"" if spec.method == "HEAD" else body


def _bytes(outcome: Outcome) -> Iterator[str]:
    """Whatever came is its own."""
    status, body = _expected(outcome)
    if outcome.status not in (0, status):
        yield f"its status is {outcome.status} and not {status}"
    if not body.startswith(outcome.body):
        yield f"it got what is not its own: {outcome.body[:40]!r}..., {len(outcome.body)} bytes"
    if outcome.is_complete and len(outcome.body) < len(body):
        yield f"its answer looks whole with {len(outcome.body)} of {len(body)} bytes"
    if (
        status == 200
        and outcome.status
        and (outcome.headers or {}).get(b"x-answer") != (b"%d" % outcome.spec.number)
    ):
        yield f"its answer has the fields {outcome.headers}"


def _end(schedule: Schedule, outcome: Outcome) -> Iterator[str]:
    """It has ended well, unless there is a reason."""
    spec, error = outcome.spec, outcome.error
    if error is not None and not isinstance(error, BatonError):
        yield f"it has failed with {error!r}"
    elif error is not None and not isinstance(error, WorkerCutShort | WorkerUnreachable):
        yield f"it has failed with {error!r}: both ends are honest"
    elif outcome.is_complete:
        if spec.app in BROKEN and spec.answer and spec.method != "HEAD":
            yield "its answer looks whole, and the application has failed"
    elif outcome.left is None and schedule.is_calm and not (spec.app in BROKEN and spec.answer):
        yield f"it has failed for no reason: {error!r}"


def _time(result: Result, outcome: Outcome) -> Iterator[str]:
    """One that is slow holds up itself."""
    assert outcome.ended is not None
    assert outcome.began is not None
    if not result.schedule.is_calm:
        return
    took, may_take = outcome.ended - outcome.began, _may_take(result, outcome)
    if took > may_take:
        yield f"it has taken {took:.3f} s, and may take {may_take:.3f} s: somebody has held it up"


def _may_take(result: Result, outcome: Outcome) -> float:
    schedule, spec = result.schedule, outcome.spec
    link = schedule.links[-1]
    own = spec.body + sum(spec.answer)
    everything = sum(request.body + sum(request.answer) for request in schedule.requests)
    trips = TRIPS + 8 * own / schedule.window + 4 * everything / link.capacity
    pieces = len(spec.answer) + 1
    app = pieces * spec.app_sends_every + spec.app_reads_every * (spec.body / min(link.piece, 64) + 2)
    leaving = 0.0 if spec.leaving is None else spec.leaves_after
    words = LAST_WORD_S if spec.leaving is Leaving.LEAVE else 0.0
    waits = max(leaving, 0.5) if spec.app in (App.WAIT, App.WAIT_MIDWAY) else 0.0
    return SLACK_S + 2.5 * link.delay_s * trips + app + spec.pause_s + words + waits


# --- what the application saw -------------------------------------------------------------------


def _calls(result: Result) -> Iterator[str]:
    counts = Counter(call.number for call in result.calls)
    for call in result.calls:
        problems = (*_call(result, call),)
        yield from (f"the application, in request {call.number}: {problem}" for problem in problems)
    for outcome in result.outcomes:
        count = counts[outcome.spec.number]
        if count > 1 and result.schedule.is_calm:
            yield f"request {outcome.spec.number} was begun {count} times"
        if outcome.is_complete and not count:
            yield f"request {outcome.spec.number} has an answer, and was never begun"


def _call(result: Result, call: Call) -> Iterator[str]:
    spec = next(spec for spec in result.schedule.requests if spec.number == call.number)
    body = request_body(spec.number, spec.body)
    if not body.startswith(call.body):
        yield f"the body is not its own: {bytes(call.body[:40])!r}..."
    elif call.is_body_whole and len(call.body) < len(body):
        yield f"the body looks whole with {len(call.body)} of {len(body)} bytes"
    if call.ended is None:
        yield "it never ended"
    outcome = next(outcome for outcome in result.outcomes if outcome.spec is spec)
    if call.left is not None and outcome.left is None and result.schedule.is_calm:
        if not outcome.is_complete and outcome.error is None:
            yield "it was told that its client has left"
    if outcome.left is not None and call.ended is not None and result.schedule.is_calm:
        yield from _leaves(result, call, outcome)


def _leaves(result: Result, call: Call, outcome: Outcome) -> Iterator[str]:
    """An application that waits for its client to leave is told at once."""
    assert outcome.left is not None
    if outcome.spec.app not in (App.WAIT, App.WAIT_MIDWAY):
        return
    link = result.schedule.links[-1]
    told = call.left
    latest = max(outcome.left, call.began) + 3 * link.delay_s + SLACK_S
    if told is None or told > latest:
        yield f"it was told at {told} that its client had left at {outcome.left:.3f}"
