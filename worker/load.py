"""A worker counts the legs that it serves, by who has sent them, and reports how busy it is.

    meter = LoadMeter(figures)           # where the engine is known
    app.add_middleware(LegCounting, meter=meter)

What is asked and answered stands in `orchestrator/wire/load.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.wire.load import LOAD_HEADER, MAX_SENDER, SENDER_HEADER, LoadReport, load_header

# An orchestrator that has not asked for so long is not there any more: it probes each worker about every
# second.
FORGET_S = 10.0
MOST_SENDERS = 256  # that are remembered; whoever reaches the worker can name itself

_SENDER = SENDER_HEADER.lower().encode()
_RANK = b"x-data-parallel-rank"
_LOAD = LOAD_HEADER.lower().encode()
_SERVED = "/v1/"  # legs are POSTs below this, but for
_OURS = "/v1/baton/"  # questions about legs


class Figures(NamedTuple):
    """An engine, or all of a server, is as busy as this."""

    running: int
    waiting: int
    prompt_tokens: int
    kv: float  # 0 to 1
    seats: int | None


class Sender(NamedTuple):
    """A request names who has sent it, and which engine is meant; b"" if it does not."""

    name: bytes
    rank: bytes

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]]) -> Sender:
        name = rank = b""
        for key, value in headers:
            if key == _SENDER:
                name = value[:MAX_SENDER]
            elif key == _RANK:
                rank = value.strip()
        return cls(name, rank if rank.isdigit() and len(rank) < 6 else b"")


class LoadMeter:
    """It is changed on the event loop only."""

    def __init__(
        self,
        figures: Callable[[int | None], Figures],
        revision: str | None = None,
        *,
        is_whole: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`figures` are asked for the engine of a rank, or None for all. `is_whole` says that all legs of the
        server come this way; else others serve beside this process, and nobody knows whose legs these are.
        """
        self._figures = figures
        self._revision = revision
        self._clock = clock
        self.is_whole = is_whole
        self._legs: dict[Sender, int] = {}
        self._asked: dict[bytes, float] = {}  # by the name of the orchestrator
        self._drained = float("inf")  # since when it drains

    @property
    def is_draining(self) -> bool:
        return self._drained <= self._clock()

    def drain(self) -> None:
        """Report from now on that no new legs are wanted."""
        if not self.is_draining:
            self._drained = self._clock()

    def undrain(self) -> None:
        self._drained = float("inf")

    def begin(self, sender: Sender) -> None:
        self._legs[sender] = self._legs.get(sender, 0) + 1

    def end(self, sender: Sender) -> None:
        left = self._legs[sender] - 1
        if left:
            self._legs[sender] = left
        else:
            del self._legs[sender]

    def note_asked(self, sender: Sender) -> None:
        """Note that an orchestrator is told the report."""
        if sender.name:
            self._asked.pop(sender.name, None)
            self._asked[sender.name] = self._clock()
            while len(self._asked) > MOST_SENDERS:
                del self._asked[next(iter(self._asked))]

    def report(self, sender: Sender, *, counts_legs: bool = True) -> LoadReport:
        """Return the report for whoever asks. `counts_legs`: legs that the engine does not have wait."""
        figures = self._figures(int(sender.rank) if sender.rank else None)
        waiting = figures.waiting
        if counts_legs:
            waiting += max(0, self._served(sender.rank) - figures.running - waiting)
        self._forget()
        return LoadReport(
            state="draining" if self.is_draining else "serving",
            revision=self._revision,
            running=figures.running,
            waiting=waiting,
            prompt_tokens=figures.prompt_tokens,
            kv=min(max(figures.kv, 0.0), 1.0),
            seats=figures.seats,
            others=self._served(sender.rank, sender.name) if self.is_whole else None,
            senders=len(self._asked.keys() | {sender.name} - {b""}) if self.is_whole else None,
            unaware=sum(asked < self._drained for asked in self._asked.values()) if self.is_draining else 0,
        )

    def header(self, sender: Sender) -> bytes:
        """Return the value of the header for a leg of this sender, which has an answer."""
        return load_header(self.report(sender, counts_legs=False))

    def _served(self, rank: bytes, but: bytes | None = None) -> int:
        """Count the legs that are served, of one engine or of all, but for those of one sender."""
        return sum(
            count
            for other, count in self._legs.items()
            if other.name != but and (not rank or other.rank == rank)
        )

    def _forget(self) -> None:
        """Forget orchestrators that do not ask any more: they stand first."""
        oldest = self._clock() - FORGET_S
        while self._asked and (first := next(iter(self._asked))) and self._asked[first] < oldest:
            del self._asked[first]


class LegCounting:
    """This middleware counts legs with a meter, and has whole answers say how busy the worker is."""

    def __init__(self, app: ASGIApp, meter: Callable[[], LoadMeter | None]) -> None:
        """`meter` is asked for each leg: an engine that is not there yet has none."""
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter = self._meter() if _is_leg(scope) else None
        if meter is None:
            await self._app(scope, receive, send)
            return
        sender = Sender.of(scope["headers"])
        meter.begin(sender)
        try:
            await self._app(scope, receive, _telling(meter, sender, send) if sender.name else send)
        finally:
            meter.end(sender)


def _is_leg(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path: str = scope["path"]
    return path.startswith(_SERVED) and not path.startswith(_OURS)


def _is_stream(message: Message) -> bool:
    """Tell whether an answer is a stream: nobody reads the load of one, which is old when it ends."""
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )


def _telling(meter: LoadMeter, sender: Sender, send: Send) -> Send:
    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start" and not _is_stream(message):
            load = (_LOAD, meter.header(sender))
            message = {**message, "headers": [*message.get("headers", ()), load]}
        await send(message)

    return tell
