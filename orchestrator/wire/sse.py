"""Server-sent events are relayed as vLLM writes them: whole, without being decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import msgspec

from orchestrator.compiled import mypyc_attr
from orchestrator.wire.shapes import DeltaChunk
from orchestrator.wire.usage import (
    Document,
    Kv,
    decode_document,
    kv_outcome,
    usage_of,
    with_cached_tokens,
)

DONE: Final = b"data: [DONE]\n\n"
# What vLLM (0.32) may end its requests with when SIGTERM stops it: such an answer looks whole. No string can
# contain it, for there the quotes would be escaped.
ABORTED: Final = b'"finish_reason":"abort"'
ENDED_BY_WORKER: Final = "the worker ended the request by itself"

_END: Final = b"\n\n"
_CRLF_END: Final = b"\r\n\r\n"

# No engine writes an event of this size; without a limit, one that never ends would fill the memory.
MAX_EVENT_BYTES = 16 * 1024 * 1024


class InvalidStream(ValueError):
    """The worker's stream is not what it must be; the client has to be told, for it looks like an end."""


class WorkerFailed(InvalidStream):
    """The worker reports an error in its stream, as an event like any other."""

    def __init__(self, document: Document) -> None:
        super().__init__("the worker's stream reports an error")
        self.document = document

    @property
    def status(self) -> int:
        """It is the HTTP status that the error would have had before the head; 500 if it has none."""
        error = decode_document(bytes(self.document["error"])) or {}
        code = bytes(error.get("code", b""))
        return int(code) if code.isdigit() and 400 <= int(code) < 600 else 500


_CHUNK: Final = msgspec.json.Decoder(DeltaChunk)


@mypyc_attr(allow_interpreted_subclasses=True)
class Events(ABC):
    """It is one stream from worker to client: chunks come in as they arrive, and events may be sent on."""

    __slots__ = ()

    @property
    @abstractmethod
    def kv(self) -> Kv:
        """It is what became of the hand-off, as the usage event tells."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """The last event was `[DONE]`."""

    @abstractmethod
    def feed(self, chunk: bytes) -> bytes:
        """Return the whole events that can be sent now; b"" if there are none.

        Raises `InvalidStream`, and `WorkerFailed` for an error among them: the others are dropped with it.
        """

    @abstractmethod
    def finish(self) -> None:
        """Note that the worker's body has ended. Raises `InvalidStream` unless it ended as a complete stream
        does.
        """


class EventStream(Events):
    """It sends the worker's own events, in its own bytes.

    Two exceptions: the usage event's cached tokens become the prefill worker's, and a usage event that the
    client did not ask for is withheld.
    """

    __slots__ = ("_cached_tokens", "_hides_usage", "_kv", "_last", "_tail")

    def __init__(self, *, hides_usage: bool = False, cached_tokens: int | None = None) -> None:
        self._hides_usage = hides_usage
        self._cached_tokens = cached_tokens
        self._tail = b""
        self._last = b""
        self._kv = Kv.UNKNOWN

    @property
    def kv(self) -> Kv:
        return self._kv

    @property
    def is_done(self) -> bool:
        return self._last.rstrip().endswith(b"data: [DONE]")

    def feed(self, chunk: bytes) -> bytes:
        if self._tail:
            chunk = self._tail + chunk
            self._tail = b""
        if not chunk.endswith(_END):
            chunk = self._cut(chunk)
        # Not `in`: for bytes that raises an exception inside, and drops it, before it looks at them.
        if chunk.rfind(b'"usage"') >= 0:
            chunk = self._mend_usage(chunk)
        if chunk.rfind(b'{"error"') >= 0:  # inside a string its quotes are escaped
            _refuse_error(chunk)
        if chunk.rfind(ABORTED) >= 0:
            raise InvalidStream(ENDED_BY_WORKER)
        if chunk:
            self._last = chunk
        return chunk

    def finish(self) -> None:
        if self._tail or not self.is_done:
            raise InvalidStream("the worker's stream ended without [DONE]")

    def _cut(self, chunk: bytes) -> bytes:
        end = max(_end_of_last(chunk, _END), _end_of_last(chunk, _CRLF_END))
        self._tail = chunk[end:]
        if len(self._tail) > MAX_EVENT_BYTES:
            raise InvalidStream("the worker's stream has an event that does not end")
        return chunk[:end]

    def _mend_usage(self, events: bytes) -> bytes:
        return b"".join(map(self._mend_event, split_events(events)))

    def _mend_event(self, event: bytes) -> bytes:
        document = _document_of(event) if b'"usage"' in event else None
        if document is None or bytes(document.get("choices", b"")) != b"[]":
            return event
        usage = usage_of(document)
        if usage is None:
            return event
        self._kv = kv_outcome(usage)
        if self._hides_usage:
            return b""
        return b"data: " + with_cached_tokens(document, usage, self._cached_tokens) + _END


def _refuse_error(events: bytes) -> None:
    for event in split_events(events):
        document = _document_of(event) if b'{"error"' in event else None
        if document is not None and "choices" not in document:
            raise WorkerFailed(document)


def has_begun(events: bytes) -> bool:
    """Tell whether one of these events says something.

    Comments do not, and neither do the role deltas that vLLM sends first, together with the first token: it
    sends them before an error too. Nor does an end: a request aborted before its first token has no more.
    """
    return any(map(_says_something, split_events(events)))


def _says_something(event: bytes) -> bool:
    if payload_of(event) in (b"", b"[DONE]"):
        return False
    return not (b'"role"' in event and _is_role_delta(event))


def _is_role_delta(event: bytes) -> bool:
    try:
        return all(choice.is_empty() for choice in _CHUNK.decode(payload_of(event)).choices)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def error_event(body: bytes) -> bytes:
    """Return what a stream ends with when it fails after its first byte: SDKs raise on this and on nothing
    else.
    """
    return b"data: " + body + _END + DONE


def _end_of_last(chunk: bytes, separator: bytes) -> int:
    at = chunk.rfind(separator)
    return 0 if at < 0 else at + len(separator)


def split_events(events: bytes) -> list[bytes]:
    """Split whole events, each with its end."""
    end = _CRLF_END if _CRLF_END in events else _END
    return [event + end for event in events.split(end) if event]


def payload_of(event: bytes) -> bytes:
    """Return the data of one event; b"" if it has none, as a comment."""
    lines = (line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(lines)


def _document_of(event: bytes) -> Document | None:
    return decode_document(payload_of(event))
