"""Calls an ASGI application as uvicorn would, without a server: chunk by chunk, then silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope

JSON_TYPE = {"content-type": "application/json"}
MSGPACK = JSON_TYPE | {"x-msgpack": "1"}
LIMIT_S = 30  # an application that waits for more than it was sent fails the test by this


@dataclass
class Reply:
    status: int = 0
    body: bytes = b""
    chunks_read: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body)


def post(
    app: ASGIApp, path: str, body: bytes | Iterable[bytes], headers: dict[str, str] = JSON_TYPE
) -> Reply:
    return asyncio.run(call(app, "POST", path, [body] if isinstance(body, bytes) else body, headers))


def get(app: ASGIApp, path: str) -> Reply:
    return asyncio.run(call(app, "GET", path, [b""], {}))


async def call(
    app: ASGIApp, method: str, path: str, chunks: Iterable[bytes], headers: dict[str, str]
) -> Reply:
    reply = Reply()
    unread = iter([*chunks, None])
    following = next(unread)

    async def receive() -> Message:
        nonlocal following
        if following is None:
            await asyncio.Event().wait()  # the client stays, and sends nothing more
        chunk, following = following, next(unread)
        reply.chunks_read += 1
        return {"type": "http.request", "body": chunk, "more_body": following is not None}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    async with asyncio.timeout(LIMIT_S):
        await app(_scope(method, path, headers), receive, send)
    return reply


def _scope(method: str, path: str, headers: dict[str, str]) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
