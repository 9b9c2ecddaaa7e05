"""The last events are kept for the person on call: what became of workers, and who changed what."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

MAX_EVENTS = 1000
MAX_TEXT = 500  # characters: of what a worker has said there may be a part in it


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event is one thing that has happened."""

    number: int  # counted from the start: those that are dropped leave a gap
    time: float  # seconds since 1970
    kind: str  # for programs: `worker.gone`, `admin.drain`
    message: str  # for people
    subject: str = ""  # the worker that it is about
    who: str = ""  # whoever has asked for it: the name of a key, and the address


class Events:
    """A ring has the last `MAX_EVENTS` events of this orchestrator. Everything here is for its event loop."""

    def __init__(self, time: Callable[[], float] = time.time) -> None:
        self._time = time
        self._ring: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._count = 0
        self.counts: Counter[str] = Counter()  # of each kind, since the start

    def note(self, kind: str, message: str, *, subject: str = "", who: str = "") -> None:
        self._count += 1
        self.counts[kind] += 1
        self._ring.append(Event(self._count, self._time(), kind, message[:MAX_TEXT], subject, who))

    def after(self, number: int = 0) -> Sequence[Event]:
        """Return those after this number that are still there, the oldest first."""
        return [event for event in self._ring if event.number > number]
