"""What may travel on a multiplexed connection (`orchestrator.wire.streams`), as somebody between both ends
sees it: told a second time, so that neither end is believed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from orchestrator.wire.streams import (
    BODY,
    CREDIT,
    DATA,
    HEAD,
    LAST,
    LEAVE,
    OPEN,
    PING,
    RESET,
    RESET_REFUSED,
    UPGRADE_PATH,
    FrameReader,
)
from tests.simulation.streams.link import Watch, Way

NAMES = {
    OPEN: "OPEN",
    BODY: "BODY",
    HEAD: "HEAD",
    DATA: "DATA",
    RESET: "RESET",
    LEAVE: "LEAVE",
    CREDIT: "CREDIT",
    PING: "PING",
    LAST: "LAST",
}
NEVER = inf
TO_WORKER = (OPEN, BODY, RESET, LEAVE, CREDIT, PING)
TO_ORCHESTRATOR = (HEAD, DATA, RESET, CREDIT, PING, LAST)


@dataclass(slots=True)
class Half:
    """What one side has done for a stream."""

    has_begun: bool = False
    has_ended: bool = False  # with END
    was_reset: bool = False  # by this side
    reset_read_at: float = NEVER  # that of the other side
    sent: int = 0  # bytes of BODY or DATA
    read: int = 0
    may_send: int = 0
    has_given: int = 0  # credit


@dataclass(slots=True)
class Stream:
    client: Half = field(default_factory=Half)
    server: Half = field(default_factory=Half)
    has_answer: bool = False  # the orchestrator has read its end

    @property
    def is_over(self) -> bool:
        return self.has_answer or self.client.was_reset or self.server.was_reset


class Rules(Watch):
    """The frames of one connection. `problems` grows with each rule that is broken.

    `window` is how much may be sent without credit. What a side has ready when it reads a reset may still
    leave, in the same moment by `time`.
    """

    def __init__(self, window: int, time: Callable[[], float]) -> None:
        self.problems: list[str] = []
        self.streams: dict[int, Stream] = {}
        self.pings = 0
        self.has_refused = False  # a stream, as the orchestrator knows
        self.was_last = False  # the orchestrator knows that the worker takes no more
        self._window = window
        self._time = time
        self.towards_worker = _Way(self, from_client=True)
        self.towards_orchestrator = _Way(self, from_client=False)

    @property
    def is_multiplexed(self) -> bool:
        return self.towards_orchestrator.is_framed

    @property
    def is_http(self) -> bool:
        """Return whether a request has gone over it as HTTP."""
        return self.towards_worker.is_http

    def upgraded(self) -> None:
        self.towards_worker.is_framed = True

    @property
    def not_over(self) -> list[int]:
        return [number for number, stream in self.streams.items() if not stream.is_over]

    # --- as they are written --------------------------------------------------------------------

    def client_sends(self, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        if kind == OPEN:
            self._open(number, is_last)
            return
        stream = self._known(kind, number, TO_WORKER)
        if stream is None:
            return
        if kind in (BODY, RESET, LEAVE, CREDIT):
            self._sends(stream.client, kind, is_last, number, payload)
        if kind == CREDIT and stream.client.has_given > stream.client.read:
            self._wrong(kind, number, "gives more credit than it has read")

    def server_sends(self, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        stream = self._known(kind, number, TO_ORCHESTRATOR)
        if stream is None:
            return
        if kind == HEAD:
            self._head(stream.server, is_last, number)
        elif kind in (DATA, RESET, CREDIT):
            self._sends(stream.server, kind, is_last, number, payload)
        if kind == DATA and not stream.server.has_begun:
            self._wrong(kind, number, "comes before its head")
        if kind == CREDIT and stream.server.has_given > stream.server.read:
            self._wrong(kind, number, "gives more credit than it has read")

    # --- as they are read -----------------------------------------------------------------------

    def server_reads(self, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None:
            self._reads(stream.server, kind, payload)

    def client_reads(self, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if kind == LAST:
            self.was_last = True
        if stream is not None:
            self._reads(stream.client, kind, payload)
            self.has_refused |= kind == RESET and payload[0] == RESET_REFUSED
            stream.has_answer |= kind in (HEAD, DATA) and is_last

    # --- inside ---------------------------------------------------------------------------------

    def _open(self, number: int, is_last: bool) -> None:
        if number <= max(self.streams, default=0):
            self._wrong(OPEN, number, "has a number that was used")
        if self.was_last:
            self._wrong(OPEN, number, "comes although the worker takes no more")
        stream = self.streams[number] = Stream()
        stream.client.has_begun, stream.client.has_ended = True, is_last
        stream.client.may_send = stream.server.may_send = self._window

    def _known(self, kind: int, number: int, kinds: tuple[int, ...]) -> Stream | None:
        if kind not in kinds:
            self._wrong(kind, number, "is not for this side to send")
        elif kind in (PING, LAST):
            self.pings += kind == PING
            if number:
                self._wrong(kind, number, "belongs to no stream")
        elif number in self.streams:
            return self.streams[number]
        else:
            self._wrong(kind, number, "is for a stream that was never opened")
        return None

    def _head(self, half: Half, is_last: bool, number: int) -> None:
        if half.has_begun:
            self._wrong(HEAD, number, "comes twice")
        if half.was_reset or half.reset_read_at < self._time():
            self._wrong(HEAD, number, "comes after a reset")
        half.has_begun, half.has_ended = True, is_last

    def _sends(self, half: Half, kind: int, is_last: bool, number: int, payload: bytes) -> None:
        if half.was_reset:
            self._wrong(kind, number, "comes after its own reset")
        if half.reset_read_at < self._time():
            self._wrong(kind, number, "comes after it has read a reset")
        if kind == RESET:
            half.was_reset = True
        elif kind == CREDIT:
            half.has_given += int.from_bytes(payload, "big")
        elif kind in (BODY, DATA):
            self._piece(half, kind, is_last, number, len(payload))

    def _piece(self, half: Half, kind: int, is_last: bool, number: int, size: int) -> None:
        if half.has_ended:
            self._wrong(kind, number, "comes after its END")
        half.sent += size
        half.has_ended = is_last
        if half.sent > half.may_send:
            self._wrong(kind, number, f"is {half.sent - half.may_send} bytes beyond the credit")

    def _reads(self, half: Half, kind: int, payload: bytes) -> None:
        if kind == RESET:
            half.reset_read_at = self._time()
        elif kind == CREDIT:
            half.may_send += int.from_bytes(payload, "big")
        elif kind in (BODY, DATA):
            half.read += len(payload)

    def _wrong(self, kind: int, number: int, what: str) -> None:
        self.problems.append(f"{NAMES.get(kind, kind)} of stream {number} {what}")


class _Way(Way):
    """One direction: HTTP up to the upgrade, then frames."""

    def __init__(self, rules: Rules, *, from_client: bool) -> None:
        sends, reads = (
            (rules.client_sends, rules.server_reads)
            if from_client
            else (rules.server_sends, rules.client_reads)
        )
        self.is_framed = False
        self._rules = rules
        self._from_client = from_client
        self._head = b""  # of HTTP, as it is written
        self._begins = f"GET {UPGRADE_PATH} ".encode() if from_client else b"HTTP/1.1 101 "
        self._written, self._read = FrameReader(sends), FrameReader(reads)
        self._head_size = 0  # once it is known
        self._bytes_read = 0

    @property
    def is_http(self) -> bool:
        return not self._begins.startswith(self._head[: len(self._begins)])

    def written(self, data: bytes) -> None:
        if not self.is_framed:
            data = self._rest_of(data)
        if data:
            self._written.feed(data)

    def read(self, data: bytes) -> None:
        start = self._bytes_read
        self._bytes_read += len(data)
        if self._head_size and self._bytes_read > self._head_size:
            self._read.feed(data[max(0, self._head_size - start) :])

    def _rest_of(self, data: bytes) -> bytes:
        """Return what is frames of what is written: all behind the head of an upgrade."""
        self._head += data
        if not self._head.startswith(self._begins) or b"\r\n\r\n" not in self._head:
            return b""
        head, _, rest = self._head.partition(b"\r\n\r\n")
        self._head_size = len(head) + 4
        if self._from_client:
            if rest:
                self._rules.problems.append("frames are sent before the upgrade is accepted")
            return b""  # frames follow once it is accepted
        self.is_framed = True
        self._rules.upgraded()
        return rest
