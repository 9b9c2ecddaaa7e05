"""`baton trace` asks a running orchestrator what became of a request, and tells it in order."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from launch import remote
from launch.exits import Exit

ABOUT: Final = (
    "tell what became of a request, by its id or that of its answer; without an id, list those of late"
)
WIDTH: Final = 80
MOST_NAMED: Final = 8  # candidates, and as many of those that were none

_KV: Final = {
    "transferred": "the KV cache went over",
    "recomputed": "the KV cache did not go over: the decode worker computed it again",
    "unknown": "the decode worker did not say whether the KV cache went over",
    "local": "no KV cache was to go over",
}
_THEN: Final = {
    "resent": "it was sent elsewhere",
    "resumed": "the stream went on elsewhere",
    "ended": "no other worker was asked",
}
_TOKENS: Final = {
    "prompt_estimated": "about {} prompt tokens",
    "prompt": "{} prompt tokens",
    "prompt_cached": "{} of them cached",
    "output": "{} tokens made",
}

Document = Mapping[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id", metavar="REQUEST-ID", nargs="?", help="x-request-id of the answer, or the id in its body"
    )
    _add_filters(parser)
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="default: %(default)s"
    )
    remote.add_options(parser)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slowest", action="store_true", help="list the slowest ones first")
    parser.add_argument(
        "--failed", action="store_true", help="list those that have failed, or that a worker has failed"
    )
    parser.add_argument("--key", metavar="NAME", help="list those of this client")
    parser.add_argument("--model", help="list those for this model")
    parser.add_argument("--worker", metavar="MODEL/ROLE/INDEX", help="list those that this worker has had")
    parser.add_argument(
        "--slower-than",
        type=_seconds,
        metavar="SECONDS",
        help="list those that took longer, or have taken so far",
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="list so many at most; default: 50")


def _seconds(text: str) -> str:
    """Return a text that says seconds as it is. Raises `argparse.ArgumentTypeError`."""
    try:
        is_right = 0 <= float(text) < float("inf")
    except ValueError:
        is_right = False
    if not is_right:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return text


def _count(text: str) -> str:
    """Return a text that says a whole number as it is. Raises `argparse.ArgumentTypeError`."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return text


@remote.command
def run(arguments: argparse.Namespace) -> int:
    """Print what became of one request, or a list; returns the exit code."""
    query = _query(arguments)
    if arguments.id is not None and query:
        raise remote.Mistaken("a request id says which request is meant: leave out what lists others")
    with remote.connect(arguments) as admin, remote.queried():
        if arguments.id is None:
            document = _checked(admin.get("/admin/requests", query), "requests")
        else:
            document = _checked(admin.get(f"/admin/requests/{_path(arguments.id)}"), "timeline")
    _print(document, arguments)
    return Exit.OK


def _print(document: Document, arguments: argparse.Namespace) -> None:
    from orchestrator.config.printing import one_line

    if arguments.output == "json":
        print(json.dumps(document, indent=2))
    else:
        is_picked = bool(_query(arguments).keys() - {"slowest"})
        lines = listed(document, is_picked=is_picked) if arguments.id is None else told(document)
        print("\n".join(map(one_line, lines)))


def _query(arguments: argparse.Namespace) -> dict[str, str]:
    given = {
        "slowest": "1" if arguments.slowest else None,
        "failed": "1" if arguments.failed else None,
        "key": arguments.key,
        "model": arguments.model,
        "worker": arguments.worker,
        "slower_than": arguments.slower_than,
        "limit": arguments.limit,
    }
    return {name: value for name, value in given.items() if value is not None}


def _path(name: str) -> str:
    if name in ("", ".", ".."):
        raise remote.Mistaken(f"{name!r} is no request id")
    return quote(name, safe="", errors="surrogateescape")


def _checked(document: Any, part: str) -> Document:
    if not isinstance(document, dict) or part not in document:
        raise remote.Failed("the admin listener does not tell what became of requests: is it older?")
    return document


# --- a list -----------------------------------------------------------------------------------------


def listed(document: Document, *, is_picked: bool) -> Iterator[str]:
    """Yield a line per request, or two if its id is long. With `is_picked` not all were asked for."""
    if document["unanswered"]:
        silent = ", ".join(map(str, document["unanswered"]))
        yield f"process {silent} did not answer: its requests are missing"
    if document["requests"]:
        yield f"{'time (UTC)':12} {'ms':>10}  {'status':28}request id"
    else:
        yield "no request of late is like that" if is_picked else "no request yet"
    for request in document["requests"]:
        yield from _row(request)


def _row(request: Document) -> Sequence[str]:
    start = f"{_time(request['received']):12} {request['total_ms']:10.1f}  {_came_to(request):26}"
    line = f"{start}  {request['id']}"
    return [line] if len(line) <= WIDTH else [start.rstrip(), f"    {request['id']}"]


def _came_to(request: Document) -> str:
    error = f" {request['error']}" if request["error"] else ""
    again = f" in {request['attempts']} attempts" if request["attempts"] > 1 else ""
    is_open = request["state"] != "ended"
    return f"... {request['state']}" if is_open else f"{request['status']}{error}{again}"[:26]


# --- one request ------------------------------------------------------------------------------------


def told(document: Document) -> Iterator[str]:
    """Yield the lines of a request's story."""
    yield from _head(document)
    yield ""
    for moment in document["timeline"]:
        yield from _wrapped(_moment(moment), 15)
    if document["plan"] is not None:
        yield ""
        yield from _why(document, document["plan"])
    if document["handoff"] is not None:
        yield ""
        yield from _handoff(document["handoff"])


def _moment(moment: Document) -> str:
    worker = f"  {moment['worker']}" if moment["worker"] else ""
    return f"{moment['ms']:10.1f} ms  {moment['what']}{worker}"


def _head(document: Document) -> Iterator[str]:
    state = document["state"]
    came_to = _came_to(document) if state == "ended" else f"is under way: it {state}"
    yield from _wrapped(f"request {document['id']}: {came_to}, {document['total_ms']:.1f} ms", 2)
    for line in (_asked_for(document), _sizes(document), _arrived(document)):
        yield from _wrapped(f"  {line}", 2)
    yield from _other_names(document)
    if document.get("others_with_this_id"):
        yield f"  the newest of {document['others_with_this_id'] + 1} requests with this id"


def _other_names(document: Document) -> Iterator[str]:
    if document["answer_id"]:
        yield from _wrapped(f"  its answer is called {document['answer_id']}", 2)
    elif document.get("worker_id") not in (None, document["id"]):
        yield from _wrapped(f"  the worker knows it as {document['worker_id']}", 2)


def _asked_for(document: Document) -> str:
    kind = "a stream" if document["stream"] else "a whole answer"
    key = f", key {document['key']}" if document["key"] else ""
    return f"{document['api']}, model {document['model'] or 'unknown'}, {kind}{key}"


def _sizes(document: Document) -> str:
    return f"{document['bytes_in']} bytes in, {document['bytes_out']} bytes out{_tokens(document['tokens'])}"


def _arrived(document: Document) -> str:
    day = datetime.fromtimestamp(document["received"], UTC).strftime("%Y-%m-%d")
    of = f" of orchestrator {document['orchestrator']}" if "orchestrator" in document else ""
    return f"arrived {day} {_time(document['received'])} UTC, at process {document['process']}{of}"


def _tokens(tokens: Document) -> str:
    if tokens.get("prompt") is not None:
        tokens = {**tokens, "prompt_estimated": None}
    said = [text.format(tokens[name]) for name, text in _TOKENS.items() if tokens.get(name) is not None]
    return "".join(f", {text}" for text in said)


def _why(document: Document, plan: Document) -> Iterator[str]:
    reason = plan["whole_reason"]
    if reason is not None and "decode" in plan:
        yield from _wrapped(f"One worker was to do all of it, {plan['decode'].get('worker')}: {reason}.", 2)
    for attempt in document["failed_attempts"]:
        yield from _wrapped(_failed(attempt), 2)
    for role, does in (("prefill", "prefills"), ("decode", "decodes" if reason is None else "serves it")):
        choice = plan.get(role)
        if choice:
            yield from _wrapped(f"{choice['worker']} {does}: {choice['reason']}", 2)
            yield from _candidates(choice)


def _failed(attempt: Document) -> str:
    then = _THEN.get(attempt["then"], "what followed is not known")
    took = f"after {attempt['took_ms'] / 1e3:.1f} s"
    return f"{attempt['worker']} failed it {took}: {attempt['outcome']}; {then}."


def _candidates(choice: Document) -> Iterator[str]:
    shown = sorted(choice["candidates"], key=lambda one: not one["chosen"])[:MOST_NAMED]
    for one in shown:
        if one["terms"] or len(shown) > 1:
            yield from _wrapped(_candidate(one), 7)
    more = choice["candidates_in_all"] - len(shown)
    if more > 0:
        yield f"     and {more} more"
    yield from _rejected(choice)


def _candidate(one: Document) -> str:
    terms = ", ".join(f"{name} {_number(value)}" for name, value in one["terms"].items())
    return f"  {'->' if one['chosen'] else '  '} {one['worker']}  {terms}".rstrip()


def _rejected(choice: Document) -> Iterator[str]:
    for one in choice["rejected"][:MOST_NAMED]:
        yield from _wrapped(f"  not {one['worker']}: {one['why']}; it is {one['state_now']} now", 6)
    if len(choice["rejected"]) > MOST_NAMED:
        yield f"  nor {len(choice['rejected']) - MOST_NAMED} others"


def _handoff(handoff: Document) -> Iterator[str]:
    yield from _wrapped(f"hand-off: {_KV.get(handoff['kv'], 'nothing is known of the KV cache')}", 2)
    if handoff["given_up"]:
        yield f"  a hand-off was given up before, as it was {handoff['given_up']}"
    if handoff["lease"]:
        yield from _wrapped(f"lease: {handoff['lease']}", 2)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S.%f")[:-3]


def _wrapped(text: str, indent: int) -> Sequence[str]:
    """Return lines of at most `WIDTH` characters; all but the first are indented by so many."""
    from orchestrator.config.printing import one_line

    start = len(text) - len(text.lstrip())
    lines = textwrap.wrap(
        one_line(text.lstrip()),
        WIDTH,
        initial_indent=" " * start,
        subsequent_indent=" " * (start + indent if start < indent else indent),
        break_on_hyphens=False,
    )
    return lines or [""]
