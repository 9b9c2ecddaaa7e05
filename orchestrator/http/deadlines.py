"""A deadline says until when a client may leave a connection as it is.

Every connection carries one moment, and one timer per server looks at all of them every
`ServerLimits.sweep_s`. No request and no chunk arms a timer, so deadlines are met with that resolution.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
import time
from collections.abc import Callable
from typing import Final

from orchestrator.http.date import DateLine
from orchestrator.http.limits import ServerLimits

NEVER: Final = float("inf")
ANY_SIZE: Final = sys.maxsize
LINGER_S = 5.0  # how long to read on after the last answer, so that a reset does not overtake it
# In bytes: over a minute that is a tenth of what a stream of 20 tokens a second needs.
MIN_TAKEN: Final = 16 * 1024


class Sweep:
    """A server has this one timer, which runs while connections are open; it also keeps the date."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.date = DateLine()
        self.date.refresh(time.time())
        self.open: dict[Deadlines, Callable[[float], None]] = {}  # and what to call when they have passed
        self._is_armed = False

    def add(self, deadlines: Deadlines, expire: Callable[[float], None]) -> None:
        """Have `expire` called with the loop's time, at each sweep after the deadline."""
        self.open[deadlines] = expire
        if not self._is_armed:
            self._arm(deadlines.loop)

    def discard(self, deadlines: Deadlines) -> None:
        """Do not look at these deadlines any more. This can be repeated."""
        self.open.pop(deadlines, None)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = True
        self.date.refresh(time.time())
        loop.call_later(self._interval_s, self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_armed = False
        if self.open:
            self._arm(loop)
        now = loop.time()
        for expire in [call for deadlines, call in self.open.items() if deadlines.at <= now]:
            expire(now)


class Deadlines:
    """A connection has one deadline: each method sets it for what is waited for from now on.

    It may be left over from an earlier phase: what it was for, whoever is told of its end finds out.
    """

    _paused_at = 0.0
    _unsent_before = ANY_SIZE  # bytes, when the sweep last looked

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: ServerLimits, keep_alive_s: float) -> None:
        self.loop = loop
        self._limits = limits
        self._keep_alive_s = keep_alive_s
        self.at = NEVER  # by the loop's clock
        self.began = 0.0  # when the present head or body began; 0.0 until it is known to need a deadline

    def connected(self, transport: asyncio.Transport) -> None:
        """Wait for a head from a client that has connected."""
        self._transport = transport
        self.at = self.loop.time() + self._limits.header_timeout_s

    def rest(self, in_head: bool) -> None:
        """Wait for the next request, as none is in progress. `in_head`: it has begun to come in."""
        now = self.loop.time()
        if in_head:
            self.began = now
            self.at = now + self._limits.header_timeout_s
        else:
            self.at = now + self._keep_alive_s

    def await_head(self) -> None:
        """Wait for the rest of a head, whatever else has come of it meanwhile."""
        if not self.began:
            self.began = self.loop.time()
            self.at = self.began + self._limits.header_timeout_s

    def await_body(self) -> None:
        """Wait for more of a body."""
        now = self.loop.time()
        self.began = self.began or now
        self.at = min(now + self._limits.body_idle_timeout_s, self.began + self._limits.body_timeout_s)

    def await_whole_body(self) -> None:
        """Wait for a body of which the client has not known so far that it may send it."""
        self.began = 0.0
        self.await_body()

    def pause(self) -> None:
        """Stop the clock: nothing is read from now on."""
        self._paused_at = self.loop.time()

    def look_soon(self) -> None:
        """Have the next sweep, and all that follow, look whether the client is still there."""
        self.at = self.loop.time()

    def forgive_pause(self) -> None:
        """Wait for more of a body; the time for which it was not read was not the client's."""
        if self.began:  # else it has begun to be waited for in the pause
            self.began += self.loop.time() - self._paused_at
        self.await_body()

    # --- what the client takes

    def await_writes(self) -> None:
        """Wait for the client to take what was written to it."""
        self._unsent_before = self._unsent()
        self.at = self.loop.time() + self._limits.write_timeout_s

    def linger(self) -> None:
        """Wait for the client to close the connection."""
        self._unsent_before = ANY_SIZE
        self.at = self.loop.time() + LINGER_S

    def lag(self, now: float) -> tuple[int, int] | None:
        """Return how many bytes a client took since the last look and how many are pending, if it took too
        few.

        Else return None: it is to take more from now on. Nothing is written meanwhile.
        """
        unsent = self._unsent()
        taken = self._unsent_before - unsent
        if taken < MIN_TAKEN:
            return max(0, taken), unsent
        self._unsent_before = unsent
        self.at = now + self._limits.write_timeout_s
        return None

    def _unsent(self) -> int:
        """Return the bytes that the client has not taken: here and in the kernel, which takes them from here
        in large steps, however evenly they leave.
        """
        return self._transport.get_write_buffer_size() + _unacknowledged(self._transport)


def _unacknowledged(transport: asyncio.BaseTransport) -> int:
    """Return the bytes in the kernel's send buffer; 0 where it does not tell."""
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)
