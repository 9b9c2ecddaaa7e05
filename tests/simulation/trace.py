"""What happened in a simulation, in order: for replaying, and for reading."""

from __future__ import annotations

import asyncio
from typing import NamedTuple


class Event(NamedTuple):
    time: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.time:10.6f}  {self.who:<12} {self.what}"


class Trace:
    """Grows during a run. To be made inside the running loop, whose clock it uses."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._time = asyncio.get_running_loop().time

    def add(self, who: str, what: str) -> None:
        self.events.append(Event(self._time(), who, what))
