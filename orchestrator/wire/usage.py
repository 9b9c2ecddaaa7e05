"""The usage object of an answer is evidence that KV was transferred; we mend two numbers in it.

What the prefix cache had of the prompt, and what was added to it, only the prefill worker knows.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import msgspec
from msgspec import Raw

from orchestrator.wire.shapes import AnswerUsage, AnswerWithUsage, MessageUsage, ResponseUsage

Document = dict[str, Raw]
# As an answer had it: each API has a shape of its own, and a stream's has none.
Usage = AnswerUsage | MessageUsage | ResponseUsage | Document


_ANSWER: Final = msgspec.json.Decoder(AnswerWithUsage)
_CACHED: Final = b'"cached_tokens":'
_CREATED: Final = b'"created_cache_tokens":'
_ENDS: Final[tuple[bytes, ...]] = (b",", b"}")  # of a number in an object
_OBJECT: Final = msgspec.json.Decoder(Document)
_json: Final = msgspec.json.Encoder()
_MOST_DIGITS: Final = 12  # of a number of tokens
_MOST_TOKENS: Final = 10**_MOST_DIGITS


class Kv(IntEnum):
    """This became of the prompt's KV cache, as the decode worker's count of cached tokens shows."""

    NONE = 0  # the request ended before anybody could tell
    TRANSFERRED = 1  # all of the prompt came from the hand-off
    RECOMPUTED = 2  # the decode worker computed (some of) the prompt itself
    LOCAL = 3  # there was no hand-off: one worker did everything
    UNKNOWN = 4  # the worker does not report cached tokens


class InvalidAnswer(ValueError):
    """A worker's answer is not a JSON object."""


def mended(content: bytes, cached_tokens: int | None, created_tokens: int | None = None) -> tuple[Kv, bytes]:
    """Judge the usage of an answer, and write the prefill worker's counts into it; see `mended_usage`. Raises
    `InvalidAnswer`.
    """
    return mended_usage(content, _typed_usage(content), cached_tokens, created_tokens)


def mended_usage(
    content: bytes, usage: AnswerUsage | None, cached_tokens: int | None, created_tokens: int | None
) -> tuple[Kv, bytes]:
    """Say what this usage of the answer tells of the hand-off, and return the answer with the prefill
    worker's counts of cached tokens, and of those that it has added to its cache.

    Valid only if the hand-off was sent without the cached-tokens key. All other bytes stay as they are; so
    does a count that is unknown, or that the worker does not report.
    """
    details = usage.prompt_tokens_details if usage is not None else None
    if usage is None or details is None or details.cached_tokens is None or usage.prompt_tokens is None:
        return Kv.UNKNOWN, content
    reported = details.cached_tokens
    outcome = Kv.TRANSFERRED if reported == usage.prompt_tokens else Kv.RECOMPUTED
    changed: bytes | None = content
    if cached_tokens is not None:
        changed = _with_count(content, _CACHED, reported, cached_tokens)
    created = details.created_cache_tokens
    if created_tokens is not None and created is not None and changed is not None:
        changed = _with_count(changed, _CREATED, created, created_tokens)
    return outcome, _rebuilt(content, cached_tokens, created_tokens) if changed is None else changed


def _typed_usage(content: bytes) -> AnswerUsage | None:
    """Return the usage; None if there is none, or one of another shape than OpenAI's."""
    try:
        return _ANSWER.decode(content).usage
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if decode_document(content) is None:
            raise InvalidAnswer("the worker's answer is not a JSON object") from error
        return None


def _with_count(content: bytes, key: bytes, reported: int, wanted: int) -> bytes | None:
    """Return the answer with another count, by its place; None if that is not beyond doubt.

    A quote within a JSON string is escaped, so `key` is found as a key or not at all.
    """
    if wanted == reported:
        return content
    before, found, behind = content.rpartition(key)
    number = b"%d" % reported
    end = len(number)
    is_all = behind.startswith(number) and behind[end : end + 1] in _ENDS
    # `in` makes an error first, of which it makes nothing: it costs four times as much as `find`.
    if found and is_all and before.find(key) < 0:
        return b"%b%b%d%b" % (before, key, wanted, behind[end:])
    return None


def _rebuilt(content: bytes, cached_tokens: int | None, created_tokens: int | None) -> bytes:
    document = decode_document(content) or {}
    return with_counts(document, usage_of(document) or {}, cached_tokens, created_tokens)


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


def tokens_in(usage: Usage | int) -> tuple[int | None, int | None]:
    """Return how many tokens prompt and answer have; None for what the usage does not say. A number is that
    of the answer's pieces, for want of a usage: each is taken for a token.
    """
    if isinstance(usage, int):
        return None, usage
    if isinstance(usage, dict):
        return _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
    prompt, answer = usage.told()
    if type(prompt) is int and type(answer) is int and 0 <= prompt < _MOST_TOKENS > answer >= 0:
        return prompt, answer  # as nearly always: a call for each costs more
    return _checked(prompt), _checked(answer)


def _number(value: Raw | None) -> int | None:
    digits = b"" if value is None else bytes(value)
    return int(digits) if digits.isdigit() and len(digits) < _MOST_DIGITS else None


def _checked(value: object) -> int | None:
    """Return a number that a worker may have told, whatever it is."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS
    return value if is_count and isinstance(value, int) else None


def kv_outcome(usage: Document) -> Kv:
    """Judge the decode worker's usage; valid only if the hand-off was sent without the cached-tokens key."""
    details = _details_of(usage)
    if details is None or "cached_tokens" not in details or "prompt_tokens" not in usage:
        return Kv.UNKNOWN
    is_whole = bytes(details["cached_tokens"]) == bytes(usage["prompt_tokens"])
    return Kv.TRANSFERRED if is_whole else Kv.RECOMPUTED


def with_counts(
    document: Document, usage: Document, cached_tokens: int | None, created_tokens: int | None
) -> bytes:
    """Return the document with the prefill worker's counts; every other value keeps its bytes, and so does a
    count that is unknown or that the usage does not have.
    """
    details = _details_of(usage)
    if details is None:
        return _json.encode(document)
    mended = details | _counts(details, cached_tokens, created_tokens)
    usage = {**usage, "prompt_tokens_details": _raw(mended)}
    return _json.encode({**document, "usage": _raw(usage)})


def _counts(details: Document, cached_tokens: int | None, created_tokens: int | None) -> Document:
    counts: Document = {}
    if cached_tokens is not None and "cached_tokens" in details:
        counts["cached_tokens"] = _raw(cached_tokens)
    if created_tokens is not None and _is_count(details.get("created_cache_tokens")):
        counts["created_cache_tokens"] = _raw(created_tokens)
    return counts


def _is_count(value: Raw | None) -> bool:
    return value is not None and bytes(value) != b"null"


def _details_of(usage: Document) -> Document | None:
    details = usage.get("prompt_tokens_details")
    return None if details is None else decode_document(bytes(details))


def _raw(value: object) -> Raw:
    return Raw(_json.encode(value))
