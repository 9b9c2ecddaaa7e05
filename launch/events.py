"""`baton events` prints what has happened in a running orchestrator, and what happens."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from launch import remote
from launch.exits import Exit

ABOUT: Final = "print what has happened of late: to workers and processes, to requests, by operators"
AGAIN_S: Final = 1.0  # before a listener that has gone is asked again

Document = Mapping[str, Any]
_id: Final = re.compile(r"\w{1,32}\.\d{1,15}", re.ASCII).fullmatch


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what happens, until Ctrl-C")
    parser.add_argument(
        "--kind",
        dest="kinds",
        metavar="KIND",
        action="append",
        default=[],
        help="only events of this kind, as worker.gone, or all of a group, as worker; may be repeated",
    )
    parser.add_argument("--after", metavar="NUMBER", help="only those after the one with this number")
    parser.add_argument(
        "-o",
        "--output",
        choices=("text", "json"),
        default="text",
        help="a line for each, for people or as a JSON object; default: %(default)s",
    )
    remote.add_options(parser)


@remote.command
def run(arguments: argparse.Namespace) -> int:
    """Print events; returns the exit code."""
    with remote.connect(arguments) as admin, remote.queried():
        if arguments.follow:
            _follow(admin, arguments)
        for event in _events(admin.get(_path(arguments, arguments.after))):
            _show(event, arguments.output)
    return Exit.OK


def _path(arguments: argparse.Namespace, after: str | None) -> str:
    from urllib.parse import urlencode

    query = [("kind", kind) for kind in arguments.kinds]
    query += [] if after is None else [("after", after)]
    query += [("follow", "1")] if arguments.follow else []
    return f"/admin/events?{urlencode(query, errors='surrogateescape')}"


def _follow(admin: remote.AnyAdmin, arguments: argparse.Namespace) -> NoReturn:
    """Print events until interrupted; a stream that is cut is taken up again where it was."""
    after = arguments.after
    while True:
        try:
            for name, event in _stream(admin, _path(arguments, after)):
                after = name or after
                _show(event, arguments.output)
        except remote.Refused:
            raise
        except remote.Failed as error:
            if after == arguments.after:  # nothing was ever heard
                raise
            remote.say(f"{error}\nasking again")
        time.sleep(AGAIN_S)


def _stream(admin: remote.AnyAdmin, path: str) -> Iterator[tuple[str, Document]]:
    with admin.lines(path) as lines:
        yield from parsed(lines)


def parsed(lines: Iterable[str]) -> Iterator[tuple[str, Document]]:
    """Yield the events of a stream (`text/event-stream`), each with its id."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "id" and _id(value):
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _events(document: Any) -> list[Document]:
    if not isinstance(document, list):
        raise remote.Failed("the admin listener lists no events: is it older?")
    return document


def _show(event: Document, output: str) -> None:
    from orchestrator.config.printing import one_line

    line = json.dumps(event) if output == "json" else one_line(shown(event))
    print(line, flush=True)


def shown(event: Document) -> str:
    """Return the line of an event."""
    if "missed" in event:
        return f"({event['missed']} events are missing here: they were dropped before they could be read)"
    when = datetime.fromtimestamp(event["time"], UTC).isoformat(timespec="milliseconds")
    did = "of" if event["kind"].startswith("request.") else "by"  # keys ask, and it is not they who refuse
    who = f", {did} {event['who']}" if event.get("who") else ""
    process = f" (process {event['process']})" if event.get("process") is not None else ""
    told = f" (orchestrator {event['orchestrator']})" if "orchestrator" in event else ""
    return f"{when.removesuffix('+00:00')}Z {event['kind']}: {event['message']}{who}{process}{told}"
