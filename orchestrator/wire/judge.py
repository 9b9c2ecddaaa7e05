"""A worker's answer is judged by what is in it: an error, an end for every choice, what is for engines alone.

Whatever its status says: a worker tells of errors in a 200 as well, and ends answers early that look whole.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.wire.shapes import AnswerUsage, CompletionWithUsage, EndedChoice, Judged, JudgedCompletion
from orchestrator.wire.usage import (
    InvalidAnswer,
    Kv,
    decode_document,
    encode_document,
    mended_usage,
)

# So vLLM writes it when SIGTERM has stopped it. No string can contain it, for there quotes are escaped.
ABORTED: Final = b'"finish_reason":"abort"'
ENDED_BY_WORKER: Final = "the worker ended the request by itself"
NOT_FINISHED: Final = "the worker's answer ended without a finish_reason"

_FAILED_REASON: Final = b'{"message":"the worker ended the request with an error","type":"server_error"}'
_COMPLETION: Final = msgspec.json.Decoder(JudgedCompletion)
_WITH_USAGE: Final = msgspec.json.Decoder(CompletionWithUsage)
_ANY: Final = msgspec.json.Decoder(Judged)
_NULL: Final = Raw(b"null")
_json: Final = msgspec.json.Encoder()


class InvalidStream(ValueError):
    """The worker's answer is not what it must be; the client has to be told, for it looks like an end."""


class WorkerFailed(InvalidStream):
    """The worker reports an error in an answer that is otherwise like any other."""

    def __init__(self, status: int, content: bytes) -> None:
        """`status` is the HTTP status that the error would have had before the head, `content` the body."""
        super().__init__("the worker's answer reports an error")
        self.status = status
        self.content = content


def completion_of(payload: bytes) -> JudgedCompletion | None:
    """Return what is to be judged of a chat, a completion, or an event of one; None if it is no JSON object.

    Raises `WorkerFailed` if it tells of an error, whatever else is in it.
    """
    judged: JudgedCompletion | None
    try:
        judged = _COMPLETION.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        judged = _without_types(payload)
        if judged is None:
            return None
    if judged.error is not None or judged.object == "error":
        raise failed(payload)
    return judged


def judged(
    content: bytes, cached_tokens: int | None, created_tokens: int | None
) -> tuple[Kv, bytes, AnswerUsage | None]:
    """Judge a whole chat or completion. Return what became of the hand-off, if there was one, what the client
    gets, and the usage: the numbers are those of `mended_usage`.

    Raises `WorkerFailed` if it tells of an error, `InvalidStream` if the worker has ended it early,
    `InvalidAnswer` if it is something else.
    """
    usage = None
    completion: JudgedCompletion | None
    try:
        typed = _WITH_USAGE.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        completion = completion_of(content)  # without the usage, which may be the reason
    else:
        completion, usage = typed, typed.usage
    if completion is None:
        raise InvalidAnswer("the worker's answer is no chat or completion")
    if completion.error is not None or completion.object == "error":  # no calls: every answer passes here
        raise failed(content)
    check_ends(completion.choices)
    if completion.kv_transfer_params is not None or completion.ec_transfer_params is not None:
        content = without_transfer(content)
    kv, content = mended_usage(content, usage, cached_tokens, created_tokens)
    return kv, content, usage


def check_answer(content: bytes) -> bytes:
    """Return a whole answer, of whatever kind, without what is for engines alone. Raises `InvalidAnswer` if
    it is no JSON object, `WorkerFailed` if it tells of an error.
    """
    judged: Judged | None
    try:
        judged = _ANY.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        judged = _without_types(content)
    if judged is None:
        raise InvalidAnswer("the worker's answer is not a JSON object")
    if judged.tells_error():
        raise failed(content)
    return without_transfer(content) if judged.is_for_engines() else content


def check_ends(choices: list[EndedChoice] | None) -> None:
    """Raise `InvalidAnswer` unless there are choices, and all have ended; else as `check_reason` does."""
    if not choices:
        raise InvalidAnswer("the worker's answer has no choices")
    for choice in choices:
        reason = choice.finish_reason
        if not reason:
            raise InvalidAnswer(NOT_FINISHED)
        if reason != "stop":
            check_reason(reason)


def check_reason(reason: str) -> None:
    """Raise `InvalidStream` if an answer with this `finish_reason` is not whole, `WorkerFailed` if it failed.

    vLLM (0.32) may end its requests with `abort` when SIGTERM stops it.
    """
    if reason == "abort":
        raise InvalidStream(ENDED_BY_WORKER)
    if reason == "error":
        raise WorkerFailed(500, b'{"error":%b}' % _FAILED_REASON)


def is_whole(ended: set[int] | None, choices: int) -> bool:
    """Tell whether these are all choices; if nobody knows how many there are (0), none may be left out."""
    if not ended:
        return False
    return len(ended) >= (choices or max(ended) + 1)


def without_transfer(content: bytes) -> bytes:
    """Return the document without what concerns engines alone; every other value keeps its bytes."""
    document = decode_document(content) or {}
    for name in ("kv_transfer_params", "ec_transfer_params"):
        if name in document:
            document[name] = _NULL
    return encode_document(document)


def failed(payload: bytes) -> WorkerFailed:
    """Return the error that a document tells of, in whatever spelling, to be raised."""
    document = decode_document(payload)
    if document is None:
        document = {"message": Raw(_json.encode(payload.decode("utf-8", "replace")))}
    error = document.get("error", _NULL)
    if bytes(error) == b"null":
        fields = {name: document[name] for name in ("message", "type", "param", "code") if name in document}
        error = Raw(_json.encode(fields))
    return WorkerFailed(_status_of(bytes(error)), b'{"error":%b}' % bytes(error))


def _status_of(error: bytes) -> int:
    """Return the HTTP status that an error object names; 500 if it names none."""
    code = bytes((decode_document(error) or {}).get("code", b""))
    return int(code) if len(code) == 3 and code.isdigit() and 400 <= int(code) < 600 else 500


def _without_types(content: bytes) -> JudgedCompletion | None:
    """Return what is to be judged of a document in which a field has a type that nobody expects."""
    document = decode_document(content)
    if document is None:
        return None
    return JudgedCompletion(
        object="error" if bytes(document.get("object", b"")) == b'"error"' else None,
        error=_is_given(document.get("error")) or None,
        kv_transfer_params=_is_given(document.get("kv_transfer_params")) or None,
        ec_transfer_params=_is_given(document.get("ec_transfer_params")) or None,
    )


def _is_given(value: Raw | None) -> bool:
    return value is not None and bytes(value) != b"null"
