"""A body holds what comes in of a request's body on a connection of our own server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from orchestrator.errors import BatonError, ClientGone
from orchestrator.http.carrier import Carrier
from orchestrator.http.exchange import BodySource
from orchestrator.http.waiters import Callback, Waiters

HIGH_WATER: Final = 256 * 1024  # unread bytes after which who reads piece by piece stops the reading
# So many pieces are joined: an object for every few bytes costs many times more.
MAX_PIECES: Final = 4096


class Body(BodySource):
    """A body holds pieces until they are read: at once, or one by one, but not both.

    The connection says what comes by `take()`, `end()`, `fail()` and `leave()`.
    """

    __slots__ = (
        "_connection",
        "_is_read_whole",
        "_runs",
        "_unread",
        "awaits_continue",
        "counted",
        "failure",
        "is_cut",
        "is_discarding",
        "is_received",
        "pieces",
        "waiters",
    )

    def __init__(self, connection: Carrier, awaits_continue: bool) -> None:
        self._connection = connection
        self.awaits_continue = awaits_continue  # the client waits for "100 Continue" before it sends the body
        self.is_received = False  # the request has been read to its end
        self.is_discarding = False  # nobody will read the rest
        self.is_cut = False  # the client left before all of it had come
        self.failure: BatonError | None = None  # why else the rest will not be had
        self.waiters: Waiters | None = None  # for more, or for the end
        self.pieces: list[bytes] = []  # that nobody has read
        self._runs: tuple[bytes, ...] = ()  # pieces, joined
        self._is_read_whole = False
        self._unread = 0  # bytes, of who reads one by one
        self.counted = 0  # bytes that are counted as held: only of bodies that do not come at once

    # --- what is read

    async def read(self, is_answered: bool) -> bytes:
        """Return the whole body; see `Exchange.read_body()`. `is_answered`: the answer has begun."""
        if self._is_read_whole:
            raise RuntimeError("the body was read before")
        self._is_read_whole = True
        if not self.is_received:
            await self._receive(is_answered)
        if self.counted:
            self.release()
        if self.failure is not None:
            raise self.failure
        if self.is_cut:
            raise ClientGone("the client left")
        pieces, self.pieces = [*self._runs, *self.pieces] if self._runs else self.pieces, []
        return b"".join(pieces)

    async def _receive(self, is_answered: bool) -> None:
        if not self._is_over():
            self.want(is_answered)
        while not self._is_over():
            await self.wait()

    def _is_over(self) -> bool:
        return self.is_received or self.is_cut or self.failure is not None

    def read_piece(self) -> bytes:
        """Return what has come since the last piece was read."""
        pieces, self.pieces = self.pieces, []
        self._unread = 0
        if self.counted:
            self.release()
        return b"".join(pieces)

    @property
    def is_taken(self) -> bool:
        return self.is_received and not self.pieces

    def on_more(self, callback: Callable[[], None] | None) -> None:
        self.waiters = None if callback is None else Callback(callback)

    def take_some(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        if self.is_cut:
            raise ClientGone("the client left")
        if not self.is_received:
            self.want(is_answered=False)
        return self.read_piece() if self.pieces else b""

    def want(self, is_answered: bool) -> None:
        """Have the client send the body, and the connection read it. Call this while more is to come."""
        connection = self._connection
        if self.awaits_continue and not is_answered:
            self.awaits_continue = False
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.await_whole_body()
        connection.resume_reading()

    async def wait(self) -> None:
        """Wait until something happens to the body, or to its request."""
        if self.waiters is None:
            self.waiters = Waiters()
        await self.waiters.wait()

    # --- what comes

    def take(self, piece: bytes) -> None:
        self.awaits_continue = False
        if self.is_discarding:
            return
        self.pieces.append(piece)
        if self._is_read_whole:
            if len(self.pieces) > MAX_PIECES:
                self._runs += (b"".join(self.pieces),)
                self.pieces.clear()
        else:
            self._unread += len(piece)
            if self._unread > HIGH_WATER:
                self._connection.pause_reading()
            if self.waiters is not None:
                self.waiters.wake()

    def end(self) -> None:
        """Note that the body is whole."""
        self.is_received = True
        self.awaits_continue = False
        if self.waiters is not None:  # not by a call: this is every request's
            self.waiters.wake()

    def fail(self, error: BatonError) -> None:
        """Note that `error` keeps the rest of the body from coming."""
        self.discard()
        if self.failure is None:
            self.failure = error
        self._wake()

    def leave(self) -> None:
        """Note that the client is gone. A body that is whole can still be read."""
        self.is_cut = not self.is_received
        self.release()
        self._wake()

    def discard(self) -> None:
        """Drop the body, as nobody will read it."""
        self.is_discarding = True
        self.pieces.clear()
        self._runs = ()
        self.release()

    # --- what is counted

    def count(self, size: int) -> int:
        """Have `size` bytes more counted as held by this body; return how many that are."""
        if self.is_discarding:
            return 0
        self.counted += size
        return size

    def release(self) -> None:
        """Have nothing counted any more: the bytes are the reader's, or dropped. This can be repeated."""
        if self.counted:
            self._connection.held.incoming -= self.counted
            self.counted = 0

    def _wake(self) -> None:
        if self.waiters is not None:
            self.waiters.wake()
