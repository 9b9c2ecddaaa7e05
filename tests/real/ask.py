"""Questions to a real cluster, and how their answers are compared."""

from __future__ import annotations

from typing import Any

import httpx

from tests.contract.engines import events
from tests.real.conftest import DATA

LIMIT = httpx.Timeout(300)
PREFILL = "What is prefill?"
NOTHING = "Say nothing."  # its answer is empty: the first token is EOS
ANSWERS: dict[str, str] = {entry["ask"]: entry["answer"] for entry in DATA["questions"]}


def chat(question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "tiny-chat", "messages": messages, "temperature": 0, "max_tokens": 80} | fields


def completion(question: str, **fields: Any) -> dict[str, Any]:
    prompt = f"Question: {question}\nAnswer:"
    return {"model": "tiny-chat", "prompt": prompt, "temperature": 0, "max_tokens": 80, "stop": "\n"} | fields


def about_passage(entry: dict[str, str]) -> str:
    """A prompt of several KV blocks; what decides the answer is in the first one."""
    return f"{entry['before']} {DATA['passage']} {entry['ask']}"


def post(url: str, document: dict[str, Any]) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in document else "/v1/completions"
    return httpx.post(url + path, json=document, timeout=LIMIT)


def text_of(answer: httpx.Response) -> str:
    """The text of an answer, streamed or not."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return text_in(answer.json()["choices"][0])
    return "".join(text_in(choice) for event in events(answer) for choice in event["choices"])


def text_in(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    said = choice["message"] if "message" in choice else choice["delta"]
    return said.get("content") or ""  # a delta may be empty


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what differs between any two requests."""
    return {key: value for key, value in document.items() if key not in ("id", "created")}
