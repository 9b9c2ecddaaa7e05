"""The last events are kept for the person on call: what became of workers, and who changed what.

Where several processes serve, each passes its events on to the supervisor, which numbers all of them: they
have one order.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

MAX_EVENTS: Final = 1000
MAX_TEXT: Final = 500  # characters: of what a worker has said there may be a part in it
MAX_SUBJECT: Final = 200
PERIOD_S: Final = 10.0  # in which events that come often are counted, after the first one
MOST_COUNTED: Final = 256  # kinds and subjects that are counted at a time; what is beyond has no subject

# What has happened, by kind. docs/operating.md has the same table.
KINDS: Final[Mapping[str, str]] = {
    "worker.ready": "a worker takes requests",
    "worker.suspect": "a worker has lost a leg, missed a probe or comes back: a probe decides",
    "worker.ejected": "a worker is out of service on suspicion, and is probed after a pause",
    "worker.probing": "a worker is back on trial, with one request at a time",
    "worker.draining": "requests end there, and none begins",
    "worker.gone": "nobody listens at its address: it has ended, or restarts",
    "worker.unfit": "a worker is there, but has another key, model, role or form",
    "worker.slow": "a worker is far slower than its peers",
    "worker.slow_over": "a worker is as fast as its peers again",
    "worker.slow_kept": "a worker is slow and stays in service, as half of its pool is out",
    "request.resent": "a worker has failed requests, which were sent to another one",
    "request.resumed": "a worker has failed streams that had begun, which another one goes on with",
    "request.poison": "a request has lost two workers and is sent to no other",
    "request.rejected": "requests were refused unserved: limits of keys, a full queue, too much memory",
    "lease.expired": "KV blocks were pinned on a prefill worker until their lease ended",
    "discovery.changed": "a source lists other workers: some join, others leave",
    "discovery.problem": "a part of what a source lists cannot be used",
    "discovery.away": "a source of workers cannot be asked: those that it found stay",
    "discovery.back": "that source can be asked again",
    "process.died": "a process that served has died; another one follows",
    "process.hung": "a process stood still and was killed; another one follows",
    "process.recycled": "a process has served as many requests as it should; another one follows",
    "process.failed": "a process has ended before it could serve",
    "certificate.expires": "the certificate expires within two weeks",
    "certificate.expired": "the certificate has expired: clients refuse connections",
    "scaling.wanted": "another number of workers is wanted, and why",
    "log.lost": "lines of the log were lost: the disk is full, or nobody reads them",
    "admin.add": "a worker was added",
    "admin.remove": "a worker was removed",
    "admin.drain": "a worker was drained",
    "admin.undrain": "a worker was undrained",
    "admin.reload": "the config was reloaded",
    "admin.reload_refused": "a config was refused, and nothing was changed",
}


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """An event is one thing that has happened."""

    number: int  # counted from the start: those that are dropped leave a gap
    time: float  # seconds since 1970
    kind: str  # for programs: `worker.gone`, `admin.drain`
    message: str  # for people
    subject: str = ""  # the worker that it is about
    who: str = ""  # whoever has asked for it: the name of a key, and the address
    process: int | None = None  # the index of the one that has seen it, where several serve

    def is_of(self, kinds: Collection[str]) -> bool:
        """Tell whether it is of one of these kinds; `worker` is all that begin with `worker.`."""
        return self.kind in kinds or self.kind.partition(".")[0] in kinds


class Events:
    """A ring has the last `MAX_EVENTS` events of this orchestrator. Everything here is for its event loop."""

    def __init__(
        self, time: Callable[[], float] = time.time, pass_on: Callable[[Event], None] | None = None
    ) -> None:
        """`pass_on` is called with each event where another process keeps those of several."""
        self.run = secrets.token_hex(4)  # numbers begin anew with each start: this tells runs apart
        self._time = time
        self._pass_on = pass_on
        self._ring: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._count = 0
        self.counts: Counter[str] = Counter()  # of each kind, since the start
        self._repeated: dict[tuple[str, str], _Repeated] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def newest(self) -> int:
        """Return the number of the last event; 0 if there was none."""
        return self._count

    @property
    def oldest(self) -> int:
        """Return the number of the oldest event that is still there; 1 if nothing was dropped yet."""
        return self._ring[0].number if self._ring else 1

    def note(self, kind: str, message: str, *, subject: str = "", who: str = "") -> None:
        """Note what has happened; `kind` is one of `KINDS`."""
        self._add(Event(0, self._time(), kind, message[:MAX_TEXT], subject[:MAX_SUBJECT], who))

    def note_often(self, kind: str, message: str, *, subject: str = "") -> None:
        """Note what may happen a thousand times a second: the first time at once, the following ones as one
        event each `PERIOD_S` seconds, which counts them and has the last message. Only inside an event loop.
        """
        if len(self._repeated) >= MOST_COUNTED and (kind, subject) not in self._repeated:
            subject = ""
        repeated = self._repeated.get((kind, subject))
        if repeated is not None:
            repeated.count += 1
            repeated.message = message
            return
        self._repeated[kind, subject] = _Repeated()
        self.note(kind, message, subject=subject)
        asyncio.get_running_loop().call_later(PERIOD_S, self._tell_repeated, kind, subject)

    def _tell_repeated(self, kind: str, subject: str) -> None:
        repeated = self._repeated.pop((kind, subject))
        if repeated.count:
            message = f"{repeated.count} times more in {PERIOD_S:g} s, the last time: {repeated.message}"
            self.note(kind, message, subject=subject)
            self._repeated[kind, subject] = _Repeated()
            asyncio.get_running_loop().call_later(PERIOD_S, self._tell_repeated, kind, subject)

    def take(self, event: Event, process: int) -> None:
        """Note what another process has seen, as the next event of all."""
        self._add(msgspec.structs.replace(event, process=process))

    def after(self, number: int = 0, kinds: Collection[str] = ()) -> Sequence[Event]:
        """Return those after this number that are still there, the oldest first; of these kinds, if given."""
        return [event for event in self._ring if event.number > number and (not kinds or event.is_of(kinds))]

    async def wait_after(self, number: int) -> None:
        """Wait until there is an event after this number."""
        while self._count <= number:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await waiting
            finally:
                self._waiting.discard(waiting)

    def _add(self, event: Event) -> None:
        if self._pass_on is not None:
            self._pass_on(event)
            return
        self._count += 1
        self.counts[event.kind] += 1
        self._ring.append(msgspec.structs.replace(event, number=self._count))
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)


class _Repeated:
    """It counts what has happened since it was last told."""

    __slots__ = ("count", "message")

    def __init__(self) -> None:
        self.count = 0
        self.message = ""
