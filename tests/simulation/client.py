"""Simulated clients: an exchange each, whose other end reads at its own pace and may leave at any moment."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from tests.orchestrator.fakes import FakeExchange
from tests.simulation.language import prompt_text
from tests.simulation.schedule import FOREVER, RequestSpec
from tests.simulation.trace import Trace

MODEL = "m"
_DONE = b"[DONE]"
_BUFFER = 100  # bytes that wait for a slow reader before the orchestrator is told


class Client(FakeExchange):
    """One request of a schedule."""

    def __init__(self, spec: RequestSpec, trace: Trace) -> None:
        path = "/v1/chat/completions" if spec.is_chat else "/v1/completions"
        super().__init__(
            msgspec.json.encode(document_of(spec)), path, headers=[(b"x-request-id", b"c%d" % spec.number)]
        )
        self.spec = spec
        self.name = f"client {spec.number}"
        self.began = 0.0
        self.left: float | None = None
        self.progress: list[float] = []  # when bytes of the answer came
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._unread = 0
        self._steps = 0

    @property
    def is_stalled(self) -> bool:
        """It does not read what it asked for."""
        return self.spec.reads_every == FOREVER

    @property
    def is_streaming(self) -> bool:
        return self.spec.is_stream and self.status == 200

    def begin(self) -> None:
        self.began = self._loop.time()
        self._trace.add(self.name, "asks")
        if self.spec.leaves_after is not None:
            self._loop.call_later(self.spec.leaves_after, self.leave)

    def note_step(self) -> None:
        """One of its legs got on."""
        self._steps += 1
        if self._steps == self.spec.leaves_on:
            self._loop.call_soon(self.leave)  # between the worker's step and what follows from it

    def leave(self) -> None:
        if not self.is_complete:
            self.left = self._loop.time()
            self._trace.add(self.name, "leaves")
        super().leave()

    def start(self, status: int, headers: bytes) -> None:
        self._trace.add(self.name, f"gets {status}")
        super().start(status, headers)

    def feed(self, chunk: bytes) -> bool:
        if not self.is_gone:
            self.progress.append(self._loop.time())
            self._trace.add(self.name, f"gets {chunk!r}")
            self._fill(len(chunk))
        return super().feed(chunk)

    def abort(self) -> None:
        self._trace.add(self.name, "is cut off")
        super().abort()

    def _fill(self, size: int) -> None:
        pause = self.spec.reads_every
        self._unread += size
        if pause and self._unread > _BUFFER and self.is_writable:
            self.is_writable = False
            if pause < FOREVER:
                self._loop.call_later(pause, self._read)

    def _read(self) -> None:
        self._unread = 0
        if not (self.is_complete or self.is_gone):
            self.read_again()


def document_of(spec: RequestSpec) -> dict[str, Any]:
    prompt = prompt_text(spec.number, spec.length, spec.padding)
    document: dict[str, Any] = {"model": MODEL}
    if spec.is_chat:
        document["messages"] = [{"role": "user", "content": prompt}]
    else:
        document["prompt"] = prompt
    if spec.is_stream:
        document["stream"] = True
        if spec.wants_usage:
            document["stream_options"] = {"include_usage": True}
    if spec.max_tokens is not None:
        document["max_tokens"] = spec.max_tokens
    if spec.wants_ids:
        document["return_token_ids"] = True
    if spec.is_whole:
        document["use_beam_search"] = True
    return document


# --- what it got --------------------------------------------------------------------------------


class Received(msgspec.Struct):
    """An answer as a client library reads it."""

    text: str = ""
    token_ids: list[int] = []
    finish_reasons: list[str] = []
    ids: set[str] = set()
    usages: list[dict[str, Any]] = []
    error: dict[str, Any] | None = None
    is_done: bool = False  # a stream: it ended with [DONE]
    has_postscript: bool = False  # something follows it; libraries read no further
    is_malformed: bool = False


def received(client: Client) -> Received:
    """What a client library makes of the bytes so far."""
    if client.is_streaming:
        return _from_stream(client.sent)
    got = Received()
    try:
        document = msgspec.json.decode(client.sent)
    except msgspec.DecodeError:
        got.is_malformed = True
        return got
    got.error = document.get("error")
    if got.error is None:
        _take(got, document)
    return got


def _from_stream(sent: bytes) -> Received:
    got = Received()
    *events, tail = sent.split(b"\n\n")
    got.is_malformed = bool(tail)
    for event in events:
        data = event.removeprefix(b"data: ")
        if got.is_done:
            got.has_postscript = True
            break
        if data == _DONE:
            got.is_done = True
        else:
            _take_event(got, data)
    return got


def _take_event(got: Received, data: bytes) -> None:
    try:
        document = msgspec.json.decode(data)
    except msgspec.DecodeError:
        got.is_malformed = True
        return
    if "error" in document:
        got.error = document["error"]
    elif got.error is None:
        _take(got, document)


def _take(got: Received, document: dict[str, Any]) -> None:
    got.ids.add(document["id"])
    if document.get("usage") is not None:
        got.usages.append(document["usage"])
    for choice in document["choices"]:
        said = choice.get("delta") or choice.get("message") or choice
        got.token_ids += choice.get("token_ids") or []
        got.text += said.get("content") or said.get("text") or ""
        if choice.get("finish_reason"):
            got.finish_reasons.append(choice["finish_reason"])
