"""The simulated model is asked questions whose answers are known, and a judge hears the answers."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from worker.sim import text

MODEL = "m"  # that the questions name, if nothing else is said
_DONE = "data: [DONE]\n\n"
_ERROR_FIELDS = {"message", "type", "code"}


class WrongAnswer(Exception):
    """The answer is not what the model says to the question, or it ends as if it were whole and is not."""


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
        """Return what a simulated worker that holds this prompt's KV cache says."""
        digest = text.digest_of(text.encode(self.prompt))
        return text.decode(list(islice(text.speak(digest), self.tokens)))


def completion(prompt: str, tokens: int, *, is_stream: bool, model: str = MODEL) -> Question:
    fields = {"model": model, "prompt": prompt}
    return _question("/v1/completions", prompt, fields, tokens, is_stream)


def chat(said: str, tokens: int, *, is_stream: bool, model: str = MODEL) -> Question:
    fields = {"model": model, "messages": [{"role": "user", "content": said}]}
    prompt = text.render_chat([("user", said)])
    return _question("/v1/chat/completions", prompt, fields, tokens, is_stream)


def _question(path: str, prompt: str, fields: dict[str, Any], tokens: int, is_stream: bool) -> Question:
    sampling = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return Question(path, prompt, {**fields, **sampling, "stream": is_stream}, tokens)


def judge(question: Question, status: int, content: str) -> Outcome:
    """Judge an answer that is complete by HTTP: RIGHT or ERROR. Raises `WrongAnswer`."""
    try:
        if status != 200:
            return _error(json.loads(content))
        return _judge_stream(question, content) if question.is_stream else _judge_whole(question, content)
    except (ValueError, LookupError, TypeError) as error:
        raise WrongAnswer(f"{error!r}: HTTP {status} {content!r}") from error


def judge_part(question: Question, content: str) -> None:
    """Judge an answer whose end did not come. Raises `WrongAnswer` if its beginning is not right."""
    if question.is_stream and content.startswith("data: "):
        whole = content[: content.rfind("\n\n") + 2]
        _check_beginning(question, events_of(whole.removesuffix(_DONE)))


def events_of(stream: str) -> list[dict[str, Any]]:
    """Return its events as documents, without what is not complete. `[DONE]` must not be in it."""
    frames = stream.split("\n\n")[:-1]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def _judge_whole(question: Question, content: str) -> Outcome:
    choice = json.loads(content)["choices"][0]
    if (_said(choice), choice["finish_reason"]) != (question.answer, "length"):
        _wrong("not the answer", content)
    return Outcome.RIGHT


def _judge_stream(question: Question, content: str) -> Outcome:
    if not content.endswith(_DONE):
        _wrong("a stream without its end", content)
    events = events_of(content.removesuffix(_DONE))
    if any("error" in event for event in events):
        _check_beginning(question, events[:-1])
        return _error(events[-1])
    if _said_by(events) != question.answer:
        _wrong("not the answer", content)
    if [reason for event in events if (reason := _finish_reason(event))] != ["length"]:
        _wrong("not one finish_reason", content)
    if len({event["id"] for event in events}) != 1:
        _wrong("more than one id", content)
    return Outcome.RIGHT


def _check_beginning(question: Question, events: list[dict[str, Any]]) -> None:
    if not question.answer.startswith(said := _said_by(events)):
        _wrong("not a beginning of the answer", said)


def _error(document: dict[str, Any]) -> Outcome:
    if missing := _ERROR_FIELDS - document["error"].keys():
        _wrong(f"an error without {missing}", str(document))
    return Outcome.ERROR


def _wrong(what: str, content: str) -> NoReturn:
    raise WrongAnswer(f"{what}: {content!r}")


def _said_by(events: list[dict[str, Any]]) -> str:
    return "".join(_said(choice) for event in events for choice in event.get("choices", ()))


def _said(choice: dict[str, Any]) -> str:
    said = choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content")
    return said or ""


def _finish_reason(event: dict[str, Any]) -> str | None:
    return next((choice["finish_reason"] for choice in event["choices"]), None)
