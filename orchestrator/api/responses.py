"""OpenAI's Responses, as vLLM serves them: `/v1/responses` in two legs, and what a worker has stored.

The prefill leg has one token, is not stored, and its answer has the hand-off, as a chat's. The decode leg is
the client's document, so the worker that answers stores the response if it stores any
(`VLLM_ENABLE_RESPONSES_API_STORE`). The response's id says which worker that is (`api/holders.py`): what
builds on it, asks for it or cancels it goes there, whole. Served whole is also what the prompt alone does not
decide: a response in the background, whose answer comes before the KV cache does; tools that the worker calls
by itself, which prompt it again; a truncated prompt, whose length depends on the number of tokens asked for.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, Final

import msgspec
from msgspec import Raw

from orchestrator.api.base import Endpoint
from orchestrator.api.holders import mark_in
from orchestrator.api.leg_form import LegForm
from orchestrator.api.view import RequestView, view_request
from orchestrator.errors import BatonError, UnknownResponse
from orchestrator.http.exchange import Exchange
from orchestrator.wire.judge import ENDED_BY_WORKER, InvalidStream, failed, without_transfer
from orchestrator.wire.named_events import NamedEvents, document_of, written
from orchestrator.wire.shapes import ResponseAnswer, ResponseEvent, ResponseUsage, Typed
from orchestrator.wire.sse import Events
from orchestrator.wire.usage import Document, InvalidAnswer, Kv, Usage, decode_document, encode_document

PATH: Final = "/v1/responses"
RETRIEVE: Final = "/v1/responses/{response_id}"
CANCEL: Final = "/v1/responses/{response_id}/cancel"

_id_in: Final = re.compile(r"/v1/responses/([A-Za-z0-9_.:-]+)(/cancel)?").fullmatch

# What events say nothing of the answer before the first that does.
_SILENT: Final = frozenset(
    f"response.{name}".encode()
    for name in ("created", "queued", "in_progress", "output_item.added", "content_part.added")
)
_ENDS: Final = frozenset(
    f"response.{name}".encode() for name in ("completed", "incomplete", "failed", "cancelled")
)
# Tools that the client calls; all others are the worker's.
_CALLED_BY_CLIENT: Final = frozenset({"function", "custom", "namespace"})
_FALSE: Final = (b"null", b"false", b"0")
_NUMBER: Final = b'"sequence_number":'
_NO_USAGE: Final = b"null"

_TEXT: Final = msgspec.json.Decoder(str | None)
_TOOLS: Final = msgspec.json.Decoder(list[Typed])
_ANSWER: Final = msgspec.json.Decoder(ResponseAnswer)
_EVENT: Final = msgspec.json.Decoder(ResponseEvent)
_json: Final = msgspec.json.Encoder()


class ResponsesForm(LegForm):
    """Legs are named in their bodies, and prefill workers do not tell the prompt's token ids."""

    def __init__(self) -> None:
        super().__init__(gives_ids=False, names_legs=True)

    def kind(self, view: RequestView) -> str:
        return ""

    def one_token(self, kind: str) -> dict[str, Any]:
        return {"stream": False, "max_output_tokens": 1, "ignore_eos": True, "store": False}


class ResponsesEndpoint(Endpoint):
    """It makes responses."""

    def __init__(self) -> None:
        super().__init__(can_continue=False)
        self.form = ResponsesForm()
        self.has_holders = True

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        view = view_request(body, exchange)
        view.wants_usage = True
        view.whole_reason = _whole_reason(view)
        return view

    def holder(self, view: RequestView, exchange: Exchange) -> str | None:
        """Raises `UnknownResponse` for a response that no worker can have."""
        before = _previous(view)
        return None if before is None else _mark_in(before)

    def events(
        self, view: RequestView, *, hides_usage: bool, cached_tokens: int | None, created_tokens: int | None
    ) -> Events:
        return ResponseEvents(
            cached_tokens=cached_tokens, created_tokens=created_tokens, may_be_cancelled=False
        )

    def whole(
        self, view: RequestView, content: bytes, *, cached_tokens: int | None, created_tokens: int | None
    ) -> tuple[Kv, bytes, Usage | None]:
        return _judged(content, cached_tokens, created_tokens, may_be_cancelled=False)

    def error_event(self, error: BatonError) -> bytes:
        return _failure({}, 0, error.message)


class StoredResponses(Endpoint):
    """It asks the worker that holds a response for it, or to cancel it."""

    def __init__(self, method: str) -> None:
        super().__init__(needs_one_worker=True, can_continue=False)
        self.method = method
        self.asks_holder = True

    def read(self, body: bytes, exchange: Exchange) -> RequestView:
        is_stream = self.method == "GET" and _asks_stream(exchange.query)
        return RequestView({}, (), {}, b"{}", "", is_stream, True, "it was made before", exchange)

    def check_content_type(self, content_type: bytes | None) -> None:
        """There is no body."""

    def holder(self, view: RequestView, exchange: Exchange) -> str | None:
        """Raises `UnknownResponse`."""
        return _mark_in(_asked_for(exchange.path))

    def target(self, exchange: Exchange) -> str:
        query = exchange.query.decode("ascii", "ignore")
        path = exchange.path.removesuffix("/")
        return f"{path}?{query}" if query else path

    def events(
        self, view: RequestView, *, hides_usage: bool, cached_tokens: int | None, created_tokens: int | None
    ) -> Events:
        return ResponseEvents(cached_tokens=None, created_tokens=None, may_be_cancelled=True)

    def whole(
        self, view: RequestView, content: bytes, *, cached_tokens: int | None, created_tokens: int | None
    ) -> tuple[Kv, bytes, Usage | None]:
        kv, content, _ = _judged(content, None, None, may_be_cancelled=True)
        return kv, content, None  # its tokens were counted when it was made

    def error_event(self, error: BatonError) -> bytes:
        return _failure({}, 0, error.message)


def entry_of(path: str) -> str | None:
    """Return the endpoint of a path that has a response's id in it; None if it is no such path."""
    found = _id_in(path)
    if found is None:
        return None
    return CANCEL if found[2] else RETRIEVE


# --- what is asked for --------------------------------------------------------------------------


def _whole_reason(view: RequestView) -> str | None:
    """Return why one worker has to make the response; None if two can."""
    if _is_true(view.own.get("background")):
        return "background"
    if _previous(view) is not None:
        return "previous_response_id"
    if _is_true(view.shared.get("truncation")) and bytes(view.shared["truncation"]) != b'"disabled"':
        return "truncation"
    if not _calls_all_tools(view):
        return "tools that the worker calls"
    if view.refuses("max_output_tokens"):
        return "no token asked for"  # refused, so nothing is to be prefilled for it
    return view.whole_reason


def _is_true(value: Raw | None) -> bool:
    return value is not None and bytes(value) not in _FALSE


def _calls_all_tools(view: RequestView) -> bool:
    """Tell whether the client calls the tools; what cannot be read the worker refuses."""
    tools = view.shared.get("tools")
    try:
        return tools is None or all(tool.type in _CALLED_BY_CLIENT for tool in _TOOLS.decode(tools))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True


def _previous(view: RequestView) -> str | None:
    """Return the id of the response that this one builds on; a wrong one the worker refuses."""
    value = view.shared.get("previous_response_id")
    try:
        return None if value is None else _TEXT.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _mark_in(response_id: str) -> str:
    mark = mark_in(response_id)
    if mark is None:
        raise UnknownResponse(response_id)
    return mark


def _asked_for(path: str) -> str:
    found = _id_in(path.removesuffix("/"))
    return "" if found is None else found[1]


def _asks_stream(query: bytes) -> bool:
    return any(part.lower() in (b"stream=true", b"stream=1") for part in query.split(b"&"))


# --- answers ------------------------------------------------------------------------------------


def _judged(
    content: bytes, cached_tokens: int | None, created_tokens: int | None, *, may_be_cancelled: bool
) -> tuple[Kv, bytes, Usage | None]:
    """Judge a whole response as `Endpoint.whole` does."""
    try:
        answer = _ANSWER.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAnswer("the worker's answer is no response") from error
    if answer.object != "response" and answer.tells_error():
        raise failed(content)
    if answer.object != "response" or answer.status is None:
        raise InvalidAnswer("the worker's answer is no response")
    if answer.status == "failed" and not may_be_cancelled:
        raise failed(content)
    if answer.status == "cancelled" and not may_be_cancelled:
        raise InvalidStream(ENDED_BY_WORKER)
    if answer.is_for_engines():
        content = without_transfer(content)
    kv = _outcome(answer.usage)
    if cached_tokens is None or kv is Kv.UNKNOWN:
        return kv, content, answer.usage
    document = _with_usage(decode_document(content) or {}, cached_tokens, created_tokens)
    return kv, encode_document(document), answer.usage


def _outcome(usage: ResponseUsage | None) -> Kv:
    details = None if usage is None else usage.input_tokens_details
    if usage is None or details is None or details.cached_tokens is None or usage.input_tokens is None:
        return Kv.UNKNOWN
    return Kv.TRANSFERRED if details.cached_tokens == usage.input_tokens else Kv.RECOMPUTED


def _with_usage(response: Document, cached_tokens: int, created_tokens: int | None) -> Document:
    """Return the response with the prefill worker's numbers; every other value keeps its bytes."""
    usage = decode_document(bytes(response.get("usage", _NO_USAGE))) or {}
    details = decode_document(bytes(usage.get("input_tokens_details", _NO_USAGE))) or {}
    counts: dict[str, Any] = {"cached_tokens": cached_tokens}
    if created_tokens is not None:
        counts["cache_write_tokens"] = created_tokens
    mended = Raw(_json.encode({**details, **counts}))
    return {**response, "usage": Raw(_json.encode({**usage, "input_tokens_details": mended}))}


class ResponseEvents(NamedEvents):
    """It sends the worker's events of a response, to the one that has the whole of it."""

    __slots__ = ("_created", "_may_be_cancelled")

    def __init__(
        self, *, cached_tokens: int | None, created_tokens: int | None, may_be_cancelled: bool
    ) -> None:
        """With `may_be_cancelled` a cancelled response is as good as any other."""
        super().__init__(
            b"response.output_text.delta", cached_tokens=cached_tokens, created_tokens=created_tokens
        )
        self._may_be_cancelled = may_be_cancelled
        self._created = b""  # the event that has the response as it was when it began

    def failure(self, message: str) -> bytes | None:
        document = decode_document(self._created) or {}
        response = decode_document(bytes(document.get("response", _NO_USAGE))) or {}
        return _failure(response, _number_in(self._latest) + 1, message)

    def _named(self, name: bytes, event: bytes, payload: bytes) -> bytes:
        if name in _ENDS:
            return self._said(self._ended_with(name, event, payload))
        if name == b"response.created":
            self._created = payload
        if name in _SILENT and not self._has_begun:
            return self._hold(event)
        return self._said(event)

    def _ended_with(self, name: bytes, event: bytes, payload: bytes) -> bytes:
        """Return the event that has the whole response."""
        try:
            response = _EVENT.decode(payload).response
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidStream("the worker's stream has an event that cannot be read") from error
        self._check_status(response, payload)
        self._is_done = True
        self._kv = _outcome(response.usage)
        self._usage = response.usage
        cached = None if self._kv is Kv.UNKNOWN else self._cached_tokens
        if cached is None and not response.is_for_engines():
            return event
        document = document_of(payload)
        held = bytes(document["response"])
        fields = decode_document(without_transfer(held) if response.is_for_engines() else held) or {}
        if cached is not None:
            fields = _with_usage(fields, cached, self._created_tokens)
        return written(name, encode_document({**document, "response": Raw(encode_document(fields))}))

    def _check_status(self, response: ResponseAnswer, payload: bytes) -> None:
        if self._may_be_cancelled:
            return
        if response.status == "failed":
            raise failed(bytes(document_of(payload)["response"]))
        if response.status == "cancelled":
            raise InvalidStream(ENDED_BY_WORKER)


def _number_in(events: bytes) -> int:
    """Return the number of the last of these events; -1 if it has none."""
    at = events.rfind(_NUMBER)
    if at < 0:
        return -1
    digits = re.match(rb"\s*(\d{1,9})", events[at + len(_NUMBER) :])
    return -1 if digits is None else int(digits[1])


def _failure(response: Document, number: int, message: str) -> bytes:
    """Return the last event of a stream that fails; `response` is what is known of it. One that has not begun
    has an id that nobody knows.
    """
    made = {"id": f"resp_{secrets.token_hex(22)}", "object": "response", "created_at": int(time.time())}
    known: dict[str, Any] = {**made, "output": [], **response}
    known |= {"status": "failed", "error": {"code": "server_error", "message": message}}
    event = {"type": "response.failed", "sequence_number": number, "response": known}
    return written(b"response.failed", _json.encode(event))
