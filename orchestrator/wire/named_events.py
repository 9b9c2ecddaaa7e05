"""Streams whose events have names are relayed as vLLM writes them: `event: NAME`, and a line of JSON."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Final

from orchestrator.compiled import mypyc_attr
from orchestrator.wire.judge import InvalidStream, failed
from orchestrator.wire.sse import JudgedEvents, WholeEvents, payload_of, split_events
from orchestrator.wire.usage import Document, Kv, Usage, decode_document

_END: Final = b"\n\n"
_EVENT: Final = b"event:"


@mypyc_attr(allow_interpreted_subclasses=True)
class NamedEvents(JudgedEvents):
    """It sends the worker's own events; a subclass knows what those are for that say more than text.

    Nearly all events of a stream are of one name, pieces of text. These are passed on with one look at their
    bytes; all others are given to `_named`, once.
    """

    _last: ClassVar[str] = "its last event"

    def __init__(self, text: bytes, *, cached_tokens: int | None, created_tokens: int | None) -> None:
        """`text` is the name of the events that bring text; the numbers are those of `Endpoint.events`."""
        self._text = b"event: %b\ndata: " % text
        self._following = _END + self._text
        self._cached_tokens = cached_tokens
        self._created_tokens = created_tokens
        self._whole = None
        self._latest = b""  # events that the client has
        self._is_open = False  # it has begun, and goes on
        self._kv = Kv.UNKNOWN
        self._usage: Usage | None = None

    def usage(self) -> Usage | None:
        return self._usage

    def feed(self, chunk: bytes) -> bytes:
        if self._whole is not None:
            chunk = self._whole.feed(chunk)
        is_text = self._is_open and chunk.startswith(self._text) and chunk.endswith(_END)
        if is_text and chunk.count(_END) == chunk.count(self._following) + 1:
            self._latest = chunk
            return chunk
        return self._judged(chunk)

    # --- one event after the other --------------------------------------------------------------

    def _judged(self, chunk: bytes) -> bytes:
        if self._whole is None and not chunk.endswith(_END):
            self._whole = WholeEvents()
            chunk = self._whole.feed(chunk)
        events = b"".join([self._event(event) for event in split_events(chunk)])
        self._is_open = self._has_begun and not self._is_done
        if events and self._has_begun:
            self._latest = events
        return events

    def _event(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if not payload:
            return event
        if self._is_done:  # nobody reads behind the end
            return b""
        name = name_of(event)
        if name == b"error" or (not name and payload.find(b'"error"') >= 0):
            raise failed(payload)
        return self._named(name, event, payload)

    @abstractmethod
    def _named(self, name: bytes, event: bytes, payload: bytes) -> bytes:
        """Return what the client gets of an event, and may not have had of those before. Raises as `feed`
        does.
        """
        ...


def name_of(event: bytes) -> bytes:
    """Return the name of an event; b"" if it has none."""
    lines = event.splitlines()
    return next((line[6:].strip() for line in lines if line.startswith(_EVENT)), b"")


def document_of(payload: bytes) -> Document:
    """Return the fields of an event. Raises `InvalidStream` if it is no JSON object."""
    document = decode_document(payload)
    if document is None:
        raise InvalidStream("the worker's stream has an event that cannot be read")
    return document


def written(name: bytes, payload: bytes) -> bytes:
    """Return an event."""
    return b"event: %b\ndata: %b\n\n" % (name, payload)
