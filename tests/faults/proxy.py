"""A TCP proxy that spoils connections on request, in the spirit of toxiproxy.

What spoils them are toxics. Each is added to one direction of a running proxy, or to both; it works on the
connections that are open and on those that come, until it is removed. Several in one direction work one after
the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import enum
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal, Self

Direction = Literal["upstream", "downstream"]  # to the target, from the target
DIRECTIONS: tuple[Direction, Direction] = ("upstream", "downstream")
Address = tuple[str, int]
Send = Callable[[bytes], Awaitable[None]]

_READ_BYTES = 65536
_QUEUED_READS = 16  # how much is under way at once: a target that does not read stops the source
_TICK_S = 0.05  # a bandwidth is spent in pieces of so long
_START_LIMIT_S = 60.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, no seconds


class Ending(enum.Enum):
    CLOSED = enum.auto()  # FIN
    RESET = enum.auto()  # RST


# --- toxics -------------------------------------------------------------------------------------


class Toxic:
    """Changes nothing; each kind overrides what it changes.

    One that is added to a proxy is a pattern: each direction of each connection gets a copy of its own.
    """

    refuses: ClassVar[bool] = False  # whether nobody listens while it is there
    _pipe: Pipe  # these two: a copy's
    _removed: asyncio.Event

    def attached(self, pipe: Pipe) -> Self:
        own = copy.copy(self)
        own._pipe = pipe
        own._removed = asyncio.Event()
        own.start()
        return own

    def detach(self) -> None:
        self._removed.set()
        self.stop()

    async def pause(self, seconds: float) -> None:
        """Ends early when the toxic is removed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._removed.wait()

    # what kinds override

    def start(self) -> None:
        """The connection is made, or the toxic is added to it."""

    def stop(self) -> None:
        """The toxic is removed, or the connection is over."""

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        """`arrived` is when the proxy read `data`, in the event loop's time."""
        await send(data)

    async def hold_ending(self) -> None:
        """Return when the end of the stream may be passed on."""


@dataclass(eq=False)
class Latency(Toxic):
    """All arrives later, as if the way were longer: how much is under way at once is not changed."""

    delay_s: float
    jitter_s: float = 0.0
    seed: int = 0

    def start(self) -> None:
        self._delays = self.delays()

    def delays(self) -> Iterator[float]:
        """Of one read after the other: the same for the same seed."""
        random = Random(self.seed)
        while True:
            yield self.delay_s + random.uniform(-self.jitter_s, self.jitter_s)

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        await self.pause(arrived + next(self._delays) - _now())
        await send(data)


@dataclass(eq=False)
class Bandwidth(Toxic):
    bytes_per_s: float

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        for piece in _pieces(data, max(1, int(self.bytes_per_s * _TICK_S))):
            await self.pause(len(piece) / self.bytes_per_s)
            await send(piece)


@dataclass(eq=False)
class Slicer(Toxic):
    """Small pieces, with a pause after each."""

    size: int
    pause_s: float

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        for piece in _pieces(data, self.size):
            await send(piece)
            await self.pause(self.pause_s)


@dataclass(eq=False)
class SlowClose(Toxic):
    """The end of the stream arrives later; what comes before does not."""

    delay_s: float

    async def hold_ending(self) -> None:
        await self.pause(self.delay_s)


@dataclass(eq=False)
class _Cut(Toxic):
    """Ends the connection after so many bytes, counted from when it meets the connection; 0: at once."""

    after_bytes: int
    ending: ClassVar[Ending]

    def start(self) -> None:
        self._left = self.after_bytes
        self._end_if_due()

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        allowed = data[: self._left]
        self._left -= len(allowed)
        if allowed:
            await send(allowed)
        self._end_if_due()

    def _end_if_due(self) -> None:
        if self._left == 0:
            self._pipe.cut(self.ending)


class Limit(_Cut):
    ending = Ending.CLOSED


class Reset(_Cut):
    ending = Ending.RESET


@dataclass(eq=False)
class Timeout(Toxic):
    """Swallows everything, the end of the stream too; closes the connection after a while, or never.

    When it is removed, connections that have lost bytes are reset: TCP never leaves a hole in a stream.
    """

    after_s: float | None = None

    def start(self) -> None:
        self._has_swallowed = False
        self._timer: asyncio.TimerHandle | None = None
        if self.after_s is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.after_s, self._pipe.cut, Ending.CLOSED)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._has_swallowed:
            self._pipe.cut(Ending.RESET)

    async def pass_on(self, data: bytes, arrived: float, send: Send) -> None:
        self._has_swallowed = True

    async def hold_ending(self) -> None:
        await self._removed.wait()


@dataclass(eq=False)
class Down(Toxic):
    """Connections are refused, and those that are open are reset."""

    refuses = True

    def start(self) -> None:
        self._pipe.cut(Ending.RESET)


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _now() -> float:
    return asyncio.get_running_loop().time()


# --- connections --------------------------------------------------------------------------------


class Pipe:
    """One direction of a connection."""

    def __init__(self, connection: _Connection, source: socket.socket, target: socket.socket) -> None:
        self._connection = connection
        self._source = source
        self._target = target
        self._queue: asyncio.Queue[tuple[bytes | Ending, float]] = asyncio.Queue(_QUEUED_READS)
        self._toxics: dict[Toxic, Toxic] = {}  # by their patterns
        self.is_over = False

    def attach(self, toxic: Toxic) -> None:
        self._toxics[toxic] = toxic.attached(self)

    def detach(self, toxic: Toxic) -> None:
        if own := self._toxics.pop(toxic, None):
            own.detach()

    def detach_all(self) -> None:
        for toxic in tuple(self._toxics):
            self.detach(toxic)

    def cut(self, ending: Ending) -> None:
        self._connection.cut(ending)

    async def read(self) -> None:
        """From the source, until it ends."""
        while True:
            data = await self._receive()
            await self._queue.put((data, _now()))
            if isinstance(data, Ending):
                return

    async def _receive(self) -> bytes | Ending:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._source, _READ_BYTES)
        except OSError:
            return Ending.RESET
        return data or Ending.CLOSED

    async def write(self) -> None:
        """What was read, through the toxics to the target; at last the end."""
        while True:
            data, arrived = await self._queue.get()
            if isinstance(data, Ending):
                await self._end(data)
                return
            await self._pass_on(tuple(self._toxics.values()), data, arrived)

    async def _pass_on(self, toxics: tuple[Toxic, ...], data: bytes, arrived: float) -> None:
        if not toxics:
            await self._send(data)
        else:
            first, *others = toxics
            await first.pass_on(data, arrived, lambda piece: self._pass_on(tuple(others), piece, _now()))

    async def _send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._target, data)
        except OSError:  # the target is gone: so is the way back
            self.cut(Ending.RESET)

    async def _end(self, ending: Ending) -> None:
        for toxic in tuple(self._toxics.values()):
            await toxic.hold_ending()
        if ending is Ending.RESET:
            self.cut(ending)
        else:
            self._close_target()

    def _close_target(self) -> None:
        with contextlib.suppress(OSError):  # it is gone
            self._target.shutdown(socket.SHUT_WR)
        self.is_over = True
        self._connection.note_end()


class _Connection:
    """Two pipes, until both have ended or one is cut."""

    def __init__(self, client: socket.socket, target: socket.socket) -> None:
        self._sockets = (client, target)
        self._pipes: dict[Direction, Pipe] = {
            "upstream": Pipe(self, client, target),
            "downstream": Pipe(self, target, client),
        }
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    def attach(self, toxic: Toxic, directions: tuple[Direction, ...]) -> None:
        for direction in directions:
            self._pipes[direction].attach(toxic)

    def detach(self, toxic: Toxic) -> None:
        for pipe in self._pipes.values():
            pipe.detach(toxic)

    async def run(self) -> None:
        ending = Ending.RESET
        try:
            ending = await self._run_pipes()
        finally:
            for pipe in self._pipes.values():
                pipe.detach_all()
            for sock in self._sockets:
                _close(sock, ending)

    async def _run_pipes(self) -> Ending:
        async with asyncio.TaskGroup() as group:
            steps = [step for pipe in self._pipes.values() for step in (pipe.read(), pipe.write())]
            work = [group.create_task(step) for step in steps]
            ending = await self._ended
            for task in work:
                task.cancel()
        return ending

    def cut(self, ending: Ending) -> None:
        """Once it has ended, this does nothing."""
        if not self._ended.done():
            self._ended.set_result(ending)

    def note_end(self) -> None:
        """A pipe is over."""
        if all(pipe.is_over for pipe in self._pipes.values()):
            self.cut(Ending.CLOSED)


def _close(sock: socket.socket, ending: Ending) -> None:
    if ending is Ending.RESET:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    sock.close()


# --- the proxy ----------------------------------------------------------------------------------


class FaultProxy:
    """Passes connections on to `target`, in a thread of its own, for as long as it is entered.

    Its methods are for other threads. What they do is done when they return.
    """

    def __init__(self, target: Address) -> None:
        self._target = target
        # Bound and never listening: it keeps the port for us while nobody listens there.
        self._placeholder = _bound(("127.0.0.1", 0))
        self.address: Address = self._placeholder.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._toxics: dict[Toxic, tuple[Direction, ...]] = {}
        self._is_running = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_running.wait(_START_LIMIT_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._placeholder.close()

    @contextlib.contextmanager
    def toxic(self, toxic: Toxic, *directions: Direction) -> Iterator[None]:
        """While the block runs; in both directions if none is given."""
        self.add(toxic, *directions)
        try:
            yield
        finally:
            self.remove(toxic)

    def add(self, toxic: Toxic, *directions: Direction) -> None:
        self._call(lambda: self._add(toxic, directions or DIRECTIONS))

    def remove(self, toxic: Toxic) -> None:
        self._call(lambda: self._remove(toxic))

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def _call(self, act: Callable[[], None]) -> None:
        async def call() -> None:
            act()

        asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    # --- in the thread --------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        async with asyncio.TaskGroup() as self._tasks:
            self._listen_or_not()
            self._is_running.set()
            await self._stopped.wait()
            self._add(Down(), DIRECTIONS)  # also for what is just being connected

    def _add(self, toxic: Toxic, directions: tuple[Direction, ...]) -> None:
        self._toxics[toxic] = directions
        self._listen_or_not()
        for connection in self._connections:
            connection.attach(toxic, directions)

    def _remove(self, toxic: Toxic) -> None:
        del self._toxics[toxic]
        self._listen_or_not()
        for connection in self._connections:
            connection.detach(toxic)

    def _listen_or_not(self) -> None:
        if any(toxic.refuses for toxic in self._toxics):
            self._stop_listening()
        elif self._listener is None:
            self._listen()

    def _listen(self) -> None:
        listener = self._listener = _bound(self.address)
        listener.listen()
        self._loop.add_reader(listener, self._accept, listener)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it has left again
            client, _ = listener.accept()
            self._tasks.create_task(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        target = socket.socket()
        for sock in (client, target):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pieces stay pieces
        try:
            await self._loop.sock_connect(target, self._target)
        except OSError:
            _close(client, Ending.RESET)
            target.close()
        else:
            await self._run(_Connection(client, target))

    async def _run(self, connection: _Connection) -> None:
        self._connections.add(connection)
        for toxic, directions in self._toxics.items():
            connection.attach(toxic, directions)
        try:
            await connection.run()
        finally:
            self._connections.remove(connection)


def _bound(address: Address) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setblocking(False)
    sock.bind(address)
    return sock
