"""A mock worker serves many requests on one connection, in the frames of `orchestrator/wire/streams.py`.

It costs as little as may be: whatever is sent in one turn of the event loop leaves in one write.
"""

from __future__ import annotations

import asyncio
from typing import Any

from bench.shared.mock_answers import (
    END_BODIES,
    EVENT_BODY,
    STREAM_FIELDS,
    answer_to,
    page,
)
from bench.shared.mock_steps import Counts, MockStream, Steps
from orchestrator.wire.streams import (
    BODY,
    DATA,
    END,
    HEAD,
    OPEN,
    PING,
    RESET,
    VERSION,
    WINDOW,
    FrameReader,
    credit,
    frame,
)

_HALF = WINDOW // 2  # of it received: so much more may come
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: %s\r\n\r\n" % VERSION


def check_fits(events: int) -> None:
    """Raises `ValueError` if a stream of so many events needs credit: a mock worker waits for none."""
    if (events + len(END_BODIES)) * len(EVENT_BODY) > WINDOW:
        raise ValueError(f"streams of {events} events do not fit into a window of {WINDOW} bytes")


class MockStreams(asyncio.Protocol):
    """It takes over a connection that asked for it, and is its protocol from then on."""

    def __init__(self, transport: Any, steps: Steps, counts: Counts) -> None:
        self._transport = transport
        self._steps = steps
        self._counts = counts
        self._bodies: dict[int, bytearray] = {}  # of requests that are not complete
        self.under_way: dict[int, _Stream] = {}
        self._written: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(self._on_frame)
        transport.set_protocol(self)
        self.send(SWITCHING)

    def send(self, data: bytes) -> None:
        """Write it before the next turn of the event loop, with all that is sent until then."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.under_way.clear()

    def _flush(self) -> None:
        written, self._written = self._written, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(written))

    def _on_frame(self, kind: int, is_last: bool, stream: int, payload: bytes) -> None:
        if kind == OPEN:
            self._on_open(is_last, stream, payload)
        elif kind == BODY:
            self._on_body(is_last, stream, payload)
        elif kind == RESET:
            self._bodies.pop(stream, None)
            self.under_way.pop(stream, None)
        elif kind == PING and not is_last:
            self.send(frame(PING | END, stream, payload))

    def _on_open(self, is_last: bool, stream: int, payload: bytes) -> None:
        """Answer GET. Of a POST the method alone is looked at."""
        method, target = payload.partition(b"\r\n")[0].split(b" ")
        if method == b"GET":
            self.send(page(target).frames(stream))
        elif is_last:
            self._answer(stream, b"")
        else:
            self._bodies[stream] = bytearray()

    def _on_body(self, is_last: bool, stream: int, payload: bytes) -> None:
        body = self._bodies.get(stream)
        if body is None:
            return
        body += payload
        if is_last:
            del self._bodies[stream]
            self._answer(stream, bytes(body))
        elif len(body) % _HALF < len(payload):
            self.send(credit(stream, _HALF))

    def _answer(self, stream: int, body: bytes) -> None:
        self._counts.requests += 1
        if (whole := answer_to(body)) is not None:
            self.send(whole.frames(stream))
            return
        self.send(frame(HEAD, stream, STREAM_FIELDS))
        self.under_way[stream] = begun = _Stream(self, stream)
        self._steps.begin(begun)


class _Stream(MockStream):
    def __init__(self, connection: MockStreams, number: int) -> None:
        self._connection = connection
        self._number = number
        self._event = frame(DATA, number, EVENT_BODY)

    def is_wanted(self) -> bool:
        return self._number in self._connection.under_way

    def send_event(self) -> None:
        self._connection.send(self._event)

    def send_end(self) -> None:
        *others, last = END_BODIES
        for body in others:
            self._connection.send(frame(DATA, self._number, body))
        self._connection.send(frame(DATA | END, self._number, last))
        self._connection.under_way.pop(self._number, None)
