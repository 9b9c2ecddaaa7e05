"""A server of ours on loopback, and a client that writes and reads raw bytes."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from orchestrator.errors import BatonError
from orchestrator.http.asgi import AsgiExchange
from orchestrator.http.connection import Shared
from orchestrator.http.cors import Cors
from orchestrator.http.exchange import Exchange, Handler
from orchestrator.http.ids import IdSource
from orchestrator.http.limits import ServerLimits
from orchestrator.http.listeners import Protocols

PATIENCE_S = 30.0  # how long anything may take; tests wait for events, not for this

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
SOON = 0.1  # a deadline that tests wait for
LAX = ServerLimits(header_timeout_s=3600, body_idle_timeout_s=3600, body_timeout_s=3600, sweep_s=0.01)
SMALL = replace(LAX, max_body_bytes=1000, drain_bytes=5000)

Main = Callable[[], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Main], None]]:
    """Runs a coroutine function to its end, on each of the event loops."""
    with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
        yield lambda main: runner.run(asyncio.wait_for(main(), 3 * PATIENCE_S))


@pytest.fixture(autouse=True)
def no_errors_logged(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    if "logs_errors" not in request.fixturenames:
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture
def logs_errors() -> None:
    """For tests that expect an error in the log."""


def lax(**limits: Any) -> ServerLimits:
    """Limits of which only the given ones may be reached."""
    return replace(LAX, **limits)


class Everywhere(dict[str, Handler]):
    """One handler for every path of our own server; for others, an ASGI application."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self._handler = handler

    def get(self, path: str, default: Any = None) -> Handler:
        return self._handler

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with AsgiExchange(scope, receive, send) as exchange:
            await self._handler(exchange)


def app_of(handler: Handler) -> Everywhere:
    return Everywhere(handler)


async def echo(exchange: Exchange) -> None:
    """Says what arrived."""
    body = await exchange.read_body()
    seen = {"method": exchange.method, "path": exchange.path, "body": body.decode("latin-1")}
    exchange.respond(200, [(b"content-type", b"application/json")], json.dumps(seen).encode())


def echo_after(gate: asyncio.Event, *, method: str = "") -> Handler:
    """It echoes once the gate is open; only requests with this method wait for that, if one is given."""

    async def gated(exchange: Exchange) -> None:
        if method in ("", exchange.method):
            await gate.wait()
        await echo(exchange)

    return gated


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool = True  # False: the connection ended within the body

    @property
    def closes(self) -> bool:
        return self.headers.get("connection") == "close"

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json()["error"]


class RawClient:
    """One connection. Its parser is deliberately plain, and strict about what our server may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def send_all(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, data: bytes, *, is_head: bool = False) -> Answer:
        self.send(data)
        return await self.answer(is_head=is_head)

    async def answer(self, *, is_head: bool = False) -> Answer:
        async with asyncio.timeout(PATIENCE_S):
            status, headers = await self.head()
            if status == 100:
                return Answer(status, headers, b"")
            body, is_whole = (b"", True) if is_head or status in (204, 304) else await self._body(headers)
            return Answer(status, headers, body, is_whole)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].split(b"\r\n")
        assert not any(b"\n" in line or b"\r" in line for line in [first, *lines])
        version, status, _ = first.split(b" ", 2)
        assert version == b"HTTP/1.1"
        pairs = [line.decode("latin-1").split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), "a header came twice"
        return int(status), headers

    async def _body(self, headers: dict[str, str]) -> tuple[bytes, bool]:
        if "content-length" in headers:
            body = await self._up_to(int(headers["content-length"]))
            return body, len(body) == int(headers["content-length"])
        if headers.get("transfer-encoding") == "chunked":
            return await self._chunks()
        return await self.rest()

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        except (asyncio.IncompleteReadError, ConnectionError):
            return body, False
        return body, True

    async def _up_to(self, size: int) -> bytes:
        try:
            return await self.reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            return error.partial

    async def rest(self) -> tuple[bytes, bool]:
        """Everything up to the end of the connection; False if that was a reset."""
        data = b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while piece := await self.reader.read(65536):
                    data += piece
        except ConnectionError:
            return data, False
        return data, True

    async def is_closed(self) -> bool:
        """Wait for the server's end of the connection; nothing may come before it."""
        data, _ = await self.rest()
        assert data == b"", data
        return True

    def half_close(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """Close so that the server gets a reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@dataclass
class Site:
    """A listening server without uvicorn's, so that it starts and stops at once."""

    port: int
    state: ServerState
    protocol: Any
    refused: list[BatonError] = field(default_factory=list)
    refused_names: list[tuple[str, str]] = field(default_factory=list)  # their ids and paths

    @asynccontextmanager
    async def client(self, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        limit = 2**16 if receive_buffer is None else 1024
        client = RawClient(*await asyncio.open_connection(sock=sock, limit=limit))
        try:
            yield client
        finally:
            await client.close()

    async def ask(self, data: bytes) -> Answer:
        async with self.client() as client:
            return await client.ask(data)

    @property
    def is_empty(self) -> bool:
        return not self.state.connections and not self.state.tasks and not self.protocol.shared.sweep.open


@asynccontextmanager
async def serving(
    app: App | Everywhere, limits: ServerLimits = LAX, cors: Cors | None = None, **options: Any
) -> AsyncIterator[Site]:
    """A server for `app`; when it ends, no connection and no task may be left."""
    loop = asyncio.get_running_loop()
    refused: list[BatonError] = []
    names: list[tuple[str, str]] = []

    def note(error: BatonError, request_id: str, path: str) -> None:
        refused.append(error)
        names.append((request_id, path))

    handlers = app if isinstance(app, Everywhere) else {}
    protocol = Protocols(Shared(limits, IdSource(Random(1)), note, handlers, cors))
    options = {"timeout_keep_alive": 3600, **options}
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, interface="asgi3", **options
    )
    config.load()
    state = ServerState()
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    site = Site(server.sockets[0].getsockname()[1], state, protocol, refused, names)
    try:
        yield site
        await until(lambda: site.is_empty)
    finally:
        server.close()
        for connection in list(state.connections):
            connection._transport.abort()  # type: ignore[attr-defined]
        for task in list(state.tasks):
            task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens on this loop but says so to nobody."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # nobody sets an event for it
            await asyncio.sleep(0.001)


def check_error(answer: Answer, status: int) -> None:
    assert answer.status == status
    assert answer.is_whole
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(answer.error) == {"message", "type", "param", "code"}


def post(body: bytes, *headers: bytes, path: bytes = b"/echo") -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


def chunked(*chunks: bytes, path: bytes = b"/echo") -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
GET = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"
