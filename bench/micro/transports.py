"""These transports cost nothing: without sockets and the kernel, what is measured is Python alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from orchestrator.transport.pool import Connect


class WorkerTransport(asyncio.Transport):
    """A worker answers whatever is written with these pieces, one in each turn of the event loop."""

    def __init__(self, protocol: asyncio.Protocol, pieces: Sequence[bytes]) -> None:
        super().__init__()
        self._protocol = protocol
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()

    def write(self, data: Any) -> None:
        self._feed(0)

    def _feed(self, at: int) -> None:
        self._loop.call_soon(self._protocol.data_received, self._pieces[at])
        if at + 1 < len(self._pieces):
            self._loop.call_soon(self._feed, at + 1)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def abort(self) -> None:
        self._loop.call_soon(self._protocol.connection_lost, None)


def connector(pieces_of: Callable[[int], Sequence[bytes]]) -> Connect:
    """Return what takes the place of the event loop's `create_connection`. A worker is known by its port."""

    async def connect(protocol_factory: Callable[[], Any], host: str, port: int, **_: Any) -> tuple[Any, Any]:
        protocol = protocol_factory()
        transport = WorkerTransport(protocol, pieces_of(port))
        protocol.connection_made(transport)
        return transport, protocol

    return connect


class ClientTransport(asyncio.Transport):
    """A client sends its request again as soon as it has a whole answer: one that ends with `end`."""

    def __init__(self, config: uvicorn.Config, request: bytes, end: bytes = b"") -> None:
        """`config` is of the server, and loaded."""
        super().__init__()
        make: Any = config.http_protocol_class
        self.protocol = make(config=config, server_state=ServerState(), app_state={})
        self._loop = asyncio.get_running_loop()
        self._request = request
        self._end = end
        self._left = 0
        self._is_at_start = True  # of an answer
        self.protocol.connection_made(self)

    def drive(self, requests: int) -> asyncio.Future[None]:
        self._left = requests
        self._done = self._loop.create_future()
        self._loop.call_soon(self.protocol.data_received, self._request)
        return self._done

    def write(self, data: Any) -> None:
        if self._is_at_start and b" 200 " not in data[:16]:
            raise RuntimeError(bytes(data[:300]).decode())
        self._is_at_start = data.endswith(self._end)
        if not self._is_at_start:
            return
        self._left -= 1
        if self._left > 0:
            self._loop.call_soon(self.protocol.data_received, self._request)
        else:
            self._done.set_result(None)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Stock uvicorn's keep-alive timer calls it."""
