"""Requests to simulated workers, and what is read from their answers."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

from tests.contract.engines import ASK_PINNED, CHAT, COMPLETION, events
from tests.worker.sim.workers import MODEL, Worker

KV_ERROR = {
    "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
}


def chat(text: str = "What is prefill?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6} | fields


def completion(prompt: Any = "Prefill is", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields


def path_of(document: dict[str, Any]) -> str:
    return CHAT if "messages" in document else COMPLETION


def ask(worker: Worker, document: dict[str, Any], **headers: str) -> httpx.Response:
    return worker.post(path_of(document), document, **headers)


def send(worker: Worker, document: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, of which nothing was read yet."""
    url = worker.client.base_url
    body = json.dumps(document).encode()
    connection = socket.create_connection((url.host, url.port or 80))
    head = f"POST {path_of(document)} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def prefill(worker: Worker, document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The hand-off, as the orchestrator passes it on: without the count of cached tokens."""
    leg = document | {"max_tokens": 1, "ignore_eos": True, "kv_transfer_params": ASK_PINNED} | fields
    answer = ask(worker, leg)
    assert answer.status_code == 200, answer.text
    handoff = dict(answer.json()["kv_transfer_params"])
    del handoff["remote_prefill_cached_tokens"]
    return handoff


def decode(
    worker: Worker, document: dict[str, Any], handoff: dict[str, Any], **fields: Any
) -> httpx.Response:
    return ask(worker, document | {"kv_transfer_params": handoff} | fields)


def text_of(answer: httpx.Response) -> str:
    """All that the first choice says, streamed or not."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return _said(answer.json()["choices"][0])
    choices = [choice for event in events(answer) for choice in event["choices"]]
    return "".join(_said(choice) for choice in choices if choice["index"] == 0)


def cached_tokens(answer: httpx.Response) -> int:
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def _said(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return (choice.get("message") or choice["delta"])["content"] or ""
