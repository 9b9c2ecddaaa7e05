"""A closed-loop load: N connections, each with one request at a time, and cheap: the router is the limit."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httptools


@dataclass
class Result:
    requests: int = 0
    failed: int = 0
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


class _Client(asyncio.Protocol):
    """One connection that sends the same bytes again as soon as the answer is complete."""

    def __init__(
        self, request: bytes, status: int, left: list[int], result: Result, done: asyncio.Future[None]
    ) -> None:
        self._request = request
        self._status = status  # that is no failure
        self._left = left  # shared by all connections
        self._result = result
        self._done = done
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._result.requests += 1
        self._result.latencies_s.append(time.perf_counter() - self._started)
        if self._parser.get_status_code() != self._status:
            self._result.failed += 1
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._result.failed += 1
            self._done.set_result(None)

    def _next(self) -> None:
        if self._left[0] <= 0:
            if not self._done.done():
                self._done.set_result(None)
            self._transport.close()
            return
        self._left[0] -= 1
        self._parser = httptools.HttpResponseParser(self)
        self._started = time.perf_counter()
        self._transport.write(self._request)


async def run_load(
    port: int,
    body: bytes,
    *,
    requests: int,
    connections: int,
    path: str = "/v1/chat/completions",
    headers: bytes = b"content-type: application/json\r\n",
    status: int = 200,
) -> Result:
    """Send `requests` requests with this body to 127.0.0.1:`port` over `connections` connections.

    An answer with another status than `status` counts as failed.
    """
    head = b"POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%scontent-length: %d\r\n\r\n"
    request = head % (path.encode(), port, headers, len(body)) + body
    loop, result, left = asyncio.get_running_loop(), Result(), [requests]
    started = time.perf_counter()
    ends = []
    for _ in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(
            lambda done=done: _Client(request, status, left, result, done), "127.0.0.1", port
        )
        ends.append(done)
    await asyncio.gather(*ends)
    result.seconds = time.perf_counter() - started
    return result
