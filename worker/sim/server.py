"""Faults need two things of uvicorn: the connection within reach, and a listener that can go away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from worker.sim.api import REFUSE_KEY
from worker.sim.faults import Refuse
from worker.sim.links import TRANSPORT_KEY, Link, reset, whole


class SimProtocol(HttpToolsProtocol):
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][TRANSPORT_KEY] = self.transport


class SimServer(uvicorn.Server):
    """It serves `app` on `listener`, which it closes when it stops.

    `on_ready` gets its URL when it takes requests.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, on_ready: Callable[[str], None] = lambda url: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=SimProtocol,
            loop="uvloop",
            lifespan="on",
            access_log=False,
            date_header=not app.state.sim.settings.defects.clock_offset_s,  # else `WrongClock` gives it
            log_level="warning",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=3,
        )
        super().__init__(config)
        self._listener = listener
        self._on_ready = on_ready
        self._engines = app.state.sim.engines
        self._refusals = [fault for fault in app.state.sim.settings.faults if isinstance(fault, Refuse)]
        self.address: tuple[str, int] = listener.getsockname()[:2]
        setattr(app.state, REFUSE_KEY, self.refuse)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets or [self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.address
        self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        for refusal in self._refusals:
            self.refuse(refusal.seconds)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is under way with `abort`, as that of a vLLM that is stopped does."""
        for engine in self._engines:
            for end in list(engine.under_way.values()):
                end()
        await super().shutdown(sockets)

    def refuse(self, seconds: float, spared: Link | None = None) -> None:
        """Let nobody listen for so long, and reset all connections but the spared one."""
        for server in self.servers:
            server.close()
        self.servers = []
        kept = None if spared is None else whole(spared)
        for connection in list(self.server_state.connections):
            transport: Any = getattr(connection, "transport", None)
            if transport is not None and transport is not kept:
                reset(transport)
        asyncio.get_running_loop().call_later(seconds, self._relisten_soon)

    def _relisten_soon(self) -> None:
        relistening = asyncio.ensure_future(self._relisten())
        self.server_state.tasks.add(relistening)
        relistening.add_done_callback(self.server_state.tasks.discard)

    async def _relisten(self) -> None:
        loop = asyncio.get_running_loop()
        self.servers = [await loop.create_server(self._protocol, sock=listen(*self.address))]

    def _protocol(self) -> SimProtocol:
        return SimProtocol(self.config, self.server_state, self.lifespan.state)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock
