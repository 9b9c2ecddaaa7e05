"""A client whose stream is cut, again and again, and goes on; everything but the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.api.view import RequestView, view_request
from orchestrator.failover.continuation import Continuation, ending_without_count, text_to_go_on_from
from orchestrator.failover.stream import ContinuedStream
from orchestrator.failover.tokenize import (
    known_prompt_ids,
    known_sent_ids,
    tokenize_prompt,
    tokenize_text,
    tokenized,
)
from orchestrator.failover.transcript import Sent, Transcript, TranscriptMemory
from orchestrator.legs.bodies import LegBodies
from orchestrator.legs.connectors.base import Handoff
from orchestrator.wire.codec import JSON
from orchestrator.wire.sse import DONE, EventStream, has_begun
from tests.orchestrator.wire import sim_worker
from tests.orchestrator.wire.documents import joined

Json = dict[str, Any]


class Worker(Protocol):
    model: str
    model_len: int

    def stream(self, view: RequestView, request_id: str) -> bytes: ...

    def tokenize(self, body: bytes) -> bytes: ...


class SimWorker:
    """A decode worker, which gets a hand-off each time."""

    model = "tiny"
    model_len = sim_worker.SETTINGS.context_tokens

    def stream(self, view: RequestView, request_id: str) -> bytes:
        handoff = Handoff(b'{"do_remote_prefill":true}', CACHED_TOKENS)
        body = LegBodies(view).decode(JSON, self.model, handoff)
        return b"".join(sim_worker.stream(json.loads(joined(body)), request_id))

    def tokenize(self, body: bytes) -> bytes:
        return sim_worker.tokenize(body)


CACHED_TOKENS = 2  # what the first hand-off says


def view_of(document: Json) -> RequestView:
    return view_request(json.dumps(document).encode())


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The data in chunks that end at these places, taken modulo its length."""
    ends = sorted({place % len(data) for place in places} | {len(data)}) if data else []
    starts = [0, *ends]
    return [data[start:end] for start, end in zip(starts, ends, strict=False) if start < end]


@dataclass
class Client:
    """Reads one stream, whoever sends it."""

    view: RequestView
    places: Sequence[int] = ()  # where chunks end
    worker: Worker = field(default_factory=SimWorker)
    got: list[bytes] = field(default_factory=list)
    transcript: Forwarded = field(default_factory=lambda: Forwarded(TranscriptMemory(1 << 20)))

    def read(self, cuts: Sequence[int] = ()) -> bytes:
        """Everything, with a loss at each of these bytes of a worker's stream, modulo its length."""
        self._start(cuts)
        return b"".join(self.got)

    def _start(self, cuts: Sequence[int]) -> None:
        stream = EventStream(hides_usage=not self.view.wants_usage, cached_tokens=CACHED_TOKENS)
        data = self.worker.stream(self.view, "first")
        if not cuts:
            return self._read_all(stream, data)
        self._feed(stream, data[: cuts[0] % len(data)])
        if not has_begun(b"".join(self.got)):  # that is no case for a continuation
            self.got.clear()
            self.transcript = Forwarded(TranscriptMemory(1 << 20))
            return self._start(cuts[1:])
        return self._go_on(cuts[1:])

    def _go_on(self, cuts: Sequence[int]) -> None:
        sent = self.transcript.sent()
        if (last := ending_without_count(self.view, sent, CACHED_TOKENS)) is not None:
            return self._take(last)
        continuation = continuation_of(self.view, sent, self.worker)
        rest = continuation.rest()
        if rest is None:
            return self._take(continuation.ending())
        data = self.worker.stream(rest, f"number-{len(cuts)}")
        if not cuts:
            return self._read_all(continuation.stream(), data)
        self._feed(continuation.stream(), data[: cuts[0] % len(data)])
        return self._go_on(cuts[1:])

    def _read_all(self, stream: EventStream | ContinuedStream, data: bytes) -> None:
        self._feed(stream, data)
        stream.finish()

    def _feed(self, stream: EventStream | ContinuedStream, data: bytes) -> None:
        for chunk in cut(data, self.places):
            self._take(stream.feed(chunk))

    def _take(self, events: bytes) -> None:
        if events:
            self.got.append(events)
            self.transcript.keep(events)


class Forwarded(Transcript):
    """A transcript, and what the relay does with it."""

    def __init__(self, memory: TranscriptMemory) -> None:
        super().__init__(memory)
        self._sent_bytes = 0

    def keep(self, events: bytes) -> None:
        self.chunks.append(events)
        self._sent_bytes += len(events)
        self.reduce_if_due(self._sent_bytes)


def continuation_of(view: RequestView, sent: Sent, worker: Worker) -> Continuation:
    """As a flow makes it: what nobody knows, a worker tells."""
    prompt, said = known_prompt_ids(view, sent, None), known_sent_ids(sent)
    if prompt is None:
        prompt, _ = tokenized(worker.tokenize(tokenize_prompt(view, sent, worker.model)))
    if said is None:
        said, _ = tokenized(worker.tokenize(tokenize_text(text_to_go_on_from(view, sent), worker.model)))
    return Continuation(
        view=view,
        sent=sent,
        prompt=prompt,
        said=said,
        model_len=worker.model_len,
        cached_tokens=CACHED_TOKENS,
    )


def sent_of(**fields: Any) -> Sent:
    """A chat's stream, cut after its first words."""
    defaults: Json = {
        "id": "one",
        "created": 7,
        "model": "tiny",
        "is_chat": True,
        "text": "ab",
        "ids": None,
        "prompt_ids": None,
        "has_role": True,
        "finish_reason": None,
        "usage": None,
        "has_final_usage": False,
        "is_done": False,
    }
    return Sent(**{**defaults, **fields})


def events_in(stream: bytes) -> list[Json]:
    """The documents of a stream, which must end as a complete one does."""
    assert stream.count(DONE) == 1
    assert stream.endswith(DONE)
    payloads = stream.removesuffix(DONE).split(b"\n\n")[:-1]
    return [json.loads(payload.removeprefix(b"data: ")) for payload in payloads]


def content_of(stream: bytes) -> Json:
    """What a client makes of a stream: lists where something may come only once."""
    events = events_in(stream)
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices if "delta" in choice]
    return {
        "text": "".join(choice["text"] for choice in choices if "text" in choice),
        "content": "".join(delta.get("content", "") for delta in deltas),
        "roles": [delta["role"] for delta in deltas if "role" in delta],
        "finish": [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None],
        "stop": [choice["stop_reason"] for choice in choices if choice.get("stop_reason") is not None],
        "ids": [token for choice in choices for token in choice.get("token_ids") or ()],
        "prompts": [ids for part in [*events, *choices] if (ids := part.get("prompt_token_ids"))],
        "usages": sum(not event["choices"] for event in events),
    }


def names_in(stream: bytes) -> set[tuple[object, ...]]:
    return {tuple(event[key] for key in ("id", "object", "created", "model")) for event in events_in(stream)}
