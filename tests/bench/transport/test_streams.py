from __future__ import annotations

import asyncio
import contextlib
import os

import pytest

from bench.shared.processes import Failed
from bench.transport.streams import Load, watch
from bench.transport.workers import Server

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


async def watch_one(answer: bytes) -> None:
    """One stream of a worker that answers with these bytes and stays connected."""
    is_closed = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, EOFError):  # the client may leave at any point
            await reader.readuntil(b"}")
            writer.write(answer)
            await reader.read()
        writer.close()
        is_closed.set()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        worker = Server(os.getpid(), server.sockets[0].getsockname()[1])
        try:
            await watch(worker, None, Load(streams=1, per_second=1, seconds=1), {})
        finally:
            await is_closed.wait()


def test_a_stream_that_does_not_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.transport.streams.WAIT_LIMIT_S", 0.0)
    with pytest.raises(Failed, match=r"^a stream has no event after 0 s$"):
        asyncio.run(watch_one(b""))


def test_a_stream_that_is_refused_is_an_error() -> None:
    with pytest.raises(Failed, match=r"^a request was answered HTTP 503$"):
        asyncio.run(watch_one(UNAVAILABLE))
