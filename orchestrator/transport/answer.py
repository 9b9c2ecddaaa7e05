"""A reader has a worker's answer in this, whatever brings it.

A connection pushes (`begin`, `receive`, `fail`), a reader pulls (`head`, `chunk`, `read`) or lets itself be
pushed (`pump`). In between there is one list of unread pieces and one future: no task, queue or timer.
"""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final

from orchestrator.errors import BatonError, WorkerCutShort, WorkerGarbage

# Takes one piece of a body; False asks for a pause until `Answer.resume()`.
Sink = Callable[[bytes], bool]

# A connection is read no further past so many unread bytes. One read brings up to 256 KiB, so this is the
# order of what a slow reader can hold up per leg.
HIGH_WATER: Final = 64 * 1024

# So many unread pieces are made one: a worker may send single bytes, each of which is an object of its own.
_MAX_PIECES: Final = 1024

_NEVER: Final = sys.maxsize  # as "wake me at": only at the end


class Answer(ABC):
    """An answer is a worker's response to one leg, from the moment the leg is sent.

    Whoever holds it must read it to the end or `abort()` it; a cancelled `head()`, `chunk()` or `read()` does
    not abort, so that the holder can still see what has arrived. One reader at a time.

    `status` is 0 until the head has arrived. `headers` have lower-case names; a repeated field keeps its last
    value.

    Subclasses tell the connection to stop and go on (`_pause_reading`, `_resume_reading`) and to close, half
    (`_close_sending`) or wholly (`_drop`); all must do nothing once the answer is complete or has failed.
    """

    __slots__ = (
        "_error",
        "_is_held",
        "_is_stale",
        "_loop",
        "_pieces",
        "_sink",
        "_size",
        "_waiter",
        "_wake_at",
        "arrivals",
        "headers",
        "is_complete",
        "status",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.is_complete = False  # the whole body has arrived; it may still be unread
        self.arrivals = 0  # reads that brought something of it, however much
        self._loop = loop
        self._pieces: list[bytes] = []  # arrived and unread, _size bytes in all
        self._size = 0
        self._error: BaseException | None = None  # a WorkerError, OutOfResources, or what a sink raised
        self._waiter: asyncio.Future[None] | None = None
        self._wake_at = 0  # wake the reader at this many unread bytes
        self._sink: Sink | None = None
        self._is_held = False  # the connection is told not to read
        self._is_stale = False  # nothing will come unless `_ask_again()` is awaited

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "failed" if self._error else "open"
        return f"<{type(self).__name__} {self.status} {state}, {self._size} bytes unread>"

    # --- for the reader -------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """So many bytes of the body have arrived, and nobody has taken them."""
        return self._size

    async def head(self) -> None:
        """Wait for `status` and `headers`. It may be called again, also after it was cancelled.

        Informational (1xx) heads are skipped. Raises `WorkerCutShort` if the connection ends first,
        `WorkerGarbage` if what came is not HTTP/1. A reused connection found closed before any response byte
        is replaced here, once, by a fresh one to the same origin.
        """
        while not self.status:
            await self._more(0)

    async def chunk(self) -> bytes:
        """Return the next piece of the body as it arrived, without framing; b"" at the end, and after it.

        Does not suspend when something is there; what arrived in several pieces meanwhile comes as one.
        Waits for the head first if need be. Raises `WorkerCutShort` if the connection ends before the body
        does, `WorkerGarbage` if the framing is broken. What arrived before the failure is delivered first.
        """
        while not self._size and not self.is_complete:
            await self._more(1)
        return self._take()

    async def read(self, limit: int) -> bytes:
        """Return the whole rest of the body. Raises as `chunk()` does, and `WorkerGarbage` past `limit`
        bytes.

        Nothing is lost when it is cancelled or raises: what had arrived stays unread.
        """
        while self._size <= limit and not self.is_complete:
            await self._more(limit + 1)
        if self._size > limit:
            raise WorkerGarbage("the worker's answer is too large")
        return self._take()

    def body_nowait(self) -> bytes | None:
        """Return all that is unread, if the body is complete; else None, and nothing is taken."""
        return self._take() if self.is_complete else None

    async def pump(self, sink: Sink) -> None:
        """Hand every further piece to `sink` the moment it arrives; returns at the end of the body.

        `sink` is called synchronously from the event loop's read callback (first, from here, with what is
        already there), never with b"", never twice at once. After it returned False it is not called
        again, and the worker's connection is not read, until `resume()`; a pause at the last piece is
        ignored. Raises as `chunk()` does. An exception out of `sink` aborts the answer and is raised from
        here; cancelling aborts too.
        """
        try:
            await self.head()
            await self._pump(sink)
        except BaseException:
            self.abort()
            raise
        finally:
            self._sink = None

    def resume(self) -> None:
        """Go on: `sink` can take more. It may be called from inside this call. No effect unless paused."""
        if self._is_held and self._sink is not None:
            self._is_held = False
            self._offer_unread(self._sink)
            if not self._is_held:
                self._resume_reading()
            self._wake()

    def leave(self) -> None:
        """Tell the worker that the answer is not wanted any more, and still take one that is on its way.

        Closes the sending half of the connection, which a server takes for the client's leaving. Read on, or
        `abort()`, as before. TLS has no such half: there it does nothing.
        """
        if not self.is_complete and self._error is None:
            self._close_sending()

    def abort(self) -> None:
        """Give the answer up: closes the connection unless the answer is complete. It may be called again.

        A reader that waits, or comes later, gets `WorkerCutShort`.
        """
        is_pumping = self._sink is not None and bool(self._pieces)
        if not self.is_complete or is_pumping:
            self._error = self._error or WorkerCutShort("the leg was given up")
            self._clear()
            self._drop()
            self._wake()

    # --- for the connection ---------------------------------------------------------------------

    def begin(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Note that the head has arrived. `receive()` must follow, if only with b"": it wakes the reader."""
        self.status = status
        self.headers = headers

    def receive(self, data: bytes, is_complete: bool) -> None:
        """Take the body part of one read, without framing, which may be empty; `is_complete` if nothing
        follows.
        """
        self.is_complete = is_complete
        self.arrivals += 1
        if data:
            sink = self._sink
            if sink is None or self._is_held:
                self._keep(data)
            else:
                self._offer(sink, data)
        if is_complete or self._size >= self._wake_at:
            waiter = self._waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def fail(self, error: BatonError) -> None:
        """End the answer here, incomplete. Later failures change nothing."""
        if self._error is None and not self.is_complete:
            self._error = error
        self._wake()

    # --- for the subclass -----------------------------------------------------------------------

    @abstractmethod
    def _pause_reading(self) -> None: ...

    @abstractmethod
    def _resume_reading(self) -> None: ...

    @abstractmethod
    def _close_sending(self) -> None: ...

    @abstractmethod
    def _drop(self) -> None: ...

    async def _ask_again(self) -> None:
        """Send the request once more, and clear `_is_stale`; what goes wrong is told by `fail()`."""
        raise NotImplementedError

    def _news(self, wake_at: int) -> asyncio.Future[None]:
        """Return a future that is done when `wake_at` bytes are unread, or something else worth a look has
        happened.
        """
        if self._waiter is not None and not self._waiter.done():
            raise RuntimeError("an answer has one reader at a time")
        self._waiter = self._loop.create_future()
        self._wake_at = wake_at
        if self._is_held and self._sink is None and self._size < wake_at:
            self._let_go()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- inside ---------------------------------------------------------------------------------

    def _more(self, wake_at: int) -> Awaitable[None]:
        """Return what to await for `_news`, or for a stale request to be sent again. Raises the answer's
        error.
        """
        if self._error is not None:
            raise self._error
        return self._ask_again() if self._is_stale else self._news(wake_at)

    async def _pump(self, sink: Sink) -> None:
        self._sink = sink
        self._is_held, was_held = False, self._is_held
        self._offer_unread(sink)
        if was_held and not self._is_held:
            self._resume_reading()
        while self._pieces or not (self.is_complete or self._error):
            await self._news(_NEVER)
        if self._error is not None:
            raise self._error

    def _offer_unread(self, sink: Sink) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._clear()
            self._offer(sink, data)

    def _offer(self, sink: Sink, data: bytes) -> None:
        try:
            wants_more = sink(data)
        except BaseException as error:
            self._error = error
            self._drop()
            self._wake()
        else:
            if not wants_more:
                self._hold()

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if len(self._pieces) > _MAX_PIECES:
            self._pieces = [b"".join(self._pieces)]
        if self._size > HIGH_WATER and self._size >= self._wake_at:
            self._hold()

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._size = 0
        if self._is_held:
            self._let_go()
        return data

    def _clear(self) -> None:
        self._pieces.clear()
        self._size = 0

    def _hold(self) -> None:
        if not (self._is_held or self.is_complete):
            self._is_held = True
            self._pause_reading()

    def _let_go(self) -> None:
        self._is_held = False
        self._resume_reading()
