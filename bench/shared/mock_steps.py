"""A mock worker's streams get their events in steps: one for every stream at the same time.

So does an engine: each of its steps makes a token for all requests that it runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass
class Counts:
    """A worker has sent so many answers to POST, streams among them, and events of streams."""

    requests: int = 0
    events: int = 0


class MockStream:
    """A stream has a client, whatever the connection is."""

    def is_wanted(self) -> bool:
        raise NotImplementedError

    def send_event(self) -> None:
        raise NotImplementedError

    def send_end(self) -> None:
        raise NotImplementedError


class Steps:
    """A stream has `events`: the first at once, the others with the steps, which are `gap_s` apart."""

    def __init__(self, events: int, gap_s: float, counts: Counts) -> None:
        self._events = events
        self._gap_s = gap_s
        self._counts = counts
        self._waiting: list[tuple[MockStream, int]] = []
        self._loop = asyncio.get_running_loop()

    def begin(self, stream: MockStream) -> None:
        """Send the first event, or all of them and the end if there is no time between them."""
        if self._gap_s:
            if not self._waiting:
                self._loop.call_later(self._gap_s, self._step)
            self._go_on(stream, self._events)
            return
        for left in range(self._events, -1, -1):
            self._send(stream, left)

    def _step(self) -> None:
        waiting, self._waiting = self._waiting, []
        for stream, left in waiting:
            self._go_on(stream, left)
        if self._waiting:
            self._loop.call_later(self._gap_s, self._step)

    def _go_on(self, stream: MockStream, left: int) -> None:
        if stream.is_wanted():
            self._send(stream, left)
            if left:
                self._waiting.append((stream, left - 1))

    def _send(self, stream: MockStream, left: int) -> None:
        if not left:
            stream.send_end()
            return
        stream.send_event()
        self._counts.events += 1
