"""An answer of a worker that is not 200 is judged here: is it about the request, or about the worker?

| answer | what it is |
|---|---|
| 401, 402, 403, 407, 408, 421, 426, 505, 511 | about the worker: its key, a proxy before it, its connection |
| 1xx, 2xx, 3xx, 600 and above | about the worker: no model server answers so |
| 400, 413, 422, and any other 4xx with an OpenAI error | about the request: the client gets it |
| 404, 405 of a server that lacks the path | about the worker for chats and completions, else the request |
| another 4xx, as the 404 of a web server | about the worker |
| 429, 503, and any other 5xx | the worker's own error: the client gets it if no other worker helps |

A worker's error reaches the client with its own words if it is an OpenAI error, as vLLM's are, in either of
their two spellings; whatever else a body is, the client gets a text of ours.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any

import msgspec

_ABOUT_WORKER = frozenset({401, 402, 403, 407, 408, 421, 426, 505, 511})
_ABOUT_REQUEST = frozenset({400, 413, 422, 429})  # whatever their bodies are; a worker may be busy, too
_MISSING = frozenset({404, 405})

# Every worker of a generative model has these; of all other paths a model may have none.
_GENERATIVE = frozenset({"/v1/chat/completions", "/v1/completions"})

# What FastAPI and Starlette say of a path that is not there: the status by its name, nothing else.
_PATH_PHRASES = frozenset({"Not Found", "Method Not Allowed"})

_MAX_BODY_BYTES = 64 * 1024  # of an error that the client gets; vLLM's quote at most a part of the request
_MAX_DETAIL = 500  # characters of an explanation that is in no OpenAI error

_HTTP_DATE = re.compile(rb"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")


# vLLM's text about a field that the document lacks, or about the document as a whole, in a JSON string: the
# first group ends where the document's fields are counted.
_COUNTED = re.compile(
    rb"(\{'type': '(?:missing', 'loc': 'body\.[^'.]+|[a-z_]+', 'loc': 'body)', "
    rb"""'msg': (?:'[^']*'|\\"[^"\\]*\\"), 'input': '<dict of )(\d{1,9})(?= items>')"""
)


class Whose(Enum):
    """An answer that is not 200 says something about one of these."""

    OWN = auto()  # the request, or the state of a worker of ours
    WORKER = auto()
    PATH = auto()  # the model is not made for this path


def whose(status: int, content: bytes, path: str) -> Whose:
    """Judge an answer to a request for `path`."""
    document = _document(content)
    if status in _MISSING and _message(document) in _PATH_PHRASES:
        return Whose.WORKER if path in _GENERATIVE else Whose.PATH
    return Whose.WORKER if _is_about_worker(status, document) else Whose.OWN


def is_denial(status: int, content: bytes) -> bool:
    """Tell whether an answer to an empty document, which a worker of ours refuses with a reason (or takes, if
    it is lenient), is about the worker; that it lacks the path counts, too.
    """
    return status != 200 and whose(status, content, "") is not Whose.OWN


def is_encoded(coding: bytes | None) -> bool:
    """Tell whether a `content-encoding` says that a body is not as it is: identity was asked for."""
    return coding is not None and coding.strip().lower() not in (b"", b"identity")


def error_body(status: int, content: bytes) -> bytes:
    """Return the OpenAI error that the client gets for a worker's own error: unchanged if it is one."""
    document = _document(content)
    error = _openai_error(document)
    if error is not None and error is document.get("error"):
        return content
    if error is None:
        error = {"message": _explained(status, document)}
    kind = "invalid_request_error" if status < 500 else "upstream_error"
    fields = {name: error.get(name) for name in ("message", "type", "param", "code")}
    return msgspec.json.encode({"error": fields | {"type": fields["type"] or kind}})


def counts_fields(content: bytes) -> bool:
    """Tell whether a worker's error may say how many fields the document has."""
    return b" items>" in content


def recounted(content: bytes, more: int) -> bytes:
    """Return a worker's error with so many fields more where it says how many the document has.

    The number itself is not known here: vLLM may have added some of its own.
    """
    return _COUNTED.sub(lambda found: b"%b%d" % (found[1], max(0, int(found[2]) + more)), content)


def retry_after(value: bytes | None) -> bytes | None:
    """Return a `retry-after` that may be passed on: a number of seconds, or an HTTP date; else None."""
    if value is None or (value.isdigit() and len(value) <= 9) or _HTTP_DATE.fullmatch(value):
        return value
    return None


def _is_about_worker(status: int, document: dict[str, Any]) -> bool:
    if not 400 <= status < 600 or status in _ABOUT_WORKER:
        return True
    return status < 500 and status not in _ABOUT_REQUEST and _openai_error(document) is None


def _document(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; an empty one if it is none, or too large for an error."""
    if len(content) > _MAX_BODY_BYTES:
        return {}
    try:
        document = msgspec.json.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _openai_error(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return an error with its message and its type or code, in OpenAI's form or vLLM's older one."""
    error = document if document.get("object") == "error" else document.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    return error if "type" in error or "code" in error else None


def _message(document: dict[str, Any]) -> object:
    error = _openai_error(document)
    message = document.get("detail") if error is None else error["message"]
    return message if isinstance(message, str) else None


def _explained(status: int, document: dict[str, Any]) -> str:
    """Return a text with the explanation in it that FastAPI gives, or an error that is a mere text."""
    detail = document.get("detail", document.get("error"))
    if isinstance(detail, list):
        detail = "; ".join(str(one["msg"]) for one in detail if isinstance(one, dict) and "msg" in one)
    text = f": {detail[:_MAX_DETAIL]}" if isinstance(detail, str) and detail else ""
    return f"the worker answered {status}{text}"
