"""A transcript holds what the client of a stream has been sent, so that another worker can go on with it.

On the hot path this is an append. Every `REDUCE_BYTES` the events are reduced to what counts in them.
A stream with anything in it that is not plain text cannot be resumed.
"""

from __future__ import annotations

import re
import sys
from array import array
from typing import Literal

import msgspec
from msgspec import Raw

from orchestrator.wire.sse import DONE, payload_of, split_events

# So many bytes of events are kept as they are; their text is a fortieth of that.
REDUCE_BYTES = 64 * 1024

# One stream's text and token ids have at most so many bytes. No model answers at such length.
MAX_KEPT_BYTES = 4 * 1024 * 1024

_NULL = Raw(b"null")
_DATA, _END = b"data: ", b"\n\n"
_BETWEEN = _END + _DATA


class CannotContinue(ValueError):
    """A stream that has begun cannot be resumed. The text says why."""


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """This is what the client has of a stream."""

    id: str
    created: int
    model: str
    is_chat: bool
    text: str
    ids: list[int] | None  # of the text; None unless the client asked for token ids
    prompt_ids: bytes | None  # a JSON list; None unless the client asked for token ids
    has_role: bool  # the event with the role that a chat begins with
    finish_reason: str | None
    usage: Usage | None  # the last that was told
    has_final_usage: bool  # the event behind the last choice
    is_done: bool  # `[DONE]`


class TranscriptMemory:
    """This counts what all transcripts of a process hold together, in bytes."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, size: int) -> bool:
        """Take so many bytes; return False, with nothing taken, if there is not so much left."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        self.used -= size


# --- events as vLLM writes them -----------------------------------------------------------------
# A stream cannot be resumed if a choice has a field that is not listed here, or a value where there is None.


class _Delta(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    role: str | None = None
    content: str | None = None
    reasoning: None = None
    reasoning_content: None = None
    refusal: None = None
    function_call: None = None
    tool_calls: None = None


class _Choice(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    index: Literal[0] = 0
    delta: _Delta | None = None
    text: str = ""
    logprobs: None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: Raw = _NULL

    @property
    def said(self) -> str:
        return self.text if self.delta is None else self.delta.content or ""

    @property
    def is_plain(self) -> bool:
        """The choice has nothing but text."""
        has_role = self.delta is not None and self.delta.role is not None
        return self.finish_reason is None and self.token_ids is None and not has_role


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice]
    usage: Usage | None = None
    prompt_token_ids: Raw = _NULL

    @property
    def is_plain(self) -> bool:
        return self.usage is None and len(self.choices) == 1 and self.choices[0].is_plain


class _Head(msgspec.Struct):
    id: str
    created: int
    model: str


_HEAD = msgspec.json.Decoder(_Head)
_EVENT = msgspec.json.Decoder(_Event)
_EVENTS = msgspec.json.Decoder(list[_Event])
_STRING = msgspec.json.Decoder(str)
_TEXT = re.compile(rb'"(?:content|text)":"((?:[^"\\]|\\.)*)"')


class Transcript:
    """It records what was sent of one stream. It is to be closed when the stream has ended, which gives its
    memory back.
    """

    __slots__ = (
        "_charged",
        "_due",
        "_has_final_usage",
        "_has_role",
        "_head",
        "_ids",
        "_is_chat",
        "_is_done",
        "_memory",
        "_misses_ids",
        "_prompt_ids",
        "_reduced_bytes",
        "_texts",
        "_usage",
        "chunks",
        "finish_reason",
        "reason",
    )

    def __init__(self, memory: TranscriptMemory) -> None:
        self._memory = memory
        self._charged = 0
        self._due = REDUCE_BYTES
        self.chunks: list[bytes] = []  # not yet reduced; the relay appends whole events
        self._reduced_bytes = 0  # of all that was sent, when the chunks were last reduced
        self._head: _Head | None = None
        self._is_chat = False
        self._texts: list[str] = []
        self._ids = array("q")
        self._misses_ids = False
        self._prompt_ids: bytes | None = None
        self._has_role = False
        self._usage: Usage | None = None
        self._has_final_usage = False
        self._is_done = False
        self.finish_reason: str | None = None  # as far as is known
        self.reason: str | None = None  # why this stream cannot be resumed, as far as is known
        self._charge(REDUCE_BYTES)

    def reduce_if_due(self, sent_bytes: int) -> None:
        """Reduce the chunks if there is enough of them. It is to be called several times a second;
        `sent_bytes` counts all chunks that were ever appended.
        """
        if sent_bytes - self._reduced_bytes >= self._due:
            self._reduced_bytes = sent_bytes
            self.reduce()

    def reduce(self) -> None:
        """Replace the chunks by what counts in them."""
        data = b"".join(self.chunks)
        self.chunks.clear()
        if self.reason is None and data:
            try:
                self._read(data)
            except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError):
                self._give_up("something other than text was sent")

    def sent(self) -> Sent:
        """Return everything that was kept. Raises `CannotContinue`."""
        self.reduce()
        if self.reason is not None:
            raise CannotContinue(self.reason)
        if self._head is None:
            raise CannotContinue("nothing was sent that names the stream")
        return Sent(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            is_chat=self._is_chat,
            text="".join(self._texts),
            ids=None if self._misses_ids else self._ids.tolist(),
            prompt_ids=self._prompt_ids,
            has_role=self._has_role,
            finish_reason=self.finish_reason,
            usage=self._usage,
            has_final_usage=self._has_final_usage,
            is_done=self._is_done,
        )

    def close(self) -> None:
        """Give the memory back; nothing is kept from now on. It may be called again."""
        self._give_up("it has ended")

    # --- reading --------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        if data.endswith(DONE):
            self._is_done = True
            data = data[: -len(DONE)]
        if self._head is None:
            data = self._read_first(data)
        if not data:
            return
        text = _plain_text(data)
        if text is None:
            self._note(_EVENTS.decode(b"[%b]" % b",".join(_payloads(data))))
        else:
            self._misses_ids = True
            self._note_text(text)

    def _read_first(self, data: bytes) -> bytes:
        """Read the first event by itself, for it is unlike the others; these are returned."""
        events = split_events(data)
        for number, event in enumerate(events, start=1):
            if payload := payload_of(event):  # no comment
                self._head = _HEAD.decode(payload)
                self._note([_EVENT.decode(payload)])
                return b"".join(events[number:])
        return b""

    def _note(self, events: list[_Event]) -> None:
        choices = [choice for event in events for choice in event.choices]
        self._note_text("".join([choice.said for choice in choices]))
        for event in events:
            self._note_rest(event)
        for choice in choices:
            self._note_choice(choice)

    def _note_text(self, text: str) -> None:
        self._texts.append(text)
        self._charge(sys.getsizeof(text))

    def _note_rest(self, event: _Event) -> None:
        self._note_prompt(event.prompt_token_ids)
        if event.usage is not None:
            self._usage = event.usage
            self._has_final_usage = not event.choices

    def _note_choice(self, choice: _Choice) -> None:
        self._note_prompt(choice.prompt_token_ids)
        if choice.token_ids:
            self._ids.extend(choice.token_ids)
            self._charge(len(choice.token_ids) * self._ids.itemsize)
        elif choice.said:
            self._misses_ids = True
        if choice.delta is not None:
            self._is_chat = True
            self._has_role = self._has_role or choice.delta.role is not None
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason

    def _note_prompt(self, ids: Raw) -> None:
        if self._prompt_ids is None and memoryview(ids)[0] == ord("["):
            self._prompt_ids = bytes(ids)
            self._charge(len(ids))

    # --- bounds ---------------------------------------------------------------------------------

    def _charge(self, size: int) -> None:
        if self.reason is not None:
            return
        if self._charged + size > MAX_KEPT_BYTES:
            self._give_up("it has become too long")
        elif not self._memory.take(size):
            self._give_up("too much is kept of other streams")
        else:
            self._charged += size

    def _give_up(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._due = 0  # what is kept from now on is dropped at once
        self.chunks.clear()
        self._texts.clear()
        self._ids = array("q")
        self._prompt_ids = None
        self._memory.give_back(self._charged)
        self._charged = 0


def _plain_text(data: bytes) -> str | None:
    """Return the text of events that differ in nothing else; None if they do, or may.

    A third of what a decoder costs: if what is between two texts is between all events, the texts are where
    they must be. There are line breaks in it, which no JSON value has, so it is found nowhere else.
    """
    events = data[len(_DATA) : -len(_END)].split(_BETWEEN)
    template = events[-1]
    found = _TEXT.search(template)
    if found is None or not _is_plain(template):
        return None
    before, behind = template[: found.start(1)], template[found.end(1) :]
    if not (data.startswith(_DATA + before) and data.count(behind + _BETWEEN + before) == len(events) - 1):
        return None
    start, end = len(before), -len(behind)
    try:
        return _STRING.decode(b'"%b"' % b"".join([event[start:end] for event in events]))
    except msgspec.DecodeError:  # one of them has a quote in it, so it is more than text
        return None


def _is_plain(payload: bytes) -> bool:
    try:
        return _EVENT.decode(payload).is_plain
    except msgspec.DecodeError:  # not even one event, for it has a comment or other line breaks
        return False


def _payloads(data: bytes) -> list[bytes]:
    """Return the data of each event."""
    return [payload for event in split_events(data) if (payload := payload_of(event))]
