"""The sink of one streamed answer: notes when each piece of it came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from launch.bench.sample import Sample, Usage
from orchestrator.wire.judge import InvalidStream, WorkerFailed, completion_of
from orchestrator.wire.sse import WholeEvents


class _Call(msgspec.Struct):
    """Whatever it calls: that it does is enough."""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None

    def is_token(self) -> bool:
        """Said, thought or called something; or a token without a text of its own, as vLLM tells of those."""
        if self.content or self.reasoning_content or self.reasoning or self.tool_calls:
            return True
        return self.content is not None and self.role is None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None

    def is_token(self) -> bool:
        """The model made a token; what opens, closes or accounts for the answer does not count."""
        return any(choice.delta is not None and choice.delta.is_token() for choice in self.choices)


_EVENT = msgspec.json.Decoder(_Event)


class TokenClock:
    """Fills in `arrivals`, `usage` and the error of a sample; for `Answer.pump`, and then `finish()`."""

    def __init__(self, sample: Sample, now: Callable[[], float] = time.perf_counter) -> None:
        self._sample = sample
        self._now = now
        self._stream = WholeEvents()
        self._is_done = False
        self._has_failed = False  # by an event that says so

    def __call__(self, chunk: bytes) -> bool:
        """Raises `InvalidStream` for what no OpenAI endpoint sends."""
        at = self._now()  # before any work of ours
        try:
            for payload in _payloads(self._stream.feed(chunk)):
                self._read(payload, at)
        except WorkerFailed as failure:
            self._has_failed = True
            self._sample.fail("error in stream", error_text(failure.content))
        return True

    def _read(self, payload: bytes, at: float) -> None:
        self._is_done = payload == b"[DONE]"
        if not self._is_done:
            completion_of(payload)
            self._note(_decode(payload), at)

    def finish(self) -> None:
        """The answer is complete. Raises `InvalidStream` unless the stream ended as a complete one does."""
        if self._has_failed:
            return
        if self._stream.has_pending or not self._is_done:
            raise InvalidStream("the stream ended without [DONE]")
        if not self._sample.arrivals:
            self._sample.fail("no token", "a stream without a single token")

    def _note(self, event: _Event, at: float) -> None:
        if event.usage is not None:
            self._sample.usage = event.usage
        if event.is_token():
            self._sample.arrivals.append(at)


def error_text(content: bytes) -> str:
    """What an OpenAI error object, or a whole error answer, says; in one line of bounded length."""
    try:
        document = msgspec.json.decode(content)
        document = document.get("error", document) if isinstance(document, dict) else document
        said = document.get("message", document) if isinstance(document, dict) else document
    except (msgspec.MsgspecError, UnicodeDecodeError):
        said = content.decode("utf-8", "replace")
    line = "".join(letter if letter.isprintable() else " " for letter in str(said))
    return " ".join(line.split())[:200]


def _payloads(events: bytes) -> Iterator[bytes]:
    return (line[5:].strip() for line in events.splitlines() if line.startswith(b"data:"))


def _decode(payload: bytes) -> _Event:
    try:
        return _EVENT.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidStream(f"an event that is not OpenAI's: {error}") from error
