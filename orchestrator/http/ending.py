"""A connection ends behind its last answer, or at once: for another one, or as its client is too slow."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
from typing import Final

from orchestrator.errors import RequestTimeout
from orchestrator.http.deadlines import NEVER, Deadlines
from orchestrator.http.intake import Receiver
from orchestrator.http.reader import Reader

logger: Final = logging.getLogger("baton.server")

_LEFT: Final = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)  # the last one is Linux's
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER


class Ending(Receiver):
    """This is the part of a client connection that closes it; `connection.py` has the rest."""

    _transport: asyncio.Transport
    _reader: Reader
    _deadlines: Deadlines
    _is_closing: bool

    # --- the crowd's side

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def give_way(self) -> None:
        self.cut(resets=False)

    # --- ending

    def _close(self) -> None:
        self._reader.is_deaf = True
        self._is_closing = True
        self._deadlines.await_writes()
        self._transport.close()

    def linger(self) -> None:
        """Close behind the answer, but read on for a while.

        Closing a socket with unread data sends a reset, and that may destroy the answer on its way.
        """
        self._reader.is_deaf = True
        self._is_closing = True
        self._reader.incoming = None
        self._reader.resume()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._deadlines.linger()

    def cut(self, *, resets: bool) -> None:
        self._reader.is_deaf = True
        self._is_closing = True
        if resets:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._transport.abort()

    # --- the sweep's side

    def expire(self, now: float) -> None:
        """Act on a deadline that has passed. It may be left over from an earlier phase."""
        active, reader = self.active, self._reader
        if self._is_closing or (self.is_write_paused and (active is None or active is not reader.incoming)):
            self._check_progress(now)
        elif active is None:
            self._expire_idle()
        elif active is reader.incoming and not (reader.is_paused or active.body.awaits_continue):
            reader.break_off(RequestTimeout("the request's body came too slowly"))
        elif active is reader.incoming and reader.is_paused:
            self._look_for_client()
        else:
            self._deadlines.at = NEVER

    def _look_for_client(self) -> None:
        """Close if the client has left, which is not heard while nothing is read; else look again soon."""
        if _has_left(self._transport):
            self._transport.abort()

    def _expire_idle(self) -> None:
        if self._reader.in_head:
            self._reader.break_off_head()
        else:
            self._close()

    def _check_progress(self, now: float) -> None:
        """Cut a client off that takes too little of what is written to it."""
        if self._is_closing and not self._transport.get_write_buffer_size():
            self._transport.abort()  # the kernel goes on sending
            return
        lag = self._deadlines.lag(now)
        if lag is not None:
            logger.info("%s is cut off: it took %d bytes, and %d wait", self.addresses.client, *lag)
            self.cut(resets=True)  # or the kernel would keep what it has, for as long as the client likes


def _has_left(transport: asyncio.Transport) -> bool:
    """Return whether the other side has closed, as far as its kernel has told ours: an end waits behind
    what was sent before it, a reset does not.
    """
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _LEFT)
    return bool(poll.poll(0))
