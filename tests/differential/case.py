"""A case of the differential suite: one request, and how two servers may differ in their answers to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
PATHS = (CHAT, COMPLETION)
JSON = {"content-type": "application/json"}
MODEL = "@model@"  # in a body: replaced by the model of whoever runs the case


@dataclass(frozen=True)
class Case:
    """A request, and what is known of its answers."""

    name: str
    path: str
    body: bytes
    status: int = 200  # of the worker, simulated or real
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)
    differs: tuple[str, ...] = ()  # names of the rightful differences (`rightful.py`), all of which occur
    is_whole: bool = False  # served by one worker although it is a chat or a completion
    only: str = ""  # "real" or "sim": where it can be run, if not everywhere

    def content(self, model: str) -> bytes:
        return self.body.replace(MODEL.encode(), model.encode())

    @property
    def is_generated(self) -> bool:
        return self.status == 200 and self.path in (*PATHS, "/v1/messages", "/v1/responses")


def document_case(name: str, path: str, document: Mapping[str, Any], **about: Any) -> Case:
    return Case(name, path, json.dumps(document).encode(), **about)


_ABOUT = ("status", "method", "headers", "differs", "is_whole", "only")


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    about = {name: fields.pop(name) for name in _ABOUT if name in fields}
    return about, fields


def chat(name: str, said: str = "What is prefill?", **fields: Any) -> Case:
    """A greedy chat of a few tokens, with these fields; `...` takes a field away."""
    about, fields = _split(fields)
    messages = [{"role": "user", "content": said}]
    document = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6} | fields
    return document_case(f"chat: {name}", CHAT, _without_gaps(document), **about)


def completion(name: str, prompt: Any = "Question: What is prefill?\nAnswer:", **fields: Any) -> Case:
    """The same for a completion."""
    about, fields = _split(fields)
    document = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields
    return document_case(f"completion: {name}", COMPLETION, _without_gaps(document), **about)


def both(name: str, **fields: Any) -> list[Case]:
    """A chat and a completion with the same fields."""
    return [chat(name, **fields), completion(name, **fields)]


def spelt(name: str, path: str = CHAT, **fields: str) -> Case:
    """A chat or a completion some of whose fields are written as they are here, JSON or not."""
    about, spellings = _split(dict(fields))
    prompt = (
        '"prompt": "Go on"' if path == COMPLETION else '"messages": [{"role": "user", "content": "Go on"}]'
    )
    values = {"model": f'"{MODEL}"', "temperature": "0", "max_tokens": "4"} | spellings
    rest = "".join(f', "{field}": {value}' for field, value in values.items())
    return raw(
        f"{name}{' of a completion' if path == COMPLETION else ''}", path, f"{{{prompt}{rest}}}", **about
    )


def raw(name: str, path: str, body: str | bytes = b"", **about: Any) -> Case:
    return Case(name, path, body.encode() if isinstance(body, str) else body, **about)


def _without_gaps(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not ...}
