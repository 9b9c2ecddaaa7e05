"""A closed loop, N connections with one request each at a time, is so cheap that the router is the limit."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httptools

from bench.shared.figures import percentile

JSON_HEADER = b"content-type: application/json\r\n"


def post(path: str, body: bytes, headers: bytes = JSON_HEADER) -> bytes:
    """Return a whole request; `headers` is a block of lines."""
    head = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1\r\n%scontent-length: %d\r\n\r\n"
    return head % (path.encode(), headers, len(body)) + body


@dataclass
class Result:
    """A load saw this: `failed` counts answers of another status, and connections that ended."""

    requests: int = 0
    failed: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float:
        return percentile(self.latencies_s, share) * 1e3


class Connection(asyncio.Protocol):
    """A connection has one request at a time, the first as soon as it is open; a parser calls `on_...`."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the next request, if there is one."""
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def _send(self, request: bytes) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._asked = time.perf_counter()
        self._transport.write(request)


class _Client(Connection):
    """A client sends the same bytes again as soon as the answer is complete."""

    def __init__(
        self, request: bytes, status: int, left: list[int], result: Result, done: asyncio.Future[None]
    ) -> None:
        self._request = request
        self._status = status  # that is no failure
        self._left = left  # shared by all connections
        self._result = result
        self._done = done

    def ask(self) -> None:
        if self._left[0] > 0:
            self._left[0] -= 1
            self._send(self._request)
            return
        if not self._done.done():
            self._done.set_result(None)
        self._transport.close()

    def on_message_complete(self) -> None:
        self._result.requests += 1
        self._result.latencies_s.append(time.perf_counter() - self._asked)
        if self._parser.get_status_code() != self._status:
            self._result.failed += 1
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._result.failed += 1
            self._done.set_result(None)


async def run_load(
    port: int,
    body: bytes,
    *,
    requests: int,
    connections: int,
    path: str = "/v1/chat/completions",
    headers: bytes = JSON_HEADER,
    status: int = 200,
) -> Result:
    """Send `requests` requests with this body to 127.0.0.1:`port` over `connections` connections.

    An answer with another status than `status` counts as failed.
    """
    request = post(path, body, headers)
    loop, result, left = asyncio.get_running_loop(), Result(), [requests]
    started = time.perf_counter()
    ends = []
    for _ in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        client = partial(_Client, request, status, left, result, done)
        await loop.create_connection(client, "127.0.0.1", port)
        ends.append(done)
    await asyncio.gather(*ends)
    result.seconds = time.perf_counter() - started
    return result
