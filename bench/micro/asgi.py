"""An ASGI application is asked here without a server, so that nothing else is in the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Sent:
    """An application has sent this."""

    status: int = 0
    header_bytes: int = 0
    messages: int = 0  # that the body had
    size: int = 0  # bytes of the body


async def call(app: Any, path: str = "/") -> Sent:
    """Send a GET of `path` to an application, or to a single response."""
    sent = Sent()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            sent.status = message["status"]
            sent.header_bytes = sum(len(name) + len(value) + 4 for name, value in message["headers"])
        else:
            sent.size += len(message.get("body", b""))
            sent.messages += 1

    await app(_scope(path), receive, send)
    return sent


def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
