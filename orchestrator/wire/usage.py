"""The usage object of an answer is evidence that KV was transferred; we mend one number in it."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.wire.shapes import AnswerUsage, AnswerWithUsage

Document = dict[str, Raw]


_ANSWER: Final = msgspec.json.Decoder(AnswerWithUsage)
_CACHED: Final = b'"cached_tokens":'
_OBJECT: Final = msgspec.json.Decoder(Document)
_json: Final = msgspec.json.Encoder()


class Kv(IntEnum):
    """This became of the prompt's KV cache, as the decode worker's count of cached tokens shows."""

    NONE = 0  # the request ended before anybody could tell
    TRANSFERRED = 1  # all of the prompt came from the hand-off
    RECOMPUTED = 2  # the decode worker computed (some of) the prompt itself
    LOCAL = 3  # there was no hand-off: one worker did everything
    UNKNOWN = 4  # the worker does not report cached tokens


class InvalidAnswer(ValueError):
    """A worker's answer is not a JSON object."""


def mended(content: bytes, cached_tokens: int | None) -> tuple[Kv, bytes]:
    """Judge an answer, and write the prefill worker's count of cached tokens into its usage.

    Valid only if the hand-off was sent without the cached-tokens key. All other bytes stay as they are; so
    does the count if `cached_tokens` is unknown or the worker reports none. Raises `InvalidAnswer`.
    """
    usage = _typed_usage(content)
    details = usage.prompt_tokens_details if usage is not None else None
    if usage is None or details is None or details.cached_tokens is None or usage.prompt_tokens is None:
        return Kv.UNKNOWN, content
    reported = details.cached_tokens
    outcome = Kv.TRANSFERRED if reported == usage.prompt_tokens else Kv.RECOMPUTED
    if cached_tokens is None or cached_tokens == reported:
        return outcome, content
    return outcome, _with_count(content, reported, cached_tokens)


def _typed_usage(content: bytes) -> AnswerUsage | None:
    """Return the usage; None if there is none, or one of another shape than OpenAI's."""
    try:
        return _ANSWER.decode(content).usage
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if decode_document(content) is None:
            raise InvalidAnswer("the worker's answer is not a JSON object") from error
        return None


def _with_count(content: bytes, reported: int, cached_tokens: int) -> bytes:
    """Return the answer with another count, by its place if that is beyond doubt, else by its structure.

    A quote within a JSON string is escaped, so `_CACHED` is found as a key or not at all.
    """
    found, number = content.find(_CACHED), str(reported).encode()
    at = found + len(_CACHED)
    end = at + len(number)
    is_alone = found >= 0 and content.find(_CACHED, at) < 0
    if is_alone and content.startswith((number + b",", number + b"}"), at):
        return b"".join((content[:at], str(cached_tokens).encode(), content[end:]))
    document = decode_document(content) or {}
    return with_cached_tokens(document, usage_of(document) or {}, cached_tokens)


def decode_document(content: bytes) -> Document | None:
    """Return the top level of a JSON object; None if it is not one."""
    try:
        return _OBJECT.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def encode_document(document: Document) -> bytes:
    return _json.encode(document)


def usage_of(document: Document) -> Document | None:
    """Return the document's usage object, or None if it has none (or a null)."""
    usage = document.get("usage")
    return None if usage is None else decode_document(bytes(usage))


def kv_outcome(usage: Document) -> Kv:
    """Judge the decode worker's usage; valid only if the hand-off was sent without the cached-tokens key."""
    details = _details_of(usage)
    if details is None or "cached_tokens" not in details or "prompt_tokens" not in usage:
        return Kv.UNKNOWN
    is_whole = bytes(details["cached_tokens"]) == bytes(usage["prompt_tokens"])
    return Kv.TRANSFERRED if is_whole else Kv.RECOMPUTED


def with_cached_tokens(document: Document, usage: Document, cached_tokens: int | None) -> bytes:
    """Return the document with the prefill worker's count of cached tokens; every other value keeps its
    bytes.

    Unchanged if the count is unknown or the usage has no such field.
    """
    details = _details_of(usage)
    if cached_tokens is not None and details is not None and "cached_tokens" in details:
        details = {**details, "cached_tokens": _raw(cached_tokens)}
        usage = {**usage, "prompt_tokens_details": _raw(details)}
        document = {**document, "usage": _raw(usage)}
    return _json.encode(document)


def _details_of(usage: Document) -> Document | None:
    details = usage.get("prompt_tokens_details")
    return None if details is None else decode_document(bytes(details))


def _raw(value: object) -> Raw:
    return Raw(_json.encode(value))
