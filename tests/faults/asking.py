"""Questions whose answers are known, and what is said of an answer: right, an error, cut, or wrong."""

from __future__ import annotations

import enum
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import httpx

from tests.orchestrator.processes import MODEL
from worker.sim import text

# Nothing here speaks TLS, and loading the system's certificates takes longer than a request.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
DONE = "data: [DONE]\n\n"
ERROR_FIELDS = {"message", "type", "code"}


class Outcome(enum.Enum):
    RIGHT = enum.auto()  # the whole answer, word for word
    ERROR = enum.auto()  # a status and an error object, or an error event and [DONE]
    CUT = enum.auto()  # the connection broke, or there was none
    GIVEN_UP = enum.auto()  # the client's own patience was over


@dataclass(frozen=True)
class Question:
    path: str
    prompt: str
    body: dict[str, Any]
    tokens: int

    @property
    def is_stream(self) -> bool:
        return bool(self.body["stream"])

    @property
    def answer(self) -> str:
        """What a simulated worker that holds this prompt's KV cache says."""
        digest = text.digest_of(text.encode(self.prompt))
        return text.decode(list(islice(text.speak(digest), self.tokens)))


def completion(prompt: str, tokens: int, *, is_stream: bool) -> Question:
    return _question("/v1/completions", prompt, {"prompt": prompt}, tokens, is_stream)


def chat(said: str, tokens: int, *, is_stream: bool) -> Question:
    fields = {"messages": [{"role": "user", "content": said}]}
    prompt = text.render_chat([("user", said)])
    return _question("/v1/chat/completions", prompt, fields, tokens, is_stream)


def _question(path: str, prompt: str, fields: dict[str, Any], tokens: int, is_stream: bool) -> Question:
    sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    body = {"model": MODEL, **fields, **sampling, "stream": is_stream}
    return Question(path, prompt, body, tokens)


def ask(
    url: str, question: Question, patience_s: float, on_event: Callable[[], None] = lambda: None
) -> Outcome:
    """Ask on a connection of its own. Raises `AssertionError` for an answer that is wrong or ends wrongly.

    `patience_s` is how long to wait for each byte. `on_event` is called whenever some have come.
    """
    seen = b""
    try:
        with (
            httpx.Client(timeout=patience_s, trust_env=False, verify=NO_TLS) as client,
            client.stream("POST", url + question.path, json=question.body) as answer,
        ):
            for chunk in answer.iter_raw():
                seen += chunk
                on_event()
    except httpx.TimeoutException:
        return _unfinished(Outcome.GIVEN_UP, question, seen)
    except httpx.TransportError:
        return _unfinished(Outcome.CUT, question, seen)
    return _judged(question, answer.status_code, seen.decode())


def _unfinished(outcome: Outcome, question: Question, seen: bytes) -> Outcome:
    """What came is the beginning of something right."""
    if question.is_stream and seen.startswith(b"data: "):
        whole = seen[: seen.rfind(b"\n\n") + 2].decode()
        assert question.answer.startswith(_said_by(_events(whole.removesuffix(DONE))))
    return outcome


def _judged(question: Question, status: int, content: str) -> Outcome:
    if status != 200:
        assert status >= 400
        return _error(json.loads(content))
    if question.is_stream:
        return _judged_stream(question, content)
    choice = json.loads(content)["choices"][0]
    assert (_said(choice), choice["finish_reason"]) == (question.answer, "length")
    return Outcome.RIGHT


def _judged_stream(question: Question, content: str) -> Outcome:
    assert content.endswith(DONE), f"a stream without its end: {content!r}"
    events = _events(content.removesuffix(DONE))
    if errors := [event for event in events if "error" in event]:
        assert errors == events[-1:]
        assert question.answer.startswith(_said_by(events))
        return _error(errors[0])
    assert _said_by(events) == question.answer
    assert [reason for event in events if (reason := _finish_reason(event))] == ["length"]
    assert len({event["id"] for event in events}) == 1
    return Outcome.RIGHT


def _error(document: dict[str, Any]) -> Outcome:
    assert document["error"].keys() >= ERROR_FIELDS
    return Outcome.ERROR


def _events(stream: str) -> list[dict[str, Any]]:
    frames = stream.split("\n\n")[:-1]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def _said_by(events: list[dict[str, Any]]) -> str:
    return "".join(_said(choice) for event in events for choice in event.get("choices", ()))


def _said(choice: dict[str, Any]) -> str:
    said = choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content")
    return said or ""


def _finish_reason(event: dict[str, Any]) -> str | None:
    return next((choice["finish_reason"] for choice in event["choices"]), None)
