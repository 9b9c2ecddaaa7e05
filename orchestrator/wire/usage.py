"""The usage object of an answer: evidence that KV was transferred, and the one number in it that we mend."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Raw

Document = dict[str, Raw]

_OBJECT = msgspec.json.Decoder(Document)
_json = msgspec.json.Encoder()


class KvOutcome(StrEnum):
    """What became of the hand-off, as the decode worker's count of cached tokens shows."""

    TRANSFERRED = "transferred"  # all of the prompt came from the hand-off
    RECOMPUTED = "recomputed"  # the decode worker computed (some of) the prompt itself
    LOCAL = "local"  # there was no hand-off: one worker did everything
    UNKNOWN = "unknown"  # the worker does not report cached tokens


def decode_document(content: bytes) -> Document | None:
    """The top level of a JSON object; None if it is not one."""
    try:
        return _OBJECT.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def encode_document(document: Document) -> bytes:
    return _json.encode(document)


def usage_of(document: Document) -> Document | None:
    """The document's usage object, or None if it has none (or a null)."""
    usage = document.get("usage")
    return None if usage is None else decode_document(bytes(usage))


def kv_outcome(usage: Document) -> KvOutcome:
    """Judge the decode worker's usage; valid only if the hand-off was sent without the cached-tokens key."""
    details = _details_of(usage)
    if details is None or "cached_tokens" not in details or "prompt_tokens" not in usage:
        return KvOutcome.UNKNOWN
    is_whole = bytes(details["cached_tokens"]) == bytes(usage["prompt_tokens"])
    return KvOutcome.TRANSFERRED if is_whole else KvOutcome.RECOMPUTED


def with_cached_tokens(document: Document, usage: Document, cached_tokens: int | None) -> bytes:
    """The document with the prefill worker's count of cached tokens; every other value keeps its bytes.

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
