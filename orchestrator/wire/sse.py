"""Server-sent events are relayed as vLLM writes them: whole, without being decoded."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Final

import msgspec

from orchestrator.compiled import mypyc_attr
from orchestrator.wire.judge import (
    NOT_FINISHED,
    InvalidStream,
    check_reason,
    completion_of,
    failed,
    is_whole,
    without_transfer,
)
from orchestrator.wire.shapes import DeltaChunk, EndedChoice
from orchestrator.wire.usage import (
    Document,
    Kv,
    Usage,
    decode_document,
    kv_outcome,
    usage_of,
    with_counts,
)

DONE: Final = b"data: [DONE]\n\n"

_DONE: Final = b"[DONE]"
_LINE_END: Final = b"\n"
_END: Final = b"\n\n"
_CRLF_END: Final = b"\n\r\n"  # its end, for the line before it may end in either
_ANY_END: Final = re.compile(rb"\n\r?\n")
_ERROR_LINE: Final = re.compile(rb"(?:\A|\n)(?:event:[ ]?error[ \t\r]*\n|error:)")

_DATA: Final = b"data: "
_CHOICES: Final = b'"choices":[{'
_NOT_ENDED: Final = b'"finish_reason":null'
_NUMBERS: Final = b"0123456789,"
_UNKNOWN: Final = Kv.UNKNOWN
# So many events are learned from: the fields behind the text come and go with the first few, if at all.
_LESSONS: Final = 4

# No engine writes an event of this size; without a limit, one that never ends would fill the memory.
MAX_EVENT_BYTES = 16 * 1024 * 1024

# What comes before the first word: roles, one for each choice, and with them the prompt's token ids, of which
# a million have 8 MB.
MAX_OPENING_BYTES = 16 * 1024 * 1024

_CHUNK: Final = msgspec.json.Decoder(DeltaChunk)


@mypyc_attr(allow_interpreted_subclasses=True)
class Events(ABC):
    """It is one stream from worker to client: chunks come in as they arrive, and events may be sent on.

    An API has one class of this kind, of which its `Endpoint` makes one per stream. What it costs is paid per
    chunk: it looks at bytes once, keeps no more than an event, and its work grows as the stream does.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def kv(self) -> Kv:
        """It is what became of the hand-off, as the worker's usage tells; UNKNOWN before that has come."""

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Something has come that an answer is made of. Until then the stream may turn out to be an error
        with a status of its own, and another worker may begin anew: nothing has been said.
        """

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Nothing is missing but the end of the body: what goes wrong behind this is no news to it."""

    @abstractmethod
    def feed(self, chunk: bytes) -> bytes:
        """Return the whole events that can be sent now; b"" if there are none.

        Before it has begun, these are comments alone: they can be sent at once, and say nothing. Events that
        come before the first word of the answer are held back, and are returned with it, or later: it may
        have begun with nothing to be sent yet.

        Raises `InvalidStream`, and `WorkerFailed` for an error among them: the others are dropped with it, so
        that another worker can say them anew. A stream that looks whole and is not is refused before its
        last event has been returned.
        """

    @abstractmethod
    def finish(self) -> None:
        """Note that the worker's body has ended. Raises `InvalidStream` unless it ended as a complete stream
        does.
        """

    def usage(self) -> Usage | None:
        """Return the worker's usage, which says how many tokens there were; None if none has come."""
        return None

    def failure(self, message: str) -> bytes | None:
        """Return the last events for a client that has had the beginning, if they depend on that; None if
        the endpoint's `error_event` says all.
        """
        return None


class WholeEvents:
    """It makes whole events of pieces, each byte of which it looks at once, however small they are."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending: bytearray | None = None  # the beginning of an event

    @property
    def has_pending(self) -> bool:
        return self._pending is not None

    def feed(self, chunk: bytes) -> bytes:
        """Return what has become whole, b"" if nothing has. Raises `InvalidStream` for an event that does not
        end.
        """
        if self._pending is not None:
            chunk = self._joined(self._pending, chunk)
        return chunk if not chunk or chunk.endswith(_END) else self._cut(chunk)

    def _joined(self, pending: bytearray, chunk: bytes) -> bytes:
        """Return all that has come, if there is an end in it. That may lie across the seam, not before it."""
        seam = bytes(pending[-2:]) + chunk
        if seam.find(_END) < 0 and seam.find(_CRLF_END) < 0:
            self._keep(pending, chunk)
            return b""
        pending += chunk
        self._pending = None
        return bytes(pending)

    def _cut(self, chunk: bytes) -> bytes:
        end = max(_end_of_last(chunk, _END), _end_of_last(chunk, _CRLF_END))
        if end < len(chunk):
            self._pending = bytearray()
            self._keep(self._pending, chunk[end:])
        return chunk[:end]

    def _keep(self, pending: bytearray, data: bytes) -> None:
        if len(pending) + len(data) > MAX_EVENT_BYTES:
            raise InvalidStream("the worker's stream has an event that does not end")
        pending += data


class EventStream(Events):
    """It sends the worker's own events of a chat or completion, in its own bytes.

    Exceptions: the usage event has the prefill worker's counts, or is withheld if the client did not ask for
    it (what the system's fingerprint is, then stands in the last event of each choice); and what is for
    engines alone is left out.

    Nearly all events of a stream differ in their text alone. Once one has been judged, those that begin and
    end as it does are passed on, for in them is neither an end nor an error: that takes one look at their
    bytes. All others are decoded, so it does not matter how they are spelt.
    """

    # Class attributes are the defaults of what is set later, or never, and not looked at per event.
    _after_numbers = b"\0"  # `_after` without the numbers in it
    _lessons = 0
    _held: list[bytes] | None = None  # events from before the first that says something
    _held_bytes = 0
    _ends: list[bytes] | None = None  # the last events of choices, until the usage has come
    _ends_bytes = 0
    _ended: set[int] | None = None  # choices that have a finish_reason
    _usage: Document | None = None
    _has_begun = False
    _is_done = False

    def __init__(
        self,
        *,
        hides_usage: bool = False,
        cached_tokens: int | None = None,
        created_tokens: int | None = None,
        choices: int = 1,
    ) -> None:
        """`choices` have to end before `[DONE]`; 0 if nobody knows how many there are."""
        self._hides_usage = hides_usage
        self._cached_tokens = cached_tokens
        self._created_tokens = created_tokens
        self._choices = choices
        self._kv = _UNKNOWN
        self._whole: WholeEvents | None = None  # once a chunk ends within an event
        self._before = b"\0"  # what is around the text of an event that was judged; no event begins so
        self._after = b"\0"

    @property
    def kv(self) -> Kv:
        return self._kv

    @property
    def has_begun(self) -> bool:
        return self._has_begun

    @property
    def is_done(self) -> bool:
        return self._is_done

    def usage(self) -> Usage | None:
        return self._usage

    def feed(self, chunk: bytes) -> bytes:
        if self._whole is not None:
            chunk = self._whole.feed(chunk)
        if (
            chunk.endswith(self._after)
            and chunk.startswith(self._before)
            and (
                chunk.find(_LINE_END) == len(chunk) - 2
                or chunk.count(self._after) * 2 == chunk.count(_LINE_END)
            )
        ):
            return chunk
        return self._judged(chunk)

    def finish(self) -> None:
        if not self._is_done or (self._whole is not None and self._whole.has_pending):
            raise InvalidStream("the worker's stream ended without [DONE]")

    # --- one event after the other --------------------------------------------------------------

    def _judged(self, chunk: bytes) -> bytes:
        if self._whole is None and not chunk.endswith(_END):
            self._whole = WholeEvents()
            chunk = self._whole.feed(chunk)
        if chunk.startswith(_DATA) and chunk.find(_LINE_END) == len(chunk) - 2:
            return self._line(chunk)
        return b"".join([self._event(event) for event in split_events(chunk)])

    def _event(self, event: bytes) -> bytes:
        """Return what the client gets of one event, and may not have had of those before."""
        if _is_one_line(event):
            return self._line(event)
        payload = payload_of(event)
        if _ERROR_LINE.search(event) is not None:
            raise failed(payload or event.partition(b":")[2].strip())
        return self._payload(event, payload) if payload else event

    def _line(self, event: bytes) -> bytes:
        """Do the same for an event of one line. If it differs from that which was judged in its text alone,
        and in numbers behind it (the ids of its tokens, its usage), it is passed on.
        """
        if event.startswith(self._before):
            at = event.rfind(_NOT_ENDED)
            if at >= 0 and event[at:].translate(None, _NUMBERS) == self._after_numbers:
                return event
        return self._payload(event, event[6:-2])

    def _payload(self, event: bytes, payload: bytes) -> bytes:
        if self._is_done:  # nobody reads behind the end
            return b""
        if payload.strip() == _DONE:
            return self._end(event)
        return self._document(event, payload)

    def _document(self, event: bytes, payload: bytes) -> bytes:
        completion = completion_of(payload)
        if completion is None:
            return self._said(event)
        if completion.is_for_engines():
            payload = without_transfer(payload)
            event = _DATA + payload + _END
        if not completion.choices:
            return self._without_choice(event, payload)
        is_end = self._note_ends(completion.choices)
        if not self._has_begun and _is_role(payload):
            return self._hold(event)
        if self._ended is not None:
            return self._ending(event, is_end=is_end)
        if self._lessons < _LESSONS and self._choices == 1:
            self._learn(event)
        return self._said(event)

    def _note_ends(self, choices: list[EndedChoice]) -> bool:
        """Note which of these choices have ended; return whether any has."""
        is_end = False
        for choice in choices:
            if choice.finish_reason:
                is_end = True
                check_reason(choice.finish_reason)
                if self._ended is None:
                    self._ended = set()
                self._ended.add(choice.index)
        return is_end

    def _learn(self, event: bytes) -> None:
        """Take what is around the text of this event as what is around that of others."""
        begin, end = event.find(_CHOICES), event.rfind(_NOT_ENDED)
        if 0 <= begin < end and event.startswith(_DATA) and event.find(_LINE_END) == len(event) - 2:
            self._lessons += 1
            self._before, self._after = event[: begin + len(_CHOICES)], event[end:]
            self._after_numbers = self._after.translate(None, _NUMBERS)

    def _forget(self) -> None:
        self._before = self._after = self._after_numbers = b"\0"

    # --- what is held back ----------------------------------------------------------------------

    def _said(self, event: bytes) -> bytes:
        """Return an event that says something, with those that were held back until one does."""
        if not event:
            return event
        self._has_begun = True
        held, self._held = self._held, None
        return event if held is None else b"".join(held) + event

    def _hold(self, event: bytes) -> bytes:
        self._held_bytes += len(event)
        if self._held_bytes > MAX_OPENING_BYTES:
            raise InvalidStream("the worker's stream says nothing at great length")
        if self._held is None:
            self._held = []
        self._held.append(event)
        return b""

    def _ending(self, event: bytes, *, is_end: bool) -> bytes:
        """Hold the last event of each choice back, if the usage that follows them is withheld: they get the
        fingerprint that vLLM writes into them for a client that does not ask for the usage.
        """
        if is_whole(self._ended, self._choices):
            self._forget()
            is_end = True  # or behind it, and stays there
        if not (is_end and self._hides_usage):
            return self._said(event)
        self._has_begun = True
        self._ends_bytes += len(event)
        if self._ends_bytes > MAX_OPENING_BYTES:
            raise InvalidStream("the worker's stream does not come to its end")
        if self._ends is None:
            self._ends = []
        self._ends.append(event)
        return b""

    def _released(self, fingerprint: bytes) -> bytes:
        """Return the last events of choices that were held back, with the fingerprint."""
        ends, self._ends = self._ends, None
        return b"" if ends is None else b"".join([_with_fingerprint(each, fingerprint) for each in ends])

    def _end(self, event: bytes) -> bytes:
        if not is_whole(self._ended, self._choices):
            raise InvalidStream(NOT_FINISHED)
        self._is_done = True
        return self._said(self._released(b"null")) + event

    def _without_choice(self, event: bytes, payload: bytes) -> bytes:
        document = decode_document(payload)
        usage = None if document is None else usage_of(document)
        if document is None or usage is None or "choices" not in document:
            return self._said(event)
        self._usage = usage
        self._kv = kv_outcome(usage)
        if self._hides_usage:
            return self._said(self._released(bytes(document.get("system_fingerprint", b"null"))))
        mended = with_counts(document, usage, self._cached_tokens, self._created_tokens)
        return self._said(_DATA + mended + _END)


def _with_fingerprint(event: bytes, fingerprint: bytes) -> bytes:
    """Return an event with the fingerprint of the system, a JSON value, if there is one."""
    if fingerprint == b"null" or not event.endswith(b"}\n\n") or b'"system_fingerprint"' in event:
        return event
    return b'%b,"system_fingerprint":%b}\n\n' % (event[:-3], fingerprint)


def _is_one_line(event: bytes) -> bool:
    return event.startswith(_DATA) and event.find(b"\n") == len(event) - 2


def _is_role(payload: bytes) -> bool:
    if payload.find(b'"role"') < 0:
        return False
    try:
        return all(choice.is_empty() for choice in _CHUNK.decode(payload).choices)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def has_begun(events: bytes) -> bool:
    """Tell whether one of these events says something.

    Comments do not, and neither do the role deltas that vLLM sends first, together with the first token: it
    sends them before an error too. Nor does an end: a request aborted before its first token has no more.
    """
    return any(map(_says_something, split_events(events)))


def _says_something(event: bytes) -> bool:
    payload = payload_of(event)
    return payload not in (b"", _DONE) and not _is_role(payload)


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
    if events.find(b"\r") < 0:
        return [event + _END for event in events.split(_END) if event]
    ends = [match.end() for match in _ANY_END.finditer(events)]
    return [events[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def payload_of(event: bytes) -> bytes:
    """Return the data of one event; b"" if it has none, as a comment."""
    if _is_one_line(event):
        return event[6:-2].strip()
    lines = (line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(lines)
