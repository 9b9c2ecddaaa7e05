"""`baton explain-route` asks a running orchestrator who would serve a request, and shows why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from launch import remote
from launch.exits import Exit
from launch.remote import Failed, Mistaken

if TYPE_CHECKING:
    import httpx

ABOUT: Final = (
    "tell which workers a running orchestrator would choose for a request, and why; nothing is sent"
)
DEFAULT_ADMIN: Final = "http://127.0.0.1:8001"
KEY_VARIABLES: Final = (remote.KEY_VARIABLE, "BATON_API_KEY", "OPENAI_API_KEY")  # the first that is set

Document = Mapping[str, Any]
Row = Sequence[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="the request's body; - is stdin")
    parser.add_argument("--path", default="/v1/chat/completions", help="of the request; default: %(default)s")
    parser.add_argument(
        "-H",
        "--header",
        dest="headers",
        action="append",
        default=[],
        metavar="NAME:VALUE",
        help="a header of the request; may be repeated. The admin listener is asked with the key in "
        f"{' or '.join(KEY_VARIABLES)}, or else with an authorization header that is given here; it is "
        f"{DEFAULT_ADMIN} where no run is found",
    )
    parser.add_argument(
        "--avoid", action="append", default=[], metavar="WORKER", help="one that has failed the request"
    )
    parser.add_argument("--process", metavar="INDEX", help="of several, the process that is to tell")
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="default: %(default)s"
    )
    remote.add_options(parser)


@remote.command
def run(arguments: argparse.Namespace) -> int:
    """Print the explanation; returns the exit code."""
    from orchestrator.config.printing import one_line

    document = ask(arguments)
    if arguments.output == "json":
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(map(one_line, shown(document))))
    return Exit.OK


# --- asking -------------------------------------------------------------------------------------


def ask(arguments: argparse.Namespace) -> Document:
    """Return what the orchestrator tells. Raises `Failed`."""
    query = [("path", arguments.path), *(("avoid", name) for name in arguments.avoid)]
    if arguments.process is not None:
        query.append(("process", arguments.process))
    body = _body(arguments.file)
    headers = {**_headers(arguments.headers), **_key(os.environ), "content-type": "application/json"}
    with _admin(arguments) as admin:
        return _understood(admin.forward("/admin/explain", query, body, headers))


def _admin(arguments: argparse.Namespace) -> remote.AnyAdmin:
    """Return the admin listener that is meant; the usual address if there is no run. Raises `Failed`."""
    try:
        return remote.connect(arguments)
    except remote.NoRun:
        return remote.Admin(DEFAULT_ADMIN, None)


def _body(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise Mistaken(f"{file}: {error.strerror}") from error


def _headers(given: Sequence[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for header in given:
        name, colon, value = header.partition(":")
        if not colon or not name.strip() or not header.isascii() or not header.isprintable():
            raise Mistaken(f"{header!r} is no header: expected NAME:VALUE")
        headers[name.strip().lower()] = value.strip()
    return headers


def _key(environ: Mapping[str, str]) -> dict[str, str]:
    key = next((environ[name].strip() for name in KEY_VARIABLES if environ.get(name)), "")
    if not (key.isascii() and key.isprintable()):
        raise Mistaken(f"{' or '.join(KEY_VARIABLES)} holds a character that no key has")
    return {"authorization": f"Bearer {key}"} if key else {}


def _understood(answer: httpx.Response) -> Document:
    try:
        document = answer.json()
    except ValueError:
        document = None
    if isinstance(document, dict):
        if answer.status_code == 200 and "plan" in document:
            return document
        error = document.get("error")
        if isinstance(error, dict):
            raise Failed(f"{answer.status_code}: {error.get('message')}")
    raise Failed(f"{answer.url.copy_with(query=None)} answered {answer.status_code}, but explains nothing")


# --- showing ------------------------------------------------------------------------------------


def shown(document: Document) -> Iterator[str]:
    """Yield the lines of an explanation."""
    process, admission = document["process"], document["admission"]
    yield f"process {process['index']} (pid {process['pid']}), model {document['model']}, {document['path']}"
    if admission["waits"]:
        yield f"first it waits: {admission['why']}"
    yield from _plan(document)
    for role in ("prefill", "decode"):
        if role in document:
            yield ""
            yield from _leg(role, document[role], document["plan"])
    if document.get("rejected"):
        yield ""
        yield "not considered:"
        yield from _table([[found["worker"], found["why"]] for found in document["rejected"]])


def _plan(document: Document) -> Iterator[str]:
    plan = document["plan"]
    if plan is None:
        yield f"nobody can serve it: {document['refused']}"
    elif plan["whole_reason"] is None:
        yield f"two workers serve it: {plan['prefill']} prefills, {plan['decode']} decodes"
    else:
        yield f"one worker serves it, {plan['decode']}: {plan['whole_reason']}"
    for key in ("auto", "pair"):
        if key in document and (plan is None or document[key]["reason"] != plan["whole_reason"]):
            yield document[key]["reason"]


def _leg(role: str, leg: Document, plan: Document) -> Iterator[str]:
    why = "" if leg["reason"] == plan["whole_reason"] else f", by the policy {leg['policy']}: {leg['reason']}"
    yield f"{role}{why}"
    names = list(dict.fromkeys(name for found in leg["candidates"] for name in found["terms"]))
    rows = [["", "worker", "in_flight", "zone", *names]]
    rows += [_candidate(found, names) for found in leg["candidates"]]
    places = [index for index in range(len(rows[0])) if index < 3 or any(row[index] for row in rows[1:])]
    yield from _table([[row[index] for index in places] for row in rows])


def _candidate(found: Document, names: Sequence[str]) -> list[str]:
    terms = found["terms"]
    return [
        "->" if found["chosen"] else "",
        found["worker"],
        str(found["in_flight"]),
        found["zone"] or "",
        *(_number(terms[name]) if name in terms else "" for name in names),
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the rows with their cells below each other."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
