"""Anthropic's Messages as vLLM serves them: a chat in another form (`/v1/messages`, `/count_tokens`)."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from worker.sim import frames, protocol
from worker.sim.frames import Json
from worker.sim.generate import Opened, Outcome, Piece
from worker.sim.protocol import ChatRequest, Job, Malformed, Refused
from worker.sim.runs import Run
from worker.sim.settings import Settings

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}  # an aborted request has none
_ROLES = ("user", "assistant", "system")


class _Conversation(msgspec.Struct, kw_only=True):
    """Both endpoints read this. Unknown fields are ignored."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class CountRequest(_Conversation, kw_only=True):
    pass


class MessagesRequest(_Conversation, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    thinking: dict[str, Any] | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


def error_body(message: str, kind: str) -> bytes:
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def refusal(refused: Refused) -> bytes:
    """Return the body of an error: a body of another type is refused before the endpoint sees it."""
    if isinstance(refused, Malformed):
        return frames.error_body(refused.message, refused.kind, refused.status, refused.param)
    return error_body(refused.message, refused.kind)


def job(request: MessagesRequest, settings: Settings, header_id: str | None) -> Job:
    """Make the job of a request. Raises `Refused`."""
    _check(request)
    chat = ChatRequest(
        model=request.model,
        messages=_chat_messages(request),
        tools=request.tools,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        stream=request.stream,
        temperature=request.temperature,
        cache_salt=request.cache_salt,
        kv_transfer_params=request.kv_transfer_params,
    )
    return protocol.chat_job(chat, settings, header_id)


def count(request: CountRequest, settings: Settings) -> Json:
    protocol.check_model(request.model, settings)
    chat = ChatRequest(model=request.model, messages=_chat_messages(request), tools=request.tools)
    tokens = len(protocol.chat_tokens(chat))
    return {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}


def _check(request: MessagesRequest) -> None:
    if request.max_tokens <= 0:
        raise Malformed("Value error, max_tokens must be positive", param="body.max_tokens")
    thinking = request.thinking or {}
    if thinking.get("type") != "enabled" or (request.kv_transfer_params or {}).get("do_remote_decode"):
        return
    if thinking.get("budget_tokens", 0) >= request.max_tokens:
        raise Malformed("Value error, thinking.budget_tokens must be less than max_tokens", param="body")


def _chat_messages(request: _Conversation) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": request.system}] if request.system else []
    wrong = [message.get("role") for message in request.messages if message.get("role") not in _ROLES]
    if wrong:
        raise Malformed(
            f"Input should be 'user', 'assistant' or 'system': {wrong[0]!r}", param="body.messages"
        )
    return system + request.messages


class MessagesAnswer(frames.Answer):
    """One block of text: the simulated model calls no tools, and does not think."""

    kv_error = error_body("Internal server error", "InternalServerError")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._has_block = False
        self._last: Piece | None = None

    def whole(self, outcome: Outcome) -> Json:
        (run,) = outcome.runs
        pieces = outcome.pieces[0]
        self._open(run)
        said = "".join(piece.text for piece in pieces)
        message: Json = {
            "id": self.job.request_id,
            "type": "message",
            "role": "assistant",
            "content": [{"type": "text", "text": said}],
            "model": self.job.model,
            **_stop(pieces[-1]),
            "usage": _usage(run, len(pieces)),
            "kv_transfer_params": run.kv,
        }
        return {name: value for name, value in message.items() if value is not None}

    def opening(self, opened: Opened) -> list[bytes]:
        self._open(opened.run)
        return [self._started(len(opened.run.prompt.tokens))]

    def said(self, piece: Piece) -> bytes:
        self._completion_tokens += 1
        self._last = piece
        if not piece.text:
            return b""
        start = b"" if self._has_block else _event("content_block_start", **_BLOCK)
        self._has_block = True
        return start + _event(
            "content_block_delta", delta={"type": "text_delta", "text": piece.text}, index=0
        )

    def ending(self) -> list[bytes]:
        stop = _event("content_block_stop", index=0) if self._has_block else b""
        usage = _usage(self._runs[0], self._completion_tokens)
        delta = {"stop_reason": None, "stop_sequence": None} | _stop(self._last)
        return [stop + _event("message_delta", delta=delta, usage=usage), _event("message_stop")]

    def aborted(self) -> list[bytes]:
        return self.ending()

    def lost(self) -> list[bytes]:
        return [self._started(0), self.error_events(self.kv_error) or b""]

    def error_events(self, content: bytes) -> bytes | None:
        error = orjson.loads(content)["error"]
        return _event("error", error={"type": "internal_error", "message": error["message"]})

    def _started(self, prompt_tokens: int) -> bytes:
        message: Json = {
            "id": self.job.request_id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.job.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }
        return _event("message_start", message=message)


_BLOCK = {"content_block": {"type": "text", "text": ""}, "index": 0}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def _stop(piece: Piece | None) -> Json:
    """Return why the answer ended, by what is known of its last token."""
    if piece is None:
        return {}
    if piece.finish == "stop" and isinstance(piece.stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": piece.stop}
    return {"stop_reason": _STOP_REASONS.get(piece.finish or "")}


def _usage(run: Run, output_tokens: int) -> Json:
    fresh = len(run.prompt.tokens) - run.cached_tokens - run.created_tokens
    return {
        "input_tokens": max(0, fresh),
        "output_tokens": output_tokens,
        "cache_creation_input_tokens": run.created_tokens,
        "cache_read_input_tokens": run.cached_tokens,
    }
