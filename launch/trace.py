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

Document = Mapping[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "id", metavar="REQUEST-ID", nargs="?", help="x-request-id of the answer, or the id in its body"
    )
    parser.add_argument("--slowest", action="store_true", help="list the slowest ones first")
    parser.add_argument(
        "--failed", action="store_true", help="list those that have failed, or that a worker has failed"
    )
    parser.add_argument("--key", metavar="NAME", help="list those of this client")
    parser.add_argument("--model", help="list those for this model")
    parser.add_argument("--worker", metavar="MODEL/ROLE/INDEX", help="list those that this worker has had")
    parser.add_argument(
        "--slower-than", metavar="SECONDS", help="list those that took longer, or have taken so far"
    )
    parser.add_argument("--limit", metavar="N", help="list so many at most; default: 50")
    parser.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="default: %(default)s"
    )
    remote.add_options(parser)


@remote.command
def run(arguments: argparse.Namespace) -> int:
    """Print what became of one request, or a list; returns the exit code."""
    from orchestrator.config.printing import one_line

    query = _query(arguments)
    if arguments.id is not None and query:
        raise remote.Mistaken("a request id says which request is meant: leave out what lists others")
    with remote.connect(arguments) as admin:
        if arguments.id is None:
            document = _list(admin.get("/admin/requests", query))
            lines = listed(document)
        else:
            document = _one(admin.get(f"/admin/requests/{_path(arguments.id)}"))
            lines = told(document)
    if arguments.output == "json":
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(map(one_line, lines)))
    return Exit.OK


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


def _one(document: Any) -> Document:
    if not isinstance(document, dict) or "timeline" not in document:
        raise remote.Failed("the admin listener does not tell what became of requests: is it older?")
    return document


def _list(document: Any) -> Document:
    if not isinstance(document, dict) or "requests" not in document:
        raise remote.Failed("the admin listener does not list requests: is it older?")
    return document


# --- a list -----------------------------------------------------------------------------------------


def listed(document: Document) -> Iterator[str]:
    """Yield a line per request, or two if its id is long."""
    if document["unanswered"]:
        silent = ", ".join(map(str, document["unanswered"]))
        yield f"process {silent} did not answer: its requests are missing"
    if not document["requests"]:
        yield "no request of late is like that"
        return
    yield f"{'time (UTC)':12} {'ms':>10}  {'':28}request id"
    for request in document["requests"]:
        when = _time(request["received"])
        line = f"{when:12} {request['total_ms']:10.1f}  {_came_to(request):26}  "
        name = request["id"]
        if len(line) + len(name) <= WIDTH:
            yield line + name
        else:
            yield line.rstrip()
            yield f"    {name}"


def _came_to(request: Document) -> str:
    if request["state"] != "ended":
        return f"... {request['state']}"
    error = f" {request['error']}" if request["error"] else ""
    again = f" in {request['attempts']} attempts" if request["attempts"] > 1 else ""
    return f"{request['status']}{error}{again}"[:26]


# --- one request ------------------------------------------------------------------------------------


def told(document: Document) -> Iterator[str]:
    """Yield the lines of a request's story."""
    yield from _head(document)
    yield ""
    for moment in document["timeline"]:
        worker = f"  {moment['worker']}" if moment["worker"] else ""
        yield from _wrapped(f"{moment['ms']:10.1f} ms  {moment['what']}{worker}", 15)
    plan = document["plan"]
    if plan is not None:
        yield ""
        yield from _why(document, plan)
    yield from _handoff(document)


def _head(document: Document) -> Iterator[str]:
    state = document["state"]
    came_to = _came_to(document) if state == "ended" else f"is under way: it {state}"
    yield from _wrapped(f"request {document['id']}: {came_to}, {document['total_ms']:.1f} ms", 2)
    kind = "a stream" if document["stream"] else "a whole answer"
    key = f", key {document['key']}" if document["key"] else ""
    model = document["model"] or "unknown"
    yield from _wrapped(f"  {document['api']}, model {model}, {kind}{key}", 2)
    sizes = f"{document['bytes_in']} bytes in, {document['bytes_out']} bytes out{_tokens(document['tokens'])}"
    yield from _wrapped(f"  {sizes}", 2)
    day = datetime.fromtimestamp(document["received"], UTC).strftime("%Y-%m-%d")
    yield f"  arrived {day} {_time(document['received'])} UTC, at process {document['process']}"
    if document["answer_id"] and document["answer_id"] != document["id"]:
        yield from _wrapped(f"  its answer is called {document['answer_id']}", 2)
    if document.get("others_with_this_id"):
        yield f"  the newest of {document['others_with_this_id'] + 1} requests with this id"


def _tokens(tokens: Document) -> str:
    names = {
        "prompt_estimated": "about {} prompt tokens",
        "prompt": "{} prompt tokens",
        "prompt_cached": "{} of them cached",
        "output": "{} tokens made",
    }
    said = [text.format(tokens[name]) for name, text in names.items() if tokens.get(name) is not None]
    return "".join(f", {text}" for text in said)


def _why(document: Document, plan: Document) -> Iterator[str]:
    reason = plan["whole_reason"]
    if reason is not None and "decode" in plan:
        yield from _wrapped(f"One worker was to do all of it, {plan['decode'].get('worker')}: {reason}.", 2)
    for attempt in document["failed_attempts"]:
        took = f"after {attempt['took_ms'] / 1e3:.1f} s"
        then = "the stream went on elsewhere" if attempt["then"] == "resumed" else "it was sent elsewhere"
        if attempt is document["failed_attempts"][-1] and document["error"] is not None:
            then = "that was its end"
        yield from _wrapped(f"{attempt['worker']} failed it {took}: {attempt['outcome']}; {then}.", 2)
    for role, does in (("prefill", "prefills"), ("decode", "decodes" if reason is None else "serves it")):
        choice = plan.get(role)
        if choice:
            yield from _wrapped(f"{choice['worker']} {does}: {choice['reason']}", 2)
            yield from _candidates(choice)


def _candidates(choice: Document) -> Iterator[str]:
    shown = sorted(choice["candidates"], key=lambda one: not one["chosen"])[:MOST_NAMED]
    for one in shown:
        terms = ", ".join(f"{name} {_number(value)}" for name, value in one["terms"].items())
        if terms or len(shown) > 1:
            mark = "->" if one["chosen"] else "  "
            yield from _wrapped(f"  {mark} {one['worker']}{f'  {terms}' if terms else ''}", 7)
    more = choice["candidates_in_all"] - len(shown)
    if more > 0:
        yield f"     and {more} more"
    for one in choice["rejected"][:MOST_NAMED]:
        yield from _wrapped(f"  not {one['worker']}: {one['why']}; it is {one['state_now']} now", 6)
    if len(choice["rejected"]) > MOST_NAMED:
        yield f"  nor {len(choice['rejected']) - MOST_NAMED} others"


def _handoff(document: Document) -> Iterator[str]:
    handoff = document["handoff"]
    if handoff is None:
        return
    yield ""
    said = {
        "transferred": "the KV cache went over",
        "recomputed": "the KV cache did not go over: the decode worker computed it again",
        "unknown": "the decode worker did not say whether the KV cache went over",
        "local": "no KV cache was to go over",
    }
    kv = said.get(handoff["kv"], "nothing is known of the KV cache")
    given_up = f"; a hand-off was given up, as it was {handoff['given_up']}" if handoff["given_up"] else ""
    yield from _wrapped(f"hand-off: {kv}{given_up}", 2)
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
