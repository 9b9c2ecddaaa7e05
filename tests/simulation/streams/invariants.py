"""What must hold after every run, whatever went wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from orchestrator.errors import WorkerCutShort, WorkerUnreachable
from tests.simulation.streams.asking import LAST_WORD_S, Outcome
from tests.simulation.streams.content import answer_body, request_body
from tests.simulation.streams.schedule import App, Leaving, RequestSpec, Schedule
from tests.simulation.streams.server import Call
from tests.simulation.streams.simulate import Result

BEFORE = (App.RAISE_BEFORE, App.RETURN_BEFORE)

# What nobody waits for: scheduling, and a connection that is opened.
SLACK_S = 0.5

# Of an answer in a calm run: what needs more round trips than these is held up by somebody else.
TRIPS = 40

# Until a connection is given up that says nothing: before or after it was upgraded.
GIVEN_UP_S = 18.0

# What finding another connection takes.
RECONNECTS_S = 5.0


def check(result: Result) -> list[str]:
    """Return everything that is wrong with a run, in words; empty if nothing is."""
    return [
        *result.wrong,
        *_rest(result),
        *_rules(result),
        *(problem for outcome in result.outcomes for problem in _request(result, outcome)),
        *(problem for call in result.calls for problem in _call(result, call)),
    ]


def _rest(result: Result) -> Iterator[str]:
    """At the end nothing is held, and nothing runs."""
    yield from (f"{count} left: {what}" for what, count in result.held.items() if count)
    yield from (f"a task is left: {task}" for task in result.tasks_left)


def _rules(result: Result) -> Iterator[str]:
    """What traveled was right, and each stream had an end, if its link was whole."""
    for rules in result.rules:
        yield from rules.problems
        if rules.not_over and result.is_calm:
            yield f"streams {rules.not_over} have no end on the link"


# --- requests -----------------------------------------------------------------------------------


def _request(result: Result, outcome: Outcome) -> Iterator[str]:
    name = f"request {outcome.spec.number}"
    if outcome.spec.number in result.stuck:
        yield f"{name} never ended"
        return
    problems = (*_bytes(outcome), *_end(result, outcome), *_begun(result, outcome), *_time(result, outcome))
    yield from (f"{name}: {problem}" for problem in problems)


def _expected(outcome: Outcome) -> tuple[int, bytes]:
    """Return the status and the body that its application answers, if it is let."""
    spec = outcome.spec
    if spec.app in BEFORE:
        status, body = 500, b"Internal Server Error"
    elif spec.app is App.NO_BODY:
        status, body = 204, b""
    else:
        pieces = spec.answer[: len(spec.answer) // 2] if spec.breaks else spec.answer
        status, body = 200, answer_body(spec.number, sum(pieces))
    return status, b"" if spec.method == "HEAD" else body


def _bytes(outcome: Outcome) -> Iterator[str]:
    """Whatever came is its own."""
    status, body = _expected(outcome)
    mark = (outcome.headers or {}).get(b"x-answer")
    if outcome.status not in (0, status):
        yield f"its status is {outcome.status} and not {status}"
    if outcome.status == 200 and mark != b"%d" % outcome.spec.number:
        yield f"its answer has the fields {outcome.headers}"
    if not body.startswith(outcome.body):
        yield f"it got what is not its own: {outcome.body[:40]!r}..., {len(outcome.body)} bytes"
    elif outcome.is_complete and len(outcome.body) < len(body):
        yield f"its answer looks whole with {len(outcome.body)} of {len(body)} bytes"


def _end(result: Result, outcome: Outcome) -> Iterator[str]:
    """It has ended well, unless there is a reason."""
    spec, error = outcome.spec, outcome.error
    if error is not None and not isinstance(error, WorkerCutShort | WorkerUnreachable):
        yield f"it has failed with {error!r}, and both ends are honest"
    elif outcome.is_complete and spec.breaks and spec.method != "HEAD":
        yield "its answer looks whole, and the application has failed"
    elif error is not None and _is_owed(result, outcome):
        yield f"it has failed for no reason: {error!r}"
    elif (
        result.is_calm and outcome.is_heard_out and not outcome.is_complete and _was_answered(result, outcome)
    ):
        yield f"its answer was on its way when its client left, and is lost: {error!r}"


def _is_owed(result: Result, outcome: Outcome) -> bool:
    """Return whether it must have a whole answer: also if a server has begun with it, and stops then."""
    if outcome.spec.breaks or outcome.left is not None:
        return False
    if result.is_calm:
        # One that was refused is sent once more: two connections may have refused it.
        return sum(rules.has_refused for rules in result.rules) < 2
    stops_at = result.schedule.stops_at
    began = min((call.began for call in result.calls if call.number == outcome.spec.number), default=inf)
    return stops_at is not None and began < stops_at and not any(rules.is_http for rules in result.rules)


def _was_answered(result: Result, outcome: Outcome) -> bool:
    """Return whether the application has answered, and there was time for the answer to come."""
    way = SLACK_S + outcome.spec.pause_s
    [call] = [call for call in result.calls if call.number == outcome.spec.number] or [None]
    if call is None or call.ended is None or outcome.left is None or not call.has_answered:
        return False
    return call.ended + way < outcome.left + LAST_WORD_S


def _begun(result: Result, outcome: Outcome) -> Iterator[str]:
    """The application has seen it once: more often only if nobody can know whether it has."""
    count = sum(call.number == outcome.spec.number for call in result.calls)
    if count > 1 and result.is_calm:
        yield f"it was begun {count} times"
    if outcome.status and not count:
        yield "it has an answer, and was never begun"


def _time(result: Result, outcome: Outcome) -> Iterator[str]:
    """One that is slow holds up itself, and nobody else; and a link that says nothing is given up."""
    if outcome.ended is None or outcome.began is None or _has_silent_http(result):
        return
    took, may_take = outcome.ended - outcome.began, _may_take(result.schedule, outcome.spec)
    may_take += GIVEN_UP_S * sum(link.spec.is_silenced for link in result.links)
    if not result.is_calm:
        may_take += RECONNECTS_S
    if took > may_take:
        yield f"it has taken {took:.3f} s, and may take {may_take:.3f} s: somebody has held it up"


def _has_silent_http(result: Result) -> bool:
    """Return whether requests went by HTTP over a silent link: nobody asks there whether the worker lives."""
    pairs = zip(result.links, result.rules, strict=True)
    return any(rules.is_http and link.spec.is_silenced for link, rules in pairs)


def _may_take(schedule: Schedule, spec: RequestSpec) -> float:
    link = schedule.links[-1]
    trips = TRIPS + 8 * _size(spec) / schedule.window + 4 * sum(map(_size, schedule.requests)) / link.capacity
    reads = spec.body / min(link.piece, schedule.max_payload) + 3
    app = (len(spec.answer) + 1) * spec.app_sends_every + reads * spec.app_reads_every
    leaving = spec.leaves_after if spec.leaving or spec.waits else 0.0
    last_word = LAST_WORD_S if spec.leaving is Leaving.LEAVE else 0.0
    return SLACK_S + 2.5 * link.delay_s * trips + app + spec.app_waits_s + spec.pause_s + leaving + last_word


def _size(spec: RequestSpec) -> int:
    return spec.body + sum(spec.answer)


# --- the application ----------------------------------------------------------------------------


def _call(result: Result, call: Call) -> Iterator[str]:
    [outcome] = [outcome for outcome in result.outcomes if outcome.spec.number == call.number]
    problems = (*_received(outcome.spec, call), *_told(result, outcome, call))
    yield from (f"the application, in request {call.number}: {problem}" for problem in problems)


def _received(spec: RequestSpec, call: Call) -> Iterator[str]:
    body = request_body(spec.number, spec.body)
    if not body.startswith(call.body):
        yield f"the body is not its own: {bytes(call.body[:40])!r}..., {len(call.body)} bytes"
    elif call.is_body_whole and len(call.body) < len(body):
        yield f"the body looks whole with {len(call.body)} of {len(body)} bytes"
    if call.ended is None:
        yield "it never ended"


def _told(result: Result, outcome: Outcome, call: Call) -> Iterator[str]:
    """It hears that its client has left: at once if it waits for that, and never if it is not so."""
    if not result.is_calm or call.ended is None:
        return
    if outcome.left is None:
        if call.left is not None and not (call.has_answered or outcome.spec.breaks):
            yield f"it was told at {call.left:.3f} that its client had left, which is not so"
    elif outcome.spec.waits:
        # It cannot hear while it sends: a client that has left may still read, and slowly.
        waits = call.began if call.waits is None else call.waits
        latest = max(outcome.left, waits) + 3 * result.schedule.links[-1].delay_s + SLACK_S
        if call.left is None or call.left > latest:
            yield f"it was told at {call.left} that its client had left at {outcome.left:.3f}"
