"""A simulated TCP connection: transports of asyncio at both ends, and bytes that take their time between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, cast

_RESET = "the simulated link was cut"

# A system notices after a while that the other one is silent: nothing that it sends is received.
KEEPALIVE_S = 100.0


@dataclass(frozen=True, slots=True)
class LinkSpec:
    delay_s: float  # of a piece, each way
    capacity: int  # bytes on their way or unread by the receiver, as in the buffers of two sockets
    piece: int  # a read brings so many bytes at most
    cut_after: tuple[int | None, int | None] = (None, None)  # bytes towards the worker, and back
    silent_after: tuple[int | None, int | None] = (None, None)  # from then on nothing arrives

    @property
    def is_silenced(self) -> bool:
        return self.silent_after != (None, None)

    @property
    def is_whole(self) -> bool:
        return not self.is_silenced and self.cut_after == (None, None)


class Watch:
    """It sees the bytes of a link: when they are written, and when they are read."""

    def __init__(self) -> None:
        self.towards_worker: Way = Way()
        self.towards_orchestrator: Way = Way()


class Way:
    """One direction, as it is watched."""

    def written(self, data: bytes) -> None: ...

    def read(self, data: bytes) -> None: ...


class Pipe:
    """One direction of a link: in order, whole, late."""

    def __init__(self, link: Link, source: SimTransport, sink: SimTransport, place: int) -> None:
        self._link = link
        self._source, self._sink = source, sink
        self._spec = link.spec
        self._cut_after, self._silent_after = link.spec.cut_after[place], link.spec.silent_after[place]
        self._loop = asyncio.get_running_loop()
        self._flying: deque[bytes] = deque()
        self._taken = 0  # bytes on their way or unread
        self._arrived = 0
        self._due = 0.0  # when the last piece arrives: none overtakes it
        self._is_delivering = False
        self._has_ended = False  # the source has written its end
        self._is_silent = False

    def pump(self) -> None:
        """Send what the source has written, as far as there is room."""
        unsent = self._source.unsent
        while unsent and (room := self._spec.capacity - self._taken) > 0:
            size = min(room, len(unsent), self._link.random.randint(1, self._spec.piece))
            piece = bytes(unsent[:size])
            del unsent[:size]
            self._fly(piece)
        if self._source.is_ending and not unsent and not self._has_ended:
            self._has_ended = True
            self._fly(b"")

    def deliver(self) -> None:
        """Give the sink what has arrived, as long as it reads."""
        if self._is_delivering:
            return
        self._is_delivering = True
        while self._flying and self._arrived and self._sink.reads and not self._is_silent:
            self._arrived -= 1
            self._hand_over(self._flying.popleft())
        self._is_delivering = False
        if self._arrived and self._sink.is_lost and not self._is_silent:
            self._source.lose(ConnectionResetError(_RESET))
            return
        self.pump()
        self._source.drained()

    def _fly(self, piece: bytes) -> None:
        self._flying.append(piece)
        self._taken += len(piece)
        jitter = self._spec.delay_s * self._link.random.random() / 4
        self._due = max(self._due, self._loop.time() + self._spec.delay_s + jitter)
        self._loop.call_at(self._due, self._arrive)

    def _arrive(self) -> None:
        self._arrived += 1
        self.deliver()

    def _hand_over(self, piece: bytes) -> None:
        self._taken -= len(piece)
        if not piece:
            self._sink.take_end()
            return
        if self._silent_after is not None:
            piece = piece[: self._silent_after]
            self._silent_after -= len(piece)
            if not self._silent_after:
                self._is_silent = True
                self._loop.call_later(KEEPALIVE_S, self._link.cut)
        if self._cut_after is not None:
            piece = piece[: self._cut_after]
            self._cut_after -= len(piece)
            if not self._cut_after:
                self._loop.call_soon(self._link.cut)
        if piece:
            self._sink.take(piece)


class Link:
    """Both ends of a connection. `watch` sees the bytes of each end as they are written, and as they are
    read at the other one.
    """

    def __init__(self, spec: LinkSpec, random: Random, watch: Watch | None = None) -> None:
        self.spec = spec
        self.random = random
        self.is_cut = False
        self.client = SimTransport(self, ("orchestrator", 1), ("worker", 80))
        self.server = SimTransport(self, ("worker", 80), ("orchestrator", 1))
        to_server = Pipe(self, self.client, self.server, 0)
        to_client = Pipe(self, self.server, self.client, 1)
        self.client.connect(to_server, to_client, watch and watch.towards_worker)
        self.server.connect(to_client, to_server, watch and watch.towards_orchestrator)

    def cut(self) -> None:
        """Break the connection; both ends are told, one of them some time after the other."""
        if not self.is_cut:
            self.is_cut = True
            late, early = self.random.sample((self.client, self.server), 2)
            early.lose(ConnectionResetError(_RESET))
            asyncio.get_running_loop().call_later(
                self.random.choice((0, self.spec.delay_s)), late.lose, ConnectionResetError(_RESET)
            )


class SimTransport(asyncio.Transport):
    """One end. It calls its protocol as the event loop's own transports do."""

    def __init__(self, link: Link, name: tuple[str, int], peer: tuple[str, int]) -> None:
        super().__init__({"sockname": name, "peername": peer})
        self.unsent = bytearray()
        self.is_ending = False  # no byte follows
        self.errors: list[BaseException] = []  # that the protocol has raised: bugs
        self.writes = 0
        self._loop = asyncio.get_running_loop()
        self._link = link
        self._protocol: Any = None
        self._high, self._low = 64 * 1024, 16 * 1024
        self._is_full = False  # the protocol was told to pause
        self._is_reading = True
        self._is_closing = False
        self.is_lost = False

    def connect(self, out: Pipe, into: Pipe, watch: Way | None) -> None:
        self._out, self._into = out, into
        self._watch = watch

    def start(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._call("connection_made", self)

    # --- for the pipes --------------------------------------------------------------------------

    @property
    def reads(self) -> bool:
        return self._is_reading and not self._is_closing and not self.is_lost

    def take(self, data: bytes) -> None:
        peer = self._link.server if self is self._link.client else self._link.client
        if peer._watch is not None:
            peer._watch.read(data)
        self._call("data_received", data)

    def take_end(self) -> None:
        if not self._call("eof_received"):
            self.close()

    def drained(self) -> None:
        """Note that room was made."""
        if self._is_full and len(self.unsent) <= self._low and not self.is_lost:
            self._is_full = False
            self._call("resume_writing")
        if self._is_closing and not self.unsent and not self.is_lost:
            self.lose(None)

    def lose(self, error: Exception | None) -> None:
        """Have the connection be over for this end, if it is not yet."""
        if not self.is_lost:
            self.is_lost = self._is_closing = True
            self.unsent.clear()
            self._loop.call_soon(self._call, "connection_lost", error)

    # --- asyncio.Transport ----------------------------------------------------------------------

    def write(self, data: Any) -> None:
        if self.is_ending and not self._is_closing:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.is_lost or self._is_closing or not data:
            return
        data = bytes(data)
        self.writes += 1
        if self._watch is not None:
            self._watch.written(data)
        self.unsent += data
        self._out.pump()
        if len(self.unsent) > self._high and not self._is_full:
            self._is_full = True
            self._call("pause_writing")

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self.is_ending = True
        if not self.is_lost:
            self._out.pump()

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = self.is_ending = True
            self._out.pump()
            if not self.unsent:
                self.lose(None)

    def abort(self) -> None:
        if not self.is_lost:
            self.lose(None)
            peer = self._link.client if self is self._link.server else self._link.server
            self._loop.call_later(self._link.spec.delay_s, peer.lose, ConnectionResetError(_RESET))

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return self.reads

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True
        self._loop.call_soon(self._into.deliver)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def get_write_buffer_size(self) -> int:
        return len(self.unsent)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = 64 * 1024 if low is None else 4 * low
        self._high, self._low = high, high // 4 if low is None else low

    # --- inside ---------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._protocol, name)(*arguments)
        except Exception as error:
            self.errors.append(error)
            self.lose(error)
            return None


class Listener:
    """A worker's port: who connects gets a link, if the worker listens."""

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.BaseProtocol],
        make_link: Callable[[], Link],
    ) -> None:
        self.is_up = True
        self.links: list[Link] = []
        self._make_protocol = make_protocol
        self._make_link = make_link

    async def connect(
        self, factory: Callable[[], asyncio.BaseProtocol], *place: Any, **options: Any
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Do what the event loop's `create_connection` does."""
        link = self._make_link()
        await asyncio.sleep(2 * link.spec.delay_s)
        if not self.is_up:
            raise ConnectionRefusedError(111, "Connection refused")
        self.links.append(link)
        link.server.start(self._make_protocol())
        protocol = factory()
        link.client.start(protocol)
        return link.client, protocol
