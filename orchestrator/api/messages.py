"""Anthropic's Messages, as vLLM serves them: `/v1/messages` in two legs, `/v1/messages/count_tokens` in one.

The prefill leg has one token, and its answer the hand-off, as a chat's. Differences:

- A prefill worker would read the one token of a tool that must be called as the call's arguments, and fail: a
  stop string that such a token begins with keeps it from doing so, and changes nothing of the prompt.
- Usage tells apart what of the prompt was new, found in the cache, and added to it. On the decode worker all
  of it was found, if it was handed over; the client gets the prefill worker's numbers.
- A stream always tells its usage, and ends with `message_stop`; one that fails ends with `event: error`.
- Keys also come as `x-api-key`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw

from orchestrator.api.base import Endpoint
from orchestrator.api.leg_form import LegForm
from orchestrator.api.view import RequestView, view_request
from orchestrator.config.keys import ANTHROPICS
from orchestrator.errors import BatonError, WorkerAnswered
from orchestrator.http.exchange import Exchange
from orchestrator.wire.judge import (
    ENDED_BY_WORKER,
    NOT_FINISHED,
    InvalidStream,
    failed,
    without_transfer,
)
from orchestrator.wire.named_events import NamedEvents, document_of, written
from orchestrator.wire.shapes import MessageAnswer, MessageDelta, MessageUsage, Typed
from orchestrator.wire.sse import Events
from orchestrator.wire.usage import InvalidAnswer, Kv, Usage, decode_document, encode_document

PATH: Final = "/v1/messages"
COUNT_PATH: Final = "/v1/messages/count_tokens"

# What no event says anything with, if it is the first of its kind.
_SILENT: Final = frozenset({b"message_start", b"content_block_start", b"ping"})

# By status; of others `invalid_request_error` if the client is to blame, else `api_error`.
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_FORCED: Final = "a tool that must be called"
_BEGINS_ARGUMENTS: Final = "{"

_TYPED: Final = msgspec.json.Decoder(Typed)
_ANSWER: Final = msgspec.json.Decoder(MessageAnswer)
_DELTA: Final = msgspec.json.Decoder(MessageDelta)
_json: Final = msgspec.json.Encoder()


class MessagesForm(LegForm):
    """Prompts go as text in both legs: prefill workers do not tell their token ids here."""

    def __init__(self) -> None:
        super().__init__(gives_ids=False)

    def kind(self, view: RequestView) -> str:
        choice = view.shared.get("tool_choice")
        return _FORCED if choice is not None and _type_of(choice) == "tool" else ""

    def one_token(self, kind: str) -> dict[str, Any]:
        fields = {"stream": False, "max_tokens": 1}
        return fields | {"stop_sequences": [_BEGINS_ARGUMENTS]} if kind else fields

    def released(self, shared: Mapping[str, Raw]) -> Mapping[str, Raw]:
        """Leave out a budget for thinking, too: it must be below the number of tokens."""
        kept = super().released(shared)
        thinking = kept.get("thinking")
        if thinking is None or _type_of(thinking) != "enabled":
            return kept
        return {name: value for name, value in kept.items() if name != "thinking"}


class MessagesEndpoint(Endpoint):
    """It has Anthropic's forms of streams and errors; `counts` tokens, or has them made."""

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__(needs_one_worker=counts, streams=not counts, can_continue=False)
        self.form = MessagesForm()
        self.wanted_key = ANTHROPICS

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        view = view_request(body, exchange)
        view.wants_usage = True
        if "max_tokens" not in view.own or view.refuses("max_tokens"):
            view.whole_reason = "no token asked for"  # refused, so nothing is to be prefilled for it
        return view

    def credential(self, exchange: Exchange) -> bytes | None:
        given = exchange.header(b"authorization")
        key = exchange.header(b"x-api-key")
        return given if given is not None or key is None else b"Bearer " + key

    def events(
        self, view: RequestView, *, hides_usage: bool, cached_tokens: int | None, created_tokens: int | None
    ) -> Events:
        return MessageEvents(cached_tokens=cached_tokens, created_tokens=created_tokens)

    def whole(
        self, view: RequestView, content: bytes, *, cached_tokens: int | None, created_tokens: int | None
    ) -> tuple[Kv, bytes, Usage | None]:
        if not self.streams:
            return super().whole(view, content, cached_tokens=cached_tokens, created_tokens=created_tokens)
        return _judged(content, cached_tokens, created_tokens)

    def error(self, error: BatonError) -> tuple[list[tuple[bytes, bytes]], bytes]:
        return error_answer(error)

    def error_event(self, error: BatonError) -> bytes:
        return written(b"error", error_body(error))


# --- errors -------------------------------------------------------------------------------------


def error_answer(error: BatonError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return headers and body of an answer that tells of `error`."""
    return error.headers(), error_body(error)


def error_body(error: BatonError) -> bytes:
    """Return Anthropic's error object. A worker's own is passed on; vLLM has OpenAI's for what it refuses
    before it looks at the request, and that becomes one.
    """
    if isinstance(error, WorkerAnswered):
        if _type_of(error.content) == "error":
            return error.content
        return _error_object(error.status, _message_in(error.content) or error.message)
    return _error_object(error.status, error.message)


def _error_object(status: int, message: str) -> bytes:
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return _json.encode({"type": "error", "error": {"type": kind, "message": message}})


def _message_in(content: bytes) -> str | None:
    """Return what an error object of OpenAI says."""
    document = decode_document(content) or {}
    for holder in (decode_document(bytes(document.get("error", b"null"))), document):
        message = (holder or {}).get("message")
        if message is not None and memoryview(message)[0] == ord('"'):
            return str(msgspec.json.decode(message))
    return None


# --- answers ------------------------------------------------------------------------------------


def _judged(
    content: bytes, cached_tokens: int | None, created_tokens: int | None
) -> tuple[Kv, bytes, Usage | None]:
    """Judge a whole message as `Endpoint.whole` does."""
    try:
        answer = _ANSWER.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAnswer("the worker's answer is no message") from error
    if answer.tells_error() or answer.type == "error":
        raise failed(content)
    if answer.type != "message":
        raise InvalidAnswer("the worker's answer is no message")
    if answer.stop_reason is None:
        raise InvalidStream(ENDED_BY_WORKER)
    if answer.is_for_engines():
        content = without_transfer(content)
    kv = _outcome(answer.usage)
    if cached_tokens is None or kv is Kv.UNKNOWN or answer.usage is None:
        return kv, content, answer.usage
    document = decode_document(content) or {}
    return kv, _with_usage(document, answer.usage, cached_tokens, created_tokens), answer.usage


def _outcome(usage: MessageUsage | None) -> Kv:
    if usage is None or usage.cache_read_input_tokens is None:
        return Kv.UNKNOWN
    return Kv.TRANSFERRED if usage.cache_read_input_tokens == usage.prompt_tokens() else Kv.RECOMPUTED


def _with_usage(
    document: dict[str, Raw], usage: MessageUsage, cached_tokens: int, created_tokens: int | None
) -> bytes:
    """Return the document with the prefill worker's numbers; every other value keeps its bytes."""
    prompt_tokens = usage.prompt_tokens()
    created = min(created_tokens or 0, prompt_tokens - cached_tokens)
    counts: dict[str, Any] = {
        "input_tokens": max(0, prompt_tokens - cached_tokens - created),
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": cached_tokens,
    }
    fields = decode_document(bytes(document["usage"])) or {}
    return encode_document({**document, "usage": Raw(_json.encode({**fields, **counts}))})


class MessageEvents(NamedEvents):
    """It sends the worker's events of a message. Its end is `message_stop`, behind a reason to stop."""

    __slots__ = ("_has_reason",)

    def __init__(self, *, cached_tokens: int | None, created_tokens: int | None) -> None:
        super().__init__(b"content_block_delta", cached_tokens=cached_tokens, created_tokens=created_tokens)
        self._has_reason = False

    def _named(self, name: bytes, event: bytes, payload: bytes) -> bytes:
        if name == b"message_delta":
            return self._said(self._stopping(event, payload))
        if name == b"message_stop":
            if not self._has_reason:
                raise InvalidStream(NOT_FINISHED)
            self._is_done = True
            return self._said(event)
        if name in _SILENT and not self._has_begun:
            return self._hold(event)
        return self._said(event)

    def _stopping(self, event: bytes, payload: bytes) -> bytes:
        """Return the event that says why the message ends, and its usage."""
        try:
            stopped = _DELTA.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidStream("the worker's stream has an event that cannot be read") from error
        if stopped.delta is None or stopped.delta.stop_reason is None:
            raise InvalidStream(ENDED_BY_WORKER)
        self._has_reason = True
        self._kv = _outcome(stopped.usage)
        self._usage = stopped.usage
        cached = self._cached_tokens
        if cached is None or stopped.usage is None or self._kv is Kv.UNKNOWN:
            return event
        document = document_of(payload)
        return written(b"message_delta", _with_usage(document, stopped.usage, cached, self._created_tokens))


def _type_of(value: Raw | bytes) -> str | None:
    """Return the `type` of a JSON object; None if it has none, or is none."""
    try:
        return _TYPED.decode(value).type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
