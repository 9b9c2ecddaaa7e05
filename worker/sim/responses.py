"""OpenAI's Responses as vLLM serves them: `/v1/responses`, and what a worker that stores them remembers."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
import orjson
from starlette.responses import Response

from worker.sim import frames, protocol
from worker.sim.engine import Engine
from worker.sim.faults import Plan
from worker.sim.frames import Json
from worker.sim.generate import Opened, Outcome, Piece, generate
from worker.sim.handoffs.base import KvLost
from worker.sim.journal import Entry
from worker.sim.protocol import ChatRequest, Job, Malformed, Refused
from worker.sim.runs import Run
from worker.sim.settings import Settings


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """Unknown fields are ignored."""

    ADDED: ClassVar = frozenset({"tool_choice"})  # vLLM writes it into the document before it looks

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    background: bool | None = False
    store: bool | None = True
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    truncation: str | None = "disabled"
    user: str | None = None
    request_id: str | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


@dataclass(slots=True)
class Store:
    """It keeps responses in memory, for good, if the worker was started so."""

    is_on: bool
    responses: dict[str, Json] = field(default_factory=dict)
    messages: dict[str, list[Json]] = field(default_factory=dict)  # what led to a response
    events: dict[str, list[bytes]] = field(default_factory=dict)  # of those that run in the background
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def find(self, response_id: str) -> Json:
        """Raises `Refused`."""
        if response_id not in self.responses:
            message = f"Response with id '{response_id}' not found."
            raise Refused(message, status=404, kind="invalid_request_error", param="response_id")
        return self.responses[response_id]

    def note(self, job: Job, response: Json) -> None:
        """Keep a response that has ended, if it is to be kept."""
        known = self.responses.get(job.request_id, {})
        if _is_stored(job, self) and known.get("status") != "cancelled":
            self.responses[job.request_id] = response

    def cancel(self, response_id: str) -> Json:
        """Raises `Refused`."""
        response = self.find(response_id)
        if response["status"] not in ("queued", "in_progress"):
            message = "Cannot cancel a synchronous response."
            raise Refused(message, kind="invalid_request_error", param="response_id")
        response["status"] = "cancelled"
        if task := self.tasks.get(response_id):
            task.cancel()
        return response


def job(request: ResponsesRequest, settings: Settings, header_id: str | None, store: Store) -> Job:
    """Make the job of a request; its name is in the body, not in the head. Raises `Refused`."""
    protocol.check_model(request.model, settings)
    _check(request, store)
    messages = _conversation(request, store)
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=request.tools or None,
        max_tokens=request.max_output_tokens,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=request.ignore_eos,
        stream=request.stream,
        temperature=request.temperature,
        seed=request.seed,
        cache_salt=request.cache_salt,
        kv_transfer_params=request.kv_transfer_params,
    )
    name = request.request_id or f"resp_{uuid.uuid4().hex}"
    made = protocol.renamed(protocol.chat_job(chat, settings, None), name, request)
    if _is_stored(made, store):
        store.messages[name] = messages
    return made


def _check(request: ResponsesRequest, store: Store) -> None:
    if request.background and request.store is False:
        raise Malformed("Value error, background can only be used when `store` is true", param="background")
    if request.background and not store.is_on:
        message = "This vLLM engine does not support `store=True` and therefore not the background mode."
        raise Refused(message, kind="invalid_request_error", param="background")


def _conversation(request: ResponsesRequest, store: Store) -> list[Json]:
    given = request.input
    added = [{"role": "user", "content": given}] if isinstance(given, str) else list(map(_message, given))
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    return system + _earlier(request, store) + added


def _earlier(request: ResponsesRequest, store: Store) -> list[Json]:
    if request.previous_response_id is None:
        return []
    before = store.find(request.previous_response_id)
    said = [_message(item) for item in before["output"]]
    return [m for m in store.messages[before["id"]] if m["role"] != "system"] + said


def _message(item: Json) -> Json:
    """Make an input item a message of a chat: what has no role is a tool's."""
    content = item.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    said = "".join(str(part.get("text") or "") for part in parts)
    if "role" in item:
        return {"role": item["role"], "content": said}
    return {"role": "tool", "content": orjson.dumps(item, option=orjson.OPT_SORT_KEYS).decode()}


def _is_stored(job: Job, store: Store) -> bool:
    return store.is_on and job.asked.store is not False


class ResponsesAnswer(frames.Answer):
    """One message of text: the simulated model calls no tools, and does not think."""

    cuts_stream = True

    def __init__(self, job: Job, store: Store) -> None:
        super().__init__(job)
        self._store = store
        self._number = 0
        self._said = ""
        self._finish: str | None = None
        self._item_id = f"msg_{uuid.uuid4().hex}"

    def whole(self, outcome: Outcome) -> Json:
        (run,) = outcome.runs
        pieces = outcome.pieces[0]
        said = "".join(piece.text for piece in pieces)
        status = "incomplete" if pieces[-1].finish == "length" else "completed"
        response = self._response(status, [self._item(said)], _usage(run, len(pieces)), run.kv)
        self._store.note(self.job, response)
        return response

    def opening(self, opened: Opened) -> list[bytes]:
        self._open(opened.run)
        response = self._response("in_progress", [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def said(self, piece: Piece) -> bytes:
        self._completion_tokens += 1
        self._finish = piece.finish
        if not piece.text:
            return b""
        start = b"" if self._said else self._begun()
        self._said += piece.text
        place = {"content_index": 0, "item_id": self._item_id, "output_index": 0}
        return start + self._event("response.output_text.delta", delta=piece.text, logprobs=[], **place)

    def ending(self) -> list[bytes]:
        done = self._done() if self._said else b""
        status = "incomplete" if self._finish == "length" else "completed"
        usage = _usage(self._runs[0], self._completion_tokens)
        response = self._response(status, [self._item(self._said)] if self._said else [], usage)
        self._store.note(self.job, response)
        return [done + self._event("response.completed", response=response)]

    def aborted(self) -> list[bytes]:
        return self.ending()

    def lost(self) -> list[bytes]:
        response = self._response("in_progress", [])
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def error_events(self, content: bytes) -> bytes | None:
        return None

    def _begun(self) -> bytes:
        item = {**_message_item(self._item_id, []), "status": "in_progress"}
        place = {"content_index": 0, "item_id": self._item_id, "output_index": 0}
        return self._event("response.output_item.added", item=item, output_index=0) + self._event(
            "response.content_part.added", part={**_text_part(""), "logprobs": []}, **place
        )

    def _done(self) -> bytes:
        place = {"content_index": 0, "item_id": self._item_id, "output_index": 0}
        return b"".join(
            (
                self._event("response.output_text.done", text=self._said, logprobs=[], **place),
                self._event("response.content_part.done", part=_text_part(self._said), **place),
                self._event("response.output_item.done", item=self._item(self._said), output_index=0),
            )
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        document = {**fields, "sequence_number": self._number, "type": kind}
        self._number += 1
        made = b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(document))
        if self.job.asked.background:
            self._store.events.setdefault(self.job.request_id, []).append(made)
        return made

    def _item(self, said: str) -> Json:
        return _message_item(self._item_id, [_text_part(said)] if said else [])

    def _response(
        self, status: str, output: list[Json], usage: Json | None = None, kv: Json | None = None
    ) -> Json:
        asked: ResponsesRequest = self.job.asked
        return {
            "id": self.job.request_id,
            "created_at": self._created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "metadata": asked.metadata,
            "model": self.job.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "tool_choice": asked.tool_choice if asked.tools else "none",
            "tools": asked.tools,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "background": bool(asked.background),
            "max_output_tokens": self.job.sampling.max_tokens,
            "max_tool_calls": None,
            "previous_response_id": asked.previous_response_id,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": None,
            "truncation": asked.truncation or "disabled",
            "usage": usage,
            "user": asked.user,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": kv,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def queued(self) -> Json:
        """Keep and return what is said of a response that is made in the background."""
        self._store.responses[self.job.request_id] = response = self._response("queued", [])
        return response


def _message_item(item_id: str, content: list[Json]) -> Json:
    return {
        "id": item_id,
        "content": content,
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def _text_part(said: str) -> Json:
    return {"annotations": [], "text": said, "type": "output_text", "logprobs": None}


def _usage(run: Run, output_tokens: int) -> Json:
    prompt_tokens = len(run.prompt.tokens)
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": run.cached_tokens,
            "cache_write_tokens": run.created_tokens,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": output_tokens,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": prompt_tokens + output_tokens,
    }


def in_background(engine: Engine, job: Job, plan: Plan, entry: Entry, store: Store) -> Response:
    """Answer at once, and let the engine work on."""
    answer = ResponsesAnswer(job, store)
    queued = answer.queued()
    task = asyncio.get_running_loop().create_task(_work(engine, job, plan, answer, entry))
    store.tasks[job.request_id] = task
    task.add_done_callback(lambda _: store.tasks.pop(job.request_id, None))
    return Response(orjson.dumps(queued), media_type="application/json")


async def _work(engine: Engine, job: Job, plan: Plan, answer: ResponsesAnswer, entry: Entry) -> None:
    outcome = Outcome()
    try:
        async with aclosing(generate(engine, job, plan)) as events:
            async for item in events:
                if isinstance(item, Piece):
                    outcome.pieces.setdefault(item.index, []).append(item)
                else:
                    outcome.runs.append(item.run)
    except KvLost as error:
        entry.outcome = f"kv lost: {error}"
        return
    answer.whole(outcome)
    entry.outcome = "done"
