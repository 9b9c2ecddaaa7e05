"""Another worker goes on with a stream: its events are rewritten into those of the worker that began it."""

from __future__ import annotations

from typing import Any

import msgspec

from orchestrator.failover.transcript import Sent, Usage
from orchestrator.wire.judge import InvalidStream
from orchestrator.wire.shapes import AnswerUsage
from orchestrator.wire.sse import DONE, Events, EventStream, payload_of, split_events
from orchestrator.wire.usage import Kv, tokens_in
from orchestrator.wire.usage import Usage as AnyUsage

_Document = dict[str, Any]
_DOCUMENT = msgspec.json.Decoder(_Document)
_json = msgspec.json.Encoder()


class Envelope(msgspec.Struct, frozen=True):
    """All events of a stream have this in common, whoever makes them."""

    sent: Sent

    def event(self, choices: list[_Document], **more: Any) -> bytes:
        return _event({**self.head(), "choices": choices, **more})

    def head(self) -> _Document:
        kind = "chat.completion.chunk" if self.sent.is_chat else "text_completion"
        return {"id": self.sent.id, "object": kind, "created": self.sent.created, "model": self.sent.model}

    def choice(self, completion: _Document) -> _Document:
        """Make the choice of a completion's event one of this stream."""
        if not self.sent.is_chat:
            # The client has the ids of its prompt. These are another one's.
            return completion | {"prompt_token_ids": None} if "prompt_token_ids" in completion else completion
        chat = {"index": 0, "delta": {"content": completion.get("text", "")}, "logprobs": None}
        names = ("finish_reason", "stop_reason", "token_ids")
        kept = {name: completion[name] for name in names if name in completion}
        if kept.get("finish_reason") is None:
            kept.pop("stop_reason", None)
        return chat | kept

    def role(self) -> bytes:
        """Return the event that a chat begins with."""
        delta = {"role": "assistant", "content": ""}
        return self.event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])


class ContinuedStream(Events):
    """It makes one stream from a new worker for a client that has the beginning from another.

    The worker was asked for a completion of prompt and beginning. Every event is made anew: the name of the
    stream, chat instead of completion, usage as if nothing had happened.
    """

    __slots__ = ("_again", "_cached_tokens", "_envelope", "_events", "_hides_usage", "_needs_role", "_so_far")

    def __init__(
        self,
        envelope: Envelope,
        so_far: Usage,
        *,
        hides_usage: bool,
        cached_tokens: int | None,
        again: str = "",
    ) -> None:
        """`so_far` counts the prompt's tokens, and those of the text that was sent.

        `cached_tokens`: what the client is told; if it is not known, the worker's own count.
        `again`: text that the client has and the worker begins with; not part of `so_far`.
        """
        self._events = EventStream(hides_usage=hides_usage)
        self._envelope = envelope
        self._so_far = so_far
        self._hides_usage = hides_usage
        self._cached_tokens = cached_tokens
        self._again = again
        self._needs_role = envelope.sent.is_chat and not envelope.sent.has_role

    @property
    def kv(self) -> Kv:
        """This is what became of the hand-off to the new worker."""
        return self._events.kv

    @property
    def has_begun(self) -> bool:
        return self._events.has_begun

    @property
    def is_done(self) -> bool:
        return self._events.is_done

    def usage(self) -> AnyUsage | None:
        """Return the usage of the whole stream, not of the new worker's part."""
        usage = self._events.usage()
        new_tokens = None if usage is None else tokens_in(usage)[1]
        if new_tokens is None:
            return None
        return AnswerUsage(self._so_far.prompt_tokens, (self._so_far.completion_tokens or 0) + new_tokens)

    def feed(self, chunk: bytes) -> bytes:
        return b"".join(map(self._rewritten, split_events(self._events.feed(chunk))))

    def finish(self) -> None:
        self._events.finish()

    def _rewritten(self, event: bytes) -> bytes:
        payload = payload_of(event)
        if not payload or payload == b"[DONE]":
            return event
        document = _decoded(payload)
        choices = document.get("choices")
        if choices is None:  # an error
            return event
        if document.get("usage") is not None:
            if self._hides_usage and not choices:
                return b""
            self._mend_usage(document["usage"])
        document.update(self._envelope.head(), choices=list(map(self._choice, choices)))
        return self._role_if_due() + _event(document)

    def _choice(self, completion: _Document) -> _Document:
        if self._again:
            completion = completion | {"text": self._new(completion["text"])}
            if self._again and completion["finish_reason"] is not None:
                raise InvalidStream("the worker left out what the client has")
        return self._envelope.choice(completion)

    def _new(self, text: str) -> str:
        """Return what of the text the client does not have."""
        again, self._again = self._again[: len(text)], self._again[len(text) :]
        if not text.startswith(again):
            raise InvalidStream("the worker says something else than the client has")
        return text[len(again) :]

    def _role_if_due(self) -> bytes:
        is_due, self._needs_role = self._needs_role, False
        return self._envelope.role() if is_due else b""

    def _mend_usage(self, usage: _Document) -> None:
        so_far = self._so_far
        new_tokens = usage.get("completion_tokens") or 0
        usage |= _usage(Usage(so_far.prompt_tokens, (so_far.completion_tokens or 0) + new_tokens))
        details = usage.get("prompt_tokens_details")
        if details and details.get("cached_tokens") is not None:
            bounded = min(details["cached_tokens"], so_far.prompt_tokens)
            details["cached_tokens"] = bounded if self._cached_tokens is None else self._cached_tokens


def ending(envelope: Envelope, usage: Usage | None, *, cached_tokens: int | None) -> bytes:
    """Return the events that a stream still needs when no token is to come any more.

    `usage`: what is to be told of it, None if nothing is.
    """
    sent, events = envelope.sent, b""
    if sent.finish_reason is None:
        every = {"usage": _usage(usage)} if usage is not None and sent.usage is not None else {}
        events += envelope.event([envelope.choice(_AT_LIMIT)], **every)
    if usage is not None and not sent.has_final_usage:
        details = {} if cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": cached_tokens}}
        events += envelope.event([], usage=_usage(usage) | details)
    return events if sent.is_done else events + DONE


_AT_LIMIT = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}


def _usage(usage: Usage) -> _Document:
    completion_tokens = usage.completion_tokens or 0
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def _decoded(payload: bytes) -> _Document:
    try:
        return _DOCUMENT.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidStream("the worker's stream has an event that cannot be read") from error


def _event(document: _Document) -> bytes:
    return b"data: %b\n\n" % _json.encode(document)
