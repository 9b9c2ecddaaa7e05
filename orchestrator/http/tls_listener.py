"""A TLS listener accepts connections that begin with a handshake, and bounds how long and how many those are.

The event loop's own listeners tell of a connection when its handshake has ended, so nobody could count those
that have not, nor close one to make room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final

from orchestrator.http.crowd import Crowd
from orchestrator.http.tls import Certificate

ACCEPTED_AT_ONCE: Final = 64  # connections in one turn of the event loop
PAUSE_S: Final = 0.5  # in which nothing is accepted, when this machine lacks what that takes

logger: Final = logging.getLogger("baton.server")


class TlsListener:
    """It accepts connections from a socket until it is closed. Handshakes under way then go on."""

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        certificate: Certificate,
        crowd: Crowd,
        handshake_s: float,
    ) -> None:
        """Each connection gets a protocol of `make`. A handshake that takes longer than `handshake_s` seconds
        is cut off, and so is the oldest when they and the `crowd` are as many as there may be.

        `listener` stays the caller's. This is made inside the running event loop.
        """
        self._listener = listener
        self._make = make
        self._certificate = certificate
        self._crowd = crowd
        self._handshake_s = handshake_s
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], None] = {}  # in the order of arrival
        self._resuming: asyncio.TimerHandle | None = None
        self._is_closed = False
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no further connection. This can be repeated."""
        self._is_closed = True
        self._loop.remove_reader(self._listener)
        if self._resuming is not None:
            self._resuming.cancel()

    async def wait_closed(self) -> None:
        """Return at once, as nothing is left to wait for."""

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            client.setblocking(False)
            self._begin(client)

    def _pause(self, error: OSError) -> None:
        """Wait for others to give back what is lacking: the socket would stay readable all the time."""
        logger.warning("no connection can be accepted for now: %s", error)
        self._loop.remove_reader(self._listener)
        self._resuming = self._loop.call_later(PAUSE_S, self._resume)

    def _begin(self, client: socket.socket) -> None:
        if len(self._crowd.open) + len(self._handshakes) >= self._crowd.most and self._handshakes:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()
        task = self._loop.create_task(self._shake_hands(client))
        self._handshakes[task] = None
        task.add_done_callback(lambda task: self._handshakes.pop(task, None))

    async def _shake_hands(self, client: socket.socket) -> None:
        with contextlib.suppress(
            OSError, asyncio.CancelledError
        ):  # TLS errors are OSErrors: clients' affairs
            await self._loop.connect_accepted_socket(
                self._make, client, ssl=self._certificate.context, ssl_handshake_timeout=self._handshake_s
            )
