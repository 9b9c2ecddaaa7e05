"""The worker of a run: the real end of its connections, beneath uvicorn's protocols, and an application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from orchestrator.wire.streams import UPGRADE_PATH
from tests.simulation.streams.content import answer_body
from tests.simulation.streams.schedule import App, RequestSpec
from tests.simulation.trace import Trace

PROTOCOLS: dict[str, Any] = {"h11": H11Protocol, "httptools": HttpToolsProtocol}


class AppFails(Exception):
    """What the application raises when it is told to."""


@dataclass(slots=True)
class Call:
    """One request as the application sees it."""

    number: int
    began: float
    method: str
    body: bytearray = field(default_factory=bytearray)
    is_body_whole: bool = False
    waits: float | None = None  # since when it waits for its client to leave, with nothing else to do
    left: float | None = None  # when it was told that the client has left
    sent: int = 0  # bytes of its answer that it has handed over
    ended: float | None = None
    has_answered: bool = False  # wholly


class Application:
    """An ASGI application that does with each request what its schedule says."""

    def __init__(self, requests: tuple[RequestSpec, ...], trace: Trace) -> None:
        self.calls: list[Call] = []
        self.wrong: list[str] = []
        self.refusal: int | None = None  # the status of answers to upgrades
        self._specs = {request.number: request for request in requests}
        self._trace = trace
        self._time = asyncio.get_running_loop().time

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is spoken here")
        if scope["path"] == UPGRADE_PATH:
            await _empty(send, self.refusal or 101)
            return
        number = int(scope["path"].removeprefix("/v1/r"))
        call = Call(number, self._time(), scope["method"])
        self.calls.append(call)
        self._check(scope, number)
        self._trace.add("worker", f"begins with {number}")
        try:
            await _Answering(self._specs[number], call, receive, send).run()
        finally:
            call.ended = self._time()
            self._trace.add("worker", f"has ended {number}: {call.sent} bytes, left {call.left}")

    def _check(self, scope: Any, number: int) -> None:
        fields = dict(scope["headers"])
        if fields.get(b"x-number") != b"%d" % number or not fields.get(b"host"):
            self.wrong.append(f"request {number} has the fields {fields}")
        if scope["method"] != self._specs[number].method or scope["query_string"] != b"q=%d" % number:
            self.wrong.append(f"request {number} is {scope['method']} {scope['query_string']!r}")


class _Answering:
    """One call of the application."""

    def __init__(self, spec: RequestSpec, call: Call, receive: Any, send: Any) -> None:
        self._spec, self._call = spec, call
        self._receive, self._send = receive, send
        self._time = asyncio.get_running_loop().time

    async def run(self) -> None:
        app = self._spec.app
        await asyncio.sleep(self._spec.app_waits_s)
        if app in (App.RAISE_BEFORE, App.RETURN_BEFORE):
            self._give_up(app)
        elif app is App.NO_BODY:
            await _empty(self._send, 204)
            self._call.has_answered = True
        elif app is App.WAIT:
            await self._until_left()
        elif app is App.ANSWER_WHILE_READING:
            await asyncio.gather(self._read(), self._answer())
        else:
            if app is App.READ_THEN_ANSWER:
                await self._read()
            await self._answer()

    async def _answer(self) -> None:
        spec, midway = self._spec, len(self._spec.answer) // 2
        fields = [(b"x-answer", b"%d" % spec.number)]
        await self._send({"type": "http.response.start", "status": 200, "headers": fields})
        for place, size in enumerate(spec.answer):
            if place == midway and self._is_over_midway():
                return
            if place == midway and spec.app is App.WAIT_MIDWAY:
                await self._until_left()
            await asyncio.sleep(spec.app_sends_every)
            await self._piece(size)
        await self._send({"type": "http.response.body", "body": b""})
        self._call.has_answered = True

    def _is_over_midway(self) -> bool:
        if self._spec.app in (App.RAISE_MIDWAY, App.RETURN_MIDWAY):
            self._give_up(self._spec.app)
            return True
        return False

    async def _piece(self, size: int) -> None:
        sent = self._call.sent
        piece = answer_body(self._spec.number, sent + size)[sent:]
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        self._call.sent += size

    def _give_up(self, app: App) -> None:
        if app in (App.RAISE_BEFORE, App.RAISE_MIDWAY):
            raise AppFails

    async def _read(self) -> None:
        call = self._call
        while not call.is_body_whole and call.left is None:
            await asyncio.sleep(self._spec.app_reads_every)
            self._take(await self._receive())

    async def _until_left(self) -> None:
        self._call.waits = self._time()
        while self._call.left is None:
            self._take(await self._receive())

    def _take(self, message: Any) -> None:
        if message["type"] == "http.disconnect":
            self._call.left = self._time()
        else:
            self._call.body += message["body"]
            self._call.is_body_whole = not message["more_body"]


async def _empty(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


class Server:
    """uvicorn's part of a worker: it makes a protocol for each connection, and stops in order.

    `wrap` puts the worker's end of multiplexed connections around an application.
    """

    def __init__(self, application: Application, http: str, wrap: Callable[[Any], Any]) -> None:
        self.state = ServerState()
        self._protocol = PROTOCOLS[http]
        self._config = Config(wrap(application), log_config=None, lifespan="off", http=http, ws="none")
        self._config.load()

    def make_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._protocol(
            config=self._config,
            server_state=self.state,
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        return protocol

    def stop(self) -> None:
        """Ask all connections to end once their requests have, as uvicorn's own server does."""
        for connection in list(self.state.connections):
            connection.shutdown()
