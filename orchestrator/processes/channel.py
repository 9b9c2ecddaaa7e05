"""The supervisor and a data-plane process talk over one socketpair.

A message is a msgpack document behind its length. When the other side is gone, `receive` says so: that is
how a data-plane process learns that its supervisor has died, whatever became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Generic, Self, TypeVar

import msgspec

from orchestrator.config.keys import Key
from orchestrator.processes.membership import Report, Snapshot
from orchestrator.processes.sharing import Shared
from orchestrator.telemetry.events import Event
from orchestrator.telemetry.query import RequestQuery

LENGTH_BYTES = 4
MOST_UNREAD = 1024 * 1024  # bytes that wait for the other side before an offer is dropped


# --- to a data-plane process --------------------------------------------------------------------


class Start(msgspec.Struct, tag=True, kw_only=True):
    """The first message tells a process all that it has to know; it reads no file but the certificates."""

    index: int  # as the admin pages show it; the successor of a process has the same
    row: int  # the one that it may write to
    rows: int  # how many there are
    row_size: int  # cells; differs if the supervisor runs another version of the code
    slots: int  # for workers, in each row
    config: bytes  # JSON
    transport: str
    started: float  # when the supervisor did, `time.time()`
    keys: list[Key] | None
    snapshot: Snapshot
    salt: int = 0  # of the log of decisions
    sender: str = ""  # what this orchestrator calls itself to workers
    key_names: list[str] = []  # whose cells come one after the other in each row, see `KeyTable`


class Reconfigured(msgspec.Struct, tag=True):
    """The process is to serve by another config, and other keys; snapshots tell of workers."""

    config: bytes  # JSON
    keys: list[Key] | None
    key_names: list[str] = []


class Replaced(msgspec.Struct, tag=True):
    """Another process serves instead: this one takes no connections and ends when its last one is closed."""


class Stop(msgspec.Struct, tag=True):
    """The process is to drain and end, within `timeout_graceful_shutdown`."""


class Cut(msgspec.Struct, tag=True):
    """The process is to end now; open requests are cut."""


class Explain(msgspec.Struct, tag=True, kw_only=True):
    """The process is to tell what would become of a request (`control.state.RouteQuestion`)."""

    number: int  # of the question: the answer has the same
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    avoid: tuple[str, ...]


class FindRequests(msgspec.Struct, tag=True, kw_only=True):
    """The process is to tell which requests of its own match."""

    number: int  # of the question: the answer has the same
    query: RequestQuery


ToProcess = Start | Snapshot | Reconfigured | Replaced | Stop | Cut | Shared | Explain | FindRequests


# --- to the supervisor --------------------------------------------------------------------------


class ServingBegun(msgspec.Struct, tag=True):
    """The process accepts connections."""


class ReplacementDue(msgspec.Struct, tag=True):
    """The process has served as many requests as it should: it wants to be replaced, and serves on until
    then.
    """


class Explained(msgspec.Struct, tag=True):
    """This is the answer to an `Explain`."""

    number: int
    status: int
    content: bytes


class RequestsFound(msgspec.Struct, tag=True):
    """This is the answer to a `FindRequests`."""

    number: int
    content: bytes  # a list, as JSON


class Noted(msgspec.Struct, tag=True):
    """The process has seen something that the person on call wants to know."""

    event: Event


ToSupervisor = ServingBegun | ReplacementDue | Report | Shared | Explained | RequestsFound | Noted

# --- the channel --------------------------------------------------------------------------------

Incoming = TypeVar("Incoming")


class Channel(Generic[Incoming]):
    """A channel is one end of the socketpair; messages are sent without waiting, and read by one task."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[Incoming],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    async def open(cls, end: socket.socket, decoder: msgspec.msgpack.Decoder[Incoming]) -> Self:
        """Return a channel that takes `end` over: `close` closes it."""
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, decoder)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message; nothing happens if the other side is gone."""
        if not self._writer.is_closing():
            document = self._encoder.encode(message)
            self._writer.write(len(document).to_bytes(LENGTH_BYTES, "big") + document)

    def offer(self, message: msgspec.Struct) -> None:
        """Send a message that may be lost: it is dropped if the other side has left much unread."""
        if self._writer.transport.get_write_buffer_size() <= MOST_UNREAD:
            self.send(message)

    async def drain(self) -> None:
        """Wait until the other side has read most of what was sent, or is gone."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    async def receive(self) -> Incoming | None:
        """Return the next message; None when the other side is gone."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def close(self) -> None:
        self._writer.close()
